"""Stops a training that no longer improves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from asynccb.callbacks.base import Callback
from asynccb.callbacks.monitor import CONDITIONED, Monitor
from asynccb.callbacks.say import say
from asynccb.callbacks.weights import copied_weights, require_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    With ``restore_best_weights`` the model has the weights of the best epoch when the training is over,
    however it came to its end: stopped here or elsewhere, or with its last epoch. After a cancel or a failure
    the weights stay as they are, and so they do if no epoch was better than none. The optimizer's state is
    not put back. Each improvement copies the weights once, inline; callbacks listed behind this one see them
    put back in their ``on_train_end``.

    Args:
        monitor: the metric to watch. Default ``"val_loss"``.
        min_delta: how much better than the best value so far a value must be, strictly. Default 0.
        patience: epochs without improvement that are one too many. Default 0.
        verbose: 1 prints ``Epoch 3: early stopping`` (1-based) at the end of the training, and which epoch's
            weights are put back. Default 0.
        mode: ``"min"``, ``"max"``, or ``"auto"`` (default): what the model knows of the metric, else what
            its name tells; see :mod:`asynccb.callbacks.monitor`. Anything else warns and means ``"auto"``.
        baseline: a value that the metric has to beat too before an improvement sets ``wait`` back. Default
            None.
        start_from_epoch: epochs before this 0-based index are not looked at. Default 0.
        restore_best_weights: put the weights of the best epoch back at the end. Needs a model with
            ``get_weights`` and ``set_weights``. Default False.

    Attributes:
        best: the best value of this training; an infinity until there is one.
        best_epoch: the 0-based epoch that had it; 0 until there is one.
        wait: epochs since it was reached.
        stopped_epoch: the 0-based epoch at whose end it stopped the training, or 0.

    Raises:
        ArgumentError: ``monitor`` is no name, or ``min_delta`` no finite number; when the training starts, a
            model whose weights cannot be put back.
    """

    changes_model: ClassVar[bool] = False
    told_apart_by: ClassVar[tuple[str, ...]] = ("monitor",)

    wait: int
    stopped_epoch: int
    best_epoch: int
    _best_weights: list[Any] | None

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
        restore_best_weights: bool = False,
    ) -> None:
        self._monitor = Monitor(
            monitor, mode, min_delta, "EarlyStopping", missing="Early stopping " + CONDITIONED
        )
        self.monitor = monitor
        self.patience = patience
        self.verbose = verbose
        self.baseline = baseline
        self.start_from_epoch = start_from_epoch
        self.restore_best_weights = restore_best_weights
        if restore_best_weights:
            self.changes_model = True  # type: ignore[misc]  # these instances do, at the end
        self._forget()

    @property
    def best(self) -> float:
        return self._monitor.best

    def on_train_begin(self, logs: Any = None) -> None:
        self._monitor.reset(self.run)
        self._forget()
        if self.restore_best_weights:
            require_weights(self.model, "restore_best_weights")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        current = self._monitor.value(logs)
        if current is None:
            self._monitor.warn_missing(logs)
            return
        if epoch < self.start_from_epoch:
            return
        self.wait += 1
        if self._monitor.improved(current):
            self.best_epoch = epoch
            if self.restore_best_weights:
                self._best_weights = copied_weights(self.model)
                for weight in self._best_weights:
                    weight.flags.writeable = False  # so that a backup need not copy it once more
            if self.baseline is None or self._monitor.is_better(current, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self._stop(epoch)

    def on_exception(self, exception: BaseException) -> None:
        self._best_weights = None

    def on_train_end(self, logs: Any = None) -> None:
        if self.stopped_epoch > 0 and self.verbose > 0:
            say(f"Epoch {self.stopped_epoch + 1}: early stopping")
        best, self._best_weights = self._best_weights, None
        if best is None:
            return
        if self.verbose > 0:
            say(f"Restoring model weights from the end of the best epoch: {self.best_epoch + 1}.")
        # Copies once more: the model may go on with these very arrays, while a backup is made of ours.
        self.model.set_weights([weight.copy() for weight in best])

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self._monitor.state_dict(),
            "wait": self.wait,
            "stopped_epoch": self.stopped_epoch,
            "best_epoch": self.best_epoch,
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._monitor.load_state_dict(state["monitor"])
        self.wait = int(state["wait"])
        self.stopped_epoch = int(state["stopped_epoch"])
        self.best_epoch = int(state["best_epoch"])
        self._best_weights = state["best_weights"] if self.restore_best_weights else None
        for weight in self._best_weights or ():
            weight.flags.writeable = False

    def _forget(self) -> None:
        self.wait = 0
        self.stopped_epoch = 0
        self.best_epoch = 0
        self._best_weights = None

    def _stop(self, epoch: int) -> None:
        self.stopped_epoch = epoch
        self.model.stop_training = True
        if self.run is not None:
            self.run.stop(
                f"EarlyStopping: {self.monitor} has not improved on {self.best:g} for {self.wait} "
                f"epoch{'s' if self.wait != 1 else ''}"
            )
