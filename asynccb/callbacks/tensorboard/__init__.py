"""TensorBoard: the callback, what it makes of a model, and the files that real TensorBoard reads.

``callback`` decides at the ends of epochs. ``job`` runs what takes long on a thread of its own: ``layers``
looks at a copy of the model, ``histograms`` and ``images`` make records of what it finds, and ``embeddings``
saves tables for the projector. ``records`` and ``crc`` are the format, ``writer`` is the file.
"""

from asynccb.callbacks.tensorboard.callback import TensorBoard

__all__ = ["TensorBoard"]
