"""The saves of a checkpoint beside the states that were handed over: a file is always one of them, whole, and
when nothing is left to do it is the newest."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asynccb import CheckpointWriteError
from asynccb.callbacks import ModelCheckpoint
from asynccb.models import adapt
from asynccb.storage.serial import SerialExecutor
from asynccb.testing import ScriptedModel
from asynccb.training.control import Limits
from asynccb.training.snapshot import POOLED, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

FAST = settings(
    max_examples=300, stateful_step_count=50, suppress_health_check=list(HealthCheck), deadline=None
)
LONG = settings(FAST, max_examples=3000, stateful_step_count=100, derandomize=False, print_blob=True)
FIND = settings(FAST, phases=[Phase.generate])  # whether a fault is found, not by how few steps


class Writer:
    """Stands for the writer's thread: a job begins and ends when the test says so."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.begun: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.threads = 1
        self.errors: list[Exception] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: function(*arguments)))
        return future

    def begin(self) -> None:
        while len(self.begun) < self.threads and self.jobs:
            future, job = self.jobs.popleft()
            if future.set_running_or_notify_cancel():
                self.begun.append((future, job))

    def end(self) -> None:
        if self.begun:
            future, job = self.begun.pop()
            try:
                future.set_result(job())
            except CheckpointWriteError as error:
                future.set_exception(error)
            except Exception as error:
                self.errors.append(error)
                future.set_exception(error)


class Control:
    """Waits by letting everybody else go on."""

    limits = Limits()
    waits: dict[str, int]

    def __init__(self, machine: Checkpoint) -> None:
        self.machine = machine
        self.waits = {}

    def wait(self, reason: str, predicate: Callable[[], bool], **_: Any) -> bool:
        self.machine.go_on_until(predicate)
        return True

    def nudge(self) -> None: ...


