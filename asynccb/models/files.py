"""From a model's state to the records of a file, and back; ``storage.hdf5`` does the rest."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.memory import Tensors
from asynccb.models.names import snake_case
from asynccb.storage.archive import is_archive, unpacked
from asynccb.storage.hdf5 import (
    LEARNING_RATE,
    ArraySpec,
    Expected,
    LayerSpec,
    ModelFile,
    ModelLayout,
    Names,
    read_model_file,
    write_model_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer
    from asynccb.models.state import SequentialState
    from asynccb.storage.hdf5 import Header

EXTENSIONS = (".h5", ".hdf5")  # ".weights.h5" ends in the first


class WeightLayout(NamedTuple):
    """Name and shape of one weight."""

    name: str
    shape: tuple[int, ...]
    trainable: bool


class LayerLayout(NamedTuple):
    """One layer: its name, the name of its group in the file, its weights."""

    name: str
    group: str
    weights: tuple[WeightLayout, ...]


def group_names(layers: Sequence[Layer]) -> list[str]:
    """Groups are named by class, numbered per class, as Keras 3 does."""
    counts: dict[str, int] = {}
    names = []
    for layer in layers:
        kind = snake_case(type(layer).__name__)
        number = counts[kind] = counts.get(kind, -1) + 1
        names.append(f"{kind}_{number}" if number else kind)
    return names


def layout_of(layers: Sequence[Layer]) -> tuple[LayerLayout, ...]:
    """The layout of built layers."""
    found: list[LayerLayout] = []
    for layer, group in zip(layers, group_names(layers), strict=True):
        weights = tuple(WeightLayout(weight.name, weight.shape, weight.trainable) for weight in layer.weights)
        found.append(LayerLayout(layer.name, group, weights))
    return tuple(found)


def optimizer_order(slots: Sequence[str], weights: int, *, by_variable: bool) -> list[tuple[str, int]]:
    """The order of slot arrays in a file: (slot, index of the trainable weight).

    Keras keeps all slots of one weight together for Adam and AdamW, and slot by slot for the others.
    """
    if by_variable:
        return [(slot, index) for index in range(weights) for slot in slots]
    return [(slot, index) for slot in slots for index in range(weights)]


def check_extension(path: str | os.PathLike[str]) -> str:
    """The path as a string.

    Raises:
        ArgumentError: unless it ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
    """
    name = os.fspath(path)
    if not isinstance(name, str) or not name.lower().endswith(EXTENSIONS):
        stem = os.path.splitext(str(name))[0]
        allowed = "model files are HDF5 and end in .h5, .hdf5 or .weights.h5"
        raise ArgumentError("path", name, allowed, f'For example "{stem}.weights.h5"')
    return name


def save_state(
    state: SequentialState,
    path: str | os.PathLike[str],
    *,
    weights_only: bool,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state; see :meth:`SequentialState.save`."""
    write_model_file(check_extension(path), to_records(state, weights_only=weights_only, extra=extra))


def to_records(
    state: SequentialState, *, weights_only: bool, extra: Mapping[str, Any] | None = None
) -> ModelFile:
    """The records of a state's file; its arrays are the state's own."""
    held = None if weights_only or state.compiled is None else state.optimizer
    plan = _plan(
        _Same(state.config),
        _Same(state.layout),
        _Same(None if held is None else state.compiled),
        () if held is None else tuple(held.slots),
        held is not None and held.by_variable,
        state.dtype,
    )
    memory = [*_pieces(state.tensors, plan.weights)]
    if held is not None:
        memory += [np.array(held.iterations, np.int32), np.array(held.learning_rate, np.float32)]
        for slot in held.slots.values():
            memory += _pieces(slot, range(len(slot)))
    return ModelFile(
        plan.layout,
        tuple(memory),
        learning_rate=None if held is None else held.learning_rate,
        extra={} if weights_only else {"random": state.random, **(extra or {})},
    )


