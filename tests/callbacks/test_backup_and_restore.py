"""BackupAndRestore: what is kept, when, and how a training goes on from it."""

from __future__ import annotations

import asyncio
import datetime
import io
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from asynccb import (
    ArgumentError,
    BackupIncomplete,
    Callback,
    CallbackError,
    CheckpointWriteError,
    FileRefused,
    FolderBusy,
    ResumeRefused,
    RunCancelled,
    Trainer,
)
from asynccb.callbacks import BackupAndRestore, CSVLogger, EarlyStopping, ProgbarLogger
from asynccb.models import Activation, Dense, Dropout, Sequential, load_model
from asynccb.storage import lock
from asynccb.storage.backups import BackupFolder
from asynccb.storage.lock import FolderLock
from asynccb.testing import Recorder, ScriptedModel, settle

if TYPE_CHECKING:
    from pathlib import Path

    from asynccb import History

X = np.arange(20.0).reshape(10, 2).astype("float32")
Y = np.arange(10) % 3
BATCHES = 5


def sequential(width: int = 6, optimizer: str = "adam") -> Sequential:
    model = Sequential(
        [Dense(width, activation="relu", input_dim=2), Dropout(0.3), Dense(3), Activation("softmax")], seed=1
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", ["accuracy"])
    return model


class Stop(Callback):
    """Stops or cancels the training behind a step."""

    changes_model = False

    def __init__(self, step: int, how: str = "stop") -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.step == self.step:
            getattr(self.run, self.how)("enough")


class Count(Callback):
    """Counts batches beside the training; each waits for the gate."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.count = 0
        self.loaded: Any = None
        self.gate = gate

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.loaded = dict(state)
        self.count = state["count"]


class FolderLockOfAnother:
    """What another training would do with the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = BackupFolder(folder)

    def __enter__(self) -> None:
        self._folder.lock("another")

    def __exit__(self, *_: object) -> None:
        self._folder.unlock()


class Patience(Callback):
    """Each batch waits for the backup before it, so that none is due while one is written."""

    changes_model = False
    backup: BackupAndRestore

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        while self.backup._writing:
            time.sleep(0.0005)


def backups(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".h5"))


def kept(path: str | Path) -> dict[str, Any]:
    """What a backup holds beside the model."""
    found: list[Any] = []
    sequential_ = sequential()
    sequential_.build((None, 2))
    sequential_.restore(os.fspath(path), found.append)
    resume: dict[str, Any] = found[0]["resume"]
    return resume


async def fit(
    folder: Path | None,
    *others: Callback,
    model: Any = None,
    save_freq: Any = "epoch",
    keep: int = 2,
    seed: int | None = 4,
    **more: Any,
) -> tuple[Any, History]:
    model = sequential() if model is None else model
    own = [] if folder is None else [BackupAndRestore(folder, save_freq, keep=keep)]
    for patient in others:
        if isinstance(patient, Patience):
            (patient.backup,) = own
    trainer = Trainer(model, seed=seed)
    asked = {"batch_size": 2, "epochs": 3, "verbose": 0} | more
    try:
        history = await trainer.fit(X, Y, callbacks=[*others, *own], **asked)
    except RunCancelled:
        assert trainer.last_run is not None
        history = trainer.last_run.history
    return model, history


def same(one: Any, other: Any) -> bool:
    a, b = one.capture(), other.capture()
    arrays = all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
    return arrays and getattr(a, "random", None) == getattr(b, "random", None)


# ---------------------------------------------------------------- going on


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 10, 14, 15])
async def test_what_was_stopped_or_cancelled_goes_on_to_the_same_bytes(
    tmp_path: Path, step: int, how: str
) -> None:
    whole, history = await fit(None, validation_data=(X, Y))
    _, half = await fit(tmp_path, Stop(step, how), validation_data=(X, Y))
    assert half.outcome == {"stop": "stopped", "cancel": "cancelled"}[how]
    seen = Recorder()
    model, again = await fit(tmp_path, seen, validation_data=(X, Y))
    assert same(model, whole)
    assert (again.rows(), again.outcome) == (history.rows(), "completed")
    trained = [hook for hook in seen.hooks if hook == "on_train_batch_end"]
    assert len(trained) == 3 * BATCHES - step


