"""A terminal that tests read from."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pyte

if TYPE_CHECKING:
    from collections.abc import Callable


def timeless(line: str) -> str:
    """The line of an epoch, however long that took on this host."""
    return re.sub(r"^(.*Epoch \d+/\d+) - \d+s", r"\1 - 0s", line)


class Terminal:
    """A real pseudo-terminal, and what stands on its screen."""

    def __init__(self, rows: int = 30) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
        self.file = open(self.slave, "w", closefd=False)  # noqa: SIM115  closed in close()
        self.screen = pyte.Screen(100, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def lines(self) -> list[str]:
        return [line for row in self.screen.display if (line := row.rstrip())]

    def at_last(self) -> list[str]:
        """The screen when all that was written so far has been read."""
        os.write(self.slave, b"\x1b]0;read\x07")  # a title, which no line shows
        while self.screen.title != "read":
            time.sleep(0.001)
        return [timeless(line) for line in self.lines()]

    async def until(self, told: Callable[[list[str]], bool]) -> None:
        """Waits until the screen is as it should be; what never comes, the time limit ends."""
        while not told(self.lines()):  # noqa: ASYNC110  a screen has no event
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.file.close()
        os.close(self.slave)
        self._thread.join()
        os.close(self.master)

    def run(self, source: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        """Runs Python with this terminal as its standard output, its standard error apart."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            timeout=50,
            check=False,
        )

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the last slave is closed
                return
            self._stream.feed(data)
