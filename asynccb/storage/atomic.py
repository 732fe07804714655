"""Writing a file so that its name always shows the old content or the new one, whole.

The order is: temporary file in the same folder, its content, fsync of the file, rename, fsync of the folder.
Without the first fsync a power cut can leave the right name with no content; without the second it can leave
the old name.
"""

from __future__ import annotations

import os
import re
import secrets
import warnings
from typing import TYPE_CHECKING

from asynccb.errors import CheckpointWriteError

if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LONGEST = 200  # characters of the name that the temporary name repeats; file systems allow 255 bytes in all


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[str], object], *, synced: bool = False
) -> None:
    """Calls ``write(temporary name)`` and puts the result in place of ``path``, durably. Blocks.

    The folder is created if it is missing. The temporary name is ``.<name>.<random>.tmp``, beside ``path``.

    Args:
        path: the file to replace or to create.
        write: creates the file whose name it is given, and closes it.
        synced: ``write`` synchronizes the file itself.

    Raises:
        CheckpointWriteError: if anything failed. What stood at ``path`` is untouched and the temporary file
            removed. Only if the folder could not be synchronized, which comes after the rename, there is a
            warning instead: the new file is in place, and might be gone after a power cut.
    """
    path = os.fspath(path)
    # As few system calls as possible: after each, this thread may have to wait for the interpreter lock.
    target = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    if os.path.islink(target):
        target = os.path.realpath(target)  # a link stays a link; what it leads to is replaced
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:_LONGEST]}.{secrets.token_hex(4)}.tmp")
    try:
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
        write(temporary)
        if not synced:
            _sync_file(temporary)
        os.replace(temporary, target)
    except Exception as error:
        _remove(temporary)
        raise CheckpointWriteError(path, error) from error
    except BaseException:  # KeyboardInterrupt: no file is left behind either
        _remove(temporary)
        raise
    _sync_folder(folder)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that :func:`atomic_write` gives to its temporary files."""
    return _TEMPORARY.fullmatch(name) is not None


def _sync_file(path: str) -> None:
    # After a failed fsync the kernel may have dropped the pages: nobody retries on this file, it is thrown
    # away.
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Makes the rename durable. Platforms that cannot open folders make it so by themselves, or cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        _warn(folder, error)
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _warn(folder, error)
    finally:
        os.close(descriptor)


def _warn(folder: str, error: OSError) -> None:
    message = f"a file in {folder} is in place, but might be gone after a power cut: {error}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