@pytest.mark.asyncio
async def test_a_training_that_had_ended_gives_its_history_at_once(tmp_path: Path) -> None:
    first, history = await fit(tmp_path)
    seen = Recorder()
    model, again = await fit(tmp_path, seen)
    assert seen.hooks == ["on_train_begin", "on_train_end"]
    assert (again.rows(), again.outcome, again.history) == (history.rows(), "completed", history.history)
    assert same(model, first)


@pytest.mark.asyncio
async def test_one_that_had_stopped_itself_stays_stopped_with_its_reason(tmp_path: Path) -> None:
    def stopper() -> EarlyStopping:
        return EarlyStopping("loss", min_delta=9.0, patience=1)

    _, history = await fit(tmp_path, stopper(), epochs=9)
    assert (len(history.epoch), history.outcome) == (2, "stopped")
    seen = Recorder()
    _, again = await fit(tmp_path, stopper(), seen, epochs=9)
    assert "on_train_batch_begin" not in seen.hooks
    assert (again.rows(), again.outcome, again.reason) == (history.rows(), "stopped", history.reason)


@pytest.mark.asyncio
async def test_epochs_may_grow_and_not_shrink(tmp_path: Path) -> None:
    whole, history = await fit(None, epochs=5)
    await fit(tmp_path, epochs=3)
    model, again = await fit(tmp_path, epochs=5)
    assert same(model, whole)
    assert again.rows() == history.rows()
    untouched = sequential()
    before = untouched.get_weights()
    with pytest.raises(
        ArgumentError, match="epochs=2: at least 5, the epochs that are trained already, or begun"
    ):
        await fit(tmp_path, model=untouched, epochs=2)
    assert all(map(np.array_equal, before, untouched.get_weights()))


@pytest.mark.asyncio
async def test_callbacks_may_be_added_and_one_that_is_gone_is_said(tmp_path: Path) -> None:
    await fit(tmp_path, Count(), Stop(7))
    with pytest.warns(RuntimeWarning, match=r"callbacks that are not there any more: Count\Z"):
        await fit(tmp_path, EarlyStopping("loss", patience=9))


@pytest.mark.asyncio
async def test_a_progress_bar_may_come_and_go_without_a_word(tmp_path: Path) -> None:
    await fit(tmp_path, ProgbarLogger(file=io.StringIO()), Stop(7))
    await fit(tmp_path)  # a warning would be an error


@pytest.mark.asyncio
async def test_a_callback_that_is_added_before_another_of_its_class_takes_nothing_from_it(
    tmp_path: Path,
) -> None:
    await fit(None, CSVLogger(tmp_path / "whole.csv"))
    await fit(tmp_path / "backup", CSVLogger(tmp_path / "log.csv"), Stop(12))
    await fit(tmp_path / "backup", CSVLogger(tmp_path / "new.csv"), CSVLogger(tmp_path / "log.csv"))
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [line[:2] for line in (tmp_path / "new.csv").read_text().splitlines()] == ["ep", "2,"]


@pytest.mark.asyncio
async def test_hooks_see_where_it_goes_on_and_no_epoch_begins_twice(tmp_path: Path) -> None:
    class Look(Recorder):
        at_begin: Any = None

        def on_train_begin(self, logs: Any = None) -> None:
            self.at_begin = self.run.resumed

    first = Look()
    await fit(tmp_path, first, Stop(7))
    assert first.at_begin is None
    again = Look()
    await fit(tmp_path, again)
    resumed = again.at_begin
    assert (resumed.epoch, resumed.batch, resumed.step) == (1, 2, 7)
    assert resumed.path == str(tmp_path / "backup-000003.h5")
    assert again.hooks.count("on_epoch_begin") == 1
    assert again.hooks.count("on_epoch_end") == 2


