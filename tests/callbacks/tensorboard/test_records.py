"""Records written byte by byte are the protocol buffers that TensorBoard's own code reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from asynccb.callbacks.tensorboard import records

if TYPE_CHECKING:
    from pathlib import Path

STEPS = st.integers(0, 2**63 - 1)
TIMES = st.floats(allow_nan=False, width=64)


def parsed(record: bytes) -> Any:
    event = Event.FromString(record)
    whole = event.SerializeToString()
    event.DiscardUnknownFields()
    assert event.SerializeToString() == whole  # nothing in it that the reader does not know
    return event


def test_the_first_record_tells_the_version_of_the_format() -> None:
    event = parsed(records.opening(12.5))
    assert (event.wall_time, event.file_version) == (12.5, "brain.Event:2")


def test_a_graph_is_carried_as_it_is() -> None:
    event = parsed(records.graph(1.0, b"x" * 300))
    assert event.graph_def == b"x" * 300


@given(STEPS, TIMES, st.dictionaries(st.text(min_size=1), st.floats(width=32), max_size=6))
def test_every_number_of_any_logs_comes_back(step: int, wall_time: float, logs: dict[str, float]) -> None:
    logs = {key: value for key, value in logs.items() if key not in ("batch", "size")}
    event = parsed(records.scalars(step, wall_time, logs))
    assert (event.step, event.wall_time) == (step, wall_time)
    back = {value.tag: value.simple_value for value in event.summary.value}
    assert list(back) == list(logs)
    assert np.array_equal(list(back.values()), list(logs.values()), equal_nan=True)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (2, 2.0),
        (True, 1.0),
        (np.float32(0.25), 0.25),
        (np.array([[0.5]]), 0.5),
        (1e39, math.inf),
        (-1e39, -math.inf),
        (10**400, math.inf),
        (-(10**400), -math.inf),
    ],
)
def test_whatever_is_one_number_is_a_single_float(value: Any, read: float) -> None:
    (found,) = parsed(records.scalars(0, 0.0, {"k": value})).summary.value
    assert found.simple_value == read


@pytest.mark.parametrize("value", [None, "1.0", np.eye(2), [1.0], 1j])
def test_whatever_is_not_one_number_is_left_out(value: Any) -> None:
    assert not parsed(records.scalars(0, 0.0, {"k": value, "batch": 1, "size": 2})).summary.value


def test_a_tag_that_is_no_unicode_is_spelt_out() -> None:
    (value,) = parsed(records.scalars(0, 0.0, {"\ud800é": 1.0}, "batch_")).summary.value
    assert value.tag == "batch_\\ud800é"


def test_a_histogram_has_all_that_the_page_draws() -> None:
    value = records.histogram("w", (-1.0, 3.0), (4, 5.0, 6.0), np.array([0.0, 3.0]), np.array([1.0, 3.0]))
    (found,) = parsed(records.summary(7, 1.0, [value])).summary.value
    histo = found.histo
    assert found.tag == "w"
    assert (histo.min, histo.max, histo.num, histo.sum, histo.sum_squares) == (-1.0, 3.0, 4.0, 5.0, 6.0)
    assert (list(histo.bucket_limit), list(histo.bucket)) == ([0.0, 3.0], [1.0, 3.0])


def test_an_image_has_its_size_and_is_grey() -> None:
    (found,) = parsed(records.summary(0, 0.0, [records.image("w", (200, 3), b"png")])).summary.value
    image = found.image
    assert (image.height, image.width, image.colorspace) == (200, 3, 1)
    assert image.encoded_image_string == b"png"


@given(st.lists(st.binary(min_size=9, max_size=300), max_size=5))
def test_frames_are_what_a_reader_of_event_files_takes_apart(contents: list[bytes]) -> None:
    from tensorboardX.record_writer import masked_crc32c

    whole, begin = records.frames(contents), 0
    for content in contents:
        length = whole[begin : begin + 8]
        assert int.from_bytes(length, "little") == len(content)
        assert int.from_bytes(whole[begin + 8 : begin + 12], "little") == masked_crc32c(length)
        end = begin + 12 + len(content)
        assert whole[begin + 12 : end] == content
        assert int.from_bytes(whole[end : end + 4], "little") == masked_crc32c(content)
        begin = end + 4
    assert begin == len(whole)


def test_more_records_than_are_looked_at_together_are_all_there(tmp_path: Path) -> None:
    contents = [records.scalars(step, 1.0, {"loss": float(step)}) for step in range(10_000)]
    (tmp_path / "many").write_bytes(records.frames(contents))
    assert list(RawEventFileLoader(str(tmp_path / "many")).Load()) == contents


def test_real_tensorboard_reads_the_frames_and_refuses_a_changed_one(tmp_path: Path) -> None:
    contents = [records.opening(1.0), records.scalars(1, 1.0, {"loss": 1.0})]
    whole = records.frames(contents)
    (tmp_path / "good").write_bytes(whole)
    assert list(RawEventFileLoader(str(tmp_path / "good")).Load()) == contents
    (tmp_path / "bad").write_bytes(whole[:-5] + bytes((whole[-5] ^ 1,)) + whole[-4:])
    assert list(RawEventFileLoader(str(tmp_path / "bad")).Load()) == contents[:1]
