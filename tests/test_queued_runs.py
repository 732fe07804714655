"""Runs that wait for their turn: what they can be asked, whose turn comes when, slots that are lent,
devices."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from orchestrated import X, submit
from waiting import PATIENT, until

from asynccb import (
    Callback,
    History,
    NotStarted,
    Orchestrator,
    Run,
    RunCancelled,
    SelfWait,
    Trainer,
    orchestrator,
)
from asynccb.budget import Budget
from asynccb.claims import _holders
from asynccb.events import EpochEnd, Gap, TrainBegin, TrainEnd
from asynccb.testing import Recorder, ScriptedModel, settle
from asynccb.training.control import Control

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class OneSlot:
    """An orchestrator whose one slot is taken, until the block below it opens the gate."""

    def __init__(self, **more: Any) -> None:
        self.orch = Orchestrator(slots=1, **more)
        self.gate = ScriptedModel(gated=True)

    async def __aenter__(self) -> OneSlot:
        await self.orch.__aenter__()
        self.first = submit(self.orch, self.gate, name="first")
        await until(lambda: self.gate.waiting)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.gate.open_for_good()
        await self.orch.__aexit__(*error)


# ---------------------------------------------------------------- what a queued run is


@pytest.mark.asyncio
async def test_a_queued_run_stands_at_the_beginning_and_has_no_outcome() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        await settle()
        assert (run.state, run.epoch, run.step, dict(run.logs), run.device) == ("queued", 0, 0, {}, None)
        assert (run.outcome, run.reason, run.exception, run.resumed) == (None, None, None, None)
        assert list(run.stats.seconds) == ["queued"]
        assert run.stats.seconds["queued"] > 0
        assert repr(run) == f"<Run {run.name} queued epoch=0 step=0>"
        await run.flush()
        with pytest.raises(NotStarted, match="queued"):
            await run.snapshot()
        with pytest.raises(RuntimeError, match="queued"):
            run.snapshot_now(Recorder())


@pytest.mark.asyncio
async def test_the_time_in_the_line_is_told_when_it_is_over() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        await asyncio.sleep(0.02)
        one.gate.open_for_good()
        await run
    assert run.stats.seconds["queued"] >= 0.02


@pytest.mark.asyncio
async def test_a_queued_run_can_be_awaited_by_many_and_a_watcher_that_is_cancelled_leaves_it_alone() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        watchers = [asyncio.ensure_future(run) for _ in range(3)]
        await settle()
        watchers[0].cancel()
        one.gate.open_for_good()
        histories = await asyncio.gather(*watchers[1:])
    assert all(history is run.history for history in histories)
    assert watchers[0].cancelled()
    assert run.outcome == "completed"


@pytest.mark.asyncio
async def test_the_block_of_a_queued_run_waits_for_it_and_cancels_it_when_it_raises() -> None:
    async with OneSlot() as one:
        good, bad = submit(one.orch), submit(one.orch)
        with pytest.raises(KeyError):
            async with bad:
                raise KeyError
        assert (bad.outcome, good.outcome) == ("cancelled", None)
        one.gate.open_for_good()
        async with good:
            good.pause()
        assert good.outcome == "completed"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "prune", "cancel"])
@pytest.mark.parametrize("thread", ["the loop's", "another"])
async def test_a_queued_run_that_is_ended_ends_at_once_and_none_of_its_hooks_runs(
    how: str, thread: str
) -> None:
    async with OneSlot() as one:
        recorder, model, held = Recorder(), ScriptedModel(), len(_holders)
        run = submit(one.orch, model, recorder)
        end = getattr(run, how)
        await (asyncio.to_thread(end, "enough") if thread == "another" else asyncio.sleep(0, end("enough")))
        async with asyncio.timeout(PATIENT):
            if how == "cancel":
                with pytest.raises(RunCancelled, match="enough"):
                    await run
            else:
                assert isinstance(await run, History)
        assert one.first.outcome is None
        kind = {"stop": "stopped", "prune": "pruned", "cancel": "cancelled"}[how]
        assert (run.state, run.outcome, run.reason) == (kind, kind, "enough")
        assert run.history.outcome == kind
        assert (one.orch.stats.queued, one.orch.stats.live) == (0, 1)
        assert len(_holders) == held
        with pytest.raises(NotStarted):
            await run.snapshot()
        submit(one.orch, model, recorder)  # both are free again
        one.gate.open_for_good()
    assert recorder.hooks[0] == "on_train_begin"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("asked", "ends"),
    [
        (["stop", "prune"], ("stopped", "stop")),
        (["prune", "stop"], ("pruned", "prune")),
        (["stop", "cancel"], ("cancelled", "cancel")),
        (["cancel", "stop"], ("cancelled", "cancel")),
    ],
    ids=lambda case: " ".join(case),
)
async def test_the_first_reason_wins_and_a_cancel_overrides_it(
    asked: list[str], ends: tuple[str, str]
) -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        for how in asked:
            getattr(run, how)(how)
        await until(lambda: run.outcome)
    assert (run.outcome, run.reason) == ends


@pytest.mark.asyncio
async def test_of_two_cancels_the_first_is_the_reason() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        run.cancel("first")
        run.cancel("second")
        await until(lambda: run.outcome)
    assert run.reason == "first"


@pytest.mark.asyncio
async def test_whatever_is_asked_behind_the_end_of_a_queued_run_changes_nothing() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        run.stop("enough")
        await run
        for ask in (run.stop, run.prune, run.cancel, run.pause, run.resume):
            ask()
        run.priority = 3
        await settle()
        assert (run.outcome, run.reason) == ("stopped", "enough")
    assert one.orch.stats.ended == {"stopped": 1, "completed": 1}


@pytest.mark.asyncio
async def test_a_paused_queued_run_lets_others_pass_until_it_goes_on() -> None:
    async with OneSlot() as one:
        paused, other = submit(one.orch), submit(one.orch)
        paused.pause()
        one.gate.open_for_good()
        await other
        assert paused.state == "queued"
        paused.resume()
        await paused
    assert paused.outcome == "completed"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_paused_queued_run_can_be_ended(how: str) -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        run.pause()
        await settle()
        getattr(run, how)()
        await until(lambda: run.outcome)
        assert one.orch.stats.queued == 0


@pytest.mark.asyncio
async def test_a_run_that_is_paused_while_it_is_being_made_parks_behind_its_first_batch() -> None:
    def make() -> Trainer:
        making.set()
        assert go_on.wait(PATIENT)
        return Trainer(model)

    model, making, go_on = ScriptedModel(), threading.Event(), threading.Event()
    async with Orchestrator(slots=1) as orch:
        run = orch.submit(make, X, batch_size=1)
        await until(making.is_set)
        run.pause()
        go_on.set()
        await until(lambda: run.state == "paused")
        assert model.steps == 1
    assert (run.outcome, model.steps) == ("completed", 4)


# ---------------------------------------------------------------- its events


@pytest.mark.asyncio
@pytest.mark.parametrize("since", [None, 0])
async def test_a_stream_that_was_opened_in_the_line_has_every_event_once(since: int | None) -> None:
    async with OneSlot() as one:
        run = submit(one.orch, epochs=2)
        stream = run.events(since)
        reading = asyncio.create_task(collect(stream))
        await settle()
        one.gate.open_for_good()
        await run
        events = await reading
    assert isinstance(events[0], TrainBegin)
    assert isinstance(events[-1], TrainEnd)
    assert [event.seq for event in events] == list(range(len(events)))
    assert not any(isinstance(event, Gap) for event in events)
    assert sum(isinstance(event, EpochEnd) for event in events) == 2


@pytest.mark.asyncio
async def test_a_stream_of_a_run_that_never_begins_ends_without_an_event() -> None:
    async with OneSlot() as one:
        run = submit(one.orch)
        reading = asyncio.create_task(collect(run.events()))
        await settle()
        run.cancel()
        async with asyncio.timeout(PATIENT):
            assert await reading == []
            assert await collect(run.events(0)) == []


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in stream]


# ---------------------------------------------------------------- whose turn it is


class Order:
    """The order in which trainings begin."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def callback(self) -> Callback:
        names = self.names

        class Begins(Callback):
            def on_train_begin(self, logs: Any = None) -> None:
                names.append(self.run.name)

        return Begins()


