"""Numbers and weights as TensorBoard's records. For the writer's thread: histograms and PNGs cost time."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["image_value", "image_views", "scalars", "weights"]

BUCKETS = 64
_LARGEST = 8e307
"""Within ± this, the width of a range is still finite."""


def scalars(step: int, wall_time: float, logs: Mapping[str, Any], prefix: str = "") -> Any:
    """One record with each number in ``logs``, ``batch`` and ``size`` apart; tags are the keys."""
    from tensorboardX.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=_text(prefix + key), simple_value=number)
        for key, value in logs.items()
        if key not in ("batch", "size") and (number := _number(value)) is not None
    ]
    return _event(step, wall_time, Summary(value=values))


def weights(step: int, wall_time: float, arrays: Mapping[str, Array], images: bool) -> Iterator[Any]:
    """A histogram of each weight, and its images where they are asked for; one record a weight.

    ``:`` in names becomes ``_``. NaN and infinities are left out of a histogram; a weight without any finite
    number has none. Images are tagged ``<weight>/image/<number>``: real TensorBoard shows only one kind of
    record of a tag.
    """
    from tensorboardX.proto.summary_pb2 import Summary

    for name, array in arrays.items():
        if name.startswith("optimizer/") or array.dtype.kind not in "biuf":
            continue
        tag = _text(name.replace(":", "_"))
        histogram = _histogram(array)
        values = [] if histogram is None else [Summary.Value(tag=tag, histo=histogram)]
        if images:
            views = enumerate(image_views(array))
            values += [image_value(f"{tag}/image/{number}", view) for number, view in views]
        if values:
            yield _event(step, wall_time, Summary(value=values))


def _event(step: int, wall_time: float, summary: Any) -> Any:
    from tensorboardX.proto.event_pb2 import Event

    return Event(wall_time=wall_time, step=step, summary=summary)


def _number(value: object) -> float | None:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, (int, float, np.bool_, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        return math.inf if value > 0 else -math.inf


def _text(tag: str) -> str:
    return tag.encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no place in a record


def _histogram(array: Array) -> Any:
    from tensorboardX.proto.summary_pb2 import HistogramProto

    values = array.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    np.clip(values, -_LARGEST, _LARGEST, out=values)
    low, high = float(values.min()), float(values.max())
    limits, counts = _buckets(values, low, high)
    with np.errstate(over="ignore", under="ignore"):
        total, squares = float(values.sum()), float(values @ values)
    return HistogramProto(
        min=low,
        max=high,
        num=values.size,
        sum=total,
        sum_squares=squares,
        bucket_limit=limits,
        bucket=counts,
    )


def _buckets(values: Array, low: float, high: float) -> tuple[list[float], list[float]]:
    edges = np.linspace(low, high, BUCKETS + 1)
    if not np.all(edges[1:] > edges[:-1]):  # all equal, or too near each other to be told apart
        return [high], [float(values.size)]
    counts, edges = np.histogram(values, bins=BUCKETS, range=(low, high))
    return edges[1:].tolist(), counts.tolist()


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


def image_value(tag: str, view: Array) -> Any:
    """A grey PNG. The smallest number is black, the largest white; what is not finite is black."""
    from PIL import Image
    from tensorboardX.proto.summary_pb2 import Summary

    out = io.BytesIO()
    Image.fromarray(_grey(view)).save(out, format="png")
    height, width = view.shape
    png = Summary.Image(height=height, width=width, colorspace=1, encoded_image_string=out.getvalue())
    return Summary.Value(tag=tag, image=png)


def _grey(view: Array) -> Array:
    finite = np.isfinite(view)
    known = np.clip(view[finite].astype(np.float64), -_LARGEST, _LARGEST)
    grey = np.zeros(view.shape, np.uint8)
    if known.size:
        low, high = known.min(), known.max()
        grey[finite] = ((known - low) / ((high - low) or 1.0) * 255.0).round()
    return grey
