"""Losses, metrics, activations and initializers against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asynccb.errors import ArgumentError
from asynccb.models import Activation, Dense, Sequential, activations, initializers, losses, metrics
from asynccb.protocols import Batch


def evaluate(loss, last, z, y, names=()):
    """A model whose last values are ``z``."""
    outputs = np.shape(z)[1]
    model = Sequential([Dense(outputs, input_dim=outputs, use_bias=False), Activation(last)], dtype="float64")
    model.compile("sgd", loss, list(names))
    model.set_weights([np.eye(outputs)])
    return model.evaluate(np.asarray(z, float), np.asarray(y))


def softmax(row):
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    return [value / sum(exps) for value in exps]


Z = [[0.5, -1.0, 2.0], [3.0, 0.1, 0.2]]


def test_cross_entropy_is_the_mean_of_minus_the_log_of_the_right_probability():
    expected = -(math.log(softmax(Z[0])[2]) + math.log(softmax(Z[1])[1])) / 2
    assert evaluate("sparse_categorical_crossentropy", "softmax", Z, [2, 1])["loss"] == pytest.approx(
        expected
    )
    assert evaluate("categorical_crossentropy", "softmax", Z, np.eye(3)[[2, 1]])["loss"] == pytest.approx(
        expected
    )


def test_soft_targets_are_weighed():
    y = [[0.2, 0.3, 0.5], [0.0, 0.5, 0.5]]
    expected = (
        -sum(
            t * math.log(p) for row, z in zip(y, Z, strict=True) for t, p in zip(row, softmax(z), strict=True)
        )
        / 2
    )
    assert evaluate("categorical_crossentropy", "softmax", Z, y)["loss"] == pytest.approx(expected)


def test_binary_cross_entropy_is_a_mean_over_outputs_too():
    def one(z, y):
        p = 1 / (1 + math.exp(-z))
        return -(y * math.log(p) + (1 - y) * math.log(1 - p))

    y = [[1, 0, 1], [0, 0, 1]]
    expected = sum(one(z, t) for zs, ts in zip(Z, y, strict=True) for z, t in zip(zs, ts, strict=True)) / 6
    assert evaluate("binary_crossentropy", "sigmoid", Z, y)["loss"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "last"), [("categorical_crossentropy", "softmax"), ("binary_crossentropy", "sigmoid")]
)
def test_the_fused_forms_stay_exact_where_probabilities_round_to_zero(loss, last):
    """At a distance of 200 the probability is 1e-87: the plain form would stop at the clip, 16.1."""
    z, y = [[200.0, 0.0]], [[0.0, 1.0]]
    expected = 200.0 if last == "softmax" else (200.0 + math.log(2.0)) / 2
    assert evaluate(loss, last, z, y)["loss"] == pytest.approx(expected)
    plain = losses.get(loss).values(np.array(y), np.array([[1.0, 0.0]]))
    assert plain[0] < 17.0


def test_squares_and_distances_are_means_over_outputs():
    y = np.zeros((2, 3))
    assert evaluate("mse", "linear", Z, y)["loss"] == pytest.approx(np.square(Z).mean())
    assert evaluate("mean_absolute_error", "linear", Z, y)["loss"] == pytest.approx(np.abs(Z).mean())


def test_losses_serve_as_metrics_also_with_other_targets():
    logs = evaluate(
        "sparse_categorical_crossentropy", "softmax", Z, [2, 1], ["mse", "categorical_crossentropy"]
    )
    p = np.array([softmax(row) for row in Z])
    assert logs["mse"] == pytest.approx(np.square(p - np.eye(3)[[2, 1]]).mean())
    assert logs["categorical_crossentropy"] == pytest.approx(logs["loss"])


@pytest.mark.parametrize(
    ("loss", "last", "y", "expected"),
    [
        ("sparse_categorical_crossentropy", "softmax", [2, 1], 0.5),
        ("categorical_crossentropy", "softmax", np.eye(3)[[2, 1]], 0.5),
        ("mse", "linear", np.eye(3)[[2, 0]], 1.0),
        ("binary_crossentropy", "sigmoid", [[1, 0, 1], [1, 0, 0]], 4 / 6),
    ],
)
@pytest.mark.parametrize("name", ["acc", "accuracy"])
def test_accuracy_becomes_the_one_that_fits_the_loss(loss, last, y, expected, name):
    assert evaluate(loss, last, Z, y, [name])[name] == pytest.approx(expected)


def test_accuracy_of_one_output_is_binary():
    assert evaluate("mse", "sigmoid", [[2.0], [-1.0], [1.0]], [1, 0, 0], ["acc"])["acc"] == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize("name", ["binary_accuracy", "categorical_accuracy", "sparse_categorical_accuracy"])
def test_accuracies_can_be_asked_for_by_their_full_name(name):
    logs = evaluate("sparse_categorical_crossentropy", "softmax", Z, [2, 1], [name])
    assert logs[name] == pytest.approx(0.5 if "categorical" in name else 4 / 6)


def test_metrics_of_a_batch_are_those_before_its_update():
    model = Sequential([Dense(3, input_dim=3, activation="softmax")], seed=1)
    model.compile("sgd", "categorical_crossentropy", ["acc"])
    batch = Batch(np.array(Z), np.eye(3)[[2, 1]], None, 2)
    before = model.test_batch(batch)
    assert model.train_batch(batch) == before
    assert model.test_batch(batch) != before


DEFINITIONS = {
    "linear": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "relu6": lambda z: min(max(z, 0.0), 6.0),
    "leaky_relu": lambda z: z if z > 0 else 0.2 * z,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "hard_sigmoid": lambda z: min(max(z / 6 + 0.5, 0.0), 1.0),
    "tanh": math.tanh,
    "softplus": lambda z: math.log1p(math.exp(z)),
    "softsign": lambda z: z / (1 + abs(z)),
    "exponential": math.exp,
    "elu": lambda z: z if z > 0 else math.expm1(z),
    "selu": lambda z: 1.0507009873554805 * (z if z > 0 else 1.6732632423543772 * math.expm1(z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "swish": lambda z: z / (1 + math.exp(-z)),
    "hard_silu": lambda z: z * min(max(z / 6 + 0.5, 0.0), 1.0),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_activations_follow_their_definitions(name, dtype, tolerance):
    z = np.linspace(-8, 8, 101, dtype=dtype)
    out = np.empty_like(z)
    activations.get(name).forward(z, out)
    np.testing.assert_allclose(
        out, [DEFINITIONS[name](float(value)) for value in z], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "softplus", "tanh", "elu", "selu", "silu", "gelu"])
def test_activations_overflow_nowhere(name):
    z = np.array([[-1e4, 0.0, 1e4]], np.float32)
    out = np.empty_like(z)
    with np.errstate(over="raise", invalid="raise"):
        activations.get(name).forward(z, out)
    assert np.isfinite(out).all()


VARIANCES = {
    "glorot_uniform": 2 / 500, "glorot_normal": 2 / 500, "he_uniform": 2 / 200, "he_normal": 2 / 200,
    "lecun_uniform": 1 / 200, "lecun_normal": 1 / 200, "uniform": 0.1**2 / 12, "normal": 0.05**2,
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANCES)
def test_initializers_have_the_variance_of_their_formula(name):
    values = initializers.get(name)((200, 300), np.random.default_rng(0))
    assert values.var() == pytest.approx(VARIANCES[name], rel=0.03)
    assert abs(values.mean()) < 4 * math.sqrt(VARIANCES[name] / values.size)


def test_normal_variants_are_cut_off_at_two_deviations():
    values = initializers.get("he_normal")((200, 300), np.random.default_rng(0))
    assert np.abs(values).max() <= 2 * math.sqrt(2 / 200) / 0.8796
    assert np.abs(initializers.get("normal")((200, 300), np.random.default_rng(0))).max() > 0.15


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_orthogonal_kernels_keep_lengths(shape):
    q = initializers.get("orthogonal")(shape, np.random.default_rng(0))
    product = q.T @ q if shape[0] >= shape[1] else q @ q.T
    np.testing.assert_allclose(product, np.eye(min(shape)), atol=1e-12)


@pytest.mark.parametrize(
    ("get", "word", "near"),
    [
        (activations.get, "leaky", "leaky_relu"),
        (initializers.get, "glorot_unifrom", "glorot_uniform"),
        (losses.get, "mae_loss", "mae"),
        (lambda name: metrics.check([name]), "acurracy", "accuracy"),
        (activations.get, ["relu"], "relu"),
    ],
)
def test_unknown_names_suggest_the_nearest(get, word, near):
    with pytest.raises(ArgumentError, match=near):
        get(word)
