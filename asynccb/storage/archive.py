"""The archives that Keras 3 writes (``.keras``): a config and a file of weights, stored side by side."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asynccb.errors import FileRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_LARGEST_CONFIG = 4 << 20  # bytes; parsed, JSON may take thirty times its length
_SIGNATURE = b"PK\x03\x04"


def is_archive(path: str) -> bool:
    """Whether a file begins as an archive does; False for what is no file, which the reader refuses.

    Raises:
        FileNotFoundError, PermissionError: it is not there, or not to be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(_SIGNATURE)) == _SIGNATURE
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:
        return False


@contextmanager
def unpacked(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The config of an archive, and the path of its weights in a folder that is gone afterwards. Blocks.

    Two members are looked at, by their names, and their check sums are compared; all else stays in the
    archive.

    Raises:
        FileRefused: for an archive that is damaged, lacks one of the two, or could become larger than it is.
            What the caller refuses of the weights is said of the archive.
    """
    with tempfile.TemporaryDirectory(prefix="asynccb") as folder:
        weights = os.path.join(folder, _WEIGHTS)
        config = _unpack(path, weights)
        try:
            yield config, weights
        except FileRefused as error:
            raise FileRefused(path, error.why) from error


def _unpack(path: str, weights: str) -> dict[str, Any]:
    """The config; the weights go where they are wanted."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = _config(path, archive)
            member = _member(path, archive, _WEIGHTS, os.path.getsize(path))
            with archive.open(member) as packed, open(weights, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        return config
    except FileRefused:
        raise
    except OSError as error:
        raise FileRefused(path, f"it cannot be unpacked: {error}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise FileRefused(path, f"it is damaged or no archive of Keras: {error}") from error


def _config(path: str, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        config = json.loads(archive.read(_member(path, archive, _CONFIG, _LARGEST_CONFIG)))
    except (ValueError, RecursionError) as error:
        raise FileRefused(path, f"its {_CONFIG} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileRefused(path, f"its {_CONFIG} is not a JSON object")
    return config


def _member(path: str, archive: zipfile.ZipFile, name: str, largest: int) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise FileRefused(path, f"it holds no {name}") from None
    if member.file_size > largest or member.compress_type != zipfile.ZIP_STORED:
        raise FileRefused(path, f"its {name} is larger than {largest} bytes, or compressed")
    return member
