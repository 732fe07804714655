"""Writing a file so that its name always shows the old content or the new one, whole.

The order is: temporary file in the same folder, its content, fsync of the file, rename, fsync of the folder.
Without the first fsync a power cut can leave the right name with no content; without the second it can leave
the old name.

A process that is killed in between leaves its temporary file. Such a file's name tells whose it is, so that
it can be removed as soon as its owner is dead.
"""

from __future__ import annotations

import os
import re
import secrets
import warnings
from typing import TYPE_CHECKING

from asynccb.errors import CheckpointWriteError
from asynccb.storage.owner import FORM, Owner, this_process
from asynccb.storage.turns import turn

if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPORARY = re.compile(rf"\..+\.({FORM})-[0-9a-f]{{8}}\.tmp(?:\.[a-z0-9]+)*", re.DOTALL)
_LONGEST = 200  # bytes of the name that the temporary name repeats; file systems allow 255 in all


def atomic_write(
    path: str | os.PathLike[str],
    write: Callable[[str], object],
    *,
    synced: bool = False,
    suffix: str = "",
) -> None:
    """Calls ``write(temporary name)`` and puts the result in place of ``path``, durably. Blocks.

    The folder is created if it is missing. The temporary name is ``.<name>.<owner>-<random>.tmp``, beside
    ``path``.

    Of several writes of one file at the same time the one that began last wins, in whatever order they end:
    an earlier one that comes later is thrown away. Its call returns as any other: what stands at ``path`` is
    whole, durable, and newer than what it was to write.

    Args:
        path: the file to replace or to create.
        write: creates the file whose name it is given, and closes it.
        synced: ``write`` synchronizes the file itself.
        suffix: what the temporary name ends in, for a ``write`` that takes no other: ``".keras"``.

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
    temporary = os.path.join(folder, _temporary_name(name, suffix))
    try:
        with turn((*_identity(folder), name)) as take:
            write(temporary)
            if not synced:
                _sync_file(temporary)
            if not take(lambda: os.replace(temporary, target)):
                _remove(temporary)
    except Exception as error:
        _remove(temporary)
        raise CheckpointWriteError(path, error) from error
    except BaseException:  # KeyboardInterrupt: no file is left behind either
        _remove(temporary)
        raise
    sync_folder(folder)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that :func:`atomic_write` gives to its temporary files."""
    return _TEMPORARY.fullmatch(name) is not None


def make_folder(folder: str) -> None:
    """Creates a folder, and those above it that are missing, durably. Blocks.

    Raises:
        OSError: it cannot be created.
    """
    missing = []
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        above = os.path.dirname(folder)
        if above == folder:
            break
        folder = above
    for made in reversed(missing):
        try:
            os.mkdir(made)
        except FileExistsError:  # somebody else was quicker, or a file is in the way
            if not os.path.isdir(made):
                raise
        sync_folder(os.path.dirname(made) or os.curdir)


def remove_leftovers(folder: str | os.PathLike[str], *, locked: bool = False) -> list[str]:
    """Removes the temporary files in ``folder`` of processes of this host that were killed. Blocks.

    A file of a process that lives, of one that nothing can be known of (on another host, in another
    container), or with another name is never touched. What cannot be removed stays.

    Args:
        folder: looked through, not what lies below; it need not exist.
        locked: nobody else on this host writes here now, because all who write hold the folder's lock and
            the caller has it. Then the files of other containers of this host are leftovers too.

    Returns:
        The names of the files that were removed.
    """
    removed = []
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if _is_leftover(entry, locked)]
    except OSError:
        return []
    for entry in found:
        try:
            os.unlink(entry.path)
        except OSError:
            continue
        removed.append(entry.name)
    return sorted(removed)


def _is_leftover(entry: os.DirEntry[str], locked: bool) -> bool:
    named = _TEMPORARY.fullmatch(entry.name)
    if named is None or not entry.is_file(follow_symlinks=False):
        return False
    owner = Owner.parse(named[1])
    dead = owner.is_dead()
    return (locked and owner.host == this_process().host) if dead is None else dead


def _temporary_name(name: str, suffix: str) -> str:
    longest = _LONGEST - len(suffix)
    short = os.fsencode(name)[:longest].decode(errors="ignore") if len(name) > longest // 4 else name
    return f".{short}.{this_process()}-{secrets.token_hex(4)}.tmp{suffix}"


def _identity(folder: str) -> tuple[int, int]:
    """Names a folder whatever way leads to it; makes it if it is missing."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        make_folder(folder)
        status = os.stat(folder)
    return status.st_dev, status.st_ino


def _sync_file(path: str) -> None:
    # After a failed fsync the kernel may have dropped the pages: nobody retries on this file, it is thrown
    # away.
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: str) -> None:
    """Makes its names durable, or warns. Blocks. Platforms that cannot open folders make it so by themselves,
    or cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"what is new in {folder} is in place, but might be gone after a power cut: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
