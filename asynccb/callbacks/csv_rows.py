"""Rows of a CSV file: their bytes, and a file brought back to those that a training had written."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.storage.direct import write_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from io import FileIO

__all__ = ["append", "cells", "formatted", "guarded", "restore"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_SHOWN = 80
"""Characters of a line that an error shows."""


def guarded(text: str) -> str:
    """``text``, with an apostrophe before what a spreadsheet would run as a formula."""
    # A spreadsheet runs what stands behind these, quoted or not: a metric's name must not become a command.
    return f"'{text}" if text.startswith(_FORMULA) else text


def cells(epoch: int, logs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Column -> cell for one epoch."""
    return {"epoch": epoch} | {guarded(str(key)): _cell(value) for key, value in (logs or {}).items()}


def formatted(lines: Iterable[Sequence[Any]], separator: str) -> bytes:
    """The lines as they stand in the file, each with its end."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(lines)
    # Half a surrogate pair has no bytes; it is no reason to lose a row.
    return text.getvalue().encode("utf-8", "backslashreplace")


def append(file: FileIO, data: bytes) -> None:
    """Writes all of ``data``, or nothing: the next row does not follow half a row. Blocks.

    Raises:
        OSError: the disk refused.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        write_all(file, data)
    except OSError:
        try:
            file.seek(end)  # else what is written next leaves a hole of zeros
            file.truncate(end)
        except OSError:
            pass  # the disk is failing already, and the error that matters is under way
        raise


def restore(filename: str, begin: int, written: bytes) -> None:
    """Brings a file back to what a training had written: what stands behind is cut off, what a crash took
    from the end (or left as zeros) is written again. On the disk when this returns; blocks.

    Args:
        filename: the file.
        begin: bytes before the training's own, which are somebody else's and not looked at.
        written: the training's own.

    Raises:
        ArgumentError: something else stands there, or somebody else's rows are gone; the file is left as it
            is.
        OSError: it cannot be read or written.
    """
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    if not begin:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        flags |= os.O_CREAT
    try:
        descriptor = os.open(filename, flags, 0o666)
    except FileNotFoundError:
        raise _refusal(filename, f"is gone, with {begin} bytes of older rows in it", begin) from None
    with open(descriptor, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size < begin:
            shorter = f"has {size} bytes, where {begin} of older rows stood before the training"
            raise _refusal(filename, shorter, begin)
        file.seek(begin)
        good, foreign = _agreeing(found := file.read(len(written)), written)
        if foreign is not None:
            raise _refusal(filename, _difference(found, written, foreign), begin)
        file.seek(begin + good)
        file.write(written[good:])
        file.truncate(begin + len(written))
        file.flush()
        os.fsync(file.fileno())


def _agreeing(found: bytes, written: bytes) -> tuple[int, int | None]:
    """How many bytes are as they were written, and where the first one is that somebody changed. What differs
    may only be missing, or zero: a file system that lost its power leaves zeros where data were under way."""
    there = np.frombuffer(found, np.uint8)
    differs = there != np.frombuffer(written, np.uint8)[: len(there)]
    foreign = np.flatnonzero(differs & (there != 0))
    good = int(np.argmax(differs)) if differs.any() else len(there)
    return good, int(foreign[0]) if len(foreign) else None


def _difference(found: bytes, written: bytes, at: int) -> str:
    number = written[:at].count(b"\r\n")
    start = written[:at].rfind(b"\r\n") + 2 if number else 0
    lines = (data[start:].split(b"\r\n")[0].decode("utf-8", "replace")[:_SHOWN] for data in (found, written))
    has, had = lines
    return f"line {number + 1} of its own is {has!r}, where {had!r} was written"


def _refusal(filename: str, what: str, begin: int) -> ArgumentError:
    anew = "" if begin else ", or move it away: a missing file is written anew"
    return ArgumentError(
        "filename",
        in_words(filename),
        f"was changed since the training that is resumed wrote it: {what}",
        f"Put the file back{anew}",
    )


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (Number, np.bool_)):
        return value
    if isinstance(value, str):
        return guarded(value)
    if getattr(value, "ndim", None) == 0:
        return _cell(value[()] if isinstance(value, np.ndarray) else value.item())
    if isinstance(value, Iterable):
        return f'"[{", ".join(map(str, value))}]"'
    return guarded(str(value))
