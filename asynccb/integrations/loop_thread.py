"""An event loop on a thread of its own, for a program that has none."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future

__all__ = ["LoopThread"]

logger = logging.getLogger("asynccb")

LIMIT = 5.0
"""Seconds for which a closing loop is waited for. A task that ignores its cancellation holds it for ever."""


class LoopThread:
    """Starts a daemon thread with a running event loop.

    Attributes:
        loop: it runs until :meth:`close`.

    Raises:
        RuntimeError: the system has no thread left.
    """

    def __init__(self) -> None:
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="asynccb background", daemon=True)
        self._thread.start()
        self.loop = self._ready.result()

    def close(self) -> None:
        """Cancels what still runs on the loop, closes it, and waits for its thread."""
        try:
            self.loop.call_soon_threadsafe(self._closing.set)
        except RuntimeError:
            if not self.loop.is_closed():
                raise
        self._thread.join(LIMIT)
        if self._thread.is_alive():
            logger.error("a task ignores its cancellation: %s is left to itself", self._thread.name)

    def _work(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.get_loop()  # before there is a coroutine that nobody would await
                runner.run(self._run())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)  # no loop to be had: no file descriptor is left, say

    async def _run(self) -> None:
        self._ready.set_result(asyncio.get_running_loop())
        await self._closing.wait()
