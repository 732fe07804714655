"""TensorBoard: all that is written is read back with real TensorBoard; faults are real where they can be."""

from __future__ import annotations

import asyncio
import errno
import inspect
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as WhatThePageShows,
)

from asynccb import Callback, Trainer
from asynccb.callbacks import tensorboard_writer
from asynccb.callbacks.tensorboard import TensorBoard
from asynccb.callbacks.tensorboard_summaries import image_views, weights
from asynccb.callbacks.tensorboard_writer import EventFile, EventWriter
from asynccb.errors import ArgumentError
from asynccb.models import Activation, Dense, Sequential

if TYPE_CHECKING:
    from collections.abc import Callable
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
        self.arrays = arrays
        self.released = False

    def release(self) -> None:
        self.released = True


class FakeRun:
    """A run as the callback sees it; every snapshot that it gave is kept."""

    def __init__(self, name: str = "run-1", arrays: dict[str, Any] | None = None) -> None:
        self.name = name
        self.arrays = arrays or {}
        self.snapshots: list[FakeSnapshot] = []

    def snapshot_now(self, callback: object) -> FakeSnapshot:
        self.snapshots.append(FakeSnapshot(self.arrays))
        return self.snapshots[-1]


async def call(hook: Callable[..., Any], *args: Any) -> None:
    """As a run does it: the inline half on another thread, what it returns on the loop."""
    later = await asyncio.to_thread(hook, *args)
    if later is not None:
        await later


async def fit(callback: TensorBoard, *epochs: dict[str, Any], run: Any = None, model: Any = None) -> None:
    callback.set_model(model)
    callback.set_params({})
    callback.run = run or FakeRun()
    await call(callback.on_train_begin, {})
    for epoch, logs in enumerate(epochs):
        await call(callback.on_epoch_end, epoch, logs)
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


@pytest.mark.parametrize("given", [{"histogram_freq": 1, "write_grads": True}, {"embeddings_freq": 2}])
def test_what_is_not_there_yet_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="not available yet"):
        TensorBoard(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"histogram_freq": -1},
        {"histogram_freq": 0.5},
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
    monkeypatch.setattr("asynccb.callbacks.tensorboard.SHIP_EVERY", 3600.0)
    await trained_batches(TensorBoard(tmp_path, update_freq="batch"), 500)
    assert len(writes) == 3  # the opening, the first batch, the rest
    assert len(points(read(tmp_path), "batch_loss")) == 500


# ---------------------------------------------------------------- weights


@pytest.mark.asyncio
async def test_histograms_are_written_every_so_many_epochs_without_validation_data(tmp_path: Path) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    run = FakeRun(arrays={"dense/kernel:0": kernel, "optimizer/m/kernel": kernel})
    await fit(TensorBoard(tmp_path, 2), *[{"loss": 1.0}] * 5, run=run)
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["dense/kernel_0"]
    assert [event.step for event in found.Histograms("dense/kernel_0")] == [0, 2, 4]
    value = found.Histograms("dense/kernel_0")[0].histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (0.0, 5.0, 6.0, 15.0, 55.0)
    assert sum(value.bucket) == 6
    assert len(run.snapshots) == 3
    assert all(snapshot.released for snapshot in run.snapshots)


@pytest.mark.asyncio
async def test_histograms_are_of_the_weights_at_the_epochs_end(tmp_path: Path) -> None:
    model = small_model()
    run = SimpleNamespace(name="r", snapshot_now=lambda callback: FakeSnapshot(dict(model.capture().arrays)))
    callback = TensorBoard(tmp_path, histogram_freq=1)
    callback.run = run
    before = float(model.get_weights()[0].max())
    await call(callback.on_train_begin, {})
    later = callback.on_epoch_end(0, {})
    model.set_weights([weight + 100.0 for weight in model.get_weights()])
    await later
    await call(callback.on_train_end, {})
    assert read(tmp_path).Histograms("dense/kernel")[0].histogram_value.max == pytest.approx(before)


finite_or_not = st.one_of(
    hnp.arrays(np.float32, hnp.array_shapes(min_side=0), elements=st.floats(width=32)),
    hnp.arrays(np.float64, hnp.array_shapes(min_side=0), elements=st.floats()),
)


