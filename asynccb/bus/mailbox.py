"""What waits for one callback: order, bound, policy and counts."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from asynccb.training.snapshot import Snapshot

__all__ = [
    "CODES",
    "HOOKS",
    "MARKER",
    "WORK",
    "Entry",
    "Mailbox",
    "MailboxStatistics",
    "Mark",
    "Work",
    "hook_of",
    "marker",
]


HOOKS = (
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_end",
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_predict_begin",
    "on_predict_end",
    "on_predict_batch_begin",
    "on_predict_batch_end",
    "on_exception",
    "on_checkpoint_saved",
)
CODES = {hook: code for code, hook in enumerate(HOOKS)}
WORK = len(HOOKS)
MARKER = WORK + 1

Entry = tuple[int, Any, Any, int, int | None]
"""What lies in a mailbox: (code, first, second, seq, epoch).

``code`` is the position of the hook in HOOKS, and ``first`` and ``second`` are its arguments (``first`` alone
where the hook takes one); or WORK with a :class:`Work` as ``first``; or MARKER with a :class:`Mark` as
``first`` and, as ``second``, what to await for its result. A
plain tuple of one shape, because the consumer takes
tens of thousands a second apart: of a named tuple that costs half as much again, and a test of its kind as
    much as the hook.
"""


class Work(NamedTuple):
    """The coroutine that an inline hook returned."""

    coroutine: Coroutine[Any, Any, object]
    hook: str
    snapshots: tuple[Snapshot, ...] = ()

    def discard(self) -> None:
        """Closes what will never run, and gives back the snapshots that it was to use."""
        self.coroutine.close()
        for snapshot in self.snapshots:
            snapshot.release()


class Mark(Protocol):
    """What a marker sets: an asyncio.Future, or what looks like one."""

    def done(self) -> bool: ...

    def set_result(self, result: Any, /) -> None: ...


def marker(mark: Mark, ask: Callable[[], Awaitable[object]] | None = None) -> Entry:
    """An entry that sets ``mark`` when everything before it is done: to what ``ask`` answers, else to None.
    Where it will never be reached, and where ``ask`` raises, that is None too."""
    return (MARKER, mark, ask, -1, None)


def hook_of(entry: Entry) -> str:
    """The name of the hook that an entry stands for; ``""`` for a marker."""
    code = entry[0]
    if code < WORK:
        return HOOKS[code]
    hook: str = entry[1].hook if code == WORK else ""
    return hook


class MailboxStatistics(NamedTuple):
    """Counts of one callback's mailbox.

    Attributes:
        waiting: entries that lie there now.
        peak: the most that ever lay there when the training looked.
        handled: entries whose hook has run, also those that raised.
        dropped: entries dropped by the ``overflow`` policy, or whose turn came after the callback was
            disabled.
        held: how often the training waited for room.
        lost: entries thrown away at the end, because their time was up.
        bound: entries that may wait.
        policy: what happens beyond them, the callback's ``overflow``.
    """

    waiting: int
    peak: int
    handled: int
    dropped: int
    held: int
    lost: int
    bound: int
    policy: str


_NOTHING: Entry = (MARKER, None, None, -1, None)
_EPOCH_END = CODES["on_epoch_end"]
_KEPT = frozenset({"", "on_train_begin", "on_train_end", "on_exception"})


class Mailbox:
    """A bounded queue with a thread's side (``append`` and ``overflow``) and a loop's side (``take``).

    The hot path of the thread is ``queue.append(entry)`` and a comparison of ``len(queue)`` with ``limit``;
    ``overflow`` is
    called when the limit is reached: the event goes in first.

    Args:
        owner: the callback's name.
        policy: ``"wait"``, ``"drop_oldest"`` or ``"latest"``.
        bound: entries that may wait.
        wait_for_room: blocks the training thread until the predicate holds.
    """

    def __init__(
        self,
        owner: str,
        policy: str,
        bound: int,
        wait_for_room: Callable[[Mailbox, Callable[[], bool]], None],
    ) -> None:
        self.owner = owner
        self.policy = policy
        self.bound = bound
        self.queue: deque[Entry] = deque()
        self.idle = False  # until the consumer starts: nobody else may say that all is done
        self.closed = False
        self.handled = 0
        self.lost = 0
        self.dropped = 0
        self.held = 0
        self.peak = 0
        self.awaited = False
        """Whether the training thread waits for room here."""
        # "latest" is looked at with every second entry: what waits is never more than one of each hook.
        self.limit = {"wait": bound, "drop_oldest": bound + 1, "latest": 2}[policy]
        # So much room that nobody need look at every event whether it is full.
        self.roomy = policy == "wait" and bound >= 256
        self._wait_for_room = wait_for_room
        # Held while entries are dropped from the middle, and by everybody on the loop who touches the queue
        # meanwhile.
        self._dropping = threading.Lock()

    @property
    def take(self) -> Callable[[], Entry]:
        """How the consumer takes the next entry. A mailbox that waits drops nothing: there without a lock."""
        return self.queue.popleft if self.policy == "wait" else self._take_locked

    @property
    def finished(self) -> bool:
        """Whether everything that was put here is done, its hooks included. Read by the training thread while
        it waits."""
        # In this order: the consumer lowers `idle` before it takes, so an empty queue with `idle` up is
        # really done.
        return self.closed or (not self.queue and self.idle)

    def put(self, entry: Entry) -> None:
        """Appends from the loop: a marker, or the news of a durable file. Never waits."""
        with self._dropping:  # the training thread may be looking through the queue for what to drop
            self.queue.append(entry)

    def put_back(self, entry: Entry) -> None:
        """The consumer has taken it, and takes it again as the next."""
        with self._dropping:
            self.queue.appendleft(entry)

    def overflow(self, entry: Entry) -> None:
        """Called on the training thread after ``entry`` was appended and ``limit`` is reached."""
        self.peak = max(self.peak, len(self.queue))
        if self.closed:  # its consumer has gone: nothing that lies here will ever be taken
            self.discard_all()
            return
        if hook_of(entry) in _KEPT:
            return
        if self.policy == "wait":
            # An epoch end passes the bound, so that closing books is not held by batches; twice the bound
            # holds all.
            if entry[0] != _EPOCH_END or len(self.queue) >= 2 * self.bound:
                self.held += 1
                # Raised before the thread looks for room, and read by the consumer after it has made some:
                # one of the two sees what the other did.
                self.awaited = True
                try:
                    self._wait_for_room(self, self._has_room)
                finally:
                    self.awaited = False
        elif self.policy == "latest":
            self._drop_older(entry)
        else:
            self._drop_oldest()

    def count_dropped(self) -> None:
        """Called on the loop."""
        with self._dropping:  # the training thread counts too
            self.dropped += 1

    def statistics(self) -> MailboxStatistics:
        waiting = len(self.queue)
        return MailboxStatistics(
            waiting,
            max(self.peak, waiting),
            self.handled,
            self.dropped,
            self.held,
            self.lost,
            self.bound,
            self.policy,
        )

    def discard_all(self) -> int:
        """Empties the mailbox at the end: coroutines are closed, snapshots released, markers told. Returns
        what was lost."""
        lost = 0
        while self.queue:
            entry = self._take_locked()
            code, first, *_ = entry
            if code == MARKER:
                if first is not None and not first.done():
                    first.set_result(None)
                continue
            lost += 1
            if code == WORK:
                first.discard()
        self.lost += lost
        return lost

    def _has_room(self) -> bool:
        return self.closed or len(self.queue) <= self.bound // 2

    def _take_locked(self) -> Entry:
        with self._dropping:
            # Empty where the training thread has dropped what the consumer saw: an entry that does nothing.
            return self.queue.popleft() if self.queue else _NOTHING

    def _drop_oldest(self) -> None:
        with self._dropping:
            while len(self.queue) > self.bound:
                at = self._first(lambda entry: entry[0] != _EPOCH_END and hook_of(entry) not in _KEPT)
                if at is None:  # nothing but epoch ends, which are dropped last
                    at = self._first(lambda entry: hook_of(entry) not in _KEPT)
                if at is None:
                    return
                self._drop(at)

    def _drop_older(self, newest: Entry) -> None:
        hook = hook_of(newest)
        with self._dropping:
            while (at := self._first(lambda entry: hook_of(entry) == hook)) is not None:
                if self.queue[at] is newest:
                    return
                self._drop(at)

    def _first(self, wanted: Callable[[Entry], bool]) -> int | None:
        return next((at for at, entry in enumerate(self.queue) if wanted(entry)), None)

    def _drop(self, at: int) -> None:
        entry = self.queue[at]
        del self.queue[at]
        self.dropped += 1
        if entry[0] == WORK:
            entry[1].discard()
