"""A step in JAX with an optimizer of optax, trained on the digits: the rate follows a schedule, the best
weights go into a file, and what it predicts comes back.

Needs jax, optax and scikit-learn. Prints, among others::

    epoch 1: val_accuracy ..., lr 0.01
    epoch 5: val_accuracy ..., lr 0.0024
    the best weights have val_accuracy ...
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from asynccb import Trainer
from asynccb.callbacks import LambdaCallback, LearningRateScheduler, ModelCheckpoint
from asynccb.models import JaxModel

# Wrapped, its learning rate lies in the state, where a LearningRateScheduler can set it.
optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)


def begin(seed: int) -> Any:
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "hidden": jax.random.normal(first, (64, 32)) / 8,
        "out": jax.random.normal(second, (32, 10)) / 6,
    }
    return params, optimizer.init(params)


def scores(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def measure(params: Any, batch: Any) -> Any:
    x, y = batch
    found = scores(params, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(found, y).mean()
    return loss, {"loss": loss, "accuracy": (found.argmax(axis=1) == y).mean()}


def step(state: Any, batch: Any) -> Any:
    params, slots = state
    slopes, logs = jax.grad(measure, has_aux=True)(params, batch)
    updates, slots = optimizer.update(slopes, slots, params)
    return (optax.apply_updates(params, updates), slots), logs


def build(seed: int) -> JaxModel:
    return JaxModel(
        step,
        begin(seed),
        test_step=lambda state, batch: measure(state[0], batch)[1],
        predict=lambda state, x: scores(state[0], x).argmax(axis=1),
    )


def show(epoch: int, logs: Any) -> None:
    print(f"epoch {epoch + 1}: val_accuracy {logs['val_accuracy']:.3f}, lr {logs['lr']:.2g}")


async def main() -> None:
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target.astype("int32")
    held = slice(1400, None)

    with tempfile.TemporaryDirectory() as folder:
        best = Path(folder) / "best.weights.h5"
        await Trainer(build(seed=0), seed=1).fit(
            x[:1400],
            y[:1400],
            batch_size=100,  # of one size, because each size is compiled once
            epochs=5,
            validation_data=(x[held], y[held]),
            verbose=0,
            callbacks=[
                LearningRateScheduler(lambda epoch: 0.01 * 0.7**epoch),
                ModelCheckpoint(best, "val_accuracy", save_best_only=True, save_weights_only=True),
                LambdaCallback(on_epoch_end=show),
            ],
        )
        model = build(seed=2)
        model.load(best)

    predicted = await Trainer(model).predict(x[held])
    print(f"the best weights have val_accuracy {np.mean(predicted == y[held]):.3f}")


if __name__ == "__main__":
    asyncio.run(main())
