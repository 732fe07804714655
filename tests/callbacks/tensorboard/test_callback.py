"""TensorBoard: all that is written is read back with real TensorBoard; faults are real where they can be."""

from __future__ import annotations

import asyncio
import errno
import inspect
import io
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as WhatThePageShows,
)
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from asynccb import Callback, Trainer
from asynccb.callbacks.tensorboard import TensorBoard
from asynccb.callbacks.tensorboard.graph import graph_of
from asynccb.callbacks.tensorboard.writer import EventFile
from asynccb.errors import ArgumentError
from asynccb.models import Activation, Dense, Embedding, Flatten, Sequential
from asynccb.run import Run
from asynccb.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EVERYTHING = dict.fromkeys(("scalars", "histograms", "images", "graph"), 0)


def read(path: object) -> EventAccumulator:
    accumulator = EventAccumulator(str(path), size_guidance=EVERYTHING)
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


class FakeSnapshot:
    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays
        self.released = False

    @property
    def arrays(self) -> dict[str, Any]:
        assert not self.released
        return self._arrays

    def to_model(self) -> Any:
        assert not self.released
        return ShowsItsLayers()

    def release(self) -> None:
        self.released = True


class ShowsItsLayers:
    """A model that can be looked into; each pass waits for ``gate``."""

    gate = threading.Event()
    gate.set()

    def activations(self, x: Any) -> dict[str, Any]:
        self.gate.wait()
        return {"layer": x}

    def gradients(self, x: Any, y: Any, sample_weight: Any) -> dict[str, Any]:
        return {"layer/w:0": y}


VALIDATION = (np.arange(6.0).reshape(3, 2), np.arange(3.0))


class FakeRun:
    """A run as the callback sees it; every snapshot that it gave is kept."""

    def __init__(self, name: str = "run-1", arrays: dict[str, Any] | None = None) -> None:
        self.name = name
        self.arrays: dict[str, Any] = arrays or {}
        self.snapshots: list[FakeSnapshot] = []
        self.room = True

    def expect_copies(self) -> None:
        pass

    def room_for_copy(self, callback: object) -> bool:
        return self.room

    def snapshot_now(self, callback: object, *, pooled: bool) -> FakeSnapshot:
        assert pooled
        self.snapshots.append(FakeSnapshot(self.arrays))
        return self.snapshots[-1]


async def call(hook: Callable[..., Any], *args: Any) -> None:
    """As a run does it: the inline half on another thread, what it returns on the loop."""
    later = await asyncio.to_thread(hook, *args)
    if later is not None:
        await later


async def begin(callback: TensorBoard, run: Any = None, model: Any = None, validation: Any = None) -> None:
    callback.run = run or FakeRun()
    callback.validation_data = validation
    callback.set_model(model)
    callback.set_params({})
    await call(callback.on_train_begin, {})


async def fit(
    callback: TensorBoard,
    *epochs: dict[str, Any],
    run: Any = None,
    model: Any = None,
    validation: Any = None,
) -> None:
    """A training whose epochs are long enough for all that is done beside them."""
    await begin(callback, run, model, validation)
    for epoch, logs in enumerate(epochs):
        await call(callback.on_epoch_end, epoch, logs)
        await callback._sideline.end()
    await call(callback.on_train_end, {})


def small_model() -> Sequential:
    layers = [Dense(8, activation="relu", input_dim=4), Dense(3), Activation("softmax")]
    model = Sequential(layers, seed=1)
    model.compile("sgd", "categorical_crossentropy")
    return model


# ---------------------------------------------------------------- arguments


def test_the_signature_is_the_pages_and_the_newer_ones_are_keyword_only() -> None:
    parameters = inspect.signature(TensorBoard).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == [
        ("log_dir", "./logs"),
        ("histogram_freq", 0),
        ("write_graph", True),
        ("write_grads", False),
        ("write_images", False),
        ("embeddings_freq", 0),
        ("embeddings_layer_names", None),
        ("embeddings_metadata", None),
    ]
    keyword_only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == {"batch_size": 32, "update_freq": "epoch"}


@pytest.mark.parametrize("name", ["write_grads", "write_images"])
def test_gradients_and_images_without_histogram_freq_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=True: needs histogram_freq greater than 0"):
        TensorBoard(**{name: True})


