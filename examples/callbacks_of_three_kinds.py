"""One callback of each kind: inline, beside the training, and both.

Prints, among others::

    inline, before epoch 3: the learning rate is now 0.05
    beside: epoch 5 is told; ... epochs have ended by now
    completed; the training waited for room in a mailbox 0 times
    the first file and the last differ: True
    the last file is the trained model: True
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from asynccb import Callback, Trainer
from asynccb.models import SGD, Dense, Sequential


class HalveTheRate(Callback):
    """Inline: a ``def`` hook runs on the training thread, between two batches, and may change the model."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 3:
            rate = self.model.optimizer.learning_rate / 2
            self.model.optimizer.learning_rate = rate
            print(f"inline, before epoch {epoch}: the learning rate is now {rate:g}")


class TellSlowly(Callback):
    """Beside: an ``async def`` hook runs on the event loop while the next epochs are trained."""

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await asyncio.sleep(0.2)  # a slow server, say: it takes longer than an epoch
        print(f"beside: epoch {epoch} is told; {len(self.run.history.epoch)} epochs have ended by now")


class Keep(Callback):
    """Both: the ``def`` half copies the model as it is now, the coroutine writes the copy when it can."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Coroutine[Any, Any, None]:
        return self._write(f"epoch-{epoch}.weights.h5", self.snapshot())

    async def _write(self, path: str, snapshot: Any) -> None:
        with snapshot:  # at the end of the block the copy's memory is free
            await asyncio.to_thread(snapshot.save, path, weights_only=True)
            print(f"both: {path} holds the model of step {snapshot.step}")


def build() -> Sequential:
    model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")], seed=7)
    model.compile(optimizer=SGD(0.1), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target

    model = build()
    run = Trainer(model, seed=7).start(
        x, y, epochs=6, validation_split=0.2, verbose=0, callbacks=[HalveTheRate(), TellSlowly(), Keep()]
    )
    history = await run
    waits = run.stats.waits.get("mailbox", 0)
    print(f"{history.outcome}; the training waited for room in a mailbox {waits} times")

    first, last = build(), build()
    first.load_weights("epoch-0.weights.h5")
    last.load_weights("epoch-5.weights.h5")
    print("the first file and the last differ:", not np.array_equal(first.predict(x), last.predict(x)))
    print("the last file is the trained model:", np.array_equal(last.predict(x), model.predict(x)))


if __name__ == "__main__":
    asyncio.run(main())
