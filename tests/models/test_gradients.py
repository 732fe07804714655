"""The gradients of every layer, activation and loss against central differences, in float64.

Everything is public: with SGD at a rate of 1 the gradient is what an update takes away, and
``capture().to_model()`` gives any number of models at the same point, random streams included.
"""

from __future__ import annotations

import numpy as np
import pytest

from asynccb.models import (
    SGD,
    Activation,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Sequential,
)
from asynccb.protocols import Batch

STEP = 1e-5
ROWS = 7


def gradients(model, batch):
    probe = model.capture().to_model()
    before = [weight.numpy() for weight in probe.weights if weight.trainable]
    probe.train_batch(batch)
    after = [weight.numpy() for weight in probe.weights if weight.trainable]
    return [old - new for old, new in zip(before, after, strict=True)]


def loss_at(model, index, shift, batch):
    probe = model.capture().to_model()
    values = probe.get_weights()
    trainable = [at for at, weight in enumerate(probe.weights) if weight.trainable]
    values[trainable[index]] += shift
    probe.set_weights(values)
    return probe.train_batch(batch)["loss"]


def assert_gradients(model, batch, tolerance=2e-7):
    rng = np.random.default_rng(11)
    found = gradients(model, batch)
    assert found
    for index, gradient in enumerate(found):
        direction = rng.standard_normal(gradient.shape)
        up = loss_at(model, index, STEP * direction, batch)
        down = loss_at(model, index, -STEP * direction, batch)
        assert np.vdot(gradient, direction) == pytest.approx(
            (up - down) / (2 * STEP), abs=tolerance, rel=1e-5
        )


def make(layers, loss):
    model = Sequential(layers, seed=5, dtype="float64")
    model.compile(SGD(learning_rate=1.0), loss)
    return model


def data(outputs=4, kind="one-hot", features=(6,)):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((ROWS, *features))
    if kind == "one-hot":
        y = np.eye(outputs)[rng.integers(0, outputs, ROWS)]
    elif kind == "soft":
        y = rng.random((ROWS, outputs))
    elif kind == "labels":
        y = rng.integers(0, outputs, ROWS)
    elif kind == "bits":
        y = rng.integers(0, 2, (ROWS, outputs)).astype(float)
    else:
        y = rng.standard_normal((ROWS, outputs))
    return x, y


ACTIVATIONS = [
    "linear",
    "relu",
    "relu6",
    "leaky_relu",
    "sigmoid",
    "hard_sigmoid",
    "tanh",
    "softmax",
    "softplus",
    "softsign",
    "exponential",
    "elu",
    "selu",
    "silu",
    "swish",
    "hard_silu",
    "hard_swish",
    "gelu",
]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("separate", [False, True])
def test_every_activation_hands_down_its_derivative(name, separate):
    first = (
        [Dense(5, input_dim=6), Activation(name)] if separate else [Dense(5, activation=name, input_dim=6)]
    )
    x, y = data(3, "numbers")
    assert_gradients(make([*first, Dense(3)], "mse"), Batch(x, y, None, ROWS))


