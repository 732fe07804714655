"""A write that was given up may still be on its way: its rename must not come after that of a newer one.

Nobody can stop a thread in a system call. So each write draws a number when it begins, and takes the name
only if no later one has taken it before. This holds among the threads of a process; between processes it is
the folder's lock that keeps writers apart.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

__all__ = ["turn"]


class _Target:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.writing = 0  # how many are on their way
        self.drawn = 0  # the number of the one that began last
        self.newest = 0  # the number of the one that has the name

    def take(self, number: int, rename: Callable[[], object]) -> bool:
        with self.lock:  # between the look and the rename no other may come
            if number < self.newest:
                return False
            rename()
            self.newest = number
            return True


_lock = threading.Lock()
_targets: dict[Hashable, _Target] = {}  # those that are being written


@contextlib.contextmanager
def turn(target: Hashable) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """Draws a number for ``target``, whatever names it, for as long as the block runs.

    Yields:
        A function that calls its argument, which puts the new file in place, and returns True; it returns
        False, without a call, if the one of a turn that began later is in place.
    """
    with _lock:
        found = _targets.setdefault(target, _Target())
        found.writing += 1
        found.drawn += 1
        number = found.drawn
    try:
        yield lambda rename: found.take(number, rename)
    finally:
        with _lock:
            found.writing -= 1
            if not found.writing:  # nobody is left who could come late
                _targets.pop(target, None)


def _forget() -> None:
    """In a forked child: the writes of the parent's threads do not go on there, yet their locks stay held."""
    global _lock, _targets
    _lock, _targets = threading.Lock(), {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
