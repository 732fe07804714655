"""Writes onto a disk that is full after so many bytes: ``python -m disk_faults.full_disk KIND FOLDER STEPS``.

``FOLDER`` is a small disk of its own. For each of the steps a ballast leaves somewhat more room on it. A line
of JSON for each tells what came of the writing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb import Trainer
from asynccb.callbacks import CSVLogger, TensorBoard
from asynccb.callbacks.tensorboard.records import frames, opening, scalars
from asynccb.callbacks.tensorboard.writer import EventFile
from asynccb.models import Dense, Sequential
from disk_faults.jobs import attempt, verdict
from disk_faults.subjects import SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_FREE = 1 << 20
"""Bytes that are free in the last step."""

OLD, NEW, NEXT = 7, 8, 9


def leave(folder: Path, free: int) -> None:
    """Fills the disk but for so many bytes."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    status = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free))


def model_file(name: str) -> Callable[[Path, int], dict[str, Any]]:
    """A save over an older file, and one more when there is room again."""

    def write(folder: Path, free: int) -> dict[str, Any]:
        (folder / "ballast").unlink(missing_ok=True)
        SUBJECTS[name].save(folder, OLD)
        old = (folder / "model.h5").read_bytes()
        leave(folder, free)
        how = attempt(name, folder, NEW)
        how["is the old one"] = (folder / "model.h5").read_bytes() == old
        how["left"] = sorted(os.listdir(folder))
        how["found"] = OLD if how["is the old one"] else verdict(name, folder)
        (folder / "ballast").unlink()
        how["next"] = attempt(name, folder, NEXT)["error"], verdict(name, folder)
        return how

    return write


def csv_file(folder: Path, free: int) -> dict[str, Any]:
    """Rows of 8 KiB up to the error, and the end of the training when there is room again."""
    path, texts = folder / "log.csv", [f"{epoch:08d}" * 1000 for epoch in range(140)]
    path.unlink(missing_ok=True)
    leave(folder, free)

    async def rows() -> tuple[int, int | None]:
        logger, error = CSVLogger(path), None
        await logger.on_train_begin()
        written = 0
        try:
            for written, text in enumerate(texts):
                await logger.on_epoch_end(written, {"text": text})
            written += 1
        except OSError as raised:
            error = raised.errno
        (folder / "ballast").unlink()
        await logger.on_train_end()
        return written, error

    written, error = asyncio.run(rows())
    wanted = "".join(f"{epoch},{text}\n" for epoch, text in enumerate(texts[:written]))
    # Of the row that failed there is nothing, and the header comes with the first one.
    whole = path.read_text() == (f"epoch,text\n{wanted}" if written else "")
    return {"errno": error, "written": written, "whole": whole}


def event_file(folder: Path, free: int) -> dict[str, Any]:
    """Records of 8 KiB up to the error."""
    for old in folder.glob("events*"):
        old.unlink()
    leave(folder, free)
    records = [opening(1.0), *(scalars(step, 2.0, {f"{step:08d}" * 1000: 1.0}) for step in range(140))]
    file, written, error = EventFile(str(folder), "run"), 0, None
    try:
        for record in records:
            file.append([record])
            written += 1
    except OSError as raised:
        error = raised.errno
    (folder / "ballast").unlink()
    file.close()
    whole = Path(file.path).read_bytes() == frames(records[:written])
    return {"errno": error, "written": written, "whole": whole}


def training(folder: Path, free: int) -> dict[str, Any]:
    """A whole training whose records do not find room on the disk as it is."""
    said: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asynccb").addHandler(log)
    model = Sequential([Dense(4, input_dim=4)], seed=1)
    model.compile("sgd", "mse")
    board = TensorBoard(folder, update_freq="batch")
    x = np.zeros((64, 4), np.float32)
    history = asyncio.run(Trainer(model).fit(x, x, batch_size=2, epochs=60, verbose=0, callbacks=[board]))
    return {
        "epochs": len(history.epoch),
        "failures": [(each.callback, each.exception.errno, each.times) for each in history.failures],
        "said": said,
        "dropped": board.dropped,
    }


KINDS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "model file": model_file("half a disk"),
    "model file, by the library": model_file("half a disk, by the library"),
    "CSV": csv_file,
    "event file": event_file,
    "training": training,
}


def main(kind: str, folder: str, steps: str) -> None:
    for step in range(int(steps)):
        free = MOST_FREE * step // int(steps)
        print(json.dumps({"free": free} | KINDS[kind](Path(folder), free)))


if __name__ == "__main__":
    main(*sys.argv[1:])
