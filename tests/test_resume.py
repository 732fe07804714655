"""Going on from a backup: how two settings differ, and which backup is taken."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from asynccb import Callback, CallbackError, RunCancelled, Trainer
from asynccb.callbacks import BackupAndRestore, ModelCheckpoint
from asynccb.models.plain import read_plain
from asynccb.resume import _candidates, _differences, _matched
from asynccb.testing import Recorder, ScriptedModel, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from asynccb import History

leaves = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.dictionaries(st.text("abc", min_size=1), inner, min_size=1),
    ),
    max_leaves=12,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict):
        return [found for key, part in tree.items() for found in places(part, (*path, key))]
    if isinstance(tree, list):
        return [found for at, part in enumerate(tree) for found in places(part, (*path, at))]
    return [path]


@given(st.dictionaries(st.text("abc", min_size=1), trees, min_size=1))
def test_equal_settings_do_not_differ(tree: Any) -> None:
    assert _differences(copy.deepcopy(tree), tree) == []


@given(st.dictionaries(st.text("abc", min_size=1), trees, min_size=1), st.data())
def test_each_value_that_differs_is_one_line_that_names_its_place(tree: Any, data: Any) -> None:
    chosen = data.draw(st.sets(st.sampled_from(places(tree)), min_size=1))
    other = copy.deepcopy(tree)
    for path in chosen:
        inner = other
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = "something else altogether"
    lines = _differences(tree, other)
    assert len(lines) == len(chosen)
    assert all("'something else altogether' here" in line for line in lines)


def test_what_the_training_of_now_leaves_open_is_not_compared() -> None:
    assert _differences({"seed": 4, "samples": 10}, {"samples": 10}) == []


def test_a_number_of_threads_that_differs_says_how_to_set_it() -> None:
    (line,) = _differences({"blas_threads": 2}, {"blas_threads": 8})
    assert line == "blas_threads: 2 there, 8 here (OPENBLAS_NUM_THREADS and its like set it)"


def test_of_a_folder_the_newest_comes_first_and_nothing_else_counts(tmp_path: Path) -> None:
    for name in (
        "backup-000009.h5",
        "backup-000010.h5",
        "backup-1000000.h5",
        "best.h5",
        ".backup-000011.h5.tmp",
    ):
        (tmp_path / name).touch()
    assert [path.rpartition("/")[2] for path in _candidates(str(tmp_path))] == [
        "backup-1000000.h5",
        "backup-000010.h5",
        "backup-000009.h5",
    ]
    assert list(_candidates(str(tmp_path / "not there yet"))) == []
    assert list(_candidates(str(tmp_path / "best.h5"))) == [str(tmp_path / "best.h5")]


@pytest.mark.asyncio
async def test_a_training_that_had_ended_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        await Trainer(ScriptedModel(), seed=1).fit([[0.0]], verbose=0, callbacks=BackupAndRestore(tmp_path))
    (record,) = caplog.records
    assert record.getMessage().endswith("had ended: this gives its History at once. resume=False begins anew")


# ---------------------------------------------------------------- stops and cancels


BATCHES = [(np.full((2, 1), index), np.zeros(2)) for index in range(5)]


class Patient(BackupAndRestore):
    """The batches wait for it: a backup is made wherever one is due."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        while self._writing:
            time.sleep(0.0005)


class At(Callback):
    """Does something behind a step, or at the end of an epoch."""

    changes_model = False

    def __init__(self, do: Any, *, step: int | None = None, epoch: int | None = None) -> None:
        self.do, self.step, self.epoch = do, step, epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.step == 0 == self.run.step:
            self.do(self)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.step == self.step:
            self.do(self)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            self.do(self)


def raise_flag(callback: Callback) -> None:
    callback.model.stop_training = True


def newest(folder: Path) -> dict[str, Any]:
    found: list[Any] = []
    read_plain(next(iter(_candidates(str(folder)))), found.append)
    resume: dict[str, Any] = found[0]["resume"]
    return resume


async def fit(
    folder: Path, *callbacks: Callback, data: Any = BATCHES, freq: Any = "epoch", **more: Any
) -> tuple[ScriptedModel, History]:
    model = ScriptedModel()
    own = Patient(folder, freq)
    asked = {"epochs": 4, "verbose": 0} | more
    return model, await Trainer(model, seed=1).fit(data, callbacks=[*callbacks, own], **asked)


@pytest.mark.asyncio
@pytest.mark.parametrize("freq", ["epoch", 1])
@pytest.mark.parametrize("where", [{"epoch": 1}, {"step": 7}])
async def test_one_that_was_stopped_by_the_flag_alone_stays_stopped_however_often_it_is_started(
    tmp_path: Path, where: dict[str, int], freq: Any
) -> None:
    _, history = await fit(tmp_path, At(raise_flag, **where), freq=freq)
    assert (len(history.epoch), history.outcome) == (2, "stopped")
    for _ in range(3):
        seen, flag = Recorder(), list[bool]()
        look = At(lambda callback, flag=flag: flag.append(callback.model.stop_training), epoch=1)
        _, again = await fit(tmp_path, look, seen, freq=freq)
        assert "on_train_batch_begin" not in seen.hooks
        assert (again.rows(), again.outcome, again.reason) == (history.rows(), "stopped", history.reason)
        assert all(flag)  # a hook of the partial epoch's end sees what it saw then


