"""The table that ``model.summary()`` prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asynccb.models.layers import Layer


def summary_lines(name: str, layers: Sequence[Layer], input_shape: tuple[int, ...] | None) -> Iterator[str]:
    """The lines of the summary; shapes are ``?`` until the model is built."""
    shape = input_shape
    rows = []
    for layer in layers:
        shape = None if shape is None else layer.output_shape(shape)
        count = sum(math.prod(weight.shape) for weight in layer.weights)
        shown = "?" if shape is None else str((None, *shape))
        rows.append((f"{layer.name} ({type(layer).__name__})", shown, f"{count:,}"))
    heads = ("Layer (type)", "Output shape", "Parameters")
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(3)]
    rule = "-" * (sum(widths) + 4)
    yield f"Model: {name}"
    yield rule
    for left, middle, right in [heads, *rows]:
        yield f"{left:<{widths[0]}}  {middle:<{widths[1]}}  {right:>{widths[2]}}"
        if left == heads[0]:
            yield rule
    yield rule
    weights = [weight for layer in layers for weight in layer.weights]
    total = sum(math.prod(weight.shape) for weight in weights)
    trainable = sum(math.prod(weight.shape) for weight in weights if weight.trainable)
    yield f"Parameters: {total:,}, trainable: {trainable:,}"
