"""What all tests of faults share."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for one test, in memory where that can be: what is tested does not depend on how fast a disk
    is. Killed saves may leave their temporary files in it."""
    memory = "/dev/shm"
    folder = Path(tempfile.mkdtemp("", "faults ", memory if os.access(memory, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)
