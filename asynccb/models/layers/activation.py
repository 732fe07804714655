"""Activation: a function applied to each element (softmax: to each row)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.models.activations import Function, get
from asynccb.models.arrays import aligned
from asynccb.models.layers.base import Layer, Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array


class Activation(Layer):
    """Applies an activation function; input and output have the same shape.

    Args:
        activation: a name such as ``"relu"``, ``"softmax"``, ``"gelu"``; the constants are those of Keras 3.
        name: see :class:`Layer`.
        input_shape: see :class:`Layer`.

    Raises:
        ArgumentError: for an unknown name; it suggests the nearest ones.
    """

    def __init__(
        self, activation: str, name: str | None = None, input_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(name, input_shape)
        self.activation = get(activation).name

    def operations(self) -> list[Operation[Any]]:
        return [Apply(get(self.activation))]

    def settings(self) -> dict[str, Any]:
        return {"activation": self.activation}


class _Buffers(NamedTuple):
    y: Array
    scratch: Array


class Apply(Operation[_Buffers]):
    """The operation of an activation function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self._forward, self._backward = function.forward, function.backward
        self._shape: Any = None

    def allocate(self, shape: Any, dtype: Any) -> _Buffers:
        return _Buffers(aligned(shape, dtype), aligned(shape, dtype))

    def infer(self, x: Array) -> Array:
        if x.shape != self._shape:
            self._shape, (self._y, self._scratch) = x.shape, self.buffers(x.shape, x.dtype)
        self._x, y = x, self._y
        self._forward(x, y)
        return y

    def back(self, g: Array) -> Array:
        self._backward(g, self._x, self._y, self._scratch)
        return g
