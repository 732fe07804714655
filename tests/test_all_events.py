"""The runs in the order in which they end, and the events of all runs as one stream."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from orchestrated import X, submit
from waiting import PATIENT, until

from asynccb import Gap, Orchestrator, Trainer
from asynccb.all_events import AllEvents
from asynccb.events import BatchEnd, EpochEnd, RunChanged, RunEvent, TrainEnd
from asynccb.testing import Recorder, ScriptedModel, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def reading(stream: AsyncIterator[Any]) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(collect(stream))


def by_run(items: list[Any]) -> dict[str, list[Any]]:
    """The events of each run, in their order."""
    found: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        found[item.run].append(item.event)
    return dict(found)


def states(events: list[Any]) -> list[str]:
    return [event.state for event in events if isinstance(event, RunChanged)]


def numbers(events: list[Any]) -> list[int]:
    """The numbers that a run gave its events."""
    return [event.seq for event in events if not isinstance(event, (RunChanged, Gap))]


# ---------------------------------------------------------------- as they end


@pytest.mark.asyncio
async def test_runs_come_in_the_order_in_which_they_end() -> None:
    models = [ScriptedModel(gated=True) for _ in range(3)]
    async with Orchestrator(slots=3) as orch:
        runs = [submit(orch, model) for model in models]
        completed = orch.as_completed()
        for index in (2, 0, 1):
            models[index].open_for_good()
            assert await anext(completed) is runs[index]
        with pytest.raises(StopAsyncIteration):
            await anext(completed)


@pytest.mark.asyncio
async def test_of_all_outcomes_each_comes_once_and_none_is_raised() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        live = submit(orch, model)
        queued = [submit(orch) for _ in range(3)]
        failing = submit(orch, ScriptedModel(raises={0: OSError("!")}))
        await until(lambda: model.waiting)
        queued[0].stop()
        queued[1].prune()
        queued[2].cancel()
        ended = reading(orch.as_completed())
        await settle()
        model.open_for_good()
        found = await ended
    assert {run.name for run in found[:3]} == {run.name for run in queued}
    assert found[3:] == [live, failing]
    assert [run.outcome for run in found[3:]] == ["completed", "failed"]


@pytest.mark.asyncio
async def test_those_that_ended_before_come_too_and_so_do_those_that_are_submitted_meanwhile() -> None:
    async with Orchestrator(slots=1) as orch:
        await submit(orch, name="before")
        names = []
        async for run in orch.as_completed():
            names.append(run.name)
            if len(names) < 4:
                submit(orch, name=f"meanwhile {len(names)}")
    assert names == ["before", "meanwhile 1", "meanwhile 2", "meanwhile 3"]
    assert [run.name async for run in orch.as_completed()] == names


@pytest.mark.asyncio
async def test_each_reader_gets_all() -> None:
    async with Orchestrator(slots=1) as orch:
        runs = [submit(orch) for _ in range(3)]
        readers = [reading(orch.as_completed()) for _ in range(3)]
        for reader in readers:
            assert await reader == runs


@pytest.mark.asyncio
async def test_where_nothing_was_submitted_nothing_is_waited_for() -> None:
    async with Orchestrator() as orch:
        assert await collect(orch.as_completed()) == []


# ---------------------------------------------------------------- the events of all


@pytest.mark.asyncio
async def test_each_event_of_each_run_comes_once_and_in_its_order_between_its_states() -> None:
    async with Orchestrator(slots=2) as orch:
        items = reading(orch.events())
        runs = [submit(orch, None, Recorder(), epochs=2, name=name) for name in "abc"]
    found = await items
    assert [item.seq for item in found] == list(range(len(found)))
    events = by_run(found)
    assert set(events) == {"a", "b", "c"}
    for run in runs:
        mine = events[run.name]
        assert states(mine) == ["queued", "running", "completed"]
        assert mine[0] == RunChanged("queued")
        assert mine[-1] == RunChanged("completed")
        assert numbers(mine) == list(range(run.stats.events))
        assert sum(isinstance(event, BatchEnd) for event in mine) == 8
        assert sum(isinstance(event, EpochEnd) for event in mine) == 2
        assert isinstance(mine[-2], TrainEnd)


@pytest.mark.asyncio
async def test_iterating_the_orchestrator_is_reading_its_events() -> None:
    async with Orchestrator() as orch:
        items = reading(aiter(orch))
        submit(orch, name="a")
    found = await items
    assert all(isinstance(item, RunEvent) for item in found)
    assert states(by_run(found)["a"]) == ["queued", "running", "completed"]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "prune", "cancel", "never made"])
async def test_a_run_that_never_begins_is_queued_and_has_its_outcome(how: str) -> None:
    def make() -> Trainer:
        raise OSError("!")

    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        items = reading(orch.events())
        first = submit(orch, model)
        watched = orch.as_completed()
        run = orch.submit(make, X, name="a") if how == "never made" else submit(orch, name="a")
        if how != "never made":
            getattr(run, how)()
        model.open_for_good()
        await first
        await until(lambda: run.ended)
        del watched
    assert by_run(await items)["a"] == [RunChanged("queued"), RunChanged(run.outcome or "")]


@pytest.mark.asyncio
async def test_a_slow_reader_gets_a_gap_and_holds_up_nobody() -> None:
    async with Orchestrator(replay=4) as orch:
        slow, quick = orch.events(), reading(orch.events())
        run = submit(orch, None, epochs=5)
        await run
    everything = await quick
    gap, *rest = await collect(slow)
    assert isinstance(gap, Gap)
    assert len(rest) == 4
    assert gap.missing + 4 == everything[-1].seq + 1
    assert rest == everything[-4:]


@pytest.mark.asyncio
async def test_events_that_are_still_there_can_be_read_again() -> None:
    async with Orchestrator() as orch:
        items = reading(orch.events())
        submit(orch, epochs=2)
    everything = await items
    assert await collect(orch.events(since=0)) == everything
    assert await collect(orch.events(since=5)) == everything[5:]
    assert await collect(orch.events()) == []


@pytest.mark.asyncio
async def test_whoever_begins_to_read_in_the_middle_gets_what_comes_from_then_on() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model, Recorder(), epochs=2, name="a")
        await until(lambda: model.waiting)
        await model.open(2)
        await settle()
        items = reading(orch.events())
        await settle()
        model.open_for_good()
    events = by_run(await items)["a"]
    assert [event.batch for event in events if isinstance(event, BatchEnd)] == [2, 3, 0, 1, 2, 3]
    assert states(events) == ["completed"]


@pytest.mark.asyncio
async def test_batch_events_are_built_only_while_somebody_reads() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, model, name="a")
        await until(lambda: model.waiting)
        table = run._parts.readers
        assert not table.wanted
        stream = orch.events()
        await settle()
        assert table.wanted
        await stream.aclose()
        await settle()
        assert not table.wanted
        model.open_for_good()


@pytest.mark.asyncio
async def test_a_reader_that_comes_just_when_the_last_one_goes_misses_nothing() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model, Recorder(), name="a")
        await until(lambda: model.waiting)
        first = orch.events()
        await settle()
        await first.aclose()
        items = reading(orch.events())
        await settle()
        model.open_for_good()
    assert sum(isinstance(event, BatchEnd) for event in by_run(await items)["a"]) == 4


@pytest.mark.asyncio
async def test_a_reader_that_comes_back_gets_what_it_missed_or_is_told_how_much() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, model, epochs=4, name="a")
        await until(lambda: model.waiting)
        first, seen = orch.events(), []
        await settle()
        await model.open(1)
        async with asyncio.timeout(PATIENT):
            while not (seen and isinstance(seen[-1].event, BatchEnd)):
                seen.append(await anext(first))
        await first.aclose()
        await settle()
        await model.open(8)  # two epochs end while nobody reads
        await settle()
        items = reading(orch.events(since=seen[-1].seq + 1))
        await settle()
        model.open_for_good()
        await run
    events = by_run(await items)["a"]
    assert [event.epoch for event in events if isinstance(event, EpochEnd)] == [0, 1, 2, 3]
    last = by_run(seen)["a"][-1].seq + 1
    for event in events:
        if isinstance(event, Gap):
            last += event.missing
        elif not isinstance(event, RunChanged):
            assert event.seq == last
            last += 1
    assert last == run.stats.events


@pytest.mark.asyncio
async def test_a_name_that_is_used_again_has_the_events_of_all_its_runs() -> None:
    async with Orchestrator(slots=1) as orch:
        items = reading(orch.events())
        for _ in range(3):
            await submit(orch, name="again")
    events = by_run(await items)["again"]
    assert sorted(states(events)) == ["completed"] * 3 + ["queued"] * 3 + ["running"] * 3
    assert sum(isinstance(event, TrainEnd) for event in events) == 3


@pytest.mark.asyncio
async def test_a_stream_that_another_thread_drops_is_let_go_of_on_the_loop() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, model)
        await until(lambda: model.waiting)
        threads: list[int] = []
        held = [orch.events()]
        await settle()
        (task,) = orch._events._tasks.values()
        task.add_done_callback(lambda _: threads.append(threading.get_ident()))
        await asyncio.to_thread(lambda: (held.clear(), gc.collect()))
        await until(lambda: threads)
        assert threads == [threading.get_ident()]
        await until(lambda: not run._parts.readers.wanted)
        model.open_for_good()


@pytest.mark.asyncio
async def test_readers_of_all_and_of_one_run_do_not_take_from_each_other() -> None:
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, epochs=2, name="a")
        all_, one = reading(orch.events(0)), reading(run.events())
        await run
    events = [event for event in by_run(await all_)["a"] if not isinstance(event, RunChanged)]
    assert events == await one


@pytest.mark.asyncio
async def test_a_ring_that_is_full_of_events_does_not_hold_the_loop() -> None:
    class Full:
        name, ended = "full", False

        async def events(self, since: int | None) -> AsyncIterator[Any]:
            for number in range(1000):
                yield SimpleNamespace(seq=number)  # none of them makes anybody wait

    run: Any = Full()
    turns: list[int] = []
    events = AllEvents(1000, lambda: [run], lambda: None)
    events.open(contextvars.copy_context())
    stream = events.stream(None, lambda: None)
    while events.busy:
        await asyncio.sleep(0)
        turns.append(events._seq)
    assert max(after - before for before, after in pairwise([0, *turns])) <= 64
    assert (await anext(stream)).run == "full"
    await stream.aclose()
