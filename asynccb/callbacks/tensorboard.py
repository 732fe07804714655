"""TensorBoard: scalars, weights and the graph of a training, in files that real TensorBoard reads."""

from __future__ import annotations

import importlib.util
import numbers
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from asynccb.callbacks.base import Callback
from asynccb.callbacks.batch_hook import add_batch_end
from asynccb.callbacks.tensorboard_graph import graph_of
from asynccb.callbacks.tensorboard_summaries import scalars, weights
from asynccb.callbacks.tensorboard_writer import EventFile, EventWriter
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from asynccb.callbacks.base import OnError, SnapshotHandle

__all__ = ["TensorBoard"]

ROOM = 64 * 2**20
"""Bytes of weights that may wait to be written; one epoch's may always."""
SHIP_EVERY = 1.0
"""Seconds between two writes of batch scalars."""


class TensorBoard(Callback):
    """Writes what ``tensorboard --logdir <log_dir>`` shows.

    Scalars: one for each number in an epoch's logs, ``lr`` and what other inline hooks add included; the tag
        is the key, the
    step the 0-based epoch. Histograms and images: of the weights as they were at the end of the epoch, tagged
    with the weight's name (``dense/kernel``; images ``dense/kernel/image/0``). The graph: the model's layers.

    Each fit writes one new file, whose name no other training has, so that many trainings may share
    ``log_dir``; TensorBoard then shows them as one run. Give each its own folder to tell them apart.

    When an epoch's awaitable is done, its records are on the disk. No batch and no other callback waits for
    that. Where the disk is slower than the training, epochs whose weights find 64 MiB of weights waiting go
    without histograms, counted in ``skipped``. When the disk fails, or does not answer for 60 s, the error is
    raised once, the training goes on (``on_error`` is "warn"), and later writes are counted in ``dropped``.

    Args:
        log_dir: folder of the file, made where it is missing. Default ``"./logs"``.
        histogram_freq: weight histograms every so many epochs, from the first; 0 (default): none. They need
            no validation data.
        write_graph: write the model's graph, if it is a row of layers with ``get_config()``. Default True.
        write_grads: histograms of gradients; not available yet. Default False.
        write_images: the weights as images too, in the epochs of ``histogram_freq``. Needs Pillow. Default
            False.
        embeddings_freq: not available yet; 0 (default).
        embeddings_layer_names: of no effect while ``embeddings_freq`` is 0.
        embeddings_metadata: of no effect while ``embeddings_freq`` is 0.
        batch_size: taken for the sake of Keras code; weights need no batches. Default 32.
        update_freq: ``"epoch"`` (default), ``"batch"``, or a number n: the logs of every n-th batch too,
            tagged ``batch_<key>``, at the count of batches trained. They reach the disk about once a second
            and at the end of each epoch.

    Attributes:
        path: the file of this training, once it has begun.
        dropped: writes that were not done because an earlier one had failed.
        skipped: epochs whose histograms were left out because the disk was behind.

    Raises:
        ArgumentError: (a ValueError) an argument out of range, ``write_grads`` or ``write_images`` without
            ``histogram_freq``, images without Pillow, or what is not available yet.
    """

    changes_model: ClassVar[bool] = False
    on_error: ClassVar[OnError] = "warn"

    path: str | None = None
    skipped = 0
    _writer: EventWriter | None = None

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
        self.batch_size = batch_size
        self.update_freq = update_freq
        self._refuse_what_cannot_be()
        self._every = _batches(update_freq)
        if self._every:
            add_batch_end(self, self.record_batch)

    @property
    def dropped(self) -> int:
        return 0 if self._writer is None else self._writer.dropped

    def on_train_begin(self, logs: Any = None) -> Coroutine[Any, Any, None]:
        self.skipped = 0
        self._batches = 0
        self._pending: list[tuple[int, float, dict[str, Any]]] = []
        self._ship_at = 0.0
        # Two counters, one for each thread that counts: neither needs a lock.
        self._captured = self._written = 0
        self._size = 0
        self._writer = None
        # Opened inline, so that a folder that cannot be written fails the training before its first batch.
        file = EventFile(os.path.abspath(self.log_dir), getattr(self.run, "name", "") or "")
        self.path = file.path
        self._writer = EventWriter(file)
        return self._begin(graph_of(self.model) if self.write_graph else None)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Coroutine[Any, Any, None]:
        logs = {} if logs is None else logs  # not `or`: what is empty now may be filled by later callbacks
        return self._write_epoch(epoch, time.time(), logs, self._weights(epoch), self._take_pending())

    def on_train_end(self, logs: Any = None) -> Coroutine[Any, Any, None]:
        return self._end(self._take_pending())

    def record_batch(self, batch: int, logs: Any = None) -> Coroutine[Any, Any, None] | None:
        """The batch hook of ``update_freq``; a subclass with a hook of its own calls it from there."""
        self._batches += 1
        if self._batches % self._every:
            return None
        self._pending.append((self._batches, time.time(), {} if logs is None else logs))
        if time.monotonic() < self._ship_at:
            return None
        self._ship_at = time.monotonic() + SHIP_EVERY
        return self._write_batches(self._take_pending())

    async def _begin(self, graph: bytes | None) -> None:
        await self._write(_opening(graph))

    async def _write_epoch(
        self,
        epoch: int,
        wall_time: float,
        logs: dict[str, Any],
        snapshot: SnapshotHandle | None,
        batches: list[tuple[int, float, dict[str, Any]]],
    ) -> None:
        # `logs` is read here, not in the inline half: only now it has what later callbacks added.
        def records() -> Iterable[Any]:
            yield from _batch_records(batches)
            yield scalars(epoch, wall_time, logs)
            if snapshot is not None:
                yield from weights(epoch, wall_time, snapshot.arrays, self.write_images)

        try:
            await self._write(records())
        finally:
            if snapshot is not None:
                snapshot.release()
                self._written += 1

    async def _write_batches(self, batches: list[tuple[int, float, dict[str, Any]]]) -> None:
        await self._write(_batch_records(batches))

    async def _end(self, batches: list[tuple[int, float, dict[str, Any]]]) -> None:
        if self._writer is None:
            return
        try:
            if batches:
                await self._write_batches(batches)
        finally:
            await self._writer.close()

    async def _write(self, records: Iterable[Any]) -> None:
        if self._writer is not None:
            await self._writer.write(lambda: records)

    def _weights(self, epoch: int) -> SnapshotHandle | None:
        due = self.histogram_freq and epoch % self.histogram_freq == 0
        if not due or self._writer is None or self._writer.failed:
            return None
        waiting = self._captured - self._written
        if waiting and (waiting + 1) * self._size > ROOM:
            self.skipped += 1
            return None
        snapshot = self.snapshot()
        self._captured += 1
        self._size = sum(array.nbytes for array in snapshot.arrays.values())
        return snapshot

    def _take_pending(self) -> list[tuple[int, float, dict[str, Any]]]:
        taken, self._pending = self._pending, []
        return taken

    def _refuse_what_cannot_be(self) -> None:
        later = "this is not available yet"
        for name in ("write_grads", "write_images"):
            if getattr(self, name) and not self.histogram_freq:
                raise ArgumentError(name, True, "needs histogram_freq greater than 0", "Set histogram_freq=1")
        if self.write_grads:
            raise ArgumentError("write_grads", True, f"histograms of gradients: {later}", "Leave it False")
        if self.embeddings_freq:
            raise ArgumentError("embeddings_freq", self.embeddings_freq, f"embeddings: {later}", "Leave it 0")
        if self.write_images and importlib.util.find_spec("PIL") is None:
            raise ArgumentError("write_images", True, "needs Pillow", "pip install 'asynccb[tensorboard]'")


def _batch_records(batches: list[tuple[int, float, dict[str, Any]]]) -> Iterable[Any]:
    return (scalars(step, wall_time, logs, "batch_") for step, wall_time, logs in batches)


def _opening(graph: bytes | None) -> Iterable[Any]:
    # A generator, run by the writer's thread: to import tensorboardX takes a second, which the loop does not
    # have.
    from tensorboardX.proto.event_pb2 import Event

    yield Event(wall_time=time.time(), file_version="brain.Event:2")
    if graph is not None:
        yield Event(wall_time=time.time(), graph_def=graph)


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
