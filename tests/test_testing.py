"""The public doubles do what tests of services rely on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.events import BatchEnd, EpochEnd
from asynccb.protocols import Batch, TrainsBatches
from asynccb.run import live_runs
from asynccb.testing import Match, Recorder, ScriptedModel, settle

if TYPE_CHECKING:
    from pathlib import Path

X = np.zeros((4, 1))


@pytest.mark.asyncio
async def test_the_example_of_the_module_is_true() -> None:
    model, recorder = ScriptedModel(gated=True), Recorder()
    run = Trainer(model).start(X, batch_size=1, verbose=0, callbacks=[recorder])
    await model.open(2)
    await settle()
    assert recorder.hooks[-1] == "on_train_batch_begin"
    assert (model.steps, model.waiting) == (2, True)
    run.stop("seen enough")
    model.open_for_good()
    await run
    assert model.steps == 3


def test_a_scripted_model_gives_its_losses_in_turn_and_raises_where_it_is_told() -> None:
    model = ScriptedModel([3.0, 1.0], raises={3: OSError("at three")})
    batch = Batch(X, size=4)
    assert isinstance(model, TrainsBatches)
    assert [model.train_batch(batch)["loss"] for _ in range(3)] == [3.0, 1.0, 3.0]
    assert set(model.weights.tolist()) == {3.0}
    with pytest.raises(OSError, match="at three"):
        model.train_batch(batch)
    assert set(model.weights.tolist()) == {3.0, 4.0}  # in the middle of the batch
    assert model.steps == 3
    assert model.sizes == [4, 4, 4]
    assert model.test_batch(batch) == {"loss": 3.0}
    np.testing.assert_array_equal(model.predict_batch(batch), np.full((4, 1), 3.0))


def test_a_scripted_state_owns_its_memory_saves_and_becomes_a_model(tmp_path: Path) -> None:
    model = ScriptedModel()
    model.train_batch(Batch(X, size=4))
    state = model.capture()
    model.train_batch(Batch(X, size=4))
    assert set(state.arrays["weights"].tolist()) == {1.0}
    assert state.to_model().steps == 1
    state.save(tmp_path / "state.bin")
    np.testing.assert_array_equal(np.frombuffer((tmp_path / "state.bin").read_bytes()), np.ones(16))


@pytest.mark.asyncio
async def test_opening_more_than_the_training_needs_returns_when_the_run_has_ended() -> None:
    model = ScriptedModel(gated=True)
    run = Trainer(model).start(X, batch_size=1, verbose=0)
    async with asyncio.timeout(10):
        await model.open(100)
    assert await run
    assert live_runs() == []


@pytest.mark.asyncio
async def test_a_recorder_keeps_every_event_in_order_with_its_logs() -> None:
    recorder = Recorder()
    await Trainer(ScriptedModel([2.0])).fit(
        np.zeros((1, 1)), verbose=0, callbacks=recorder, validation_data=(np.zeros((1, 1)), None)
    )
    assert recorder.events == [
        ("on_train_begin",),
        ("on_epoch_begin", 0),
        ("on_train_batch_begin", 0),
        ("on_train_batch_end", 0),
        ("on_test_begin",),
        ("on_test_batch_begin", 0),
        ("on_test_batch_end", 0),
        ("on_test_end",),
        ("on_epoch_end", 0),
        ("on_train_end",),
    ]
    assert recorder.logs[3] == {"batch": 0, "size": 1, "loss": 2.0}
    assert recorder.logs[8] == {"val_loss": 1.0, "loss": 2.0}
    assert len(recorder.logs) == len(recorder.hooks) == 10


def test_a_match_compares_the_fields_that_it_names() -> None:
    event = EpochEnd(5, 1, {"loss": 2.0}, 8)
    assert event == Match(EpochEnd, epoch=1)
    assert event == Match(EpochEnd, epoch=1, logs={"loss": 2.0})
    assert event != Match(EpochEnd, epoch=2)
    assert event != Match(BatchEnd)
    assert [event] == [Match(EpochEnd)]
    assert repr(Match(EpochEnd, epoch=1)) == "Match(EpochEnd, epoch=1)"
    assert repr(Match(EpochEnd)) == "Match(EpochEnd)"


@pytest.mark.asyncio
async def test_settle_waits_for_all_that_can_move_and_for_nothing_else() -> None:
    class Slow(Callback):
        def __init__(self) -> None:
            self.handled = 0

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            for _ in range(10):
                await asyncio.sleep(0)
            self.handled += 1

    await settle()  # without any run it returns
    slow, model = Slow(), ScriptedModel(gated=True)
    run = Trainer(model).start(X, batch_size=1, verbose=0, callbacks=slow)
    await model.open(3)
    await settle()
    assert slow.handled == 3
    run.pause()
    model.open_for_good()
    await settle()
    assert run.state == "paused"
    run.resume()
    await run
