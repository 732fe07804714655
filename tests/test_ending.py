"""The ways out of a training, cell by cell: the closing hooks that each callback got, what the caller got."""

from __future__ import annotations

import asyncio
import datetime
import gc
import logging
import re
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from waiting import until

from asynccb import Callback, CallbackError, Gap, History, ModelError, Run, RunCancelled, Trainer
from asynccb.ending import WAYS, Outcome, note_all, of_error, of_return
from asynccb.testing import ScriptedModel, settle
from asynccb.training.control import Interrupt, Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SHORT = Limits(grace=0.05, last_words=0.05, poll=0.01)
CLOSING = ("on_epoch_end", "on_exception", "on_train_end")
X = np.zeros((2, 1))


class Inline(Callback):
    """Notes its hooks on the training thread; ``acts`` are called with the first of each."""

    def __init__(self, **acts: Callable[[], object]) -> None:
        self.seen: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.told: BaseException | None = None
        self.acts = acts

    def _note(self, hook: str) -> None:
        self.seen.append(hook)
        if act := self.acts.get(hook):
            act()

    def on_train_begin(self, logs: Any = None) -> None:
        self._note("on_train_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.logs.append(dict(logs))
        self._note("on_epoch_end")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._note("on_train_batch_end")

    def on_exception(self, exception: BaseException) -> None:
        self.told = exception
        self._note("on_exception")

    def on_train_end(self, logs: Any = None) -> None:
        self._note("on_train_end")


class Beside(Inline):
    """The same on the event loop."""

    async def on_train_begin(self, logs: Any = None) -> None:  # type: ignore[override]
        self._note("on_train_begin")

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # type: ignore[override]
        self.logs.append(dict(logs))
        self._note("on_epoch_end")

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # type: ignore[override]
        self._note("on_train_batch_end")

    async def on_exception(self, exception: BaseException) -> None:  # type: ignore[override]
        self.told = exception
        self._note("on_exception")

    async def on_train_end(self, logs: Any = None) -> None:  # type: ignore[override]
        self._note("on_train_end")


def closing(callback: Inline) -> tuple[str, ...]:
    return tuple(hook for hook in callback.seen if hook in CLOSING)


def throw(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


class Scene:
    """Two epochs of two batches with validation data, one inline and one beside callback."""

    def __init__(self, model: ScriptedModel, *more: Callback) -> None:
        self.model = model
        self.inline, self.beside = Inline(), Beside()
        self.trainer = Trainer(model)
        self.trainer._limits = Limits(poll=0.01)
        self.callbacks = [self.inline, self.beside, *more]

    def start(self, **more: Any) -> Run:
        return self.trainer.start(
            X, batch_size=1, epochs=2, verbose=0, callbacks=self.callbacks, validation_data=(X, None), **more
        )

    async def fit(self) -> History:
        return await self.trainer.fit(
            X, batch_size=1, epochs=2, verbose=0, callbacks=self.callbacks, validation_data=(X, None)
        )


async def the_end() -> Scene:
    scene = Scene(ScriptedModel())
    assert isinstance(await scene.start(), History)
    return scene


async def stop_training() -> Scene:
    model = ScriptedModel()
    scene = Scene(model, Inline(on_train_batch_end=lambda: setattr(model, "stop_training", True)))
    assert isinstance(await scene.start(), History)
    return scene


async def run_stop() -> Scene:
    scene = Scene(ScriptedModel(gated=True))
    run = scene.start()
    await scene.model.open(1)
    run.stop("enough")
    run.stop("a later reason")
    scene.model.open_for_good()
    assert isinstance(await run, History)
    return scene


async def stop_after() -> Scene:
    scene = Scene(ScriptedModel(gated=True))
    run = scene.start(stop_after=datetime.timedelta(seconds=0.2))
    await scene.model.open(1)
    await until(lambda: run._parts.control.stop_reason is not None)
    scene.model.open_for_good()
    assert isinstance(await run, History)
    return scene


async def run_cancel() -> Scene:
    scene = Scene(ScriptedModel(gated=True))
    run = scene.start()
    await scene.model.open(1)
    run.cancel("no more")
    scene.model.open_for_good()
    with pytest.raises(RunCancelled, match="no more"):
        await run
    return scene


async def fit_cancelled() -> Scene:
    scene = Scene(ScriptedModel(gated=True))
    task = asyncio.create_task(scene.fit())
    await asyncio.sleep(0)
    await scene.model.open(1)
    task.cancel()
    await asyncio.sleep(0)
    scene.model.open_for_good()
    with pytest.raises(asyncio.CancelledError):
        await task
    return scene


async def model_raises() -> Scene:
    scene = Scene(ScriptedModel(raises={1: ZeroDivisionError("by the model")}))
    with pytest.raises(ZeroDivisionError, match="by the model"):
        await scene.start()
    return scene


async def inline_hook_raises() -> Scene:
    scene = Scene(ScriptedModel(), Inline(on_train_batch_end=throw(KeyError("of a hook"))))
    with pytest.raises(KeyError, match="of a hook"):
        await scene.start()
    return scene


async def beside_hook_raises() -> Scene:
    scene = Scene(ScriptedModel(gated=True), Beside(on_train_batch_end=throw(KeyError("of a hook"))))
    run = scene.start()
    await scene.model.open(1)
    await settle()
    scene.model.open_for_good()
    with pytest.raises(CallbackError, match="of a hook") as caught:
        await run
    assert (
        caught.value.callback,
        caught.value.hook,
        caught.value.epoch,
    ) == ("Beside#2", "on_train_batch_end", None) or caught.value.epoch == 0
    return scene


async def stuck_after_cancel() -> Scene:
    scene = Scene(ScriptedModel(gated=True))
    scene.trainer._limits = SHORT
    run = scene.start()
    await scene.model.open(1)
    run.cancel("no more")
    with pytest.raises(RunCancelled, match="no more"):
        await run
    return scene


class Cell(NamedTuple):
    way: Callable[[], Awaitable[Scene]]
    inline: tuple[str, ...]
    beside: tuple[str, ...]
    outcome: str
    reason: str
    validated: bool = False


EPOCH, EXCEPTION, END = CLOSING
TABLE = [
    Cell(the_end, (EPOCH, EPOCH, END), (EPOCH, EPOCH, END), "completed", "", validated=True),
    Cell(stop_training, (EPOCH, END), (EPOCH, END), "stopped", "model.stop_training was set"),
    Cell(run_stop, (EPOCH, END), (EPOCH, END), "stopped", "enough"),
    Cell(stop_after, (EPOCH, END), (EPOCH, END), "stopped", "stop_after 0.2 s"),
    Cell(run_cancel, (EXCEPTION, END), (EXCEPTION, END), "cancelled", "no more"),
    Cell(
        fit_cancelled,
        (EXCEPTION, END),
        (EXCEPTION, END),
        "cancelled",
        "the task that awaited fit was cancelled",
    ),
    Cell(model_raises, (EXCEPTION, END), (EXCEPTION, END), "failed", "ZeroDivisionError: by the model"),
    Cell(inline_hook_raises, (EXCEPTION, END), (EXCEPTION, END), "failed", "KeyError: 'of a hook'"),
    Cell(
        beside_hook_raises,
        (EXCEPTION, END),
        (EXCEPTION, END),
        "failed",
        "Beside#2.on_train_batch_end of epoch 0 raised: KeyError: 'of a hook'",
    ),
    Cell(stuck_after_cancel, (), (EXCEPTION, END), "cancelled", "no more"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("cell", TABLE, ids=lambda cell: cell.way.__name__)
async def test_every_way_out_runs_its_closing_hooks_and_gives_its_outcome(cell: Cell) -> None:
    scene = await cell.way()
    run = scene.trainer.last_run
    assert run is not None
    assert cell.inline == closing(scene.inline)
    assert cell.beside == closing(scene.beside)
    assert (cell.outcome, cell.reason) == (run.outcome, run.reason)
    assert (cell.outcome, cell.reason) == (run.history.outcome, run.history.reason)
    assert cell.outcome == run.state
    assert all(cell.validated == ("val_loss" in logs) for logs in scene.inline.logs)
    scene.model.open_for_good()
    await until(lambda: not scene.trainer.last_run._session.claim._objects)
    assert cell.inline == closing(scene.inline)
    assert cell.beside == closing(scene.beside)
    assert (cell.outcome, cell.reason) == (run.outcome, run.reason)
    assert scene.inline.run is scene.beside.run is None


@pytest.mark.asyncio
async def test_on_exception_is_told_what_fit_raises() -> None:
    scene = await model_raises()
    assert scene.inline.told is scene.beside.told is scene.trainer.last_run.exception

    cancelled = await run_cancel()
    assert isinstance(cancelled.inline.told, RunCancelled)
    assert cancelled.inline.told.reason == "no more"
    assert cancelled.trainer.last_run.history is cancelled.inline.told.history


# ---------------------------------------------------------------- a thread that is stuck


@pytest.mark.asyncio
async def test_a_stuck_thread_names_the_inline_hooks_that_never_ran(caplog: pytest.LogCaptureFixture) -> None:
    scene = await stuck_after_cancel()
    said = " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR)
    assert "Hooks that never ran: " in said
    assert "Inline.on_exception" in said
    assert "Inline.on_train_end" in said
    assert "Beside.on_train_end" not in said
    scene.model.open_for_good()


@pytest.mark.asyncio
async def test_what_a_stuck_thread_trains_after_it_was_given_up_reaches_no_hook() -> None:
    scene = await stuck_after_cancel()
    before = list(scene.inline.seen), list(scene.beside.seen)
    scene.model.open_for_good()
    await freed(scene.trainer.last_run)
    assert before == (scene.inline.seen, scene.beside.seen)
    assert scene.model.steps == 2  # the batch at the gate was trained, and then no other


@pytest.mark.asyncio
async def test_model_and_callbacks_stay_busy_until_a_stuck_thread_has_returned() -> None:
    scene = await stuck_after_cancel()
    with pytest.raises(RuntimeError, match="already in run-"):
        scene.start()
    with pytest.raises(RuntimeError, match="Inline already serves run-"):
        Trainer(ScriptedModel()).start(X, verbose=0, callbacks=[scene.inline])
    assert scene.inline.run is scene.trainer.last_run
    scene.model.open_for_good()
    await freed(scene.trainer.last_run)
    assert (await scene.fit()).outcome == "completed"


class LongLastWords(Beside):
    """Its ``on_train_end`` is suspended until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()
        self.waiting = asyncio.Event()

    async def on_train_end(self, logs: Any = None) -> None:  # type: ignore[override]
        self._note("on_train_end")
        self.waiting.set()
        await self.let_go.wait()


@pytest.mark.asyncio
async def test_a_thread_that_comes_back_during_the_last_words_adds_nothing_after_train_end() -> None:
    slow = LongLastWords()
    scene = Scene(ScriptedModel(gated=True), slow)
    scene.trainer._limits = Limits(grace=0.05, last_words=20, poll=0.01)
    run = scene.start()
    await scene.model.open(1)
    run.cancel("no more")
    await slow.waiting.wait()
    scene.model.open_for_good()
    await until(lambda: not any(thread.name.startswith("asynccb run") for thread in threading.enumerate()))
    slow.let_go.set()
    with pytest.raises(RunCancelled, match="no more"):
        await run
    assert [*slow.seen][-2:] == ["on_exception", "on_train_end"]
    assert [*scene.beside.seen][-2:] == ["on_exception", "on_train_end"]


@pytest.mark.asyncio
async def test_a_stuck_training_that_failed_keeps_its_failure_when_the_thread_comes_back() -> None:
    scene = Scene(ScriptedModel(gated=True), Beside(on_train_batch_end=throw(KeyError("of a hook"))))
    scene.trainer._limits = SHORT
    run = scene.start()
    await scene.model.open(1)
    with pytest.raises(CallbackError, match="of a hook"):
        await run
    scene.model.open_for_good()
    await freed(run)
    assert (run.outcome, run.history.outcome) == ("failed", "failed")
    with pytest.raises(CallbackError, match="of a hook"):
        await run


@pytest.mark.asyncio
async def test_a_thread_stuck_in_an_inline_hook_calls_no_further_hook_when_it_comes_back() -> None:
    gate = threading.Event()
    first, second, beside = Inline(on_epoch_end=gate.wait), Inline(), Beside()
    trainer = Trainer(ScriptedModel())
    trainer._limits = SHORT
    run = trainer.start(X, batch_size=1, epochs=2, verbose=0, callbacks=[first, second, beside])
    await until(lambda: "on_epoch_end" in first.seen)
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    gate.set()
    await freed(run)
    assert first.seen[-1] == "on_epoch_end"
    assert closing(second) == ()
    assert closing(beside) == (EXCEPTION, END)


@pytest.mark.asyncio
async def test_no_stream_shows_a_batch_of_a_stuck_thread_after_the_train_end() -> None:
    gate = threading.Event()
    stuck = Inline(on_train_batch_end=gate.wait)
    trainer = Trainer(ScriptedModel())
    trainer._limits = SHORT
    run = trainer.start(X, batch_size=1, epochs=2, verbose=0, callbacks=stuck)
    stream = run.events(since=0)
    await until(lambda: "on_train_batch_end" in stuck.seen)
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    gate.set()
    await freed(run)
    hooks = [event.hook for event in [event async for event in stream] if not isinstance(event, Gap)]
    assert hooks[-2:] == ["on_exception", "on_train_end"]
    assert hooks.count("on_train_end") == 1


# ---------------------------------------------------------------- an event loop that is gone


class HandsOver(Inline):
    """Its inline hook returns a coroutine, which a closed loop never runs."""

    ran = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        self.seen.append("on_epoch_end")
        return self._later()

    def on_train_end(self, logs: Any = None) -> Any:
        self.seen.append("on_train_end")
        return self._later()

    async def _later(self) -> None:
        self.ran = True


def close_the_loop_in_mid_training(scene_made: list[Any]) -> None:
    async def main() -> None:
        model = ScriptedModel(gated=True)
        callbacks = [Inline(), Beside(), HandsOver()]
        trainer = Trainer(model)
        trainer._limits = SHORT
        run = trainer.start(X, batch_size=1, epochs=2, verbose=0, callbacks=callbacks)
        await model.open(3)
        scene_made.append((model, callbacks, run))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


@pytest.mark.filterwarnings("error")
def test_a_loop_that_is_closed_in_mid_training_ends_it_with_inline_hooks_only(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # asyncio itself says that tasks were destroyed; whoever closes a loop under its tasks is told so by it.
    logging.getLogger("asyncio").disabled = True
    made: list[Any] = []
    try:
        thread = threading.Thread(target=close_the_loop_in_mid_training, args=(made,))
        thread.start()
        thread.join()
        model, (inline, beside, hands_over), run = made.pop()
        seen_beside = list(beside.seen)
        model.open_for_good()
        for other in threading.enumerate():
            if other.name == f"asynccb {run.name}":
                other.join()
        assert closing(inline) == (EPOCH, EXCEPTION, END)
        assert closing(hands_over) == (EPOCH, EXCEPTION, END)
        assert seen_beside == beside.seen
        assert EXCEPTION not in beside.seen
        assert (run.outcome, run.reason) == ("cancelled", "the event loop was closed during the training")
        assert model.steps == 4
        said = "".join(record.getMessage() for record in caplog.records if record.name == "asynccb")
        assert "the event loop was closed during the training; not delivered: " in said
        assert "Beside" in said
        assert inline.run is beside.run is None
        del run, inline, beside, hands_over, model
        gc.collect()
    finally:
        logging.getLogger("asyncio").disabled = False
    assert re.sub(r"(?s)^\s*$", "", capfd.readouterr().err) == ""


# ---------------------------------------------------------------- closing hooks that raise


@pytest.mark.asyncio
@pytest.mark.parametrize("hook", ["on_exception", "on_train_end"])
async def test_a_closing_hook_that_raises_keeps_no_other_callback_from_its_own(hook: str) -> None:
    bad, scene = (
        Inline(**{hook: throw(KeyError("while closing"))}),
        Scene(ScriptedModel(raises={1: OSError("!")})),
    )
    scene.callbacks.insert(0, bad)
    with pytest.raises(OSError, match="!") as caught:
        await scene.start()
    assert (EXCEPTION, END) == closing(bad) == closing(scene.inline) == closing(scene.beside)
    assert caught.value.__notes__ == ["Also: KeyError: 'while closing'"]


@pytest.mark.asyncio
async def test_an_inline_train_end_that_raises_fails_a_training_that_was_complete() -> None:
    scene = Scene(ScriptedModel(), Inline(on_train_end=throw(KeyError("while closing"))))
    with pytest.raises(KeyError, match="while closing"):
        await scene.start()
    assert (EPOCH, EPOCH, END) == closing(scene.inline) == closing(scene.beside)
    assert scene.trainer.last_run.outcome == "failed"


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit, asyncio.CancelledError])
async def test_what_cannot_cross_an_await_is_wrapped_from_a_closing_hook_too(
    kind: type[BaseException],
) -> None:
    scene = Scene(ScriptedModel(), Inline(on_train_end=throw(kind("odd"))))
    with pytest.raises(ModelError, match=kind.__name__) as caught:
        await scene.start()
    assert isinstance(caught.value.__cause__, kind)
    assert scene.trainer.last_run.outcome == "failed"


@pytest.mark.asyncio
async def test_a_beside_train_end_that_raises_after_a_complete_training_gives_callback_error() -> None:
    scene = Scene(ScriptedModel(), Beside(on_train_end=throw(KeyError("while closing"))))
    with pytest.raises(CallbackError, match=r"Beside#2\.on_train_end raised: KeyError") as caught:
        await scene.start()
    assert isinstance(caught.value.__cause__, KeyError)
    assert EXCEPTION not in scene.inline.seen
    assert EXCEPTION not in scene.beside.seen


@pytest.mark.asyncio
async def test_a_cancel_after_the_thread_has_left_only_bounds_the_drain() -> None:
    slow = LongLastWords()
    scene = Scene(ScriptedModel(), slow)
    scene.trainer._limits = SHORT
    task = asyncio.create_task(scene.fit())
    await slow.waiting.wait()
    assert scene.trainer.last_run.state == "closing"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert scene.trainer.last_run.outcome == "completed"
    assert EXCEPTION not in [*scene.inline.seen, *scene.beside.seen, *slow.seen]


@pytest.mark.asyncio
async def test_a_cancel_while_an_inline_train_end_is_stuck_keeps_the_outcome_that_was_fixed() -> None:
    gate = threading.Event()
    stuck = Inline(on_train_end=gate.wait)
    scene = Scene(ScriptedModel(), stuck)
    scene.trainer._limits = SHORT
    task = asyncio.create_task(scene.fit())
    await until(lambda: "on_train_end" in stuck.seen)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run = scene.trainer.last_run
    assert "completed" == run.outcome == run.history.outcome
    assert EXCEPTION not in [*scene.inline.seen, *scene.beside.seen]
    assert scene.beside.seen[-1] == END
    gate.set()
    await freed(run)
    assert run.outcome == "completed"


@pytest.mark.asyncio
async def test_a_cancel_overrides_a_stop() -> None:
    scene = Scene(ScriptedModel(gated=True))
    run = scene.start()
    await scene.model.open(1)
    run.stop("enough")
    run.cancel("no more")
    scene.model.open_for_good()
    with pytest.raises(RunCancelled, match="no more"):
        await run
    assert closing(scene.inline) == (EXCEPTION, END)


@pytest.mark.asyncio
async def test_errors_of_sinks_are_notes_of_the_models_own_error() -> None:
    failing = Beside(on_train_end=throw(KeyError("while closing")))
    scene = Scene(ScriptedModel(raises={0: OSError("!")}), failing)
    with pytest.raises(OSError, match="!") as caught:
        await scene.start()
    assert caught.value.__notes__ == [
        "Also: CallbackError: Beside#2.on_train_end raised: KeyError: 'while closing'"
    ]
    assert [f[:2] for f in scene.trainer.last_run.history.failures] == [("Beside#2", "on_train_end")]


@pytest.mark.asyncio
async def test_the_first_of_several_beside_errors_in_event_order_is_raised() -> None:
    early, late = (
        Beside(on_train_batch_end=throw(KeyError("early"))),
        Beside(on_epoch_end=throw(KeyError("late"))),
    )
    scene = Scene(ScriptedModel(gated=True), late, early)
    run = scene.start()
    await scene.model.at_gate()
    scene.model.open_for_good()
    with pytest.raises(CallbackError, match="early"):
        await run


async def freed(run: Run) -> None:
    """Waits until the thread of the run, however late, has let go of the model."""
    await until(lambda: run._session.claim.freed)


# ---------------------------------------------------------------- the values themselves


def test_an_outcome_raised_many_times_keeps_the_traceback_that_it_had() -> None:
    def depth(error: BaseException) -> int:
        frames, trace = 0, error.__traceback__
        while trace is not None:
            frames, trace = frames + 1, trace.tb_next
        return frames

    try:
        raise ValueError("once")
    except ValueError as error:
        outcome = of_error(error)
    depths = set()
    for _ in range(50):
        with pytest.raises(ValueError, match="once") as caught:
            outcome.raise_exception()
        depths.add(depth(caught.value))
    assert {3} == depths

    naive = ValueError("naive")
    for _ in range(50):
        with pytest.raises(ValueError, match="naive"):
            raise naive
    assert depth(naive) == 50


@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit, asyncio.CancelledError])
def test_what_means_something_to_await_is_wrapped(kind: type[BaseException]) -> None:
    original = kind("odd")
    outcome = of_error(original)
    assert isinstance(outcome.exception, ModelError)
    assert outcome.exception.__cause__ is original
    assert f"{kind.__name__}: odd" == outcome.reason


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, ExceptionGroup])
def test_everything_else_is_raised_as_it_is(kind: type[BaseException]) -> None:
    original = kind("a", [OSError()]) if kind is ExceptionGroup else kind("a")
    assert of_error(original).exception is original


def test_a_return_is_complete_only_if_every_epoch_came_to_its_end() -> None:
    assert of_return(True, None)[:2] == ("completed", "")
    assert of_return(True, "a stop in the last batch")[:2] == ("completed", "")
    assert of_return(False, "enough")[:2] == ("stopped", "enough")
    assert of_return(False, None)[:2] == ("stopped", "the data ran out")


def test_an_interrupt_is_a_cancel_unless_a_callback_failed() -> None:
    error = CallbackError("CSVLogger", "on_epoch_end", 3)
    assert ("failed", "words", error) == of_error(Interrupt("failed", "words", error))[:3]
    assert of_error(Interrupt("cancelled", "words"))[:3] == ("cancelled", "words", None)
    assert of_error(Interrupt("loop gone", "words"))[:3] == ("cancelled", "words", None)


def test_notes_tell_every_other_error_once() -> None:
    error = ValueError("first")
    note_all(error, [KeyError("second"), OSError("third")])
    assert error.__notes__ == ["Also: KeyError: 'second'", "Also: OSError: third"]
    note_all(None, [KeyError("nobody to tell")])


def test_closing_errors_make_a_completed_outcome_fail_and_leave_a_cancelled_one_cancelled() -> None:
    errors: list[BaseException] = [KeyError("a"), OSError("b")]
    failed = Outcome("completed", "", None, None, WAYS["completed"]).with_closing_errors(errors)
    assert ("failed", "KeyError: 'a'", errors[0]) == failed[:3]
    assert errors[0].__notes__ == ["Also: OSError: b"]
    cancelled = Outcome("cancelled", "words", None, None, WAYS["cancelled"])
    assert cancelled == cancelled.with_closing_errors([KeyError("a")])


# ---------------------------------------------------------------- exceptions that cannot be told


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot assign to field {name!r}")


@pytest.mark.asyncio
async def test_an_exception_without_a_text_is_raised_all_the_same() -> None:
    error = Unprintable()
    trainer = Trainer(ScriptedModel(raises={0: error}))

    async with asyncio.timeout(5):
        with pytest.raises(Unprintable) as raised:
            await trainer.fit(X, batch_size=1, verbose=0)

    assert raised.value is error
    assert trainer.last_run is not None
    assert trainer.last_run.reason == "Unprintable (its text raised ValueError)"


@pytest.mark.asyncio
async def test_a_beside_hook_that_raises_one_without_a_text_fails_the_run() -> None:
    class Raises(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise Unprintable

    async with asyncio.timeout(5):
        with pytest.raises(CallbackError) as raised:
            await Trainer(ScriptedModel()).fit(X, batch_size=1, verbose=0, callbacks=[Raises()])

    told = "Raises.on_epoch_end of epoch 0 raised: Unprintable (its text raised ValueError)"
    assert told == str(raised.value)


def test_an_exception_that_takes_no_notes_goes_without() -> None:
    error = Frozen("mine")

    note_all(error, [ValueError("another")])

    assert not hasattr(error, "__notes__")
