"""Power cuts: from the record of one save, what a disk may hold when the current fails in the middle of it.

The rules are those of the most forgetful file system that still keeps what it promises. What was done to a
file before an fsync of it returned is there. Everything later is there, or not, or in part, sector by sector
and in any order. What was done to the folder's names is there after an fsync of the folder; until then each
change of a name by itself is there, or not, whatever has become of the file's content.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from disk_faults.shim import Call

SECTORS = (512, 4096)
"""Bytes that a disk writes whole."""

_FINEST = min(SECTORS)


class Change(NamedTuple):
    """The smallest thing that is done or not done.

    Attributes:
        moment: index of its call.
        place: number of the file, None for the folder.
        what: of a file, ``(offset, bytes)``, ``("cut", length)`` or ``("grow", length)``; of the folder,
            ``(name, number of a file)``, the number None where the name goes.
    """

    moment: int
    place: int | None
    what: tuple[object, object]


@dataclass
class Cut:
    """A moment at which the current fails.

    Attributes:
        moment: calls that had been made.
        kept: changes that are there for certain.
        open: changes that may be there.
    """

    moment: int
    kept: list[Change] = field(default_factory=list)
    open: list[Change] = field(default_factory=list)


class Save:
    """The record of one save as a row of changes.

    Args:
        calls: the record.
        folder: where it was saved.
        before: names and contents of the files that were there, all of them durable.
    """

    def __init__(self, calls: Sequence[Call], folder: Path, before: Mapping[str, bytes]) -> None:
        self._folder, self._before = str(folder), list(before.items())
        self.changes: list[Change] = []
        self._syncs: list[tuple[int, int | None]] = []
        self._names: dict[str, int] = {name: number for number, (name, _) in enumerate(self._before)}
        self._opened: dict[str, int | None] = {}
        self._files = len(self._before)
        self.moments = len(calls)
        for moment, call in enumerate(calls):
            if call.result >= 0:
                getattr(self, f"_{call.name}", lambda *_: None)(moment, call)

    def _open(self, moment: int, call: Call) -> None:
        name = os.path.basename(call.path)
        if call.path == self._folder:
            self._opened[call.path] = None
            return
        if name not in self._names and call.at & os.O_CREAT:
            self._rename_to(moment, name, self._files)
            self._files += 1
        elif call.at & os.O_TRUNC:
            self.changes.append(Change(moment, self._names[name], ("cut", 0)))
        self._opened[call.path] = self._names[name]

    def _write(self, moment: int, call: Call) -> None:
        at, data = call.at, call.data
        while data:
            length = _FINEST - at % _FINEST
            self.changes.append(Change(moment, self._opened[call.path], (at, data[:length])))
            at, data = at + len(data[:length]), data[length:]

    def _ftruncate(self, moment: int, call: Call) -> None:
        self.changes.append(Change(moment, self._opened[call.path], ("cut", call.at)))

    def _fallocate(self, moment: int, call: Call) -> None:
        self.changes.append(Change(moment, self._opened[call.path], ("grow", call.at)))

    def _fsync(self, moment: int, call: Call) -> None:
        self._syncs.append((moment, self._opened[call.path]))

    def _rename(self, moment: int, call: Call) -> None:
        number = self._names[os.path.basename(call.path)]
        self._rename_to(moment, os.path.basename(call.other), number)
        self._rename_to(moment, os.path.basename(call.path), None)

    def _unlink(self, moment: int, call: Call) -> None:
        self._rename_to(moment, os.path.basename(call.path), None)

    def _rename_to(self, moment: int, name: str, number: int | None) -> None:
        self.changes.append(Change(moment, None, (name, number)))
        if number is None:
            del self._names[name]
        else:
            self._names[name] = number

    def cut(self, moment: int) -> Cut:
        """The current fails when ``moment`` calls have been made."""
        made = Cut(moment)
        synced = {place: when for when, place in self._syncs if when < moment}
        for change in self.changes:
            if change.moment < moment:
                kept = change.moment < synced.get(change.place, -1)
                (made.kept if kept else made.open).append(change)
        return made

    def files(self, changes: Sequence[Change]) -> dict[str, bytes]:
        """What lies in the folder when these changes are there."""
        names = {name: number for number, (name, _) in enumerate(self._before)}
        contents = [bytearray(content) for _, content in self._before]
        contents += [bytearray() for _ in range(self._files - len(contents))]
        for change in sorted(changes, key=lambda change: change.moment):
            if change.place is None:
                names[change.what[0]] = change.what[1]
            else:
                _apply(contents[change.place], *change.what)
        return {name: bytes(contents[number]) for name, number in names.items() if number is not None}


def _apply(content: bytearray, where: object, what: object) -> None:
    if where == "cut":
        del content[what:]
    if where in ("cut", "grow"):
        content.extend(bytes(max(0, what - len(content))))
        return
    content.extend(bytes(max(0, where - len(content))))
    content[where : where + len(what)] = what


class State(NamedTuple):
    """One state of the disk: the current failed at ``moment``, the changes ``lost`` are not there."""

    moment: int
    lost: frozenset[Change]
    files: dict[str, bytes]


def states(save: Save, seed: int) -> Iterator[State]:
    """Different states without an end: first the telling ones, then random ones."""
    seen = set()
    cuts = [save.cut(moment) for moment in range(save.moments + 1)]
    for cut, lost in itertools.chain(_telling(cuts), _random(cuts, random.Random(seed))):
        if (cut.moment, lost) not in seen:
            seen.add((cut.moment, lost))
            there = [change for change in cut.open if change not in lost]
            yield State(cut.moment, lost, save.files([*cut.kept, *there]))


def _telling(cuts: Sequence[Cut]) -> Iterator[tuple[Cut, frozenset[Change]]]:
    for cut in cuts:
        data = [change for change in cut.open if change.place is not None]
        names = [change for change in cut.open if change.place is None]
        yield cut, frozenset()  # all is there
        yield cut, frozenset(cut.open)  # only what is certain
        yield cut, frozenset(data)  # names without content
        yield cut, frozenset(names)  # content without names
        yield cut, frozenset(change for change in data if change.what[0] != "grow")  # nothing but length
    for cut in reversed(cuts):
        for lost in cut.open:
            yield cut, frozenset([lost])
        for moment in {change.moment for change in cut.open}:  # a whole call
            yield cut, frozenset(change for change in cut.open if change.moment == moment)
        for sector in SECTORS:  # a tear: up to a sector all is there
            yield from _torn(cut, sector)


def _torn(cut: Cut, sector: int) -> Iterator[tuple[Cut, frozenset[Change]]]:
    data = [change for change in cut.open if change.place is not None and isinstance(change.what[0], int)]
    for end in {change.what[0] // sector * sector for change in data}:
        yield cut, frozenset(change for change in data if change.what[0] >= end)


def _random(cuts: Sequence[Cut], chance: random.Random) -> Iterator[tuple[Cut, frozenset[Change]]]:
    some = [cut for cut in cuts if len(cut.open) > 1]
    while some:
        cut, share = chance.choice(some), chance.choice((0.1, 0.5, 0.9))
        yield cut, frozenset(change for change in cut.open if chance.random() < share)
