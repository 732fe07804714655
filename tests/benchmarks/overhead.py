"""What a batch pays for the loop and for its callbacks, beside a hand-written loop and Keras' CallbackList.

    python tests/benchmarks/overhead.py [--rounds 9]

All rows of a table are measured in turn within each round, with one BLAS thread, and shown as the median and
the range over the rounds, in microseconds a batch. Quote ratios: absolute times are those of this machine on
this day.

Loop: Sequential 64-64-10, rmsprop, batches of 128 from 12,800 float32 samples, shuffled, metrics none. "by
    hand" is a plain loop over the
same permutation, the same fancy indexing and the same ``train_batch``, so the difference is the loop alone;
"numpy by hand" writes the network out in numpy too.

Callbacks: 8 callbacks with a hook on batch begin and on batch end that do nothing, and a model that does
    nothing. Async is the slope
between two numbers of batches of the whole ``fit``, which ends when every event is delivered. Keras' row is
its ``CallbackList`` called as its ``fit`` calls it; it needs Keras and a backend (``pip install keras jax``)
and is left out without them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np  # noqa: E402  # after the thread counts, which it reads once

from asynccb import Callback, Trainer  # noqa: E402
from asynccb.models import Activation, Dense, Sequential  # noqa: E402
from asynccb.protocols import Batch  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

CALLBACKS = 8
FEW, MANY = 3_000, 15_000
BATCH, SAMPLES, EPOCHS = 128, 12_800, 60


class NoModel:
    """A model that does nothing, so that what is measured is around it."""

    metrics_names = ("loss",)
    stop_training = False

    def train_batch(self, batch: Batch) -> dict[str, float]:
        return {"loss": 1.0}


class Inline(Callback):
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pass

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


class Beside(Callback):
    async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pass

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def build() -> Sequential:
    model = Sequential([Dense(64, activation="relu", input_dim=64), Dense(10), Activation("softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="categorical_crossentropy")
    return model


def data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES, 64)).astype(np.float32)
    return x, np.eye(10, dtype=np.float32)[generator.integers(0, 10, SAMPLES)]


# Loops ------------------------------------------------------------------------------------------------------


def fit() -> float:
    x, y = data()
    model = build()
    began = time.perf_counter()
    asyncio.run(Trainer(model, seed=1).fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0))
    return (time.perf_counter() - began) / (EPOCHS * SAMPLES // BATCH)


def by_hand() -> float:
    x, y = data()
    model = build()
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        order = np.random.default_rng([1, epoch]).permutation(SAMPLES)
        total = 0.0
        for start in range(0, SAMPLES, BATCH):
            rows = order[start : start + BATCH]
            total += model.train_batch(Batch(x[rows], y[rows], None, BATCH))["loss"]
    return (time.perf_counter() - began) / (EPOCHS * SAMPLES // BATCH)


def numpy_by_hand() -> float:
    x, y = data()
    generator = np.random.default_rng(7)
    w1 = generator.normal(0, 0.1, (64, 64)).astype(np.float32)
    w2 = generator.normal(0, 0.1, (64, 10)).astype(np.float32)
    b1, b2 = np.zeros(64, np.float32), np.zeros(10, np.float32)
    weights = [w1, b1, w2, b2]
    squares = [np.zeros_like(weight) for weight in weights]
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        order = np.random.default_rng([1, epoch]).permutation(SAMPLES)
        total = 0.0
        for start in range(0, SAMPLES, BATCH):
            rows = order[start : start + BATCH]
            inputs, targets = x[rows], y[rows]
            hidden = np.maximum(inputs @ w1 + b1, 0)
            scores = hidden @ w2 + b2
            scores -= scores.max(axis=1, keepdims=True)
            exponents = np.exp(scores)
            sums = exponents.sum(axis=1, keepdims=True)
            total += float((np.log(sums)[:, 0] - (scores * targets).sum(axis=1)).mean())
            above = (exponents / sums - targets) / np.float32(BATCH)
            below = (above @ w2.T) * (hidden > 0)
            gradients = [inputs.T @ below, below.sum(axis=0), hidden.T @ above, above.sum(axis=0)]
            for weight, square, gradient in zip(weights, squares, gradients, strict=True):
                square *= np.float32(0.9)
                square += np.float32(0.1) * gradient * gradient
                weight -= np.float32(0.001) * gradient / np.sqrt(square + np.float32(1e-7))
    return (time.perf_counter() - began) / (EPOCHS * SAMPLES // BATCH)


# Callbacks --------------------------------------------------------------------------------------------------


def whole_fit(batches: int, kind: type[Callback] | None) -> float:
    callbacks = [] if kind is None else [kind() for _ in range(CALLBACKS)]
    x = np.zeros((batches, 1))
    began = time.perf_counter()
    asyncio.run(
        Trainer(NoModel(), seed=1).fit(x, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
    )
    return time.perf_counter() - began


def slope(run: Callable[[int], float]) -> float:
    few, many = run(FEW), run(MANY)
    return (many - few) / (MANY - FEW)


def keras_list() -> Callable[[int], float] | None:
    try:
        import keras
    except ImportError:
        return None

    class Nothing(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    hooks = keras.callbacks.CallbackList(
        [Nothing() for _ in range(CALLBACKS)], add_history=False, add_progbar=False
    )

    def run(batches: int) -> float:
        began = time.perf_counter()
        for batch in range(batches):
            hooks.on_train_batch_begin(batch)
            hooks.on_train_batch_end(batch, {"loss": 1.0})
        return time.perf_counter() - began

    return run


# Tables -----------------------------------------------------------------------------------------------------


def measure(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every row once a round, in turn, after one round that does not count; in microseconds."""
    figures: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, run in rows.items():
            took = run() * 1e6
            if number:
                figures[name].append(took)
    return figures


def show(title: str, figures: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':34}{'median':>9}{'least':>9}{'most':>9}   us a batch")
    for name, values in figures.items():
        print(f"{name:34}{statistics.median(values):9.2f}{min(values):9.2f}{max(values):9.2f}")


def minus(left: list[float], right: list[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def ratio(left: list[float], right: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(left, right, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds

    loops = measure({"fit": fit, "by hand": by_hand, "numpy by hand": numpy_by_hand}, rounds)
    loops["fit over by hand"] = minus(loops["fit"], loops["by hand"])
    show("The loop", loops)
    print(f"fit / numpy by hand: {ratio(loops['fit'], loops['numpy by hand'])}")

    rows: dict[str, Callable[[], float]] = {
        "no callbacks": lambda: slope(lambda n: whole_fit(n, None)),
        "inline": lambda: slope(lambda n: whole_fit(n, Inline)),
        "async, delivered": lambda: slope(lambda n: whole_fit(n, Beside)),
    }
    peer = keras_list()
    if peer is not None:
        rows["Keras CallbackList"] = lambda: slope(peer)
    figures = measure(rows, rounds)
    bare = figures["no callbacks"]
    figures["cost of 8 inline"] = minus(figures["inline"], bare)
    figures["cost of 8 async"] = minus(figures["async, delivered"], bare)
    show(f"{CALLBACKS} callbacks, a hook on batch begin and one on batch end", figures)
    if peer is not None:
        keras = figures["Keras CallbackList"]
        print(f"inline / Keras: {ratio(figures['cost of 8 inline'], keras)}")
        print(f"async / Keras:  {ratio(figures['cost of 8 async'], keras)}")


if __name__ == "__main__":
    main()