LOSSES = [
    ("categorical_crossentropy", "one-hot"),
    ("categorical_crossentropy", "soft"),
    ("sparse_categorical_crossentropy", "labels"),
    ("binary_crossentropy", "bits"),
    ("binary_crossentropy", "soft"),
    ("mse", "numbers"),
    ("mae", "numbers"),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("last", ["softmax", "sigmoid", "exponential"])
@pytest.mark.parametrize(("loss", "kind"), LOSSES)
def test_every_loss_agrees_with_every_last_activation(loss, kind, last, weighted):
    if loss == "binary_crossentropy" and last == "exponential":
        last = "hard_sigmoid"  # its outputs are probabilities
    x, y = data(4, kind)
    weight = np.linspace(0.0, 2.0, ROWS) if weighted else None
    model = make([Dense(5, activation="tanh", input_dim=6), Dense(4), Activation(last)], loss)
    assert_gradients(model, Batch(x, y, weight, ROWS))


@pytest.mark.parametrize("last", ["softmax", "sigmoid"])
def test_the_fused_form_has_the_gradient_of_the_plain_one(last):
    """A last Dense with an activation is fused; behind it a linear Activation keeps the plain path."""
    loss = "categorical_crossentropy" if last == "softmax" else "binary_crossentropy"
    x, y = data(4, "one-hot")
    fused = make([Dense(4, activation=last, input_dim=6)], loss)
    plain = make([Dense(4, activation=last, input_dim=6), Activation("linear")], loss)
    plain.set_weights(fused.get_weights())
    for one, other in zip(
        gradients(fused, Batch(x, y, None, ROWS)), gradients(plain, Batch(x, y, None, ROWS)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Dense(5, input_dim=6), BatchNormalization(), Dense(4, activation="softmax")],
        lambda: [BatchNormalization(input_shape=(6,)), Dense(4, activation="softmax")],
        lambda: [
            Dense(5, input_dim=6),
            BatchNormalization(center=False, scale=False),
            Dense(4),
            Activation("softmax"),
        ],
        lambda: [Dense(8, activation="relu", input_dim=6), Dropout(0.5), Dense(4, activation="softmax")],
        lambda: [Dropout(0.3, input_shape=(6,)), Dense(4, use_bias=False, activation="softmax")],
    ],
    ids=["normalization", "normalization-first", "normalization-bare", "dropout", "dropout-first"],
)
def test_layers_with_state_and_chance_have_exact_gradients(layers):
    x, y = data(4)
    assert_gradients(make(layers(), "categorical_crossentropy"), Batch(x, y, None, ROWS))


def test_an_embedding_adds_up_the_gradients_of_a_number_that_occurs_twice():
    x = np.array([[0, 1, 1], [2, 2, 2], [3, 0, 1]])
    y = np.eye(2)[[0, 1, 0]]
    model = make(
        [Embedding(4, 3, input_length=3), Flatten(), Dense(2, activation="softmax")],
        "categorical_crossentropy",
    )
    assert_gradients(model, Batch(x, y, None, 3))


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "sparse_categorical_crossentropy", "mse"])
def test_samples_of_several_axes_are_rows_of_their_last_one(loss):
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((ROWS, 3, 6)), rng.integers(0, 4, (ROWS, 3))
    y = labels if loss.startswith("sparse") else np.eye(4)[labels]
    layers = [
        Dense(5, activation="tanh", input_shape=(3, 6)),
        BatchNormalization(),
        Dense(4, activation="softmax"),
    ]
    for weight in (None, np.linspace(0.5, 1.5, ROWS)):
        assert_gradients(
            make(layers, loss) if weight is None else make(fresh(layers), loss), Batch(x, y, weight, ROWS)
        )


def fresh(layers):
    return [type(layer)(**layer.settings(), input_shape=layer.input_shape) for layer in layers]


def test_flatten_gives_gradients_their_shape_back():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((ROWS, 2, 3)), np.eye(4)[rng.integers(0, 4, ROWS)]
    layers = [Dense(5, activation="tanh", input_shape=(2, 3)), Flatten(), Dense(4, activation="softmax")]
    assert_gradients(make(layers, "categorical_crossentropy"), Batch(x, y, None, ROWS))


def test_the_check_itself_notices_a_wrong_gradient(monkeypatch):
    """Negative control: with the derivative of tanh off by a thousandth, the comparison fails."""
    from asynccb.models import activations

    def wrong(g, z, y, scratch):
        g *= (1.0 - y * y) * 1.001

    monkeypatch.setitem(activations._TABLE, "tanh", (activations._tanh, wrong))
    x, y = data(4)
    with pytest.raises(AssertionError):
        assert_gradients(
            make([Dense(5, activation="tanh", input_dim=6), Dense(4)], "mse"), Batch(x, y, None, ROWS)
        )
