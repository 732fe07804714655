"""Losses by the names and formulas of Keras 3: one value per row, their gradient, and what goes with an
activation.

A *row* is one prediction: a sample, or one position of a sample where the output has more than two axes.
``y`` and ``p`` are of shape (rows, outputs); for sparse targets ``y`` is (rows,) of integers. The loss of a
batch is ``sum(weight * value) / rows``, so that weights scale the loss and the number of rows stays the
divisor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from asynccb.models.names import lookup

if TYPE_CHECKING:
    from asynccb.models.arrays import Array

EPSILON = 1e-7  # probabilities are kept this far from 0 and 1 before a logarithm


class Loss:
    """Base class.

    Attributes:
        sparse: targets are class numbers.
        fuses: the last activation with which loss and gradient have a stable common form, or None.
    """

    name: ClassVar[str]
    sparse: ClassVar[bool] = False
    fuses: ClassVar[str | None] = None

    def values(self, y: Array, p: Array) -> Array:
        """The loss of each row, shape (rows,)."""
        raise NotImplementedError

    def gradient(self, y: Array, p: Array) -> Array:
        """The derivative of each row's loss by ``p``, shape of ``p``; a new array."""
        raise NotImplementedError


def _normalized(p: Array) -> tuple[Array, Array]:
    total = p.sum(axis=-1, keepdims=True)
    return p / total, total


class CategoricalCrossentropy(Loss):
    """``-sum(y * log(p / sum(p)))`` over the classes; targets one-hot, or probabilities."""

    name = "categorical_crossentropy"
    fuses = "softmax"

    def values(self, y: Array, p: Array) -> Array:
        q, _ = _normalized(p)
        return np.asarray(-(y * np.log(np.clip(q, EPSILON, 1.0 - EPSILON))).sum(axis=-1))

    def gradient(self, y: Array, p: Array) -> Array:
        q, total = _normalized(p)
        inside = (q >= EPSILON) & (q <= 1.0 - EPSILON)  # where the clip is flat the derivative is zero
        slope = np.where(inside, -y / np.where(inside, q, 1.0), 0.0)
        return np.asarray((slope - (slope * q).sum(axis=-1, keepdims=True)) / total, dtype=p.dtype)


class SparseCategoricalCrossentropy(Loss):
    """``-log(p[y] / sum(p))``; targets are class numbers from 0."""

    name = "sparse_categorical_crossentropy"
    sparse = True
    fuses = "softmax"

    def values(self, y: Array, p: Array) -> Array:
        q, _ = _normalized(p)
        return np.asarray(-np.log(np.clip(q[np.arange(len(y)), y], EPSILON, 1.0 - EPSILON)))

    def gradient(self, y: Array, p: Array) -> Array:
        return _CATEGORICAL.gradient(one_hot(y, p), p)


class BinaryCrossentropy(Loss):
    """``-(y * log(p) + (1 - y) * log(1 - p))``, mean over the outputs."""

    name = "binary_crossentropy"
    fuses = "sigmoid"

    def values(self, y: Array, p: Array) -> Array:
        q = np.clip(p, EPSILON, 1.0 - EPSILON)
        return np.asarray(-(y * np.log(q) + (1.0 - y) * np.log(1.0 - q)).mean(axis=-1))

    def gradient(self, y: Array, p: Array) -> Array:
        q = np.clip(p, EPSILON, 1.0 - EPSILON)
        inside = (p >= EPSILON) & (p <= 1.0 - EPSILON)
        return np.asarray(np.where(inside, (q - y) / (q * (1.0 - q)), 0.0) / p.shape[-1], dtype=p.dtype)


class MeanSquaredError(Loss):
    """``(p - y)**2``, mean over the outputs."""

    name = "mean_squared_error"

    def values(self, y: Array, p: Array) -> Array:
        return np.asarray(np.square(p - y).mean(axis=-1))

    def gradient(self, y: Array, p: Array) -> Array:
        return np.asarray((p - y) * (2.0 / p.shape[-1]))


class MeanAbsoluteError(Loss):
    """``|p - y|``, mean over the outputs; the derivative at 0 is 0."""

    name = "mean_absolute_error"

    def values(self, y: Array, p: Array) -> Array:
        return np.asarray(np.abs(p - y).mean(axis=-1))

    def gradient(self, y: Array, p: Array) -> Array:
        return np.asarray(np.sign(p - y) * (1.0 / p.shape[-1]))


_CATEGORICAL = CategoricalCrossentropy()
_MSE, _MAE = MeanSquaredError(), MeanAbsoluteError()

TABLE: dict[str, Loss] = {
    "categorical_crossentropy": _CATEGORICAL,
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy(),
    "binary_crossentropy": BinaryCrossentropy(),
    "mean_squared_error": _MSE,
    "mse": _MSE,
    "MSE": _MSE,
    "mean_absolute_error": _MAE,
    "mae": _MAE,
    "MAE": _MAE,
}


def get(name: str) -> Loss:
    """The loss of this name.

    Raises:
        ArgumentError: for an unknown name; it suggests the nearest ones.
    """
    return lookup("loss", name, TABLE)


def one_hot(y: Array, like: Array) -> Array:
    """Class numbers as rows of zeros with a one, in shape and dtype of ``like``."""
    rows = np.zeros_like(like)
    rows[np.arange(len(y)), y] = 1.0
    return rows
