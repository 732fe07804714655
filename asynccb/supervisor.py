"""The one task that owns everything a run starts: its thread, its consumers, its async sources, and their
end.

The consumers stand in a plain list and not in a TaskGroup: cancelled in its ``__aexit__``, a group drops all
its tasks without a drain, and an error while closing replaces the CancelledError by a group, so that
``asyncio.timeout`` around a training would give no TimeoutError.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

from asynccb.bus.delivery import end_by_force
from asynccb.ending import Outcome, of_error
from asynccb.errors import RunCancelled
from asynccb.events import ExceptionRaised, Logs

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable

    from asynccb.bus.delivery import Consumer
    from asynccb.bus.dispatch import Dispatcher
    from asynccb.callbacks.history import History
    from asynccb.driver import Driver
    from asynccb.protocols import Engine
    from asynccb.training.control import Control
    from asynccb.training.programs import Program

__all__ = ["Supervisor"]

logger = logging.getLogger("asynccb")


class Supervisor:
    """Starts a run, waits for its thread, drains its mailboxes, and ends what is left.

    Args:
        name: of the run, for tasks, threads and messages.
        driver: the body of the thread.
        consumers: one for each callback, not yet started.
        fixed: told the outcome where the thread cannot tell it; answers the History.
        cancel: called with a reason when somebody cancels the supervisor's own task.
        context: gives each task a fresh copy of the caller's context.
    """

    def __init__(
        self,
        name: str,
        driver: Driver,
        program: Program,
        consumers: list[Consumer],
        dispatcher: Dispatcher,
        control: Control,
        engine: Engine,
        *,
        fixed: Callable[[Outcome], History],
        cancel: Callable[[str], None],
        context: Callable[[], contextvars.Context],
    ) -> None:
        self.outcome: Outcome | None = None
        self.stuck = False
        self.draining = False
        self.cancelled_at: float | None = None
        self.left_at: float | None = None
        """When the thread had left, or was given up (``time.monotonic``)."""
        self._name = name
        self._driver = driver
        self._program = program
        self._consumers = consumers
        self._dispatcher = dispatcher
        self._control = control
        self._engine = engine
        self._fixed = fixed
        self._cancel = cancel
        self._context = context
        self._limits = control.limits
        self._released_at = 0.0
        self._feeding: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()

    # What others tell it, on the loop -----------------------------------------------------------------------

    def poke(self) -> None:
        """Something changed that the supervisor may be waiting for."""
        self._news.set()

    def moved(self) -> None:
        """A consumer has handled something."""
        self._control.nudge()
        if self.draining:
            self._news.set()

    def thread_left(self, outcome: Outcome) -> None:
        """The last that the thread says. Too late if it was given up as stuck."""
        if self.outcome is None:
            self.outcome = outcome
        self._news.set()

    def abandon_all(self) -> None:
        """Ends whatever is still there, at once: the supervisor itself has failed."""
        for consumer in self._consumers:
            if not consumer.ended:
                consumer.abandon(time.monotonic())
        for task in self._feeding:
            task.cancel()

    # Its life -----------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """From start to end. Cancelling the task cancels the run; it still ends in order."""
        if self._control.interrupt is not None:  # cancelled while queued: no hook runs
            outcome = of_error(self._control.interrupt)
            self._fixed(outcome)
            return outcome
        self._start()
        outcome = await self._wait_for_thread()
        self.left_at = time.monotonic()
        await self._end_feeds()
        await self._drain()
        await self._end_consumers()
        return outcome

    def _start(self) -> None:
        for consumer in self._consumers:
            consumer.start(self._context(), f"callback {consumer.name} of {self._name}")
        for feed in self._program.feeds:
            feed.attach(self._control, asyncio.get_running_loop())
            task = asyncio.get_running_loop().create_task(
                feed.fetch(), name=f"source of {self._name}", context=self._context()
            )
            self._feeding.append(task)
        try:
            self._context().run(self._engine.start, self._driver, f"asynccb {self._name}")
        except BaseException as error:  # no thread to be had
            self.outcome = of_error(error)
            self._fixed(self.outcome)

    async def _wait_for_thread(self) -> Outcome:
        while self.outcome is None:
            deadline = self._thread_deadline()
            if deadline is not None and time.monotonic() >= deadline:
                self.outcome = self._give_up_thread()
            else:
                await self._wait_for_news(deadline)
        return self.outcome

    def _thread_deadline(self) -> float | None:
        """When the thread counts as stuck; None: never, because nobody has asked it to leave, or because it
        has left its loop after a callback failed, and closing hooks have all the time then."""
        if self._control.interrupt is None:
            return None
        if self._driver.outcome is None:
            comeback = self._limits.grace if self._limits.comeback is None else self._limits.comeback
            return None if math.isinf(comeback) else self._control.interrupted_at + comeback
        return None if self.cancelled_at is None else self.cancelled_at + self._limits.grace

    def _give_up_thread(self) -> Outcome:
        """The thread is stuck in a batch or a hook. It cannot be killed: it is left alone, and no hook of
        ours runs on it."""
        assert self._control.interrupt is not None
        # A thread that is stuck in a closing hook had left its loop: the outcome was fixed then.
        outcome = self._driver.outcome or of_error(self._control.interrupt)
        hooks = [self._program.closing.hook]
        if outcome.way.exception_hook:
            hooks.insert(0, ExceptionRaised.hook)
        unheard = [
            f"{s.name}.{hook}"
            for s in self._dispatcher.subscribers
            for hook in hooks
            if s.begun and hook in s.inline and hook not in s.closing_hooks
        ]
        reason = self._control.interrupt.reason
        self.stuck = self._control.closing = True
        self._control.interrupt_with("abandoned", "the run ended without its thread")
        self._dispatcher.silence()
        self._control.share.leave()  # others compute meanwhile
        history = self._fixed(outcome)
        # What a thread in the middle of an event may still hand over must not come after the closing hooks.
        lost = [f"{len(c.mailbox.queue)} events for {c.name}" for c in self._consumers if c.mailbox.queue]
        for consumer in self._consumers:
            consumer.mute()
        if outcome.way.exception_hook:
            told = outcome.exception or RunCancelled(outcome.reason, history)
            self._dispatcher.close_beside(ExceptionRaised, told)
        self._dispatcher.close_beside(self._program.closing, self._driver.step, Logs())
        logger.error(
            "%s: the training thread did not come back within %g s after %s; it is left to itself.%s%s",
            self._name,
            self._limits.grace,
            reason,
            f" Hooks that never ran: {', '.join(unheard)}" if unheard else "",
            f" Lost: {', '.join(lost)}" if lost else "",
        )
        return outcome

    # The drain ----------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Waits until every mailbox is empty and every hook is done, within the limits of the way out."""
        self.draining = True
        await self._wait_for_consumers(lambda consumer: consumer.mailbox.finished)
        while self._dispatcher.release_withheld():
            self._released_at = time.monotonic()
            await self._wait_for_consumers(lambda consumer: consumer.mailbox.finished)

    async def _wait_for_consumers(self, done: Callable[[Consumer], bool]) -> None:
        patience = time.monotonic() + self._limits.patience
        while busy := [c for c in self._consumers if not c.ended and not done(c)]:
            now = time.monotonic()
            for consumer in busy:
                deadline = self._deadline(consumer)
                if deadline is not None and now >= deadline:
                    self._give_up_consumer(consumer, now)
            if now >= patience:
                patience = now + self._limits.patience
                doing = ", ".join(f"{c.name}.{c.hook or 'hooks'}" for c in busy)
                logger.warning("%s: the training is over and still waits for %s", self._name, doing)
            deadlines = [d for c in busy if (d := self._deadline(c)) is not None]
            await self._wait_for_news(min([patience, *deadlines]))

    def _deadline(self, consumer: Consumer) -> float | None:
        """When this consumer's time is up; None: never."""
        until = self._drain_ends(consumer)
        if consumer.given_up_at is not None:
            until = consumer.given_up_at + self._limits.last_words
        # What was withheld came late, and not by the doing of this callback.
        return until if until is None else max(until, self._released_at + self._limits.last_words)

    def _drain_ends(self, consumer: Consumer) -> float | None:
        assert self.outcome is not None
        assert self.left_at is not None
        if self.stuck:
            return self.left_at + self._limits.last_words
        if self.cancelled_at is not None:
            return self.cancelled_at + self._limits.grace
        drain = self.outcome.way.drain
        if drain == "grace" or (drain == "grace for the culprit" and consumer.muted):
            return self.left_at + self._limits.grace
        return None

    def _give_up_consumer(self, consumer: Consumer, now: float) -> None:
        """One step further: its hook is cancelled, then the closing hook that came after it, then nobody
        waits for it any more."""
        hook = consumer.hook
        if consumer.given_up_at is None:
            lost = consumer.cut_short(now)
            where = f" in {hook}" if hook else ""
            logger.warning(
                "%s: %s was cut short%s; %d events for it are lost", self._name, consumer.name, where, lost
            )
        elif consumer.closing_up:
            consumer.abandon(now)
            logger.warning("%s: %s was cut short in %s too", self._name, consumer.name, hook)
        else:
            consumer.leave_behind()
            logger.error(
                "%s: %s.%s ignores its cancellation and is left to itself", self._name, consumer.name, hook
            )

    # The end ------------------------------------------------------------------------------------------------

    async def _end_consumers(self) -> None:
        # A file that is announced at this very moment begins a hook, which has its time too.
        self._released_at = time.monotonic()
        for consumer in self._consumers:
            consumer.close()
        await self._wait_for_consumers(lambda consumer: consumer.ended)

    async def _end_feeds(self) -> None:
        for feed in self._program.feeds:
            feed.end()
        for task in self._feeding:
            task.cancel()
            task.add_done_callback(lambda _: self.poke())
        deadline = time.monotonic() + self._limits.grace
        while any(not task.done() for task in self._feeding):
            if time.monotonic() >= deadline:
                logger.error(
                    "%s: the async source ignores its cancellation and is left to itself", self._name
                )
                for task in self._feeding:
                    end_by_force(task)
                return
            await self._wait_for_news(deadline)
        for task in self._feeding:
            if not task.cancelled() and task.exception() is not None:
                logger.warning("%s: closing the async source raised %r", self._name, task.exception())

    async def _wait_for_news(self, deadline: float | None) -> None:
        timer = None
        if deadline is not None:
            delay = max(0.0, deadline - time.monotonic())
            timer = asyncio.get_running_loop().call_later(delay, self._news.set)
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            # `asyncio.run` cancels everything when its main function returns. That counts as a cancel of the
            # run, which then ends within its grace period; a second one changes nothing.
            task = asyncio.current_task()
            while task is not None and task.cancelling():
                task.uncancel()
            self._cancel("the event loop is shutting down")
        finally:
            if timer is not None:
                timer.cancel()
            self._news.clear()
