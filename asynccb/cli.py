"""The command line: ``asynccb demo`` trains a classifier of handwritten digits and shows what that leaves.

The only place that touches signals. The first Ctrl-C (or SIGTERM) stops the trainings after the batch under
way: a backup is made there, every file is written whole and closed, and the command says what there is and
how to go on. The second leaves at once; what stands under a file's name is whole even then.

Exit status: 0 done; 1 failed; 2 wrong usage; 130 (SIGTERM: 143) stopped from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from asynccb.callbacks import BackupAndRestore, Callback, CSVLogger, ModelCheckpoint, TensorBoard
from asynccb.errors import AsynccbError
from asynccb.models import Activation, Dense, Dropout, Sequential
from asynccb.storage.backups import BackupFolder
from asynccb.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType, TracebackType

    from asynccb.callbacks import History
    from asynccb.run import Run

__all__ = ["main"]

BACKUPS = "backup"
VALIDATED = 0.2
"""The part of the digits that is validated on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: None means ``sys.argv[1:]``.

    Returns:
        The exit status.

    Raises:
        SystemExit: wrong usage (2), or ``--help`` (0).
    """
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except KeyboardInterrupt:
        # Before the trainings have begun and after they have ended, Ctrl-C is Python's own.
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Nobody reads on. The interpreter's own flush at exit must not fail on it once more.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except (AsynccbError, OSError, _Missing) as error:
        return _fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asynccb", description="Await a training: callbacks that never make a batch wait."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a classifier of handwritten digits, with live progress",
        description="Trains a classifier of scikit-learn's handwritten digits; leaves a CSV, checkpoints and "
        "TensorBoard logs. Ctrl-C once stops cleanly, twice leaves at once; --resume goes on after either.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_whole(1), default=20, metavar="N", help="epochs of each training")
    demo.add_argument("--runs", type=_whole(1), default=1, metavar="N", help="trainings at the same time")
    demo.add_argument("--out", type=Path, default="asynccb-demo", metavar="FOLDER", help="where to write")
    demo.add_argument(
        "--seed", type=_whole(0), default=7, metavar="N", help="the first training's; +1 for each"
    )
    demo.add_argument(
        "--resume", action="store_true", help="go on from the backups of an interrupted or killed demo"
    )
    demo.add_argument("--stats", action="store_true", help="say where the time of each training went")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {least} on is wanted")
        return value

    return number


# What a training leaves


class _Saved(Callback):
    """Notes which checkpoints have become durable, and of which epoch."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}

    async def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        if not path.endswith(".h5"):  # a backup
            self.epochs[path] = epoch


class _Training(NamedTuple):
    """A training under way, and what says afterwards what it has written."""

    run: Run
    csv: Path
    saved: _Saved
    tensorboard: TensorBoard

    @classmethod
    def start(cls, data: tuple[Any, Any], folder: Path, seed: int, name: str, options: Any) -> _Training:
        training = Trainer(_model(seed), seed=seed)
        csv, saved, tensorboard = folder / "log.csv", _Saved(), TensorBoard(folder / "tensorboard")
        run = training.start(
            *data,
            epochs=options.epochs,
            validation_split=VALIDATED,
            callbacks=[
                CSVLogger(csv),
                ModelCheckpoint(folder / "best.hdf5", save_best_only=True),
                ModelCheckpoint(folder / "last.hdf5"),
                tensorboard,
                saved,
                BackupAndRestore(folder / BACKUPS),
            ],
            resume=None if options.resume else False,
            name=name,
        )
        return cls(run, csv, saved, tensorboard)

    def written(self) -> list[tuple[str, str]]:
        """What there is now, each with what is in it."""
        rows = len(self.run.history.epoch)
        files = [(str(self.csv), _count(rows, "row"))] if rows and self.csv.exists() else []
        for model in (self.csv.with_name("best.hdf5"), self.csv.with_name("last.hdf5")):
            if (epoch := self.saved.epochs.get(str(model))) is not None:
                files.append((str(model), f"the model of epoch {epoch + 1}"))
            elif self.run.resumed is not None and model.exists():
                files.append((str(model), "as it was when this training went on"))
        if self.tensorboard.path is not None and os.path.exists(self.tensorboard.path):
            files.append((str(self.csv.with_name("tensorboard")), "events"))
        return files


