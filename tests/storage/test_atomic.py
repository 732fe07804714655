"""A file is the old one or the new one, whole, whichever step fails."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import threading
import warnings

import pytest

from asynccb.errors import CheckpointWriteError
from asynccb.storage import atomic, atomic_write, turns
from asynccb.storage.atomic import is_temporary, make_folder, remove_leftovers
from asynccb.storage.owner import this_process

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


def test_folders_that_are_made_are_made_durable_from_the_top(tmp_path, monkeypatch):
    """A power cut may take away a new folder with all that was synchronized in it."""
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("which file a descriptor belongs to is not told here")
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    atomic_write(tmp_path / "a" / "b" / "model.h5", write_new, synced=True)
    assert synced == [".", "a", os.path.join("a", "b")]
    synced.clear()
    make_folder(str(tmp_path / "a" / "b"))
    assert synced == []


def test_a_folder_that_another_one_makes_at_the_same_time_is_good_too(tmp_path, monkeypatch):
    real = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path: (real(path), real(path)))
    make_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


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


def test_names_of_many_bytes_can_be_written(tmp_path):
    name = "é" * 126 + ".h5"
    atomic_write(tmp_path / name, write_new)
    assert os.listdir(tmp_path) == [name]


def failing(name, number, left, sticky):
    """A call of the system that fails when ``left`` is counted down."""
    real = getattr(os, name)

    def call(*args, **kwargs):
        left[0] -= 1
        fails = left[0] == 0 or (sticky and left[0] < 0)
        if not fails or name == "close":
            result = real(*args, **kwargs)  # a failing close closes all the same
        if fails:
            raise OSError(number, os.strerror(number))
        return result

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_an_error_at_any_call_leaves_the_old_file_or_the_new_one_whole(tmp_path, monkeypatch, number, sticky):
    """The k-th call fails, for every k, until none is left to fail."""
    calls = ("stat", "open", "fsync", "replace", "close")
    target = tmp_path / "model.h5"
    for k in range(1, 20):
        target.write_bytes(OLD)
        left, outcome = [k], "new"

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for name in calls:
                patch.setattr(os, name, failing(name, number, left, sticky))
            try:
                atomic_write(target, write_new)
            except CheckpointWriteError as error:
                outcome, caught = "old", error.errno
        assert outcome == "new" or caught == number
        assert target.read_bytes() == (OLD if outcome == "old" else NEW), f"call {k}"
        assert os.listdir(tmp_path) == ["model.h5"], f"call {k}"
        assert len(said) <= 1
        if left[0] > 0:
            break
        assert outcome == "old" or said, f"call {k}: a failure is said"
    assert 6 < k < 19


# ---------------------------------------------------------------- turns


def content(text):
    def write(path):
        with open(path, "wb") as file:
            file.write(text)

    return write


def abandon_and_go_on(target, between):
    """An old write is at its end and waits; ``between`` is done; then it goes on."""
    written, go_on = threading.Event(), threading.Event()

    def write(path):
        content(b"abandoned")(path)
        written.set()
        assert go_on.wait(30)

    old = threading.Thread(target=atomic_write, args=(target, write))
    old.start()
    assert written.wait(30)
    try:
        between()
    finally:
        go_on.set()
        old.join()
    return target.read_bytes()


def test_a_write_that_was_given_up_never_lands_over_a_newer_one(target):
    found = abandon_and_go_on(target, lambda: atomic_write(target, content(b"newer")))
    assert found == b"newer"
    assert os.listdir(target.parent) == ["model.h5"]


def test_without_turns_it_would(target, monkeypatch):
    """Negative control for the test above."""
    monkeypatch.setattr(turns._Target, "take", lambda self, number, rename: rename() or True)
    found = abandon_and_go_on(target, lambda: atomic_write(target, content(b"newer")))
    assert found == b"abandoned"


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_the_same_file_under_another_name_is_the_same_file(tmp_path, target, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "best.h5").symlink_to("model.h5")
    monkeypatch.chdir(tmp_path)
    for name in ("link/model.h5", "model.h5", "./link/link/model.h5", "best.h5"):
        found = abandon_and_go_on(target, lambda name=name: atomic_write(name, content(b"newer")))
        assert found == b"newer", name


def test_a_newer_write_that_fails_does_not_keep_an_older_one_from_its_place(target):
    def fail_to_write():
        with pytest.raises(CheckpointWriteError):
            atomic_write(target, write_half_and_fail)

    assert abandon_and_go_on(target, fail_to_write) == b"abandoned"


def test_other_files_of_the_folder_have_turns_of_their_own(target):
    other = target.with_name("other.h5")
    assert abandon_and_go_on(target, lambda: atomic_write(other, write_new)) == b"abandoned"


def test_one_that_was_overtaken_returns_when_the_newer_one_is_durable(target, monkeypatch):
    """The newer one has its name and may not have synchronized the folder yet."""
    folders, real = [], os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(threading.current_thread())
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    abandon_and_go_on(target, lambda: atomic_write(target, content(b"newer")))
    assert len(set(folders)) == 2


def test_nothing_is_remembered_of_files_that_are_not_being_written(tmp_path):
    for index in range(50):
        atomic_write(tmp_path / f"{index}.h5", write_new)
    with pytest.raises(CheckpointWriteError):
        atomic_write(tmp_path / "50.h5", write_half_and_fail)
    assert turns._targets == {}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_a_child(job):
    """Forks; the child runs the job and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads; the child needs none
        child = os.fork()
    if child:
        return child
    try:
        job()
    finally:
        os._exit(0)


def wait_for(child):
    os.waitpid(child, 0)


