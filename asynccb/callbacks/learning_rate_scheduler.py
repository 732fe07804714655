"""The learning rate as a function of the epoch, and the one place that knows where a model keeps it."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from asynccb.callbacks.base import Callback
from asynccb.callbacks.say import say
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LearningRate", "LearningRateScheduler"]

_SHARE = "asynccb share of lr"


class LearningRate:
    """The learning rate of a model's optimizer: ``learning_rate`` where it has that, else ``lr``, else that
    of the first of its ``param_groups``, as torch's have them; the other groups keep their proportion to
    it.

    Raises:
        ValueError: the model has no optimizer with any of these.
    """

    def __init__(self, model: Any) -> None:
        self._optimizer = getattr(model, "optimizer", None)
        self._name = "learning_rate" if hasattr(self._optimizer, "learning_rate") else "lr"
        self._groups = None
        if not hasattr(self._optimizer, self._name):
            self._groups = getattr(self._optimizer, "param_groups", None)
            if not self._groups:
                raise ValueError('Optimizer must have a "lr" attribute.')

    @property
    def value(self) -> float:
        return float(self._groups[0]["lr"] if self._groups else getattr(self._optimizer, self._name))

    @value.setter
    def value(self, rate: float) -> None:
        if not self._groups:
            setattr(self._optimizer, self._name, rate)
            return
        before = self.value
        shares = [float(group["lr"]) / before if before else group.get(_SHARE, 1.0) for group in self._groups]
        for group, share in zip(self._groups, shares, strict=True):
            own = rate * share
            if not rate:  # no rate of 0 tells any more what it is a part of
                group[_SHARE] = share
            if hasattr(group["lr"], "fill_"):  # a tensor, which a compiled step holds on to
                group["lr"].fill_(own)
            else:
                group["lr"] = own

    def log(self, logs: Any) -> None:
        """Adds the rate to ``logs`` as ``lr``, unless another callback did so before it changed the rate."""
        if logs is not None:
            logs.setdefault("lr", self.value)


class LearningRateScheduler(Callback):
    """Sets the learning rate at the beginning of each epoch, inline, and logs it as ``lr`` at its end.

    Args:
        schedule: called as ``schedule(epoch)`` with the 0-based epoch, or as ``schedule(epoch, lr)`` with
            the present rate too. Which of the two is read from its signature, so that a TypeError inside of
            it stays visible: it gets the rate if it cannot be called without, or if its second parameter is
            named ``lr`` or ``learning_rate``. It returns the new rate: any real number, NumPy's scalars and
            0-d arrays included.
        verbose: 1 prints each rate with the 1-based epoch. Default 0.

    Raises:
        ArgumentError: ``schedule`` cannot be called in either way, or is a coroutine function.
        ValueError: at the start, a model without ``optimizer.lr`` and ``.learning_rate``; in an epoch, a
            schedule that returned None, a string, NaN or an infinity.
    """

    def __init__(self, schedule: Callable[..., Any], *, verbose: int = 0) -> None:
        self._takes_rate = _takes_rate(schedule)
        self.schedule = schedule
        self.verbose = verbose

    def on_train_begin(self, logs: Any = None) -> None:
        self._rate = LearningRate(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        answer = self.schedule(epoch, self._rate.value) if self._takes_rate else self.schedule(epoch)
        self._rate.value = rate = _real(answer)
        if self.verbose > 0:
            say(f"\nEpoch {epoch + 1}: LearningRateScheduler setting learning rate to {rate}.")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._rate.log(logs)


def _takes_rate(schedule: Callable[..., Any]) -> bool:
    if not callable(schedule) or inspect.iscoroutinefunction(schedule):
        raise ArgumentError("schedule", schedule, "a function of the epoch (`def`, not `async def`)")
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return False  # a builtin that does not tell: the page's way
    if not _binds(signature, 0, 0.0):
        if not _binds(signature, 0):
            raise ArgumentError(
                "schedule", schedule, "a function called as schedule(epoch) or schedule(epoch, lr)"
            )
        return False
    second = list(signature.parameters)[1:2]
    return not _binds(signature, 0) or second in (["lr"], ["learning_rate"])


def _binds(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _real(answer: Any) -> float:
    rate = math.nan
    if not isinstance(answer, (str, bytes)) and getattr(answer, "ndim", 0) == 0:
        try:
            rate = float(answer)
        except (TypeError, ValueError):
            pass
    if not math.isfinite(rate):
        raise ValueError(f'The output of the "schedule" function should be float. Got: {answer!r}')
    return rate
