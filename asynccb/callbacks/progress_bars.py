"""Bars on a terminal, one row for each training, drawn by rich. Used by one thread, the display's."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asynccb.callbacks.progress import Row

__all__ = ["Bars"]


class Bars:
    """The live part of a display, from construction to :meth:`stop`.

    While it lives, rich stands in for ``sys.stdout`` and ``sys.stderr`` where these are the same terminal, so
    that what a user prints appears above the bars.

    Args:
        stream: where to draw; must swallow its own errors (rich ends the process when a pipe breaks).
        stdout: ``sys.stdout`` is this terminal.
        stderr: ``sys.stderr`` is this terminal.
    """

    def __init__(self, stream: Any, *, stdout: bool, stderr: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}", markup=False),
            console=_serial_console(stream),
            auto_refresh=False,
            transient=True,  # what is to stay was said in lines
            redirect_stdout=stdout,
            redirect_stderr=stderr,
        )
        self._console = self._progress.console
        self._tasks: dict[Row[Any], Any] = {}
        with self._console:
            self._progress.start()

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def draw(self, rows: Iterable[Row[Any]]) -> None:
        """Draws these rows and no others."""
        with self._console:
            self._update(list(rows))
            self._progress.refresh()

    def _update(self, rows: list[Row[Any]]) -> None:
        for row in [row for row in self._tasks if row not in rows]:
            self._progress.remove_task(self._tasks.pop(row))
        for row in rows:
            if row not in self._tasks:
                self._tasks[row] = self._progress.add_task("", total=None, status="")
            self._progress.update(
                self._tasks[row],
                description=row.title,
                total=row.meter.total,
                completed=row.meter.completed,
                status=row.meter.status(),
            )

    def stop(self) -> None:
        """Takes the rows away and gives ``sys.stdout`` and ``sys.stderr`` back."""
        with self._console:
            self._progress.stop()


def _serial_console(stream: Any) -> Any:
    """A console whose output is written in the order in which it was worked out.

    rich works out how many rows to wipe under one lock and writes under another. A user's print on another
    thread that comes between the two wipes by the count of before, and takes a line that was to stay. ``with
    console`` surrounds both halves of everything that rich does, so that is where the lock goes; whoever
    calls rich enters there first, for rich's own locks lie inside.
    """
    from rich.console import Console

    serial = threading.RLock()

    class SerialConsole(Console):
        def __enter__(self) -> Console:
            serial.acquire()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            try:
                super().__exit__(*error)
            finally:
                serial.release()

    return SerialConsole(file=stream, force_terminal=True, force_jupyter=False)
