"""PyTorch: a module with its loss and optimizer as a model. torch is imported when the first one is made.

::

    model           TorchModel: what a training asks of it
      step          one batch: forward, loss, backward, update
        metrics     by name, or as torch has them
      setting       random numbers, and what belongs to a thread
      state         copies and files
      blueprint     how another one is made of a copy
      checking      what is refused
"""

from __future__ import annotations

from asynccb.models.torch.model import TorchModel, adapt, load_weights

__all__ = ["TorchModel", "adapt", "load_weights"]
