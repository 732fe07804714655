"""From the training thread to the event loop: one flag for each run, however many mailboxes it fills."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Wakeup"]

DELAY = 0.005
"""Seconds for which the loop lets batch events gather."""


class Wakeup:
    """Tells the loop that something was appended.

    ``ring`` and ``flush`` are called on any thread, the rest on the loop. The delay of batch events is the
    loop's doing (``call_later``) and never the producer's: a producer that limited its own rate would leave
    the last event of a burst lying until the next one comes.

    Attributes:
        rung: whether the loop has been told already. The hot path looks here and spares itself :meth:`ring`.

    Args:
        loop: the loop to wake.
        deliver: called on the loop, once for all that was appended before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._timer: asyncio.TimerHandle | None = None
        self.rung = False
        self._urgent = False

    def ring(self) -> None:
        """A batch event was appended: the loop comes within about 5 ms."""
        if not self.rung:
            self.rung = True
            self._call(self._delay)

    def flush(self) -> None:
        """Something that should not wait was appended: the loop comes at once."""
        if not self._urgent:
            self.rung = self._urgent = True
            self._call(self._come)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The loop is gone. The training thread sees that itself, before its next batch and in every wait.

    def _delay(self) -> None:
        if not self._urgent and self._timer is None:
            self._timer = self._loop.call_later(DELAY, self._come)

    def _come(self) -> None:
        self.close()
        # The flags fall before the mailboxes are looked at. The other way round, an event appended in between
        # would find the flag still up, wake nobody, and lie until the next one.
        self.rung = self._urgent = False
        self._deliver()
