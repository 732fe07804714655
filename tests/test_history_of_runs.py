"""What the History tells of a training after each way out, and while it goes on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from asynccb import Callback, CallbackError, History, RunCancelled, Trainer
from asynccb.testing import Recorder, ScriptedModel

X = np.zeros((2, 1))


@pytest.mark.asyncio
async def test_a_completed_training_has_every_epoch_and_no_reason() -> None:
    history = await Trainer(ScriptedModel([4.0, 2.0])).fit(X, batch_size=1, epochs=2, verbose=0)
    assert history.history == {"loss": [3.0, 3.0]}
    assert history.epoch == [0, 1]
    assert history.rows() == [{"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 3.0}]
    assert (history.outcome, history.reason, history.failures) == ("completed", "", [])


@pytest.mark.asyncio
async def test_the_epoch_under_way_is_there_after_a_stop_and_not_after_a_cancel() -> None:
    for way, epochs in (("stop", [0, 1]), ("cancel", [0])):
        model = ScriptedModel([1.0, 2.0, 3.0], gated=True)
        trainer = Trainer(model)
        run = trainer.start(X, batch_size=1, epochs=9, verbose=0)
        await model.open(2)
        getattr(run, way)("enough")
        model.open_for_good()
        try:
            await run
        except RunCancelled:
            assert way == "cancel"
        assert run.history.epoch == epochs
        assert run.history.reason == "enough"
        assert run.history.history["loss"] == [1.5, 3.0][: len(epochs)]


@pytest.mark.asyncio
async def test_a_cancelled_fit_leaves_its_history_with_the_trainer() -> None:
    model = ScriptedModel(gated=True)
    trainer = Trainer(model)
    task = asyncio.create_task(trainer.fit(X, batch_size=1, epochs=9, verbose=0))
    await asyncio.sleep(0)
    await model.open(5)
    task.cancel()
    await asyncio.sleep(0)
    model.open_for_good()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trainer.last_run.history.epoch == [0, 1]
    assert trainer.last_run.history.outcome == "cancelled"


@pytest.mark.asyncio
async def test_a_failed_training_has_the_epochs_before_it_and_the_error_in_words() -> None:
    trainer = Trainer(ScriptedModel(raises={3: OSError("of the model")}))
    with pytest.raises(OSError, match="of the model"):
        await trainer.fit(X, batch_size=1, epochs=9, verbose=0)
    history = trainer.last_run.history
    assert (history.epoch, history.outcome, history.reason) == ([0], "failed", "OSError: of the model")


@pytest.mark.asyncio
async def test_the_history_of_a_callback_error_is_the_runs() -> None:
    class Fails(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise ValueError("!")

    trainer = Trainer(ScriptedModel())
    with pytest.raises(CallbackError) as caught:
        await trainer.fit(X, epochs=5, verbose=0, callbacks=Fails())
    assert caught.value.history is trainer.last_run.history
    assert caught.value.history.epoch[0] == 0


@pytest.mark.asyncio
async def test_failures_keep_the_first_of_each_hook_and_count_the_rest() -> None:
    class Fails(Callback):
        on_error = "warn"

        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            raise KeyError(epoch)

        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise ValueError(epoch)

    history = await Trainer(ScriptedModel()).fit(X, epochs=3, verbose=0, callbacks=[Fails(), Fails()])
    assert sorted((f.callback, f.hook, f.epoch, f.times) for f in history.failures) == [
        ("Fails", "on_epoch_begin", 0, 3),
        ("Fails", "on_epoch_end", 0, 3),
        ("Fails#2", "on_epoch_begin", 0, 3),
        ("Fails#2", "on_epoch_end", 0, 3),
    ]
    assert {f.exception.args for f in history.failures} == {(0,)}


@pytest.mark.asyncio
async def test_a_history_starts_anew_with_each_training() -> None:
    history = History()
    trainer = Trainer(ScriptedModel(raises={2: OSError("!")}))
    for _ in range(2):
        with pytest.raises(OSError, match="!"):
            await trainer.fit(X, batch_size=1, epochs=2, verbose=0, callbacks=history)
        trainer = Trainer(ScriptedModel(raises={2: OSError("!")}))
        assert (history.epoch, history.outcome) == ([0], "failed")
    await Trainer(ScriptedModel()).fit(X, epochs=1, verbose=0, callbacks=history)
    assert (history.epoch, history.outcome, history.failures) == ([0], "completed", [])


@pytest.mark.asyncio
async def test_a_history_can_be_read_while_the_training_goes_on() -> None:
    seen: list[Any] = []
    model = ScriptedModel(gated=True)
    run = Trainer(model).start(X, batch_size=1, epochs=3, verbose=0)
    await model.open(4)
    thread = threading.Thread(target=lambda: seen.append((run.history.rows(), run.history.outcome)))
    thread.start()
    thread.join()
    assert seen == [([{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 1.0}], None)]
    model.open_for_good()
    await run


@pytest.mark.asyncio
async def test_epochs_are_counted_from_the_initial_one() -> None:
    recorder = Recorder()
    history = await Trainer(ScriptedModel()).fit(
        X,
        epochs=5,
        initial_epoch=3,
        verbose=0,
        callbacks=recorder,
        validation_data=(X, None),
        validation_freq=2,
    )
    assert history.epoch == [3, 4]
    assert history.rows() == [{"epoch": 3, "val_loss": 1.0, "loss": 1.0}, {"epoch": 4, "loss": 1.0}]
    assert [event for event in recorder.events if event[0] == "on_epoch_begin"] == [
        ("on_epoch_begin", 3),
        ("on_epoch_begin", 4),
    ]


@pytest.mark.asyncio
async def test_nothing_to_train_is_complete_at_once() -> None:
    recorder = Recorder()
    history = await Trainer(ScriptedModel()).fit(X, epochs=2, initial_epoch=2, verbose=0, callbacks=recorder)
    assert (history.epoch, history.outcome) == ([], "completed")
    assert recorder.hooks == ["on_train_begin", "on_train_end"]
