"""Going on from a backup: finding it, refusing that of another training, and putting everything back.

The order: the model, the data's place and the seed before any hook; then ``set_model``, ``set_params``,
``on_train_begin`` with its awaitables, which see ``run.resumed``; then the state of each callback.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from asynccb.budget import blas_threads
from asynccb.callbacks.history import History
from asynccb.errors import ArgumentError, FileRefused, FolderBusy, ResumeRefused
from asynccb.protocols import Place
from asynccb.storage.backups import BackupFolder
from asynccb.storage.packing import freeze
from asynccb.unit import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from asynccb.bus.table import Subscriber
    from asynccb.training.programs import Fit

__all__ = ["Resume", "Resumed", "check_resumable"]


logger = logging.getLogger("asynccb")


class Resumed(NamedTuple):
    """Where a training went on.

    Attributes:
        path: the backup.
        epoch: the 0-based epoch under way, or the next one.
        batch: batches of it that were trained.
        step: batches trained, over all epochs.
    """

    path: str
    epoch: int
    batch: int
    step: int


class KeepsBackups(Protocol):
    """A callback that makes backups; see :class:`asynccb.callbacks.BackupAndRestore`."""

    backup_dir: str

    def take_folder(self, owner: str) -> None: ...

    def leave_folder(self) -> None: ...


def check_resumable(model: Any, purpose: str) -> None:
    """Refuses a model without ``fingerprint`` and ``restore``.

    Raises:
        ArgumentError: it cannot be resumed.
    """
    if getattr(model, "has_restore", callable(getattr(model, "restore", None))):
        return
    raise ArgumentError(
        "model",
        model.user_model,
        f"capture, fingerprint and restore are needed, because {purpose}",
        "Add state_dict() and load_state_dict(state) of plain data, which is the same in short",
    )


class Resume:
    """What a run does about backups, on its training thread.

    Args:
        model: what is trained.
        program: what is done with it.
        paths: a backup, or folders of them: the first that has any counts; empty: begin anew.
        keepers: the callbacks that make backups.

    Attributes:
        owner: the run, in words for another one that wants its folders.
    """

    def __init__(
        self, model: Any, program: Fit, paths: Sequence[str], keepers: Sequence[KeepsBackups]
    ) -> None:
        self.owner = "a training"
        self.resumed: Resumed | None = None
        self._model = model
        self._program = program
        self._paths = paths
        self._keepers = keepers
        self._settings: dict[str, Any] = {}
        self._state: Mapping[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What goes into every backup besides place, model and callbacks."""
        # Copied: a source may answer what it goes on to change, and this is written beside the training.
        return {"settings": self._settings, "data": freeze(self._program.state_dict(), "state of the data")}

    def begin(self) -> Resumed | None:
        """After the data is prepared and before any hook: puts model and data back, if there is a backup.

        Raises:
            ArgumentError: model or data cannot be resumed.
            ResumeRefused: the newest backup is of another training.
            FileRefused: all backups are damaged.
            FolderBusy: another training has a folder of this one.
        """
        if not self._paths and not self._keepers:
            return None
        purpose = "backups are asked for" if self._keepers else "it is to be resumed"
        self._program.check_seekable(purpose)
        self._settings = _settings(self._model, self._program)
        for keeper in self._keepers:
            keeper.take_folder(self.owner)
        self._go_on()
        return self.resumed

    def leave(self, subscribers: Sequence[Subscriber]) -> None:
        """Behind the training: a keeper whose ``on_train_begin`` was never called is not told of the end."""
        for subscriber in subscribers:
            if subscriber.callback in self._keepers and not subscriber.begun:
                subscriber.callback.leave_folder()

    def end(self, subscribers: Sequence[Subscriber]) -> str | None:
        """After ``on_train_begin``: gives each callback its state back. Answers why the training had been
        stopped from within, None if it had not."""
        states = {**self._state["callbacks"], **self._state["takers"]}
        told = self._state["told apart"]
        names = _matched({s.name: told_apart(s.callback) for s in subscribers}, told)
        # The History first: a CSVLogger writes rows again from it that a crash has lost.
        for subscriber in sorted(subscribers, key=lambda s: not isinstance(s.callback, History)):
            if names.get(subscriber.name) in states:
                subscriber.callback.load_state_dict(states.pop(names[subscriber.name]))
        # The progress bar comes and goes with `verbose`, and nothing depends on it.
        gone = {n for n in states.keys() & self._state["callbacks"].keys() if _kind(n) != "ProgbarLogger"}
        if gone:
            warnings.warn(
                "the backup has state of callbacks that are not there any more: "
                + ", ".join(" ".join([name, *told[name]]) for name in sorted(gone)),
                RuntimeWarning,
                stacklevel=2,
            )
        stopped: str | None = self._state["stop"]
        if stopped is not None or self._program.over:
            logger.warning(
                "the training in %s had ended: this gives its History at once. resume=False begins anew",
                self.resumed and self.resumed.path,
            )
        return stopped

    @property
    def start(self) -> Place:
        """Where the training begins."""
        return self._program.start

    def _go_on(self) -> None:
        for path in self._paths:
            if path not in (keeper.backup_dir for keeper in self._keepers) and not os.path.exists(path):
                raise ArgumentError(
                    "resume",
                    path,
                    "something that is there",
                    "BackupAndRestore(folder) makes backups in a folder",
                )
        damaged: list[FileRefused] = []
        for file in (file for path in self._paths for file in _candidates(path)):
            try:
                self._restore(file)
            except FileRefused as error:
                damaged.append(error)
                continue
            break
        if self.resumed is None and damaged:
            raise damaged[0]
        if damaged:
            warnings.warn(
                f"the training goes on from {self.resumed and self.resumed.path}, an older backup: "
                + "; ".join(map(str, damaged)),
                RuntimeWarning,
                stacklevel=2,
            )

    def _restore(self, file: str) -> None:
        def accept(extra: Mapping[str, Any]) -> None:
            if not isinstance(extra.get("resume"), dict):
                raise ResumeRefused(
                    file, ["it holds a model and nothing else of a training: load it with load_model"]
                )
            self._state = extra["resume"]
            saved = self._state["settings"]
            if different := _differences(saved, self._comparable()):
                raise ResumeRefused(file, different)
            self._program.check_place(Place(**self._state["place"]))

        try:
            self._model.restore(file, accept)
        except FileNotFoundError:
            # It was there when the folder was read: another training removes its older ones.
            raise FolderBusy(os.path.dirname(file)) from None
        place = Place(**self._state["place"])
        step = int(self._state["step"])
        self._program.go_on(place, int(self._state["settings"]["data"]["seed"]), self._state["data"])
        self._settings = _settings(self._model, self._program)
        self.resumed = Resumed(file, place.epoch, place.batch, step)

    def _comparable(self) -> dict[str, Any]:
        """The settings of now, without a seed that nobody asked for."""
        data = dict(self._settings["data"])
        if self._program.seed_drawn:
            del data["seed"]
        return self._settings | {"data": data}