@pytest.mark.asyncio
async def test_the_highest_priority_begins_first_and_among_equals_the_first_submitted() -> None:
    order = Order()
    async with OneSlot() as one:
        for name, priority in (("a", 0), ("b", 1), ("c", -1.5), ("d", 1), ("e", 0)):
            submit(one.orch, None, order.callback(), name=name, priority=priority)
        one.gate.open_for_good()
    assert order.names == ["b", "d", "a", "e", "c"]


@pytest.mark.asyncio
async def test_numbers_of_numpy_are_priorities_like_others() -> None:
    """``-numpy.uint8(1)`` is 255: taken as they are, they would turn the order round."""
    order = Order()
    async with OneSlot() as one:
        for name, priority in (("a", np.uint8(0)), ("b", np.uint8(2)), ("c", np.float32(0.5))):
            submit(one.orch, None, order.callback(), name=name, priority=priority)
        one.gate.open_for_good()
    assert order.names == ["b", "c", "a"]


@pytest.mark.asyncio
@pytest.mark.parametrize("thread", ["the loop's", "another"])
async def test_a_queued_run_can_be_moved(thread: str) -> None:
    order = Order()
    async with OneSlot() as one:
        runs = [submit(one.orch, None, order.callback(), name=name) for name in "abc"]

        def move() -> None:
            runs[2].priority = 2
            runs[0].priority = -1

        if thread == "another":
            await asyncio.to_thread(move)
        else:
            move()
        assert (runs[2].priority, runs[2].weight, runs[0].weight) == (2, 4.0, 0.5)
        await settle()
        one.gate.open_for_good()
    assert order.names == ["c", "b", "a"]


