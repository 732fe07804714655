"""File names with fields, ``weights.{epoch:02d}-{val_loss:.2f}.hdf5``, from values that nobody vouches for.

A field is a name, an optional conversion (``!r``) and a format specification; attributes, items and nested
fields, which ``str.format`` would follow anywhere, are refused. What a field becomes is cut to 64 characters
and loses separators, control characters and what a file name may not hold, so that the file always lies below
the folder that the template spells out before its first field.
"""

from __future__ import annotations

import os
import re
import string
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.callbacks.monitor import find_key
from asynccb.errors import ArgumentError, CheckpointWriteError
from asynccb.storage.atomic import make_folder, remove_leftovers
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

__all__ = ["FileTemplate"]

_LONGEST_VALUE = 64
_LONGEST_NAME = 255 - 16  # bytes; the rest is for the temporary name beside it
_WIDEST = 255
_NEVER_IN_A_NAME = re.compile(r'[/\\:*?"<>|]')
_SEPARATOR = re.compile(r"([/\\])" if os.name == "nt" else "(/)")
_CONVERSIONS: dict[str, Callable[[object], str]] = {"r": repr, "s": str, "a": ascii}
_COUNTED = frozenset({"epoch", "batch"})


class _Piece(NamedTuple):
    """Literal text and the field behind it; ``name`` is None where no field follows."""

    literal: str
    name: str | None
    spec: str
    conversion: str | None


