"""Embeddings for TensorBoard's projector: which layers, their metadata, and the files that the page reads.

The projector takes ``projector_config.pbtxt`` from the folder of the event file, and shows each tensor named
there under its name. A tensor's file may lie anywhere below that folder and nowhere else, and so may its
metadata, which is why metadata from elsewhere is copied.
"""

from __future__ import annotations

import codecs
import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np

from asynccb.errors import ArgumentError, nearest
from asynccb.storage.atomic import atomic_write
from asynccb.storage.direct import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Embedding", "Projector", "chosen_layers"]

_TOGETHER = 1 << 16
"""Numbers that are made text at a time."""

KEPT = 5
"""Saves that stay on the disk, as with the saver that Keras used."""


class Embedding(NamedTuple):
    """A layer to be shown.

    Attributes:
        layer: its name.
        weight: the name of its table among the arrays of a snapshot.
        shape: rows and columns of the table.
        metadata: path of the file with a line for each row, or None.
    """

    layer: str
    weight: str
    shape: tuple[int, int]
    metadata: str | None


def chosen_layers(
    model: Any,
    names: Sequence[str] | None,
    metadata: Mapping[str, Any] | str | os.PathLike[str] | None,
    log_dir: str,
) -> list[Embedding]:
    """The layers to be shown, checked with their metadata. Reads the metadata files.

    Args:
        model: whose ``layers`` have ``name`` and ``weights``.
        names: of layers whose first weight is shown; None or empty: every layer of a class ``Embedding``.
        metadata: a file for all, or files by layer; looked up in ``log_dir``, else from the working folder.
        log_dir: folder of the event file.

    Raises:
        ArgumentError: a layer or metadata file that is not there, a weight that is not a table, a file that
            has not one line for each row.
    """
    layers = {layer.name: layer for layer in getattr(model, "layers", ())}
    for name in names or ():
        if name not in layers:
            raise ArgumentError(
                "embeddings_layer_names", name, "is no layer of the model", nearest(name, layers)
            )
    chosen = list(names or ()) or [name for name in layers if type(layers[name]).__name__ == "Embedding"]
    files = dict.fromkeys(chosen, metadata) if isinstance(metadata, (str, os.PathLike)) else metadata or {}
    for name in files:
        if name not in chosen:
            raise ArgumentError(
                "embeddings_metadata", name, "is no layer whose embeddings are saved", nearest(name, chosen)
            )
    return [_embedding(layers[name], files.get(name), log_dir) for name in chosen]


def _embedding(layer: Any, metadata: Any, log_dir: str) -> Embedding:
    weights = getattr(layer, "weights", ())
    if not weights or len(weights[0].shape) != 2:
        raise ArgumentError(
            "embeddings_layer_names",
            layer.name,
            "the layer's first weight has not two axes, rows and columns",
        )
    rows, columns = map(int, weights[0].shape)
    if metadata is not None:
        metadata = _checked_metadata(os.fspath(metadata), rows, layer.name, log_dir)
    return Embedding(
        layer.name, getattr(weights[0], "path", None) or weights[0].name, (rows, columns), metadata
    )


def _checked_metadata(given: str, rows: int, layer: str, log_dir: str) -> str:
    for path in (os.path.join(log_dir, given), given):
        if os.path.isfile(path):
            break
    else:
        raise ArgumentError(
            "embeddings_metadata", given, f"is no file, neither in {log_dir} nor in the working folder"
        )
    lines = _lines(path)
    if lines != rows:
        raise ArgumentError(
            "embeddings_metadata",
            given,
            f"has {lines} lines, the layer {layer} has {rows} embeddings",
            "One line each; a header line only where there are several columns, between tabs",
        )
    return os.path.abspath(path)


def _lines(path: str) -> int:
    """Lines as the projector counts them: without blank ones, and without a first one that has a tab."""
    with open(path, encoding="utf-8", errors="replace") as file:
        told = [line for line in file if line.strip()]
    return len(told) - bool(told and "\t" in told[0])


class _Table(NamedTuple):
    name: str
    path: str
    shape: tuple[int, int]
    layer: str


