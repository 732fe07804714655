"""Waiting for what a thread brings about."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENT = 20.0
"""Seconds after which what should have come has not."""


async def until(condition: Callable[[], object]) -> None:
    """Returns when ``condition()`` holds; fails if it does not come true in time."""
    async with asyncio.timeout(PATIENT):
        while not condition():  # noqa: ASYNC110  # a thread brings it about
            await asyncio.sleep(0.001)
