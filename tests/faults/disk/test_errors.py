"""A disk that refuses at any call of a save: a typed error and the old file, or success and the new one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json

import pytest
from disk_faults.jobs import verdict
from disk_faults.shim import rule
from disk_faults.subjects import SUBJECTS

OLD, NEW, NEXT = 7, 8, 9
FAST = ["small", "large", "small, piece by piece"]
LONG = ["wide", "many", "small, by the library", "wide, piece by piece"]
BOTH = [*FAST, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]

CONTINUED = {"open", "write", "fsync", "fallocate"}
"""The calls that a signal may interrupt; whoever made one makes it again."""


def endured(server, folder, name, rules):
    """(the save under rules, the next one without, files that the process has left open)"""
    answer = server.ask("endure", subject=name, folder=folder, k=NEW, rules=rules)
    assert (answer.signal, answer.hangs) == (0, False)
    return [json.loads(line) for line in answer.said]


def at_every_call(server, folder, name, action, calls="*", *, always=False):
    """How the saves ended, with the fault at the first call, at the second, and so on.

    Fails for a save that is neither whole nor refused, leaves something, or keeps the next one from working.
    """
    SUBJECTS[name].save(folder, OLD)
    content, ways = (folder / "model.h5").read_bytes(), []
    for count in itertools.count(1):
        (folder / "model.h5").write_bytes(content)
        rules = rule(calls, f"{folder}/*", action, count, always=always)
        first, second, left_open = endured(server, folder, name, rules)
        said = f"{action} at call {count} of {name}: {first}, then {second}, open: {left_open}"
        assert first["error"] in (None, "CheckpointWriteError"), said
        assert first["found"] == (OLD if first["error"] else NEW), said
        assert first["left"] == ["model.h5"], said
        assert (second["error"], second["found"], second["left"]) == (None, NEXT, ["model.h5"]), said
        assert left_open == [], said
        if not first["at"]:
            assert first["found"] == NEW
            return ways
        ways.append(first)
    raise AssertionError


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", BOTH)
def test_refused_once_at_any_call_the_save_is_an_error_and_the_old_file_stays(server, folder, name, code):
    ways = at_every_call(server, folder, name, f"errno {code}")
    assert {"open", "write", "fsync", "close", "rename"} <= {way["at"] for way in ways}
    assert {way["errno"] for way in ways if way["error"]} == {code}
    # A look at the new file that fails is no failed save.
    assert {way["at"] for way in ways if not way["error"]} <= {"open", "close"}
    assert sum(way["error"] is None for way in ways) <= 2


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["small", "large", "small, by the library", "wide, piece by piece"])
def test_refused_from_any_write_on_the_save_is_an_error_and_the_old_file_stays(server, folder, name, code):
    for calls in ("write", "fsync", "rename", "close", "write,fsync,rename,fallocate,ftruncate"):
        ways = at_every_call(server, folder, name, f"errno {code}", calls, always=True)
        assert {way["errno"] for way in ways if way["error"]} == {code}
        assert calls == "close" or all(way["error"] for way in ways)


@pytest.mark.parametrize("name", BOTH)
def test_an_interrupted_call_is_made_again(server, folder, name):
    ways = at_every_call(server, folder, name, f"errno {errno.EINTR}")
    # No local disk interrupts an open; the library leaves it at that.
    continued = CONTINUED - ({"open"} if "library" in name else set())
    assert [way["text"] for way in ways if way["error"] and way["at"] in continued] == []
    assert {way["errno"] for way in ways if way["error"]} <= {errno.EINTR}


@pytest.mark.parametrize("name", BOTH)
def test_a_short_write_is_continued(server, folder, name):
    ways = at_every_call(server, folder, name, "short", "write")
    assert ways
    assert [way["text"] for way in ways if way["error"]] == []


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("name", ["small", "small, piece by piece"])
def test_short_writes_without_end_are_continued(server, folder, name):
    ways = at_every_call(server, folder, name, "short", "write", always=True)
    assert [way["text"] for way in ways if way["error"]] == []


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("name", ["small", "large", "small, piece by piece"])
def test_a_slow_call_changes_nothing(server, folder, name):
    ways = at_every_call(server, folder, name, "delay 500")
    assert [way["text"] for way in ways if way["error"]] == []


@pytest.mark.parametrize("calls", ["open", "fsync"])
def test_a_folder_that_cannot_be_synchronized_is_one_warning_and_the_new_file_is_there(server, folder, calls):
    rules = rule(calls, str(folder), f"errno {errno.EIO}")
    first, second, left_open = endured(server, folder, "small", rules)
    assert (first["error"], first["found"], first["at"]) == (None, NEW, calls)
    (warning,) = first["warnings"]
    assert "is in place, but might be gone after a power cut" in warning
    assert (second["error"], second["found"], second["warnings"]) == (None, NEXT, [])
    assert left_open == []


def test_in_place_a_disk_that_refuses_takes_the_old_file_with_it(server, folder):
    """Negative control."""
    lost = 0
    for count in range(1, 6):
        SUBJECTS["in place"].save(folder, OLD)
        rules = rule("write", f"{folder}/*", f"errno {errno.ENOSPC}", count)
        with contextlib.suppress(RuntimeError):  # the job's own end is not what is looked at
            server.ask("save", subject="in place", folder=folder, k=NEW, rules=rules, record="")
        lost += verdict("in place", folder) not in (OLD, NEW)
    assert lost > 2
