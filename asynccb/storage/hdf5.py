"""HDF5: the one writer of model files, the door to the one reader, and the thread for background saves.

The layout is one that Keras 3 opens under every name: each weight is stored once, under ``layers``, and
hard-linked under ``model_weights`` for the older reader::

    /  @model_config @training_config @keras_version @backend @asynccb_state
    vars                                             empty
    layers/<class>_<n>/vars/<index>                  the weights
    model_weights/<layer>/<model>/<layer>/<weight>   hard links to them
    optimizer/vars/<index>                           iteration, learning rate, slots

``optimizer_weights`` is never written: with it Keras builds an optimizer without slots.

h5py is imported when a file is first touched, and every h5py object lives and dies inside one call: its
release takes the library's global lock, so one that the garbage collector finds later could stop the event
loop for a whole write.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.storage.atomic import atomic_write
from asynccb.storage.reader import read_contents
from asynccb.storage.records import Contents, Expected, Header, LayerArrays, ModelFile
from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Contents",
    "Expected",
    "Header",
    "LayerArrays",
    "ModelFile",
    "hdf5_thread",
    "read_model_file",
    "write_model_file",
]

# Background saves run their h5py work here. The library has one global lock, so a second thread would only
# wait.
hdf5_thread = SerialExecutor("asynccb hdf5")

_KERAS_VERSION = "3.0.0"  # readers choose the conversion of old weights by it
_ATTRIBUTE_LIMIT = 60_000  # bytes; an array attribute must stay below 64 KiB


def write_model_file(path: str | os.PathLike[str], contents: ModelFile) -> None:
    """Writes a model file, atomically and durably. Blocks. Equal contents give equal bytes.

    Raises:
        CheckpointWriteError: if it could not be written; what stood at ``path`` is untouched.
    """
    atomic_write(path, lambda temporary: _write(temporary, contents))


def read_model_file(path: str | os.PathLike[str], expect: Callable[[Header], Expected]) -> Contents:
    """Reads a model file.

    Args:
        path: the file.
        expect: is given the file's JSON and answers with the shapes that the arrays must have. No array is
            read or allocated before; what it raises goes to the caller.

    Raises:
        FileNotFoundError: if there is no such file.
        FileRefused: for a file that is damaged, not safe, or does not hold exactly these shapes.
    """
    return read_contents(os.fspath(path), expect)


def _write(path: str, contents: ModelFile) -> None:
    import h5py

    # The name is ours alone until the rename, so no lock is needed; some network file systems cannot give
    # one.
    with h5py.File(path, "w", locking=False) as file:
        for name, value in _attributes(contents):
            file.attrs[name] = value
        file.create_group("vars")
        layers, links = file.create_group("layers"), file.create_group("model_weights")
        _names(links, "layer_names", [layer.name for layer in contents.layers])
        links.attrs["backend"] = "numpy"
        links.attrs["keras_version"] = _KERAS_VERSION
        for layer in contents.layers:
            stored = layers.create_group(layer.group).create_group("vars")
            linked = links.create_group(layer.name)
            paths = [f"{contents.model_name}/{layer.name}/{name}" for name, _ in layer.weights]
            _names(linked, "weight_names", paths)
            for index, (path_in_layer, (_, array)) in enumerate(zip(paths, layer.weights, strict=True)):
                linked[path_in_layer] = _dataset(stored, index, array)
        if contents.optimizer is not None:
            variables = file.create_group("optimizer").create_group("vars")
            for index, array in enumerate(contents.optimizer):
                _dataset(variables, index, array)


def _dataset(group: Any, index: int, array: Any) -> Any:
    return group.create_dataset(str(index), data=array, track_times=False)


def _attributes(contents: ModelFile) -> Iterator[tuple[str, str]]:
    yield "asynccb_state", _json(contents.extra)
    yield "backend", "numpy"
    yield "keras_version", _KERAS_VERSION
    yield "model_config", _json(contents.model_config)
    if contents.training_config is not None:
        yield "training_config", _json(contents.training_config)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """Names as an array attribute; a long list in numbered pieces ``<attribute>0``, ... as Keras has it."""
    array = np.array([name.encode() for name in names]) if names else np.array([], np.float64)
    pieces = -(-array.nbytes // _ATTRIBUTE_LIMIT)
    if pieces <= 1:
        group.attrs[attribute] = array
        return
    for number, piece in enumerate(np.array_split(array, pieces)):
        group.attrs[f"{attribute}{number}"] = piece