@pytest.mark.asyncio
async def test_a_backup_that_had_to_wait_for_another_is_made_in_a_pause_too(tmp_path: Path) -> None:
    class Slow(Callback):
        def __init__(self) -> None:
            self.synced, self.go_on = 0, asyncio.Event()

        async def sync(self) -> None:
            self.synced += 1
            if self.synced == 2:
                await self.go_on.wait()

    slow, pause = Slow(), At(lambda callback: callback.run.pause(), step=7)
    own = BackupAndRestore(tmp_path, 2)
    run = Trainer(ScriptedModel(), seed=1).start(BATCHES, epochs=4, verbose=0, callbacks=[slow, pause, own])
    await until(lambda: run.state == "paused")
    assert own.deferred == 1
    slow.go_on.set()
    await until(lambda: own.saved == str(tmp_path / "backup-000003.h5"))
    assert (run.state, (await asyncio.to_thread(newest, tmp_path))["step"]) == ("paused", 7)
    run.resume()
    assert (await run).outcome == "completed"


@pytest.mark.asyncio
async def test_one_that_is_cancelled_while_it_is_paused_goes_on_from_there(tmp_path: Path) -> None:
    loop, there = asyncio.get_running_loop(), asyncio.Event()

    def pause(callback: Callback) -> None:
        callback.run.pause()
        loop.call_soon_threadsafe(there.set)

    run = Trainer(ScriptedModel(), seed=1).start(
        BATCHES, epochs=2, verbose=0, callbacks=[At(pause, step=3), BackupAndRestore(tmp_path)]
    )
    await there.wait()
    await settle()
    assert run.state == "paused"
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    assert (await asyncio.to_thread(newest, tmp_path))["step"] == 3


