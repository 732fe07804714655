"""The parts of one run, and how they are joined: who tells whom when something has happened.

::

    training thread   driver ── dispatcher ── mailboxes ──┐ wakeup
    event loop        supervisor ── consumers ◄───────────┘ readers
    the way uphill    control
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

from asynccb.bus.delivery import Consumer
from asynccb.bus.dispatch import Dispatcher, Subscriber
from asynccb.bus.mailbox import Mailbox
from asynccb.bus.wakeup import Wakeup
from asynccb.driver import Driver
from asynccb.failures import Failures
from asynccb.health import watch_loop
from asynccb.statistics import Phases, RunStatistics
from asynccb.supervisor import Supervisor
from asynccb.training.control import Control, Limits
from asynccb.training.snapshot import Snapshots

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable, Sequence

    from asynccb.bus.delivery import HookFailure
    from asynccb.bus.readers import Readers
    from asynccb.callbacks.base import Callback
    from asynccb.callbacks.history import History
    from asynccb.callbacks.hooks import Hooks
    from asynccb.ending import Outcome
    from asynccb.errors import CallbackError
    from asynccb.protocols import Engine, Model, QueueStatistics, Share
    from asynccb.resume import Resume, Resumed
    from asynccb.training.programs import Program
    from asynccb.training.snapshot import Snapshot

__all__ = ["Wiring", "tell"]

logger = logging.getLogger("asynccb")


class Wiring:
    """Makes the parts of a run. Called on the loop; nothing is started.

    Args:
        name: of the run.
        loop: of the run.
        callbacks: in order, each with its hooks.
        history: gets the failures.
        readers: of the run's events.
        join: makes the thread's share of what all trainings of the process compute with; called on it first,
            with what is to be called when the share has changed.
        equip: gives each callback its run, params and data; called on the training thread.
        fixed: told the outcome when it is fixed, by whoever knows it first; answers the History.
        left: told the final outcome as the last thing on the training thread.
        cancel: cancels the run, with a reason.
        context: gives each task a fresh copy of the caller's context.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        model: Model,
        program: Program,
        resume: Resume | None,
        callbacks: Sequence[tuple[Callback, Hooks]],
        history: History,
        *,
        engine: Engine,
        readers: Readers,
        limits: Limits,
        join: Callable[[Callable[[], None]], Share],
        equip: Callable[[dict[str, Any]], None],
        fixed: Callable[[Outcome], History],
        left: Callable[[Outcome], None],
        cancel: Callable[[str], None],
        context: Callable[[], contextvars.Context],
    ) -> None:
        self.model = model
        self._loop = loop
        self._resume = resume
        self._loop_thread = threading.get_ident()
        self._feeds = program.feeds
        self._joints = joints = _Joints(name, readers, limits.slow_mailbox)
        self.phases = Phases("queued")
        self.failures = Failures(name, history, joints.fail)
        self.wakeup = Wakeup(loop, joints.deliver)
        self.control = Control(loop.is_closed, self.wakeup.flush, limits)
        self.readers = readers
        model_asks = getattr(model, "always_asks", False)
        subscribers = [
            self._subscriber(own, callback, hooks, model_asks)
            for own, (callback, hooks) in zip(_names(callbacks), callbacks, strict=True)
        ]
        snapshots = Snapshots(model, self.control, name)
        self.dispatcher = Dispatcher(
            subscribers,
            self.readers,
            self.wakeup,
            self.control,
            snapshots.gate,
            failed=self.failures.inline,
            warn=joints.warn_lockstep,
            phase=self.phases.enter,
        )
        self.driver = Driver(
            model,
            program,
            resume,
            self.dispatcher,
            self.control,
            snapshots,
            self.phases,
            join=functools.partial(join, self.control.look_up),
            equip=equip,
            # A thread that was given up as stuck has no say any more when it comes back.
            fixed=lambda outcome: history if joints.supervisor.stuck else fixed(outcome),
            left=left,
        )
        self.consumers = [
            Consumer(
                subscriber.name,
                subscriber.mailbox,
                subscriber.beside,
                failed=functools.partial(joints.beside_failed, subscriber),
                moved=joints.moved,
                cancelled=cancel,
                closing=frozenset({"on_exception", program.closing.hook}),
                died=functools.partial(self.failures.died, subscriber.name),
            )
            for subscriber in subscribers
        ]
        self.supervisor = Supervisor(
            name,
            self.driver,
            program,
            self.consumers,
            self.dispatcher,
            self.control,
            engine,
            fixed=fixed,
            cancel=cancel,
            context=context,
        )
        joints.consumers, joints.supervisor, joints.control = self.consumers, self.supervisor, self.control
        joints.dispatcher, joints.failures = self.dispatcher, self.failures
        self.lag = watch_loop(loop, name)  # behind all that may raise: nobody else would close it

    def take_apart(self) -> None:
        """Behind the last word of thread and supervisor: the parts let go of each other, so that they go at
        once. Left to the garbage collector they cost a quarter of the time of many short trainings.

        What can be read here stays, for whoever reads at this moment on another thread. And nothing is done
        where a thread or a hook was left to itself, which may come back.
        """
        if self.supervisor.stuck or any(consumer.alive for consumer in self.consumers):
            return
        self._joints.cut()
        self.driver.let_go()
        self.dispatcher.let_go()

    def poke(self) -> None:
        """Something changed that the supervisor may be waiting for. Legal on any thread."""
        tell(self._loop, self.supervisor.poke)

    @property
    def resumed(self) -> Resumed | None:
        return None if self._resume is None else self._resume.resumed

    @property
    def model_waits(self) -> bool:
        """Whether the model says that it waits for somebody, as doubles of models do."""
        return bool(getattr(self.model.user_model, "waiting", False))

    def snapshot_now(self, callback: Callback, *, pooled: bool) -> Snapshot:
        """The model at this very moment, for an inline hook of ``callback``."""
        if threading.get_ident() != self.driver.ident:
            raise RuntimeError(
                f"{type(callback).__name__}.snapshot() is legal in inline (`def`) hooks only; "
                "elsewhere: `await self.run.snapshot()`"
            )
        return self.dispatcher.snapshot(callback, self.driver.capture, pooled=pooled)

    def statistics(self) -> RunStatistics:
        """Counts so far."""
        return RunStatistics(
            self.dispatcher.taken,
            {s.name: s.mailbox.statistics() for s in self.dispatcher.subscribers},
            dict(self.control.waits),
            dict(self.control.waited),
            self.driver.snapshots.made,
            dict(self.dispatcher.clock.spent),
            self.phases.read(),
            self._queues(),
            self.control.share.spent,
            self.lag.statistics(),
        )

    def _queues(self) -> dict[str, QueueStatistics]:
        """Of all that waits outside of mailboxes. A callback may serve another run after this one."""
        found = {"event streams": self.readers.statistics(), "copies": self.driver.snapshots.statistics()}
        found |= {f"source of {feed.name}": feed.statistics() for feed in self._feeds}
        for subscriber in self.dispatcher.subscribers:
            try:
                own = subscriber.callback.queue_statistics()
                found |= {f"{subscriber.name}: {what}": counts for what, counts in own.items()}
            except Exception:  # a user's: whoever looks at a run must not get its errors, nor its end fail
                continue
        return found

    def _subscriber(self, name: str, callback: Callback, hooks: Hooks, model_asks: bool) -> Subscriber:
        mailbox = Mailbox(name, callback.overflow, callback.mailbox_size, self._joints.wait_for_room)
        return Subscriber(
            name,
            callback,
            hooks.inline,
            hooks.beside,
            mailbox,
            lockstep=callback.lockstep,
            changes_model=hooks.changes_model,
            model_asks=model_asks,
        )

    def readers_changed(self) -> None:
        """The first reader has come, or the last one gone."""
        # A stream may be dropped by the garbage collector, on any thread; tables are made on the loop.
        if threading.get_ident() == self._loop_thread:
            self.dispatcher.rebuild()
        else:
            tell(self._loop, self.dispatcher.rebuild)


