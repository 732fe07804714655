"""One run owns its folder: what it writes and removes there is nobody else's.

The lock is the kernel's, on the file ``.lock``, so that a process that is killed lets go of it at once; what
stands in the file only tells others who has it. The file is never deleted: somebody who had opened it just
before would lock a file without a name, and somebody else the new one.

Where a file system has no locks, what stands in the file is all there is: it holds as long as the process
that it names is not known to be dead, and two that begin in the very same moment may both have it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from asynccb.errors import FolderBusy
from asynccb.storage.owner import FORM, Owner, this_process
from asynccb.text import printable

__all__ = ["FolderLock"]

NAME = ".lock"

_LONGEST = 4096  # bytes of the file that are looked at
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_registry = threading.RLock()  # the collector may let go of one lock while another one is taken
_held: dict[tuple[int, int], FolderLock] = {}  # in this process: some file systems have locks of processes


class FolderLock:
    """The lock of one folder. Two of them exclude each other in one process as in two.

    A child that Python forks does not have the lock. One that other code forks keeps it until it ends or runs
    another program, should this process be killed while it holds it.

    Args:
        folder: must exist when it is locked.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.path.abspath(folder)
        self._descriptor: int | None = None
        self._file = (0, 0)
        self._record: dict[str, Any] = {}

    def acquire(self, owner: str) -> None:
        """Locks the folder, or raises at once. Blocks for a few system calls.

        Args:
            owner: who locks it, in words for whoever comes too late.

        Raises:
            FolderBusy: somebody has it, perhaps this very process.
            OSError: the file of the lock cannot be made.
        """
        path = os.path.join(self._folder, NAME)
        with _registry:
            holder = _held.get(_identity(path))
            if holder is not None:  # not opened: closing it again could take the other's lock away
                raise _busy(self._folder, holder._record)
            descriptor = _open(path)
            try:
                self._record = _take(self._folder, descriptor, owner)
                status = os.fstat(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor, self._file = descriptor, (status.st_dev, status.st_ino)
            _held[self._file] = self

    def release(self) -> None:
        """Gives the lock back; nothing happens if it is not held."""
        with _registry:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is None:
                return
            del _held[self._file]
            try:
                os.ftruncate(descriptor, 0)
                _unlock(descriptor)
            except OSError:  # then what stands there is out of date; the lock ends all the same
                pass
            os.close(descriptor)


def _open(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT
    for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY", "O_NOINHERIT"):
        flags |= getattr(os, flag, 0)
    return os.open(path, flags, 0o666)


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (0, 0)
    return status.st_dev, status.st_ino


def _take(folder: str, descriptor: int, owner: str) -> dict[str, Any]:
    """Locks the file and writes down whose it is."""
    locked = _lock(descriptor)
    if locked is False:
        raise _busy(folder, _known_alive(_read(descriptor)))
    if locked is None and _is_in_use(found := _read(descriptor)):
        raise _busy(folder, found, f"If no such process is running, delete {os.path.join(folder, NAME)}")
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    process = this_process()
    record = {
        "owner": owner,
        "pid": process.pid,
        "host": platform.node(),
        "since": now,
        "process": str(process),
    }
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(record).encode())
    if locked is None and _read(descriptor) != record:
        raise _busy(folder, _read(descriptor))
    return record


def _read(descriptor: int) -> dict[str, Any]:
    """What stands in the file; empty where it makes no sense."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        record = json.loads(os.read(descriptor, _LONGEST))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _process(record: dict[str, Any]) -> Owner | None:
    text = record.get("process")
    return Owner.parse(text) if isinstance(text, str) and re.fullmatch(FORM, text) else None


def _known_alive(record: dict[str, Any]) -> dict[str, Any]:
    """Nothing, if it is the record of a dead one: the new owner is about to write its own."""
    process = _process(record)
    return record if process is not None and not process.is_dead() else {}


def _is_in_use(record: dict[str, Any]) -> bool:
    process = _process(record)
    return process is not None and process != this_process() and not process.is_dead()


def _busy(folder: str, record: dict[str, Any], fix: str = "") -> FolderBusy:
    pid = record.get("pid")
    owner, host, since = (printable(str(record.get(key, ""))) for key in ("owner", "host", "since"))
    return FolderBusy(folder, owner, pid if isinstance(pid, int) else None, host, since, fix)


# The kernel's lock: True if it is ours now, False if it is another's, None where there is none ------------

if sys.platform == "win32":
    import msvcrt

    _BYTE = 1 << 30  # far behind the text, which nobody could read if it were locked

    def _lock(descriptor: int) -> bool | None:
        os.lseek(descriptor, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            return None if error.errno in _NO_LOCKS else False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:

    def _lock(descriptor: int) -> bool | None:
        try:
            import fcntl
        except ImportError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        return True

    def _unlock(descriptor: int) -> None:
        try:
            import fcntl
        except ImportError:
            return
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would do, unless somebody's child has a copy


def _leave_to_the_parent() -> None:
    """In a forked child: the lock is the parent's, and must not outlive it here."""
    global _registry
    _registry = threading.RLock()
    for lock in _held.values():
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
