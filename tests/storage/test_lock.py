"""Of all who want a folder exactly one has it, and a dead one has none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from asynccb.errors import FolderBusy
from asynccb.storage import lock
from asynccb.storage.lock import NAME, FolderLock
from asynccb.storage.owner import this_process

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def locks(tmp_path):
    """Makes locks of the test's folder, and gives them back in the end."""
    made = []

    def make(folder=tmp_path):
        made.append(FolderLock(folder))
        return made[-1]

    yield make
    for one in made:
        one.release()


@pytest.fixture(params=["kernel", "file"])
def kind(request, monkeypatch):
    """With the kernel's locks, and on a file system that has none."""
    if request.param == "file":
        monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    return request.param


def test_a_locked_folder_is_refused_with_all_that_is_known_of_its_owner(locks, tmp_path, kind):
    locks().acquire("run-1")
    with pytest.raises(FolderBusy) as caught:
        locks().acquire("run-2")
    error = caught.value
    assert (error.folder, error.owner, error.pid) == (str(tmp_path), "run-1", os.getpid())
    assert error.host
    assert error.since.endswith(" UTC")
    assert f"{tmp_path} is in use by run-1 (process {os.getpid()} on " in str(error)


def test_after_its_release_another_one_has_it(locks, kind):
    first, second = locks(), locks()
    first.acquire("run-1")
    first.release()
    first.release()  # nothing happens
    second.acquire("run-2")
    first.release()  # it is not his
    with pytest.raises(FolderBusy, match="run-2"):
        first.acquire("run-1")


def test_a_lock_can_be_taken_again(locks, kind):
    one = locks()
    for _ in range(3):
        one.acquire("run-1")
        one.release()


def test_one_that_holds_it_does_not_take_it_twice(locks, kind):
    one = locks()
    one.acquire("run-1")
    with pytest.raises(FolderBusy):
        one.acquire("run-1")
    one.release()
    locks().acquire("run-2")


def test_folders_have_locks_of_their_own(locks, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    locks(tmp_path / "a").acquire("run-1")
    locks(tmp_path / "b").acquire("run-2")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_folder_under_another_name_is_the_same_folder(locks, tmp_path, kind):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    locks(tmp_path / "real").acquire("run-1")
    with pytest.raises(FolderBusy, match="run-1"):
        locks(tmp_path / "link").acquire("run-2")


def test_a_relative_folder_stays_where_it_was(locks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = locks(".")
    monkeypatch.chdir("/")
    one.acquire("run-1")
    assert (tmp_path / NAME).exists()


def test_the_file_stays_and_says_nothing_after_the_release(locks, tmp_path):
    one = locks()
    one.acquire("run-1")
    assert json.loads((tmp_path / NAME).read_bytes())["owner"] == "run-1"
    one.release()
    assert (tmp_path / NAME).read_bytes() == b""


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 4000, b'{"owner":{"a":[]},"process":"x"}']
)
def test_what_stands_in_a_file_that_nobody_holds_does_not_matter(locks, tmp_path, kind, text):
    (tmp_path / NAME).write_bytes(text)
    locks().acquire("run-1")
    with pytest.raises(FolderBusy, match="run-1"):
        locks().acquire("run-2")


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are followed there")
def test_a_link_in_place_of_the_file_is_not_followed(locks, tmp_path):
    (tmp_path / "precious").write_text("a user's")
    (tmp_path / NAME).symlink_to("precious")
    with pytest.raises(OSError):  # noqa: PT011  # which one depends on the system
        locks().acquire("run-1")
    assert (tmp_path / "precious").read_text() == "a user's"


def test_what_an_owner_calls_itself_is_shown_without_control_characters(locks):
    locks().acquire("run\x1b[2J-1")
    with pytest.raises(FolderBusy) as caught:
        locks().acquire("run-2")
    assert "\x1b" not in str(caught.value)


def test_an_error_of_the_system_is_raised_and_nothing_stays_open(locks, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        locks(tmp_path / "missing").acquire("run-1")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(OSError, match="No space"):
            locks().acquire("run-1")
    locks().acquire("run-2")


@pytest.mark.skipif(sys.platform == "win32", reason="another call does it there")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_served_by_the_file(locks, monkeypatch, number):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks().acquire("run-1")
    with pytest.raises(FolderBusy, match="run-1"):
        locks().acquire("run-2")


@pytest.mark.skipif(sys.platform == "win32", reason="another module does it there")
def test_a_platform_without_the_call_is_served_by_the_file(locks, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    locks().acquire("run-1")
    with pytest.raises(FolderBusy, match="run-1"):
        locks().acquire("run-2")


# ---------------------------------------------------------------- two processes


class Rival:
    """A forked child that takes and gives back the folder's lock when it is told to."""

    def __init__(self, folder, name):
        (asked, self._ask), (self._hear, answer) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads; it needs none
            self.pid = os.fork()
        if not self.pid:
            try:
                self._work(FolderLock(folder), name, asked, answer)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)

    def _work(self, one, name, asked, answer):
        os.close(self._ask)
        while what := os.read(asked, 1):
            said = b"!"
            if what == b"a":
                try:
                    one.acquire(name)
                except FolderBusy:
                    said = b"?"
            elif what == b"r":
                one.release()
            else:
                if what == b"F":
                    lock._held.clear()
                if os.fork():
                    continue
                os.write(answer, str(os.getpid()).encode())  # by itself: all that a fork brings is done
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)  # should the test be killed
                signal.pause()
            os.write(answer, said)

    def begin(self, what):
        os.write(self._ask, what)

    def won(self):
        return os.read(self._hear, 1) == b"!"

    def acquire(self):
        self.begin(b"a")
        return self.won()

    def fork(self, what):
        """The number of a child of the child."""
        self.begin(what)
        return int(os.read(self._hear, 20))

    def kill(self):
        if not self.pid:
            return
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._ask)
        os.close(self._hear)
        self.pid = 0


