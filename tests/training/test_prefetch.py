"""Async sources: one task alone reads each, a few items ahead, and whatever happens it is closed once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, ModelError, RunCancelled, Trainer
from asynccb.errors import ArgumentError
from asynccb.testing import ScriptedModel, settle
from asynccb.training.prefetch import AHEAD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asynccb.protocols import Batch


def item(value: int = 0) -> Any:
    return np.array([float(value)])


class Sees(ScriptedModel):
    """Notes what it is trained on."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.seen: list[int] = []

    def train_batch(self, batch: Batch) -> dict[str, float]:
        logs = super().train_batch(batch)
        self.seen.append(int(batch.x[0]))
        return logs


class Source:
    """An async iterable that can be iterated again, and knows who does what with it.

    Args:
        items: of each pass; None: without end.
        blocks_at: the item of a pass that never comes.
        raises_at: the item of a pass in whose place ``error`` is raised.
    """

    def __init__(
        self,
        items: int | None = 3,
        *,
        blocks_at: int = -1,
        raises_at: int = -1,
        error: BaseException | None = None,
    ) -> None:
        self.items, self.blocks_at, self.raises_at, self.error = items, blocks_at, raises_at, error
        self.passes = 0
        self.given = 0
        self.most_at_once = 0
        self.closed: list[int] = []
        self.tasks: set[Any] = set()
        self.blocked = asyncio.Event()

    def __aiter__(self) -> Pass:
        self.tasks.add(asyncio.current_task())
        self.passes += 1
        return Pass(self, self.passes)


class Pass:
    def __init__(self, source: Source, number: int) -> None:
        self.source, self.number = source, number
        self.given = 0
        self.inside = 0

    def __aiter__(self) -> Pass:
        return self

    async def __anext__(self) -> Any:
        source = self.source
        source.tasks.add(asyncio.current_task())
        self.inside += 1
        source.most_at_once = max(source.most_at_once, self.inside)
        try:
            await asyncio.sleep(0)
            if self.given == source.items:
                raise StopAsyncIteration
            if self.given == source.blocks_at:
                source.blocked.set()
                await asyncio.Event().wait()
            if self.given == source.raises_at:
                assert source.error is not None
                raise source.error
        finally:
            self.inside -= 1
        self.given += 1
        source.given += 1
        return item(10 * self.number + self.given - 1)

    async def aclose(self) -> None:
        self.source.tasks.add(asyncio.current_task())
        assert self.inside == 0
        await asyncio.sleep(0)
        self.source.closed.append(self.number)


async def fit(model: ScriptedModel, source: Any, **more: Any) -> Any:
    return await Trainer(model).fit(source, verbose=0, **more)


# ---------------------------------------------------------------- passes and epochs


@pytest.mark.asyncio
async def test_without_steps_each_epoch_is_a_pass_of_its_own() -> None:
    model, source = Sees(), Source()
    history = await fit(model, source, epochs=3)
    assert model.seen == [10, 11, 12, 20, 21, 22, 30, 31, 32]
    assert (source.passes, history.epoch) == (3, [0, 1, 2])


@pytest.mark.asyncio
async def test_no_pass_is_begun_before_its_epoch() -> None:
    class Looks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            begun.append(source.passes)

    source, begun = Source(), list[int]()
    await fit(Sees(), source, epochs=3, callbacks=Looks())
    assert begun == [1, 2, 3]


@pytest.mark.asyncio
async def test_with_steps_nothing_that_was_fetched_is_lost_between_epochs() -> None:
    model, source = Sees(), Source(items=5)
    await fit(model, source, steps_per_epoch=3, epochs=4)
    assert model.seen == [10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 30, 31]


@pytest.mark.asyncio
async def test_a_generator_may_feed_many_epochs_where_there_are_steps() -> None:
    async def numbers() -> AsyncIterator[Any]:
        for value in range(100):
            yield item(value)

    model = Sees()
    await fit(model, numbers(), steps_per_epoch=2, epochs=3)
    assert model.seen == list(range(6))