def _model(seed: int) -> Sequential:
    model = Sequential(
        [
            Dense(128, activation="relu", input_dim=64),
            Dropout(0.2),
            Dense(10),
            Activation("softmax"),
        ],
        seed=seed,
    )
    model.compile(optimizer="rmsprop", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class _Missing(Exception):
    """What the demo needs is not installed."""


def _digits() -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _Missing("the demo needs scikit-learn: pip install 'asynccb[demo]'") from error
    digits = load_digits()
    return digits.data.astype("float32") / 16.0, digits.target


# The demo


def _demo(options: argparse.Namespace) -> int:
    data = _digits()
    with warnings.catch_warnings():
        # An interrupted epoch is not validated and so cannot be the best one: nothing to warn of here.
        warnings.filterwarnings("ignore", "ModelCheckpoint skips epochs without validation", RuntimeWarning)
        return asyncio.run(_train(data, options))


async def _train(data: tuple[Any, Any], options: argparse.Namespace) -> int:
    trained = int(len(data[0]) * (1 - VALIDATED))
    print(
        f"Training on {trained} handwritten digits, validating on {len(data[0]) - trained}. "
        "Ctrl-C stops; twice leaves at once.",
        flush=True,
    )
    trainings: list[_Training] = []
    with _Interrupts(trainings) as interrupts:
        names = [f"run-{number + 1}" for number in range(options.runs)]
        folders = [options.out / name for name in names] if options.runs > 1 else [options.out]
        if not options.resume:
            for folder in folders:
                _forget_backups(folder / BACKUPS)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            trainings.append(_Training.start(data, folder, options.seed + number, name, options))
        # One that fails does not end the others.
        results = await asyncio.gather(*(training.run for training in trainings), return_exceptions=True)
    for training, result in zip(trainings, results, strict=True):
        _report(training, result)
        if options.stats:
            print(f"\nWhere the time of {training.run.name} went:\n{training.run.stats.report()}")
    _say_how_to_look(options.out, [path for training in trainings for path, _ in training.written()])
    if interrupts.first is not None:
        print(f"\nGo on with it:\n  {_again(options)}")
        return 128 + interrupts.first
    return 1 if any(isinstance(result, BaseException) for result in results) else 0


def _forget_backups(path: Path) -> None:
    """A demo that begins anew: the backups of an earlier one would only lie there.

    Raises:
        FolderBusy: they are of one that is under way.
    """
    if not path.exists():
        return
    folder = BackupFolder(path)
    folder.lock("a demo that begins")
    try:
        for backup in folder.files():
            os.unlink(backup)
    finally:
        folder.unlock()


def _again(options: argparse.Namespace) -> str:
    asked = {"epochs": options.epochs, "runs": options.runs, "out": options.out, "seed": options.seed}
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in asked.items()]
    return " ".join(["python -m asynccb demo --resume", *given])


def _report(training: _Training, result: History | BaseException) -> None:
    run = training.run
    if isinstance(result, BaseException):
        _fail(f"{run.name}: {result or type(result).__name__}")
    else:
        rows = result.rows()
        means = ", ".join(f"{k} {v:.4f}" for k, v in (rows[-1] if rows else {}).items() if k != "epoch")
        print(f"\n{run.name}: {run.outcome}, {_count(len(rows), 'epoch')}" + (f", {means}" if means else ""))
    files = training.written()
    width = max((len(path) for path, _ in files), default=0)
    for path, what in files:
        print(f"  {path:{width}}  {what}")
    if not files:
        print("  nothing was written")


def _say_how_to_look(out: Path, written: list[str]) -> None:
    csv = next((path for path in written if path.endswith(".csv")), None)
    model = next((path for path in written if path.endswith(".hdf5")), None)
    if written:
        print("\nLook at it:")
        print(f"  tensorboard --logdir {shlex.quote(str(out))}    (pip install tensorboard)")
    if csv:
        print(f"  pandas.read_csv({csv!r})    (pip install pandas)")
    if model:
        print(f"  asynccb.models.load_model({model!r})")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fail(error: object) -> int:
    print(f"asynccb: error: {error}", file=sys.stderr)
    return 1


# Signals


class _Interrupts:
    """Borrows SIGINT and SIGTERM for a block on the event loop, and gives them back at its end.

    The first signal stops the trainings, the second ends the process.

    Attributes:
        first: the number of the first signal, or None.
    """

    def __init__(self, trainings: list[_Training]) -> None:
        self.first: int | None = None
        self._trainings = trainings
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, self._stop, number)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda n, _: loop.call_soon_threadsafe(self._stop, n))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number, before in self._before.items():
            try:
                loop.remove_signal_handler(number)
            except NotImplementedError:
                pass
            signal.signal(number, before)

    def _stop(self, number: int) -> None:
        if self.first is not None:  # both came before the loop looked
            _leave(number, None)
        self.first = number
        for training in self._trainings:
            training.run.stop("interrupted")
        # Past the loop: a terminal that is held (Ctrl-S) holds the line below, and must not hold the second.
        for borrowed in self._before:
            signal.signal(borrowed, _leave)
        print("Stopping after this batch; once more leaves at once.", file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process without a word to anybody: no thread, file or terminal can hold it."""
    stream = sys.__stdout__
    try:
        # The bars have hidden the cursor.
        if stream is not None and stream.isatty() and select.select([], [stream], [], 0)[1]:
            os.write(stream.fileno(), b"\x1b[?25h\r\n")
    except (OSError, ValueError):
        pass
    os._exit(128 + number)
