"""What is process-wide, counted and restored in one place.

A value is saved by the first that holds it and restored by the last that lets go. To save and restore by each
for itself would leak: of two runs that overlap, the one that began later would restore the first one's value
after that has put back the original.
"""

from __future__ import annotations

import sys
import threading

__all__ = ["SwitchInterval", "blas_threads"]

_lock = threading.Lock()
_held: list[float] = []
_before = 0.0


def blas_threads() -> int | None:
    """Threads that the linear algebra under numpy computes with; None where it does not tell. Results depend
    on it to the last bit."""
    from threadpoolctl import threadpool_info

    counts = [int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=None)


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
        self._holds = False

    def hold(self) -> None:
        global _before
        with _lock:
            if self._holds:
                return
            self._holds = True
            if not _held:
                _before = sys.getswitchinterval()
            _held.append(self._seconds)
            sys.setswitchinterval(min(_held))

    def let_go(self) -> None:
        """Legal any number of times, on any thread."""
        with _lock:
            if not self._holds:
                return
            self._holds = False
            ours = _same(sys.getswitchinterval(), min(_held))
            _held.remove(self._seconds)
            if ours:
                sys.setswitchinterval(min(_held) if _held else _before)


def _same(one: float, other: float) -> bool:
    return abs(one - other) < 1e-6  # the interpreter keeps whole microseconds
