"""The hook table: which events somebody wants, and what is done on the training thread for each.

``emit.batch_end`` and its like are functions made once for a version of the table, with everything looked up
beforehand, or None where nobody wants the event; the loop then only takes its number (``skip``). A reader
that joins or leaves makes a new version.
"""

from __future__ import annotations

import itertools
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any

from asynccb.bus.clock import HookClock, Timed
from asynccb.bus.inline import HookSnapshots, as_coroutine
from asynccb.bus.mailbox import CODES, WORK, Work
from asynccb.bus.table import BATCH_KINDS, Emit, InlineFailure, Subscriber
from asynccb.events import (
    BatchEnd,
    CheckpointSaved,
    EpochBegin,
    EpochEnd,
    ExceptionRaised,
    FrozenLogs,
    Logs,
    TestBegin,
    TestEnd,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from asynccb.bus.mailbox import Entry
    from asynccb.bus.readers import EventStream, Readers
    from asynccb.bus.table import Emitter
    from asynccb.bus.wakeup import Wakeup
    from asynccb.training.control import Control
    from asynccb.training.copying import Copying
    from asynccb.training.snapshot import Snapshot

__all__ = ["Dispatcher", "Emit", "InlineFailure", "Subscriber"]

GLANCE = 16
"""Batches between two looks at the length of a roomy mailbox."""


class Dispatcher:
    """Runs inline hooks and fills mailboxes. Called on the training thread; ``rebuild``, ``commit``,
    ``silence`` and ``close_beside`` on the loop.

    Args:
        subscribers: in the order of the callback list.
        readers: the ring of event streams.
        wakeup: the way to the loop.
        control: for the waits of lockstep hooks.
        gate: the copy of the model under way, which is completed before a hook that may change the model.
        failed: told of every inline hook that raised, before the exception goes on.
        warn: told of hooks that hold the training for long: (seconds, names of the callbacks, hook).
        phase: told when a validation begins and when batches go on.
    """

    def __init__(
        self,
        subscribers: list[Subscriber],
        readers: Readers,
        wakeup: Wakeup,
        control: Control,
        gate: Copying,
        *,
        failed: Callable[[InlineFailure], None],
        warn: Callable[[float, str, str], None],
        phase: Callable[[str], object] = lambda phase: None,
    ) -> None:
        self.subscribers = subscribers
        self._snapshots = HookSnapshots([(s.callback, s.changes_model) for s in subscribers])
        self._readers = readers
        self._wakeup = wakeup
        self._control = control
        self._gate = gate
        self._one_by_one = False  # whether the hooks of the event under way are looked at one by one
        self._failed = failed
        self._warn = warn
        self._phase = phase
        self._numbers = itertools.count()
        self.skip: Callable[[], int] = self._numbers.__next__
        """Takes the number of an event that nobody wants, and answers it."""
        self._numbering = threading.Lock()
        # One list of hooks for each batch event, shared by all versions of the table so that `silence`
        # reaches them all.
        self._inline: dict[str, list[Any]] = {kind.hook: [] for kind in BATCH_KINDS.values()}
        # By identity, and kept beside the lists: `silence` empties these under the feet of a stuck thread.
        self._owners: dict[tuple[str, int], Subscriber] = {}
        self._beside: dict[str, list[Subscriber]] = {}
        for subscriber in subscribers:
            for name, hook in subscriber.inline.items():
                self._owners[name, id(hook)] = subscriber
                if name in self._inline:
                    self._inline[name].append(hook)
            for name in subscriber.beside:
                self._beside.setdefault(name, []).append(subscriber)
        self.clock = HookClock(self._name_of)
        self._silent = False
        self._speaker: int | None = None
        self._opening = ""
        self._closed: set[type[Any]] = set()
        self._withheld: list[tuple[Subscriber, Entry]] = []
        self._use: Callable[[Emit], None] = lambda table: None
        self.emit = self._build()

    # The table ----------------------------------------------------------------------------------------------

    def rebuild(self) -> None:
        """A reader came or went: other events are wanted from now on."""
        self.emit = self._build()
        self._use(self.emit)

    def follow(self, use: Callable[[Emit], None]) -> Emit:
        """Answers the present table; ``use`` is given every later one, so that the hot path need not ask."""
        self._use = use
        return self.emit

    def let_go(self) -> None:
        """Of what leads back here; nothing is dispatched any more."""
        self._use = lambda table: None
        self.clock.let_go()
        del self.emit

    def mute(self, subscriber: Subscriber) -> None:
        """The callback was disabled: from now on its closing hooks are called and no other. Called on the
        loop."""
        subscriber.muted = True
        for name, hooks in self._inline.items():
            own = subscriber.inline.get(name)
            for at, hook in enumerate(hooks):
                # In its place: the training thread may be going through this very list.
                if own is hook:
                    hooks[at] = _nothing

    def stream(self, since: int | None, allowed: Callable[[], None]) -> EventStream:
        """Opens an event stream. Under the lock of the numbers: else an event that is numbered and not yet in
        the ring would look lost."""
        with self._numbering:
            return self._readers.open(since, self.taken, allowed)

    def snapshot(self, callback: Any, capture: Callable[..., Snapshot], *, pooled: bool) -> Snapshot:
        """The model as it is now, for an inline hook of ``callback``."""
        snapshot = self._snapshots.take(callback, capture, pooled=pooled)
        if self._may_be_torn(callback):
            self._gate.finish()
        return snapshot

    def _may_be_torn(self, callback: Any) -> bool:
        """Whether the model may be changed past the gate before anybody looks for a copy under way: by the
        hook that asked, or by those behind it in the tight loop over the hooks of a batch."""
        at = next((at for at, s in enumerate(self.subscribers) if s.callback is callback), None)
        if at is None:  # wrapped into another one
            return True
        behind = at + 1 if self._one_by_one else len(self.subscribers)
        return any(subscriber.past_the_gate for subscriber in self.subscribers[at:behind])

    def shares_copy(self, callback: Any) -> bool:
        """Whether :meth:`snapshot` would give it a handle on a copy that another hook of this event has."""
        return self._snapshots.shared(callback) is not None

    def silence(self) -> None:
        """The run is over though its thread is stuck: nothing that it may still emit reaches a hook or a
        stream."""
        with self._numbering:
            self._silent, self._speaker = True, threading.get_ident()
        self.rebuild()
        for hooks in self._inline.values():
            hooks.clear()
        for subscriber in self.subscribers:
            subscriber.inline = {}

    @property
    def taken(self) -> int:
        """Numbers given to events so far."""
        return int(
            repr(self._numbers)[len("count(") : -1]
        )  # the one way to look at a counter without moving it

    def _build(self) -> Emit:
        streamed = self._readers.wanted
        shared = streamed or not self._beside.keys().isdisjoint(self._inline)
        return Emit(
            # Nobody but inline hooks sees the logs of a batch: then a plain dict, which costs a third, will
            # do.
            logs=Logs if shared else dict,
            late=not shared and all(getattr(it, "reads_late", False) for it in self._inline[BatchEnd.hook]),
            epoch_begin=self._always(EpochBegin),
            epoch_end=self._always(EpochEnd),
            test_begin=self._always(TestBegin),
            test_end=self._always(TestEnd),
            **{name: self._per_batch(kind, streamed) for name, kind in BATCH_KINDS.items()},
        )

    def _per_batch(self, kind: type[Any], streamed: bool) -> Emitter:
        """The emitter of a batch event: its inline hooks, then its delivery, or the one of them that there
        is."""
        if self._silent:
            return None
        deliver = self._delivery(kind, streamed) if streamed or kind.hook in self._beside else None
        run = self._inline_hooks(kind.hook, numbers=deliver is None)
        if run is None or deliver is None:
            return run or deliver

        def emit(index: int, logs: Logs, epoch: int, step: int) -> None:
            run(index, logs, epoch, step)
            deliver(index, logs, epoch, step)

        return emit

    def _inline_hooks(self, hook_name: str, *, numbers: bool) -> Emitter:
        """Runs the inline hooks of a batch event; every lookup that can be done beforehand is done here.

        Args:
            hook_name: of the hooks.
            numbers: whether to take the event's number: nobody delivers it.
        """
        inline = self._inline[hook_name]
        if not inline:
            return None
        keep_work, taken, gate = self._keep_work, self._snapshots.taken, self._gate
        clock, skip = self.clock, self.skip if numbers else None
        past_gate = any(s.past_the_gate for s in self.subscribers if hook_name in s.inline)

        def run(index: int, logs: Logs, epoch: int, step: int) -> None:
            hook: Any = None
            later: list[tuple[Subscriber, Entry]] | None = None
            if past_gate and gate.copying:
                gate.finish()
            sampled = index & clock.mask < 2
            try:
                for hook in clock.begin(hook_name, index, inline) if sampled else inline:
                    result = hook(index, logs)
                    if result is not None:
                        later = keep_work(self._owner(hook, hook_name), hook_name, epoch, result, later)
            except BaseException as error:
                self._failed(InlineFailure(self._owner(hook, hook_name), hook_name, self.taken, epoch, error))
                self._end_inline(hook_name, later, wait=False)
                raise
            if sampled:
                clock.end(hook_name, index, step)
            if taken or later is not None:
                self._end_inline(hook_name, later)
            if skip is not None:
                skip()

        return run

    def _delivery(self, kind: type[Any], streamed: bool) -> Emitter:
        """Puts a batch event into the mailboxes and the ring; the hot path of events that are delivered."""
        hook_name = kind.hook
        beside = self._beside.get(hook_name, [])
        boxes = [s.mailbox for s in beside]
        lockstep = [s for s in beside if s.lockstep]
        appends = tuple(box.queue.append for box in boxes)
        # Room is looked for with every event where the bound is tight, else with every 16th: a roomy mailbox
        # keeps as much in hand.
        tight = tuple((box.queue, box.limit, box) for box in boxes if not box.roomy)
        every = (*tight, *((box.queue, box.limit - 2 * GLANCE, box) for box in boxes if box.roomy))
        code, numbers, wakeup, frozen = CODES[hook_name], self.skip, self._wakeup, FrozenLogs

        def deliver(index: int, logs: Logs, epoch: int, step: int) -> None:
            logs.__class__ = frozen
            number = self._publish(kind, (index, logs, epoch, step)) if streamed else numbers()
            entry = (code, index, logs, number, epoch)
            for append in appends:
                append(entry)
            for queue, limit, box in tight if index % GLANCE else every:
                if len(queue) >= limit:
                    box.overflow(entry)
            if not wakeup.rung:
                wakeup.ring()
            if lockstep:
                self._wait_lockstep(lockstep, hook_name)

        return deliver

    def _always(self, kind: type[Any]) -> Emitter:
        """The emitter of an event that is always built: epochs and evaluations."""

        def emit(*fields: Any) -> None:
            if kind is TestBegin:
                self._phase("validation")
            self._run_inline(kind.hook, fields, self.subscribers)
            if self._silent:
                return
            self._post(kind, fields, self._beside.get(kind.hook, []))
            if kind is TestEnd:
                self._phase("batches")

        return emit

    # The ends of a run --------------------------------------------------------------------------------------

    def begin(self, kind: type[Any], step: int) -> None:
        """The first event. A callback has begun once this hook of it was called."""
        self._opening = kind.hook
        fields = (step, Logs())
        beside = self._beside.get(kind.hook, [])
        self._run_inline(kind.hook, fields, self.subscribers, begins=True)
        for subscriber in beside:
            subscriber.begun = True
        self._post(kind, fields, beside)

    def wait_begun(self) -> None:
        """Waits for the awaitables of the first event of all callbacks."""
        self._control.wait(
            "train begin",
            lambda: all(s.mailbox.finished for s in self.subscribers),
            complain=self._warn_begin,
            complain_after=self._control.limits.patience,
        )

    def close(self, kind: type[Any], *fields: Any) -> list[BaseException]:
        """A closing event, for every callback that has begun. One that raises does not keep it from the
        rest."""
        errors: list[BaseException] = []
        later: list[tuple[Subscriber, Entry]] | None = None
        self._one_by_one = True
        for subscriber in self.subscribers:
            if subscriber.begun:
                subscriber.closing_hooks.add(kind.hook)
                try:
                    later = self._call_inline(subscriber, kind.hook, fields, later)
                except BaseException as error:
                    errors.append(error)
        self._end_inline(kind.hook, later)
        self.close_beside(kind, *fields)
        return errors

    def close_beside(self, kind: type[Any], *fields: Any) -> None:
        """The beside half of it; alone, on the loop, where the thread is stuck and inline hooks can never
        run.

        A callback that listens for durable files gets its last event only by :meth:`release_withheld`: files
        that are still being written are announced before it closes its books.
        """
        with self._numbering:
            if kind in self._closed:  # a thread that was given up as stuck, and came back
                return
            self._closed.add(kind)
        wanted = [s for s in self.subscribers if s.begun and kind.hook in s.beside]
        listening = [s for s in wanted if CheckpointSaved.hook in s.beside and kind is not ExceptionRaised]
        entry = self._post(kind, fields, [s for s in wanted if s not in listening])
        self._withheld = [(s, entry) for s in listening]

    def release_withheld(self) -> bool:
        """Posts what :meth:`close_beside` withheld; False where there was nothing. Called on the loop."""
        withheld, self._withheld = self._withheld, []
        for subscriber, entry in withheld:
            subscriber.mailbox.put(entry)
        self._wakeup.flush()
        return bool(withheld)

    def commit(self, path: str, epoch: int) -> None:
        """A file has become durable. Called on the loop."""
        number = self._publish(CheckpointSaved, (path, epoch))
        entry = (CODES[CheckpointSaved.hook], path, epoch, number, epoch)
        for subscriber in self.subscribers:
            if subscriber.begun and CheckpointSaved.hook in subscriber.beside:
                subscriber.mailbox.put(entry)
        self._wakeup.flush()

    # What they share ----------------------------------------------------------------------------------------

    def _run_inline(
        self, hook_name: str, fields: tuple[Any, ...], subscribers: list[Subscriber], *, begins: bool = False
    ) -> None:
        later: list[tuple[Subscriber, Entry]] | None = None
        self._one_by_one = True
        try:
            for subscriber in subscribers:
                if begins and hook_name not in subscriber.beside:
                    subscriber.begun = True
                if not subscriber.muted:
                    later = self._call_inline(subscriber, hook_name, fields, later)
        except BaseException:
            self._end_inline(hook_name, later, wait=False)
            raise
        self._end_inline(hook_name, later)

    def _call_inline(
        self,
        subscriber: Subscriber,
        hook_name: str,
        fields: tuple[Any, ...],
        later: list[tuple[Subscriber, Entry]] | None,
    ) -> list[tuple[Subscriber, Entry]] | None:
        """Calls one inline hook. Answers ``later`` with the coroutine in it that it returned, if any."""
        hook = subscriber.inline.get(hook_name)
        if hook is None:
            return later
        if subscriber.past_the_gate:
            self._gate.finish()
        arguments, epoch = _arguments(hook_name, fields)
        began = perf_counter()
        try:
            result = hook(*arguments)
            self.clock.add(subscriber.name, perf_counter() - began)
            if result is None:
                return later
            return self._keep_work(subscriber, hook_name, epoch, result, later)
        except BaseException as error:
            self._failed(InlineFailure(subscriber, hook_name, self.taken, epoch, error))
            raise

    def _end_inline(
        self, hook_name: str, later: list[tuple[Subscriber, Entry]] | None, *, wait: bool = True
    ) -> None:
        self._snapshots.forget()
        self._one_by_one = False
        if later is not None:
            self._post_later(later, hook_name, wait=wait)

    def _publish(self, kind: type[Any], fields: tuple[Any, ...]) -> int:
        """Builds the event for the ring. Number and ring under one lock: the thread and the loop both number
        events, and the ring holds them in the order of their numbers."""
        with self._numbering:
            number = self.skip()
            # Looked at under the lock: a thread that comes back just now must not speak after the last event.
            if self._speaker is None or self._speaker == threading.get_ident():
                self._readers.append(kind(number, *fields))
        return number

    def _post(self, kind: type[Any], fields: tuple[Any, ...], wanted: list[Subscriber]) -> Entry:
        for field in fields:
            if isinstance(field, Logs):
                field.freeze()
        number = self._publish(kind, fields)
        arguments, epoch = _arguments(kind.hook, fields)
        first, second = (*arguments, None)[:2]
        entry: Entry = (CODES[kind.hook], first, second, number, epoch)
        self._append_all([(subscriber, entry) for subscriber in wanted])
        if wanted or self._readers.wanted:
            self._wakeup.flush()
        self._wait_lockstep([s for s in wanted if s.lockstep], kind.hook)
        return entry

    def _keep_work(
        self,
        subscriber: Subscriber,
        hook_name: str,
        epoch: int | None,
        result: object,
        later: list[tuple[Subscriber, Entry]] | None,
    ) -> list[tuple[Subscriber, Entry]] | None:
        """``later`` with the coroutine in it that an inline hook returned, if it is one."""
        coroutine = as_coroutine(result, f"{subscriber.name}.{hook_name}")
        if coroutine is None:
            return later
        work = Work(coroutine, hook_name, self._snapshots.of(subscriber.callback))
        return [*(later or ()), (subscriber, (WORK, work, None, self.taken, epoch))]

    def hand_over(
        self, subscriber: Subscriber, coroutine: Coroutine[Any, Any, object], snapshots: tuple[Snapshot, ...]
    ) -> None:
        """Puts work that no hook returned into a callback's mailbox. Called on the training thread."""
        work: Entry = (WORK, Work(coroutine, "unit", snapshots), None, self.taken, None)
        self._append_all([(subscriber, work)])
        self._wakeup.flush()

    def mark(self, subscriber: Subscriber, entry: Entry) -> None:
        """Puts a marker behind everything that lies in a callback's mailbox. It passes the bound."""
        box = subscriber.mailbox
        box.queue.append(entry)
        if box.closed:  # nobody will ever come to it
            box.discard_all()
        self._wakeup.flush()

    def _post_later(
        self, later: list[tuple[Subscriber, Entry]], hook_name: str, *, wait: bool = True
    ) -> None:
        """Hands over what the inline hooks of one event returned, after all of them have run.

        Args:
            wait: False while an exception of a hook is on its way, which an Interrupt would replace.
        """
        self._append_all(later, wait=wait)
        self._wakeup.flush()
        if wait:
            self._wait_lockstep([s for s, _ in later if s.lockstep], hook_name)

    def _append_all(self, entries: Sequence[tuple[Subscriber, Entry]], *, wait: bool = True) -> None:
        """Puts entries into mailboxes, all of them before any mailbox is waited for: that wait may end in an
        Interrupt, and nobody shall miss an event because somebody else was slow."""
        for subscriber, entry in entries:
            subscriber.mailbox.queue.append(entry)
        for subscriber, entry in entries:
            box = subscriber.mailbox
            if box.closed or (wait and len(box.queue) >= box.limit):
                box.overflow(entry)

    def _wait_lockstep(self, subscribers: list[Subscriber], hook_name: str) -> None:
        if not subscribers:
            return
        boxes = [s.mailbox for s in subscribers]
        names = ", ".join(s.name for s in subscribers)
        self._control.wait(
            "lockstep",
            lambda: all(box.finished for box in boxes),
            complain=lambda seconds: self._warn(seconds, names, hook_name),
            complain_after=self._control.limits.patience,
        )

    def _warn_begin(self, seconds: float) -> None:
        busy = [s.name for s in self.subscribers if not s.mailbox.finished]
        self._warn(seconds, ", ".join(busy), self._opening)

    def _name_of(self, hook: object, hook_name: str) -> str | None:
        return None if hook is _nothing else self._owner(hook, hook_name).name

    def _owner(self, hook: object, hook_name: str) -> Subscriber:
        hook = hook.hook if isinstance(hook, Timed) else hook
        return self._owners[hook_name, id(hook)]


def _arguments(hook_name: str, fields: tuple[Any, ...]) -> tuple[tuple[Any, ...], int | None]:
    """What a hook is called with, and the epoch: fields are (epoch, logs, step), (step, logs) or
    (exception,)."""
    if hook_name in ("on_epoch_begin", "on_epoch_end"):
        return fields[:2], fields[0]
    return fields[-1:], None


def _nothing(index: int, logs: dict[str, Any]) -> None:
    """Stands where a muted callback had its hook."""
