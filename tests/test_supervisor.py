"""What owns a training: every hook that raises, a cancel at every point, the drain and its limits."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import until

from asynccb import Callback, CallbackError, ModelError, Run, RunCancelled, Trainer
from asynccb.callbacks import BackupAndRestore
from asynccb.run import live_runs
from asynccb.supervisor import Supervisor
from asynccb.testing import Recorder, ScriptedModel, settle
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

X = np.zeros((2, 1))
SHORT = Limits(grace=0.05, last_words=0.05, poll=0.01)


class OfNoKind(BaseException):
    """Neither an Exception nor one of Python's own."""


KINDS = [
    ValueError,
    OfNoKind,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
    StopIteration,
    GeneratorExit,
]
ODD = (asyncio.CancelledError, StopIteration, GeneratorExit)
HOOKS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_test_end",
    "on_epoch_end",
    "on_train_end",
]


class Notes(Callback):
    """Notes the hooks it got."""

    def __init__(self) -> None:
        self.seen: list[str] = []


def make(side: str, raising: str = "", error: BaseException | None = None) -> Notes:
    """A callback of ``def`` or of ``async def`` hooks; the first call of ``raising`` raises ``error``."""

    def note(self: Notes, hook: str) -> None:
        self.seen.append(hook)
        if hook == raising and error is not None and self.seen.count(hook) == 1:
            raise error

    def inline(hook: str) -> Callable[..., Any]:
        return lambda self, *_: note(self, hook)

    def beside(hook: str) -> Callable[..., Any]:
        async def call(self: Notes, *_: Any) -> None:
            await asyncio.sleep(0)
            note(self, hook)

        return call

    kind = inline if side == "inline" else beside
    return type(side.capitalize(), (Notes,), {hook: kind(hook) for hook in [*HOOKS, "on_exception"]})()


def trainer_of(model: ScriptedModel, limits: Limits = SHORT) -> Trainer:
    trainer = Trainer(model)
    trainer._limits = limits
    return trainer