@pytest.mark.asyncio
async def test_a_seed_that_was_drawn_is_that_of_the_backup(tmp_path: Path) -> None:
    await fit(tmp_path, Stop(7), seed=None)
    (drawn,) = {kept(tmp_path / name)["settings"]["data"]["seed"] for name in backups(tmp_path)}
    whole, history = await fit(None, seed=drawn)
    model, again = await fit(tmp_path, seed=None)
    assert same(model, whole)
    assert again.rows() == history.rows()


@pytest.mark.asyncio
async def test_a_stop_in_a_validation_goes_on_before_it(tmp_path: Path) -> None:
    class StopInTest(Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self.run.stop("in the validation")

    whole, history = await fit(None, validation_data=(X, Y))
    await fit(tmp_path, StopInTest(), validation_data=(X, Y))
    model, again = await fit(tmp_path, validation_data=(X, Y))
    assert same(model, whole)
    assert again.rows() == history.rows()


@pytest.mark.asyncio
async def test_an_async_source_goes_on_in_its_middle(tmp_path: Path) -> None:
    class Source:
        def __init__(self) -> None:
            self.first, self.asked = (0, 0), list[tuple[int, int]]()

        def seek(self, number: int, batch: int) -> None:
            self.asked.append((number, batch))
            self.first = (number, batch)

        async def __aiter__(self) -> Any:
            number, at = self.first
            self.first = (number + 1, 0)
            for index in range(at, 4):
                yield X[index : index + 2] + number, Y[index : index + 2]

    async def train(*callbacks: Callback) -> tuple[Any, Any, Source]:
        model, source = sequential(), Source()
        history = await Trainer(model, seed=1).fit(source, epochs=3, verbose=0, callbacks=callbacks)
        return model, history, source

    whole, history, _ = await train()
    await train(Stop(6), BackupAndRestore(tmp_path))
    model, again, source = await train(BackupAndRestore(tmp_path))
    assert same(model, whole)
    assert again.rows() == history.rows()
    assert source.asked == [(1, 2)]


# ---------------------------------------------------------------- when, and what is kept


@pytest.mark.asyncio
async def test_one_is_there_before_the_first_batch(tmp_path: Path) -> None:
    model = ScriptedModel(gated=True)
    run = Trainer(model, seed=1).start(X, batch_size=2, verbose=0, callbacks=BackupAndRestore(tmp_path))
    await model.at_gate()
    assert backups(tmp_path) == ["backup-000001.h5"]
    model.open_for_good()
    await run


@pytest.mark.asyncio
@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (9, [0, 1, 2, 3])])
async def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    await fit(tmp_path, Patience(), keep=keep)
    places = [kept(tmp_path / name)["place"] for name in backups(tmp_path)]
    assert [(place["epoch"], place["phase"]) for place in places] == [(epoch, "epoch") for epoch in left]


