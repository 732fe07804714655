"""Event files of a resumed training, read with real TensorBoard: no step twice, none missing."""

from __future__ import annotations

import asyncio
import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as WhatThePageShows,
)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from asynccb.callbacks.tensorboard import TensorBoard
from asynccb.callbacks.tensorboard.records import frames, graph, opening, scalars, start
from asynccb.callbacks.tensorboard.resumed import Place, cut_back, files_of
from asynccb.callbacks.tensorboard.writer import EventFile

if TYPE_CHECKING:
    from pathlib import Path

Point = tuple[int, float]


class FakeSnapshot:
    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays

    def release(self) -> None:
        pass


class FakeRun:
    name = "run-1"

    def __init__(self, resumed: Any = None) -> None:
        self.resumed = resumed
        self.arrays = {"dense/kernel": np.arange(6.0)}

    def expect_copies(self) -> None:
        pass

    def room_for_copy(self, callback: object) -> bool:
        return True

    def snapshot_now(self, callback: object, *, pooled: bool) -> FakeSnapshot:
        return FakeSnapshot(self.arrays)


class Session:
    """A process that writes ``batches`` a step each, ``per_epoch`` of them an epoch."""

    def __init__(self, folder: Path, *, epoch: int = 0, batch: int = 0, **options: Any) -> None:
        self.board = TensorBoard(folder, **options)
        self.at = (epoch, batch)
        self.step = epoch * 2 + batch
        self.later: list[Any] = []

    async def begin(self, state: dict[str, Any] | None = None) -> Session:
        resumed = None if state is None else SimpleNamespace(epoch=self.at[0], batch=self.at[1])
        self.board.run = FakeRun(resumed)
        self.board.set_model(None)
        self.board.set_params({})
        await (await asyncio.to_thread(self.board.on_train_begin, {}))
        if state is not None:
            await asyncio.to_thread(self.board.load_state_dict, state)
        return self

    def play(self, batches: int) -> None:
        epoch, batch = self.at
        for _ in range(batches):
            self.step += 1
            if self.board.update_freq != "epoch":
                self.later.append(self.board.record_batch(batch, {"loss": float(self.step)}))
            batch += 1
            if batch == 2:
                self.later.append(self.board.on_epoch_end(epoch, {"loss": 100.0 + epoch}))
                epoch, batch = epoch + 1, 0
        self.at = (epoch, batch)

    async def drain(self) -> None:
        later, self.later = self.later, []
        for coroutine in later:
            if coroutine is not None:
                await coroutine

    async def state(self) -> dict[str, Any]:
        state = self.board.state_dict()
        await self.drain()
        await self.board.sync()
        return state

    async def crash(self) -> None:
        """The file is let go as a dead process lets it go."""
        await self.drain()
        assert self.board._writer is not None
        await self.board._writer.close()

    async def end(self) -> None:
        await self.drain()
        await self.board.on_train_end({})


def shown(folder: Path) -> dict[str, list[Point]]:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def shown_by_the_page(folder: Path) -> dict[str, list[int]]:
    read = WhatThePageShows(str(folder), size_guidance={}, tensor_size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [event.step for event in read.Tensors(tag)] for tag in read.Tags()["tensors"]}


def events(path: str) -> list[Event]:
    return [Event.FromString(record) for record in RawEventFileLoader(path).Load()]


EPOCHS = [(epoch, 100.0 + epoch) for epoch in range(5)]
STEPS = [(step, float(step)) for step in range(1, 11)]


