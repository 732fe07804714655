"""Which of its files a checkpoint callback leaves on the disk."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["File", "Retention"]

# Around the lists below, for a few operations at a time: the training thread decides, the writer's thread
# writes. One for all, because a lock inside would keep the callback from being pickled.
_lock = threading.Lock()


@dataclass(eq=False, slots=True)
class File:
    """A file that is going to be written, or is.

    Attributes:
        path: absolute.
        value: of the monitored metric; None: it was missing.
    """

    path: str
    value: float | None


class Retention:
    """The files that one training has written, and which of them may go.

    Only files that were told to :meth:`wrote` are ever deleted or counted: what else has such a name is
    somebody else's. The newest file always stays. One that could not be deleted is tried again
    with the next one.

    Args:
        last: how many of the newest files stay; None: no number does.
        best: how many of those with the best value stay; None: no number does. NaN is the worst of all, of
            equal values the older one is the better. Files without a value stay unless ``last`` lets them go.
    """

    def __init__(self, last: int | None, best: int | None) -> None:
        self._last = last
        self._best = best
        self._decided: list[File] = []
        self._written: list[File] = []

    def decide(self, path: str, value: float | None) -> File:
        """A file is going to be written; called on the training thread."""
        file = File(os.path.abspath(path), value)
        with _lock:
            self._decided.append(file)
        return file

    def gave_up(self, file: File) -> None:
        """It was not written after all."""
        with _lock:
            self._decided.remove(file)

    def wrote(self, file: File, direction: str) -> OSError | None:
        """It is on the disk, durably: deletes what need not stay any longer. Blocks.

        Args:
            file: what :meth:`decide` answered.
            direction: ``"min"`` or ``"max"``: which values are better.

        Returns:
            Why a file could not be deleted, if there is one.
        """
        with _lock:
            self._decided.remove(file)
            self._written = _each_once([*self._written, file])
            kept = self._kept(direction)
            outdated = [old for old in self._written if old not in kept]
        failed = None
        for old in outdated:
            error = _delete(old.path)
            if error is None:
                with _lock:
                    self._written.remove(old)
            failed = failed or error
        return failed

    def state_dict(self) -> list[Any]:
        """The files written and to be written, in order."""
        with _lock:
            return [[file.path, file.value] for file in _each_once([*self._written, *self._decided])]

    def load_state_dict(self, state: Sequence[Sequence[Any]], is_own: Callable[[str], bool]) -> None:
        """Takes back what :meth:`state_dict` answered, as far as it is there and ``is_own``: a state comes
        from a file, and no file may name what is to be deleted elsewhere. Blocks."""
        files = [File(str(path), None if value is None else float(value)) for path, value in state]
        self._written = [file for file in files if is_own(file.path) and os.path.exists(file.path)]

    def _kept(self, direction: str) -> list[File]:
        kept = self._written[-(self._last or 1) :]
        if self._best is None:
            return kept
        sign = 1.0 if direction == "min" else -1.0
        ranked = [(file.value * sign, file) for file in self._written if file.value is not None]
        ranked = sorted((one for one in ranked if not math.isnan(one[0])), key=lambda one: one[0])
        kept += [file for _, file in ranked[: self._best]]
        if self._last is None:
            kept += [file for file in self._written if file.value is None]
        return kept


def _each_once(files: Iterable[File]) -> list[File]:
    """The last one of each path, in their order."""
    last: dict[str, File] = {}
    for file in files:
        last.pop(file.path, None)
        last[file.path] = file
    return list(last.values())


def _delete(path: str) -> OSError | None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return None  # somebody tidied up
    except OSError as error:
        return error
    return None
