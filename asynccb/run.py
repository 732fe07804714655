"""The handle on a training: queued, under way, or over.

::

    queued ──► running ⇄ paused ──► closing ──► completed | stopped | pruned | cancelled | failed
      └───────────────────────────────────────► stopped | pruned | cancelled
                                                (before its turn came: nothing of it has begun, no hook runs)

A run of :meth:`asynccb.Trainer.start` begins at once, one that was submitted to an
:class:`~asynccb.Orchestrator` when its turn comes. ``closing`` begins when the training thread has left its
loop: the outcome is fixed, the closing hooks and the drain follow.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from asynccb.awaited import End
from asynccb.budget import check_priority, weight_of
from asynccb.bus.mailbox import marker
from asynccb.bus.readers import Readers
from asynccb.ending import of_error, of_stop, raisable
from asynccb.errors import NotStarted, SelfWait
from asynccb.session import Session, log_failure
from asynccb.statistics import RunStatistics
from asynccb.training.control import Interrupt, SnapshotRequest
from asynccb.wiring import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from types import TracebackType

    from asynccb.bus.readers import EventStream
    from asynccb.callbacks.base import Callback
    from asynccb.callbacks.history import History
    from asynccb.claims import Claim
    from asynccb.ending import Outcome
    from asynccb.resume import Resumed
    from asynccb.session import Order
    from asynccb.training.control import StopKind
    from asynccb.training.snapshot import Snapshot
    from asynccb.wiring import Wiring

__all__ = ["Run", "RunStatistics", "live_runs"]

logger = logging.getLogger("asynccb")

_numbers = itertools.count(1)
_inside: contextvars.ContextVar[tuple[Run, ...]] = contextvars.ContextVar("asynccb_inside", default=())
"""The runs whose hooks or sources we are in, outermost first: awaiting one of them would never end."""

_live: set[Run] = set()


def new_name() -> str:
    """``run-<n>``, another one each time."""
    return f"run-{next(_numbers)}"


def inside_runs() -> tuple[Run, ...]:
    """The runs whose hooks or sources the caller is in, outermost first."""
    return _inside.get()


def live_runs() -> list[Run]:
    """The runs of this process whose turn has come and that have not ended."""
    return list(_live)


class _Place(NamedTuple):
    """Where a run stands, when it has not begun or is over."""

    epoch: int = 0
    step: int = 0
    logs: Mapping[str, Any] = {}
    resumed: Resumed | None = None
    stats: RunStatistics = RunStatistics.nothing()


class Run:
    """A training, evaluation or prediction; made by :meth:`asynccb.Trainer.start` and
    :meth:`asynccb.Orchestrator.submit`.

    ``await run`` waits for its end and gives what ``fit`` would return, any number of times and in any number
    of tasks. Cancelling a task that awaits a run leaves the run alone. ``async with`` waits at the end of a
    block that ends normally (and resumes a paused run), and cancels the run when the block raises.

    ``state``, ``epoch``, ``step``, ``logs``, ``history``, ``outcome``, ``exception`` and ``stats`` may be
    read at any time from any thread, and ``stop``, ``prune``, ``cancel``, ``pause`` and ``resume`` may be
    called from any; none of them blocks or raises.

    Attributes:
        name: unique among the runs of a process unless you named two alike; among those of an orchestrator
            always.
        history: the :class:`~asynccb.History` that the run fills.
        device: the name of the device that an orchestrator has given it; None: none.
    """

    def __init__(
        self,
        name: str | None,
        history: History,
        *,
        replay: int,
        priority: float = 0,
        changed: Callable[[Run], None] | None = None,
        watched: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queued, until :meth:`begin`.

        Args:
            replay: events kept for readers that come late.
            priority: see :attr:`priority`.
            changed: called on the loop when the run has ended, and when it is queued and somebody has asked
                something of it.
            watched: whether somebody will see how it ends, though nobody awaits it.
        """
        self.name = name or new_name()
        self.history = history
        self.device: str | None = None
        self._loop = asyncio.get_running_loop()
        self._replay = replay
        self._priority = check_priority(priority)
        self._changed = changed
        self._watched = watched
        self._being_made = False
        self._created = time.perf_counter()
        self._end = End(history)
        self._session: Session | None = None
        self._parts: Wiring | None = None
        self._place = _NOWHERE
        self._early_end: Outcome | None = None
        self._paused_early = False
        self._readers: Readers | None = None
        self.context = contextvars.copy_context()
        """That of whoever asked for the run, in which all of it is executed."""
        self.context.run(_inside.set, (*_inside.get(), self))

    def be_made(self) -> None:
        """Its turn has come, and its model is made on a thread now."""
        self._being_made = True
        _live.add(self)

    def begin(self, order: Order, claim: Claim) -> None:
        """Its turn has come. Called on the loop, once.

        Raises:
            ModelBusy, CallbackBusy: another run has the model or a callback; then nothing has begun.
        """
        session = Session(self, order, self._ring(), self.context, claim)
        assert session.parts is not None
        session.parts.phases.backdate(self._created)
        self._session, self._parts = session, session.parts
        self._being_made = False
        _live.add(self)
        if self._paused_early:
            session.parts.control.pause()
        if not self._paused_early:  # or not any more: taken back at this moment, on another thread
            session.parts.control.resume()
        if self._early_end is not None:
            self._apply_early_end(self._early_end)

    def end_early(self, outcome: Outcome) -> None:
        """It ends before it has begun: no hook runs. Called on the loop."""
        self.fix(outcome)
        self._place = _NOWHERE._replace(stats=self.stats)
        self.end()
        if self._readers is not None:
            self._readers.close()
        self.over()
        if outcome.kind == "failed" and not self.awaited:
            log_failure(self.name, outcome.kind, outcome.reason)

    # What its orchestrator looks at

    @property
    def end_asked(self) -> Outcome | None:
        """How a queued run is to end, where somebody has asked for that; None: it is to run."""
        return self._early_end

    @property
    def pause_asked(self) -> bool:
        """Whether a queued run is not to begin yet."""
        return self._paused_early

    @property
    def waits_for(self) -> float:
        """Seconds that it has waited by now for anything but its turn to compute; for its drain, if its
        thread has left."""
        parts = self._parts
        since = None if parts is None else parts.control.blocked_at or parts.supervisor.left_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def computed(self) -> float:
        """Seconds in which it had the right to compute."""
        parts = self._parts
        return self._place.stats.computed if parts is None else parts.control.share.spent

    @property
    def ended(self) -> bool:
        """Whether it has drained, or ended before it began."""
        return self._end.has_come

    @property
    def ended_as(self) -> Outcome | None:
        return self._end.outcome

    # What can be read ---------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``paused``, ``closing``, ``completed``, ``stopped``, ``pruned``,
        ``cancelled`` or ``failed``."""
        outcome = self._end.outcome
        if outcome is not None:
            return outcome.kind if self._end.has_come else "closing"
        parts = self._parts
        if parts is None or parts.driver.ident is None:
            return "queued"
        return "paused" if parts.control.parked else "running"

    @property
    def epoch(self) -> int:
        """The 0-based epoch under way, or the last one."""
        parts = self._parts
        return self._place.epoch if parts is None else parts.driver.epoch

    @property
    def step(self) -> int:
        """Batches trained so far, over all epochs."""
        parts = self._parts
        return self._place.step if parts is None else parts.driver.step

    @property
    def resumed(self) -> Resumed | None:
        """The backup that this training goes on from, and where; None where it began anew. Known from
        ``on_train_begin`` on."""
        parts = self._parts
        return self._place.resumed if parts is None else parts.resumed

    @property
    def logs(self) -> Mapping[str, Any]:
        """The newest logs of a batch or an epoch; a copy. Of a model that computes on a device while nobody
        wants them, those of the batch before the newest."""
        parts = self._parts
        return dict(self._place.logs if parts is None else parts.driver.logs)

    @property
    def outcome(self) -> str | None:
        """``"completed"``, ``"stopped"``, ``"pruned"``, ``"cancelled"`` or ``"failed"``; None until the
        training has left its loop."""
        outcome = self._end.outcome
        return None if outcome is None else outcome.kind

    @property
    def reason(self) -> str | None:
        """Why it ended before its time, in words; None until the training has left its loop."""
        outcome = self._end.outcome
        return None if outcome is None else outcome.reason

    @property
    def exception(self) -> BaseException | None:
        """What awaiting this run raises, or None."""
        return self._end.exception

    @property
    def stats(self) -> RunStatistics:
        """Counts of events, mailboxes and waits so far, and where the time went."""
        parts = self._parts
        if parts is not None:
            return parts.statistics()
        if self._end.has_come:
            return self._place.stats
        return _NOWHERE.stats._replace(seconds={"queued": time.perf_counter() - self._created})

    @property
    def settled(self) -> bool:
        """Whether nothing of this run can move before somebody else does: see
        :func:`asynccb.testing.settle`."""
        parts = self._parts
        if parts is None:
            return not self._being_made
        thread_rests = parts.control.resting or self._end.outcome is not None or parts.model_waits
        return thread_rests and all(c.mailbox.finished or c.suspended for c in parts.consumers)

    @property
    def priority(self) -> float:
        """Where trainings compete for processor time, one more doubles this one's share, one less halves it,
        within 8 of 0; and of those that are queued, the highest begins first. Default 0. May be set at any
        time.

        Raises:
            ArgumentError: set to what is no number.
        """
        return self._priority

    @priority.setter
    def priority(self, priority: float) -> None:
        self._priority = check_priority(priority)
        parts = self._parts
        if parts is not None:
            parts.control.share.weight = self.weight
        else:
            self._tell_changed()

    @property
    def weight(self) -> float:
        """The share in comparison with others."""
        return weight_of(self._priority)

    # What can be asked --------------------------------------------------------------------------------------

    def stop(self, reason: str = "stopped") -> None:
        """Ends the training after the batch under way: its epoch ends without validation, ``fit`` returns its
        History.

        The first reason wins; a cancel overrides it. No effect on a run that has ended. One that has not
        begun ends at once, and none of its hooks runs.
        """
        self._stop("stopped", reason)

    def prune(self, reason: str = "pruned") -> None:
        """As :meth:`stop`, for a training that was not worth going on with: its outcome is ``"pruned"``."""
        self._stop("pruned", reason)

    def _stop(self, kind: StopKind, reason: str) -> None:
        parts = self._parts
        if parts is not None:
            parts.control.stop(str(reason), kind)
        elif self._early_end is None:
            self._end_while_queued(of_stop(kind, str(reason)))

    def cancel(self, reason: str = "cancelled") -> None:
        """Ends the training after the batch under way; the epoch is left open.

        ``on_exception`` and ``on_train_end`` run, mailboxes drain for the grace period of 5 s, what is lost
        then is logged. Who awaits the run gets :class:`~asynccb.RunCancelled`. A run that has not begun ends
        at once, and none of its hooks runs.
        """
        if self._end.has_come:
            return
        parts = self._parts
        if parts is None:
            if self._early_end is None or self._early_end.kind != "cancelled":
                self._end_while_queued(of_error(Interrupt("cancelled", str(reason))))
            return
        if parts.supervisor.cancelled_at is None:
            parts.supervisor.cancelled_at = time.monotonic()
        parts.control.interrupt_with("cancelled", str(reason))
        parts.poke()

    def pause(self) -> None:
        """Asks the training to park after the batch under way; ``state`` is ``paused`` once it has. One that
        is queued does not begin before :meth:`resume`."""
        self._paused_early = True
        parts = self._parts
        if parts is not None:
            parts.control.pause()
        else:
            self._tell_changed()

    def resume(self) -> None:
        """Takes :meth:`pause` back."""
        self._paused_early = False
        parts = self._parts
        if parts is not None:
            parts.control.resume()
        else:
            self._tell_changed()

    def _end_while_queued(self, outcome: Outcome) -> None:
        if self._end.has_come:
            return
        # Written before `_parts` is read again: it may begin at this moment, on another thread, which writes
        # `_parts` before it looks here.
        self._early_end = outcome
        if self._parts is None:
            self._tell_changed()
        else:
            self._apply_early_end(outcome)

    def _apply_early_end(self, outcome: Outcome) -> None:
        if outcome.kind == "cancelled":
            self.cancel(outcome.reason)
        else:
            self._stop(cast("StopKind", outcome.kind), outcome.reason)

    def _tell_changed(self) -> None:
        if self._changed is not None:
            tell(self._loop, self._changed, self)

    async def snapshot(self) -> Snapshot:
        """A consistent copy of the model at the next safe point: after the batch under way, or at once in a
        wait or a pause.

        After the end it is the final state. The copy owns its memory; release it when it is big and you are
        done.

        Raises:
            NotStarted: the run is still queued, or ended before it had begun.
            TornState: the model raised inside a batch.
            ModelBusy: the run has ended and another one has the model now.
        """
        session, parts = self._session, self._parts
        if session is None or (
            parts is not None and parts.driver.ident is None and self._end.outcome is None
        ):
            raise NotStarted(f"{self.name} is {self.state}: it has no state of its own")
        if parts is None:
            return await session.final_snapshot()
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Snapshot] = loop.create_future()

        def set_answer(snapshot: Snapshot | None, error: BaseException | None) -> None:
            if answered.done():
                return  # whoever asked was cancelled meanwhile
            if error is not None:
                answered.set_exception(raisable(error))
            elif snapshot is not None:
                answered.set_result(snapshot)

        request = SnapshotRequest(
            lambda snapshot: _tell_whole(loop, set_answer, snapshot.another()),
            lambda error: tell(loop, set_answer, None, error),
        )
        if parts.control.ask(request):
            return await answered
        return await session.final_snapshot()

    async def flush(self) -> None:
        """Waits until every callback has handled all events emitted so far.

        Raises:
            SelfWait: called from a hook or an async source of this run.
        """
        self._refuse_inside("flush()")
        parts = self._parts
        if parts is None:
            return
        marks = []
        for consumer in parts.consumers:
            if not consumer.ended:
                done = self._loop.create_future()
                consumer.mailbox.put(marker(done))
                marks.append(done)
        parts.wakeup.flush()
        for done in marks:
            await done

    def events(self, since: int | None = None) -> EventStream:
        """The run's events as an async iterator that ends after the drain.

        A slow reader never slows the training: where events have left the ring (its size is ``replay`` of
        ``start``), or were never built because nobody wanted them, it gets a :class:`~asynccb.Gap`.

        Args:
            since: the ``seq`` of the first event wanted; None: from now on.
        """
        parts = self._parts
        if parts is not None:
            return parts.dispatcher.stream(since, self._allow_reading)
        return self._ring().open(since, self._place.stats.events, self._allow_reading)

    def _allow_reading(self) -> None:
        self._refuse_inside("the run's events")

    def _ring(self) -> Readers:
        if self._readers is None:
            self._readers = Readers(self._replay, self._readers_changed)
            if self._end.has_come:
                self._readers.close()
        return self._readers

    def _readers_changed(self) -> None:
        parts = self._parts
        if parts is not None:
            parts.readers_changed()

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
        cancelled = await self._end.wait_shielded(
            lambda: self.cancel("the task was cancelled while it waited for the run")
        )
        if cancelled is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled
        if error is None:
            self._end.result()

    def __repr__(self) -> str:
        return f"<Run {self.name} {self.state} epoch={self.epoch} step={self.step}>"

    # What callbacks may ask, while they serve this run ------------------------------------------------------

    def snapshot_now(self, callback: Callback, *, pooled: bool = False) -> Snapshot:
        """The model at this very moment; legal on the training thread only, which is where inline hooks run.

        Args:
            callback: who asks.
            pooled: for the writers of this package, which release it: its memory is then used again, and the
                training waits where two such copies are still in use.

        Raises:
            RuntimeError: called on another thread.
        """
        return self._under_way.snapshot_now(callback, pooled=pooled)

    def expect_copies(self) -> None:
        """Says, in an inline ``on_train_begin``, that pooled snapshots will be taken: memory for the first is
        got beside the first batches."""
        self._under_way.driver.snapshots.expect()

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Raises ArgumentError for a path that the model says it cannot be saved to."""
        check = getattr(self._under_way.model, "check_path", None)
        if check is not None:
            check(path, weights_only=weights_only)

    def room_for_copy(self, callback: Callback) -> bool:
        """Whether ``callback`` can have a pooled snapshot, or share one of this event's, without waiting for
        a writer. Called in inline hooks."""
        parts = self._under_way
        return parts.dispatcher.shares_copy(callback) or parts.driver.snapshots.has_room()

    def want_unit(self) -> None:
        """Says that a callback with ``take_unit`` wants a resume unit: it is asked at the next place where
        one can be cut. Legal on any thread."""
        self._under_way.control.want_unit()

    def announce_saved(self, path: str, epoch: int) -> None:
        """Tells everybody that the file at ``path`` is durable. Called on the loop by whoever wrote it; where
        the run is over nobody listens."""
        parts = self._parts
        if parts is not None:
            parts.dispatcher.commit(path, epoch)

    def direction(self, metric: str) -> str | None:
        """``"min"`` or ``"max"`` where the model knows in which direction ``metric`` improves."""
        return self._under_way.model.direction(metric)

    @property
    def _under_way(self) -> Wiring:
        if self._parts is None:
            raise RuntimeError(f"{self.name} is {self.state}")
        return self._parts

    # Waiting for the end ------------------------------------------------------------------------------------

    async def _wait_as_watcher(self) -> History:
        self._refuse_inside("the run itself")
        return await self._end.wait()

    async def wait_as_owner(self) -> History:
        """The wait of ``fit``: cancelling it cancels the run, waits for the end, and then lets the
        cancellation go on."""
        self._refuse_inside("the run itself")
        cancelled = await self._end.wait_shielded(
            lambda: self.cancel("the task that awaited fit was cancelled")
        )
        if cancelled is not None:
            raise cancelled
        return self._end.result()

    def _refuse_inside(self, what: str) -> None:
        if self in _inside.get():
            raise SelfWait(
                f"a hook or source of {self.name} waits for {what}, which waits for that hook to end"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(f"{self.name} belongs to another event loop; await it there")

    # What its session tells it ------------------------------------------------------------------------------

    @property
    def awaited(self) -> bool:
        return self._end.awaiting > 0 or self._watched()

    def fix(self, outcome: Outcome) -> History:
        return self._end.fix(outcome)

    def end(self) -> None:
        parts = self._parts
        if parts is not None:
            driver = parts.driver
            self._end.errors = list(parts.failures.errors)
            self._place = _Place(
                driver.epoch, driver.step, driver.logs, parts.resumed, self._last_word(parts)
            )
            self._parts = None  # last: a reader on another thread finds one or the other
        self._end.come()
        if self._changed is not None:
            self._changed(self)

    def _last_word(self, parts: Wiring) -> RunStatistics:
        try:
            return parts.statistics()
        except Exception:
            # A defect of ours; nobody shall wait for ever because of it.
            logger.exception("%s: its counts are lost", self.name)
            return _NOWHERE.stats

    def over(self) -> None:
        _live.discard(self)


def _tell_whole(loop: asyncio.AbstractEventLoop, answer: Callable[..., object], snapshot: Snapshot) -> None:
    """Answers once the copy is made, so that nobody on the loop waits for the thread that makes it."""
    snapshot.then(lambda: tell(loop, answer, snapshot, None))


_NOWHERE = _Place()