class _Joints:
    """Who tells whom when something has happened: the only way from the parts of a run back to each other."""

    consumers: list[Consumer]
    supervisor: Supervisor
    control: Control
    dispatcher: Dispatcher
    failures: Failures

    def __init__(self, name: str, readers: Readers, slow_mailbox: float) -> None:
        self._name = name
        self._readers = readers
        self._slow_mailbox = slow_mailbox

    def cut(self) -> None:
        """Nobody is left who would tell anything, but for a wake-up that was on its way."""
        self.consumers = []
        del self.supervisor, self.control, self.dispatcher, self.failures

    def deliver(self) -> None:
        for consumer in self.consumers:
            if consumer.mailbox.queue:
                consumer.wake()
        self._readers.wake()

    def moved(self) -> None:
        self.supervisor.moved()

    def wait_for_room(self, mailbox: Mailbox, has_room: Callable[[], bool]) -> None:
        consumer = next(c for c in self.consumers if c.mailbox is mailbox)
        self.control.wait(
            "mailbox",
            has_room,
            complain=lambda seconds: logger.warning(
                "%s: the training has waited %.1f s for %s.%s, whose mailbox is full. "
                'Make the hook quicker, or choose overflow = "drop_oldest" or "latest"',
                self._name,
                seconds,
                mailbox.owner,
                consumer.hook or "hooks",
            ),
            complain_after=self._slow_mailbox,
        )

    def beside_failed(self, subscriber: Subscriber, failure: HookFailure) -> None:
        self.failures.beside(failure, subscriber.callback.on_error)
        if failure.consumer.muted:
            self.dispatcher.mute(subscriber)

    def fail(self, error: CallbackError) -> None:
        """Called on the loop, by a consumer."""
        self.control.interrupt_with("failed", str(error), error)
        self.supervisor.poke()

    def warn_lockstep(self, seconds: float, names: str, hook: str) -> None:
        logger.warning("%s: the training has waited %.0f s for %s.%s", self._name, seconds, names, hook)


def _names(callbacks: Sequence[tuple[Callback, Hooks]]) -> list[str]:
    """A name for each callback: its class, numbered from the second of a class on."""
    counts: dict[str, int] = {}
    names = []
    for callback, _ in callbacks:
        kind = type(callback).__name__
        counts[kind] = counts.get(kind, 0) + 1
        names.append(kind if counts[kind] == 1 else f"{kind}#{counts[kind]}")
    return names


def tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
    """Calls ``function`` on the loop soon; nothing where the loop is gone, for then nobody listens."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise
