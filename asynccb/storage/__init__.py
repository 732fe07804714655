"""Files: written whole or not at all, HDF5 behind one writer and one reader, folders that one run owns, work
in order on one thread."""

from __future__ import annotations

from asynccb.storage.atomic import atomic_write
from asynccb.storage.serial import SerialExecutor

__all__ = ["SerialExecutor", "atomic_write"]