@pytest.mark.parametrize(
    "given",
    [
        {"histogram_freq": -1},
        {"histogram_freq": 0.5},
        {"embeddings_freq": -1},
        {"batch_size": 0},
        {"batch_size": 0.5},
        {"update_freq": 0},
        {"update_freq": True},
        {"update_freq": "never"},
    ],
)
def test_arguments_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(given))):
        TensorBoard(**given)


def test_images_without_pillow_are_refused_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ArgumentError, match=r"needs Pillow.*asynccb\[tensorboard\]"):
        TensorBoard(histogram_freq=1, write_images=True)


def test_a_batch_hook_is_there_only_if_batches_are_asked_for() -> None:
    assert "on_train_batch_end" not in vars(TensorBoard())
    assert "on_train_batch_end" in vars(TensorBoard(update_freq="batch"))


def test_a_subclass_keeps_its_own_batch_hook() -> None:
    class Mine(TensorBoard):
        def on_batch_end(self, batch: int, logs: Any = None) -> None: ...

    assert "on_train_batch_end" not in vars(Mine(update_freq=10))


# ---------------------------------------------------------------- scalars


@pytest.mark.asyncio
async def test_every_number_of_the_logs_is_a_scalar_under_its_own_name(tmp_path: Path) -> None:
    logs = {
        "val_loss": 1.5,
        "loss": 2,
        "batch": 7,
        "size": 32,
        "lr": np.float32(0.25),
        "f1 score [é]": np.array([0.5]),
        "confusion": np.eye(2),
        "note": "text",
    }
    await fit(TensorBoard(tmp_path), logs, {"loss": True, "lr": 10**400})
    found = read(tmp_path)
    assert found.Tags()["scalars"] == ["val_loss", "loss", "lr", "f1 score [é]"]
    assert points(found, "val_loss") == [(0, 1.5)]
    assert points(found, "loss") == [(0, 2.0), (1, 1.0)]
    assert points(found, "lr") == [(0, 0.25), (1, math.inf)]
    assert points(found, "f1 score [é]") == [(0, 0.5)]


@pytest.mark.asyncio
async def test_nan_and_infinity_are_scalars_too(tmp_path: Path) -> None:
    await fit(TensorBoard(tmp_path), {"loss": math.nan}, {"loss": -math.inf})
    (_, first), (_, second) = points(read(tmp_path), "loss")
    assert math.isnan(first)
    assert second == -math.inf


@pytest.mark.asyncio
async def test_keys_that_later_inline_hooks_add_are_there(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path)
    callback.run = FakeRun()
    await call(callback.on_train_begin, {})
    logs = {"loss": 1.0}
    later = callback.on_epoch_end(0, logs)
    logs["lr"] = 0.5
    await later
    await call(callback.on_train_end, {})
    assert points(read(tmp_path), "lr") == [(0, 0.5)]


@pytest.mark.asyncio
async def test_an_epoch_is_on_disk_when_its_awaitable_is_done(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path)
    callback.run = FakeRun()
    await call(callback.on_train_begin, {})
    for epoch in range(3):
        await call(callback.on_epoch_end, epoch, {"loss": float(epoch)})
        assert points(read(tmp_path), "loss") == [(e, float(e)) for e in range(epoch + 1)]
    await call(callback.on_train_end, {})


@pytest.mark.asyncio
async def test_each_fit_writes_a_file_of_its_own(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path / "new" / "folder")
    await fit(callback, {"loss": 1.0})
    first = callback.path
    await fit(callback, {"loss": 2.0})
    assert first is not None
    assert points(read(first), "loss") == [(0, 1.0)]
    assert points(read(callback.path), "loss") == [(0, 2.0)]
    assert len(os.listdir(tmp_path / "new" / "folder")) == 2


@pytest.mark.asyncio
async def test_a_run_name_that_is_no_file_name_does_no_harm(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path)
    await fit(callback, {"loss": 1.0}, run=FakeRun(name="../ü/\x1b" + "x" * 300))
    assert callback.path is not None
    assert os.path.dirname(callback.path) == str(tmp_path)
    assert points(read(callback.path), "loss") == [(0, 1.0)]


# ---------------------------------------------------------------- scalars of batches


async def trained_batches(callback: TensorBoard, count: int) -> None:
    callback.run = FakeRun()
    await call(callback.on_train_begin, {})
    for batch in range(count):
        await call(callback.on_train_batch_end, batch, {"batch": batch, "size": 4, "loss": float(batch)})
    await call(callback.on_train_end, {})