def nothing_left() -> bool:
    """Whether no run, no task and no thread of a training is there any more."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("asynccb run")]
    return not (live_runs() or tasks or threads)


# ---------------------------------------------------------------- each hook, position and kind of error


async def fit_with(bad: Notes, position: int) -> tuple[BaseException | None, list[Notes], Run]:
    others = [make("inline"), make("beside")]
    callbacks = [*others[:position], bad, *others[position:]]
    trainer = trainer_of(ScriptedModel(), Limits(poll=0.01))
    try:
        await trainer.fit(
            X, batch_size=1, epochs=2, verbose=0, validation_data=(X, None), callbacks=callbacks
        )
    except BaseException as error:
        return error, others, trainer.last_run
    return None, others, trainer.last_run


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", HOOKS)
async def test_an_inline_hook_that_raises_anything_anywhere_fails_the_training_with_just_that(
    hook: str,
) -> None:
    for kind, position in itertools.product(KINDS, range(3)):
        error, bad = kind("odd"), None
        bad = make("inline", hook, error)
        raised, others, run = await fit_with(bad, position)
        if kind in ODD:
            assert isinstance(raised, ModelError)
            assert raised.__cause__ is error
        else:
            assert raised is error
        assert run.outcome == "failed"
        assert [(f.callback, f.hook) for f in run.history.failures][:1] == [
            ("Inline" if position == 0 else "Inline#2", hook)
        ]
        assert bad.seen.count("on_train_end") == 1
        for index, other in enumerate(others):
            # In train begin itself, those after it have not begun, nor have those that begin on the loop.
            begun = hook != "on_train_begin" or (index == 0 and position > 0)
            assert other.seen.count("on_train_end") == begun
            assert other.seen.count("on_exception") == (begun and hook != "on_train_end")
        await until(nothing_left)


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", HOOKS)
async def test_a_beside_hook_that_raises_anything_anywhere_gives_callback_error(hook: str) -> None:
    for kind, position in itertools.product(KINDS, range(3)):
        error = kind("odd")
        bad = make("beside", hook, error)
        raised, others, run = await fit_with(bad, position)
        assert isinstance(raised, CallbackError)
        name = "Beside" if position < 2 else "Beside#2"
        assert (raised.callback, raised.hook, raised.history) == (name, hook, run.history)
        if kind is StopIteration:  # what Python makes of it in a coroutine
            assert raised.__cause__.__cause__ is error
        else:
            assert raised.__cause__ is error
        assert (run.outcome, run.history.outcome) == ("failed", "failed")
        for callback in (bad, *others):
            assert callback.seen.count("on_train_end") == 1
            assert callback.seen[-1] == "on_train_end"
        await until(nothing_left)


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", ["on_exception", "on_train_end"])
@pytest.mark.parametrize("side", ["inline", "beside"])
async def test_a_closing_hook_that_raises_anything_anywhere_is_a_note_of_the_models_own_error(
    side: str, hook: str
) -> None:
    for kind, position in itertools.product(KINDS, range(3)):
        bad, others = make(side, hook, kind("odd")), [make("inline"), make("beside")]
        callbacks = [*others[:position], bad, *others[position:]]
        error = OSError("of the model")
        trainer = trainer_of(ScriptedModel(raises={1: error}), Limits(poll=0.01))
        with pytest.raises(OSError, match="of the model") as caught:
            await trainer.fit(X, batch_size=1, epochs=2, verbose=0, callbacks=callbacks)
        assert caught.value is error
        (note,) = error.__notes__
        assert note.startswith("Also: ")
        (failure,) = trainer.last_run.history.failures
        assert (failure.hook, failure.times) == (hook, 1)
        for callback in callbacks:
            assert callback.seen[-2:] == ["on_exception", "on_train_end"]
        await until(nothing_left)


@pytest.mark.asyncio
async def test_after_it_raised_a_callback_gets_its_closing_hooks_only() -> None:
    bad = make("beside", "on_train_batch_end", ValueError("!"))
    model = ScriptedModel(gated=True)
    run = trainer_of(model).start(X, batch_size=1, epochs=3, verbose=0, callbacks=bad)
    await model.open(1)
    await settle()
    model.open_for_good()
    with pytest.raises(CallbackError):
        await run
    assert bad.seen[bad.seen.index("on_train_batch_end") + 1 :] == ["on_exception", "on_train_end"]
    assert model.steps == 2  # it stopped at the next batch


@pytest.mark.asyncio
async def test_a_cancelled_error_that_nobody_asked_for_does_not_kill_a_task_group_and_is_not_lost() -> None:
    """In a task group the child would vanish without a word; here it is an error of the hook."""

    async def child() -> None:
        raise asyncio.CancelledError

    async with asyncio.TaskGroup() as group:  # the negative control
        vanished = group.create_task(child())
    assert vanished.cancelled()

    bad = make("beside", "on_epoch_end", asyncio.CancelledError())
    with pytest.raises(CallbackError) as caught:
        await trainer_of(ScriptedModel()).fit(X, verbose=0, callbacks=bad)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.asyncio
@pytest.mark.parametrize("policy", ["warn", "disable"])
async def test_on_error_warns_once_and_the_training_goes_on(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Recorder):
        on_error = policy

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            await super().on_train_batch_end(batch, logs)
            raise ValueError("always")

    fails, other = Fails(), Recorder()
    history = await trainer_of(ScriptedModel()).fit(
        X, batch_size=1, epochs=3, verbose=0, callbacks=[fails, other]
    )
    expected = {"warn": 6, "disable": 1}[policy]
    assert history.outcome == "completed"
    assert fails.hooks.count("on_train_batch_end") == expected
    assert fails.hooks[-1] == "on_train_end"
    assert other.hooks.count("on_train_batch_end") == 6
    (failure,) = history.failures
    assert failure[:2] == ("Fails", "on_train_batch_end")
    assert failure.times == expected
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Fails.on_train_batch_end raised ValueError: always" in caplog.text
    if policy == "disable":
        assert fails.hooks[fails.hooks.index("on_train_batch_end") + 1 :] == ["on_train_end"]


# ---------------------------------------------------------------- a cancel at every point


class Trip:
    """Cancels a task at the k-th time that a hook passes."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[Any] | None = None
        self.lock = threading.Lock()

    def passed(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.loop.call_soon_threadsafe(self.task.cancel)


def tripping(side: str, trip: Trip) -> Notes:
    def inline(hook: str) -> Callable[..., Any]:
        def call(self: Notes, *_: Any) -> None:
            self.seen.append(hook)
            trip.passed()

        return call

    def beside(hook: str) -> Callable[..., Any]:
        async def call(self: Notes, *_: Any) -> None:
            trip.passed()
            await asyncio.sleep(0)
            self.seen.append(hook)
            trip.passed()

        return call

    kind = inline if side == "inline" else beside
    return type(side.capitalize(), (Notes,), {hook: kind(hook) for hook in [*HOOKS, "on_exception"]})()


@pytest.mark.asyncio
async def test_a_cancel_at_every_point_of_a_training_leaves_nothing_and_closes_everybody() -> None:
    outcomes = []
    for at in itertools.count(1):
        trip = Trip(at)
        callbacks = [tripping("inline", trip), tripping("beside", trip)]
        trainer = trainer_of(ScriptedModel(), Limits(poll=0.01))
        trip.task = asyncio.create_task(
            trainer.fit(X, batch_size=1, epochs=3, verbose=0, callbacks=callbacks)
        )
        try:
            await trip.task
        except asyncio.CancelledError:
            assert trip.task.cancelling() == 1
        run = trainer.last_run
        outcomes.append(run.outcome)
        for callback in callbacks:
            assert callback.seen[0] == "on_train_begin"
            assert callback.seen.count("on_train_end") == 1
            assert callback.seen[-1] == "on_train_end"
            assert callback.seen.count("on_exception") == (run.outcome == "cancelled")
        await until(nothing_left)
        if trip.left > 0:
            assert not trip.task.cancelled()
            break
    assert at > 3 * (3 * 6 + 2)  # three passes of each event: one inline, two beside
    assert set(outcomes) == {"cancelled", "completed"}


# ---------------------------------------------------------------- the drain


class Hangs(Callback):
    """One hook hangs until it is cancelled."""

    def __init__(self) -> None:
        self.hanging = asyncio.Event()
        self.cancelled = False

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.mark.asyncio
async def test_a_hook_that_hangs_is_cut_short_after_the_grace_period_and_what_is_lost_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hangs, model = Hangs(), ScriptedModel(gated=True)
    run = trainer_of(model).start(X, batch_size=1, epochs=9, verbose=0, callbacks=hangs)
    await model.open(6)
    await hangs.hanging.wait()
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    assert hangs.cancelled
    assert run.stats.callbacks["Hangs"].lost == 2
    assert "Hangs was cut short in on_epoch_end; 2 events for it are lost" in caplog.text
    await until(nothing_left)


class Swallows(Callback):
    """A hook that swallows its cancellation, and hands coroutines over from inline hooks."""

    def __init__(self, let_go: asyncio.Event) -> None:
        self.let_go = let_go
        self.hanging = asyncio.Event()
        self.ran: list[str] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        return self.hang() if epoch == 0 else self.note(f"epoch {epoch}")

    def on_train_end(self, logs: Any = None) -> Any:
        return self.note("on_train_end")

    async def hang(self) -> None:
        self.hanging.set()
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                continue

    async def note(self, what: str) -> None:
        self.ran.append(what)


@pytest.mark.asyncio
async def test_a_hook_that_swallows_its_cancellation_is_named_and_left_and_nothing_behind_it_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    let_go = asyncio.Event()
    swallows, recorder, model = Swallows(let_go), Recorder(), ScriptedModel(gated=True)
    run = trainer_of(model).start(X, batch_size=1, epochs=9, verbose=0, callbacks=[swallows, recorder])
    await model.open(6)
    await swallows.hanging.wait()
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    assert "Swallows.hang ignores its cancellation and is left to itself" in caplog.text
    assert recorder.hooks[-1] == "on_train_end"
    let_go.set()
    await until(nothing_left)
    assert swallows.ran == []


class CutShort(Recorder):
    """Hangs in its first batch hook; in its last hook too if it is told to."""

    def __init__(self, *, swallows: bool = False, hangs_at_the_end: bool = False) -> None:
        super().__init__()
        self.hanging = asyncio.Event()
        self.swallows = swallows
        self.hangs_at_the_end = hangs_at_the_end
        self.cancelled: list[str] = []

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await super().on_train_batch_end(batch, logs)
        await self.hang("on_train_batch_end")

    async def on_train_end(self, logs: Any = None) -> None:
        if self.hangs_at_the_end:
            await self.hang("on_train_end")
        await super().on_train_end(logs)

    async def hang(self, hook: str) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(hook)
            if not self.swallows:
                raise


async def cancelled_while_it_hangs(callback: CutShort) -> Run:
    model = ScriptedModel(gated=True)
    run = trainer_of(model, SHORT._replace(last_words=0.3)).start(
        X, batch_size=1, epochs=9, verbose=0, callbacks=callback
    )
    await model.open(6)
    await callback.hanging.wait()
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    await until(nothing_left)
    return run


@pytest.mark.asyncio
@pytest.mark.parametrize("swallows", [False, True])
async def test_a_callback_whose_hook_was_cut_short_gets_its_closing_hooks_and_nothing_else(
    swallows: bool,
) -> None:
    callback = CutShort(swallows=swallows)
    run = await cancelled_while_it_hangs(callback)
    behind = callback.hooks[callback.hooks.index("on_train_batch_end") + 1 :]
    assert behind == ["on_exception", "on_train_end"]
    assert callback.cancelled == ["on_train_batch_end"]
    counts = run.stats.callbacks["CutShort"]
    assert counts.lost == 18
    # What came before the hook, it itself where it came to its end, and the two that close.
    assert counts.handled == len(callback.events)


@pytest.mark.asyncio
async def test_who_was_cut_short_is_asked_for_no_backup_so_that_its_closing_hooks_have_the_time(
    tmp_path: Path,
) -> None:
    class Syncs(CutShort):
        async def sync(self) -> None:
            if self.hanging.is_set():  # a disk that hangs, as the hook did
                await asyncio.Event().wait()

    callback, model = Syncs(), ScriptedModel(gated=True)
    run = trainer_of(model, SHORT._replace(last_words=0.3)).start(
        X, batch_size=1, epochs=9, verbose=0, callbacks=[callback, BackupAndRestore(tmp_path)]
    )
    await model.open(2)
    await callback.hanging.wait()
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    await until(nothing_left)
    assert callback.hooks[-2:] == ["on_exception", "on_train_end"]
    # Behind hooks that were lost nothing counts: only the backup from before the first batch is there.
    assert [path.name for path in tmp_path.glob("*.h5")] == ["backup-000001.h5"]


@pytest.mark.asyncio
async def test_a_closing_hook_that_hangs_after_one_was_cut_short_is_cut_short_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = CutShort(hangs_at_the_end=True)
    await cancelled_while_it_hangs(callback)
    assert callback.hooks[-1] == "on_exception"
    assert callback.cancelled == ["on_train_batch_end", "on_train_end"]
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert said == [
        "CutShort was cut short in on_train_batch_end; 18 events for it are lost",
        "CutShort was cut short in on_train_end too",
    ]


@pytest.mark.asyncio
async def test_what_an_inline_train_end_handed_over_runs_though_the_callback_was_cut_short() -> None:
    class HandsOver(Callback):
        def __init__(self) -> None:
            self.hanging = asyncio.Event()
            self.ran: list[str] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self.hang(epoch)

        def on_train_end(self, logs: Any = None) -> Any:
            return self.close()

        async def hang(self, epoch: int) -> None:
            self.ran.append(f"epoch {epoch}")
            self.hanging.set()
            await asyncio.Event().wait()

        async def close(self) -> None:
            self.ran.append("closed")

    callback, model = HandsOver(), ScriptedModel(gated=True)
    run = trainer_of(model).start(X, batch_size=1, epochs=9, verbose=0, callbacks=callback)
    await model.open(6)
    await callback.hanging.wait()
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    assert callback.ran == ["epoch 0", "closed"]


@pytest.mark.asyncio
async def test_an_inline_train_end_has_all_the_time_after_a_beside_hook_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Slow(Callback):
        def __init__(self) -> None:
            self.gate, self.closing, self.closed = threading.Event(), threading.Event(), False

        def on_train_end(self, logs: Any = None) -> None:
            self.closing.set()
            self.closed = self.gate.wait(30)

    slow, bad = Slow(), make("beside", "on_epoch_begin", ValueError("!"))
    run = trainer_of(ScriptedModel()).start(X, epochs=10**6, verbose=0, callbacks=[bad, slow])
    await until(slow.closing.is_set)
    await asyncio.sleep(3 * SHORT.grace)
    assert run.state == "closing"
    slow.gate.set()
    with pytest.raises(CallbackError):
        await run
    assert slow.closed
    assert caplog.records == []


@pytest.mark.asyncio
async def test_a_hook_begun_by_a_file_that_is_announced_after_the_drain_is_bounded_by_the_grace_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hangs(Callback):
        async def on_checkpoint_saved(self, path: str, epoch: int) -> None:
            await asyncio.Event().wait()

    async def drain_and_announce(supervisor: Supervisor) -> None:
        await drain(supervisor)
        run._parts.dispatcher.commit("late.h5", 0)

    drain = Supervisor._drain
    monkeypatch.setattr(Supervisor, "_drain", drain_and_announce)
    model = ScriptedModel(gated=True)  # a thread that spins would make the loop's own work slow
    run = trainer_of(model).start(X, epochs=10**6, verbose=0, callbacks=Hangs())
    await model.open(3)
    run.cancel()
    model.open_for_good()
    async with asyncio.timeout(10):  # it was for ever
        with pytest.raises(RunCancelled):
            await run
    assert "Hangs was cut short in on_checkpoint_saved" in caplog.text
    await until(nothing_left)


@pytest.mark.asyncio
async def test_a_drain_without_limit_names_who_it_waits_for_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Slow(Recorder):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await let_go.wait()
            await super().on_epoch_end(epoch, logs)

    let_go, slow = asyncio.Event(), Slow()
    run = trainer_of(ScriptedModel(), SHORT._replace(patience=0.02)).start(X, verbose=0, callbacks=slow)
    await until(lambda: len(caplog.records) >= 2)
    assert {record.getMessage() for record in caplog.records} == {
        f"{run.name}: the training is over and still waits for Slow.on_epoch_end"
    }
    let_go.set()
    assert (await run).outcome == "completed"
    assert slow.hooks[-2:] == ["on_epoch_end", "on_train_end"]


@pytest.mark.asyncio
async def test_after_a_beside_failure_the_others_drain_without_limit() -> None:
    class Slow(Recorder):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            waiting.set()
            await let_go.wait()
            await super().on_epoch_end(epoch, logs)

    waiting, let_go, slow = asyncio.Event(), asyncio.Event(), Slow()
    bad = make("beside", "on_epoch_end", ValueError("!"))
    run = trainer_of(ScriptedModel()).start(X, verbose=0, callbacks=[bad, slow])
    await waiting.wait()
    await asyncio.sleep(3 * SHORT.grace)
    assert run.state == "closing"
    let_go.set()
    with pytest.raises(CallbackError):
        await run
    assert ("on_epoch_end", 0) in slow.events
    assert slow.hooks[-1] == "on_train_end"


@pytest.mark.asyncio
async def test_a_listener_for_files_that_is_cut_short_does_not_keep_the_drain_waiting() -> None:
    class HangsAndListens(Hangs):
        async def on_checkpoint_saved(self, path: str, epoch: int) -> None: ...

        async def on_train_end(self, logs: Any = None) -> None: ...

    hangs = HangsAndListens()
    run = trainer_of(ScriptedModel()).start(X, epochs=10**6, verbose=0, callbacks=hangs)
    await hangs.hanging.wait()
    run.cancel()
    async with asyncio.timeout(10):  # it was 30 s, the patience of the drain
        with pytest.raises(RunCancelled):
            await run


@pytest.mark.asyncio
async def test_a_listener_for_files_gets_its_train_end_though_another_used_up_the_grace_period() -> None:
    hangs, recorder = Hangs(), Recorder()
    run = trainer_of(ScriptedModel(), SHORT._replace(last_words=5)).start(
        X, epochs=10**6, verbose=0, callbacks=[hangs, recorder]
    )
    await hangs.hanging.wait()
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


# ---------------------------------------------------------------- others cancel what is ours


@pytest.mark.asyncio
async def test_a_runner_that_cancels_a_consumer_loses_the_running_hook_only() -> None:
    class Waits(Recorder):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            waiting.set()
            await let_go.wait()
            await super().on_epoch_end(epoch, logs)

    waiting, let_go, waits = asyncio.Event(), asyncio.Event(), Waits()
    run = trainer_of(ScriptedModel(), Limits(poll=0.01)).start(X, epochs=10**6, verbose=0, callbacks=waits)
    await waiting.wait()
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == f"callback Waits of {run.name}"]
    let_go.set()
    task.cancel()
    with pytest.raises(RunCancelled, match="the task of Waits was cancelled"):
        await run
    assert ("on_epoch_end", 0) not in waits.events
    assert ("on_epoch_end", 1) in waits.events or run.epoch < 2
    assert waits.hooks[-2:] == ["on_exception", "on_train_end"]


