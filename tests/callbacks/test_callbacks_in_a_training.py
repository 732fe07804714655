"""The callbacks of the page at work in real trainings: what only their interplay shows."""

from __future__ import annotations

import csv
import math
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, CallbackError, Trainer
from asynccb.callbacks import (
    BaseLogger,
    Callback,
    CSVLogger,
    EarlyStopping,
    History,
    LambdaCallback,
    LearningRateScheduler,
    ReduceLROnPlateau,
    TerminateOnNaN,
)
from asynccb.models import Activation, Dense, Sequential
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from pathlib import Path

DATA = np.zeros((4, 1), np.float32)
VALIDATION = (DATA, DATA)


def scripted(*losses: float) -> ScriptedModel:
    model = ScriptedModel(losses or (1.0,))
    model.optimizer = SimpleNamespace(lr=1.0)  # type: ignore[attr-defined]
    return model


async def fit(model: Any, *callbacks: Callback, batch_size: int = 4, **options: Any) -> History:
    history = await Trainer(model).fit(
        DATA, DATA, batch_size=batch_size, callbacks=list(callbacks), **{"epochs": 3, "verbose": 0, **options}
    )
    assert isinstance(history, History)
    return history


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    chance = np.random.default_rng(0)
    return chance.normal(size=(64, 8)).astype("f4"), np.eye(3, dtype="f4")[chance.integers(0, 3, 64)]


