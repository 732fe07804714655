"""Writing a file from pieces of memory with few system calls, each without the interpreter lock."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from asynccb.storage.seal import BESIDE, SIZE, digesting, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from io import FileIO

    Buffer = bytes | memoryview

_MOST_PIECES = 1024  # of one call; every system allows as many
_MOST_BYTES = 1 << 30  # of one call; some systems count in 32 bits
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NOT_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems that cannot allocate ahead


def write_sealed(path: str, pieces: Sequence[Buffer], size: int, check: Callable[[], object]) -> None:
    """Writes a new file and makes it durable. Blocks. Nothing of the order of ``size`` is allocated.

    Args:
        path: its name.
        pieces: its content, ``size`` bytes in all, in order. A seal is added.
        size: see above.
        check: called when everything is written and before it is made durable.
    """
    descriptor = os.open(path, _NEW_FILE, 0o666)
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


def write_all(file: FileIO, data: Buffer) -> None:
    """Writes all of ``data`` where the file stands: a disk may take a part at a time. Blocks.

    Raises:
        OSError: the disk refused, or took nothing.
    """
    left = memoryview(data)
    while left:
        written = file.write(left)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        left = left[written:]


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
    for batch in _batches(pieces):
        waiting = batch
        while waiting:
            written = _put(descriptor, waiting, at)
            if not written and any(map(len, waiting)):
                raise OSError(errno.EIO, "nothing was written")
            at += written
            waiting = _rest(waiting, written)


def _put(descriptor: int, pieces: Sequence[Buffer], at: int) -> int:
    """One system call; returns how many bytes it has written."""
    if hasattr(os, "pwritev"):
        return os.pwritev(descriptor, pieces, at)
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.write(descriptor, next(filter(len, pieces), b""))


def _batches(pieces: Sequence[Buffer]) -> Iterator[Sequence[Buffer]]:
    """The same pieces, as many at a time as one call takes."""
    for start in range(0, len(pieces), _MOST_PIECES):
        batch = pieces[start : start + _MOST_PIECES]
        if sum(map(len, batch)) <= _MOST_BYTES:
            yield batch
            continue
        for piece in batch:
            for cut in range(0, len(piece), _MOST_BYTES):
                yield [memoryview(piece)[cut : cut + _MOST_BYTES]]


def _rest(pieces: Sequence[Buffer], written: int) -> Sequence[Buffer]:
    if written == sum(map(len, pieces)):
        return []
    first = 0
    while written >= len(pieces[first]):
        written -= len(pieces[first])
        first += 1
    return [memoryview(pieces[first])[written:], *pieces[first + 1 :]]
