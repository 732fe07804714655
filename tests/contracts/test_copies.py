"""A copy of a model is all of it: what is made of the copy trains on as the original would have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.models import (
    Activation,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Sequential,
    adapt,
)
from asynccb.protocols import Batch
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.protocols import Model

_drawn = np.random.default_rng(0)
X = np.abs(_drawn.normal(size=(12, 4)) * 3).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(12) % 3]


def sequential(optimizer: str) -> Sequential:
    """One with every kind of state: weights, slots, moving means, a random stream."""
    layers = [Dense(6, activation="relu", input_dim=4), BatchNormalization(), Dropout(0.25), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=7)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def partly_frozen() -> Sequential:
    model = sequential("adam")
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile("adam", "categorical_crossentropy")
    return model


def of_words() -> Sequential:
    """A table whose rows are updated one by one; it reads the numbers before the point as words."""
    model = Sequential([Embedding(9, 4, input_length=4), Flatten(), Dense(3, activation="softmax")], seed=7)
    model.compile("adagrad", "categorical_crossentropy")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "bare": lambda: ScriptedModel([3.0, 2.0, 1.0]),
    **{
        optimizer: lambda optimizer=optimizer: sequential(optimizer)
        for optimizer in ("sgd", "rmsprop", "adagrad", "adam", "adamw")
    },
    "partly frozen": partly_frozen,
    "of words": of_words,
}


def numbers(model: Model) -> dict[str, Any]:
    return {name: array.copy() for name, array in model.capture().arrays.items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_made_of_a_copy_trains_on_exactly_as_the_original(kind: str) -> None:
    model = adapt(MODELS[kind]())
    batches = [Batch(X[at : at + 4], Y[at : at + 4], None, 4) for at in (0, 4, 8)]
    for batch in batches:
        model.train_batch(batch)
    made = adapt(model.capture().to_model())
    for batch in batches:
        model.train_batch(batch)
        made.train_batch(batch)
    assert_same(numbers(model), numbers(made))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", MODELS)
async def test_the_copy_of_an_ended_training_is_of_its_last_batch(kind: str) -> None:
    given = MODELS[kind]()
    run = Trainer(given, seed=1).start(X, Y, batch_size=5, epochs=2, verbose=0)
    await run
    snapshot = await run.snapshot()
    assert (snapshot.step, snapshot.epoch) == (6, 1)
    assert_same(numbers(adapt(given)), dict(snapshot.arrays))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", MODELS)
async def test_two_trainings_with_one_seed_end_in_the_same_state(kind: str) -> None:
    states = []
    for _ in range(2):
        given = MODELS[kind]()
        await Trainer(given, seed=3).fit(X, Y, batch_size=5, epochs=2, verbose=0)
        states.append(numbers(adapt(given)))
    assert_same(*states)
