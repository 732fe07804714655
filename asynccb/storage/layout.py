"""The groups, names and attributes of a model file, as h5py makes them.

The layout is one that Keras 3 opens under every name: each weight is stored once, under ``layers``, and
hard-linked under ``model_weights`` for the older reader::

    /  @model_config @training_config @keras_version @backend
    vars                                             empty
    layers/<class>_<n>/vars/<index>                  the weights
    model_weights/<layer>/<model>/<layer>/<weight>   hard links to them
    optimizer/vars/<index>                           iteration, learning rate, slots
    asynccb/state                                    what is ours: a packed tree, padded with spaces

``optimizer_weights`` is never written: with it Keras builds an optimizer without slots. Keras takes the
learning rate of a whole model from ``training_config``, that of weights from ``optimizer/vars/1``: so it is
in both.

Everything here runs on the thread of HDF5.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.storage.packing import pack
from asynccb.storage.records import FORMAT, LEARNING_RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from asynccb.storage.records import ModelLayout

    Buffer = bytes | memoryview

STATE = "asynccb/state"
SMALLEST_STATE = 1024  # bytes; a larger one takes the next power of two, so that the layout seldom changes

# The oldest format that the library writes: every version of it can read the file, and its headers carry no
# checksums over what differs from save to save.
OLDEST = ("earliest", "v110")

_SPACES = memoryview(b" " * (1 << 16))

_KERAS_VERSION = "3.0.0"  # readers choose the conversion of old weights by it
_ATTRIBUTE_LIMIT = 60_000  # bytes; an array attribute must stay below 64 KiB

HOLE = json.dumps(LEARNING_RATE)
"""What a layout's JSON has where the learning rate goes. 24 characters, as many as the longest float."""


def build(file: Any, layout: ModelLayout, training_config: str | None, dataset: Callable[..., Any]) -> None:
    """Fills an empty file.

    Args:
        file: an h5py file.
        layout: what to build.
        training_config: the attribute of this name.
        dataset: called with the group, the name, and the index of the array in ``layout.specs()``; makes the
            dataset and returns it.
    """
    file.attrs["backend"] = "numpy"
    file.attrs["keras_version"] = _KERAS_VERSION
    file.attrs["model_config"] = layout.model_config
    if training_config is not None:
        file.attrs["training_config"] = training_config
    file.create_group("vars")
    layers, links = file.create_group("layers"), file.create_group("model_weights")
    _names(links, "layer_names", [layer.name for layer in layout.layers])
    links.attrs["backend"] = "numpy"
    links.attrs["keras_version"] = _KERAS_VERSION
    count = 0
    for layer in layout.layers:
        stored = layers.create_group(layer.group).create_group("vars")
        linked = links.create_group(layer.name)
        paths = [f"{layout.model_name}/{layer.name}/{name}" for name, _ in layer.weights]
        _names(linked, "weight_names", paths)
        for index, path in enumerate(paths):
            linked[path] = dataset(stored, str(index), count)
            count += 1
    if layout.optimizer is not None:
        variables = file.create_group("optimizer").create_group("vars")
        for index in range(len(layout.optimizer)):
            dataset(variables, str(index), count + index)


def paths(layout: ModelLayout) -> Iterator[str]:
    """Where :func:`build` puts the arrays, in the order of ``layout.specs()``."""
    for layer in layout.layers:
        for index in range(len(layer.weights)):
            yield f"layers/{layer.group}/vars/{index}"
    for index in range(len(layout.optimizer or ())):
        yield f"optimizer/vars/{index}"


def learning_rate_text(rate: float | None) -> str:
    """A number in JSON that takes the place of :data:`~asynccb.storage.records.LEARNING_RATE`, as long as it
    is with its quotes."""
    return json.dumps(rate).ljust(len(HOLE))


def fill_in(training_config: str, rate: float | None) -> str:
    """The ``training_config`` of a file: whatever the rate is, it is as long as before."""
    return training_config.replace(HOLE, learning_rate_text(rate))


def state_pieces(extra: Mapping[str, Any]) -> list[Buffer]:
    """The content of ``asynccb/state`` in pieces, the version of the format in front; none where there is
    nothing. Together they are as long as a power of two. Arrays are not copied."""
    if not extra:
        return []
    pieces = pack({"format": FORMAT, **extra})
    size = sum(map(len, pieces))
    room = max(SMALLEST_STATE, 1 << (size - 1).bit_length()) - size
    while room:
        pieces.append(_SPACES[:room])
        room -= len(pieces[-1])
    return pieces


def _names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """Names as an array attribute; a long list in numbered pieces ``<attribute>0``, ... as Keras has it."""
    array = np.array([name.encode() for name in names]) if names else np.array([], np.float64)
    pieces = -(-array.nbytes // _ATTRIBUTE_LIMIT)
    if pieces <= 1:
        group.attrs[attribute] = array
        return
    for number, piece in enumerate(np.array_split(array, pieces)):
        group.attrs[f"{attribute}{number}"] = piece