@pytest.fixture
def rivals(tmp_path):
    made = []

    def make(name):
        made.append(Rival(tmp_path, name))
        return made[-1]

    yield make
    for rival in made:
        rival.kill()


def race(rivals, rounds):
    """How many won, round by round."""
    two = [rivals("a"), rivals("b")]
    winners = []
    for _ in range(rounds):
        for rival in two:
            rival.begin(b"a")
        winners.append([rival.won() for rival in two])
        for rival in two:
            rival.begin(b"r")
        assert [rival.won() for rival in two] == [True, True]
    return [sum(won) for won in winners]


@needs_fork
def test_of_two_processes_that_race_for_a_folder_exactly_one_wins_200_times(rivals):
    assert race(rivals, 200) == [1] * 200


@needs_fork
def test_without_the_kernels_lock_both_would_win(rivals, monkeypatch):
    """Negative control for the test above."""
    monkeypatch.setattr(lock, "_lock", lambda descriptor: True)
    assert 2 in race(rivals, 20)


def test_of_many_threads_exactly_one_wins(locks, kind):
    for _ in range(25):
        barrier, won = threading.Barrier(8), []

        def compete(one, barrier=barrier, won=won):
            barrier.wait(30)
            try:
                one.acquire("thread")
            except FolderBusy:
                return
            won.append(one)

        threads = [threading.Thread(target=compete, args=(locks(),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()


@needs_fork
def test_the_folder_of_a_killed_process_is_free_at_once(locks, tmp_path, kind):
    rival = Rival(tmp_path, "run-1")
    try:
        assert rival.acquire()
        with pytest.raises(FolderBusy, match=rf"run-1 \(process {rival.pid} on "):
            locks().acquire("run-2")
    finally:
        rival.kill()
    assert json.loads((tmp_path / NAME).read_bytes())["owner"] == "run-1"  # it could not tidy up
    locks().acquire("run-2")


def record_of(process, **more):
    return json.dumps({"owner": "run-1", "pid": process.pid, "process": str(process), **more}).encode()


def test_a_process_that_was_given_a_dead_ones_number_does_not_own_its_folder(locks, tmp_path, kind):
    if this_process().start == "00000000":
        pytest.skip("the time of a start is not told here")
    (tmp_path / NAME).write_bytes(record_of(this_process()._replace(pid=os.getppid(), start="0badcafe")))
    locks().acquire("run-2")


def test_without_locks_what_another_host_wrote_is_believed_and_the_way_out_is_said(
    locks, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    (tmp_path / NAME).write_bytes(record_of(this_process()._replace(host="0badcafe"), host="far"))
    with pytest.raises(
        FolderBusy, match=r"run-1 \(process .* on far.* If no such process is running, delete "
    ):
        locks().acquire("run-2")
    monkeypatch.undo()
    locks().acquire("run-2")  # the control: the kernel knows better


@pytest.mark.skipif(os.name == "nt", reason="the end of a process is not told there")
def test_who_comes_while_the_winner_has_not_written_yet_is_not_told_of_the_one_before(
    locks, tmp_path, monkeypatch
):
    (tmp_path / NAME).write_bytes(record_of(this_process()._replace(pid=0x7FFFFFF0)))
    monkeypatch.setattr(lock, "_lock", lambda descriptor: False)
    with pytest.raises(FolderBusy, match="in use by another run"):
        locks().acquire("run-2")


@needs_fork
def test_a_forked_child_has_not_the_lock_of_its_parent(locks, rivals):
    one = locks()
    one.acquire("parent")
    rival = rivals("child")  # forked while the lock is held
    assert not rival.acquire()
    one.release()
    assert rival.acquire()


def left_by_a_killed_owner(rivals, what):
    """A child of one that had the lock and was killed; it lives and does nothing."""
    rival = rivals("killed")
    assert rival.acquire()
    child = rival.fork(what)
    rival.kill()
    return child


@needs_fork
def test_a_forked_child_does_not_keep_the_folder_of_its_killed_parent(locks, rivals):
    """Its copy of the open file would hold the lock as long as it lives."""
    child = left_by_a_killed_owner(rivals, b"f")
    try:
        locks().acquire("next")
    finally:
        os.kill(child, signal.SIGKILL)


@needs_fork
def test_without_closing_it_there_the_child_would_keep_it(locks, rivals):
    """Negative control for the test above, with a lock that is not known when the child is forked."""
    child = left_by_a_killed_owner(rivals, b"F")
    try:
        with pytest.raises(FolderBusy):
            locks().acquire("next")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_program_that_is_run_does_not_get_the_open_file(locks, tmp_path):
    one = locks()
    one.acquire("parent")
    assert one._descriptor is not None
    assert not os.get_inheritable(one._descriptor)
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"up"
        one.release()
        locks().acquire("next")
        child.communicate(b"")
