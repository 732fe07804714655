"""ProgbarLogger: what stands on a real terminal at the end, and that no stream can harm a training."""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import io
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from terminal import Terminal, timeless

from asynccb.callbacks import progbar_logger, progress
from asynccb.callbacks.progbar_logger import ProgbarLogger
from asynccb.callbacks.progress import Display
from asynccb.callbacks.progress_meter import Meter, duration, number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARRAYS = {"epochs": 2, "samples": 10, "batch_size": 4, "steps": 3, "metrics": ["loss", "val_loss"]}


async def fit(
    callback: ProgbarLogger,
    *epochs: dict[str, Any],
    params: dict[str, Any] | None = None,
    name: str = "run-1",
) -> None:
    callback.set_params({"verbose": 1, **(ARRAYS if params is None else params)})
    callback.run = SimpleNamespace(name=name)
    await callback.on_train_begin({})
    for epoch, logs in enumerate(epochs):
        await callback.on_epoch_begin(epoch, {})
        if "on_train_batch_end" in vars(callback):
            for batch, size in enumerate((4, 4, 2)):
                await callback.on_train_batch_end(batch, {"batch": batch, "size": size, "loss": 1.0})
        await callback.on_epoch_end(epoch, logs)
    await callback.on_train_end({})


# ---------------------------------------------------------------- arguments


def test_the_signature_is_the_pages_and_the_newer_ones_are_keyword_only() -> None:
    parameters = inspect.signature(ProgbarLogger).parameters.values()
    assert [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in parameters] == [
        ("count_mode", "samples", False),
        ("file", None, True),
        ("interval", 0.1, True),
    ]


