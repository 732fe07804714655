"""Callbacks beside a hand-written loop: the meanings of a run, around a loop that is not ours."""

from __future__ import annotations

import asyncio
import contextvars
import csv
import gc
import logging
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import until

from asynccb import (
    ArgumentError,
    Callback,
    CallbackBusy,
    CallbackError,
    History,
    ModelBusy,
    RunCancelled,
    TornState,
    Trainer,
)
from asynccb.callbacks import (
    BackupAndRestore,
    BaseLogger,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
)
from asynccb.integrations import Background
from asynccb.integrations.entrance import Entrance
from asynccb.run import live_runs
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATIENT = 20.0


def train(hooks: Any, epochs: int = 1, batches: int = 2, loss: float = 1.0) -> None:
    """A hand-written loop."""
    for epoch in range(epochs):
        hooks.on_epoch_begin(epoch)
        for batch in range(batches):
            hooks.on_batch_begin(batch, {"size": 4})
            hooks.on_batch_end(batch, {"loss": loss, "size": 4})
        hooks.on_epoch_end(epoch, {"loss": loss})
        if hooks.should_stop:
            break


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


class Weighed:
    """What can be copied: one array, filled with the number of its updates."""

    def __init__(self) -> None:
        self.model = ScriptedModel()

    def update(self) -> None:
        self.model.weights += 1

    def capture(self) -> Any:
        return self.model.capture()


class Recorder(Callback):
    """Notes its hooks, which run inline, on the loop's own thread."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.thread = threading.get_ident()

    def _note(self, hook: str) -> None:
        assert threading.get_ident() == self.thread
        self.hooks.append(hook)

    def on_train_begin(self, logs: Any = None) -> None:
        self.thread = threading.get_ident()
        self._note("on_train_begin")

    def on_train_end(self, logs: Any = None) -> None:
        self._note("on_train_end")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._note("on_epoch_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("on_epoch_end")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._note("on_train_batch_begin")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._note("on_train_batch_end")

    def on_test_begin(self, logs: Any = None) -> None:
        self._note("on_test_begin")

    def on_test_end(self, logs: Any = None) -> None:
        self._note("on_test_end")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._note("on_test_batch_begin")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._note("on_test_batch_end")

    def on_exception(self, exception: BaseException) -> None:
        self._note("on_exception")


class Beside(Callback):
    """Notes its hooks and the thread that they run on."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.threads: set[str] = set()

    async def on_train_begin(self, logs: Any = None) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        self._note("begin")

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note((epoch, dict(logs)))

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)
        self._note(batch)

    async def on_exception(self, exception: BaseException) -> None:
        self._note(exception)

    async def on_train_end(self, logs: Any = None) -> None:
        self._note("end")

    def _note(self, what: Any) -> None:
        self.seen.append(what)
        self.threads.add(threading.current_thread().name)


class Fails(Callback):
    """Its epoch ends fail, beside the loop, when they are let, and the loop's thread can wait for that."""

    def __init__(self) -> None:
        self._let, self._failed = threading.Event(), threading.Event()

    def fail(self) -> None:
        self._let.set()
        assert self._failed.wait(PATIENT)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await asyncio.to_thread(self._let.wait, PATIENT)
        asyncio.get_running_loop().call_soon(self._failed.set)
        raise PermissionError("the disk")


# ---------------------------------------------------------------- the same meanings


def test_def_hooks_run_on_the_loops_thread_in_order_and_async_def_ones_on_another() -> None:
    recorder, beside = Recorder(), Beside()
    with Background([recorder, beside]) as hooks:
        train(hooks, epochs=2, batches=1)
    assert recorder.hooks == [
        "on_train_begin",
        *["on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"] * 2,
        "on_train_end",
    ]
    assert beside.seen == ["begin", 0, (0, {"loss": 1.0}), 0, (1, {"loss": 1.0}), "end"]
    assert beside.threads == {"asynccb background"}
    assert hooks.history.history == {"loss": [1.0, 1.0]}
    assert (hooks.history.outcome, hooks.run.state, hooks.run.step) == ("completed", "completed", 2)


