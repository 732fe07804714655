"""The way uphill: what the event loop asks of a training thread, and the only place where that thread ever
waits.

Everything else flows down, from the batch to the callbacks. Stop, cancel, pause and snapshot requests flow
up, and they are seen at the safe points of the loop (between two batches) and in every wait.

Two threads share this object. The training thread calls ``safe_point``, ``stopped``, ``wait`` and ``leave``;
everybody else calls the rest, from any thread. What is shared is written under one condition variable and
read without it on the hot path: reading ``attention`` a batch late is harmless, missing a wake-up is not.

===========================  ======================================================================
the thread waits for         ended by
===========================  ======================================================================
``mailbox`` with room        its consumer, cancel, loop gone
``lockstep`` hook            its consumer, cancel, loop gone
``train begin`` awaitables   the consumers, cancel, loop gone
``feed``                     the async source's task, stop, cancel, loop gone
``pause``                    resume, stop, cancel, loop gone
``compute token``            its turn, cancel, loop gone
``pool``: room for a copy    a writer's release, cancel, loop gone
``gate``: a segment copied   the copier, which waits for nobody
===========================  ======================================================================

Before it blocks the thread gives its compute token back, and takes one again afterwards: kept, two trainings
that wait for each other would never end. A wait for the token itself raises nothing: whoever was cancelled
meanwhile goes on without one, to the next place where it may leave.

In the first five snapshots are served: a lockstep hook that awaits ``run.snapshot()`` would else wait for the
thread that waits for the hook; and in a wait for the token, unless it follows one of the last two. In a pause
resume units are cut too. In the last two the thread is inside of a
hook or of a batch, where a copy would be of no defined moment.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Literal, NamedTuple

from asynccb.errors import TornState

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.protocols import Share
    from asynccb.training.snapshot import Snapshot

__all__ = ["FLAGGED", "STUCK", "TORN", "Control", "Interrupt", "Limits", "NoShare", "Reason", "StopKind"]

Reason = Literal["mailbox", "lockstep", "train begin", "feed", "pause", "compute token", "pool", "gate"]
_BETWEEN_BATCHES = frozenset({"feed", "pause"})
Cause = Literal["cancelled", "failed", "loop gone", "abandoned"]
StopKind = Literal["stopped", "pruned"]


FLAGGED = "model.stop_training was set"
TORN = "the model raised inside a batch, so its weights may be half updated"
STUCK = "the training thread did not come back, so the weights may be half updated"


class Limits(NamedTuple):
    """The times of a run, in seconds; a test shortens them."""

    grace: float = 5.0
    """From a cancel to the end of the drain."""
    last_words: float = 1.0
    """For a cancelled hook to return, for the closing hooks of a callback that was cut short, and for those
    of a run whose thread is stuck."""
    poll: float = 0.2
    """How often a waiting thread looks whether the event loop still exists."""
    slow_mailbox: float = 1.0
    """A training held longer than this by a full mailbox is one warning."""
    patience: float = 30.0
    """A lockstep hook or a drain that takes longer than this is a warning, for drains each time."""
    comeback: float | None = None
    """From a cancel until a thread that does not come back counts as stuck; None: ``grace``; infinite: it
    always comes back."""
    unit: float = 60.0
    """From the cut of a resume unit to the last callback's report."""


class Interrupt(BaseException):
    """Leaves the training thread's stack at once. A BaseException, so that no ``except Exception`` of a model
    or hook holds it."""

    def __init__(self, cause: Cause, reason: str, error: BaseException | None = None) -> None:
        super().__init__(reason)
        self.cause: Cause = cause
        self.reason = reason
        self.error = error


class SnapshotRequest(NamedTuple):
    """How an asker gets its answer; both are called on the training thread."""

    answer: Callable[[Snapshot], None]
    refuse: Callable[[BaseException], None]


class NoShare:
    """Of a thread that takes no turns."""

    contended = False
    granted = True
    spent = 0.0
    weight = 1.0

    def request(self) -> None:
        """It may always compute."""

    give_back = leave = look_at_others = request

    def batch_done(self) -> bool:
        return False


