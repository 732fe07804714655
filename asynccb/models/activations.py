"""Activation functions and their derivatives, by the names and constants of Keras 3.

Each is a pair. ``forward(z, out)`` fills ``out``; ``backward(g, z, y, scratch)`` turns ``g``, the gradient by
the output ``y``, into the gradient by the input ``z``, in place. All arrays of one call have the same shape
and dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asynccb.models.names import lookup

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.models.arrays import Array


class Function(NamedTuple):
    """One activation."""

    name: str
    forward: Callable[[Array, Array], object]
    backward: Callable[[Array, Array, Array, Array], object]


def get(name: str | None) -> Function:
    """The activation of this name; None is ``linear``.

    Raises:
        ArgumentError: for an unknown name; it suggests the nearest ones.
    """
    forward, backward = lookup("activation", "linear" if name is None else name, _TABLE)
    return Function(name or "linear", forward, backward)


def sigmoid(z: Array, out: Array) -> Array:
    """1 / (1 + exp(-z)), written as (1 + tanh(z / 2)) / 2, which overflows nowhere."""
    np.multiply(z, 0.5, out=out)
    np.tanh(out, out=out)
    out += 1.0
    out *= 0.5
    return out


def softmax(z: Array, out: Array) -> Array:
    """exp(z) / sum(exp(z)) over the last axis, shifted by the maximum."""
    np.subtract(z, z.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)
    return out


def _linear(z: Array, out: Array) -> None:
    np.copyto(out, z)


def _linear_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    pass


_ZERO = np.zeros((), np.float32)  # an array is handed over faster than a number; it changes no dtype


def _relu(z: Array, out: Array) -> None:
    np.maximum(z, _ZERO, out=out)


def _relu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.greater(y, _ZERO, out=scratch)  # 1.0 and 0.0: a multiplication is cheaper than a masked write
    np.multiply(g, scratch, out=g)


def _sigmoid_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.subtract(1.0, y, out=scratch)
    scratch *= y
    g *= scratch


def _tanh(z: Array, out: Array) -> None:
    np.tanh(z, out=out)


def _tanh_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.multiply(y, y, out=scratch)
    np.subtract(1.0, scratch, out=scratch)
    g *= scratch


def _softmax_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.multiply(g, y, out=scratch)
    g -= scratch.sum(axis=-1, keepdims=True)
    g *= y


def _elu(z: Array, out: Array) -> None:
    """Clevert et al. 2016, alpha 1."""
    np.minimum(z, 0.0, out=out)
    np.expm1(out, out=out)
    np.maximum(z, out, out=out)


def _elu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.minimum(y, 0.0, out=scratch)
    scratch += 1.0
    g *= scratch


# Klambauer et al. 2017.
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


def _selu(z: Array, out: Array) -> None:
    np.minimum(z, 0.0, out=out)
    np.expm1(out, out=out)
    out *= _SELU_ALPHA
    out += np.maximum(z, 0.0)
    out *= _SELU_SCALE


def _selu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.minimum(z, 0.0, out=scratch)
    np.exp(scratch, out=scratch)
    scratch *= _SELU_SCALE * _SELU_ALPHA
    np.copyto(scratch, _SELU_SCALE, where=z > 0.0)
    g *= scratch


def _softplus(z: Array, out: Array) -> None:
    np.logaddexp(z, 0.0, out=out)


def _softplus_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    g *= sigmoid(z, scratch)


def _softsign(z: Array, out: Array) -> None:
    np.abs(z, out=out)
    out += 1.0
    np.divide(z, out, out=out)


def _softsign_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.abs(z, out=scratch)
    scratch += 1.0
    np.multiply(scratch, scratch, out=scratch)
    g /= scratch


def _exponential(z: Array, out: Array) -> None:
    np.exp(z, out=out)


def _exponential_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    g *= y


def _silu(z: Array, out: Array) -> None:
    sigmoid(z, out)
    out *= z


def _silu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    sigmoid(z, scratch)
    g *= scratch + y * (1.0 - scratch)


def _normal_cdf(z: Array) -> Array:
    """The distribution function of the standard normal distribution.

    float32 by formula 7.1.26 of Abramowitz and Stegun (error below 1.5e-7, the width of the dtype); wider
    dtypes by the exact function of the standard library, element by element.
    """
    if z.dtype != np.float32:
        exact = np.asarray(np.frompyfunc(math.erf, 1, 1)(z * math.sqrt(0.5)))
        return np.asarray(0.5 * (1.0 + exact.astype(z.dtype)))
    x = np.abs(z) * np.float32(math.sqrt(0.5))
    t = 1.0 / (1.0 + 0.3275911 * x)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(0.5 + np.copysign(0.5 - 0.5 * poly * np.exp(-x * x), z))


def _gelu(z: Array, out: Array) -> None:
    """Hendrycks and Gimpel 2016, the exact form."""
    np.multiply(z, _normal_cdf(z), out=out)


def _gelu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.multiply(z, z, out=scratch)
    scratch *= -0.5
    np.exp(scratch, out=scratch)
    scratch *= z
    scratch *= 1.0 / math.sqrt(2.0 * math.pi)
    scratch += _normal_cdf(z)
    g *= scratch


_LEAK = 0.2


def _leaky_relu(z: Array, out: Array) -> None:
    np.multiply(z, _LEAK, out=out)
    np.maximum(z, out, out=out)


def _leaky_relu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.greater(z, 0.0, out=scratch)
    scratch *= 1.0 - _LEAK
    scratch += _LEAK
    g *= scratch


def _relu6(z: Array, out: Array) -> None:
    np.clip(z, 0.0, 6.0, out=out)


def _relu6_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    g *= (z > 0.0) & (z < 6.0)


def _hard_sigmoid(z: Array, out: Array) -> None:
    """relu6(z + 3) / 6."""
    np.add(z, 3.0, out=out)
    np.clip(out, 0.0, 6.0, out=out)
    out *= 1.0 / 6.0


def _hard_sigmoid_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    np.less(np.abs(z), 3.0, out=scratch)
    scratch *= 1.0 / 6.0
    g *= scratch


def _hard_silu(z: Array, out: Array) -> None:
    _hard_sigmoid(z, out)
    out *= z


def _hard_silu_back(g: Array, z: Array, y: Array, scratch: Array) -> None:
    _hard_sigmoid(z, scratch)
    g *= scratch + z * (np.abs(z) < 3.0) * (1.0 / 6.0)


_SILU = (_silu, _silu_back)
_HARD_SILU = (_hard_silu, _hard_silu_back)

_TABLE: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "linear": (_linear, _linear_back),
    "relu": (_relu, _relu_back),
    "relu6": (_relu6, _relu6_back),
    "leaky_relu": (_leaky_relu, _leaky_relu_back),
    "sigmoid": (sigmoid, _sigmoid_back),
    "hard_sigmoid": (_hard_sigmoid, _hard_sigmoid_back),
    "tanh": (_tanh, _tanh_back),
    "softmax": (softmax, _softmax_back),
    "softplus": (_softplus, _softplus_back),
    "softsign": (_softsign, _softsign_back),
    "exponential": (_exponential, _exponential_back),
    "elu": (_elu, _elu_back),
    "selu": (_selu, _selu_back),
    "silu": _SILU,
    "swish": _SILU,
    "hard_silu": _HARD_SILU,
    "hard_swish": _HARD_SILU,
    "gelu": (_gelu, _gelu_back),
}
