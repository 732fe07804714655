"""How late the event loop is, and a warning where Python code in other threads keeps it waiting.

A timer of the loop measures it: how much later than asked for it comes is how long whatever the service has
to do waits, be it for a handler that blocks, for the interpreter lock or for a processor. One timer serves
all who watch a loop, however many trainings that are.

Which of the three it is, lateness does not tell. So a loop that is late time after time takes a few naps of
half a millisecond and looks what comes after them. Beside a thread that computes in Python it waits for the
interpreter lock, for a switch interval or longer; beside a handler that blocks, not at all; on a busy machine
for a processor, which the system counts in another way.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import threading
import time
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import asyncio

__all__ = ["LagStatistics", "LoopWatch", "watch_loop"]

logger = logging.getLogger("asynccb")

PERIOD = 0.05
"""Seconds from one probe to the next. Each stops a thread that computes in Python for about 0.13 ms, which is
0.3 % of its time."""
LATE = 0.003
"""Seconds: a loop whose probes come later than this is looked at more closely. A system's timer alone may be
1 ms late."""
WINDOW = 100
"""Probes, of which more than half must be late: what passes within seconds, as a compiler at work, is no
starvation."""
TESTS = 12
"""Probes that then measure the wait for the interpreter lock."""
NAP = 0.0005
"""Seconds for which they leave it to others."""

FINEST = 1e-5
BUCKETS_PER_OCTAVE = 8
BUCKETS = 1 + 28 * BUCKETS_PER_OCTAVE  # up to 45 minutes


class LagStatistics(NamedTuple):
    """How much later than they should the loop's timers came, in seconds, since a watch began.

    Attributes:
        p50: half of them were no later than this, rounded up by at most 9 %.
        p99: 99 of 100 were no later.
        worst: the latest one, exactly; counting one that is due and has not come yet.
        samples: how many there were.
    """

    p50: float
    p99: float
    worst: float
    samples: int


def watch_loop(loop: asyncio.AbstractEventLoop, name: str) -> LoopWatch:
    """Begins to watch how late ``loop`` is; called on that loop. Nothing of it stays there once every watch
    is closed.

    Args:
        name: of what runs meanwhile; the warning names it. There is one warning at most from the moment the
            first watch of a loop begins to the moment the last one closes.
    """
    with _lock:
        probe = _probes.get(id(loop))
        if probe is None:
            probe = _probes[id(loop)] = _Probe(loop)
    return LoopWatch(probe, name)


class LoopWatch:
    """One that watches; made by :func:`watch_loop`."""

    def __init__(self, probe: _Probe, name: str) -> None:
        self.name = name
        self.worst = 0.0
        self._probe: _Probe | None = probe
        self._before = list(probe.counts)
        self._began = probe.samples
        self._final = LagStatistics(0.0, 0.0, 0.0, 0)
        probe.join(self)

    def statistics(self) -> LagStatistics:
        """Since this watch began, until now or until it was closed. Legal on any thread."""
        before, probe = self._before, self._probe  # in this order: close() takes them away in the other
        if probe is None:
            return self._final
        worst = max(self.worst, probe.overdue())
        if probe.samples == self._began:
            return LagStatistics(0.0, 0.0, worst, 0)
        counts = [now - before for now, before in zip(list(probe.counts), before, strict=True)]
        samples = sum(counts)
        p50, p99 = (min(worst, _quantile(counts, math.ceil(samples * part))) for part in (0.5, 0.99))
        return LagStatistics(p50, p99, worst, samples)

    def close(self) -> None:
        """Ends the watch; its statistics stay. Called on the loop, or when that is closed; legal any number
        of times."""
        probe = self._probe
        if probe is not None:
            self._final = self.statistics()
            self._probe = None  # a watch that is kept does not keep the loop
            self._before = []
            probe.leave(self)


class _Probe:
    """The timer of one loop, and what it saw. Its methods are called on the loop, ``overdue`` on any thread.

    Attributes:
        samples: how often it came, since the first watch began.
        counts: how many of its lags fell into each bucket.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.samples = 0
        self.counts = [0] * BUCKETS
        self._loop = loop
        self._watches: dict[LoopWatch, None] = {}
        self._starvation: _Starvation | None = _Starvation()
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    def join(self, watch: LoopWatch) -> None:
        self._watches[watch] = None
        if self._timer is None:
            self._arm()

    def leave(self, watch: LoopWatch) -> None:
        self._watches.pop(watch, None)
        if self._watches or self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        with _lock:
            _probes.pop(id(self._loop), None)

    def overdue(self) -> float:
        return max(0.0, perf_counter() - self._due)

    def _arm(self) -> None:
        self._due = perf_counter() + PERIOD
        self._timer = self._loop.call_later(PERIOD, self._come)

    def _come(self) -> None:
        lag = self.overdue()
        self.counts[_bucket(lag)] += 1
        self.samples += 1
        for watch in self._watches:
            if lag > watch.worst:
                watch.worst = lag
        if self._starvation is not None:
            late = self._starvation.after(lag)
            if late is not None:
                self._starvation = None
                _warn(late, [watch.name for watch in self._watches])
        self._arm()