@pytest.mark.asyncio
async def test_a_run_that_is_moved_while_it_is_paused_begins_at_its_new_place() -> None:
    order = Order()
    async with OneSlot() as one:
        runs = [submit(one.orch, None, order.callback(), name=name) for name in "abc"]
        runs[2].pause()
        await settle()
        runs[2].priority = 1
        runs[2].resume()
        await settle()
        one.gate.open_for_good()
    assert order.names == ["c", "a", "b"]


# ---------------------------------------------------------------- slots that are lent


class Slow(Callback):
    """Holds its training up with a full mailbox."""

    mailbox_size = 1

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.gate.wait()


class Lockstep(Slow):
    lockstep = True


@pytest.fixture
def _lent_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asynccb.orchestrator.LENDS_AFTER", 0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", ["pause", "data", "mailbox", "lockstep"])
@pytest.mark.usefixtures("_lent_soon")
async def test_a_training_that_waits_lends_its_slot_and_has_it_back_when_it_goes_on(reason: str) -> None:
    async def source() -> AsyncIterator[Any]:
        yield X
        await gate.wait()
        while True:
            yield X

    gate, slow = asyncio.Event(), Lockstep() if reason == "lockstep" else Slow()
    second, third = ScriptedModel(gated=True), ScriptedModel(gated=True)
    waiting = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        if reason == "data":
            first = orch.submit(Trainer(waiting), source(), epochs=2, steps_per_epoch=3)
        else:
            held = [slow] if reason in ("mailbox", "lockstep") else []
            first = submit(orch, waiting, *held, epochs=2)
        queued = submit(orch, second), submit(orch, third)
        await until(lambda: waiting.waiting)
        if reason == "pause":
            first.pause()
        waiting.open_for_good()
        await until(lambda: second.waiting)  # it has the slot
        assert (orch.stats.live, queued[1].state) == (2, "queued")
        await asyncio.sleep(0.05)
        assert queued[1].state == "queued"  # one slot is lent once
        first.resume()
        gate.set()
        slow.gate.set()
        await first
        await asyncio.sleep(0.05)
        assert queued[1].state == "queued"  # the slot is taken back
        second.open_for_good()
        await until(lambda: third.waiting)
        third.open_for_good()


