"""Stops a training that no longer improves."""

from __future__ import annotations

from typing import Any, ClassVar

from asynccb.callbacks.base import Callback
from asynccb.callbacks.monitor import CONDITIONED, Monitor
from asynccb.callbacks.say import say

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """Stops the training at the end of an epoch when a metric has stopped improving.

    Counts as Keras 3 does: each epoch first adds one to ``wait``, an improvement sets it back to 0, and the
    training stops as soon as ``wait`` reaches ``patience``. Without any improvement after the first epoch
    it stops at the 0-based epoch 1 for a ``patience`` of 0 and of 1, at epoch 2 for 2, at epoch 3 for 3;
    never in epoch 0. The stop takes effect at the end of that epoch: callbacks listed later still run, and
    see ``model.stop_training``.

    It runs inline. A training that lacks the metric goes on, with one RuntimeWarning. ``acc`` and
    ``accuracy`` find each other. An object may be used for one training after the other: each starts
    afresh.

    Args:
        monitor: the metric to watch. Default ``"val_loss"``.
        min_delta: how much better than the best value so far a value must be, strictly. Default 0.
        patience: epochs without improvement that are one too many. Default 0.
        verbose: 1 prints ``Epoch 3: early stopping`` (1-based) at the end of the training. Default 0.
        mode: ``"min"``, ``"max"``, or ``"auto"`` (default): what the model knows of the metric, else what
            its name tells; see :mod:`asynccb.callbacks.monitor`. Anything else warns and means ``"auto"``.
        baseline: a value that the metric has to beat too before an improvement sets ``wait`` back. Default
            None.
        start_from_epoch: epochs before this 0-based index are not looked at. Default 0.

    Attributes:
        best: the best value of this training; an infinity until there is one.
        wait: epochs since it was reached.
        stopped_epoch: the 0-based epoch at whose end it stopped the training, or 0.

    Raises:
        ArgumentError: ``monitor`` is no name, or ``min_delta`` no finite number.
    """

    changes_model: ClassVar[bool] = False

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        *,
        baseline: float | None = None,
        start_from_epoch: int = 0,
    ) -> None:
        self._monitor = Monitor(
            monitor, mode, min_delta, "EarlyStopping", missing="Early stopping " + CONDITIONED
        )
        self.monitor = monitor
        self.patience = patience
        self.verbose = verbose
        self.baseline = baseline
        self.start_from_epoch = start_from_epoch
        self.wait = 0
        self.stopped_epoch = 0

    @property
    def best(self) -> float:
        return self._monitor.best

    def on_train_begin(self, logs: Any = None) -> None:
        self._monitor.reset(self.run)
        self.wait = 0
        self.stopped_epoch = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        current = self._monitor.value(logs)
        if current is None:
            self._monitor.warn_missing(logs)
            return
        if epoch < self.start_from_epoch:
            return
        self.wait += 1
        if self._monitor.improved(current):
            if self.baseline is None or self._monitor.is_better(current, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self._stop(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        if self.stopped_epoch > 0 and self.verbose > 0:
            say(f"Epoch {self.stopped_epoch + 1}: early stopping")

    def _stop(self, epoch: int) -> None:
        self.stopped_epoch = epoch
        self.model.stop_training = True
        if self.run is not None:
            self.run.stop(
                f"EarlyStopping: {self.monitor} has not improved on {self.best:g} for {self.wait} "
                f"epoch{'s' if self.wait != 1 else ''}"
            )
