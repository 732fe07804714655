"""Files that the library never wrote: it finds in them what was in memory."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import threading
import tracemalloc
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb.errors import CheckpointWriteError, FileRefused
from asynccb.models import Adagrad, BatchNormalization, Dense, Dropout, Sequential, load_model
from asynccb.storage import direct, hdf5, template
from asynccb.storage.hdf5 import hdf5_thread, read_model_file, write_model_file
from asynccb.storage.layout import SMALLEST_STATE, STATE, state_pieces
from asynccb.storage.packing import unpack
from asynccb.storage.template import Template, Templates, Unfit, make

_spec = importlib.util.spec_from_file_location("model_files", Path(__file__).with_name("model_files.py"))
model_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model_files)
expect, file_of, layout_of, numbers = (
    model_files.expect, model_files.file_of, model_files.layout_of, model_files.numbers,
)  # fmt: skip


@pytest.fixture(autouse=True)
def templates(monkeypatch):
    """None is known from another test."""
    known = Templates(hdf5_thread.call)
    monkeypatch.setattr(hdf5, "_templates", known)
    return known


@pytest.fixture
def calls(monkeypatch):
    """How many system calls each save by a template has written with."""
    counts, pieces, put = [], Template.pieces, direct._put

    def of_a_template(*args):
        made = pieces(*args)
        counts.append(0)
        return made

    def counted(*args):
        if counts:
            counts[-1] += 1
        return put(*args)

    monkeypatch.setattr(Template, "pieces", of_a_template)
    monkeypatch.setattr(direct, "_put", counted)
    return counts


@pytest.fixture
def no_library(monkeypatch):
    """From the call on, the library may not be used."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("the library is used")

        monkeypatch.setattr(h5py, "File", refuse)
        return monkeypatch.undo

    return forbid


def read(path):
    """Everything in a file, as the library sees it."""
    with h5py.File(path) as file:
        found = {f"@{name}": value for name, value in file.attrs.items()}
        file.visititems(
            lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {})
        )
    return found


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)
DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "u1", "i4", "i8", "u4"])


@given(SHAPES, DTYPES, st.randoms(), st.booleans())
def test_the_library_finds_every_array_where_the_template_put_it(
    tmp_path_factory, shapes, dtype, random, with_state
):
    arrays, slots = numbers(*shapes, dtype=dtype), numbers((), (3,), *shapes[:2], seed=1)
    order = list(range(len(arrays) + len(slots)))
    random.shuffle(order)
    extra = {"random": {"x": 1 << 90}} if with_state else {}
    contents = file_of(arrays, slots, order=tuple(order), extra=extra)
    path = tmp_path_factory.mktemp("template") / "m.h5"
    write_model_file(path, contents)
    found = read(path)
    for index, array in enumerate(arrays):
        assert same(found[f"layers/dense_{index}/vars/0"], array)
    for index, array in enumerate(slots):
        assert same(found[f"optimizer/vars/{index}"], array)
    assert json.loads(found["@training_config"])["optimizer_config"]["config"]["learning_rate"] == 0.1
    assert (unpack(found[STATE].data) if with_state else {}) == ({"format": 1, **extra} if with_state else {})
    assert hdf5._templates.get(contents.layout, len(state_bytes(extra))).proved


def test_what_the_template_writes_is_what_the_library_would_write(tmp_path, monkeypatch):
    contents = file_of(numbers((3, 4), (4,), ()), numbers((), (2, 2), seed=1), extra={"random": {}})
    write_model_file(tmp_path / "template.h5", contents)
    monkeypatch.setattr(hdf5._templates, "get", lambda *args: None)
    write_model_file(tmp_path / "library.h5", contents)
    left, right = read(tmp_path / "template.h5"), read(tmp_path / "library.h5")
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_after_the_first_save_of_a_layout_the_library_is_not_used(tmp_path, no_library):
    write_model_file(tmp_path / "first.h5", file_of(numbers((3, 4), seed=1)))
    wanted = file_of(numbers((3, 4), seed=2))
    allow = no_library()
    write_model_file(tmp_path / "later.h5", wanted)
    allow()
    assert same(read_model_file(tmp_path / "later.h5", expect(wanted)).weights[0], wanted.memory[0])


