"""A CSV file after a crash: brought back to the bytes of a training without one, or refused."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb.callbacks.csv_logger import CSVLogger
from asynccb.callbacks.csv_rows import restore
from asynccb.callbacks.history import History
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EPOCHS: list[dict[str, Any]] = [
    {"loss": 0.5, "name": "a,b"},
    {"loss": np.float32(0.1), "name": "ünï\r\ncode"},
    {"loss": float("nan"), "name": None},
    {"loss": [1.0, 2.0], "name": "=1+1"},
]
OLDER = b"epoch,loss,name\n0,9.0,x"  # without the end of its line
LATER = b"4,0.5,lost\r\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.csv"


def equipped(log: Path, history: History, *, append: bool, resumed: Any = None) -> CSVLogger:
    logger = CSVLogger(log, append=append)
    logger.run = SimpleNamespace(history=history, resumed=resumed)
    logger.set_params({"metrics": ["loss"], "do_validation": False})
    return logger


async def train(log: Path, *, append: bool = False) -> tuple[dict[str, Any], History]:
    """The state at the end of the last epoch of :data:`EPOCHS`, and their History."""
    history = History()
    logger = equipped(log, history, append=append)
    await logger.on_train_begin()
    for epoch, logs in enumerate(EPOCHS):
        history.on_epoch_end(epoch, logs)
        await logger.on_epoch_end(epoch, logs)
    state = logger.state_dict()
    await logger.on_train_end()
    return state, history


async def resume(log: Path, state: dict[str, Any], history: History, *, append: bool = False) -> None:
    """A training that goes on from there, and has no further epoch."""
    logger = equipped(log, history, append=append, resumed=object())
    await logger.on_train_begin()
    await asyncio.to_thread(logger.load_state_dict, state)
    await logger.on_train_end()


def crashes(whole: bytes, begin: int) -> Iterator[bytes]:
    """What a crash in or behind the last write may leave of a file, from the training's first byte on."""
    for at in range(begin, len(whole) + 1):
        yield whole[:at]
        yield whole[:at] + bytes(len(whole) - at)  # the length reached the disk, the data did not
        yield whole[:at] + bytes(4096)
    for at in range(len(LATER) + 1):
        yield whole + LATER[:at]
    for start in range(begin, len(whole), 7):  # a block in the middle that was lost
        yield whole[:start] + bytes(len(whole[start : start + 7])) + whole[start + 7 :]


@pytest.mark.asyncio
@pytest.mark.parametrize("append", [False, True])
async def test_after_a_crash_at_any_byte_the_file_has_the_bytes_of_a_training_without_one(
    log: Path, append: bool
) -> None:
    if append:
        log.write_bytes(OLDER)
    state, history = await train(log, append=append)
    whole = log.read_bytes()
    begin = len(OLDER + b"\r\n") if append else 0
    assert state["begin"] == begin
    tried = 0
    for left in crashes(whole, begin):
        log.write_bytes(left)
        await resume(log, state, history, append=append)
        assert log.read_bytes() == whole, left
        tried += 1
    assert tried > 3 * len(whole[begin:])


def test_a_file_cut_back_to_its_length_alone_would_fill_with_zeros(log: Path) -> None:
    log.write_bytes(b"epoch,loss\r\n0,0")
    os.truncate(log, 20)
    assert log.read_bytes().endswith(b"\0")


@pytest.mark.asyncio
async def test_a_file_that_is_gone_is_written_anew(log: Path) -> None:
    state, history = await train(log)
    whole = log.read_bytes()
    log.unlink()
    log.parent.rmdir()
    await resume(log, state, history)
    assert log.read_bytes() == whole


@pytest.mark.asyncio
async def test_older_rows_that_are_gone_cannot_be_written_anew(log: Path) -> None:
    log.write_bytes(OLDER)
    state, history = await train(log, append=True)
    log.unlink()
    with pytest.raises(ArgumentError, match="is gone, with 25 bytes of older rows in it"):
        await resume(log, state, history, append=True)
    assert not log.exists()
    log.write_bytes(OLDER)
    with pytest.raises(ArgumentError, match="has 23 bytes, where 25 of older rows stood"):
        await resume(log, state, history, append=True)
    assert log.read_bytes() == OLDER


@pytest.mark.asyncio
async def test_rows_that_somebody_has_changed_are_refused_and_left_as_they_are(log: Path) -> None:
    state, history = await train(log)
    changed = log.read_bytes().replace(b"0,0.5,", b"0,0.4,")
    log.write_bytes(changed)
    with pytest.raises(ArgumentError, match=r"line 2 of its own is '0,0\.4,.* where '0,0\.5,") as refused:
        await resume(log, state, history)
    assert "log.csv" in str(refused.value)
    assert log.read_bytes() == changed


