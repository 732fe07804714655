"""ModelCheckpoint: which epochs it saves under which name, whose weights the file has, what a fault costs."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb import ArgumentError, Callback, CallbackError, CheckpointWriteError, Trainer
from asynccb.callbacks import LambdaCallback
from asynccb.callbacks.hooks import read_hooks
from asynccb.callbacks.model_checkpoint import ModelCheckpoint
from asynccb.models import Activation, Dense, Sequential, load_model
from asynccb.storage.atomic import atomic_write
from asynccb.storage.hdf5 import hdf5_thread
from asynccb.testing import ScriptedModel
from asynccb.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

pytestmark = pytest.mark.filterwarnings("error")


class FakeSnapshot:
    """Counts its releases, and writes its number as the file."""

    def __init__(self, number: int, before: Callable[[], None]) -> None:
        self.step = self.epoch = self.number = number
        self.released = 0
        self.alone = True
        self.freed = threading.Event()
        self.weights_only: bool | None = None
        self._before = before

    @property
    def arrays(self) -> dict[str, Any]:
        return {}

    def to_model(self) -> Any:
        return None

    def save(self, path: str | os.PathLike[str], *, weights_only: bool = False) -> None:
        assert not self.released
        self._before()
        self.weights_only = weights_only
        atomic_write(path, lambda temporary: Path(temporary).write_text(str(self.number)))

    def release(self) -> None:
        self.released += 1
        self.freed.set()


class FakeRun:
    """What a checkpoint asks of its run."""

    name = "fake"

    def __init__(self, before: Callable[[], None] = lambda: None, **directions: str) -> None:
        self.snapshots: list[FakeSnapshot] = []
        self.saved: list[tuple[str, int]] = []
        self._before = before
        self._directions = directions

    room = True

    def expect_copies(self) -> None:
        pass

    def check_path(self, path: str, *, weights_only: bool) -> None: ...

    def room_for_copy(self, callback: object) -> bool:
        return self.room

    def snapshot_now(self, callback: object, *, pooled: bool) -> FakeSnapshot:
        assert pooled
        self.snapshots.append(FakeSnapshot(len(self.snapshots), self._before))
        return self.snapshots[-1]

    def announce_saved(self, path: str, epoch: int) -> None:
        self.saved.append((Path(path).name, epoch))

    def direction(self, metric: str) -> str | None:
        return self._directions.get(metric)


def with_run(checkpoint: ModelCheckpoint, run: FakeRun | None = None, **params: Any) -> FakeRun:
    checkpoint.run = run or FakeRun()
    checkpoint.set_params({"metrics": ["loss"], "do_validation": True, **params})
    run = checkpoint.run
    assert isinstance(run, FakeRun)
    return run


async def trained(checkpoint: ModelCheckpoint, *epochs: dict[str, Any], first: int = 0) -> None:
    """One training, each save finished before the next epoch."""
    begun = checkpoint.on_train_begin()
    await begun
    for epoch, logs in enumerate(epochs, first):
        checkpoint.on_epoch_begin(epoch)
        writing = checkpoint.on_epoch_end(epoch, logs)
        if writing is not None:
            await writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def losses(*values: Any) -> list[dict[str, Any]]:
    return [{"val_loss": value, "loss": 1.0} for value in values]


# ---------------------------------------------------------------- names and epochs


def test_the_positional_order_and_defaults_of_the_page_hold() -> None:
    signature = inspect.signature(ModelCheckpoint)
    positional = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert list(positional.items())[1:] == [
        ("monitor", "val_loss"),
        ("verbose", 0),
        ("save_best_only", False),
        ("save_weights_only", False),
        ("mode", "auto"),
        ("period", 1),
    ]
    assert list(signature.parameters)[7:] == [
        "save_freq",
        "initial_value_threshold",
        "keep_last",
        "keep_best",
    ]


@pytest.mark.asyncio
async def test_epochs_in_names_count_from_one(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "weights.{epoch:02d}-{val_loss:.2f}.hdf5")
    run = with_run(checkpoint)
    await trained(checkpoint, *losses(0.5, 0.25))
    assert names(tmp_path) == ["weights.01-0.50.hdf5", "weights.02-0.25.hdf5"]
    assert run.saved == [("weights.01-0.50.hdf5", 0), ("weights.02-0.25.hdf5", 1)]
    assert [snapshot.released for snapshot in run.snapshots] == [1, 1]


@pytest.mark.asyncio
async def test_a_log_key_named_epoch_does_not_change_the_name(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{acc}.h5")
    with_run(checkpoint)
    await trained(checkpoint, {"epoch": 40, "accuracy": 0.5})
    assert names(tmp_path) == ["1-0.5.h5"]


@pytest.mark.asyncio
async def test_period_saves_every_so_many_epochs_and_counts_anew_in_each_training(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", period=2)
    run = with_run(checkpoint)
    await trained(checkpoint, *losses(*[1.0] * 7))
    assert [epoch for _, epoch in run.saved] == [1, 3, 5]
    await trained(checkpoint, *losses(1.0, 1.0), first=3)
    assert [epoch for _, epoch in run.saved] == [1, 3, 5, 4]


@pytest.mark.asyncio
async def test_a_fresh_object_counts_from_its_own_start_when_a_training_resumes(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", period=2)
    run = with_run(checkpoint)
    await trained(checkpoint, *losses(1.0, 1.0, 1.0), first=3)
    assert [epoch for _, epoch in run.saved] == [4]


@pytest.mark.asyncio
@pytest.mark.parametrize("weights_only", [False, True])
async def test_save_weights_only_is_handed_to_the_snapshot(tmp_path: Path, weights_only: bool) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "a/b/w.h5", "loss", 0, False, weights_only)
    run = with_run(checkpoint)
    await trained(checkpoint, {"loss": 1.0})
    assert run.snapshots[0].weights_only is weights_only
    assert (tmp_path / "a/b/w.h5").read_text() == "0"


# ---------------------------------------------------------------- the best


async def saved_epochs(checkpoint: ModelCheckpoint, *epochs: dict[str, Any]) -> list[int]:
    run = with_run(checkpoint, FakeRun())
    await trained(checkpoint, *epochs)
    return [epoch for _, epoch in run.saved]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("auto", [0.5, 0.5, 0.4, 0.6, 0.3], [0, 2, 4]),
        ("max", [0.5, 0.5, 0.4, 0.6, 0.3], [0, 3]),
        ("min", [math.nan, 0.5, math.nan, 0.4], [1, 3]),
        ("max", [math.nan, math.nan], []),
        ("min", [math.inf, 3.0, -math.inf, -math.inf], [1, 2]),
        ("max", [-math.inf, 3.0, math.inf, math.inf], [1, 2]),
        ("min", [np.float32(0.5), np.array(0.25), np.array([0.125])], [0, 1, 2]),
    ],
)
async def test_only_what_is_strictly_better_is_saved(
    tmp_path: Path, mode: str, values: list[Any], expected: list[int]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True, mode=mode)
    assert await saved_epochs(checkpoint, *losses(*values)) == expected


@pytest.mark.asyncio
async def test_with_a_period_better_epochs_in_between_are_neither_saved_nor_remembered(
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True, period=2)
    assert await saved_epochs(checkpoint, *losses(0.1, 0.5, 0.2, 0.4)) == [1, 3]


def naive_saves(values: list[float], mode: str) -> list[int]:
    """The rule in ten lines, for comparison."""
    saved: list[int] = []
    best: float | None = None
    for epoch, value in enumerate(values):
        if math.isnan(value) or (math.isinf(value) and (value > 0) == (mode == "min")):
            continue
        if best is None or (value < best if mode == "min" else value > best):
            best = value
            saved.append(epoch)
    return saved


@given(st.lists(st.floats(), max_size=8), st.sampled_from(["min", "max"]))
def test_the_epochs_saved_are_those_of_the_rule(values: list[float], mode: str) -> None:
    checkpoint = ModelCheckpoint("w.h5", save_best_only=True, mode=mode)
    checkpoint.run = FakeRun()
    saved = []
    for epoch, logs in enumerate(losses(*values)):
        writing = checkpoint.on_epoch_end(epoch, logs)
        checkpoint._waiting = None
        if writing is not None:
            saved.append(epoch)
            writing.close()
    assert saved == naive_saves(values, mode)


KINDS: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "number": 0.5,
    "float32": np.float32(0.25),
    "array": np.zeros(2),
    "missing": None,
}


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["min", "max"])
async def test_every_short_sequence_of_kinds_saves_what_the_rule_says(tmp_path: Path, mode: str) -> None:
    """Missing and not a number: saved. NaN and the worst infinity: never. The rest: if better."""
    for kinds in itertools.product(KINDS, repeat=3):
        checkpoint = ModelCheckpoint(tmp_path / "w.h5", "loss", save_best_only=True, mode=mode)
        checkpoint.run = FakeRun()
        saved: list[int] = []
        best = math.inf if mode == "min" else -math.inf
        expected = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for epoch, kind in enumerate(kinds):
                writing = checkpoint.on_epoch_end(epoch, {} if kind == "missing" else {"loss": KINDS[kind]})
                checkpoint._waiting = None
                if writing is not None:
                    saved.append(epoch)
                    writing.close()
                if kind in ("missing", "array"):
                    expected.append(epoch)
                elif KINDS[kind] < best if mode == "min" else KINDS[kind] > best:
                    best = KINDS[kind]
                    expected.append(epoch)
        assert (kinds, saved) == (kinds, expected)
        assert checkpoint.best == best


@pytest.mark.asyncio
async def test_the_best_starts_anew_with_each_training(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True)
    assert await saved_epochs(checkpoint, *losses(0.5, 0.4)) == [0, 1]
    assert checkpoint.best == 0.4
    assert await saved_epochs(checkpoint, *losses(0.9, 0.95)) == [0]


@pytest.mark.asyncio
async def test_a_resumed_training_goes_on_with_its_state(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True, period=2)
    await saved_epochs(first, *losses(0.9, 0.5, 0.4))
    state = first.state_dict()
    assert (state["monitor"]["best"], state["epochs_since_last_save"]) == (0.5, 1)
    second = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True, period=2)
    run = with_run(second)
    await second.on_train_begin()
    second.load_state_dict(state)
    assert second.on_epoch_end(3, {"val_loss": 0.6}) is None
    assert second.on_epoch_end(4, {"val_loss": 0.1}) is None
    writing = second.on_epoch_end(5, {"val_loss": 0.3})
    assert writing is not None
    await writing
    assert run.saved == [("w.h5", 5)]


@pytest.mark.asyncio
@pytest.mark.parametrize(("threshold", "expected"), [(0.45, [1]), (math.inf, [0, 1]), (0.1, [])])
async def test_an_initial_value_must_be_beaten_first(
    tmp_path: Path, threshold: float, expected: list[int]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", save_best_only=True, initial_value_threshold=threshold)
    assert await saved_epochs(checkpoint, *losses(0.5, 0.4)) == expected
    assert await saved_epochs(checkpoint, *losses(0.5, 0.4)) == expected


@pytest.mark.asyncio
async def test_the_models_own_direction_decides_in_auto_mode(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", "val_score", save_best_only=True)
    run = with_run(checkpoint, FakeRun(score="max"))
    await trained(checkpoint, *({"val_score": value} for value in (1.0, 2.0, 1.5)))
    assert [epoch for _, epoch in run.saved] == [0, 1]


def test_an_unknown_mode_warns_and_is_auto() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        ModelCheckpoint("w.h5", mode="foo")
    assert str(caught[0].message) == "ModelCheckpoint mode foo is unknown, fallback to auto mode."
    assert caught[0].filename == __file__


# ---------------------------------------------------------------- what is missing


@pytest.mark.asyncio
async def test_a_missing_monitor_warns_once_and_saves_as_keras_3_does(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", "acc", save_best_only=True)
    with pytest.warns(RuntimeWarning) as caught:
        assert await saved_epochs(checkpoint, {"loss": 1.0}, {"loss": 1.0}) == [0, 1]
    assert [str(w.message) for w in caught] == ["Can save best model only with acc available."]


@pytest.mark.asyncio
async def test_a_monitor_of_many_numbers_warns_once_and_saves(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5", "a", save_best_only=True)
    with pytest.warns(RuntimeWarning) as caught:
        assert await saved_epochs(checkpoint, *[{"a": np.zeros(2)}] * 2) == [0, 1]
    assert [str(w.message) for w in caught] == [
        "Can save best model only when `monitor` is a scalar value. Received: [0. 0.]. "
        "Falling back to `save_best_only=False`."
    ]


@pytest.mark.asyncio
async def test_without_save_best_only_the_monitor_does_not_matter(tmp_path: Path) -> None:
    assert await saved_epochs(ModelCheckpoint(tmp_path / "{epoch}.h5"), {"loss": 1.0}) == [0]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("template", "best"), [("{epoch}-{val_loss:.1f}.h5", False), ("{epoch}.h5", True), ("{val_acc}.h5", True)]
)
async def test_epochs_without_validation_are_skipped_with_one_warning(
    tmp_path: Path, template: str, best: bool
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / template, save_best_only=best)
    plain, validated = {"loss": 1.0}, {"loss": 1.0, "val_loss": 0.5, "val_accuracy": 0.5}
    with pytest.warns(RuntimeWarning) as caught:
        assert await saved_epochs(checkpoint, plain, plain, validated, plain) == [2]
    assert len(caught) == 1
    assert str(caught[0].message).startswith(
        "ModelCheckpoint skips epochs without validation, which have no val_"
    )


@pytest.mark.asyncio
async def test_an_unknown_field_is_refused_before_the_first_batch_if_no_callback_can_add_it(
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{val_los}.h5")
    with_run(checkpoint, metrics=["loss", "acc", "val_loss", "val_acc"], log_keys_open=False)
    with pytest.raises(ArgumentError) as caught:
        checkpoint.on_train_begin()
    assert "{val_los} is not in the logs" in str(caught.value)
    assert 'Did you mean "val_loss"' in str(caught.value)


@pytest.mark.asyncio
@pytest.mark.parametrize("template", ["{epoch}", "{loss}", "{accuracy}", "{val_accuracy}", "{val_loss}"])
async def test_known_fields_in_either_spelling_are_not_refused(tmp_path: Path, template: str) -> None:
    checkpoint = ModelCheckpoint(tmp_path / f"{template}.h5")
    with_run(checkpoint, metrics=["loss", "acc"], log_keys_open=False)
    await checkpoint.on_train_begin()


@pytest.mark.asyncio
@pytest.mark.parametrize("params", [{"log_keys_open": True}, {}, {"log_keys_open": False, "metrics": []}])
async def test_a_field_that_may_still_come_is_refused_at_the_first_epochs_end(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{lr}.h5", period=5)
    with_run(checkpoint, **params)
    await checkpoint.on_train_begin()
    with pytest.raises(ArgumentError, match=r"\{lr\} is not in the logs, which have loss, val_loss, epoch"):
        checkpoint.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})


@pytest.mark.asyncio
async def test_a_misspelt_field_is_refused_in_an_epoch_without_validation_too(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{val_loss}-{los}.h5")
    with_run(checkpoint)
    await checkpoint.on_train_begin()
    with pytest.raises(ArgumentError, match=r"\{los\} is not in the logs"):
        checkpoint.on_epoch_end(0, {"loss": 1.0})


def test_hooks_called_by_hand_without_a_run_say_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="ModelCheckpoint serves no run"):
        ModelCheckpoint("w.h5").on_epoch_end(0, {"loss": 1.0})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"filepath": "w{epoch"}, "malformed"),
        ({"filepath": "{loss.__class__}"}, "reaches into a value"),
        ({"period": 0}, "period=0: an integer of at least 1"),
        ({"period": 1.5}, "period=1.5: an integer of at least 1"),
        ({"period": True}, "period=True: an integer of at least 1"),
        ({"save_freq": 0}, 'save_freq=0: an integer of at least 1, or "epoch"'),
        ({"save_freq": "batch"}, "save_freq='batch': an integer of at least 1, or \"epoch\""),
        ({"save_freq": 5, "period": 2}, "period=2: either period (epochs) or save_freq (batches), not both"),
        ({"initial_value_threshold": math.nan}, "initial_value_threshold=nan: a number, or None"),
        ({"initial_value_threshold": "best"}, "initial_value_threshold='best': a number, or None"),
        ({"monitor": ""}, "monitor='': the name of a metric"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ModelCheckpoint(**{"filepath": "w.h5", **arguments})
    assert words in str(caught.value)


@pytest.mark.asyncio
async def test_a_folder_that_cannot_be_written_is_refused_at_train_begin(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = ModelCheckpoint(tmp_path / "file" / "w.h5")
    with_run(checkpoint)
    with pytest.raises(ArgumentError, match="its folder cannot be written"):
        await checkpoint.on_train_begin()


# ---------------------------------------------------------------- what is printed


@pytest.mark.asyncio
async def test_the_lines_are_those_of_keras_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w{epoch}.h5"
    checkpoint = ModelCheckpoint(path, verbose=1, save_best_only=True)
    await saved_epochs(checkpoint, *losses(0.5, 0.4, 0.4))
    assert capsys.readouterr().out == (
        f"\nEpoch 1: val_loss improved from None to 0.50000, saving model to {tmp_path}/w1.h5\n"
        f"\nEpoch 1: finished saving model to {tmp_path}/w1.h5\n"
        f"\nEpoch 2: val_loss improved from 0.50000 to 0.40000, saving model to {tmp_path}/w2.h5\n"
        f"\nEpoch 2: finished saving model to {tmp_path}/w2.h5\n"
        "\nEpoch 3: val_loss did not improve from 0.40000\n"
    )


@pytest.mark.asyncio
async def test_a_plain_save_is_one_line_before_and_one_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await saved_epochs(ModelCheckpoint(tmp_path / "w.h5", verbose=1), {"loss": 1.0})
    assert capsys.readouterr().out == (
        f"\nEpoch 1: saving model to {tmp_path}/w.h5\n\nEpoch 1: finished saving model to {tmp_path}/w.h5\n"
    )


@pytest.mark.asyncio
async def test_nothing_is_printed_by_default_and_control_characters_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await saved_epochs(ModelCheckpoint(tmp_path / "w.h5"), {"loss": 1.0})
    assert capsys.readouterr().out == ""
    name = "a\x1b[2J"
    checkpoint = ModelCheckpoint(tmp_path / "w\x1b]0;x\x07.h5", name, 1, True)
    await saved_epochs(checkpoint, {name: 1.0}, {name: 2.0})
    assert "\x1b" not in capsys.readouterr().out


# ---------------------------------------------------------------- every so many batches


async def batches(checkpoint: ModelCheckpoint, *epochs: int, logs: dict[str, Any] | None = None) -> None:
    await checkpoint.on_train_begin()
    for epoch, count in enumerate(epochs):
        checkpoint.on_epoch_begin(epoch)
        for batch in range(count):
            writing = checkpoint.on_train_batch_end(
                batch, {"batch": batch, "size": 1, "loss": 0.5} if logs is None else logs
            )
            if writing is not None:
                await writing
        assert checkpoint.on_epoch_end(epoch, {"loss": 0.5, "val_loss": 0.5}) is None


@pytest.mark.asyncio
async def test_save_freq_counts_batches_over_epochs_and_numbers_them_from_one(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{batch:03d}-{loss}.h5", save_freq=3)
    run = with_run(checkpoint)
    await batches(checkpoint, 5, 5)
    assert run.saved == [("1-003-0.5.h5", 0), ("2-001-0.5.h5", 1), ("2-004-0.5.h5", 1)]
    await batches(checkpoint, 4)
    assert run.saved[3:] == [("1-003-0.5.h5", 0)]


def test_only_save_freq_with_a_number_asks_for_batches() -> None:
    assert "on_train_batch_end" in read_hooks(ModelCheckpoint("w.h5", save_freq=2)).inline
    assert set(read_hooks(ModelCheckpoint("w.h5")).inline) == {
        "on_train_begin",
        "on_epoch_begin",
        "on_epoch_end",
    }


@pytest.mark.asyncio
async def test_a_field_that_batches_do_not_have_is_refused_at_the_first_batch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{val_loss}.h5", save_freq=1000)
    with_run(checkpoint)
    with pytest.raises(ArgumentError, match=r"\{val_loss\} is not in the logs, which have batch, size, loss"):
        await batches(checkpoint, 1)


@pytest.mark.asyncio
async def test_save_freq_with_the_best_only_looks_at_the_batch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5", "loss", save_best_only=True, save_freq=1)
    run = with_run(checkpoint)
    await batches(checkpoint, 3)
    assert run.saved == [("w.h5", 0)]


@pytest.mark.parametrize("arguments", [{}, {"save_freq": 3}])
def test_it_crosses_processes(arguments: dict[str, Any]) -> None:
    copy = pickle.loads(pickle.dumps(ModelCheckpoint("w{epoch}.h5", **arguments)))
    assert (copy.filepath, copy.save_freq) == ("w{epoch}.h5", arguments.get("save_freq", "epoch"))
    bound = vars(copy).get("on_train_batch_end")
    assert bound is None or bound.__self__ is copy


# ---------------------------------------------------------------- one running, one waiting


@pytest.mark.asyncio
async def test_a_newer_save_takes_the_place_of_the_waiting_one_for_the_same_path(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def before() -> None:
        started.set()
        go_on.wait(30)

    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint, FakeRun(before))
    await checkpoint.on_train_begin()
    running = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert running is not None
    first = asyncio.create_task(running)
    assert await asyncio.to_thread(started.wait, 30)
    waiting = checkpoint.on_epoch_end(1, {"loss": 1.0})
    assert waiting is not None
    assert [checkpoint.on_epoch_end(epoch, {"loss": 1.0}) for epoch in (2, 3)] == [None, None]
    assert checkpoint.superseded == 2
    assert [snapshot.released for snapshot in run.snapshots] == [0, 1, 1, 0]
    go_on.set()
    await first
    await waiting
    assert run.saved == [("w.h5", 0), ("w.h5", 3)]
    assert (tmp_path / "w.h5").read_text() == "3"
    assert [snapshot.released for snapshot in run.snapshots] == [1, 1, 1, 1]


@pytest.mark.asyncio
async def test_the_waiting_copy_makes_room_for_the_one_that_replaces_it(tmp_path: Path) -> None:
    """Else the training would wait for the save that runs."""
    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint)
    await checkpoint.on_train_begin()
    waiting = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert waiting is not None
    released: list[list[int]] = []
    take = run.snapshot_now

    def look(callback: object, *, pooled: bool) -> FakeSnapshot:
        released.append([snapshot.released for snapshot in run.snapshots])
        return take(callback, pooled=pooled)

    run.snapshot_now = look  # type: ignore[method-assign]
    for epoch, run.room in ((1, True), (2, False)):
        assert checkpoint.on_epoch_end(epoch, {"loss": 1.0}) is None
    assert released == [[0], [1, 1]]
    await waiting
    assert [snapshot.released for snapshot in run.snapshots] == [1, 1, 1]
    assert (run.saved, (tmp_path / "w.h5").read_text()) == ([("w.h5", 2)], "2")


@pytest.mark.asyncio
async def test_a_save_that_would_begin_while_it_is_replaced_leaves_the_work_to_the_newer_one(
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint)
    await checkpoint.on_train_begin()
    waiting = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert waiting is not None
    take = run.snapshot_now

    def while_it_begins(callback: object, *, pooled: bool) -> FakeSnapshot:
        with pytest.raises(StopIteration):
            waiting.send(None)  # it ends at once, with nothing to write
        return take(callback, pooled=pooled)

    run.snapshot_now = while_it_begins  # type: ignore[method-assign]
    newer = checkpoint.on_epoch_end(1, {"loss": 1.0})
    assert newer is not None
    await newer
    assert (run.saved, checkpoint.superseded) == ([("w.h5", 1)], 0)
    assert [snapshot.released for snapshot in run.snapshots] == [1, 1]


@pytest.mark.asyncio
async def test_a_save_is_written_though_the_copy_that_was_to_replace_it_could_not_be_taken(
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint)
    await checkpoint.on_train_begin()
    waiting = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert waiting is not None

    def fails(callback: object, *, pooled: bool) -> FakeSnapshot:
        raise MemoryError("no page left")

    run.snapshot_now = fails  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        checkpoint.on_epoch_end(1, {"loss": 1.0})
    await waiting
    assert run.saved == [("w.h5", 0)]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Callback:
    """A callback at whose end of the training the disk begins to answer."""
    go_on = threading.Event()
    save = Snapshot.save

    def slow(snapshot: Snapshot, path: Any, *, weights_only: bool = False) -> None:
        assert go_on.wait(30)
        save(snapshot, path, weights_only=weights_only)

    monkeypatch.setattr(Snapshot, "save", slow)

    class GoOn(Callback):
        def on_train_end(self, logs: Any = None) -> None:
            go_on.set()

    return GoOn()


@pytest.mark.asyncio
async def test_a_slow_disk_holds_no_batch_where_newer_saves_replace_older_ones(
    tmp_path: Path, slow_disk: Callback
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = Trainer(ScriptedModel()).start(
        np.zeros((4, 1)), epochs=10, verbose=0, callbacks=[checkpoint, slow_disk]
    )
    await run
    assert run.stats.waits.get("pool", 0) == run.stats.waits.get("mailbox", 0) == 0
    assert checkpoint.superseded >= 8
    assert np.unique(np.frombuffer((tmp_path / "w.h5").read_bytes())).tolist() == [10.0]


@pytest.mark.asyncio
async def test_two_checkpoints_of_one_training_do_not_hold_it_up_either(
    tmp_path: Path, slow_disk: Callback
) -> None:
    """They share each copy, so that none of them alone gives its memory back."""
    both = [ModelCheckpoint(tmp_path / name) for name in ("a.h5", "b.h5")]
    run = Trainer(ScriptedModel()).start(np.zeros((4, 1)), epochs=10, verbose=0, callbacks=[*both, slow_disk])
    await run
    assert run.stats.waits.get("pool", 0) == run.stats.waits.get("mailbox", 0) == 0
    for name in ("a.h5", "b.h5"):
        assert np.unique(np.frombuffer((tmp_path / name).read_bytes())).tolist() == [10.0]


@pytest.mark.asyncio
async def test_a_model_without_an_input_shape_is_saved_though_it_is_built_by_its_first_batch(
    tmp_path: Path,
) -> None:
    model = Sequential([Dense(4), Dense(2)], seed=1)
    model.compile("sgd", "mse")
    batches = [(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"))] * 3
    await Trainer(model).fit(batches, verbose=0, callbacks=[ModelCheckpoint(tmp_path / "w.h5")])
    assert load_model(tmp_path / "w.h5").get_weights()[0].shape == (3, 4)


@pytest.mark.asyncio
async def test_saves_for_different_paths_are_all_written(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5")
    run = with_run(checkpoint)
    await checkpoint.on_train_begin()
    writing = [checkpoint.on_epoch_end(epoch, {"loss": 1.0}) for epoch in range(4)]
    for coroutine in writing:
        assert coroutine is not None
        await coroutine
    assert checkpoint.superseded == 0
    assert [epoch for _, epoch in run.saved] == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_a_save_that_has_begun_is_not_replaced(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint)
    await checkpoint.on_train_begin()
    for epoch in range(2):
        writing = checkpoint.on_epoch_end(epoch, {"loss": 1.0})
        assert writing is not None
        await writing
    assert (run.saved, checkpoint.superseded) == ([("w.h5", 0), ("w.h5", 1)], 0)


def test_a_coroutine_that_is_closed_before_it_ran_takes_its_snapshot_with_it() -> None:
    checkpoint = ModelCheckpoint("w.h5")
    run = with_run(checkpoint)
    lost = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert lost is not None
    held = weakref.ref(run.snapshots.pop())
    lost.close()
    del lost
    gc.collect()
    assert held() is None
    again = checkpoint.on_epoch_end(1, {"loss": 1.0})
    assert again is not None
    again.close()


async def cancelled_while_writing(path: Path) -> tuple[ModelCheckpoint, FakeRun, threading.Event]:
    """A callback whose first save was cancelled while its thread was at work, and what lets that go on."""
    started, go_on = threading.Event(), threading.Event()

    def before() -> None:
        started.set()
        go_on.wait(30)

    checkpoint = ModelCheckpoint(path)
    run = with_run(checkpoint, FakeRun(before))
    await checkpoint.on_train_begin()
    writing = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert writing is not None
    task = asyncio.create_task(writing)
    assert await asyncio.to_thread(started.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return checkpoint, run, go_on


@pytest.mark.asyncio
async def test_a_cancelled_save_keeps_its_snapshot_until_the_thread_has_left_it(tmp_path: Path) -> None:
    _, run, go_on = await cancelled_while_writing(tmp_path / "w.h5")
    assert run.snapshots[0].released == 0
    go_on.set()
    assert await asyncio.to_thread(run.snapshots[0].freed.wait, 30)
    assert run.saved == []
    assert (tmp_path / "w.h5").read_text() == "0"


@pytest.mark.asyncio
async def test_no_save_waits_for_one_of_another_callback_or_for_the_thread_of_hdf5(tmp_path: Path) -> None:
    both, go_on = threading.Barrier(3, timeout=30), threading.Event()
    slow = hdf5_thread.submit(go_on.wait, 30)
    saves = []
    for name in "ab":
        checkpoint = ModelCheckpoint(tmp_path / f"{name}.h5")
        with_run(checkpoint, FakeRun(lambda: (both.wait(), None)[1]))
        await checkpoint.on_train_begin()
        writing = checkpoint.on_epoch_end(0, {"loss": 1.0})
        assert writing is not None
        saves.append(asyncio.create_task(writing))
    await asyncio.to_thread(both.wait)  # broken, unless both are inside at the same time
    await asyncio.gather(*saves)
    assert not slow.done()
    go_on.set()
    assert names(tmp_path) == ["a.h5", "b.h5"]


@pytest.mark.asyncio
async def test_what_a_cancelled_training_still_writes_comes_before_the_next_trainings_saves(
    tmp_path: Path,
) -> None:
    checkpoint, old, go_on = await cancelled_while_writing(tmp_path / "w.h5")
    overtaken = threading.Event()
    new = with_run(checkpoint, FakeRun(overtaken.set))
    new.snapshots += old.snapshots  # so that its own is number 1
    writing = checkpoint.on_epoch_end(0, {"loss": 1.0})
    assert writing is not None
    task = asyncio.create_task(writing)

    def queued() -> None:
        while not checkpoint._writer._jobs and not overtaken.wait(0.001):
            pass

    await asyncio.to_thread(queued)
    assert not overtaken.is_set()
    go_on.set()
    await task
    assert (tmp_path / "w.h5").read_text() == "1"


# ---------------------------------------------------------------- faults of the disk


@pytest.mark.asyncio
async def test_a_full_disk_leaves_the_old_file_and_the_next_save_succeeds(tmp_path: Path) -> None:
    faults = [None, OSError(errno.ENOSPC, "No space left on device"), None]

    def before() -> None:
        if fault := faults.pop(0):
            raise CheckpointWriteError(tmp_path / "w.h5", fault)

    checkpoint = ModelCheckpoint(tmp_path / "w.h5")
    run = with_run(checkpoint, FakeRun(before))
    await checkpoint.on_train_begin()

    async def save(epoch: int) -> None:
        writing = checkpoint.on_epoch_end(epoch, {"loss": 1.0})
        assert writing is not None
        await writing

    await save(0)
    with pytest.raises(CheckpointWriteError) as caught:
        await save(1)
    assert (caught.value.errno, caught.value.path) == (errno.ENOSPC, str(tmp_path / "w.h5"))
    assert (tmp_path / "w.h5").read_text() == "0"
    await save(2)
    assert (tmp_path / "w.h5").read_text() == "2"
    assert names(tmp_path) == ["w.h5"]
    assert run.saved == [("w.h5", 0), ("w.h5", 2)]
    assert [snapshot.released for snapshot in run.snapshots] == [1, 1, 1]


@pytest.mark.asyncio
async def test_a_folder_in_the_way_and_a_name_that_grew_too_long_are_write_errors(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / f"{{name}}{'x' * 200}{{name}}.h5")
    with_run(checkpoint)
    with pytest.raises(CheckpointWriteError):
        await trained(checkpoint, {"name": "y" * 60})
    (tmp_path / "1.h5").mkdir()
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.h5")
    with_run(checkpoint)
    with pytest.raises(CheckpointWriteError):
        await trained(checkpoint, {})
    assert names(tmp_path) == ["1.h5"]


# ---------------------------------------------------------------- with a real training


def content(path: Path) -> float:
    """The number of batches trained, as ScriptedModel's files have it."""
    values = set(np.frombuffer(path.read_bytes()).tolist())
    assert len(values) == 1
    return float(values.pop())


