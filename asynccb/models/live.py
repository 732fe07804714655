"""The state of a Sequential as it lies in memory, ready to be copied beside the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.models.memory import Tensors
from asynccb.models.state import OptimizerState, SequentialState
from asynccb.protocols import LiveState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.config import Compiled
    from asynccb.models.files import LayerLayout
    from asynccb.models.layers import Layer
    from asynccb.models.memory import Memory
    from asynccb.models.optimizers import Optimizer


def live_state(
    memory: Memory,
    version: int,
    blueprint: tuple[dict[str, Any], tuple[LayerLayout, ...]],
    layers: Sequence[Layer],
    optimizer: Optimizer | None,
    compiled: Compiled | None,
    rebuild: Callable[[SequentialState], Any],
) -> LiveState:
    """The live state.

    It holds arrays, layers and optimizer, but not the model: that dies when it is let go of, and not only when
    a collector looks at rings.

    Args:
        memory: where everything lies.
        version: of the weights that no batch changes.
        blueprint: config and layout as they were when the weights were laid out.
        layers: for their random streams.
        optimizer: for its counters; None where there is none.
        compiled: how the model was compiled.
        rebuild: makes a model of a state.
    """
    config, layout = blueprint

    def complete(copies: Sequence[Array]) -> SequentialState:
        made = None
        if optimizer is not None:
            slots = {slot: Tensors(copies, places) for slot, places in memory.slots.items()}
            rate, by_variable = optimizer.learning_rate, optimizer.slots_by_variable
            made = OptimizerState(optimizer.iterations, rate, slots, by_variable)
        return SequentialState(
            config=config,
            compiled=compiled,
            layout=layout,
            weights=Tensors(copies, memory.weights),
            optimizer=made,
            random={layer.name: state for layer in layers if (state := layer.random_state()) is not None},
            rebuild=rebuild,
        )

    versions = [version if index == memory.constants else None for index in range(len(memory.arrays))]
    return LiveState(memory.arrays, memory.segments, versions, complete)
