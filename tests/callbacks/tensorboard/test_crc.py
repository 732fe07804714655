"""The checksum of many records at once, against known values and against the one that reads byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.record_writer import masked_crc32c

from asynccb.callbacks.tensorboard.crc import masked_crcs


def unmasked(masked: int) -> int:
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("message", "crc"),
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
    ids=["zeros", "ones", "counting up"],
)
def test_the_examples_of_rfc_3720_come_out(message: bytes, crc: int) -> None:
    assert unmasked(int(masked_crcs([message])[0])) == crc


EDGES = [4, 5, 8, 255, 256, 257, 511, 512, 513, 767, 5 * 256, 6 * 256 + 1, 70_001]


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("fill", [None, b"\0", b"\xff"], ids=["random", "zeros", "ones"])
def test_a_record_of_any_size_has_the_checksum_of_its_bytes(size: int, fill: bytes | None) -> None:
    record = np.random.default_rng(size).bytes(size) if fill is None else fill * size
    assert masked_crcs([record]).tolist() == [masked_crc32c(record)]


@given(st.lists(st.binary(min_size=4, max_size=600), max_size=20))
def test_each_of_many_records_has_its_own(records: list[bytes]) -> None:
    assert masked_crcs(records).tolist() == [masked_crc32c(record) for record in records]


@given(st.binary(min_size=4, max_size=600), st.data())
def test_a_flipped_bit_is_seen(record: bytes, data: st.DataObject) -> None:
    place, bit = data.draw(st.integers(0, len(record) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(record)
    flipped[place] ^= 1 << bit
    before, after = masked_crcs([record, bytes(flipped)])
    assert before != after


def test_less_than_four_bytes_is_no_record() -> None:
    with pytest.raises(ValueError, match="a record of 3 bytes"):
        masked_crcs([b"long enough", b"abc"])
