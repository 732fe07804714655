"""Histograms: every finite number once, in its bucket, however the numbers came."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.data_compat import migrate_value
from tensorboard.util.tensor_util import make_ndarray

from asynccb.callbacks.tensorboard.histograms import BUCKETS, Histogram

LARGEST = 8e307

NUMBERS = st.one_of(
    hnp.arrays(np.float32, hnp.array_shapes(min_side=0), elements=st.floats(width=32)),
    hnp.arrays(np.float64, hnp.array_shapes(min_side=0), elements=st.floats()),
    hnp.arrays(np.float16, hnp.array_shapes(), elements=st.floats(width=16)),
    hnp.arrays(np.int64, hnp.array_shapes()),
    hnp.arrays(np.bool_, hnp.array_shapes()),
)


def of(*arrays: Any) -> Any:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    value = histogram.value("w")
    return None if value is None else Summary.FromString(value).value[0].histo


def finite(array: Any) -> Any:
    flat = array.ravel().astype(float)
    return np.clip(flat[np.isfinite(flat)], -LARGEST, LARGEST)


@given(NUMBERS)
def test_every_finite_number_is_counted_once_in_the_bucket_that_holds_it(array: Any) -> None:
    numbers, histogram = finite(array), of(array)
    if not numbers.size:
        assert histogram is None
        return
    edges = [-np.inf, *histogram.bucket_limit]
    assert edges == sorted(set(edges))
    assert edges[-1] == histogram.max
    held = [((numbers >= low) & (numbers < high)).sum() for low, high in pairwise(edges)]
    held[-1] += (numbers == edges[-1]).sum()
    assert list(histogram.bucket) == held
    assert sum(held) == histogram.num == numbers.size
    assert len(held) <= BUCKETS
    assert (histogram.min, histogram.max) == (numbers.min(), numbers.max())


@given(NUMBERS.filter(lambda array: array.size > 0), st.data())
def test_however_the_numbers_are_divided_the_buckets_are_the_same(array: Any, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(array.size)))
    cut = data.draw(st.integers(0, array.size))
    shuffled = array.ravel()[list(order)]
    histogram = Histogram()
    for part in (shuffled[:cut], shuffled[cut:]):
        histogram.add(part)
        histogram.value("counts what has come so far")
    value, whole = histogram.value("w"), of(array)
    if whole is None:
        assert value is None
        return
    assert value is not None
    parts = Summary.FromString(value).value[0].histo
    assert list(parts.bucket_limit) == list(whole.bucket_limit)
    assert list(parts.bucket) == list(whole.bucket)


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(0).normal(size=70_000).astype(np.float32),
        np.asfortranarray(np.random.default_rng(1).normal(size=(300, 200))),
        np.random.default_rng(2).normal(size=(400, 300))[::2, ::3],
        np.arange(70_000),
    ],
    ids=["more than a block", "Fortran order", "with gaps", "integers"],
)
def test_large_arrays_in_any_layout_are_counted_whole(array: Any) -> None:
    histogram = of(array)
    assert histogram.num == sum(histogram.bucket) == array.size
    assert histogram.sum == pytest.approx(float(array.sum(dtype=float)))
    assert histogram.sum_squares == pytest.approx(float((array.astype(float) ** 2).sum()))
    assert BUCKETS / 2 <= len(histogram.bucket) <= BUCKETS


def test_numbers_far_from_zero_have_buckets_of_their_own() -> None:
    numbers = np.random.default_rng(0).normal(1000.0, 0.01, 5000)
    assert len(of(numbers).bucket) >= BUCKETS / 2


def test_the_greatest_number_is_never_alone_in_a_bucket_without_width() -> None:
    histogram = of(-np.maximum(np.linspace(-1.0, 1.0, 101), 0.0))  # half of them are the greatest, zero
    widths = np.diff([histogram.min, *histogram.bucket_limit])
    assert (widths > 0).all()
    assert sum(histogram.bucket) == 101


def test_the_page_shows_each_of_them() -> None:
    numbers = np.random.default_rng(0).normal(size=1000)
    histogram = Histogram()
    histogram.add(numbers)
    (value,) = Summary.FromString(histogram.value("w") or b"").value
    shown = make_ndarray(migrate_value(value).tensor)
    assert shown[:, 2].sum() == 1000
    assert shown[0, 0] == np.float32(numbers.min())
    assert shown[-1, 1] == np.float32(numbers.max())
    assert (shown[1:, 0] == shown[:-1, 1]).all()


def test_memory_does_not_grow_with_what_is_added() -> None:
    array = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    tracemalloc.start()
    try:
        of(array, array)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 4


def test_nothing_is_a_histogram_of_nothing() -> None:
    assert of() is None
    assert of(np.zeros(0), np.array([np.nan, np.inf])) is None
