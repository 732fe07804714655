"""The one reader of HDF5 files. A file is data from somewhere: nothing in it is followed that is not on the
list.

Allowed are hard-linked groups, and contiguous or chunked, unfiltered datasets of plain integers or floats.
Soft and external links, external and virtual datasets read other files; object and variable-length types
follow pointers; filters and shapes make memory out of nothing. Attributes are read only where they are one
string, which is JSON. What is ours alone is a tree of plain data.

A file that we wrote is compared with its seal before libhdf5 parses it, so damage never gets there. A hostile
file can be sealed too, or have no seal, and crash the library or keep it busy for ever. This keeps out what a
file may *say*; files of strangers belong in a process of their own, with limits of memory and time.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import FileRefused
from asynccb.storage.finding import by_name, by_number
from asynccb.storage.layout import STATE
from asynccb.storage.packing import unpack
from asynccb.storage.records import FORMAT, Contents, Expected, Header
from asynccb.storage.seal import check_seal, identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

_MOST_OBJECTS = 200_000
_MOST_NAMES = 1_000  # beyond one more for each object, which is what a file of ours has
_DEEPEST = 100
_LARGEST_CONFIG = 4 << 20  # characters; parsed, JSON may take thirty times its length
_MOST_TRIES = 10
_VERSION = re.compile(rb'\{"format":(\d+)')


def read_contents(
    path: str,
    expect: Callable[[Header], Expected],
    on_thread: Callable[[Callable[[], Contents | None]], Contents | None],
    *,
    sealed: bool,
) -> Contents:
    """See :func:`asynccb.storage.hdf5.read_model_file`.

    ``on_thread`` runs a function on the thread of HDF5 and returns its result.
    """
    for _ in range(_MOST_TRIES):
        try:
            checked = check_seal(path, needed=sealed)
        except (FileRefused, FileNotFoundError, PermissionError):
            raise  # the last two are the caller's to see as they are
        except OSError as error:
            raise FileRefused(path, f"it cannot be read: {error}") from error
        contents = on_thread(lambda checked=checked: _read(path, expect, checked))  # type: ignore[misc]
        if contents is not None:
            return contents
    raise FileRefused(path, "it was replaced again and again while it was read")


def _read(path: str, expect: Callable[[Header], Expected], checked: tuple[int, ...]) -> Contents | None:
    """The contents of the file that was checked; None if another one has its name by now."""
    import h5py

    asked = False
    try:
        with h5py.File(path, "r", locking=False) as file:
            status = os.stat(path)  # after the opening: it is this file that was opened, or a newer one
            if identity(status) != checked:
                return None
            _Walk(path, h5py).check(file)
            header = _header(path, file, h5py, status.st_size)
            asked = True
            expected = expect(header)
            asked = False
            return _arrays(path, file, expected, status.st_size)
    except FileRefused:
        raise
    except PermissionError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        if asked:
            raise
        raise FileRefused(path, f"it is damaged or no HDF5 file: {error}") from error


class _Walk:
    """Visits every object once and refuses the file for the first that is not on the list."""

    def __init__(self, path: str, h5py: Any) -> None:
        self._path, self._h5py = path, h5py
        self._seen: set[Any] = set()
        self._again = 0

    def check(self, root: Any) -> None:
        waiting = [(root, 0)]
        while waiting:
            group, depth = waiting.pop()
            if depth > _DEEPEST:
                raise FileRefused(self._path, f"its groups are nested more than {_DEEPEST} deep")
            for name in group:
                place = f"{group.name.rstrip('/')}/{name}"
                found = self._open(group, name, place)
                if found is not None and isinstance(found, self._h5py.Group):
                    waiting.append((found, depth + 1))

    def _open(self, group: Any, name: str, place: str) -> Any:
        h5py = self._h5py
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise FileRefused(
                self._path, f"{place} is a {type(link).__name__}, which could lead to another file"
            )
        found = group[name]
        key = h5py.h5o.get_info(found.id).addr
        if key in self._seen:
            self._again += 1
            if self._again > len(self._seen) + _MOST_NAMES:
                raise FileRefused(self._path, "it holds too many names for too few objects")
            return None
        self._seen.add(key)
        if len(self._seen) > _MOST_OBJECTS:
            raise FileRefused(self._path, f"it holds more than {_MOST_OBJECTS} objects")
        if isinstance(found, h5py.Dataset):
            self._dataset(found, place)
        elif not isinstance(found, h5py.Group):
            raise FileRefused(self._path, f"{place} is neither a group nor a dataset")
        return found

    def _dataset(self, dataset: Any, place: str) -> None:
        h5d, plist = self._h5py.h5d, dataset.id.get_create_plist()
        why = None
        if plist.get_external_count():
            why = "keeps its data in another file"
        elif plist.get_layout() not in (h5d.CONTIGUOUS, h5d.CHUNKED):
            why = "is a virtual or compact dataset"
        elif plist.get_nfilters():
            why = "is compressed or filtered"
        elif dataset.dtype.kind not in "iuf" or dataset.dtype.subdtype is not None:
            why = f"is of type {dataset.dtype}, not of plain numbers"
        if why is not None:
            raise FileRefused(self._path, f"{place} {why}")


def _header(path: str, file: Any, h5py: Any, size: int) -> Header:
    model_config = _json(path, file, "model_config", h5py)
    training_config = _json(path, file, "training_config", h5py)
    return Header(model_config, training_config, _state(path, file, size))


def _json(path: str, file: Any, name: str, h5py: Any) -> dict[str, Any] | None:
    if name not in file.attrs:
        return None
    kept = file.attrs.get_id(name)
    if h5py.check_string_dtype(kept.dtype) is None or kept.shape != ():
        raise FileRefused(path, f"its attribute {name} is not one string")
    text = file.attrs[name]
    if len(text) > _LARGEST_CONFIG:
        raise FileRefused(path, f"its attribute {name} is longer than {_LARGEST_CONFIG} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileRefused(path, f"its attribute {name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileRefused(path, f"its attribute {name} is not a JSON object")
    return value


def _state(path: str, file: Any, size: int) -> dict[str, Any]:
    """What is ours alone, from a file of so many bytes; empty where there is none."""
    if STATE not in file:
        return {}
    dataset = file[STATE]
    if getattr(dataset, "ndim", None) != 1 or dataset.dtype != np.uint8:
        raise FileRefused(path, f"{STATE} is not a row of bytes")
    if dataset.size > min(size, dataset.id.get_storage_size()):
        raise FileRefused(path, f"{STATE} claims to be larger than what is stored of it")
    stored = dataset[()].data
    _check_format(path, bytes(stored[:40]))
    try:
        state = unpack(stored)
    except ValueError as error:
        raise FileRefused(path, f"its {STATE} is no state: {error}") from None
    if not isinstance(state, dict):
        raise FileRefused(path, f"its {STATE} is not a state with names")
    state.pop("format", None)
    return state


def _check_format(path: str, start: bytes) -> None:
    # Looked for in the text: a newer version may hold what this one cannot unpack.
    found = _VERSION.match(start)
    if found is not None and int(found[1]) > FORMAT:
        raise FileRefused(
            path,
            f"a newer asynccb has written it, in version {int(found[1])} of the format; this one reads "
            f"versions up to {FORMAT}",
        )


def _arrays(path: str, file: Any, expected: Expected, size: int) -> Contents:
    find = by_number if expected.names is None or "layers" in file else by_name
    weights, slots = find(path, file, expected)
    # All shapes are compared before the first number is read, and together they must fit into the file:
    # several names may lead to the same bytes, but no small file becomes a large model.
    # Loops in place of comprehensions: these would keep `file` in a closure, which outlives its frame's
    # clearing.
    datasets: list[Any] = []
    for found, kinds in ((weights, "f"), (slots or (), "iuf")):
        for dataset, shape in found:
            _check_dataset(path, dataset, shape, kinds)
            datasets.append(dataset)
    if sum(_nbytes(dataset) for dataset in datasets) > size:
        raise FileRefused(path, "its arrays claim to be larger than the file")
    arrays: list[Array] = [np.asarray(dataset[()]) for dataset in datasets]
    return Contents(arrays[: len(weights)], None if slots is None else arrays[len(weights) :])


def _check_dataset(path: str, dataset: Any, shape: tuple[int, ...], kinds: str) -> None:
    place = dataset.name.lstrip("/")
    if dataset.shape != shape:
        raise FileRefused(path, f"{place} has shape {dataset.shape}, the model needs {shape}")
    if dataset.dtype.kind not in kinds:
        raise FileRefused(path, f"{place} is of type {dataset.dtype}")
    if dataset.id.get_storage_size() < _nbytes(dataset):
        raise FileRefused(path, f"{place} claims to be larger than what is stored of it")


def _nbytes(dataset: Any) -> int:
    return int(dataset.size) * int(dataset.dtype.itemsize)
