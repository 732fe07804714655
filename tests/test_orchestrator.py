"""An orchestrator's block: what it takes, what it refuses, how it is left, and what a failure touches."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import gc
import logging
import sys
import threading
import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from orchestrated import X, submit
from threadpoolctl import threadpool_limits
from waiting import PATIENT, until

from asynccb import (
    ArgumentError,
    Callback,
    CallbackBusy,
    ModelBusy,
    Orchestrator,
    OrchestratorClosed,
    Run,
    RunCancelled,
    Trainer,
    health,
)
from asynccb.budget import blas_threads, budget, usable_cpus
from asynccb.claims import Claim, _holders
from asynccb.models import Dense, Sequential
from asynccb.run import live_runs, new_name
from asynccb.testing import Recorder, ScriptedModel
from asynccb.training.control import NoShare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


async def begun(*models: ScriptedModel) -> None:
    await until(lambda: all(model.waiting for model in models))


def factory(model: Callable[[], ScriptedModel] = ScriptedModel) -> Callable[[], Trainer]:
    return lambda: Trainer(model())


def open_all(*models: ScriptedModel) -> None:
    for model in models:
        model.open_for_good()


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threadpool_limits(2, "blas"):
        yield


# ---------------------------------------------------------------- what it does


@pytest.mark.asyncio
async def test_leaving_the_block_waits_for_all_that_was_submitted() -> None:
    models = [ScriptedModel() for _ in range(5)]
    async with Orchestrator(slots=2) as orch:
        runs = [submit(orch, model, epochs=3) for model in models]
        assert {run.state for run in runs} == {"queued"}
    assert [run.outcome for run in runs] == ["completed"] * 5
    assert [model.steps for model in models] == [12] * 5
    assert orch.stats.ended == {"completed": 5}


@pytest.mark.asyncio
async def test_leaving_resumes_what_is_paused_whether_it_has_begun_or_not() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        live, queued = submit(orch, model), submit(orch)
        await begun(model)
        live.pause()
        queued.pause()
        model.open_for_good()
        await until(lambda: live.state == "paused")
    assert (live.outcome, queued.outcome) == ("completed", "completed")


@pytest.mark.asyncio
async def test_no_more_than_slots_are_alive_at_a_time() -> None:
    models = [ScriptedModel(gated=True) for _ in range(5)]
    async with Orchestrator(slots=2) as orch:
        runs = [submit(orch, model) for model in models]
        for number in range(5):
            await begun(*models[number : number + 2])
            assert [run.state for run in runs].count("running") == min(2, 5 - number)
            assert (orch.stats.live, orch.stats.queued) == (min(2, 5 - number), max(0, 3 - number))
            models[number].open_for_good()
            await runs[number]
    assert orch.stats.live == orch.stats.queued == 0


@pytest.mark.asyncio
async def test_models_too_are_made_with_the_threads_of_the_block(two_threads: None) -> None:
    """Orthogonal weights, say, are computed by linear algebra: made with other threads they are others, and
    the first training would differ from the rest."""
    seen: list[int | None] = []

    def build() -> Trainer:
        seen.append(blas_threads())
        return Trainer(ScriptedModel())

    async with Orchestrator(slots=1) as orch:
        seen.append(blas_threads())
        for _ in range(2):
            orch.submit(build, X)
    assert seen == [1, 1, 1]
    assert blas_threads() == 2


@pytest.mark.asyncio
async def test_a_submitted_training_is_silent_unless_it_is_told_to_speak(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with Orchestrator() as orch:
        await submit(orch)
        assert capsys.readouterr().out == ""
        await submit(orch, verbose=2)
    assert "Epoch 1/1" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_by_default_there_are_twice_as_many_slots_as_can_compute() -> None:
    assert Orchestrator().slots == 2 * usable_cpus()
    assert Orchestrator(cpu_threads=usable_cpus()).slots == 2
    assert Orchestrator(slots=7).stats.slots == 7


@pytest.mark.asyncio
async def test_while_it_is_open_linear_algebra_has_its_threads_and_afterwards_what_it_had() -> None:
    before = budget().statistics().blas_threads
    async with Orchestrator() as orch:
        assert orch.stats.budget.blas_threads == 1
    async with Orchestrator(cpu_threads=usable_cpus()) as orch:
        assert orch.stats.budget.blas_threads == usable_cpus()
    assert budget().statistics().blas_threads == before
    assert budget()._wishes == []


@pytest.mark.filterwarnings("ignore:coroutine|Task:RuntimeWarning")
def test_what_is_process_wide_is_restored_where_the_loop_is_closed_in_the_midst_of_the_block() -> None:
    before = sys.getswitchinterval(), blas_threads()

    async def main() -> None:
        async with Orchestrator():
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    task = main()
    held = loop.create_task(task)
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert sys.getswitchinterval() != before[0]
    held._log_destroy_pending = False  # type: ignore[attr-defined]  # as whoever does this is told by asyncio
    loop.close()
    task.close()
    assert (sys.getswitchinterval(), blas_threads()) == before
    assert budget()._wishes == []


@pytest.mark.asyncio
async def test_the_switch_interval_is_lowered_while_it_is_open() -> None:
    before = sys.getswitchinterval()
    async with Orchestrator():
        assert sys.getswitchinterval() == pytest.approx(0.001)
    assert sys.getswitchinterval() == before
    async with Orchestrator(switch_interval=0.002):
        assert sys.getswitchinterval() == pytest.approx(0.002)
    async with Orchestrator(switch_interval=None):
        assert sys.getswitchinterval() == before


@pytest.mark.asyncio
@pytest.mark.parametrize("first", [0, 1])
async def test_of_two_that_are_open_the_last_one_to_close_puts_everything_back(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    threads, interval = budget().statistics().blas_threads, sys.getswitchinterval()
    both = Orchestrator(cpu_threads=1, switch_interval=0.002), Orchestrator(cpu_threads=usable_cpus())
    for orch in both:
        await orch.__aenter__()
        submit(orch)
    assert both[1].stats.budget.blas_threads == 1  # what was asked for earlier
    assert sys.getswitchinterval() == pytest.approx(0.001)
    await both[first].__aexit__(None, None, None)
    await both[1 - first].__aexit__(None, None, None)
    assert (budget().statistics().blas_threads, sys.getswitchinterval()) == (threads, interval)
    assert len(caplog.records) == (usable_cpus() > 1)
    assert all(run.outcome == "completed" for orch in both for run in orch.runs.values())


@pytest.mark.asyncio
async def test_a_training_is_told_to_compute_with_the_threads_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int | None] = []

    def join(wake: Any, *, weight: float, threads: int | None) -> NoShare:
        asked.append(threads)
        return NoShare()

    monkeypatch.setattr(budget(), "join", join)
    model, other = ScriptedModel(), ScriptedModel()
    model.needs_cpu = other.needs_cpu = True
    async with Orchestrator(slots=1) as orch:
        submit(orch, model, threads=usable_cpus())
        submit(orch, other)
    assert asked == [usable_cpus(), None]


@pytest.mark.asyncio
async def test_stats_can_be_read_before_the_block_and_behind_it() -> None:
    orch = Orchestrator(slots=3, devices=["a"])
    assert orch.stats[:6] == (3, 0, 0, {}, 0.0, {"a": 0.0})
    async with orch:
        run = submit(orch, device="a")
        assert orch.stats.queued == 1
        await run
        seen = await asyncio.to_thread(lambda: orch.stats)
        assert seen.ended == {"completed": 1}
    assert orch.stats[1:4] == (0, 0, {"completed": 1})


@pytest.mark.asyncio
async def test_stats_count_every_outcome() -> None:
    models = [ScriptedModel(gated=True) for _ in range(3)]
    async with Orchestrator(slots=5) as orch:
        runs = [submit(orch, model) for model in models]
        failing = submit(orch, ScriptedModel(raises={0: OSError("!")}))
        submit(orch)
        await begun(*models)
        runs[0].stop()
        runs[1].prune()
        runs[2].cancel()
        open_all(*models)
        with pytest.raises(OSError, match="!"):
            await failing
    assert orch.stats.ended == dict.fromkeys(["completed", "stopped", "pruned", "cancelled", "failed"], 1)


@pytest.mark.asyncio
async def test_runs_are_those_that_ended_and_then_the_others_in_the_order_of_submission() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, name="first")
        await orch.runs["first"]
        submit(orch, model, name="second")
        submit(orch, name="third")
        found = orch.runs
        assert list(found) == ["first", "second", "third"]
        found.clear()
        assert len(orch.runs) == 3
        model.open_for_good()
    assert list(orch.runs) == ["first", "second", "third"]


@pytest.mark.asyncio
async def test_of_those_that_ended_the_newest_are_kept() -> None:
    async with Orchestrator(slots=1, keep=3) as orch:
        for number in range(5):
            submit(orch, name=str(number))
    assert list(orch.runs) == ["2", "3", "4"]
    assert [run.name async for run in orch.as_completed()] == ["2", "3", "4"]
    assert orch.stats.ended == {"completed": 5}


# ---------------------------------------------------------------- names


@pytest.mark.asyncio
async def test_a_name_is_free_again_when_its_run_has_ended() -> None:
    async with Orchestrator() as orch:
        first = submit(orch, name="again")
        await first
        second = submit(orch, name="again")
        await second
        assert first is not second
        assert orch.runs == {"again": second}
    assert orch.stats.ended == {"completed": 2}


@pytest.mark.asyncio
async def test_a_name_of_ours_is_never_one_that_was_given() -> None:
    async with Orchestrator(slots=1) as orch:
        probe = submit(orch)
        number = int(probe.name.removeprefix("run-"))
        given = [submit(orch, name=f"run-{number + more}") for more in range(1, 40)]
        ours = [submit(orch) for _ in range(10)]
        assert len({run.name for run in [probe, *given, *ours]}) == 50
    assert orch.stats.ended == {"completed": 50}
    assert {run.outcome for run in ours} == {"completed"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("slots", 0),
        ("slots", -1),
        ("slots", 1.5),
        ("slots", True),
        ("slots", "2"),
        ("cpu_threads", 0),
        ("cpu_threads", 10**6),
        ("cpu_threads", "1"),
        ("devices", "cuda:0"),
        ("devices", {"cuda:0": 0}),
        ("on_failure", "raise"),
        ("on_failure", None),
        ("switch_interval", -1),
        ("switch_interval", "1"),
        ("replay", 0),
    ],
)
def test_what_an_orchestrator_cannot_be_made_with_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=argument):
        Orchestrator(**{argument: value})


class Stubborn(Fraction):
    def __float__(self) -> float:
        raise ValueError("never")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no trainer": ({"trainer": ScriptedModel()}, "trainer"),
    "nothing": ({"trainer": None}, "trainer"),
    "an async factory": ({"trainer": "coroutine function"}, "trainer"),
    "a name that is none": ({"name": 7}, "name"),
    "a name that is taken": ({"name": "taken"}, "name"),
    "a name that a queued run has": ({"name": "waiting"}, "name"),
    "a priority that is no number": ({"priority": "high"}, "priority"),
    "a priority that is not finite": ({"priority": float("nan")}, "priority"),
    "a priority without end": ({"priority": float("inf")}, "priority"),
    "a truth for a priority": ({"priority": True}, "priority"),
    "a priority beyond all numbers": ({"priority": 10**400}, "priority"),
    "a priority of a kind that fails": ({"priority": Stubborn(1)}, "priority"),
    "no threads": ({"threads": 0}, "threads"),
    "more threads than there are": ({"threads": 10**6}, "threads"),
    "an unknown device": ({"device": "cuda:7"}, "device"),
    "too much of a device": ({"device": ("a", 2)}, "device"),
    "epochs": ({"epochs": -1}, "epochs"),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "callbacks": ({"callbacks": [Recorder]}, "callback"),
    "resume": ({"resume": 7}, "resume"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", BAD)
async def test_what_is_refused_names_the_argument_and_touches_no_other_training(bad: str) -> None:
    more, named = dict(BAD[bad][0]), BAD[bad][1]

    async def coroutine_function() -> Trainer:
        return Trainer(ScriptedModel())

    trainer = more.pop("trainer", Trainer(ScriptedModel()))
    trainer = coroutine_function if trainer == "coroutine function" else trainer
    model, held = ScriptedModel(gated=True), len(_holders)
    async with Orchestrator(slots=1, devices=["a"]) as orch:
        submit(orch, model, name="taken")
        submit(orch, name="waiting")
        with pytest.raises(ArgumentError, match=named):
            orch.submit(trainer, X, **{"batch_size": 1, **more})
        assert list(orch.runs) == ["taken", "waiting"]
        model.open_for_good()
    assert orch.stats.ended == {"completed": 2}
    assert len(_holders) == held


@pytest.mark.asyncio
@pytest.mark.parametrize("taken", ["live", "queued", "outside"])
async def test_a_model_or_callback_of_another_run_is_refused_at_once(taken: str) -> None:
    gate, model, recorder = ScriptedModel(gated=True), ScriptedModel(gated=True), Recorder()
    async with Orchestrator(slots=1) as orch:
        if taken == "queued":
            submit(orch, gate)
            run = submit(orch, model, recorder)
        elif taken == "live":
            run = submit(orch, model, recorder)
            await begun(model)
        else:
            run = Trainer(model).start(X, batch_size=1, verbose=0, callbacks=recorder)
        with pytest.raises(ModelBusy, match=run.name):
            submit(orch, model)
        with pytest.raises(CallbackBusy, match=run.name):
            submit(orch, ScriptedModel(), recorder)
        if taken == "queued":
            with pytest.raises(ModelBusy, match=run.name):
                Trainer(model).start(X)
        open_all(gate, model)
        await run
    assert orch.stats.ended in ({}, {"completed": 1}, {"completed": 2})
    assert recorder.hooks[-1] == "on_train_end"


@pytest.mark.asyncio
async def test_a_model_that_was_taken_before_its_turn_fails_its_run_alone() -> None:
    shared = ScriptedModel(gated=True)
    async with Orchestrator(slots=2) as orch:
        first = submit(orch, shared)
        await begun(shared)
        with pytest.raises(ModelBusy, match=first.name):
            await orch.submit(lambda: Trainer(shared), X, batch_size=1)
        shared.open_for_good()
    assert orch.stats.ended == {"failed": 1, "completed": 1}
    assert shared.steps == 4


@pytest.mark.asyncio
async def test_before_the_block_and_behind_it_nothing_is_taken() -> None:
    orch, held = Orchestrator(), len(_holders)
    with pytest.raises(OrchestratorClosed, match="async with"):
        submit(orch)
    with pytest.raises(OrchestratorClosed, match="async with"):
        orch.as_completed()
    with pytest.raises(OrchestratorClosed, match="async with"):
        orch.events()
    async with orch:
        pass
    with pytest.raises(OrchestratorClosed, match="closed"):
        submit(orch)
    with pytest.raises(OrchestratorClosed, match="opened once"):
        await orch.__aenter__()
    assert len(_holders) == held


@pytest.mark.asyncio
async def test_another_event_loop_is_refused() -> None:
    async def elsewhere() -> list[str]:
        said = []
        for ask in (
            lambda: submit(orch),
            orch.as_completed,
            orch.events,
        ):
            try:
                ask()
            except RuntimeError as error:
                said.append(str(error))
        try:
            await run
        except RuntimeError as error:
            said.append(str(error))
        return said

    model = ScriptedModel(gated=True)
    async with Orchestrator() as orch:
        run = submit(orch, model)
        said = await asyncio.to_thread(asyncio.run, elsewhere())
        assert len(said) == 4
        assert all("another event loop" in line for line in said)
        model.open_for_good()
    assert run.outcome == "completed"


def test_without_a_loop_nothing_is_taken() -> None:
    async def main() -> Orchestrator:
        async with Orchestrator() as orch:
            return orch

    orch = asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        submit(orch)


# ---------------------------------------------------------------- functions that make trainers


@pytest.mark.asyncio
async def test_a_function_is_called_when_its_turn_comes_on_a_thread_in_the_callers_context() -> None:
    asked_in: contextvars.ContextVar[str] = contextvars.ContextVar("asked_in", default="?")
    seen: list[tuple[int, str]] = []

    def make() -> Trainer:
        seen.append((threading.get_ident(), asked_in.get()))
        asked_in.set("changed there")
        return Trainer(ScriptedModel())

    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model)
        asked_in.set("here")
        run = orch.submit(make, X, batch_size=1)
        await begun(model)
        assert seen == []
        model.open_for_good()
        await run
        assert asked_in.get() == "here"
    ((thread, context),) = seen
    assert thread != threading.get_ident()
    assert context == "here"


@pytest.mark.asyncio
async def test_a_function_that_takes_an_argument_gets_the_name_of_the_device() -> None:
    seen: list[Any] = []

    def make(device: Any) -> Trainer:
        seen.append(device)
        return Trainer(ScriptedModel())

    def with_default(device: str = "its own") -> Trainer:
        return make(device)

    async with Orchestrator(slots=1, devices=["a"]) as orch:
        for maker, device in ((make, "a"), (make, None), (with_default, "a"), (with_default, None)):
            await orch.submit(maker, X, batch_size=1, device=device)
    assert seen == ["a", None, "its own", "its own"]


class NotSaid(Exception):
    pass


@pytest.mark.asyncio
@pytest.mark.parametrize("raised", [NotSaid, KeyboardInterrupt, SystemExit])
async def test_a_function_that_raises_fails_its_run_alone(raised: type[BaseException]) -> None:
    def make() -> Trainer:
        raise raised("no memory")

    async with Orchestrator(slots=1) as orch:
        recorder = Recorder()
        bad = orch.submit(make, X, callbacks=recorder)
        good = submit(orch)
        with pytest.raises(raised, match="no memory"):
            await bad
    assert (bad.outcome, good.outcome) == ("failed", "completed")
    assert recorder.events == []


@pytest.mark.asyncio
@pytest.mark.parametrize("made", [None, "a trainer", ScriptedModel], ids=repr)
async def test_a_function_that_makes_no_trainer_fails_its_run_alone(made: Any) -> None:
    async with Orchestrator(slots=1) as orch:
        bad = orch.submit(lambda: made, X)
        good = submit(orch)
        with pytest.raises(ArgumentError, match=r"trainer.*makes a Trainer"):
            await bad
    assert (bad.outcome, good.outcome) == ("failed", "completed")


@pytest.mark.asyncio
async def test_what_a_function_made_need_not_be_printable() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise ValueError("no words")

    async with Orchestrator(slots=1) as orch:
        bad = orch.submit(Shy, X)
        good = submit(orch)
        with pytest.raises(ArgumentError, match="not a Shy"):
            await bad
    assert (bad.outcome, good.outcome) == ("failed", "completed")


@pytest.mark.asyncio
async def test_an_empty_name_is_none_and_a_name_of_ours_never_one_that_was_given() -> None:
    number = int(new_name().removeprefix("run-"))
    async with Orchestrator(slots=1) as orch:
        given = submit(orch, name=f"run-{number + 1}")
        unnamed = submit(orch, name="")
        assert unnamed.name not in ("", given.name)
        assert orch.runs == {given.name: given, unnamed.name: unnamed}


@pytest.mark.asyncio
async def test_a_training_that_cannot_begin_leaves_no_watch_on_the_loop() -> None:
    recorder = Recorder()
    async with Orchestrator(slots=1) as orch:
        bad = submit(orch, None, recorder)
        recorder.overflow = "nonsense"  # behind the back of what looked at it
        with pytest.raises(KeyError):
            await bad
    assert not health._probes


@pytest.mark.asyncio
async def test_what_a_function_made_cannot_train_fails_its_run_alone() -> None:
    held = len(_holders)
    async with Orchestrator(slots=1) as orch:
        bad = orch.submit(lambda: Trainer(Sequential([Dense(1, input_dim=1)])), X, X)
        good = submit(orch)
        with pytest.raises(ArgumentError, match="compile"):
            await bad
    assert (bad.outcome, good.outcome) == ("failed", "completed")
    assert len(_holders) == held


@pytest.mark.asyncio
async def test_a_run_that_was_ended_before_its_turn_is_never_made() -> None:
    made: list[str] = []

    def make() -> Trainer:
        made.append("!")
        return Trainer(ScriptedModel())

    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model)
        run = orch.submit(make, X)
        run.stop()
        model.open_for_good()
    assert made == []
    assert run.outcome == "stopped"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "prune", "cancel"])
async def test_a_run_that_is_ended_while_it_is_being_made_never_begins(how: str) -> None:
    making, go_on, model = threading.Event(), threading.Event(), ScriptedModel()

    def make() -> Trainer:
        making.set()
        assert go_on.wait(PATIENT)
        return Trainer(model)

    async with Orchestrator(slots=1) as orch:
        recorder = Recorder()
        run = orch.submit(make, X, batch_size=1, callbacks=recorder)
        await until(making.is_set)
        assert run.state == "queued"
        getattr(run, how)("enough")
        await until(lambda: run.outcome)
        assert orch.stats.live == 1  # its model is still being made, in its slot
        other = submit(orch)
        go_on.set()
        await other
        assert orch.stats.live == 0
    assert run.reason == "enough"
    assert (model.steps, recorder.events) == (0, [])


@pytest.mark.asyncio
async def test_a_function_that_does_not_return_is_left_to_itself_when_the_block_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on, making = threading.Event(), threading.Event()

    def make() -> Trainer:
        making.set()
        assert go_on.wait(PATIENT)
        return Trainer(ScriptedModel())

    orch = Orchestrator(slots=1)
    orch._grace = 0.05

    async def main() -> None:
        async with orch:
            orch.submit(make, X, name="stuck")
            await until(making.is_set)
            raise NotSaid

    with pytest.raises(NotSaid):
        await main()
    assert orch.runs["stuck"].outcome == "cancelled"
    assert "stuck do not return" in caplog.text
    go_on.set()


@pytest.mark.asyncio
async def test_where_there_is_no_thread_a_run_fails_and_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Orchestrator(slots=1) as orch:
        start = orch._engine.start

        def refuse(target: Any, name: str) -> None:
            if "builds" in name:
                raise RuntimeError("can't start new thread")
            start(target, name)

        monkeypatch.setattr(orch._engine, "start", refuse)
        bad, good = orch.submit(factory(), X), submit(orch)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await bad
    assert (bad.outcome, good.outcome) == ("failed", "completed")


# ---------------------------------------------------------------- ways out


@pytest.mark.asyncio
async def test_a_block_that_raises_cancels_all_and_waits_for_their_end() -> None:
    models = [ScriptedModel(gated=True) for _ in range(3)]
    recorders = [Recorder() for _ in range(3)]
    orch = Orchestrator(slots=2)

    async def main() -> None:
        async with orch:
            for pair in zip(models, recorders, strict=True):
                submit(orch, *pair)
            await begun(*models[:2])
            raise NotSaid

    block = asyncio.create_task(main())
    await until(lambda: orch._state == "closing")
    with pytest.raises(OrchestratorClosed, match="closing"):
        submit(orch)
    open_all(*models)
    with pytest.raises(NotSaid):
        await block
    runs = list(orch.runs.values())
    assert [run.outcome for run in runs] == ["cancelled"] * 3
    assert {run.reason for run in runs} == {"the block raised NotSaid"}
    assert [model.steps for model in models] == [1, 1, 0]  # the batch under way
    assert [recorder.hooks[-2:] for recorder in recorders[:2]] == [["on_exception", "on_train_end"]] * 2
    assert recorders[2].events == []


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["inside", "at the end"])
async def test_a_timeout_around_the_block_cancels_all_and_is_told_as_one(where: str) -> None:
    orch = Orchestrator(slots=2)

    async def main() -> None:
        async with asyncio.timeout(0.05), orch:
            for _ in range(3):
                submit(orch, ScriptedModel(), epochs=10**9)
            if where == "inside":
                await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await main()
    assert [run.outcome for run in orch.runs.values()] == ["cancelled"] * 3
    assert live_runs() == []


@pytest.mark.asyncio
async def test_a_second_cancel_does_not_leave_anything_behind() -> None:
    model = ScriptedModel(gated=True)

    async def main() -> None:
        async with Orchestrator(slots=1) as orch:
            submit(orch, model)
            submit(orch)

    task = asyncio.create_task(main())
    await begun(model)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()  # its batch is under way
    model.open_for_good()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert live_runs() == []


@pytest.mark.asyncio
async def test_a_training_submitted_by_a_hook_while_the_block_is_left_is_waited_for() -> None:
    class Submits(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            more.append(submit(orch, ScriptedModel(), Recorder(), epochs=2))

    more: list[Run] = []
    async with Orchestrator(slots=1) as orch:
        submit(orch, ScriptedModel(), Submits())
    assert [run.outcome for run in more] == ["completed"]
    assert orch.stats.ended == {"completed": 2}


# ---------------------------------------------------------------- failures


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["batch", "hook", "inline", "data", "factory"])
async def test_a_training_that_fails_touches_no_other_and_is_said_once(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Beside(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            raise NotSaid("broken")

    class Inline(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            raise NotSaid("broken")

    def data() -> Any:
        yield X
        raise NotSaid("broken")

    def broken() -> Trainer:
        raise NotSaid("broken")

    async with Orchestrator(slots=3) as orch:
        others = [ScriptedModel(gated=True) for _ in range(2)]
        runs = [submit(orch, model) for model in others]
        await begun(*others)
        if where == "batch":
            bad = submit(orch, ScriptedModel(raises={1: NotSaid("broken")}))
        elif where == "data":
            bad = orch.submit(Trainer(ScriptedModel()), data())
        elif where == "factory":
            bad = orch.submit(broken, X)
        else:
            bad = submit(orch, ScriptedModel(), Beside() if where == "hook" else Inline(), epochs=9)
        late = submit(orch)
        await until(lambda: bad.state == "failed")
        open_all(*others)
    assert [run.outcome for run in [*runs, late]] == ["completed"] * 3
    assert [model.steps for model in others] == [4, 4]
    assert "broken" in str(bad.exception)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert bad.name in said[0]
    assert "broken" in said[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["await", "as_completed"])
async def test_a_failure_that_somebody_sees_is_not_logged(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Orchestrator() as orch:
        bad = submit(orch, ScriptedModel(raises={0: NotSaid("broken")}))
        if how == "await":
            with pytest.raises(NotSaid):
                await bad
        else:
            assert [run async for run in orch.as_completed()] == [bad]
    assert caplog.records == []
    with pytest.raises(NotSaid, match="broken"):
        await bad


@pytest.mark.asyncio
async def test_the_first_failure_cancels_the_others_and_is_raised_where_that_is_asked_for() -> None:
    bad, other = ScriptedModel(gated=True, raises={0: NotSaid("first")}), ScriptedModel(gated=True)
    recorder = Recorder()
    orch = Orchestrator(slots=2, on_failure="cancel_others")

    async def main() -> None:
        async with orch:
            failing = submit(orch, bad, name="bad")
            submit(orch, other, name="live")
            submit(orch, ScriptedModel(), recorder, name="queued")
            await begun(bad, other)
            bad.open_for_good()
            await until(lambda: failing.state == "failed")
            with pytest.raises(OrchestratorClosed, match="closing"):
                submit(orch)
            open_all(other)

    with pytest.raises(NotSaid, match="first"):
        await main()
    live, queued = orch.runs["live"], orch.runs["queued"]
    assert (live.outcome, queued.outcome) == ("cancelled", "cancelled")
    assert live.reason == queued.reason == "bad failed"
    assert recorder.events == []
    assert orch.stats.ended == {"failed": 1, "cancelled": 2}


@pytest.mark.asyncio
async def test_where_failures_are_collected_the_block_raises_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Orchestrator(on_failure="collect") as orch:
        submit(orch, ScriptedModel(raises={0: NotSaid("!")}))
    assert orch.stats.ended == {"failed": 1}
    assert len(caplog.records) == 1


@pytest.mark.asyncio
async def test_an_error_of_the_block_goes_before_a_failure_of_a_training() -> None:
    async def main() -> None:
        async with Orchestrator(on_failure="cancel_others") as orch:
            bad = submit(orch, ScriptedModel(raises={0: NotSaid("!")}))
            await until(lambda: bad.state == "failed")
            raise KeyError

    with pytest.raises(KeyError):
        await main()


@pytest.mark.asyncio
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in a task group"])
async def test_whoever_awaits_a_run_that_another_ones_failure_cancelled_gets_that_failure(
    grouped: bool,
) -> None:
    bad, other = ScriptedModel(raises={0: NotSaid("first")}), ScriptedModel(gated=True)

    async def main() -> None:
        async with Orchestrator(slots=2, on_failure="cancel_others") as orch:
            live = submit(orch, other)
            await begun(other)
            failing = submit(orch, bad)
            await until(lambda: failing.state == "failed")
            other.open_for_good()
            # RunCancelled, which is a consequence and not the cause
            if not grouped:
                await live
            async with asyncio.TaskGroup() as group:
                group.create_task(live.wait_as_owner())

    with pytest.raises(NotSaid, match="first"):
        await main()


@pytest.mark.asyncio
async def test_a_run_cancelled_by_hand_is_no_failure() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1, on_failure="cancel_others") as orch:
        first, second = submit(orch, model), submit(orch)
        await begun(model)
        first.cancel("by hand")
        model.open_for_good()
        with pytest.raises(RunCancelled, match="by hand"):
            await first
    assert second.outcome == "completed"


# ---------------------------------------------------------------- what a run takes along


@pytest.mark.asyncio
async def test_hooks_run_in_the_context_of_whoever_submitted() -> None:
    class Looks(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            seen.append(asked_in.get())

        async def on_train_end(self, logs: Any = None) -> None:
            seen.append(asked_in.get())

    asked_in: contextvars.ContextVar[str] = contextvars.ContextVar("asked_in", default="?")
    seen: list[str] = []
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model)
        asked_in.set("here")
        run = submit(orch, ScriptedModel(), Looks())
        asked_in.set("later")
        model.open_for_good()
        await run
    assert seen == ["here", "here"]


@pytest.mark.asyncio
async def test_the_time_after_which_it_stops_begins_when_it_does() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model)
        run = submit(orch, stop_after=datetime.timedelta(seconds=0.02), epochs=10**9)
        await begun(model)
        await asyncio.sleep(0.05)
        assert run.state == "queued"
        model.open_for_good()
        await run
    assert (run.outcome, run.step > 0) == ("stopped", True)


@pytest.mark.asyncio
async def test_the_priority_of_a_live_training_is_its_part_of_the_processor_time() -> None:
    model = ScriptedModel(gated=True)
    model.needs_cpu = True
    async with Orchestrator(slots=1) as orch:
        run = submit(orch, model, priority=1)
        await begun(model)
        assert run._parts.control.share.weight == 2.0
        for priority, weight in ((2, 4.0), (-1, 0.5), (100, 256.0), (-100, 1 / 256)):
            run.priority = priority
            assert run._parts.control.share.weight == weight
            assert run.priority == priority
        with pytest.raises(ArgumentError, match="priority"):
            run.priority = "high"  # type: ignore[assignment]
        assert run.priority == -100
        model.open_for_good()


@pytest.mark.asyncio
async def test_a_trainer_knows_its_newest_run_when_it_has_begun() -> None:
    model = ScriptedModel(gated=True)
    async with Orchestrator(slots=1) as orch:
        submit(orch, model)
        trainer = Trainer(ScriptedModel())
        run = orch.submit(trainer, X)
        assert trainer.last_run is None
        model.open_for_good()
        await run
        assert trainer.last_run is run


# ---------------------------------------------------------------- a loop that goes away


def test_a_loop_that_is_closed_under_the_block_leaves_nothing_held() -> None:
    async def main() -> None:
        orch = Orchestrator(slots=2)
        await orch.__aenter__()
        run = submit(orch, models[0], epochs=10**9)
        orch.submit(make, X)
        submit(orch)
        await begun(models[0])
        await until(making.is_set)
        claims.append(run._session.claim)
        models[0].open_for_good()

    def make() -> Trainer:
        making.set()
        assert go_on.wait(PATIENT)
        return Trainer(ScriptedModel())

    models, making, go_on = [ScriptedModel(gated=True)], threading.Event(), threading.Event()
    claims: list[Claim] = []
    interval, held = sys.getswitchinterval(), len(_holders)
    # asyncio says that tasks were destroyed; whoever closes a loop under its tasks is told so by it.
    logging.getLogger("asyncio").disabled = True
    try:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        go_on.set()
        for thread in threading.enumerate():
            if thread.name.startswith("asynccb"):
                thread.join(PATIENT)
        assert live_runs() == []
        with budget()._lock:  # the collector may come wherever a thread is
            gc.collect()
    finally:
        logging.getLogger("asyncio").disabled = False
    deadline = time.monotonic() + PATIENT
    while (budget()._wishes or sys.getswitchinterval() != interval) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (budget()._wishes, budget()._shares) == ([], {})
    assert sys.getswitchinterval() == interval
    assert len(_holders) == held
    assert [claim.freed for claim in claims] == [True]  # and not let go of once too often


@pytest.mark.asyncio
async def test_a_model_that_is_still_being_made_keeps_its_slot_though_its_run_was_cancelled() -> None:
    """Else models would be made side by side, however few slots there are."""
    asked, may_return = threading.Event(), threading.Event()
    second: list[bool] = []

    def slow() -> Trainer:
        asked.set()
        assert may_return.wait(30)
        return Trainer(ScriptedModel())

    def quick() -> Trainer:
        second.append(may_return.is_set())
        return Trainer(ScriptedModel())

    async with Orchestrator(slots=1, devices=["a"]) as orch:
        first = orch.submit(slow, X, device="a")
        after = orch.submit(quick, X, device="a")
        while not asked.is_set():  # noqa: ASYNC110  # a thread comes
            await asyncio.sleep(0.001)
        first.cancel("not needed")
        with pytest.raises(RunCancelled):
            await first
        assert (orch.stats.live, orch.stats.queued, orch.stats.devices) == (1, 1, {"a": 1.0})
        for _ in range(5):
            await asyncio.sleep(0)
        assert after.state == "queued"
        may_return.set()
    assert after.outcome == "completed"
    assert second == [True]
    assert orch.stats.devices == {"a": 0.0}
