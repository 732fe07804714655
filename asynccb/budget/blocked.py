"""Whether a training that holds a token computes at all.

A batch may wait for a device, another process, a lock, or for something that another training is to do. A
token that it keeps meanwhile would be lost for all, in the last case for ever. Between two batches it would
have given the token back; inside of one it cannot be asked. So who waits for a token looks at the processor
time of those who hold one.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pulse"]

SECONDS = 0.1
"""Of looking, after which a thread that hardly computed counts as blocked."""
BUSY = 0.1
"""Part of that time for which one that computes has a processor at least, on a busy machine too."""
BLIND = 1.0
"""The same where the system does not tell the processor time of a thread: then a long batch counts too."""


class Pulse:
    """Of one thread, made on it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._processor = _processor_clock()
        self._seen_at = -math.inf
        self._looked_at = 0.0
        self._computed = 0.0

    def is_blocked(self, seen_at: float) -> bool:
        """Whether the thread has hardly computed since somebody first looked.

        Args:
            seen_at: when it was last known to compute; looking begins anew when that changes.
        """
        now = self._clock()
        computed = self._processor_seconds()
        if seen_at != self._seen_at:
            self._seen_at, self._looked_at, self._computed = seen_at, now, computed or 0.0
            return False
        looked_for = now - self._looked_at
        if computed is None:
            return looked_for >= BLIND
        return looked_for >= SECONDS and computed - self._computed < BUSY * looked_for

    def _processor_seconds(self) -> float | None:
        if self._processor is None:
            return None
        try:
            return time.clock_gettime(self._processor)
        except OSError:  # the thread has ended without a word
            return None


def _processor_clock() -> int | None:
    """The clock of the calling thread's processor time, which others may read; None where there is none, as
    on Windows and macOS."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.pthread_getcpuclockid(threading.get_ident())