@pytest.mark.asyncio
@pytest.mark.parametrize(("update_freq", "steps"), [("batch", [1, 2, 3, 4, 5]), (2, [2, 4])])
async def test_update_freq_says_which_batches_are_written(
    tmp_path: Path, update_freq: Any, steps: list[int]
) -> None:
    await trained_batches(TensorBoard(tmp_path, update_freq=update_freq), 5)
    found = read(tmp_path)
    assert found.Tags()["scalars"] == ["batch_loss"]
    assert points(found, "batch_loss") == [(step, step - 1.0) for step in steps]


@pytest.mark.asyncio
async def test_batches_are_gathered_and_not_written_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    append = EventFile.append
    monkeypatch.setattr(EventFile, "append", lambda file, events: (writes.append(1), append(file, events))[1])
    monkeypatch.setattr("asynccb.callbacks.tensorboard.callback.SHIP_EVERY", 3600.0)
    await trained_batches(TensorBoard(tmp_path, update_freq="batch"), 500)
    assert len(writes) == 3  # the opening, the first batch, the rest
    assert len(points(read(tmp_path), "batch_loss")) == 500


# ---------------------------------------------------------------- histograms

WEIGHTS_ONLY = "TensorBoard: histograms of weights only; "


@pytest.mark.asyncio
async def test_histograms_are_of_weights_and_activations_every_so_many_epochs(tmp_path: Path) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    run = FakeRun(arrays={"layer/w:0": kernel, "optimizer/m/kernel": kernel})
    callback = TensorBoard(tmp_path, 2)
    await fit(callback, *[{"loss": 1.0}] * 5, run=run, model=ShowsItsLayers(), validation=VALIDATION)
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["layer/w_0", "layer_out"]
    for tag, numbers in (("layer/w_0", kernel), ("layer_out", VALIDATION[0])):
        assert [event.step for event in found.Histograms(tag)] == [0, 2, 4]
        value = found.Histograms(tag)[0].histogram_value
        assert (value.min, value.max, value.num) == (0.0, 5.0, 6.0)
        assert (value.sum, value.sum_squares) == (numbers.sum(), (numbers**2).sum())
        assert sum(value.bucket) == 6
    assert len(run.snapshots) == 3
    assert all(snapshot.released for snapshot in run.snapshots)
    assert callback.skipped == 0


@pytest.mark.asyncio
async def test_gradients_are_there_if_asked_for(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, 1, write_grads=True)
    await fit(callback, {}, model=ShowsItsLayers(), validation=VALIDATION)
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["layer_out", "layer/w_0_grad"]
    assert found.Histograms("layer/w_0_grad")[0].histogram_value.sum == 3.0


@pytest.mark.asyncio
async def test_one_histogram_an_epoch_whatever_the_chunks(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, 1, write_grads=True, batch_size=1)
    await fit(callback, {}, {}, model=ShowsItsLayers(), validation=VALIDATION)
    for tag, count in (("layer_out", 6), ("layer/w_0_grad", 3)):
        found = read(tmp_path).Histograms(tag)
        assert [(event.step, event.histogram_value.num) for event in found] == [(0, count), (1, count)]


class Iterated:
    def __iter__(self) -> Any:
        raise AssertionError("the training's to take")

    __aiter__ = __iter__


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("model", "validation", "write_grads", "why"),
    [
        (ShowsItsLayers(), None, False, "those of activations and gradients need validation data"),
        (ShowsItsLayers(), Iterated(), False, ".* need validation data in arrays"),
        (object(), VALIDATION, False, r"object has no activations\(\)"),
        (object(), VALIDATION, True, r"object has no activations\(\) and no gradients\(\)"),
    ],
    ids=["no data", "no arrays", "no activations", "no gradients"],
)
async def test_where_the_model_cannot_be_looked_into_there_are_weights_and_one_warning(
    tmp_path: Path, model: Any, validation: Any, write_grads: bool, why: str
) -> None:
    callback = TensorBoard(tmp_path, 1, write_grads=write_grads)
    run = FakeRun(arrays={"w": np.eye(2)})
    with pytest.warns(RuntimeWarning, match=f"^{WEIGHTS_ONLY}{why}$") as warned:
        await fit(callback, {}, {}, run=run, model=model, validation=validation)
    assert len(warned) == 1
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["w"]
    assert [event.step for event in found.Histograms("w")] == [0, 1]


