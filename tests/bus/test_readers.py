"""Streams of events: in order, told of what they missed, and never in the way of the training."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.bus.readers import EventStream, Readers
from asynccb.events import BatchEnd, Gap, Logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.events import Event


def event(seq: int) -> BatchEnd:
    return BatchEnd(seq, seq, Logs(), 0, seq)


class Ring:
    """Readers, and what a dispatcher would do with them."""

    def __init__(self, size: int = 8) -> None:
        self.changes = 0
        self.taken = 0
        self.readers = Readers(size, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def emit(self, count: int = 1) -> None:
        for _ in range(count):
            self.readers.append(event(self.taken))
            self.taken += 1

    def skip(self, count: int = 1) -> None:
        self.taken += count

    def open(self, since: int | None = None, allowed: Callable[[], None] = lambda: None) -> EventStream:
        return self.readers.open(since, self.taken, allowed)

    def close(self) -> None:
        self.readers.close()


async def read(stream: EventStream) -> list[Any]:
    """The numbers of the events until the end, and the gaps between them."""
    return [item if isinstance(item, Gap) else item.seq async for item in stream]


@pytest.mark.asyncio
async def test_a_reader_sees_what_comes_from_now_on_in_order_and_ends_with_the_run() -> None:
    ring = Ring()
    ring.emit(3)
    stream = ring.open()
    ring.emit(3)
    ring.close()
    assert await read(stream) == [3, 4, 5]


@pytest.mark.asyncio
async def test_since_replays_from_the_ring() -> None:
    ring = Ring()
    ring.emit(5)
    ring.close()
    assert await read(ring.open(since=2)) == [2, 3, 4]
    assert await read(ring.open(since=0)) == [0, 1, 2, 3, 4]


@pytest.mark.asyncio
async def test_a_number_past_the_end_replays_nothing() -> None:
    ring = Ring()
    ring.emit(5)
    ring.close()
    assert await read(ring.open(since=5)) == []


@pytest.mark.asyncio
async def test_events_gone_from_the_ring_are_a_gap_of_their_number() -> None:
    ring = Ring(size=4)
    ring.emit(10)
    ring.close()
    assert await read(ring.open(since=1)) == [Gap(5), 6, 7, 8, 9]


@pytest.mark.asyncio
async def test_events_that_were_never_built_are_a_gap_too() -> None:
    ring = Ring()
    stream = ring.open()
    ring.emit()
    ring.skip(7)
    ring.emit()
    ring.close()
    assert await read(stream) == [0, Gap(7), 8]


@pytest.mark.asyncio
async def test_a_slow_reader_is_overtaken_told_so_and_goes_on() -> None:
    ring = Ring(size=4)
    stream = ring.open()
    ring.emit(2)
    assert (await anext(stream)).seq == 0  # type: ignore[union-attr]
    ring.emit(8)
    ring.close()
    assert await read(stream) == [Gap(5), 6, 7, 8, 9]


@pytest.mark.asyncio
async def test_a_reader_that_waits_is_woken_by_an_event_and_by_the_end() -> None:
    ring = Ring()
    stream = ring.open()
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    ring.emit()
    ring.readers.wake()
    await asyncio.sleep(0)
    assert not reading.done()
    ring.close()
    assert await reading == [0]


@pytest.mark.asyncio
async def test_who_comes_and_who_goes_is_told_for_other_events_are_wanted_then() -> None:
    ring = Ring()
    assert not ring.readers.wanted
    stream = ring.open()
    assert (ring.changes, ring.readers.wanted) == (1, True)
    await stream.aclose()
    await stream.aclose()
    assert (ring.changes, ring.readers.wanted) == (2, False)


@pytest.mark.asyncio
async def test_a_closed_stream_ends_even_where_it_held_an_event_behind_a_gap() -> None:
    ring = Ring(size=2)
    ring.emit(5)
    stream = ring.open(since=0)
    assert await anext(stream) == Gap(3)
    await stream.aclose()
    assert await read(stream) == []


@pytest.mark.asyncio
async def test_closing_ends_a_reader_that_waits() -> None:
    ring = Ring()
    stream = ring.open()
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await reading == []


@pytest.mark.asyncio
async def test_a_cancelled_reader_may_read_on() -> None:
    ring = Ring()
    stream = ring.open()
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    ring.emit()
    ring.close()
    assert await read(stream) == [0]


@pytest.mark.asyncio
async def test_one_stream_is_for_one_task_and_says_so() -> None:
    ring = Ring()
    stream = ring.open()
    first = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match=r"being read by another task; open one for each: run.events\(\)"):
        await anext(stream)
    ring.close()
    assert await first == []


@pytest.mark.asyncio
async def test_waiting_where_it_can_never_end_is_refused() -> None:
    ring = Ring()

    def refuse() -> None:
        raise RuntimeError("inside")

    stream = ring.open(allowed=refuse)
    with pytest.raises(RuntimeError, match="inside"):
        await anext(stream)


@pytest.mark.asyncio
async def test_a_stream_that_nobody_holds_is_wanted_by_nobody() -> None:
    ring = Ring()
    ring.open()
    assert not ring.readers.wanted


def test_a_reader_at_the_oldest_event_never_gets_the_one_that_is_just_overwriting_it() -> None:
    """The writer stores, the reader looks, and only then the count moves: the reader must not find the wrong
    event."""
    ring = Ring(size=4)
    ring.emit(5)
    seen: list[tuple[int, Event] | None] = []

    class Slots(list[Any]):
        def __setitem__(self, at: Any, value: Any) -> None:
            super().__setitem__(at, value)
            seen.append(ring.readers.read(1))

    ring.readers._slots = Slots(ring.readers._slots)
    ring.emit()
    assert [found and (found[0], found[1].seq) for found in seen] == [(1, 1)]


def test_beside_a_running_writer_a_reader_accounts_for_every_event() -> None:
    ring = Ring(size=16)
    total = 20_000

    async def scene() -> list[Any]:
        stream = ring.open(since=0)
        writer = threading.Thread(target=ring.emit, args=(total,))
        writer.start()
        items: list[Any] = []
        while writer.is_alive() or ring.readers.read(stream._position):
            if ring.readers.read(stream._position):
                items.append(await anext(stream))
        writer.join()
        ring.close()
        return items + [item async for item in stream]

    items = asyncio.run(scene())
    expected = 0
    for item in items:
        if isinstance(item, Gap):
            assert item.missing > 0
            expected += item.missing
        else:
            assert item.seq == expected
            expected += 1
    assert expected == total


def test_a_ring_takes_memory_for_the_events_that_were_appended_and_not_for_its_size() -> None:
    assert sum(map(sys.getsizeof, vars(Ring(size=1 << 16).readers).values())) < 2048
    preallocated = [None] * (1 << 16)  # the negative control
    assert sys.getsizeof(preallocated) > 2048
    ring = Ring(size=8)
    for _ in range(50):
        ring.emit()
        assert sys.getsizeof(ring.readers._slots) <= sys.getsizeof([None] * 32)


@pytest.mark.asyncio
async def test_a_closed_ring_is_still_read_and_tells_nobody_of_its_readers() -> None:
    ring = Ring()
    ring.emit(3)
    early = ring.open()
    ring.close()
    changes = ring.changes
    assert await read(ring.open(since=1)) == [1, 2]
    await early.aclose()
    assert ring.changes == changes == 1
