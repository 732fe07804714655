"""A power cut at any moment of a save leaves the old file or the new one, and after the save the new one."""

from __future__ import annotations

import itertools
import os

import pytest
from disk_faults.jobs import Verdicts
from disk_faults.replay import Save, states
from disk_faults.shim import Call, read_record, rule
from disk_faults.subjects import SUBJECTS

OLD, NEW = 7, 8
PRIORS = ["nothing", "a file"]


def write(folder, files):
    for entry in os.scandir(folder):
        if entry.name not in files:
            os.unlink(entry)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def recorded(server, folder, tmp_path, name, prior, *, without=""):
    """The record of a save, and the state before it. ``without``: a rule for what is left out."""
    old = None
    if prior == "a file":
        for old in (OLD - 1, OLD):
            SUBJECTS[name].save(folder, old)
    before = {entry.name: (folder / entry.name).read_bytes() for entry in os.scandir(folder)}
    record = tmp_path / "record"
    rules = without + rule("*", f"{folder}*", "log", always=True)
    answer = server.ask("save", subject=name, folder=folder, k=NEW, record=record, rules=rules)
    assert answer.said == ["saved"]
    calls = list(read_record(record))
    write(folder, {})
    return Save(calls, folder, before), old


def after_power_cuts(folder, name, save, old, count, seed):
    """What was found where it must not be, in ``count`` states of the disk."""
    verdicts, bad, seen = Verdicts(name), [], 0
    for number, state in enumerate(itertools.islice(states(save, seed), count)):
        write(folder, state.files)
        found = verdicts.of(folder)
        if found not in ((NEW,) if state.moment == save.moments else (old, NEW)):
            bad.append((number, state.moment, sorted(change[:2] for change in state.lost)[:5], found))
        seen = number + 1
    assert seen == count, "there are no more states"
    return bad


def check(server, folder, tmp_path, name, prior, count, seed):
    save, old = recorded(server, folder, tmp_path, name, prior)
    bad = after_power_cuts(folder, name, save, old, count, seed)
    assert bad == [], f"seed {seed}: (number of the state, calls made, first changes lost, what was found)"


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", ["small", "wide", "small, piece by piece", "backups"])
def test_a_power_cut_leaves_the_old_file_or_the_new_one(server, folder, tmp_path, name, prior):
    check(server, folder, tmp_path, name, prior, 250, seed=1)


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "name", ["small", "wide", "large", "wide, by the library", "wide, piece by piece", "backups"]
)
def test_a_power_cut_leaves_the_old_file_or_the_new_one_at_length(server, folder, tmp_path, name, prior):
    check(server, folder, tmp_path, name, prior, 2000, seed=2)


@pytest.mark.parametrize("what", ["the file", "the folder"])
@pytest.mark.parametrize("name", ["small", "small, piece by piece"])
def test_without_an_fsync_a_power_cut_loses_it(server, folder, tmp_path, name, what):
    """Negative control."""
    skip = rule("fsync", f"{folder}/*" if what == "the file" else str(folder), "skip", always=True)
    save, old = recorded(server, folder, tmp_path, name, "a file", without=skip)
    assert after_power_cuts(folder, name, save, old, 300, seed=1)


def test_written_in_place_a_power_cut_loses_both(server, folder, tmp_path):
    """Negative control."""
    save, old = recorded(server, folder, tmp_path, "in place", "a file")
    assert len(after_power_cuts(folder, "in place", save, old, 300, seed=1)) > 100


# ---------------------------------------------------------------- the replay itself

FLAGS = os.O_CREAT | os.O_WRONLY


def of(*calls):
    """A save of these calls in ``/d``, where ``old`` lay."""
    return Save([Call(*call) for call in calls], "/d", {"old": b"old"})


def possible(save, count=200):
    return [state.files for state in itertools.islice(states(save, 1), count)]


def test_what_was_not_synchronized_may_be_there_or_not_or_be_empty():
    found = possible(of(("open", "/d/new", "", 3, FLAGS), ("write", "/d/new", "", 3, 0, b"abc")), 4)
    assert all(files["old"] == b"old" for files in found)
    assert {files.get("new") for files in found} == {None, b"", b"abc"}


def test_the_content_of_a_synchronized_file_is_kept_and_its_name_is_not():
    save = of(("open", "/d/new", "", 3, FLAGS), ("write", "/d/new", "", 3, 0, b"abc"), ("fsync", "/d/new"))
    assert {files.get("new") for files in possible(save, 6)} == {None, b"", b"abc"}
    cut = save.cut(3)
    assert "new" not in save.files(cut.kept)
    assert save.files([*cut.kept, *cut.open])["new"] == b"abc"


def test_a_synchronized_folder_keeps_a_rename():
    calls = [("open", "/d/new", "", 3, FLAGS), ("rename", "/d/new", "/d/old"), ("open", "/d", "", 4, 0)]
    save = of(*calls, ("fsync", "/d"))
    assert save.cut(4).open == []
    assert save.files(save.cut(4).kept) == {"old": b""}
    before = {files["old"] for files in possible(of(*calls), 6)}
    assert before == {b"old", b""}


def test_writes_are_torn_at_sectors_and_lost_in_any_order():
    content = bytes(range(1, 256)) * 20
    save = of(("open", "/d/old", "", 3, os.O_RDWR), ("write", "/d/old", "", 3, 100, content[:5000]))
    found = {files["old"] for files in possible(save)}
    whole = b"old" + bytes(97) + content[:5000]
    assert whole in found
    assert whole[:4096] in found
    first_lost = b"old".ljust(512, b"\0")
    assert any(state[:512] == first_lost and state[4096:] == whole[4096:] for state in found)


def test_calls_that_failed_have_changed_nothing():
    assert of(("open", "/d/new", "", -1, FLAGS), ("write", "/d/old", "", -1, 0)).changes == []


def test_truncations_and_allocations_change_the_length():
    save = of(
        ("open", "/d/old", "", 3, os.O_RDWR | os.O_TRUNC),
        ("fallocate", "/d/old", "", 0, 5),
        ("ftruncate", "/d/old", "", 0, 2),
    )
    cut = save.cut(3)
    assert save.files(cut.open) == {"old": bytes(2)}
    assert save.files(cut.open[1:]) == {"old": b"ol"}
