"""Async sources: one task, a few items ahead, and an end for every wait for them."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, ModelError, RunCancelled, Trainer
from asynccb.testing import ScriptedModel, settle
from asynccb.training.prefetch import AHEAD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asynccb.protocols import Batch

BATCH = np.zeros((2, 1))


class Source:
    """Yields ``count`` batches in each pass, and notes who touches it how."""

    def __init__(self, count: int, *, gate: asyncio.Semaphore | None = None) -> None:
        self.count = count
        self.gate = gate
        self.passes = 0
        self.given = 0
        self.closed = 0
        self.tasks: set[Any] = set()
        self.inside = 0

    def __aiter__(self) -> Pass:
        self.passes += 1
        return Pass(self)


class Pass:
    def __init__(self, source: Source) -> None:
        self.source, self.left = source, source.count

    def __aiter__(self) -> Pass:
        return self

    async def __anext__(self) -> Any:
        source = self.source
        source.tasks.add(asyncio.current_task())
        source.inside += 1
        assert source.inside == 1, "entered twice"
        try:
            if source.gate is not None:
                await source.gate.acquire()
            await asyncio.sleep(0)
        finally:
            source.inside -= 1
        if self.left == 0:
            raise StopAsyncIteration
        self.left -= 1
        source.given += 1
        return BATCH + source.given

    async def aclose(self) -> None:
        self.source.tasks.add(asyncio.current_task())
        self.source.closed += 1


async def one_shot(count: int, closed: list[str] | None = None) -> AsyncIterator[Any]:
    try:
        for index in range(count):
            yield BATCH + index
    finally:
        if closed is not None:
            closed.append("closed")


class Sees(ScriptedModel):
    """Notes the first value of each batch."""

    def __init__(self, **scripted: Any) -> None:
        super().__init__(**scripted)
        self.values: list[float] = []

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.values.append(float(batch.x[0, 0]))
        return super().train_batch(batch)


@pytest.mark.asyncio
async def test_an_epoch_is_one_pass_and_each_epoch_asks_for_the_next() -> None:
    source, model = Source(5), Sees()
    history = await Trainer(model).fit(source, epochs=3, verbose=0)
    assert history.epoch == [0, 1, 2]
    assert (source.passes, source.given) == (3, 15)
    assert model.values == list(range(1, 16))


@pytest.mark.asyncio
async def test_one_task_alone_touches_the_source() -> None:
    source = Source(20)
    await Trainer(ScriptedModel()).fit(source, epochs=2, verbose=0)
    (task,) = source.tasks
    assert task.get_name().startswith("source of ")
    assert task.done()


@pytest.mark.asyncio
async def test_each_source_has_a_task_of_its_own() -> None:
    training, validation = Source(3), Source(3)
    await Trainer(ScriptedModel()).fit(training, validation_data=validation, verbose=0)
    assert len(training.tasks) == len(validation.tasks) == 1
    assert training.tasks.isdisjoint(validation.tasks)


@pytest.mark.asyncio
async def test_a_source_runs_in_the_context_of_the_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen: list[str] = []

    async def source() -> AsyncIterator[Any]:
        seen.append(variable.get())
        yield BATCH

    variable.set("the caller's")
    await Trainer(ScriptedModel()).fit(source(), verbose=0)
    assert seen == ["the caller's"]


@pytest.mark.asyncio
async def test_no_pass_is_begun_before_its_epoch() -> None:
    class Looks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            begun.append(source.passes)

    source, begun = Source(3), list[int]()
    await Trainer(ScriptedModel()).fit(source, epochs=3, verbose=0, callbacks=Looks())
    assert begun == [1, 2, 3]


@pytest.mark.asyncio
async def test_never_more_than_eight_items_are_fetched_ahead() -> None:
    assert AHEAD == 8
    source, model = Source(100), ScriptedModel(gated=True)
    ahead: list[int] = []
    async with Trainer(model).start(source, verbose=0) as run:
        for _ in range(30):
            await model.open(1)
            await settle()
            for _ in range(20):
                await asyncio.sleep(0)
            ahead.append(source.given - model.steps)
        run.stop()
        model.open_for_good()
    # One more than lies there is in the hands of the training.
    assert max(ahead) == AHEAD + 1
    assert min(ahead) >= AHEAD // 2


@pytest.mark.asyncio
async def test_items_carry_over_from_one_epoch_to_the_next() -> None:
    closed: list[str] = []
    model = Sees()
    history = await Trainer(model).fit(one_shot(6, closed), epochs=3, steps_per_epoch=2, verbose=0)
    assert history.epoch == [0, 1, 2]
    assert model.values == [0, 1, 2, 3, 4, 5]
    assert closed == ["closed"]


@pytest.mark.asyncio
async def test_with_steps_passes_follow_each_other_within_an_epoch() -> None:
    source, model = Source(3), Sees()
    await Trainer(model).fit(source, epochs=2, steps_per_epoch=4, verbose=0)
    assert model.values == [1, 2, 3, 4, 5, 6, 7, 8]
    assert source.passes >= 3


@pytest.mark.asyncio
async def test_a_one_shot_source_with_several_epochs_is_refused_before_the_first_batch() -> None:
    source = one_shot(4)
    message = (
        "x=async_generator, which can be iterated once: something that can be iterated for each of 2 epochs"
        r". Give steps_per_epoch, or an object whose __iter__ \(or __aiter__\) starts anew"
    )
    with pytest.raises(ArgumentError, match=message):
        await Trainer(ScriptedModel()).fit(source, epochs=2, verbose=0)
    await source.aclose()  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_a_source_that_runs_out_in_mid_epoch_ends_the_training_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="ran out with 1 batches of the epoch missing") as caught:
        history = await Trainer(ScriptedModel()).fit(one_shot(3), epochs=2, steps_per_epoch=2, verbose=0)
    assert (history.outcome, history.reason, len(caught)) == ("stopped", "the data ran out", 1)
    assert history.epoch == [0, 1]


@pytest.mark.asyncio
async def test_a_source_that_ends_between_two_epochs_is_said_once() -> None:
    with pytest.warns(UserWarning, match="ran out with 2 batches") as caught:
        history = await Trainer(ScriptedModel()).fit(one_shot(2), epochs=2, steps_per_epoch=2, verbose=0)
    assert len(caught) == 1
    assert (history.outcome, history.epoch) == ("stopped", [0])


@pytest.mark.asyncio
async def test_a_source_without_an_item_is_refused() -> None:
    with pytest.raises(ArgumentError, match="x=an iterable without batches: there must be data to train on"):
        await Trainer(ScriptedModel()).fit(Source(0), verbose=0)


# ---------------------------------------------------------------- errors


@pytest.mark.asyncio
async def test_an_error_of_the_source_is_the_trainings_after_what_came_before_it() -> None:
    class Broken(Exception):
        pass

    error = Broken("cable")

    async def source() -> AsyncIterator[Any]:
        yield BATCH
        yield BATCH
        raise error

    model = ScriptedModel()
    with pytest.raises(Broken) as caught:
        await Trainer(model).fit(source(), verbose=0)
    assert caught.value is error
    assert model.steps == 2


@pytest.mark.asyncio
async def test_a_source_that_cannot_even_begin_is_the_trainings_error_too() -> None:
    class Broken:
        def __aiter__(self) -> Any:
            raise OSError("no route")

    with pytest.raises(OSError, match="no route"):
        await Trainer(ScriptedModel()).fit(Broken(), verbose=0)


@pytest.mark.asyncio
async def test_a_cancelled_error_of_the_source_that_nobody_asked_for_ends_the_training() -> None:
    async def source() -> AsyncIterator[Any]:
        yield BATCH
        raise asyncio.CancelledError("of its own")

    with pytest.raises(ModelError, match="CancelledError: of its own"):
        await Trainer(ScriptedModel()).fit(source(), verbose=0)


@pytest.mark.asyncio
async def test_a_generator_exit_of_the_source_itself_ends_the_training() -> None:
    async def source() -> AsyncIterator[Any]:
        yield BATCH
        raise GeneratorExit

    async with asyncio.timeout(10):  # taken for the end of the loop, it left the thread waiting for ever
        with pytest.raises(ModelError) as caught:
            await Trainer(ScriptedModel()).fit(source(), verbose=0)
    assert isinstance(caught.value.__cause__, GeneratorExit)


@pytest.mark.asyncio
async def test_who_cancels_the_sources_task_cancels_the_training() -> None:
    source = Source(5, gate=asyncio.Semaphore(1))
    run = Trainer(ScriptedModel()).start(source, verbose=0)
    await settle()
    (task,) = source.tasks
    task.cancel()
    with pytest.raises(RunCancelled, match="the task of the async source was cancelled"):
        await run


@pytest.mark.asyncio
async def test_an_item_that_is_no_batch_is_refused_where_it_comes() -> None:
    async def source() -> AsyncIterator[Any]:
        yield BATCH, BATCH, None, None

    message = r"x=an item of 4 parts: a batch is x, \(x, y\) or \(x, y, sample_weight\)"
    with pytest.raises(ArgumentError, match=message):
        await Trainer(ScriptedModel()).fit(source(), verbose=0)


# ---------------------------------------------------------------- ends


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_stop_and_cancel_end_the_wait_for_an_item_and_close_the_source_once(how: str) -> None:
    source = Source(100, gate=asyncio.Semaphore(3))
    model = ScriptedModel()
    run = Trainer(model).start(source, verbose=0)
    await settle()
    assert model.steps == 3
    if how == "stop":
        run.stop("enough")
        assert (await run).reason == "enough"
    else:
        run.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await run
    assert source.closed == 1
    assert model.steps == 3


@pytest.mark.asyncio
async def test_a_stop_before_the_first_item_is_no_empty_source() -> None:
    source = Source(1, gate=asyncio.Semaphore(0))
    run = Trainer(ScriptedModel()).start(source, verbose=0)
    await settle()
    run.stop("enough")
    history = await run
    assert (history.outcome, history.epoch) == ("stopped", [])


@pytest.mark.asyncio
async def test_a_source_that_is_not_used_to_its_end_is_closed_with_the_training() -> None:
    closed: list[str] = []
    source = one_shot(1000, closed)
    await Trainer(ScriptedModel()).fit(source, steps_per_epoch=2, verbose=0)
    assert closed == ["closed"]


@pytest.mark.asyncio
async def test_a_pass_that_came_to_its_end_is_not_closed_again() -> None:
    source = Source(2)
    await Trainer(ScriptedModel()).fit(source, epochs=2, verbose=0)
    assert source.closed == 0


@pytest.mark.asyncio
async def test_a_timeout_around_fit_ends_the_wait_for_an_item_and_is_a_timeout_error() -> None:
    source = Source(1, gate=asyncio.Semaphore(0))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await Trainer(ScriptedModel()).fit(source, verbose=0)
    assert source.closed == source.passes  # on a slow host it may not yet have been opened


@pytest.mark.asyncio
async def test_a_stop_leaves_untrained_what_was_fetched_ahead() -> None:
    model, source = Sees(gated=True), Source(100)
    run = Trainer(model).start(source, verbose=0)
    await model.open(2)
    await settle()
    run.stop("enough")
    model.open_for_good()
    await run
    assert model.values == [1, 2, 3]
    assert source.given > 3


@pytest.mark.asyncio
async def test_an_error_while_the_source_is_closed_is_said_and_does_not_undo_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def source() -> AsyncIterator[Any]:
        try:
            while True:
                yield BATCH
        finally:
            raise OSError("cannot hang up")

    history = await Trainer(ScriptedModel()).fit(source(), steps_per_epoch=2, verbose=0)
    assert history.outcome == "completed"
    assert "closing the async source raised OSError('cannot hang up')" in caplog.text


@pytest.mark.asyncio
async def test_a_source_that_awaits_its_own_run_is_told_that_this_would_never_end() -> None:
    runs: list[Any] = []

    async def source() -> AsyncIterator[Any]:
        yield BATCH
        await runs[0]
        yield BATCH

    runs.append(Trainer(ScriptedModel()).start(source(), verbose=0))
    with pytest.raises(RuntimeError, match="waits for the run itself, which waits for that hook"):
        await runs[0]


@pytest.mark.asyncio
async def test_class_weights_multiply_the_sample_weights_of_each_batch() -> None:
    class Weighs(ScriptedModel):
        def train_batch(self, batch: Batch) -> dict[str, float]:
            weights.append(batch.sample_weight.tolist())
            return super().train_batch(batch)

    async def source() -> AsyncIterator[Any]:
        yield np.zeros((3, 1)), np.array([0, 1, 2])
        yield np.zeros((2, 1)), np.array([1, 1]), np.array([0.5, 2.0])

    weights: list[Any] = []
    await Trainer(Weighs()).fit(source(), class_weight={1: 4.0, 2: 0.0}, verbose=0)
    assert weights == [[1.0, 4.0, 0.0], [2.0, 8.0]]


# ---------------------------------------------------------------- validation


@pytest.mark.asyncio
async def test_async_validation_runs_one_pass_each_time() -> None:
    source = Source(3)
    history = await Trainer(ScriptedModel()).fit(
        np.zeros((4, 1)), epochs=2, validation_data=source, verbose=0
    )
    assert source.given == 6
    assert len(history.history["val_loss"]) == 2


@pytest.mark.asyncio
async def test_validation_data_that_ran_out_does_not_hold_the_training_for_ever() -> None:
    """The second validation asks a source that has nothing more to give."""

    class Counts(Callback):
        def __init__(self) -> None:
            self.ends: list[list[str]] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.ends.append(sorted(logs))

    counts = Counts()
    with pytest.warns(UserWarning, match="ran out") as caught:
        history = await Trainer(ScriptedModel()).fit(
            np.zeros((4, 1)),
            epochs=3,
            validation_data=one_shot(3),
            validation_steps=2,
            callbacks=[counts],
            verbose=0,
        )
    assert len(caught) == 1
    assert history.outcome == "completed"
    assert counts.ends == [["loss", "val_loss"], ["loss", "val_loss"], ["loss"]]


@pytest.mark.asyncio
async def test_evaluate_and_predict_take_async_sources_too() -> None:
    trainer = Trainer(ScriptedModel())
    assert await trainer.evaluate(Source(3)) == {"loss": 0.0}
    assert (await trainer.predict(Source(3))).shape == (6, 1)
