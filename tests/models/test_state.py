from __future__ import annotations

import pickle

import numpy as np
import pytest

from asynccb.models import Activation, BatchNormalization, Dense, Dropout, RMSprop, Sequential, load_model
from asynccb.protocols import Batch

OPTIMIZERS = ["sgd", "rmsprop", "adagrad", "adam", "adamw"]


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5)).astype(np.float32)
    return x, np.eye(3, dtype=np.float32)[x[:, :3].argmax(axis=1)]


def trained(optimizer="adam", updates=3):
    layers = [Dense(4, activation="tanh", input_dim=5), BatchNormalization(), Dropout(0.3), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=2)
    model.compile(optimizer, "categorical_crossentropy", ["acc"])
    go_on(model, updates)
    return model


def go_on(model, updates=3):
    x, y = data()
    return [model.train_batch(Batch(x, y, None, len(x))) for _ in range(updates)]


def contents(state):
    return {name: array.tobytes() for name, array in state.arrays.items()}


def test_a_state_is_not_changed_by_training_on():
    model = trained()
    state = model.capture()
    before = contents(state)
    live = [weight.value.tobytes() for weight in model.weights]
    go_on(model)
    assert contents(state) == before
    assert [
        weight.value.tobytes() for weight in model.weights
    ] != live  # the control: views would have changed


def test_weights_come_first_in_the_order_of_get_weights_then_the_optimizer():
    model = trained()
    names = list(model.capture().arrays)
    weights = [weight.path for weight in model.weights]
    assert names[: len(weights)] == weights
    assert all(name.startswith("optimizer/") for name in names[len(weights) :])
    assert names[len(weights) :][:3] == [
        "optimizer/iteration", "optimizer/learning_rate", "optimizer/dense/kernel/momentum",
    ]  # fmt: skip
    for weight, array in zip(model.get_weights(), model.capture().arrays.values(), strict=False):
        np.testing.assert_array_equal(weight, array)


def test_all_arrays_are_read_only():
    for array in trained().capture().arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, RMSprop(momentum=0.5, centered=True)])
def test_a_model_from_a_state_trains_on_bit_by_bit(optimizer):
    model = trained(optimizer)
    model.optimizer.lr = 0.0123
    copy = model.capture().to_model()
    assert copy.optimizer is not model.optimizer
    assert copy.optimizer.lr == 0.0123
    assert go_on(copy) == go_on(model)
    assert contents(copy.capture()) == contents(model.capture())


def test_two_models_from_one_state_are_independent():
    state = trained().capture()
    one, other = state.to_model(), state.to_model()
    go_on(one)
    assert contents(other.capture()) == contents(state)


def test_a_state_pickles():
    state = trained().capture()
    again = pickle.loads(pickle.dumps(state))
    assert contents(again) == contents(state)
    assert go_on(again.to_model()) == go_on(state.to_model())


def test_an_uncompiled_model_has_a_state_of_weights_alone(tmp_path):
    state = Sequential([Dense(2, input_dim=3)], seed=1).capture()
    assert list(state.arrays) == ["dense/kernel", "dense/bias"]
    state.save(tmp_path / "m.h5")
    assert load_model(tmp_path / "m.h5").optimizer is None


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5", "m.weights.h5"])
def test_a_state_saves_itself_without_the_model(tmp_path, name):
    model = trained()
    state = model.capture()
    go_on(model)
    state.save(tmp_path / name)
    assert contents(load_model(tmp_path / name).capture()) == contents(state)
    state.save(tmp_path / name, weights_only=True)
    weights = load_model(tmp_path / name)
    assert weights.optimizer is None
    assert list(weights.capture().arrays) == [weight.path for weight in model.weights]
