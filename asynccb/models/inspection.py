"""What goes on inside a Sequential, for looking at it: the outputs of its layers, the gradients of a batch.

Nothing of the model's state changes by being looked at: no update, no step of a running mean, no draw from a
random stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer
    from asynccb.models.network import Network
    from asynccb.models.step import Step


def activations(network: Network, layers: Sequence[Layer], x: Array) -> dict[str, Array]:
    """Layer name -> its output for ``x``, computed as for a prediction; arrays of their own."""
    with np.errstate(all="ignore"):
        return dict(zip([layer.name for layer in layers], network.outputs(x), strict=True))


def gradients(
    network: Network, step: Step, layers: Sequence[Layer], x: Array, y: Any, sample_weight: Any
) -> dict[str, Array]:
    """Path of each trainable weight -> gradient of the batch's loss, as an update would use it; copies.

    Dropout draws what the next batch will draw: its streams are put back.
    """
    streams = [(layer, state) for layer in layers if (state := layer.random_state()) is not None]
    try:
        step.differentiate(x, y, sample_weight)
    finally:
        for layer, state in streams:
            layer.set_random_state(state)
    return {weight.path: weight.gradient() for weight in network.trainable}