class Checkpoint(RuleBasedStateMachine):
    """A ModelCheckpoint with the mailbox, the consumer, the pool and the writer of a run."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda descriptor: None)
        replace = os.replace

        def replace_or_fail(source: Any, target: Any) -> None:
            if self.fails:
                raise OSError(28, "No space left on device")
            replace(source, target)

        self.patch.setattr(os, "replace", replace_or_fail)
        self.fails = False
        self.model = ScriptedModel()
        self.snapshots = Snapshots(adapt(self.model), Control(self), "checkpoint")  # type: ignore[arg-type]
        self.checkpoint = ModelCheckpoint(f"{self.folder.name}/{{slot}}")
        self.checkpoint._writer = self.writer = Writer()  # type: ignore[assignment]
        self.checkpoint.run = self
        self.checkpoint.set_params({"metrics": ["loss"], "log_keys_open": True})
        begun = self.checkpoint.on_train_begin()
        begun.close()
        self.mailbox: deque[Coroutine[Any, Any, None]] = deque()
        self.running: asyncio.Task[None] | None = None
        self.number = self.superseded = 0
        self.handed: dict[str, list[int]] = {"a": [], "b": []}
        self.newest_counts = dict.fromkeys(self.handed, True)  # nothing was cancelled or failed since
        self.seen = dict.fromkeys(self.handed, 0)

    # What a checkpoint asks of its run ----------------------------------------------------------------------

    def expect_copies(self) -> None: ...

    def check_path(self, path: str, *, weights_only: bool) -> None: ...

    def room_for_copy(self, callback: object) -> bool:
        return self.snapshots.has_room()

    def snapshot_now(self, callback: object, *, pooled: bool) -> Any:
        return self.snapshots.take(self.number, self.number, pooled=pooled)

    def announce_saved(self, path: str, epoch: int) -> None:
        assert self.content(Path(path).name) > epoch, "announced before it was there"

    def direction(self, metric: str) -> str | None:
        return None

    # What happens -------------------------------------------------------------------------------------------

    def step(self) -> None:
        for _ in range(3):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        if self.running is not None and self.running.done():
            if not self.running.cancelled():
                error = self.running.exception()
                assert error is None or isinstance(error, CheckpointWriteError)
            self.running = None

    def go_on_until(self, predicate: Callable[[], bool]) -> None:
        for _ in range(20):
            if predicate():
                return
            self.consume()
            self.begin_to_write()
            self.write()
        raise AssertionError("the training would wait for ever")

    @rule(slot=st.sampled_from("aab"))
    def end_an_epoch(self, slot: str) -> None:
        self.number += 1
        self.model.weights.fill(self.number)
        writing = self.checkpoint.on_epoch_end(self.number - 1, {"loss": 1.0, "slot": slot})
        self.handed[slot].append(self.number)
        self.newest_counts[slot] = True
        if writing is None:
            self.superseded += 1
            return
        self.mailbox.append(writing)
        if len(self.mailbox) >= self.checkpoint.mailbox_size:
            self.go_on_until(lambda: len(self.mailbox) <= self.checkpoint.mailbox_size // 2)

    @rule()
    def consume(self) -> None:
        if self.running is None and self.mailbox:
            self.running = self.loop.create_task(self.mailbox.popleft())
            self.step()

    @rule()
    def begin_to_write(self) -> None:
        self.writer.begin()

    @rule()
    def write(self) -> None:
        self.writer.end()
        self.step()

    @precondition(lambda self: self.writer.begun)
    @rule()
    def fail_to_write(self) -> None:
        self.fails = True
        self.newest_counts = dict.fromkeys(self.handed, False)
        self.write()
        self.fails = False

    @precondition(lambda self: self.running is not None)
    @rule()
    def cancel(self) -> None:
        assert self.running is not None
        self.newest_counts = dict.fromkeys(self.handed, False)
        self.running.cancel()
        self.step()

    @precondition(lambda self: self.mailbox)
    @rule()
    def throw_away_what_waits(self) -> None:
        self.newest_counts = dict.fromkeys(self.handed, False)
        while self.mailbox:
            self.mailbox.popleft().close()

    # What holds always --------------------------------------------------------------------------------------

    def content(self, slot: str) -> int:
        """The number that a file holds; 0 where there is none."""
        path = Path(self.folder.name, slot)
        if not path.exists():
            return 0
        numbers = np.fromfile(path)
        assert len(numbers) == 16, "a part of a file"
        assert len(set(numbers)) == 1, "a torn file"
        return int(numbers[0])

    @invariant()
    def a_file_is_a_state_handed_over_and_never_older_than_it_was(self) -> None:
        for slot, handed in getattr(self, "handed", {}).items():
            content = self.content(slot)
            assert content == 0 or content in handed
            assert content >= self.seen[slot], "an older state has landed over a newer one"
            self.seen[slot] = content

    @invariant()
    def nothing_else_is_in_the_folder(self) -> None:
        if hasattr(self, "folder"):
            assert set(os.listdir(self.folder.name)) <= set(self.handed)

    @invariant()
    def superseded_saves_are_counted(self) -> None:
        if hasattr(self, "checkpoint"):
            assert self.checkpoint.superseded == self.superseded

    @invariant()
    def nobody_writes_from_memory_that_was_given_back(self) -> None:
        if hasattr(self, "writer"):
            assert self.writer.errors == []

    @invariant()
    def there_are_two_copies_at_most(self) -> None:
        if hasattr(self, "snapshots"):
            assert self.snapshots.statistics().waiting <= POOLED

    @invariant()
    def when_nothing_is_left_to_do_the_newest_is_there(self) -> None:
        if not hasattr(self, "loop") or self.running or self.mailbox or self.writer.begun or self.writer.jobs:
            return
        for slot, handed in self.handed.items():
            if handed and self.newest_counts[slot]:
                assert self.content(slot) == handed[-1]
        assert self.snapshots.has_room()  # fetches what was dropped without a word
        assert self.snapshots.statistics().waiting == 0, "a copy was not released"

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            for _ in range(20):
                self.consume()
                self.begin_to_write()
                self.write()
            assert not self.running
            assert not self.mailbox
            self.when_nothing_is_left_to_do_the_newest_is_there()
        finally:
            while self.mailbox:
                self.mailbox.pop().close()
            if self.running is not None:
                self.running.cancel()
                self.step()
            self.patch.undo()
            self.loop.close()
            self.folder.cleanup()


Checkpoint.TestCase.settings = FAST
TestCheckpoint = Checkpoint.TestCase


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_checkpoint_beside_its_states_for_long() -> None:
    run_state_machine_as_test(Checkpoint, settings=LONG)


async def forgets_to_release(checkpoint: ModelCheckpoint, save: Any) -> None:
    await asyncio.wrap_future(checkpoint._writer.submit(checkpoint._write_now, save, save.snapshot))
    kept.append(save.snapshot)


async def releases_too_early(checkpoint: ModelCheckpoint, save: Any) -> None:
    snapshot, checkpoint._waiting = save.snapshot, None
    writing = checkpoint._writer.submit(checkpoint._write_now, save, snapshot)
    try:
        await asyncio.wrap_future(writing)
    finally:
        snapshot.release()  # the thread may still read it


kept: list[Any] = []


@pytest.mark.parametrize(
    "naive",
    [
        forgets_to_release,
        releases_too_early,
    ],
)
def test_a_checkpoint_that_breaks_its_law_is_found(naive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls."""
    monkeypatch.setattr(ModelCheckpoint, "_write", naive)
    with pytest.raises((AssertionError, RuntimeError, ExceptionGroup)):
        run_state_machine_as_test(Checkpoint, settings=FIND)
    kept.clear()


def test_what_a_second_writer_still_writes_of_a_cancelled_save_would_land_over_a_newer_one() -> None:
    """Negative control of the one thread."""
    machine = Checkpoint()
    machine.start()
    machine.writer.threads = 2
    try:
        for _ in range(2):
            machine.end_an_epoch("a")
            machine.consume()
            machine.begin_to_write()
            machine.cancel()
        machine.write()
        machine.a_file_is_a_state_handed_over_and_never_older_than_it_was()
        machine.write()
        with pytest.raises(AssertionError, match="an older state has landed over a newer one"):
            machine.a_file_is_a_state_handed_over_and_never_older_than_it_was()
    finally:
        machine.teardown()


def test_an_executor_that_runs_jobs_in_order_is_what_a_checkpoint_has() -> None:
    assert isinstance(ModelCheckpoint("a")._writer, SerialExecutor)