@given(finite_or_not)
def test_a_histogram_counts_every_finite_number_once(array: np.ndarray) -> None:
    finite = np.clip(array[np.isfinite(array)].astype(float), -8e307, 8e307)
    events = list(weights(3, 1.0, {"w": array}, images=True))
    values = [value for event in events for value in event.summary.value]
    histograms = [value.histo for value in values if value.HasField("histo")]
    if not finite.size:
        assert histograms == []
        return
    (histogram,) = histograms
    assert sum(histogram.bucket) == histogram.num == finite.size
    assert (histogram.min, histogram.max) == (finite.min(), finite.max())
    assert list(histogram.bucket_limit) == sorted(histogram.bucket_limit)
    assert histogram.bucket_limit[-1] == finite.max()


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [
        ((), 0),
        ((5,), [(5, 1)]),
        ((1, 5), [(5, 1)]),
        ((3, 5), [(3, 5)]),
        ((5, 3), [(3, 5)]),
        ((2, 3, 4), [(2, 3)] * 4),
        ((3, 3, 1, 8), [(3, 3)] * 8),
        ((2, 2, 2, 2), 0),
        ((0, 3), 0),
    ],
)
def test_the_pictures_of_a_weight_by_its_shape(shape: tuple[int, ...], pictures: Any) -> None:
    assert [view.shape for view in image_views(np.zeros(shape))] == (pictures or [])


def test_each_kernel_of_three_axes_is_a_picture_of_its_own() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for index, view in enumerate(image_views(array)):
        assert view.tolist() == array[:, :, index].tolist()


@pytest.mark.asyncio
async def test_images_are_pngs_with_the_numbers_between_black_and_white(tmp_path: Path) -> None:
    from PIL import Image

    kernel = np.array([[-1.0, 0.0, 1.0], [math.nan, math.inf, 1.0]], np.float32)
    run = FakeRun(arrays={"w": kernel, "flat": np.ones(2)})
    await fit(TensorBoard(tmp_path, 1, write_images=True), {}, run=run)
    found = read(tmp_path)
    assert found.Tags()["images"] == ["w/image/0", "flat/image/0"]
    (event,) = found.Images("w/image/0")
    assert (event.step, event.height, event.width) == (0, 2, 3)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert np.asarray(image).tolist() == [[0, 128, 255], [0, 0, 255]]


@pytest.mark.asyncio
async def test_the_page_shows_histogram_and_image_of_one_weight(tmp_path: Path) -> None:
    await fit(TensorBoard(tmp_path, 1, write_images=True), {}, run=FakeRun(arrays={"w": np.eye(3)}))
    assert kinds_shown(tmp_path) == {"histograms": ["w"], "images": ["w/image/0"]}


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


async def epochs_that_come_faster_than_they_are_written(folder: Path, arrays: Any) -> TensorBoard:
    callback = TensorBoard(folder, histogram_freq=1)
    callback.run = FakeRun(arrays=arrays)
    await call(callback.on_train_begin, {})
    waiting = [callback.on_epoch_end(epoch, {"loss": 1.0}) for epoch in range(3)]
    for later in waiting:
        await later
    await call(callback.on_epoch_end, 3, {"loss": 1.0})
    await call(callback.on_train_end, {})
    assert [step for step, _ in points(read(folder), "loss")] == [0, 1, 2, 3]
    assert len(callback.run.snapshots) == 4 - callback.skipped
    return callback


@pytest.mark.asyncio
async def test_small_weights_wait_to_be_written(tmp_path: Path) -> None:
    callback = await epochs_that_come_faster_than_they_are_written(tmp_path, {"w": np.eye(3)})
    assert [event.step for event in read(tmp_path).Histograms("w")] == [0, 1, 2, 3]
    assert callback.skipped == 0