@pytest.mark.asyncio
async def test_cancelling_the_supervisors_own_task_cancels_the_run_in_order() -> None:
    recorder = Recorder()
    run = trainer_of(ScriptedModel(), Limits(poll=0.01)).start(X, epochs=10**6, verbose=0, callbacks=recorder)
    await until(lambda: run.step > 2)
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == f"asynccb {run.name}"]
    task.cancel()
    with pytest.raises(RunCancelled, match="the event loop is shutting down"):
        await run
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


def test_a_task_group_in_its_place_would_drop_the_drain() -> None:
    """The negative control: why consumers are no children of a group."""
    delivered: list[int] = []

    async def consume(queue: asyncio.Queue[int]) -> None:
        while True:
            event = await queue.get()
            await asyncio.sleep(0)
            delivered.append(event)

    async def fit() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(consume(queue))
            for event in range(100):
                queue.put_nowait(event)
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(fit())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(delivered) < 10

    class Slow(Recorder):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            await asyncio.sleep(0)
            await super().on_train_batch_end(batch, logs)

    async def ours() -> tuple[Slow, ScriptedModel]:
        slow, model = Slow(), ScriptedModel(gated=True)
        task = asyncio.create_task(
            Trainer(model).fit(np.zeros((200, 1)), batch_size=1, verbose=0, callbacks=slow)
        )
        await asyncio.sleep(0)
        await model.open(100)
        task.cancel()
        await asyncio.sleep(0)  # the run has heard of it
        model.open_for_good()
        with pytest.raises(asyncio.CancelledError):
            await task
        return slow, model

    slow, model = asyncio.run(ours())
    assert slow.hooks.count("on_train_batch_end") == model.steps
    assert model.steps in (100, 101)


