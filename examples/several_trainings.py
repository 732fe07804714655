"""Four learning rates at the same time: plain ``asyncio.gather``, a worker thread and a CSV for each.

Prints, among others::

    lr=0.3    val_accuracy ...
    lr=0.1    val_accuracy ...
    lr=0.03   val_accuracy ...
    lr=0.01   val_accuracy ...
    best: lr=...
"""

import asyncio
from typing import Any

from sklearn.datasets import load_digits

from asynccb import History, Trainer
from asynccb.callbacks import CSVLogger
from asynccb.models import SGD, Dense, Sequential

RATES = (0.3, 0.1, 0.03, 0.01)


async def train(rate: float, x: Any, y: Any) -> History:
    model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")], seed=7)
    model.compile(optimizer=SGD(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return await Trainer(model, seed=7).fit(
        x,
        y,
        epochs=6,
        validation_split=0.2,
        callbacks=[CSVLogger(f"lr={rate}.csv")],
        name=f"lr={rate}",
    )


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target

    # The data is shared, not copied. Cancelling this task would cancel all four.
    histories = await asyncio.gather(*(train(rate, x, y) for rate in RATES))

    reached = {rate: h.history["val_accuracy"][-1] for rate, h in zip(RATES, histories, strict=True)}
    for rate, accuracy in reached.items():
        print(f"lr={rate:<6} val_accuracy {accuracy:.3f}")
    print(f"best: lr={max(reached, key=lambda rate: reached[rate])}")


if __name__ == "__main__":
    asyncio.run(main())
