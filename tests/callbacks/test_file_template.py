"""File names with fields: what is refused when, and that no value leads out of the template's own folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb import ArgumentError, CheckpointWriteError
from asynccb.callbacks.file_template import FileTemplate

VALUES = {"epoch": 3, "loss": 0.25, "val_loss": float("nan"), "acc": np.float32(0.5), "name": "a"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("weights.{epoch:02d}-{loss:.2f}.hdf5", "weights.03-0.25.hdf5"),
        ("w.h5", "w.h5"),
        ("/abs/w{epoch}.h5", "/abs/w3.h5"),
        ("../up/w{epoch}.h5", "../up/w3.h5"),
        ("./w{epoch}.h5", "./w3.h5"),
        ("/{epoch}.h5", "/3.h5"),
        ("a/{epoch}/b/{loss}.h5", "a/3/b/0.25.h5"),
        ("{epoch}{loss}", "30.25"),
        ("w{{epoch}}.h5", "w{epoch}.h5"),
        ("w-{val_loss:.2f}.h5", "w-nan.h5"),
        ("w-{accuracy:.1f}.h5", "w-0.5.h5"),
        ("w-{loss!r:>8}.h5", "w-    0.25.h5"),
        ("w-{loss:/>8}.h5", "w-____0.25.h5"),
        ("w-{loss:+.1e}.h5", "w-+2.5e-01.h5"),
        ("w-{loss:.1%}.h5", "w-25.0%.h5"),
        ("w-{epoch:.2f}.h5", "w-3.00.h5"),
        ("w-{name:>3}.h5", "w-  a.h5"),
        ("損失-{epoch}.h5", "損失-3.h5"),
    ],
)
def test_fields_become_their_values(template: str, expected: str) -> None:
    assert FileTemplate(template).fill(VALUES) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("w{epoch.h5", "malformed: expected '}' before end of string"),
        ("w}.h5", "malformed: Single '}' encountered in format string"),
        ("w{epoch!}.h5", "malformed: "),
        ("w{}.h5", "the field {} needs a name"),
        ("w{0}.h5", "the field {0} needs a name"),
        ("w{loss.__class__}.h5", "the field {loss.__class__} reaches into a value"),
        ("w{loss.__init__.__globals__[os]}.h5", "reaches into a value"),
        ("w{loss[0]}.h5", "the field {loss[0]} reaches into a value"),
        ("w{loss!x}.h5", "the field {loss} has the unknown conversion !x"),
        ("w{loss:{epoch}}.h5", "the field {loss} must have a plain format of at most 255 characters"),
        ("w{loss!r:>999999999}.h5", "must have a plain format"),
        ("w{loss:.999999999f}.h5", "must have a plain format"),
        ("w{epoch:s}.h5", "the field {epoch} has the format 's', which no number takes"),
        ("w{loss:q}.h5", "the field {loss} has the format 'q', which no number takes"),
        ("", "a path that ends in a file's name"),
        ("folder/", "a path that ends in a file's name"),
        ("folder/{epoch}/", "a path that ends in a file's name"),
        (".", "a path that ends in a file's name"),
        ("folder/..", "a path that ends in a file's name"),
        ("w\0.h5", "without NUL characters"),
        ("a/{epoch}/../../x.h5", "behind the first field, `.` and `..` are not allowed as folders"),
        ("{epoch}/./x.h5", "behind the first field, `.` and `..` are not allowed as folders"),
        (b"w.h5", "a path, as a string or a PathLike of strings"),
        (7, "a path, as a string or a PathLike of strings"),
        (None, "a path, as a string or a PathLike of strings"),
    ],
)
def test_a_template_that_can_never_work_is_refused_when_it_is_made(template: Any, why: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        FileTemplate(template)
    assert caught.value.argument == "filepath"
    assert why in str(caught.value)


def test_attribute_access_is_what_the_naive_way_allows() -> None:
    """Negative control: ``str.format`` shows whatever can be reached from a value."""
    reaching, climbing = "w{loss.__class__}.h5", "ckpt/{name}.h5"
    assert reaching.format(loss=1.0) == "w<class 'float'>.h5"
    assert climbing.format(name="../../x") == "ckpt/../../x.h5"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("../../x", "ckpt/.._.._x/w.h5"),
        ("..", "ckpt/__/w.h5"),
        (".", "ckpt/_/w.h5"),
        ("", "ckpt/_/w.h5"),
        ("/etc", "ckpt/_etc/w.h5"),
        ("a\\b", "ckpt/a_b/w.h5"),
        ("C:x", "ckpt/C_x/w.h5"),
        ("a\0b", "ckpt/a_x00b/w.h5"),
        ("a\nb", "ckpt/a_x0ab/w.h5"),
        ("\x1b[2J", "ckpt/_x1b[2J/w.h5"),
        ("x" * 300, f"ckpt/{'x' * 64}/w.h5"),
    ],
)
def test_a_value_never_leads_out_of_the_folder(value: str, expected: str) -> None:
    assert FileTemplate("ckpt/{name}/w.h5").fill({"name": value}) == expected


@given(first=st.text(), second=st.text(), number=st.floats())
def test_whatever_the_values_the_file_lies_below_the_literal_folder(
    first: str, second: str, number: float
) -> None:
    template = FileTemplate("/base/ckpt/{first}{second}/{number}/{second}")
    path = template.fill({"first": first, "second": second, "number": number})
    assert template.folder == "/base/ckpt"
    assert os.path.normpath(path) == path
    assert path.startswith("/base/ckpt/")
    assert path.count("/") == 5


def test_a_missing_key_is_named_with_those_that_are_there() -> None:
    with pytest.raises(ArgumentError, match=r"\{val_los\} is not there. There are: epoch, loss"):
        FileTemplate("w{val_los}.h5").fill({"epoch": 1, "loss": 2.0})


@pytest.mark.parametrize(
    ("spec", "value"), [("d", 0.5), (".2f", None), (".2f", np.zeros(2)), (".2f", "text"), (".2f", [1.0])]
)
def test_a_value_that_does_not_take_its_format_is_an_error_that_names_the_field(
    spec: str, value: object
) -> None:
    with pytest.raises(ArgumentError, match=r"the value of \{loss\} does not take its format"):
        FileTemplate(f"w{{loss:{spec}}}.h5").fill({"loss": value})


def test_arrays_of_one_number_are_numbers() -> None:
    assert FileTemplate("{a:.1f}{b:.1f}").fill({"a": np.array(0.5), "b": np.array([1.5])}) == "0.51.5"


def test_missing_names_each_field_once_and_knows_both_spellings_of_accuracy() -> None:
    template = FileTemplate("{epoch}-{val_acc}-{x}-{x}.h5")
    assert template.names == ("epoch", "val_acc", "x")
    assert template.missing({"epoch", "val_accuracy"}) == ["x"]


def test_preparing_creates_the_literal_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    FileTemplate(tmp_path / "a/b/w{epoch}/x.h5").prepare()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/b"]


def test_a_template_without_a_folder_is_one_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = FileTemplate("w{epoch}.h5")
    template.prepare()
    template.make_room(template.fill({"epoch": 1}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="the end of a process is not told there")
def test_what_a_dead_process_left_half_written_in_the_folder_is_removed(tmp_path: Path) -> None:
    from asynccb.storage.owner import this_process

    dead = this_process()._replace(pid=0x7FFFFFF0)
    (tmp_path / f".w3.h5.{dead}-01234567.tmp").write_bytes(b"half")
    (tmp_path / "w2.h5.tmp").write_bytes(b"a user's")
    FileTemplate(tmp_path / "w{epoch}.h5").prepare()
    assert os.listdir(tmp_path) == ["w2.h5.tmp"]


def test_an_existing_folder_as_the_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="it is an existing folder"):
        FileTemplate(tmp_path).prepare()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="its folder cannot be written: "):
        FileTemplate(tmp_path / "file" / "w.h5").prepare()


@pytest.mark.skipif(os.name == "nt", reason="modes of folders are POSIX")
def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root ignores modes; the kernel's own folders refuse it too
        folder = Path("/proc/self")
    with pytest.raises(ArgumentError, match="its folder cannot be written: "):
        FileTemplate(folder / "w.h5").prepare()


@pytest.mark.parametrize("name", ["x" * 240, "損" * 80, "x" * 240 + "/w.h5"])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="a file or folder name in it is longer than 239 bytes"):
        FileTemplate(tmp_path / name).prepare()


def test_the_longest_name_that_is_allowed_can_be_written_atomically(tmp_path: Path) -> None:
    from asynccb.storage.atomic import atomic_write

    template = FileTemplate(tmp_path / ("x" * 239))
    template.prepare()
    atomic_write(template.text, lambda name: Path(name).write_text("whole"))
    assert Path(template.text).read_text() == "whole"


def test_a_link_below_the_folder_that_leads_out_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "ckpt" / "out").symlink_to(tmp_path / "outside")
    template = FileTemplate(tmp_path / "ckpt" / "{name}" / "w.h5")
    with pytest.raises(CheckpointWriteError, match="a link leads out of"):
        template.make_room(template.fill({"name": "out"}))
    template.make_room(template.fill({"name": "in"}))
    assert (tmp_path / "ckpt" / "in").is_dir()


def test_a_folder_that_is_a_link_itself_is_the_users_own_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "ckpt").symlink_to(tmp_path / "disk")
    template = FileTemplate(tmp_path / "ckpt" / "{epoch}" / "w.h5")
    template.prepare()
    template.make_room(template.fill({"epoch": 1}))
    assert (tmp_path / "disk" / "1").is_dir()


@pytest.mark.parametrize(
    ("template", "path", "gives"),
    [
        ("{epoch}.h5", "7.h5", True),
        ("{epoch}.h5", "7.txt", False),
        ("{epoch}.h5", "a/7.h5", False),
        ("a/{epoch}/w-{loss:.2f}.h5", "a/7/w-0.50.h5", True),
        ("a/{epoch}/w-{loss:.2f}.h5", "b/7/w-0.50.h5", False),
        ("{epoch}/w.h5", "../w.h5", False),
        ("w.h5", "w.h5", True),
        ("w.h5", "wah5", False),
    ],
)
def test_which_paths_it_may_have_given(tmp_path: Path, template: str, path: str, gives: bool) -> None:
    assert FileTemplate(tmp_path / "logs" / template).gives(f"{tmp_path}/logs/{path}") is gives


@pytest.mark.parametrize("template", ["{epoch}-{loss:.1f}.h5", "./{epoch}.h5", "a/../b/{epoch}.h5"])
def test_a_path_that_was_given_is_known_again_or_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = FileTemplate(template).fill({"epoch": 1, "loss": 0.5})
    assert FileTemplate(template).gives(os.path.abspath(filled))
    assert not FileTemplate(template).gives(os.path.abspath(filled) + "x")
