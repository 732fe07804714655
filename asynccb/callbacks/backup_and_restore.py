"""Backups of a whole training: the same program, started again after a crash, goes on to the very same
bytes."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from asynccb.callbacks.base import Callback
from asynccb.callbacks.batch_hook import add_batch_end
from asynccb.errors import ArgumentError
from asynccb.protocols import QueueStatistics
from asynccb.storage.backups import BackupFolder
from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from asynccb.callbacks.base import SnapshotHandle

__all__ = ["BackupAndRestore"]

SaveFreq = int | Literal["epoch"] | datetime.timedelta


class _Unit(Protocol):
    """See :class:`asynccb.unit.Unit`."""

    step: int
    snapshot: SnapshotHandle

    async def complete(self) -> dict[str, Any]: ...

    def write(self, path: str, state: Mapping[str, Any]) -> None: ...


class BackupAndRestore(Callback):
    """Keeps backups in a folder, and lets a training that finds one there go on from it.

    A backup is one file, and all of a training: weights, optimizer, random streams, the place in the data,
    History, and the state of every callback at one place between two batches. ``fit`` goes on from the newest
    intact one as if it had never been interrupted: what it returns, the model, the CSV file are those of an
    uninterrupted training, byte by byte. A training that had ended returns its History at once. So the same
    program is simply started again::

        await Trainer(model, seed=1).fit(x, y, epochs=50, callbacks=[BackupAndRestore("backup")])

    A stop by ``model.stop_training`` is an end, as that of EarlyStopping: it is part of the training. One by
    ``run.stop`` or ``stop_after`` is an interruption, whoever calls it: started again, the training goes on.

    One is made before the first batch, which waits for it; then at the end of every epoch, or as
    ``save_freq`` says; and, whatever that says, where the training ends, or is stopped or cancelled (not
    where a cancel finds it in a validation, or held by a callback). No batch but the first waits for one,
    except for room for a copy of the model. While one is written, the next one that is due waits, and is then
    made of the newest state. A backup counts once every callback has its state and its files of the same
    moment on the disk; where one needs more than 60 s for that, there is a
    :class:`~asynccb.BackupIncomplete`, which ends the training as ``on_error`` says.

    The folder belongs to one training at a time; that of a killed process is taken over.

    A custom callback that must know something after the interruption answers it from ``state_dict`` and takes
    it back in ``load_state_dict``. Where a training goes on in the middle of an epoch, ``on_epoch_begin`` is
    not called again.

    Args:
        backup_dir: the folder. Created when the training starts.
        save_freq: ``"epoch"``, a number of batches, or a ``datetime.timedelta``, from one backup to the next.
        keep: backups of this training that are kept; older ones are deleted after the new one is durable.

    Attributes:
        saved: the newest backup of this training, or None.
        deferred: backups of this training that were due while one was being written.

    Raises:
        ArgumentError: ``save_freq`` or ``keep`` out of range; when the training starts, a model or data that
            cannot be resumed exactly.
        FolderBusy: when the training starts, another one has the folder.
    """

    changes_model: ClassVar[bool] = False
    told_apart_by: ClassVar[tuple[str, ...]] = ("backup_dir",)

    saved: str | None
    deferred: int
    _own: list[str]  # paths of this training's backups, those being written too
    _writing: set[str]

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: SaveFreq = "epoch",
        *,
        keep: int = 2,
    ) -> None:
        self.backup_dir = os.path.abspath(os.fspath(backup_dir))
        self.save_freq = _checked(save_freq)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ArgumentError("keep", keep, "a number of backups, at least 1")
        self.keep = keep
        self._writer = SerialExecutor("asynccb backup", background=True)
        self._lease: _Lease | None = None
        if save_freq != "epoch":
            add_batch_end(self, self._count_batch)
        self._reset()

    def on_train_begin(self, logs: Any = None) -> None:
        self._reset()
        if self._lease is None:
            self.take_folder(getattr(self.run, "name", "") or "a training")
        if self.run is not None:
            self._due = self.run.resumed is None
            self.run.expect_copies()

    def take_folder(self, owner: str) -> None:
        """Takes the folder for this training: before anything is read in it, and before any hook, for hooks
        open files that another training may be writing. Blocks.

        Raises:
            FolderBusy: another one has it.
        """
        self.leave_folder()  # a training whose loop was closed under it left this
        folder = BackupFolder(self.backup_dir)
        folder.lock(owner)
        self._lease = _Lease(folder)

    def leave_folder(self) -> None:
        """Gives the folder back where the training does not even begin. Blocks."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.save_freq == "epoch":
            self._become_due()

    def on_train_end(self, logs: Any = None) -> Coroutine[Any, Any, None] | None:
        lease, self._lease = self._lease, None
        return None if lease is None else self._end(lease)

    def state_dict(self) -> dict[str, Any]:
        return {"folder": self.backup_dir, "own": [os.path.basename(path) for path in list(self._own)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["folder"] == self.backup_dir:  # in another one the same names may be somebody else's
            self._own = [os.path.join(self.backup_dir, os.path.basename(name)) for name in state["own"]]
        resumed = os.path.abspath(self.run.resumed.path)
        if os.path.dirname(resumed) == self.backup_dir and resumed not in self._own:
            self._own.append(resumed)

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        # The last of a training does not wait for the one before it.
        return {"backups": QueueStatistics(2, "skip", len(self._writing), self.deferred)}

    def wants_unit(self, *, last: bool) -> bool:
        """Whether a unit is to be cut now; ``last``: no further one comes."""
        return self._lease is not None and (last or (self._due and not self._writing))

    def take_unit(self, unit: _Unit) -> Coroutine[Any, Any, None]:
        """What writes a unit that was cut."""
        assert self._lease is not None
        self._due, self._batches, self._made_at = False, 0, time.monotonic()
        path = self._lease.folder.next()
        self._own.append(path)
        self._writing.add(path)
        return self._write(unit, path, self._lease)

    def _count_batch(self, batch: int, logs: Any = None) -> None:
        self._batches += 1
        if isinstance(self.save_freq, datetime.timedelta):
            due = time.monotonic() - self._made_at >= self.save_freq.total_seconds()
        else:
            due = self._batches >= int(self.save_freq)
        if due and not self._due:
            self._become_due()
            self._ask()

    def _become_due(self) -> None:
        self._due = True
        self.deferred += bool(self._writing)

    def _ask(self) -> None:
        if self.run is not None:
            self.run.want_unit()

    async def _write(self, unit: _Unit, path: str, lease: _Lease) -> None:
        try:
            state = await self._complete(unit)
            writing = self._writer.submit(self._write_now, unit, state, path, lease)
            # Released by the writer and not here: when this task is cancelled, its thread may still read the
            # arrays.
            writing.add_done_callback(lambda _: unit.snapshot.release())
            await asyncio.wrap_future(writing)
            self.saved = path
            if self.run is not None:
                self.run.announce_saved(path, unit.snapshot.epoch)
        finally:
            self._writing.discard(path)
            if self._due:
                self._ask()

    async def _complete(self, unit: _Unit) -> dict[str, Any]:
        try:
            return await unit.complete()
        except BaseException:
            unit.snapshot.release()
            raise

    def _write_now(self, unit: _Unit, state: Mapping[str, Any], path: str, lease: _Lease) -> None:
        try:
            unit.write(path, state)
        except BaseException:
            self._own.remove(path)
            raise
        # Only now that the new one is durable. The list is shared with the training thread, which appends to
        # it: each of these steps is atomic by itself.
        durable = self._own[: self._own.index(path) + 1]
        left = lease.folder.prune(durable, self.keep)
        for path in durable:
            if path not in left:
                self._own.remove(path)

    async def _end(self, lease: _Lease) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, lease.end)

    def _reset(self) -> None:
        self.saved = None
        self.deferred = 0
        self._own = []
        self._writing = set()
        self._due = False
        self._batches = 0
        self._made_at = time.monotonic()


class _Lease:
    """The hold on a folder, shared by the callback and its writes under way: the last one lets go, also where
    a coroutine is thrown away before it began."""

    def __init__(self, folder: BackupFolder) -> None:
        self.folder = folder
        self._ended = False

    def end(self) -> None:
        """Gives the folder back. Blocks."""
        self.folder.unlock()
        self._ended = True

    def __del__(self) -> None:
        if self._ended:
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            # At once: a thread that is started while the interpreter ends never runs, and is waited for.
            self.folder.unlock()
            return
        # The loop is not to wait for the disk. An executor of its own: the collector may have come here from
        # within any lock, also that of the writer.
        unlocking = SerialExecutor("asynccb backup").submit(self.folder.unlock)
        if unlocking.done() and unlocking.exception() is not None:  # no thread can be had
            self.folder.unlock()


def _checked(save_freq: object) -> SaveFreq:
    if isinstance(save_freq, datetime.timedelta) and save_freq > datetime.timedelta(0):
        return save_freq
    if isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq >= 1:
        return save_freq
    if save_freq == "epoch":
        return "epoch"
    raise ArgumentError(
        "save_freq", save_freq, 'a number of batches from 1 on, "epoch", or a positive datetime.timedelta'
    )
