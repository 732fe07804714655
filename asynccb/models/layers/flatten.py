"""Flatten: each sample becomes one row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from asynccb.models.layers.base import Layer, Operation

if TYPE_CHECKING:
    from asynccb.models.arrays import Array
    from asynccb.models.layers.base import Shape


class Flatten(Layer):
    """Gives each sample the shape (number of its elements,).

    Args:
        input_shape: see :class:`Layer`.
        name: see :class:`Layer`.
    """

    def output_shape(self, input_shape: Shape) -> Shape:
        return (math.prod(input_shape),)

    def operations(self) -> list[Operation[Any]]:
        return [_Reshape()]


class _Reshape(Operation[None]):
    def infer(self, x: Array) -> Array:
        self._shape = x.shape
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def back(self, g: Array) -> Array:
        return g.reshape(self._shape)
