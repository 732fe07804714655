"""The examples of Keras 2's callbacks page, as they stand there.

Changed are the imports, ``await Trainer(model).fit(...)`` in place of ``model.fit(...)``, and the paths,
which lie in a temporary folder.
"""

# The page's own code has default arguments that are lists, and files opened without `with`.
# ruff: noqa: B006, SIM115, UP015

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
import pytest

import asynccb.callbacks
from asynccb import Trainer
from asynccb.callbacks import CSVLogger, LambdaCallback, ModelCheckpoint, ReduceLROnPlateau
from asynccb.models import Activation, Dense, Sequential, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

TRAIN, TEST, CLASSES = 640, 200, 10
BATCHES = TRAIN // 128

Array = np.ndarray[Any, Any]


def images(count: int, chance: np.random.Generator) -> tuple[Array, Array]:
    """As many samples of 784 numbers, of ten classes that can be told apart, and their targets."""
    labels = chance.integers(0, CLASSES, count)
    centres = np.random.default_rng(1).random((CLASSES, 784))
    x = 0.5 * centres[labels] + 0.5 * chance.random((count, 784))
    return x.astype("float32"), np.eye(CLASSES, dtype="float32")[labels]


x_train, y_train = images(TRAIN, np.random.default_rng(2))
x_test, y_test = images(TEST, np.random.default_rng(3))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page names its files without folders."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model() -> Sequential:
    model = Sequential(seed=7)
    model.add(Dense(10, input_dim=784, kernel_initializer="uniform"))
    model.add(Activation("softmax"))
    model.compile(loss="categorical_crossentropy", optimizer="rmsprop")
    return model


