"""One row for each epoch, on disk when the epoch is over, written beside the training."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from asynccb.callbacks.base import Callback
from asynccb.callbacks.csv_rows import append, cells, formatted, guarded, restore
from asynccb.errors import ArgumentError
from asynccb.storage.serial import SerialExecutor
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

__all__ = ["CSVLogger"]

T = TypeVar("T")


class CSVLogger(Callback):
    """Writes the logs of every epoch as a row of a CSV file (``excel`` dialect: lines end in CR LF; UTF-8).

    The file is opened before the first batch, which is also when a folder that cannot be written is told;
    missing folders are created. Rows are written on the event loop's side, by a thread of this callback
    alone: no batch waits for the disk, no row is lost or out of order, and each is handed to the operating
    system at the end of its epoch. In a subclass whose ``on_error`` lets the training go on, rows that a full
    disk refused are written with the next one.

    Columns are decided with the first epoch: ``epoch`` (0-based), then the sorted keys of that epoch's logs
    and, if the training validates, the ``val_*`` names of its metrics. A key that is missing later is
    ``NA``; one that appears later is told in one RuntimeWarning and gets no column. ``lr`` and what other
    inline callbacks add to the logs is there wherever this callback stands in the list.

    Numbers stand as Python writes them (``nan``, ``inf``), None is empty, iterables become ``"[1.0, 2.0]"``
    with quotes of their own, as in Keras. Texts and column names that a spreadsheet would run as a formula
    (``=``, ``+``, ``-``, ``@``, tab or line end at their start) get a leading apostrophe; numbers never do.

    In a training that is resumed the file is cut back to the rows of the moment that is gone on from, and
    rows that a crash took are written again from the History, before the first batch: in the end it has the
    bytes of a training that was never interrupted. A file that is gone as a whole is written anew, unless
    rows of older trainings stood in it (``append``); one whose rows somebody has changed is refused, and left
    as it is. A CSVLogger that the resumed training did not have begins as in a new training, with its first
    row.

    Args:
        filename: a path, ``~`` not expanded.
        separator: one character between the cells. Default ``","``.
        append: True: rows go behind those of an existing file, under its header; columns of that which this
            training does not have are ``NA``. Default False: the file is overwritten when the training
            starts.

    Raises:
        TypeError: ``separator`` is not one character.
        ArgumentError: ``separator`` is a quote or a line end; when the training starts, ``append=True`` and
            a file whose header lacks ``epoch`` or one of the training's metrics, or, where it is resumed, a
            file that has other rows than it wrote. The file is left as it was.
        OSError: when the training starts, a file that cannot be opened.
    """

    changes_model: ClassVar[bool] = False
    told_apart_by: ClassVar[tuple[str, ...]] = ("filename",)

    _begin: int | None  # bytes that stood in the file before the training; None: it was not opened yet
    _columns: list[str] | None
    _headed: bool  # the header is this training's own
    _rows: int
    _owed: bytes  # rows that the disk refused
    _told: set[str]

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        csv.writer(io.StringIO(), delimiter=separator)
        if separator in '"\r\n':
            raise ArgumentError("separator", separator, "one character, neither a quote nor a line end")
        self.filename = os.fspath(filename)
        self.separator = separator
        self.append = append
        self._file: Any = None
        self._forget()

    async def on_train_begin(self, logs: Any = None) -> None:
        self._forget()
        if self._file is not None:
            # A training whose loop was closed under it left this open. Its wrapper belongs to that loop.
            abandoned, self._file = self._file, None
            await self._do(abandoned.close)
        if getattr(self.run, "resumed", None) is None:
            await self._begin_file()
        # Else nothing is touched yet: load_state_dict tells which rows stay.

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._begin is None:
            await self._begin_file()
        row = cells(epoch, logs)
        lines: list[list[Any]] = []
        if self._columns is None:
            self._columns = ["epoch", *sorted({guarded(str(key)) for key in logs or ()} | self._validated())]
            self._headed = True
            lines.append(self._columns)
        lines.append([row.get(column, "NA") for column in self._columns])
        self._rows += 1
        await self._write(lines)
        self._tell_of_late(row)

    async def on_train_end(self, logs: Any = None) -> None:
        file, self._file = self._file, None
        if file is not None:
            # Shielded: a runner that shuts down cancels this task before the thread has begun with it.
            closing = asyncio.get_running_loop().run_in_executor(self._executor, file.close)
            try:
                await asyncio.shield(closing)
            except RuntimeError:  # no thread to be had; every row went out when it was written
                file.close()
                raise

    async def sync(self) -> None:
        if self._file is not None:
            await self._do(os.fsync, self._file.fileno())

    def state_dict(self) -> dict[str, Any]:
        return {
            "begin": self._begin,
            "columns": self._columns,
            "headed": self._headed,
            "rows": self._rows,
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["begin"] is None:
            return  # it had not begun its file
        self._columns = None if state["columns"] is None else list(state["columns"])
        self._headed = bool(state["headed"])
        self._rows = int(state["rows"])
        self._told = set(state["told"])
        restore(self.filename, int(state["begin"]), self._written())
        self._begin = int(state["begin"])

    def _written(self) -> bytes:
        """The bytes of the header and the rows so far, from the History."""
        columns = self._columns or []
        lines: list[Any] = [columns] if self._headed else []
        epochs = self.run.history.recorded()
        if len(epochs) < self._rows:
            raise RuntimeError(f"{self._rows} rows were written, and the History has {len(epochs)} epochs")
        for epoch, logs in epochs[len(epochs) - self._rows :]:
            row = cells(epoch, logs)
            lines.append([row.get(column, "NA") for column in columns])
        return formatted(lines, self.separator)

    def _forget(self) -> None:
        self._begin = None
        self._columns = None
        self._headed = False
        self._rows = 0
        self._owed = b""
        self._told = set()
        self._executor = SerialExecutor(f"asynccb-csv {Path(self.filename).name}")

    async def _begin_file(self) -> None:
        old = await self._do(_prepare, self.filename, self.separator, self.append)
        if old is not None:
            self._refuse_other_header(old.columns)
            self._columns = old.columns
        await self._open("a" if self.append else "w")
        if old is not None and not old.ends_its_line:
            await self._do(append, self._file, b"\r\n")
        self._begin = 0 if old is None else old.size + 2 * (not old.ends_its_line)

    async def _open(self, mode: str) -> None:
        # Unbuffered: every row reaches the operating system when it is written.
        opening = self._executor.submit(open, self.filename, f"{mode}b", buffering=0)
        try:
            self._file = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_what_was_opened)
            raise

    async def _write(self, lines: list[list[Any]]) -> None:
        rows, self._owed = self._owed + formatted(lines, self.separator), b""
        try:
            if self._file is None:
                await self._open("a")
            await self._do(append, self._file, rows)
        except OSError:
            self._owed = rows  # they go before the next one: who resumes counts every row that was decided
            raise

    async def _do(self, job: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, job, *arguments)

    def _validated(self) -> set[str]:
        params = self.params or {}
        if not params.get("do_validation"):
            return set()
        return {guarded(name) for name in params.get("metrics") or () if name.startswith("val_")}

    def _refuse_other_header(self, columns: list[str]) -> None:
        metrics = (self.params or {}).get("metrics") or ()
        known = {guarded(name) for name in metrics if not name.startswith("val_")} | self._validated()
        missing = sorted({"epoch", *known} - set(columns))
        if missing:
            raise ArgumentError(
                "append",
                self.append,
                f"{self.filename} has another header, without {', '.join(missing)}",
                "Give another filename, or append=False to overwrite it",
            )

    def _tell_of_late(self, row: Mapping[str, Any]) -> None:
        late = [key for key in row if key not in (self._columns or ()) and key not in self._told]
        if late:
            self._told.update(late)
            text = f"CSVLogger: {self.filename} has no column for {', '.join(late)}, which came too late"
            warnings.warn(printable(text), RuntimeWarning, stacklevel=2)


def _close_what_was_opened(opening: Future[Any]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Old(NamedTuple):
    """What append=True found."""

    columns: list[str]
    size: int
    ends_its_line: bool


def _prepare(filename: str, separator: str, append: bool) -> _Old | None:
    """Makes the folder, and reads of a file that is to be gone on with what must be known. Blocks."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)
    if not append or not os.path.exists(filename) or os.path.getsize(filename) == 0:
        return None
    with open(filename, encoding="utf-8-sig", errors="replace", newline="") as text:
        try:
            columns = next(csv.reader(text, delimiter=separator), [])
        except csv.Error:
            columns = []
    with open(filename, "rb") as raw:
        size = raw.seek(-1, os.SEEK_END) + 1
        return _Old(columns, size, raw.read(1) in b"\r\n")
