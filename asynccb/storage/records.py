"""What goes into a model file and what comes out of it, free of HDF5."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]

ALIGNMENT = 64  # bytes; every array of a file starts on a multiple of it

FORMAT = 1
"""Version of what is ours in a file. One of a higher version is refused; the first files had no number."""

LEARNING_RATE = "asynccb: learning rate"
"""Stands in a layout's ``training_config`` for the number that changes from save to save."""


class ArraySpec(NamedTuple):
    """Shape and dtype (``"<f4"``) of an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class LayerSpec(NamedTuple):
    """One layer: its name, the name of its group (class in snake case, numbered), its weights by name."""

    name: str
    group: str
    weights: tuple[tuple[str, ArraySpec], ...]


@dataclass(frozen=True)
class ModelLayout:
    """All of a model file that is the same in every save of a training.

    Attributes:
        model_name: name of the model, part of the older layout's paths.
        model_config: architecture, JSON.
        training_config: how it was compiled, JSON, with :data:`LEARNING_RATE` in place of the learning rate;
            None leaves it out.
        layers: in order.
        optimizer: iteration, learning rate, slots; None leaves it out.
        order: in which the arrays lie in the file, as indices into :meth:`specs`.
    """

    model_name: str
    model_config: str
    training_config: str | None
    layers: tuple[LayerSpec, ...]
    optimizer: tuple[ArraySpec, ...] | None
    order: tuple[int, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept, because a layout of thousands of arrays is looked up at every save.
        content = (self.model_name, self.model_config, self.training_config, self.layers, self.optimizer)
        object.__setattr__(self, "_hash", hash((content, self.order)))

    def __hash__(self) -> int:
        return self._hash

    def specs(self) -> list[ArraySpec]:
        """All arrays: the weights in order, then the optimizer's."""
        weights = [spec for layer in self.layers for _, spec in layer.weights]
        return weights + list(self.optimizer or ())


class ModelFile(NamedTuple):
    """All that a model file holds.

    Attributes:
        layout: names, shapes, configuration.
        memory: the arrays, in the layout's ``order``. One that is flat may hold several neighbours, each of
            which starts on a multiple of :data:`ALIGNMENT` bytes in it, with zeros in between and up to its
            end. Arrays without elements have no place here.
        learning_rate: the one of the moment; only with a ``training_config``.
        extra: what is ours alone, a tree of plain data (``storage.packing``) without the key ``format``;
            empty leaves it out.
    """

    layout: ModelLayout
    memory: tuple[Array, ...]
    learning_rate: float | None
    extra: Mapping[str, Any]

    def arrays(self) -> list[Array]:
        """The arrays one by one, in the order of :meth:`ModelLayout.specs`; views where they can be."""
        specs = self.layout.specs()
        found = {
            index: np.empty(spec.shape, spec.dtype) for index, spec in enumerate(specs) if not spec.nbytes
        }
        waiting = [index for index in reversed(self.layout.order) if specs[index].nbytes]
        for piece in self.memory:
            at = 0
            while at < piece.nbytes and waiting:
                index = waiting.pop()
                found[index] = _cut(piece, at, specs[index])
                at += padded(specs[index].nbytes)
        if len(found) != len(specs):
            raise ValueError(f"{len(found)} arrays are given, the layout has {len(specs)}")
        return [found[index] for index in range(len(specs))]


def _cut(piece: Array, at: int, spec: ArraySpec) -> Array:
    if piece.nbytes == spec.nbytes:
        return piece.reshape(spec.shape)
    return piece.reshape(-1).view(np.uint8)[at : at + spec.nbytes].view(spec.dtype).reshape(spec.shape)


def padded(nbytes: int) -> int:
    """The bytes that an array takes, so that the next one starts on a multiple of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        model_config: None in files of weights that others wrote.
        training_config: None where there is none.
        extra: what is ours alone; empty where there is none.
    """

    model_config: dict[str, Any] | None
    training_config: dict[str, Any] | None
    extra: dict[str, Any]


class Expected(NamedTuple):
    """The shapes that a file must hold, exactly.

    Attributes:
        layers: group -> shapes of its weights.
        optimizer: shapes of the optimizer's arrays; None does not look at them.
        names: where these arrays are in a file of the older layout, which others write; None where there can
            be no such file. An optimizer that has not trained yet may be missing then.
    """

    layers: Mapping[str, tuple[tuple[int, ...], ...]]
    optimizer: tuple[tuple[int, ...], ...] | None
    names: Names | None = None


class Names(NamedTuple):
    """What the arrays of a model are called in the older layout, which knows no numbers.

    Attributes:
        layers: name of a layer, and of its weights, in the order of :attr:`Expected.layers`.
        slots: for each array of the optimizer behind the first two: the slot, and the index of its weight
            among all weights.
    """

    layers: tuple[tuple[str, tuple[str, ...]], ...]
    slots: tuple[tuple[str, int], ...]


class Contents(NamedTuple):
    """The arrays of a file: weights in order, and the optimizer's where they were expected and are there."""

    weights: list[Array]
    optimizer: list[Array] | None
