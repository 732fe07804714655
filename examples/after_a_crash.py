"""Kills a training three times, starts the same program again each time, and compares what it ends in with a
training that nobody has interrupted. Rows that are newer than the last backup are cut off and written again.

    python examples/after_a_crash.py

Prints, among others::

    killed 1 times; the CSV has ... rows
    killed 3 times; the CSV has ... rows
    the same, byte by byte
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from asynccb import Trainer
from asynccb.callbacks import BackupAndRestore, CSVLogger, ReduceLROnPlateau
from asynccb.models import Dense, Dropout, Sequential


async def train(folder: Path) -> str:
    """Trains, or goes on where a killed process was; answers a digest of the model and the CSV."""
    drawn = np.random.default_rng(7)
    x = drawn.random((2000, 20), dtype="float32")
    y = (x.sum(axis=1) > 10).astype("int64")
    model = Sequential(
        [Dense(32, activation="relu", input_dim=20), Dropout(0.2), Dense(2, activation="softmax")], seed=7
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    await Trainer(model, seed=7).fit(
        x,
        y,
        epochs=40,
        verbose=0,
        callbacks=[
            CSVLogger(folder / "log.csv"),
            ReduceLROnPlateau("loss", factor=0.5, patience=2),
            BackupAndRestore(folder / "backup", save_freq=20),  # batches
        ],
    )
    digest = hashlib.sha256((folder / "log.csv").read_bytes())
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    return digest.hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        killed.mkdir()
        expected = asyncio.run(train(whole))
        for number in range(1, 4):
            process = subprocess.Popen([sys.executable, __file__, str(killed)])
            first = sorted(killed.glob("backup/backup-*.h5"))
            while process.poll() is None and sorted(killed.glob("backup/backup-*.h5")) == first:
                pass  # until it has made one more
            process.kill()
            process.wait()
            print(f"killed {number} times; the CSV has {count_rows(killed / 'log.csv')} rows")
        again = asyncio.run(train(killed))
        print("the same, byte by byte" if again == expected else "different!")


def count_rows(csv: Path) -> int:
    return max(0, len(csv.read_bytes().splitlines()) - 1) if csv.exists() else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(train(Path(sys.argv[1])))
    else:
        main()
