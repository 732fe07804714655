"""A step in JAX that has all that a state may have: weights, slots with their rate, a random key."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from asynccb.models import JaxModel
from asynccb.protocols import Batch

_drawn = np.random.default_rng(0)
X = _drawn.normal(size=(60, 4)).astype("float32")
Y = _drawn.normal(size=(60, 2)).astype("float32")


class Injected(NamedTuple):
    """What ``optax.inject_hyperparams`` keeps, as far as it matters here."""

    hyperparams: dict[str, Any]
    speed: Any


def begin(seed: int = 0, features: int = 4, outputs: int = 2) -> dict[str, Any]:
    """Weights, momentum with its rate, and a random key for the noise on the inputs."""
    key, drawn = jax.random.split(jax.random.key(seed))
    weights = {"kernel": jax.random.normal(drawn, (features, outputs)), "bias": jnp.zeros(outputs)}
    speed = jax.tree.map(jnp.zeros_like, weights)
    rate = {"learning_rate": jnp.asarray(0.05, jnp.float32)}
    return {"key": key, "opt_state": Injected(rate, speed), "weights": weights}


def loss_of(weights: Any, batch: Any) -> Any:
    x, y = batch
    return ((x @ weights["kernel"] + weights["bias"] - y) ** 2).mean()


def step(state: Any, batch: Any) -> Any:
    x, y = batch
    key, drawn = jax.random.split(state["key"])
    noisy = x + 0.1 * jax.random.normal(drawn, x.shape)
    loss, slopes = jax.value_and_grad(loss_of)(state["weights"], (noisy, y))
    rates, speed = state["opt_state"]
    speed = jax.tree.map(lambda old, slope: 0.9 * old + slope, speed, slopes)
    rate = rates["learning_rate"]
    weights = jax.tree.map(lambda old, moved: old - rate * moved, state["weights"], speed)
    largest = jnp.abs(slopes["kernel"]).max()
    return {"key": key, "opt_state": Injected(rates, speed), "weights": weights}, {
        "largest": largest,
        "loss": loss,
    }


def tested(state: Any, batch: Any) -> Any:
    return {"loss": loss_of(state["weights"], batch)}


def model(seed: int = 0) -> JaxModel:
    return JaxModel(
        step, begin(seed), test_step=tested, predict=lambda state, x: x @ state["weights"]["kernel"]
    )


def bits(state: Any) -> list[bytes]:
    leaves = jax.tree.leaves(state)
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for leaf in leaves
    ]


def batch(start: int = 0, stop: int = 20) -> Batch:
    return Batch(X[start:stop], Y[start:stop], None, stop - start)