@pytest.mark.asyncio
async def test_a_generator_for_several_epochs_without_steps_is_refused_before_it_is_asked() -> None:
    asked = False

    async def numbers() -> AsyncIterator[Any]:
        nonlocal asked
        asked = True
        yield item()

    source = numbers()
    with pytest.raises(
        ArgumentError, match=r"x=a async_generator, which can be iterated once.*steps_per_epoch"
    ):
        await fit(Sees(), source, epochs=2)
    assert not asked
    await fit(Sees(), source, epochs=1)
    assert asked


@pytest.mark.asyncio
async def test_a_source_that_runs_out_in_mid_epoch_is_one_warning_and_the_end_of_the_training() -> None:
    async def numbers() -> AsyncIterator[Any]:
        for value in range(5):
            yield item(value)

    model = Sees()
    with pytest.warns(UserWarning, match="ran out with 1 batches of the epoch missing") as caught:
        history = await fit(model, numbers(), steps_per_epoch=3, epochs=9)
    assert len(caught) == 1
    assert (model.seen, history.epoch, history.outcome) == ([0, 1, 2, 3, 4], [0, 1], "stopped")


@pytest.mark.asyncio
async def test_a_source_without_a_batch_is_refused() -> None:
    with pytest.raises(ArgumentError, match="x=an iterable without batches"):
        await fit(Sees(), Source(items=0))


@pytest.mark.asyncio
async def test_a_validation_may_come_from_an_async_source_too() -> None:
    source = Source(items=2)
    history = await fit(ScriptedModel(), np.zeros((2, 1)), validation_data=source, epochs=3)
    assert history.history["val_loss"] == [1.0, 2.0, 3.0]
    assert source.passes == 3


@pytest.mark.asyncio
async def test_evaluate_and_predict_take_async_sources() -> None:
    source = Source(items=4)
    model = Sees()
    assert await Trainer(model).evaluate(source) == {"loss": 0.0}
    assert (await Trainer(model).predict(source)).shape == (4, 1)
    assert source.passes == 2


# ---------------------------------------------------------------- one task alone, and not too far ahead


@pytest.mark.asyncio
async def test_one_task_alone_reads_and_closes_a_source() -> None:
    source = Source(items=None)
    await fit(Sees(), source, steps_per_epoch=10, epochs=2)
    (task,) = source.tasks
    assert task is not asyncio.current_task()
    assert task.done()
    assert source.most_at_once == 1


@pytest.mark.asyncio
async def test_each_source_has_a_task_of_its_own() -> None:
    training, validation = Source(), Source()
    await fit(Sees(), training, validation_data=validation)
    assert len(training.tasks) == len(validation.tasks) == 1
    assert training.tasks.isdisjoint(validation.tasks)


@pytest.mark.asyncio
async def test_a_source_is_read_as_many_items_ahead_as_are_promised_and_no_more() -> None:
    model, source = Sees(gated=True), Source(items=None)
    run = Trainer(model).start(source, steps_per_epoch=50, verbose=0)
    ahead = []
    for trained in range(20):
        await model.at_gate()
        await settle()
        # One is in the hands of the model that waits at the gate.
        ahead.append(source.given - trained - 1)
        await model.open()
    # It is read on when half of what was fetched has been used.
    assert max(ahead) == AHEAD == 8
    assert min(ahead) > AHEAD // 2
    model.open_for_good()
    await run
    assert source.given <= 50 + AHEAD


@pytest.mark.asyncio
async def test_a_source_runs_in_the_context_of_the_caller() -> None:
    import contextvars

    variable = contextvars.ContextVar("variable", default="nothing")

    async def numbers() -> AsyncIterator[Any]:
        seen.append(variable.get())
        yield item()

    seen: list[str] = []
    variable.set("the caller's")
    await fit(Sees(), numbers())
    assert seen == ["the caller's"]


# ---------------------------------------------------------------- ends


@pytest.mark.asyncio
async def test_a_pass_that_was_not_read_to_its_end_is_closed_once() -> None:
    source = Source(items=None)
    await fit(Sees(), source, steps_per_epoch=2, epochs=2)
    assert source.closed == [1]


@pytest.mark.asyncio
async def test_a_pass_that_came_to_its_end_is_not_closed_again() -> None:
    source = Source(items=2)
    await fit(Sees(), source, epochs=2)
    assert source.closed == []