@pytest.mark.asyncio
@pytest.mark.usefixtures("_lent_soon")
async def test_no_more_slots_are_lent_than_there_are() -> None:
    models = [ScriptedModel(gated=True) for _ in range(2)]
    async with Orchestrator(slots=1) as orch:
        runs = [submit(orch, model) for model in [*models, ScriptedModel()]]
        for run, model in zip(runs, models, strict=False):
            await until(lambda model=model: model.waiting)
            run.pause()
            model.open_for_good()
        await until(lambda: [run.state for run in runs] == ["paused", "paused", "queued"])
        await asyncio.sleep(0.05)
        assert runs[2].state == "queued"
        runs[0].cancel()
        await until(lambda: runs[2].outcome)
        assert runs[1].state == "paused"


@pytest.mark.asyncio
@pytest.mark.usefixtures("_lent_soon")
async def test_a_training_whose_batch_takes_long_lends_no_slot() -> None:
    async with OneSlot() as one:
        other = submit(one.orch)
        await asyncio.sleep(0.05)
        assert other.state == "queued"
        one.gate.open_for_good()


# ---------------------------------------------------------------- devices


@pytest.mark.asyncio
async def test_a_training_waits_for_room_on_its_device_and_holds_up_nobody() -> None:
    models = {name: ScriptedModel(gated=True) for name in "abcde"}
    async with Orchestrator(slots=9, devices=["gpu", "tpu"]) as orch:
        runs = {
            "a": submit(orch, models["a"], device=("gpu", 0.5)),
            "b": submit(orch, models["b"], device="gpu"),
            "c": submit(orch, models["c"], device=("any", 0.75)),
            "d": submit(orch, models["d"], device=("gpu", 0.5)),
            "e": submit(orch, models["e"]),
        }
        await until(lambda: all(models[name].waiting for name in "ace"))
        assert {name: run.device for name, run in runs.items()} == {
            "a": "gpu",
            "b": None,
            "c": "tpu",
            "d": None,  # there is room for it, which is kept for the one before it
            "e": None,
        }
        assert (runs["b"].state, runs["d"].state) == ("queued", "queued")
        assert orch.stats.devices == {"gpu": 0.5, "tpu": 0.75}
        models["a"].open_for_good()
        await runs["a"]
        await until(lambda: models["b"].waiting)
        assert (runs["b"].device, runs["d"].state, orch.stats.devices["gpu"]) == ("gpu", "queued", 1.0)
        models["b"].open_for_good()
        await runs["b"]
        await until(lambda: models["d"].waiting)
        for model in models.values():
            model.open_for_good()
    assert orch.stats.devices == {"gpu": 0.0, "tpu": 0.0}


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["fails", "cancelled", "never made"])
async def test_a_device_is_free_again_however_its_training_ends(how: str) -> None:
    making, go_on = threading.Event(), threading.Event()

    def make() -> Trainer:
        making.set()
        assert go_on.wait(PATIENT)
        return Trainer(ScriptedModel())

    async with Orchestrator(slots=2, devices=["gpu"]) as orch:
        model = ScriptedModel(gated=True, raises={0: OSError("!")} if how == "fails" else {})
        if how == "never made":
            run = orch.submit(make, X, device="gpu")
            await until(making.is_set)
        else:
            run = submit(orch, model, device="gpu")
            await until(lambda: model.waiting)
        assert orch.stats.devices == {"gpu": 1.0}
        completed = orch.as_completed()  # else the failure would be logged
        if how != "fails":
            run.cancel()
        model.open_for_good()
        await until(lambda: run.ended)
        assert await anext(completed) is run
        go_on.set()
        await until(lambda: orch.stats.devices == {"gpu": 0.0})  # a model that is being made keeps it
        await submit(orch, device="gpu")


