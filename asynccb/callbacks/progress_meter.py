"""What a progress display says of one training: count, time left, means so far. No terminal in here."""

from __future__ import annotations

import numbers
import time
from typing import TYPE_CHECKING, Any

from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Meter", "duration", "number", "shown"]


class Meter:
    """Counts of the epoch under way.

    Written by the event loop, read by the display's thread without a lock: a reading may be one batch old in
    one number and not in another, which the next drawing mends.

    Args:
        params: the callback's ``params``.
        count_mode: ``"samples"`` counts samples where their number is known (array data), else batches.
        clock: seconds, never going back.

    Attributes:
        total: samples or batches of an epoch; None where not known.
        completed: how many of them are done.
    """

    def __init__(
        self, params: Mapping[str, Any], count_mode: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        samples = params.get("samples")
        self._in_samples = count_mode == "samples" and samples is not None
        self.total: int | None = samples if self._in_samples else params.get("steps")
        self.completed = 0
        self._batch_size: int | None = params.get("batch_size")
        self._epochs = params.get("epochs")
        self._metrics: tuple[str, ...] = tuple(params.get("metrics") or ())
        self._accumulated: bool = params.get("accumulated", False)
        self._clock = clock
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """An epoch starts; ``epoch`` is 0-based."""
        self.completed = 0
        self._epoch = epoch
        self._sums = dict.fromkeys(self._metrics, 0.0)
        self._sizes = dict.fromkeys(self._metrics, 0)
        self._began = self._clock()

    def add(self, batch: int, logs: Mapping[str, Any]) -> None:
        """A batch is done. The hot path."""
        size = logs.get("size", 1)
        if not self._in_samples:
            self.completed = batch + 1
        elif self._batch_size:
            # By the index, not by summing up: batches that were dropped on the way here count all the same.
            self.completed = batch * self._batch_size + size
        else:
            self.completed += size
        for name in self._metrics:
            value = logs.get(name)
            if value is None:
                continue
            if self._accumulated:  # it is of the epoch so far, and takes the place of the one before
                self._sums[name], self._sizes[name] = value, 1
            else:
                self._sums[name] += value * size
                self._sizes[name] += size

    def state_dict(self) -> dict[str, Any]:
        """The epoch under way, for a resumed training."""
        return {
            "epoch": self._epoch,
            "completed": self.completed,
            "sums": self._sums,
            "sizes": self._sizes,
            "seconds": self._clock() - self._began,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` answered; the time in between does not count."""
        self.begin(int(state["epoch"]))
        self.completed = int(state["completed"])
        self._sums.update((name, value) for name, value in state["sums"].items() if name in self._sums)
        self._sizes.update((name, size) for name, size in state["sizes"].items() if name in self._sizes)
        self._began -= float(state["seconds"])

    @property
    def title(self) -> str:
        """``Epoch 1/20``: printed epochs count from 1."""
        of = "" if self._epochs is None else f"/{self._epochs}"
        return f"Epoch {self._epoch + 1}{of}"

    def status(self) -> str:
        """``4/10 - ETA: 1s - loss: 1.0000``: the means so far, weighted by the batches' sizes."""
        count = str(self.completed) if self.total is None else f"{self.completed}/{self.total}"
        means = {name: self._sums[name] / size for name in self._metrics if (size := self._sizes[name])}
        return " - ".join([count, self._time(), *shown(means.items())])

    def summary(self, logs: Mapping[str, Any]) -> str:
        """``Epoch 1/20 - 3s - loss: 1.7500 - val_loss: 1.9000``: the epoch's own values, not the means."""
        names: Iterable[str] = self._metrics or (name for name in logs if name not in ("batch", "size"))
        values = [(name, logs[name]) for name in names if name in logs]
        seconds = f"{int(self._clock() - self._began)}s"
        return " - ".join([self.title, seconds, *shown(values)])

    def _time(self) -> str:
        spent = self._clock() - self._began
        if not self.total or not self.completed:
            return duration(spent)
        return f"ETA: {duration(spent / self.completed * max(0, self.total - self.completed))}"


def number(value: float) -> str:
    """Four digits: ``1.7500``, and ``1.2000e-04`` up to 0.001 on either side of zero."""
    return f"{value:.4f}" if abs(value) > 1e-3 else f"{value:.4e}"


def duration(seconds: float) -> str:
    """``59s``, ``1:05``, ``1:01:05``."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def shown(values: Iterable[tuple[str, Any]]) -> list[str]:
    """``loss: 1.7500`` for each value that is a number."""
    return [
        f"{printable(name)}: {number(float(value))}"
        for name, value in values
        if isinstance(value, numbers.Real)
    ]
