"""Killed at any instant of a save, the old file or the new one is there, whole."""

from __future__ import annotations

import itertools
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from disk_faults.client import Server
from disk_faults.jobs import Verdicts, verdict
from disk_faults.shim import rule
from disk_faults.subjects import SUBJECTS

from asynccb.storage.atomic import is_temporary, remove_leftovers

OLD, NEW = 7, 8
STALE = ".model.h5.01234567-01234567-1-01234567-01234567.tmp"
PRIORS = ["nothing", "a file", "a file and a stale temporary one"]
FAST = ["small", "wide", "large", "small, by the library", "small, piece by piece", "backups"]
LONG = ["many", "wide, piece by piece", "many, by the library"]


def clear(folder):
    for entry in os.scandir(folder):
        os.unlink(entry)


def prepare(folder, name, prior):
    """Makes the state of the folder before a save; returns what a reader finds in it."""
    clear(folder)
    files = {}
    if prior != "nothing":
        for k in (OLD - 1, OLD):
            SUBJECTS[name].save(folder, k)
        files = {entry.name: (folder / entry.name).read_bytes() for entry in os.scandir(folder)}
    if "stale" in prior:
        files[STALE] = min(files.values())[:10_000]

    def restore():
        clear(folder)
        for file, content in files.items():
            (folder / file).write_bytes(content)

    return restore, OLD if files else None


def killed_at_every_call(server, folder, name, prior):
    """(points at which a save was killed, what was found where it must not be)"""
    restore, old = prepare(folder, name, prior)
    points, bad, verdicts = 0, [], Verdicts(name)
    for action, calls in (("kill", "*"), ("tear", "write")):
        for count in itertools.count(1):
            restore()
            answer = server.ask(
                "save",
                subject=name,
                folder=folder,
                k=NEW,
                record="",
                rules=rule(calls, f"{folder}*", action, count),
            )
            found = verdicts.of(folder)
            if answer.signal == 0:
                assert answer.said == ["saved"]
                assert found == NEW
                break
            assert answer.signal == signal.SIGKILL
            points += 1
            if found not in (old, NEW):
                bad.append((action, count, found))
            assert len(remove_leftovers(folder)) <= 1
            assert [left for left in os.listdir(folder) if is_temporary(left) and left != STALE] == []
    return points, bad


@pytest.mark.timeout(140)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_killed_at_any_system_call_of_a_save_the_old_file_or_the_new_one_is_there(
    server, folder, name, prior
):
    points, bad = killed_at_every_call(server, folder, name, prior)
    assert points >= 10, "the calls of a save were not seen"
    assert bad == [], "(action, which call, what was found)"


def test_a_file_written_in_place_is_lost_at_most_of_these_calls(server, folder):
    """Negative control."""
    points, bad = killed_at_every_call(server, folder, "in place", "a file")
    assert len(bad) > points // 2


def test_where_the_old_backup_is_deleted_first_there_is_none_at_some_of_these_calls(server, folder):
    """Negative control."""
    _, bad = killed_at_every_call(server, folder, "backups, deleted first", "a file")
    assert {found for _, _, found in bad} == {None}


def killed_at_random(server, folder, name, trials, seed):
    """(kills in the middle of a save, what was found where it must not be)

    The time to each kill runs from the first save that has returned; the child saves on and on.
    """
    chance, hits, bad, reached = random.Random(seed), 0, [], 0
    for trial in range(trials):
        wait, first = chance.uniform(2, 30), reached + 1
        answer = server.ask(
            "save_on", subject=name, folder=folder, k=first, kill_after=wait, from_first_word=True
        )
        assert answer.signal == signal.SIGKILL
        assert answer.said
        returned = reached + len(answer.said)
        reached = verdict(name, folder)
        if reached not in (returned, returned + 1):
            bad.append((trial, wait, returned, reached))
            clear(folder)
            reached = 0
        removed = remove_leftovers(folder)  # as the next start of a training does
        assert len(removed) <= 1
        assert [left for left in os.listdir(folder) if is_temporary(left)] == []
        hits += reached == returned + 1 or bool(removed)
    return hits, bad


def check_random_kills(server, folder, name, trials, seed):
    hits, bad = killed_at_random(server, folder, name, trials, seed)
    assert bad == [], f"seed {seed}: (trial, ms, last state saved, what was found)"
    assert hits > trials // 10, "void: the kills did not hit saves"


# In parts, because a test that takes minutes is taken for one that hangs.
THOUSAND = [
    [("small", 200, 0), ("small", 200, 1)],
    [("small", 200, 2), ("small", 200, 3)],
    [("backups", 100, 0), ("backups", 100, 1)],
]
TEN_THOUSAND = [
    *[("small", 500, seed) for seed in range(4, 16)],
    *[("wide", 250, seed) for seed in range(4)],
    *[("large", 250, seed) for seed in range(2)],
    *[("wide, piece by piece", 250, seed) for seed in range(2)],
    *[("backups", 250, seed) for seed in range(1, 9)],
]


@pytest.mark.parametrize("parts", THOUSAND)
def test_killed_a_thousand_times_while_saving_what_was_saved_last_is_there(server, shim, folder, parts):
    """Side by side, one on each of two processors."""
    second = Server(shim)
    try:
        with ThreadPoolExecutor(2) as pool:
            running = []
            for own, (name, trials, seed) in zip((server, second), parts, strict=True):
                mine = folder / str(seed)
                mine.mkdir()
                running.append(pool.submit(check_random_kills, own, mine, name, trials, seed))
        for future in running:
            future.result()
    finally:
        second.close()


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize(("name", "trials", "seed"), TEN_THOUSAND)
def test_killed_ten_thousand_times_while_saving_what_was_saved_last_is_there(
    server, folder, name, trials, seed
):
    check_random_kills(server, folder, name, trials, seed)


def test_a_file_written_in_place_does_not_survive_random_kills(server, folder):
    """Negative control."""
    _, bad = killed_at_random(server, folder, "in place", 30, seed=1)
    assert bad