@pytest.mark.asyncio
async def test_histograms_are_of_the_model_at_the_epochs_end(tmp_path: Path) -> None:
    model, x = small_model(), np.ones((5, 4), np.float32)
    run = SimpleNamespace(
        name="r",
        snapshot_now=lambda callback, pooled: Snapshot(model.capture(), 0, 0),
        room_for_copy=lambda callback: True,
        expect_copies=lambda: None,
    )
    callback = TensorBoard(tmp_path, histogram_freq=1)
    kernel, outputs = float(model.get_weights()[0].max()), model.activations(x)["dense"]
    await begin(callback, run, model, (x, np.eye(3, dtype=np.float32)[[0] * 5]))
    later = callback.on_epoch_end(0, {})
    model.set_weights([weight + 100.0 for weight in model.get_weights()])
    await later
    await call(callback.on_train_end, {})
    found = read(tmp_path)
    assert found.Histograms("dense/kernel")[0].histogram_value.max == pytest.approx(kernel)
    assert found.Histograms("dense_out")[0].histogram_value.max == pytest.approx(float(outputs.max()))


@pytest.mark.asyncio
async def test_images_of_weights_are_pngs(tmp_path: Path) -> None:
    from PIL import Image

    run = FakeRun(arrays={"w": np.array([[-1.0, 0.0, 1.0]], np.float32), "flat": np.ones(2)})
    callback = TensorBoard(tmp_path, 1, write_images=True)
    await fit(callback, {}, run=run, model=ShowsItsLayers(), validation=VALIDATION)
    found = read(tmp_path)
    assert found.Tags()["images"] == ["w/image/0", "flat/image/0"]
    (event,) = found.Images("w/image/0")
    assert (event.step, event.height, event.width) == (0, 3, 1)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert np.asarray(image).tolist() == [[0], [128], [255]]


@pytest.mark.asyncio
async def test_the_page_shows_every_kind_of_a_weights_records(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, 1, write_images=True, write_grads=True)
    run = FakeRun(arrays={"w": np.eye(3)})
    await fit(callback, {}, run=run, model=ShowsItsLayers(), validation=VALIDATION)
    assert kinds_shown(tmp_path) == {
        "histograms": ["layer/w_0_grad", "layer_out", "w"],
        "images": ["w/image/0"],
    }


def test_control_under_one_tag_the_page_shows_only_one_of_them(tmp_path: Path) -> None:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_histogram("w", np.eye(3), 0)
        writer.add_image("w", np.eye(3), 0, dataformats="HW")
    assert kinds_shown(tmp_path) == {"histograms": ["w"]}


def kinds_shown(folder: Path) -> dict[str, list[str]]:
    shown = WhatThePageShows(str(folder), size_guidance={"tensors": 0})
    shown.Reload()
    tags = {kind: shown.PluginTagToContent(kind) for kind in shown.ActivePlugins()}
    return {kind: sorted(found) for kind, found in tags.items()}


