"""The models of the contract suite, each with data that it can train on.

A model joins by a line in MODELS. What it is made by can be called in another process too.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential
from asynccb.protocols import Batch
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.protocols import ModelState


class Subject(NamedTuple):
    """One model of the suite, and what it trains on."""

    make: Callable[[], Any]
    x: Any
    y: Any
    suffix: str = ""
    gated: bool = True
    marks: tuple[pytest.MarkDecorator, ...] = ()


def sequential() -> Sequential:
    model = Sequential(
        [
            Dense(6, activation="relu", input_dim=4),
            BatchNormalization(),
            Dropout(0.25),
            Dense(3),
            Activation("softmax"),
        ],
        seed=7,
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def jax_model() -> Any:
    """Momentum by hand, with the random key of its dropout in the state."""
    import jax
    from jax import numpy as jnp

    from asynccb.models import JaxModel

    def forward(weights: Any, x: Any) -> Any:
        return jnp.tanh(x @ weights["hidden"]) @ weights["out"]

    def logs_of(weights: Any, batch: Any, keep: Any) -> Any:
        x, y, *weight = batch
        errors = ((forward(weights, x * keep) - y) ** 2).mean(axis=1)
        return (errors * weight[0] if weight else errors).mean()

    def step(state: Any, batch: Any) -> Any:
        weights, opt_state, key = state["weights"], state["opt_state"], state["key"]
        key, drawn = jax.random.split(key)
        keep = jax.random.bernoulli(drawn, 0.8, batch[0].shape)
        loss, slopes = jax.value_and_grad(logs_of)(weights, batch, keep)
        speed = jax.tree.map(lambda old, slope: 0.9 * old + slope, opt_state, slopes)
        weights = jax.tree.map(lambda old, moved: old - 0.1 * moved, weights, speed)
        return {"weights": weights, "opt_state": speed, "key": key}, {"loss": loss}

    drawn = np.random.default_rng(3)
    weights = {
        "hidden": drawn.normal(size=(4, 5)).astype("float32"),
        "out": drawn.normal(size=(5, 3)).astype("float32"),
    }
    state = {
        "weights": weights,
        "opt_state": {name: np.zeros_like(array) for name, array in weights.items()},
        "key": jax.random.key(0),
    }
    return JaxModel(
        step,
        state,
        test_step=lambda state, batch: {"loss": logs_of(state["weights"], batch, 1.0)},
        predict=lambda state, x: forward(state["weights"], x),
    )


def estimator(make: Callable[..., Any], **first: Any) -> Callable[[], Any]:
    """One that has been trained before: what is not fitted cannot be tested."""
    return lambda: make().partial_fit(X, LABELS, **first)


def perceptron() -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((5,), random_state=7)


def linear() -> Any:
    from sklearn.linear_model import SGDClassifier

    return SGDClassifier(random_state=7)


def of_torch() -> Any:
    """One with every kind of state: weights, slots, running means, random numbers, a scheduler, clipping."""
    import torch
    from torch import nn

    from asynccb.models import TorchModel

    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(6))

        def forward(self, x: Any) -> Any:
            if self.training:
                self.running_mean.lerp_(x.detach().mean(0), 0.3)
            return x - self.running_mean

    generator = torch.Generator().manual_seed(7)
    module = nn.Sequential(nn.Linear(4, 6), Centered(), nn.ReLU(), nn.Dropout(0.25), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return TorchModel(
        module,
        nn.CrossEntropyLoss(reduction="none"),
        optimizer,
        ["accuracy"],
        clip_norm=1.0,
        scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
        scheduler_step="batch",
        seed=7,
    )


_drawn = np.random.default_rng(0)
X = _drawn.normal(size=(12, 4)).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(12) % 3]
LABELS = np.arange(12) % 3


def keras_model() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    drawn = [keras.initializers.GlorotUniform(seed) for seed in (1, 2)]
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, activation="relu", kernel_initializer=drawn[0], name="one"),
            keras.layers.Dropout(0.25, seed=7),
            keras.layers.Dense(3, activation="softmax", kernel_initializer=drawn[1], name="two"),
        ],
        name="contract",
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "categorical_crossentropy", metrics=["accuracy"])
    return model


def heavy(*packages: str) -> tuple[pytest.MarkDecorator, ...]:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.heavy, pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


# Keras with numpy 2: its own conversions ask for what torch's and its own arrays do not offer yet.
KERAS = (*heavy("keras"), pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"))

MODELS = {
    "sequential": Subject(sequential, X, Y, ".h5"),
    "jax": Subject(jax_model, X, Y, ".h5", marks=heavy("jax")),
    "sklearn, linear": Subject(estimator(linear, classes=[0, 1, 2]), X, LABELS, ".h5"),
    "sklearn, perceptron": Subject(estimator(perceptron, classes=[0, 1, 2]), X, LABELS, ".h5"),
    "bare": Subject(lambda: ScriptedModel(losses=[3.0, 2.0, 1.0]), X, Y),
    "torch": Subject(of_torch, X, Y, ".pt", marks=heavy("torch")),
    "keras": Subject(keras_model, X, Y, ".weights.h5", marks=KERAS),
}


PARAMETERS = [pytest.param(name, marks=MODELS[name].marks) for name in sorted(MODELS)]


def batch(subject: Subject, start: int = 0, stop: int = 4) -> Batch:
    return Batch(subject.x[start:stop], subject.y[start:stop], None, stop - start)


def numbers(state: ModelState) -> dict[str, Any]:
    return {name: array.copy() for name, array in state.arrays.items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
