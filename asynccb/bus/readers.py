"""Streams of a run's events, read from a bounded ring. A slow reader never slows the training: it gets a
Gap."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from asynccb.events import Event, Gap, RunEvent
from asynccb.protocols import QueueStatistics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["EventStream", "Readers"]


class Readers:
    """The ring of the newest events and the streams that read it.

    The training thread appends, the loop reads. The ring grows with the events; once it is full, slots are
    overwritten in turn. A reader that was overtaken notices by the count of appended events, never by looking
    at what a slot holds.

    Args:
        size: events that are kept for readers that come late or are slow.
        changed: called when the first reader comes or the last one goes, for then other events are wanted.
    """

    def __init__(self, size: int, changed: Callable[[], None]) -> None:
        self._slots: list[Any] = []
        # One slot more than is ever read: the one that is being overwritten, while the count has not yet
        # moved.
        self._all = size + 1
        self._size = size
        self._changed = changed
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self.appended = 0
        self.overtaken = 0
        self.closed = False

    def statistics(self) -> QueueStatistics:
        """Of the ring; counted are the events that were overwritten before a stream came to them, those of
        each stream."""
        return QueueStatistics(self._size, "drop_oldest", min(self.appended, self._size), self.overtaken)

    @property
    def wanted(self) -> bool:
        """Whether somebody reads now, so that events which no callback wants are to be built too."""
        return bool(self._streams)

    def append(self, event: Event | RunEvent) -> None:
        """Called by whoever holds the run's event lock."""
        appended = self.appended
        if appended < self._all:
            self._slots.append(event)
        else:
            self._slots[appended % self._all] = event
        # The count moves last: a reader that sees it finds the event in its slot.
        self.appended = appended + 1

    def open(self, since: int | None, taken: int, allowed: Callable[[], None]) -> EventStream:
        """A stream from event ``since`` on, or from now on. ``taken``: numbers given to events so far."""
        if since is None:
            stream = EventStream(self, self.appended, taken, allowed)
        else:
            stream = EventStream(self, max(0, self.appended - self._size), since, allowed)
        self._streams.add(stream)
        self._changed()
        return stream

    def close(self) -> None:
        """The run is over: streams end when they have read what is there, and nobody is told of them."""
        self.closed = True
        self._changed = _nobody
        self.wake()

    def wake(self) -> None:
        if not self._streams:  # as a rule; to go through none of them costs ten times as much
            return
        for stream in list(self._streams):
            stream.wake()

    def forget(self, stream: EventStream) -> None:
        self._streams.discard(stream)
        self._changed()

    def read(self, position: int) -> tuple[int, Event] | None:
        """The event at ``position`` or, where that is overwritten, the oldest one still there, with its
        position."""
        while position < self.appended:
            position = max(position, self.appended - self._size)
            event: Event = self._slots[position % self._all]
            if self.appended - position <= self._size:
                return position, event
        return None


def _nobody() -> None:
    """Is told that a stream came or went after the run."""


class EventStream:
    """An async iterator over a run's events. Ends after the drain of the run.

    Yields events in order, and :class:`~asynccb.Gap` where events are gone from the ring or were never built
    because nobody wanted them then.
    """

    def __init__(self, readers: Readers, position: int, seq: int, allowed: Callable[[], None]) -> None:
        self._readers = readers
        self._position = position
        self._next_seq = seq
        self._allowed = allowed
        self._bell: asyncio.Future[None] | None = None
        self._held: Event | None = None
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Event | Gap]:
        return self

    async def __anext__(self) -> Event | Gap:
        if self._held is not None:
            event, self._held = self._held, None
            return event
        while not self._closed:
            found = self._readers.read(self._position)
            if found is not None:
                position, event = found
                self._readers.overtaken += position - self._position
                self._position = position + 1
                if event.seq >= self._next_seq:
                    return self._deliver(event)
            elif self._readers.closed:
                break
            else:
                await self._wait()
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stops reading; events that only this reader wanted are no longer built."""
        if not self._closed:
            self._closed = True
            self._held = None
            self._readers.forget(self)
            self.wake()

    def wake(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def __del__(self) -> None:
        # `break` in an `async for` drops the stream without a word.
        if not self._closed:
            self._readers.forget(self)

    def _deliver(self, event: Event) -> Event | Gap:
        missing, self._next_seq = event.seq - self._next_seq, event.seq + 1
        if missing == 0:
            return event
        self._held = event
        return Gap(missing)

    async def _wait(self) -> None:
        self._allowed()
        if self._bell is not None:
            raise RuntimeError(
                "this event stream is being read by another task; open one for each: run.events()"
            )
        self._bell = asyncio.get_running_loop().create_future()
        try:
            await self._bell
        finally:
            self._bell = None