# ---------------------------------------------------------------- slower than the training


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it opens, no look into a model comes to its end."""
    gate = threading.Event()
    monkeypatch.setattr(ShowsItsLayers, "gate", gate)
    yield gate
    gate.set()


@pytest.mark.asyncio
async def test_while_one_epochs_histograms_are_made_those_of_the_next_are_skipped_and_counted(
    tmp_path: Path, gate: threading.Event
) -> None:
    callback, run = TensorBoard(tmp_path, 1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    for epoch in range(4):
        await call(callback.on_epoch_end, epoch, {"loss": float(epoch)})
        assert points(read(tmp_path), "loss")[-1] == (epoch, float(epoch))  # scalars wait for nothing
    assert (callback.skipped, len(run.snapshots)) == (3, 1)
    gate.set()
    await callback._sideline.end()
    await call(callback.on_epoch_end, 4, {})
    await call(callback.on_train_end, {})
    found = read(tmp_path)
    for tag in ("w", "layer_out"):
        assert [event.step for event in found.Histograms(tag)] == [0, 4]
    assert (callback.skipped, len(run.snapshots)) == (3, 2)


@pytest.mark.asyncio
async def test_histograms_are_skipped_while_the_disk_has_not_taken_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, run = TensorBoard(tmp_path, 1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    append, gate = EventFile.append, threading.Event()
    monkeypatch.setattr(EventFile, "append", lambda file, records: (gate.wait(), append(file, records))[1])
    later = [callback.on_epoch_end(epoch, {"loss": 1.0}) for epoch in range(3)]
    assert (callback.skipped, len(run.snapshots)) == (2, 1)
    gate.set()
    for hook in later:
        await hook
    await call(callback.on_train_end, {})
    assert [step for step, _ in points(read(tmp_path), "loss")] == [0, 1, 2]


@pytest.mark.asyncio
async def test_where_checkpoints_hold_all_copies_the_histograms_are_skipped_and_the_training_goes_on(
    tmp_path: Path,
) -> None:
    callback, run = TensorBoard(tmp_path, 1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    for epoch, run.room in ((0, False), (1, True)):
        await call(callback.on_epoch_end, epoch, {"loss": 1.0})
    await call(callback.on_train_end, {})
    found = read(tmp_path)
    assert [event.step for event in found.Histograms("w")] == [1]
    assert [event.step for event in found.Scalars("loss")] == [0, 1]
    assert (callback.skipped, len(run.snapshots)) == (1, 1)


@pytest.mark.asyncio
async def test_a_hook_that_never_runs_does_not_stand_in_the_next_ones_way(tmp_path: Path) -> None:
    callback, run = TensorBoard(tmp_path, 1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    callback.on_epoch_end(0, {}).close()  # the bus gives back the snapshot of what it throws away
    await call(callback.on_epoch_end, 1, {})
    await call(callback.on_train_end, {})
    assert [event.step for event in read(tmp_path).Histograms("w")] == [1]
    assert (callback.skipped, len(run.snapshots)) == (0, 2)


@pytest.mark.asyncio
async def test_the_inline_half_starts_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = TensorBoard(tmp_path, 1)
    await begin(callback, FakeRun(), ShowsItsLayers(), VALIDATION)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
        later = callback.on_epoch_end(0, {})
    await later
    await call(callback.on_train_end, {})


@pytest.mark.asyncio
async def test_the_copy_is_given_back_before_the_pass_over_the_data(
    tmp_path: Path, gate: threading.Event
) -> None:
    given_back = threading.Event()
    run = FakeRun()
    callback = TensorBoard(tmp_path, 1)
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    with_event = FakeSnapshot({})
    with_event.release = given_back.set  # type: ignore[method-assign]
    run.snapshot_now = lambda callback, pooled: with_event  # type: ignore[method-assign]
    await call(callback.on_epoch_end, 0, {})
    assert await asyncio.to_thread(given_back.wait, 10)
    assert not gate.is_set()
    gate.set()
    await call(callback.on_train_end, {})


@pytest.mark.asyncio
async def test_a_cancelled_end_gives_up_what_is_still_being_made(
    tmp_path: Path, gate: threading.Event
) -> None:
    callback, run = TensorBoard(tmp_path, 1, batch_size=1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    await call(callback.on_epoch_end, 0, {})
    end = asyncio.ensure_future(callback.on_train_end({}))
    await asyncio.sleep(0)
    end.cancel()
    with pytest.raises(asyncio.CancelledError):
        await end
    gate.set()
    await callback._sideline.end()
    assert [snapshot.released for snapshot in run.snapshots] == [True]
    assert read(tmp_path).Tags()["histograms"] == []


@pytest.mark.asyncio
async def test_a_look_that_fails_is_raised_once_and_the_next_epoch_is_looked_at(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, run = TensorBoard(tmp_path, 1), FakeRun(arrays={"w": np.eye(2)})
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    with monkeypatch.context() as patched:
        patched.setattr(ShowsItsLayers, "activations", lambda model, x: gate.wait() and 1 / 0)
        await call(callback.on_epoch_end, 0, {"loss": 1.0})
        gate.set()
        await settled(callback)
    with pytest.raises(ZeroDivisionError):
        await call(callback.on_epoch_end, 1, {"loss": 2.0})
    await call(callback.on_train_end, {})
    found = read(tmp_path)
    assert points(found, "loss") == [(0, 1.0), (1, 2.0)]
    assert [event.step for event in found.Histograms("layer_out")] == [1]
    assert [snapshot.released for snapshot in run.snapshots] == [True, True]


@pytest.mark.asyncio
async def test_a_look_that_fails_last_is_raised_at_the_end(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShowsItsLayers, "activations", lambda model, x: gate.wait() and 1 / 0)
    callback = TensorBoard(tmp_path, 1)
    await begin(callback, model=ShowsItsLayers(), validation=VALIDATION)
    await call(callback.on_epoch_end, 0, {})
    gate.set()
    with pytest.raises(ZeroDivisionError):
        await call(callback.on_train_end, {})


async def settled(callback: TensorBoard) -> None:
    """Returns when nothing is being made, and leaves the error where it is."""
    assert callback._sideline._job is not None
    await asyncio.wait({asyncio.wrap_future(callback._sideline._job)})


# ---------------------------------------------------------------- embeddings


def embedding_model() -> Sequential:
    model = Sequential([Embedding(4, 3, input_length=2), Flatten(), Dense(2)], seed=1)
    model.compile("sgd", "mse")
    return model


@pytest.mark.asyncio
async def test_embeddings_are_saved_every_so_many_epochs(tmp_path: Path) -> None:
    (tmp_path / "words.tsv").write_text("a\nb\nc\nd\n")
    callback = TensorBoard(tmp_path, embeddings_freq=2, embeddings_metadata="words.tsv")
    run = FakeRun(arrays={"embedding/embeddings": np.full((4, 3), 0.1, np.float32)})
    await fit(callback, {}, {}, {}, run=run, model=embedding_model())
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [e.tensor_name for e in config.embeddings] == ["embedding.ckpt-2", "embedding.ckpt-0"]
    assert {e.metadata_path for e in config.embeddings} == {"words.tsv"}
    for embedding in config.embeddings:
        assert np.fromfile(tmp_path / embedding.tensor_path, "<f4").tolist() == [np.float32(0.1)] * 12
    assert [snapshot.released for snapshot in run.snapshots] == [True, True]
    assert read(tmp_path).Tags()["histograms"] == []


@pytest.mark.asyncio
async def test_embeddings_and_histograms_share_one_copy(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, 1, embeddings_freq=1)
    model, run = embedding_model(), FakeRun()
    run.arrays = dict(model.capture().arrays)
    with pytest.warns(RuntimeWarning, match=WEIGHTS_ONLY):
        await fit(callback, {}, run=run, model=model)
    assert len(run.snapshots) == 1
    assert "embedding/embeddings" in read(tmp_path).Tags()["histograms"]
    assert (tmp_path / "projector_config.pbtxt").exists()


@pytest.mark.asyncio
async def test_a_model_without_embeddings_is_said_once(tmp_path: Path) -> None:
    run = FakeRun()
    with pytest.warns(RuntimeWarning, match="the model has no Embedding layer") as warned:
        await fit(TensorBoard(tmp_path, embeddings_freq=1), {}, {}, run=run, model=small_model())
    assert len(warned) == 1
    assert run.snapshots == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embeddings_layer_names": ["none"]}, "embeddings_layer_names='none': is no layer"),
        ({"embeddings_metadata": "none.tsv"}, "embeddings_metadata='none.tsv': is no file"),
    ],
)
async def test_embeddings_that_cannot_be_are_refused_before_the_first_batch(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    callback = TensorBoard(tmp_path / "logs", embeddings_freq=1, **given)
    with pytest.raises(ArgumentError, match=message):
        await begin(callback, model=embedding_model())
    await call(callback.on_train_end, {})
    assert not (tmp_path / "logs").exists()


@pytest.mark.asyncio
async def test_without_embeddings_freq_their_other_arguments_have_no_effect(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, embeddings_layer_names=["none"], embeddings_metadata="none.tsv")
    await fit(callback, {"loss": 1.0}, model=embedding_model())
    assert os.listdir(tmp_path) == [os.path.basename(callback.path or "")]


# ---------------------------------------------------------------- graph


@pytest.mark.asyncio
async def test_the_graph_is_the_models_layers(tmp_path: Path) -> None:
    await fit(TensorBoard(tmp_path), model=small_model())
    nodes = {node.name: node for node in read(tmp_path).Graph().node}
    assert {name: list(node.input) for name, node in nodes.items()} == {
        "sequential/input": [],
        "sequential/dense/kernel": [],
        "sequential/dense/bias": [],
        "sequential/dense/Dense": ["sequential/input", "sequential/dense/kernel", "sequential/dense/bias"],
        "sequential/dense_1/kernel": [],
        "sequential/dense_1/bias": [],
        "sequential/dense_1/Dense": [
            "sequential/dense/Dense",
            "sequential/dense_1/kernel",
            "sequential/dense_1/bias",
        ],
        "sequential/activation": ["sequential/dense_1/Dense"],
    }
    assert [node.op for node in nodes.values()][-1] == "Activation"
    dims = nodes["sequential/dense/Dense"].attr["_output_shapes"].list.shape[0].dim
    assert [dim.size for dim in dims] == [-1, 8]
    assert b'"units": 8' in nodes["sequential/dense/Dense"].attr["config"].s


def test_the_graph_has_nothing_that_the_page_does_not_know() -> None:
    graph = GraphDef.FromString(graph_of(small_model()) or b"")
    whole = graph.SerializeToString()
    graph.DiscardUnknownFields()
    assert graph.SerializeToString() == whole
    assert graph.versions.producer == 22


@pytest.mark.asyncio
async def test_a_training_imports_no_other_writer(tmp_path: Path) -> None:
    code = """
        import asyncio, sys, numpy as np
        from asynccb import Trainer
        from asynccb.callbacks import TensorBoard
        from asynccb.models import Dense, Sequential
        model = Sequential([Dense(1, input_dim=2)])
        model.compile("sgd", "mse")
        board = TensorBoard(sys.argv[1], 1, write_grads=True, update_freq="batch")
        x, y = np.zeros((4, 2)), np.zeros((4, 1))
        asyncio.run(Trainer(model).fit(x, y, validation_data=(x, y), verbose=0, callbacks=[board]))
        print(*sorted({"tensorboardX", "google", "torch", "tensorboard", "PIL"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout.strip() == ""
    assert read(tmp_path).Tags()["graph"] is True


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("write_graph", "model"),
    [(False, small_model()), (True, object()), (True, SimpleNamespace(layers=[], get_config=dict))],
    ids=["not wanted", "no layers", "empty"],
)
async def test_no_graph_where_there_is_none_to_write(tmp_path: Path, write_graph: bool, model: Any) -> None:
    await fit(TensorBoard(tmp_path, write_graph=write_graph), {"loss": 1.0}, model=model)
    found = read(tmp_path)
    assert found.Tags()["graph"] is False
    assert points(found, "loss") == [(0, 1.0)]


# ---------------------------------------------------------------- many trainings, one folder


@pytest.mark.asyncio
async def test_sixteen_trainings_in_one_folder_leave_sixteen_files_with_all_records(tmp_path: Path) -> None:
    callbacks = [TensorBoard(tmp_path) for _ in range(16)]
    epochs = [{"loss": float(epoch)} for epoch in range(20)]
    await asyncio.gather(*(fit(callback, *epochs, run=FakeRun(name="same")) for callback in callbacks))
    assert {os.path.join(tmp_path, name) for name in os.listdir(tmp_path)} == {c.path for c in callbacks}
    assert len(os.listdir(tmp_path)) == 16
    for callback in callbacks:
        assert points(read(callback.path), "loss") == [(epoch, float(epoch)) for epoch in range(20)]


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.asyncio
async def test_a_folder_that_cannot_be_made_fails_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    callback = TensorBoard(tmp_path / "file" / "logs")
    with pytest.raises(OSError, match="file"):
        await call(callback.on_train_begin, {})
    await call(callback.on_train_end, {})  # comes after a failure too


@pytest.mark.asyncio
async def test_after_a_failure_no_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: EventFile, records: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = FakeRun(arrays={"w": np.eye(2)})
    callback = TensorBoard(tmp_path, histogram_freq=1)
    await begin(callback, run, ShowsItsLayers(), VALIDATION)
    monkeypatch.setattr(EventFile, "append", refuse)
    errors = []
    for epoch in range(3):
        try:
            await call(callback.on_epoch_end, epoch, {})
        except OSError as error:
            errors.append(str(error))
        await settled(callback)
    await call(callback.on_train_end, {})
    assert errors == ["[Errno 28] No space left on device"]
    assert [snapshot.released for snapshot in run.snapshots] == [True]
    assert callback.dropped == 3  # of two epochs the scalars, of the first one more: the scalars or the rest


# ---------------------------------------------------------------- in a training


async def train(*callbacks: Any, epochs: int = 3) -> Any:
    rng = np.random.default_rng(0)
    x = rng.random((64, 4), np.float32)
    y = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 64)]
    return await Trainer(small_model()).fit(
        x, y, batch_size=8, epochs=epochs, validation_split=0.25, verbose=0, callbacks=list(callbacks)
    )


