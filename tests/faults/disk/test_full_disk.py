"""A full disk: a typed error, the old file, nothing left, and the next save succeeds when there is room.

What becomes of a file that is written in place stands in ``test_errors.py``.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
from disk_faults.client import environment
from disk_faults.full_disk import MOST_FREE, NEW, NEXT, OLD

MOUNTED = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && exec "$@"'


def run_on_a_small_disk(folder, size, *command, env):
    """What Python says there. The disk is seen by that process alone, and goes with it."""
    before = ["unshare", "-m", "sh", "-c", MOUNTED, folder, size]
    try:
        allowed = subprocess.run([*before, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a file system needs rights that are not given here")
    done = subprocess.run(
        [*before, sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def steps_of(tmp_path, kind, steps):
    command = ["-m", "disk_faults.full_disk", kind, tmp_path, str(steps)]
    lines = run_on_a_small_disk(tmp_path, "3m", *command, env=environment()).splitlines()
    found = [json.loads(line) for line in lines]
    assert [step["free"] for step in found] == [MOST_FREE * step // steps for step in range(steps)]
    return found


def check_model_file(tmp_path, kind, steps):
    found = steps_of(tmp_path, kind, steps)
    for step in found:
        failed = step["error"] is not None
        assert step["found"] == (OLD if failed else NEW), step
        assert step["left"] == ["ballast", "model.h5"], step
        assert step["next"] == [None, NEXT], step
    kinds = {(step["error"], step["errno"]) for step in found}
    assert kinds == {(None, None), ("CheckpointWriteError", errno.ENOSPC)}
    assert sum(step["error"] is not None for step in found) > steps // 2


def check_rows(tmp_path, kind, steps):
    found = steps_of(tmp_path, kind, steps)
    assert [step for step in found if not step["whole"]] == []
    assert {step["errno"] for step in found} == {errno.ENOSPC}
    assert len({step["written"] for step in found}) > steps // 3


def test_on_a_full_disk_the_old_file_stays_and_the_next_save_succeeds_when_there_is_room(tmp_path):
    check_model_file(tmp_path, "model file", 64)


@pytest.mark.parametrize("kind", ["CSV", "event file"])
def test_a_full_disk_is_an_error_and_what_was_written_before_is_whole(tmp_path, kind):
    check_rows(tmp_path, kind, 64)


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("kind", ["model file", "model file, by the library"])
def test_at_every_page_of_a_full_disk_the_old_file_stays(tmp_path, kind):
    check_model_file(tmp_path, kind, 256)


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("kind", ["CSV", "event file"])
def test_at_every_page_of_a_full_disk_what_was_written_before_is_whole(tmp_path, kind):
    check_rows(tmp_path, kind, 256)


def test_a_training_whose_records_find_no_room_finishes_and_says_so_once(tmp_path):
    found = run_on_a_small_disk(
        tmp_path, "64k", "-m", "disk_faults.full_disk", "training", tmp_path, "1", env=environment()
    )
    result = json.loads(found)
    assert result["epochs"] == 60
    assert result["failures"] == [["TensorBoard", errno.ENOSPC, 1]]
    assert len(result["said"]) == 1
    assert "No space left on device" in result["said"][0]
    assert result["dropped"] > 0