@needs_fork
def test_a_forked_child_does_not_wait_for_the_writes_of_its_parents_threads(target, monkeypatch):
    renaming, go_on, real = threading.Event(), threading.Event(), os.replace

    def replace(source, destination):
        renaming.set()
        assert go_on.wait(30)
        real(source, destination)

    monkeypatch.setattr(atomic.os, "replace", replace)
    old = threading.Thread(target=atomic_write, args=(target, content(b"parent")))
    old.start()
    assert renaming.wait(30)
    monkeypatch.setattr(atomic.os, "replace", real)
    try:
        wait_for(in_a_child(lambda: atomic_write(target, content(b"child"))))
        assert target.read_bytes() == b"child"
    finally:
        go_on.set()
        old.join()
    assert target.read_bytes() == b"parent"  # another process knows nothing of our turns


# ---------------------------------------------------------------- leftovers


def named(owner, name="model.h5"):
    return f".{name}.{owner}-01234567.tmp"


def killed_in_a_save(target):
    """Leaves the file of a process that was killed in the middle of a save. It is not waited for yet."""
    child = in_a_child(
        lambda: atomic_write(target, lambda path: (write_new(path), os.kill(os.getpid(), signal.SIGKILL)))
    )
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return child


@needs_fork
def test_what_a_killed_process_left_is_removed(target):
    child = killed_in_a_save(target)
    left = set(os.listdir(target.parent)) - {"model.h5"}
    assert len(left) == 1  # the control: there is something to remove
    assert set(remove_leftovers(target.parent)) == left  # though the dead one is still listed
    wait_for(child)
    assert os.listdir(target.parent) == ["model.h5"]
    assert target.read_bytes() == OLD
    wait_for(killed_in_a_save(target))
    assert len(remove_leftovers(target.parent)) == 1


@needs_fork
def test_what_a_living_process_writes_is_never_removed(target):
    """A child that waits in the middle of its save, and this process itself."""
    reading, writing = os.pipe()
    ready, is_ready = os.pipe()

    def write(path):
        write_new(path)
        os.write(is_ready, b"!")
        os.read(reading, 1)

    child = in_a_child(lambda: atomic_write(target, write))
    os.read(ready, 1)
    removed = []
    try:
        for locked in (False, True):
            atomic_write(
                target,
                lambda path, locked=locked: (
                    write_new(path),
                    removed.extend(remove_leftovers(target.parent, locked=locked)),
                ),
            )
        assert len(os.listdir(target.parent)) == 2
    finally:
        os.write(writing, b"!")
        wait_for(child)
        for descriptor in (reading, writing, ready, is_ready):
            os.close(descriptor)
    assert removed == []
    assert os.listdir(target.parent) == ["model.h5"]


@pytest.fixture
def dead():
    """A process of this host that has ended. Its number is beyond those that are given."""
    return this_process()._replace(pid=0x7FFFFFF0)


@pytest.fixture
def folder(tmp_path_factory):
    """Not the test's own: a guard looks for temporary files there."""
    return tmp_path_factory.mktemp("leftovers")


needs_signals = pytest.mark.skipif(os.name == "nt", reason="the end of a process is not told there")


@needs_signals
def test_nothing_else_is_ever_removed(folder, dead):
    mine = this_process()
    living = [named(mine), named(mine._replace(start="00000000")), named(mine._replace(host="0badcafe"))]
    elsewhere = [named(dead._replace(host="0badcafe")), named(dead._replace(space="0badcafe"))]
    others = [
        "foo.tmp",
        ".foo.tmp",
        ".model.h5.01234567.tmp",
        f"x{named(dead)}",
        f"{named(dead)}~",
        "model.h5",
    ]
    for name in living + elsewhere + others:
        (folder / name).write_bytes(b"somebody's")
    (folder / "target").write_bytes(b"somebody's")
    (folder / named(dead, "link")).symlink_to("target")
    (folder / named(dead, "folder")).mkdir()
    (folder / "below").mkdir()
    (folder / "below" / named(dead)).write_bytes(b"")
    before = sorted(os.listdir(folder))
    assert remove_leftovers(folder) == []
    assert sorted(os.listdir(folder)) == before
    (folder / named(dead, "control")).write_bytes(b"")
    assert remove_leftovers(folder) == [named(dead, "control")]


@needs_signals
def test_a_temporary_name_may_end_as_the_writer_needs_it_and_is_removed_all_the_same(folder, dead):
    written = []

    def write(name):
        written.append(os.path.basename(name))
        write_new(name)

    atomic_write(folder / ("m" * 230 + ".keras"), write, suffix=".keras")
    assert written[0].endswith(".tmp.keras")
    assert len(written[0]) <= 255
    assert is_temporary(written[0])
    left = f"{named(dead)}.weights.h5"
    (folder / left).write_bytes(b"")
    assert remove_leftovers(folder) == [left]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the time of a start is not told here")
def test_a_process_number_that_was_given_again_hides_no_leftover(tmp_path):
    for owner in (this_process(), this_process()._replace(pid=os.getppid())):
        (tmp_path / named(owner._replace(start="0badcafe"))).write_bytes(b"")
        assert len(remove_leftovers(tmp_path)) == 1


def test_who_has_the_folders_lock_removes_those_of_other_containers_of_this_host_too(folder, dead):
    here = named(dead._replace(space="0badcafe"))
    elsewhere = named(dead._replace(host="0badcafe"))
    for name in (here, elsewhere, named(this_process())):
        (folder / name).write_bytes(b"")
    assert remove_leftovers(folder) == []
    assert remove_leftovers(folder, locked=True) == [here]


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    assert remove_leftovers(tmp_path / "missing") == []


@needs_signals
def test_what_cannot_be_removed_stays(tmp_path, monkeypatch, dead):
    (tmp_path / named(dead)).write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "unlink", fail)
        assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path) == [named(dead)]
