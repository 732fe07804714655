"""What we save Keras loads, and what Keras saves we load: layer by layer, both ways."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from beside_keras import report_of

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(200),
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs Keras 3"),
]

SIDE = Path(__file__).with_name("interchange_side.py")
TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=["jax", "torch"])
def report(request, tmp_path_factory):
    return report_of(SIDE, request.param, tmp_path_factory.mktemp(request.param))


def test_predictions_agree_to_a_millionth_for_every_layer_in_both_directions(report):
    assert len(report["layers"]) == 22
    for layer, row in report["layers"].items():
        assert len(row) == 8
        assert {way: value for way, value in row.items() if not value <= TOLERANCE} == {}, layer


def test_a_training_that_keras_began_goes_on_here_with_the_same_numbers(report):
    assert len(report["optimizers"]) == 6 * 2 * 2
    assert {name: value for name, value in report["optimizers"].items() if not value <= TOLERANCE} == {}


def test_what_was_never_trained_or_never_compiled_comes_back_so(report):
    assert {name: value for name, value in report["fresh"].items() if not value <= TOLERANCE} == {}
