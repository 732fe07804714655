"""The preloaded library ``shim.c``: building it, writing its rules, reading its record."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("shim.c")

_ENTRY = struct.Struct("<16sqqIIQ")


def why_not() -> str | None:
    """What keeps the library from being built here; None where nothing does."""
    if not sys.platform.startswith("linux") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        return "system calls are intercepted through glibc's preloading, which is not here"
    if shutil.which("gcc") is None:
        return "there is no gcc to build the interception of system calls with"
    return None


def build(folder: Path) -> Path:
    """Builds the library in ``folder``."""
    library = folder / "shim.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        library,
        SOURCE,
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return library


def rule(calls: str, glob: str, action: str, count: int = 1, *, always: bool = False) -> str:
    """A rule; the words stand in ``shim.c``."""
    return f"{calls}\t{glob}\t{count}\t{'always' if always else 'once'}\t{action}\n"


class Call(NamedTuple):
    """One call of a record.

    Attributes:
        name: open, write, fsync, close, ftruncate, fallocate, rename, unlink.
        path: what it was about.
        other: the new name of a rename.
        result: what it returned.
        at: flags of an open, offset of a write, length after a truncation or an allocation.
        data: what a write has written.
    """

    name: str
    path: str
    other: str = ""
    result: int = 0
    at: int = 0
    data: bytes = b""


def read_record(path: Path) -> Iterator[Call]:
    """The calls in order."""
    content = memoryview(path.read_bytes())
    while content:
        name, result, at, path_length, other_length, data_length = _ENTRY.unpack_from(content)
        parts, end = [], _ENTRY.size
        for length in (path_length, other_length, data_length):
            parts.append(bytes(content[end : end + length]))
            end += length
        words = name.rstrip(b"\0").decode(), os.fsdecode(parts[0]), os.fsdecode(parts[1])
        yield Call(*words, result, at, parts[2])
        content = content[end:]
