"""The names that users type. Adding or removing one changes this file, so that it is never an accident."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING

import pytest

import asynccb

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC = [
    "ArgumentError",
    "AsynccbError",
    "BackupIncomplete",
    "Callback",
    "CallbackBusy",
    "CallbackError",
    "CheckpointWriteError",
    "Failure",
    "FileRefused",
    "FolderBusy",
    "Gap",
    "History",
    "HookRefused",
    "ModelBusy",
    "ModelError",
    "NotStarted",
    "Orchestrator",
    "OrchestratorClosed",
    "ResumeRefused",
    "Resumed",
    "Run",
    "RunCancelled",
    "SelfWait",
    "Snapshot",
    "TornState",
    "Trainer",
]

CALLBACKS = [
    "BackupAndRestore",
    "BaseLogger",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "LearningRateScheduler",
    "ModelCheckpoint",
    "Offload",
    "ProgbarLogger",
    "ReduceLROnPlateau",
    "RemoteMonitor",
    "SwapEMAWeights",
    "TensorBoard",
    "TerminateOnNaN",
]

ROOMS = [
    "asynccb",
    "asynccb.callbacks",
    "asynccb.errors",
    "asynccb.events",
    "asynccb.models",
    "asynccb.testing",
]


def test_the_package_offers_exactly_these_names() -> None:
    assert asynccb.__all__ == PUBLIC


def test_the_callbacks_are_exactly_these() -> None:
    assert importlib.import_module("asynccb.callbacks").__all__ == CALLBACKS


def test_the_version_has_three_numbers_and_its_line_in_the_changelog(root: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", asynccb.__version__)
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{asynccb.__version__}]" in changelog


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_sorted_and_every_name_is_there(room: str) -> None:
    def order(name: str) -> tuple[bool, bool, str]:
        """That of the linter: CONSTANTS, Classes, functions."""
        return not name.isupper(), not name[0].isupper(), name

    module = importlib.import_module(room)
    assert module.__all__ == sorted(set(module.__all__), key=order)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_complete(room: str) -> None:
    """What is defined here, or brought here by a package, and has no underscore, is announced."""
    module = importlib.import_module(room)
    is_package = hasattr(module, "__path__")

    def belongs(thing: object) -> bool:
        home = getattr(thing, "__module__", None) or ""
        return home.startswith(f"{room}.") if is_package else home == room

    things = {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and inspect.isclass(thing) and belongs(thing)
    }
    assert sorted(set(things) - set(module.__all__)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_docstring_of_its_own(room: str) -> None:
    module = importlib.import_module(room)
    things = {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    silent = [
        name
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isroutine(thing))
        # A NamedTuple that says nothing gets "Name(field, field)" from Python.
        and (
            not vars(thing).get("__doc__", thing.__doc__)
            or re.fullmatch(rf"{name}\(.*\)", thing.__doc__ or "")
        )
    ]
    assert silent == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_importable_from_the_module_that_it_names(room: str) -> None:
    """``__module__`` is what pickles and tracebacks say: it is ours, and leads back to the same object."""
    module = importlib.import_module(room)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__module__.partition(".")[0] == "asynccb", name
            assert getattr(importlib.import_module(thing.__module__), thing.__name__) is thing, name
