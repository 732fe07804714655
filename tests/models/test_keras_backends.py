"""What holds for Keras models holds with either backend; a process has one, so the other one has its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from keras_models import CALM

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = [pytest.mark.heavy, *CALM]


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    return pytest.importorskip("keras")


@pytest.mark.timeout(400)
def test_all_that_is_tested_holds_with_the_other_backend_too(keras: ModuleType, tmp_path: Path) -> None:
    other = "torch" if keras.backend.backend() == "jax" else "jax"
    compiled = {  # what is compiled once for one of the tests is there for all of them
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    tests = Path(__file__).parents[1]
    files = ["models/test_keras_adapter.py", "callbacks/test_keras_callbacks.py", "contracts/test_model.py"]
    these = [*(str(tests / file) for file in files), "-k", "keras"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "heavy", *these],
        env={**os.environ, **compiled, "KERAS_BACKEND": other, "TMPDIR": str(tmp_path)},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