@pytest.mark.asyncio
async def test_a_training_that_never_went_on_leaves_the_file_alone(log: Path) -> None:
    _, history = await train(log)
    whole = log.read_bytes()
    logger = equipped(log, history, append=False, resumed=object())
    await logger.on_train_begin()
    await logger.on_train_end()
    assert log.read_bytes() == whole


@pytest.mark.asyncio
async def test_a_logger_that_the_resumed_training_did_not_have_begins_with_its_first_row(log: Path) -> None:
    logger = equipped(log, History(), append=False, resumed=object())
    await logger.on_train_begin()
    assert not log.exists()
    unopened = logger.state_dict()
    await logger.on_epoch_end(7, {"loss": 0.5})
    await logger.on_train_end()
    assert log.read_bytes() == b"epoch,loss\r\n7,0.5\r\n"
    again = equipped(log, History(), append=False, resumed=object())
    await again.on_train_begin()
    again.load_state_dict(unopened)
    await again.on_train_end()
    assert log.read_bytes() == b"epoch,loss\r\n7,0.5\r\n"


@pytest.mark.asyncio
async def test_rows_follow_behind_those_that_were_brought_back(log: Path) -> None:
    state, history = await train(log)
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    logger = equipped(log, history, append=False, resumed=object())
    await logger.on_train_begin()
    await asyncio.to_thread(logger.load_state_dict, state)
    await logger.on_epoch_end(4, {"loss": 0.5, "name": "lost"})
    await logger.on_train_end()
    assert log.read_bytes() == whole + LATER
    assert logger.state_dict()["rows"] == 5


class FillsUp:
    """A file on a disk that takes no more than so many bytes of it."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: memoryview) -> int:
        count = min(len(data), self.room - self._file.tell())
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data[:count]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.asyncio
@pytest.mark.parametrize("room", range(13, 22))
async def test_rows_that_a_full_disk_refused_are_written_with_the_next_one(log: Path, room: int) -> None:
    history = History()
    logger = equipped(log, history, append=False)
    await logger.on_train_begin()
    disk = FillsUp(logger._file, room)
    logger._file = disk
    refused = 0
    for epoch in range(4):
        if epoch == 3:
            disk.room = 1000
        history.on_epoch_end(epoch, {"loss": 0.5})
        try:
            await logger.on_epoch_end(epoch, {"loss": 0.5})
        except OSError:
            refused += 1
    assert refused
    state = logger.state_dict()
    await logger.on_train_end()
    whole = b"epoch,loss\r\n0,0.5\r\n1,0.5\r\n2,0.5\r\n3,0.5\r\n"
    assert log.read_bytes() == whole
    await resume(log, state, history)
    assert log.read_bytes() == whole


def test_after_half_a_row_that_is_taken_back_the_position_alone_would_leave_zeros(log: Path) -> None:
    with open(log, "wb", buffering=0) as file:
        file.write(b"0,0.5\r\n1,0")
        file.truncate(7)
        file.write(b"2,0.5\r\n")
    assert log.read_bytes() == b"0,0.5\r\n\0\0\x002,0.5\r\n"


@pytest.mark.asyncio
async def test_a_log_named_epoch_is_brought_back_as_it_was_written(log: Path) -> None:
    history = History()
    logger = equipped(log, history, append=False)
    await logger.on_train_begin()
    history.on_epoch_end(0, {"epoch": 40, "loss": 1.0})
    await logger.on_epoch_end(0, {"epoch": 40, "loss": 1.0})
    state = logger.state_dict()
    await logger.on_train_end()
    whole = log.read_bytes()
    log.unlink()
    await resume(log, state, history)
    assert log.read_bytes() == whole


@pytest.mark.asyncio
async def test_a_history_without_the_epochs_that_were_written_is_an_error(log: Path) -> None:
    state, _ = await train(log)
    with pytest.raises(RuntimeError, match="4 rows were written, and the History has 0 epochs"):
        await resume(log, state, History())


@pytest.mark.asyncio
async def test_sync_forces_the_rows_onto_the_disk(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    logger = equipped(log, History(), append=False)
    await logger.on_train_begin()
    await logger.on_epoch_end(0, {"loss": 0.5})
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(log.read_bytes()) or fsync(descriptor))
    assert synced == []
    await logger.sync()
    assert synced == [b"epoch,loss\r\n0,0.5\r\n"]
    await logger.on_train_end()
    await logger.sync()
    assert len(synced) == 1


def test_what_was_brought_back_is_on_the_disk_too(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(log.read_bytes()))
    log.write_bytes(b"epo")
    restore(str(log), 0, b"epoch\r\n1\r\n")
    assert synced == [b"epoch\r\n1\r\n"]
