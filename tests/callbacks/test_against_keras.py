"""Our counts beside those of Keras 3 itself, epoch by epoch."""

from __future__ import annotations

import math
import os
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.callbacks.early_stopping import EarlyStopping
from asynccb.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def curve(chance: random.Random) -> list[float]:
    """Values with ties, plateaus and improvements of exactly ``min_delta``; NaN too, but not as the first."""
    values = [chance.choice([1.0, 0.75, 0.5, 0.25, 2.0]) for _ in range(12)]
    for index in range(1, len(values)):
        if chance.random() < 0.1:
            values[index] = math.nan
    return values


def stopped(callback: Any, values: list[float]) -> tuple[int | None, int]:
    model = SimpleNamespace(stop_training=False)
    callback.set_model(model)
    callback.on_train_begin({})
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
        if model.stop_training:
            return epoch, callback.wait
    return None, callback.wait


@pytest.mark.parametrize("seed", range(20))
def test_early_stopping_stops_where_keras_stops(keras: ModuleType, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(50):
        options = {
            "mode": chance.choice(["min", "max"]),
            "patience": chance.randrange(5),
            "min_delta": chance.choice([0, 0.25]),
            "baseline": chance.choice([None, 0.5, 1.0]),
            "start_from_epoch": chance.choice([0, 0, 2]),
        }
        values = curve(random.Random(chance.random()))
        values[options["start_from_epoch"]] = 1.0
        theirs = stopped(keras.callbacks.EarlyStopping(**options), values)
        assert stopped(EarlyStopping(**options), values) == theirs, (options, values)


def rates(callback: Any, values: list[float], name: str) -> list[float]:
    model = SimpleNamespace(optimizer=SimpleNamespace(**{name: 1.0}))
    callback.set_model(model)
    callback.on_train_begin({})
    after = []
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
        after.append(float(getattr(model.optimizer, name)))
    return after


@pytest.mark.parametrize("seed", range(20))
def test_the_learning_rate_drops_where_keras_drops_it(keras: ModuleType, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(50):
        options = {
            "mode": chance.choice(["min", "max"]),
            "factor": 0.5,
            "patience": chance.randrange(4),
            "min_delta": chance.choice([0, 0.25]),
            "cooldown": chance.randrange(4),
            "min_lr": chance.choice([0, 0.125, 0.2]),
        }
        values = curve(random.Random(chance.random()))
        theirs = rates(keras.callbacks.ReduceLROnPlateau(**options), values, "learning_rate")
        assert rates(ReduceLROnPlateau(**options), values, "lr") == pytest.approx(theirs), (options, values)
