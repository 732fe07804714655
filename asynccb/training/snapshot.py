"""Consistent copies of a model in training, and the memory that they are made in.

All who ask at the same safe point share one copy, and each holds a handle of its own on it, so that nobody's
``release`` takes the arrays from under another. The writers of this package get copies out of a pool of warm
memory: at most as many at a time as the pool has room for, then the training waits for a release. What a user
receives owns its memory and takes none from the pool.
"""

from __future__ import annotations

from collections import deque
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from asynccb.protocols import QueueStatistics
from asynccb.training.copying import Copying, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike
    from types import TracebackType

    import numpy as np

    from asynccb.protocols import LiveState, Model, ModelState
    from asynccb.training.control import Control
    from asynccb.training.copying import Copy, Warming

__all__ = ["Pool", "Snapshot", "Snapshots"]

POOLED = 2
"""Copies for our own writers that may exist at a time: one being written, one waiting or being made. One more
for each further callback that writes."""


class Snapshot:
    """A model at one moment: training on does not change it.

    The copy may still be made, beside the training, when this is handed out. ``arrays``, ``save`` and
    ``to_model`` wait for it (for about as long as a copy takes); ``await run.snapshot()`` and the coroutines
    that hooks return get it whole.

    Attributes:
        step: batches trained when it was taken, over all epochs.
        epoch: 0-based epoch in which it was taken.
    """

    def __init__(self, state: ModelState, step: int, epoch: int, shared: Shared | None = None) -> None:
        self._state: ModelState | None = state
        self._shared = Shared(None, None, None) if shared is None else shared
        self._shared.hold()
        self.step = step
        self.epoch = epoch

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Read-only arrays by name; optimizer slots have the prefix ``optimizer/``."""
        return MappingProxyType(dict(self._held().arrays))

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None:
        """Writes the model as a file, atomically: at any instant the name holds the old file or the new one.

        Blocks while it writes; on an event loop use ``loop.run_in_executor``.

        Raises:
            CheckpointWriteError: the file could not be written; the old one is untouched.
        """
        self._held().save(path, weights_only=weights_only)

    def write(self, path: str, extra: Mapping[str, Any]) -> None:
        """:meth:`save`, with ``extra`` (plain data) in the same file; for models that can be resumed."""
        self._held().save(path, extra=extra)

    def to_model(self) -> Any:
        """A new model with this state, to predict with or to train from while the original trains on."""
        return self._held().to_model()

    def another(self) -> Snapshot:
        """A second handle on the same copy."""
        return Snapshot(self._alive(), self.step, self.epoch, self._shared)

    def own(self) -> Snapshot:
        """Itself, and from now on nobody else ever uses the copy's memory: a user has it."""
        self._shared.own()
        return self

    @property
    def released(self) -> bool:
        return self._state is None

    @property
    def alone(self) -> bool:
        """Whether this is the one handle on its copy, so that a release frees memory."""
        return self._shared.held == 1

    @property
    def whole(self) -> bool:
        """Whether the copy is made."""
        return self._shared.copy is None or self._shared.copy.whole

    def then(self, function: Callable[[], None]) -> None:
        """Calls ``function`` once the copy is whole: now, or on the thread that completes it."""
        if self._shared.copy is None:
            function()
        else:
            self._shared.copy.then(function)

    def release(self) -> None:
        """Gives the memory back. Legal any number of times; everything else then raises RuntimeError."""
        if self._state is not None:
            self._state = None
            if self._shared.let_go():
                self._shared.end()

    def _alive(self) -> ModelState:
        if self._state is None:
            raise RuntimeError(f"this snapshot of step {self.step} was released")
        return self._state

    def _held(self) -> ModelState:
        state = self._alive()
        if self._shared.copy is not None:
            self._shared.copy.wait()
        return state

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # A coroutine that is closed before it ran drops its snapshot without a word.
        if self._state is not None:
            self._state = None
            if self._shared.let_go():
                self._shared.orphan()

    def __repr__(self) -> str:
        released = ", released" if self._state is None else ""
        return f"<Snapshot step={self.step} epoch={self.epoch}{released}>"


class Shared:
    """What all handles on one copy have in common: the copy, and where its memory goes after the last one.

    A handle may be dropped by the garbage collector at any instruction, also inside of a method here: there
    is no lock, only operations that are atomic by themselves.
    """

    def __init__(self, copy: Copy | None, slot: Slot | None, pool: Pool | None) -> None:
        self.copy = copy
        self._handles: list[None] = []
        self._slot = [] if slot is None else [slot]
        self._pool = pool

    @property
    def held(self) -> int:
        return len(self._handles)

    def hold(self) -> None:
        self._handles.append(None)

    def let_go(self) -> bool:
        """True for the last one."""
        self._handles.pop()
        return not self._handles

    def own(self) -> None:
        """The memory leaves the pool for good."""
        slot, pool, self._pool = self._take_slot(), self._pool, None
        if slot is not None and pool is not None:
            pool.forget(slot)

    def end(self) -> None:
        """The last handle was released."""
        if self.copy is not None:
            self.copy.give_up()
        self.give_back()

    def give_back(self) -> None:
        """Returns the memory to the pool, as soon as no thread writes to it any more."""
        slot, pool, self._pool = self._take_slot(), self._pool, None
        if slot is None or pool is None:
            return
        if self.copy is None:
            pool.put(slot)
        else:
            self.copy.then(lambda: pool.put(slot))

    def orphan(self) -> None:
        """The last handle was dropped without a release: the pool fetches the memory when it wants some."""
        if self._slot and self._pool is not None:
            self._pool.orphans.append(self)

    def _take_slot(self) -> Slot | None:
        try:
            return self._slot.pop()
        except IndexError:  # somebody was quicker, or it was never of a pool
            return None


