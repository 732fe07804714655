"""Work that takes its time: one job at a time, on a thread beside the training."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["Sideline"]


class Sideline:
    """Runs a job where nobody waits for it. While one is at work there is no second one, and nothing queues.

    Args:
        name: of the thread, which is there only while there is a job.
    """

    def __init__(self, name: str) -> None:
        self._executor = SerialExecutor(name, background=True)
        self._job: Future[None] | None = None
        self._stopped = False
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def goes_on(self) -> bool:
        """For a job to ask now and then: False once its work is no longer wanted."""
        return not self._stopped

    def start(self, job: Callable[[], None], done: Callable[[], None]) -> None:
        """Starts a job; legal while none is at work.

        Args:
            job: what to do.
            done: called when it has ended, however, or will never begin.
        """

        # Both before the job counts as done: whoever sees that sees its error and what it gave back.
        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._keep(error)
            finally:
                done()

        def ended(future: Future[None]) -> None:
            if future.cancelled():
                done()
            elif future.exception() is not None:  # there was no thread to be had
                self._keep(future.exception())
                done()

        self._job = self._executor.submit(run)
        self._job.add_done_callback(ended)

    def raise_error(self) -> None:
        """Raises the error of a job that has failed, once."""
        if self._error is None:
            return
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # it holds this frame

    async def idle(self) -> None:
        """Waits for the job, if there is one."""
        if self._job is not None:
            job = asyncio.wrap_future(self._job)
            try:
                await asyncio.wait({job})
            finally:
                job.cancel()  # if the wait was cancelled: let nobody hear of its end

    async def end(self) -> None:
        """Waits for the job, if there is one, and raises its error."""
        await self.idle()
        self.raise_error()

    def stop(self) -> None:
        """Tells the job that its work is no longer wanted."""
        self._stopped = True

    def _keep(self, error: BaseException | None) -> None:
        if self._error is None:
            self._error = error
