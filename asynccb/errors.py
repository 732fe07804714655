"""Every exception of this package, drawn first.

::

    AsynccbError
    ├── ArgumentError           (ValueError)    refused before the first batch: what was given and is allowed
    │   └── HookRefused                         a callback's hook cannot be called as it stands
    ├── ModelBusy               (RuntimeError)  the model is in another training
    ├── CallbackBusy            (RuntimeError)  the callback is in another training
    ├── FolderBusy              (RuntimeError)  another run writes into the folder
    ├── OrchestratorClosed      (RuntimeError)  it is not open, or takes no more trainings
    ├── SelfWait                (RuntimeError)  a hook waits for its own run
    ├── NotStarted              (RuntimeError)  the run is still queued
    ├── TornState               (RuntimeError)  the model raised inside a batch: half updated weights
    ├── ModelError                              the model raised what cannot cross an ``await``
    ├── CallbackError                           a beside-hook raised, and its ``on_error`` is "raise"
    ├── RunCancelled                            somebody else cancelled the run that you await
    ├── CheckpointWriteError    (OSError)       a file could not be written; the old one is untouched
    ├── BackupIncomplete                        a callback did not report its state for a backup in time
    ├── FileRefused             (ValueError)    a file that is damaged or not safe to load
    └── ResumeRefused           (ValueError)    the training is not the one that the backup is of

The model's own exception is never wrapped, ModelError's three kinds apart: ``fit`` raises it as it is. All of
these pickle, so that they can cross processes: each is rebuilt from the arguments of its constructor.
"""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "AsynccbError",
    "BackupIncomplete",
    "CallbackBusy",
    "CallbackError",
    "CheckpointWriteError",
    "Failure",
    "FileRefused",
    "FolderBusy",
    "HookRefused",
    "ModelBusy",
    "ModelError",
    "NotStarted",
    "OrchestratorClosed",
    "ResumeRefused",
    "RunCancelled",
    "SelfWait",
    "TornState",
]


class AsynccbError(Exception):
    """The root of all errors of this package."""


class ArgumentError(AsynccbError, ValueError):
    """An argument was refused before the first batch.

    Args:
        argument: the name that the caller typed.
        given: what was given; shown shortened.
        allowed: what is allowed, in words.
        fix: the likely mend; empty where there is none to guess.
    """

    def __init__(self, argument: str, given: object, allowed: str, fix: str = "") -> None:
        super().__init__(argument, given, allowed, fix)
        self.argument = argument
        self.given = given
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        shown = self.given if isinstance(self.given, _Words) else _shorten(repr(self.given))
        return f"{self.argument}={shown}: {self.allowed}" + (f". {self.fix}" if self.fix else "")

    def __reduce__(self) -> tuple[Any, ...]:
        # What was given need not pickle (a lock, a socket); what the user reads of it does.
        shown = _Words(self.given if isinstance(self.given, _Words) else _shorten(repr(self.given)))
        return type(self), (self.argument, shown, self.allowed, self.fix)


class _Words(str):
    """What was given, already in words; shown without quotes."""

    __slots__ = ()


def in_words(text: str) -> str:
    """Marks ``text`` as a description for ArgumentError's ``given``, to be shown as it is: ``x=shape (3,
    4)``."""
    return _Words(text)


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest(word: object, known: Iterable[str]) -> str:
    """``Did you mean "relu"?`` for a misspelt name, or the list of the known names where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f'"{name}"' for name in close) + "?"
    return "Known: " + ", ".join(names)


def said(error: BaseException) -> str:
    """``TypeName: message`` of any exception. A ``__str__`` that raises must not end the thread or the task
    that tells of the error: the run would never end."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as unprintable:
        return f"{type(error).__name__} (its text raised {type(unprintable).__name__})"


class HookRefused(ArgumentError):
    """A hook of a callback has the wrong signature, mixes ``def`` and ``async def``, or is an async
    generator."""


class ModelBusy(AsynccbError, RuntimeError):
    """The model is in a training that is under way; the message says what to use meanwhile."""


class CallbackBusy(AsynccbError, RuntimeError):
    """The callback serves another run that is under way; one instance serves one run at a time."""


