"""One event file: who writes it, what is on disk when, and what happens when the disk fails or hangs.

tensorboardX gives the records' shapes and their checksum. Its writer is not used: it puts a queue of ten and
a thread between ``add_scalar`` and the file, so that a flush flushes what has arrived, not what was added,
and when the thread has died of a full disk the eleventh call blocks for ever. Here a write is one job on a
daemon thread of the file's own: when it is done, its records are on the disk; when the disk refuses, the job
raises; when it does not answer, the job is abandoned after a deadline and the thread with it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["EventFile", "EventWriter"]

DEADLINE = 60.0
"""Seconds that one write may take: the histograms of a large model on a slow disk, and then some."""

_counter = itertools.count(1)
_ODD = re.compile(r"[^A-Za-z0-9_-]+")


class EventFile:
    """A new file, ``events.out.tfevents.<time>.<host>.<pid>.<counter>.<run name>``. Blocks; not for the loop.

    Args:
        folder: made where it is missing.
        run_name: the last part of the name.

    Raises:
        OSError: the folder or the file cannot be made.
    """

    def __init__(self, folder: str, run_name: str) -> None:
        os.makedirs(folder, exist_ok=True)
        parts = (int(time.time()), _part(socket.gethostname()), os.getpid())
        prefix = "events.out.tfevents." + ".".join(map(str, parts))
        suffix = _part(run_name)
        while True:
            name = f"{prefix}.{next(_counter)}" + (f".{suffix}" if suffix else "")
            self.path = os.path.join(folder, name)
            try:
                # "x": two containers may share host name, process id and folder, and neither may truncate the
                # other's file.
                self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115  kept open for the whole training
                break
            except FileExistsError:
                continue
        self._end = 0

    def append(self, events: Iterable[Any]) -> None:
        """Writes the records; they are on the disk when this returns.

        Raises:
            OSError: they are not; the file ends behind the last whole record.
        """
        data = memoryview(b"".join(_frame(event.SerializeToString()) for event in events))
        try:
            left = data
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._cut()
            raise OSError(error.errno, error.strerror, self.path) from error
        self._end += len(data)

    def close(self) -> None:
        """Legal any number of times."""
        self._file.close()

    def _cut(self) -> None:
        # Half a record at the end makes some readers wait for the rest for ever.
        try:
            self._file.truncate(self._end)
        except OSError:
            pass  # the disk is failing already, and the error that matters is under way


class EventWriter:
    """Writes one :class:`EventFile` from the event loop.

    Attributes:
        path: the file.
        failed: nothing is written any more.
        dropped: writes that were asked for after the first failure, and not done.

    Args:
        file: owned from now on.
        deadline: seconds that one write may take.
    """

    def __init__(self, file: EventFile, deadline: float = DEADLINE) -> None:
        self.path = file.path
        self.dropped = 0
        self._file = file
        self._deadline = deadline
        self.failed = False
        self._executor = SerialExecutor("asynccb tensorboard")

    async def write(self, build: Callable[[], Iterable[Any]]) -> None:
        """Writes what ``build`` answers; ``build`` is called on the writer's thread.

        Order: that of the calls. The records are on the disk when this returns. Never blocks the loop.

        Raises:
            OSError: the disk refused (a TimeoutError: it did not answer). Raised once; later writes are
                dropped and counted.
        """
        if self.failed:
            self.dropped += 1
            return
        await self._do(lambda: self._file.append(build()))

    async def close(self) -> None:
        """Closes the file. After a failure nothing is left to do."""
        if not self.failed:
            await self._do(self._file.close)

    async def _do(self, job: Callable[[], None]) -> None:
        future = asyncio.wrap_future(self._executor.submit(job))
        try:
            done, _ = await asyncio.wait({future}, timeout=self._deadline)
            if not done:
                raise TimeoutError(
                    f"{self.path}: no answer from the disk for {self._deadline:g} s; the file gets no more"
                )
            future.result()
        except OSError:
            self.failed = True
            # Behind the abandoned job, if it ever ends: the thread closes what nobody waits for any more.
            self._executor.submit(self._file.close)
            raise
        finally:
            future.cancel()  # abandoned: let nobody hear of its end


def _frame(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checksums), data, next(checksums)))


def _part(name: str) -> str:
    return _ODD.sub("_", name)[:64]
