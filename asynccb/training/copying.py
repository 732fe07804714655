"""Copies of a model made beside the training.

A copy begins between two batches and is finished while the next ones compute::

    training thread     begin ── forward, backward ── gate(1) update ── gate(2) update ── ...
    copier thread         └─ segment 1 ─ segment 2 ─ segment 3 ─ ...

The update of a segment waits until that segment is copied, so that it chases the copier; where it has
caught up, it copies what nobody has begun itself, which is no dearer than waiting for another thread to do
it. Rows of a large table that an update overwrites here and there are not waited for: the gate keeps them as
they were, and they are put into the copy at its end.

Never torn: nothing but a batch of the model's and code of the user's can change a model. The first asks the
gate, and before the second runs the copy is finished (``Copying.finish``).
"""

from __future__ import annotations

import threading
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asynccb.protocols import LiveState
    from asynccb.training.control import Control

    Array = np.ndarray[Any, Any]

__all__ = ["Copy", "Copying", "Target", "Warming"]

AT_ONCE = 1 << 18
"""Bytes up to which a copy is made at once: to wake the other thread costs as much as copying them."""
KEPT = 1 << 24
"""Bytes of single rows that are kept aside before the copy is finished instead."""
PAGE, PAGES = 4096, 256
"""Bytes of the smallest page of memory that systems have, and how many are asked for at a time."""


class Target:
    """The memory of one copy: arrays in the shapes of a :class:`~asynccb.protocols.LiveState`, used again and
    again.

    Attributes:
        arrays: what the copies are written to.
        shown: the same arrays, read-only.
        nbytes: their size.
    """

    def __init__(self, live: LiveState) -> None:
        self.arrays = [np.empty(array.shape, array.dtype) for array in live.arrays]
        self.shown = [_read_only(array) for array in self.arrays]
        self.nbytes = sum(array.nbytes for array in self.arrays)
        self._versions: list[int | None] = [None] * len(self.arrays)
        self._segments = live.segments
        self._parts = [self.arrays[index][start:stop] for index, start, stop in live.segments]

    def fits(self, live: LiveState) -> bool:
        """Whether ``live`` has the shapes for which this memory was made."""
        if live.segments is self._segments:
            return True
        own = [(array.shape, array.dtype) for array in self.arrays]
        return own == [(array.shape, array.dtype) for array in live.arrays] and (
            list(live.segments) == list(self._segments)
        )

    def pairs(self, live: LiveState) -> list[tuple[Array, Array] | None]:
        """For each segment where to copy and from where; None where the target has it already."""
        both = zip(self._versions, live.versions, strict=True)
        same = [own is not None and own == now for own, now in both]
        self._versions = list(live.versions)
        return [
            None if same[index] else (part, live.arrays[index][start:stop])
            for part, (index, start, stop) in zip(self._parts, live.segments, strict=True)
        ]

    def forget(self) -> None:
        """The copy was given up, or failed: what it holds is nothing's state."""
        self._versions = [None] * len(self.arrays)

    def pages(self) -> Iterator[Array]:
        """A byte of every page, some at a time."""
        for array in self.arrays:
            memory = array.reshape(-1).view(np.uint8)
            for start in range(0, len(memory), PAGE * PAGES):
                yield memory[start : start + PAGE * PAGES : PAGE]


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