def fit(model: Any, *callbacks: Callback, **arguments: Any) -> Coroutine[Any, Any, Any]:
    data = np.zeros((4, 1))
    return Trainer(model).fit(data, batch_size=2, verbose=0, callbacks=list(callbacks), **arguments)


class Announced(Callback):
    """Remembers what was announced, and what stood in the file at that moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    async def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        self.seen.append((Path(path).name, epoch, content(Path(path))))


@pytest.mark.asyncio
async def test_each_file_holds_the_weights_of_its_epoch_and_is_announced_when_it_is_there(
    tmp_path: Path,
) -> None:
    announced = Announced()
    await fit(ScriptedModel(), ModelCheckpoint(tmp_path / "{epoch}.h5"), announced, epochs=4)
    assert announced.seen == [(f"{epoch + 1}.h5", epoch, 2.0 * (epoch + 1)) for epoch in range(4)]
    assert names(tmp_path) == ["1.h5", "2.h5", "3.h5", "4.h5"]


@pytest.mark.asyncio
async def test_a_save_decided_when_it_is_written_would_be_of_another_epoch(tmp_path: Path) -> None:
    """Negative control: without the copy inline, what is written is what the model is by then."""

    class Naive(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                await third.wait()
                (tmp_path / "naive.h5").write_bytes(self.model.weights.tobytes())

    class Third(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                third.set()

    third = asyncio.Event()
    await fit(ScriptedModel(), Naive(), Third(), epochs=3)
    assert content(tmp_path / "naive.h5") != 2.0


@pytest.mark.asyncio
async def test_a_slow_disk_never_loses_the_last_state_of_a_path(tmp_path: Path) -> None:
    model, checkpoint = ScriptedModel(), ModelCheckpoint(tmp_path / "last.h5", save_freq=1)
    await fit(model, checkpoint, epochs=100)
    assert model.steps == 200
    assert content(tmp_path / "last.h5") == 200.0
    assert names(tmp_path) == ["last.h5"]


@pytest.mark.asyncio
async def test_the_epoch_of_a_stop_in_its_middle_is_skipped_if_validation_is_needed(tmp_path: Path) -> None:
    def stop(batch: int, logs: Any) -> None:
        if model.steps == 3:
            model.stop_training = True

    model = ScriptedModel()
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{val_loss}.h5")
    with pytest.warns(RuntimeWarning, match="skips epochs without validation, which have no val_loss"):
        await fit(
            model,
            LambdaCallback(on_batch_end=stop),
            checkpoint,
            epochs=5,
            validation_data=(np.zeros((2, 1)), np.zeros(2)),
        )
    assert names(tmp_path) == ["1-2.0.h5"]


@pytest.mark.asyncio
async def test_an_unknown_field_stops_fit_before_it_trains(tmp_path: Path) -> None:
    model = ScriptedModel()
    with pytest.raises(ArgumentError, match="Did you mean"):
        await fit(model, ModelCheckpoint(tmp_path / "{los}.h5"))
    assert model.steps == 0


@pytest.mark.asyncio
async def test_a_field_that_an_inline_callback_adds_is_filled(tmp_path: Path) -> None:
    add = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=epoch + 0.5))
    await fit(ScriptedModel(), add, ModelCheckpoint(tmp_path / "{score}.h5"), epochs=2)
    assert names(tmp_path) == ["0.5.h5", "1.5.h5"]


@pytest.mark.asyncio
async def test_a_path_that_cannot_be_written_stops_fit_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "w.h5").mkdir()
    model = ScriptedModel()
    with pytest.raises((ArgumentError, CallbackError)) as caught:
        await fit(model, ModelCheckpoint(tmp_path / "w.h5"))
    assert "it is an existing folder" in str(caught.value)
    assert model.steps == 0


@pytest.mark.asyncio
async def test_a_failed_save_stops_the_training_and_fit_raises_it(tmp_path: Path) -> None:
    model = ScriptedModel()
    (tmp_path / "2.h5").mkdir()
    with pytest.raises(CallbackError) as caught:
        await fit(model, ModelCheckpoint(tmp_path / "{epoch}.h5"), epochs=10_000)
    assert caught.value.epoch == 1
    assert isinstance(caught.value.__cause__, CheckpointWriteError)
    assert model.steps < 20_000
    assert content(tmp_path / "1.h5") == 2.0


# The limit is the process's own and can be lifted again, so it plays the disk that is full and then is freed.
FULL_DISK = """
import asyncio, os, resource, sys
import numpy as np
from asynccb import CallbackError, CheckpointWriteError, Trainer
from asynccb.callbacks import ModelCheckpoint
from asynccb.models import Dense, Sequential

