"""Virtual time: a day of training in seconds.

The loop's clock stands still while anybody works. When nothing on the loop is ready, no socket has anything
to say and no thread of ours computes, it jumps to the next timer. A training computes for a virtual while by
:meth:`Clock.sleep`, so the threads are real and their waits are too; only the hours between are left out.

``time.monotonic`` tells the virtual time and ``time.time`` a virtual date, which a test may put forward or
back.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from asynccb import health
from asynccb.run import live_runs

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

START = 1_000.0
DATE = 1_800_000_000.0
MOMENT = 0.0005
"""Real seconds between two looks at who works."""


class Clock:
    """What time it is.

    Attributes:
        now: virtual seconds.
        date_moved: by how many seconds somebody has put the date forward.
        jumps: how often time has jumped.
    """

    def __init__(self) -> None:
        self.now = START
        self.date_moved = 0.0
        self.jumps = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self._asleep: set[int] = set()

    def monotonic(self) -> float:
        return self.now

    def date(self) -> float:
        return DATE + self.now + self.date_moved

    def sleep(self, seconds: float) -> None:
        """Called on a thread that is to work for ``seconds``, or to hang for as long."""
        assert self.loop is not None
        ident, done = threading.get_ident(), threading.Event()

        def wake() -> None:
            self._asleep.discard(ident)  # before it runs: from now on it works
            done.set()

        # The timer first: a thread that counts as asleep lets the time jump.
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, wake)
        self._asleep.add(ident)
        done.wait()

    def somebody_works(self) -> bool:
        """Whether a thread of ours is neither asleep nor waits for the loop. A copier waits for a copy, and
        the training waits for it at the gate."""
        resting = {
            run._parts.driver.ident for run in live_runs() if run._parts and run._parts.control.resting
        }
        return any(
            thread.name.startswith("asynccb")
            and not thread.name.endswith("copier")
            and thread.ident not in self._asleep
            and thread.ident not in resting
            for thread in threading.enumerate()
        )


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for sockets as any selector, and lets the time jump where there is nothing to wait for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        while True:
            ready = super().select(0)
            if ready or timeout == 0:
                return ready
            if self._clock.somebody_works():
                ready = super().select(MOMENT)
            else:
                ready = super().select(0)  # what it said before it came to rest
                if not ready and timeout is not None:
                    self._clock.now += timeout
                    self._clock.jumps += 1
                    return ready
                if not ready:
                    ready = super().select(MOMENT)
            if ready:
                return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_JumpingSelector(clock))
        self._clock = clock
        clock.loop = self

    def time(self) -> float:
        return self._clock.now


@contextmanager
def _patched(clock: Clock) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock.monotonic)
        patch.setattr(health, "PERIOD", 1e9)  # its timer goes by real time, and would come a million times
        patch.setattr(time, "time", clock.date)
        yield


def run(clock: Clock, main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner, _patched(clock):
        return runner.run(main)