def _candidates(path: str) -> Iterator[str]:
    """The file, or those of the folder, newest first."""
    if os.path.isdir(path) or not os.path.exists(path):
        yield from BackupFolder(path).files()
    else:
        yield path


def _matched(now: Mapping[str, list[str]], saved: Mapping[str, list[str]]) -> dict[str, str]:
    """Which callback of now was which of the backup, by their names; what tells them apart is given for each.

    Of a class those that are alike belong together, and then those that are left, in their order, if there
    are as many of them as there were: a file may have been given another name. Else nobody knows.
    """
    matched: dict[str, str] = {}
    for kind in dict.fromkeys(_kind(name) for name in now):
        mine = [name for name in now if _kind(name) == kind]
        theirs = [name for name in saved if _kind(name) == kind]
        for name in mine:
            if same := [other for other in theirs if saved[other] == now[name]]:
                matched[name] = same[0]
                theirs.remove(same[0])
        left = [name for name in mine if name not in matched]
        if len(left) == len(theirs):
            matched |= zip(left, theirs, strict=True)
    return matched


def _kind(name: str) -> str:
    return name.partition("#")[0]


def _settings(model: Any, program: Fit) -> dict[str, Any]:
    """What must be equal for equal bytes."""
    found: dict[str, Any] = freeze(
        {"model": model.fingerprint(), "data": program.settings(), "blas_threads": blas_threads()}, "settings"
    )
    return found


def _differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """One line for each value of ``now`` that is another one in ``saved``."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key in now
            for line in _differences(saved.get(key), now[key], f"{where}.{key}" if where else key)
        ]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [
            line
            for at, (old, new) in enumerate(zip(saved, now, strict=True))
            for line in _differences(old, new, f"{where}[{at}]")
        ]
    hint = " (OPENBLAS_NUM_THREADS and its like set it)" if where == "blas_threads" else ""
    return [] if saved == now else [f"{where}: {saved!r} there, {now!r} here{hint}"]