class Slot:
    """A place in the pool, and the memory that lies there once it has been used or is being warmed."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.warming: Warming | None = None


class Pool:
    """Room for a number of copies, whose memory is used again and again.

    ``take`` and ``forget`` are called on the training thread, ``put`` on any.

    Args:
        size: copies that may exist at a time.
        control: where the training waits for one.
    """

    def __init__(self, size: int, control: Control) -> None:
        self.orphans: deque[Shared] = deque()
        self._control = control
        self._slots = [Slot() for _ in range(size)]
        self._free = deque(self._slots)

    def take(self) -> Slot:
        """A free slot; the one that was used last, whose memory is warm. Waits for one.

        While the run closes nothing is waited for, and the slot is one that the pool does not know.

        Raises:
            Interrupt: the run was cancelled or failed meanwhile, or its loop is gone.
        """
        if not self.has_room():
            self._control.wait("pool", self.has_room, serve=False)
        return self._free.pop() if self._free else Slot()

    def has_room(self) -> bool:
        while self.orphans:
            try:
                orphan = self.orphans.popleft()
            except IndexError:  # another thread looks too
                break
            orphan.give_back()
        return bool(self._free)

    def statistics(self) -> QueueStatistics:
        size = len(self._slots)
        return QueueStatistics(
            size, "wait", max(0, size - len(self._free)), self._control.waits.get("pool", 0)
        )

    def first(self) -> Slot | None:
        """The slot that would be taken next."""
        return self._free[-1] if self._free else None

    def put(self, slot: Slot) -> None:
        self._free.append(slot)
        self._control.nudge()

    def stop_warming(self) -> None:
        for slot in self._slots:
            if slot.warming is not None:
                slot.warming.stop()

    def forget(self, slot: Slot) -> None:
        """Its memory belongs to somebody else now; a new place takes its own."""
        self._slots[self._slots.index(slot)] = new = Slot()
        self._free.appendleft(new)

    def grow(self) -> None:
        """Room for one more copy."""
        new = Slot()
        self._slots.append(new)
        self._free.appendleft(new)


class Snapshots:
    """Makes the snapshots of one run. Used on the training thread.

    Attributes:
        made: copies made.
        gate: what the model asks before it overwrites itself.
    """

    def __init__(self, model: Model, control: Control, name: str) -> None:
        self.made = 0
        self.gate = Copying(control, name)
        self._model = model
        self._writers = 0
        self._pool = Pool(POOLED, control)

    def take(self, step: int, epoch: int, *, pooled: bool = False) -> Snapshot:
        """The model now.

        Args:
            step, epoch: where the training stands.
            pooled: in memory that is used again after the release; else the copy owns its memory.

        Raises:
            Interrupt: the run was cancelled while it waited for room in the pool.
        """
        slot = self._slot() if pooled else None
        try:
            snapshot = self._take(step, epoch, slot)
        except BaseException:
            if slot is not None:
                self._pool.put(slot)
            raise
        self.made += 1
        return snapshot

    def expect(self) -> None:
        """One more callback will take pooled snapshots: room for one more of them, and for the first callback
        memory for its first, got beside the training."""
        self._writers += 1
        if self._writers > 1:
            self._pool.grow()
            return
        try:
            live = self._live()
        except (
            Exception
        ):  # a model that is not built yet; what is wrong with any other, its first copy will say
            return
        slot = self._pool.first()
        if slot is not None and slot.target is None and live is not None:
            slot.target = Target(live)
            slot.warming = self.gate.warm(slot.target)

    def statistics(self) -> QueueStatistics:
        """Of the pool; counted is how often the training waited for a release."""
        return self._pool.statistics()

    def has_room(self) -> bool:
        """Whether a pooled snapshot can be had without waiting."""
        return self._pool.has_room()

    def _live(self) -> LiveState | None:
        live = getattr(self._model, "live", None)
        found: LiveState | None = None if live is None else live()
        return found

    def _slot(self) -> Slot:
        if not self._pool.has_room():
            # Who has the room may wait for the copy that is under way, and we need not wait for its thread.
            self.gate.finish()
        return self._pool.take()

    def close(self) -> None:
        """The training is over: what is under way is completed."""
        self._pool.stop_warming()
        self.gate.close()

    def _take(self, step: int, epoch: int, slot: Slot | None) -> Snapshot:
        pool = None if slot is None else self._pool
        live = self._live()
        if live is None:
            return Snapshot(self._model.capture(), step, epoch, Shared(None, slot, pool))
        target = _target(live, slot)
        copy = self.gate.begin(live, target)
        return Snapshot(live.complete(target.shown), step, epoch, Shared(copy, slot, pool))


def _target(live: LiveState, slot: Slot | None) -> Target:
    if slot is None:
        return Target(live)
    if slot.warming is not None:
        slot.warming.stop()
        slot.warming = None
    if slot.target is None or not slot.target.fits(live):
        slot.target = Target(live)
    return slot.target