# ---------------------------------------------------------------- waits that would never end


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["run", "all", "block", "events"])
async def test_a_hook_that_waits_for_its_own_run_is_refused(what: str) -> None:
    class Waits(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            waits: dict[str, Callable[[], Awaitable[Any]]] = {
                "run": lambda: self.run.wait_as_owner(),
                "all": lambda: collect(orch.as_completed()),
                "block": lambda: orch.__aexit__(None, None, None),
                "events": lambda: collect(orch.events()),
            }
            with pytest.raises(SelfWait, match=self.run.name):
                await waits[what]()
            refused.append(epoch)

    refused: list[int] = []
    async with Orchestrator() as orch:
        await submit(orch, None, Waits())
    assert refused == [0]


@pytest.mark.asyncio
async def test_a_hook_may_wait_for_another_run_of_the_orchestrator() -> None:
    class Waits(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            seen.append(await other)

    seen: list[History] = []
    async with Orchestrator(slots=2) as orch:
        other = submit(orch)
        await submit(orch, None, Waits())
    assert seen == [other.history]


@pytest.mark.asyncio
async def test_a_hook_may_read_the_events_that_are_there() -> None:
    class Reads(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            seen.append(await anext(orch.events(0)))

    seen: list[Any] = []
    async with Orchestrator() as orch:
        run = submit(orch, None, Reads())
        await run
    assert (seen[0].run, seen[0].event.state) == (run.name, "queued")


@pytest.mark.asyncio
async def test_a_hook_that_submits_and_awaits_gets_the_result_of_its_own_training() -> None:
    class Submits(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            histories.append(await submit(orch, name="inner"))

    histories: list[History] = []
    async with Orchestrator(slots=2) as orch:
        await submit(orch, None, Submits())
    assert histories == [orch.runs["inner"].history]


# ---------------------------------------------------------------- from other threads


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "prune", "cancel"])
async def test_an_end_that_races_with_the_beginning_on_another_thread_is_never_lost(how: str) -> None:
    """Each would train for ever if the word came between its two looks."""
    runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()

    def end_them() -> None:
        chance = random.Random(7)
        while (run := runs.get()) is not None:
            until = time.perf_counter() + chance.random() * 0.002
            while time.perf_counter() < until:
                pass
            getattr(run, how)()

    thread = threading.Thread(target=end_them)
    thread.start()
    async with Orchestrator(slots=2) as orch:
        for number in range(60):
            model = ScriptedModel()
            made = Trainer(model) if number % 2 else (lambda model=model: Trainer(model))
            runs.put(orch.submit(made, X, epochs=10**9))
            await asyncio.sleep(0)
        runs.put(None)
        async with asyncio.timeout(PATIENT):
            ended = [run.outcome async for run in orch.as_completed()]
    await until(lambda: not thread.is_alive())
    assert set(ended) == {{"stop": "stopped", "prune": "pruned", "cancel": "cancelled"}[how]}
    assert len(ended) == 60


@pytest.mark.asyncio
async def test_trainings_are_submitted_on_the_loop_alone() -> None:
    async with Orchestrator() as orch:
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(submit, orch)
        assert orch.runs == {}


# ---------------------------------------------------------------- many of them


class Drains(Callback):
    """Keeps a run from its end until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.gate = asyncio.Event(), asyncio.Event()

    async def on_train_end(self, logs: Any = None) -> None:
        self.reached.set()
        await self.gate.wait()


@pytest.mark.asyncio
async def test_what_was_asked_of_a_queued_run_and_is_told_late_does_not_end_one_that_drains() -> None:
    drains = Drains()
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, None, drains)
        await drains.reached.wait()
        assert run.outcome == "completed"
        orch._run_changed(run)  # as another thread would have it called, which was long about it
        assert (orch.stats.live, orch.stats.ended) == (1, {})
        drains.gate.set()
    assert orch.stats.ended == {"completed": 1}


@pytest.mark.asyncio
async def test_a_training_that_drains_lends_its_slot() -> None:
    drains = Drains()
    async with Orchestrator(slots=1) as orch:
        first = submit(orch, None, drains)
        async with asyncio.timeout(PATIENT):
            await submit(orch)
        assert first.state == "closing"
        drains.gate.set()


@pytest.mark.asyncio
async def test_when_all_are_cancelled_each_queued_one_ends_in_the_time_that_is_taken_for_it() -> None:
    """Told to the loop one by one, they would all end in its next turn, however many those are."""
    async with OneSlot() as one:
        runs = [submit(one.orch) for _ in range(3)]
        await settle()
        one.orch._cancel_all("enough")
        assert [run.outcome for run in runs] == ["cancelled"] * 3


@pytest.mark.asyncio
async def test_paused_ones_are_resumed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = await OneSlot().__aenter__()
    runs = [submit(one.orch) for _ in range(3)]
    for run in runs:
        run.pause()
    await settle()
    monkeypatch.setattr(orchestrator, "STEP", 0.0)
    left: list[int] = []

    def look() -> None:
        left.append(sum(run.pause_asked for run in runs))
        if left[-1]:
            asyncio.get_running_loop().call_soon(look)

    asyncio.get_running_loop().call_soon(look)
    await one.__aexit__(None, None, None)
    assert left == [3, 2, 1, 0]
    assert [run.outcome for run in runs] == ["completed"] * 3


# ---------------------------------------------------------------- asked at the very moment of its beginning


@pytest.mark.asyncio
async def test_a_resume_that_meets_the_beginning_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Control.pause

    def pause_a_moment_late(control: Control) -> None:
        run.resume()
        pause(control)

    def build() -> Trainer:
        run.pause()
        return Trainer(ScriptedModel())

    monkeypatch.setattr(Control, "pause", pause_a_moment_late)
    async with Orchestrator(slots=1) as orch:
        run = orch.submit(build, X)
        async with asyncio.timeout(PATIENT):
            await run
    assert run.outcome == "completed"


@pytest.mark.asyncio
async def test_a_priority_that_meets_the_beginning_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    join = Budget.join

    def join_and_be_overtaken(self: Budget, *arguments: Any, **more: Any) -> Any:
        share = join(self, *arguments, **more)
        run.priority = 2
        return share

    class Weighs(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            weights.append(run._parts.control.share.weight)

    monkeypatch.setattr(Budget, "join", join_and_be_overtaken)
    weights: list[float] = []
    async with Orchestrator(slots=1) as orch:
        run = orch.submit(Trainer(Plain()), X, callbacks=Weighs())
        await run
    assert weights == [4.0]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "prune", "cancel"])
async def test_an_end_that_meets_the_beginning_is_not_lost(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(run: Run, outcome: Any) -> None:
        if outcome is not None:
            orch._fill()  # it begins at the last moment at which nobody can know of it
            assert run._parts is not None
        run.__dict__["early"] = outcome

    monkeypatch.setattr(Run, "_early_end", property(lambda run: run.__dict__["early"], write), raising=False)
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, epochs=10**9)
        getattr(run, how)("enough")
        async with asyncio.timeout(PATIENT):
            await ended(run)
    assert (run.outcome, run.reason) == (OUTCOMES[how], "enough")


OUTCOMES = {"stop": "stopped", "prune": "pruned", "cancel": "cancelled"}


async def ended(run: Run) -> None:
    with contextlib.suppress(RunCancelled):
        await run


class Plain:
    def train_batch(self, batch: Any) -> dict[str, float]:
        return {"loss": 0.0}