@pytest.mark.asyncio
async def test_a_generator_runs_its_own_finally_before_fit_returns() -> None:
    async def numbers() -> AsyncIterator[Any]:
        try:
            while True:
                yield item()
        finally:
            await asyncio.sleep(0)
            ends.append(asyncio.current_task())

    ends: list[Any] = []
    await fit(Sees(), numbers(), steps_per_epoch=3)
    assert len(ends) == 1
    assert ends[0].get_name().startswith("source of run-")


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [0, 2])
async def test_an_error_of_a_source_is_the_training_s_after_what_came_before_it(at: int) -> None:
    error = ConnectionResetError("the line")
    model, source = Sees(), Source(items=None, raises_at=at, error=error)
    with pytest.raises(ConnectionResetError) as caught:
        await fit(model, source, steps_per_epoch=9)
    assert caught.value is error
    assert (model.seen, source.closed) == ([10, 11][:at], [1])


@pytest.mark.asyncio
async def test_a_source_that_cannot_be_iterated_at_all_fails_the_training() -> None:
    class Broken:
        def __aiter__(self) -> Any:
            raise OSError("no such table")

    with pytest.raises(OSError, match="no such table"):
        await fit(Sees(), Broken())


@pytest.mark.asyncio
async def test_a_cancelled_error_of_the_source_s_own_neither_hangs_the_training_nor_passes_for_a_cancel() -> (
    None
):
    source = Source(raises_at=1, error=asyncio.CancelledError())
    with pytest.raises(ModelError) as caught:
        await fit(Sees(), source)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.asyncio
async def test_a_batch_without_samples_is_refused() -> None:
    async def numbers() -> AsyncIterator[Any]:
        yield np.zeros((0, 1))

    with pytest.raises(ArgumentError, match="a batch without samples"):
        await fit(Sees(), numbers())


@pytest.mark.asyncio
@pytest.mark.parametrize("trained", [0, 2])
async def test_a_stop_ends_the_wait_for_an_item_that_does_not_come(trained: int) -> None:
    model, source = Sees(), Source(blocks_at=trained)
    run = Trainer(model).start(source, epochs=2, verbose=0)
    await source.blocked.wait()
    await settle()
    run.stop("enough")
    history = await run
    assert (history.outcome, history.reason) == ("stopped", "enough")
    assert (len(model.seen), history.epoch) == (trained, [0] if trained else [])
    assert source.closed == [1]


@pytest.mark.asyncio
async def test_a_cancel_ends_the_wait_for_an_item_that_does_not_come() -> None:
    model, source = Sees(), Source(blocks_at=1)
    run = Trainer(model).start(source, verbose=0)
    await source.blocked.wait()
    await settle()
    run.cancel("enough")
    with pytest.raises(RunCancelled, match="enough"):
        await run
    assert (model.seen, source.closed) == ([10], [1])


@pytest.mark.asyncio
async def test_a_timeout_around_fit_ends_the_wait_for_an_item_and_is_a_timeout_error() -> None:
    source = Source(blocks_at=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await fit(Sees(), source)
    assert source.closed in ([], [1])  # it may not yet have been opened
    assert source.passes == len(source.closed)


@pytest.mark.asyncio
async def test_a_stop_while_the_thread_trains_leaves_what_was_fetched_untrained() -> None:
    model, source = Sees(gated=True), Source(items=None)
    run = Trainer(model).start(source, steps_per_epoch=50, verbose=0)
    await model.open(2)
    await settle()
    run.stop("enough")
    model.open_for_good()
    await run
    assert model.seen == [10, 11, 12]
    assert source.given > 3


@pytest.mark.asyncio
async def test_class_weights_reach_the_batches_of_an_async_source() -> None:
    class Weighs(ScriptedModel):
        def train_batch(self, batch: Batch) -> dict[str, float]:
            weights.append(batch.sample_weight.tolist())
            return super().train_batch(batch)

    async def batches() -> AsyncIterator[Any]:
        yield np.zeros((3, 1)), np.array([0, 1, 2])
        yield np.zeros((2, 1)), np.array([1, 1]), np.array([0.5, 2.0])

    weights: list[Any] = []
    await fit(Weighs(), batches(), class_weight={1: 4.0, 2: 0.0})
    assert weights == [[1.0, 4.0, 0.0], [2.0, 8.0]]
