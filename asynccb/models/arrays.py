"""Aligned arrays, and the packing of many tensors into one flat array."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

_LINE = 64  # bytes of a cache line


def aligned(shape: tuple[int, ...] | int, dtype: Any, fill: float | None = None) -> Array:
    """A C-contiguous array that starts on a cache line; uninitialised unless ``fill`` is given.

    The alignment is a matter of equal results, not of speed alone: vector loops treat the elements before the
    first boundary apart, so two processes whose allocators differ by 16 bytes could otherwise round
    differently.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    array: Array = raw[start : start + size].view(dtype).reshape(shape)
    if fill is not None:
        array.fill(fill)
    return array


def padded_size(shape: tuple[int, ...], dtype: Any) -> int:
    """Elements that a tensor takes inside a flat array, so that the next one starts on a cache line again."""
    per_line = max(1, _LINE // np.dtype(dtype).itemsize)
    lines = -(-math.prod(shape) // per_line)
    return int(lines * per_line)


def views(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The tensors inside ``flat``, in order, as views of the given shapes."""
    found, at = [], 0
    for shape in shapes:
        found.append(flat[at : at + math.prod(shape)].reshape(shape))
        at += padded_size(shape, flat.dtype)
    return found


def read_only(array: Array) -> Array:
    """A view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def pack(tensors: Sequence[Array], dtype: Any) -> Array:
    """One zero-padded flat array that holds copies of ``tensors``; :func:`views` finds them again."""
    flat = aligned(sum(padded_size(tensor.shape, dtype) for tensor in tensors), dtype, fill=0.0)
    for view, tensor in zip(views(flat, [tensor.shape for tensor in tensors]), tensors, strict=True):
        view[...] = tensor
    return flat
