"""Every queue of the package has a bound, a policy and a count in ``run.stats``: each of them is stalled for
a whole training, which goes on as its policy says."""

from __future__ import annotations

import ast
import asyncio
import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import until

import asynccb
from asynccb import Callback, Trainer
from asynccb.bus.mailbox import MailboxStatistics
from asynccb.callbacks import (
    CSVLogger,
    EarlyStopping,
    ModelCheckpoint,
    ProgbarLogger,
    RemoteMonitor,
    TensorBoard,
    progress,
    remote_monitor,
)
from asynccb.callbacks.tensorboard import callback as tensorboard
from asynccb.callbacks.tensorboard.writer import EventFile
from asynccb.events import Gap
from asynccb.protocols import QueueStatistics
from asynccb.testing import ScriptedModel, ScriptedState, settle
from asynccb.training.prefetch import AHEAD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asynccb.run import Run

EPOCHS = 40
X = np.zeros((2, 1))

# What waits in a `deque`, and what keeps it short. A new one has to be entered here, with its bound.
DEQUES = {
    ("bus/clock.py", "samples"): "ten, its own bound",
    ("bus/mailbox.py", "self.queue"): "run.stats.callbacks",
    ("training/copying.py", "self._newest"): "one, its own bound",
    ("training/prefetch.py", "self._fetched"): "run.stats.queues, source of",
    ("completed.py", "self._ended"): "one for each run that ended, until the task that iterates takes it",
    ("orchestrator.py", "self._cancelling"): "one for each queued run, each of which takes one step",
    ("training/control.py", "self._requests"): "one for each caller, who waits for the answer",
    ("training/control.py", "asked, self._requests"): "the same",
    ("training/snapshot.py", "self.orphans"): "copies of the pool, as many as it has room for",
    ("training/snapshot.py", "self._free"): "run.stats.queues, copies",
    ("callbacks/post_queue.py", "self._messages"): "run.stats.queues, posts",
    ("callbacks/progress.py", "self._lines"): "run.stats.queues, lines",
    ("storage/serial.py", "self._jobs"): "one for each caller, who waits for it; all else is counted above",
}


def test_every_deque_of_the_package_is_known_with_what_keeps_it_short() -> None:
    package = Path(asynccb.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign | ast.AnnAssign) and "deque(" in ast.unparse(node.value or node):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                name = ast.unparse(target).strip("()")
                found.add((path.relative_to(package).as_posix(), name))
    assert found == set(DEQUES)