@pytest.mark.asyncio
async def test_large_weights_are_skipped_while_earlier_ones_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asynccb.callbacks.tensorboard.ROOM", 100)
    callback = await epochs_that_come_faster_than_they_are_written(tmp_path, {"w": np.eye(3)})
    assert [event.step for event in read(tmp_path).Histograms("w")] == [0, 3]
    assert callback.skipped == 2


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
    monkeypatch.setattr(tensorboard_writer, "_counter", iter([int(first.path.split(".")[-2]), 777]))
    second = EventFile(str(tmp_path), "run")
    first.close()
    second.close()
    assert second.path != first.path
    assert second.path.endswith(".777.run")


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.asyncio
async def test_a_folder_that_cannot_be_made_fails_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    callback = TensorBoard(tmp_path / "file" / "logs")
    with pytest.raises(OSError, match="file"):
        await call(callback.on_train_begin, {})
    await call(callback.on_train_end, {})  # comes after a failure too


FULL_DISK = """
import asyncio, json, resource, signal, sys, warnings
from types import SimpleNamespace
import numpy as np
from asynccb.callbacks.tensorboard import TensorBoard

def snapshot(callback):
    return SimpleNamespace(arrays={f"w{i}": np.random.rand(64) for i in range(40)}, release=lambda: None)

async def main(folder):
    callback = TensorBoard(folder, histogram_freq=1)
    callback.run = SimpleNamespace(name="run", snapshot_now=snapshot)
    errors, done = [], 0
    await callback.on_train_begin({})
    for epoch in range(50):
        try:
            await callback.on_epoch_end(epoch, {"loss": float(epoch)})
            done += not errors
        except OSError as error:
            errors.append([error.errno, error.filename])
    await callback.on_train_end({})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    accumulator = EventAccumulator(callback.path, size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    print(json.dumps({
        "errors": errors, "done": done, "dropped": callback.dropped, "path": callback.path,
        "scalars": [event.step for event in accumulator.Scalars("loss")],
        "histograms": [event.step for event in accumulator.Histograms("w39")],
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
    assert result["scalars"] == list(range(result["done"]))
    assert result["histograms"] == list(range(result["done"]))


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


@pytest.mark.asyncio
async def test_after_a_failure_no_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: EventFile, events: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = FakeRun(arrays={"w": np.eye(2)})
    callback = TensorBoard(tmp_path, histogram_freq=1)
    callback.run = run
    await call(callback.on_train_begin, {})
    monkeypatch.setattr(EventFile, "append", refuse)
    with pytest.raises(OSError, match="No space left"):
        await call(callback.on_epoch_end, 0, {})
    await call(callback.on_epoch_end, 1, {})
    await call(callback.on_train_end, {})
    assert [snapshot.released for snapshot in run.snapshots] == [True]
    assert callback.dropped == 1


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
import os, signal, sys
from tensorboardX import SummaryWriter
writer = SummaryWriter(sys.argv[1])
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


# ---------------------------------------------------------------- in a training


async def train(*callbacks: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.random((64, 4), np.float32)
    y = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 64)]
    return await Trainer(small_model()).fit(
        x, y, batch_size=8, epochs=3, validation_split=0.25, verbose=0, callbacks=list(callbacks)
    )


@pytest.mark.asyncio
async def test_a_training_leaves_every_kind_of_record(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path, histogram_freq=1, write_images=True, update_freq="batch")
    history = await train(callback)
    found = read(tmp_path)
    for key in ("loss", "val_loss"):
        assert [step for step, _ in points(found, key)] == [0, 1, 2]
        assert [value for _, value in points(found, key)] == pytest.approx(history.history[key])
    assert [step for step, _ in points(found, "batch_loss")] == list(range(1, 19))
    assert sorted(found.Tags()["histograms"]) == [
        "dense/bias",
        "dense/kernel",
        "dense_1/bias",
        "dense_1/kernel",
    ]
    assert [event.step for event in found.Histograms("dense/kernel")] == [0, 1, 2]
    assert [event.step for event in found.Images("dense_1/bias/image/0")] == [0, 1, 2]
    assert found.Tags()["graph"] is True


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
    monkeypatch.setattr("asynccb.callbacks.tensorboard_writer.os.fsync", full)
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
    with pytest.raises(NotADirectoryError):
        await train(TensorBoard(tmp_path / "file" / "logs"), counts)
    assert counts.batches == 0


class Counts(Callback):
    batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
