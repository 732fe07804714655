"""The resume unit: everything that another process needs to go on with a training to the very same bytes, cut
at one place of its loop.

::

    training thread    ─ batch ─┬─ batch ─ batch ─ ...
                                │ cut: the model (copied beside the next batch), the place in the data, the
                                │ state of every callback of `def` hooks, now
    each mailbox       ─ hook ──┴─ marker       a callback of `async def` hooks gives its state when it comes
                                     │          to the marker; one with rows or files makes them durable
    the taker's mailbox   ─ write ◄──┘          commits when all have reported

Any other moment would mix: a callback that lags behind has not done yet what the model has.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from asynccb.bus.mailbox import marker
from asynccb.callbacks.base import Callback
from asynccb.errors import BackupIncomplete, said
from asynccb.storage.packing import freeze

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from asynccb.bus.dispatch import Dispatcher, Subscriber
    from asynccb.protocols import Place
    from asynccb.training.snapshot import Snapshot

__all__ = ["TakesUnits", "Unit", "Units"]


class TakesUnits(Protocol):
    """A callback that resume units are cut for."""

    def wants_unit(self, *, last: bool) -> bool:
        """Asked on the training thread at every place where one could be cut; ``last``: no further one
        comes."""

    def take_unit(self, unit: Unit) -> Coroutine[Any, Any, object]:
        """Called at the cut, on the training thread. The coroutine runs behind what lies in the callback's
        mailbox; it completes and writes the unit."""


class Unit:
    """One cut.

    Attributes:
        place: where in the loop.
        step: batches trained, over all epochs.
        snapshot: the model.
    """

    def __init__(
        self,
        place: Place,
        step: int,
        snapshot: Snapshot,
        state: dict[str, Any],
        reports: Sequence[Report],
        deadline: float,
    ) -> None:
        self.place = place
        self.step = step
        self.snapshot = snapshot
        self._state = state
        self._reports = reports
        self._deadline = deadline

    async def complete(self) -> dict[str, Any]:
        """Everything but the model, as plain data, as soon as all callbacks have reported.

        Raises:
            BackupIncomplete: one has not, within the time for it, or could not.
        """
        loop = asyncio.get_running_loop()
        for report in self._reports:
            await report.wait(loop, self._deadline)
        if missing := [report.missing for report in self._reports if report.missing]:
            raise BackupIncomplete(self.step, missing)
        states = self._state["callbacks"] | {r.name: r.state for r in self._reports if r.stateful}
        return self._state | {"callbacks": states}

    def write(self, path: str, state: Mapping[str, Any]) -> None:
        """Writes the model and ``state`` as one file, atomically and durably. Blocks.

        Raises:
            CheckpointWriteError: it could not be written.
        """
        self.snapshot.write(path, {"resume": state})

    def another(self) -> Unit:
        """The same cut with a handle of its own on the model."""
        return Unit(
            self.place, self.step, self.snapshot.another(), self._state, self._reports, self._deadline
        )


class Report:
    """What one callback has to say to a unit; done when its consumer has come to it, or its
    mailbox was emptied.

    Args:
        subscriber: the callback.
        stateful: whether its state is still to come.
    """

    def __init__(self, subscriber: Subscriber, *, stateful: bool) -> None:
        self.name = subscriber.name
        self.stateful = stateful
        self.state: dict[str, Any] | None = None
        self._subscriber = subscriber
        self._why = ""
        self._told = False
        self._done = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def missing(self) -> str:
        """Why the unit cannot commit, empty where it can."""
        if self._why:
            return f"{self.name} ({self._why})"
        if not self._done:
            return f"{self.name} (still busy with what came before)"
        # The marker was thrown away, and with it what lay before it, rows or files perhaps.
        return "" if self._told else f"{self.name} (it had ended)"

    async def sync(self) -> None:
        """What the consumer awaits when it reaches the marker. Raises what the callback's own ``sync``
        raises."""
        callback = self._subscriber.callback
        final = callback.on_error == "raise"  # else somebody has said that it may lose something
        if self._subscriber.muted and final:
            # What it was to write before this is not there, or not all: this training fails, and the one that
            # is resumed has to write it.
            self._why = "one of its hooks has failed"
            return
        try:
            await callback.sync()
        except Exception as error:
            if final:
                self._why = f"its sync() raised {said(error)}"
            else:
                self._tell(callback)
            raise
        self._tell(callback)

    def _tell(self, callback: Callback) -> None:
        if self.stateful:
            try:
                self.state = _state_of(self.name, callback)
            except Exception as error:
                self._why = f"its state_dict() raised {said(error)}"
        self._told = True

    def done(self) -> bool:
        return self._done

    def set_result(self, _: None) -> None:
        self._done = True
        # Who waits has put its bell here before it looked at `_done`: one of the two sees the other.
        for loop, bell in list(self._waiters):
            try:
                loop.call_soon_threadsafe(bell.set)
            except RuntimeError:  # the loop is gone, and nobody waits
                if not loop.is_closed():
                    raise

    async def wait(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Until it is set, or its time is up."""
        bell = asyncio.Event()
        self._waiters.append((loop, bell))
        if self._done:
            return
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await bell.wait()
        except TimeoutError:
            pass


