"""A classifier of handwritten digits, trained inside of a running event loop.

Prints, among others::

    Epoch 1/8 - ...
    Epoch 8/8 - ...
    the loop answered ... times while the digits were trained
    completed after 8 epochs; validation accuracy ...
    best.hdf5 says 3, 3, 3 for three images of a 3
"""

import asyncio

from sklearn.datasets import load_digits

from asynccb import Trainer
from asynccb.callbacks import CSVLogger, EarlyStopping, ModelCheckpoint
from asynccb.models import Activation, Dense, Sequential, load_model


def build() -> Sequential:
    model = Sequential([Dense(64, activation="relu", input_dim=64), Dense(10), Activation("softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target

    answered = 0

    async def keep_answering() -> None:
        nonlocal answered
        while True:
            await asyncio.sleep(0.01)
            answered += 1

    service = asyncio.create_task(keep_answering())
    history = await Trainer(build(), seed=7).fit(
        x,
        y,
        epochs=8,
        validation_split=0.2,
        callbacks=[
            CSVLogger("log.csv"),
            ModelCheckpoint("best.hdf5", save_best_only=True),
            EarlyStopping(patience=3),
        ],
    )
    service.cancel()

    accuracy = history.history["val_accuracy"][-1]
    print(f"the loop answered {answered} times while the digits were trained")
    print(f"{history.outcome} after {len(history.epoch)} epochs; validation accuracy {accuracy:.3f}")

    best = load_model("best.hdf5")
    threes = best.predict(x[y == 3][:3]).argmax(axis=1)
    print(f"best.hdf5 says {', '.join(map(str, threes))} for three images of a 3")


if __name__ == "__main__":
    asyncio.run(main())
