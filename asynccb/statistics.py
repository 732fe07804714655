"""What a run did and where its time went: counts that are there at any time, and a report of them."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from asynccb.health import LagStatistics
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asynccb.budget import BudgetStatistics
    from asynccb.bus.mailbox import MailboxStatistics
    from asynccb.protocols import QueueStatistics

__all__ = ["OrchestratorStatistics", "Phases", "RunStatistics"]

WIDTH = 40
"""Characters of the report's first column."""


class Phases:
    """A stopwatch: seconds by phase, one after the other. One thread turns it at a time, any may read.

    Args:
        phase: the first one; it begins now.
    """

    def __init__(self, phase: str) -> None:
        self._seconds = {phase: 0.0}
        self._now = (phase, perf_counter())

    def backdate(self, began: float) -> None:
        """The first phase began earlier, at ``began`` (``perf_counter``). Called before another one turns."""
        self._now = (self._now[0], began)

    def enter(self, phase: str | None) -> str:
        """Ends the phase under way and begins another; None: none, for good. Answers the one that ended."""
        before, began = self._now
        if not before:  # ended; a thread that was given up as stuck has come back
            return before
        now = perf_counter()
        self._seconds[before] = self._seconds.get(before, 0.0) + now - began
        self._now = (phase or "", now)
        return before

    def read(self) -> dict[str, float]:
        """Seconds by phase so far."""
        phase, began = self._now
        seconds = {name: spent for name, spent in dict(self._seconds).items() if name}
        if phase:
            seconds[phase] = seconds.get(phase, 0.0) + perf_counter() - began
        return seconds


class RunStatistics(NamedTuple):
    """What a run did so far.

    Attributes:
        events: numbers given to events, also of those that nobody wanted.
        callbacks: counts of each callback's mailbox, by the callback's name.
        waits: for each reason, how often the training thread waited. ``"gate"``: for a segment of the model
            to be copied; ``"pool"``: for room for a copy.
        waited: for each reason, how many seconds in all. At the gate, the time in which the thread itself
            copied is counted in.
        snapshots: copies of the model made.
        inline: seconds in inline hooks, by the callback's name; those of batch hooks are estimated from the
            batches that are timed.
        seconds: where the time went, by phase: ``"queued"``, ``"opening"`` (up to the first batch),
            ``"batches"``, ``"validation"``, ``"closing"`` (the closing hooks) and ``"drain"``.
        queues: counts of everything else in which something waits, by its name: ``"event streams"``,
            ``"copies"``, ``"source of x"``, ``"source of validation_data"``, and those inside of callbacks,
            as ``"ModelCheckpoint: waiting saves"``.
        computed: seconds in which it had the right to compute; without its waits, for its turn among them.
        lag: how late the event loop was while the run was alive.
    """

    events: int
    callbacks: dict[str, MailboxStatistics]
    waits: dict[str, int]
    waited: dict[str, float]
    snapshots: int
    inline: dict[str, float]
    seconds: dict[str, float]
    queues: dict[str, QueueStatistics]
    computed: float
    lag: LagStatistics

    @classmethod
    def nothing(cls) -> RunStatistics:
        """Of a run that has not begun."""
        return cls(0, {}, {}, {}, 0, {}, {}, {}, 0.0, LagStatistics(0.0, 0.0, 0.0, 0))

    def report(self) -> str:
        """A table of where the time went, for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        whole = sum(self.seconds.values()) or 1.0
        yield f"{'phase':<{WIDTH}}{'seconds':>10}{'share':>8}"
        for phase, seconds in self.seconds.items():
            yield _row(phase, seconds, whole)
        yield _row("in all", sum(self.seconds.values()), whole)
        rows = [(f"of it inline hooks of {printable(name)}", spent) for name, spent in self.inline.items()]
        rows += [(f"of it waiting: {reason}", spent) for reason, spent in self.waited.items()]
        for what, spent in sorted(rows, key=lambda row: -row[1]):
            yield _row(what, spent, whole)
        yield f"{'events':<{WIDTH}}{'handled':>10}{'peak':>8}{'dropped':>9}{'held':>6}{'lost':>6}"
        for name, box in self.callbacks.items():
            numbers = f"{box.handled:>10}{box.peak:>8}{box.dropped:>9}{box.held:>6}{box.lost:>6}"
            yield _fit(printable(name)) + numbers
        yield f"{'queues':<{WIDTH}}{'waiting':>10}{'bound':>8}  when full"
        for name, queue in self.queues.items():
            numbers = f"{queue.waiting:>10}{queue.bound:>8}  {queue.policy}: {queue.overflowed}"
            yield _fit(printable(name)) + numbers
        yield f"copies of the model: {self.snapshots}"
        yield f"the event loop was late by {_milliseconds(self.lag)}"


class OrchestratorStatistics(NamedTuple):
    """What an orchestrator did so far.

    Attributes:
        slots: trainings that may be alive at a time; those that wait lend theirs.
        queued: trainings that have not begun.
        live: trainings that are being made, run, or close.
        ended: how many ended, by outcome.
        computed: seconds in which its trainings had the right to compute, all together.
        devices: how much of each device is taken, by its name.
        budget: of the whole process: threads of linear algebra, compute tokens, what has been learned.
        lag: how late the event loop was since the block was opened.
    """

    slots: int
    queued: int
    live: int
    ended: dict[str, int]
    computed: float
    devices: dict[str, float]
    budget: BudgetStatistics
    lag: LagStatistics


def _milliseconds(lag: LagStatistics) -> str:
    return f"{lag.p50 * 1e3:.1f} ms (p50), {lag.p99 * 1e3:.1f} ms (p99), {lag.worst * 1e3:.1f} ms (worst)"


def _row(what: str, seconds: float, whole: float) -> str:
    return f"{_fit(what)}{seconds:>10.3f}{100 * seconds / whole:>7.1f}%"


def _fit(text: str) -> str:
    return f"{text[: WIDTH - 1]:<{WIDTH}}"
