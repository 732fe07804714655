"""A seed is a promise about bytes: two processes, the same files, whatever runs beside the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS, BATCHES, BESIDE = 4, 20, 4

TRAINING = """
import asyncio, hashlib, json, sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from asynccb import Callback, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint
from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential

folder, model_seed, order_seed, beside = Path(sys.argv[1]), *map(int, sys.argv[2:])


class Beside(Callback):
    called = 0

    async def on_batch_begin(self, batch, logs=None):
        await asyncio.sleep(0)

    async def on_batch_end(self, batch, logs=None):
        await asyncio.sleep(0)
        self.called += 1
        if batch == 3:
            with await self.run.snapshot() as snapshot:
                sum(float(np.sum(array)) for array in snapshot.arrays.values())


def digest(parts):
    whole = hashlib.sha256()
    for name, data in parts:
        whole.update(f"{name} {len(data)} ".encode() + data)
    return whole.hexdigest()


async def main():
    x, y = load_digits(return_X_y=True)
    x, y = (x[:1200] / 16).astype("float32"), np.eye(10, dtype="float32")[y[:1200]]
    model = Sequential([
        Dense(32, activation="relu", input_dim=64), Dropout(0.3), BatchNormalization(), Dropout(0.1),
        Dense(10), Activation("softmax"),
    ], seed=model_seed)
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    others = [Beside() for _ in range(beside)]
    files = [
        CSVLogger(folder / "log.csv"), ModelCheckpoint(folder / "{epoch:02d}.hdf5"),
        ModelCheckpoint(folder / "best.hdf5", save_best_only=True),
    ]
    history = await Trainer(model, seed=order_seed).fit(
        x, y, batch_size=50, epochs=4, verbose=0, validation_split=0.2,
        callbacks=[*others[:2], *files, *others[2:]])
    arrays = [(name, array.tobytes()) for name, array in model.capture().arrays.items()]
    print(json.dumps({
        "weights": digest(pair for pair in arrays if not pair[0].startswith("optimizer/")),
        "optimizer": digest(pair for pair in arrays if pair[0].startswith("optimizer/")),
        "history": digest([("", json.dumps(history.history).encode())]),
        "csv": digest([("", (folder / "log.csv").read_bytes())]),
        "checkpoints": digest((path.name, path.read_bytes()) for path in sorted(folder.glob("*.hdf5"))),
        "files": sorted(path.name for path in folder.iterdir()),
        "called": [other.called for other in others],
    }))


asyncio.run(main())
"""
BYTES = ("weights", "optimizer", "history", "csv", "checkpoints")

#                   model, order, callbacks beside, PYTHONHASHSEED
TRAININGS = {
    "first": (7, 7, 0, 1),
    "again": (7, 7, 0, 2),
    "beside": (7, 7, BESIDE, 3),
    "other model": (8, 7, 0, 1),
    "other order": (7, 8, 0, 1),
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What each of TRAININGS says, each in a process and a folder of its own."""
    root = tmp_path_factory.mktemp("determinism")
    script = root / "training.py"
    script.write_text(TRAINING)
    processes = {}
    for name, (*arguments, hash_seed) in TRAININGS.items():
        folder = root / name
        folder.mkdir()
        processes[name] = _start(script, folder, arguments, hash_seed)
    said = {name: process.communicate() for name, process in processes.items()}
    # That a training had to wait for a busy disk is no difference.
    wrong = [line for _, errors in said.values() for line in errors.splitlines() if "has waited" not in line]
    assert wrong == []
    return {name: json.loads(output) for name, (output, _) in said.items()}


def _start(script: Path, folder: Path, arguments: list[int], hash_seed: int) -> subprocess.Popen[str]:
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "BLIS")}
    return subprocess.Popen(
        [sys.executable, script, folder, *map(str, arguments)],
        env={**os.environ, **one_thread, "PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_training_left_all_its_files(trainings: dict[str, dict[str, object]]) -> None:
    files = ["01.hdf5", "02.hdf5", "03.hdf5", "04.hdf5", "best.hdf5", "log.csv"]
    assert dict.fromkeys(TRAININGS, files) == {name: said["files"] for name, said in trainings.items()}


@pytest.mark.parametrize("part", BYTES)
def test_two_processes_with_one_seed_leave_the_same_bytes(
    trainings: dict[str, dict[str, object]], part: str
) -> None:
    assert trainings["first"][part] == trainings["again"][part]


@pytest.mark.parametrize("part", BYTES)
def test_callbacks_beside_the_training_change_no_byte(
    trainings: dict[str, dict[str, object]], part: str
) -> None:
    assert trainings["beside"]["called"] == [EPOCHS * BATCHES] * BESIDE
    assert trainings["first"][part] == trainings["beside"][part]


@pytest.mark.parametrize("part", BYTES)
@pytest.mark.parametrize("seed", ["other model", "other order"])
def test_another_seed_leaves_other_bytes(
    trainings: dict[str, dict[str, object]], seed: str, part: str
) -> None:
    assert trainings["first"][part] != trainings[seed][part]
