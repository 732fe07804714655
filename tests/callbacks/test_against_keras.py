"""Our counts beside those of Keras 3 itself, epoch by epoch."""

from __future__ import annotations

import math
import os
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb.callbacks.early_stopping import EarlyStopping
from asynccb.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from asynccb.callbacks.swap_ema_weights import SwapEMAWeights

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


class Follower:
    """A model that has the weights that Keras' model had, batch by batch."""

    def __init__(self) -> None:
        self.kernel = np.zeros((4, 2), np.float32)

    def get_weights(self) -> list[Any]:
        return [self.kernel]

    def set_weights(self, weights: list[Any]) -> None:
        self.kernel[:] = weights[0]


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_averages_stand_where_keras_has_them_and_are_its_own(keras: ModuleType, swap_on_epoch: bool) -> None:
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.75), "mse")
    theirs: list[Any] = []
    own = Follower()
    ours = SwapEMAWeights(0.75, swap_on_epoch=swap_on_epoch)
    ours.set_model(own)
    ours.on_train_begin({})
    seen: list[Any] = []

    class Follow(keras.callbacks.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            own.kernel[:] = self.model.get_weights()[0]
            ours.on_train_batch_end(batch, logs)

        def __getattribute__(self, name: str) -> Any:
            if name not in ("on_test_begin", "on_test_end", "on_epoch_begin", "on_epoch_end"):
                return super().__getattribute__(name)

            def both(*arguments: Any) -> None:
                getattr(ours, name)(*arguments)
                theirs.append((name, self.model.get_weights()[0].copy()))
                seen.append((name, own.kernel.copy()))

            return both

    x, y = np.random.default_rng(0).normal(size=(12, 4)), np.ones((12, 2))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    model.fit(
        x,
        y,
        batch_size=4,
        epochs=3,
        validation_data=(x, y),
        verbose=0,
        shuffle=False,
        callbacks=[swap, Follow()],
    )
    ours.on_train_end({})
    # Keras' model shows the first epoch begin before it has any weights to follow.
    assert [name for name, _ in seen] == [name for name, _ in theirs]
    assert len(seen) == 4 * 3
    for (name, expected), (_, actual) in zip(theirs[1:], seen[1:], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(own.kernel, model.get_weights()[0], rtol=1e-5)
