"""Which arrays hold the state of a model, where each tensor lies in them, and in which order they change.

Dense weights, gradients and slots are one flat array each: an update is a few numpy calls however many
tensors there are, and so is a copy. A table of which a batch touches few rows has arrays of its own, and so
have the weights that no batch changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.models.arrays import padded_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asynccb.models.arrays import Array
    from asynccb.models.network import Network
    from asynccb.models.updates import Optimizer

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


class Run(NamedTuple):
    """Tensors that lie one behind the other in one array.

    Attributes:
        array: its index.
        start, stop: its elements from the first tensor to the end of the last one's padding.
        tensors: indices of the tensors, in their order.
        between: the elements of the run that belong to no tensor, counted from ``start``.
    """

    array: int
    start: int
    stop: int
    tensors: tuple[int, ...]
    between: Array


class Tensors(Sequence[Any]):
    """The tensors at ``places`` of ``arrays``; the views are cut when one is first asked for.

    Args:
        arrays: where they lie.
        places: of each.
        runs: all of them once, in the order of a file.
    """

    def __init__(self, arrays: Sequence[Array], places: Sequence[Place], runs: Sequence[Run]) -> None:
        self._arrays, self._places, self._runs = arrays, places, runs
        self._views: list[Array] | None = None

    def pieces(self) -> Iterator[Array]:
        """The memory of all of them, in the order of the runs: a run whole if nothing but zeros lies between
        its tensors, else tensor by tensor. What goes into a file must not depend on what an update left
        there."""
        for run in self._runs:
            flat = self._arrays[run.array].reshape(-1)[run.start : run.stop]
            if flat[run.between].any():
                yield from (self[index] for index in run.tensors)
            else:
                yield flat

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
        runs: of the weights, the trainable ones first.
        slots: slot name -> place of the slot of each trainable weight.
        slot_runs: slot name -> runs of its places.
        through_moving: number of segments up to the last one of the running means.
    """

    arrays: tuple[Array, ...]
    segments: tuple[Segment, ...]
    constants: int | None
    weights: tuple[Place, ...]
    runs: tuple[Run, ...]
    slots: dict[str, tuple[Place, ...]]
    slot_runs: dict[str, tuple[Run, ...]]
    through_moving: int


def lay_out(network: Network, optimizer: Optimizer | None) -> Memory:
    """Where everything lies now."""
    slots = {} if optimizer is None else optimizer.flat_slots
    row_slots = {} if optimizer is None else optimizer.table_slots
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
    learned = [at for at, (kind, _, _) in enumerate(where) if kind in ("dense", "table")]
    order = learned + [at for at in range(len(where)) if at not in set(learned)]
    weights = tuple(Place(index[kind, ""], start, shape) for kind, start, shape in where)
    slot_places = {
        slot: tuple(
            Place(index[kind, slot], start, shape) for kind, start, shape in (where[at] for at in learned)
        )
        for slot in slots
    }
    sizes = [array.size for array in found.values()]
    dtype = network.params.dtype
    return Memory(
        arrays=tuple(found.values()),
        segments=tuple(segments),
        constants=index.get(("constant", "")),
        weights=weights,
        runs=runs_of(weights, order, sizes, dtype),
        slots=slot_places,
        slot_runs={
            slot: runs_of(places, range(len(places)), sizes, dtype) for slot, places in slot_places.items()
        },
        through_moving=through_moving,
    )


def runs_of(
    places: Sequence[Place], order: Sequence[int], sizes: Sequence[int], dtype: Any
) -> tuple[Run, ...]:
    """The places in ``order``, neighbours together; ``sizes`` are those of the arrays, in elements. Tensors
    without elements are left out."""
    runs: list[Run] = []
    for index in order:
        array, start, shape = places[index]
        if not math.prod(shape):
            continue
        stop = min(start + padded_size(shape, dtype), sizes[array])
        between = np.arange(start + math.prod(shape), stop)
        last = runs[-1] if runs else None
        if last is not None and (last.array, last.stop) == (array, start):
            gaps = np.concatenate([last.between, between - last.start])
            runs[-1] = Run(array, last.start, stop, (*last.tensors, index), gaps)
        else:
            runs.append(Run(array, start, stop, (index,), between - start))
    return tuple(runs)


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
