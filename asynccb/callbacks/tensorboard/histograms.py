"""Histograms of any number of arrays, one after the other, in one pass and in bounded memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.tensorboard.records import histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Histogram"]

BUCKETS = 128
_BLOCK = 1 << 14
"""Numbers counted at a time: as doubles they stay in the processor's cache."""
_LARGEST = 8e307
"""Within ± this, the width of a range is still finite."""
_FINEST = -1000
"""The least exponent of a bucket's width, so that its inverse is finite."""


class Histogram:
    """Counts numbers in at most 128 buckets of equal width; at least 63, unless the numbers lie few steps of
    the float format apart.

    The width is a power of two and every edge a multiple of it. So a number's bucket is exact, a wider range
    only joins neighbouring buckets, and the result does not depend on how the numbers were divided among the
    calls of :meth:`add`.

    NaN and infinities are left out. Takes 128 KiB, whatever is added.
    """

    def __init__(self) -> None:
        self._waiting = np.empty(_BLOCK)
        self._filled = 0
        self._num, self._sum, self._squares = 0, 0.0, 0.0
        self._low, self._high = math.inf, -math.inf
        self._exponent = 0
        self._first = 0  # the first bucket begins at this multiple of the width
        self._counts = np.zeros(0, np.int64)

    def add(self, array: Array) -> None:
        """Adds all numbers of an array of bools, integers or real floats."""
        flat, start = array.ravel(order="K"), 0
        while start < flat.size:
            piece = flat[start : start + _BLOCK - self._filled]
            end = self._filled + piece.size
            with np.errstate(over="ignore"):  # long doubles beyond all doubles become infinite
                self._waiting[self._filled : end] = piece
            self._filled, start = end, start + piece.size
            if end == _BLOCK:
                self._count()

    def value(self, tag: str) -> bytes | None:
        """The value of a summary; None if no finite number was added."""
        self._count()
        if not self._num:
            return None
        limits, counts = self._buckets()
        return histogram(tag, (self._low, self._high), (self._num, self._sum, self._squares), limits, counts)

    def _buckets(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        counts = self._counts.astype(np.float64)
        edges = (self._first + np.arange(len(counts), dtype=np.int64)) * 2.0**self._exponent
        if len(counts) > 1 and edges[-1] == self._high:
            # The last bucket is closed on both sides. Of no width, TensorBoard would draw none of it.
            counts[-2] += counts[-1]
            counts, edges = counts[:-1], edges[:-1]
        return np.append(edges[1:], self._high), counts

    def _count(self) -> None:
        values, self._filled = self._waiting[: self._filled], 0
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (low >= -_LARGEST and high <= _LARGEST):  # NaN is not either
            values = np.clip(values[np.isfinite(values)], -_LARGEST, _LARGEST)
            if not values.size:
                return
            low, high = float(values.min()), float(values.max())
        with np.errstate(over="ignore", under="ignore"):
            self._num += values.size
            self._sum += float(values.sum())
            self._squares += float(np.einsum("i,i", values, values))  # not a dot product: BLAS starts threads
            self._widen(min(low, self._low), max(high, self._high))
            np.multiply(values, 2.0**-self._exponent, out=values)
        np.floor(values, out=values)
        np.subtract(values, float(self._first), out=values)
        self._counts += np.bincount(values.astype(np.intp), minlength=len(self._counts))

    def _widen(self, low: float, high: float) -> None:
        """Makes the buckets reach from ``low`` to ``high``."""
        if (low, high) == (self._low, self._high):
            return
        exponent = _exponent(low, high)
        first, last = (math.floor(edge * 2.0**-exponent) for edge in (low, high))
        counts = np.zeros(last - first + 1, np.int64)
        if len(self._counts):
            old = self._first + np.arange(len(self._counts), dtype=np.int64)
            np.add.at(counts, (old >> min(exponent - self._exponent, 63)) - first, self._counts)
        self._low, self._high, self._exponent = low, high, exponent
        self._first, self._counts = first, counts


def _exponent(low: float, high: float) -> int:
    """Of the narrowest width that covers the range with 128 buckets, and that the float format can tell."""
    finest = math.frexp(math.ulp(max(-low, high)))[1] - 1
    # Twice the buckets there are would not do, so the search begins at the next width.
    exponent = max(_FINEST, finest, math.frexp(high - low)[1] - BUCKETS.bit_length() + 1)
    while math.floor(high * 2.0**-exponent) - math.floor(low * 2.0**-exponent) >= BUCKETS:
        exponent += 1
    return exponent