class Copy:
    """One copy under way. Any number of threads may :meth:`work` on it; all attributes are theirs together,
    under the lock.

    Args:
        live: what is copied.
        target: where to.
        moved: called after each segment, on whichever thread copied it.
    """

    def __init__(self, live: LiveState, target: Target, moved: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._live: Sequence[Array] = live.arrays
        self._target = target
        self._pairs = target.pairs(live)
        self._moved = moved
        self._lock = threading.Lock()
        self._next = 0
        self._done = [pair is None for pair in self._pairs]
        self._left = self._done.count(False)
        self._first = 0  # all segments before it are copied
        self._kept: list[tuple[int, Array, Array]] = []
        self._kept_bytes = 0
        self._whole = threading.Event()
        self._then: list[Callable[[], None]] = []
        if not self._left:
            self._finish()

    @property
    def whole(self) -> bool:
        return self._whole.is_set()

    def work(self, upto: int | None = None) -> bool:
        """Copies the next segment that nobody has begun; False where there is none below ``upto``."""
        with self._lock:
            end = len(self._done) if upto is None else min(upto, len(self._done))
            while self._next < end and self._done[self._next]:
                self._next += 1
            at = self._next
            if at >= end:
                return False
            self._next += 1
            pair, moved = self._pairs[at], self._moved
        assert pair is not None
        try:
            np.copyto(*pair)
        except BaseException as error:  # nobody may wait for ever for this segment
            self.error = error
            self._target.forget()
        self._end_of(at)
        moved()
        return True

    def done(self, upto: int | None = None) -> bool:
        """Whether the first ``upto`` segments are copied; None: all, kept rows included."""
        if upto is None:
            return self.whole
        at, end = self._first, min(upto, len(self._done))
        while at < end and self._done[at]:
            at += 1
        self._first = at  # two threads may look at once: a smaller number is only looked at again
        return at >= end

    def keep(self, array: int, rows: Array) -> int:
        """Takes rows as they are before they are overwritten. Answers the bytes kept so far.

        No lock against :meth:`_finish`: what is kept too late for it was overwritten after everything was
        copied.
        """
        live, kept = self._live, self._kept
        if not live:
            return 0
        values = live[array][rows]
        kept.append((array, rows, values))
        self._kept_bytes += values.nbytes
        return self._kept_bytes

    def give_up(self) -> None:
        """Nobody wants it any more: what is not begun is left out."""
        with self._lock:
            left_out = [at for at in range(self._next, len(self._done)) if not self._done[at]]
            self._next = len(self._done)
            if left_out:
                self._target.forget()
        for at in left_out:
            self._end_of(at)

    def wait(self) -> None:
        """Blocks until the copy is whole, and helps with it.

        Raises:
            BaseException: what kept it from becoming whole.
        """
        while self.work():
            pass
        self._whole.wait()
        if self.error is not None:
            raise self.error

    def then(self, function: Callable[[], None]) -> None:
        """Calls ``function`` once the copy is whole: now, or on the thread that completes it."""
        with self._lock:
            if not self.whole:
                self._then.append(function)
                return
        function()

    def _end_of(self, at: int) -> None:
        with self._lock:
            self._done[at] = True
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        # The oldest of the rows kept is the one as it was at the moment of the copy: it is written last.
        for array, rows, values in reversed(self._kept):
            self._target.arrays[array][rows] = values
        # A snapshot that is kept for long keeps no model alive, and no run.
        self._kept, self._pairs, self._live = [], [], ()
        with self._lock:
            self._moved = _nothing
            self._whole.set()
            then, self._then = self._then, []
        for function in then:
            function()


def _nothing() -> None:
    """Stands where somebody was to be told, who need not be any more."""


class Warming:
    """Memory that is written to once before it is needed.

    The system gives a page at its first write, which takes several times as long as copying to it: a first
    copy would be ten times as slow as those after it.
    """

    def __init__(self, target: Target) -> None:
        self._pages = target.pages()
        self._lock = threading.Lock()

    def work(self) -> bool:
        """Asks for some pages; False where there are no more."""
        with self._lock:
            some = next(self._pages, None)
            if some is None:
                return False
            some[...] = 0
            return True

    def stop(self) -> None:
        """The memory is needed now. Nobody writes to it any more when this returns."""
        with self._lock:
            self._pages = iter(())


class Copying:
    """The copies of one run: begins them, and is the gate of its model (``protocols.Gate``).

    Only the training thread calls it. One copy is under way at a time.

    Attributes:
        copying: whether the model has to ask before it overwrites its state.
    Args:
        control: where the training thread waits.
        name: of the run.
    """

    def __init__(self, control: Control, name: str) -> None:
        self.copying = False
        self._control = control
        self._name = name
        self._copy: Copy | None = None
        self._copier: tuple[threading.Thread, _Handed] | None = None

    def begin(self, live: LiveState, target: Target) -> Copy:
        """Starts the copy of ``live`` into ``target``; a small one is whole when this returns."""
        self.finish()
        copy = Copy(live, target, self._control.nudge)
        if target.nbytes <= AT_ONCE:
            copy.wait()
        elif not copy.whole:
            self._copy, self.copying = copy, True
            if not self._hand_over(copy):
                self.finish()
        return copy

    def warm(self, target: Target) -> Warming | None:
        """Has the copier's thread write to ``target``, until it is stopped; None where it is too small, or
        the thread has a copy to make."""
        if target.nbytes <= AT_ONCE or self.copying:
            return None
        warming = Warming(target)
        self._hand_over(warming)
        return warming

    def _hand_over(self, work: Copy | Warming) -> bool:
        if self._copier is None and not self._start():
            return False
        assert self._copier is not None
        self._copier[1].put(work)
        return True

    def _start(self) -> bool:
        handed = _Handed()
        thread = threading.Thread(
            target=_copy_all, args=(handed,), name=f"asynccb {self._name} copier", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the process has no thread left to give
            return False
        self._copier = thread, handed
        return True

    def __call__(self, segments: int | None = None) -> None:
        """See :class:`asynccb.protocols.Gate`. Waits for a thread that is copying at this moment, and nothing
        ends that wait but the copy."""
        copy = self._copy
        if copy is None:
            return
        if not copy.done(segments):
            began = perf_counter()
            while copy.work(segments):
                pass
            helped = perf_counter() - began
            if not copy.done(segments):
                self._control.wait("gate", lambda: copy.done(segments), unending=True)
            self._control.waited["gate"] += helped
        if copy.whole:
            self._copy, self.copying = None, False

    def keep(self, array: int, rows: Array) -> None:
        copy = self._copy
        if copy is None:
            return
        if copy.whole or copy.keep(array, rows) > KEPT:
            self()

    def finish(self) -> None:
        """Completes the copy under way, before anything may change the model that does not ask the gate."""
        if self.copying:
            self()

    def close(self) -> None:
        """The run is over: completes the copy under way and ends the thread."""
        self.finish()
        copier, self._copier = self._copier, None
        if copier is not None:
            thread, handed = copier
            handed.put(None)
            thread.join()


class _Handed:
    """From the training thread to the copier: the newest work alone. A copy that has not been taken by then
    is made already, for there is one at a time, and no warming comes while it is under way; a warming may
    go."""

    def __init__(self) -> None:
        self._newest: deque[Copy | Warming | None] = deque(maxlen=1)
        self._bell = threading.Semaphore(0)

    def put(self, work: Copy | Warming | None) -> None:
        self._newest.append(work)
        self._bell.release()

    def take(self) -> Copy | Warming | None:
        while True:
            self._bell.acquire()
            if self._newest:
                return self._newest.pop()


def _copy_all(handed: _Handed) -> None:
    """The body of the copier's thread; it knows of nothing but its work, so that it keeps nothing alive."""
    while (work := handed.take()) is not None:
        while work.work():
            pass
        del work  # it must not keep a model's arrays alive until the next one comes
