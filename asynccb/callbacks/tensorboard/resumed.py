"""The event files of a training that is resumed, cut back to where it goes on.

What was written between that moment and the crash comes again, into a new file. A reader would show both.
TensorBoard drops points before a START record of a session, but by one step number for all tags: where the
steps of some are epochs and those of others batches, no number is right for both. So the files themselves
lose what is to come again, and the record is there for a reader that has read it already.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from asynccb.callbacks.tensorboard.records import BATCH_PREFIX, encoded, is_length_head

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PREFIX", "RESUMED", "Place", "cut_back", "files_of", "is_root"]

PREFIX = "events.out.tfevents."
RESUMED = ".resumed-"
_ROOT = re.compile(r"[A-Za-z0-9_.-]+")
_HEAD, _TAIL = 12, 4  # bytes around the content of a record
_LOOKED_AT = 256
"""Bytes of a record that tell what it is."""


class Place(NamedTuple):
    """Where a training goes on: what is written from there on has these steps or higher ones.

    Attributes:
        epoch: of everything of epochs.
        batch: of the scalars of batches.
    """

    epoch: int
    batch: int


def is_root(text: object) -> bool:
    """Whether this can be what the name of a training's first file ends in. It comes from a backup, and no
    backup may name what is to be written elsewhere."""
    return isinstance(text, str) and _ROOT.fullmatch(text) is not None and bool(text.strip("."))


def files_of(folder: str, root: str) -> list[str]:
    """Paths of all files that a training has written into ``folder``, in order.

    Args:
        folder: of the files.
        root: what the name of its first one ends in.
    """
    if not is_root(root) or not os.path.isdir(folder):
        return []
    own = re.compile(re.escape(PREFIX + root) + rf"({re.escape(RESUMED)}\d+)?")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if own.fullmatch(name)]


def cut_back(path: str, place: Place) -> None:
    """Takes the first record that comes again, and all behind it, from a file; half a record at its end too.
    Blocks.

    Raises:
        OSError: the file cannot be read or written.
    """
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        for after, begin in _records(file, size):
            if _comes_again(begin, place):
                break
            end = after
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def _records(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """For each whole record where it ends, and the first bytes of its content."""
    at = 0
    while at + _HEAD + _TAIL <= size:
        file.seek(at)
        start = file.read(_HEAD + _LOOKED_AT)
        length = int.from_bytes(start[:8], "little")
        at += _HEAD + length + _TAIL
        if not is_length_head(start[:_HEAD]) or at > size:
            return
        yield at, start[_HEAD:][:length]


def _comes_again(content: bytes, place: Place) -> bool:
    """Whether a record as :mod:`records` writes them is one of values at a step that comes again."""
    if content[:1] != b"\x09":
        return True  # no record of ours: what a crash left
    if content[9:10] != b"\x10":
        return False  # the opening, or a graph
    step, at = _varint(content, 10)
    if content[at : at + 1] != b"\x2a":
        return False
    size, at = _varint(content, at + 1)
    if not size:
        return False
    return step >= (place.batch if _is_of_batch(content, at) else place.epoch)


def _is_of_batch(content: bytes, at: int) -> bool:
    """Whether the value that begins there is a scalar of a batch. Weights may have such names too."""
    _, at = _varint(content, at + 1)
    size, at = _varint(content, at + 1)
    tag = content[at : at + size]
    return tag.startswith(encoded(BATCH_PREFIX)) and content[at + size : at + size + 1] == b"\x15"


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    number = shift = 0
    while at < len(content):
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number, at
