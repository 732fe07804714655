"""Whatever happens, the newest finished backup is there and whole, and nobody else's file is gone."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from asynccb.errors import CheckpointWriteError, FolderBusy
from asynccb.storage import atomic, atomic_write
from asynccb.storage.backups import BackupFolder
from asynccb.storage.owner import this_process


@pytest.fixture
def folder(tmp_path):
    made = BackupFolder(tmp_path / "runs" / "backups")
    made.lock("run-1")
    yield made
    made.unlock()


def save(path, text="backup"):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    return path


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_a_folder_that_is_not_there_has_no_backups_and_is_made_by_its_lock(tmp_path):
    folder = BackupFolder(tmp_path / "a" / "b")
    assert folder.files() == []
    folder.lock("run-1")
    folder.unlock()
    assert (tmp_path / "a" / "b").is_dir()
    assert names([folder.next()]) == ["backup-000001.h5"]


def test_backups_are_numbered_and_the_newest_comes_first(folder):
    written = [save(folder.next()) for _ in range(3)]
    assert names(written) == ["backup-000001.h5", "backup-000002.h5", "backup-000003.h5"]
    assert folder.files() == written[::-1]
    assert os.path.isabs(written[0])


def test_the_order_is_that_of_the_numbers_however_long_they_are(folder):
    for number in ("9", "000010", "999999", "1000000", "0"):
        save(os.path.join(folder.path, f"backup-{number}.h5"))
    found = names(folder.files())
    assert found == [f"backup-{number}.h5" for number in ("1000000", "999999", "000010", "9", "0")]
    assert names([folder.next()]) == ["backup-1000001.h5"]


def test_no_name_is_given_twice(folder):
    first = folder.next()
    assert folder.next() != first  # though nothing was written
    last = save(folder.next())
    os.unlink(last)
    assert names([folder.next()]) == ["backup-000004.h5"]


def test_other_names_are_no_backups(folder):
    others = [
        "backup-.h5",
        "backup-1.h5.tmp",
        "xbackup-1.h5",
        "backup-1.h5\n",
        "backup-\u0661.h5",
        "model.h5",
        ".lock",
    ]
    for other in others:
        save(os.path.join(folder.path, other))
    assert folder.files() == []


def test_a_second_run_is_refused_before_it_removes_anything(folder, tmp_path):
    dead = this_process()._replace(pid=0x7FFFFFF0)
    left = save(os.path.join(folder.path, f".backup-000001.h5.{dead}-01234567.tmp"))
    other = BackupFolder(folder.path)
    with pytest.raises(FolderBusy, match="run-1"):
        other.lock("run-2")
    assert os.path.exists(left)
    folder.unlock()
    other.lock("run-2")  # the control
    other.unlock()
    assert not os.path.exists(left)


def test_the_oldest_of_ones_own_are_deleted_until_so_many_are_left(folder):
    foreign = [save(folder.next(), "somebody's") for _ in range(2)]
    own = [save(folder.next()) for _ in range(4)]
    foreign.append(save(folder.next(), "somebody's"))
    assert folder.prune(own, 2) == [own[3], own[2]]
    assert sorted(folder.files()) == sorted([*foreign, own[2], own[3]])
    assert folder.prune([own[3], own[2], own[3], own[0]], 2) == [own[3], own[2]]
    assert folder.prune(own, 1) == [own[3]]
    assert folder.prune([], 1) == []


def test_files_elsewhere_and_of_other_names_are_not_deleted_whoever_asks(folder, tmp_path):
    others = [
        save(str(tmp_path / "backup-000001.h5")), save(os.path.join(folder.path, "model.h5")),
        os.path.join(folder.path, ".lock"),
    ]  # fmt: skip
    own = save(folder.next())
    assert folder.prune([*others, own], 1) == [own]
    assert all(map(os.path.exists, others))


def test_at_least_one_is_kept(folder):
    own = save(folder.next())
    with pytest.raises(ValueError, match="one is the least"):
        folder.prune([own], 0)
    assert os.path.exists(own)


def test_one_that_cannot_be_deleted_is_tried_again_next_time(folder, monkeypatch):
    own = [save(folder.next()) for _ in range(4)]
    real = os.unlink

    def unlink(path):
        if path == own[0]:
            raise PermissionError(13, "in use")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        assert folder.prune(own, 2) == [own[3], own[2], own[0]]
    assert folder.prune([own[3], own[2], own[0]], 2) == [own[3], own[2]]


def test_one_that_somebody_else_deletes_meanwhile_is_gone(folder, monkeypatch):
    own = [save(folder.next()) for _ in range(2)]
    real = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: (real(path), real(path)))
    assert folder.prune(own, 1) == [own[1]]


# ---------------------------------------------------------------- whatever happens


class Killed(BaseException):
    """The process ends here; nothing is tidied up."""


def whole(number):
    """The content of a backup, which shows whether all of it is there."""
    text = f"backup {number} " * 20
    return f"{text}{hashlib.sha256(text.encode()).hexdigest()}".encode()


def is_whole(content):
    return hashlib.sha256(content[:-64]).hexdigest().encode() == content[-64:]


WAYS_TO_DIE = [
    "while writing",
    "before the rename",
    "before the older ones are removed",
    "between two removals",
]


class Life(RuleBasedStateMachine):
    """Runs that write backups, are killed, and are started again, in a folder where others write too."""

    prune_first = False
    deaths = Counter()  # how often each happened

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep):
        self.path, self.keep = tempfile.mkdtemp(), keep
        self.foreign, self.given, self.finished, self.stuck = {}, [], [], set()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda descriptor: None)
        dead = this_process()._replace(pid=0x7FFFFFF0)  # what is left behind shall be a dead one's
        self.patch.setattr(atomic, "this_process", lambda: dead)
        self.folder, self.own = None, []
        self.start(True)

    def teardown(self):
        if hasattr(self, "patch"):
            self.folder.unlock()
            self.patch.undo()
            shutil.rmtree(self.path)

    @rule(remembers=st.booleans())
    def start(self, remembers):
        """Another process, which knows from the backup that it resumes what was its own, or does not."""
        if self.folder is not None:
            self.folder.unlock()  # as the kernel does it
        self.folder = BackupFolder(self.path)
        self.folder.lock("run")
        self.given = list(self.finished)  # a number that came to nothing may be given again
        self.own = [path for path in self.finished if os.path.exists(path)] if remembers else []
        left = [name for name in os.listdir(self.path) if atomic.is_temporary(name)]
        assert left == [], "what a killed process left is removed at the next start"

    def write(self, path, killed):
        def content(temporary):
            data = whole(path)
            with open(temporary, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                if killed == "while writing":
                    raise Killed
                file.write(data[len(data) // 2 :])
            if killed == "before the rename":
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            if killed:
                patch.setattr(atomic, "_remove", lambda temporary: None)
            atomic_write(path, content)
        self.finished.append(path)
        self.own.append(path)
        if killed == "before the older ones are removed":
            raise Killed

    def remove_older(self, keep, killed):
        real, left = os.unlink, [2]

        def unlink(path):
            left[0] -= 1
            if killed == "between two removals" and not left[0]:
                raise Killed
            if path in self.stuck:
                raise PermissionError(13, "in use")
            real(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            self.own = self.folder.prune(self.own, keep)

    @rule(
        killed=st.sampled_from(["", "", *WAYS_TO_DIE]),
        forgets=st.booleans(),
    )
    def back_up(self, killed, forgets):
        path = self.folder.next()
        assert path not in self.given, "a name is given twice"
        assert not os.path.exists(path)
        self.given.append(path)
        try:
            if self.prune_first:
                self.remove_older(max(1, self.keep - 1), killed)
                if self.keep == 1 and self.own:
                    os.unlink(self.own.pop())
            self.write(path, killed)
            self.remove_older(self.keep, killed)
        except Killed:
            self.deaths[killed] += 1
            self.start(not forgets)
            return
        mine = [kept for kept in self.own if kept not in self.stuck]
        assert len(mine) <= self.keep
        assert path in self.own

    @rule()
    def save_on_a_full_disk(self):
        def full(temporary):
            save(temporary, "half")
            raise OSError(28, "No space left on device")

        with pytest.raises(CheckpointWriteError):
            atomic_write(self.folder.next(), full)
        assert not any(map(atomic.is_temporary, os.listdir(self.path)))

    @rule(number=st.integers(0, 30), digits=st.sampled_from([1, 6]))
    def somebody_elses_backup(self, number, digits):
        path = os.path.join(self.path, f"backup-{number:0{digits}d}.h5")
        if not os.path.exists(path) and path not in self.given:
            self.foreign[path] = whole("somebody's")
            with open(path, "wb") as file:
                file.write(self.foreign[path])

    @rule(
        name=st.sampled_from(
            ["foo.tmp", "model.h5", ".hidden", "backup-1.h5.tmp", ".backup-1.h5.0123abcd.tmp"]
        )
    )
    def somebody_elses_file(self, name):
        path = os.path.join(self.path, name)
        self.foreign[path] = b"somebody's"
        with open(path, "wb") as file:
            file.write(b"somebody's")

    @rule(data=st.data())
    def one_cannot_be_deleted_for_a_while(self, data):
        if self.own:
            self.stuck ^= {data.draw(st.sampled_from(sorted(self.own)))}

    @invariant()
    def the_newest_finished_backup_is_there(self):
        if getattr(self, "finished", None):
            assert os.path.exists(self.finished[-1]), "the newest backup is gone"

    @invariant()
    def every_backup_is_whole(self):
        if hasattr(self, "folder"):
            files = self.folder.files()
            assert len(files) == len(set(files))
            for path in files:
                with open(path, "rb") as file:
                    assert is_whole(file.read())

    @invariant()
    def what_is_somebody_elses_stays(self):
        for path, content in getattr(self, "foreign", {}).items():
            with open(path, "rb") as file:
                assert file.read() == content


class PrunesFirst(Life):
    """Removes older backups before the new one is there, as some do to save space."""

    prune_first = True


def test_whatever_happens_the_newest_backup_survives():
    Life.deaths.clear()
    run_state_machine_as_test(Life, settings=settings(max_examples=300, stateful_step_count=50))
    assert min(Life.deaths[way] for way in WAYS_TO_DIE) > 50


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(15))
def test_whatever_happens_the_newest_backup_survives_in_thousands_of_lives(part):
    """Others in each part and run; a failure is printed with the blob that repeats it."""
    chance = settings(max_examples=200, stateful_step_count=100, derandomize=False, print_blob=True)
    run_state_machine_as_test(Life, settings=chance)


def test_with_the_removal_before_the_save_it_does_not():
    """Negative control for the test above."""
    with pytest.raises(AssertionError, match="the newest backup is gone"):
        run_state_machine_as_test(PrunesFirst, settings=settings(max_examples=100, phases=[Phase.generate]))


def test_runs_that_start_at_the_same_time_share_no_folder(tmp_path):
    folders = [BackupFolder(tmp_path) for _ in range(8)]
    won, barrier = [], threading.Barrier(8)

    def start(folder):
        barrier.wait(30)
        try:
            folder.lock("run")
        except FolderBusy:
            return
        won.append(folder)

    threads = [threading.Thread(target=start, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].unlock()
