"""The runs of an orchestrator in the order in which they end."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asynccb.run import Run

__all__ = ["Completed"]


class Completed:
    """An async iterator, for one task; :meth:`asynccb.Orchestrator.as_completed` makes it.

    Args:
        ended: the runs that have ended already.
        pending: whether there are others.
        allowed: raises where whoever iterates would wait for itself.
    """

    def __init__(
        self, ended: Iterable[Run], pending: Callable[[], object], allowed: Callable[[], object]
    ) -> None:
        self._ended = deque(ended)
        self._pending = pending
        self._allowed = allowed
        self._bell = asyncio.Event()

    def add(self, run: Run) -> None:
        """It has ended. Called on the loop."""
        self._ended.append(run)
        self._bell.set()

    def __aiter__(self) -> Completed:
        return self

    async def __anext__(self) -> Run:
        self._allowed()
        while not self._ended:
            if not self._pending():
                raise StopAsyncIteration
            self._bell.clear()
            await self._bell.wait()
        return self._ended.popleft()