class Projector:
    """The files of one training. Blocks; not for the loop.

    Args:
        log_dir: folder of the event file.
        run: a name that no other training in this folder has.
        embeddings: the layers.
    """

    def __init__(self, log_dir: str, run: str, embeddings: Sequence[Embedding]) -> None:
        self._log_dir = os.path.realpath(log_dir)
        self._folder = os.path.join(self._log_dir, "projector", run)
        self._embeddings = embeddings
        self._saves: list[list[_Table]] = []
        self._metadata: dict[str, str] = {}

    def prepare(self) -> None:
        """Copies the metadata that the projector could not reach where it is.

        Raises:
            OSError: it cannot be read, or the folder not be written.
        """
        for embedding in self._embeddings:
            if embedding.metadata is not None:
                self._metadata[embedding.layer] = self._reachable(embedding.metadata, embedding.layer)

    def find(self, epochs: Iterable[int]) -> None:
        """Takes over what the training that is resumed had saved at these epochs, as far as it is there."""
        for epoch in epochs:
            both = [(embedding, binary) for embedding in self._embeddings for binary in (True, False)]
            tables = [self._table(embedding, epoch, binary) for embedding, binary in both]
            tables = [table for table in tables if os.path.exists(table.path)]
            if tables:
                self._saves.insert(0, tables)

    def save(self, epoch: int, arrays: Mapping[str, Array]) -> None:
        """Writes the tables as ``projector/<run>/<layer>.ckpt-<epoch>.bin`` (or ``.tsv``), and a
        configuration that names those of the last five saves, the newest first.

        Each file is old or new, whole, and the configuration never names one that is not there.

        Raises:
            CheckpointWriteError: a file could not be written.
        """
        self._saves.insert(0, [self._write(embedding, epoch, arrays) for embedding in self._embeddings])
        old = [table for save in self._saves[KEPT:] for table in save]
        del self._saves[KEPT:]
        text = "".join(self._entry(table) for save in self._saves for table in save)
        atomic_write(os.path.join(self._log_dir, "projector_config.pbtxt"), _writes(text.encode()))
        for table in old:  # only now does nothing name them
            with suppress(OSError):  # somebody tidied up
                os.unlink(table.path)

    def _write(self, embedding: Embedding, epoch: int, arrays: Mapping[str, Array]) -> _Table:
        values = np.ascontiguousarray(arrays[embedding.weight], "<f4")
        binary = _is_told_from_text(values)
        table = self._table(embedding, epoch, binary)
        atomic_write(table.path, _writes(values.data) if binary else _writes_each(_as_text(values)))
        return table

    def _table(self, embedding: Embedding, epoch: int, binary: bool) -> _Table:
        name = f"{embedding.layer}.ckpt-{epoch}"
        path = os.path.join(self._folder, _file_name(name)) + (".bin" if binary else ".tsv")
        return _Table(name, path, embedding.shape, embedding.layer)

    def _entry(self, table: _Table) -> str:
        rows, columns = table.shape
        lines = [
            f"tensor_name: {_quoted(table.name)}",
            f"tensor_shape: {rows}",
            f"tensor_shape: {columns}",
            f"tensor_path: {_quoted(self._relative(table.path))}",
        ]
        if table.layer in self._metadata:
            lines.append(f"metadata_path: {_quoted(self._metadata[table.layer])}")
        return "embeddings {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"

    def _reachable(self, path: str, layer: str) -> str:
        real = os.path.realpath(path)
        if not real.startswith(os.path.join(self._log_dir, "")):
            os.makedirs(self._folder, exist_ok=True)
            source, real = real, os.path.join(self._folder, _file_name(f"{layer}.metadata.tsv"))
            shutil.copyfile(source, real)
        return self._relative(real)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._log_dir).replace(os.sep, "/")


def _writes(*pieces: bytes | memoryview) -> Callable[[str], None]:
    return _writes_each(pieces)


def _writes_each(pieces: Iterable[bytes | memoryview]) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "xb", buffering=0) as file:
            for piece in pieces:
                write_all(file, memoryview(piece).cast("B"))

    return write


def _is_told_from_text(values: Array) -> bool:
    """Whether the projector sees that the bytes of a table are no text. It reads lines until one of them is
    no UTF-8; a row of zeros is."""
    first_line = values.data.cast("B")[:4096].tobytes().partition(b"\n")[0]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(first_line)
    except UnicodeDecodeError:
        return True
    return False


def _as_text(values: Array) -> Iterator[bytes]:
    """Some rows at a time: as text and Python numbers a table takes many times its own memory."""
    rows = max(1, _TOGETHER // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part = values[start : start + rows].tolist()
        yield "".join("\t".join(map(repr, row)) + "\n" for row in part).encode()


def _quoted(text: str) -> str:
    plain = range(0x20, 0x7F)
    shown = [
        chr(b) if b in plain and b not in b'"\\' else f"\\{b:03o}" for b in text.encode("utf-8", "replace")
    ]
    return f'"{"".join(shown)}"'


def _file_name(text: str) -> str:
    return quote(text, safe=" ")