def test_entering_waits_for_the_awaitables_of_train_begin() -> None:
    beside = Beside()
    with Background(beside):
        assert beside.seen == ["begin"]


def test_a_validation_is_told_too() -> None:
    recorder = Recorder()
    with Background(recorder) as hooks:
        hooks.on_epoch_begin(0)
        hooks.on_test_begin()
        hooks.on_test_batch_begin(0)
        hooks.on_test_batch_end(0, {"loss": 2.0})
        hooks.on_test_end({"loss": 2.0})
        hooks.on_epoch_end(0, {"val_loss": 2.0})
    assert recorder.hooks[2:-2] == [
        "on_test_begin",
        "on_test_batch_begin",
        "on_test_batch_end",
        "on_test_end",
    ]
    assert hooks.history.history == {"val_loss": [2.0]}


def test_a_coroutine_that_a_def_hook_returns_runs_beside_the_loop() -> None:
    class Both(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self._later(threading.current_thread().name)

        async def _later(self, decided_on: str) -> None:
            ran.append((decided_on, threading.current_thread().name))

    ran: list[Any] = []
    with Background(Both()) as hooks:
        train(hooks)
    assert ran == [(threading.current_thread().name, "asynccb background")]


def test_logs_are_numbers_and_the_callers_dict_may_be_used_again() -> None:
    beside, logs = Beside(), {"loss": np.float32(0.5)}
    with Background(beside) as hooks:
        hooks.on_epoch_end(0, logs)
        logs["loss"] = np.float32(9)
    assert beside.seen[1] == (0, {"loss": 0.5})
    assert type(beside.seen[1][1]["loss"]) is float


def test_a_full_mailbox_holds_the_loop_and_nothing_is_lost() -> None:
    class Slow(Callback):
        mailbox_size = 2

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            most.append(told[0] - batch)
            seen.append(batch)

    most: list[int] = []
    seen: list[int] = []
    told = [0]
    with Background(Slow()) as hooks:
        for batch in range(50):
            told[0] = batch
            hooks.on_batch_end(batch)
    assert seen == list(range(50))
    assert max(most) <= 3  # two that wait, and the one that is handled
    assert hooks.run.stats.callbacks["Slow"].held > 0


def test_without_a_bound_the_loop_would_run_away() -> None:
    """The negative control of the test before: a mailbox that is never full."""

    class Slow(Callback):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            await asyncio.to_thread(all_told.wait, PATIENT)
            seen.append(batch)

    all_told, seen = threading.Event(), []
    with Background(Slow()) as hooks:
        for batch in range(50):
            hooks.on_batch_end(batch)
        assert seen == []
        all_told.set()
    assert seen == list(range(50))


def test_what_is_dropped_is_counted() -> None:
    class Newest(Callback):
        overflow = "drop_oldest"
        mailbox_size = 2

        async def on_train_begin(self, logs: Any = None) -> None: ...

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 0:
                begun.set()
                await asyncio.to_thread(go_on.wait, PATIENT)
            seen.append(batch)

    begun, go_on, seen = threading.Event(), threading.Event(), []
    with Background(Newest()) as hooks:
        hooks.on_batch_end(0)
        assert begun.wait(PATIENT)
        for batch in range(1, 10):
            hooks.on_batch_end(batch)
        go_on.set()
    assert seen == [0, 8, 9]
    assert hooks.run.stats.callbacks["Newest"].dropped == 7


def test_a_lockstep_hook_is_done_when_the_call_returns() -> None:
    class Lockstep(Beside):
        lockstep = True

    beside = Lockstep()
    with Background(beside) as hooks:
        hooks.on_batch_end(0)
        assert beside.seen == ["begin", 0]
        hooks.on_epoch_end(0)
        assert beside.seen == ["begin", 0, (0, {})]


def test_hooks_see_the_context_of_whoever_enters() -> None:
    class Reads(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            seen.append(who.get())

    who: contextvars.ContextVar[str] = contextvars.ContextVar("who")
    seen: list[str] = []
    who.set("the caller")
    with Background(Reads()):
        pass
    assert seen == ["the caller"]


def test_it_may_be_used_again() -> None:
    recorder = Recorder()
    background = Background(recorder)
    for _ in range(2):
        with background as hooks:
            train(hooks)
        assert hooks.history.epoch == [0]
    assert recorder.hooks.count("on_train_end") == 2


def test_params_and_model_are_the_callbacks_own() -> None:
    class Looks(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            seen.append((self.params, self.model, self.run.name))

    seen: list[Any] = []
    model = object()
    with Background(Looks(), params={"epochs": 7}, model=model, name="mine"):
        pass
    assert seen == [({"epochs": 7}, model, "mine")]


def test_means_of_an_epoch_are_base_loggers_affair() -> None:
    with Background(BaseLogger()) as hooks:
        hooks.on_epoch_begin(0)
        hooks.on_batch_end(0, {"loss": 1.0, "size": 3})
        hooks.on_batch_end(1, {"loss": 5.0, "size": 1})
        hooks.on_epoch_end(0)
    assert hooks.history.history == {"loss": [2.0]}


def test_no_event_is_built_that_nobody_wants() -> None:
    class Touchy(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("somebody looked")

    with Background([]) as hooks:
        hooks.on_batch_end(0, Touchy(loss=1))
        assert hooks.run.step == 1


# ---------------------------------------------------------------- stop and cancel


def test_a_stop_is_seen_by_the_loop_and_is_the_outcome() -> None:
    stops = LambdaCallback(on_epoch_end=lambda epoch, logs: stops.run.stop("enough"))
    with Background(stops) as hooks:
        assert not hooks.should_stop
        train(hooks, epochs=5)
    assert hooks.history.epoch == [0]
    assert (hooks.history.outcome, hooks.history.reason) == ("stopped", "enough")
    assert not hooks.should_stop


def test_early_stopping_stops_a_loop_without_a_model() -> None:
    with Background(EarlyStopping("loss", patience=1)) as hooks:
        train(hooks, epochs=9)
    assert hooks.history.epoch == [0, 1]
    assert hooks.history.reason.startswith("EarlyStopping: loss has not improved")


def test_stop_training_of_the_model_is_a_stop() -> None:
    class Sets(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = True

    with Background(Sets()) as hooks:
        hooks.on_batch_end(0)
        assert hooks.should_stop
    assert hooks.history.outcome == "stopped"


def test_a_cancel_is_raised_by_the_next_hook_and_all_later_ones() -> None:
    recorder = Recorder()
    with pytest.raises(RunCancelled, match="somebody") as caught, Background(recorder) as hooks:  # noqa: PT012
        hooks.run.cancel("somebody")
        with pytest.raises(RunCancelled):
            hooks.on_batch_end(0)
        hooks.on_epoch_end(0)
    assert caught.value.history is hooks.history
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert hooks.history.outcome == "cancelled"


def test_a_block_may_end_by_a_cancel_that_it_was_told_earlier() -> None:
    told: list[RunCancelled] = []
    with pytest.raises(RunCancelled) as caught, Background([]) as hooks:  # noqa: PT012
        hooks.run.cancel("somebody")
        for epoch in range(2):
            with pytest.raises(RunCancelled) as each:
                hooks.on_epoch_end(epoch)
            told.append(each.value)
        raise told[0]
    assert caught.value is told[0]
    assert hooks.history.outcome == "cancelled"


def test_a_cancel_that_the_loop_swallows_is_raised_at_the_end() -> None:
    with pytest.raises(RunCancelled, match="somebody"), Background([]) as hooks:
        hooks.run.cancel("somebody")


def test_a_loop_that_comes_back_late_is_not_given_up(caplog: pytest.LogCaptureFixture) -> None:
    recorder, beside = Recorder(), Beside()
    background = Background([recorder, beside])
    background._limits = background._limits._replace(grace=0.02, last_words=0.02)
    with pytest.raises(RunCancelled), background as hooks:  # noqa: PT012
        hooks.run.cancel("while it computes")
        _wait_longer_than(0.06)
        assert hooks.run.state == "running"
    assert recorder.hooks == ["on_train_begin", "on_exception", "on_train_end"]
    assert beside.seen[-1] == "end"
    assert caplog.messages == []


def test_one_whose_owner_may_be_gone_is_given_up_after_its_time() -> None:
    """The negative control of the test before: the same with a limit, as ``open`` has one."""
    recorder = Recorder()
    background = Background(recorder)
    background._limits = background._limits._replace(grace=0.02, last_words=0.02)
    background._begin(0.02)
    background.run.cancel("while it computes")
    deadline = threading.Event()
    while not background.run.ended and not deadline.wait(0.005):
        pass
    assert recorder.hooks == ["on_train_begin"]
    with pytest.raises(RunCancelled):
        background.on_batch_end(0)
    with pytest.raises(RunCancelled):
        background.close()
    assert recorder.hooks == ["on_train_begin"]


def _wait_longer_than(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_a_pause_parks_the_loop_until_it_is_taken_back() -> None:
    class Parks(Callback):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            while self.run.state != "paused":  # noqa: ASYNC110  # the loop's thread brings it about
                await asyncio.sleep(0)
            paused.append(batch)
            self.run.resume()

    paused: list[int] = []
    with Background(Parks()) as hooks:
        hooks.run.pause()
        hooks.on_batch_end(0)
        assert paused == [0]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration()])
def test_an_exception_of_the_block_is_told_and_goes_on(error: BaseException) -> None:
    recorder, beside = Recorder(), Beside()
    with pytest.raises(type(error)) as caught, Background([recorder, beside]) as hooks:
        raise error
    assert caught.value is error
    assert recorder.hooks == ["on_train_begin", "on_exception", "on_train_end"]
    assert beside.seen[2:] == ["end"]
    if not isinstance(error, StopIteration):
        assert beside.seen[1] is error
    assert hooks.history.outcome == "failed"


def test_a_hook_beside_that_fails_is_raised_by_the_next_call_and_at_the_end() -> None:
    fails, recorder = Fails(), Recorder()
    with pytest.raises(CallbackError) as caught, Background([fails, recorder]) as hooks:  # noqa: PT012
        hooks.on_epoch_end(0)
        fails.fail()
        for _ in range(2):
            with pytest.raises(CallbackError) as first:
                hooks.on_batch_end(0)
    assert caught.value is first.value
    assert isinstance(caught.value.__cause__, PermissionError)
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert [failure.callback for failure in hooks.history.failures] == ["Fails"]


def test_one_that_fails_behind_the_last_call_is_raised_at_the_end() -> None:
    class FailsLast(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            raise PermissionError("the disk")

    with pytest.raises(CallbackError, match=r"FailsLast\.on_train_end"), Background(FailsLast()):
        pass


def test_it_is_a_note_where_the_block_raises_something_else() -> None:
    fails = Fails()
    with pytest.raises(ValueError, match="mine") as caught, Background(fails) as hooks:  # noqa: PT012
        hooks.on_epoch_end(0)
        fails.fail()
        raise ValueError("mine")
    assert "Also: CallbackError: Fails.on_epoch_end" in caught.value.__notes__[0]


def test_a_callback_that_only_warns_leaves_the_loop_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Warns(Fails):
        on_error = "warn"

    warns = Warns()
    with Background(warns) as hooks:
        train(hooks, epochs=3)
        warns.fail()
    assert hooks.history.failures[0].times == 3
    assert hooks.history.outcome == "completed"
    assert len(caplog.messages) == 1


def test_an_inline_hook_that_raises_does_so_out_of_the_call() -> None:
    def refuse(epoch: int, logs: Any) -> None:
        raise error

    error = ValueError("of the hook")
    recorder = Recorder()
    background = Background([LambdaCallback(on_epoch_end=refuse), recorder], model=Weighed())
    with pytest.raises(ValueError, match="of the hook") as caught, background as hooks:
        hooks.on_epoch_end(0)
    assert caught.value is error
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    assert hooks.history.outcome == "failed"


def test_a_train_begin_that_fails_is_raised_by_the_entrance_and_leaves_nothing() -> None:
    class Refuses(Callback):
        async def on_train_begin(self, logs: Any = None) -> None:
            raise PermissionError("the file")

    recorder = Recorder()
    with pytest.raises(CallbackError, match="the file"), Background([recorder, Refuses()]):
        pytest.fail("it was entered")
    assert recorder.hooks == ["on_train_begin", "on_exception", "on_train_end"]
    assert "asynccb background" not in threads()


def test_a_callback_of_another_run_is_refused_and_nothing_begins() -> None:
    recorder = Recorder()
    with Background(recorder) as first:
        with pytest.raises(CallbackBusy, match="Recorder already serves"), Background(recorder):
            pytest.fail("it was entered")
        train(first)
    assert recorder.hooks.count("on_train_begin") == 1


def test_hooks_outside_of_the_block_or_on_another_thread_are_refused() -> None:
    background = Background([])
    with pytest.raises(RuntimeError, match="inside of"):
        background.on_epoch_end(0)
    with background as hooks:
        failed: list[str] = []

        def call() -> None:
            try:
                hooks.on_epoch_end(0)
            except RuntimeError as error:
                failed.append(str(error))

        other = threading.Thread(target=call)
        other.start()
        other.join()
        assert [text.partition(";")[0] for text in failed] == [
            "hooks are called on the thread that has entered the Background"
        ]
        with pytest.raises(RuntimeError, match="open already"):
            background.__enter__()
    with pytest.raises(RuntimeError, match="inside of"):
        background.on_epoch_end(0)


def test_what_cannot_be_done_is_refused_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be resumed by us"):
        Background(BackupAndRestore(tmp_path))
    with pytest.raises(ArgumentError, match="not classes"):
        Background([History])  # type: ignore[list-item]


def test_what_is_no_epoch_and_what_are_no_logs_is_refused_by_the_call() -> None:
    with Background([History()]) as hooks:
        given: Any
        for given in ({"loss": 1.0}, "0", 0.5):
            with pytest.raises(ArgumentError, match=r"epoch=.*a whole number, from 0 on"):
                hooks.on_epoch_end(given)
        given = 0.5
        with pytest.raises(ArgumentError, match=r'logs=0.5: a dict.*Write \{"loss": loss\}'):
            hooks.on_epoch_end(0, given)
        given = np.int64(0)
        hooks.on_epoch_end(given, {"loss": 1.0})
    assert hooks.history.epoch == [0]
    assert type(hooks.history.epoch[0]) is int


def test_a_second_interrupt_while_it_drains_leaves_the_grace_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hangs(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            await asyncio.Event().wait()

    background = Background(Hangs())
    background._limits = background._limits._replace(grace=0.02, last_words=0.02)
    with pytest.raises(KeyboardInterrupt), background as hooks:  # noqa: PT012
        over = background._entrance._over
        wait, interrupts = over.wait, [KeyboardInterrupt()]

        def interrupted(timeout: float | None = None) -> bool:
            if interrupts:
                raise interrupts.pop()
            return wait(timeout)

        monkeypatch.setattr(over, "wait", interrupted)
    assert hooks.run.ended
    assert "asynccb background" not in threads()


# ---------------------------------------------------------------- snapshots


def test_a_snapshot_is_of_the_very_moment() -> None:
    class Keeps(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            return self._later(self.snapshot()) if batch == 1 else None

        async def _later(self, snapshot: Any) -> None:
            kept.append((snapshot.step, float(snapshot.arrays["weights"][0])))

    kept: list[Any] = []
    model = Weighed()
    with Background(Keeps(), model=model) as hooks:
        for batch in range(4):
            model.update()
            hooks.on_batch_end(batch)
    assert kept == [(2, 2.0)]


def test_one_that_a_hook_beside_asks_for_is_of_a_place_between_two_batches() -> None:
    class Asks(Callback):
        lockstep = True

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            snapshot = await self.run.snapshot()
            kept.append((snapshot.step, float(snapshot.arrays["weights"][0])))

    kept: list[Any] = []
    model = Weighed()
    with Background(Asks(), model=model) as hooks:
        for batch in range(2):
            model.update()
            hooks.on_batch_end(batch)
    assert kept == [(1, 1.0), (2, 2.0)]


def test_a_checkpoint_is_written_beside_the_loop(tmp_path: Path) -> None:
    model = Weighed()
    with Background(ModelCheckpoint(str(tmp_path / "{epoch}.npy")), model=model) as hooks:
        train(hooks, epochs=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_model_a_checkpoint_is_refused_by_the_entrance(tmp_path: Path) -> None:
    with (
        pytest.raises(ArgumentError, match=r"model=None: snapshots and checkpoints need it"),
        Background(ModelCheckpoint(str(tmp_path / "x"))),
    ):
        pytest.fail("it was entered")


def test_a_model_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Trains:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {}

    with (
        pytest.raises(ArgumentError, match=r"Trains.*capture is needed"),
        Background(ModelCheckpoint(str(tmp_path / "x")), model=Trains()),
    ):
        pytest.fail("it was entered")


def test_behind_an_exception_of_the_block_the_weights_may_be_torn() -> None:
    class Asks(Callback):
        def on_exception(self, exception: BaseException) -> None:
            try:
                self.snapshot()
            except TornState:
                torn.append(exception)

    torn: list[BaseException] = []
    with pytest.raises(ValueError, match="in a batch"), Background(Asks(), model=Weighed()):
        raise ValueError("in a batch")
    assert len(torn) == 1


# ---------------------------------------------------------------- the caller's loop


@pytest.mark.asyncio
async def test_hooks_run_on_the_callers_loop_where_it_is_given() -> None:
    class Here(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            loops.append(asyncio.get_running_loop())

    def work() -> None:
        with background as hooks:
            train(hooks, epochs=2)
        names.append(threads())

    loops: list[Any] = []
    names: list[set[str]] = []
    loop = asyncio.get_running_loop()
    background = Background(Here(), loop=loop)
    await _in_thread(work)
    assert loops == [loop, loop]
    assert "asynccb background" not in names[0]
    assert (await background.run).epoch == [0, 1]


@pytest.mark.asyncio
async def test_the_run_can_be_read_and_stopped_by_the_callers_tasks() -> None:
    def work() -> None:
        with background as hooks:
            entered.set()
            epoch = 0
            while not hooks.should_stop:
                hooks.on_epoch_end(epoch)
                epoch += 1

    entered = threading.Event()
    background = Background([], loop=asyncio.get_running_loop())
    working = asyncio.ensure_future(_in_thread(work))
    await until(entered.is_set)
    seen = []
    async for event in background.run.events():
        seen.append(event)
        background.run.stop("seen enough")
    await working
    assert background.history.outcome == "stopped"
    assert seen


@pytest.mark.asyncio
async def test_to_enter_on_the_loops_own_thread_is_refused() -> None:
    with (
        pytest.raises(ArgumentError, match="the loop of another thread"),
        Background([], loop=asyncio.get_running_loop()),
    ):
        pytest.fail("it was entered")


def test_on_the_thread_of_a_running_loop_a_private_one_serves() -> None:
    """As in a cell of a notebook."""

    async def main() -> None:
        with Background(beside) as hooks:
            train(hooks)

    beside = Beside()
    asyncio.run(main())
    assert beside.threads == {"asynccb background"}


def test_a_loop_that_does_not_run_is_refused() -> None:
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ArgumentError, match="a loop that runs"), Background([], loop=loop):
            pytest.fail("it was entered")
    finally:
        loop.close()
    none: Any = "uvloop"
    with pytest.raises(ArgumentError, match="a loop that runs"), Background([], loop=none):
        pytest.fail("it was entered")


def test_where_the_callers_loop_ends_the_next_hook_ends_the_foreign_one() -> None:
    """``asyncio.run`` waits for the threads of ``to_thread``; without this, for ever."""

    def work(loop: asyncio.AbstractEventLoop) -> None:
        try:
            with Background(recorder, loop=loop) as hooks:
                entered.set()
                while True:
                    hooks.on_batch_end(0)
        except RunCancelled as error:
            ended.append(str(error))

    async def main() -> None:
        working = asyncio.ensure_future(asyncio.to_thread(work, asyncio.get_running_loop()))
        await until(entered.is_set)
        working.cancel()

    recorder, entered, ended = Recorder(), threading.Event(), []
    asyncio.run(main())
    assert len(ended) == 1
    assert "the event loop is shutting down" in ended[0]
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


def test_an_interrupt_when_the_callers_loop_is_closed_leaves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)  # as in the next test

    def interrupt(timeout: float | None = None) -> bool:
        if loop.is_closed():
            return False
        loop.close()
        raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()
    with pytest.raises(KeyboardInterrupt) as caught, Background([], loop=loop) as hooks:  # noqa: PT012
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        monkeypatch.setattr(hooks._entrance._over, "wait", interrupt)
    assert live_runs() == []
    del hooks, caught
    gc.collect()


@pytest.mark.parametrize("error", [None, ValueError("mine")])
def test_where_the_callers_loop_is_closed_during_the_drain_the_end_says_so(
    error: ValueError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # asyncio says that a task was destroyed; whoever closes a loop under its tasks is told so by it.
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)

    def close_meanwhile(timeout: float | None = None) -> bool:
        loop.close()
        return False

    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()
    with (  # noqa: PT012
        pytest.raises(error.__class__ if error else RunCancelled) as caught,
        Background([], loop=loop) as hooks,
    ):
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        monkeypatch.setattr(hooks._entrance._over, "wait", close_meanwhile)
        if error is not None:
            raise error
    said = caught.value.__notes__[0] if error else str(caught.value)
    assert "the event loop was closed while callbacks still worked" in said
    assert live_runs() == []
    del hooks, caught
    gc.collect()


async def _in_thread(work: Callable[[], None]) -> None:
    """``asyncio.to_thread`` without the default executor, whose threads stay."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        loop.call_soon_threadsafe(done.set_result, None)

    thread = threading.Thread(target=run)
    thread.start()
    await done
    thread.join()
    if failed:
        raise failed[0]


# ---------------------------------------------------------------- begin and end by calls


def test_one_that_was_forgotten_is_closed_by_the_next_open(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    background = Background(recorder)
    background.open()
    first = background.run
    background.on_epoch_begin(0)
    background.open(params={"epochs": 2})
    assert first.outcome == "cancelled"
    assert recorder.hooks[:4] == ["on_train_begin", "on_epoch_begin", "on_exception", "on_train_end"]
    assert recorder.params == {"epochs": 2}
    background.close()
    background.close()
    assert recorder.hooks[4:] == ["on_train_begin", "on_train_end"]
    assert background.history.outcome == "completed"
    assert len(caplog.messages) == 1
    assert "its loop ended without a word" in caplog.messages[0]


@pytest.mark.parametrize("shared", ["model", "callback"])
def test_one_that_was_forgotten_is_closed_by_another_that_has_its_model_or_a_callback(shared: str) -> None:
    """As where a cell of a notebook is run again."""
    recorder = Recorder()
    model, other = Weighed(), Weighed()
    first = Background(recorder)
    first.open(model=model)
    second = Background(recorder if shared == "callback" else [])
    second.open(model=model if shared == "model" else other)
    assert not first.is_open
    assert first.run.outcome == "cancelled"
    assert recorder.hooks[:3] == ["on_train_begin", "on_exception", "on_train_end"]
    second.close()
    assert second.history.outcome == "completed"


def test_one_that_has_nothing_in_common_may_be_inside_of_it_or_on_another_thread() -> None:
    model = Weighed()
    outer, inner = Background([]), Background([])
    outer.open(model=model)
    inner.open(model=Weighed())
    assert outer.is_open
    inner.close()
    refused: list[BaseException] = []

    def other_thread() -> None:
        try:
            Background([]).open(model=model)
        except ModelBusy as error:
            refused.append(error)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(refused) == 1
    outer.on_epoch_end(0)
    outer.close()


def test_the_model_of_one_that_was_forgotten_may_be_torn() -> None:
    class Asks(Callback):
        def on_exception(self, exception: BaseException) -> None:
            with pytest.raises(TornState):
                self.snapshot()
            asked.append(exception)

    asked: list[BaseException] = []
    background = Background(Asks())
    background.open(model=Weighed())
    background.open()
    background.close()
    assert len(asked) == 1


def test_one_that_is_forgotten_for_good_is_closed_with_the_interpreter(tmp_path: Path) -> None:
    script = """
        from asynccb.callbacks import CSVLogger, LambdaCallback
        from asynccb.integrations import Background

        says = LambdaCallback(on_train_end=lambda logs: print("end"))
        background = Background([CSVLogger("log.csv"), says])
        background.open()
        for epoch in range(3):
            background.on_epoch_end(epoch, {"loss": epoch})
        raise ValueError("as a fit that fails")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert "as a fit that fails" in done.stderr
    assert done.stdout == "end\n"
    with open(tmp_path / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


# ---------------------------------------------------------------- beside a Trainer


def test_a_foreign_loop_takes_no_turns_with_trainings() -> None:
    """It might not give its turn back for the length of an epoch. A Trainer's run is the control."""

    class Trains:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 1.0}

    async def fit() -> Any:
        run = Trainer(Trains()).start(np.zeros((1, 1)), verbose=0)
        await run
        return run.stats.computed

    with Background([], model=Trains()) as hooks:
        train(hooks)
        assert asyncio.run(fit()) > 0.0
    assert hooks.run.stats.computed == 0.0


def test_a_trainer_does_not_get_a_model_that_a_foreign_loop_trains() -> None:
    async def fit() -> None:
        await Trainer(model).fit(np.zeros((1, 1)), verbose=0)

    model = ScriptedModel()
    with Background([], model=model), pytest.raises(ModelBusy, match="the model is already in"):
        asyncio.run(fit())


# ---------------------------------------------------------------- interrupted on the way in


@pytest.mark.parametrize("comes_first", ["the interrupt", "the loop"])
def test_an_interrupt_on_the_way_in_leaves_nothing(comes_first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(entrance: Entrance) -> Any:
        if comes_first == "the loop":
            entrance._wait(entrance._news)
        raise KeyboardInterrupt

    monkeypatch.setattr(Entrance, "wait_for_driver", interrupted)
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), Background(recorder):
        pytest.fail("it was entered")
    assert recorder.hooks == []
    assert "asynccb background" not in threads()
    monkeypatch.undo()
    with Background(recorder):  # nobody has it any more
        pass
    assert recorder.hooks == ["on_train_begin", "on_train_end"]


def test_where_no_loop_can_be_made_the_entrance_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise OSError("too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", refuse)
    monkeypatch.setattr(asyncio.events, "new_event_loop", refuse)
    with pytest.raises(OSError, match="too many open files"), Background([]):
        pytest.fail("it was entered")
    assert "asynccb background" not in threads()
