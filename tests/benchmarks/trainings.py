"""The trainings that several benchmarks run many of, and the loop for them that people write by hand.

A module of its own, so that processes which other people's pools start can import it by its name.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.models import Dense, RMSprop, Sequential
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RATE = 1e-6
"""So small that losses stay what they are whatever the order of additions: results can be compared."""
PURE_PYTHON = "pure Python"


class Kind(NamedTuple):
    """A model and its data.

    Attributes:
        units: of each layer, inputs first.
        batch: samples in a batch.
        batches: of an epoch.
        loss: cross-entropy, after a softmax, or a mean square.
    """

    units: tuple[int, ...]
    batch: int
    batches: int
    loss: str = "categorical_crossentropy"


KINDS = {
    "64-64-10": Kind((64, 64, 10), 128, 100),
    "784-256-10": Kind((784, 256, 10), 128, 10),
    "1024x1024": Kind((1024, 1024), 1024, 2, "mse"),
    PURE_PYTHON: Kind((1, 1), 1, 100),
}


class PurePython:
    """A model that computes in Python alone and never lets the interpreter go by itself: about 2 ms."""

    metrics_names = ("loss",)
    stop_training = False

    def train_batch(self, batch: Batch) -> dict[str, float]:
        total = 0
        for number in range(60_000):
            total += number * number
        return {"loss": float(total)}


def build(kind: str, seed: int = 7) -> Any:
    if kind == PURE_PYTHON:
        return PurePython()
    units, _, _, loss = KINDS[kind]
    activations = ["relu"] * (len(units) - 2) + ["linear" if loss == "mse" else "softmax"]
    layers = [
        Dense(wide, activation=activation, input_dim=units[0] if at == 0 else None)
        for at, (wide, activation) in enumerate(zip(units[1:], activations, strict=True))
    ]
    model = Sequential(layers, seed=seed)
    model.compile(optimizer=RMSprop(RATE), loss=loss)
    return model


@functools.cache
def data(kind: str) -> tuple[Any, Any]:
    """One epoch; made once in a process."""
    units, batch, batches, _ = KINDS[kind]
    generator = np.random.default_rng(0)
    x = generator.standard_normal((batch * batches, units[0]), dtype=np.float32)
    return x, np.eye(units[-1], dtype=np.float32)[generator.integers(0, units[-1], len(x))]


def batches_of(kind: str) -> Iterator[Batch]:
    x, y = data(kind)
    rows = KINDS[kind].batch
    for at in range(0, len(x), rows):
        yield Batch(x[at : at + rows], y[at : at + rows], None, rows)


def by_hand(kind: str, epochs: int, seed: int = 7) -> float:
    """The bare loop, from building the model to the mean loss of its last epoch."""
    model = build(kind, seed)
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        losses += (model.train_batch(batch)["loss"] for batch in batches_of(kind))
    return sum(losses) / len(losses)


def by_hand_until(kind: str, stopped: Callable[[], bool], trained: Callable[[], Any]) -> None:
    """The bare loop until ``stopped()``; tells ``trained`` of each batch."""
    model = build(kind)
    while True:
        for batch in batches_of(kind):
            if stopped():
                return
            model.train_batch(batch)
            trained()


def ready(kind: str) -> None:
    """What a process pays once: the data, and the first touch of everything. It also keeps a worker busy for
    long enough that a pool starts the others."""
    for batch in list(batches_of(kind))[:2]:
        build(kind).train_batch(batch)
    time.sleep(0.3)