class Units:
    """Cuts the units of one run. Used on the training thread.

    Args:
        dispatcher: knows the callbacks and their mailboxes.
        capture: copies the model.
        describe: answers what goes into every unit besides place, model and callbacks.
        seconds: from the cut to the last report.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        capture: Callable[[], Snapshot],
        describe: Callable[[], dict[str, Any]],
        seconds: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._capture = capture
        self._describe = describe
        self._seconds = seconds
        self._takers = [s for s in dispatcher.subscribers if hasattr(s.callback, "take_unit")]
        self._newest: dict[str, tuple[Place, str | None]] = {}

    def cut(self, place: Place, step: int, *, last: bool = False) -> None:
        """Cuts a unit here if a taker wants one; never two for one taker at one place.

        Raises:
            Interrupt: the run was cancelled while it waited for room for a copy of the model.
        """
        takers = [s for s in self._takers if not s.muted and s.callback.wants_unit(last=last)]
        if not takers:
            return
        described = self._describe()
        here = place, described["stop"]
        takers = [s for s in takers if self._newest.get(s.name) != here]
        if not takers:
            return
        unit = self._cut(place, step, described)
        self._newest |= {taker.name: here for taker in takers}
        for taker in takers[1:]:
            self._give(taker, unit.another())
        self._give(takers[0], unit)

    def _give(self, taker: Subscriber, unit: Unit) -> None:
        self._dispatcher.hand_over(taker, taker.callback.take_unit(unit), (unit.snapshot,))

    def _cut(self, place: Place, step: int, described: dict[str, Any]) -> Unit:
        deadline = time.monotonic() + self._seconds
        states: dict[str, Any] = {}
        takers: dict[str, Any] = {}
        reports = []
        for subscriber in self._dispatcher.subscribers:
            callback = subscriber.callback
            stateful = _overrides(callback, "state_dict")
            beside = _works_beside(subscriber)
            if stateful and not beside:
                mine = takers if subscriber in self._takers else states
                mine[subscriber.name] = _state_of(subscriber.name, callback)
            if (stateful and beside) or _overrides(callback, "sync"):
                reports.append((subscriber, Report(subscriber, stateful=stateful and beside)))
        state = described | {
            "place": place._asdict(),
            "step": step,
            "callbacks": states,
            "takers": takers,
            "told apart": {s.name: told_apart(s.callback) for s in self._dispatcher.subscribers},
        }
        snapshot = self._capture()
        for subscriber, report in reports:
            self._dispatcher.mark(subscriber, marker(report, report.sync))
        return Unit(place, step, snapshot, state, [report for _, report in reports], deadline)


def _state_of(name: str, callback: Callback) -> dict[str, Any]:
    frozen: dict[str, Any] = freeze(callback.state_dict(), name)
    return frozen


def _works_beside(subscriber: Subscriber) -> bool:
    """Whether its hooks run on the event loop. What it does there before the first batch is over by now."""
    beside = subscriber.beside.keys() - {"on_train_begin"}
    # News of files are told there whatever the other hooks are.
    return bool(beside - {"on_checkpoint_saved"}) or (bool(beside) and not subscriber.inline)


def told_apart(callback: Callback) -> list[str]:
    """What tells it from another one of its class: the file that it writes, say."""
    return [str(getattr(callback, name)) for name in callback.told_apart_by]


def _overrides(callback: Callback, method: str) -> bool:
    return method in vars(callback) or getattr(type(callback), method) is not getattr(Callback, method)
