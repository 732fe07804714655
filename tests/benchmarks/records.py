"""Records a second: on the thread that trains, and in total until in the file; beside peers and a limit.

    python tests/benchmarks/records.py [--rounds 7] [--records 20000]

Scalars: ``loss`` and ``acc`` of every batch. Ours are a whole ``fit`` of a model that does nothing, with
``TensorBoard(update_freq="batch")``; "on the thread" is what the training thread takes from its first batch
to its last beyond a fit without callbacks, "in total" what the fit takes beyond one, with the file written,
forced onto the disk and closed. tensorboardX and torch are ``SummaryWriter`` used directly, two
``add_scalar`` a step, then ``close()``.

Rows: ours are epochs of one batch with ``CSVLogger``, against Keras' ``CSVLogger`` called directly.

The limit of each is a plain loop that appends the same bytes, one write a record through a buffer of 64 KiB,
then fsync (scalars) or close (rows): what the file itself costs.

All rows are measured in turn within each round, after one round that does not count, with one BLAS thread,
and shown as the median and the range over the rounds, in microseconds a record (a record is one batch's two
scalars, or one epoch's row). Ratios are taken within a round. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np  # noqa: E402  # after the thread counts, which it reads once

from asynccb import Callback, Trainer  # noqa: E402
from asynccb.callbacks import CSVLogger, TensorBoard  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.protocols import Batch


class Took(NamedTuple):
    """Seconds."""

    thread: float
    total: float


class NoModel:
    """A model that does nothing, and knows when its first and its last batch were."""

    metrics_names = ("loss", "acc")
    stop_training = False

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def train_batch(self, batch: Batch) -> dict[str, float]:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return {"loss": self.last, "acc": 0.5}


def fit(batches: int, epochs: int, *callbacks: Callback) -> Took:
    model, x = NoModel(), np.zeros((batches, 1))
    began = time.perf_counter()
    training = Trainer(model, seed=1).fit(
        x, batch_size=1, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    asyncio.run(training)
    return Took(model.last - model.first, time.perf_counter() - began)


# Scalars ----------------------------------------------------------------------------------------------------


def our_scalars(folder: Path, records: int) -> Took:
    bare = fit(records, 1)
    board = TensorBoard(folder / "ours", write_graph=False, update_freq="batch")
    ours = fit(records, 1, board)
    assert board.path is not None
    assert os.path.getsize(board.path) > 40 * records
    return Took(ours.thread - bare.thread, ours.total - bare.total)


def peer_scalars(module: str) -> Callable[[Path, int], Took]:
    def run(folder: Path, records: int) -> Took:
        writer = importlib.import_module(module).SummaryWriter(str(folder / module))
        began = time.perf_counter()
        for step in range(records):
            writer.add_scalar("batch_loss", 1.5 + step, step)
            writer.add_scalar("batch_acc", 0.5, step)
        added = time.perf_counter()
        writer.close()
        return Took(added - began, time.perf_counter() - began)

    return run


# Rows -------------------------------------------------------------------------------------------------------


def our_rows(folder: Path, records: int) -> Took:
    bare = fit(1, records)
    ours = fit(1, records, CSVLogger(folder / "ours.csv"))
    assert len((folder / "ours.csv").read_bytes().splitlines()) == records + 1
    return Took(ours.thread - bare.thread, ours.total - bare.total)


def keras_rows(folder: Path, records: int) -> Took:
    import keras

    logger = keras.callbacks.CSVLogger(str(folder / "keras.csv"))
    logger.set_model(NoModel())
    logger.on_train_begin()
    began = time.perf_counter()
    for epoch in range(records):
        logger.on_epoch_end(epoch, {"loss": 1.5 + epoch, "acc": 0.5})
    logged = time.perf_counter()
    logger.on_train_end()
    return Took(logged - began, time.perf_counter() - began)


# Limits -----------------------------------------------------------------------------------------------------


def limit(size: int, *, sync: bool) -> Callable[[Path, int], Took]:
    """``size``: bytes of one record."""

    def run(folder: Path, records: int) -> Took:
        record = b"x" * size
        with open(folder / "limit", "wb", buffering=65536) as file:
            began = time.perf_counter()
            for _ in range(records):
                file.write(record)
            written = time.perf_counter()
            file.flush()
            if sync:
                os.fsync(file.fileno())
        return Took(written - began, time.perf_counter() - began)

    return run


# Tables -----------------------------------------------------------------------------------------------------


def measure(rows: dict[str, Callable[[Path, int], Took]], records: int, rounds: int) -> dict[str, list[Took]]:
    """Every row once a round, in turn, after one round that does not count; in microseconds a record."""
    figures: dict[str, list[Took]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, run in rows.items():
            with tempfile.TemporaryDirectory() as folder:
                gc.collect()
                took = run(Path(folder), records)
            if number:
                figures[name].append(Took(*(seconds / records * 1e6 for seconds in took)))
    return figures


def show(title: str, figures: dict[str, list[Took]]) -> None:
    ours = figures["ours"]
    print(f"\n{title}\n{'':20}{'on the thread':^45}{'in total':^45}")
    print(f"{'':20}" + f"{'us a record (range)':>26}{'a second':>11}{'ours /':>8}" * 2)
    for name, values in figures.items():
        line = f"{name:20}"
        for field in Took._fields:
            own = [getattr(value, field) for value in values]
            median = statistics.median(own)
            ratios = [getattr(a, field) / b for a, b in zip(ours, own, strict=True)]
            spread = f"{median:.2f} ({min(own):.2f} to {max(own):.2f})"
            line += f"{spread:>26}{1e6 / median:>11,.0f}{statistics.median(ratios):>8.2f}"
        print(line)


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, default=20_000)
    asked = parser.parse_args()

    scalars: dict[str, Callable[[Path, int], Took]] = {"ours": our_scalars}
    if installed("tensorboardX"):
        scalars["tensorboardX"] = peer_scalars("tensorboardX")
    if installed("torch", "tensorboard"):
        scalars["torch SummaryWriter"] = peer_scalars("torch.utils.tensorboard")
    scalars["limit, same bytes"] = limit(_bytes_of_scalars(), sync=True)
    show("Two scalars a batch", measure(scalars, asked.records, asked.rounds))

    rows: dict[str, Callable[[Path, int], Took]] = {"ours": our_rows}
    if installed("keras"):
        rows["Keras CSVLogger"] = keras_rows
    rows["limit, same bytes"] = limit(len(b"12345,0.5,12345.123456789\r\n"), sync=False)
    show("A row an epoch", measure(rows, asked.records // 10, asked.rounds))


def _bytes_of_scalars() -> int:
    from asynccb.callbacks.tensorboard.records import frames, scalars

    return len(frames([scalars(10_000, 1.0, {"loss": 1.0, "acc": 0.5}, "batch_")]))


if __name__ == "__main__":
    main()
