"""What goes on in a model's layers, as TensorBoard's records: weights, activations, gradients.

Everything here takes its time and is called on a thread beside the training, on a copy of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.tensorboard.histograms import Histogram
from asynccb.callbacks.tensorboard.images import image_value, image_views
from asynccb.callbacks.tensorboard.records import summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Part", "activations", "first_part", "gradients", "weights"]

SAMPLES = 256
"""Samples that activations and gradients are looked at over."""
BYTES = 16 * 2**20
"""Bytes of those samples."""
OUTPUTS = 4 * 2**20
"""Bytes of all layers' outputs that are computed at a time, where one chunk has not more. Few large arrays
give the interpreter lock away, and take it from the training, less often than many small ones."""


class Part:
    """The first ``size`` samples of data, in chunks.

    Args:
        data: x, y and sample weights; each an array, None, or a tuple, list or dict of such.
        size: samples.
        chunk: samples in each chunk; the last may have fewer.
    """

    def __init__(self, data: Sequence[Any], size: int, chunk: int) -> None:
        self.size, self.chunk = size, chunk
        self._data = data

    def rows(self, begin: int, end: int) -> list[Any]:
        """The samples from ``begin`` on, up to ``end`` or the end of the part."""
        rows = slice(begin, min(end, self.size))
        return [_rows(data, rows) for data in self._data]

    def __iter__(self) -> Iterator[list[Any]]:
        for begin in range(0, self.size, self.chunk):
            yield self.rows(begin, begin + self.chunk)


def first_part(validation_data: Any, chunk: int) -> Part | None:
    """The first samples of ``(x, y)`` or ``(x, y, sample_weight)``: at most 256, and at most 16 MiB of them
    where one sample has not more. Views, no copies.

    Returns:
        None for anything but arrays: batches from an iterable are the training's to take.
    """
    if not isinstance(validation_data, tuple) or not 2 <= len(validation_data) <= 3:
        return None
    leaves = list(_leaves(validation_data))
    if not leaves or not all(isinstance(leaf, np.ndarray) and leaf.ndim for leaf in leaves):
        return None
    x, y, *rest = validation_data
    samples = len(leaves[0])
    each = sum(leaf.nbytes for leaf in leaves) // max(1, samples)
    size = min(samples, SAMPLES, max(1, BYTES // max(1, each)))
    return Part([x, y, rest[0] if rest else None], size, chunk)


def weights(step: int, wall_time: float, arrays: Mapping[str, Array], images: bool) -> Iterator[bytes]:
    """A histogram of each weight, and its images where they are asked for; one record a weight.

    ``:`` in names becomes ``_``. NaN and infinities are left out of a histogram; a weight without any finite
    number has none. Images are tagged ``<weight>/image/<number>``: real TensorBoard shows only one kind of
    record of a tag.
    """
    for name, array in arrays.items():
        if name.startswith("optimizer/") or array.dtype.kind not in "biuf":
            continue
        tag, histogram = _tag(name), Histogram()
        histogram.add(array)
        value = histogram.value(tag)
        values = [] if value is None else [value]
        if images:
            views = enumerate(image_views(array))
            values += [image_value(f"{tag}/image/{number}", view) for number, view in views]
        if values:
            yield summary(step, wall_time, values)


def activations(
    step: int, wall_time: float, model: Any, part: Part, go_on: Callable[[], bool]
) -> Iterator[bytes]:
    """One histogram of each layer's outputs over all samples of the part, tagged ``<layer>_out``."""
    yield from _merged(step, wall_time, _outputs(model, part), "_out", go_on)


def gradients(
    step: int, wall_time: float, model: Any, part: Part, go_on: Callable[[], bool]
) -> Iterator[bytes]:
    """One histogram of each weight's gradients, those of every chunk counted, tagged ``<weight>_grad``."""
    found = (model.gradients(x, y, sample_weight) for x, y, sample_weight in part)
    yield from _merged(step, wall_time, found, "_grad", go_on)


def _outputs(model: Any, part: Part) -> Iterator[Mapping[str, Array]]:
    begin, count = 0, part.chunk
    while begin < part.size:
        arrays = model.activations(part.rows(begin, begin + count)[0])
        yield arrays
        each = sum(array.nbytes for array in arrays.values()) // min(count, part.size - begin)
        begin += count
        count = max(part.chunk, OUTPUTS // max(1, each))


def _merged(
    step: int,
    wall_time: float,
    chunks: Iterator[Mapping[str, Array]],
    suffix: str,
    go_on: Callable[[], bool],
) -> Iterator[bytes]:
    histograms: dict[str, Histogram] = {}
    for arrays in chunks:
        for name, array in arrays.items():
            histograms.setdefault(name, Histogram()).add(array)
        if not go_on():
            return
    for name, histogram in histograms.items():
        value = histogram.value(_tag(name) + suffix)
        if value is not None:
            yield summary(step, wall_time, [value])


def _tag(name: str) -> str:
    return name.replace(":", "_")


def _leaves(data: Any) -> Iterator[Any]:
    """The arrays of what may be one, or a tuple, list or dict of them."""
    if isinstance(data, dict):
        data = tuple(data.values())
    if isinstance(data, (tuple, list)):
        for inner in data:
            yield from _leaves(inner)
    elif data is not None:
        yield data


def _rows(data: Any, rows: slice) -> Any:
    if isinstance(data, dict):
        return {key: _rows(inner, rows) for key, inner in data.items()}
    if isinstance(data, list):
        return [_rows(inner, rows) for inner in data]
    if isinstance(data, tuple):
        return tuple(_rows(inner, rows) for inner in data)
    return None if data is None else data[rows]
