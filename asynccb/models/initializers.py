"""Initial values of weights, by the names and formulas of Keras 3.

Variance scaling: Glorot and Bengio 2010 (``glorot_*``), He et al. 2015 (``he_*``), LeCun et al. 1998
(``lecun_*``). The ``normal`` variants of these draw from a normal distribution cut off at two standard
deviations, widened by 1 / 0.8796 so that the variance is the wanted one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from asynccb.models.names import lookup

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.models.arrays import Array

    Initializer = Callable[[tuple[int, ...], np.random.Generator], Array]

# Standard deviation of the standard normal distribution cut off at +-2.
_CUT_OFF_STDDEV = 0.87962566103423978


def get(name: str, argument: str = "kernel_initializer") -> Initializer:
    """The initializer of this name: ``(shape, generator) -> float64 array``.

    Raises:
        ArgumentError: for an unknown name; it suggests the nearest ones.
    """
    return lookup(argument, name, _TABLE)


def _fans(shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) < 2:
        size = float(shape[0]) if shape else 1.0
        return size, size
    field = math.prod(shape[:-2])
    return float(shape[-2] * field), float(shape[-1] * field)


def _truncated(shape: tuple[int, ...], rng: np.random.Generator, stddev: float) -> Array:
    values = rng.standard_normal(shape)
    while True:
        outside = np.abs(values) > 2.0
        count = int(np.count_nonzero(outside))
        if not count:
            return values * stddev
        values[outside] = rng.standard_normal(count)


def _scaling(scale: float, mode: str, distribution: str) -> Initializer:
    def initialize(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        fan_in, fan_out = _fans(shape)
        fan = fan_in if mode == "fan_in" else (fan_in + fan_out) / 2.0
        variance = scale / max(1.0, fan)
        if distribution == "uniform":
            limit = math.sqrt(3.0 * variance)
            return rng.uniform(-limit, limit, shape)
        return _truncated(shape, rng, math.sqrt(variance) / _CUT_OFF_STDDEV)

    return initialize


def _zeros(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return np.zeros(shape)


def _ones(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return np.ones(shape)


def _uniform(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return rng.uniform(-0.05, 0.05, shape)


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return rng.standard_normal(shape) * 0.05


def _truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return _truncated(shape, rng, 0.05)


def _orthogonal(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Saxe et al. 2014: the orthonormal factor of a normal matrix, with signs fixed so that it is unique."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))
    return np.ascontiguousarray(q if rows >= columns else q.T).reshape(shape)


_TABLE: dict[str, Initializer] = {
    "zeros": _zeros,
    "ones": _ones,
    "uniform": _uniform,
    "random_uniform": _uniform,
    "normal": _normal,
    "random_normal": _normal,
    "truncated_normal": _truncated_normal,
    "orthogonal": _orthogonal,
    "glorot_uniform": _scaling(1.0, "fan_avg", "uniform"),
    "glorot_normal": _scaling(1.0, "fan_avg", "normal"),
    "he_uniform": _scaling(2.0, "fan_in", "uniform"),
    "he_normal": _scaling(2.0, "fan_in", "normal"),
    "lecun_uniform": _scaling(1.0, "fan_in", "uniform"),
    "lecun_normal": _scaling(1.0, "fan_in", "normal"),
}
