"""Who wrote this: a process, named so that another one can tell later whether it is dead.

A process number alone is given again. With the time at which the process started, and the boot of which this
is a time, it is not. The number means something on one host, and there in one space of process numbers: each
container has its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Owner", "this_process"]

FORM = "[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{1,8}-[0-9a-f]{8}"
"""Regular expression for the text of an owner."""


class Owner(NamedTuple):
    """A process.

    Attributes:
        host: hash of the host's name and identity.
        space: hash of its space of process numbers.
        pid: its number there.
        start: hash of boot and time of its start; all zeros where the platform does not tell.
    """

    host: str
    space: str
    pid: int
    start: str

    def __str__(self) -> str:
        """A part of a file name, of at most 35 characters."""
        return f"{self.host}-{self.space}-{self.pid:x}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> Owner:
        """The owner of whom this is the text; it must have the form :data:`FORM`."""
        host, space, pid, start = text.split("-")
        return cls(host, space, int(pid, 16), start)

    def is_dead(self) -> bool | None:
        """Whether this process has ended; None where that cannot be known from here: of other hosts and
        spaces, and of other processes on Windows."""
        here = this_process()
        if (self.host, self.space) != (here.host, here.space):
            return None
        if self.pid == here.pid:
            return _UNKNOWN not in (self.start, here.start) and self.start != here.start
        if os.name == "nt":
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # or a number that no process can have
            return True
        except OSError:  # not ours to signal, so it is there
            pass
        start = _start_of(self.pid)
        return _UNKNOWN not in (self.start, start) and self.start != start


def this_process() -> Owner:
    """The process that asks, also after a fork."""
    return _process(os.getpid())


@lru_cache(maxsize=1)
def _process(pid: int) -> Owner:
    host = _hash(platform.node(), _read("/etc/machine-id"))
    return Owner(host, _hash(_space()), pid, _start_of(pid))


_UNKNOWN = "0" * 8
_ENDED = ""


def _start_of(pid: int) -> str:
    """Hash of boot and time of a process's start; no hash for one that has ended and is still listed."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
    except OSError:
        return _UNKNOWN
    if len(fields) < 20:
        return _UNKNOWN
    return _ENDED if fields[0] in (b"Z", b"X") else _hash(_boot(), fields[19].decode())


@lru_cache(maxsize=1)
def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except (OSError, AttributeError):
        return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(1000).strip()
    except OSError:
        return ""


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:8]