@pytest.mark.asyncio
async def test_a_foreign_file_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "backup-000007.h5").write_bytes(b"of an older training")
    (tmp_path / "notes.txt").write_text("mine")
    await fit(tmp_path, Patience(), resume=False, keep=1)
    assert backups(tmp_path) == ["backup-000007.h5", "backup-000011.h5"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.asyncio
async def test_after_a_resume_the_ones_before_it_are_still_its_own(tmp_path: Path) -> None:
    await fit(tmp_path, Stop(6), keep=2)
    await fit(tmp_path, keep=1)
    assert len(backups(tmp_path)) == 1


@pytest.mark.asyncio
async def test_every_so_many_batches(tmp_path: Path) -> None:
    await fit(tmp_path, Patience(), save_freq=3, keep=99, epochs=2)
    assert [kept(tmp_path / name)["step"] for name in backups(tmp_path)] == [0, 3, 6, 9, 10]


async def settle_writer(backup: BackupAndRestore) -> None:
    await asyncio.get_running_loop().run_in_executor(backup._writer, lambda: None)
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("asynccb.callbacks.backup_and_restore.time", SimpleNamespace(monotonic=lambda: now))
    backup = BackupAndRestore(tmp_path, datetime.timedelta(minutes=1), keep=99)
    model = ScriptedModel(gated=True)
    run = Trainer(model, seed=1).start(X, batch_size=2, verbose=0, callbacks=backup)
    await model.open()
    now += 59.0
    await model.open()
    now += 1.0
    await model.open()
    model.open_for_good()
    await run
    steps = [h5_step(tmp_path / name) for name in backups(tmp_path)]
    assert steps == [0, 3, 5]


def h5_step(path: Path) -> int:
    from asynccb.models.plain import read_plain

    found: list[Any] = []
    read_plain(str(path), found.append)
    step: int = found[0]["resume"]["step"]
    return step


@pytest.mark.asyncio
async def test_while_one_is_written_the_next_waits_and_is_of_the_newest_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, writes = threading.Event(), list[int]()
    original = BackupAndRestore._write_now

    def slow(self: Any, unit: Any, *rest: Any) -> None:
        writes.append(unit.step)
        if unit.step:
            assert gate.wait(20)
        original(self, unit, *rest)

    monkeypatch.setattr(BackupAndRestore, "_write_now", slow)
    model = ScriptedModel(gated=True)
    backup = BackupAndRestore(tmp_path, 1, keep=99)
    run = Trainer(model, seed=1).start(X, batch_size=1, verbose=0, callbacks=backup)
    await model.open(6)
    assert run.stats.queues["BackupAndRestore: backups"] == (2, "skip", 1, 1)
    gate.set()
    while backup._writing:
        await settle_writer(backup)
    await settle()
    model.open_for_good()
    await run
    assert writes[:3] == [0, 1, 7]
    assert writes[-1] == 10
    assert run.stats.waits.get("pool", 0) == 0


@pytest.mark.asyncio
async def test_every_backup_is_announced_when_it_is_durable(tmp_path: Path) -> None:
    class Listen(Callback):
        def __init__(self) -> None:
            self.heard: list[tuple[str, int, bool]] = []

        def on_checkpoint_saved(self, path: str, epoch: int) -> None:
            self.heard.append((os.path.basename(path), epoch, os.path.exists(path)))

    listen = Listen()
    await fit(tmp_path, Patience(), listen)
    assert listen.heard == [
        (f"backup-{n:06d}.h5", epoch, True) for n, epoch in [(1, 0), (2, 0), (3, 1), (4, 2)]
    ]


@pytest.mark.asyncio
async def test_two_of_them_keep_two_folders(tmp_path: Path) -> None:
    whole, _ = await fit(None)
    second = BackupAndRestore(tmp_path / "b", 2)
    await fit(tmp_path / "a", second, Stop(8))
    for folder in ("a", "b"):
        model, _ = await fit(None, resume=tmp_path / folder)
        assert same(model, whole)


@pytest.mark.asyncio
async def test_of_two_folders_the_first_that_has_any_counts_and_both_keep_their_number(
    tmp_path: Path,
) -> None:
    whole, _ = await fit(None)

    def both() -> list[BackupAndRestore]:
        return [BackupAndRestore(tmp_path / "a"), BackupAndRestore(tmp_path / "b")]

    await fit(None, *both(), Stop(8))
    for path in (tmp_path / "a").glob("*.h5"):
        path.unlink()
    model, _ = await fit(None, *both())
    assert same(model, whole)
    assert [len(backups(tmp_path / folder)) for folder in ("a", "b")] == [2, 2]


@pytest.mark.asyncio
async def test_a_backup_that_another_training_removes_meanwhile_says_whose_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fit(tmp_path, Stop(8))
    monkeypatch.setattr("asynccb.resume._candidates", lambda path: [str(tmp_path / "backup-000099.h5")])
    with pytest.raises(FolderBusy, match=tmp_path.name):
        await fit(tmp_path)


@pytest.mark.asyncio
async def test_a_backup_is_a_model_file_that_other_tools_open(tmp_path: Path) -> None:
    model, _ = await fit(tmp_path)
    path = tmp_path / backups(tmp_path)[-1]
    assert same(load_model(path), model)
    with h5py.File(path) as file:
        assert "layers/dense/vars/0" in file


# ---------------------------------------------------------------- one cut through everything


@pytest.mark.asyncio
async def test_a_callback_that_lags_behind_gives_its_state_of_the_cut(tmp_path: Path) -> None:
    gate = asyncio.Event()
    count = Count(gate)
    model = ScriptedModel(gated=True)
    backup = BackupAndRestore(tmp_path, 3)
    run = Trainer(model, seed=1).start(X, batch_size=1, verbose=0, callbacks=[count, backup])
    await model.open(7)
    # At the cut of step 3 it has handled nothing, and now 7 batches lie behind it.
    assert (count.count, h5_states(tmp_path)["Count"]) == (0, {"count": 0})
    gate.set()
    await settle()
    while backup._writing:
        await settle_writer(backup)
        await settle()
    assert h5_states(tmp_path, "backup-000002.h5")["Count"] == {"count": 3}
    model.open_for_good()
    await run
    assert h5_states(tmp_path)["Count"] == {"count": 10}


def h5_states(folder: Path, name: str | None = None) -> dict[str, Any]:
    from asynccb.models.plain import read_plain

    found: list[Any] = []
    read_plain(str(folder / (name or backups(folder)[-1])), found.append)
    states: dict[str, Any] = found[0]["resume"]["callbacks"]
    return states


@pytest.mark.asyncio
async def test_one_that_never_reports_fails_the_backup_by_name_and_the_one_before_stands(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    count = Count(gate)
    trainer = Trainer(ScriptedModel(), seed=1)
    trainer._limits = trainer._limits._replace(unit=0.05)
    run = trainer.start(X, batch_size=1, verbose=0, callbacks=[count, BackupAndRestore(tmp_path, 3)])
    while not run._parts.failures.errors:  # noqa: ASYNC110  a thread brings it about
        await asyncio.sleep(0.001)
    gate.set()
    with pytest.raises(CallbackError) as raised:
        await run
    cause = raised.value.__cause__
    assert isinstance(cause, BackupIncomplete)
    assert cause.missing == ["Count (still busy with what came before)"]
    assert backups(tmp_path) == ["backup-000001.h5"]


@pytest.mark.asyncio
@pytest.mark.parametrize("beside", [False, True])
async def test_a_state_that_is_no_plain_data_is_refused_by_its_place(tmp_path: Path, beside: bool) -> None:
    class Inline(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {1, 2}}

    class Beside(Inline):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    with pytest.raises((TypeError, CallbackError)) as raised:
        await fit(tmp_path, Beside() if beside else Inline())
    assert "side.seen" in str(raised.value) or "Inline.seen" in str(raised.value)


@pytest.mark.asyncio
async def test_files_are_durable_before_a_backup_counts_on_them(tmp_path: Path) -> None:
    order: list[str] = []

    class Slow(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await asyncio.sleep(0)
            order.append(f"row {epoch}")

        async def sync(self) -> None:
            order.append("sync")

    class Listen(Callback):
        def on_checkpoint_saved(self, path: str, epoch: int) -> None:
            order.append(os.path.basename(path))

    await fit(tmp_path, Slow(), Listen(), epochs=1)
    assert order.index("row 0") < len(order) - order[::-1].index("sync") - 1 < order.index("backup-000002.h5")


@pytest.mark.asyncio
async def test_rows_that_cannot_be_made_durable_are_the_failure_of_their_callback(tmp_path: Path) -> None:
    class Broken(Callback):
        on_error = "warn"

        async def sync(self) -> None:
            raise OSError(5, "the disk is gone")

    _, history = await fit(tmp_path, Broken())
    (failure,) = history.failures
    assert (failure.callback, failure.hook, str(failure.exception)) == (
        "Broken",
        "sync",
        "[Errno 5] the disk is gone",
    )
    assert len(backups(tmp_path)) == 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.asyncio
async def test_another_model_or_data_is_refused_with_all_differences_and_nothing_is_changed(
    tmp_path: Path,
) -> None:
    await fit(tmp_path, Stop(7))
    other = sequential(width=7, optimizer="sgd")
    before = other.capture()
    with pytest.raises(ResumeRefused) as raised:
        await Trainer(other, seed=5).fit(
            X[:8], Y[:8], batch_size=4, verbose=0, callbacks=BackupAndRestore(tmp_path)
        )
    said = "\n".join(raised.value.differences)
    for part in (
        "6 there, 7 here",
        "samples: 10 there, 8 here",
        "seed: 4 there, 5 here",
        "batch_size: 2 there",
    ):
        assert part in said
    assert "optimizer.class_name" in said or "optimizer" in said
    assert all(np.array_equal(before.arrays[name], array) for name, array in other.capture().arrays.items())
    assert len(backups(tmp_path)) == 2


@pytest.mark.asyncio
async def test_another_number_of_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fit(tmp_path, Stop(7))
    monkeypatch.setattr("asynccb.resume.blas_threads", lambda: 17)
    with pytest.raises(ResumeRefused, match=r"blas_threads: [0-9]+ there, 17 here"):
        await fit(tmp_path)


@pytest.mark.asyncio
async def test_damage_of_the_newest_falls_back_and_names_both(tmp_path: Path) -> None:
    whole, history = await fit(None)
    await fit(tmp_path, Stop(8))
    older, newest = backups(tmp_path)
    damaged = bytearray((tmp_path / newest).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / newest).write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match=rf"(?s){older}, an older backup: .*{newest} was not loaded"):
        model, again = await fit(tmp_path)
    assert same(model, whole)
    assert again.rows() == history.rows()


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", ["cut", "without its seal", "empty"])
async def test_where_all_are_damaged_it_does_not_silently_begin_anew(tmp_path: Path, damage: str) -> None:
    await fit(tmp_path, Stop(8))
    for name in backups(tmp_path):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(
            {"cut": content[:-500], "without its seal": content[:-56], "empty": b""}[damage]
        )
    with pytest.raises(FileRefused):
        await fit(tmp_path)


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_put_back_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Bare:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 0.0}

    with pytest.raises(ArgumentError, match="backups are asked for"):
        await Trainer(Bare()).fit(X, verbose=0, callbacks=BackupAndRestore(tmp_path))


@pytest.mark.asyncio
async def test_a_model_of_plain_state_is_put_back(tmp_path: Path) -> None:
    first, _ = await fit(tmp_path, Stop(7), model=ScriptedModel())
    assert first.steps == 7
    again, history = await fit(tmp_path, model=ScriptedModel())
    assert (again.steps, len(again.sizes), again.weights.tolist()) == (15, 8, [15.0] * 16)
    assert history.epoch == [0, 1, 2]


@pytest.mark.asyncio
async def test_data_that_cannot_go_on_in_its_middle_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter([(X, Y)])

    with pytest.raises(
        ArgumentError, match=r"x=Stream: data that can go on in its middle.*seek\(pass, batch\)"
    ):
        await Trainer(sequential()).fit(Stream(), verbose=0, callbacks=BackupAndRestore(tmp_path))
    with pytest.raises(ArgumentError, match=r"validation_data=Stream: data that can go on in its middle"):
        await fit(tmp_path, validation_data=Stream(), validation_steps=1)


@pytest.mark.asyncio
async def test_validation_data_that_is_always_iterated_anew_need_not(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter([(X[:6], Y[:6]), (X[6:], Y[6:])])

    whole, history = await fit(None, validation_data=Stream())
    await fit(tmp_path, Stop(7), validation_data=Stream())
    model, again = await fit(tmp_path, validation_data=Stream())
    assert same(model, whole)
    assert again.rows() == history.rows()


@pytest.mark.asyncio
async def test_the_folder_belongs_to_one_training_at_a_time(tmp_path: Path) -> None:
    model = ScriptedModel(gated=True)
    run = Trainer(model, seed=1).start(
        X, batch_size=2, verbose=0, callbacks=BackupAndRestore(tmp_path), name="the first"
    )
    await model.at_gate()
    with pytest.raises(FolderBusy, match="the first"):
        await fit(tmp_path, model=ScriptedModel(), seed=1)
    model.open_for_good()
    await run
    await fit(tmp_path, model=ScriptedModel(), seed=1)


@pytest.mark.asyncio
async def test_a_second_training_in_the_folder_touches_neither_files_nor_its_own_model(
    tmp_path: Path,
) -> None:
    folder, log = tmp_path / "backup", tmp_path / "log.csv"
    gated = ScriptedModel(gated=True)
    run = Trainer(gated, seed=1).start(
        X, batch_size=5, epochs=2, verbose=0, callbacks=[CSVLogger(log), BackupAndRestore(folder)]
    )
    await gated.open(3)
    await settle()
    before = log.read_bytes()
    assert before
    for resume in (None, False):
        second, seen = ScriptedModel(), Recorder()
        with pytest.raises(FolderBusy):
            await fit(folder, CSVLogger(log), seen, model=second, seed=1, resume=resume)
        assert (seen.hooks, second.steps) == ([], 0)
    assert log.read_bytes() == before
    gated.open_for_good()
    await run


@pytest.mark.asyncio
async def test_a_training_that_does_not_even_begin_gives_the_folder_back(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            raise ZeroDivisionError

    await fit(tmp_path, Stop(7))
    own = BackupAndRestore(tmp_path)
    for wrong, error in (({"callbacks": [Broken(), own]}, ZeroDivisionError), ({"epochs": 1}, ArgumentError)):
        asked = {"batch_size": 2, "epochs": 3, "callbacks": own} | wrong
        with pytest.raises(error):
            await Trainer(sequential(), seed=4).fit(X, Y, verbose=0, **asked)
        with FolderLockOfAnother(tmp_path):
            pass


@pytest.mark.asyncio
async def test_a_backup_that_cannot_be_written_is_an_error_and_the_one_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"
    failing = False
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if failing and str(target).startswith(str(folder)):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    model = ScriptedModel(gated=True)
    run = Trainer(model, seed=1).start(X, batch_size=2, verbose=0, callbacks=BackupAndRestore(folder, 2))
    await model.open()
    failing = True
    model.open_for_good()
    with pytest.raises(CallbackError) as raised:
        await run
    assert isinstance(raised.value.__cause__, CheckpointWriteError)
    assert raised.value.__cause__.errno == 28
    assert backups(folder) == ["backup-000001.h5"]


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "batch", datetime.timedelta(0), None])
def test_a_save_freq_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="save_freq"):
        BackupAndRestore("folder", given)


