"""Which arrays hold the state of a model, where each tensor lies in them, and in which order they change.

Dense weights, gradients and slots are one flat array each: an update is a few numpy calls however many
tensors there are, and so is a copy. A table of which a batch touches few rows has arrays of its own, and so
have the weights that no batch changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.models.arrays import padded_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asynccb.models.arrays import Array
    from asynccb.models.network import Network
    from asynccb.models.optimizers import Optimizer

    Segment = tuple[int, int, int]

PART = 4 << 20
"""Bytes that are overwritten between two questions to the gate: small beside a model whose copy takes long,
large beside what a question costs."""


class Place(NamedTuple):
    """Where a tensor lies: in the array of this index, from this element on."""

    array: int
    start: int
    shape: tuple[int, ...]

    def of(self, arrays: Sequence[Array]) -> Array:
        """The tensor, as a view of its array."""
        flat = arrays[self.array].reshape(-1)
        return flat[self.start : self.start + math.prod(self.shape)].reshape(self.shape)


class Tensors(Sequence[Any]):
    """The tensors at ``places`` of ``arrays``; the views are cut when one is first asked for."""

    def __init__(self, arrays: Sequence[Array], places: Sequence[Place]) -> None:
        self._arrays, self._places = arrays, places
        self._views: list[Array] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if self._views is None:
            self._views = [place.of(self._arrays) for place in self._places]
        return self._views[index]

    def __reduce__(self) -> Any:
        return list, (list(self),)


class Memory(NamedTuple):
    """The state of a bound network and its optimizer.

    Attributes:
        arrays: the live arrays. A table and its slots come first: the optimizer counts on it.
        segments: (array, start, stop) along axis 0, in the order in which an update overwrites them.
        constants: index of the array that no batch changes, None if there is none.
        weights: place of each weight.
        slots: slot name -> place of the slot of each trainable weight.
        through_moving: number of segments up to the last one of the running means.
    """

    arrays: tuple[Array, ...]
    segments: tuple[Segment, ...]
    constants: int | None
    weights: tuple[Place, ...]
    slots: dict[str, tuple[Place, ...]]
    through_moving: int


def lay_out(network: Network, optimizer: Optimizer | None) -> Memory:
    """Where everything lies now."""
    slots = {} if optimizer is None else optimizer.slots
    row_slots = {} if optimizer is None else optimizer.row_slots
    found: dict[tuple[str, str], Array] = {}  # (kind of weight, slot or "" for the weight itself)
    if network.table is not None:
        found["table", ""] = network.table.value
        found.update({("table", slot): array for slot, array in row_slots.items()})
    found["dense", ""] = network.params
    found.update({("dense", slot): array for slot, array in slots.items()})
    found["moving", ""], found["constant", ""] = network.moving, network.constants
    found = {key: array for key, array in found.items() if array.size}
    index = {key: number for number, key in enumerate(found)}

    where = list(_starts(network))
    segments = _overwritten(index, optimizer, network) + _in_parts(found, index, "moving")
    through_moving = len(segments)
    segments += _in_parts(found, index, "table") + _in_parts(found, index, "constant")
    trainable = [(kind, start, shape) for kind, start, shape in where if kind in ("dense", "table")]
    return Memory(
        arrays=tuple(found.values()),
        segments=tuple(segments),
        constants=index.get(("constant", "")),
        weights=tuple(Place(index[kind, ""], start, shape) for kind, start, shape in where),
        slots={
            slot: tuple(Place(index[kind, slot], start, shape) for kind, start, shape in trainable)
            for slot in slots
        },
        through_moving=through_moving,
    )


def _starts(network: Network) -> Iterator[Any]:
    at = dict.fromkeys(network.kinds, 0)
    for weight, kind in zip(network.weights, network.kinds, strict=True):
        yield kind, at[kind], weight.shape
        at[kind] += padded_size(weight.shape, network.params.dtype)


def _overwritten(index: dict[tuple[str, str], int], optimizer: Optimizer | None, network: Network) -> Any:
    """The dense weights with their slots, in the groups in which the optimizer overwrites them."""
    own = [number for (kind, _), number in index.items() if kind == "dense"]
    spans = parts(network.params) if optimizer is None else optimizer.groups
    return [(number, start, stop) for start, stop in spans for number in own]


def _in_parts(found: dict[tuple[str, str], Array], index: dict[tuple[str, str], int], kind: str) -> Any:
    return [
        (index[key], start, stop)
        for key, array in found.items()
        if key[0] == kind
        for start, stop in parts(array)
    ]


def parts(array: Array, arrays: int = 1, multiple: int = 1) -> list[tuple[int, int]]:
    """``array`` along axis 0 in pieces of about ``PART`` bytes.

    Args:
        array: what is divided.
        arrays: how many of its size share the bytes of a piece.
        multiple: every piece but the last is a multiple of so many rows.
    """
    row = max(1, array.nbytes // max(1, len(array))) * arrays * multiple
    size = max(1, PART // row) * multiple
    return [(start, min(start + size, len(array))) for start in range(0, len(array), size)]
