"""What goes into a model file and what comes out of it, free of HDF5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]


class LayerArrays(NamedTuple):
    """One layer: its name, the name of its group (class in snake case, numbered), its weights by name."""

    name: str
    group: str
    weights: tuple[tuple[str, Array], ...]


class ModelFile(NamedTuple):
    """All that a model file holds.

    Attributes:
        model_name: name of the model, part of the older layout's paths.
        model_config: architecture, JSON.
        training_config: how it was compiled, JSON; None leaves it out.
        layers: in order.
        optimizer: iteration, learning rate, slots; None leaves it out.
        extra: JSON that is ours alone.
    """

    model_name: str
    model_config: Mapping[str, Any]
    training_config: Mapping[str, Any] | None
    layers: tuple[LayerArrays, ...]
    optimizer: tuple[Array, ...] | None
    extra: Mapping[str, Any]


class Header(NamedTuple):
    """The JSON of a file; ``model_config`` is None in files of weights that others wrote."""

    model_config: dict[str, Any] | None
    training_config: dict[str, Any] | None
    extra: dict[str, Any]


class Expected(NamedTuple):
    """The shapes that a file must hold, exactly.

    Attributes:
        layers: group -> shapes of its weights.
        optimizer: shapes of the optimizer's arrays; None does not look at them.
    """

    layers: Mapping[str, tuple[tuple[int, ...], ...]]
    optimizer: tuple[tuple[int, ...], ...] | None


class Contents(NamedTuple):
    """The arrays of a file: weights in order, and the optimizer's where they were expected and are there."""

    weights: list[Array]
    optimizer: list[Array] | None
