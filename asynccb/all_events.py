"""The events of many runs as one stream.

A run's events are read only while somebody reads here; then there is one task for each run that is alive,
which ends when that run's stream does.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from asynccb.bus.readers import Readers
from asynccb.events import Gap, RunChanged, RunEvent
from asynccb.wiring import tell

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Iterable

    from asynccb.bus.readers import EventStream
    from asynccb.events import Event
    from asynccb.run import Run

__all__ = ["AllEvents"]

STRIDE = 64
"""Events of one run that are read without a break: 0.3 ms."""


class AllEvents:
    """All methods are called on the loop.

    Args:
        replay: events kept for readers that come late.
        begun: the runs whose events are to be read when the first reader comes.
        moved: called when a task here has ended.
    """

    def __init__(self, replay: int, begun: Callable[[], Iterable[Run]], moved: Callable[[], None]) -> None:
        self._readers = Readers(replay, self._readers_changed)
        self._begun = begun
        self._moved = moved
        self._tasks: dict[Run, asyncio.Task[None]] = {}
        self._read_to: dict[Run, int] = {}
        self._seq = 0

    @property
    def busy(self) -> bool:
        """Whether a task here is still alive."""
        return bool(self._tasks)

    def open(self, context: contextvars.Context) -> None:
        """``context``: in which runs are read, which is not that of a reader: he may be inside of a hook of
        one."""
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

    def close(self) -> None:
        """Streams end when they have read what is there."""
        self._readers.close()

    def stream(self, since: int | None, allowed: Callable[[], None]) -> EventStream:
        """Where nobody has read for a while, what the runs' rings still have of that time comes first, unless
        it is wanted from now on only."""
        if since is None and not self._readers.wanted:
            self._read_to.clear()
        return self._readers.open(since, self._seq, allowed)

    def tell(self, run: Run, event: Event | Gap | RunChanged) -> None:
        self._readers.append(RunEvent(self._seq, run.name, event))
        self._seq += 1
        self._readers.wake()

    def begins(self, run: Run) -> None:
        """Called before the run's first event."""
        if self._readers.wanted:
            self._follow(run, 0)

    def ended(self, run: Run) -> None:
        """Its outcome is the last that is said of it: here, or by the task that still reads it."""
        if run not in self._tasks:
            self._say_outcome(run)

    def _say_outcome(self, run: Run) -> None:
        self._read_to.pop(run, None)
        self.tell(run, RunChanged(run.state))

    def _readers_changed(self) -> None:
        # A stream may be dropped by the garbage collector, on any thread.
        if threading.get_ident() != self._loop_thread:
            tell(self._loop, self._readers_changed)
        elif self._readers.wanted:
            for run in self._begun():
                if run not in self._tasks:
                    self._follow(run, self._read_to.get(run))
        else:
            # Forgotten at once: a reader that comes before they have ended needs others.
            tasks, self._tasks = self._tasks, {}
            for run, task in tasks.items():
                task.cancel()
                if run.ended:
                    self._say_outcome(run)

    def _follow(self, run: Run, since: int | None) -> None:
        task = self._loop.create_task(
            self._forward(run, run.events(since)), name=f"events of {run.name}", context=self._context
        )
        self._tasks[run] = task
        task.add_done_callback(lambda task: self._forwarded(run, task))

    async def _forward(self, run: Run, events: EventStream) -> None:
        try:
            number = 0
            async for event in events:
                if not isinstance(event, Gap):
                    self._read_to[run] = event.seq + 1
                self.tell(run, event)
                number += 1
                if number % STRIDE == 0:  # a ring that is full of events makes nobody wait above
                    await asyncio.sleep(0)
        finally:
            await events.aclose()  # now, and not when the garbage collector finds it

    def _forwarded(self, run: Run, task: asyncio.Task[None]) -> None:
        if self._tasks.get(run) is task:
            del self._tasks[run]
            if run.ended:
                self._say_outcome(run)
        self._moved()