class Unhurried(TensorBoard):
    """The training waits at the end of an epoch until all that is done beside it is done."""

    lockstep = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        return self._whole(super().on_epoch_end(epoch, logs))

    async def _whole(self, later: Any) -> None:
        await later
        await self._sideline.end()


@pytest.mark.asyncio
async def test_a_training_leaves_every_kind_of_record(tmp_path: Path) -> None:
    board = Unhurried(tmp_path, 1, write_images=True, write_grads=True, update_freq="batch")
    history = await train(board)
    found = read(tmp_path)
    for key in ("loss", "val_loss"):
        assert [step for step, _ in points(found, key)] == [0, 1, 2]
        assert [value for _, value in points(found, key)] == pytest.approx(history.history[key])
    assert [step for step, _ in points(found, "batch_loss")] == list(range(1, 19))
    kinds = {
        "dense": ["/bias", "/bias_grad", "/kernel", "/kernel_grad", "_out"],
        "dense_1": ["/bias", "/bias_grad", "/kernel", "/kernel_grad", "_out"],
        "activation": ["_out"],
    }
    tags = sorted(layer + kind for layer, all_kinds in kinds.items() for kind in all_kinds)
    assert sorted(found.Tags()["histograms"]) == tags
    for tag in tags:
        assert [event.step for event in found.Histograms(tag)] == [0, 1, 2]
    out = found.Histograms("activation_out")[0].histogram_value
    assert (out.num, out.sum) == (16 * 3, pytest.approx(16.0))  # a softmax of each of the 16 samples
    assert [event.step for event in found.Images("dense_1/bias/image/0")] == [0, 1, 2]
    assert found.Tags()["graph"] is True
    assert board.skipped == 0


