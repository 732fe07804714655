"""Best so far: the one comparison of a watched metric that every callback with a ``monitor`` uses.

A value improves on the best one so far if it is better by more than ``min_delta``::

    min:  value + min_delta < best
    max:  value - min_delta > best

This is Keras 3's ``op(current - d, best)``, with ``d`` of the sign of the mode. It is strict: an equal value
is no improvement, and neither is one that is better by exactly ``min_delta``. ``best`` starts at the worst
infinity of its mode, therefore NaN never improves and never becomes the best, not even in the first epoch.

``mode="auto"`` asks the model first (``run.direction``). Where it does not know the metric, names with one of
the words acc, accuracy, auc, precision, recall, f1 or fmeasure in them go up, all others go down. Words end
at anything that is neither a letter nor a digit: ``val_f1_score`` goes up, ``occlusion_accent`` goes down.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

from asynccb.errors import ArgumentError
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["CONDITIONED", "Monitor", "find_key"]

Direction = Literal["min", "max"]

_UPWARD = frozenset({"acc", "accuracy", "auc", "f1", "fmeasure", "precision", "recall"})
_SPELLINGS = {"acc": "accuracy", "accuracy": "acc"}
CONDITIONED = "conditioned on metric `{monitor}` which is not available. Available metrics are: {available}"


def _other_spelling(name: str) -> str | None:
    prefix = "val_" if name.startswith("val_") else ""
    other = _SPELLINGS.get(name.removeprefix("val_"))
    return None if other is None else prefix + other


def find_key(name: str, keys: Collection[str]) -> str | None:
    """The key that ``name`` means in logs: itself, else the other spelling of acc / accuracy (``val_`` too).

    Args:
        name: what the user typed as ``monitor`` or in a file template.
        keys: the logs, or their keys.

    Returns:
        A member of ``keys``, or None.
    """
    if name in keys:
        return name
    other = _other_spelling(name)
    return other if other is not None and other in keys else None


class Monitor:
    """Watches one metric and remembers its best value. Used from one thread at a time; never blocks.

    Args:
        monitor: the metric's name in the logs.
        mode: ``"min"``, ``"max"`` or ``"auto"``; anything else warns and means ``"auto"``, as in Keras.
        min_delta: how much better a value must be; its sign does not matter, as in Keras 3.
        owner: who watches, as it stands in the warning about ``mode``.
        missing: the text of :meth:`warn_missing`, a template with ``{monitor}`` and ``{available}``. Default:
            Keras' words about a condition on a metric that is not available, beginning with ``owner``.

    Attributes:
        best: the best value of this training, a plain float; the worst infinity until there is one.
        direction: ``"min"`` or ``"max"``, decided at :meth:`reset`.

    Raises:
        ArgumentError: ``monitor`` is no string or empty, or ``min_delta`` is no finite number.
    """

    def __init__(
        self,
        monitor: str,
        mode: str = "auto",
        min_delta: float = 0.0,
        owner: str = "EarlyStopping",
        *,
        missing: str = "{owner} " + CONDITIONED,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise ArgumentError("monitor", monitor, "the name of a metric, such as 'val_loss'")
        if mode not in ("auto", "min", "max"):
            # Two frames up stands the line that made the callback.
            warnings.warn(
                f"{owner} mode {mode} is unknown, fallback to auto mode.", RuntimeWarning, stacklevel=3
            )
            mode = "auto"
        self.monitor = monitor
        self.mode = mode
        self.min_delta = _finite("min_delta", min_delta)
        self._owner = owner
        self._missing = missing
        self.reset()

    def reset(self, run: Any = None, best: float | None = None) -> None:
        """Forgets the best value and the warnings given. Call it in ``on_train_begin``.

        Args:
            run: the run, whose ``direction(metric)`` decides mode ``"auto"`` where it is known; or None.
            best: the value that is to be beaten; None: any number.
        """
        self.direction: Direction = self._decide(run)
        worst = math.inf if self.direction == "min" else -math.inf
        self.best = worst if best is None else float(best)
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """The best value and whether the warning was given, for a resumed training."""
        return {"best": self.best, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` answered; call it after :meth:`reset`."""
        self.best = float(state["best"])
        self._warned = bool(state["warned"])

    def value(self, logs: Mapping[str, Any] | None) -> float | None:
        """The watched value of this epoch as a plain float, or None where the logs lack it.

        NumPy scalars and arrays of one element count as numbers.

        Raises:
            ArgumentError: the value is not one number.
        """
        key = find_key(self.monitor, logs or ())
        if not logs or key is None or logs[key] is None:
            return None
        value = logs[key]
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(
                "monitor", self.monitor, f"a metric whose value is one number, not {value!r}"
            ) from None

    def is_better(self, value: float, than: float) -> bool:
        """True if ``value`` is better than ``than`` by more than ``min_delta``. Remembers nothing."""
        if self.direction == "min":
            return value + self.min_delta < than
        return value - self.min_delta > than

    def improved(self, value: float) -> bool:
        """True if ``value`` is better than the best one so far, and then it is the new best."""
        if not self.is_better(value, self.best):
            return False
        self.best = value
        return True

    def warn_missing(self, logs: Mapping[str, Any] | None) -> None:
        """Says in a RuntimeWarning that the metric is not in ``logs``; once in a training."""
        if self._warned:
            return
        self._warned = True
        text = self._missing.format(owner=self._owner, monitor=self.monitor, available=",".join(logs or ()))
        warnings.warn(printable(text), RuntimeWarning, stacklevel=3)

    def _decide(self, run: Any) -> Direction:
        if self.mode != "auto":
            return "min" if self.mode == "min" else "max"
        names = [self.monitor, _other_spelling(self.monitor) or self.monitor]
        for name in [*names, *(name.removeprefix("val_") for name in names)]:
            known: Direction | None = None if run is None else run.direction(name)
            if known is not None:
                return known
        words = re.split(r"[^a-z0-9]+", self.monitor.lower())
        return "min" if _UPWARD.isdisjoint(words) else "max"


def _finite(argument: str, given: float) -> float:
    try:
        number = abs(float(given))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(argument, given, "a finite number")
    return number