class _Plan(NamedTuple):
    layout: ModelLayout
    weights: list[int]
    """The weights in the order of the file: those that the optimizer has slots for first."""


class _Same:
    """A key that is equal for the very same object alone: comparing configs costs more than saving them."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@lru_cache(maxsize=8)
def _plan(
    config: _Same,
    layout: _Same,
    compiled: _Same,
    slots: tuple[str, ...],
    by_variable: bool,
    dtype: np.dtype[Any],
) -> _Plan:
    """What is the same for all files of a training."""
    layers: tuple[LayerLayout, ...] = layout.it
    weights = [weight for layer in layers for weight in layer.weights]
    trainable = [index for index, weight in enumerate(weights) if weight.trainable]
    frozen = [index for index, weight in enumerate(weights) if not weight.trainable]
    order, optimizer = trainable + frozen, None
    if compiled.it is not None:
        placed = optimizer_order(slots, len(trainable), by_variable=by_variable)
        shapes = [weights[trainable[index]].shape for _, index in placed]
        optimizer = (
            ArraySpec((), np.dtype(np.int32).str),
            ArraySpec((), np.dtype(np.float32).str),
            *(ArraySpec(shape, dtype.str) for shape in shapes),
        )
        first = len(weights)
        place = {which: first + 2 + index for index, which in enumerate(placed)}
        order += [first, first + 1]
        order += [place[slot, index] for slot in slots for index in range(len(trainable))]
    file = ModelLayout(
        model_name=str(config.it["config"]["name"]),
        model_config=_json(config.it),
        training_config=None if optimizer is None else _json(compiled.it.training_config(LEARNING_RATE)),
        layers=tuple(
            LayerSpec(
                layer.name,
                layer.group,
                tuple((weight.name, ArraySpec(weight.shape, dtype.str)) for weight in layer.weights),
            )
            for layer in layers
        ),
        optimizer=optimizer,
        order=tuple(order),
    )
    return _Plan(file, trainable + frozen)


def _pieces(tensors: Sequence[Array], order: Sequence[int]) -> Iterator[Array]:
    if isinstance(tensors, Tensors):
        yield from tensors.pieces()
    else:
        yield from (tensors[index] for index in order if tensors[index].size)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def load_weights(path: str | os.PathLike[str], layout: Sequence[LayerLayout]) -> list[Array]:
    """The weights in a file, which must hold exactly those of ``layout``.

    Raises:
        FileRefused: for a file that is damaged, not safe, or of other shapes.
    """
    name = os.fspath(path)
    if is_archive(name):
        with unpacked(name) as (_, weights):
            return read_model_file(weights, lambda header: expected(layout)).weights
    return read_model_file(name, lambda header: expected(layout, names=names_of(layout))).weights


def expected(
    layout: Sequence[LayerLayout],
    optimizer: Sequence[tuple[int, ...]] | None = None,
    names: Names | None = None,
) -> Expected:
    """What a file must hold for a model of this layout."""
    shapes = {layer.group: tuple(weight.shape for weight in layer.weights) for layer in layout}
    return Expected(shapes, None if optimizer is None else tuple(optimizer), names)


def names_of(layout: Sequence[LayerLayout], slots: Sequence[tuple[str, int]] = ()) -> Names:
    """What the arrays are called in a file that Keras wrote in its older layout.

    Args:
        layout: of the model.
        slots: of its optimizer, in the order of a file: (slot, index of the trainable weight).
    """
    trainable = [index for index, w in enumerate(w for layer in layout for w in layer.weights) if w.trainable]
    layers = tuple((layer.name, tuple(weight.name for weight in layer.weights)) for layer in layout)
    return Names(layers, tuple((slot, trainable[index]) for slot, index in slots))


def unpack_random(header: Header) -> dict[str, Any]:
    """The random streams that a file holds; empty where it holds none."""
    random = header.extra.get("random")
    return random if isinstance(random, dict) else {}
