"""An error of a callback in the background: raised once, at the next safe point, and never lost."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, CallbackError, Run, RunCancelled, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, TensorBoard
from asynccb.callbacks.tensorboard.writer import EventFile
from asynccb.errors import CheckpointWriteError
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EPOCHS, FAILS = 5, 2
"""Epochs of one batch each, and which of them the error belongs to, from 1 on."""
X = np.zeros((1, 1))


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class FailsBeside(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch + 1 == self.at:
            raise full()


class FullDisk(CSVLogger):
    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path)
        self.at = at

    async def _write(self, lines: Any) -> None:
        if self._rows == self.at:
            raise full()
        await super()._write(lines)


class FailingWriter(ModelCheckpoint):
    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path)
        self.at = at

    def _write_now(self, save: Any, snapshot: Any) -> None:
        if save.epoch + 1 == self.at:
            raise CheckpointWriteError(save.path, full())
        super()._write_now(save, snapshot)


SINKS: dict[str, tuple[Callable[[Path, int], Callback], type[Exception]]] = {
    "FailsBeside": (lambda folder, at: FailsBeside(at), OSError),
    "FullDisk": (lambda folder, at: FullDisk(folder / "log.csv", at), OSError),
    "FailingWriter": (
        lambda folder, at: FailingWriter(folder / "model-{epoch}.h5", at),
        CheckpointWriteError,
    ),
}


class Scene:
    """A training whose ``sink`` fails; ``others`` tasks await its run beside the one that awaits ``fit``."""

    def __init__(self, sink: Callback, waiters: int, *, gated: bool) -> None:
        self.model, self.recorder = ScriptedModel(gated=gated), Recorder()
        trainer = Trainer(self.model)
        self.run: Run = trainer.start(
            X, batch_size=1, epochs=EPOCHS, verbose=0, callbacks=[sink, self.recorder]
        )
        self.tasks = [asyncio.create_task(self.wait()) for _ in range(waiters)]

    async def wait(self) -> Any:
        return await self.run

    async def failed(self) -> None:
        """Waits until the error is known."""
        while not self.run.history.failures:  # noqa: ASYNC110  # a thread brings it about
            await asyncio.sleep(0.001)

    async def errors(self) -> list[Any]:
        """What each waiter got, once the run has ended."""
        await self.run._end._came.wait()
        return await asyncio.gather(*self.tasks, return_exceptions=True)


async def at_the_next_batch(scene: Scene) -> None:
    await scene.model.open(FAILS)
    await scene.failed()
    scene.model.open_for_good()


async def at_a_flush(scene: Scene) -> None:
    await scene.model.open(FAILS)
    await scene.failed()
    await scene.run.flush()
    scene.model.open_for_good()


async def at_the_end(scene: Scene) -> None:
    await scene.run._end._came.wait()


async def cancelled_after_it(scene: Scene) -> None:
    await scene.model.open(FAILS)
    await scene.failed()
    scene.run.cancel("too late")
    scene.model.open_for_good()


@pytest.mark.asyncio
@pytest.mark.parametrize("waiters", [0, 1, 4])
@pytest.mark.parametrize("moment", [at_the_next_batch, at_a_flush, at_the_end, cancelled_after_it])
@pytest.mark.parametrize("sink", SINKS)
async def test_an_error_in_the_background_is_raised_once_within_a_batch_and_told_to_every_waiter(
    sink: str, moment: Callable[[Scene], Any], waiters: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, kind = SINKS[sink]
    last = moment is at_the_end
    scene = Scene(make(tmp_path, EPOCHS if last else FAILS), waiters, gated=not last)
    await moment(scene)
    errors = await scene.errors()
    assert scene.model.steps - (EPOCHS - 1 if last else FAILS) in (0, 1)  # the batch under way is trained
    assert scene.run.outcome == "failed"
    assert len(errors) == waiters
    assert len({id(error) for error in errors}) <= 1  # all of them get this one
    for error in errors:
        assert isinstance(error, CallbackError)
        assert (error.callback, error.hook, error.epoch) == (
            sink,
            "on_epoch_end",
            (EPOCHS if last else FAILS) - 1,
        )
        assert isinstance(error.__cause__, kind)
        assert not hasattr(error, "__notes__")
    (failure,) = scene.run.history.failures
    assert (failure.callback, failure.hook, failure.times) == (sink, "on_epoch_end", 1)
    assert isinstance(failure.exception, kind)
    # Said in the log only where nobody was there to be told.
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * (waiters == 0)
    assert scene.recorder.hooks[-1] == "on_train_end"


@pytest.mark.asyncio
@pytest.mark.parametrize("waiters", [0, 1, 4])
@pytest.mark.parametrize("sink", SINKS)
async def test_an_error_in_the_drain_of_a_cancelled_training_is_told_to_everybody_and_said_if_nobody_waits(
    sink: str, waiters: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Late(Callback):
        """Keeps the training in its last epoch until it is cancelled."""

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch + 1 == FAILS:
                self.run.cancel("no more")

    make, kind = SINKS[sink]
    model = ScriptedModel()
    callbacks = [Late(), make(tmp_path, FAILS)]
    trainer = Trainer(model)
    run = trainer.start(X, batch_size=1, epochs=EPOCHS, verbose=0, callbacks=callbacks)

    async def wait() -> Any:
        return await run

    tasks = [asyncio.create_task(wait()) for _ in range(waiters)]
    await run._end._came.wait()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    words = f"{sink}.on_epoch_end of epoch {FAILS - 1} raised: "
    for error in errors:
        assert isinstance(error, RunCancelled)
        (note,) = error.__notes__
        assert note.startswith(f"Also: CallbackError: {words}")
    (failure,) = run.history.failures
    assert isinstance(failure.exception, kind)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (waiters == 0)
    assert all(words in line for line in said)


@pytest.mark.asyncio
async def test_a_cancelled_fit_has_the_error_of_a_sink_as_a_note_once(tmp_path: Path) -> None:
    model, fails = ScriptedModel(gated=True), FailsBeside(FAILS)
    trainer = Trainer(model)
    task = asyncio.create_task(trainer.fit(X, batch_size=1, epochs=EPOCHS, verbose=0, callbacks=fails))
    await asyncio.sleep(0)
    await model.open(FAILS)
    while not trainer.last_run.history.failures:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0)
    model.open_for_good()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    (note,) = caught.value.__notes__
    assert note.startswith(f"Also: CallbackError: FailsBeside.on_epoch_end of epoch {FAILS - 1} raised: ")


@pytest.mark.asyncio
async def test_a_full_disk_under_tensorboard_is_one_warning_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = EventFile.append, []

    def refuse(file: EventFile, records: Any) -> None:
        calls.append(file)
        if len(calls) > FAILS:
            raise full()
        append(file, records)

    monkeypatch.setattr(EventFile, "append", refuse)
    board = TensorBoard(tmp_path)
    history = await Trainer(ScriptedModel()).fit(X, batch_size=1, epochs=EPOCHS, verbose=0, callbacks=board)
    assert history.outcome == "completed"
    (failure,) = history.failures
    assert (failure.callback, failure.hook, failure.times) == ("TensorBoard", "on_epoch_end", 1)
    (record,) = caplog.records
    assert (
        "TensorBoard.on_epoch_end raised OSError: [Errno 28] No space left on device" in record.getMessage()
    )
    assert board.dropped == EPOCHS - FAILS


@pytest.mark.asyncio
async def test_a_naive_task_beside_a_training_loses_its_error_until_it_is_collected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The negative control: a task that nobody awaits."""
    steps: list[int] = []

    async def save() -> None:
        raise full()

    def train() -> None:
        asyncio.run_coroutine_threadsafe(save(), loop)
        steps.extend(range(EPOCHS))

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(train)
    await asyncio.sleep(0)
    assert len(steps) == EPOCHS  # trained to its end, and nobody has heard of the full disk
    assert caplog.records == []
