"""A table of which a batch touches few rows: its gradient is those rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from asynccb.models.arrays import Array


class Table:
    """A weight that is updated row by row, outside of the flat arrays.

    Attributes:
        value: the live table, (rows, length).
        rows: numbers of the rows that the last batch looked up, each once, ascending.
        sums: the gradients of these rows.
    """

    def __init__(self, value: Array) -> None:
        self.value = value
        self.rows, self.sums = sum_rows(np.empty(0, np.intp), value[:0])

    def collect(self, numbers: Array, g: Array) -> None:
        """Takes the gradient ``g[i]`` of row ``numbers[i]``, for all i."""
        self.rows, self.sums = sum_rows(numbers, g)

    def gradient(self) -> Array:
        """The gradient of the whole table: a new array, zero but in ``rows``."""
        dense = np.zeros_like(self.value)
        dense[self.rows] = self.sums
        return dense


def sum_rows(numbers: Array, g: Array) -> tuple[Array, Array]:
    """Different ``numbers``, ascending, and for each the sum of the rows of ``g`` that stand beside it."""
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    first = np.flatnonzero(np.concatenate((ascending[:1] == ascending[:1], ascending[1:] != ascending[:-1])))
    if not len(first):
        return ascending, g[:0].copy()
    sums = np.add.reduceat(g[order], first, axis=0)
    return ascending[first], sums
