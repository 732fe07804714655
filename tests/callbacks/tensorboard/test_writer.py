"""One event file: what is on disk when, names that never meet, disks that refuse or hang, a kill."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asynccb.callbacks.tensorboard import writer as writer_room
from asynccb.callbacks.tensorboard.records import opening, scalars
from asynccb.callbacks.tensorboard.writer import EventFile, EventWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERYTHING = dict.fromkeys(("scalars", "histograms", "images", "graph"), 0)


def read(path: object) -> EventAccumulator:
    accumulator = EventAccumulator(str(path), size_guidance=EVERYTHING)
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


# ---------------------------------------------------------------- names


def test_control_two_plain_writers_in_one_second_lose_the_points_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX import SummaryWriter

    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    writers = [SummaryWriter(str(tmp_path)) for _ in range(2)]
    for number, writer in enumerate(writers):
        for step in range(50):
            writer.add_scalar(f"loss/{number}", 1.0, step)
        writer.close()
    assert len(os.listdir(tmp_path)) == 1
    assert len(read(tmp_path).Tags()["scalars"]) < 2


def test_a_name_that_another_container_has_taken_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    first = EventFile(str(tmp_path), "run")
    monkeypatch.setattr(writer_room, "_counter", iter([int(first.path.split(".")[-2]), 777]))
    second = EventFile(str(tmp_path), "run")
    first.close()
    second.close()
    assert second.path != first.path
    assert second.path.endswith(".777.run")


# ---------------------------------------------------------------- a disk that refuses


FULL_DISK = """
import asyncio, json, resource, signal, sys, warnings
from types import SimpleNamespace
from asynccb.callbacks.tensorboard import TensorBoard

async def main(folder):
    callback = TensorBoard(folder)
    callback.run = SimpleNamespace(name="run")
    errors, done, names = [], 0, [f"a metric with a long name {n}" for n in range(60)]
    await callback.on_train_begin({})
    for epoch in range(50):
        try:
            await callback.on_epoch_end(epoch, dict.fromkeys(names, float(epoch)))
            done += not errors
        except OSError as error:
            errors.append([error.errno, error.filename])
    await callback.on_train_end({})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    accumulator = EventAccumulator(callback.path, size_guidance={"scalars": 0})
    accumulator.Reload()
    print(json.dumps({
        "errors": errors, "done": done, "dropped": callback.dropped, "path": callback.path,
        "steps": [event.step for event in accumulator.Scalars("a metric with a long name 59")],
    }))
"""

LIMITED = """
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
asyncio.run(main(sys.argv[1]))
"""

PLAIN_WRITER = """
import os, sys, threading
from tensorboardX import SummaryWriter
writer, returned = SummaryWriter(sys.argv[1], flush_secs=0), []
threading.excepthook = lambda args: None
def add():
    for step in range(2000):
        writer.add_text("text", "x" * 1000, step)
        returned.append(step)
