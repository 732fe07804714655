"""A training and a save as a user who is not root: ``drop`` gives up what lets root pass modes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb import Trainer
from asynccb.callbacks import LambdaCallback, ModelCheckpoint
from asynccb.models import Dense, Sequential

if TYPE_CHECKING:
    from pathlib import Path

_VERSION_3 = 0x20080522  # of the system call's structures


def drop() -> None:
    """Gives up all capabilities of this process for good; a user who has none keeps what he has. Linux."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(struct.pack("<Ii", _VERSION_3, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def passes_modes(folder: Path) -> bool:
    """Whether this process writes where modes do not allow it."""
    locked = folder / "locked"
    locked.mkdir(mode=0o500)
    return os.access(locked, os.W_OK)


def trained(path: str) -> dict[str, Any]:
    """Two epochs with a checkpoint: the error that ended them, the batches that began, and what was warned
    of."""
    model, batches = Sequential([Dense(2, input_dim=2)], seed=1), []
    model.compile("sgd", "mse")
    x = np.zeros((4, 2), np.float32)
    callbacks = [
        ModelCheckpoint(path),
        LambdaCallback(on_batch_begin=lambda batch, logs: batches.append(batch)),
    ]
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            asyncio.run(Trainer(model).fit(x, x, batch_size=2, epochs=2, verbose=0, callbacks=callbacks))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "batches": len(batches), "warnings": [str(it.message) for it in caught]}
