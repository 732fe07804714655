"""Our numbers beside those of Keras 3, step by step, and our files opened by it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from beside_keras import report_of

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs Keras 3"),
]

SIDE = Path(__file__).with_name("keras_side.py")
TOLERANCE = 1e-6
PARTS = [
    "optimizers",
    "losses",
    "sample weights",
    "activations",
    "evaluate",
    "files",
    "embedding",
    "trainable",
]


@pytest.fixture(scope="module", params=["jax", "torch"])
def report(request, tmp_path_factory):
    return report_of(SIDE, request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("part", PARTS)
def test_numbers_agree_with_keras_to_a_millionth(report, part):
    assert {name: value for name, value in report[part].items() if not value <= TOLERANCE} == {}