class Control:
    """Requests to one training thread, and its waits.

    Args:
        loop_is_closed: whether the event loop of the run is gone.
        entering_wait: called when the thread is about to block, so that what lies in the mailboxes is
            delivered first.
        limits: the times of the run.
    """

    def __init__(
        self, loop_is_closed: Callable[[], bool], entering_wait: Callable[[], None], limits: Limits
    ) -> None:
        self.limits = limits
        self.attention = False
        self.stop_reason: str | None = None
        self.stop_kind: StopKind = "stopped"
        self.share: Share = NoShare()
        """The right to compute, of the process's budget."""
        self.interrupt: Interrupt | None = None
        self.interrupted_at = 0.0
        self.pause_wanted = False
        self.waiting: Reason | None = None
        self.blocked_at: float | None = None
        """Since when it waits for something else than its turn to compute (``time.monotonic``)."""
        self.parked = False
        self.closing = False
        self.torn = False
        self.waits: defaultdict[str, int] = defaultdict(int)
        self.waited: defaultdict[str, float] = defaultdict(float)
        self.flagged: Callable[[], bool] = lambda: False
        self.capture: Callable[[], Snapshot] | None = None
        self.cut: Callable[[], object] = lambda: None
        """Cuts a resume unit, where one is wanted and the training can be resumed."""
        self.between = False
        """Whether the interrupt left the loop between two batches, and not out of a batch or a hook."""
        self._loop_is_closed = loop_is_closed
        self._entering_wait = entering_wait
        self._changed = threading.Condition()
        self._requests: deque[SnapshotRequest] = deque()
        self._left = False
        self._unit_wanted = False
        self._predicate: Callable[[], bool] | None = None
        self._stop_ends = False

    # From any thread ----------------------------------------------------------------------------------------

    def stop(self, reason: str, kind: StopKind = "stopped") -> None:
        """Ends the training after the batch under way. The first reason wins."""
        with self._changed:
            if self.stop_reason is None:
                self.stop_reason, self.stop_kind = reason, kind
            self._changed.notify_all()

    def interrupt_with(self, cause: Cause, reason: str, error: BaseException | None = None) -> bool:
        """Ends the training after the batch under way, without its epoch end. The first cause wins, but for
        ``abandoned``.

        Returns:
            Whether this interrupt is the one that counts.
        """
        with self._changed:
            if self.interrupt is not None and cause != "abandoned":
                return False
            if self.interrupt is None:
                self.interrupted_at = time.monotonic()
            self.interrupt = Interrupt(cause, reason, error)
            self.attention = True
            self._changed.notify_all()
        if cause == "abandoned":
            self._refuse_snapshots()
        return True

    def pause(self) -> None:
        with self._changed:
            self.pause_wanted = True
            self.attention = True

    def resume(self) -> None:
        with self._changed:
            self.pause_wanted = False
            self._changed.notify_all()

    def want_unit(self) -> None:
        """A resume unit is wanted: the next safe point looks after it, or the pause at this one."""
        self._unit_wanted = self.attention = True
        self.nudge()

    def ask(self, request: SnapshotRequest) -> bool:
        """Asks for a snapshot at the next safe point. False: the thread has left, and nobody will answer."""
        with self._changed:
            if self._left:
                return False
            self._requests.append(request)
            self.attention = True
            self._changed.notify_all()
            return True

    def nudge(self) -> None:
        """Something that the thread may be waiting for has changed. Wakes it only if what it waits for has
        come true.

        A thread woken for nothing costs two changes of the interpreter lock, many times what a callback
        costs. No wake-up is lost: the thread hangs out its predicate before it looks at what it waits for,
        and the caller has changed that before it looks for a predicate.
        """
        predicate = self._predicate
        if predicate is not None and predicate():
            with self._changed:
                self._changed.notify_all()

    def take_turns(self, share: Share) -> None:
        """From now on the thread computes only with a token of ``share``, and waits for its first. Called on
        the training thread."""
        self.share = share
        self._take_turn(serve=True)

    def look_up(self) -> None:
        """Something about the share has changed. Legal on any thread."""
        self.attention = True
        self.nudge()

    @property
    def resting(self) -> bool:
        """Whether the thread waits, and nothing has happened that ends its wait or is to be served in it."""
        predicate = self._predicate
        if predicate is None or self._requests or self.interrupt is not None:
            return False
        return not (predicate() or (self._stop_ends and self.stop_reason is not None))

    # From the training thread -------------------------------------------------------------------------------

    def safe_point(self) -> None:
        """Between two batches: serves snapshots, parks in a pause, and leaves by Interrupt if the run was
        cancelled."""
        if self.attention:
            self._attend()

    def stopped(self) -> bool:
        """Whether the training is to end here. The model's ``stop_training`` counts, from whichever hook set
        it."""
        if self.attention:
            self._leave_between()
        if self._loop_is_closed():
            self._loop_gone()
        if self.stop_reason is None and self.flagged():
            self.stop(FLAGGED)
        return self.stop_reason is not None

    def wait(
        self,
        reason: Reason,
        predicate: Callable[[], bool],
        *,
        stop_ends: bool = False,
        unending: bool = False,
        serve: bool = True,
        complain: Callable[[float], None] | None = None,
        complain_after: float = float("inf"),
    ) -> bool:
        """Blocks the training thread until ``predicate()`` holds. No other function may block it.

        While the run closes nothing but the gate is waited for: the drain follows, and it has its own limits.

        Args:
            reason: what is waited for; counted and timed under this name.
            predicate: cheap, callable on any thread, and made true only by somebody who then calls
                :meth:`nudge`.
            stop_ends: whether a stop ends this wait too.
            unending: nothing but the predicate ends this wait; only for what waits for nobody itself.
            serve: whether snapshots are served meanwhile.
            complain: called once, with the seconds waited so far, after ``complain_after`` seconds.

        Returns:
            True if the predicate holds, False if a stop ended the wait.

        Raises:
            Interrupt: the run was cancelled or failed, or its loop is gone.
        """
        if (self.closing and not unending) or predicate():
            return True
        # Kept while it is blocked, the token would keep from computing whoever this thread waits for.
        gave = self.share.granted
        if gave:
            self.share.give_back()
        serve = serve and not unending
        came_true = self._block(
            reason, predicate, stop_ends=stop_ends, serve=serve, complain=complain, after=complain_after
        )
        if gave:
            self._take_turn(serve=serve)
        return came_true

    def _take_turn(self, *, serve: bool) -> None:
        share = self.share
        share.request()
        if not (share.granted or self.closing):
            self._block("compute token", lambda: share.granted or self._must_leave(), serve=serve)
        if not share.granted:
            share.give_back()  # it does not wait any more

    def _must_leave(self) -> bool:
        return self.interrupt is not None or self._loop_is_closed()

    def _block(
        self,
        reason: Reason,
        predicate: Callable[[], bool],
        *,
        stop_ends: bool = False,
        serve: bool,
        complain: Callable[[float], None] | None = None,
        after: float = float("inf"),
    ) -> bool:
        started = time.monotonic()
        raises = reason not in ("gate", "compute token")
        # A copy may be completed inside of another wait.
        outer = self.waiting, self._stop_ends, self._predicate
        self.waiting = reason
        self._stop_ends = stop_ends
        self._predicate = predicate
        if reason != "compute token" and self.blocked_at is None:
            self.blocked_at = started
        self.waits[reason] += 1
        if reason != "gate":
            self._entering_wait()
        try:
            while True:
                if serve:
                    self._serve_snapshots()
                with self._changed:
                    if predicate():
                        return True
                    if reason in _BETWEEN_BATCHES:
                        self._leave_between()
                    elif raises:
                        self._raise_interrupt()
                    if stop_ends and (self.stop_reason is not None or self.flagged()):
                        return False
                    if not (serve and self._requests):
                        self._changed.wait(self.limits.poll)
                if reason == "compute token":
                    self.share.look_at_others()
                if raises and self._loop_is_closed():
                    self._loop_gone()
                if complain is not None and time.monotonic() - started >= after:
                    complain(time.monotonic() - started)
                    complain = None
        finally:
            self.waiting, self._stop_ends, self._predicate = outer
            if self.waiting is None:
                self.blocked_at = None
            self.waited[reason] += time.monotonic() - started

    def leave(self) -> None:
        """The thread goes: every request still open is answered, later ones are told that nobody is here."""
        self._serve_snapshots()
        with self._changed:
            self._left = True
        self._serve_snapshots()

    def _refuse_snapshots(self) -> None:
        """The thread is stuck, and nobody else may touch the model: who asked must not wait for it."""
        with self._changed:
            self._left = True
            asked, self._requests = self._requests, deque()
        for request in asked:
            request.refuse(TornState(STUCK))

    def _attend(self) -> None:
        # Lowered first: a request that comes in while we serve the earlier ones raises it again and is not
        # lost.
        self.attention = False
        self._leave_between()
        self._serve_snapshots()
        if self._unit_wanted:
            self._cut()
        self._let_others_compute()
        if self.pause_wanted:
            self.parked = True
            try:
                while (
                    self.wait("pause", self._pause_is_over_or_a_unit_wanted, stop_ends=True)
                    and self._unit_wanted
                ):
                    self._cut()
            finally:
                self.parked = False

    def _let_others_compute(self) -> None:
        share = self.share
        if share.contended:
            self.attention = True  # its slice is looked at behind each batch
            if share.batch_done():
                share.give_back()
                self._take_turn(serve=True)

    def _cut(self) -> None:
        self._unit_wanted = False  # lowered first, as above
        self.cut()

    def _pause_is_over_or_a_unit_wanted(self) -> bool:
        return not self.pause_wanted or self._unit_wanted

    def _serve_snapshots(self) -> None:
        if not self._requests:
            return
        # All that have asked by now share one copy.
        with self._changed:
            asked, self._requests = self._requests, deque()
        try:
            if self.torn or self.capture is None:
                raise TornState(TORN)
            snapshot = self.capture()
        except BaseException as error:  # whatever the model raised: who asked must not wait for ever
            for request in asked:
                request.refuse(error)
            return
        for request in asked:
            request.answer(snapshot)
        snapshot.release()  # who asked has a handle of its own

    def _leave_between(self) -> None:
        self.between = True
        self._raise_interrupt()
        self.between = False

    def _raise_interrupt(self) -> None:
        if self.interrupt is not None and not (self.closing and self.interrupt.cause != "abandoned"):
            self.attention = True
            raise self.interrupt

    def _loop_gone(self) -> None:
        self.interrupt_with("loop gone", "the event loop was closed during the training")
        if not self.closing:
            self._raise_interrupt()
