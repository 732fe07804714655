"""Weights as pictures: which ones, and what is black and white."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from asynccb.callbacks.tensorboard.images import image_value, image_views


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [
        ((), 0),
        ((5,), [(5, 1)]),
        ((1, 5), [(5, 1)]),
        ((3, 5), [(3, 5)]),
        ((5, 3), [(3, 5)]),
        ((2, 3, 4), [(2, 3)] * 4),
        ((3, 3, 1, 8), [(3, 3)] * 8),
        ((2, 2, 2, 2), 0),
        ((0, 3), 0),
    ],
)
def test_the_pictures_of_a_weight_by_its_shape(shape: tuple[int, ...], pictures: Any) -> None:
    assert [view.shape for view in image_views(np.zeros(shape))] == (pictures or [])


def test_each_kernel_of_three_axes_is_a_picture_of_its_own() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for index, view in enumerate(image_views(array)):
        assert view.tolist() == array[:, :, index].tolist()


@pytest.mark.parametrize(
    ("numbers", "pixels"),
    [
        ([[-1.0, 0.0, 1.0], [math.nan, math.inf, 1.0]], [[0, 128, 255], [0, 0, 255]]),
        ([[2.0, 2.0]], [[0, 0]]),
        ([[math.nan]], [[0]]),
        ([[-1e308, 1e308]], [[0, 255]]),
    ],
)
def test_numbers_lie_between_black_and_white(numbers: Any, pixels: Any) -> None:
    (value,) = Summary.FromString(image_value("w", np.array(numbers))).value
    assert (value.tag, value.image.height, value.image.width) == ("w", len(pixels), len(pixels[0]))
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        assert np.asarray(image).tolist() == pixels
