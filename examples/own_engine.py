"""An engine of your own: any object with ``train_batch(batch) -> dict of logs`` is a model. This one has its
weights in another process and sends the batches there; so it says ``needs_cpu = False``, and two of them
train at the same time without taking turns. Because it can tell its state, its training can be resumed.

Prints, among others::

    after an interruption at batch 10: loss ...
    resumed at epoch 1, and the loss is that of an uninterrupted training: True
"""

import asyncio
import multiprocessing
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from asynccb import Callback, Trainer
from asynccb.callbacks import BackupAndRestore
from asynccb.protocols import Batch


def engine(pipe: Connection) -> None:
    """The other process: a linear classifier that answers until nobody asks any more."""
    weights = np.zeros((64, 10))
    while True:
        try:
            verb, given = pipe.recv()
        except EOFError:
            return
        if verb == "get":
            pipe.send(weights)
        elif verb == "set":
            weights = given
            pipe.send(None)
        else:
            x, y = given
            scores = np.exp(x @ weights)
            probabilities = scores / scores.sum(axis=1, keepdims=True)
            right = probabilities[np.arange(len(y)), y]
            if verb == "train":
                weights -= 0.5 * x.T @ (probabilities - np.eye(10)[y]) / len(y)
            accuracy = np.mean(probabilities.argmax(axis=1) == y)
            pipe.send({"loss": float(-np.log(right).mean()), "accuracy": float(accuracy)})


class Remote:
    """A model that computes elsewhere. The training thread waits in ``recv``, and nobody waits for it."""

    needs_cpu = False
    metrics_names = ("loss", "accuracy")

    def __enter__(self) -> "Remote":
        here = multiprocessing.get_context("spawn")
        self._pipe, other = here.Pipe()
        self._process = here.Process(target=engine, args=(other,))
        self._process.start()
        other.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()
        self._process.close()

    # All that a training needs:

    def train_batch(self, batch: Batch) -> Mapping[str, float]:
        logs: dict[str, float] = self._ask("train", (batch.x, batch.y))
        return logs

    # For validation and ``evaluate``:

    def test_batch(self, batch: Batch) -> Mapping[str, float]:
        logs: dict[str, float] = self._ask("test", (batch.x, batch.y))
        return logs

    # For backups, and to go on from them:

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._ask("get", None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ask("set", state["weights"])

    def _ask(self, verb: str, given: Any) -> Any:
        self._pipe.send((verb, given))
        return self._pipe.recv()


class Interrupts(Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 10 and self.run is not None:
            self.run.stop("the machine is wanted for something else")


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    settings: dict[str, Any] = {"batch_size": 100, "epochs": 2, "validation_split": 0.2, "verbose": 0}

    with tempfile.TemporaryDirectory() as folder, Remote() as first, Remote() as second:
        interrupted, whole = await asyncio.gather(
            Trainer(first, seed=1).fit(x, y, **settings, callbacks=[BackupAndRestore(folder), Interrupts()]),
            Trainer(second, seed=1).fit(x, y, **settings),
        )
        print(f"after an interruption at batch 10: loss {interrupted.history['loss'][-1]:.3f}")

        with Remote() as another:
            trainer = Trainer(another, seed=1)
            resumed = await trainer.fit(x, y, **settings, callbacks=BackupAndRestore(folder))
        same = resumed.history == whole.history
        went_on = trainer.last_run.resumed if trainer.last_run else None
        epoch = went_on.epoch + 1 if went_on else 0
        print(f"resumed at epoch {epoch}, and the loss is that of an uninterrupted training: {same}")


if __name__ == "__main__":
    asyncio.run(main())
