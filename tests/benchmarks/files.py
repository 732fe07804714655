"""Bytes to disk: a checkpoint beside the fastest way in which Python can write the same bytes.

    python tests/benchmarks/files.py [--rounds 5] [--sizes 1 40 256] [--tensors 10 200 2000] [--folder DIR]

A Sequential of so many tensors and megabytes saves itself. The limit writes as many bytes from one buffer: a
temporary file, posix_fallocate, one ``pwrite``, rename. Then both compute a SHA-256 in a second thread
beside the writing, then both fsync the file and its folder too, the limit while its digest is still being
computed; that is what a checkpoint really does.
"Arrays apart" is the same with every tensor in memory of its own, as a framework's model has it. Peers write
the same tensors to a temporary name and rename it, without a digest and an fsync, and are compared with the
plain limit.

Everything is done once with the other threads idle and once beside a thread that runs pure Python, and so
holds the interpreter lock whenever it can. All rows are measured in turn within each round, over a name that
was removed before; shown are the median and the range, in milliseconds, and the median and range of the
ratios within a round. Beside the busy thread peers have one round (h5py may take minutes). Quote ratios:
absolute times are those of this machine on this day. Leave the folder on the file system that you ask about.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import statistics
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import h5py  # noqa: E402  # after the thread counts, which numpy reads once
import numpy as np  # noqa: E402

from asynccb.models import Dense, Sequential  # noqa: E402
from asynccb.models.files import to_records  # noqa: E402
from asynccb.storage import direct  # noqa: E402
from asynccb.storage.hdf5 import ModelFile, write_model_file  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Row = Callable[[str], object]

SAVERS = 4


# What is written --------------------------------------------------------------------------------------------


def state_of(megabytes: float, tensors: int) -> Any:
    """The state of a model with half as many layers as tensors, each with a square kernel and a bias."""
    layers = tensors // 2
    units = int((megabytes * 1e6 / 4 / layers) ** 0.5)
    model = Sequential([Dense(units, input_dim=units), *[Dense(units) for _ in range(layers - 1)]], seed=1)
    model.compile("sgd", "mse")
    return model.capture()


def apart(state: Any) -> ModelFile:
    """The same file, each tensor in memory of its own."""
    records = to_records(state, weights_only=False)
    arrays = [array.copy() for array in records.arrays()]
    return records._replace(memory=tuple(arrays[index] for index in records.layout.order))


# Limits -----------------------------------------------------------------------------------------------------


def raw(data: memoryview, *, digest: bool, sync: bool) -> Row:
    def write(path: str) -> None:
        temporary = f"{path}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        hashing = threading.Thread(target=lambda: hashlib.sha256(data).digest())
        if digest:
            hashing.start()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, len(data))
        assert os.pwrite(descriptor, data, 0) == len(data)
        if sync:
            os.fsync(descriptor)
        if digest:
            hashing.join()
        os.close(descriptor)
        os.replace(temporary, path)
        if sync:
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    return write


# Ours, whole and without its parts --------------------------------------------------------------------------


@contextlib.contextmanager
def without(*, digest: bool, sync: bool) -> Iterator[None]:
    """Takes the digest or the fsync out of every save inside."""

    @contextlib.contextmanager
    def no_digest(pieces: Any, size: int) -> Iterator[Callable[[], bytes]]:
        yield lambda: bytes(32)

    kept = direct.digesting, os.fsync
    if digest:
        direct.digesting = no_digest
    if sync:
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    try:
        yield
    finally:
        direct.digesting, os.fsync = kept


def ours(save: Row, *, digest: bool, sync: bool) -> Row:
    def write(path: str) -> None:
        with without(digest=not digest, sync=not sync):
            save(path)

    return write


# Peers ------------------------------------------------------------------------------------------------------


def renamed(save: Row) -> Row:
    def write(path: str) -> None:
        save(f"{path}.tmp.npz")
        os.replace(f"{path}.tmp.npz", path)

    return write


def peers(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Row]:
    def with_h5py(path: str) -> None:
        with h5py.File(path, "w", locking=False) as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)

    rows = {
        "h5py create_dataset": renamed(with_h5py),
        "numpy savez": renamed(lambda path: np.savez(path, **arrays)),
    }
    if importlib.util.find_spec("torch"):
        import torch

        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        rows["torch.save"] = renamed(lambda path: torch.save(tensors, path))
    if importlib.util.find_spec("safetensors"):
        from safetensors.numpy import save_file

        rows["safetensors"] = renamed(lambda path: save_file(arrays, path))
    return rows


# Measuring --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A thread of pure Python beside the block."""
    stop = threading.Event()

    def spin() -> None:
        count = 0
        while not stop.is_set():
            for _ in range(1000):
                count += 1

    thread = threading.Thread(target=spin)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


