"""Dense: ``activation(x @ kernel + bias)``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.activations import get as get_activation
from asynccb.models.arrays import aligned
from asynccb.models.initializers import get as get_initializer
from asynccb.models.layers.activation import Apply
from asynccb.models.layers.base import Layer, Operation, Weight, WeightSpec, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers.base import Shape


class Dense(Layer):
    """A fully connected layer; on samples of several axes it acts on the last one.

    Args:
        units: size of the output.
        activation: name of an activation function; None is none.
        use_bias: whether a bias is added.
        kernel_initializer: name of an initializer.
        bias_initializer: name of an initializer.
        input_dim: the same as ``input_shape=(input_dim,)``.
        input_shape: see :class:`Layer`.
        name: see :class:`Layer`.
        trainable: see :class:`Layer`.

    Raises:
        ArgumentError: for unknown names and sizes that are no positive whole numbers.
    """

    def __init__(
        self,
        units: int,
        activation: str | None = None,
        use_bias: bool = True,
        kernel_initializer: str = "glorot_uniform",
        bias_initializer: str = "zeros",
        input_dim: int | None = None,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        if input_dim is not None:
            input_shape = (whole("input_dim", input_dim),)
        super().__init__(name, input_shape, trainable)
        self.units = whole("units", units)
        self.activation = get_activation(activation).name
        self.use_bias = bool(use_bias)
        self.kernel_initializer, self.bias_initializer = kernel_initializer, bias_initializer
        get_initializer(kernel_initializer)
        get_initializer(bias_initializer, "bias_initializer")

    def weight_specs(self, input_shape: Shape) -> list[WeightSpec]:
        if not input_shape:
            raise ArgumentError("input_shape", input_shape, f"{self.name or 'Dense'} needs at least one axis")
        kernel = WeightSpec("kernel", (input_shape[-1], self.units), self.kernel_initializer)
        return [kernel, WeightSpec("bias", (self.units,), self.bias_initializer)][: 1 + self.use_bias]

    def output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], self.units)

    def operations(self) -> list[Operation[Any]]:
        affine: Operation[Any] = Affine(*self.weights)
        if self.activation == "linear":
            return [affine]
        return [affine, Apply(get_activation(self.activation))]

    def settings(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "activation": self.activation,
            "use_bias": self.use_bias,
            "kernel_initializer": self.kernel_initializer,
            "bias_initializer": self.bias_initializer,
            "trainable": self.trainable,
        }


class _Buffers(NamedTuple):
    out: Array
    g_in: Array
    ones: Array


class Affine(Operation[_Buffers]):
    """The operation ``x @ kernel + bias``."""

    def __init__(self, kernel: Weight, bias: Weight | None = None) -> None:
        super().__init__()
        self._w, self._w_turned, self._gw = kernel.value, kernel.value.T, kernel.grad
        self._b: Array | None = None
        self._gb: Array | None = None
        if bias is not None:
            self._b, self._gb = bias.value, bias.grad
        self._shape: Any = None

    def allocate(self, shape: Any, dtype: Any) -> _Buffers:
        rows, (fan_in, units) = math.prod(shape[:-1]), self._w.shape
        return _Buffers(
            aligned((rows, units), dtype), aligned((rows, fan_in), dtype), aligned(rows, dtype, fill=1.0)
        )

    def infer(self, x: Array) -> Array:
        shape = x.shape
        if shape != self._shape:
            self._shape, (self._out, self._g_in, self._ones) = shape, self.buffers(shape, x.dtype)
        flat = self._x = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        out = flat.dot(self._w, self._out)
        if self._b is not None:
            np.add(out, self._b, out=out)
        return out if len(shape) == 2 else out.reshape(*shape[:-1], -1)

    def back(self, g: Array) -> Array:
        shape = g.shape
        flat = g if len(shape) == 2 else g.reshape(-1, shape[-1])
        if self._gw is not None:
            self._x.T.dot(flat, self._gw)
        if self._gb is not None:
            self._ones.dot(flat, self._gb)  # the sum over the rows; BLAS does it faster than a reduction
        if not self.needs_input_gradient:
            return g
        g_in = flat.dot(self._w_turned, self._g_in)
        return g_in if len(shape) == 2 else g_in.reshape(*shape[:-1], -1)
