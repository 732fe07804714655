"""The state in a backup, for a model that is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import FileRefused
from asynccb.models import config, optimizers
from asynccb.models.files import expected, optimizer_order, unpack_random
from asynccb.models.state import OptimizerState
from asynccb.storage.hdf5 import read_model_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.files import LayerLayout
    from asynccb.models.updates import Optimizer
    from asynccb.storage.hdf5 import Expected, Header


class Saved(NamedTuple):
    """All that changes in a model while it trains."""

    weights: list[Array]
    optimizer: OptimizerState
    random: dict[str, Any]


def read_saved(
    path: str,
    layout: Sequence[LayerLayout],
    optimizer: Optimizer,
    accept: Callable[[Mapping[str, Any]], object],
) -> Saved:
    """What a sealed file holds for a model of this layout and optimizer.

    Args:
        path: the file.
        layout: of the model.
        optimizer: of the model.
        accept: given what is ours in the file, before any array is read.

    Raises:
        FileRefused: for a file that is damaged, not safe, or of other shapes.
    """
    trainable = [weight.shape for layer in layout for weight in layer.weights if weight.trainable]
    order = optimizer_order(optimizer.slot_names(), len(trainable), by_variable=optimizer.slots_by_variable)
    headers: list[Header] = []

    def expect(header: Header) -> Expected:
        accept(header.extra)
        headers.append(header)
        return expected(layout, [(), (), *(trainable[index] for _, index in order)])

    contents = read_model_file(path, expect, sealed=True)
    (header,) = headers
    if contents.optimizer is None or header.training_config is None:
        raise FileRefused(path, "it holds no state of an optimizer")
    saved = optimizers.from_config(config.compiled_from(header.training_config).optimizer)
    return Saved(
        contents.weights,
        unpack_optimizer(saved, contents.optimizer, len(trainable)),
        unpack_random(header),
    )


def unpack_optimizer(saved: Optimizer, arrays: Sequence[Array], trainable: int) -> OptimizerState:
    """The state of an optimizer from the arrays of a file.

    Args:
        saved: an optimizer of the file's config.
        arrays: iteration, learning rate, slots.
        trainable: number of trainable weights.
    """
    iteration, rate, *rest = arrays
    by_slot: dict[str, list[Any]] = {name: [None] * trainable for name in saved.slot_names()}
    order = optimizer_order(saved.slot_names(), trainable, by_variable=saved.slots_by_variable)
    for (slot, index), array in zip(order, rest, strict=True):
        by_slot[slot][index] = array
    # The array is the config's number rounded to float32; where it is another, somebody set it.
    exact = saved.learning_rate
    with np.errstate(over="ignore"):
        learning_rate = exact if np.float32(exact) == np.float32(rate) else float(rate)
    return OptimizerState(int(iteration), learning_rate, by_slot, saved.slots_by_variable)
