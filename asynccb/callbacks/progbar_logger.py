"""ProgbarLogger: a bar for each training on a terminal, a line for each epoch everywhere else."""

from __future__ import annotations

import math
import sys
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal

from asynccb.callbacks.base import Callback, OnError, Overflow
from asynccb.callbacks.batch_hook import add_batch_end
from asynccb.callbacks.progress import Display, Row, is_terminal, join
from asynccb.callbacks.progress_meter import Meter
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asynccb.protocols import QueueStatistics

__all__ = ["ProgbarLogger"]

PATIENCE = 2.0
"""Seconds that the end of a training waits for its last line to be taken."""


class ProgbarLogger(Callback):
    """Shows how a training goes.

    ``params["verbose"]`` decides: 0 nothing at all; 1 (or ``"auto"``) a bar with count, time left and the
    means so far, and, when the epoch ends, a line that stays; 2 the lines only. Where the output is not a
    terminal (a pipe, a file, a notebook, ``TERM=dumb``), 1 gives the lines only too::

        Epoch 1/20 - 3s - loss: 1.7500 - val_loss: 1.9000

    Only metrics in ``params["metrics"]`` are shown (all numbers of the logs where that is empty); the bar's
    means are weighted by the batches' sizes, the line has the epoch's own values. Epochs count from 1.

    Trainings on one terminal share it, a row each, with their names before their lines; what a user prints
    meanwhile appears above the rows. No batch waits for the terminal, nor does the event loop: batches may be
    left out of the means when the display is behind, lines keep their order. Output that cannot be written (a
    closed or broken stream) is lost silently.

    Args:
        count_mode: ``"samples"`` (default) or ``"steps"``: what the bar counts. Data of unknown length is
            counted in steps.
        file: where to write; default: ``sys.stdout`` as it is when the training begins.
        interval: seconds between two drawings of the bars, at least. Default 0.1.

    Raises:
        ArgumentError: (a ValueError) an unknown ``count_mode``, a negative ``interval``.
    """

    changes_model: ClassVar[bool] = False
    overflow: ClassVar[Overflow] = "drop_oldest"
    on_error: ClassVar[OnError] = "disable"

    _display: Display | None = None
    _last_counts: QueueStatistics | None = None
    _row: Row[Meter] | None = None

    def __init__(
        self,
        count_mode: Literal["samples", "steps"] = "samples",
        *,
        file: IO[str] | None = None,
        interval: float = 0.1,
    ) -> None:
        if count_mode not in ("samples", "steps"):
            raise UnknownCountMode("count_mode", count_mode, '"samples" or "steps"')
        if not (interval >= 0 and math.isfinite(interval)):
            raise ArgumentError("interval", interval, "a number of seconds, not negative")
        self.count_mode = count_mode
        self.file = file
        self.interval = interval
        self._draws = is_terminal(self._stream())
        if self._draws:
            add_batch_end(self, self._on_train_batch_end)

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        counts = self._last_counts if self._display is None else self._display.statistics()
        return {} if counts is None else {"lines": counts}

    async def on_train_begin(self, logs: Any = None) -> None:
        self._leave()
        params = self.params or {}
        verbose = params.get("verbose", 1)
        if not verbose:
            return
        stream = self._stream()
        self._display = join(stream)
        self._row = Row(self._display, getattr(self.run, "name", "") or "", Meter(params, self.count_mode))
        if verbose in (1, "auto") and self._draws and is_terminal(stream):
            self._display.show(self._row)

    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._row is not None and self._display is not None:
            self._row.meter.begin(epoch)
            self._display.draw_soon(self.interval)

    async def _on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        display = self._display
        if display is not None and self._row is not None:
            self._row.meter.add(batch, logs or {})
            if monotonic() >= display.quiet_until:
                display.draw_soon(self.interval)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._row is not None and self._display is not None:
            self._display.say(self._row.named(self._row.meter.summary(logs or {})))

    async def on_train_end(self, logs: Any = None) -> None:
        display = self._leave()
        if display is not None:
            await display.settled(PATIENCE)
            self._last_counts = display.statistics()

    def state_dict(self) -> dict[str, Any]:
        return {"meter": None if self._row is None else self._row.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._row is not None and state["meter"] is not None:
            self._row.meter.load_state_dict(state["meter"])

    def _leave(self) -> Display | None:
        display, row = self._display, self._row
        self._display = self._row = None
        if display is not None and row is not None:
            display.leave(row)
            self._last_counts = display.statistics()
        return display

    def _stream(self) -> Any:
        return sys.stdout if self.file is None else self.file


class UnknownCountMode(ArgumentError):
    def __str__(self) -> str:
        return f"Unknown `count_mode`: {self.given}"
