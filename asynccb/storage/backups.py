"""A folder of backups, ``backup-000012.h5``, each with a number of its own: the highest is the newest.

A backup is never replaced: each gets a new name, and older ones are removed only when it is durable. So
whatever happens in between, there is one.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from asynccb.storage.atomic import make_folder, remove_leftovers
from asynccb.storage.lock import FolderLock

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BackupFolder"]

_NAME = re.compile(r"backup-([0-9]+)\.h5")


class BackupFolder:
    """Names, order and removal of the backups of one folder. Everything blocks for a few system calls.

    Args:
        folder: need not exist before it is locked.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(folder)
        self._lock = FolderLock(self.path)
        self._highest = 0

    def lock(self, owner: str) -> None:
        """Makes the folder, takes it for one run alone, and removes what killed processes left unfinished.

        Args:
            owner: the run, in words for another one that wants the folder.

        Raises:
            FolderBusy: another run has it.
            OSError: it cannot be made or written.
        """
        make_folder(self.path)
        self._lock.acquire(owner)
        remove_leftovers(self.path, locked=True)

    def unlock(self) -> None:
        """Gives the folder back; nothing happens if it is not locked."""
        self._lock.release()

    def files(self) -> list[str]:
        """Paths of all backups, whoever wrote them, the newest first; none where there is no folder."""
        return [os.path.join(self.path, name) for _, name in self._found()]

    def next(self) -> str:
        """The path of the next backup. No other call returns it, and no backup that was ever seen here has a
        higher number."""
        numbers = [number for number, _ in self._found()]
        self._highest = max(self._highest, *numbers, 0) + 1
        return os.path.join(self.path, f"backup-{self._highest:06d}.h5")

    def prune(self, own: Iterable[str], keep: int) -> list[str]:
        """Deletes the oldest of ``own`` until ``keep`` of them are left, and never another file.

        To be called when the newest of them is durable, not before. One that cannot be deleted stays, and is
        tried again next time.

        Args:
            own: paths of backups of this folder that the caller may delete.
            keep: how many are to be left, at least 1.

        Returns:
            Those of ``own`` that are there afterwards, the newest first.
        """
        if keep < 1:
            raise ValueError(f"{keep} backups cannot be kept, one is the least")
        mine = {os.path.abspath(path) for path in own}
        there = [path for path in self.files() if path in mine]
        return there[:keep] + [path for path in there[keep:] if not _removed(path)]

    def _found(self) -> list[tuple[int, str]]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        numbered = [(int(found[1]), found[0]) for name in names if (found := _NAME.fullmatch(name))]
        return sorted(numbered, reverse=True)


def _removed(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
