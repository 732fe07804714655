"""What is saved and how it is read: a table, so that every fault meets every kind of file.

State number k is written into every number of the file, so a reader sees at once which state it has got, and
whether it is one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import pytest

from asynccb.errors import FileRefused
from asynccb.models import Dense, Dropout, Sequential, load_model
from asynccb.models.state import OptimizerState, SequentialState
from asynccb.storage import hdf5
from asynccb.storage.backups import BackupFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Mixture(AssertionError):
    """A file was read without an error and holds what nobody saved."""


class Subject(NamedTuple):
    """One kind of file.

    Attributes:
        save: writes state ``k`` into a folder, durably.
        read: the state that the folder holds, None if nothing was saved there. Raises what the reader raises
            for a file that it refuses, and :class:`Mixture` for one that holds no state as it was saved.
    """

    save: Callable[[Path, int], None]
    read: Callable[[Path], int | None]


class _Models:
    """``model.h5``, written as a model's state is saved and read by ``load_model``."""

    def __init__(self, layers: int, units: int, way: str = "") -> None:
        self._layers, self._units, self._way = layers, units, way
        self._model: Sequential | None = None

    def state(self, k: int) -> SequentialState:
        if self._model is None:
            dense = [Dense(self._units) for _ in range(self._layers - 1)]
            self._model = Sequential(
                [Dense(self._units, input_dim=self._units), Dropout(0.5), *dense], seed=1
            )
            self._model.compile("adam", "mse")
        was = self._model.capture()
        assert was.optimizer is not None
        slots = {name: [np.full_like(a, k) for a in arrays] for name, arrays in was.optimizer.slots.items()}
        return SequentialState(
            config=was.config,
            compiled=was.compiled,
            layout=was.layout,
            weights=[np.full_like(array, k) for array in was.weights().values()],
            optimizer=OptimizerState(k, was.optimizer.learning_rate, slots, was.optimizer.by_variable),
            random=was.random,
            rebuild=Sequential._from_state,
        )

    def save(self, folder: Path, k: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self._way == "by the library":  # what fits no template
                patch.setattr(hdf5._templates, "get", lambda *args: None)
            elif self._way == "piece by piece":  # where there is no system call for many pieces
                patch.delattr(os, "pwritev")
            self.state(k).save(folder / "model.h5")

    def read(self, folder: Path) -> int | None:
        try:
            found = load_model(folder / "model.h5").capture()
        except FileNotFoundError:
            return None
        k = int(found.arrays["optimizer/iteration"])
        self._compare(found, k)
        return k

    def _compare(self, found: SequentialState, k: int) -> None:
        wanted = self.state(k)
        if found.random != wanted.random or found.config != wanted.config:
            raise Mixture("the random streams or the configuration are others")
        for name, array in wanted.arrays.items():
            if found.arrays[name].tobytes() != array.tobytes():
                raise Mixture(f"{name} is not that of state {k}")


class _Backups(_Models):
    """A folder of backups, of which two are kept."""

    def save(self, folder: Path, k: int) -> None:
        backups = BackupFolder(folder)
        self._write(backups.next(), k)
        backups.prune(backups.files(), 2)

    def _write(self, path: str, k: int) -> None:
        self.state(k).save(path, extra={"resume": {"k": k, "best": np.full(100, k)}})

    def read(self, folder: Path) -> int | None:
        """The newest that is not damaged."""
        refused: FileRefused | None = None
        for path in BackupFolder(folder).files():
            try:
                return self._restored(path)
            except FileRefused as error:
                refused = error
        if refused is not None:
            raise refused
        return None

    def _restored(self, path: str) -> int:
        extra: dict[str, Any] = {}
        self.state(0)  # makes the model
        assert self._model is not None
        model = Sequential.from_config(self._model.get_config())
        model.compile("adam", "mse")
        model.restore(path, extra.update)
        k = int(extra["resume"]["k"])
        if (extra["resume"]["best"] != k).any():
            raise Mixture("what is beside the model is of another state")
        self._compare(model.capture(), k)
        return k


class _DeletedFirst(_Backups):
    """Negative control: makes room for the new backup before it writes it."""

    def save(self, folder: Path, k: int) -> None:
        backups = BackupFolder(folder)
        path = backups.next()
        for old in backups.files():
            os.unlink(old)
        self._write(path, k)


class _InPlace:
    """Negative control: plain HDF5 over the old file, read as HDF5 is read."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def save(self, folder: Path, k: int) -> None:
        with h5py.File(folder / "model.h5", "w") as file:
            for index in range(self._layers):
                file[f"layers/{index}/kernel"] = np.full((16, 16), k, np.float32)
                file[f"layers/{index}/bias"] = np.full(16, k, np.float32)

    def read(self, folder: Path) -> int | None:
        if not (folder / "model.h5").exists():
            return None
        with h5py.File(folder / "model.h5") as file:
            arrays = [
                file[f"layers/{index}/{name}"][()]
                for index in range(self._layers)
                for name in ("kernel", "bias")
            ]
        k = int(arrays[0].flat[0])
        if any((array != k).any() for array in arrays):
            raise Mixture(f"not all numbers are {k}")
        return k


def _subject(kind: _Models | _InPlace) -> Subject:
    return Subject(kind.save, kind.read)


SUBJECTS = {
    "small": _subject(_Models(1, 4)),
    "wide": _subject(_Models(4, 16)),
    "large": _subject(_Models(2, 320)),  # above 2 MiB, synchronized before its seal is written
    "many": _subject(_Models(64, 4)),  # 128 weights, 384 arrays
    "damaged": _subject(_Models(2, 48)),  # 75 KiB, three quarters of them numbers
    "half a disk": _subject(_Models(2, 180)),  # 790 KiB
    "half a disk, by the library": _subject(_Models(2, 180, "by the library")),
    "small, by the library": _subject(_Models(1, 4, "by the library")),
    "wide, by the library": _subject(_Models(4, 16, "by the library")),
    "many, by the library": _subject(_Models(64, 4, "by the library")),
    "small, piece by piece": _subject(_Models(1, 4, "piece by piece")),
    "wide, piece by piece": _subject(_Models(4, 16, "piece by piece")),
    "backups": _subject(_Backups(1, 4)),
    "backups, deleted first": _subject(_DeletedFirst(1, 4)),
    "in place": _subject(_InPlace(8)),
}
"""By name; the last two must fail."""
