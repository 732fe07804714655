"""Writing a file from pieces of memory with few system calls, each without the interpreter lock."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from asynccb.storage.seal import BESIDE, SIZE, digesting, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Buffer = bytes | memoryview

_MOST_PIECES = 1024  # of one call; every system allows as many
_MOST_BYTES = 1 << 30  # of one call; some systems count in 32 bits
_NOT_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems that cannot allocate ahead


def available() -> bool:
    """Whether the platform has the call."""
    return hasattr(os, "pwritev")


def write_sealed(path: str, pieces: Sequence[Buffer], size: int, check: Callable[[], object]) -> None:
    """Writes a new file and makes it durable. Blocks. Nothing of the order of ``size`` is allocated.

    Args:
        path: its name.
        pieces: its content, ``size`` bytes in all, in order. A seal is added.
        size: see above.
        check: called when everything is written and before it is made durable.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with digesting(pieces, size) as digest:
            _allocate(descriptor, size + SIZE)
            if size < BESIDE:
                _write(descriptor, [*pieces, seal(size, digest())])
            else:
                _write(descriptor, pieces)
                os.fsync(descriptor)  # the disk works while the digest is being computed
                _write(descriptor, [seal(size, digest())], size)
        check()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """A disk that is too full says so before anything is written."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def _write(descriptor: int, pieces: Sequence[Buffer], at: int = 0) -> None:
    """Writes all pieces, one after the other from ``at`` on. A system call that wrote less is continued; one
    that a signal interrupted is repeated by Python itself."""
    waiting = [memoryview(piece) for piece in reversed(pieces) if len(piece)]
    while waiting:
        now: list[memoryview] = []
        room = _MOST_BYTES
        while waiting and room and len(now) < _MOST_PIECES:
            piece = waiting.pop()
            if len(piece) > room:
                waiting.append(piece[room:])
                piece = piece[:room]
            now.append(piece)
            room -= len(piece)
        written = os.pwritev(descriptor, now, at)
        at += written
        waiting += reversed(_rest(now, written))


def _rest(pieces: list[memoryview], written: int) -> list[memoryview]:
    for index, piece in enumerate(pieces):
        if written < len(piece):
            return [piece[written:], *pieces[index + 1 :]]
        written -= len(piece)
    return []
