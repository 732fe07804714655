"""Fixtures of the tests of faults of the disk, and the way to what they share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from disk_faults import shim as shims
from disk_faults.client import Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to preload."""
    if why := shims.why_not():
        pytest.skip(why)
    return shims.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def server(shim: Path) -> Iterator[Server]:
    """The server of trials."""
    server = Server(shim)
    yield server
    server.close()
