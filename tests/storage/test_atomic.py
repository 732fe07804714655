"""A file is the old one or the new one, whole, whichever step fails."""

from __future__ import annotations

import errno
import os
import pickle
import stat

import pytest

from asynccb.errors import CheckpointWriteError
from asynccb.storage import atomic, atomic_write

OLD, NEW = b"old content", b"new content, longer than the old"


def write_new(path):
    with open(path, "wb") as file:
        file.write(NEW)


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(OLD)
    return path


def test_the_new_content_takes_the_place_of_the_old(target):
    atomic_write(target, write_new)
    assert target.read_bytes() == NEW
    assert os.listdir(target.parent) == ["model.h5"]


def test_missing_folders_are_made(tmp_path):
    atomic_write(tmp_path / "a" / "b" / "model.h5", write_new)
    assert (tmp_path / "a" / "b" / "model.h5").read_bytes() == NEW


def test_the_temporary_file_lies_beside_the_target_and_is_recognisable(target):
    seen = []
    atomic_write(target, lambda path: (seen.append(path), write_new(path)))
    folder, name = os.path.split(seen[0])
    assert folder == str(target.parent)
    assert name.startswith(".model.h5.")
    assert atomic.is_temporary(name)
    assert not any(
        atomic.is_temporary(other) for other in ("model.h5", ".hidden", ".a.tmp", "a.01234567.tmp")
    )


def test_while_it_is_written_the_old_content_is_read(target):
    def write(path):
        write_new(path)
        assert target.read_bytes() == OLD

    atomic_write(target, write)


def test_writing_in_place_would_show_half_a_file(target):
    """Negative control for the test above: the obvious way leaves a reader with neither content."""
    with open(target, "wb", buffering=0) as file:
        file.write(NEW[:5])
        assert target.read_bytes() not in (OLD, NEW)
        file.write(NEW[5:])


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half_and_fail(path):
    with open(path, "wb") as file:
        file.write(NEW[:4])
    fail()


@pytest.mark.parametrize("step", ["write", "open", "fsync", "replace"])
def test_a_failure_in_any_step_leaves_the_old_file_and_nothing_else(target, monkeypatch, step):
    if step != "write":
        monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(CheckpointWriteError) as caught:
        atomic_write(target, write_half_and_fail if step == "write" else write_new)
    monkeypatch.undo()
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == ["model.h5"]
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.path == str(target)
    assert isinstance(caught.value, OSError)


def test_a_failure_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(CheckpointWriteError):
        atomic_write(tmp_path / "model.h5", write_half_and_fail)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_the_same_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointWriteError) as caught:
        atomic_write(tmp_path / "file" / "model.h5", write_new)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_errors_of_the_writer_that_are_no_system_errors_are_wrapped_too(target):
    def write(path):
        raise ValueError("odd")

    with pytest.raises(CheckpointWriteError, match=r"could not write .*model\.h5: odd") as caught:
        atomic_write(target, write)
    assert isinstance(caught.value.__cause__, ValueError)
    assert pickle.loads(pickle.dumps(caught.value)).path == str(target)


def test_an_interrupt_passes_unchanged_and_leaves_nothing_behind(target):
    def write(path):
        write_new(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, write)
    assert os.listdir(target.parent) == ["model.h5"]


def test_the_order_is_content_fsync_rename_fsync_of_the_folder(target, monkeypatch):
    """Either fsync left out, or out of order, and a power cut leaves the name without the content."""
    order = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real["fsync"](descriptor)

    def replace(source, destination):
        order.append("rename")
        real["replace"](source, destination)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "replace", replace)
    atomic_write(target, lambda path: (order.append("content"), write_new(path)))
    assert order == ["content", "file", "rename", "folder"]


def test_a_writer_that_synchronizes_the_file_itself_is_not_repeated(target, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    atomic_write(target, write_new, synced=True)
    assert synced == [True]  # the folder alone


def test_a_path_through_a_linked_folder_is_written_where_the_link_leads(tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    monkeypatch.chdir(tmp_path)
    atomic_write("link/../model.h5", write_new)
    assert (tmp_path / "real" / "model.h5").read_bytes() == NEW
    assert not (tmp_path / "model.h5").exists()


def test_a_platform_that_cannot_open_folders_is_served_without(target, monkeypatch):
    monkeypatch.delattr(atomic.os, "O_DIRECTORY")
    atomic_write(target, write_new)
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synchronized_is_a_warning_because_the_file_is_in_place(
    target, monkeypatch, call
):
    real = getattr(os, call)

    def fail_for_folders(what, *args):
        is_folder = os.path.isdir(what) if call == "open" else stat.S_ISDIR(os.fstat(what).st_mode)
        return fail() if is_folder else real(what, *args)

    monkeypatch.setattr(atomic.os, call, fail_for_folders)
    with pytest.warns(RuntimeWarning, match="is in place, but might be gone after a power cut"):
        atomic_write(target, write_new)
    monkeypatch.undo()
    assert target.read_bytes() == NEW


def test_a_link_stays_a_link(tmp_path, target):
    link = tmp_path / "best.h5"
    link.symlink_to(target)
    atomic_write(link, write_new)
    assert link.is_symlink()
    assert target.read_bytes() == NEW


def test_names_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    name = "n" * 250 + ".h5"
    atomic_write(tmp_path / name, write_new)
    assert os.listdir(tmp_path) == [name]


def test_a_relative_path_is_written_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atomic_write("model.h5", write_new)
    assert (tmp_path / "model.h5").read_bytes() == NEW
