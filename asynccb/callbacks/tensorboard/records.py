"""TensorBoard's records, byte by byte: protocol buffers written out, and the frame around each in the file.

Written by hand because a training may leave one for every batch: a message object and its setters cost more
than the batch's whole delivery may. The fields are those of ``event.proto`` and ``summary.proto``.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.tensorboard.crc import masked_crcs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "BATCH_PREFIX",
    "encoded",
    "field",
    "frames",
    "graph",
    "histogram",
    "image",
    "is_length_head",
    "opening",
    "scalars",
    "start",
    "summary",
    "varint",
]

BATCH_PREFIX = "batch_"
"""What the tags of the scalars of batches begin with."""

_double, _float = struct.Struct("<d").pack, struct.Struct("<f").pack
_length = struct.Struct("<Q").pack
_TOGETHER = 4096
"""Records whose checksums are computed at a time, which bounds the memory that takes."""


def opening(wall_time: float) -> bytes:
    """The first record of a file."""
    return b"\x09" + _double(wall_time) + field(3, b"brain.Event:2")


def start(step: int, wall_time: float) -> bytes:
    """The record of a session that starts at ``step``: for a reader, what came before with this step or a
    higher one is void."""
    return b"\x09" + _double(wall_time) + b"\x10" + varint(step) + field(7, b"\x08\x01")


def graph(wall_time: float, definition: bytes) -> bytes:
    """The record with a serialized GraphDef."""
    return b"\x09" + _double(wall_time) + field(4, definition)


def summary(step: int, wall_time: float, values: Iterable[bytes]) -> bytes:
    """A record of values at one step; the values are what the functions below answer."""
    content = b"".join(values)
    return b"".join(
        (b"\x09", _double(wall_time), b"\x10", varint(step), b"\x2a", varint(len(content)), content)
    )


def scalars(step: int, wall_time: float, logs: Mapping[str, Any], prefix: str = "") -> bytes:
    """The record with each number in ``logs``, ``batch`` and ``size`` apart; tags are prefix and key."""
    values = []
    for key, value in logs.items():
        if key == "batch" or key == "size":
            continue
        number = value if type(value) is float else _number(value)
        if number is not None:
            values.append(_scalar_head(prefix + key) + _single(number))
    return summary(step, wall_time, values)


def histogram(
    tag: str,
    extremes: tuple[float, float],
    moments: tuple[int, float, float],
    limits: NDArray[np.float64],
    counts: NDArray[np.float64],
) -> bytes:
    """A value of a summary.

    Args:
        tag: its name.
        extremes: least and greatest number.
        moments: how many numbers, their sum, the sum of their squares.
        limits: the right edge of each bucket.
        counts: numbers in each bucket.
    """
    fields = (*extremes, *moments)
    heads = (b"\x09", b"\x11", b"\x19", b"\x21", b"\x29")
    content = b"".join(head + _double(field) for head, field in zip(heads, fields, strict=True))
    content += field(6, np.asarray(limits, "<f8").tobytes()) + field(7, np.asarray(counts, "<f8").tobytes())
    return field(1, field(1, encoded(tag)) + field(5, content))


def image(tag: str, shape: tuple[int, int], png: bytes) -> bytes:
    """A value of a summary: a grey picture of ``shape`` (height, width)."""
    height, width = shape
    content = b"\x08" + varint(height) + b"\x10" + varint(width) + b"\x18\x01" + field(4, png)
    return field(1, field(1, encoded(tag)) + field(4, content))


def frames(records: Sequence[bytes]) -> bytes:
    """The records as they stand in a file: length, its checksum, content, its checksum."""
    parts: list[bytes] = []
    for begin in range(0, len(records), _TOGETHER):
        some = records[begin : begin + _TOGETHER]
        crcs = masked_crcs(some).astype("<u4").tobytes()
        for index, record in enumerate(some):
            parts += (_length_head(len(record)), record, crcs[4 * index : 4 * index + 4])
    return b"".join(parts)


def is_length_head(head: bytes) -> bool:
    """Whether these twelve bytes are the length of a record and its checksum."""
    return head == _length_head(int.from_bytes(head[:8], "little"))


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that has a length: a text, bytes, a message, packed numbers."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


def varint(number: int) -> bytes:
    """An integer of 64 bits as protocol buffers have it; negative ones in two's complement."""
    if 0 <= number < 0x80:
        return bytes((number,))
    number &= 0xFFFF_FFFF_FFFF_FFFF
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def encoded(text: str) -> bytes:
    """UTF-8."""
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate has no place in a record


@lru_cache(4096)
def _length_head(size: int) -> bytes:
    length = _length(size)
    return length + masked_crcs([length]).astype("<u4").tobytes()


@lru_cache(4096)
def _scalar_head(tag: str) -> bytes:
    content = field(1, encoded(tag)) + b"\x15"
    return b"\x0a" + varint(len(content) + 4) + content


def _single(number: float) -> bytes:
    try:
        return _float(number)
    except OverflowError:  # beyond all single floats
        return _float(math.copysign(math.inf, number))


def _number(value: object) -> float | None:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, (int, float, np.bool_, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        return math.inf if value > 0 else -math.inf
