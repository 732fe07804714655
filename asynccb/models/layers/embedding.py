"""Embedding: whole numbers become rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.models.arrays import aligned
from asynccb.models.initializers import get
from asynccb.models.layers.base import Layer, Operation, Weight, WeightSpec, whole
from asynccb.models.tables import sum_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers.base import Shape


class Embedding(Layer):
    """Looks up each whole number of its input in a trainable table. Only as the first layer.

    Args:
        input_dim: rows of the table; inputs lie in ``0 .. input_dim - 1``.
        output_dim: length of each row.
        embeddings_initializer: name of an initializer.
        input_length: the same as ``input_shape=(input_length,)``.
        input_shape: see :class:`Layer`.
        name: see :class:`Layer`.
        trainable: see :class:`Layer`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: str = "uniform",
        input_length: int | None = None,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        if input_length is not None:
            input_shape = (whole("input_length", input_length),)
        super().__init__(name, input_shape, trainable)
        self.input_dim = whole("input_dim", input_dim)
        self.output_dim = whole("output_dim", output_dim)
        self.embeddings_initializer = embeddings_initializer
        get(embeddings_initializer, "embeddings_initializer")

    def weight_specs(self, input_shape: Shape) -> list[WeightSpec]:
        shape = (self.input_dim, self.output_dim)
        return [WeightSpec("embeddings", shape, self.embeddings_initializer, by_rows=True)]

    def output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape, self.output_dim)

    def operations(self) -> list[Operation[Any]]:
        return [_Look(self.weights[0])]

    def settings(self) -> dict[str, Any]:
        return {
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "embeddings_initializer": self.embeddings_initializer,
            "trainable": self.trainable,
        }


class _Look(Operation["Array"]):
    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._table, self._g_table, self._rows = weight.value, weight.grad, weight.table

    def allocate(self, shape: Any, dtype: Any) -> Array:
        return aligned((*shape, self._table.shape[1]), dtype)

    def infer(self, x: Array) -> Array:
        self._x = x
        out = self.buffers(x.shape, self._table.dtype)
        # numpy fills ``out`` by way of a copy unless it need not check the indices, so they are checked
        # first.
        if x.size and not 0 <= int(x.min()) <= int(x.max()) < len(self._table):
            allowed = f"the Embedding's input_dim is {len(self._table)}"
            raise ArgumentError("x", in_words(f"numbers from {x.min()} to {x.max()}"), allowed)
        return np.take(self._table, x, axis=0, out=out, mode="clip")

    def back(self, g: Array) -> Array:
        numbers, sums = self._x.reshape(-1), g.reshape(-1, g.shape[-1])
        if self._rows is not None:
            self._rows.collect(numbers, sums)
        elif self._g_table is not None:
            self._g_table.fill(0.0)
            rows, sums = sum_rows(numbers, sums)
            self._g_table[rows] = sums
        return g