class Stalling:
    """Gives batches up to a step, and then none."""

    def __init__(self, until: int) -> None:
        self.at, self.until = 0, until

    def seek(self, number: int, batch: int) -> None:
        self.at = batch

    async def __aiter__(self) -> Any:
        while True:
            if self.at == self.until:
                await asyncio.Event().wait()
            self.at += 1
            yield BATCHES[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("step", [0, 3, 5, 6])
async def test_one_that_is_stopped_or_cancelled_while_it_waits_for_data_goes_on_from_there(
    tmp_path: Path, step: int, how: str
) -> None:
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    tell = At(lambda callback: loop.call_soon_threadsafe(there.set), step=step)
    run = Trainer(ScriptedModel(), seed=1).start(
        Stalling(step),
        steps_per_epoch=5,
        epochs=3,
        verbose=0,
        callbacks=[tell, BackupAndRestore(tmp_path, 99)],
    )
    await there.wait()
    await settle()
    getattr(run, how)()
    await asyncio.gather(run, return_exceptions=True)
    unit = await asyncio.to_thread(newest, tmp_path)
    assert (unit["step"], unit["place"]["epoch"], unit["place"]["batch"]) == (step, step // 5, step % 5)


# ---------------------------------------------------------------- data with a place of its own


class Stream:
    """Another pass each time, each item a number of its own; seekable."""

    def __init__(self, items: int = 5, passes: int = 99) -> None:
        self.first, self.items, self.passes = (0, 0), items, passes
        self.asked: list[tuple[int, int]] = []

    def seek(self, number: int, batch: int) -> None:
        self.asked.append((number, batch))
        self.first = (number, batch)

    def __iter__(self) -> Iterator[Any]:
        number, at = self.first
        self.first = (number + 1, 0)
        for index in range(at, self.items if number < self.passes else 0):
            yield np.full((2, 1), 100 * number + index)


class Beside:
    """The same as an async source."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.seek = stream, stream.seek

    async def __aiter__(self) -> Any:
        for item in self.stream:
            yield item


class Seeing(ScriptedModel):
    """Remembers the first number of each batch; its loss is that number."""

    def __init__(self, seen: list[float]) -> None:
        super().__init__()
        self.seen = seen

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.seen.append(float(batch.x[0, 0]))
        return super().train_batch(batch)

    def test_batch(self, batch: Any) -> dict[str, float]:
        return {"loss": float(batch.x[0, 0])}


async def see(folder: Path | None, data: Any, *callbacks: Callback, **more: Any) -> tuple[list[float], Any]:
    seen: list[float] = []
    own = [] if folder is None else [BackupAndRestore(folder, 99)]
    asked = {"epochs": 4, "verbose": 0} | more
    history = await Trainer(Seeing(seen), seed=1).fit(data, callbacks=[*callbacks, *own], **asked)
    return seen, history.rows()


def stop(callback: Callback) -> None:
    callback.run.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("steps", [None, 3, 7])
@pytest.mark.parametrize("step", [1, 3, 5, 6, 7, 8])
async def test_passes_count_from_the_first_epoch_of_the_training(
    tmp_path: Path, step: int, steps: int | None, beside: bool
) -> None:
    def source() -> Any:
        return Beside(Stream()) if beside else Stream()

    asked: dict[str, Any] = {"initial_epoch": 1, "steps_per_epoch": steps}
    whole, _ = await see(None, source(), **asked)
    before, _ = await see(tmp_path, source(), At(stop, step=step), **asked)
    after, _ = await see(tmp_path, source(), **asked)
    assert (len(before), before + after) == (step, whole)


class StopInTest(Callback):
    """In the middle of a validation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.epoch == self.epoch and batch == 1:
            self.run.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("steps", [None, 3, 7])
@pytest.mark.parametrize("stopper", [At(stop, step=12), At(stop, step=17), StopInTest(1), StopInTest(3)])
async def test_a_validation_sees_the_data_that_it_would_have_seen(
    tmp_path: Path, stopper: Any, steps: int | None, beside: bool
) -> None:
    def validation() -> Any:
        return Beside(Stream()) if beside else Stream()

    asked: dict[str, Any] = {"validation_freq": 2, "validation_steps": steps}
    _, whole = await see(None, BATCHES, validation_data=validation(), **asked)
    await see(tmp_path, BATCHES, stopper, validation_data=validation(), **asked)
    _, rows = await see(tmp_path, BATCHES, validation_data=validation(), **asked)
    assert rows == whole
    assert len({row["val_loss"] for row in rows if "val_loss" in row}) == 2


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:the data:UserWarning")
@pytest.mark.parametrize("items", [5, 7])
async def test_data_that_had_run_out_is_run_out(tmp_path: Path, items: int) -> None:
    async def train() -> Any:
        model, history = await fit(tmp_path, data=Stream(items, passes=3), steps_per_epoch=5, epochs=9)
        return model.steps, history.rows(), history.outcome, history.reason

    first = await train()
    assert first[0] == 3 * items
    assert [await train(), await train()] == [first, first]


@pytest.mark.asyncio
async def test_what_a_source_answers_is_copied_at_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Live:
        """Answers the very dict that it changes."""

        def __init__(self) -> None:
            self.state: dict[str, Any] = {"at": 0}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

        def __iter__(self) -> Iterator[Any]:
            while self.state["at"] < 10:
                self.state["at"] += 1
                yield BATCHES[0]

    moved, write = threading.Event(), BackupAndRestore._write_now
    written: dict[int, int] = {}

    def late(self: Any, unit: Any, state: Any, *rest: Any) -> None:
        assert unit.step != 3 or moved.wait(20)
        written[unit.step] = state["data"]["data"]["source"]["at"]
        write(self, unit, state, *rest)

    monkeypatch.setattr(BackupAndRestore, "_write_now", late)
    move = At(lambda callback: moved.set(), step=8)
    await Trainer(ScriptedModel(), seed=1).fit(
        Live(), verbose=0, callbacks=[move, BackupAndRestore(tmp_path, 3)]
    )
    assert written[3] == 3
    assert all(step == at for step, at in written.items())


# ---------------------------------------------------------------- what failed before


@pytest.mark.asyncio
async def test_a_checkpoint_that_could_not_be_written_is_written_by_the_training_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, best = os.replace, tmp_path / "best.weights.npz"
    full = True

    def refuse(source: Any, target: Any) -> None:
        if full and os.fspath(target) == os.fspath(best):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(best, "loss", save_best_only=True)  # the first is the best

    with pytest.raises(CallbackError) as raised:
        await fit(tmp_path / "backup", keep())
    assert (raised.value.callback, best.exists()) == ("ModelCheckpoint", False)
    full = False
    _, history = await fit(tmp_path / "backup", keep())
    assert history.outcome == "completed"
    assert best.exists()


NOW_AND_SAVED = [
    # what is there now, what the backup has, who was who
    ({"A": [], "A#2": []}, {"A": [], "A#2": []}, {"A": "A", "A#2": "A#2"}),
    ({"A": ["x"], "A#2": ["y"]}, {"A": ["y"], "A#2": ["x"]}, {"A": "A#2", "A#2": "A"}),
    ({"A": ["new"], "A#2": ["old"]}, {"A": ["old"]}, {"A#2": "A"}),
    ({"A": ["old"]}, {"A": ["gone"], "A#2": ["old"]}, {"A": "A#2"}),
    ({"A": ["other name"]}, {"A": ["name"]}, {"A": "A"}),
    ({"A": ["same"], "A#2": ["same"]}, {"A": ["same"], "A#2": ["same"]}, {"A": "A", "A#2": "A#2"}),
    ({"A": ["b"], "A#2": ["c"], "A#3": ["d"]}, {"A": ["e"], "A#2": ["f"]}, {}),
    ({"B": []}, {"A": []}, {}),
]


@pytest.mark.parametrize(("now", "saved", "expected"), NOW_AND_SAVED)
def test_who_is_told_apart_gets_his_own_state_and_nobody_gets_one_by_a_guess(
    now: Any, saved: Any, expected: Any
) -> None:
    assert _matched(now, saved) == expected
