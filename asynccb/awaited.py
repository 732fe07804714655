"""The end of a run, and all who wait for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asynccb.ending import note_all
from asynccb.errors import RunCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asynccb.callbacks.history import History
    from asynccb.ending import Outcome

__all__ = ["End"]


class End:
    """How a run ends, as soon as that is known, and that it has ended. Any number of tasks may wait for it.

    Attributes:
        outcome: None until the training has left its loop; may become another one until the end.
        errors: of hooks beside the training, to be added as notes to what is raised.
        awaiting: tasks that wait.
    """

    def __init__(self, history: History) -> None:
        self.outcome: Outcome | None = None
        self.errors: Sequence[BaseException] = ()
        self.awaiting = 0
        self._history = history
        self._came = asyncio.Event()

    def fix(self, outcome: Outcome) -> History:
        """Legal on any thread."""
        self.outcome = outcome
        self._history.outcome = outcome.kind
        self._history.reason = outcome.reason
        return self._history

    def come(self) -> None:
        """It has ended. Called on the loop."""
        self._came.set()

    @property
    def has_come(self) -> bool:
        return self._came.is_set()

    @property
    def exception(self) -> BaseException | None:
        """What whoever awaits the run gets raised, or None."""
        if self.outcome is None:
            return None
        if self.outcome.kind == "cancelled":
            return RunCancelled(self.outcome.reason, self._history)
        return self.outcome.exception

    async def wait(self) -> History:
        """The wait of a watcher: to cancel it cancels nothing else."""
        self.awaiting += 1
        try:
            await self._came.wait()
        finally:
            self.awaiting -= 1
        return self.result()

    async def wait_shielded(self, cancel: Callable[[], None]) -> asyncio.CancelledError | None:
        """The wait of an owner: a cancellation is given on by ``cancel`` and answered, at the end."""
        cancelled: asyncio.CancelledError | None = None
        self.awaiting += 1
        try:
            while not self._came.is_set():
                try:
                    await self._came.wait()
                except asyncio.CancelledError as error:
                    cancelled = cancelled or error
                    cancel()
        finally:
            self.awaiting -= 1
        if cancelled is not None:
            note_all(cancelled, list(self.errors))
        return cancelled

    def result(self) -> History:
        """The History, or what there is to raise."""
        assert self.outcome is not None
        if self.outcome.kind == "cancelled":
            cancelled = RunCancelled(self.outcome.reason, self._history)
            note_all(cancelled, list(self.errors))
            raise cancelled
        self.outcome.raise_exception()
        return self._history