class FileTemplate:
    """A path with fields, checked when it is made.

    Args:
        filepath: the path; relative to the working directory, as everywhere.
        argument: the argument's name, for error messages.

    Attributes:
        text: the template as a string.
        names: the names of its fields, in order.
        shape: the path with one character in place of each field.
        folder: the folder spelt out before the first field, ``""`` for the working directory.

    Raises:
        ArgumentError: the template is malformed, or can name nothing but a folder.
    """

    def __init__(self, filepath: str | os.PathLike[str], argument: str = "filepath") -> None:
        self._argument = argument
        given = os.fspath(filepath) if isinstance(filepath, (str, os.PathLike)) else None
        if not isinstance(given, str):
            raise ArgumentError(argument, filepath, "a path, as a string or a PathLike of strings")
        self.text: str = given
        self._pieces = self._parse()
        self.names = tuple(dict.fromkeys(piece.name for piece in self._pieces if piece.name is not None))
        before = self._pieces[0].literal if self._pieces else ""
        self.folder = os.path.dirname(before)
        # A field stands for a character here, so that `..{epoch}` is not taken for the folder above.
        self.shape = "".join(piece.literal + "x" * (piece.name is not None) for piece in self._pieces)
        self._refuse_bad_names()

    def missing(self, keys: Collection[str]) -> list[str]:
        """The names that ``keys`` cannot fill; acc and accuracy fill each other."""
        return [name for name in self.names if find_key(name, keys) is None]

    def fill(self, values: Mapping[str, Any]) -> str:
        """The path for these values.

        Raises:
            ArgumentError: a name is not among the values, or its value does not take the format
                specification.
        """
        missing = self.missing(values)
        if missing:
            raise self._refusal(
                f"{_listed(missing)} is not there. There are: {', '.join(map(printable, values))}"
            )
        parts = [piece.literal + self._value(piece, values) for piece in self._pieces]
        tail = _SEPARATOR.split("".join(parts)[len(self.folder) :])
        # A name of dots alone is no file but this folder or the one above.
        return self.folder + "".join("_" * len(name) if name in (".", "..") else name for name in tail)

    def gives(self, path: str) -> bool:
        """Whether ``path``, an absolute one, is one that :meth:`fill` may have given. Paths spelt in an
        unusual way may be denied; no other is ever confirmed."""
        folder = os.path.abspath(self.folder or os.curdir)
        first, *others = self._pieces
        literals = [first.literal[len(self.folder) :].lstrip("/\\"), *(piece.literal for piece in others)]
        shape = "".join(
            re.escape(literal) + ("[^/\\\\]*" if piece.name is not None else "")
            for literal, piece in zip(literals, self._pieces, strict=True)
        )
        inside = os.path.join(folder, "")
        plain = path == os.path.abspath(path) and path.startswith(inside)
        return plain and re.fullmatch(shape, path[len(inside) :]) is not None

    def prepare(self) -> None:
        """Creates the folder before the first field and tries whether it takes a file. Blocks.

        Raises:
            ArgumentError: it cannot be created or written, the path is a folder, or a name in it is too long.
        """
        if any(len(os.fsencode(name)) > _LONGEST_NAME for name in _SEPARATOR.split(self.shape)):
            raise self._refusal(f"a file or folder name in it is longer than {_LONGEST_NAME} bytes")
        if not self.names and os.path.isdir(self.fill({})):
            raise self._refusal("it is an existing folder; a file's path is needed")
        folder = self.folder or os.curdir
        try:
            make_folder(folder)
            # Asked by doing: permission bits lie to root, on read-only mounts and on network file systems.
            with tempfile.TemporaryFile(dir=folder):
                pass
            remove_leftovers(folder)
        except OSError as error:
            raise self._refusal(f"its folder cannot be written: {error.strerror or error}") from error

    def make_room(self, path: str) -> None:
        """Creates the folder of a path that :meth:`fill` gave. Blocks.

        Raises:
            CheckpointWriteError: it cannot be created, or a link in it leads out of the template's own
                folder.
        """
        above, below = (os.path.realpath(part or os.curdir) for part in (self.folder, os.path.dirname(path)))
        try:
            if os.path.commonpath([above, below]) != above:
                raise PermissionError(f"a link leads out of {above}")
            make_folder(below)
        except OSError as error:
            raise CheckpointWriteError(path, error) from error

    def _parse(self) -> list[_Piece]:
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise self._refusal(f"malformed: {error}") from error
        pieces = [_Piece(literal, name, spec or "", conversion) for literal, name, spec, conversion in parsed]
        for piece in pieces:
            if piece.name is not None:
                self._check_field(piece.name, piece.spec, piece.conversion)
        return pieces

    def _check_field(self, name: str, spec: str, conversion: str | None) -> None:
        field = "{" + name + "}"
        if not name or name.isdigit():
            raise self._refusal(f"the field {field} needs a name, such as {{epoch}}")
        if set(".[") & set(name):
            raise self._refusal(f"the field {field} reaches into a value; a field is the name of a metric")
        if conversion is not None and conversion not in _CONVERSIONS:
            raise self._refusal(f"the field {field} has the unknown conversion !{conversion}")
        if "{" in spec or any(int(number) > _WIDEST for number in re.findall(r"\d{1,4000}", spec)):
            raise self._refusal(f"the field {field} must have a plain format of at most {_WIDEST} characters")
        examples: tuple[object, ...] = ("",) if conversion else (1,) if name in _COUNTED else (1, 1.0, "")
        if not any(_takes(example, spec) for example in examples):
            raise self._refusal(f"the field {field} has the format {spec!r}, which no number takes")

    def _refuse_bad_names(self) -> None:
        if os.path.basename(self.shape) in ("", ".", "..") or "\0" in self.shape:
            raise self._refusal("a path that ends in a file's name, without NUL characters, is needed")
        if {".", ".."} & set(_SEPARATOR.split(self.shape[len(self.folder) :])):
            raise self._refusal("behind the first field, `.` and `..` are not allowed as folders")

    def _value(self, piece: _Piece, values: Mapping[str, Any]) -> str:
        if piece.name is None:
            return ""
        key = find_key(piece.name, values)
        assert key is not None
        value = values[key]
        value = value.item() if getattr(value, "size", None) == 1 and hasattr(value, "item") else value
        if piece.conversion:
            value = _CONVERSIONS[piece.conversion](value)
        try:
            text = format(value, piece.spec)
        except (TypeError, ValueError) as error:
            raise self._refusal(f"the value of {{{piece.name}}} does not take its format: {error}") from error
        return _NEVER_IN_A_NAME.sub("_", printable(text))[:_LONGEST_VALUE] or "_"

    def _refusal(self, why: str) -> ArgumentError:
        return ArgumentError(self._argument, self.text, why)


def _takes(value: object, spec: str) -> bool:
    try:
        format(value, spec)
    except (TypeError, ValueError):
        return False
    return True


def _listed(names: list[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
