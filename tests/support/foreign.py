"""What the tests of other people's loops have in common."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import numpy as np

from asynccb import Callback

__all__ = ["BATCHES", "NEEDS", "Beside", "Raises", "installed", "samples"]

BATCHES = 4
NEEDS = {
    "keras": ["keras", "jax"],
    "lightning": ["torch", "lightning"],
    "transformers": ["torch", "transformers", "accelerate"],
    "ignite": ["torch", "ignite"],
}


class Beside(Callback):
    """Notes its hooks, on the event loop."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []
        self.batches: list[Any] = []
        self.epochs: list[tuple[int, dict[str, Any]]] = []
        self.threads: set[str] = set()

    async def on_train_begin(self, logs: Any = None) -> None:
        self.hooks.append("begin")

    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.hooks.append(epoch)

    async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.hooks.append("(")

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.hooks.append(")")
        self.batches.append((batch, dict(logs)))

    async def on_test_begin(self, logs: Any = None) -> None:
        self.hooks.append("test")

    async def on_test_end(self, logs: Any = None) -> None:
        self.hooks.append("tested")

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.hooks.append(f"end of {epoch}")
        self.epochs.append((epoch, dict(logs)))
        self.threads.add(threading.current_thread().name)

    async def on_exception(self, exception: BaseException) -> None:
        self.hooks.append(exception)

    async def on_train_end(self, logs: Any = None) -> None:
        self.hooks.append("end")


class Raises(Callback):
    """As a model does that fails in a batch; the framework cannot tell."""

    def __init__(self) -> None:
        self.error = ValueError("in a batch")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        raise self.error


def samples() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(8 * BATCHES, 4)).astype(np.float32)
    return x, x.sum(axis=1, keepdims=True)


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(needed) is not None for needed in NEEDS[name])