@pytest.fixture(scope="module")
def workers() -> Iterator[list[BaseProcess]]:
    """Three processes: two that would work for long, and one that has ended."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=time.sleep, args=(seconds,), daemon=True) for seconds in (600, 600, 0)]
    for process in processes:
        process.start()
    processes[2].join()
    assert [process.is_alive() for process in processes] == [True, True, False]
    yield processes
    for process in processes:
        process.kill()
        process.join()
        process.close()


# fmt: off
# From here on the code of the page keeps its own layout and quotes.

class LossHistory(asynccb.callbacks.Callback):
    def on_train_begin(self, logs={}):
        self.losses = []

    def on_batch_end(self, batch, logs={}):
        self.losses.append(logs.get('loss'))


@pytest.mark.asyncio
async def test_the_losses_of_all_batches_are_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    model = Sequential()
    model.add(Dense(10, input_dim=784, kernel_initializer='uniform'))
    model.add(Activation('softmax'))
    model.compile(loss='categorical_crossentropy', optimizer='rmsprop')

    history = LossHistory()
    returned = await Trainer(model).fit(
        x_train, y_train, batch_size=128, epochs=20, verbose=0, callbacks=[history])

    print(history.losses)

    losses = history.losses
    assert capsys.readouterr().out == f"{losses}\n"
    assert [float] * (20 * BATCHES) == [type(loss) for loss in losses]
    assert losses[0] == pytest.approx(np.log(CLASSES), abs=0.3)
    assert losses[-1] < losses[0] / 2
    means = np.reshape(losses, (20, BATCHES)).mean(axis=1)
    assert returned.history["loss"] == pytest.approx(means)


@pytest.mark.asyncio
async def test_loss_history_starts_anew_with_each_fit(model: Sequential) -> None:
    history, seen = LossHistory(), []
    for epochs in (3, 1):
        await Trainer(model).fit(
            x_train, y_train, batch_size=128, epochs=epochs, verbose=0, callbacks=[history])
        seen.append(len(history.losses))
    assert seen == [3 * BATCHES, BATCHES]


@pytest.mark.asyncio
async def test_the_best_model_is_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Sequential()
    model.add(Dense(10, input_dim=784, kernel_initializer='uniform'))
    model.add(Activation('softmax'))
    model.compile(loss='categorical_crossentropy', optimizer='rmsprop')

    checkpointer = ModelCheckpoint(filepath=f'{folder}/weights.hdf5', verbose=1, save_best_only=True)
    history = await Trainer(model).fit(
        x_train, y_train, batch_size=128, epochs=20, verbose=0, validation_data=(x_test, y_test),
        callbacks=[checkpointer])

    losses = history.history["val_loss"]
    assert min(losses) == checkpointer.best
    best = load_model(folder / "weights.hdf5")
    assert best.evaluate(x_test, y_test)["loss"] == pytest.approx(min(losses), rel=1e-6)
    improved = [epoch for epoch in range(20) if losses[epoch] < min([np.inf, *losses[:epoch]])]
    said = capsys.readouterr().out.splitlines()
    assert [f"Epoch {epoch + 1}: val_loss" for epoch in range(20)] == [
        line.partition(" improved")[0].partition(" did not")[0] for line in said if " val_loss " in line
    ]
    assert len(improved) == sum(" improved from " in line for line in said)


@pytest.mark.asyncio
async def test_the_best_is_kept_when_later_epochs_are_worse(model: Sequential, folder: Path) -> None:
    spoil = LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(model.optimizer, "lr", 1.0 if epoch > 2 else 0.001))

    checkpointer = ModelCheckpoint(filepath=f'{folder}/weights.hdf5', verbose=1, save_best_only=True)
    history = await Trainer(model, seed=7).fit(
        x_train, y_train, batch_size=128, epochs=6, verbose=0, validation_data=(x_test, y_test),
        callbacks=[spoil, checkpointer])

    losses = history.history["val_loss"]
    assert min(losses) == losses[2] < losses[-1] / 2
    best = load_model(folder / "weights.hdf5")
    assert best.evaluate(x_test, y_test)["loss"] == pytest.approx(losses[2], rel=1e-6)
    assert model.evaluate(x_test, y_test)["loss"] == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.asyncio
async def test_three_lambda_callbacks_print_log_and_clean_up(
    model: Sequential, folder: Path, workers: list[BaseProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    # Print the batch number at the beginning of every batch.
    batch_print_callback = LambdaCallback(
        on_batch_begin=lambda batch,logs: print(batch))

    # Stream the epoch loss to a file in JSON format. The file content
    # is not well-formed JSON but rather has a JSON object per line.
    json_log = open('loss_log.json', mode='wt', buffering=1)
    json_logging_callback = LambdaCallback(
        on_epoch_end=lambda epoch, logs: json_log.write(
        json.dumps({'epoch': epoch, 'loss': logs['loss']}) + '\n'),
        on_train_end=lambda logs: json_log.close()
    )

    # Terminate some processes after having finished model training.
    processes = workers
    cleanup_callback = LambdaCallback(
        on_train_end=lambda logs: [
        p.terminate() for p in processes if p.is_alive()])

    history = await Trainer(model).fit(
        x_train, y_train, batch_size=128, epochs=3, verbose=0,
        callbacks=[batch_print_callback,
                   json_logging_callback,
                   cleanup_callback])

    assert [*range(BATCHES)] * 3 == [int(line) for line in capsys.readouterr().out.split()]
    assert json_log.closed
    lines = (folder / "loss_log.json").read_text().splitlines()
    expected = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(history.history["loss"])]
    assert expected == [json.loads(line) for line in lines]
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [-signal.SIGTERM, -signal.SIGTERM, 0]


@pytest.mark.parametrize("epochs", [{}, {"epochs": 5}])
@pytest.mark.asyncio
async def test_every_epoch_is_a_row_of_the_csv_file(model: Sequential, epochs: dict[str, int]) -> None:
    csv_logger = CSVLogger('training.log')
    history = await Trainer(model).fit(x_train, y_train, callbacks=[csv_logger], **epochs)

    table = pandas.read_csv("training.log")
    assert list(table.columns) == ["epoch", "loss"]
    assert [*range(epochs.get("epochs", 1))] == list(table["epoch"])
    assert history.history["loss"] == pytest.approx(list(table["loss"]), rel=1e-12)


@pytest.mark.asyncio
async def test_a_plateau_without_validation_warns(model: Sequential) -> None:
    reduce_lr = ReduceLROnPlateau(monitor='val_loss', factor=0.2,
                                  patience=5, min_lr=0.001)
    with pytest.warns(RuntimeWarning, match="val_loss") as warned:
        history = await Trainer(model).fit(x_train, y_train, callbacks=[reduce_lr])

    assert len(warned) == 1
    assert (history.outcome, history.epoch) == ("completed", [0])


@pytest.mark.asyncio
async def test_a_plateau_without_validation_warns_once_in_a_training_and_trains_on(model: Sequential) -> None:
    reduce_lr = ReduceLROnPlateau(monitor='val_loss', factor=0.2,
                                  patience=5, min_lr=0.001)
    with pytest.warns(RuntimeWarning, match="val_loss") as warned:
        history = await Trainer(model).fit(x_train, y_train, epochs=8, verbose=0, callbacks=[reduce_lr])

    assert len(warned) == 1
    assert ("completed", [*range(8)]) == (history.outcome, history.epoch)
    assert [pytest.approx(0.001)] * 8 == history.history["lr"]
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.asyncio
async def test_a_plateau_with_validation_lowers_the_rate(model: Sequential) -> None:
    model.optimizer.lr = 0.1
    reduce_lr = ReduceLROnPlateau(monitor='val_loss', factor=0.2,
                                  patience=5, min_lr=0.001, epsilon=1e9)
    history = await Trainer(model).fit(
        x_train, y_train, epochs=17, verbose=0, validation_data=(x_test, y_test), callbacks=[reduce_lr])
    # The first epoch is the best of all; from then on every fifth one lowers the rate.
    expected = [0.1] * 6 + [0.02] * 5 + [0.004] * 5 + [0.001]
    assert expected == pytest.approx(history.history["lr"])
