"""The display that all trainings on one terminal, file or pipe share.

Hooks only leave lines and numbers here. A thread of the display's own, alive while there is something to
write, brings them to the stream: a terminal that is held by Ctrl-S, or a pipe whose reader sleeps, holds that
thread and neither a batch nor the event loop. What the stream refuses is lost silently: a training does not
end because nobody looks on.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from asynccb.callbacks.progress_bars import Bars
from asynccb.protocols import QueueStatistics
from asynccb.storage.serial import SerialExecutor
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

__all__ = ["Display", "Gauge", "Row", "is_terminal", "join"]

LINES = 1024
"""Lines that wait for a stream that does not take them; older ones are lost."""


class Gauge(Protocol):
    """What a row shows; read by the display's thread."""

    @property
    def title(self) -> str: ...

    @property
    def total(self) -> int | None: ...

    @property
    def completed(self) -> int: ...

    def status(self) -> str: ...


G = TypeVar("G", bound=Gauge)


class Row(Generic[G]):
    """One training on a display."""

    def __init__(self, display: Display, name: str, meter: G) -> None:
        self.meter = meter
        self._display = display
        self._name = printable(name)

    @property
    def title(self) -> str:
        return self.named(self.meter.title)

    def named(self, text: str) -> str:
        """``text`` with the training's name before it, where more than one training writes here."""
        return f"{self._name}: {text}" if self._name and self._display.shared else text


class Display:
    """Use :func:`join`. All methods may be called from any thread; none blocks.

    Attributes:
        quiet_until: before this moment of ``time.monotonic`` a call of :meth:`draw_soon` has no effect;
            looking here first is cheaper than the call.
        shared: more than one training has been here since the last time it was empty.
    """

    def __init__(self) -> None:
        self.quiet_until = 0.0
        self.shared = False
        self._stream = SafeStream(None)
        self._lock = threading.Lock()
        self._executor = SerialExecutor("asynccb progress")
        self._queued = False
        self._lines: deque[str] = deque(maxlen=LINES)
        self._lost = 0
        self._users = 0
        self._rows: dict[Row[Any], None] = {}
        self._bars: Bars | None = None

    def enter(self, stream: Any) -> None:
        """A training joins. The first one's stream is the one that is written to."""
        with self._lock:
            if not self._users:
                self._stream = SafeStream(stream)
                self.shared = False
            self._users += 1
            self.shared = self.shared or self._users > 1

    def show(self, row: Row[Any]) -> None:
        """Draws a bar for this training from now on."""
        with self._lock:
            self._rows[row] = None

    def hide(self, row: Row[Any]) -> None:
        """Draws it no more from the next drawing on."""
        with self._lock:
            self._rows.pop(row, None)

    def leave(self, row: Row[Any]) -> None:
        """The training is over. With the last one the bars go, and ``sys.stdout`` comes back."""
        with self._lock:
            self._users -= 1
            self._rows.pop(row, None)
        self._draw()

    def say(self, line: str) -> None:
        """A line that stays, in order; lost only if 1,024 newer ones wait or the stream is broken."""
        with self._lock:
            self._lost += len(self._lines) == LINES
            self._lines.append(line)
        self._draw()

    def statistics(self) -> QueueStatistics:
        """Of the lines of all trainings that share this display."""
        return QueueStatistics(LINES, "drop_oldest", len(self._lines), self._lost)

    def draw_soon(self, interval: float) -> None:
        """Draws the rows, at once or ``interval`` seconds after the last time; called on an event loop."""
        with self._lock:
            now = time.monotonic()
            if now < self.quiet_until:
                return
            wait = self.quiet_until + interval - now
            self.quiet_until = max(now, self.quiet_until + interval)
        if wait > 0:
            # If that loop ends before, the moment passes, and the next call, from whatever loop, draws.
            asyncio.get_running_loop().call_later(wait, self._draw)
        else:
            self._draw()

    async def settled(self, seconds: float) -> None:
        """Waits until all that was said is on the stream, or ``seconds`` have passed."""
        future = asyncio.wrap_future(self._executor.submit(_nothing))
        try:
            await asyncio.wait({future}, timeout=seconds)
        finally:
            future.cancel()

    def _draw(self) -> None:
        with self._lock:
            if self._queued:
                return
            self._queued = True
        self._executor.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            self._queued = False
            rows, lines = list(self._rows), list(self._lines)
            self._lines.clear()
        try:
            self._write(lines, rows)
        except Exception:
            # Whatever a drawing library can stumble on, the training is worth more than its picture.
            self._stream.broken = True

    def _write(self, lines: Iterable[str], rows: list[Row[Any]]) -> None:
        if rows and self._bars is None:
            out, err = _device(sys.stdout), _device(sys.stderr)
            here = _device(self._stream.stream)
            self._bars = Bars(self._stream, stdout=out == here, stderr=err == here)
        if self._bars is None:
            for line in lines:
                self._stream.write(line + "\n")
            self._stream.flush()
            return
        try:
            for line in lines:
                self._bars.say(line)
            if rows:
                self._bars.draw(rows)
        finally:
            if not rows:
                bars, self._bars = self._bars, None
                bars.stop()


class SafeStream:
    """A stream that never raises: what it cannot encode is escaped, what it cannot take is lost."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.broken = stream is None
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        encodable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try("write", encodable)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return is_terminal(self.stream)

    def fileno(self) -> int:
        return int(self.stream.fileno())

    def _try(self, method: str, *args: str) -> None:
        if self.broken:
            return
        try:
            getattr(self.stream, method)(*args)
        except BlockingIOError:
            pass  # full for now
        except (OSError, ValueError):
            self.broken = True  # the reader is gone, or the file was closed


_displays: WeakValueDictionary[Hashable, Display] = WeakValueDictionary()
"""By device or stream. Weak: a display lives as long as a training writes to it or its thread has work, so
that the next training on the same terminal never meets one that is still taking its bars away."""
_joining = threading.Lock()


def join(stream: Any) -> Display:
    """The display of ``stream``, shared with all trainings that write to the same terminal or object."""
    with _joining:
        key = _device(stream)
        display = _displays.get(key)
        if display is None:
            display = _displays[key] = Display()
        display.enter(_own(stream))
        return display


def is_terminal(stream: Any) -> bool:
    """A terminal that bars can be drawn on. A stream that rich has wrapped for somebody else is not."""
    own = _own(stream)
    if hasattr(own, "rich_proxied_file") or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    try:
        return bool(own.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def _own(stream: Any) -> Any:
    """What stands behind ``stream`` if it is one that our own bars have put in place of ``sys.stdout``."""
    behind = getattr(stream, "rich_proxied_file", None)
    return stream if behind is None or _device(behind) not in _displays else behind


def _device(stream: Any) -> Hashable:
    behind = getattr(stream, "rich_proxied_file", stream)
    try:
        if behind.isatty():
            return os.ttyname(behind.fileno())
    except (AttributeError, OSError, ValueError):
        pass
    return id(behind)


def _nothing() -> None:
    pass
