"""Files that say what they must not say are refused, before an array is read."""

from __future__ import annotations

import ast
import errno
import os
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

import asynccb
from asynccb.errors import CheckpointWriteError, FileRefused
from asynccb.models import Dense, Sequential, load_model
from asynccb.storage import hdf5

SECRET = np.arange(20, dtype=np.float32).reshape(5, 4)
KERNEL = "layers/dense/vars/0"


def make():
    model = Sequential([Dense(4, input_dim=5)], seed=1)
    model.compile("adam", "mse")
    return model


@pytest.fixture
def path(tmp_path):
    make().save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = SECRET
    SECRET.tofile(tmp_path / "raw.bin")
    return tmp_path / "m.h5"


def replaced(change):
    """An attack that puts something else in the kernel's place."""

    def attack(file, folder):
        del file[KERNEL]
        change(file, folder)

    return attack


def external_link(file, folder):
    file[KERNEL] = h5py.ExternalLink(str(folder / "other.h5"), "/secret")


def soft_link(file, folder):
    file[KERNEL] = h5py.SoftLink("/optimizer/vars/2")


def external_storage(file, folder):
    file.create_dataset(KERNEL, (5, 4), "f4", external=[(str(folder / "raw.bin"), 0, 80)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((5, 4), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (5, 4))
    file.create_virtual_dataset(KERNEL, layout)


def strings(file, folder):
    file.create_dataset(KERNEL, (5, 4), h5py.string_dtype())


def ragged(file, folder):
    file.create_dataset(KERNEL, (5, 4), h5py.vlen_dtype(np.float32))


def references(file, folder):
    file.create_dataset(KERNEL, (5, 4), h5py.ref_dtype)


def compound(file, folder):
    file.create_dataset(KERNEL, (5, 4), [("a", "f4")])


def whole_numbers(file, folder):
    file.create_dataset(KERNEL, (5, 4), "i4", data=np.zeros((5, 4)))


def compressed(file, folder):
    file.create_dataset(KERNEL, data=SECRET, compression="gzip")


def bomb(file, folder):
    file.create_dataset(
        KERNEL, (3_000_000, 750_000_000), "f4", chunks=(1024, 1024)
    )  # 9 PB, none of it stored


def never_stored(file, folder):
    file.create_dataset(KERNEL, (5, 4), "f4", chunks=(5, 4))  # reads as zeros that nobody wrote


def other_shape(file, folder):
    file.create_dataset(KERNEL, data=SECRET.T)


def a_group(file, folder):
    file.create_group(KERNEL)


def a_type(file, folder):
    file[KERNEL] = np.dtype("f4")


def missing(file, folder):
    pass


ATTACKS = {change.__name__: replaced(change) for change in (
    external_link, soft_link, external_storage, virtual, strings, ragged, references, compound, whole_numbers,
    compressed,    bomb, never_stored, other_shape, a_group, a_type, missing,
)}  # fmt: skip


def attack(function):
    ATTACKS[function.__name__] = function
    return function


@attack
def link_of_a_whole_branch(file, folder):
    del file["layers"]
    file["layers"] = h5py.ExternalLink(str(folder / "other.h5"), "/")


@attack
def link_in_a_corner_that_is_not_read(file, folder):
    file["asynccb/deep/corner"] = h5py.SoftLink("/")


@attack
def more_layers(file, folder):
    file["layers/dense_1/vars/0"] = SECRET


@attack
def more_arrays(file, folder):
    file["layers/dense/vars/2"] = SECRET


@attack
def optimizer_bomb(file, folder):
    del file["optimizer/vars/2"]
    file.create_dataset("optimizer/vars/2", (3_000_000, 750_000_000), "f4", chunks=(1024, 1024))


@attack
def config_is_no_json(file, folder):
    file.attrs["model_config"] = "{"


@attack
def config_is_a_list(file, folder):
    file.attrs["model_config"] = "[]"


@attack
def config_is_too_deep(file, folder):
    file.attrs["model_config"] = "[" * 200_000


@attack
def config_is_an_array_of_strings(file, folder):
    del file.attrs["model_config"]
    file.attrs["model_config"] = ["{}", "{}"]


@attack
def config_is_numbers(file, folder):
    file.attrs["model_config"] = np.zeros(3)


@attack
def config_asks_for_code(file, folder):
    file.attrs["model_config"] = file.attrs["model_config"].replace('"Dense"', '"Lambda"')


@attack
def config_is_a_bomb(file, folder):
    file.attrs["model_config"] = file.attrs["model_config"].replace('"units":4', '"units":4000000000000')


def text(content):
    return np.frombuffer(content.encode(), np.uint8)


def with_state(**arguments):
    """An attack that puts something else in the place of what is ours."""

    def change(file, folder):
        del file["asynccb/state"]
        file.create_dataset("asynccb/state", **arguments)

    return change


ATTACKS |= {
    "state_is_a_bomb": with_state(shape=(1 << 45,), dtype="u1", chunks=(1 << 20,)),
    "state_was_never_stored": with_state(shape=(4096,), dtype="u1", chunks=(4096,)),
    "state_is_no_json": with_state(data=np.frombuffer(b"{ ", np.uint8)),
    "state_is_no_text": with_state(data=np.frombuffer(b'{"\xff": 1}', np.uint8)),
    "state_is_a_list": with_state(data=np.frombuffer(b"[] ", np.uint8)),
    "state_is_too_deep": with_state(data=np.frombuffer(b"[" * 200_000, np.uint8)),
    "state_is_a_table": with_state(data=np.full((2, 2), 32, np.uint8)),
    "state_is_one_number": with_state(data=np.uint8(32)),
    "state_is_floats": with_state(data=np.zeros(3)),
    "state_is_empty": with_state(shape=(0,), dtype="u1"),
    "state_holds_objects": with_state(data=text('{"a":{"$":["array","|O8",[1],0]}}\n        ')),
    "state_holds_more_than_it_has": with_state(
        data=text('{"a":{"$":["array","<f8",[1048576,1048576],0]}}\n')
    ),
    "state_is_of_a_newer_version": with_state(data=text('{"format":2,"a":{"$":["a word of then"]}}\n')),
}


@attack
def state_is_a_group(file, folder):
    del file["asynccb/state"]
    file.create_group("asynccb/state")


@attack
def a_hundred_and_one_groups_in_a_row(file, folder):
    file.create_group("g/" * 101)


@attack
def two_thousand_names_for_one_group(file, folder):
    for number in range(2000):
        file[f"vars/{number}"] = file["layers"]


@attack
def config_is_longer_than_any(file, folder):
    file.attrs["model_config"] = '{"a":"' + "a" * (4 << 20) + '"}'


@attack
def config_has_more_layers_than_any(file, folder):
    row = '{"class_name":"Dropout","config":{"rate":0.5}},'
    file.attrs["model_config"] = file.attrs["model_config"].replace('"layers":[', '"layers":[' + row * 10_000)


@attack
def config_has_a_type_that_numpy_would_compile(file, folder):
    file.attrs["model_config"] = file.attrs["model_config"].replace('"float32"', '"(9,9)f4"')


@attack
def iteration_is_without_end(file, folder):
    del file["optimizer/vars/0"]
    file["optimizer/vars/0"] = np.float32(np.inf)


@attack
def config_has_entries_of_odd_types(file, folder):
    file.attrs["model_config"] = '{"class_name":"Sequential","config":{"layers":[3],"name":"s"}}'


@attack
def optimizer_of_another_kind(file, folder):
    file.attrs["training_config"] = file.attrs["training_config"].replace('"Adam"', '"SGD"')


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_that_says_what_it_must_not_is_refused(path, name):
    with h5py.File(path, "r+") as file:
        ATTACKS[name](file, path.parent)
    with pytest.raises(FileRefused, match=r"m\.h5 was not loaded: "):
        load_model(path)


def test_a_file_of_a_newer_version_says_so(path):
    with h5py.File(path, "r+") as file:
        ATTACKS["state_is_of_a_newer_version"](file, path.parent)
    with pytest.raises(FileRefused, match=r"a newer asynccb has written it, in version 2 .* up to 1$"):
        load_model(path)


def test_a_file_from_before_the_versions_is_read(path):
    """There what is ours was JSON alone."""
    with h5py.File(path, "r+") as file:
        with_state(data=text('{"random":{}}'.ljust(1024)))(file, path.parent)
    assert load_model(path).get_weights()[0].shape == (5, 4)


@pytest.mark.parametrize("name", ["external_link", "external_storage", "virtual"])
def test_without_the_list_these_files_read_other_files(path, name):
    """Negative control: the plain way of reading returns the content of a file that nobody opened."""
    with h5py.File(path, "r+") as file:
        ATTACKS[name](file, path.parent)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file[KERNEL][()], SECRET)


@pytest.mark.parametrize("name", ["external_link", "virtual", "bomb", "other_shape", "more_layers"])
def test_load_weights_refuses_the_same_and_changes_nothing(path, name):
    with h5py.File(path, "r+") as file:
        ATTACKS[name](file, path.parent)
    model = make()
    before = [weight.tobytes() for weight in model.get_weights()]
    with pytest.raises(FileRefused):
        model.load_weights(path)
    assert [weight.tobytes() for weight in model.get_weights()] == before


def test_many_names_for_the_same_bytes_make_no_large_model(tmp_path):
    """Each array is stored in full, but a thousand of them are the same one."""
    model = Sequential(
        [Dense(50, use_bias=False, input_dim=50), *[Dense(50, use_bias=False) for _ in range(99)]]
    )
    model.save_weights(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as old, h5py.File(tmp_path / "small.h5", "w") as new:
        new.attrs["model_config"] = old.attrs["model_config"]
        new["layers/dense/vars/0"] = old["layers/dense/vars/0"][()]
        for index in range(1, 100):
            new[f"layers/dense_{index}/vars/0"] = new["layers/dense/vars/0"]
    with pytest.raises(FileRefused, match="larger than the file"):
        load_model(tmp_path / "small.h5")


def test_a_state_that_claims_to_lie_beyond_the_end_of_the_file_takes_no_memory(path):
    """Its header says so many bytes at this place, and that all of them are stored."""
    with h5py.File(path, "r+") as file:
        size = file["asynccb/state"].size
        header = h5py.h5o.get_info(file["asynccb/state"].id).addr
    content, claimed = bytearray(path.read_bytes()), 1 << 33
    places = [at for at in range(header, header + 256) if content[at : at + 8] == size.to_bytes(8, "little")]
    assert len(places) == 3  # the shape, its maximum, the length of what is stored
    for at in places:
        content[at : at + 8] = claimed.to_bytes(8, "little")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileRefused):  # by the library, or before it is asked for the bytes
            load_model(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 << 20


def test_a_ring_of_groups_is_walked_once(path):
    with h5py.File(path, "r+") as file:
        file["vars/round"] = file["/"]
    assert len(load_model(path).get_weights()) == 2


@pytest.mark.parametrize("content", [b"", b"no HDF5 file", b"\x89HDF\r\n\x1a\n" + b"\xff" * 500])
def test_what_is_no_hdf5_file_is_refused(tmp_path, content):
    (tmp_path / "m.h5").write_bytes(content)
    with pytest.raises(FileRefused, match="damaged or no HDF5 file"):
        load_model(tmp_path / "m.h5")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FileRefused):
        load_model(path)


def test_a_plain_hdf5_file_is_refused_by_what_it_lacks(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["data"] = SECRET
    with pytest.raises(FileRefused, match="model_config"):
        load_model(tmp_path / "m.h5")


def test_uncompressed_chunks_are_allowed(path):
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        file.create_dataset(KERNEL, data=SECRET, chunks=(5, 2))
    np.testing.assert_array_equal(load_model(path).get_weights()[0], SECRET)


@pytest.mark.parametrize("failing", ["create_dataset", "create_group"])
def test_a_library_that_fails_leaves_the_old_file(path, monkeypatch, failing):
    content = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hdf5._templates, "get", lambda *args: None)
    monkeypatch.setattr(h5py.Group, failing, fail)
    with pytest.raises(CheckpointWriteError) as caught:
        make().save(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == content
    assert sorted(os.listdir(path.parent)) == ["m.h5", "other.h5", "raw.bin"]


def test_arrays_are_read_in_one_place_only():
    """Nothing but the reader subscripts an open file, so nothing goes round its list."""
    package = Path(asynccb.__file__).parent if asynccb.__file__ else Path("asynccb")
    opening = []
    for source in package.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
        opens = [call for call in calls if ast.unparse(call.func) == "h5py.File"]
        opening.extend((source.name, ast.literal_eval(call.args[1])) for call in opens)
    # The template's own check opens what it has just written, and compares places alone.
    wanted = [("hdf5.py", "w"), ("reader.py", "r"), ("template.py", "r"), ("template.py", "w")]
    assert sorted(opening) == wanted
