"""The digest behind a file's data: what is read back is what was written.

A sealed file is an HDF5 file with 56 bytes behind its end, where the library does not look: a mark, the
length of what stands before, its SHA-256. The digest is computed from the arrays in memory while they are
being written, in a second thread; hashing lets go of the interpreter lock.

A program that opens a sealed file for writing through the library cuts the seal off (the library does, at
closing), and the file is one without a seal from then on, like those that Keras writes. One that changes
bytes in place leaves the seal, which no longer fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import threading
from typing import TYPE_CHECKING

from asynccb.errors import FileRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    Buffer = bytes | memoryview

MARK = b"\x89asynccb seal\r\n\x1a"
_SEAL = struct.Struct("<16sQ32s")
SIZE = _SEAL.size

BESIDE = 2 << 20  # bytes; a smaller file is hashed before it is worth a thread
_SMALL, _SMALLEST = 2 << 20, 64 << 10  # bytes; smaller pieces than a sixteenth of the whole are gathered,
_GATHERED = 4 << 20  # so many bytes at a time
_BLOCK = 4 << 20  # bytes read at a time

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def seal(size: int, digest: bytes) -> bytes:
    """The seal of a file of ``size`` bytes."""
    return _SEAL.pack(MARK, size, digest)


@contextlib.contextmanager
def digesting(pieces: Sequence[Buffer], size: int) -> Iterator[Callable[[], bytes]]:
    """Computes the digest of ``pieces``, ``size`` bytes in all, while the block runs.

    Yields:
        A function that waits for the digest. Leaving the block waits too, so that nobody reads the pieces
        afterwards.
    """
    work = _Digest(pieces, size)
    if size < BESIDE:
        work.run()
        yield work.result
        return
    thread = threading.Thread(target=work.run, name="asynccb digest", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the process has no thread left to give, or the interpreter is ending
        work.run()
        yield work.result
        return

    def wait() -> bytes:
        thread.join()
        return work.result()

    try:
        yield wait
    except BaseException:
        work.unwanted = True
        raise
    finally:
        thread.join()


class _Digest:
    def __init__(self, pieces: Sequence[Buffer], size: int) -> None:
        self._pieces, self._size = pieces, size
        self._digest = hashlib.sha256()
        self._failed: Exception | None = None
        self.unwanted = False

    def run(self) -> None:
        try:
            for block in _blocks(self._pieces, self._size):
                if self.unwanted:
                    return
                self._digest.update(block)
        except Exception as error:  # raised where the digest is wanted
            self._failed = error

    def result(self) -> bytes:
        if self._failed is not None:
            raise self._failed
        return self._digest.digest()


def _blocks(pieces: Sequence[Buffer], size: int) -> Iterator[Buffer]:
    """The same bytes in fewer pieces: after each the interpreter lock has to be waited for.

    Where pieces are many they are gathered, in memory that is used again for the next block.
    """
    small = min(_SMALL, max(_SMALLEST, size // 16))
    room = sum(len(piece) for piece in pieces if len(piece) < small)
    gathered, at = memoryview(bytearray(min(_GATHERED, room))), 0
    for piece in pieces:
        end = at + len(piece)
        if at and (len(piece) >= small or end > len(gathered)):
            yield gathered[:at]
            at, end = 0, len(piece)
        if len(piece) >= small:
            yield piece
        else:
            gathered[at:end] = piece
            at = end
    if at:
        yield gathered[:at]


def check_seal(path: str, *, needed: bool = False) -> tuple[int, ...]:
    """Refuses a file whose seal does not fit; one without a seal passes, unless it is ``needed``. Blocks for
    as long as reading the file takes.

    Returns:
        What :func:`identity` says of the file that was checked.

    Raises:
        FileRefused: the file is damaged, or was changed in place.
        FileNotFoundError, PermissionError: as they are.
    """
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused(path, "it is a pipe or a device")
        size = status.st_size
        file.seek(max(0, size - SIZE))
        tail = file.read(SIZE)
        if len(tail) == SIZE and tail.startswith(MARK):
            _, length, digest = _SEAL.unpack(tail)
            if length != size - SIZE or _digest_of(file, length) != digest:
                raise FileRefused(
                    path,
                    "it is damaged, or another program changed it in place: its content is not the one that "
                    "was written",
                )
        elif needed:
            raise FileRefused(path, "it has no seal: it is not as it was written")
        else:
            _refuse_remains(path, file, size)
    return identity(status)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for somebody to write


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one that took its name, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_remains(path: str, file: BinaryIO, size: int) -> None:
    """A seal that was cut off, changed in its mark, or is no longer at the end."""
    file.seek(0)
    start = file.read(48)
    if not start.startswith(_SIGNATURE + b"\0") or len(start) < 48:
        return
    (end,) = struct.unpack_from("<Q", start, 40)  # of the library's data, in files of its oldest format
    if end >= size:
        return
    file.seek(end)
    if size - end <= SIZE or file.read(len(MARK)) == MARK:
        raise FileRefused(path, "it is damaged: what stands behind its data is not the seal that was written")


def _digest_of(file: BinaryIO, length: int) -> bytes:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, max(1, length))))
    file.seek(0)
    while length:
        count = file.readinto(block[: min(len(block), length)])  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(block[:count])
        length -= count
    return digest.digest()