class Gate:
    """Where a sink is stalled."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.reached = 0

    def __call__(self) -> None:
        self.reached += 1
        assert self.go_on.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.go_on.set()


@pytest.fixture
def slow_saves(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ScriptedState.save

    def gated(state: ScriptedState, path: Any, **given: Any) -> None:
        gate()
        save(state, path, **given)

    monkeypatch.setattr(ScriptedState, "save", gated)


@pytest.fixture
def slow_records(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    append = EventFile.append

    def gated(file: EventFile, records: Any) -> None:
        gate()
        append(file, records)

    monkeypatch.setattr(EventFile, "append", gated)


def started(*callbacks: Callback, epochs: int = EPOCHS, **more: Any) -> Run:
    return Trainer(ScriptedModel()).start(
        X, batch_size=1, epochs=epochs, callbacks=list(callbacks), **({"verbose": 0} | more)
    )


@pytest.mark.asyncio
async def test_a_run_with_every_sink_shows_all_queues_empty_at_its_end_with_bound_and_policy(
    tmp_path: Path,
) -> None:
    async def batches() -> AsyncIterator[Any]:
        for _ in range(3):
            yield X, X

    callbacks = [
        CSVLogger(tmp_path / "log.csv"),
        ModelCheckpoint(tmp_path / "model"),
        TensorBoard(tmp_path / "board"),
        ProgbarLogger(file=io.StringIO()),
        RemoteMonitor("http://127.0.0.1:1", retries=0),
        EarlyStopping("loss"),
    ]
    sources = {"x": batches(), "validation_data": batches()}
    run = Trainer(ScriptedModel()).start(**sources, verbose=1, callbacks=callbacks)
    with pytest.warns(UserWarning, match="lost"):
        await run
    bounds = {name: (queue.bound, queue.policy, queue.waiting) for name, queue in run.stats.queues.items()}
    assert bounds == {
        "event streams": (4096, "drop_oldest", 7),
        "copies": (2, "wait", 0),
        "source of x": (8, "wait", 0),
        "source of validation_data": (8, "wait", 0),
        "ModelCheckpoint: waiting saves": (1, "supersede", 0),
        "TensorBoard: batches": (65536, "drop_newest", 0),
        "TensorBoard: histograms": (1, "skip", 0),
        "ProgbarLogger: lines": (1024, "drop_oldest", 0),
        "RemoteMonitor: posts": (256, "drop_oldest", 0),
    }
    mailboxes = {name: (box.bound, box.policy) for name, box in run.stats.callbacks.items()}
    assert {bound for bound, _ in mailboxes.values()} == {2, 256, 1024}
    assert all(name in run.stats.report() for name in [*bounds, *mailboxes])


@pytest.mark.asyncio
async def test_a_training_that_stalls_stalls_its_source_at_eight_items() -> None:
    made = 0

    async def batches() -> AsyncIterator[Any]:
        nonlocal made
        for _ in range(100):
            made += 1
            yield X, X

    model = ScriptedModel(gated=True)
    run = Trainer(model).start(batches(), verbose=0)
    await model.at_gate()
    await until(lambda: made >= AHEAD)
    await settle()
    assert made in (AHEAD, AHEAD + 1)  # the one that is trained may have been taken before the others came
    assert run.stats.queues["source of x"][:3] == (AHEAD, "wait", made - 1)
    model.open_for_good()
    await run
    assert run.step == 100
    queue = run.stats.queues["source of x"]
    assert queue.waiting == 0
    assert queue.overflowed >= 1


@pytest.mark.asyncio
async def test_a_reader_that_does_not_read_loses_events_that_are_counted_and_holds_nobody() -> None:
    run = started(replay=16)
    stream = run.events(since=0)
    await run
    seen = [event async for event in stream]
    lost = sum(event.missing for event in seen if isinstance(event, Gap))
    assert len(seen) == 1 + 16  # a gap, and what the ring holds
    assert lost + 16 == run.stats.events
    assert run._readers.statistics() == QueueStatistics(16, "drop_oldest", 16, lost)


@pytest.mark.asyncio
async def test_a_server_that_never_answers_leaves_256_posts_waiting_and_the_rest_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, taken = asyncio.Event(), asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.set()
        await answer.wait()
        writer.transport.abort()

    class Waits(Callback):
        """Lets no further epoch begin before the server has the first one."""

        lockstep = True

        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await taken.wait()

    monkeypatch.setattr(remote_monitor, "_DRAIN", 0.0)
    server = await asyncio.start_server(never, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monitor = RemoteMonitor(f"http://127.0.0.1:{port}", timeout=60)
    run = started(monitor, Waits(), epochs=500)
    await until(lambda: run.epoch == 499)
    queue = run.stats.queues["RemoteMonitor: posts"]
    with pytest.warns(UserWarning, match="500 events were lost"):
        await run
    answer.set()
    server.close()
    await server.wait_closed()
    assert queue.waiting <= 256
    assert run.stats.queues["RemoteMonitor: posts"].overflowed == 500 - 256 - 1
    assert run.stats.callbacks["RemoteMonitor"].dropped == 0
    assert (monitor.sent, monitor.lost) == (0, 500)


@pytest.mark.asyncio
@pytest.mark.usefixtures("slow_saves")
async def test_a_disk_that_stalls_leaves_one_save_waiting_whose_state_is_superseded_and_counted(
    gate: Gate, tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "model")

    class Waits(Callback):
        """Lets no further epoch begin before the first save is at the disk."""

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self._later() if epoch == 0 else None

        lockstep = True

        async def _later(self) -> None:
            await until(lambda: gate.reached)

    run = started(checkpoint, Waits())
    await until(lambda: run.outcome)
    queues = run.stats.queues
    assert queues["ModelCheckpoint: waiting saves"] == QueueStatistics(1, "supersede", 1, EPOCHS - 2)
    assert queues["copies"][:3] == (2, "wait", 2)
    assert run.stats.waits.get("mailbox", 0) == run.stats.waits.get("pool", 0) == 0
    gate.go_on.set()
    await run
    assert gate.reached == 2
    assert run.stats.queues["copies"].waiting == 0
    assert np.fromfile(tmp_path / "model").tolist() == [2.0 * EPOCHS] * 16


@pytest.mark.asyncio
@pytest.mark.usefixtures("slow_saves")
async def test_a_disk_that_stalls_holds_a_training_whose_saves_have_names_of_their_own(
    gate: Gate, tmp_path: Path
) -> None:
    run = started(ModelCheckpoint(f"{tmp_path}/{{epoch}}"))
    await until(lambda: run.stats.waits.get("pool"))
    stats = run.stats
    assert (run.epoch, stats.queues["copies"][:3]) == (2, (2, "wait", 2))
    assert stats.queues["copies"].overflowed == stats.waits["pool"] == 1
    gate.go_on.set()
    await run
    assert len(list(tmp_path.iterdir())) == EPOCHS
    assert run.stats.queues["ModelCheckpoint: waiting saves"].overflowed == 0


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TensorBoard")
@pytest.mark.usefixtures("slow_records")
async def test_a_disk_that_stalls_skips_histograms_and_leaves_out_batches_and_counts_both(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "ROWS", 7)
    board = TensorBoard(tmp_path, histogram_freq=1, update_freq="batch", write_graph=False)
    gate.go_on.set()  # the opening of the file, which the training waits for

    class Stalls(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                gate.go_on.clear()

    run = started(Stalls(), board)
    await until(lambda: run.outcome)
    queues = run.stats.queues
    assert queues["TensorBoard: batches"] == QueueStatistics(7, "drop_newest", 7, 2 * EPOCHS - 7)
    assert queues["TensorBoard: histograms"].overflowed == board.skipped >= EPOCHS - 2
    gate.go_on.set()
    await run
    assert run.stats.queues["TensorBoard: batches"].waiting == 0
    assert run.stats.queues["TensorBoard: histograms"].waiting == 0


class Stalled(io.StringIO):
    """A terminal that is held."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def write(self, text: str) -> int:
        self.gate()
        return super().write(text)


