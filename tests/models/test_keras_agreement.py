"""Our numbers beside those of Keras 3, step by step, and our files opened by it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"needs {request.param}")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "KERAS_BACKEND": request.param, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(SIDE), str(tmp_path_factory.mktemp(request.param))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("part", PARTS)
def test_numbers_agree_with_keras_to_a_millionth(report, part):
    assert {name: value for name, value in report[part].items() if not value <= TOLERANCE} == {}
