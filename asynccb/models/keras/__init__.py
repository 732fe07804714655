"""Keras 3: a compiled model, driven as it is. Keras is there already, as its user has made the model.

::

    model           KerasModel: what a training asks of it
      steps         Keras' own functions for a batch, and what belongs to their thread
      state         copies and files
"""

from __future__ import annotations

from asynccb.models.keras.model import KerasModel, adapt

__all__ = ["KerasModel", "adapt"]