class FolderBusy(AsynccbError, RuntimeError):
    """Another run owns the folder: what it writes and removes there must not be mixed with a second run's.

    Attributes:
        folder: the folder.
        owner: who has it, in its own words; empty where it has not said so yet.
        pid: number of its process, None where it is not known; on ``host``.
        host: name of the host.
        since: when it took the folder, in words.
        fix: what else can be done; empty where waiting or another folder is all.
    """

    def __init__(
        self,
        folder: str,
        owner: str = "",
        pid: int | None = None,
        host: str = "",
        since: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(folder, owner, pid, host, since, fix)
        self.folder, self.owner, self.pid = folder, owner, pid
        self.host, self.since, self.fix = host, since, fix

    def __str__(self) -> str:
        who = self.owner or "another run"
        if self.pid is not None:
            who += f" (process {self.pid} on {self.host}, since {self.since})"
        text = (
            f"{self.folder} is in use by {who}. Wait until it has ended, or choose a folder of this run's own"
        )
        return f"{text}. {self.fix}" if self.fix else text


class OrchestratorClosed(AsynccbError, RuntimeError):
    """An orchestrator takes trainings inside of its block, and only as long as they are not cancelled."""


class SelfWait(AsynccbError, RuntimeError):
    """A hook or an async source of a run awaited that run, which waits for the hook: neither would ever
    end."""


class NotStarted(AsynccbError, RuntimeError):
    """The run is still queued; it has no state to copy yet."""


class TornState(AsynccbError, RuntimeError):
    """The model raised inside a batch, so that its weights may be half updated; no snapshot is taken of
    them."""


class ModelError(AsynccbError):
    """The model raised StopIteration, GeneratorExit or a CancelledError of its own.

    These three mean something to ``await`` itself, so they are wrapped; ``__cause__`` is the original. Every
    other exception of a model reaches the caller of ``fit`` unchanged.
    """


class CallbackError(AsynccbError):
    """A beside-hook of a callback raised; ``__cause__`` is what it raised.

    Attributes:
        callback: the callback's name (a string, so that the error pickles).
        hook: the hook's name, such as ``"on_epoch_end"``.
        epoch: 0-based epoch, or None outside of epochs.
        history: the History of the run so far; not carried over a pickle.
    """

    def __init__(self, callback: str, hook: str, epoch: int | None = None, history: Any = None) -> None:
        super().__init__(callback, hook, epoch)
        self.callback = callback
        self.hook = hook
        self.epoch = epoch
        self.history = history

    def __str__(self) -> str:
        at = "" if self.epoch is None else f" of epoch {self.epoch}"
        cause = "" if self.__cause__ is None else f": {said(self.__cause__)}"
        return f"{self.callback}.{self.hook}{at} raised{cause}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.callback, self.hook, self.epoch)


class RunCancelled(AsynccbError):
    """The awaited run was cancelled, though not this task.

    An Exception and not a CancelledError: a task that only watches a run must not vanish silently because
    another handler cancelled the training.

    Attributes:
        reason: the words given to ``run.cancel(reason)``.
        history: the History up to the cancel; not carried over a pickle.
    """

    def __init__(self, reason: str, history: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.history = history

    def __str__(self) -> str:
        return f"the training was cancelled: {self.reason}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason,)


class CheckpointWriteError(AsynccbError, OSError):
    """A file could not be written. The file that stood there before is untouched, the temporary one is
    removed.

    Attributes:
        path: the name that was to be written.
        cause: the error underneath; its ``errno``, if any, is this error's ``errno`` too.
    """

    def __init__(self, path: str | os.PathLike[str], cause: BaseException) -> None:
        super().__init__(getattr(cause, "errno", None), f"could not write {os.fspath(path)}: {cause}")
        self.path = os.fspath(path)
        self.cause = cause

    def __str__(self) -> str:
        return f"could not write {self.path}: {self.cause}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.cause)


class BackupIncomplete(AsynccbError):
    """A backup was given up, because what belongs into it did not come; the one before it stands.

    Attributes:
        missing: the names of the callbacks that have not reported, each with what is known of it.
    """

    def __init__(self, step: int, missing: list[str]) -> None:
        super().__init__(step, missing)
        self.step = step
        self.missing = missing

    def __str__(self) -> str:
        return f"the backup of step {self.step} was given up: nothing came from {', '.join(self.missing)}"


class ResumeRefused(AsynccbError, ValueError):
    """A training was not resumed, because it is not the one that the backup is of; nothing was changed.

    Attributes:
        path: the backup.
        differences: one line for each.
    """

    def __init__(self, path: str | os.PathLike[str], differences: list[str]) -> None:
        super().__init__(os.fspath(path), differences)
        self.path = os.fspath(path)
        self.differences = differences

    def __str__(self) -> str:
        listed = "".join(f"\n  {difference}" for difference in self.differences)
        return (
            f"{self.path} is the backup of another training:{listed}\n"
            "Make them equal to go on from it, or give another folder (or resume=False) to start anew"
        )


class FileRefused(AsynccbError, ValueError):
    """A file was not loaded because it is damaged, of another format, or not safe to load."""

    def __init__(self, path: str | os.PathLike[str], why: str) -> None:
        super().__init__(os.fspath(path), why)
        self.path = os.fspath(path)
        self.why = why

    def __str__(self) -> str:
        return f"{self.path} was not loaded: {self.why}"


class Failure(NamedTuple):
    """One line of ``history.failures``: the first failure of one hook of one callback, and how often it
    came."""

    callback: str
    hook: str
    epoch: int | None
    exception: BaseException
    times: int = 1