@pytest.mark.parametrize("given", [0, True, "all"])
def test_keeping_nothing_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="keep"):
        BackupAndRestore("folder", keep=given)


# ---------------------------------------------------------------- resume=


@pytest.mark.asyncio
async def test_resume_takes_a_file_too(tmp_path: Path) -> None:
    whole, _ = await fit(None)
    await fit(tmp_path, Stop(8))
    for name in backups(tmp_path):
        model, _ = await fit(None, resume=tmp_path / name)
        assert same(model, whole)


@pytest.mark.asyncio
async def test_resume_false_begins_anew_and_leaves_the_older_ones(tmp_path: Path) -> None:
    await fit(tmp_path, Stop(8))
    before = backups(tmp_path)
    seen = Recorder()
    await fit(tmp_path, seen, resume=False)
    assert seen.hooks.count("on_train_batch_end") == 15
    assert set(before) < set(backups(tmp_path))


@pytest.mark.asyncio
async def test_an_empty_folder_begins_anew(tmp_path: Path) -> None:
    seen = Recorder()
    await fit(None, seen, resume=tmp_path)
    assert seen.hooks.count("on_train_batch_end") == 15


@pytest.mark.asyncio
@pytest.mark.parametrize("given", ["nowhere", "nowhere/backup.h5", 7, True])
async def test_what_is_not_there_is_refused(tmp_path: Path, given: Any) -> None:
    path = tmp_path / given if isinstance(given, str) else given
    with pytest.raises(ArgumentError, match="resume="):
        await fit(None, resume=path)