_lock = threading.Lock()
# By the loop's id, weakly: a loop that is dropped with watches still open takes its probe along, and as long
# as a watch keeps the probe, the probe keeps the loop, so that nobody else can have the id.
_probes: weakref.WeakValueDictionary[int, _Probe] = weakref.WeakValueDictionary()


def _bucket(lag: float) -> int:
    if lag <= FINEST:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log2(lag / FINEST) * BUCKETS_PER_OCTAVE))


def _quantile(counts: list[int], rank: int) -> float:
    """The upper edge of the bucket that holds the value at a 1-based rank; 0 where there is none."""
    for index, count in enumerate(counts):
        rank -= count
        if count and rank <= 0:
            return float(FINEST * 2 ** (index / BUCKETS_PER_OCTAVE))
    return 0.0


class _Starvation:
    """Tells a loop that waits for the interpreter lock from one that is late for another reason."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._suspected = 0.0
        self._waits: list[float] = []

    def after(self, lag: float) -> float | None:
        """Takes the lag of another probe. Answers how late the loop is as a rule, if that is for want of the
        lock."""
        if self._suspected:
            self._waits.append(_lock_wait())
            if len(self._waits) == TESTS:
                return self._judge()
            return None
        self._lags.append(lag)
        if len(self._lags) == WINDOW:
            median = statistics.median_low(self._lags)
            self._suspected = median if median >= LATE else 0.0
            self._lags.clear()
        return None

    def _judge(self) -> float | None:
        # Three of four had to wait: beside a thread that has the lock now and then, most had not.
        starved = sorted(self._waits)[TESTS // 4] >= LATE
        suspected, self._suspected = self._suspected, 0.0
        self._waits.clear()
        return suspected if starved else None


def _lock_wait() -> float:
    """Lets go of the interpreter lock, and answers the seconds of waiting until it was had again."""
    before, began = _switches(), perf_counter()
    time.sleep(NAP)
    waited, switches = perf_counter() - began - NAP, _switches() - before
    # The nap itself is one, and each wait for the lock one more. On a busy machine a nap is longer, but no
    # more than one.
    return 0.0 if switches == 1 else waited


def _switches() -> int:
    """How often this thread has given its processor away by itself; 0 where the system does not tell."""
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return 0
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _warn(late: float, names: list[str]) -> None:
    interval = sys.getswitchinterval()
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    shorter = ""
    if interval > 0.0005:
        shorter = "switch_interval=0.0005 for the trainings, or an Orchestrator, which sets 0.001 by itself; "
    logger.warning(
        "the event loop is starved beside %s: as a rule it comes %.1f ms late, because threads that compute "
        "in Python, as a model's own code, keep the interpreter lock from it. Only one thread runs Python at "
        "a time, and it is asked to give way after a switch interval, %.1f ms now; a request waits for that "
        "more than once. What helps: %sfewer trainings at once; array operations over whole batches in place "
        "of loops in Python.",
        shown,
        late * 1e3,
        interval * 1e3,
        shorter,
    )
