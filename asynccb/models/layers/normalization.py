"""Batch normalization (Ioffe and Szegedy 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.arrays import aligned
from asynccb.models.layers.base import Layer, Operation, Weight, WeightSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers.base import Shape


class BatchNormalization(Layer):
    """Normalizes the last axis: in training by mean and variance of the batch, otherwise by their running
    means.

    The variance is the biased one, in the running mean too, as in Keras 3. A layer that is not trainable
    normalizes by the running means in training too, and leaves them as they are.

    Args:
        momentum: share that the running means keep at each batch; default 0.99.
        epsilon: added to the variance; default 0.001.
        center: whether ``beta`` is added.
        scale: whether the result is multiplied by ``gamma``.
        input_shape: see :class:`Layer`.
        name: see :class:`Layer`.
        trainable: see :class:`Layer`.
    """

    def __init__(
        self,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__(name, input_shape, trainable)
        if not 0.0 <= momentum <= 1.0:
            raise ArgumentError("momentum", momentum, "must lie between 0 and 1")
        if not epsilon > 0.0:
            raise ArgumentError("epsilon", epsilon, "must be positive")
        self.momentum, self.epsilon = float(momentum), float(epsilon)
        self.center, self.scale = bool(center), bool(scale)

    def weight_specs(self, input_shape: Shape) -> list[WeightSpec]:
        if not input_shape:
            raise ArgumentError("input_shape", input_shape, f"{self.name} needs at least one axis")
        shape = (input_shape[-1],)
        gamma = [WeightSpec("gamma", shape, "ones")] if self.scale else []
        beta = [WeightSpec("beta", shape, "zeros")] if self.center else []
        mean = WeightSpec("moving_mean", shape, "zeros", learned=False)
        return [*gamma, *beta, mean, WeightSpec("moving_variance", shape, "ones", learned=False)]

    def operations(self) -> list[Operation[Any]]:
        kind = _Normalize if self.trainable else _Fixed
        return [kind({weight.name: weight for weight in self.weights}, self.momentum, self.epsilon)]

    def settings(self) -> dict[str, Any]:
        return {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "trainable": self.trainable,
        }


class _Buffers(NamedTuple):
    hat: Array
    out: Array


class _Fixed(Operation[_Buffers]):
    """The layer by its running means, and without a gradient of its own."""

    def __init__(self, weights: dict[str, Weight], momentum: float, epsilon: float) -> None:
        super().__init__()
        self._gamma, self._beta = weights.get("gamma"), weights.get("beta")
        self._mean, self._variance = weights["moving_mean"].value, weights["moving_variance"].value
        self._momentum, self._epsilon = momentum, epsilon

    def allocate(self, shape: Any, dtype: Any) -> _Buffers:
        return _Buffers(aligned(shape, dtype), aligned(shape, dtype))

    def infer(self, x: Array) -> Array:
        self._inverse = 1.0 / np.sqrt(self._variance + self._epsilon)
        return self._apply(x, self._mean, self._inverse)

    def _apply(self, x: Array, mean: Array, inverse: Array) -> Array:
        b = self._b = self.buffers(x.shape, x.dtype)
        np.subtract(x, mean, out=b.hat)
        np.multiply(b.hat, inverse, out=b.hat)
        if self._gamma is None:
            np.copyto(b.out, b.hat)
        else:
            np.multiply(b.hat, self._gamma.value, out=b.out)
        if self._beta is not None:
            np.add(b.out, self._beta.value, out=b.out)
        return b.out

    def back(self, g: Array) -> Array:
        np.multiply(g, self._inverse, out=g)
        if self._gamma is not None:
            np.multiply(g, self._gamma.value, out=g)
        return g


class _Normalize(_Fixed):
    """The layer in training: by mean and variance of the batch."""

    def train(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        self._batch_mean = rows.mean(axis=0)
        self._batch_variance = np.square(rows - self._batch_mean).mean(axis=0)
        self._inverse = 1.0 / np.sqrt(self._batch_variance + self._epsilon)
        return self._apply(x, self._batch_mean, self._inverse)

    def back(self, g: Array) -> Array:
        rows = g.reshape(-1, g.shape[-1])
        hat = self._b.hat.reshape(rows.shape)
        if self._beta is not None:
            np.sum(rows, axis=0, out=self._beta.grad)
        if self._gamma is not None:
            np.sum(rows * hat, axis=0, out=self._gamma.grad)
            rows = rows * self._gamma.value
        # The batch's mean and variance depend on every row; their two terms are the means subtracted here.
        through = rows - rows.mean(axis=0) - hat * (rows * hat).mean(axis=0)
        return np.asarray(through * self._inverse).reshape(g.shape)

    def commit(self) -> None:
        for running, batch in ((self._mean, self._batch_mean), (self._variance, self._batch_variance)):
            np.multiply(running, self._momentum, out=running)
            np.add(running, batch * (1.0 - self._momentum), out=running)
