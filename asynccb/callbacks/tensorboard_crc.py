"""The checksum of event files, CRC-32C, for many records at once.

The checksum of a message is the exclusive or of one table entry per byte, chosen by the byte and by its
distance from the end. So numpy looks up all bytes of a thousand short records in one go, in place of one
Python step per byte; a long record is a stack of rows of 256 bytes, whose checksums are then joined in pairs.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

__all__ = ["masked_crcs"]

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected: RFC 3720, appendix B.4
_ROW = 256
_SHORTEST = 4  # bytes that the register's start value lies upon


def masked_crcs(records: Sequence[bytes]) -> Words:
    """The checksum of each record in the form that event files keep: turned by 15 bits, plus a constant.

    Args:
        records: of at least 4 bytes each.
    """
    crcs = np.empty(len(records), np.uint32)
    short = [index for index, record in enumerate(records) if len(record) <= _ROW]
    if short:
        crcs[short] = _short([records[index] for index in short])
    for index, record in enumerate(records):
        if len(record) > _ROW:
            crcs[index] = _long(record)
    crcs = ~crcs
    masked: Words = ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)
    return masked


def _short(records: Sequence[bytes]) -> Words:
    lengths = np.array([len(record) for record in records])
    width = int(lengths.max())
    if lengths.min() < _SHORTEST:
        raise ValueError(f"a record of {lengths.min()} bytes")
    joined = b"".join([record.rjust(width, b"\0") for record in records])
    rows = np.frombuffer(joined, np.uint8).reshape(len(records), width)
    crcs: Words = _of_rows(rows) ^ _starts()[lengths]
    return crcs


def _long(record: bytes) -> Any:
    count = -(-len(record) // _ROW)
    data = np.frombuffer(record.rjust(count * _ROW, b"\0"), np.uint8).copy()
    begin = data.size - len(record)
    data[begin : begin + _SHORTEST] ^= 0xFF
    crcs, doubled = _of_rows(data.reshape(count, _ROW)), 0
    while crcs.size > 1:
        if crcs.size % 2:
            crcs = np.concatenate((np.zeros(1, np.uint32), crcs))  # leading zeros change nothing
        crcs = _shifted(crcs[0::2], _shift(doubled)) ^ crcs[1::2]
        doubled += 1
    return crcs[0]


def _of_rows(rows: NDArray[np.uint8]) -> Words:
    """The register behind each row, begun with zero."""
    width = rows.shape[1]
    table = _table()[_ROW - width :]
    found = table.ravel().take(rows + np.arange(0, width * 256, 256, dtype=np.intp))
    crcs: Words = np.bitwise_xor.reduce(found, axis=1)
    return crcs


def _shifted(crcs: Words, shift: Words) -> Words:
    """The registers after as many zero bytes more as ``shift`` stands for."""
    found = np.ascontiguousarray(crcs, "<u4").view(np.uint8).reshape(*crcs.shape, 4)
    moved: Words = shift[0][found[..., 0]]
    for place in (1, 2, 3):
        moved ^= shift[place][found[..., place]]
    return moved


@cache
def _table() -> Words:
    """``[place in a row of 256 bytes, byte]`` -> what it adds to the register at the end of the row."""
    one = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one = np.where(one & 1, (one >> np.uint32(1)) ^ np.uint32(_POLYNOMIAL), one >> np.uint32(1))
    table = np.empty((_ROW, 256), np.uint32)
    table[-1] = one
    for place in range(_ROW - 2, -1, -1):
        behind = table[place + 1]
        table[place] = (behind >> np.uint32(8)) ^ one[behind & np.uint32(0xFF)]
    return table


@cache
def _shift(doubled: int) -> Words:
    """For each byte of a register: what is left of it after ``2 ** doubled`` rows of zeros."""
    if not doubled:
        return _table()[:_SHORTEST]
    half = _shift(doubled - 1)
    return _shifted(half, half)


@cache
def _starts() -> Words:
    """Length -> what the start value, all ones, adds; it lies upon the first four bytes."""
    ones = np.concatenate((_table()[:, 255], np.zeros(_SHORTEST, np.uint32)))
    adds = ones[:-4] ^ ones[1:-3] ^ ones[2:-2] ^ ones[3:-1]
    return np.concatenate((np.zeros(1, np.uint32), adds[::-1]))
