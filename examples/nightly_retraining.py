"""Retraining that has 0.4 seconds a night: the clock cancels it in the middle of an epoch, and the next
night goes on with the batch that would have come next.

Prints, among others::

    night 1: the time is over in epoch ... of 400
    night 2: goes on from epoch ...
    completed after 400 epochs in ... nights
"""

import asyncio
import tempfile
from pathlib import Path

from sklearn.datasets import load_digits

from asynccb import Callback, History, Trainer
from asynccb.callbacks import BackupAndRestore
from asynccb.models import Dense, Sequential

EPOCHS = 400
SECONDS = 0.4
DIGITS = load_digits()


class SayWhere(Callback):
    def __init__(self, night: int) -> None:
        self.night = night

    def on_train_begin(self, logs: object = None) -> None:
        if self.run.resumed is not None:
            print(f"night {self.night}: goes on from epoch {self.run.resumed.epoch + 1}")


async def retrain(night: int, folder: Path) -> History | None:
    """None: it is not done yet."""
    model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")], seed=7)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    trainer = Trainer(model, seed=7)
    try:
        async with asyncio.timeout(SECONDS):
            # A cancelled training makes a last backup, at the very batch, before it ends.
            return await trainer.fit(
                DIGITS.data / 16,
                DIGITS.target,
                epochs=EPOCHS,
                verbose=0,
                callbacks=[BackupAndRestore(folder), SayWhere(night)],
            )
    except TimeoutError:
        assert trainer.last_run is not None
        print(f"night {night}: the time is over in epoch {trainer.last_run.epoch + 1} of {EPOCHS}")
        return None


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        night = 1
        while (history := await retrain(night, Path(folder, "backup"))) is None:
            night += 1
    print(f"{history.outcome} after {len(history.epoch)} epochs in {night} nights")
    print(f"accuracy {history.history['accuracy'][-1]:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
