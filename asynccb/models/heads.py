"""The end of a network: from the last values and the targets to the loss, the predictions and the first
gradient.

Where loss and last activation fit together, the activation is left out of the network in training and both
are computed in one: ``log(sum(exp(z))) - z[y]`` for softmax with cross-entropy, and ``max(z, 0) - z * y +
log(1 + exp(-|z|))`` for sigmoid. Neither overflows, and their gradient is ``p - y``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from asynccb.models.activations import sigmoid
from asynccb.models.arrays import aligned

if TYPE_CHECKING:
    from asynccb.models.arrays import Array
    from asynccb.models.losses import Loss

_KEPT = 4  # batch sizes whose buffers are kept


class Head:
    """Base class; also the head of every loss that is not fused."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        """The loss of the batch; keeps what the other two need."""
        self._z, self._y, self._weight = z, y, weight
        return mean(self.loss.values(y, z), weight)

    def prediction(self) -> Array:
        """What the network predicts for the last batch, shape (rows, outputs)."""
        return self._z

    def backward(self) -> Array:
        """The gradient of the loss by ``z``; the caller may overwrite it."""
        g = self.loss.gradient(self._y, self._z)
        g *= _scale(len(g), self._weight)
        return g


def mean(values: Array, weight: Array | None) -> float:
    """``sum(weight * values) / len(values)`` as a Python float; 0.0 for no rows."""
    total = values.sum() if weight is None else np.dot(values, weight)
    return float(total) / max(1, len(values))


def _scale(rows: int, weight: Array | None) -> Array | float:
    return 1.0 / max(1, rows) if weight is None else weight[:, None] / max(1, rows)


class _SoftmaxBuffers:
    """Arrays for one shape, and views of them in the shapes in which they meet."""

    def __init__(self, z: Array) -> None:
        rows, classes = z.shape
        self.by_class = aligned((classes, rows), z.dtype)
        self.top = aligned(rows, z.dtype)
        self.top_column = self.top[:, None]
        self.shifted = aligned(z.shape, z.dtype)
        self.powers = aligned(z.shape, z.dtype)
        self.total = aligned(rows, z.dtype)
        self.total_column = self.total[:, None]
        self.log_total = aligned(rows, z.dtype)
        self.share = aligned(rows, z.dtype)
        self.share_column = self.share[:, None]
        self.g = aligned(z.shape, z.dtype)
        self.ones = aligned(classes, z.dtype, fill=1.0)
        self.index = np.arange(rows)


class SoftmaxHead(Head):
    """Softmax with categorical or sparse categorical cross-entropy."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self._buffers: dict[tuple[int, ...], _SoftmaxBuffers] = {}

    def _sized(self, z: Array) -> _SoftmaxBuffers:
        if len(self._buffers) >= _KEPT:
            self._buffers.clear()
        made = self._buffers[z.shape] = _SoftmaxBuffers(z)
        return made

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        b = self._b = self._buffers.get(z.shape) or self._sized(z)
        self._y, self._weight = y, weight
        # The maximum over a short last axis is several times slower than over the first one of a transposed
        # copy.
        b.by_class[...] = z.T
        np.maximum.reduce(b.by_class, axis=0, out=b.top)
        np.subtract(z, b.top_column, out=b.shifted)
        np.exp(b.shifted, out=b.powers)
        b.powers.dot(b.ones, b.total)
        np.log(b.total, out=b.log_total)
        if self.loss.sparse:
            return mean(b.log_total - b.shifted[b.index, y], weight)
        self._sums = sums = y.dot(b.ones)  # ones for one-hot targets; anything for soft ones
        if weight is None:
            return float(sums.dot(b.log_total) - np.vdot(y, b.shifted)) / max(1, len(sums))
        return mean(sums * b.log_total - (y * b.shifted).sum(axis=1), weight)

    def prediction(self) -> Array:
        return np.asarray(self._b.powers / self._b.total_column)

    def backward(self) -> Array:
        b = self._b
        if self.loss.sparse:
            np.divide(b.powers, b.total_column, out=b.g)
            b.g[b.index, self._y] -= 1.0
        else:
            np.divide(self._sums, b.total, out=b.share)
            np.multiply(b.powers, b.share_column, out=b.g)
            np.subtract(b.g, self._y, out=b.g)
        np.multiply(b.g, _scale(len(b.g), self._weight), out=b.g)
        return b.g


class SigmoidHead(Head):
    """Sigmoid with binary cross-entropy."""

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        self._y, self._weight = y, weight
        self._p = sigmoid(z, np.empty_like(z))
        values = np.maximum(z, 0.0) - z * y + np.log1p(np.exp(-np.abs(z)))
        return mean(values.mean(axis=-1), weight)

    def prediction(self) -> Array:
        return self._p

    def backward(self) -> Array:
        g = self._p - self._y
        g *= _scale(len(g), self._weight)
        g *= 1.0 / g.shape[-1]
        return np.asarray(g)


def head_for(loss: Loss, last_activation: str | None) -> tuple[Head, bool]:
    """The head of a loss, and whether it takes over the network's last activation."""
    if loss.fuses is not None and loss.fuses == last_activation:
        return (SoftmaxHead(loss) if loss.fuses == "softmax" else SigmoidHead(loss)), True
    return Head(loss), False
