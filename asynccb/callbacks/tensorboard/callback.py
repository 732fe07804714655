"""TensorBoard: scalars, weights and the graph of a training, in files that real TensorBoard reads."""

from __future__ import annotations

import importlib.util
import numbers
import os
import time
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from asynccb.callbacks.base import Callback
from asynccb.callbacks.batch_hook import add_batch_end
from asynccb.callbacks.tensorboard.embeddings import KEPT, Projector, chosen_layers
from asynccb.callbacks.tensorboard.graph import graph_of
from asynccb.callbacks.tensorboard.job import Sideline
from asynccb.callbacks.tensorboard.layers import activations, first_part, gradients, weights
from asynccb.callbacks.tensorboard.records import BATCH_PREFIX, scalars
from asynccb.callbacks.tensorboard.records import graph as graph_record
from asynccb.callbacks.tensorboard.records import opening as opening_record
from asynccb.callbacks.tensorboard.records import start as start_record
from asynccb.callbacks.tensorboard.resumed import Place, cut_back, files_of, is_root
from asynccb.callbacks.tensorboard.writer import EventFile, EventWriter
from asynccb.errors import ArgumentError
from asynccb.protocols import QueueStatistics
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence

    from asynccb.callbacks.base import OnError, SnapshotHandle
    from asynccb.callbacks.tensorboard.layers import Part

__all__ = ["TensorBoard"]

