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
    """Base class; also the head of every loss that is not fused.

    Attributes:
        prediction: what the network predicts for the last batch, shape (rows, outputs).
    """

    prediction: Array

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        """The loss of the batch; keeps what :meth:`backward` needs."""
        self.prediction, self._y, self._weight = z, y, weight
        return mean(self.loss.values(y, z), weight)

    def backward(self) -> Array:
        """The gradient of the loss by ``z``; the caller may overwrite it."""
        g = self.loss.gradient(self._y, self.prediction)
        g *= _scale(len(g), self._weight)
        return g


def mean(values: Array, weight: Array | None) -> float:
    """``sum(weight * values) / len(values)`` as a Python float; 0.0 for no rows."""
    total = values.sum() if weight is None else np.dot(values, weight)
    return float(total) / max(1, len(values))


def _scale(rows: int, weight: Array | None) -> Array | float:
    return 1.0 / max(1, rows) if weight is None else weight[:, None] / max(1, rows)


class _SoftmaxBuffers:
    def __init__(self, z: Array) -> None:
        rows, classes = z.shape
        self.by_class = aligned((classes, rows), z.dtype)
        self.top = aligned(rows, z.dtype)
        self.shifted = aligned(z.shape, z.dtype)
        self.p = aligned(z.shape, z.dtype)
        self.total = aligned((rows, 1), z.dtype)
        self.log_total = aligned(rows, z.dtype)
        self.g = aligned(z.shape, z.dtype)
        self.ones = aligned(classes, z.dtype, fill=1.0)
        self.index = np.arange(rows)


class SoftmaxHead(Head):
    """Softmax with categorical or sparse categorical cross-entropy."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self._buffers: dict[tuple[int, ...], _SoftmaxBuffers] = {}

    def _sized(self, z: Array) -> _SoftmaxBuffers:
        found = self._buffers.get(z.shape)
        if found is None:
            if len(self._buffers) >= _KEPT:
                self._buffers.clear()
            found = self._buffers[z.shape] = _SoftmaxBuffers(z)
        return found

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        b = self._b = self._sized(z)
        self._y, self._weight = y, weight
        # The maximum over a short last axis is several times slower than over the first one of a transposed
        # copy.
        np.copyto(b.by_class, z.T)
        np.maximum.reduce(b.by_class, axis=0, out=b.top)
        np.subtract(z, b.top[:, None], out=b.shifted)
        np.exp(b.shifted, out=b.p)
        np.dot(b.p, b.ones, out=b.total[:, 0])
        np.divide(b.p, b.total, out=b.p)
        self.prediction = b.p
        np.log(b.total[:, 0], out=b.log_total)
        return self._sparse(y, weight) if self.loss.sparse else self._dense(y, weight)

    def _sparse(self, y: Array, weight: Array | None) -> float:
        return mean(self._b.log_total - self._b.shifted[self._b.index, y], weight)

    def _dense(self, y: Array, weight: Array | None) -> float:
        b = self._b
        self._sums = sums = np.dot(y, b.ones)  # ones for one-hot targets; anything for soft ones
        if weight is None:
            return float(np.dot(sums, b.log_total) - np.vdot(y, b.shifted)) / max(1, len(sums))
        return mean(sums * b.log_total - (y * b.shifted).sum(axis=1), weight)

    def backward(self) -> Array:
        b = self._b
        if self.loss.sparse:
            np.copyto(b.g, b.p)
            b.g[b.index, self._y] -= 1.0
        else:
            np.multiply(b.p, self._sums[:, None], out=b.g)
            np.subtract(b.g, self._y, out=b.g)
        np.multiply(b.g, _scale(len(b.g), self._weight), out=b.g)
        return b.g


class SigmoidHead(Head):
    """Sigmoid with binary cross-entropy."""

    def forward(self, y: Array, z: Array, weight: Array | None) -> float:
        self._y, self._weight = y, weight
        self.prediction = sigmoid(z, np.empty_like(z))
        values = np.maximum(z, 0.0) - z * y + np.log1p(np.exp(-np.abs(z)))
        return mean(values.mean(axis=-1), weight)

    def backward(self) -> Array:
        g = self.prediction - self._y
        g *= _scale(len(g), self._weight)
        g *= 1.0 / g.shape[-1]
        return np.asarray(g)


def head_for(loss: Loss, last_activation: str | None) -> tuple[Head, bool]:
    """The head of a loss, and whether it takes over the network's last activation."""
    if loss.fuses is not None and loss.fuses == last_activation:
        return (SoftmaxHead(loss) if loss.fuses == "softmax" else SigmoidHead(loss)), True
    return Head(loss), False