path = os.path.join(sys.argv[1], "w.h5")
model = Sequential([Dense(200, input_dim=200), Dense(1)])
model.compile(optimizer="sgd", loss="mse")
x, y = np.zeros((4, 200)), np.zeros((4, 1))

def fit():
    asyncio.run(Trainer(model).fit(x, y, verbose=0, callbacks=[ModelCheckpoint(path)]))

def content():
    with open(path, "rb") as file:
        return file.read()

fit()
old = content()
whole = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in range(0, len(old), 16384):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))
    try:
        fit()
    except CallbackError as error:
        cause = error.__cause__
    resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert isinstance(cause, CheckpointWriteError) and cause.path == path, cause
    assert content() == old
    assert os.listdir(sys.argv[1]) == ["w.h5"], os.listdir(sys.argv[1])
    del cause
fit()
assert content() != old
print("all refused")
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of a process are POSIX")
def test_a_real_file_that_outgrows_the_disk_at_any_point_costs_only_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert (done.stdout, done.returncode) == ("all refused\n", 0), done.stderr


def classifier() -> Sequential:
    model = Sequential([Dense(4, activation="relu", input_dim=3), Dense(2), Activation("softmax")], seed=1)
    model.compile(optimizer="rmsprop", loss="categorical_crossentropy", metrics=["acc"])
    return model


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["w.h5", "w.hdf5", "w.weights.h5"])
async def test_the_pages_best_model_is_a_file_that_h5py_opens_and_load_model_trains_on(
    tmp_path: Path, name: str
) -> None:
    x, y = np.random.default_rng(0).random((32, 3)), np.eye(2)[np.arange(32) % 2]
    model = classifier()
    checkpoint = ModelCheckpoint(tmp_path / name, save_best_only=True)
    history = await Trainer(model, seed=3).fit(
        x, y, epochs=5, verbose=0, validation_data=(x, y), callbacks=[checkpoint]
    )
    best = min(history.history["val_loss"])
    assert checkpoint.best == best
    with h5py.File(tmp_path / name, "r") as file:
        assert "layers" in file
    loaded = load_model(tmp_path / name)
    assert (await Trainer(loaded).evaluate(x, y))["loss"] == pytest.approx(best, rel=1e-6)
    await Trainer(loaded).fit(x, y, verbose=0)


@pytest.mark.asyncio
async def test_weights_alone_load_into_a_model_of_the_same_shape(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((32, 3)), np.eye(2)[np.arange(32) % 2]
    model, other = classifier(), classifier()
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{acc:.1f}.weights.h5", save_weights_only=True)
    await Trainer(model, seed=3).fit(x, y, epochs=2, verbose=0, callbacks=[checkpoint])
    [_, last] = names(tmp_path)
    other.load_weights(tmp_path / last)
    assert all(map(np.array_equal, model.get_weights(), other.get_weights()))
