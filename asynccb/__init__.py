"""Await a training: asyncio-based concurrent training with callbacks that never make a batch wait.

::

            orchestrator ── budget                      many trainings · what is process-wide
                 │
    trainer ── run ── session ── driver ── ending       owns one training: its task, its thread, its end
       ┌─────────┼──────────────────┐
    engines     bus            callbacks/*              who drives · who delivers · who reacts
       │      dispatch, mailbox,    │
       │      delivery, readers   storage               atomic files, HDF5
       │         │
    training: loop, feed, prefetch, snapshot, control   what happens on the training thread
       │
     models ── storage                                  Sequential, adapters
          protocols · events · errors · text            the ground floor

Arrows only go down. A batch ends in ``training/loop.py``; the loop tells its host; the dispatcher runs the
inline hooks, in order, on the same thread, and puts the event into the mailbox of each callback that wants
it; each callback's consumer works at its own pace on the event loop. Only ``training/control.py`` goes
uphill: stop, pause, cancel and snapshot requests.

Importing this package starts nothing, installs no signal handler, configures no logging and imports no
framework.
"""

from asynccb.callbacks.base import Callback
from asynccb.callbacks.history import History
from asynccb.errors import (
    ArgumentError,
    AsynccbError,
    BackupIncomplete,
    CallbackBusy,
    CallbackError,
    CheckpointWriteError,
    Failure,
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
)
from asynccb.events import Gap
from asynccb.orchestrator import Orchestrator
from asynccb.resume import Resumed
from asynccb.run import Run
from asynccb.trainer import Trainer
from asynccb.training.snapshot import Snapshot

__version__ = "0.1.0"

__all__ = [
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