def test_an_unknown_count_mode_is_refused_in_the_words_of_keras() -> None:
    with pytest.raises(ValueError, match=r"^Unknown `count_mode`: foo$"):
        ProgbarLogger("foo")  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [-1.0, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(interval: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        ProgbarLogger(interval=interval)


def test_a_stream_that_is_no_terminal_costs_no_batch_hook() -> None:
    assert "on_train_batch_end" not in vars(ProgbarLogger(file=io.StringIO()))


# ---------------------------------------------------------------- what is said


class Clock:
    """A second passes with each look."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def __call__(self) -> float:
        return next(self._seconds)


def test_a_bar_counts_samples_and_shows_the_time_left_and_the_means_so_far() -> None:
    meter = Meter(ARRAYS, "samples", Clock())
    meter.begin(0)
    said = []
    for batch, (size, loss) in enumerate([(4, 1.0), (4, 2.0), (2, 2.75)]):
        meter.add(batch, {"batch": batch, "size": size, "loss": loss, "lr": 0.1})
        said.append((meter.title, meter.status()))
    assert said == [
        ("Epoch 1/2", "4/10 - ETA: 1s - loss: 1.0000"),
        ("Epoch 1/2", "8/10 - ETA: 0s - loss: 1.5000"),
        ("Epoch 1/2", "10/10 - ETA: 0s - loss: 1.7500"),
    ]
    assert meter.summary({"val_loss": 1.9, "loss": 1.75, "lr": 0.1}) == (
        "Epoch 1/2 - 4s - loss: 1.7500 - val_loss: 1.9000"
    )


def test_in_steps_too_the_means_are_weighted_by_size_and_the_line_has_the_epochs_own_value() -> None:
    meter = Meter(ARRAYS, "steps", Clock())
    meter.begin(1)
    for batch, (size, loss) in enumerate([(4, 1.0), (4, 2.0), (2, 3.0)]):
        meter.add(batch, {"batch": batch, "size": size, "loss": loss})
    assert meter.status() == "3/3 - ETA: 0s - loss: 1.8000"
    assert meter.summary({"loss": 1.5}) == "Epoch 2/2 - 2s - loss: 1.5000"


def test_values_of_the_epoch_so_far_are_shown_as_they_are() -> None:
    meter = Meter({**ARRAYS, "accumulated": True}, "samples", Clock())
    for batch, loss in enumerate([4.0, 2.0]):
        meter.add(batch, {"batch": batch, "size": 4, "loss": loss})
    assert meter.status().endswith("loss: 2.0000")


def test_batches_that_were_dropped_on_the_way_count_all_the_same() -> None:
    meter = Meter(ARRAYS, "samples", Clock())
    meter.add(2, {"batch": 2, "size": 2, "loss": 3.0})
    assert meter.status() == "10/10 - ETA: 0s - loss: 3.0000"


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"steps": 4, "metrics": ["loss"]}, "2/4 - ETA: 1s - loss: 1.0000"),  # a generator counts steps
        ({"steps": None, "metrics": ["loss"]}, "2 - 1s - loss: 1.0000"),
        ({"samples": 12, "steps": 3, "metrics": []}, "8/12 - ETA: 0s"),
        ({}, "2 - 1s"),
    ],
)
def test_missing_params_are_no_error(params: dict[str, Any], status: str) -> None:
    meter = Meter(params, "samples", Clock())
    for batch in range(2):
        meter.add(batch, {"batch": batch, "size": 4, "loss": 1.0})
    assert meter.status() == status


class Hands:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_goes_on_at_the_batch_where_another_one_was_and_the_time_between_does_not_count() -> None:
    hands, later = Hands(), Hands()
    first, second = Meter(ARRAYS, "samples", hands), Meter(ARRAYS, "samples", later)
    first.begin(1)
    hands.now = 5.0
    first.add(0, {"size": 4, "loss": 1.0})
    later.now = 1000.0
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    hands.now, later.now = 7.0, 1002.0
    for meter in (first, second):
        meter.add(1, {"size": 4, "loss": 2.0})
    assert second.title == first.title == "Epoch 2/2"
    assert second.status() == first.status() == "8/10 - ETA: 1s - loss: 1.5000"
    assert second.summary({"loss": 1.5}) == first.summary({"loss": 1.5}) == "Epoch 2/2 - 7s - loss: 1.5000"


def test_an_epoch_without_batches_is_no_error() -> None:
    meter = Meter(ARRAYS, "samples", Clock())
    assert meter.status() == "0/10 - 1s"
    assert meter.summary({}) == "Epoch 1/2 - 2s"


def test_without_names_of_metrics_all_numbers_of_the_logs_are_shown() -> None:
    meter = Meter({"metrics": []}, "samples", Clock())
    assert meter.summary({"loss": 1, "matrix": [1, 2]}) == "Epoch 1 - 1s - loss: 1.0000"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.75, "1.7500"),
        (-1.75, "-1.7500"),
        (0.0011, "0.0011"),
        (0.001, "1.0000e-03"),
        (1.2e-4, "1.2000e-04"),
        (-1.2e-4, "-1.2000e-04"),
        (0, "0.0000e+00"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_four_digits_and_an_exponent_near_zero(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0s"), (59, "59s"), (65, "1:05"), (3665, "1:01:05")])
def test_durations_read_as_clocks_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- not a terminal


@pytest.mark.asyncio
@pytest.mark.parametrize("verbose", [1, 2, "auto"])
async def test_where_there_is_no_terminal_each_epoch_is_one_plain_line(verbose: Any) -> None:
    file = io.StringIO()
    params = {**ARRAYS, "verbose": verbose}
    await fit(ProgbarLogger(file=file), {"loss": 1.75, "val_loss": 1.2e-4}, {"loss": 1.5}, params=params)
    assert file.getvalue() == (
        "Epoch 1/2 - 0s - loss: 1.7500 - val_loss: 1.2000e-04\nEpoch 2/2 - 0s - loss: 1.5000\n"
    )


@pytest.mark.asyncio
async def test_verbose_0_says_nothing_at_all() -> None:
    file = io.StringIO()
    await fit(ProgbarLogger(file=file), {"loss": 1.0}, params={**ARRAYS, "verbose": 0})
    assert file.getvalue() == ""


@pytest.mark.asyncio
async def test_standard_output_is_the_one_of_the_moment_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callback, file = ProgbarLogger(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    await fit(callback, {"loss": 1.0})
    assert file.getvalue() == "Epoch 1/2 - 0s - loss: 1.0000\n"


@pytest.mark.asyncio
async def test_trainings_that_share_a_stream_put_their_names_before_their_lines() -> None:
    file = io.StringIO()
    begun = asyncio.Barrier(3)

    class Together(ProgbarLogger):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            await begun.wait()
            await super().on_epoch_begin(epoch, logs)

    names = ["run-1", "run-2", "evil\x1b[2J"]
    await asyncio.gather(*(fit(Together(file=file), {"loss": 1.0}, name=name) for name in names))
    assert sorted(file.getvalue().splitlines()) == [
        r"evil\x1b[2J: Epoch 1/2 - 0s - loss: 1.0000",
        "run-1: Epoch 1/2 - 0s - loss: 1.0000",
        "run-2: Epoch 1/2 - 0s - loss: 1.0000",
    ]
    file.truncate(0)
    await fit(ProgbarLogger(file=file), {"loss": 1.0}, name="alone")
    assert "alone" not in file.getvalue()


UNSAFE = [chr(code) for code in (*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029)]
UNSAFE += ["\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))]
UNSAFE += ["\x1b[31m", "\x1b]8;;http://evil\x07", "\x1b]52;c;ZXZpbA==\x07"]


@pytest.mark.asyncio
async def test_no_name_of_a_metric_reaches_the_output_with_a_control_code() -> None:
    file = io.StringIO()
    names = [f"a{unsafe}b" for unsafe in UNSAFE]
    logs = dict.fromkeys(names, 1.0)
    await fit(ProgbarLogger(file=file), logs, params={"epochs": 1, "metrics": names})
    line, rest = file.getvalue().split("\n", 1)
    assert rest == ""
    assert not [unsafe for unsafe in UNSAFE if unsafe[0] in line]


# ---------------------------------------------------------------- streams that fail


@pytest.mark.asyncio
async def test_names_that_the_stream_cannot_encode_are_escaped() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    await fit(ProgbarLogger(file=file), {"größe": 1.0}, params={"epochs": 1, "metrics": ["größe"]})
    assert raw.getvalue() == b"Epoch 1/1 - 0s - gr\\xf6\\xdfe: 1.0000\n"


@pytest.mark.asyncio
async def test_a_closed_stream_is_no_error() -> None:
    file = io.StringIO()
    file.close()
    await fit(ProgbarLogger(file=file), {"loss": 1.0}, {"loss": 1.0})


@pytest.mark.asyncio
async def test_no_standard_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    await fit(ProgbarLogger(), {"loss": 1.0})


class Pipe:
    """A pipe of 4 KiB with a text file at its writing end."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        self.file = open(self.writer, "w", closefd=False)  # noqa: SIM115  closed in close()

    def break_off(self) -> None:
        os.close(self.reader)
        self.reader = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, self.writer)  # for what is left in the file's buffer
        self.file.close()
        for descriptor in (sink, self.reader, self.writer):
            os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    try:
        yield pipe
    finally:
        pipe.close()


@pytest.mark.asyncio
async def test_a_broken_pipe_is_no_error(pipe: Pipe) -> None:
    pipe.break_off()
    await fit(ProgbarLogger(file=pipe.file), {"loss": 1.0}, {"loss": 1.0})
    with pytest.raises(BrokenPipeError):  # control: so it is broken
        os.write(pipe.writer, b"x")


@pytest.mark.asyncio
async def test_a_full_pipe_that_does_not_block_loses_lines_and_nothing_else(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    os.write(pipe.writer, b"x" * 4096)
    await fit(ProgbarLogger(file=pipe.file), {"loss": 1.0})
    assert os.read(pipe.reader, 8192) == b"x" * 4096


@pytest.mark.asyncio
async def test_a_pipe_that_nobody_reads_holds_neither_the_training_nor_its_end(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progbar_logger, "PATIENCE", 0.01)
    os.write(pipe.writer, b"x" * 4096)
    await fit(ProgbarLogger(file=pipe.file), {"loss": 1.0}, {"loss": 2.0})
    naive = threading.Thread(target=os.write, args=(pipe.writer, b"naive"), daemon=True)
    naive.start()
    naive.join(0.05)
    assert naive.is_alive()  # control: who writes there himself does wait
    wanted = b"Epoch 1/2 - 0s - loss: 1.0000\nEpoch 2/2 - 0s - loss: 2.0000\n"
    found = b""
    while len(found) < 4096 + len(b"naive") + len(wanted):
        found += os.read(pipe.reader, 8192)
    assert found.replace(b"naive", b"").lstrip(b"x") == wanted
    naive.join()


# ---------------------------------------------------------------- cost


@pytest.mark.asyncio
async def test_ten_thousand_batches_in_one_moment_are_two_drawings(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(progbar_logger, "monotonic", lambda: 1000.0)
    callback = ProgbarLogger(file=terminal.file)
    callback.set_params({**ARRAYS, "verbose": 1})
    await callback.on_train_begin({})
    asked = 0

    def draw_soon(display: Display, interval: float) -> None:
        nonlocal asked
        asked += 1
        original(display, interval)

    original = Display.draw_soon
    monkeypatch.setattr(Display, "draw_soon", draw_soon)
    for batch in range(10_000):
        await callback.on_train_batch_end(batch, {"size": 1, "loss": 1.0})
    await callback.on_train_end({})
    assert asked == 2  # one at once, one a tenth of a second later


@pytest.mark.asyncio
async def test_a_display_that_waits_for_its_moment_draws_what_came_last(terminal: Terminal) -> None:
    callback = ProgbarLogger(file=terminal.file, interval=0.0)
    callback.set_params({**ARRAYS, "verbose": 1})
    await callback.on_train_begin({})
    for batch, size in enumerate((4, 4, 2)):
        await callback.on_train_batch_end(batch, {"size": size, "loss": 1.0})
    shown = "10/10 - ETA: 0s - loss: 1.0000"
    await terminal.until(lambda lines: any(shown in line for line in lines))
    await callback.on_train_end({})
    await terminal.until(lambda lines: lines == [])


# ---------------------------------------------------------------- a terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    try:
        yield terminal
    finally:
        terminal.close()


TRAINING = """
import asyncio, sys, time
import numpy as np
from asynccb import Callback, Trainer
from asynccb.models import Dense, Sequential

class Talks(Callback):
    async def on_epoch_end(self, epoch, logs=None):
        print(f"[bold]the user of {self.run.name} says {epoch}")
        print("aside", file=sys.stderr)

class Slow(Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.01)

async def train(**arguments):
    model = Sequential([Dense(1, input_dim=2)], seed=1)
    model.compile("sgd", "mse")
    x = np.zeros((20, 2), np.float32)
    await Trainer(model).fit(x, x[:, :1], batch_size=2, epochs=2, **arguments)
"""


def test_two_trainings_and_a_users_print_on_one_terminal_leave_whole_lines_in_order(
    terminal: Terminal,
) -> None:
    done = terminal.run(
        TRAINING
        + """
async def both():
    await asyncio.gather(*(train(callbacks=[Talks(), Slow()]) for _ in range(2)))

before = sys.stdout, sys.stderr
asyncio.run(both())
print("the streams are back", (sys.stdout, sys.stderr) == before)
"""
    )
    assert (done.returncode, done.stderr.decode()) == (0, "aside\n" * 4)
    lines = terminal.at_last()
    assert lines.pop() == "the streams are back True"
    for name in ("run-1", "run-2"):
        of_run = [line for line in lines if line.startswith(f"{name}:")]
        assert of_run == [f"{name}: Epoch {epoch}/2 - 0s - loss: 0.0000e+00" for epoch in (1, 2)]
        said = [line for line in lines if f"user of {name}" in line]
        assert said == [f"[bold]the user of {name} says {epoch}" for epoch in (0, 1)]
    assert len(lines) == 8


CROWD = """
import asyncio, sys, threading
from pathlib import Path
from types import SimpleNamespace
from asynccb.callbacks import ProgbarLogger

def talk():
    for line in range(200):
        print("said", line)

async def begin(name):
    callback = ProgbarLogger(interval=0.0)
    callback.set_params({"epochs": 1, "steps": 3, "verbose": 1, "metrics": ["loss"]})
    callback.run = SimpleNamespace(name=name)
    await callback.on_train_begin({})
    await callback.on_epoch_begin(0, {})
    return callback

async def fit(name):
    callback = await begin(name)
    for batch in range(3):
        await callback.on_train_batch_end(batch, {"size": 1, "loss": 1.0})
        await asyncio.sleep(0.001)
    await callback.on_epoch_end(0, {"loss": 1.0})
    await callback.on_train_end({})

async def main():
    stays = await begin("stays")
    while not hasattr(sys.stdout, "rich_proxied_file"):
        await asyncio.sleep(0.001)
    thread = threading.Thread(target=talk)
    thread.start()
    await asyncio.gather(*(fit(f"run-{number}") for number in range(40)))
    while thread.is_alive():
        await asyncio.sleep(0.001)
    await stays.on_train_end({})

asyncio.run(main())
print("over")
"""


CROWD_ON_PLAIN_RICH = """
from rich.console import Console
from asynccb.callbacks import progress_bars
progress_bars._serial_console = lambda stream: Console(file=stream, force_terminal=True)
"""


def what_a_crowd_leaves(source: str) -> list[str]:
    terminal = Terminal(rows=300)
    try:
        done = terminal.run(source)
        assert (done.returncode, done.stderr) == (0, b"")
        return terminal.at_last()
    finally:
        terminal.close()


SAID = [f"said {line}" for line in range(200)]
ENDED = sorted(f"run-{number}: Epoch 1/1 - 0s - loss: 1.0000" for number in range(40))
WHOLE = sorted([*SAID, *ENDED, "over"])


def test_lines_of_another_thread_are_whole_while_rows_come_and_go() -> None:
    lines = what_a_crowd_leaves(CROWD)
    assert [line for line in lines if line.startswith("said")] == SAID
    assert sorted(line for line in lines if line.startswith("run")) == ENDED
    assert sorted(lines) == WHOLE
    assert lines[-1] == "over"


def test_control_on_a_plain_console_of_rich_some_of_them_are_lost() -> None:
    # A race: nearly always the first try shows it.
    assert any(sorted(what_a_crowd_leaves(CROWD_ON_PLAIN_RICH + CROWD)) != WHOLE for _ in range(5))


def test_on_a_terminal_that_takes_no_codes_there_are_plain_lines(terminal: Terminal) -> None:
    done = terminal.run(TRAINING + "asyncio.run(train())", TERM="dumb")
    assert (done.returncode, done.stderr) == (0, b"")
    assert terminal.at_last() == [f"Epoch {epoch}/2 - 0s - loss: 0.0000e+00" for epoch in (1, 2)]


def test_bars_are_drawn_in_ascii_where_the_terminal_is(terminal: Terminal) -> None:
    done = terminal.run(
        TRAINING + "asyncio.run(train(callbacks=[Slow()]))", PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert terminal.at_last() == [f"Epoch {epoch}/2 - 0s - loss: 0.0000e+00" for epoch in (1, 2)]


@pytest.mark.asyncio
async def test_a_row_shows_title_bar_count_time_and_means_and_goes_with_its_training(
    terminal: Terminal,
) -> None:
    callback = ProgbarLogger(file=terminal.file)
    callback.set_params({**ARRAYS, "verbose": 1})
    callback.run = SimpleNamespace(name="run-1")
    await callback.on_train_begin({})
    await callback.on_epoch_begin(0, {})
    await callback.on_train_batch_end(0, {"size": 4, "loss": 1.0})
    await terminal.until(lambda lines: any("4/10" in line for line in lines))
    (row,) = terminal.lines()
    assert row.startswith("Epoch 1/2 ━━")
    assert row.endswith(" 4/10 - ETA: 0s - loss: 1.0000")
    await callback.on_epoch_end(0, {"loss": 1.0})
    await callback.on_train_end({})
    await terminal.until(lambda lines: lines == ["Epoch 1/2 - 0s - loss: 1.0000"])


@pytest.mark.asyncio
async def test_verbose_2_draws_no_bar_on_a_terminal_either(terminal: Terminal) -> None:
    await fit(ProgbarLogger(file=terminal.file), {"loss": 1.0}, params={**ARRAYS, "verbose": 2})
    await terminal.until(lambda lines: lines == ["Epoch 1/2 - 0s - loss: 1.0000"])
    assert terminal.screen.cursor.hidden is False


@pytest.mark.asyncio
async def test_one_callback_serves_one_training_after_the_other(terminal: Terminal) -> None:
    callback = ProgbarLogger(file=terminal.file)
    for _ in range(3):
        await fit(callback, {"loss": 1.0})
    await terminal.until(lambda lines: lines == ["Epoch 1/2 - 0s - loss: 1.0000"] * 3)


# ---------------------------------------------------------------- a pipe in a shell


def test_a_training_whose_output_goes_to_head_trains_on_and_needs_no_rich(tmp_path: Path) -> None:
    source = TRAINING + textwrap.dedent(
        f"""
        sys.stdout.reconfigure(line_buffering=True)
        asyncio.run(train())
        asyncio.run(train())
        open({str(tmp_path / "done")!r}, "w").write(f"{{'rich' in sys.modules}}")
        """
    )
    (tmp_path / "script.py").write_text(source)
    command = f"{sys.executable} -W ignore {tmp_path / 'script.py'} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=50, check=False)
    assert timeless(done.stdout) == "Epoch 1/2 - 0s - loss: 0.0000e+00\n"
    assert (tmp_path / "done").read_text() == "False"
