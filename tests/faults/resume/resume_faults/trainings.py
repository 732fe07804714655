"""Small trainings in which everything takes part that a resumed one must get right, and the digest of all
that they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb import Callback, Trainer
from asynccb.callbacks import (
    BackupAndRestore,
    CSVLogger,
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    SwapEMAWeights,
    TensorBoard,
)
from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential
from asynccb.models.optimizers import SGD
from asynccb.resume import Resume
from asynccb.training.programs import Fit

if TYPE_CHECKING:
    from pathlib import Path

    from asynccb import History

SAMPLES, BATCH, FEATURES, CLASSES = 200, 8, 6, 3
STEPS_IN_EPOCH = SAMPLES // BATCH

_drawn = np.random.default_rng(7)
X = _drawn.normal(size=(SAMPLES, FEATURES)).astype("float32")
Y = (X @ _drawn.normal(size=(FEATURES, CLASSES)) + _drawn.normal(size=(SAMPLES, CLASSES))).argmax(axis=1)
VALIDATION = (X[:40] + 0.1, Y[:40])


class Setting(NamedTuple):
    """One configuration of the table.

    Attributes:
        optimizer: of the model.
        save_freq: of the backups.
        callbacks: names of CALLBACKS.
        fit: arguments of ``fit`` beyond the data.
        listed: the data as a list of batches, in place of arrays.
        append: the CSV file has rows already.
    """

    optimizer: str
    save_freq: Any
    callbacks: tuple[str, ...] = ()
    fit: dict[str, Any] = {}
    listed: bool = False
    append: bool = False


CALLBACKS = {
    "early": lambda folder: EarlyStopping("loss", patience=1, min_delta=0.05),
    "early, best": lambda folder: EarlyStopping("val_loss", patience=9, restore_best_weights=True),
    "plateau": lambda folder: ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.05, cooldown=1),
    "schedule": lambda folder: LearningRateScheduler(lambda epoch, lr: lr * 0.9),
    "best file": lambda folder: ModelCheckpoint(folder / "best.h5", "val_loss", save_best_only=True),
    "files": lambda folder: ModelCheckpoint(folder / "w{epoch:02d}.h5", keep_last=2),
    "batch files": lambda folder: ModelCheckpoint(folder / "at{epoch:02d}-{batch:03d}.h5", save_freq=10),
    "averages": lambda folder: SwapEMAWeights(momentum=0.9),
    "averages at the end": lambda folder: SwapEMAWeights(momentum=0.9, swap_on_epoch=True),
    "board": lambda folder: TensorBoard(folder / "logs", write_graph=False, update_freq=5),
}

SETTINGS = {
    "sgd, every batch": Setting("sgd", 1),
    "adam, every epoch": Setting("adam", "epoch", ("early, best",)),
    "momentum, every 7 batches": Setting("momentum", 7, ("plateau", "best file")),
    "adam, early stopping": Setting("adam", 1, ("early", "schedule"), {"validation_freq": 2}),
    "averages": Setting("adam", 7, ("averages", "files")),
    "averages at the end, in steps": Setting(
        "rmsprop", 3, ("averages at the end", "schedule"), {"steps_per_epoch": 20}, listed=True
    ),
    "appended": Setting("adam", "epoch", ("plateau", "batch files"), append=True),
    "a list": Setting("momentum", 1, ("plateau", "board"), listed=True),
}
MORE_SETTINGS = {
    f"{optimizer}, {' and '.join(callbacks)}, {freq}": Setting(
        optimizer, freq, callbacks, more, listed, append
    )
    for optimizer, freq, callbacks, more, listed, append in (
        ("sgd", "epoch", ("early", "best file"), {}, False, True),
        ("sgd", 1, ("averages", "early, best"), {}, False, False),
        ("momentum", 1, ("schedule", "plateau", "files"), {"shuffle": "batch"}, False, False),
        ("momentum", "epoch", ("averages at the end", "best file"), {}, False, False),
        ("adam", 1, ("early", "schedule", "files", "board"), {"validation_freq": 3}, False, False),
        ("adam", 7, ("plateau", "early"), {"shuffle": False}, False, True),
        ("rmsprop", 1, ("early, best", "schedule", "files"), {}, False, False),
        ("rmsprop", 7, ("averages", "plateau", "batch files"), {}, True, False),
        ("rmsprop", "epoch", ("best file", "board", "early"), {}, False, False),
        ("adagrad", 1, ("plateau", "best file"), {}, False, False),
        ("adagrad", 7, ("averages at the end", "early, best"), {}, False, True),
        ("adagrad", "epoch", ("schedule", "files", "board"), {}, False, False),
        ("adamw", 1, ("early", "averages"), {"steps_per_epoch": 15}, True, False),
        ("adamw", 7, ("early, best", "plateau", "best file"), {}, False, False),
        ("adamw", "epoch", ("batch files", "schedule"), {}, True, False),
        ("adam", 13, ("averages", "early, best", "plateau", "files", "board"), {}, False, True),
    )
}


NAIVE = ("callbacks", "random", "place", "optimizer")
"""What a resume may forget; each is found."""


def forget(what: str) -> None:
    """Makes this process a naive one."""
    if what == "callbacks":
        Resume.end = lambda self, subscribers: None  # type: ignore[method-assign]
    elif what == "place":
        go_on = Fit.go_on
        Fit.go_on = lambda self, place, *rest: go_on(self, place._replace(batch=0), *rest)  # type: ignore[method-assign]
    else:
        put = Sequential._put

        def forgetful(self: Any, weights: Any, optimizer: Any, drawn: Any) -> None:
            put(self, weights, None if what == "optimizer" else optimizer, {} if what == "random" else drawn)

        Sequential._put = forgetful  # type: ignore[method-assign]


class Watch(Callback):
    """Compares the training with the reference, step by step, and kills its process.

    Args:
        reference: the digest of each step; empty to make them.
        kill_at: the step behind which the process dies; None: it does not.
        backup: waited for at every step, so that the training is not long over before the first backup is
            written; None: not waited for.
    """

    changes_model = False

    def __init__(
        self, reference: list[str], kill_at: int | None, backup: BackupAndRestore | None = None
    ) -> None:
        self.seen: list[str] = []
        self._reference = reference
        self._kill_at = kill_at
        self._backup = backup

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.run.step
        while self._backup is not None and self._backup._writing:
            time.sleep(0.0002)
        digest = _digest_of_model(self.model, repr(self.run.history.rows()))
        self.seen.append(digest)
        if self._reference and digest != self._reference[step - 1]:
            raise AssertionError(f"step {step} is another one than it was (resumed: {self.run.resumed})")
        if step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


async def train(
    name: str, folder: Path, epochs: int, reference: list[str], kill_at: int | None, *, patient: bool
) -> Any:
    """Trains, or goes on training, in ``folder``. Answers the digests of all steps and of what is left."""
    setting = (SETTINGS | MORE_SETTINGS)[name]
    csv = folder / "log.csv"
    if setting.append and not csv.exists():
        csv.write_bytes(b"epoch,accuracy,loss,lr,val_accuracy,val_loss\r\n0,1,2,3,4,5\r\n")
    model = _model(setting.optimizer)
    backup = BackupAndRestore(folder / "backup", setting.save_freq)
    watch = Watch(reference, kill_at, backup if patient else None)
    callbacks = [
        CSVLogger(csv, append=setting.append),
        *(CALLBACKS[key](folder) for key in setting.callbacks),
        watch,
        backup,
    ]
    data: Any = {"x": X, "y": Y, "batch_size": BATCH}
    if setting.listed:
        data = {"x": [(X[at : at + BATCH], Y[at : at + BATCH]) for at in range(0, SAMPLES, BATCH)]}
    history = await Trainer(model, seed=11).fit(
        **data, epochs=epochs, verbose=0, validation_data=VALIDATION, callbacks=callbacks, **setting.fit
    )
    return {"steps": watch.seen, "left": _left(model, history, folder)}


def _model(optimizer: str) -> Sequential:
    layers = [
        Dense(12, activation="relu", input_dim=FEATURES),
        BatchNormalization(),
        Dropout(0.3),
        Dense(CLASSES),
        Activation("softmax"),
    ]
    model = Sequential(layers, seed=3)
    chosen: Any = SGD(0.05, momentum=0.9) if optimizer == "momentum" else optimizer
    model.compile(chosen, "sparse_categorical_crossentropy", ["accuracy"])
    return model


def _digest_of_model(model: Sequential, more: str = "") -> str:
    state = model.capture()
    digest = hashlib.sha256(more.encode())
    for key, array in state.arrays.items():
        digest.update(key.encode() + array.tobytes())
    digest.update(json.dumps(state.random, sort_keys=True).encode())
    return digest.hexdigest()


def _left(model: Sequential, history: History, folder: Path) -> dict[str, str]:
    """What a training leaves behind, by name."""
    left = {
        "model": _digest_of_model(model),
        "history": repr((history.rows(), history.epoch, history.history, history.outcome, history.reason)),
    }
    for path in sorted(folder.iterdir()):
        if path.is_file():
            left[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    left["scalars"] = repr(_scalars(folder / "logs")) if (folder / "logs").exists() else ""
    return left


def _scalars(folder: Path) -> list[tuple[str, list[tuple[int, float]]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), purge_orphaned_data=True)
    shown.Reload()
    found = []
    for tag in sorted(shown.Tags()["tensors"]):
        events = shown.Tensors(tag)
        found.append((tag, [(event.step, float(event.tensor_proto.float_val[0])) for event in events]))
    found += [
        (tag, [(event.step, event.value) for event in shown.Scalars(tag)])
        for tag in sorted(shown.Tags()["scalars"])
    ]
    return found
