"""The handle on a training under way.

::

    queued ──► running ⇄ paused ──► closing ──► completed | stopped | cancelled | failed
      └──────────────────────────────────────► cancelled      (cancelled while queued: no hook runs)

``closing`` begins when the training thread has left its loop: the outcome is fixed, the closing hooks and the
drain follow.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from asynccb.budget import SwitchInterval
from asynccb.bus.mailbox import marker
from asynccb.claims import Claim
from asynccb.driver import mark_training
from asynccb.ending import Outcome, note_all, of_error, raisable
from asynccb.errors import CallbackError, NotStarted, RunCancelled, SelfWait, TornState
from asynccb.statistics import RunStatistics
from asynccb.storage.serial import SerialExecutor
from asynccb.training.control import STUCK, SnapshotRequest
from asynccb.wiring import Wiring, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from types import TracebackType

    from asynccb.bus.mailbox import Mailbox
    from asynccb.bus.readers import EventStream
    from asynccb.callbacks.base import Callback
    from asynccb.callbacks.history import History
    from asynccb.callbacks.hooks import Hooks
    from asynccb.protocols import Engine, Model, QueueStatistics
    from asynccb.resume import Resume, Resumed
    from asynccb.training.control import Limits
    from asynccb.training.programs import Program
    from asynccb.training.snapshot import Snapshot

__all__ = ["Run", "RunStatistics", "live_runs"]

logger = logging.getLogger("asynccb")

_numbers = itertools.count(1)
_inside: contextvars.ContextVar[tuple[Run, ...]] = contextvars.ContextVar("asynccb_inside", default=())
"""The runs whose hooks or sources we are in, outermost first: awaiting one of them would never end."""

_live: set[Run] = set()
_final_snapshots = SerialExecutor("asynccb snapshot")


def live_runs() -> list[Run]:
    """The runs of this process that have not ended."""
    return list(_live)


class Run:
    """A training, evaluation or prediction under way; made by :meth:`asynccb.Trainer.start`.

    ``await run`` waits for its end and gives what ``fit`` would return, any number of times and in any number
    of tasks. Cancelling a task that awaits a run leaves the run alone. ``async with`` waits at the end of a
    block that ends normally (and resumes a paused run), and cancels the run when the block raises.

    ``state``, ``epoch``, ``step``, ``logs``, ``history``, ``outcome``, ``exception`` and ``stats`` may be
    read at any time from any thread, and ``stop``, ``cancel``, ``pause`` and ``resume`` may be called from
    any; none of them blocks or raises.

    Attributes:
        name: unique among the runs of a process unless you named two alike.
        history: the :class:`~asynccb.History` that the run fills.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        callbacks: list[tuple[Callback, Hooks]],
        history: History,
        *,
        name: str | None = None,
        engine: Engine,
        replay: int,
        limits: Limits,
        stop_after: float | None = None,
        switch_interval: float | None = None,
        resume: Resume | None = None,
    ) -> None:
        self.name = name or f"run-{next(_numbers)}"
        self.history = history
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._program = program
        self._resume = resume
        if resume is not None:
            resume.owner = self.name
        self._claim = Claim(self.name, model.user_model, [callback for callback, _ in callbacks])
        self._final_claim = self._claim
        mark_training(model.user_model, -1)
        self._switch_interval = SwitchInterval(switch_interval) if switch_interval else None
        self._callbacks = callbacks
        self._outcome: Outcome | None = None
        self._queues: dict[str, QueueStatistics] = {}
        self._awaiting = 0
        self._ended = asyncio.Event()
        self._open_callbacks = {callback for callback, _ in callbacks}
        self._context = contextvars.copy_context()
        self._context.run(_inside.set, (*_inside.get(), self))

        self._wiring = wiring = Wiring(
            self.name,
            self._loop,
            model,
            program,
            resume,
            callbacks,
            history,
            engine=engine,
            replay=replay,
            limits=limits,
            equip=self._equip,
            fixed=self._fix,
            left=self._thread_left,
            cancel=self.cancel,
            context=self._context.copy,
        )
        self._control, self._dispatcher, self._driver = wiring.control, wiring.dispatcher, wiring.driver
        self._consumers, self._supervisor = wiring.consumers, wiring.supervisor
        self._failures, self._readers = wiring.failures, wiring.readers
        self._timer = None
        if stop_after is not None:
            self._timer = self._loop.call_later(stop_after, self.stop, f"stop_after {stop_after:g} s")
        _live.add(self)
        self._task = self._loop.create_task(self._live(), name=f"asynccb {self.name}", context=self._context)
        self._task.add_done_callback(self._end_unstarted)

    # What can be read ---------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``paused``, ``closing``, ``completed``, ``stopped``, ``cancelled`` or
        ``failed``."""
        if self._outcome is not None:
            return self._outcome.kind if self._ended.is_set() else "closing"
        if self._control.parked:
            return "paused"
        return "queued" if self._driver.ident is None else "running"

    @property
    def epoch(self) -> int:
        """The 0-based epoch under way, or the last one."""
        return self._driver.epoch

    @property
    def step(self) -> int:
        """Batches trained so far, over all epochs."""
        return self._driver.step

    @property
    def resumed(self) -> Resumed | None:
        """The backup that this training goes on from, and where; None where it began anew. Known from
        ``on_train_begin`` on."""
        return None if self._resume is None else self._resume.resumed

    @property
    def logs(self) -> Mapping[str, Any]:
        """The newest logs of a batch or an epoch; a copy."""
        return dict(self._driver.logs)

    @property
    def outcome(self) -> str | None:
        """``"completed"``, ``"stopped"``, ``"cancelled"`` or ``"failed"``; None until the training has left
        its loop."""
        return None if self._outcome is None else self._outcome.kind

    @property
    def reason(self) -> str | None:
        """Why it ended before its time, in words; None until the training has left its loop."""
        return None if self._outcome is None else self._outcome.reason

    @property
    def exception(self) -> BaseException | None:
        """What awaiting this run raises, or None."""
        if self._outcome is None:
            return None
        if self._outcome.kind == "cancelled":
            return RunCancelled(self._outcome.reason, self.history)
        return self._outcome.exception

    @property
    def stats(self) -> RunStatistics:
        """Counts of events, mailboxes and waits so far, and where the time went."""
        return self._wiring.statistics(self._queues if self._ended.is_set() else self._wiring.queues())

    @property
    def settled(self) -> bool:
        """Whether nothing of this run can move before somebody else does: see
        :func:`asynccb.testing.settle`."""
        user_model = self._model.user_model
        thread_rests = (
            self._control.resting or self._outcome is not None or getattr(user_model, "waiting", False)
        )
        return thread_rests and all(c.mailbox.finished or c.suspended for c in self._consumers)

    # What can be asked --------------------------------------------------------------------------------------

    def stop(self, reason: str = "stopped") -> None:
        """Ends the training after the batch under way: its epoch ends without validation, ``fit`` returns its
        History.

        The first reason wins; a cancel overrides it. No effect on a run that has ended.
        """
        self._control.stop(str(reason))

    def cancel(self, reason: str = "cancelled") -> None:
        """Ends the training after the batch under way; the epoch is left open.

        ``on_exception`` and ``on_train_end`` run, mailboxes drain for the grace period of 5 s, what is lost
        then is logged. Who awaits the run gets :class:`~asynccb.RunCancelled`.
        """
        if self._ended.is_set():
            return
        if self._supervisor.cancelled_at is None:
            self._supervisor.cancelled_at = time.monotonic()
        self._control.interrupt_with("cancelled", str(reason))
        self._wiring.poke()

    def pause(self) -> None:
        """Asks the training to park after the batch under way; ``state`` is ``paused`` once it has."""
        self._control.pause()

    def resume(self) -> None:
        """Takes :meth:`pause` back."""
        self._control.resume()

    async def snapshot(self) -> Snapshot:
        """A consistent copy of the model at the next safe point: after the batch under way, or at once in a
        wait or a pause.

        After the end it is the final state. The copy owns its memory; release it when it is big and you are
        done.

        Raises:
            NotStarted: the run is still queued.
            TornState: the model raised inside a batch.
            ModelBusy: the run has ended and another one has the model now.
        """
        if self._driver.ident is None and self._outcome is None:
            raise NotStarted(f"{self.name} is queued: it has no state of its own yet")
        answered: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()

        def set_answer(snapshot: Snapshot | None, error: BaseException | None) -> None:
            if answered.done():
                return  # whoever asked was cancelled meanwhile
            if error is not None:
                answered.set_exception(raisable(error))
            elif snapshot is not None:
                answered.set_result(snapshot)

        loop = asyncio.get_running_loop()
        request = SnapshotRequest(
            lambda snapshot: _tell_whole(loop, set_answer, snapshot.another()),
            lambda error: tell(loop, set_answer, None, error),
        )
        if self._control.ask(request):
            return await answered
        return await self._final_snapshot()

    async def flush(self) -> None:
        """Waits until every callback has handled all events emitted so far.

        Raises:
            SelfWait: called from a hook or an async source of this run.
        """
        self._refuse_inside("flush()")
        marks = []
        for consumer in self._consumers:
            if not consumer.ended:
                done = self._loop.create_future()
                consumer.mailbox.put(marker(done))
                marks.append(done)
        self._wiring.wakeup.flush()
        for done in marks:
            await done

    def events(self, since: int | None = None) -> EventStream:
        """The run's events as an async iterator that ends after the drain.

        A slow reader never slows the training: where events have left the ring (its size is ``replay`` of
        ``start``), or were never built because nobody wanted them, it gets a :class:`~asynccb.Gap`.

        Args:
            since: the ``seq`` of the first event wanted; None: from now on.
        """
        return self._dispatcher.stream(since, lambda: self._refuse_inside("the run's events"))

    def __aiter__(self) -> EventStream:
        return self.events()

    def __await__(self) -> Generator[Any, None, History]:
        return self._wait_as_watcher().__await__()

    async def __aenter__(self) -> Run:
        self._refuse_inside("the run itself")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.resume()
        else:
            self.cancel(f"its block raised {kind.__name__ if kind else 'an exception'}")
        cancelled = await self._wait_shielded("the task was cancelled while it waited for the run")
        if cancelled is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled
        if error is None:
            self._result()

    def __repr__(self) -> str:
        return f"<Run {self.name} {self.state} epoch={self.epoch} step={self.step}>"

    # What callbacks may ask ---------------------------------------------------------------------------------

    def snapshot_now(self, callback: Callback, *, pooled: bool = False) -> Snapshot:
        """The model at this very moment; legal on the training thread only, which is where inline hooks run.

        Args:
            callback: who asks.
            pooled: for the writers of this package, which release it: its memory is then used again, and the
                training waits where two such copies are still in use.

        Raises:
            RuntimeError: called on another thread.
        """
        if threading.get_ident() != self._driver.ident:
            raise RuntimeError(
                f"{type(callback).__name__}.snapshot() is legal in inline (`def`) hooks only; "
                "elsewhere: `await self.run.snapshot()`"
            )
        return self._dispatcher.snapshot(callback, self._driver.capture, pooled=pooled)

    def expect_copies(self) -> None:
        """Says, in an inline ``on_train_begin``, that pooled snapshots will be taken: memory for the first is
        got beside the first batches."""
        self._driver.snapshots.expect()

    def room_for_copy(self, callback: Callback) -> bool:
        """Whether ``callback`` can have a pooled snapshot, or share one of this event's, without waiting for
        a writer. Called in inline hooks."""
        return self._dispatcher.shares_copy(callback) or self._driver.snapshots.has_room()

    def want_unit(self) -> None:
        """Says that a callback with ``take_unit`` wants a resume unit: it is asked at the next place where
        one can be cut. Legal on any thread."""
        self._control.want_unit()

    def announce_saved(self, path: str, epoch: int) -> None:
        """Tells everybody that the file at ``path`` is durable. Called on the loop by whoever wrote it."""
        self._dispatcher.commit(path, epoch)

    def direction(self, metric: str) -> str | None:
        """``"min"`` or ``"max"`` where the model knows in which direction ``metric`` improves."""
        return self._model.direction(metric)

    # Waiting for the end ------------------------------------------------------------------------------------

    async def _wait_as_watcher(self) -> History:
        self._refuse_inside("the run itself")
        self._awaiting += 1
        try:
            await self._ended.wait()
        finally:
            self._awaiting -= 1
        return self._result()

    async def wait_as_owner(self) -> History:
        """The wait of ``fit``: cancelling it cancels the run, waits for the end, and then lets the
        cancellation go on."""
        self._refuse_inside("the run itself")
        cancelled = await self._wait_shielded("the task that awaited fit was cancelled")
        if cancelled is not None:
            note_all(cancelled, list(self._failures.errors))
            raise cancelled
        return self._result()

    async def _wait_shielded(self, reason: str) -> asyncio.CancelledError | None:
        cancelled: asyncio.CancelledError | None = None
        self._awaiting += 1
        try:
            while not self._ended.is_set():
                try:
                    await self._ended.wait()
                except asyncio.CancelledError as error:
                    cancelled = cancelled or error
                    self.cancel(reason)
        finally:
            self._awaiting -= 1
        return cancelled

    def _result(self) -> History:
        assert self._outcome is not None
        if self._outcome.kind == "cancelled":
            cancelled = RunCancelled(self._outcome.reason, self.history)
            note_all(cancelled, list(self._failures.errors))
            raise cancelled
        self._outcome.raise_exception()
        return self.history

    def _refuse_inside(self, what: str) -> None:
        if self in _inside.get():
            raise SelfWait(
                f"a hook or source of {self.name} waits for {what}, which waits for that hook to end"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(f"{self.name} belongs to another event loop; await it there")

    # Its life -----------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        if self._switch_interval is not None:
            self._switch_interval.hold()
        try:
            try:
                outcome = await self._supervisor.run()
            except Exception as error:
                # A defect of ours; nobody shall wait for ever because of it.
                outcome = of_error(error)
                self._control.interrupt_with("failed", outcome.reason, error)
                self._supervisor.abandon_all()
            self._end(outcome)
        finally:
            if self._driver.ident is None:  # no thread ever started
                self._free()
            self._free()
            _live.discard(self)

    def _end_unstarted(self, task: asyncio.Task[None]) -> None:
        # `asyncio.run` whose main function returns right after `start` cancels the task before its first
        # step: nothing of its body ever runs, its `finally` neither.
        if not task.cancelled():
            return
        self.cancel("the event loop is shutting down")
        assert self._control.interrupt is not None
        self._end(of_error(self._control.interrupt))
        self._free()
        self._free()
        _live.discard(self)

    def _end(self, outcome: Outcome) -> None:
        errors = self._failures.errors
        if errors and (outcome.exception is None or isinstance(outcome.exception, CallbackError)):
            outcome = outcome.with_beside_errors(errors)
        elif errors:
            note_all(outcome.exception, list(errors))
        self._fix(outcome)
        try:
            if self._timer is not None:
                self._timer.cancel()
            self._wiring.wakeup.close()
            if self._driver.ident is None:
                self._close_unused()
        finally:
            self._wiring.phases.enter(None)
            self._queues = self._wiring.queues()
            self._ended.set()
            self._readers.close()
        if (outcome.kind == "failed" or errors) and not self._awaiting:
            # As text: the exception's traceback would hold the run and all its arrays.
            reason = outcome.reason if outcome.kind == "failed" else f"{outcome.reason}; {errors[0]}"
            logger.error("%s %s and nobody awaits it: %s", self.name, outcome.kind, reason)

    def _close_unused(self) -> None:
        """No thread ever ran: what it and consumers that never started would have closed on their way out is
        closed here, else a ``snapshot()`` or ``flush()`` would wait for them for ever."""
        self._control.leave()
        for consumer in self._consumers:
            consumer.leave_behind()

    def _fix(self, outcome: Outcome) -> History:
        self._outcome = outcome
        self.history.outcome = outcome.kind
        self.history.reason = outcome.reason
        self._failures.publish()
        return self.history

    def _thread_left(self, outcome: Outcome) -> None:
        """The last that happens on the training thread."""
        stuck = self._supervisor.stuck
        if not stuck:
            self._fix(outcome)
        # Before the loop is told: whoever awaits the run may start the next one on this model at once.
        self._free()
        if stuck:
            for consumer in self._consumers:
                if consumer.mailbox.closed:  # what the last hook of this thread handed over
                    _discard(consumer.mailbox)
            return
        try:
            self._loop.call_soon_threadsafe(self._supervisor.thread_left, outcome)
        except RuntimeError:
            unheard = [f"{c.name}: {len(c.mailbox.queue)} events" for c in self._consumers if c.mailbox.queue]
            logger.error(
                "%s: the event loop was closed during the training; not delivered: %s",
                self.name,
                ", ".join(unheard) or "nothing",
            )
            for consumer in self._consumers:
                _discard(consumer.mailbox)
            _live.discard(self)
            self._free()

    def _free(self) -> None:
        self._claim.let_go(self._clean_up)

    def _clean_up(self) -> None:
        if self._switch_interval is not None:
            self._switch_interval.let_go()
        mark_training(self._model.user_model, None)
        for callback in self._open_callbacks:
            callback.run = None
        self._open_callbacks = set()

    def _equip(self, params: dict[str, Any]) -> None:
        for callback, _ in self._callbacks:
            callback.run = self
            callback.validation_data = self._program.validation_data
            callback.set_model(self._model.user_model)
            callback.set_params(params)

    async def _final_snapshot(self) -> Snapshot:
        if self._control.torn:
            raise TornState("the model raised inside a batch, so its weights may be half updated")
        if self._supervisor.stuck:
            raise TornState(STUCK)
        let_go = self._hold_model()
        copied = _final_snapshots.submit(self._driver.capture_final)
        # Not here: if this task is cancelled, the copy that is being made still needs the model.
        copied.add_done_callback(lambda _: let_go())
        return await asyncio.wrap_future(copied)

    def _hold_model(self) -> Callable[[], None]:
        """Keeps other runs from the model while a final copy is made. Answers how to let go."""
        if self._claim.hold():  # it still drains
            return self._free
        if not self._final_claim.hold():
            self._final_claim = Claim(f"a snapshot of {self.name}", self._model.user_model, [])
            self._final_claim.let_go()
        return self._final_claim.let_go


def _tell_whole(loop: asyncio.AbstractEventLoop, answer: Callable[..., object], snapshot: Snapshot) -> None:
    """Answers once the copy is made, so that nobody on the loop waits for the thread that makes it."""
    snapshot.then(lambda: tell(loop, answer, snapshot, None))


def _discard(mailbox: Mailbox) -> None:
    while mailbox.queue:
        try:
            mailbox.discard_all()
        except RuntimeError:  # the marker of a `flush()` on the closed loop; it is out of the queue now
            continue
