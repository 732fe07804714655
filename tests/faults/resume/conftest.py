"""Fixtures of the tests of killed and resumed trainings, and the way to what they share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from resume_faults.client import Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def servers(root: Path) -> Iterator[tuple[Server, Server]]:
    """Two servers of trials."""
    if not hasattr(os, "fork"):
        pytest.skip("this platform cannot fork")
    servers = Server(root), Server(root)
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    """The server of trials."""
    return servers[0]