def timed(row: Row, path: str) -> float:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    began = time.perf_counter()
    row(path)
    return (time.perf_counter() - began) * 1e3


def measure(rows: dict[str, Row], rounds: int, path: str) -> dict[str, list[float]]:
    """Every row once a round, in turn; milliseconds."""
    figures: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            figures[name].append(timed(row, path))
    return figures


def show(figures: dict[str, list[float]], limits: dict[str, str]) -> None:
    print(f"  {'':28}{'median':>9}{'least':>9}{'most':>9}   ms      / its limit")
    for name, values in figures.items():
        line = f"  {name:28}{statistics.median(values):9.2f}{min(values):9.2f}{max(values):9.2f}"
        if name in limits:
            line += f"      {ratio(values, figures[limits[name]])}"
        print(line, flush=True)


def ratio(left: list[float], right: list[float]) -> str:
    if len(left) != len(right):
        right = [statistics.median(right)] * len(left)
    ratios = sorted(a / b for a, b in zip(left, right, strict=True))
    return f"{statistics.median(ratios):6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


PARTS = {
    "": {"digest": False, "sync": False},
    " + sha256": {"digest": True, "sync": False},
    " + sha256 + fsync": {"digest": True, "sync": True},
}


def compare(megabytes: float, tensors: int, rounds: int, path: str) -> None:
    state = state_of(megabytes, tensors)
    single = apart(state)
    state.save(path)  # the template is made
    size = os.path.getsize(path)
    data = memoryview(np.ones(size, np.uint8))
    arrays = {name: array for name, array in state.arrays.items() if not name.startswith("optimizer/")}
    rows, limits = {}, {}
    for part, parts in PARTS.items():
        rows[f"limit{part}"] = raw(data, **parts)
        rows[f"ours{part}"] = ours(state.save, **parts)
        rows[f"arrays apart{part}"] = ours(lambda where: write_model_file(where, single), **parts)
        limits |= {f"{name}{part}": f"limit{part}" for name in ("ours", "arrays apart")}
    others = peers(arrays)
    limits |= dict.fromkeys(others, "limit")
    for row in (rows | others).values():
        row(path)  # once, unmeasured
    for load in (False, True):
        print(f"\n{megabytes:g} MB, {tensors} tensors, {size / 1e6:.1f} MB in the file, {words(load)}")
        with busy(load):
            figures = measure(rows, rounds, path) | measure(others, 1 if load else rounds, path)
        show(figures, limits)


def words(load: bool) -> str:
    return "beside a thread that holds the interpreter lock" if load else "idle"


def savers(rounds: int, folder: str) -> None:
    """Several trainings save at once."""
    states = [state_of(40, 200) for _ in range(SAVERS)]
    first = os.path.join(folder, "0.h5")
    states[0].save(first)
    buffers = [memoryview(np.ones(os.path.getsize(first), np.uint8)) for _ in states]

    def together(rows: list[Row]) -> Row:
        def write(path: str) -> None:
            threads = [
                threading.Thread(target=row, args=(os.path.join(folder, f"{index}.h5"),))
                for index, row in enumerate(rows)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return write

    rows: dict[str, Row] = {}
    for part, parts in PARTS.items():
        rows[f"limit{part}"] = together([raw(data, **parts) for data in buffers])
        row = together([state.save for state in states])
        rows[f"ours{part}"] = ours(row, **parts)
    limits = {f"ours{part}": f"limit{part}" for part in PARTS}
    print(f"\n{SAVERS} at once, each 40 MB in 200 tensors, idle")
    show(measure(rows, rounds, os.path.join(folder, "none")), limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 40, 256], help="megabytes")
    parser.add_argument("--tensors", type=int, nargs="*", default=[10, 200, 2000])
    parser.add_argument("--folder", help="where to write; default: the folder for temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for megabytes in given.sizes:
            for tensors in given.tensors:
                compare(megabytes, tensors, given.rounds, os.path.join(folder, "model.h5"))
        savers(given.rounds, folder)


if __name__ == "__main__":
    main()