# ---------------------------------------------------------------- async sources


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["end", "stop", "cancel", "model raises"])
async def test_an_async_source_is_closed_on_every_way_out(way: str) -> None:
    closed: list[str] = []

    async def source() -> AsyncIterator[np.ndarray[Any, Any]]:
        try:
            for _ in itertools.count() if way in ("stop", "cancel") else range(3):
                yield np.zeros((1, 1))
                await asyncio.sleep(0)
        finally:
            closed.append(asyncio.current_task().get_name())

    model = ScriptedModel(raises={1: OSError("!")} if way == "model raises" else {})
    run = trainer_of(model).start(source(), verbose=0)
    if way in ("stop", "cancel"):
        await until(lambda: run.step > 2)
        getattr(run, way)()
    try:
        await run
    except (RunCancelled, OSError):
        pass
    assert closed == [f"source of {run.name}"]
    assert run.outcome == {"end": "completed", "stop": "stopped", "cancel": "cancelled"}.get(way, "failed")
    await until(nothing_left)


@pytest.mark.asyncio
async def test_an_async_source_that_raises_fails_the_training_with_its_own_error() -> None:
    async def source() -> AsyncIterator[np.ndarray[Any, Any]]:
        yield np.zeros((1, 1))
        raise OSError("of the source")

    recorder = Recorder()
    with pytest.raises(OSError, match="of the source"):
        await trainer_of(ScriptedModel()).fit(source(), verbose=0, callbacks=recorder)
    assert recorder.hooks[-2:] == ["on_exception", "on_train_end"]


