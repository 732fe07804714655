"""Stops a training whose loss is no number any more."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from asynccb.callbacks.base import Callback
from asynccb.callbacks.say import say

__all__ = ["TerminateOnNaN"]


class TerminateOnNaN(Callback):
    """Stops the training after the first batch whose ``loss`` is NaN or infinite.

    It looks inline, after every batch, prints ``Batch 5: Invalid loss, terminating training`` (0-based, as
    in Keras) and stops: the open epoch is ended without validation, so its mean stands in the History, and
    no other batch is trained. Logs without a loss pass.
    """

    changes_model: ClassVar[bool] = False

    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = logs.get("loss") if logs else None
        if loss is None or _is_finite(loss):
            return
        say(f"Batch {batch}: Invalid loss, terminating training")
        self.model.stop_training = True
        if self.run is not None:
            self.run.stop(f"TerminateOnNaN: the loss of batch {batch} is {loss}")


def _is_finite(loss: Any) -> bool:
    if loss.__class__ is float:  # what a run logs; it is asked after every batch
        return math.isfinite(loss)
    return bool(np.isfinite(loss).all())
