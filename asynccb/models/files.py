"""From a model's state to the records of a file, and back; ``storage.hdf5`` does the rest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.names import numbered, snake_case
from asynccb.storage.hdf5 import LayerArrays, ModelFile, read_model_file, write_model_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer
    from asynccb.models.state import SequentialState
    from asynccb.storage.hdf5 import Expected, Header

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


def layout_of(layers: Sequence[Layer]) -> tuple[LayerLayout, ...]:
    """The layout of built layers. Groups are named by class, numbered per class, as Keras 3 does."""
    found: list[LayerLayout] = []
    for layer in layers:
        group = numbered(snake_case(type(layer).__name__), {other.group for other in found})
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


def save_state(state: SequentialState, path: str | os.PathLike[str], *, weights_only: bool) -> None:
    """Writes a state; see :meth:`SequentialState.save`."""
    write_model_file(check_extension(path), to_records(state, weights_only=weights_only))


def to_records(state: SequentialState, *, weights_only: bool) -> ModelFile:
    """The records of a state's file."""
    arrays = iter(state.weights().values())
    layers = tuple(
        LayerArrays(layer.name, layer.group, tuple((weight.name, next(arrays)) for weight in layer.weights))
        for layer in state.layout
    )
    training, slots = None, None
    if state.compiled is not None and state.optimizer is not None and not weights_only:
        training = state.compiled.training_config(state.optimizer.learning_rate)
        iteration, rate, *rest = state.optimizer_arrays().values()
        slots = (iteration.astype(np.int32), rate.astype(np.float32), *rest)
    return ModelFile(
        model_name=str(state.config["config"]["name"]),
        model_config=state.config,
        training_config=training,
        layers=layers,
        optimizer=slots,
        extra={} if weights_only else {"random": state.random},
    )


def load_weights(path: str | os.PathLike[str], layout: Sequence[LayerLayout]) -> list[Array]:
    """The weights in a file, which must hold exactly those of ``layout``.

    Raises:
        FileRefused: for a file that is damaged, not safe, or of other shapes.
    """
    contents = read_model_file(os.fspath(path), lambda header: expected(layout))
    return contents.weights


def expected(layout: Sequence[LayerLayout], optimizer: Sequence[tuple[int, ...]] | None = None) -> Expected:
    """What a file must hold for a model of this layout."""
    from asynccb.storage.hdf5 import Expected

    shapes = {layer.group: tuple(weight.shape for weight in layer.weights) for layer in layout}
    return Expected(shapes, None if optimizer is None else tuple(optimizer))


def unpack_random(header: Header) -> dict[str, Any]:
    """The random streams that a file holds; empty where it holds none."""
    random = header.extra.get("random")
    return random if isinstance(random, dict) else {}
