"""A run that has begun, from the claim on its model to the last that is told of its end.

The handle that users hold, :class:`asynccb.Run`, may be queued for hours and kept for days: it is small. What
a training needs while it is alive, threads, mailboxes, copies, is made here when its turn comes and let go
when it is over.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from asynccb.budget import SwitchInterval, budget
from asynccb.claims import Claim
from asynccb.driver import mark_training
from asynccb.ending import Outcome, note_all, of_error
from asynccb.errors import CallbackError, TornState
from asynccb.storage.serial import SerialExecutor
from asynccb.training.control import STUCK, TORN, NoShare
from asynccb.training.snapshot import Snapshot
from asynccb.wiring import Wiring

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable

    from asynccb.bus.mailbox import Mailbox
    from asynccb.bus.readers import Readers
    from asynccb.callbacks.base import Callback
    from asynccb.callbacks.history import History
    from asynccb.callbacks.hooks import Hooks
    from asynccb.protocols import Engine, Model, Share
    from asynccb.resume import Resume
    from asynccb.training.control import Limits
    from asynccb.training.programs import Program

__all__ = ["Order", "Session", "log_failure"]

logger = logging.getLogger("asynccb")

_final_snapshots = SerialExecutor("asynccb snapshot")


class Order(NamedTuple):
    """What a run is to do, with everything that could be checked checked.

    Attributes:
        callbacks: in order, each with its hooks.
        history: one of them, or the one of a run that is no training.
        engine: where the thread comes from.
        limits: the times of the run.
        stop_after: seconds, or None.
        switch_interval: seconds, or None: the interpreter's is left alone.
        resume: finds a backup; None where the program is no training.
        threads: that it computes with; None: what linear algebra has in this process.
    """

    model: Model
    program: Program
    callbacks: list[tuple[Callback, Hooks]]
    history: History
    engine: Engine
    limits: Limits
    stop_after: float | None = None
    switch_interval: float | None = None
    resume: Resume | None = None
    threads: int | None = None


class Handle(Protocol):
    """What a session tells its run; all of it on the run's loop but ``fix``, which may be called on the
    training thread."""

    name: str
    history: History

    @property
    def weight(self) -> float:
        """Its share of the processors in comparison with others."""

    @property
    def awaited(self) -> bool:
        """Whether somebody will see how the run ends."""

    def fix(self, outcome: Outcome) -> History:
        """How it ends is known; called again if a closing hook changes that. Answers the History."""

    def end(self) -> None:
        """It has drained: whoever awaits it may go on."""

    def over(self) -> None:
        """Nothing of it is left on the loop; legal on any thread."""

    def cancel(self, reason: str) -> None: ...

    def stop(self, reason: str) -> None: ...


class Session:
    """Made on the loop; its supervisor's task begins with the next turn of the loop.

    Args:
        run: the handle.
        readers: of the run's events.
        context: gives each task a fresh copy of the caller's context.
        claim: what the run has claimed already; it lacks the model perhaps.

    Raises:
        ModelBusy, CallbackBusy: another run has the model or a callback; then nothing has begun.
    """

    def __init__(
        self,
        run: Handle,
        order: Order,
        readers: Readers,
        context: contextvars.Context,
        claim: Claim,
    ) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._model = order.model
        self._order: Order | None = order
        if order.resume is not None:
            order.resume.owner = run.name
        self.claim = claim
        callbacks = [callback for callback, _ in order.callbacks]
        claim.extend(order.model.user_model, callbacks, getattr(order.model, "also_trains", ()))
        self._final_claim = claim
        mark_training(order.model.user_model, -1)
        self._switch_interval = SwitchInterval(order.switch_interval) if order.switch_interval else None
        self._open_callbacks = {callback for callback, _ in order.callbacks}
        self._last: tuple[int, int] = (0, 0)
        self._why_torn: str | None = None
        self.parts: Wiring | None = Wiring(
            run.name,
            self._loop,
            order.model,
            order.program,
            order.resume,
            order.callbacks,
            order.history,
            engine=order.engine,
            readers=readers,
            limits=order.limits,
            join=self._join,
            equip=self._equip,
            fixed=self._fix,
            left=self._thread_left,
            cancel=run.cancel,
            context=context.copy,
        )
        self._timer = None
        if order.stop_after is not None:
            self._timer = self._loop.call_later(
                order.stop_after, run.stop, f"stop_after {order.stop_after:g} s"
            )
        self._task = self._loop.create_task(
            self._live(self.parts), name=f"asynccb {run.name}", context=context
        )
        self._task.add_done_callback(self._end_unstarted)

    # Its life -----------------------------------------------------------------------------------------------

    async def _live(self, parts: Wiring) -> None:
        if self._switch_interval is not None:
            self._switch_interval.hold()
        try:
            try:
                outcome = await parts.supervisor.run()
            except Exception as error:
                # A defect of ours; nobody shall wait for ever because of it.
                outcome = of_error(error)
                parts.control.interrupt_with("failed", outcome.reason, error)
                parts.supervisor.abandon_all()
            self._end(parts, outcome)
        finally:
            self._end_task(parts)

    def _end_unstarted(self, task: asyncio.Task[None]) -> None:
        # `asyncio.run` whose main function returns right after `start` cancels the task before its first
        # step: nothing of its body ever runs, its `finally` neither.
        if not task.cancelled():
            return
        self._run.cancel("the event loop is shutting down")
        assert self.parts is not None
        assert self.parts.control.interrupt is not None
        parts = self.parts
        self._end(parts, of_error(self.parts.control.interrupt))
        self._end_task(parts)

    def _end_task(self, parts: Wiring) -> None:
        if self.parts is None:
            # The loop was closed under it: the thread has let go of everything, and the collector drops the
            # task, which never came to its end.
            return
        if parts.driver.ident is None:  # no thread ever started
            self._free()
        self._free()
        self._run.over()

    def _end(self, parts: Wiring, outcome: Outcome) -> None:
        errors = parts.failures.errors
        if errors and (outcome.exception is None or isinstance(outcome.exception, CallbackError)):
            outcome = outcome.with_beside_errors(errors)
        elif errors:
            note_all(outcome.exception, list(errors))
        self._fix(outcome)
        try:
            if self._timer is not None:
                self._timer.cancel()
            parts.wakeup.close()
            parts.lag.close()
            if parts.driver.ident is None:
                _close_unused(parts)
        finally:
            parts.phases.enter(None)
            self._remember(parts)
            self._run.end()
            parts.readers.close()
        if (outcome.kind == "failed" or errors) and not self._run.awaited:
            reason = outcome.reason if outcome.kind == "failed" else f"{outcome.reason}; {errors[0]}"
            log_failure(self._run.name, outcome.kind, reason)

    def _remember(self, parts: Wiring) -> None:
        self._last = parts.driver.step, parts.driver.epoch
        if parts.control.torn:
            self._why_torn = TORN
        elif parts.supervisor.stuck:
            self._why_torn = STUCK

    def _fix(self, outcome: Outcome) -> History:
        history = self._run.fix(outcome)
        if self.parts is not None:
            self.parts.failures.publish()
        return history

    def _thread_left(self, outcome: Outcome) -> None:
        """The last that happens on the training thread."""
        parts = self.parts
        assert parts is not None
        supervisor, consumers = parts.supervisor, parts.consumers
        stuck = supervisor.stuck
        if not stuck:
            self._fix(outcome)
        # Before the loop is told: whoever awaits the run may start the next one on this model at once.
        self._free()
        if stuck:
            for consumer in consumers:
                if consumer.mailbox.closed:  # what the last hook of this thread handed over
                    _discard(consumer.mailbox)
            return
        try:
            self._loop.call_soon_threadsafe(supervisor.thread_left, outcome)
        except RuntimeError:
            self.give_up_loop()

    def give_up_loop(self) -> None:
        """The loop was closed and the thread has left: its task never comes to its end. On any thread."""
        parts = self.parts
        assert parts is not None
        left = [f"{c.name}: {len(c.mailbox.queue)} events" for c in parts.consumers if c.mailbox.queue]
        logger.error(
            "%s: the event loop was closed during the training; not delivered: %s",
            self._run.name,
            ", ".join(left) or "nothing",
        )
        for consumer in parts.consumers:
            _discard(consumer.mailbox)
        parts.lag.close()
        self._run.over()
        self._free()

    def _free(self) -> None:
        self.claim.let_go(self._clean_up)

    def _clean_up(self) -> None:
        if self._switch_interval is not None:
            self._switch_interval.let_go()
        mark_training(self._model.user_model, None)
        for callback in self._open_callbacks:
            callback.run = None
        self._open_callbacks = set()
        # Of a run that is kept when it is over, the rings and pools are not.
        parts, self._order, self.parts = self.parts, None, None
        if parts is not None:
            parts.take_apart()

    def _join(self, wake: Callable[[], None]) -> Share:
        order, parts = self._order, self.parts
        assert order is not None
        assert parts is not None
        if not (order.program.takes_turns and getattr(self._model.user_model, "needs_cpu", True)):
            return NoShare()
        share = budget().join(wake, weight=self._run.weight, threads=order.threads)
        # In this order: who sets the priority at this moment, on another thread, finds the share, or we find
        # what was set.
        parts.control.share = share
        share.weight = self._run.weight
        return share

    def _equip(self, params: dict[str, Any]) -> None:
        order = self._order
        assert order is not None
        for callback, _ in order.callbacks:
            callback.run = self._run
            callback.validation_data = order.program.validation_data
            callback.set_model(self._model.user_model)
            callback.set_params(params)

    # Behind it ----------------------------------------------------------------------------------------------

    async def final_snapshot(self) -> Snapshot:
        """The state that the thread has left behind.

        Raises:
            TornState: the model raised inside a batch, or the thread is still stuck in one.
            ModelBusy: another run has the model now.
        """
        if (parts := self.parts) is not None:  # it has not drained yet, or its thread is stuck
            self._remember(parts)
        if self._why_torn is not None:
            raise TornState(self._why_torn)
        let_go = self._hold_model()
        copied = _final_snapshots.submit(self._capture_final)
        # Not here: if this task is cancelled, the copy that is being made still needs the model.
        copied.add_done_callback(lambda _: let_go())
        return await asyncio.wrap_future(copied)

    def _capture_final(self) -> Snapshot:
        return Snapshot(self._model.capture(), *self._last)

    def _hold_model(self) -> Callable[[], None]:
        """Keeps other runs from the model while a final copy is made. Answers how to let go."""
        if self.claim.hold():  # it still drains
            return self._free
        if not self._final_claim.hold():
            self._final_claim = Claim(f"a snapshot of {self._run.name}", self._model.user_model, [])
            self._final_claim.let_go()
        return self._final_claim.let_go


def log_failure(run_name: str, kind: str, reason: str) -> None:
    """As text: the exception's traceback would hold the run and all its arrays."""
    logger.error("%s %s and nobody awaits it: %s", run_name, kind, reason)


def _close_unused(parts: Wiring) -> None:
    """No thread ever ran: what it and consumers that never started would have closed on their way out is
    closed here, else a ``snapshot()`` or ``flush()`` would wait for them for ever."""
    parts.control.leave()
    for consumer in parts.consumers:
        consumer.leave_behind()


def _discard(mailbox: Mailbox) -> None:
    while mailbox.queue:
        try:
            mailbox.discard_all()
        except RuntimeError:  # the marker of a `flush()` on the closed loop; it is out of the queue now
            continue
