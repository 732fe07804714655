"""Async sources: consumed on the event loop, a few items ahead of the training thread.

One task for each source, alone, calls ``__anext__`` and ``aclose``: no generator is ever entered twice. Items
that were fetched but not used in one epoch are the first of the next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.protocols import QueueStatistics
from asynccb.training.feed import as_batch, check_seekable, warn_ran_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Mapping

    from asynccb.protocols import Batch
    from asynccb.training.control import Control

__all__ = ["AsyncFeed"]

AHEAD = 8
"""Items fetched ahead of the training."""


class _Item(NamedTuple):
    number: int
    """Of the pass that it is from."""
    item: Any


class _EndOfPass(NamedTuple):
    empty: bool


class _Failed(NamedTuple):
    error: BaseException


class AsyncFeed:
    """Batches from an async iterable.

    Without ``steps`` an epoch is one pass, and the next pass is asked for when its epoch begins; with
    ``steps`` passes follow each other and an epoch ends after ``steps`` batches. It can go on in the middle
    of a pass if ``source`` has ``seek(pass, batch)``, which tells its next ``aiter`` where to begin (passes
    of a training count from 0, whatever its first epoch).

    The training thread calls ``begin`` and ``next``, the loop everything else. What waits is bounded by 8
    items.

    Attributes:
        name: of the argument that the source was given as.
    """

    def __init__(
        self,
        source: AsyncIterable[Any],
        *,
        steps: int | None,
        weigh: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.steps = steps
        self.samples: int | None = None
        self.exhausted = False
        self.name = "x"
        self._source = source
        self._weigh = weigh
        self._left = -1
        self._fetched: deque[Any] = deque()
        self._passes_wanted = 0
        self._pass, self._taken = -1, 0  # the pass of the item that was trained last, and items taken of it
        self._epoch = -1  # that began last, and where
        self._began = (0, 0)
        self._resumes = False
        self._held = 0
        self._ended = False
        self._bell: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._control: Control | None = None

    def statistics(self) -> QueueStatistics:
        """Of the items fetched; counted is how often the source waited for room."""
        return QueueStatistics(AHEAD, "wait", len(self._fetched), self._held)

    def attach(self, control: Control, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the loop before the thread starts."""
        self._control, self._loop = control, loop

    def end(self) -> None:
        """Nothing more is fetched, not even by a source that swallows the cancellation of its task."""
        self._ended = True

    async def fetch(self) -> None:
        """The body of the task. Ends when it is cancelled, when the source raises, or when nothing more can
        come."""
        mine = asyncio.current_task()
        iterator = None
        passes = number = 0
        empty = True
        try:
            while not self._ended:
                await self._until(passes)
                if iterator is None:
                    empty = True
                    if self._resumes:
                        self._resumes, number = False, max(self._pass, 0)
                        if callable(seek := getattr(self._source, "seek", None)):
                            seek(number, self._taken)
                        empty = not self._taken  # what is left of the pass may be nothing
                    iterator = aiter(self._source)
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    iterator = None
                    # With steps, the pass that follows continues the epoch; a pass without an item ends it
                    # all.
                    if self.steps is None or empty:
                        passes += 1
                        self._put(_EndOfPass(empty))
                    number += 1
                else:
                    empty = False
                    self._put(_Item(number, item))
        except BaseException as error:
            task = asyncio.current_task() if asyncio._get_running_loop() else None
            if isinstance(error, GeneratorExit) and task is not mine:
                iterator = None  # the loop is gone, and with it everybody who could close the source
                raise
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self._cancelled()
                raise
            # A CancelledError that nobody asked for is the source's own doing: let through, it would end this
            # task silently, and the training would wait for ever.
            self._put(_Failed(error))
        finally:
            if iterator is not None and hasattr(iterator, "aclose"):
                await iterator.aclose()

    # On the training thread ---------------------------------------------------------------------------------

    def begin(self, epoch: int, at: int = 0) -> None:
        again, self._epoch = self._resumes and epoch == self._epoch, epoch
        if self.steps is None:
            self._pass, self._taken = self._pass if again else self._pass + 1, at
            self._passes_wanted += 1
        else:
            self._left = self.steps - at
            if not again:
                self._began = (max(self._pass, 0), self._taken)
            elif not at:
                self._pass, self._taken = self._began
            self._passes_wanted = 1
        self._ring()

    def check_seekable(self, argument: str, purpose: str) -> None:
        check_seekable(self._source, argument, purpose, by_state=False)

    def state_dict(self) -> dict[str, Any]:
        return {
            "pass": self._pass,
            "taken": self._taken,
            "epoch": self._epoch,
            "began": self._began,
            "exhausted": self.exhausted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pass, self._taken, self._epoch = (int(state[name]) for name in ("pass", "taken", "epoch"))
        self._began = int(state["began"][0]), int(state["began"][1])
        self.exhausted, self._resumes = bool(state["exhausted"]), True

    def next(self) -> Batch | None:
        if self._left == 0 or self.exhausted:
            return None
        assert self._control is not None
        if not self._fetched and not self._control.wait("feed", lambda: bool(self._fetched), stop_ends=True):
            return None
        item = self._fetched.popleft()
        if self._bell is not None and len(self._fetched) <= AHEAD // 2:
            self._ring()
        if isinstance(item, _Failed):
            raise item.error
        if isinstance(item, _EndOfPass):
            if self._left > 0:
                self.exhausted = True
                warn_ran_out(self._left)
            return None
        self._left -= 1
        if item.number != self._pass:
            self._pass, self._taken = item.number, 0
        self._taken += 1
        batch = as_batch(item.item)
        return batch if self._weigh is None else self._weigh(batch)

    def close(self) -> None:
        """Nothing: its task, on the loop, closes what it has opened."""

    def _ring(self) -> None:
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._rung)
            except RuntimeError:  # the loop is gone; the training thread sees that before its next batch
                if not self._loop.is_closed():
                    raise

    # On the loop --------------------------------------------------------------------------------------------

    def _put(self, item: Any) -> None:
        self._fetched.append(item)
        if self._control is not None:
            self._control.nudge()

    def _cancelled(self) -> None:
        # Once the training has left, that is how this task ends; before, somebody else did it, and no item
        # will ever come.
        if self._control is not None and not self._control.closing:
            self._control.interrupt_with("cancelled", "the task of the async source was cancelled")

    def _rung(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    async def _until(self, passes: int) -> None:
        """Waits until more than ``passes`` passes are wanted and there is room for an item."""

        def wanted() -> bool:
            return self._passes_wanted > passes and len(self._fetched) < AHEAD

        self._held += self._passes_wanted > passes and not wanted()
        while not wanted():
            # The bell hangs before we look again: a thread that took an item in between finds it and rings.
            self._bell = asyncio.get_running_loop().create_future()
            try:
                if not wanted():
                    await self._bell
            finally:
                self._bell = None
