"""The command line, as a user starts it: in a process, a folder and a terminal of its own."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas
import pyte
import pytest
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asynccb.cli import main
from asynccb.models import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WAIT = 45.0
"""Seconds after which what should have happened has not."""

ENVIRONMENT = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error::ResourceWarning"}

FOR_EVER = "1000000"

# The demo with a model that never returns from its first batch, so that a first Ctrl-C cannot end it.
STUCK = """
import sys, threading
from asynccb import cli
from asynccb.testing import ScriptedModel

class Stuck(ScriptedModel):
    def train_batch(self, batch):
        while True:  # again and again: a print at the very moment at which the bar appears may be drawn over
            print("stuck", flush=True)
            threading.Event().wait(0.2)

cli._model = lambda seed: Stuck()
sys.exit(cli.main(["demo"]))
"""


def _demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asynccb", "demo", *options],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=WAIT,
        check=False,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in ``tmp_path``; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def popen(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _has_a_row(path: Path) -> bool:
    return path.exists() and path.read_text().count("\n") >= 2


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


# ---------------------------------------------------------------- what it leaves


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after a demo of four epochs, and what that printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = _demo(folder, "--epochs", "4")
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_pandas_reads_the_csv(trained: tuple[Path, str]) -> None:
    frame = pandas.read_csv(trained[0] / "asynccb-demo" / "log.csv")
    assert list(frame.columns) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss"]
    assert list(frame["epoch"]) == [0, 1, 2, 3]
    assert frame["loss"].is_monotonic_decreasing
    assert frame["val_accuracy"].iloc[-1] > 0.7


def test_the_checkpoints_hold_the_best_and_the_last_model(trained: tuple[Path, str]) -> None:
    folder = trained[0] / "asynccb-demo"
    digits = load_digits()
    x, y = digits.data[-360:].astype("float32") / 16, digits.target[-360:]
    losses = [float(row["val_loss"]) for row in _rows(folder / "log.csv")]
    assert load_model(folder / "last.hdf5").evaluate(x, y)["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert load_model(folder / "best.hdf5").evaluate(x, y)["loss"] == pytest.approx(min(losses), rel=1e-5)
    with h5py.File(folder / "last.hdf5") as file:
        assert "model_config" in file.attrs
        assert "model_weights" in file


def test_tensorboard_reads_its_logs(trained: tuple[Path, str]) -> None:
    folder = trained[0] / "asynccb-demo"
    logged = [(int(row["epoch"]), float(row["val_loss"])) for row in _rows(folder / "log.csv")]
    shown = _scalars(folder / "tensorboard", "val_loss")
    assert [step for step, _ in shown] == [0, 1, 2, 3]
    assert np.allclose(shown, logged, rtol=1e-6)


def test_it_says_what_was_written_and_how_to_look_at_it(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0].startswith("Training on 1437 handwritten digits, validating on 360. ")
    assert "asynccb-demo/log.csv 4 rows" in lines
    assert "asynccb-demo/last.hdf5 the model of epoch 4" in lines
    assert "asynccb-demo/tensorboard events" in lines
    assert "tensorboard --logdir asynccb-demo (pip install tensorboard)" in lines
    assert "pandas.read_csv('asynccb-demo/log.csv') (pip install pandas)" in lines
    assert sorted(path.name for path in (folder / "asynccb-demo").iterdir()) == [
        "backup",
        "best.hdf5",
        "last.hdf5",
        "log.csv",
        "tensorboard",
    ]


def test_without_a_terminal_each_epoch_is_a_plain_line(trained: tuple[Path, str]) -> None:
    printed = trained[1]
    assert [line.split(" - ")[0] for line in printed.splitlines() if line.startswith("Epoch")] == [
        "Epoch 1/4",
        "Epoch 2/4",
        "Epoch 3/4",
        "Epoch 4/4",
    ]
    assert "\x1b" not in printed
    assert "\r" not in printed


def test_concurrent_trainings_have_a_folder_and_a_seed_each(tmp_path: Path) -> None:
    done = _demo(tmp_path, "--runs", "2", "--epochs", "2", "--out", "two of them", "--seed", "7")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (_rows(tmp_path / "two of them" / name / "log.csv") for name in ("run-1", "run-2"))
    assert [len(first), len(second)] == [2, 2]
    assert first != second
    assert "run-2: Epoch 2/2 - " in done.stdout
    assert "tensorboard --logdir 'two of them'" in done.stdout
    alone = _demo(tmp_path, "--epochs", "2", "--out", "alone", "--seed", "8")
    assert alone.returncode == 0
    assert _rows(tmp_path / "alone" / "log.csv") == second


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_stops_cleanly_and_says_what_was_written(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int, status: int
) -> None:
    process = start("-m", "asynccb", "demo", "--epochs", FOR_EVER, "--runs", "2", "--out", "out")
    logs = [tmp_path / "out" / name / "log.csv" for name in ("run-1", "run-2")]
    _wait_for(lambda: all(map(_has_a_row, logs)), process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=WAIT)
    assert process.returncode == status, errors
    assert errors == "Stopping after this batch; once more leaves at once.\n"
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for log in logs:
        rows = _rows(log)
        assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
        assert all(row["loss"] for row in rows)
        assert f"{log.relative_to(tmp_path)} {len(rows)} row{'s' if len(rows) > 1 else ''}" in lines
        assert load_model(log.with_name("last.hdf5")).predict(np.zeros((1, 64), "float32")).shape == (1, 10)
        assert [step for step, _ in _scalars(log.with_name("tensorboard"), "loss")] == list(range(len(rows)))
        assert {path.name for path in log.parent.iterdir()} <= {
            "backup",
            "best.hdf5",
            "last.hdf5",
            "log.csv",
            "tensorboard",
        }
    assert sum(": stopped, " in line for line in lines) == 2


def test_what_a_signal_stopped_goes_on_to_the_same_rows_and_models(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("-m", "asynccb", "demo", "--epochs", FOR_EVER, "--out", "killed")
    folder = tmp_path / "killed"
    _wait_for(lambda: _has_a_row(folder / "log.csv"), process)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 143, errors
    again = f"python -m asynccb demo --resume --epochs {FOR_EVER} --runs 1 --out killed --seed 7"
    assert printed.splitlines()[-1].strip() == again
    epochs = str(len(_rows(folder / "log.csv")) + 2)
    resumed = _demo(tmp_path, "--resume", "--epochs", epochs, "--out", "killed")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert _demo(tmp_path, "--epochs", epochs, "--out", "whole").returncode == 0
    for name in ("log.csv", "last.hdf5", "best.hdf5"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_demo_that_begins_anew_leaves_no_backups_of_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        assert _demo(tmp_path, "--epochs", "2", "--out", "demo").returncode == 0
    kept = sorted(path.name for path in (tmp_path / "demo" / "backup").glob("*.h5"))
    assert len(kept) <= 2


def test_what_had_ended_is_listed_again_and_fewer_epochs_than_there_are_list_nothing(tmp_path: Path) -> None:
    assert _demo(tmp_path, "--epochs", "2", "--out", "demo").returncode == 0
    again = _demo(tmp_path, "--resume", "--epochs", "2", "--out", "demo")
    lines = [" ".join(line.split()) for line in again.stdout.splitlines()]
    assert lines[3:6] == [
        "demo/log.csv 2 rows",
        "demo/best.hdf5 as it was when this training went on",
        "demo/last.hdf5 as it was when this training went on",
    ]
    fewer = _demo(tmp_path, "--resume", "--epochs", "1", "--out", "demo")
    assert fewer.returncode == 1
    assert "demo/log.csv" not in fewer.stdout


def test_a_demo_that_begins_anew_takes_no_backup_from_one_that_is_under_way(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("-m", "asynccb", "demo", "--epochs", FOR_EVER, "--out", "demo")
    _wait_for(lambda: _has_a_row(tmp_path / "demo" / "log.csv"), process)
    process.send_signal(signal.SIGSTOP)  # so that it makes no new one
    before = sorted((tmp_path / "demo").rglob("*"))
    second = _demo(tmp_path, "--epochs", "1", "--out", "demo")
    assert second.returncode == 1
    assert second.stderr.startswith("asynccb: error: ")
    assert f"(process {process.pid} on " in second.stderr
    assert sorted((tmp_path / "demo").rglob("*")) == before
    # Killed where it stood still, it could leave the temporary file of a save.
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT)
    assert process.returncode == 130


def test_the_second_ctrl_c_leaves_at_once_though_a_batch_is_stuck(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("-c", STUCK)
    assert process.stdout is not None
    assert process.stderr is not None
    while process.stdout.readline() not in ("stuck\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Stopping after this batch; once more leaves at once.\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, printed, errors) == (130, "", "")


def test_two_signals_at_once_are_two(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("-c", STUCK)
    assert process.stdout is not None
    while process.stdout.readline() not in ("stuck\n", ""):
        pass
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
    process.communicate(timeout=WAIT)
    assert process.returncode in (130, 143)  # whichever the system delivers last


def test_the_signals_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["demo", "--epochs", "1"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "run-1: completed, 1 epoch, " in capsys.readouterr().out


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["demo", "--epochs", "0"], "argument --epochs: '0': a whole number from 1 on is wanted"),
        (["demo", "--runs", "two"], "argument --runs: 'two': a whole number from 1 on is wanted"),
        (["demo", "--seed", "-1"], "argument --seed: '-1': a whole number from 0 on is wanted"),
        (["dome"], "invalid choice: 'dome'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_said_with_status_2(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_one_line_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = _demo(tmp_path, "--out", "taken")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("asynccb: error: run-1: ")
    assert "taken" in line
    assert "nothing was written" in done.stdout
    assert (tmp_path / "taken").read_text() == "a file"


def test_without_scikit_learn_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    expected = "asynccb: error: the demo needs scikit-learn: pip install 'asynccb[demo]'\n"
    assert capsys.readouterr().err == expected


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m asynccb demo --epochs 1 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


# ---------------------------------------------------------------- on a terminal


class _Terminal:
    """A process on a terminal of its own, and the screen that a person would see."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 110))
        # A terminal throws away what it has not yet shown when Ctrl-C is pressed; here all is to be read.
        modes = termios.tcgetattr(slave)
        modes[3] |= termios.NOFLSH
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "110"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C comes as a signal
        )
        os.close(slave)
        self.screen = pyte.HistoryScreen(110, 24, history=10_000, ratio=1.0)
        self._stream = pyte.ByteStream(self.screen)
        self._deadline = time.monotonic() + WAIT

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def read_until(self, seen: Callable[[str], bool]) -> None:
        while not seen("\n".join(self.screen.display)):
            assert self._read(), "\n".join(self.screen.display)

    def read_to_the_end(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=WAIT)

    def lines(self) -> list[str]:
        """All that stands on the screen and above it."""
        above = [
            "".join(row[column].data for column in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return [line.rstrip() for line in (*above, *self.screen.display)]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        assert time.monotonic() < self._deadline, "\n".join(self.screen.display)
        if not select.select([self._master], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self._stream.feed(data)
        return bool(data)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., _Terminal]]:
    opened: list[_Terminal] = []

    def open_terminal(*command: str) -> _Terminal:
        opened.append(_Terminal(tmp_path, *command))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_on_a_terminal_a_live_bar_is_drawn_and_ctrl_c_leaves_whole_lines(
    terminal: Callable[..., _Terminal],
) -> None:
    person = terminal("-m", "asynccb", "demo", "--epochs", FOR_EVER)
    person.read_until(lambda screen: "━" in screen and f"Epoch 3/{FOR_EVER} - " in screen)
    person.press(b"\x03")
    assert person.read_to_the_end() == 130
    lines = person.lines()
    assert not any("━" in line for line in lines)
    assert "Stopping after this batch; once more leaves at once." in lines
    ended = [line for line in lines if line.startswith("Epoch ")]
    assert [line.split(" - ")[0] for line in ended] == [
        f"Epoch {epoch}/{FOR_EVER}" for epoch in range(1, len(ended) + 1)
    ]
    assert any(line.startswith(f"run-1: stopped, {len(ended)} epochs") for line in lines)
    assert not person.screen.cursor.hidden


def test_on_a_terminal_the_second_ctrl_c_gives_the_cursor_back(terminal: Callable[..., _Terminal]) -> None:
    person = terminal("-c", STUCK)
    person.read_until(lambda screen: "stuck" in screen and person.screen.cursor.hidden)
    person.press(b"\x03")
    person.read_until(lambda screen: "once more leaves at once." in screen)
    person.press(b"\x03")
    assert person.read_to_the_end() == 130
    assert not person.screen.cursor.hidden
