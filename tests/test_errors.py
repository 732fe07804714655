"""What errors say, and that each of them crosses processes."""

from __future__ import annotations

import copy
import errno
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import asynccb
from asynccb import (
    ArgumentError,
    AsynccbError,
    BackupIncomplete,
    CallbackBusy,
    CallbackError,
    CheckpointWriteError,
    FileRefused,
    FolderBusy,
    HookRefused,
    ModelBusy,
    ModelError,
    NotStarted,
    OrchestratorClosed,
    ResumeRefused,
    RunCancelled,
    SelfWait,
    TornState,
    Trainer,
    errors,
)
from asynccb.errors import in_words, nearest
from asynccb.testing import ScriptedModel

EXAMPLES: list[AsynccbError] = [
    ArgumentError("epochs", -1, "a whole number from 0 on", "Did you mean 1?"),
    HookRefused("Mine.on_epoch_end", in_words("on_epoch_end(self)"), "it takes (index, logs)"),
    ModelBusy("the model is already in run-1"),
    CallbackBusy("CSVLogger already serves run-1"),
    SelfWait("a hook waits for its own run"),
    NotStarted("run-1 is queued"),
    OrchestratorClosed("the orchestrator is closed"),
    TornState("half updated"),
    ModelError("the training raised StopIteration: 7"),
    CallbackError("CSVLogger#2", "on_epoch_end", 3),
    CallbackError("CSVLogger", "on_train_end"),
    RunCancelled("no more"),
    CheckpointWriteError("a.h5", OSError(errno.ENOSPC, "No space left on device")),
    BackupIncomplete(12, ["Slow (still busy)"]),
    FileRefused("a.h5", "it is damaged"),
    ResumeRefused("a.h5", ["seed: 1 there, 2 here"]),
    FolderBusy("runs/a", "run-1", 7, "host", "2026-11-27 08:00:00 UTC", "Delete it"),
    FolderBusy("runs/a"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_every_error_pickles_with_its_words_and_its_attributes(error: AsynccbError, protocol: int) -> None:
    other = pickle.loads(pickle.dumps(error, protocol))
    assert type(other) is type(error)
    assert str(other) == str(error)
    for name, value in vars(error).items():
        if name not in ("given", "cause"):
            assert getattr(other, name) == value
    again = pickle.loads(pickle.dumps(other))
    assert str(again) == str(error)
    assert str(copy.copy(error)) == str(error)


def test_there_is_an_example_of_every_error() -> None:
    every = {getattr(errors, name) for name in errors.__all__} - {AsynccbError, errors.Failure}
    assert {type(error) for error in EXAMPLES} == every


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (ArgumentError, ValueError),
        (HookRefused, ArgumentError),
        (FileRefused, ValueError),
        (ResumeRefused, ValueError),
        (CheckpointWriteError, OSError),
        (ModelBusy, RuntimeError),
        (CallbackBusy, RuntimeError),
        (FolderBusy, RuntimeError),
        (SelfWait, RuntimeError),
        (NotStarted, RuntimeError),
        (OrchestratorClosed, RuntimeError),
        (TornState, RuntimeError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind: type[Exception], also: type[Exception]) -> None:
    assert issubclass(kind, also)
    assert issubclass(kind, AsynccbError)


def test_a_cancelled_run_is_an_exception_and_no_cancelled_error() -> None:
    assert issubclass(RunCancelled, Exception)


def test_an_argument_error_names_argument_value_and_mend() -> None:
    error = ArgumentError("epochs", -1, "a whole number from 0 on", "Did you mean 1?")
    assert str(error) == "epochs=-1: a whole number from 0 on. Did you mean 1?"
    assert str(ArgumentError("x", in_words("shape (3, 4)"), "two samples")) == "x=shape (3, 4): two samples"


def test_a_busy_folder_names_folder_owner_process_and_mend() -> None:
    error = FolderBusy("runs/a", "run-1", 7, "host", "2026-11-27 08:00:00 UTC", "Or delete it")
    assert str(error) == (
        "runs/a is in use by run-1 (process 7 on host, since 2026-11-27 08:00:00 UTC). "
        "Wait until it has ended, or choose a folder of this run's own. Or delete it"
    )
    assert str(FolderBusy("runs/a")).startswith("runs/a is in use by another run. Wait")


def test_what_was_given_is_shown_shortened_and_need_not_pickle() -> None:
    given = threading.Lock()
    error = ArgumentError("x", given, "an array")
    assert error.given is given
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    long = ArgumentError("x", "y" * 1000, "short")
    assert len(str(long)) < 150
    assert "..." in str(long)
    array = ArgumentError("x", np.zeros((100, 100)), "smaller")
    assert len(str(array)) < 150


def test_a_callback_error_tells_callback_hook_epoch_and_cause() -> None:
    error = CallbackError("CSVLogger", "on_epoch_end", 3)
    assert str(error) == "CSVLogger.on_epoch_end of epoch 3 raised"
    error.__cause__ = OSError("disk full")
    assert str(error) == "CSVLogger.on_epoch_end of epoch 3 raised: OSError: disk full"
    assert str(CallbackError("CSVLogger", "on_train_end")) == "CSVLogger.on_train_end raised"


def test_a_checkpoint_write_error_keeps_the_number_of_its_cause() -> None:
    error = CheckpointWriteError("a.h5", OSError(errno.ENOSPC, "No space left on device"))
    assert error.errno == errno.ENOSPC
    assert pickle.loads(pickle.dumps(error)).errno == errno.ENOSPC
    assert str(error) == "could not write a.h5: [Errno 28] No space left on device"


def test_the_history_of_an_error_is_not_carried_over_a_pickle() -> None:
    history = object()
    for error in (CallbackError("A", "on_epoch_end", 0, history), RunCancelled("no more", history)):
        assert error.history is history
        assert pickle.loads(pickle.dumps(error)).history is None


@pytest.mark.asyncio
async def test_an_error_that_came_out_of_a_training_pickles_too() -> None:
    class Fails(asynccb.Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise ValueError(threading.Lock())  # this does not pickle

    with pytest.raises(CallbackError) as caught:
        await Trainer(ScriptedModel()).fit(np.zeros((1, 1)), verbose=0, callbacks=Fails())
    other = pickle.loads(pickle.dumps(caught.value))
    assert (other.callback, other.hook, other.epoch) == ("Fails", "on_epoch_end", 0)

    run = Trainer(ScriptedModel()).start(np.zeros((1, 1)), verbose=0)
    run.cancel("no more")
    with pytest.raises(RunCancelled) as cancelled:
        await run
    assert pickle.loads(pickle.dumps(cancelled.value)).reason == "no more"


def test_a_misspelt_name_is_answered_with_the_nearest_or_with_all() -> None:
    assert nearest("rleu", {"relu", "tanh"}) == 'Did you mean "relu"?'
    assert nearest("xyz", {"relu", "tanh"}) == "Known: relu, tanh"