@pytest.mark.asyncio
async def test_an_async_source_that_swallows_its_cancellation_is_named_and_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    let_go = asyncio.Event()

    class Source:
        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> Any:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            raise StopAsyncIteration

    run = trainer_of(ScriptedModel()).start(Source(), verbose=0)
    await until(lambda: run._parts.control.waiting == "feed")
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    assert "the async source ignores its cancellation and is left to itself" in caplog.text
    let_go.set()
    await until(nothing_left)


# ---------------------------------------------------------------- news of durable files


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["end", "cancel"])
async def test_a_durable_file_is_announced_before_the_listeners_train_end(way: str) -> None:
    class Writes(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self.write(epoch)

        async def write(self, epoch: int) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            self.run.announce_saved(f"/nowhere/{epoch}.bin", epoch)

    class Listens(Callback):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def on_checkpoint_saved(self, path: str, epoch: int) -> None:
            asyncio.get_running_loop()  # a `def`, but called on the loop
            self.heard.append((path, epoch))

        def on_train_end(self, logs: Any = None) -> None:
            self.heard.append("inline on_train_end")

    recorder, listens, model = Recorder(), Listens(), ScriptedModel()
    run = trainer_of(model, Limits(poll=0.01)).start(
        X, epochs=3, verbose=0, callbacks=[recorder, Writes(), listens]
    )
    if way == "cancel":
        await until(lambda: run.step >= 1)
        run.cancel()
    try:
        await run
    except RunCancelled:
        assert way == "cancel"
    saved = [event for event in recorder.events if event[0] == "on_checkpoint_saved"]
    epochs = len(run.history.epoch)
    assert saved == [("on_checkpoint_saved", f"{epoch}.bin") for epoch in range(epochs)]
    assert recorder.hooks[-1] == "on_train_end"
    assert [heard for heard in listens.heard if heard != "inline on_train_end"] == [
        (f"/nowhere/{epoch}.bin", epoch) for epoch in range(epochs)
    ]