thread = threading.Thread(target=add, daemon=True)
thread.start()
thread.join(3)
print("hangs" if thread.is_alive() else "ended", len(returned), flush=True)
os._exit(0)
"""


def run_python(source: str, *args: object, before: tuple[str, ...] = ()) -> str:
    command = [*before, sys.executable, "-W", "ignore", "-c", textwrap.dedent(source), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_failed_once_and_kept_what_was_written(output: str, code: int) -> None:
    result = json.loads(output)
    assert result["errors"] == [[code, result["path"]]]
    assert 0 < result["done"] < 49
    assert result["dropped"] == 49 - result["done"]
    assert result["steps"] == list(range(result["done"]))


def test_a_file_that_may_not_grow_is_one_error_and_whole_records(tmp_path: Path) -> None:
    output = run_python(FULL_DISK + LIMITED, tmp_path)
    assert_failed_once_and_kept_what_was_written(output, errno.EFBIG)


TINY_DISK = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"')


def with_tiny_disk(folder: Path) -> tuple[str, ...]:
    """What to put before a command that is to find a full disk of 64 KiB at ``folder``."""
    before = (*TINY_DISK, str(folder))
    try:
        allowed = subprocess.run([*before, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a file system needs rights that are not given here")
    return before


def test_a_full_disk_is_one_error_and_whole_records(tmp_path: Path) -> None:
    before = with_tiny_disk(tmp_path)
    output = run_python(FULL_DISK + "asyncio.run(main(sys.argv[1]))", tmp_path, before=before)
    assert_failed_once_and_kept_what_was_written(output, errno.ENOSPC)


def test_control_on_a_full_disk_the_plain_writer_hangs(tmp_path: Path) -> None:
    state, returned = run_python(PLAIN_WRITER, tmp_path, before=with_tiny_disk(tmp_path)).split()
    assert state == "hangs"
    assert int(returned) < 2000


class SleepingFile:
    """An event file on a disk that does not answer until it is told to."""

    path = "sleeping"

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.closed = threading.Event()

    def append(self, events: Any) -> None:
        self.answer.wait()
        raise OSError(errno.EIO, "too late for anybody to hear")

    def close(self) -> None:
        self.closed.set()


@pytest.mark.asyncio
async def test_a_disk_that_does_not_answer_is_one_error_and_holds_nobody() -> None:
    file = SleepingFile()
    writer = EventWriter(file, deadline=0.01)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match=r"sleeping: no answer from the disk for 0\.01 s"):
        await writer.write(list)
    await writer.write(list)
    await writer.write(list)
    await writer.close()
    assert writer.dropped == 2
    assert not file.closed.is_set()
    file.answer.set()  # the abandoned thread closes the file when it is free at last
    assert await asyncio.to_thread(file.closed.wait, 10)


@pytest.mark.asyncio
async def test_a_cancelled_write_leaves_nothing_on_the_loop() -> None:
    file = SleepingFile()
    writer = EventWriter(file)  # type: ignore[arg-type]
    task = asyncio.ensure_future(writer.write(list))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    file.answer.set()
    await writer.close()
    assert file.closed.is_set()


# ---------------------------------------------------------------- two threads write


@pytest.fixture
def file(tmp_path: Path) -> Iterator[EventFile]:
    made = EventFile(str(tmp_path), "run")
    yield made
    made.close()


@pytest.mark.asyncio
async def test_a_thread_beside_the_loop_writes_too(file: EventFile) -> None:
    writer = EventWriter(file)
    await writer.write(lambda: [opening(1.0)])
    await asyncio.to_thread(writer.write_blocking, [scalars(1, 1.0, {"loss": 2.0})])
    assert points(read(file.path), "loss") == [(1, 2.0)]
    await writer.close()


@pytest.mark.asyncio
async def test_the_first_failure_is_raised_whoever_writes_and_the_rest_are_counted(
    file: EventFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = EventWriter(file)
    with monkeypatch.context() as patched:
        patched.setattr(EventFile, "append", refuses)
        with pytest.raises(OSError, match="No space left"):
            await asyncio.to_thread(writer.write_blocking, [b""])
        await writer.write(list)
        await asyncio.to_thread(writer.write_blocking, [b""])
    assert (writer.failed, writer.dropped) == (True, 2)


@pytest.mark.asyncio
async def test_of_two_writes_that_fail_together_one_raises() -> None:
    file = SleepingFile()
    writer = EventWriter(file)  # type: ignore[arg-type]
    beside = asyncio.ensure_future(asyncio.to_thread(writer.write_blocking, [b""]))
    on_loop = asyncio.ensure_future(writer.write(list))
    await asyncio.sleep(0)
    file.answer.set()
    ends = await asyncio.gather(beside, on_loop, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["NoneType", "OSError"]
    assert writer.dropped == 1


@pytest.mark.asyncio
async def test_a_thread_that_writes_waits_no_longer_than_the_deadline() -> None:
    file = SleepingFile()
    writer = EventWriter(file, deadline=0.01)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match=r"no answer from the disk for 0\.01 s"):
        await asyncio.to_thread(writer.write_blocking, [b""])
    file.answer.set()
    assert await asyncio.to_thread(file.closed.wait, 10)


# ---------------------------------------------------------------- onto the disk


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    monkeypatch.setattr("asynccb.callbacks.tensorboard.writer.os.fsync", done.append)
    return done


def test_what_is_written_is_forced_onto_the_disk_once_a_second_and_at_the_end(
    tmp_path: Path, syncs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("asynccb.callbacks.tensorboard.writer.time.monotonic", lambda: clock.now)
    file, counts = EventFile(str(tmp_path), "run"), []
    for seconds in (0.0, 0.5, 0.4, 0.2, 0.1):
        clock.now += seconds
        file.append([opening(1.0)])
        counts.append(len(syncs))
    file.close()
    file.close()
    # The first time the folder too, which has the name.
    assert (counts, len(syncs)) == ([2, 2, 2, 3, 3], 4)


def test_its_name_and_those_of_new_folders_are_made_durable_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that a power cut may leave a backup whose event file is gone."""
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file = EventFile(str(tmp_path / "new" / "logs"), "run")
    file.append([opening(1.0)])
    file.close()
    durable = [tmp_path, tmp_path / "new", file.path, tmp_path / "new" / "logs", file.path]
    assert synced == [os.stat(path).st_ino for path in durable]


def test_a_disk_that_refuses_at_the_end_is_an_error_and_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = EventFile(str(tmp_path), "run")
    monkeypatch.setattr("asynccb.callbacks.tensorboard.writer.os.fsync", refuses)
    with pytest.raises(OSError, match="No space left") as caught:
        file.close()
    assert caught.value.filename == file.path
    file.close()


def refuses(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- kill -9

ACKNOWLEDGED = """
import asyncio, os, signal, sys
from types import SimpleNamespace
from asynccb.callbacks.tensorboard import TensorBoard

async def main():
    callback = TensorBoard(sys.argv[1], update_freq="batch")
    callback.run = SimpleNamespace(name="run")
    await callback.on_train_begin({})
    for batch in range(1000):
        later = callback.on_train_batch_end(batch, {"loss": 1.0})
        if later is not None:
            await later
    await callback.on_epoch_end(0, {"loss": 0.5})
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

FLUSHED = """
import itertools, os, signal, sys, threading
from tensorboardX import SummaryWriter
writer = SummaryWriter(sys.argv[1])
events = writer.file_writer.event_writer._ev_writer
write, written = events.write_event, itertools.count()

def slow(event):  # the disk stands still for a moment, as its thread does on a busy machine
    if next(written) == 995:
        threading.Event().wait()
    write(event)

events.write_event = slow
for step in range(1000):
    writer.add_scalar("batch_loss", 1.0, step)
writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(source: str, folder: Path) -> EventAccumulator:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source, str(folder)], timeout=50, check=False
    )
    assert done.returncode == -signal.SIGKILL
    return read(folder)


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    found = killed(ACKNOWLEDGED, tmp_path)
    assert len(points(found, "batch_loss")) == 1000
    assert points(found, "loss") == [(0, 0.5)]


def test_control_what_the_plain_writer_flushed_does_not(tmp_path: Path) -> None:
    assert len(points(killed(FLUSHED, tmp_path), "batch_loss")) < 1000
