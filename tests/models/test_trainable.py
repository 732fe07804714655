"""Layers that are not trainable."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from asynccb.models import (
    Activation,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Sequential,
    load_model,
)
from asynccb.protocols import Batch

ROWS = 32


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 5)).astype(np.float32)
    return x, np.eye(3, dtype=np.float32)[x[:, :3].argmax(axis=1)]


def make(*frozen, optimizer="adam", dropout=0.0):
    layers = [
        Dense(6, activation="tanh", input_dim=5, name="low", trainable="low" not in frozen),
        BatchNormalization(name="norm", trainable="norm" not in frozen),
        Dropout(dropout),
        Dense(4, activation="relu", name="middle", trainable="middle" not in frozen),
        Dense(3, name="top", trainable="top" not in frozen),
        Activation("softmax"),
    ]
    model = Sequential(layers, seed=9)
    model.compile(optimizer, "categorical_crossentropy")
    return model


def train(model, updates=4):
    x, y = data()
    return [model.train_batch(Batch(x, y, None, ROWS))["loss"] for _ in range(updates)]


def changed(model, updates=4):
    """The layers whose weights training changes."""
    before = {weight.path: weight.numpy() for weight in model.weights}
    train(model, updates)
    return {
        weight.path.split("/")[0] for weight in model.weights if np.any(weight.value != before[weight.path])
    }


def layer(model, name):
    return next(layer for layer in model.layers if layer.name == name)


@pytest.mark.parametrize("frozen", [[], ["low"], ["middle"], ["low", "norm"], ["norm", "top"]])
def test_training_changes_the_weights_of_trainable_layers_alone(frozen):
    assert changed(make(*frozen)) == {"low", "norm", "middle", "top"} - set(frozen)


def test_a_model_without_anything_trainable_gives_logs_and_stays_as_it_is():
    model = make("low", "norm", "middle", "top")
    assert changed(model) == set()
    assert len(set(train(model))) == 1


def test_gradients_pass_through_a_layer_that_has_none_itself():
    """The gradients of the others are those that they have when all layers are trainable."""
    x, y = data()
    whole, part = make().gradients(x, y), make("middle").gradients(x, y)
    assert set(whole) - set(part) == {"middle/kernel", "middle/bias"}
    for path, gradient in part.items():
        np.testing.assert_array_equal(gradient, whole[path])


def test_there_is_no_backward_pass_below_the_lowest_trainable_layer():
    model = make("low", "norm")
    train(model, 1)
    called = [operation.__self__ for operation in model._network._back]
    assert np.shares_memory(called[-1]._w, layer(model, "middle").weights[0].value)
    assert called[-1].needs_input_gradient is False
    assert layer(model, "low").weights[0].grad is None


@pytest.mark.parametrize("trainable_below", [False, True])
def test_a_normalization_that_is_not_trainable_uses_its_running_means(trainable_below):
    model = make("norm", *([] if trainable_below else ["low"]))
    rng = np.random.default_rng(3)
    model.set_weights([rng.random(weight.shape) + 0.5 for weight in model.weights])
    x, y = data()
    loss = model.evaluate(x, y, batch_size=ROWS)["loss"]
    assert train(model, 1) == [pytest.approx(loss, rel=1e-6)]
    assert make().evaluate(x, y)["loss"] != pytest.approx(train(make(), 1)[0], rel=1e-6)  # the control


def test_a_normalization_that_is_not_trainable_hands_down_its_derivative():
    layers = [Dense(4, input_dim=5, name="low"), BatchNormalization(trainable=False), Dense(1)]
    model = Sequential(layers, seed=2, dtype="float64")
    model.compile("sgd", "mse")
    rng = np.random.default_rng(1)
    model.set_weights([rng.random(weight.shape) + 0.5 for weight in model.weights])
    x, y = rng.standard_normal((ROWS, 5)), rng.standard_normal((ROWS, 1))
    found = model.gradients(x, y)["low/kernel"]
    weights, step = model.get_weights(), 1e-6

    def loss_with(at, shift):
        kernel = weights[0].copy()
        kernel[at] += shift
        model.set_weights([kernel, *weights[1:]])
        return model.evaluate(x, y, batch_size=ROWS)["loss"]

    for at in np.ndindex(weights[0].shape):
        above, below = loss_with(at, step), loss_with(at, -step)
        assert found[at] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_of_a_bound_model_are_read_only_and_can_be_set(frozen):
    """Whoever wrote to them past the model would tear the copy of it that may be under way."""
    model = make(*(["middle"] if frozen else []))
    train(model, 1)
    kernel = layer(model, "middle").weights[0]
    with pytest.raises(ValueError, match="read-only"):
        kernel.value[...] = 0
    model.set_weights([weight + 1 for weight in model.get_weights()])
    before = kernel.numpy()
    train(model)
    assert np.array_equal(kernel.value, before) is frozen


def test_a_change_after_compile_counts_from_the_next_compile_on():
    model = make()
    layer(model, "middle").trainable = False
    assert "middle" in changed(model)
    copies = [model.capture().to_model(), pickle.loads(pickle.dumps(model))]
    losses = train(model)
    assert [train(copy) for copy in copies] == [losses] * 2  # a copy goes on as the original does
    model.compile("adam", "categorical_crossentropy")
    assert "middle" not in changed(model)
    layer(model, "middle").trainable = True
    assert "middle" not in changed(model)
    model.compile("adam", "categorical_crossentropy")
    assert "middle" in changed(model)


def test_weights_say_whether_they_are_trainable():
    model = make("middle")
    flags = {weight.path: weight.trainable for weight in model.weights}
    assert not flags["middle/kernel"]
    assert not flags["norm/moving_mean"]
    assert flags["norm/gamma"]
    layer(model, "norm").trainable = False
    layer(model, "norm").trainable = True
    assert {weight.path: weight.trainable for weight in model.weights} == flags
    lines = []
    model.summary(lines.append)
    assert lines[-1] == "Parameters: 103, trainable: 63"


def test_slots_of_other_weights_of_equal_size_are_not_taken_over():
    layers = [Dense(5, input_dim=5, name="one"), Dense(5, name="two", trainable=False)]
    model, optimizer = Sequential(layers, seed=1), None
    model.compile("adam", "mse")
    optimizer = model.optimizer
    x = np.ones((4, 5), np.float32)
    model.train_batch(Batch(x, x, None, 4))
    layers[0].trainable, layers[1].trainable = False, True
    model.compile(optimizer, "mse")
    model._ready_step()
    assert optimizer.slots["momentum"].size == 32 + 16 - 16 + 16  # kernel and bias, in whole cache lines
    assert not np.any(optimizer.slots["momentum"])


@pytest.mark.parametrize("frozen", [["low"], ["norm", "top"], ["low", "norm", "middle", "top"]])
def test_a_file_and_a_copy_know_what_is_trainable(frozen, tmp_path):
    model = make(*frozen, dropout=0.3)
    train(model)
    model.save(tmp_path / "m.h5")
    copy, loaded = model.capture().to_model(), load_model(tmp_path / "m.h5")
    assert [one.trainable for one in loaded.layers] == [one.trainable for one in model.layers]
    names = list(model.capture().arrays)
    assert list(copy.capture().arrays) == list(loaded.capture().arrays) == names
    assert not [name for name in names for one in frozen if name.startswith(f"optimizer/{one}/")]
    assert train(copy) == train(loaded) == train(model)


def test_a_config_says_what_is_trainable_as_keras_does():
    entries = {
        entry["config"].get("name"): entry["config"] for entry in make("low").get_config()["config"]["layers"]
    }
    assert entries["low"]["trainable"] is False
    assert entries["norm"]["trainable"] is True
    again = Sequential.from_config(make("low").get_config())
    assert [one.trainable for one in again.layers][:2] == [False, True]


def test_a_frozen_embedding_is_no_table_of_the_optimizer():
    layers = [Embedding(9, 2, input_length=3, trainable=False), Flatten(), Dense(1)]
    model = Sequential(layers, seed=1)
    model.compile("sgd", "mse")
    before = layers[0].weights[0].numpy()
    model.train_batch(Batch(np.array([[1, 2, 3]]), np.ones((1, 1)), None, 1))
    np.testing.assert_array_equal(layers[0].weights[0].value, before)
    assert model._network.table is None


def test_one_weight_cannot_be_frozen_by_itself():
    """The files know layers that are trainable, and no weights."""
    with pytest.raises(AttributeError):
        make().layers[0].weights[0].trainable = False
