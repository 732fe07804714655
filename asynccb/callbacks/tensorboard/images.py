"""Weights as pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.tensorboard.records import image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["image_value", "image_views"]

_LARGEST = 8e307
"""Within ± this, the width of a range is still finite."""


def image_views(array: Array) -> Iterator[Array]:
    """The 2-D pictures of a weight (height by width), axes of length 1 left out.

    One axis: a column. Two axes: one picture, lying, turned where it would stand. Three axes: a picture for
    each index of the last one (a kernel of a convolution, channels last). Any other number: none.
    """
    squeezed = np.squeeze(array)
    if not squeezed.size:
        return
    if squeezed.ndim == 1:
        yield squeezed[:, np.newaxis]
    elif squeezed.ndim == 2:
        yield squeezed.T if squeezed.shape[0] > squeezed.shape[1] else squeezed
    elif squeezed.ndim == 3:
        yield from np.moveaxis(squeezed, -1, 0)


def image_value(tag: str, view: Array) -> bytes:
    """A grey PNG. The smallest number is black, the largest white; what is not finite is black."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(_grey(view)).save(out, format="png")
    height, width = view.shape
    return image(tag, (height, width), out.getvalue())


def _grey(view: Array) -> Array:
    finite = np.isfinite(view)
    known = np.clip(view[finite].astype(np.float64), -_LARGEST, _LARGEST)
    grey = np.zeros(view.shape, np.uint8)
    if known.size:
        low, high = known.min(), known.max()
        grey[finite] = ((known - low) / ((high - low) or 1.0) * 255.0).round()
    return grey