@pytest.mark.asyncio
@pytest.mark.parametrize("options", [{}, {"update_freq": 1}], ids=["epochs", "batches too"])
@pytest.mark.parametrize("cut", range(10))
@pytest.mark.parametrize("lost", [0, 3])
async def test_wherever_it_was_cut_readers_see_every_step_once(
    tmp_path: Path, options: dict[str, Any], cut: int, lost: int
) -> None:
    first = await Session(tmp_path, **options).begin()
    first.play(cut)
    state = await first.state()
    first.play(lost)
    await first.crash()
    second = await Session(tmp_path, epoch=cut // 2, batch=cut % 2, **options).begin(state)
    second.play(10 - cut)
    await second.end()
    expected = {"loss": EPOCHS, **({"batch_loss": STEPS} if options else {})}
    assert shown(tmp_path) == expected
    assert shown_by_the_page(tmp_path) == {
        tag: [step for step, _ in points] for tag, points in expected.items()
    }


@pytest.mark.asyncio
async def test_a_chain_of_crashes_from_one_moment_leaves_no_step_twice(tmp_path: Path) -> None:
    first = await Session(tmp_path, update_freq=1).begin()
    first.play(5)
    state = await first.state()
    await first.crash()
    for _ in range(3):
        again = await Session(tmp_path, epoch=2, batch=1, update_freq=1).begin(state)
        again.play(4)
        await again.crash()
    last = await Session(tmp_path, epoch=2, batch=1, update_freq=1).begin(state)
    last.play(5)
    await last.end()
    assert shown(tmp_path) == {"loss": EPOCHS, "batch_loss": STEPS}


def test_without_the_cut_no_step_number_of_a_start_record_would_do(tmp_path: Path) -> None:
    before = [opening(0.0), *(scalars(s, 0.0, {"loss": s}, "batch_") for s in range(1, 9)), *(
        scalars(e, 0.0, {"loss": e}) for e in range(4)
    )]  # fmt: skip
    # Gone on from batch 7, in epoch 3: its mean and batches 7 and 8 come again.
    after = [*(scalars(s, 0.0, {"loss": s}, "batch_") for s in (7, 8)), scalars(3, 0.0, {"loss": 3.0})]
    results = []
    for step in range(10):
        folder = tmp_path / str(step)
        folder.mkdir()
        (folder / "a.tfevents.1").write_bytes(frames(before))
        (folder / "a.tfevents.2").write_bytes(frames([opening(0.0), start(step, 0.0), *after]))
        found = shown(folder)
        results.append(
            [s for s, _ in found["loss"]] == [0, 1, 2, 3]
            and [s for s, _ in found["batch_loss"]] == list(range(1, 9))
        )
    assert results == [False] * 10


@pytest.mark.asyncio
async def test_the_new_file_begins_with_a_session_at_the_step_that_is_gone_on_from(tmp_path: Path) -> None:
    # Batch 5 waited to be written when the training was cut, and is written by the new session.
    for options, step, count in (({}, 2, 1), ({"update_freq": 1}, 5, 3)):
        folder = tmp_path / str(step)
        first = await Session(folder, **options).begin()
        first.play(5)
        state = await first.state()
        await first.crash()
        second = await Session(folder, epoch=2, batch=1, **options).begin(state)
        second.play(1)
        await second.end()
        assert second.board.path is not None
        version, session, *values = events(second.board.path)
        assert version.file_version == "brain.Event:2"
        assert (session.session_log.status, session.step) == (SessionLog.START, step)
        assert len(values) == count


@pytest.mark.asyncio
async def test_a_reader_that_has_seen_the_lost_steps_drops_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = await Session(tmp_path).begin()
    first.play(4)
    state = await first.state()
    first.play(4)
    await first.crash()
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss")] == [0, 1, 2, 3]
    second = await Session(tmp_path, epoch=2).begin(state)
    second.play(2)
    await second.end()
    with caplog.at_level(logging.ERROR):
        reader.Reload()
    assert [event.step for event in reader.Scalars("loss")] == [0, 1, 2]


@pytest.mark.asyncio
async def test_readers_come_to_the_new_file_last_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await Session(tmp_path).begin()
    first.play(2)
    state = await first.state()
    await first.crash()
    monkeypatch.setattr("time.time", lambda: 1.0)
    second = await Session(tmp_path, epoch=1).begin(state)
    await second.end()
    assert first.board.path is not None
    assert second.board.path == first.board.path + ".resumed-000001"
    files = await asyncio.to_thread(files_of, str(tmp_path), first.board.state_dict()["root"])
    assert files == [first.board.path, second.board.path]


@pytest.mark.asyncio
async def test_the_files_of_other_trainings_are_let_alone(tmp_path: Path) -> None:
    other = await Session(tmp_path).begin()
    other.play(10)
    await other.end()
    assert other.board.path is not None
    first = await Session(tmp_path).begin()
    first.play(2)
    state = await first.state()
    await first.crash()
    with open(other.board.path, "rb") as file:
        before = file.read()
    second = await Session(tmp_path, epoch=1).begin(state)
    await second.end()
    with open(other.board.path, "rb") as file:
        assert file.read() == before


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TensorBoard. histograms of weights only")
async def test_histograms_of_epochs_before_the_cut_are_in_the_file_when_it_is_synchronized(
    tmp_path: Path,
) -> None:
    first = await Session(tmp_path, histogram_freq=1).begin()
    first.play(2)
    state = await first.state()
    before = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    before.Reload()
    assert [event.step for event in before.Histograms("dense/kernel")] == [0]
    first.play(2)
    await first.drain()
    await first.board._sideline.end()
    await first.crash()
    second = await Session(tmp_path, epoch=1, histogram_freq=1).begin(state)
    second.play(2)
    await second.end()
    after = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    after.Reload()
    assert [event.step for event in after.Histograms("dense/kernel")] == [0, 1]


@pytest.mark.asyncio
async def test_warnings_of_the_first_session_are_not_given_again(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="histograms of weights only"):
        first = await Session(tmp_path, histogram_freq=1).begin()
    state = await first.state()
    await first.end()
    second = await Session(tmp_path, histogram_freq=1).begin(state)
    await second.end()


@pytest.mark.asyncio
async def test_one_that_the_resumed_training_did_not_have_begins_a_file_of_its_own(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.run = FakeRun(SimpleNamespace(epoch=3))
    await (await asyncio.to_thread(board.on_train_begin, {}))
    assert os.listdir(tmp_path) == []
    await (await asyncio.to_thread(board.on_epoch_end, 3, {"loss": 1.0}))
    await board.on_train_end({})
    assert shown(tmp_path) == {"loss": [(3, 1.0)]}


def test_a_root_that_leads_elsewhere_is_nobodys(tmp_path: Path) -> None:
    assert files_of(str(tmp_path), "../x") == []
    (tmp_path / "events.out.tfevents.1.h.2.3").touch()
    assert files_of(str(tmp_path), "1.h.2.3") == [str(tmp_path / "events.out.tfevents.1.h.2.3")]
    assert files_of(str(tmp_path), "1.h.2") == []


@pytest.mark.asyncio
@pytest.mark.parametrize("root", ["../../../elsewhere/x", "..", 5])
async def test_a_backup_that_names_a_place_elsewhere_gets_a_new_file_in_the_folder(
    tmp_path: Path, root: Any
) -> None:
    logs, elsewhere = tmp_path / "logs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (logs / "events.out.tfevents...").mkdir(parents=True)  # what makes a way out of the name
    first = await Session(logs).begin()
    state = await first.state() | {"root": root}
    await first.end()
    resumed = await Session(logs).begin(state)
    assert resumed.board.path is not None
    assert (os.path.dirname(resumed.board.path), ".resumed-" in resumed.board.path) == (str(logs), False)
    await resumed.end()
    assert os.listdir(elsewhere) == []


@pytest.mark.asyncio
async def test_sync_forces_the_file_onto_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await Session(tmp_path).begin()
    synced: list[bytes] = []

    def noted(descriptor: int) -> None:
        assert session.board.path is not None
        with open(session.board.path, "rb") as file:
            synced.append(file.read())

    session.play(2)
    await session.drain()
    monkeypatch.setattr("os.fsync", noted)
    assert synced == []
    await session.board.sync()
    assert len(synced) == 1
    assert b"loss" in synced[0]
    await session.end()


# ---------------------------------------------------------------- the cut itself


def cut(path: Path, place: Place, records: list[bytes], tail: bytes = b"") -> int:
    """How many records are left."""
    path.write_bytes(frames(records) + tail)
    cut_back(str(path), place)
    left = path.read_bytes()
    whole = [frames(records[:count]) for count in range(len(records) + 1)]
    return whole.index(left)


@pytest.mark.parametrize("tail", [b"", b"\0" * 7, b"\0" * 64, frames([opening(0.0)])[:-1], b"garbage" * 9])
def test_half_a_record_at_the_end_goes_too(tmp_path: Path, tail: bytes) -> None:
    records = [opening(0.0), scalars(0, 0.0, {"loss": 1.0})]
    assert cut(tmp_path / "f", Place(9, 9), records, tail) == 2


@pytest.mark.parametrize(
    ("record", "stays"),
    [
        (scalars(2, 0.0, {"loss": 1.0}), True),
        (scalars(3, 0.0, {"loss": 1.0}), False),
        (scalars(300, 0.0, {"loss": 1.0}, "batch_"), True),
        (scalars(301, 0.0, {"loss": 1.0}, "batch_"), False),
        (scalars(5, 0.0, {}), True),
        (graph(0.0, b"graph"), True),
        (start(7, 0.0), True),
        (bytes(40), False),
    ],
)
def test_what_comes_again_is_told_by_step_and_kind(tmp_path: Path, record: bytes, stays: bool) -> None:
    assert cut(tmp_path / "f", Place(3, 301), [opening(0.0), record]) == 1 + stays


def test_a_weight_with_the_name_of_a_batchs_scalar_is_of_its_epoch(tmp_path: Path) -> None:
    from asynccb.callbacks.tensorboard.records import histogram, summary

    numbers = np.ones(1)
    value = histogram("batch_normalization/gamma", (0.0, 1.0), (1, 1.0, 1.0), numbers, numbers)
    assert cut(tmp_path / "f", Place(3, 301), [opening(0.0), summary(3, 0.0, [value])]) == 1
    assert cut(tmp_path / "f", Place(4, 301), [opening(0.0), summary(3, 0.0, [value])]) == 2


def test_new_files_of_one_training_are_numbered_on(tmp_path: Path) -> None:
    first = EventFile(str(tmp_path), "run-1")
    others = [EventFile(str(tmp_path), "another name", first.root) for _ in range(2)]
    for file in (first, *others):
        file.close()
    assert [file.path for file in others] == [f"{first.path}.resumed-00000{n}" for n in (1, 2)]
    assert {file.root for file in others} == {first.root}