SHIP_EVERY = 1.0
"""Seconds between two writes of batch scalars."""
ROWS = 2**16
"""Batches whose scalars may wait for the disk."""
_TOGETHER = 2**20
"""Bytes of histograms and images that are written at a time."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Look:
    """Something to be done with a snapshot beside the training."""

    take: Callable[[], None]
    snapshot: SnapshotHandle


class TensorBoard(Callback):
    """Writes what ``tensorboard --logdir <log_dir>`` shows.

    Scalars: one for each number in an epoch's logs, ``lr`` and what other inline hooks add included; the tag
    is the key, the step the 0-based epoch. The graph: the model's layers.

    Histograms, every ``histogram_freq`` epochs, of the model as it was at the end of the epoch: of each
    weight, tagged with its name (``dense/kernel``); of each layer's outputs (``dense_out``) and, with
    ``write_grads``, of each weight's gradients (``dense/kernel_grad``). The last two are computed anew on a
    copy of the model, over the first 256 samples of the validation data, or those of them that make up
    16 MiB, ``batch_size`` samples at a time (more, where all their outputs have not over 4 MiB); a gradient
    is that of ``batch_size`` samples, and all are counted. Without validation data, with data that are no
    arrays, and for models without ``activations()`` and ``gradients()``, there are those of weights only, and
    one RuntimeWarning. Images: of the weights (``dense/kernel/image/0``).

    Embeddings, every ``embeddings_freq`` epochs: the tables of the layers, for the projector. Each save is a
    tensor of its own there, ``<layer>.ckpt-<0-based epoch>``; the last five are kept. A folder has one
    projector: of several trainings in one ``log_dir`` it shows the one that saved last.

    Each fit writes one new file, whose name no other training has, so that many trainings may share
    ``log_dir``; TensorBoard then shows them as one run. Give each its own folder to tell them apart. A
    training that is resumed writes a new file too, named after its first one. What the older files have of
    steps that come again is cut off before the first batch, and the new one begins with the record of a
    session that starts there, so that no step is shown twice and none is missing. (Readers drop by that
    record whatever else lies in the folder with such steps: one more reason for a folder of its own.)

    When an epoch's awaitable is done, its scalars are with the operating system, so that a kill loses none;
    they are forced onto the disk with the first write after a second, and at the end. Histograms, images and
    embeddings are made on a thread of their own, one epoch's at a time, and are there when the training is
    over. No batch waits for any of it. While one epoch's are still being made or written, or both places for
    copies of the model are taken (by checkpoints that a slow disk holds up), those of the next are left out,
    counted in ``skipped``. When the disk fails, or does not answer for 60 s, the error is
    raised once, the training goes on (``on_error`` is "warn"), and later writes are counted in ``dropped``.

    Args:
        log_dir: folder of the file, made where it is missing. Default ``"./logs"``.
        histogram_freq: histograms every so many epochs, from the first; 0 (default): none.
        write_graph: write the model's graph, if it is a row of layers with ``get_config()``. Default True.
        write_grads: gradients too, in the epochs of ``histogram_freq``. Default False.
        write_images: the weights as images too, in the epochs of ``histogram_freq``. Needs Pillow. Default
            False.
        embeddings_freq: embeddings every so many epochs, from the first; 0 (default): none.
        embeddings_layer_names: layers whose first weight is saved. Default None, or an empty list: every
            ``Embedding`` layer; a RuntimeWarning if there is none.
        embeddings_metadata: a file for all these layers, or a dict from layer to file; a file has a line for
            each row of the table. Looked up in ``log_dir``, else from the working folder; copied where the
            projector could not reach it. Default None.
        batch_size: samples that a gradient is computed over, and activations at a time. Default 32.
        update_freq: ``"epoch"`` (default), ``"batch"``, or a number n: the logs of every n-th batch too,
            tagged ``batch_<key>``, at the count of batches trained. They reach the disk about once a second
            and at the end of each epoch; while 65,536 wait for it, those of further batches are left out.

    Attributes:
        path: the file of this training, once it has begun.
        dropped: writes that were not done because an earlier one had failed.
        skipped: epochs without histograms and embeddings because earlier ones were still being made.

    Raises:
        ArgumentError: (a ValueError) an argument out of range, ``write_grads`` or ``write_images`` without
            ``histogram_freq``, images without Pillow; when the training starts, an unknown layer, or a
            metadata file that is not there or has not one line for each row.
    """

    changes_model: ClassVar[bool] = False
    told_apart_by: ClassVar[tuple[str, ...]] = ("log_dir",)
    on_error: ClassVar[OnError] = "warn"

    path: str | None = None
    skipped = 0
    _root: str | None = None
    _writer: EventWriter | None = None
    _projector: Projector | None = None
    _part: Part | None = None

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "./logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_grads: bool = False,
        write_images: bool = False,
        embeddings_freq: int = 0,
        embeddings_layer_names: list[str] | None = None,
        embeddings_metadata: dict[str, str] | str | None = None,
        *,
        batch_size: int = 32,
        update_freq: Literal["epoch", "batch"] | int = "epoch",
    ) -> None:
        self.log_dir = os.fspath(log_dir)
        self.histogram_freq = _epochs("histogram_freq", histogram_freq)
        self.write_graph = write_graph
        self.write_grads = write_grads
        self.write_images = write_images
        self.embeddings_freq = _epochs("embeddings_freq", embeddings_freq)
        self.embeddings_layer_names = embeddings_layer_names
        self.embeddings_metadata = embeddings_metadata
        self.batch_size = _samples(batch_size)
        self.update_freq = update_freq
        self._refuse_what_cannot_be()
        self._every = _batches(update_freq)
        if self._every:
            add_batch_end(self, self.record_batch)

    @property
    def dropped(self) -> int:
        return 0 if self._writer is None else self._writer.dropped

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        if self._writer is None:
            return {}
        waiting = max(0, self._rows_taken - self._rows_done)
        return {
            "batches": QueueStatistics(ROWS, "drop_newest", waiting, self._rows_dropped),
            "histograms": QueueStatistics(1, "skip", int(self._sideline.busy), self.skipped),
        }

    def on_train_begin(self, logs: Any = None) -> Coroutine[Any, Any, None]:
        self.skipped = 0
        self._batches = 0
        self._next_epoch = 0
        self._pending: list[tuple[int, float, Mapping[str, Any]]] = []
        self._ship_at = 0.0
        # Rows of batches taken, by the training, and done with, by the loop: each has a number of its own.
        self._rows_taken = self._rows_done = self._rows_dropped = 0
        self._handed_over: weakref.ref[_Look] | None = None
        self._sideline = Sideline("asynccb tensorboard histograms")
        self._writer = self._projector = self._root = None
        self._opening: list[bytes] = []
        self._saved_at: list[int] = []
        self._resumed = getattr(self.run, "resumed", None)
        self._chosen = self._embeddings(os.path.abspath(self.log_dir)) if self.embeddings_freq else []
        self._part = self._part_to_look_at() if self.histogram_freq else None
        if self.run is not None and (self.histogram_freq or self._chosen):
            self.run.expect_copies()
        if self._resumed is None:
            # Opened inline, so that a folder that cannot be written fails the training before its first
            # batch. In a resumed training it is load_state_dict that opens.
            self._open(None)
        return self._begin()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Coroutine[Any, Any, None]:
        logs = {} if logs is None else logs  # not `or`: what is empty now may be filled by later callbacks
        wall_time = time.time()
        self._next_epoch = epoch + 1
        self._open_late()
        return self._write_epoch(
            epoch, wall_time, logs, self._take_pending(), self._look_inside(epoch, wall_time)
        )

    def on_train_end(self, logs: Any = None) -> Coroutine[Any, Any, None]:
        return self._end(self._take_pending())

    def record_batch(self, batch: int, logs: Any = None) -> Coroutine[Any, Any, None] | None:
        """The batch hook of ``update_freq``; a subclass with a hook of its own calls it from there."""
        self._batches += 1
        if self._batches % self._every:
            return None
        self._open_late()
        if self._rows_taken - self._rows_done < ROWS:
            self._rows_taken += 1
            self._pending.append((self._batches, time.time(), {} if logs is None else logs))
        else:
            self._rows_dropped += 1
        if not self._pending or time.monotonic() < self._ship_at:
            return None
        self._ship_at = time.monotonic() + SHIP_EVERY
        return self._write_batches(self._take_pending())

    def state_dict(self) -> dict[str, Any]:
        # Nothing of the file but its name: the coroutines that write it may be anywhere.
        return {
            "root": self._root,
            "epoch": self._next_epoch,
            "batches": self._batches,
            "pending": [[step, wall_time, dict(logs)] for step, wall_time, logs in self._pending],
            "embeddings": self._saved_at,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next_epoch = int(state["epoch"])
        self._batches = int(state["batches"])
        self._pending = [(int(step), float(wall_time), logs) for step, wall_time, logs in state["pending"]]
        self._saved_at = list(state["embeddings"])
        self.skipped = int(state["skipped"])
        self._open(state["root"] if is_root(state["root"]) else None)

    async def sync(self) -> None:
        await self._sideline.idle()  # its histograms are of epochs that do not come again
        if self._writer is not None:
            await self._writer.sync()

    def _open(self, root: str | None) -> None:
        """The file of this process. Blocks.

        Args:
            root: what the name of the first file ends in, of the training that is resumed.
        """
        folder = os.path.abspath(self.log_dir)
        place = Place(self._next_epoch, self._pending[0][0] if self._pending else self._batches + 1)
        for path in files_of(folder, root) if root else ():
            cut_back(path, place)
        now = time.time()
        file = EventFile(folder, getattr(self.run, "name", "") or "", root)
        self.path, self._root = file.path, file.root
        self._writer = EventWriter(file)
        self._opening = [opening_record(now)]
        if root:
            self._opening.append(start_record(self._starting_step(place), now))
        elif self.write_graph and (graph := graph_of(self.model)) is not None:
            self._opening.append(graph_record(now, graph))
        if self._chosen:
            self._projector = Projector(folder, file.root, self._chosen)
            self._projector.prepare()
            self._projector.find(self._saved_at)

    def _open_late(self) -> None:
        if self._writer is None:  # this callback is new in a training that is resumed
            self._open(None)

    def _starting_step(self, place: Place) -> int:
        """All that readers have with this step or a higher one is void; never a point that stays."""
        first = place.epoch if self._resumed is None else max(place.epoch, int(self._resumed.epoch))
        return max(first, place.batch) if self._every else first

    async def _begin(self) -> None:
        opening, self._opening = self._opening, []
        if opening:
            await self._write(opening)

    async def _write_epoch(
        self,
        epoch: int,
        wall_time: float,
        logs: Mapping[str, Any],
        batches: list[tuple[int, float, Mapping[str, Any]]],
        look: _Look | None,
    ) -> None:
        await self._begin()
        if look is not None:
            # Not by the inline half: to start a thread is to wait until it runs.
            self._sideline.start(look.take, look.snapshot.release)
            self._handed_over = None

        # `logs` is read here, not in the inline half: only now it has what later callbacks added.
        def records() -> Iterable[bytes]:
            yield from _batch_records(batches)
            yield scalars(epoch, wall_time, logs)

        try:
            await self._write(records())
        finally:
            self._rows_done += len(batches)
        self._sideline.raise_error()

    async def _write_batches(self, batches: list[tuple[int, float, Mapping[str, Any]]]) -> None:
        try:
            await self._begin()
            await self._write(_batch_records(batches))
        finally:
            self._rows_done += len(batches)

    async def _end(self, batches: list[tuple[int, float, Mapping[str, Any]]]) -> None:
        if self._writer is None:
            return
        try:
            await self._begin()
            if batches:
                await self._write_batches(batches)
            await self._sideline.end()
        finally:
            self._sideline.stop()
            await self._writer.close()

    async def _write(self, records: Iterable[bytes]) -> None:
        if self._writer is not None:
            await self._writer.write(lambda: records)

    # -- beside the training ---------------------------------------------------------------------------------

    def _look_inside(self, epoch: int, wall_time: float) -> _Look | None:
        """What is due, on a copy of the model."""
        histograms = _due(self.histogram_freq, epoch)
        projector = self._projector if _due(self.embeddings_freq, epoch) else None
        writer = self._writer
        if not (histograms or projector) or writer is None or writer.failed:
            return None
        # In this order: the loop starts the last one before it forgets that it was handed over.
        handed_over = self._handed_over
        waits = handed_over is not None and handed_over() is not None
        if waits or self._sideline.busy or not self.run.room_for_copy(self):
            self.skipped += 1
            return None
        snapshot = self._snapshot(pooled=True)
        if projector is not None:
            self._saved_at = [*self._saved_at, epoch][-KEPT:]

        def take() -> None:
            if projector is not None:
                projector.save(epoch, snapshot.arrays)
            if histograms:
                self._write_beside(writer, self._histograms(epoch, wall_time, snapshot))

        look = _Look(take, snapshot)
        self._handed_over = weakref.ref(look)  # dies with its coroutine, should that never run
        return look

    def _histograms(self, epoch: int, wall_time: float, snapshot: SnapshotHandle) -> Iterator[bytes]:
        yield from weights(epoch, wall_time, snapshot.arrays, self.write_images)
        if self._part is None:
            return
        model = snapshot.to_model()
        snapshot.release()
        yield from activations(epoch, wall_time, model, self._part, self._sideline.goes_on)
        if self.write_grads:
            yield from gradients(epoch, wall_time, model, self._part, self._sideline.goes_on)

    def _write_beside(self, writer: EventWriter, records: Iterator[bytes]) -> None:
        together: list[bytes] = []
        size = 0
        for record in records:
            if not self._sideline.goes_on():
                return
            together.append(record)
            size += len(record)
            if size > _TOGETHER:
                writer.write_blocking(together)
                together, size = [], 0
        if together and self._sideline.goes_on():
            writer.write_blocking(together)

    def _part_to_look_at(self) -> Part | None:
        part = first_part(self.validation_data, self.batch_size)
        needed = ["activations", "gradients"] if self.write_grads else ["activations"]
        missing = [name for name in needed if not callable(getattr(self.model, name, None))]
        if self.validation_data is None:
            why = "those of activations and gradients need validation data"
        elif part is None:
            why = "those of activations and gradients need validation data in arrays"
        elif missing:
            why = f"{type(self.model).__name__} has no {' and no '.join(f'{name}()' for name in missing)}"
        else:
            return part
        self._warn(f"TensorBoard: histograms of weights only; {why}")
        return None

    def _embeddings(self, folder: str) -> Sequence[Any]:
        found = chosen_layers(self.model, self.embeddings_layer_names, self.embeddings_metadata, folder)
        if not found:
            self._warn("TensorBoard: embeddings_freq is set, but the model has no Embedding layer")
        return found

    def _warn(self, text: str) -> None:
        if self._resumed is None:  # else it was told when the training began
            warnings.warn(printable(text), RuntimeWarning, stacklevel=4)

    def _take_pending(self) -> list[tuple[int, float, Mapping[str, Any]]]:
        taken, self._pending = self._pending, []
        return taken

    def _refuse_what_cannot_be(self) -> None:
        for name in ("write_grads", "write_images"):
            if getattr(self, name) and not self.histogram_freq:
                raise ArgumentError(name, True, "needs histogram_freq greater than 0", "Set histogram_freq=1")
        if self.write_images and importlib.util.find_spec("PIL") is None:
            raise ArgumentError("write_images", True, "needs Pillow", "pip install 'asynccb[tensorboard]'")


def _batch_records(batches: list[tuple[int, float, Mapping[str, Any]]]) -> Iterable[bytes]:
    return (scalars(step, wall_time, logs, BATCH_PREFIX) for step, wall_time, logs in batches)


def _due(every: int, epoch: int) -> bool:
    return bool(every) and epoch % every == 0


def _samples(batch_size: object) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ArgumentError("batch_size", batch_size, "a number of samples, at least 1")
    return int(batch_size)


def _epochs(argument: str, given: object) -> int:
    if not isinstance(given, numbers.Integral) or given < 0:
        raise ArgumentError(argument, given, "a number of epochs, 0 for never")
    return int(given)


def _batches(update_freq: object) -> int:
    """Every how many batches; 0: none."""
    if update_freq in ("epoch", "batch"):
        return 1 if update_freq == "batch" else 0
    if isinstance(update_freq, bool) or not isinstance(update_freq, numbers.Integral) or update_freq < 1:
        raise ArgumentError("update_freq", update_freq, '"epoch", "batch" or a number of batches')
    return int(update_freq)
