from __future__ import annotations

import threading

import numpy as np
import pytest

from asynccb.errors import ArgumentError, ModelBusy
from asynccb.models import SGD, Activation, BatchNormalization, Dense, Dropout, Embedding, Flatten, Sequential
from asynccb.protocols import Batch

ROWS = 24


def data():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, 5)).astype(np.float32)
    return x, np.eye(3, dtype=np.float32)[x[:, :3].argmax(axis=1)]


def make(optimizer="adam"):
    layers = [Dense(4, activation="tanh", input_dim=5), BatchNormalization(), Dropout(0.4), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=3)
    model.compile(optimizer, "categorical_crossentropy")
    return model


def train(model, updates=3):
    x, y = data()
    return [model.train_batch(Batch(x, y, None, ROWS))["loss"] for _ in range(updates)]


def test_every_layer_shows_its_output_and_the_last_one_is_the_prediction():
    model, (x, _) = make(), data()
    train(model)
    found = model.activations(x)
    assert list(found) == [layer.name for layer in model.layers]
    kernel, bias = (array.astype(np.float64) for array in model.get_weights()[:2])
    np.testing.assert_allclose(found["dense"], np.tanh(x @ kernel + bias), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["dropout"], found["batch_normalization"])  # no chance: inference
    np.testing.assert_array_equal(found["activation"], model.predict(x, batch_size=ROWS))


def test_layers_that_pass_on_their_input_get_arrays_of_their_own():
    model = Sequential([Flatten(input_shape=(2, 2)), Dropout(0.5)])
    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    found = model.activations(x)
    for array in found.values():
        array += 1.0
    np.testing.assert_array_equal(found["dropout"], x.reshape(2, 4) + 1.0)
    np.testing.assert_array_equal(x.reshape(-1), np.arange(8))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_that_an_update_of_the_same_batch_uses(weighted):
    x, y = data()
    weight = np.linspace(0, 2, ROWS) if weighted else None
    model = make(SGD(1.0))
    train(model)
    found = model.gradients(x, y, weight)
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.train_batch(Batch(x, y, weight, ROWS))
    trainable = [weight for weight in model.weights if weight.trainable]
    assert list(found) == [weight.path for weight in trainable]
    for one in trainable:
        np.testing.assert_array_equal(before[one.path] - found[one.path], one.value)
        assert np.any(found[one.path])


def test_an_embedding_shows_the_gradient_of_its_whole_table():
    model = Sequential([Embedding(5, 2, input_length=2), Flatten(), Dense(1)], seed=1)
    model.compile("sgd", "mse")
    found = model.gradients(np.array([[0, 3], [3, 3]]), np.ones((2, 1)))["embedding/embeddings"]
    assert found.shape == (5, 2)
    assert found.any(axis=1).tolist() == [True, False, False, True, False]


def test_a_model_that_was_looked_at_trains_on_as_one_that_was_not():
    looked_at, other, (x, y) = make(), make(), data()
    train(looked_at), train(other)
    looked_at.activations(x)
    looked_at.gradients(x, y)
    assert train(looked_at) == train(other)
    for one, two in zip(looked_at.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    looked_at.layers[2].draw(np.empty(1, np.float32))
    assert train(looked_at) != train(other)  # the control: one number drawn would have been seen


def test_the_random_streams_stand_where_they_stood_even_if_a_batch_fails():
    model, (x, y) = make(), data()
    train(model)
    before = model.layers[2].random_state()
    model._ready_step().differentiate = lambda *given: model.layers[2].draw(np.empty(3)) or given[9]
    with pytest.raises(IndexError):
        model.gradients(x, y)
    assert model.layers[2].random_state() == before


def test_what_is_shown_is_not_changed_by_training_on():
    model, (x, y) = make(), data()
    shown = [*model.activations(x).values(), *model.gradients(x, y).values()]
    kept = [array.copy() for array in shown]
    train(model)
    for array, copy in zip(shown, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_gradients_need_a_compiled_model_and_fitting_data():
    model, (x, y) = Sequential([Dense(3, input_dim=5)]), data()
    with pytest.raises(ArgumentError, match="is not compiled"):
        model.gradients(x, y)
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match="shape"):
        model.gradients(x[:, :2], y)
    with pytest.raises(ArgumentError, match="shape"):
        model.activations(x[:, :2])


@pytest.mark.parametrize("verb", ["activations", "gradients"])
def test_a_model_in_training_is_shown_to_its_own_thread_alone(verb):
    model, (x, y) = make(), data()
    given = (x, y) if verb == "gradients" else (x,)
    model.training_thread = threading.get_ident()
    getattr(model, verb)(*given)
    model.training_thread = -1
    with pytest.raises(ModelBusy, match=rf"model\.{verb}"):
        getattr(model, verb)(*given)
