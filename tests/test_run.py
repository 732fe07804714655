"""The handle on a training: its states, who may wait for it and how, and what it can be asked."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import until

from asynccb import Callback, CallbackError, History, ModelError, Run, RunCancelled, SelfWait, Trainer
from asynccb.run import live_runs
from asynccb.storage.serial import SerialExecutor
from asynccb.supervisor import Supervisor
from asynccb.testing import Recorder, ScriptedModel, settle
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

X = np.zeros((4, 1))


def start(model: ScriptedModel, *callbacks: Callback, epochs: int = 1, **more: Any) -> Run:
    return Trainer(model).start(X, batch_size=1, epochs=epochs, verbose=0, callbacks=callbacks, **more)


def fitting(model: ScriptedModel, *callbacks: Callback, epochs: int = 1) -> asyncio.Task[History]:
    return asyncio.create_task(
        Trainer(model).fit(X, batch_size=1, epochs=epochs, verbose=0, callbacks=callbacks)
    )


def depth(error: BaseException | None) -> int:
    frames, trace = 0, None if error is None else error.__traceback__
    while trace is not None:
        frames, trace = frames + 1, trace.tb_next
    return frames


# ---------------------------------------------------------------- its states


@pytest.mark.asyncio
async def test_a_run_is_queued_then_running_then_closing_then_completed() -> None:
    class Slow(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            states.append(self.run.state)
            await asyncio.sleep(0)
            states.append(self.run.state)

    states: list[str] = []
    model = ScriptedModel(gated=True)
    run = start(model, Slow())
    states.append(run.state)
    await model.at_gate()
    states.append(run.state)
    model.open_for_good()
    history = await run
    states.append(run.state)
    assert states == ["queued", "running", "closing", "closing", "completed"]
    assert (run.outcome, run.reason, run.exception) == ("completed", "", None)
    assert history is run.history


@pytest.mark.asyncio
async def test_a_run_tells_epoch_step_and_logs_while_it_trains() -> None:
    model = ScriptedModel([0.5, 0.25], gated=True)
    run = start(model, Recorder(), epochs=2)
    assert (run.epoch, run.step, run.logs, run.outcome, run.reason) == (0, 0, {}, None, None)
    await model.open(2)
    assert (run.epoch, run.step, run.logs["loss"]) == (0, 2, 0.25)
    await model.open(3)
    assert (run.epoch, run.step, run.logs["loss"]) == (1, 5, 0.5)
    run.logs["loss"] = 7  # a copy
    assert run.logs["loss"] == 0.5
    assert f"<Run {run.name} running epoch=1 step=5>" == repr(run)
    model.open_for_good()
    await run
    assert (run.epoch, run.step) == (1, 8)


@pytest.mark.asyncio
async def test_a_name_can_be_given_and_is_else_numbered() -> None:
    named, numbered = start(ScriptedModel(), name="mine"), start(ScriptedModel())
    await named
    await numbered
    assert named.name == "mine"
    assert numbered.name.startswith("run-")


@pytest.mark.asyncio
async def test_stop_cancel_pause_and_resume_are_harmless_after_the_end() -> None:
    run = start(ScriptedModel())
    await run
    for ask in (run.stop, run.cancel, run.pause, run.resume):
        ask()
    assert (run.state, run.outcome, run.reason) == ("completed", "completed", "")
    assert isinstance(await run, History)


@pytest.mark.asyncio
async def test_a_run_may_be_stopped_from_any_thread() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.at_gate()
    thread = threading.Thread(target=run.stop, args=("from afar",))
    thread.start()
    await until(lambda: not thread.is_alive())
    model.open_for_good()
    await run
    assert (run.outcome, run.reason) == ("stopped", "from afar")


@pytest.mark.asyncio
async def test_a_pruned_run_ends_behind_the_batch_under_way_without_validation_and_gives_its_history(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, model = Recorder(), ScriptedModel(gated=True)
    run = start(model, recorder, epochs=3, validation_data=(X, X))
    await model.at_gate()
    run.prune("not promising")
    model.open_for_good()
    history = await run
    assert (run.state, run.outcome, run.reason, run.exception) == ("pruned", "pruned", "not promising", None)
    assert (history.outcome, history.epoch, model.steps) == ("pruned", [0], 1)
    assert "on_test_begin" not in recorder.hooks
    assert "on_exception" not in recorder.hooks
    assert recorder.hooks[-2:] == ["on_epoch_end", "on_train_end"]
    assert caplog.records == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("asked", "outcome"),
    [(["prune", "stop"], "pruned"), (["stop", "prune"], "stopped"), (["prune", "cancel"], "cancelled")],
)
async def test_of_a_stop_and_a_pruning_the_first_counts_and_a_cancel_goes_before_both(
    asked: list[str], outcome: str
) -> None:
    model = ScriptedModel(gated=True)
    run = start(model, epochs=3)
    await model.at_gate()
    for how in asked:
        getattr(run, how)(how)
    model.open_for_good()
    await until(lambda: run.ended)
    assert (run.outcome, run.reason) == (outcome, asked[0] if outcome != "cancelled" else "cancel")


@pytest.mark.asyncio
async def test_a_hook_may_prune_its_own_run() -> None:
    class Prunes(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.run.prune("seen enough")

    run = start(ScriptedModel(), Prunes(), epochs=10**6)
    history = await run
    assert (run.outcome, history.outcome, history.reason) == ("pruned", "pruned", "seen enough")


@pytest.mark.asyncio
async def test_stopped_while_queued_it_begins_and_ends_without_an_epoch() -> None:
    recorder, model = Recorder(), ScriptedModel()
    run = start(model, recorder)
    run.stop("changed my mind")
    history = await run
    assert (run.outcome, run.reason, history.epoch) == ("stopped", "changed my mind", [])
    assert recorder.hooks == ["on_train_begin", "on_train_end"]
    assert model.steps == 0


@pytest.mark.asyncio
async def test_cancelled_while_queued_it_runs_no_hook() -> None:
    recorder, model = Recorder(), ScriptedModel()
    run = start(model, recorder)
    run.cancel("changed my mind")
    assert run.state == "queued"
    with pytest.raises(RunCancelled, match="changed my mind"):
        await run
    assert (run.state, recorder.hooks, model.steps) == ("cancelled", [], 0)
    assert isinstance(await start(model, recorder), History)  # both are free again


@pytest.mark.asyncio
async def test_cancelled_while_queued_it_still_answers_flush_and_snapshot() -> None:
    run = start(ScriptedModel(), Recorder())
    run.cancel()
    early = asyncio.create_task(run.flush())
    with pytest.raises(RunCancelled):
        await run

    async with asyncio.timeout(5):
        await early
        await run.flush()
        assert (await run.snapshot()).step == 0


@pytest.mark.asyncio
async def test_stop_looks_after_a_batch_and_before_an_epoch_never_between() -> None:
    class StopsAtEpoch(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.run.stop("in epoch begin")

    class StopsAtEpochEnd(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.run.stop("in epoch end")

    recorder, model = Recorder(), ScriptedModel()
    await start(model, StopsAtEpoch(), recorder, epochs=3)
    assert model.steps == 5  # the epoch had begun, so one batch of it is trained
    assert [event for event in recorder.events if "epoch" in event[0]] == [
        ("on_epoch_begin", 0),
        ("on_epoch_end", 0),
        ("on_epoch_begin", 1),
        ("on_epoch_end", 1),
    ]
    recorder, model = Recorder(), ScriptedModel()
    await start(model, StopsAtEpochEnd(), recorder, epochs=3)
    assert ("on_epoch_begin", 1) not in recorder.events
    assert model.steps == 4


@pytest.mark.asyncio
async def test_an_epoch_without_a_trained_batch_has_no_end() -> None:
    class Empty:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([np.zeros((1, 1))] if self.passes == 1 else [])

    recorder = Recorder()
    trainer = Trainer(ScriptedModel())
    with pytest.warns(UserWarning, match="gave no batch"):
        await trainer.fit(Empty(), epochs=3, verbose=0, callbacks=recorder)
    assert ("on_epoch_begin", 1) in recorder.events
    assert ("on_epoch_end", 1) not in recorder.events
    assert (trainer.last_run.outcome, trainer.last_run.reason) == ("stopped", "the data ran out")


@pytest.mark.asyncio
async def test_stop_training_is_reset_at_start_and_a_stop_of_the_run_is_not() -> None:
    model = ScriptedModel()
    model.stop_training = True
    run = start(model)
    assert not model.stop_training
    await run
    assert run.outcome == "completed"


# ---------------------------------------------------------------- pause


@pytest.mark.asyncio
async def test_a_pause_parks_the_thread_after_the_batch_under_way() -> None:
    model = ScriptedModel(gated=True)
    run = start(model, epochs=2)
    await model.at_gate()
    run.pause()
    assert run.state == "running"
    model.open_for_good()
    await until(lambda: run.state == "paused")
    await settle()
    assert (run.state, model.steps) == ("paused", 1)
    run.resume()
    await run
    assert (run.outcome, model.steps) == ("completed", 8)
    assert run.stats.waits["pause"] == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["stop", "cancel"])
async def test_stop_and_cancel_end_a_pause(way: str) -> None:
    model = ScriptedModel()
    run = start(model, epochs=200)
    run.pause()
    await until(lambda: run.state == "paused")
    steps = model.steps
    getattr(run, way)("enough")
    if way == "stop":
        assert isinstance(await run, History)
    else:
        with pytest.raises(RunCancelled, match="enough"):
            await run
    assert (run.reason, model.steps) == ("enough", steps)


# ---------------------------------------------------------------- who waits for it


@pytest.mark.asyncio
async def test_many_tasks_may_await_one_run_many_times() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)

    async def watch() -> History:
        first = await run
        assert first is await run
        return first

    watchers = [asyncio.create_task(watch()) for _ in range(20)]
    await model.at_gate()
    model.open_for_good()
    assert {run.history} == set(await asyncio.gather(*watchers))


@pytest.mark.asyncio
async def test_cancelling_a_task_that_awaits_a_run_leaves_the_run_alone() -> None:
    async def watch() -> History:
        return await run

    model = ScriptedModel(gated=True)
    run = start(model)
    watcher = asyncio.create_task(watch())
    await model.open(1)
    watcher.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watcher
    assert (run.state, run.outcome) == ("running", None)
    model.open_for_good()
    await run
    assert run.outcome == "completed"


@pytest.mark.asyncio
async def test_a_cancelled_run_is_an_exception_for_those_who_were_not_cancelled() -> None:
    async def watch() -> None:
        with pytest.raises(RunCancelled) as caught:
            await run
        seen.append(caught.value)

    seen: list[RunCancelled] = []
    model = ScriptedModel(gated=True)
    run = start(model, epochs=2)
    await model.open(5)
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(watch())
        await asyncio.sleep(0)
        run.cancel("by a third")
        model.open_for_good()
    assert [error.reason for error in seen] == ["by a third"] * 3
    assert [error.history for error in seen] == [run.history] * 3
    assert run.history.epoch == [0]
    assert isinstance(run.exception, RunCancelled)


@pytest.mark.asyncio
async def test_a_fit_that_somebody_else_cancels_is_not_a_cancelled_task() -> None:
    model = ScriptedModel(gated=True)
    trainer = Trainer(model)
    task = asyncio.create_task(trainer.fit(X, batch_size=1, verbose=0))
    await asyncio.sleep(0)
    await model.at_gate()
    trainer.last_run.cancel("from the service")
    model.open_for_good()
    with pytest.raises(RunCancelled, match="from the service"):
        await task
    assert not task.cancelled()


@pytest.mark.asyncio
async def test_a_timeout_around_fit_is_a_timeout_error_and_the_hooks_have_run() -> None:
    recorder, model = Recorder(), ScriptedModel()
    task = asyncio.current_task()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await Trainer(model).fit(X, epochs=10**6, batch_size=1, verbose=0, callbacks=recorder)
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert task.cancelling() == 0
    assert live_runs() == []


@pytest.mark.asyncio
async def test_a_task_group_that_fails_cancels_its_fit_and_raises_its_own_error_alone() -> None:
    recorder, model = Recorder(), ScriptedModel(gated=True)

    async def fail() -> None:
        await model.open(1)
        model.open_for_good()
        raise OSError("the sibling")

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  # the block is what is tested
        async with asyncio.TaskGroup() as group:
            fit = group.create_task(
                Trainer(model).fit(X, epochs=10**6, batch_size=1, verbose=0, callbacks=recorder)
            )
            await asyncio.sleep(0)
            group.create_task(fail())
    assert [type(error) for error in caught.value.exceptions] == [OSError]
    assert fit.cancelled()
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


@pytest.mark.asyncio
async def test_further_cancels_are_absorbed_and_counted() -> None:
    class Slow(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            waiting.set()
            await let_go.wait()
            ended.append(True)

    waiting, let_go, ended = asyncio.Event(), asyncio.Event(), []
    model = ScriptedModel(gated=True)
    task = fitting(model, Slow())
    await asyncio.sleep(0)
    await model.open(1)
    task.cancel()
    await asyncio.sleep(0)
    model.open_for_good()
    await waiting.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (task.cancelled(), task.cancelling(), ended) == (True, 4, [True])


@pytest.mark.asyncio
async def test_a_cancel_that_races_with_the_end_is_never_lost_and_never_leaves_anything() -> None:
    for delay in range(0, 40):
        recorder = Recorder()
        model = ScriptedModel()
        trainer = Trainer(model)
        task = asyncio.create_task(trainer.fit(X, verbose=0, callbacks=recorder))
        for _ in range(delay):
            await asyncio.sleep(0.0002)
        cancelled = task.cancel()
        if cancelled:
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            assert (await task).outcome == "completed"
        if trainer.last_run is not None:
            assert trainer.last_run.state in ("completed", "cancelled")
            assert recorder.hooks[-1:] in (["on_train_end"], [])
            assert recorder.hooks.count("on_train_end") == recorder.hooks.count("on_train_begin")
        assert live_runs() == []


def test_a_run_whose_main_function_returns_is_cancelled_in_order() -> None:
    recorder, model = Recorder(), ScriptedModel(gated=True)

    async def main() -> Run:
        run = start(model, recorder, epochs=10**6)
        await model.open(2)
        model.open_for_good()
        return run

    run = asyncio.run(main())
    assert run.state == "cancelled"  # whichever of its tasks was told first gives the reason
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert live_runs() == []


def test_a_run_whose_main_function_returns_at_once_ends_in_order_and_its_model_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, model = Recorder(), ScriptedModel()

    async def main() -> Run:
        return start(model, recorder)

    run = asyncio.run(main())
    assert (run.state, run.outcome) == ("cancelled", "cancelled")
    # The consumers were cancelled before their first step; what they owe is delivered all the same.
    assert recorder.hooks[0] == "on_train_begin"
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert [record.getMessage() for record in caplog.records] == []
    assert recorder.run is None
    assert live_runs() == []

    async def again() -> History:
        return await start(model, recorder)

    assert asyncio.run(again()).outcome == "completed"


@pytest.mark.asyncio
async def test_a_run_whose_task_is_cancelled_before_its_first_step_runs_no_hook_and_frees_its_model() -> None:
    recorder, model = Recorder(), ScriptedModel()
    run = start(model, recorder)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    with pytest.raises(RunCancelled, match="the event loop is shutting down"):
        await run
    assert (run.state, recorder.hooks, live_runs()) == ("cancelled", [], [])
    assert (await start(model, recorder)).outcome == "completed"


def test_a_naive_thread_cannot_be_cancelled() -> None:
    """The negative control of every test here: `to_thread` of a training outlives its cancellation."""
    model = ScriptedModel(gated=True)
    trained: list[int] = []

    def train() -> None:
        for _ in range(3):
            model.train_batch(type("B", (), {"size": 1}))
            trained.append(1)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.to_thread(train)
        model.open_for_good()

    asyncio.run(main())
    assert trained == [1, 1, 1]  # all batches, after the caller was told that it is over


# ---------------------------------------------------------------- async with


@pytest.mark.asyncio
async def test_a_block_that_ends_normally_waits_for_its_run() -> None:
    async with start(ScriptedModel()) as run:
        assert run.state == "queued"
    assert run.state == "completed"


@pytest.mark.asyncio
async def test_a_block_that_ends_normally_resumes_a_paused_run() -> None:
    async with start(ScriptedModel(), epochs=2) as run:
        run.pause()
        await until(lambda: run.state == "paused")
    assert run.state == "completed"


@pytest.mark.asyncio
async def test_a_block_that_raises_cancels_its_run_and_raises_its_own_error() -> None:
    recorder = Recorder()
    with pytest.raises(LookupError, match="mine"):  # noqa: PT012  # the block is what is tested
        async with start(ScriptedModel(), recorder, epochs=10**6) as run:
            await until(lambda: run.step > 2)
            raise LookupError("mine")
    assert (run.state, run.reason) == ("cancelled", "its block raised LookupError")
    assert recorder.hooks[-1] == "on_train_end"


@pytest.mark.asyncio
async def test_a_block_gives_the_error_of_its_run() -> None:
    with pytest.raises(OSError, match="of the model"):
        async with start(ScriptedModel(raises={1: OSError("of the model")})):
            pass
    with pytest.raises(RunCancelled, match="inside"):
        async with start(ScriptedModel(), epochs=10**6) as run:
            run.cancel("inside")


@pytest.mark.asyncio
async def test_a_timeout_inside_of_a_block_cancels_the_run_and_is_a_timeout_error() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), start(ScriptedModel(), epochs=10**6) as run:
            await asyncio.Event().wait()
    assert run.state == "cancelled"


@pytest.mark.asyncio
async def test_a_cancel_while_a_failed_block_waits_for_its_run_is_not_lost() -> None:
    model = ScriptedModel(gated=True)

    async def block() -> None:
        async with start(model):
            await model.at_gate()
            raise LookupError("mine")

    task = asyncio.create_task(block())
    await until(lambda: any(run.reason or run._parts.control.interrupt for run in live_runs()))
    task.cancel()
    await asyncio.sleep(0)
    model.open_for_good()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__context__, LookupError)


# ---------------------------------------------------------------- waiting for oneself


class Waits(Callback):
    """Awaits ``what(run)`` in its hook and keeps what that raised."""

    def __init__(self, what: Callable[[Run], Any], *, in_a_task: bool = False) -> None:
        self.what = what
        self.in_a_task = in_a_task
        self.error: BaseException | None = None

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        coroutine = self.what(self.run)
        try:
            await (asyncio.create_task(coroutine) if self.in_a_task else coroutine)
        except SelfWait as error:
            self.error = error


async def awaits(run: Run) -> None:
    await run


async def flushes(run: Run) -> None:
    await run.flush()


async def reads(run: Run) -> None:
    async for _ in run.events():
        pass


async def enters(run: Run) -> None:
    async with run:
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize("in_a_task", [False, True], ids=["in the hook", "in a task made there"])
@pytest.mark.parametrize("what", [awaits, flushes, reads, enters])
async def test_a_hook_that_waits_for_its_own_run_is_refused_at_once(
    what: Callable[[Run], Any], in_a_task: bool
) -> None:
    waits = Waits(what, in_a_task=in_a_task)
    run = start(ScriptedModel(), waits)
    await run
    assert isinstance(waits.error, SelfWait)
    assert run.name in str(waits.error)


@pytest.mark.asyncio
async def test_an_async_source_that_waits_for_its_own_run_is_refused() -> None:
    runs: list[Run] = []

    async def source() -> AsyncIterator[np.ndarray[Any, Any]]:
        yield np.zeros((1, 1))
        await runs[0]
        yield np.zeros((1, 1))

    runs.append(Trainer(ScriptedModel()).start(source(), verbose=0))
    with pytest.raises(SelfWait):
        await runs[0]


@pytest.mark.asyncio
async def test_a_hook_may_wait_for_another_run_and_that_run_for_its_own() -> None:
    class Nests(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            inner.append(await Trainer(ScriptedModel()).fit(X, verbose=0, callbacks=self.guests))

    inner: list[History] = []
    outer_run: list[Run] = []
    nests, waits = Nests(), Waits(lambda _: awaits(outer_run[0]))
    nests.guests = [waits]
    outer_run.append(start(ScriptedModel(), nests, epochs=2))
    await outer_run[0]
    assert [history.outcome for history in inner] == ["completed", "completed"]
    assert isinstance(waits.error, SelfWait)  # the inner run's hook would wait for the outer run's


@pytest.mark.asyncio
async def test_a_run_cancelled_while_its_hook_awaits_another_fit_cancels_that_one_too() -> None:
    class Nests(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await inner.fit(X, epochs=10**6, verbose=0, callbacks=recorder)

    inner, recorder = Trainer(ScriptedModel()), Recorder()
    outer = Trainer(ScriptedModel())
    outer._limits = Limits(grace=0.05)
    run = outer.start(X, verbose=0, epochs=10**6, callbacks=Nests())
    await until(lambda: inner.last_run is not None and inner.last_run.step > 2)
    run.cancel("no more")
    with pytest.raises(RunCancelled):
        await run
    await until(lambda: not live_runs())
    assert inner.last_run.state == "cancelled"
    assert recorder.hooks[-1] == "on_train_end"


@pytest.mark.asyncio
async def test_a_nested_run_on_a_loop_of_its_own_may_be_awaited_in_an_inline_hook() -> None:
    class Nests(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            outcomes.append(asyncio.run(Trainer(ScriptedModel()).fit(X, verbose=0)).outcome)

    outcomes: list[str] = []
    await start(ScriptedModel(), Nests(), epochs=2)
    assert outcomes == ["completed", "completed"]


def test_awaiting_from_another_event_loop_is_refused() -> None:
    runs: list[Run] = []

    async def main() -> None:
        runs.append(start(ScriptedModel()))
        await runs[0]

    async def elsewhere() -> None:
        for wait in (awaits, flushes):
            with pytest.raises(RuntimeError, match="belongs to another event loop; await it there"):
                await wait(runs[0])

    asyncio.run(main())
    asyncio.run(elsewhere())


@pytest.mark.asyncio
async def test_awaiting_a_live_run_from_a_loop_in_another_thread_is_refused() -> None:
    async def elsewhere() -> None:
        for wait in (awaits, flushes, reads, enters):
            try:
                await wait(run)
            except RuntimeError as error:
                errors.append(str(error))

    errors: list[str] = []
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.at_gate()
    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    await until(lambda: not thread.is_alive())
    model.open_for_good()
    await run
    assert errors == [f"{run.name} belongs to another event loop; await it there"] * 4


# ---------------------------------------------------------------- its errors


@pytest.mark.asyncio
async def test_an_error_awaited_many_times_does_not_grow() -> None:
    run = start(ScriptedModel(raises={1: OSError("of the model")}))
    depths = set()
    for _ in range(50):
        with pytest.raises(OSError, match="of the model") as caught:
            await run
        depths.add(depth(caught.value))
        assert getattr(caught.value, "__notes__", []) == []
    assert len(depths) == 1
    traceback = caught.tb
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "train_batch"  # the original traceback, down to the model's own line
    del traceback


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit, asyncio.CancelledError])
async def test_what_a_model_raises_and_await_would_misread_comes_as_model_error(kind: type[Any]) -> None:
    recorder, original = Recorder(), kind("odd")
    for _ in range(2):
        run = start(ScriptedModel(raises={1: original}), recorder)
        with pytest.raises(ModelError, match=f"the training raised {kind.__name__}: odd") as caught:
            await run
        assert caught.value.__cause__ is original
        assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_system_exit_and_keyboard_interrupt_of_a_model_reach_the_awaiter_and_not_the_loop(
    kind: type[BaseException],
) -> None:
    recorder = Recorder()
    with pytest.raises(kind, match="odd"):
        await Trainer(ScriptedModel(raises={1: kind("odd")})).fit(
            X, batch_size=1, verbose=0, callbacks=recorder
        )
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    await asyncio.sleep(0)  # the loop is alive
    assert isinstance(await start(ScriptedModel()), History)


@pytest.mark.asyncio
async def test_a_failure_that_nobody_awaits_is_logged_as_text(caplog: pytest.LogCaptureFixture) -> None:
    run = start(ScriptedModel(raises={1: OSError("of the model")}))
    await until(lambda: run.state == "failed")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asynccb", logging.ERROR)
    assert record.getMessage() == f"{run.name} failed and nobody awaits it: OSError: of the model"
    assert record.exc_info is None
    assert not any(isinstance(argument, BaseException) for argument in record.args)


@pytest.mark.asyncio
async def test_a_failure_that_somebody_awaits_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match="of the model"):
        await start(ScriptedModel(raises={1: OSError("of the model")}))
    with pytest.raises(OSError, match="of the model"):
        async with start(ScriptedModel(raises={1: OSError("of the model")})):
            pass
    assert caplog.records == []


@pytest.mark.asyncio
async def test_an_ended_run_that_nobody_keeps_is_collected_with_its_model() -> None:
    model = ScriptedModel()
    trainer = Trainer(model)
    await trainer.fit(X, verbose=0, callbacks=Recorder())
    gone = [weakref.ref(model), weakref.ref(trainer.last_run)]
    del model, trainer
    await asyncio.sleep(0)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# ---------------------------------------------------------------- what it counts, and flush


@pytest.mark.asyncio
async def test_stats_count_events_mailboxes_waits_and_copies() -> None:
    recorder = Recorder()
    run = start(ScriptedModel(), recorder)
    await run
    stats = run.stats
    # train begin, epoch begin, 4 x 2 batch events, epoch end, train end
    assert stats.events == 12
    assert stats.callbacks["Recorder"].handled == len(recorder.hooks) == 12
    assert stats.callbacks["Recorder"][0] == stats.callbacks["Recorder"].dropped == 0
    assert (stats.snapshots, stats.waits.get("mailbox", 0)) == (0, 0)


@pytest.mark.asyncio
async def test_two_callbacks_of_one_class_are_told_apart_by_number() -> None:
    run = start(ScriptedModel(), Recorder(), Recorder(), Recorder())
    await run
    assert [name for name in run.stats.callbacks if "Recorder" in name] == [
        "Recorder",
        "Recorder#2",
        "Recorder#3",
    ]


@pytest.mark.asyncio
async def test_flush_waits_for_all_that_was_emitted_so_far() -> None:
    class Slow(Recorder):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            await asyncio.sleep(0.001)
            await super().on_train_batch_end(batch, logs)

    recorder, slow, model = Recorder(), Slow(), ScriptedModel(gated=True)
    run = start(model, recorder, slow)
    await model.open(3)
    await run.flush()
    for each in (recorder, slow):
        assert each.hooks.count("on_train_batch_end") == 3
    model.open_for_good()
    await run
    await run.flush()  # nothing is left to wait for


@pytest.mark.asyncio
async def test_flush_ends_when_its_run_is_cancelled_under_it() -> None:
    class Hangs(Callback):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            await asyncio.Event().wait()

    trainer = Trainer(ScriptedModel(gated=True))
    trainer._limits = Limits(grace=0.02, last_words=0.02)
    run = trainer.start(X, batch_size=1, verbose=0, callbacks=Hangs())
    await trainer.model.open(1)
    flush = asyncio.create_task(run.flush())
    await asyncio.sleep(0)
    run.cancel()
    trainer.model.open_for_good()
    await flush
    with pytest.raises(RunCancelled):
        await run


@pytest.mark.asyncio
async def test_settle_does_not_wait_for_a_hook_that_waits() -> None:
    class Hangs(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await let_go.wait()

    let_go = asyncio.Event()
    run = start(ScriptedModel(), Hangs())
    await settle()
    assert (run.state, run.settled) == ("closing", True)
    let_go.set()
    await run


# ---------------------------------------------------------------- when the machinery itself breaks


@pytest.mark.asyncio
@pytest.mark.parametrize("waits", [False, True])
async def test_a_delivery_that_dies_fails_the_run_and_is_never_a_silent_end(waits: bool) -> None:
    class Broken(Callback):
        lockstep = waits

        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise ValueError("the hook")

    class Reading(Broken):
        reads = 0

        @property
        def on_error(self) -> str:  # type: ignore[override]
            Reading.reads += 1
            if Reading.reads > 1:  # the check at start may read it
                raise RuntimeError("the policy")
            return "raise"

    with pytest.raises(CallbackError) as caught:
        await Trainer(ScriptedModel()).fit(
            np.zeros((2, 1)), batch_size=1, epochs=500, verbose=0, callbacks=Reading()
        )
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.asyncio
async def test_a_stop_flag_set_while_the_thread_waits_for_data_is_seen() -> None:
    waits = asyncio.Event()

    async def silent() -> Any:
        yield np.zeros((1, 1))
        waits.set()
        await asyncio.Event().wait()

    model = ScriptedModel()
    run = Trainer(model).start(silent(), verbose=0)
    await waits.wait()
    model.stop_training = True
    history = await run
    assert (history.outcome, model.steps) == ("stopped", 1)


@pytest.mark.asyncio
async def test_a_cancel_does_not_take_the_place_of_what_an_inline_hook_raised() -> None:
    begun = asyncio.Event()

    class Slow(Callback):
        lockstep = True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self.later()

        async def later(self) -> None:
            begun.set()
            await asyncio.Event().wait()

    class Raising(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise KeyError("mine")

    trainer = Trainer(ScriptedModel())
    trainer._limits = Limits(grace=0.05, last_words=0.05)
    run = trainer.start(np.zeros((1, 1)), verbose=0, callbacks=[Slow(), Raising()])
    await begun.wait()
    run.cancel()
    with pytest.raises(KeyError, match="mine"):
        await run


@pytest.mark.asyncio
async def test_a_defect_in_the_supervision_fails_the_run_and_lets_nobody_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: Supervisor) -> None:
        raise LookupError("a defect of ours")

    monkeypatch.setattr(Supervisor, "_drain", broken)
    model, recorder = ScriptedModel(), Recorder()
    with pytest.raises(LookupError, match="a defect of ours"):
        await Trainer(model).fit(np.zeros((1, 1)), verbose=0, callbacks=recorder)
    monkeypatch.undo()
    assert live_runs() == []
    await settle()
    history = await Trainer(model).fit(np.zeros((1, 1)), verbose=0)  # the model is free again
    assert history.outcome == "completed"


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", ["on_epoch_end", "on_train_batch_end"])
async def test_what_a_stuck_inline_hook_returns_after_its_run_has_ended_is_closed(hook: str) -> None:
    inside, go_on = threading.Event(), threading.Event()
    made: list[Any] = []

    class Stuck(Callback):
        async def later(self) -> None: ...

    def stuck(self: Stuck, index: int, logs: Any = None) -> Any:
        inside.set()
        go_on.wait(10)
        made.append(self.later())
        return made[0]

    setattr(Stuck, hook, stuck)
    trainer = Trainer(ScriptedModel())
    trainer._limits = Limits(grace=0.05, last_words=0.05)
    run = trainer.start(np.zeros((1, 1)), verbose=0, callbacks=Stuck())
    await until(inside.is_set)
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == f"asynccb {run.name}":
            await asyncio.get_running_loop().run_in_executor(SerialExecutor("joins"), thread.join, 5)
    assert [coroutine.cr_frame for coroutine in made] == [None]


@pytest.mark.asyncio
async def test_the_parts_of_a_run_that_is_over_are_gone_without_the_garbage_collector() -> None:
    """Beside many short trainings to collect them cost a quarter of their time."""
    gc.collect()
    gc.disable()
    try:
        run = Trainer(ScriptedModel()).start(X, verbose=0, callbacks=[Recorder()])
        assert run._parts is not None
        parts = run._parts.dispatcher, run._parts.driver, run._parts.control, run._parts.supervisor
        gone = [weakref.ref(part) for part in (run._parts, *parts)]
        del parts
        await run
        await until(lambda: run._session is not None and run._session.parts is None)
        await asyncio.sleep(0)
        assert [part() for part in gone] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_who_reads_on_another_thread_while_a_run_ends_reads_to_the_end() -> None:
    run = Trainer(ScriptedModel()).start(X, epochs=2, verbose=0)
    parts = run._parts  # as that thread has got hold of them
    assert parts is not None
    await run
    await until(lambda: run._session is not None and run._session.parts is None)
    assert (parts.driver.epoch, parts.driver.step, parts.control.parked) == (1, 2, False)
    assert parts.statistics() == run.stats
    parts.control.stop("too late")
    parts.control.pause()
    parts.poke()
    parts.readers_changed()
    await asyncio.sleep(0)
    assert run.outcome == "completed"
