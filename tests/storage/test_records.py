"""The arrays of a file are found in memory, one by one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location("model_files", Path(__file__).with_name("model_files.py"))
model_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model_files)

ARRAYS = model_files.numbers((3, 4), (0, 2), (5,), (), seed=1)


def flat(*arrays):
    """The arrays in one, each on a boundary of 64 bytes."""
    return np.concatenate(
        [np.resize(np.append(a, np.zeros(16, "f4")), -(-a.size // 16) * 16) for a in arrays]
    )


def check(contents):
    found = contents.arrays()
    assert [array.shape for array in found] == [array.shape for array in ARRAYS]
    assert all(map(np.array_equal, found, ARRAYS))
    return found


def test_arrays_of_their_own_are_given_as_they_are():
    found = check(model_files.file_of(ARRAYS))
    assert np.shares_memory(found[0], ARRAYS[0])


def test_neighbours_in_a_flat_array_are_views():
    memory = flat(*ARRAYS)
    found = check(model_files.file_of(ARRAYS, memory=(memory,)))
    assert all(np.shares_memory(array, memory) for array in found if array.size)


def test_the_order_in_memory_is_the_layouts():
    order = (3, 2, 1, 0)
    check(model_files.file_of(ARRAYS, order=order))
    check(model_files.file_of(ARRAYS, order=order, memory=(ARRAYS[3], flat(ARRAYS[2], ARRAYS[0]))))


def test_too_few_arrays_are_an_error():
    with pytest.raises(ValueError, match="3 arrays are given, the layout has 4"):
        model_files.file_of(ARRAYS, memory=(ARRAYS[0], ARRAYS[2])).arrays()


def test_equal_layouts_are_one_key():
    left, right, other = (model_files.layout_of(ARRAYS, name=name) for name in ("m", "m", "n"))
    assert left == right
    assert hash(left) == hash(right)
    assert left != other
