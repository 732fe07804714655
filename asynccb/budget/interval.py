"""The interpreter's switch interval, held down while somebody needs it."""

from __future__ import annotations

import os
import sys
import threading

__all__ = ["SwitchInterval"]

_lock = threading.Lock()
_held: list[SwitchInterval] = []
_before = 0.0


class SwitchInterval:
    """Holds the interpreter's switch interval down while a training is active.

    A thread that computes in Python gives the interpreter lock to the event loop at most once in a switch
    interval (5 ms by default), so that a request which takes the lock three times waits for up to 15 ms. A
    shorter interval makes the loop quicker and the training a little slower. Of several that hold it the
    shortest counts. Who sets ``sys.setswitchinterval`` meanwhile is not overruled at the end.

    Args:
        seconds: the interval.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def hold(self) -> None:
        global _before
        with _lock:
            if self in _held:
                return
            if not _held:
                _before = sys.getswitchinterval()
            _held.append(self)
            sys.setswitchinterval(_shortest())

    def let_go(self) -> None:
        """Legal any number of times, on any thread."""
        with _lock:
            if self not in _held:
                return
            ours = _same(sys.getswitchinterval(), _shortest())
            _held.remove(self)
            if ours:
                sys.setswitchinterval(_shortest() if _held else _before)


def _same(one: float, other: float) -> bool:
    return abs(one - other) < 1e-6  # the interpreter keeps whole microseconds


def _shortest() -> float:
    return min(held._seconds for held in _held)


def _after_fork() -> None:
    # The child has none of the threads that hold the interval, or the lock.
    global _lock
    _lock = threading.Lock()
    for held in _held:
        held.let_go()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
