"""Dropout (Srivastava et al. 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.arrays import aligned
from asynccb.models.layers.base import Layer, Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array


class Dropout(Layer):
    """Sets a share of its inputs to zero in training and scales the others by ``1 / (1 - rate)``.

    Args:
        rate: the share, at least 0 and less than 1.
        seed: of its random stream; by default it follows from the model's seed and the layer's place.
        input_shape: see :class:`Layer`.
        name: see :class:`Layer`.
    """

    def __init__(
        self,
        rate: float,
        seed: int | None = None,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name, input_shape)
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0.0 <= rate < 1.0:
            raise ArgumentError("rate", rate, "must be at least 0 and less than 1")
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ArgumentError("seed", seed, "must be None or a whole number that is not negative")
        self.rate = float(rate)
        self.seed = None if seed is None else int(seed)
        self._rng = np.random.default_rng(self.seed)

    def seed_random(self, rng: np.random.Generator) -> None:
        self._rng = rng if self.seed is None else np.random.default_rng(self.seed)

    def random_state(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(self._rng.bit_generator.state)
        return state

    def set_random_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state

    def operations(self) -> list[Operation[Any]]:
        return [_Drop(self)]

    def settings(self) -> dict[str, Any]:
        return {"rate": self.rate, "seed": self.seed}

    def draw(self, out: Array) -> None:
        """Fills ``out`` with numbers from [0, 1)."""
        self._rng.random(dtype=out.dtype, out=out)


class _Buffers(NamedTuple):
    mask: Array
    out: Array


class _Drop(Operation[_Buffers]):
    def __init__(self, layer: Dropout) -> None:
        super().__init__()
        self._layer = layer

    def allocate(self, shape: Any, dtype: Any) -> _Buffers:
        return _Buffers(aligned(shape, dtype), aligned(shape, dtype))

    def infer(self, x: Array) -> Array:
        return x

    def train(self, x: Array) -> Array:
        mask, out = self.buffers(x.shape, x.dtype)
        self._mask = mask
        rate = self._layer.rate
        self._layer.draw(mask)
        np.greater_equal(mask, rate, out=mask)
        np.multiply(mask, 1.0 / (1.0 - rate), out=mask)
        np.multiply(x, mask, out=out)
        return out

    def back(self, g: Array) -> Array:
        np.multiply(g, self._mask, out=g)
        return g