@pytest.mark.asyncio
async def test_the_last_embeddings_saved_are_those_of_the_trained_model(tmp_path: Path) -> None:
    model, x = embedding_model(), np.random.default_rng(0).integers(0, 4, (32, 2))
    board = Unhurried(tmp_path, 1, embeddings_freq=1)
    y = np.ones((32, 2))
    await Trainer(model).fit(x, y, epochs=3, validation_data=(x, y), verbose=0, callbacks=[board])
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [e.tensor_name for e in config.embeddings] == [f"embedding.ckpt-{epoch}" for epoch in (2, 1, 0)]
    last = np.fromfile(tmp_path / config.embeddings[0].tensor_path, "<f4").reshape(4, 3)
    assert last.tolist() == model.get_weights()[0].tolist()
    assert [event.step for event in read(tmp_path).Histograms("embedding_out")] == [0, 1, 2]


@pytest.mark.asyncio
async def test_a_cancelled_training_leaves_no_thread_and_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, gate = threading.Event(), threading.Event()
    looks_inside = Sequential.activations

    def slowly(model: Sequential, x: Any) -> Any:
        began.set()
        gate.wait()
        return looks_inside(model, x)

    monkeypatch.setattr(Sequential, "activations", slowly)
    take, given = Run.snapshot_now, list[Any]()

    def noted(run: Run, callback: Any, *, pooled: bool) -> Any:
        given.append(take(run, callback, pooled=pooled))
        return given[-1]

    monkeypatch.setattr(Run, "snapshot_now", noted)
    board = TensorBoard(tmp_path, 1)
    training = asyncio.ensure_future(train(board, epochs=10**6))
    await asyncio.to_thread(began.wait, 10)
    training.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert not board._sideline.busy
    assert given
    assert all(snapshot.released for snapshot in given)
    assert read(tmp_path).Histograms("dense_out")[0].step == 0


@pytest.mark.asyncio
async def test_a_disk_that_fills_up_is_said_once_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("asynccb"), "handlers", [log])
    monkeypatch.setattr(logging.getLogger("asynccb"), "propagate", False)
    monkeypatch.setattr("asynccb.callbacks.tensorboard.writer.os.fsync", full)
    callback = TensorBoard(tmp_path)
    history = await train(callback)
    (line,) = said
    assert "No space left on device" in line
    assert history.epoch == [0, 1, 2]
    assert [(failure.callback, failure.times) for failure in history.failures] == [("TensorBoard", 1)]
    assert callback.dropped == 3


@pytest.mark.asyncio
async def test_a_folder_that_cannot_be_made_ends_the_training_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counts = Counts()
    with pytest.raises(FileExistsError):
        await train(TensorBoard(tmp_path / "file" / "logs"), counts)
    assert counts.batches == 0


class Counts(Callback):
    batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