def classifier(metric: str = "accuracy") -> Sequential:
    model = Sequential([Dense(3, input_dim=8), Activation("softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="categorical_crossentropy", metrics=[metric])
    return model


@pytest.mark.asyncio
async def test_the_epochs_mean_is_weighted_by_the_sizes_of_its_batches() -> None:
    history = await fit(scripted(1.0, 4.0), batch_size=3, epochs=1)
    assert history.history == {"loss": [(3 * 1.0 + 1 * 4.0) / 4]}


@pytest.mark.asyncio
async def test_a_history_and_a_base_logger_of_the_users_replace_the_automatic_ones() -> None:
    mine = History()
    assert await fit(scripted(2.0), mine, BaseLogger(stateful_metrics=["loss"])) is mine
    assert (mine.epoch, mine.outcome) == ([0, 1, 2], "completed")


@pytest.mark.asyncio
async def test_an_infinite_loss_ends_the_training_in_its_first_epoch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    history = await fit(
        scripted(1.0, math.inf, 1.0), TerminateOnNaN(), batch_size=1, validation_data=VALIDATION
    )
    assert history.history == {"loss": [math.inf]}
    assert (history.outcome, history.reason) == ("stopped", "TerminateOnNaN: the loss of batch 1 is inf")
    assert capsys.readouterr().out == "Batch 1: Invalid loss, terminating training\n"


@pytest.mark.asyncio
async def test_a_csv_log_survives_a_training_that_is_stopped_before_its_first_validation(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.csv"
    await fit(scripted(math.nan), CSVLogger(log), TerminateOnNaN(), batch_size=1, validation_data=VALIDATION)
    rows = read(log)
    assert rows[0][0] == "epoch"
    assert dict(zip(*rows, strict=True))["loss"] == "nan"
    assert dict(zip(*rows, strict=True)).get("val_loss", "NA") == "NA"


@pytest.mark.asyncio
async def test_early_stopping_stops_at_the_end_of_an_epoch_and_later_callbacks_still_see_it() -> None:
    seen = []
    watcher = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(watcher.model.stop_training))
    history = await fit(scripted(1.0), EarlyStopping("loss", patience=2), watcher, epochs=10)
    assert history.epoch == [0, 1, 2]
    assert seen == [False, False, True]
    assert (history.outcome, history.reason) == (
        "stopped",
        "EarlyStopping: loss has not improved on 1 for 2 epochs",
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(("spelling", "monitor"), [("acc", "val_accuracy"), ("accuracy", "val_acc")])
@pytest.mark.filterwarnings("error")
async def test_the_metric_is_found_under_either_spelling(spelling: str, monitor: str) -> None:
    x, y = digits()
    stopper = EarlyStopping(monitor, min_delta=1, patience=1)
    history = await Trainer(classifier(spelling)).fit(
        x, y, epochs=5, verbose=0, validation_data=(x, y), callbacks=[stopper]
    )
    assert history.epoch == [0, 1]
    assert stopper.best == history.history[f"val_{spelling}"][0]


@pytest.mark.asyncio
async def test_the_pages_plateau_example_has_no_val_loss_and_so_warns_once_and_trains_on() -> None:
    x, y = digits()
    reduce_lr = ReduceLROnPlateau(monitor="val_loss", factor=0.2, patience=5, min_lr=0.001)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = await Trainer(classifier()).fit(x, y, epochs=8, verbose=0, callbacks=[reduce_lr])
    assert [str(one.message) for one in caught] == [
        "Reduce LR on plateau conditioned on metric `val_loss` which is not available. "
        "Available metrics are: loss,accuracy,lr"
    ]
    assert history.history["lr"] == [pytest.approx(0.001)] * 8


@pytest.mark.asyncio
@pytest.mark.parametrize("csv_first", [True, False])
async def test_the_csv_has_the_rate_before_each_drop_wherever_it_stands_in_the_list(
    tmp_path: Path, csv_first: bool
) -> None:
    log = tmp_path / "log.csv"
    callbacks: list[Callback] = [CSVLogger(log), ReduceLROnPlateau("loss", factor=0.5, patience=1)]
    history = await fit(scripted(1.0), *(callbacks if csv_first else callbacks[::-1]))
    assert read(log) == [
        ["epoch", "loss", "lr"],
        ["0", "1.0", "1.0"],
        ["1", "1.0", "1.0"],
        ["2", "1.0", "0.5"],
    ]
    assert history.history["lr"] == [1.0, 1.0, 0.5]


@pytest.mark.asyncio
async def test_a_schedule_sets_and_logs_the_rate_of_a_real_optimizer() -> None:
    x, y = digits()
    model = classifier()
    seen = []
    watcher = LambdaCallback(on_batch_begin=lambda batch, logs: seen.append(model.optimizer.lr))
    halve = LearningRateScheduler(lambda epoch, lr: lr / 2)
    model.optimizer.lr = 0.5
    history = await Trainer(model).fit(x, y, epochs=2, verbose=0, batch_size=32, callbacks=[halve, watcher])
    assert history.history["lr"] == [0.25, 0.125]
    assert seen == [0.25, 0.25, 0.125, 0.125]
    assert model.optimizer.learning_rate == 0.125


@pytest.mark.asyncio
async def test_a_schedule_for_a_model_without_a_rate_is_refused_before_the_first_batch() -> None:
    model = ScriptedModel()
    with pytest.raises(ValueError, match=r'Optimizer must have a "lr" attribute\.'):
        await fit(model, LearningRateScheduler(lambda epoch: 0.1))
    assert model.steps == 0


@pytest.mark.asyncio
async def test_a_csv_file_with_another_header_is_refused_before_the_first_batch_and_left_as_it_was(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(b"epoch,a\r\n0,9\r\n")
    model = scripted()
    with pytest.raises(CallbackError) as failure:
        await fit(model, CSVLogger(log, append=True))
    assert isinstance(failure.value.__cause__, ArgumentError)
    assert "has another header, without loss" in str(failure.value)
    assert model.steps == 0
    assert log.read_bytes() == b"epoch,a\r\n0,9\r\n"


@pytest.mark.asyncio
async def test_a_training_goes_on_in_the_same_file_with_append(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log.csv", append=True)
    model = scripted(1.0, 2.0)
    await fit(model, logger, epochs=2)
    await fit(model, logger, epochs=4, initial_epoch=2)
    assert read(tmp_path / "log.csv") == [
        ["epoch", "loss"],
        ["0", "1.0"],
        ["1", "2.0"],
        ["2", "1.0"],
        ["3", "2.0"],
    ]


@pytest.mark.asyncio
async def test_a_full_disk_ends_the_training_with_an_error_that_names_the_callback() -> None:
    with pytest.raises(
        CallbackError, match=r"^CSVLogger\.on_epoch_end of epoch 0 raised: OSError: .*No space left"
    ):
        await fit(scripted(), CSVLogger("/dev/full"), epochs=1000)


@pytest.mark.asyncio
async def test_functions_of_all_three_kinds_are_called_once_each_in_order() -> None:
    calls: list[str] = []

    async def awaited(epoch: int, logs: Any) -> None:
        calls.append(f"async {epoch}")

    callbacks = [
        LambdaCallback(on_epoch_end=lambda epoch, logs: calls.append(f"inline {epoch}")),
        LambdaCallback(on_epoch_end=awaited, on_train_end=lambda logs: awaited(9, logs)),
    ]
    await fit(scripted(), *callbacks)
    assert sorted(calls) == ["async 0", "async 1", "async 2", "async 9", "inline 0", "inline 1", "inline 2"]
    for kind in ("async", "inline"):
        own = [call for call in calls if call.startswith(kind)]
        assert own == sorted(own)
