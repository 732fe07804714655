"""Checkpoints of the model: decided at the epoch, written beside the training."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from asynccb.callbacks.base import Callback
from asynccb.callbacks.batch_hook import add_batch_end
from asynccb.callbacks.file_template import FileTemplate
from asynccb.callbacks.monitor import Monitor, find_key
from asynccb.callbacks.retention import File, Retention
from asynccb.callbacks.say import say
from asynccb.errors import ArgumentError, nearest
from asynccb.protocols import QueueStatistics
from asynccb.storage.serial import SerialExecutor
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from asynccb.callbacks.base import SnapshotHandle

__all__ = ["ModelCheckpoint"]

# Guards the waiting save of every checkpoint callback, for a few attribute reads at a time. One for all,
# because a lock inside would keep the callback from being pickled.
_waiting_lock = threading.Lock()


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Save:
    """One file to be written. Until its writing starts, a newer state for its path may take its place."""

    path: str
    epoch: int
    snapshot: SnapshotHandle | None
    retention: Retention | None
    file: File | None


class ModelCheckpoint(Callback):
    """Saves the model at the ends of epochs, or every so many batches.

    Path, "is it the best" and the weights are those of the moment: they are decided and copied inline,
    between two batches. The file is written beside the training, to a temporary name first, so that its name
    shows the old file or the new one, whole. One save runs and one waits; a newer one takes the place of the
    waiting one if it has the same path (counted in :attr:`superseded`), otherwise the training waits for
    room. A save that fails raises :class:`~asynccb.CheckpointWriteError` as the callback's ``on_error`` says,
    and leaves the old file as it was.

    The path may have fields: ``weights.{epoch:02d}-{val_loss:.2f}.hdf5``. ``epoch`` counts from 1 in file
    names and in what is printed (the hooks count from 0), and so does ``batch``, which is there with a number
    as ``save_freq``; the other fields are keys of the logs, ``acc`` and ``accuracy`` meaning each other. The
    values lose what could lead out of the folder spelt out before the first field; missing folders are
    created.

    Before the first batch are refused: a malformed template, a folder that cannot be written, an existing
    folder as the path, an ending that the model says it has no format for, and an unknown field if no inline
    callback can still add that key; otherwise the first epoch's end (or the first batch's) refuses it. In an
    epoch without validation, a template or monitor that needs ``val_*`` skips, with one warning in a
    training.

    With ``save_best_only``, NaN is never the best, an equal value is not better, and only those epochs are
    looked at that ``period`` selects. If the monitored value is missing or is not one number, there is one
    warning, and the model is saved, as in Keras 3. ``best`` and the counts of ``period`` and ``save_freq``
    start anew with every training, and go on in one that is resumed.

    With ``keep_last`` and ``keep_best`` files are deleted when a newer one is durable, by the thread that
    writes: all but the newest ``keep_last``, or all but the best ``keep_best`` by ``monitor``; with both, a
    file stays that either of them keeps. The newest file always stays. Only files that this callback has
    written in this training, or in the one that it resumes, are deleted or counted: those of older trainings
    in the same folder are let alone, whatever their numbers. NaN is never among the best; files saved while
    the monitored value was missing stay, unless ``keep_last`` lets them go. What cannot be deleted is told in
    one RuntimeWarning, and tried again with the next file.

    Args:
        filepath: where to save.
        monitor: the value that tells the best.
        verbose: 1 prints a line for each decision and each finished save.
        save_best_only: save only if ``monitor`` has improved.
        save_weights_only: save without the configuration and the optimizer's state.
        mode: ``"min"``, ``"max"``, or ``"auto"``: what the model knows about the metric, else up for names
            with acc, auc, precision, recall, f1 or fmeasure as a word, else down.
        period: epochs from one save to the next.
        save_freq: ``"epoch"``, or the number of batches from one save to the next.
        initial_value_threshold: the best value so far, which the first save has to beat.
        keep_last: how many of the newest files to keep. Needs a path with fields. Default None.
        keep_best: how many of the best files to keep. Needs a path with fields. Default None: with neither,
            all files stay.

    Attributes:
        best: the best value of this training; the worst infinity until there is one.
        superseded: saves of this training that a newer one for the same path replaced before they were
            written.

    Raises:
        ArgumentError: a malformed template, a number out of range, both ``period`` and ``save_freq``, or a
            number of files to keep for a path that is always the same.
    """

    changes_model: ClassVar[bool] = False
    told_apart_by: ClassVar[tuple[str, ...]] = ("filepath", "monitor")
    mailbox_size: ClassVar[int] = 2

    epochs_since_last_save: int
    batches_since_last_save: int
    _retention: Retention | None

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        period: int = 1,
        *,
        save_freq: int | Literal["epoch"] = "epoch",
        initial_value_threshold: float | None = None,
        keep_last: int | None = None,
        keep_best: int | None = None,
    ) -> None:
        self._template = FileTemplate(filepath)
        self.filepath = self._template.text
        # Its own, so that a save waits for no other training's. The same for all trainings of the callback:
        # what a cancelled one still writes gets its name before a later save does.
        self._writer = SerialExecutor("asynccb checkpoint", background=True)
        self._monitor = Monitor(
            monitor,
            mode,
            owner="ModelCheckpoint",
            missing=f"Can {'save' if save_best_only else 'keep'} best model only with {{monitor}} available.",
        )
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.period = _at_least_one("period", period)
        self.save_freq = save_freq if save_freq == "epoch" else _at_least_one("save_freq", save_freq)
        if save_freq != "epoch" and period != 1:
            raise ArgumentError("period", period, "either period (epochs) or save_freq (batches), not both")
        self.initial_value_threshold = _threshold(initial_value_threshold)
        self.keep_last = self._number_to_keep("keep_last", keep_last)
        self.keep_best = self._number_to_keep("keep_best", keep_best)
        if save_freq != "epoch":
            add_batch_end(self, self._save_at_batch)
        self._reset(None)

    @property
    def best(self) -> float:
        return self._monitor.best

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        waits = self._waiting is not None and self._waiting() is not None
        return {"waiting saves": QueueStatistics(1, "supersede", int(waits), self.superseded)}

    def on_train_begin(self, logs: Any = None) -> Coroutine[Any, Any, None]:
        self._reset(self.run)
        self._refuse_unknown_fields()
        if self.run is not None:
            self.run.expect_copies()
            self._check_ending()
        return self._prepare()

    def _check_ending(self) -> None:
        try:
            self.run.check_path(self._template.shape, weights_only=self.save_weights_only)
        except ArgumentError as error:
            if error.argument != "path":
                raise
            raise ArgumentError("filepath", self.filepath, error.allowed, error.fix) from None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Coroutine[Any, Any, None] | None:
        if self.save_freq != "epoch":
            return None
        values = {**(logs or {}), "epoch": epoch + 1}
        lacking = self._lacks_validation(values)
        self._refuse_missing_fields(values, lacking)
        self.epochs_since_last_save += 1
        if self.epochs_since_last_save < self.period:
            return None
        self.epochs_since_last_save = 0
        if lacking:
            self._say_unvalidated(lacking)
            return None
        return self._decide(epoch, values)

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self._monitor.state_dict(),
            "epoch": self._epoch,
            "epochs_since_last_save": self.epochs_since_last_save,
            "batches_since_last_save": self.batches_since_last_save,
            "superseded": self.superseded,
            "said": [self._said_unvalidated, self._said_not_a_number],
            "fields_were_there": self._fields_were_there,
            "files": [] if self._retention is None else self._retention.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._monitor.load_state_dict(state["monitor"])
        self._epoch = int(state["epoch"])
        self.epochs_since_last_save = int(state["epochs_since_last_save"])
        self.batches_since_last_save = int(state["batches_since_last_save"])
        self.superseded = int(state["superseded"])
        self._said_unvalidated, self._said_not_a_number = map(bool, state["said"])
        self._fields_were_there = bool(state["fields_were_there"])
        if self._retention is not None:
            self._retention.load_state_dict(state["files"], self._template.gives)

    async def sync(self) -> None:
        """Every save decided so far is durable: each was awaited before this."""

    def _save_at_batch(self, batch: int, logs: Any = None) -> Coroutine[Any, Any, None] | None:
        values = {**(logs or {}), "epoch": self._epoch + 1, "batch": batch + 1}
        self._refuse_missing_fields(values, [])
        self.batches_since_last_save += 1
        if self.batches_since_last_save < int(self.save_freq):
            return None
        self.batches_since_last_save = 0
        return self._decide(self._epoch, values)

    def _reset(self, run: Any) -> None:
        self._monitor.reset(run, self.initial_value_threshold)
        self.epochs_since_last_save = 0
        self.batches_since_last_save = 0
        self.superseded = 0
        self._epoch = 0
        self._fields_were_there = False
        self._said_unvalidated = self._said_not_a_number = self._said_undeleted = False
        # A new one for each training: what a cancelled one still writes is no file of the next one.
        keeps_all = self.keep_last is None and self.keep_best is None
        self._retention = None if keeps_all else Retention(self.keep_last, self.keep_best)
        # Weak: a coroutine that is closed before it ran must take its snapshot with it.
        self._waiting: weakref.ref[_Save] | None = None

    def _refuse_unknown_fields(self) -> None:
        params = self.params or {}
        # Inline batch hooks may add keys to batch logs, so with batches the first one tells.
        if self.save_freq != "epoch" or params.get("log_keys_open", True) or not params.get("metrics"):
            return
        names = [str(name) for name in params["metrics"]]
        validated = [f"val_{name}" for name in ("loss", *names)] if params.get("do_validation") else []
        known = {"epoch", "loss", *names, *validated}
        self._refuse(self._template.missing(known), known)

    def _refuse_missing_fields(self, values: Mapping[str, Any], excused: list[str]) -> None:
        """At every epoch or batch, also those without a save, until all fields have been there once."""
        if not self._fields_were_there:
            missing = self._template.missing(values)
            self._refuse([name for name in missing if name not in excused], values)
            self._fields_were_there = not missing

    async def _prepare(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, self._template.prepare)

    def _refuse(self, missing: list[str], known: Any) -> None:
        if missing:
            fields = ", ".join(f"{{{name}}}" for name in missing)
            there = ", ".join(printable(name) for name in known)
            raise ArgumentError(
                "filepath",
                self.filepath,
                f"{fields} is not in the logs, which have {there}",
                nearest(missing[0], known),
            )

    def _lacks_validation(self, values: Mapping[str, Any]) -> list[str]:
        """The values that are needed and not there because only other epochs were validated."""
        if not self._unvalidated(values):
            return []
        needed = [*self._template.names, *([self.monitor] if self.save_best_only else [])]
        return [name for name in needed if name.startswith("val_")]

    def _unvalidated(self, values: Mapping[str, Any]) -> bool:
        validates = (self.params or {}).get("do_validation")
        return bool(validates) and not any(name.startswith("val_") for name in values)

    def _say_unvalidated(self, lacking: list[str]) -> None:
        if not self._said_unvalidated:
            self._said_unvalidated = True
            warnings.warn(
                f"ModelCheckpoint skips epochs without validation, which have no {printable(lacking[0])}.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _decide(self, epoch: int, values: Mapping[str, Any]) -> Coroutine[Any, Any, None] | None:
        path = self._template.fill(values)
        value = self._monitored(values) if self.save_best_only or self.keep_best else None
        what = self._reason_to_save(value)
        if self.verbose and what is not None:
            say(f"\nEpoch {epoch + 1}: {what}saving model to {printable(path)}")
        elif self.verbose:
            say(f"\nEpoch {epoch + 1}: {printable(self.monitor)} did not improve from {self._shown_best()}")
        return None if what is None else self._hand_over(path, epoch, value)

    def _monitored(self, values: Mapping[str, Any]) -> float | None:
        """The monitored value; None, told once, where it is missing or not one number."""
        try:
            value = self._monitor.value(values)
        except ArgumentError:
            self._say_not_a_number(values)
            return None
        excused = self.save_freq == "epoch" and self.monitor.startswith("val_") and self._unvalidated(values)
        if value is None and not excused:
            self._monitor.warn_missing(values)
        return value

    def _reason_to_save(self, value: float | None) -> str | None:
        """Words that tell why to save, empty where there is nothing to tell, or None: not now."""
        if not self.save_best_only or value is None:
            return ""
        before = self._shown_best()
        if not self._monitor.improved(value):
            return None
        return f"{printable(self.monitor)} improved from {before} to {value:.5f}, "

    def _say_not_a_number(self, values: Mapping[str, Any]) -> None:
        if not self._said_not_a_number:
            self._said_not_a_number = True
            given = values[find_key(self.monitor, values) or self.monitor]
            warnings.warn(
                "Can save best model only when `monitor` is a scalar value. "
                f"Received: {printable(str(given))}. Falling back to `save_best_only=False`.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _shown_best(self) -> str:
        worst = math.inf if self._monitor.direction == "min" else -math.inf
        return "None" if self.best == worst else f"{self.best:.5f}"

    def _hand_over(self, path: str, epoch: int, value: float | None) -> Coroutine[Any, Any, None] | None:
        waiting, older = self._take_waiting(path)
        if older is not None and older.alone and not self.run.room_for_copy(self):
            older.release()  # else the training would wait for the save that runs, to replace one that waits
            older = None
        try:
            snapshot = self._snapshot(pooled=True)
        except BaseException:
            if waiting is not None:
                waiting.snapshot = older
            raise
        if older is not None:
            older.release()
        with _waiting_lock:
            if waiting is not None and self._waiting is not None and self._waiting() is waiting:
                # The coroutine that was handed over for the waiting save writes this state instead.
                waiting.snapshot, waiting.epoch = snapshot, epoch
                if waiting.file is not None:
                    waiting.file.value = value
                self.superseded += 1
                return None
            kept = self._retention
            save = _Save(path, epoch, snapshot, kept, None if kept is None else kept.decide(path, value))
            self._waiting = weakref.ref(save)
        return self._write(save)

    def _take_waiting(self, path: str) -> tuple[_Save | None, SnapshotHandle | None]:
        """The waiting save, if it is for ``path``, and what it was to write: its coroutine, should it come
        now, finds nothing to do."""
        with _waiting_lock:
            waiting = None if self._waiting is None else self._waiting()
            if waiting is None or waiting.path != path:
                return None, None
            older, waiting.snapshot = waiting.snapshot, None
            return waiting, older

    async def _write(self, save: _Save) -> None:
        with _waiting_lock:  # from here on nobody replaces what is written
            if self._waiting is not None and self._waiting() is save:
                self._waiting = None
            snapshot = save.snapshot
        if snapshot is None:  # a newer state for this path was taken just now, and has a coroutine of its own
            self._give_up(save)
            return
        writing = self._writer.submit(self._write_now, save, snapshot)
        # Released by the writer and not here: when this task is cancelled, the thread may still read the
        # arrays.
        writing.add_done_callback(lambda _: snapshot.release())
        undeleted = await asyncio.wrap_future(writing)
        if self.run is not None:
            self.run.announce_saved(save.path, save.epoch)
        if undeleted is not None and not self._said_undeleted:
            self._said_undeleted = True
            text = f"ModelCheckpoint cannot delete {undeleted.filename}: {undeleted.strerror}"
            warnings.warn(printable(text), RuntimeWarning, stacklevel=2)

    def _write_now(self, save: _Save, snapshot: SnapshotHandle) -> OSError | None:
        """Answers why a file that need not stay could not be deleted."""
        try:
            if os.path.dirname(save.path) != self._template.folder:
                self._template.make_room(save.path)
            snapshot.save(save.path, weights_only=self.save_weights_only)
        except BaseException:
            self._give_up(save)
            raise
        if self.verbose:
            say(f"\nEpoch {save.epoch + 1}: finished saving model to {printable(save.path)}")
        if save.retention is None or save.file is None:
            return None
        return save.retention.wrote(save.file, self._monitor.direction)

    def _give_up(self, save: _Save) -> None:
        if save.retention is not None and save.file is not None:
            save.retention.gave_up(save.file)

    def _number_to_keep(self, argument: str, given: int | None) -> int | None:
        if given is not None and not self._template.names:
            raise ArgumentError(argument, given, f"{self.filepath} is one file: there is nothing to keep")
        return None if given is None else _at_least_one(argument, given)


def _at_least_one(argument: str, given: object) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        allowed = "an integer of at least 1" + (', or "epoch"' if argument == "save_freq" else "")
        raise ArgumentError(argument, given, allowed)
    return given


def _threshold(given: float | None) -> float | None:
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise ArgumentError("initial_value_threshold", given, "a number, or None")
    return value
