"""Lowers the learning rate when a metric has stopped improving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from asynccb.callbacks.base import Callback
from asynccb.callbacks.learning_rate_scheduler import LearningRate
from asynccb.callbacks.monitor import CONDITIONED, Monitor
from asynccb.callbacks.say import say
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ReduceLROnPlateau"]

# The default by identity too: only a caller who leaves `epsilon` out passes this very object.
_EPSILON = 0.0001
# The rate counts as being at `min_lr` within this part of it; a float32 rate never meets it exactly.
_AT_FLOOR = 1e-4


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by ``factor`` when a metric has stopped improving.

    Counts as Keras 3 does: an epoch without improvement first adds one to ``wait``, and the rate drops as
    soon as ``wait`` reaches ``patience``; so on a flat metric it drops every ``patience`` epochs (0 and 1
    alike). After a drop ``cooldown`` epochs pass in which nothing is counted. The rate of the epoch, before
    any drop, is logged as ``lr``.

    It runs inline. A training that lacks the metric goes on, with one RuntimeWarning. ``acc`` and
    ``accuracy`` find each other. An object may be used for one training after the other: each starts
    afresh.

    Args:
        monitor: the metric to watch. Default ``"val_loss"``.
        factor: new rate = rate * factor; below 1. Default 0.1.
        patience: epochs without improvement that are one too many. Default 10.
        verbose: 1 prints each drop with the 1-based epoch. Default 0.
        mode: ``"min"``, ``"max"``, or ``"auto"`` (default): what the model knows of the metric, else what
            its name tells; see :mod:`asynccb.callbacks.monitor`. Anything else warns and means ``"auto"``.
        epsilon: how much better than the best value so far a value must be, strictly. Default 0.0001.
        cooldown: epochs to wait after a drop. Default 0.
        min_lr: the rate never drops below. Default 0.
        min_delta: the later name of ``epsilon``; give one of the two.

    Attributes:
        best: the best value of this training; an infinity until there is one.
        wait: epochs counted since.
        cooldown_counter: epochs of the cooldown that are left.

    Raises:
        ArgumentError: ``factor`` of 1 or more, ``epsilon`` and ``min_delta`` together, ``monitor`` no name.
        ValueError: at the start, a model without ``optimizer.lr`` and ``.learning_rate``.
    """

    told_apart_by: ClassVar[tuple[str, ...]] = ("monitor",)

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        epsilon: float = _EPSILON,
        cooldown: int = 0,
        min_lr: float = 0,
        *,
        min_delta: float | None = None,
    ) -> None:
        if factor >= 1.0:
            raise ArgumentError("factor", factor, "ReduceLROnPlateau does not support a factor >= 1.0.")
        if min_delta is not None and epsilon is not _EPSILON:
            raise ArgumentError(
                "min_delta", min_delta, "another name of epsilon, which is given too", "Give one"
            )
        self._monitor = Monitor(
            monitor,
            mode,
            epsilon if min_delta is None else min_delta,
            "Learning Rate Plateau Reducing",
            missing="Reduce LR on plateau " + CONDITIONED,
        )
        self.monitor = monitor
        self.factor = factor
        self.patience = patience
        self.verbose = verbose
        self.cooldown = cooldown
        self.min_lr = min_lr
        self.wait = 0
        self.cooldown_counter = 0

    @property
    def best(self) -> float:
        return self._monitor.best

    def on_train_begin(self, logs: Any = None) -> None:
        self._rate = LearningRate(self.model)
        self._monitor.reset(self.run)
        self.wait = 0
        self.cooldown_counter = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._rate.log(logs)
        current = self._monitor.value(logs)
        if current is None:
            self._monitor.warn_missing(logs)
            return
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.wait = 0
        if self._monitor.improved(current):
            self.wait = 0
        elif self.cooldown_counter <= 0:
            self.wait += 1
            if self.wait >= self.patience:
                self._reduce(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self._monitor.state_dict(),
            "wait": self.wait,
            "cooldown_counter": self.cooldown_counter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._monitor.load_state_dict(state["monitor"])
        self.wait = int(state["wait"])
        self.cooldown_counter = int(state["cooldown_counter"])

    def _reduce(self, epoch: int) -> None:
        old = self._rate.value
        if old <= self.min_lr * (1 + _AT_FLOOR):
            return
        self._rate.value = new = max(old * self.factor, self.min_lr)
        self.cooldown_counter = self.cooldown
        self.wait = 0
        if self.verbose > 0:
            say(f"\nEpoch {epoch + 1}: ReduceLROnPlateau reducing learning rate to {new}.")
