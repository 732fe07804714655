"""One row for each epoch, on disk when the epoch is over, written beside the training."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import warnings
from collections.abc import Iterable
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from asynccb.callbacks.base import Callback
from asynccb.errors import ArgumentError
from asynccb.storage.serial import SerialExecutor
from asynccb.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CSVLogger"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class CSVLogger(Callback):
    """Writes the logs of every epoch as a row of a CSV file (``excel`` dialect: lines end in CR LF; UTF-8).

    The file is opened before the first batch, which is also when a folder that cannot be written is told;
    missing folders are created. Rows are written on the event loop's side, by a thread of this callback
    alone: no batch waits for the disk, no row is lost or out of order, and each is handed to the operating
    system at the end of its epoch.

    Columns are decided with the first epoch: ``epoch`` (0-based), then the sorted keys of that epoch's logs
    and, if the training validates, the ``val_*`` names of its metrics. A key that is missing later is
    ``NA``; one that appears later is told in one RuntimeWarning and gets no column. ``lr`` and what other
    inline callbacks add to the logs is there wherever this callback stands in the list.

    Numbers stand as Python writes them (``nan``, ``inf``), None is empty, iterables become ``"[1.0, 2.0]"``
    with quotes of their own, as in Keras. Texts and column names that a spreadsheet would run as a formula
    (``=``, ``+``, ``-``, ``@``, tab or line end at their start) get a leading apostrophe; numbers never do.

    Args:
        filename: a path, ``~`` not expanded.
        separator: one character between the cells. Default ``","``.
        append: True: rows go behind those of an existing file, under its header; columns of that which this
            training does not have are ``NA``. Default False: the file is overwritten when the training
            starts.

    Raises:
        TypeError: ``separator`` is not one character.
        ArgumentError: ``separator`` is a quote or a line end; when the training starts, ``append=True`` and
            a file whose header lacks ``epoch`` or one of the training's metrics. The file is left as it
            was.
        OSError: when the training starts, a file that cannot be opened.
    """

    changes_model: ClassVar[bool] = False

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        csv.writer(io.StringIO(), delimiter=separator)
        if separator in '"\r\n':
            raise ArgumentError("separator", separator, "one character, neither a quote nor a line end")
        self.filename = os.fspath(filename)
        self.separator = separator
        self.append = append
        self._file: Any = None
        self._columns: list[str] | None = None
        self._told: set[str] = set()

    async def on_train_begin(self, logs: Any = None) -> None:
        import aiofiles

        self._columns = None
        self._told = set()
        executor = SerialExecutor(f"asynccb-csv {Path(self.filename).name}")
        loop = asyncio.get_running_loop()
        if self._file is not None:
            # A training whose loop was closed under it left this open. Its wrapper belongs to that loop.
            abandoned, self._file = self._file, None
            await loop.run_in_executor(executor, abandoned.buffer.close)
        old = await loop.run_in_executor(executor, _prepare, self.filename, self.separator, self.append)
        if old is not None:
            self._refuse_other_header(old.columns)
            self._columns = old.columns
        self._file = await aiofiles.open(
            self.filename,
            "a" if self.append else "w",
            buffering=1,  # of lines: what is written ends in one, so every write reaches the operating system
            encoding="utf-8",
            errors="backslashreplace",  # half a surrogate pair has no bytes; it is no reason to lose a row
            newline="",
            executor=executor,
        )
        if old is not None and not old.ends_its_line:
            await self._file.write("\r\n")

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        cells = {"epoch": epoch} | {_guarded(str(key)): _cell(value) for key, value in (logs or {}).items()}
        lines = []
        if self._columns is None:
            self._columns = ["epoch", *sorted({_guarded(str(key)) for key in logs or ()} | self._validated())]
            lines.append(self._columns)
        lines.append([cells.get(column, "NA") for column in self._columns])
        await self._file.write(self._format(lines))
        self._tell_of_late(cells)

    async def on_train_end(self, logs: Any = None) -> None:
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    def _validated(self) -> set[str]:
        params = self.params or {}
        if not params.get("do_validation"):
            return set()
        return {_guarded(name) for name in params.get("metrics") or () if name.startswith("val_")}

    def _refuse_other_header(self, columns: list[str]) -> None:
        metrics = (self.params or {}).get("metrics") or ()
        known = {_guarded(name) for name in metrics if not name.startswith("val_")} | self._validated()
        missing = sorted({"epoch", *known} - set(columns))
        if missing:
            raise ArgumentError(
                "append",
                self.append,
                f"{self.filename} has another header, without {', '.join(missing)}",
                "Give another filename, or append=False to overwrite it",
            )

    def _format(self, lines: list[list[Any]]) -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=self.separator).writerows(lines)
        return text.getvalue()

    def _tell_of_late(self, cells: Mapping[str, Any]) -> None:
        late = [key for key in cells if key not in (self._columns or ()) and key not in self._told]
        if late:
            self._told.update(late)
            text = f"CSVLogger: {self.filename} has no column for {', '.join(late)}, which came too late"
            warnings.warn(printable(text), RuntimeWarning, stacklevel=2)


class _Old(NamedTuple):
    """What append=True found."""

    columns: list[str]
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
        raw.seek(-1, os.SEEK_END)
        return _Old(columns, raw.read(1) in b"\r\n")


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (Number, np.bool_)):
        return value
    if isinstance(value, str):
        return _guarded(value)
    if getattr(value, "ndim", None) == 0:
        return _cell(value[()] if isinstance(value, np.ndarray) else value.item())
    if isinstance(value, Iterable):
        return f'"[{", ".join(map(str, value))}]"'
    return _guarded(str(value))


def _guarded(text: str) -> str:
    # A spreadsheet runs what stands behind these, quoted or not: a metric's name must not become a command.
    return f"'{text}" if text.startswith(_FORMULA) else text
