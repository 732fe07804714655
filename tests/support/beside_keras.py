"""Programs that compare with Keras, each in a process of its own, because a process has one backend."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report_of(program: Path, backend: str, folder: Path) -> Any:
    """What the last line that ``program`` prints says, as JSON; the lines before it are shown.

    Args:
        program: is given ``folder``, for scratch.
        backend: of Keras; the test is skipped where it is not installed.
    """
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"needs {backend}")
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.strip().splitlines()
    print(*lines[:-1], sep="\n")
    return json.loads(lines[-1])
