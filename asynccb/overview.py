"""What an orchestrator shows of its trainings: one display for all of them.

The loop only counts and leaves lines; what is drawn, and when, is the affair of the display's own thread, so
that a terminal that does not take it holds nobody.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from asynccb.callbacks.progress import Display, Row, is_terminal, join
from asynccb.callbacks.progress_meter import duration, shown
from asynccb.errors import ArgumentError
from asynccb.text import printable

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Iterable

    from asynccb.run import Run
    from asynccb.statistics import OrchestratorStatistics

__all__ = ["Overview", "Verbosity"]

Verbosity = Literal["auto", 0, 1, 2]

INTERVAL = 0.25
"""Seconds between two drawings."""
PATIENCE = 2.0
"""Seconds that the end of the block waits for its last line to be taken."""
OTHER_ROWS = 4
"""Lines of a terminal that are left to the totals and to what is said above the rows."""


class Overview:
    """All methods are called on the loop; none blocks.

    Args:
        verbose: ``verbose`` of :class:`asynccb.Orchestrator`.
        stats: the totals.
        begun: the runs that have begun and not ended.

    Raises:
        ArgumentError: an unknown ``verbose``.
    """

    def __init__(
        self,
        verbose: Verbosity,
        stats: Callable[[], OrchestratorStatistics],
        begun: Callable[[], Iterable[Run]],
    ) -> None:
        if verbose not in ("auto", 0, 1, 2):
            raise ArgumentError("verbose", verbose, '"auto", 0, 1 or 2')
        self._verbose = verbose
        self._stats = stats
        self._begun = begun
        self._context: contextvars.Context | None = None
        self._stream: Any = None
        self._display: Display | None = None
        self._totals = Totals()
        self._rows: dict[Run, Row[Progress]] = {}
        self._ticking: asyncio.TimerHandle | None = None

    def open(self, context: contextvars.Context) -> None:
        """Decides by what ``sys.stdout`` is now. ``context``: in which rows are looked after, which is not
        that of who submits: he may be inside of a hook of a run."""
        self._context = context
        self._stream = sys.stdout
        drawable = is_terminal(self._stream)
        if self._verbose == "auto":
            self._verbose = 1 if drawable else 0
        elif self._verbose == 1 and not drawable:
            self._verbose = 2

    def submitted(self) -> None:
        """There is one more, queued."""
        if not self._verbose:
            return
        if self._display is None:
            self._display = join(self._stream)
            self._total_row = Row(self._display, "", self._totals)
        if self._verbose == 1 and self._ticking is None:
            self._look_again()

    def ended(self, run: Run) -> None:
        display = self._display
        if display is None:
            return
        if self._verbose == 2:
            self._totals.read(self._stats())
            display.say(f"{self._totals.completed}/{self._totals.total} - {_told_whatever_it_holds(run)}")
        elif run.outcome == "failed":
            display.say(_told_whatever_it_holds(run))

    async def close(self) -> None:
        """Takes everything away but the lines, says the totals, and waits until they are taken, or 2 s have
        passed."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        display, self._display = self._display, None
        if display is None:
            return
        self._totals.read(self._stats())
        display.say(self._totals.line())
        self._show_only(display, ())
        display.leave(self._total_row)
        await display.settled(PATIENCE)

    def _tick(self) -> None:
        self._ticking = None
        if self._display is None:
            return
        self._totals.read(self._stats())
        alive = self._totals.completed < self._totals.total
        if alive:
            self._display.show(self._total_row)
        else:
            self._display.hide(self._total_row)
        self._show_only(self._display, list(self._begun())[: self._room()])
        self._display.draw_soon(0.0)
        if alive:
            self._look_again()

    def _look_again(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(INTERVAL, self._tick, context=self._context)

    def _show_only(self, display: Display, runs: Iterable[Run]) -> None:
        wanted = dict.fromkeys(runs)
        for run in [run for run in self._rows if run not in wanted]:
            display.hide(self._rows.pop(run))
        for run in wanted:
            if run not in self._rows:
                self._rows[run] = Row(display, "", Progress(run))
                display.show(self._rows[run])

    def _room(self) -> int:
        """More rows than the terminal has lines could not be taken away again."""
        try:
            lines = os.get_terminal_size(self._stream.fileno()).lines
        except (AttributeError, OSError, ValueError):
            lines = 24
        return max(1, lines - OTHER_ROWS)


class Totals:
    """``12 of 40 ended``, and how many are running, queued, or have ended how."""

    def __init__(self) -> None:
        self.total = 0
        self.completed = 0
        self._counts: dict[str, int] = {}
        self._began = time.monotonic()

    def read(self, stats: OrchestratorStatistics) -> None:
        self.completed = sum(stats.ended.values())
        self.total = self.completed + stats.live + stats.queued
        self._counts = {"running": stats.live, "queued": stats.queued, **stats.ended}

    @property
    def title(self) -> str:
        return f"{self.completed} of {self.total} ended"

    def status(self) -> str:
        counts = [f"{count} {what}" for what, count in self._counts.items() if count and what != "completed"]
        return " - ".join([duration(time.monotonic() - self._began), *counts])

    def line(self) -> str:
        """``40 of 40 ended - 1:05 - 2 pruned - 1 failed``"""
        return f"{self.title} - {self.status()}"


class Progress:
    """How far a run is; read by the display's thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._farthest = 0

    @property
    def title(self) -> str:
        return printable(self._run.name)

    @property
    def total(self) -> int | None:
        params = self._params()
        epochs = params.get("epochs")
        return None if epochs is None else epochs * (params.get("steps") or 1)

    @property
    def completed(self) -> int:
        """Batches where their number is known, else epochs. Never goes back: epoch and step are not read at
        one moment."""
        steps = self._params().get("steps")
        run = self._run
        here = run.epoch * steps + run.step % steps if steps else run.epoch
        self._farthest = max(self._farthest, here)
        return self._farthest

    def status(self) -> str:
        """``Epoch 3/20 - loss: 0.5000 - val_loss: 0.6000``: the newest value of each metric."""
        epochs = self._params().get("epochs")
        epoch = f"Epoch {self._run.epoch + 1}{'' if epochs is None else f'/{epochs}'}"
        state = [] if self._run.state == "running" else [self._run.state]
        return " - ".join([epoch, *state, *shown(newest(self._run))])

    def _params(self) -> dict[str, Any]:
        return self._run.history.params or {}


def told(run: Run) -> str:
    """``lr-0.1 completed - 20 epochs - 3s - loss: 0.5000``: one line on a run that has ended."""
    said = f"{printable(run.name)} {run.outcome}"
    if run.reason:
        said += f": {printable(run.reason)}"
    epochs = len(run.history.epoch)
    seconds = sum(spent for phase, spent in run.stats.seconds.items() if phase != "queued")
    count = f"{epochs} epoch{'' if epochs == 1 else 's'}"
    return " - ".join([said, count, duration(seconds), *shown(newest(run))])


def _told_whatever_it_holds(run: Run) -> str:
    try:
        return told(run)
    except Exception:  # a user's values: whoever waits for the end of a run must not get their errors
        return f"{printable(run.name)} {run.outcome}"


def newest(run: Run) -> list[tuple[str, Any]]:
    """The last value of each metric."""
    values = {name: column[-1] for name, column in dict(run.history.history).items() if column}
    values |= run.logs
    metrics = (run.history.params or {}).get("metrics") or [
        key for key in values if key not in ("batch", "size")
    ]
    return [(name, values[name]) for name in metrics if name in values]
