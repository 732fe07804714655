"""The public API as users type it, for the type checker alone: ``mypy`` reads this file, nothing runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any, assert_type

import numpy as np

from asynccb import Callback, CallbackError, Gap, History, Run, RunCancelled, Snapshot, Trainer
from asynccb.callbacks import CSVLogger, EarlyStopping, LambdaCallback, ModelCheckpoint
from asynccb.events import EpochEnd, Event
from asynccb.models import Activation, Dense, Sequential
from asynccb.protocols import Batch

x = np.zeros((8, 4), np.float32)
y = np.zeros((8, 2), np.float32)


def build() -> Sequential:
    model = Sequential([Dense(4, activation="relu", input_dim=4), Dense(2), Activation("softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="categorical_crossentropy", metrics=["accuracy"])
    return model


class Inline(Callback):
    """Hooks that run between two batches."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.losses: list[float] = []

    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(logs["loss"])


class Beside(Callback):
    """Hooks that run on the event loop."""

    overflow = "drop_oldest"
    on_error = "warn"

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)


class Both(Callback):
    """Decides inline, works beside."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        return self._later(epoch, self.snapshot().arrays)

    async def _later(self, epoch: int, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        await asyncio.sleep(0)


class Smallest:
    """The smallest model there is."""

    def train_batch(self, batch: Batch) -> Mapping[str, Any]:
        return {"loss": float(batch.size)}


async def batches() -> AsyncIterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    yield x, y


async def fit() -> None:
    trainer = Trainer(build(), seed=7)
    history = await trainer.fit(
        x,
        y,
        batch_size=4,
        epochs=2,
        validation_split=0.25,
        callbacks=[
            CSVLogger("log.csv"),
            EarlyStopping(patience=3),
            ModelCheckpoint("weights.{epoch:02d}.h5"),
            LambdaCallback(on_epoch_end=lambda epoch, logs: None),
            Inline(),
            Beside(),
            Both(),
        ],
        stop_after=timedelta(minutes=1),
    )
    assert_type(history, History)
    losses: list[float] = history.history["loss"]
    rows: list[dict[str, Any]] = history.rows()
    print(losses, rows, history.outcome, history.reason, history.failures)

    await trainer.evaluate(x, y)
    await trainer.predict(x)
    await Trainer(Smallest()).fit(x, y)
    await Trainer(build()).fit(batches(), steps_per_epoch=1)


async def watch() -> None:
    run = Trainer(build()).start(x, y, epochs=2)
    assert_type(run, Run)
    async for event in run:
        if isinstance(event, EpochEnd):
            print(event.epoch, event.logs["loss"])
    async for later in run.events(since=0):
        assert_type(later, Event | Gap)
    print(run.state, run.epoch, run.step, run.logs, run.outcome, run.exception, run.stats)

    snapshot = await run.snapshot()
    assert_type(snapshot, Snapshot)
    with snapshot:
        print(snapshot.step, snapshot.epoch, snapshot.arrays.keys())
    run.pause()
    run.resume()
    await run.flush()
    run.stop("enough")
    run.cancel()
    assert_type(await run, History)


async def handle() -> None:
    async with Trainer(build()).start(x, y) as run:
        run.stop()
    try:
        await run
    except CallbackError as error:
        print(error.callback, error.hook, error.epoch, error.history)
    except RunCancelled as cancelled:
        print(cancelled.reason, cancelled.history)