@pytest.mark.asyncio
async def test_a_model_file_is_no_backup(tmp_path: Path) -> None:
    model = sequential()
    model.build((None, 2))
    model.save(tmp_path / "model.h5")
    with pytest.raises(ResumeRefused, match="load it with load_model"):
        await fit(None, resume=tmp_path / "model.h5")


# What a training leaves whose loop was closed under it ----------------------------------------------------


def begun(folder: Path) -> BackupAndRestore:
    """One that has the folder, as a training leaves it that was never ended."""
    callback = BackupAndRestore(folder)
    callback.on_train_begin()
    return callback


def is_free(folder: Path) -> bool:
    other = FolderLock(folder)
    try:
        other.acquire("somebody else")
    except FolderBusy:
        return False
    other.release()
    return True


def test_the_next_training_has_the_folder_of_one_that_was_left_behind_at_once(tmp_path: Path) -> None:
    callback = begun(tmp_path)
    for _ in range(50):
        callback.on_train_begin()
    assert not is_free(tmp_path)
    callback._lease = None
    assert is_free(tmp_path)


def test_one_that_was_left_behind_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    code = f"""
from asynccb.callbacks import BackupAndRestore
callback = BackupAndRestore({str(tmp_path)!r})
callback.on_train_begin()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert is_free(tmp_path)


@pytest.mark.asyncio
async def test_on_the_loop_a_thread_gives_the_folder_back(tmp_path: Path) -> None:
    callback, main, gave = await asyncio.to_thread(begun, tmp_path), threading.get_ident(), threading.Event()
    threads: list[int] = []
    assert callback._lease is not None
    unlock = callback._lease.folder.unlock

    def noted() -> None:
        threads.append(threading.get_ident())
        unlock()
        gave.set()

    callback._lease.folder.unlock = noted  # type: ignore[method-assign]
    callback._lease = None
    await asyncio.to_thread(gave.wait, 10)
    assert threads
    assert main not in threads
    assert await asyncio.to_thread(is_free, tmp_path)


def test_where_no_thread_can_be_had_the_folder_is_given_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    callback = begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "get_running_loop", object)  # as on one
        patch.setattr(threading.Thread, "start", no_thread)
        callback._lease = None
    assert is_free(tmp_path)


def test_the_collector_may_come_to_it_from_within_any_lock_of_ours(tmp_path: Path) -> None:
    """From within the writer's, where it could only wait for itself, and while another folder is locked."""
    callback = begun(tmp_path)
    done = []

    def collected() -> None:
        with callback._writer._lock, lock._registry:
            callback._lease = None
        done.append(is_free(tmp_path))

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(10)
    assert done == [True]
