"""Which files of a checkpoint callback stay on the disk, and that no other is ever deleted."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import random
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, CheckpointWriteError, Trainer
from asynccb.callbacks import LambdaCallback, ModelCheckpoint
from asynccb.models import Dense, Sequential
from asynccb.storage.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeSnapshot:
    alone = True

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before

    def save(self, path: Any, *, weights_only: bool = False) -> None:
        self._before()
        atomic_write(path, lambda temporary: Path(temporary).write_text("new"))

    def release(self) -> None:
        pass


class FakeRun:
    name = "run-1"
    resumed = None

    def __init__(self, before: Callable[[], None]) -> None:
        self.before = before
        self.saved: list[str] = []

    def expect_copies(self) -> None:
        pass

    def check_path(self, path: str, *, weights_only: bool) -> None: ...

    def room_for_copy(self, callback: object) -> bool:
        return True

    def snapshot_now(self, callback: object, *, pooled: bool) -> FakeSnapshot:
        return FakeSnapshot(self.before)

    def announce_saved(self, path: str, epoch: int) -> None:
        self.saved.append(Path(path).name)

    def direction(self, metric: str) -> str | None:
        return None


async def begin(checkpoint: ModelCheckpoint, before: Callable[[], None] = lambda: None) -> FakeRun:
    run = FakeRun(before)
    checkpoint.run = run
    checkpoint.set_params({"metrics": ["loss"], "do_validation": False})
    await checkpoint.on_train_begin({})
    return run


async def epoch(checkpoint: ModelCheckpoint, number: int, loss: Any = 1.0) -> None:
    checkpoint.on_epoch_begin(number)
    writing = checkpoint.on_epoch_end(number, {} if loss is None else {"loss": loss})
    assert writing is not None
    await writing


async def train(checkpoint: ModelCheckpoint, *losses: Any, first: int = 0) -> None:
    await begin(checkpoint)
    for number, loss in enumerate(losses, first):
        await epoch(checkpoint, number, loss)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "losses", "left"),
    [
        ({"keep_last": 2}, [1, 2, 3, 4], "34"),
        ({"keep_last": 9}, [1, 2, 3], "123"),
        ({"keep_best": 2}, [1, 4, 2, 3], "134"),  # the newest one always stays
        ({"keep_best": 2}, [4, 3, 2, 1], "34"),
        ({"keep_best": 1}, [2, 2, 2], "13"),  # an equal value is not better
        ({"keep_best": 1, "keep_last": 2}, [1, 4, 2, 3], "134"),
        ({"keep_best": 2, "mode": "max"}, [1, 4, 2, 3, 0], "245"),
        ({"keep_best": 2}, [math.nan, 3, math.nan, 4, 5], "245"),
        ({"keep_best": 1}, [math.inf, 4, -math.inf, 9], "34"),
    ],
)
async def test_the_newest_and_the_best_stay(
    tmp_path: Path, options: dict[str, Any], losses: list[float], left: str
) -> None:
    await train(ModelCheckpoint(tmp_path / "{epoch}.h5", "loss", **options), *losses)
    assert files(tmp_path) == [f"{number}.h5" for number in left]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "left"), [({"keep_best": 1}, "1234"), ({"keep_best": 1, "keep_last": 2}, "134")]
)
async def test_files_without_a_value_stay_unless_the_newest_are_counted(
    tmp_path: Path, options: dict[str, Any], left: str
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", "loss", **options)
    with pytest.warns(RuntimeWarning, match="Can keep best model only with loss available") as said:
        await train(checkpoint, 1.0, None, None, 2.0)
    assert len(said) == 1
    assert files(tmp_path) == [f"{number}.h5" for number in left]


@pytest.mark.asyncio
async def test_against_a_plain_account_of_what_stays(tmp_path: Path) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        last, best = draw.choice([(None, 1), (2, None), (1, 2), (3, 1)])
        losses = [draw.choice([0.5, 1.0, 2.0, math.nan]) for _ in range(8)]
        folder = tmp_path / str(seed)
        await train(ModelCheckpoint(folder / "{epoch}.h5", "loss", keep_last=last, keep_best=best), *losses)
        there: list[tuple[int, float]] = []
        for number, loss in enumerate(losses, 1):
            there.append((number, loss))
            newest = there[-(last or 1) :]
            finite = sorted((one for one in there if one[1] == one[1]), key=lambda one: (one[1], one[0]))
            there = [one for one in there if one in newest or one in finite[: best or 0]]
        assert files(folder) == [f"{number}.h5" for number, _ in there], f"seed {seed}"


@pytest.mark.asyncio
async def test_files_of_an_older_training_are_neither_deleted_nor_counted(tmp_path: Path) -> None:
    for number in (1, 7, 1000):
        (tmp_path / f"{number}.h5").write_text("old")
    await train(ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=2), 1, 1, 1)
    assert files(tmp_path) == ["1000.h5", "2.h5", "3.h5", "7.h5"]  # 1 is its own


def test_going_by_names_would_delete_the_new_files_and_keep_the_old() -> None:
    names = [f"{number}.h5" for number in (1, 2, 1000, 1001)]
    assert sorted(names, key=lambda name: int(name[:-3]))[-2:] == ["1000.h5", "1001.h5"]


@pytest.mark.asyncio
async def test_a_second_training_of_the_same_object_lets_the_files_of_the_first_alone(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    await train(checkpoint, 1, 1)
    await train(checkpoint, 1, 1, first=5)
    assert files(tmp_path) == ["2.h5", "7.h5"]


@pytest.mark.asyncio
async def test_a_path_that_is_written_again_counts_once_with_its_newest_value(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{mark}.h5", "loss", keep_last=2)
    await begin(checkpoint)
    for number, mark in enumerate("abaab"):
        checkpoint.on_epoch_begin(number)
        writing = checkpoint.on_epoch_end(number, {"loss": 1.0, "mark": mark})
        assert writing is not None
        await writing
    assert files(tmp_path) == ["a.h5", "b.h5"]
    assert [Path(path).name for path, _ in checkpoint.state_dict()["files"]] == ["a.h5", "b.h5"]


@pytest.mark.asyncio
async def test_nothing_is_deleted_before_the_newer_file_is_durable(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    arrived, gate = threading.Event(), threading.Event()

    def before() -> None:
        arrived.set()
        gate.wait()

    await begin(checkpoint)
    await epoch(checkpoint, 0)
    assert isinstance(checkpoint.run, FakeRun)
    checkpoint.run.before = before
    saving = asyncio.create_task(epoch(checkpoint, 1))
    await asyncio.to_thread(arrived.wait)
    assert files(tmp_path) == ["1.h5"]
    gate.set()
    await saving
    assert files(tmp_path) == ["2.h5"]


@pytest.mark.asyncio
async def test_a_save_that_fails_costs_no_older_file(tmp_path: Path) -> None:
    def full() -> None:
        raise CheckpointWriteError("2.h5", OSError(errno.ENOSPC, "full"))

    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    run = await begin(checkpoint)
    await epoch(checkpoint, 0)
    run.before = full
    with pytest.raises(CheckpointWriteError):
        await epoch(checkpoint, 1)
    assert files(tmp_path) == ["1.h5"]
    assert [Path(path).name for path, _ in checkpoint.state_dict()["files"]] == ["1.h5"]
    run.before = lambda: None
    await epoch(checkpoint, 2)
    assert files(tmp_path) == ["3.h5"]


@pytest.mark.asyncio
async def test_a_file_that_cannot_be_deleted_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, refuse = os.unlink, [True]

    def guarded(path: Any, **options: Any) -> None:
        if refuse[0] and str(path).endswith(".h5"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        unlink(path, **options)

    monkeypatch.setattr("os.unlink", guarded)
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    run = await begin(checkpoint)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(3):
            await epoch(checkpoint, number)
    assert [str(one.message) for one in said] == [
        f"ModelCheckpoint cannot delete {tmp_path}/1.h5: Permission denied"
    ]
    assert run.saved == ["1.h5", "2.h5", "3.h5"]
    refuse[0] = False
    await epoch(checkpoint, 3)
    assert files(tmp_path) == ["4.h5"]


@pytest.mark.asyncio
async def test_a_file_that_somebody_took_away_is_no_error(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    await train(checkpoint, 1)
    (tmp_path / "1.h5").unlink()
    await epoch(checkpoint, 1)
    assert files(tmp_path) == ["2.h5"]


@pytest.mark.asyncio
async def test_a_resumed_training_goes_on_with_the_files_of_the_first(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "{epoch}.h5", "loss", keep_last=1, keep_best=1)
    await train(first, 1, 2, 3)
    state = first.state_dict()
    (tmp_path / "9.h5").write_text("old")
    second = ModelCheckpoint(tmp_path / "{epoch}.h5", "loss", keep_last=1, keep_best=1)
    await begin(second)
    await asyncio.to_thread(second.load_state_dict, state)
    await epoch(second, 3, 4)
    assert files(tmp_path) == ["1.h5", "4.h5", "9.h5"]


@pytest.mark.asyncio
async def test_a_save_under_way_at_the_cut_is_in_the_state(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", "loss", keep_last=2)
    await train(checkpoint, 1)
    writing = checkpoint.on_epoch_end(1, {"loss": 2.0})
    assert writing is not None
    state = checkpoint.state_dict()
    await writing
    assert [(Path(path).name, value) for path, value in state["files"]] == [("1.h5", None), ("2.h5", None)]
    assert state["files"] == checkpoint.state_dict()["files"]


@pytest.mark.asyncio
async def test_a_state_cannot_name_files_to_be_deleted_that_the_path_does_not_give(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    foreign = [tmp_path / name for name in ("a.txt", "kept/1.h5", "1.h5.txt")]
    for path in foreign:
        path.write_text("mine")
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", keep_last=1)
    await train(checkpoint, 1)
    state = checkpoint.state_dict()
    state["files"] = [*([str(path), None] for path in foreign), [f"{tmp_path}/kept/../a.txt", None]]
    await begin(checkpoint)
    await asyncio.to_thread(checkpoint.load_state_dict, state)
    await epoch(checkpoint, 5)
    await epoch(checkpoint, 6)
    assert all(path.read_text() == "mine" for path in foreign)


@pytest.mark.parametrize("argument", ["keep_last", "keep_best"])
def test_numbers_of_files_are_at_least_one_and_need_a_path_with_fields(argument: str) -> None:
    options: dict[str, Any] = {argument: 1}
    with pytest.raises(ArgumentError, match=r"model\.h5 is one file: there is nothing to keep"):
        ModelCheckpoint("model.h5", **options)
    for given in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match=argument):
            ModelCheckpoint("{epoch}.h5", **{argument: given})


@pytest.mark.asyncio
async def test_in_a_real_training_the_files_kept_are_whole_and_the_best(tmp_path: Path) -> None:
    model = Sequential([Dense(2, input_dim=2)], seed=1)
    model.compile("sgd", "mse")
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    score = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=next(scores)))
    checkpoint = ModelCheckpoint(
        tmp_path / "{epoch}-{score:.0f}.h5", "score", mode="max", keep_last=1, keep_best=2
    )
    x, y = np.eye(2, dtype="f4"), np.ones((2, 2), "f4")
    await Trainer(model).fit(x, y, epochs=5, verbose=0, callbacks=[score, checkpoint])
    assert files(tmp_path) == ["4-5.h5", "5-4.h5"]