@pytest.mark.asyncio
async def test_a_terminal_that_is_held_keeps_1024_lines_and_counts_the_rest(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINES", 8)
    run = started(ProgbarLogger(file=Stalled(gate)), verbose=2)
    await until(lambda: run.outcome and run.stats.callbacks["ProgbarLogger"].handled >= EPOCHS)
    queue = run.stats.queues["ProgbarLogger: lines"]
    assert (queue.bound, queue.policy, queue.waiting) == (8, "drop_oldest", 8)
    assert EPOCHS - 8 - queue.overflowed in range(9)  # taken by the thread that is held
    gate.go_on.set()
    await run
    assert run.stats.queues["ProgbarLogger: lines"].overflowed == queue.overflowed


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [None, OSError("!")])
async def test_a_callback_that_cannot_tell_what_waits_in_it_is_left_out_and_the_training_ends(
    answer: Any,
) -> None:
    class Wrong(Callback):
        def queue_statistics(self) -> dict[str, QueueStatistics]:
            if answer is not None:
                raise answer
            return None  # type: ignore[return-value]

    run = started(Wrong(), ModelCheckpoint("never", save_freq=10**6))
    await run
    assert list(run.stats.queues) == ["event streams", "copies", "ModelCheckpoint: waiting saves"]


@pytest.mark.asyncio
async def test_what_a_run_has_counted_stays_when_its_callbacks_serve_the_next_one(tmp_path: Path) -> None:
    class Queues(Callback):
        def __init__(self) -> None:
            self.number = 0

        def on_train_begin(self, logs: Any = None) -> None:
            self.number += 1

        def queue_statistics(self) -> dict[str, QueueStatistics]:
            return {"own": QueueStatistics(1, "skip", 0, self.number)}

    callback = Queues()
    first, second = started(callback), None
    await first
    second = started(callback)
    await second
    assert first.stats.queues["Queues: own"].overflowed == 1
    assert second.stats.queues["Queues: own"].overflowed == 2
    assert isinstance(first.stats.callbacks["Queues"], MailboxStatistics)