def test_the_first_save_of_a_layout_uses_it(tmp_path, no_library):
    """Negative control for the test above."""
    no_library()
    with pytest.raises(CheckpointWriteError, match="the library is used"):
        write_model_file(tmp_path / "first.h5", file_of(numbers((3, 4))))


def test_first_and_later_saves_and_those_of_a_new_process_give_equal_bytes(tmp_path, monkeypatch):
    contents = file_of(numbers((3, 4), (5,)), extra={"random": {}})
    for name in ("first.h5", "later.h5"):
        write_model_file(tmp_path / name, contents)
    monkeypatch.setattr(hdf5, "_templates", Templates(hdf5_thread.call))
    write_model_file(tmp_path / "new.h5", contents)
    assert len({(tmp_path / name).read_bytes() for name in ("first.h5", "later.h5", "new.h5")}) == 1


def trained_shape(layers):
    model = Sequential([Dense(5, input_dim=5), *[Dense(5) for _ in range(layers - 1)]], seed=1)
    model.compile("adam", "mse")
    return model


def test_a_model_in_flat_arrays_is_one_system_call_however_many_weights_it_has(tmp_path, calls):
    trained_shape(100).save(tmp_path / "m.h5")
    assert calls == [1]


@pytest.mark.parametrize("optimizer", ["adam", Adagrad(0.1), "sgd"])
def test_what_lies_between_the_tensors_of_a_flat_array_never_gets_into_a_file(tmp_path, optimizer):
    """An update may leave anything there (Adagrad starts with its accumulators at 0.1)."""
    model = Sequential([Dense(3, input_dim=5), BatchNormalization()], seed=1)
    model.compile(optimizer, "mse")
    model.save(tmp_path / "a.h5")
    load_model(tmp_path / "a.h5").save(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_what_changes_from_save_to_save_does_not_change_the_layout(tmp_path, templates):
    model = Sequential([Dense(3, input_dim=5), Dropout(0.1)], seed=1)
    model.compile("adam", "mse")
    for rate in (0.001, 1 / 3, 1e-300, 5, 12345.678901234567):
        model.optimizer.lr = rate
        model.train_batch(batch())
        model.save(tmp_path / "m.h5")
        loaded = load_model(tmp_path / "m.h5")
        assert loaded.optimizer.lr == rate
        assert loaded.train_batch(batch()) == model.train_batch(batch())
    assert len(templates._known) == 1


def batch():
    from asynccb.protocols import Batch

    return Batch(np.ones((4, 5), np.float32), np.ones((4, 3), np.float32), None, 4)


def state_bytes(extra):
    return b"".join(state_pieces(extra))


def test_what_is_ours_has_room_to_grow_and_doubles_it():
    for length in (1, 500, 990):
        assert len(state_bytes({"x": "a" * length})) == SMALLEST_STATE
    assert [len(state_bytes({"x": "a" * length})) for length in (1100, 3000, 9000)] == [2048, 4096, 16384]
    assert len(state_bytes({"x": np.zeros(100_000, np.uint8)})) == 1 << 17
    assert state_bytes({}) == b""
    exactly = {"x": "a" * (2048 - len('{"format":1,"x":""}\n'))}
    assert len(state_bytes(exactly)) == 2048
    assert unpack(state_bytes(exactly)) == {"format": 1, **exactly}
    assert len(state_bytes({"x": exactly["x"] + "a"})) == 4096


def extra_of(path, contents):
    """What the file holds that is ours."""
    seen = []
    read_model_file(path, lambda header: (seen.append(header.extra), expect(contents)(header))[1])
    return seen[0]


def state_with_arrays(seed):
    weights = numbers((30, 40), (), (7,), (0, 3), seed=seed)
    return {"resume": {"best": weights, "nan": float("nan"), "history": {"loss": [0.5, seed]}}, "random": {}}


@pytest.mark.parametrize("way", ["template", "library"])
def test_arrays_in_what_is_ours_come_back(tmp_path, monkeypatch, way, calls):
    if way == "library":
        monkeypatch.setattr(hdf5._templates, "get", lambda *args: None)
    for seed in (1, 2):
        contents = file_of(numbers((3, 4)), extra=state_with_arrays(seed))
        write_model_file(tmp_path / "m.h5", contents)
        found, wanted = extra_of(tmp_path / "m.h5", contents), state_with_arrays(seed)
        assert found.keys() == wanted.keys()
        assert all(map(same, found["resume"]["best"], wanted["resume"]["best"]))
        assert found["resume"]["history"] == wanted["resume"]["history"]
        with h5py.File(tmp_path / "m.h5") as file:
            assert file[STATE].shape == (8192,)
    assert len(calls) == (2 if way == "template" else 0)


def test_a_state_that_grows_within_its_room_needs_no_library(tmp_path, no_library):
    write_model_file(tmp_path / "m.h5", file_of(numbers((3,)), extra={"x": np.zeros(1200, np.uint8)}))
    forbidden = no_library()
    write_model_file(tmp_path / "m.h5", file_of(numbers((3,)), extra={"x": np.ones(1900, np.uint8)}))
    forbidden()
    assert extra_of(tmp_path / "m.h5", file_of(numbers((3,))))["x"].tolist() == [1] * 1900


# ---------------------------------------------------------------- what does not fit


def backwards(array):
    return array.astype(array.dtype.newbyteorder(">"))


@pytest.mark.parametrize(
    "arrays",
    [
        [backwards(numbers((3, 4))[0])],
        [numbers((4, 3))[0].T],
        [numbers((6, 4))[0][::2]],
    ],
    ids=["other order of bytes", "transposed", "every other row"],
)
def test_what_does_not_fit_is_written_through_the_library(tmp_path, arrays, calls):
    contents = file_of(arrays)
    write_model_file(tmp_path / "m.h5", contents)
    assert calls == []
    (found,) = read_model_file(tmp_path / "m.h5", expect(contents)).weights
    assert np.array_equal(found, arrays[0])


def test_an_array_that_does_not_fit_leaves_the_layout_as_it_is(tmp_path, calls):
    write_model_file(tmp_path / "a.h5", file_of([numbers((3, 4))[0].T]))
    assert calls == []
    write_model_file(tmp_path / "b.h5", file_of(numbers((4, 3))))
    assert len(calls) == 1


def test_a_name_that_looks_like_the_learning_rate_is_kept_as_it_is(tmp_path, calls):
    config = json.dumps({"name": hdf5.LEARNING_RATE})
    write_model_file(tmp_path / "m.h5", file_of(numbers((2,)), numbers(()), config=config))
    assert calls == []
    found = read(tmp_path / "m.h5")
    assert found["@model_config"] == config
    assert json.loads(found["@training_config"])["optimizer_config"]["config"]["learning_rate"] == 0.1


def test_without_the_system_call_that_takes_pieces_they_are_written_one_by_one(tmp_path, monkeypatch, calls):
    monkeypatch.delattr(os, "pwritev")
    model = trained_shape(3)
    model.save(tmp_path / "m.h5")
    assert calls[0] > 1
    loaded = load_model(tmp_path / "m.h5")
    assert [w.tobytes() for w in loaded.get_weights()] == [w.tobytes() for w in model.get_weights()]


def test_a_library_that_makes_no_template_writes_the_file_itself(tmp_path, monkeypatch, calls):
    def odd(*args):
        raise TypeError("an argument has another name by now")

    monkeypatch.setattr(template, "make", odd)
    contents = file_of(numbers((3, 4)))
    write_model_file(tmp_path / "m.h5", contents)
    assert calls == []
    assert same(read_model_file(tmp_path / "m.h5", expect(contents)).weights[0], contents.memory[0])


def misplace(monkeypatch):
    real = template._place
    monkeypatch.setattr(
        template, "_place", lambda head, header, offset, nbytes: real(head, header, offset - 64, nbytes)
    )


def test_a_template_that_the_library_does_not_confirm_is_never_used(tmp_path, monkeypatch, templates, calls):
    misplace(monkeypatch)
    contents = file_of(numbers((30,), (40,)))
    write_model_file(tmp_path / "m.h5", contents)
    assert all(map(same, read_model_file(tmp_path / "m.h5", expect(contents)).weights, contents.memory))
    assert templates.get(contents.layout, 0) is None
    calls.clear()
    write_model_file(tmp_path / "m.h5", contents)
    assert calls == []
    assert os.listdir(tmp_path) == ["m.h5"]


def test_without_the_confirmation_wrong_numbers_would_be_read(tmp_path, monkeypatch):
    """Negative control for the test above."""
    misplace(monkeypatch)
    monkeypatch.setattr(Template, "prove", lambda *args: None)
    contents = file_of(numbers((30,), (40,)))
    write_model_file(tmp_path / "m.h5", contents)
    assert not all(map(same, read_model_file(tmp_path / "m.h5", expect(contents)).weights, contents.memory))


def test_metadata_of_another_format_does_not_fit():
    layout = layout_of(numbers((3,)))

    def image(libver):
        with h5py.File("x", "w", driver="core", backing_store=False, libver=libver) as file:
            file.create_dataset("d", (3,), "f4")
            file.flush()
            return file.id.get_file_image(), h5py.h5o.get_info(file.id, b"d").addr

    for libver in ("latest", ("earliest", "v110")):
        content, header = image(libver)
        if libver == "latest":
            with pytest.raises(Unfit):
                Template(layout, content, [header], 0)
        else:
            assert Template(layout, content, [header], 0).size > len(content)  # the control
            with pytest.raises(Unfit, match="layout"):
                Template(layout_of(numbers((4,))), content, [header], 0)


def test_arrays_that_are_not_those_of_the_layout_are_an_error_and_no_file(tmp_path):
    contents = file_of(numbers((3, 4)), memory=tuple(numbers((40, 40))))
    with pytest.raises(CheckpointWriteError, match="do not fill the layout"):
        write_model_file(tmp_path / "m.h5", contents)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- memory, threads


def test_the_templates_kept_are_few_and_small(monkeypatch):
    known = Templates(lambda job: job())
    layouts = [layout_of(numbers((index + 1,))) for index in range(template.MOST_TEMPLATES + 3)]
    for layout in layouts:
        known.get(layout, 0)
    assert [key[0] for key in known._known] == layouts[3:]
    known.get(layouts[3], 0)  # used again, so it stays
    known.get(layouts[0], 0)
    assert [key[0] for key in known._known] == [*layouts[5:], layouts[3], layouts[0]]
    monkeypatch.setattr(template, "MOST_BYTES", 1)
    known.get(layouts[1], 0)
    assert [key[0] for key in known._known] == [layouts[1]]


@pytest.mark.parametrize("count", [1, 300])
def test_a_save_takes_no_memory_of_the_order_of_the_arrays(tmp_path, count):
    size = 32 << 20
    arrays = [np.ones(size // count // 4, np.float32) for _ in range(count)]
    contents = file_of(arrays)
    write_model_file(tmp_path / "m.h5", contents)
    tracemalloc.start()
    try:
        write_model_file(tmp_path / "m.h5", contents)
        _, peak = tracemalloc.get_traced_memory()
        copied = [array.copy() for array in arrays]
        _, control = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(copied) == count
    assert control > size
    assert peak < size / 4  # small arrays are gathered for the digest, 4 MB at a time


@pytest.mark.parametrize("way", ["in pieces", "one by one"])
def test_arrays_in_what_is_ours_are_not_copied_by_a_save(tmp_path, monkeypatch, way):
    if way == "one by one":
        monkeypatch.delattr(os, "pwritev")
    best = np.ones(33 << 18, np.float32)  # 33 MB, and 31 MB of room behind
    contents = file_of(numbers((3, 4)), extra={"best": best})
    write_model_file(tmp_path / "m.h5", contents)
    tracemalloc.start()
    try:
        write_model_file(tmp_path / "m.h5", contents)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < best.nbytes / 2


def test_a_known_layout_is_saved_while_the_librarys_thread_is_busy(tmp_path):
    contents = file_of(numbers((3, 4)))
    write_model_file(tmp_path / "m.h5", contents)
    gate = threading.Event()
    busy = hdf5_thread.submit(gate.wait)
    try:
        write_model_file(tmp_path / "later.h5", contents)
        assert not busy.done()
        assert (tmp_path / "later.h5").exists()
    finally:
        gate.set()


def test_the_library_writes_in_memory_alone(tmp_path, monkeypatch):
    """On a disk it swallows the error of a write that it makes when an object is released, and may crash
    behind one that it meets when it closes the file."""
    writing, real = [], h5py.File

    def file(name, mode, **settings):
        if mode == "w":
            writing.append((settings.get("driver"), settings.get("backing_store")))
        return real(name, mode, **settings)

    monkeypatch.setattr(h5py, "File", file)
    write_model_file(tmp_path / "fits.h5", file_of(numbers((3, 4))))
    write_model_file(tmp_path / "fits not.h5", file_of([numbers((3, 4))[0].T]))
    assert writing == [("core", False)] * 3


def test_all_objects_of_the_library_live_on_its_thread(tmp_path, monkeypatch):
    seen, real = set(), h5py.File

    def file(*args, **kwargs):
        seen.add(threading.current_thread().name)
        return real(*args, **kwargs)

    monkeypatch.setattr(h5py, "File", file)
    model = trained_shape(2)
    model.save(tmp_path / "m.h5")
    load_model(tmp_path / "m.h5")
    monkeypatch.setattr(hdf5._templates, "get", lambda *args: None)
    model.save(tmp_path / "m.h5")
    assert seen == {"asynccb hdf5"}


def test_an_error_takes_none_of_the_librarys_objects_off_its_thread(tmp_path, monkeypatch):
    contents = file_of(numbers((3, 4)))
    write_model_file(tmp_path / "m.h5", contents)
    opened, real = [], h5py.File

    def file(*args, **kwargs):
        found = real(*args, **kwargs)
        opened.append(weakref.ref(found))
        return found

    monkeypatch.setattr(h5py, "File", file)
    with pytest.raises(FileRefused) as refused:
        read_model_file(tmp_path / "m.h5", expect(file_of(numbers((4, 3)))))

    def explode(header):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own") as own:
        read_model_file(tmp_path / "m.h5", explode)
    gc.collect()
    assert [reference() for reference in opened] == [None, None]
    assert refused.tb
    assert own.tb  # both are still held


def test_a_save_on_the_librarys_own_thread_does_not_wait_for_itself(tmp_path):
    contents = file_of(numbers((3, 4)))
    hdf5_thread.submit(write_model_file, tmp_path / "m.h5", contents).result(timeout=30)
    read = hdf5_thread.submit(read_model_file, tmp_path / "m.h5", expect(contents)).result(timeout=30)
    assert same(read.weights[0], contents.memory[0])


def test_layouts_asked_for_at_the_same_time_are_made_once(monkeypatch):
    made, gate = [], threading.Event()

    def counted(layout, capacity):
        made.append(layout)
        return make(layout, capacity)

    monkeypatch.setattr(template, "make", counted)
    known = Templates(hdf5_thread.call)
    layout = layout_of(numbers((3,)))
    hdf5_thread.submit(gate.wait)
    asking = [threading.Thread(target=known.get, args=(layout, 0)) for _ in range(4)]
    for thread in asking:
        thread.start()
    while len(hdf5_thread._jobs) < 4:
        pass
    gate.set()
    for thread in asking:
        thread.join()
    assert len(made) == 1
