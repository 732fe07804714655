"""The way in and out of a run for a thread that is there already."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

from asynccb.callbacks.history import History
from asynccb.claims import Claim
from asynccb.ending import of_error
from asynccb.errors import RunCancelled
from asynccb.prepared import REPLAY
from asynccb.run import Run

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from asynccb.driver import Driver
    from asynccb.ending import Outcome
    from asynccb.integrations.observed import Observed
    from asynccb.session import Order

__all__ = ["Entrance"]


class Entrance:
    """The engine of a run whose thread is there already, and the way in and out for that thread.

    Args:
        loop: of the run.
        poll: seconds between two looks whether it still exists.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, poll: float) -> None:
        self.run: _Run
        self._loop = loop
        self._poll = poll
        self._driver: Driver | None = None
        self._error: BaseException | None = None
        self._news = threading.Event()
        self._over = threading.Event()

    def begin(self, order: Order, name: str | None) -> None:
        """Begins the run. Called on the loop."""
        try:
            self.run = _Run(name, order.history, self._set_over)
            self.run.begin(order, Claim(self.run.name, None, []))
        except BaseException as error:
            self._error = error
            self._set_over()

    def start(self, target: Callable[[], None], name: str) -> None:
        """What an engine does: the thread that waits goes on as the training thread."""
        self._driver = cast("Driver", target)
        self._news.set()

    def wait_for_driver(self) -> Driver:
        self._wait(self._news)
        if self._driver is not None:
            return self._driver
        if self._error is not None:
            raise self._error
        raise RunCancelled("the event loop ended", History())

    def turn_away(self, error: BaseException) -> None:
        """The thread does not come."""
        if self._over.is_set() or self._loop.is_closed():
            return
        self._wait(self._news)
        if self._driver is not None:
            self.leave(self._driver, of_error(error))

    def leave(self, driver: Driver, outcome: Outcome) -> None:
        """Closes the training and waits until it has drained. An interrupt meanwhile leaves it the grace
        period, a second one nothing.

        Raises:
            RunCancelled: the loop was closed before that; what was not handled is lost.
        """
        self.run.come_back()
        driver.finish(outcome)
        lost = False
        try:
            self._wait(self._over)
        except BaseException:
            self.run.cancel("it was interrupted while its callbacks still worked")
            self._wait(self._over)
            raise
        finally:
            if not self._over.is_set() and self._loop.is_closed():
                lost = True
                self.run.give_up_loop()
        if lost:
            raise RunCancelled("the event loop was closed while callbacks still worked", self.run.history)

    def _set_over(self) -> None:
        self._over.set()
        self._news.set()

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(self._poll):
            if self._loop.is_closed():
                return


class _Run(Run):
    """A run that tells when nothing of it is left, to a thread that cannot await it."""

    def __init__(self, name: str | None, history: History, over: Callable[[], None]) -> None:
        super().__init__(name, history, replay=REPLAY, watched=lambda: True)
        self._told_over = over

    def over(self) -> None:
        super().over()
        self._told_over()

    def give_up_loop(self) -> None:
        assert self._session is not None
        self._session.give_up_loop()

    def expect_copies(self) -> None:
        cast("Observed", self._under_way.model).require_capture()
        super().expect_copies()

    def come_back(self) -> None:
        """A foreign loop hears of a cancel when it calls. What is left then has the whole grace period."""
        parts = self._parts
        if parts is not None and parts.supervisor.cancelled_at is not None:
            parts.supervisor.cancelled_at = time.monotonic()
