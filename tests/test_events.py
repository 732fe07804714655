"""The records of a training, and the streams that read them."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Gap, Run, RunCancelled, Trainer
from asynccb import events as records
from asynccb.events import (
    BatchBegin,
    BatchEnd,
    CheckpointSaved,
    EpochBegin,
    EpochEnd,
    Event,
    ExceptionRaised,
    FrozenLogs,
    Logs,
    TrainBegin,
    TrainEnd,
)
from asynccb.testing import Match, Recorder, ScriptedModel, settle

if TYPE_CHECKING:
    from asynccb.bus.readers import EventStream

X = np.zeros((2, 1))


def start(model: ScriptedModel, *callbacks: Callback, epochs: int = 1, **more: Any) -> Run:
    return Trainer(model).start(X, batch_size=1, epochs=epochs, verbose=0, callbacks=callbacks, **more)


async def read_all(stream: EventStream) -> list[Event | Gap]:
    return [event async for event in stream]


def kinds(events: list[Event | Gap]) -> list[str]:
    return [type(event).__name__ for event in events]


# ---------------------------------------------------------------- the records


def test_frozen_logs_read_as_a_dict_and_refuse_every_change() -> None:
    logs = Logs(loss=1.0)
    logs["acc"] = 0.5
    logs.freeze()
    assert type(logs) is FrozenLogs
    assert logs == {"loss": 1.0, "acc": 0.5}
    for change in (
        lambda: logs.__setitem__("a", 1),
        lambda: logs.__delitem__("loss"),
        lambda: logs.__ior__({"a": 1}),
        logs.clear,
        lambda: logs.pop("loss"),
        logs.popitem,
        lambda: logs.setdefault("a", 1),
        lambda: logs.update(a=1),
    ):
        with pytest.raises(TypeError, match="shared by all callbacks"):
            change()
    logs.freeze()  # once more does nothing
    assert logs == {"loss": 1.0, "acc": 0.5}


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, dict.copy, FrozenLogs.copy, lambda logs: pickle.loads(pickle.dumps(logs))],
)
def test_every_copy_of_frozen_logs_is_a_plain_dict_of_its_own(duplicate: Any) -> None:
    logs = FrozenLogs(loss=1.0, outputs=np.zeros(2))
    other = duplicate(logs)
    assert type(other) is dict
    other["loss"] = 2.0
    assert logs["loss"] == 1.0


def test_every_event_names_its_hook_and_gives_the_hooks_arguments() -> None:
    every = [getattr(records, name) for name in records.__all__]
    every = [kind for kind in every if issubclass(kind, Event) and kind is not Event]
    assert len(every) == len({kind.hook for kind in every}) == 16
    assert all(callable(getattr(Callback, kind.hook)) for kind in every)
    logs = Logs()
    assert TrainBegin(0, 0, logs).arguments == (logs,)
    assert EpochEnd(0, 3, logs, 7).arguments == (3, logs)
    assert BatchEnd(0, 5, logs, 3, 7).arguments == (5, logs)
    error = OSError()
    assert ExceptionRaised(0, error).arguments == (error,)
    assert CheckpointSaved(0, "a.bin", 3).arguments == ("a.bin", 3)


# ---------------------------------------------------------------- streams of a run


@pytest.mark.asyncio
async def test_a_stream_gives_every_event_in_order_and_ends_after_the_drain() -> None:
    class Slow(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            self.run.announce_saved("late.bin", 0)

    run = start(ScriptedModel(), Slow())
    events = await read_all(run.events())
    assert kinds(events) == [
        "TrainBegin",
        "EpochBegin",
        *["BatchBegin", "BatchEnd"] * 2,
        "EpochEnd",
        "TrainEnd",
        "CheckpointSaved",
    ]
    assert [event.seq for event in events] == list(range(9))
    assert Match(EpochEnd, epoch=0, step=2, logs={"loss": 1.0}) == events[6]
    assert run.state == "completed"


@pytest.mark.asyncio
async def test_a_run_is_itself_a_stream_from_now_on() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.at_gate()
    reading = asyncio.create_task(read_all(run.__aiter__()))
    await asyncio.sleep(0)
    model.open_for_good()
    events = await reading
    assert kinds(events)[:2] == ["BatchEnd", "BatchBegin"]
    assert kinds(events)[-2:] == ["EpochEnd", "TrainEnd"]


@pytest.mark.asyncio
async def test_events_that_nobody_wanted_are_a_gap_for_who_comes_later() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.open(1)
    reading = asyncio.create_task(read_all(run.events(since=0)))
    await asyncio.sleep(0)
    model.open_for_good()
    events = await reading
    # Epochs are always built; three batch events had passed before we came.
    assert kinds(events)[:3] == ["TrainBegin", "EpochBegin", "Gap"]
    assert events[2] == Gap(3)
    assert kinds(events)[3:] == ["BatchEnd", "EpochEnd", "TrainEnd"]
    assert [event.seq for event in events if not isinstance(event, Gap)] == [0, 1, 5, 6, 7]


@pytest.mark.asyncio
async def test_an_ended_run_replays_what_its_ring_still_holds_and_tells_the_gap() -> None:
    run = start(ScriptedModel(), Recorder(), epochs=10, replay=4)
    await run
    events = await read_all(run.events(since=0))
    last = run.stats.events - 1
    assert isinstance(events[0], Gap)
    assert events[0] == Gap(events[1].seq)
    assert events[-1].seq == last
    assert len([event for event in events if not isinstance(event, Gap)]) == 4
    assert await read_all(run.events(since=last)) == events[-1:]
    assert await read_all(run.events(since=last + 1)) == []
    assert await read_all(run.events()) == []


@pytest.mark.asyncio
async def test_two_readers_and_a_slow_one_do_not_disturb_each_other_nor_the_training() -> None:
    model = ScriptedModel(gated=True)
    run = Trainer(model).start(np.zeros((50, 1)), batch_size=1, verbose=0, replay=8)
    slow = run.events()
    quick = [asyncio.create_task(read_all(run.events())) for _ in range(2)]
    await asyncio.sleep(0)
    first = asyncio.create_task(anext(slow))
    await model.open(50)
    await run  # the slow reader holds nobody
    rest = [await first, *await read_all(slow)]
    for events in (await quick[0], await quick[1], rest):
        seen = 0
        for event in events:
            seen += event[0] if isinstance(event, Gap) else 1
        assert seen == run.stats.events == 104  # nothing is lost without being counted
        assert events[-1].hook == "on_train_end"
    assert any(isinstance(event, Gap) for event in rest)


@pytest.mark.asyncio
@pytest.mark.parametrize("close", ["break", "aclose", "cancelled"])
async def test_batch_events_are_built_for_readers_only_while_there_are_some(close: str) -> None:
    model = ScriptedModel(gated=True)
    run = start(model, epochs=100)
    assert run._parts.dispatcher.emit.batch_begin is None

    async def read_one() -> None:
        async for event in run:
            if close == "break" and isinstance(event, BatchEnd):
                break

    if close == "aclose":
        stream = run.events()
        assert run._parts.dispatcher.emit.batch_begin is not None
        await stream.aclose()
        await stream.aclose()
        assert await read_all(stream) == []
    else:
        reading = asyncio.create_task(read_one())
        await asyncio.sleep(0)
        assert run._parts.dispatcher.emit.batch_begin is not None
        await model.open(2)
        if close == "cancelled":
            reading.cancel()
        await asyncio.wait([reading])
        del reading
        gc.collect()
    await settle()
    assert run._parts.dispatcher.emit.batch_begin is None
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run


@pytest.mark.asyncio
async def test_one_stream_read_by_two_tasks_is_refused() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.at_gate()
    stream = run.events()
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="being read by another task; open one for each"):
        await anext(stream)
    model.open_for_good()
    assert isinstance(await first, BatchEnd)
    await stream.aclose()
    await run


@pytest.mark.asyncio
async def test_a_stream_ends_on_a_cancel_with_the_exception_told() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    reading = asyncio.create_task(read_all(run.events()))
    await model.at_gate()
    run.cancel("no more")
    model.open_for_good()
    events = await reading
    assert kinds(events) == [
        "TrainBegin",
        "EpochBegin",
        "BatchBegin",
        "BatchEnd",
        "ExceptionRaised",
        "TrainEnd",
    ]
    assert str(events[-2].exception) == "the training was cancelled: no more"
    with pytest.raises(RunCancelled):
        await run


@pytest.mark.asyncio
async def test_a_stream_of_a_run_cancelled_while_queued_is_empty() -> None:
    run = start(ScriptedModel())
    stream = run.events(since=0)
    run.cancel()
    assert await read_all(stream) == []
    with pytest.raises(RunCancelled):
        await run


@pytest.mark.asyncio
async def test_every_reader_callback_and_history_share_one_object_of_logs() -> None:
    class Keeps(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kept.append(logs)

    kept: list[Any] = []
    run = start(ScriptedModel(), Keeps(), Keeps())
    events = await read_all(run.events())
    (event,) = [event for event in events if isinstance(event, EpochEnd)]
    assert kept[0] is kept[1] is event.logs


@pytest.mark.asyncio
async def test_batch_begin_tells_its_place() -> None:
    run = start(ScriptedModel(), epochs=2)
    events = await read_all(run.events())
    begins = [(e.epoch, e.batch, e.step) for e in events if isinstance(e, BatchBegin)]
    assert begins == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert [(e.epoch, e.step) for e in events if isinstance(e, EpochBegin)] == [(0, 0), (1, 2)]
    assert [e.step for e in events if isinstance(e, (TrainBegin, TrainEnd))] == [0, 4]
