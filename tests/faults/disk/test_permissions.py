"""What the system does not allow is said before the first batch, in words."""

from __future__ import annotations

import errno
import json
import os

import pytest
from disk_faults.jobs import verdict
from disk_faults.subjects import SUBJECTS

OLD, NEW = 7, 8


@pytest.fixture
def unlocked(folder):
    """The folder, in which everything may be removed at the end."""
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o700)


def as_others(server, job, folder, **rest):
    """What the job says as a user who is not root."""
    answer = server.ask(job, folder=folder, **rest)
    if not answer.said:
        pytest.skip("the rights of root cannot be given up here")
    return json.loads(answer.said[0])


def made(folder, what):
    """A path for checkpoints, and what is in its way."""
    (folder / "file").write_text("")
    (folder / "read only").mkdir(mode=0o500)
    (folder / "not to be entered").mkdir(mode=0o600)
    (folder / "folder.h5").mkdir()
    return str(folder / what)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("read only/w.h5", "its folder cannot be written: Permission denied"),
        ("read only/w.{epoch}.h5", "its folder cannot be written: Permission denied"),
        ("read only/missing/deep/w.h5", "its folder cannot be written: Permission denied"),
        ("not to be entered/w.h5", "its folder cannot be written: Permission denied"),
        ("not to be entered/deep/w.h5", "its folder cannot be written: Permission denied"),
        ("file/w.h5", "its folder cannot be written: "),
        ("folder.h5", "it is an existing folder"),
        ("n" * 250 + ".h5", "a file or folder name in it is longer than"),
        ("n" * 300 + "/w.h5", "a file or folder name in it is longer than"),
        (f"{'d' * 100}/" * 60 + "w.h5", "its folder cannot be written: File name too long"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_batch(server, unlocked, what, why):
    result = as_others(server, "train_without_rights", unlocked, path=made(unlocked, what))
    assert result["error"] is not None
    assert "ModelCheckpoint.on_train_begin raised: ArgumentError: filepath=" in result["error"]
    assert why in result["error"]
    assert result["batches"] == 0


@pytest.mark.parametrize("what", ["missing/deep/w.h5", "folder/w.{epoch}.h5"])
def test_a_folder_that_can_be_made_is_made(server, unlocked, what):
    result = as_others(server, "train_without_rights", unlocked, path=made(unlocked, what))
    assert result == {"error": None, "batches": 4, "warnings": []}
    assert sum(name.endswith(".h5") for _, _, names in os.walk(unlocked) for name in names) in (1, 2)


def test_a_file_that_may_not_be_written_is_replaced_all_the_same(server, unlocked):
    SUBJECTS["small"].save(unlocked, OLD)
    (unlocked / "model.h5").chmod(0o400)
    result = as_others(server, "save_without_rights", unlocked, subject="small", path=unlocked, k=NEW)
    assert result["error"] is None
    assert verdict("small", unlocked) == NEW


def test_in_a_folder_that_may_only_be_read_the_old_file_stays(server, unlocked):
    inner = unlocked / "inner"
    inner.mkdir()
    SUBJECTS["small"].save(inner, OLD)
    inner.chmod(0o500)
    result = as_others(server, "save_without_rights", unlocked, subject="small", path=inner, k=NEW)
    assert (result["error"], result["errno"]) == ("CheckpointWriteError", errno.EACCES)
    assert verdict("small", inner) == OLD
    assert os.listdir(inner) == ["model.h5"]


def test_a_folder_that_cannot_be_opened_is_one_warning_and_the_new_file_is_there(server, unlocked):
    """Then the rename cannot be made durable, though it was made."""
    inner = unlocked / "inner"
    inner.mkdir(mode=0o300)
    result = as_others(server, "save_without_rights", unlocked, subject="small", path=inner, k=NEW)
    assert result["error"] is None
    (warning,) = result["warnings"]
    assert "is in place, but might be gone after a power cut: [Errno 13]" in warning
    assert verdict("small", inner) == NEW
