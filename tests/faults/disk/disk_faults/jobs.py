"""What the children of the server do. Each job says lines of JSON, and is given the rest of its request."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from asynccb.errors import AsynccbError, FileRefused
from asynccb.models import load_model
from asynccb.storage.atomic import is_temporary
from disk_faults import hostile, permissions
from disk_faults.shim import read_record, rule
from disk_faults.subjects import SUBJECTS, Mixture

if TYPE_CHECKING:
    from collections.abc import Callable

    Say = Callable[[str], object]


HARMFUL = (
    "open",
    "exec",
    "compile",
    "import",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "ctypes.dlopen",
    "marshal.",
    "pickle.",
)
"""Beginnings of the audit events that no loading of a file may raise, its own opening apart."""

LOG_OPENS = rule("open", "*", "log", always=True)


def set_faults(rules: str, record: str = "") -> None:
    """From now on these rules hold in this process."""
    ctypes.CDLL(None).faults_set(rules.encode(), record.encode())


def _acted() -> str:
    """The call on which a rule has acted; empty where none has."""
    acted = ctypes.CDLL(None).faults_acted
    acted.restype = ctypes.c_char_p
    return acted().decode()


def verdict(name: str, folder: Path) -> Any:
    """What a reader gets: the number of a state, None, or words for what is none."""
    try:
        return SUBJECTS[name].read(folder)
    except FileRefused as error:
        return f"refused: {error}"
    except (Mixture, OSError, KeyError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


class Verdicts:
    """Verdicts that are asked for again and again: the same files give the same one, whatever lies beside
    them under names of temporary files."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[tuple[str, bytes], ...], Any] = {}

    def of(self, folder: Path) -> Any:
        files = [path for path in sorted(folder.iterdir()) if not is_temporary(path.name)]
        key = tuple((path.name, path.read_bytes()) for path in files)
        if key not in self._known:
            self._known[key] = verdict(self._name, folder)
        return self._known[key]


def save(say: Say, request: dict[str, Any]) -> None:
    """One save under rules; says that it has returned."""
    set_faults(request["rules"], request["record"])
    SUBJECTS[request["subject"]].save(Path(request["folder"]), request["k"])
    set_faults("")
    say("saved")


def save_on(say: Say, request: dict[str, Any]) -> None:
    """Saves one state after the other; a line for each that has returned."""
    for k in itertools.count(request["k"]):
        SUBJECTS[request["subject"]].save(Path(request["folder"]), k)
        say("saved")


def endure(say: Say, request: dict[str, Any]) -> None:
    """A save under rules, and another one when the disk is well again.

    Says how each ended, and what it left.
    """
    folder = Path(request["folder"])
    for k, rules in ((request["k"], request["rules"]), (request["k"] + 1, "")):
        set_faults(rules)
        how = attempt(request["subject"], folder, k) | {"at": _acted()}
        set_faults("")
        how["found"], how["left"] = verdict(request["subject"], folder), sorted(os.listdir(folder))
        say(json.dumps(how))
    say(json.dumps(_open_files(folder)))


def attempt(name: str, folder: Path, k: int) -> dict[str, Any]:
    """A save, and how it ended: type, number and text of its error, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            SUBJECTS[name].save(folder, k)
        except (AsynccbError, OSError) as error:
            how = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        else:
            how = {"error": None, "errno": None, "text": ""}
    return how | {"warnings": [str(warning.message) for warning in caught]}


def read_plainly(say: Say, request: dict[str, Any]) -> None:
    """Reads a model file of state ``k`` as HDF5 is read, without looking at its seal. Says ``right``,
    ``wrong`` or ``refused``."""
    k, found = request["k"], []
    try:
        with h5py.File(request["path"]) as file:
            for name in ("layers", "optimizer"):
                file[name].visititems(
                    lambda place, it: found.append((place, it[()])) if isinstance(it, h5py.Dataset) else None
                )
    except (OSError, KeyError, ValueError, RuntimeError, TypeError):
        say('"refused"')
        return
    numbers = [array for place, array in found if place != "vars/1"]  # that is the learning rate
    right = len(numbers) == 13 and all((array == k).all() for array in numbers)
    say('"right"' if right else '"wrong"')


def load_watched(say: Say, request: dict[str, Any]) -> None:
    """Loads a file with little memory, and says what came of it, which other files were opened, what else
    Python was made to do, and how much memory was taken at most."""
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    events: list[str] = []
    sys.addaudithook(lambda event, values: events.append(f"{event} {values!r:.200}") if watched else None)
    watched, record = False, Path(request["record"])
    load_model(request["good"])  # what is imported late is imported now
    codecs.lookup("ascii")
    path = Path(request["path"])
    set_faults(LOG_OPENS, str(record))
    watched = True
    found = _load(path)
    watched = False
    set_faults("")
    opened = {call.path for call in read_record(record)} - {str(path)}
    record.unlink()
    done = [event for event in events if event.startswith(HARMFUL) and str(path) not in event]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(json.dumps({"found": found, "opened": sorted(opened), "done": done, "peak": peak}))


def _load(path: Path) -> str:
    try:
        load_model(path)
    except FileRefused as error:
        return f"refused: {error.why}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def read_all_plainly(say: Say, request: dict[str, Any]) -> None:
    """Reads everything in each file as HDF5 is read, and says which other files were opened."""
    record = Path(request["record"])
    for path in request["paths"]:
        set_faults(LOG_OPENS, str(record))
        with contextlib.suppress(OSError, KeyError), h5py.File(path) as file:
            for place in (hostile.KERNEL, "optimizer/more"):
                file.get(place, np.zeros(()))[()]
        set_faults("")
        say(json.dumps(sorted({call.path for call in read_record(record)} - {path})))
        record.unlink()


def load_mutants(say: Say, request: dict[str, Any]) -> None:
    """Loads mutants number ``numbers[0]`` to ``numbers[1] - 1`` of a file, each with a seal that fits.

    Says of each ``loaded``, ``refused``, or the error. One that takes too long ends the process.
    """
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    content, path = Path(request["content"]).read_bytes(), Path(request["folder"], "mutant.h5")
    for number in range(*request["numbers"]):
        hostile.resealed(path, hostile.mutant(content, random.Random(f"{request['seed']} {number}")))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        found = _load(path)
        say("refused" if found.startswith("refused: ") else found)


def train_without_rights(say: Say, request: dict[str, Any]) -> None:
    """Trains with a checkpoint, as a user whom modes hold. Says nothing where that cannot be had."""
    permissions.drop()
    if not permissions.passes_modes(Path(request["folder"])):
        say(json.dumps(permissions.trained(request["path"])))


def save_without_rights(say: Say, request: dict[str, Any]) -> None:
    """Saves as a user whom modes hold. Says nothing where that cannot be had."""
    permissions.drop()
    if not permissions.passes_modes(Path(request["folder"])):
        say(json.dumps(attempt(request["subject"], Path(request["path"]), request["k"])))


def _open_files(folder: Path) -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return [path for path in found if path.startswith(str(folder))]
