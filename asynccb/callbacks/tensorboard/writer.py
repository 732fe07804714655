"""One event file: who writes it, what is on disk when, and what happens when the disk fails or hangs.

tensorboardX is not used: it puts a queue of ten and a thread between ``add_scalar`` and the file, so
that a flush flushes what has arrived, not what was added, and when the thread has died of a full disk the
eleventh call blocks for ever. Here a write is one job on a daemon thread of the file's own: when it is done,
its records are the operating system's, and every second or so on the disk; when the disk refuses, the job
raises; when it does not answer, the job is abandoned after a deadline and the thread with it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import threading
import time
from concurrent.futures import wait
from typing import TYPE_CHECKING

from asynccb.callbacks.tensorboard.records import frames
from asynccb.callbacks.tensorboard.resumed import PREFIX, RESUMED, files_of
from asynccb.storage.atomic import make_folder, sync_folder
from asynccb.storage.direct import write_all
from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from io import FileIO

__all__ = ["EventFile", "EventWriter"]

DEADLINE = 60.0
"""Seconds that one write may take: the histograms of a large model on a slow disk, and then some."""
SYNC_EVERY = 1.0
"""Seconds between two times that what was written is forced onto the disk."""

_counter = itertools.count(1)
_ODD = re.compile(r"[^A-Za-z0-9_-]+")


class EventFile:
    """A new file, ``events.out.tfevents.<time>.<host>.<pid>.<counter>.<run name>``. Blocks; not for the loop.

    That of a resumed training has the name of the training's first file, and ``.resumed-000001`` behind it,
    so that readers, who go by name, come to it last whatever the clock says.

    Attributes:
        path: its own.
        root: what the name of the training's first file ends in; no other training in this folder has it.

    Args:
        folder: made where it is missing.
        run_name: the last part of the name.
        root: of the training that is resumed; None: this is a new one.

    Raises:
        OSError: the folder or the file cannot be made.
    """

    def __init__(self, folder: str, run_name: str, root: str | None = None) -> None:
        make_folder(folder)
        self._file, self.root, self.path = _create(folder, run_name, root)
        self._end = 0
        self._sync_at = 0.0
        self._name_is_durable = False

    def append(self, records: Iterable[bytes]) -> None:
        """Writes the records. They are the operating system's when this returns, and on the disk if the last
        time that they were forced there is a second past.

        Raises:
            OSError: they are not; the file ends behind the last whole record.
        """
        data = memoryview(frames(list(records)))
        try:
            write_all(self._file, data)
            if time.monotonic() >= self._sync_at:
                self._sync()
        except OSError as error:
            self._cut()
            raise OSError(error.errno, error.strerror, self.path) from error
        self._end += len(data)

    def sync(self) -> None:
        """Forces all onto the disk.

        Raises:
            OSError: the disk refused.
        """
        try:
            self._sync()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def close(self) -> None:
        """Forces all onto the disk. Legal any number of times.

        Raises:
            OSError: the disk refused.
        """
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._file.close()

    def let_go(self) -> None:
        """Closes without forcing anything onto the disk."""
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        if not self._name_is_durable:
            sync_folder(os.path.dirname(self.path))
            self._name_is_durable = True
        self._sync_at = time.monotonic() + SYNC_EVERY

    def _cut(self) -> None:
        # Half a record at the end makes some readers wait for the rest for ever.
        try:
            self._file.truncate(self._end)
        except OSError:
            pass  # the disk is failing already, and the error that matters is under way


class EventWriter:
    """Writes one :class:`EventFile` from the event loop, and from threads beside it.

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
        self._lock = threading.Lock()  # around the two above: the loop and a thread beside it write
        self._executor = SerialExecutor("asynccb tensorboard")

    async def write(self, build: Callable[[], Iterable[bytes]]) -> None:
        """Writes what ``build`` answers; ``build`` is called on the writer's thread.

        Order: that of the calls. The records are the operating system's when this returns, so that a kill
        loses none; they are forced onto the disk with the first write after a second, and at the end. Never
        blocks the loop.

        Raises:
            OSError: the disk refused (a TimeoutError: it did not answer). Raised once; later writes are
                dropped and counted.
        """
        if not self._drops():
            await self._do(lambda: self._file.append(build()))

    def write_blocking(self, records: list[bytes]) -> None:
        """:meth:`write` for a thread that may wait."""
        if self._drops():
            return
        future = self._executor.submit(self._file.append, records)
        try:
            self._take(future.result, not wait((future,), self._deadline).not_done)
        finally:
            future.cancel()

    async def sync(self) -> None:
        """What was written is on the disk when this returns. After a failure there is nothing to do.

        Raises:
            OSError: as :meth:`write`.
        """
        if not self.failed:
            await self._do(self._file.sync)

    async def close(self) -> None:
        """Closes the file. After a failure nothing is left to do."""
        if self.failed:
            return
        try:
            await self._do(self._file.close)
        except asyncio.CancelledError:
            # By a runner that shuts down, before the thread had begun with it; once more is harmless.
            self._executor.submit(self._file.close)
            raise
        except RuntimeError:  # no thread to be had
            self._file.let_go()
            raise

    async def _do(self, job: Callable[[], None]) -> None:
        on_loop = asyncio.wrap_future(self._executor.submit(job))
        try:
            done, _ = await asyncio.wait({on_loop}, timeout=self._deadline)
            self._take(on_loop.result, bool(done))
        finally:
            on_loop.cancel()  # abandoned: let nobody hear of its end

    def _take(self, result: Callable[[], None], done: bool) -> None:
        try:
            if not done:
                raise TimeoutError(
                    f"{self.path}: no answer from the disk for {self._deadline:g} s; the file gets no more"
                )
            result()
        except OSError:
            if self._fails_first():
                # Behind the abandoned job, if it ever ends: the thread closes what nobody waits for any more.
                self._executor.submit(self._file.close)
                raise

    def _drops(self) -> bool:
        with self._lock:
            self.dropped += self.failed
            return self.failed

    def _fails_first(self) -> bool:
        """Whether this failure is the one to be raised; of two at the same time, the other is a drop."""
        with self._lock:
            first, self.failed = not self.failed, True
            self.dropped += not first
            return first


def _create(folder: str, run_name: str, root: str | None) -> tuple[FileIO, str, str]:
    """A file, what the name of the training's first one ends in, and its path.

    It is opened with "x": two containers may share host name, process id and folder, and neither may truncate
    the other's file.
    """
    number = max(0, len(files_of(folder, root)) - 1) if root else 0
    prefix = f"{int(time.time())}.{_part(socket.gethostname())}.{os.getpid()}"
    while True:
        if root is None:
            first = ".".join(filter(None, (prefix, str(next(_counter)), _part(run_name))))
            path = os.path.join(folder, PREFIX + first)
        else:
            number += 1
            first, path = root, os.path.join(folder, f"{PREFIX}{root}{RESUMED}{number:06d}")
        try:
            return open(path, "xb", buffering=0), first, path
        except FileExistsError:
            continue


def _part(name: str) -> str:
    return _ODD.sub("_", name)[:64]
