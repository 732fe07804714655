"""The checksum of event files, CRC-32C, for many records at once.

The checksum of a message is the exclusive or of one table entry per byte, chosen by the byte and by its
distance from the end. So numpy looks up all bytes of a thousand records in one go, in place of one Python
step per byte. A long record is a stack of rows of 256 bytes, whose checksums are then joined in pairs. Zeros
before a message change nothing, so records of about one length are padded to lie side by side.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

__all__ = ["masked_crcs"]

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected: RFC 3720, appendix B.4
_ROW = 256
_SHORTEST = 4  # bytes that a register has


def masked_crcs(records: Sequence[bytes]) -> Words:
    """The checksum of each record in the form that event files keep: turned by 15 bits, plus a constant.

    Args:
        records: of at least 4 bytes each.
    """
    crcs = np.empty(len(records), np.uint32)
    alike: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        alike.setdefault((-(-len(record) // _ROW) - 1).bit_length(), []).append(index)
    for doublings, indices in alike.items():
        crcs[indices] = _crcs([records[index] for index in indices], doublings)
    masked: Words = ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)
    return masked


def _crcs(records: Sequence[bytes], doublings: int) -> Words:
    """Of records that have at most ``2 ** doublings`` rows."""
    lengths = np.array([len(record) for record in records])
    if lengths.min() < _SHORTEST:
        raise ValueError(f"a record of {lengths.min()} bytes")
    width = _ROW << doublings if doublings else int(lengths.max())
    joined = bytearray().join([record.rjust(width, b"\0") for record in records])
    data = np.frombuffer(joined, np.uint8)
    begins = np.arange(width, width * len(records) + 1, width) - lengths
    data[begins[:, np.newaxis] + np.arange(_SHORTEST)] ^= np.uint8(0xFF)  # what the register begins with
    crcs = _of_rows(data.reshape(len(records), 1 << doublings, -1))
    for doubled in range(doublings):
        crcs = _shifted(crcs[:, 0::2], _shift(doubled)) ^ crcs[:, 1::2]
    return ~crcs[:, 0]


def _of_rows(rows: NDArray[np.uint8]) -> Words:
    """The register behind each row, begun with zero."""
    width = rows.shape[-1]
    table = _table()[_ROW - width :]
    found = table.ravel().take(rows + np.arange(0, width * 256, 256, dtype=np.intp))
    crcs: Words = np.bitwise_xor.reduce(found, axis=-1)
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
