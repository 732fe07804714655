"""One display for all trainings of an orchestrator: what it shows, what stays, and that it holds nobody."""

from __future__ import annotations

import asyncio
import io
import re
import sys
import termios
from contextlib import asynccontextmanager, redirect_stdout
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from terminal import Terminal

from asynccb import ArgumentError, Orchestrator, Trainer, overview
from asynccb.overview import Progress
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asynccb import Run

X = np.zeros((4, 1), np.float32)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    yield from a_terminal(monkeypatch, 30)


@pytest.fixture
def low_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    yield from a_terminal(monkeypatch, 8)


def a_terminal(monkeypatch: pytest.MonkeyPatch, rows: int) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(overview, "INTERVAL", 0.01)
    terminal = Terminal(rows)
    try:
        yield terminal
    finally:
        terminal.close()


@asynccontextmanager
async def on(terminal: Terminal, **arguments: Any) -> AsyncIterator[Orchestrator]:
    """In the body of a test: the capture of pytest puts a stream of its own between the phases."""
    with redirect_stdout(terminal.file):
        async with Orchestrator(**arguments) as orch:
            yield orch
        assert sys.stdout is terminal.file


def submit(orch: Orchestrator, name: str, model: ScriptedModel | None = None, epochs: int = 2) -> Run:
    return orch.submit(Trainer(model or ScriptedModel()), X, epochs=epochs, batch_size=2, name=name)


def timeless(text: str) -> str:
    return re.sub(r" - (\d+s|\d+:\d\d)( - |$)", r" - 0s\2", text, flags=re.MULTILINE)


async def three(file: Any, verbose: Any = "auto") -> None:
    with redirect_stdout(file):
        await _three(verbose)


async def _three(verbose: Any) -> None:
    async with Orchestrator(slots=1, verbose=verbose) as orch:
        first = submit(orch, "evil\x1b[2J")
        second = submit(orch, "fails", ScriptedModel(raises={0: OSError("no\nroom")}))
        second.pause()
        submit(orch, "queued").prune("not wanted")
        await first
        second.resume()


LINES = """\
1/3 - queued pruned: not wanted - 0 epochs - 0s
2/3 - evil\\x1b[2J completed - 2 epochs - 0s - loss: 1.0000
3/3 - fails failed: OSError: no\\x0aroom - 0 epochs - 0s
3 of 3 ended - 0s - 1 pruned - 1 failed
"""


# ---------------------------------------------------------------- not a terminal


@pytest.mark.asyncio
@pytest.mark.parametrize("verbose", [1, 2])
async def test_where_there_is_no_terminal_each_end_is_a_line_and_the_last_one_has_the_totals(
    verbose: int,
) -> None:
    plain = io.StringIO()
    await three(plain, verbose)
    assert timeless(plain.getvalue()) == LINES


@pytest.mark.asyncio
@pytest.mark.parametrize("verbose", [0, "auto"])
async def test_by_default_nothing_is_said_where_there_is_no_terminal(verbose: Any) -> None:
    plain = io.StringIO()
    await three(plain, verbose)
    assert plain.getvalue() == ""


@pytest.mark.asyncio
async def test_values_that_cannot_be_shown_keep_nobody_from_the_end() -> None:
    class Shy(float):
        def __float__(self) -> float:
            raise ValueError("no number")

    class Odd:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"odd": Shy(1.0)}

    plain = io.StringIO()
    with redirect_stdout(plain):
        async with Orchestrator(slots=1, verbose=2) as orch:
            first = orch.submit(Trainer(Odd()), X, name="odd")
            submit(orch, "next", epochs=1)
    assert timeless(plain.getvalue()).startswith(
        f"1/2 - odd {first.outcome}\n2/2 - next completed - 1 epoch - 0s"
    )


@pytest.mark.asyncio
async def test_a_block_without_trainings_says_nothing() -> None:
    plain = io.StringIO()
    with redirect_stdout(plain):
        async with Orchestrator(verbose=2):
            pass
    assert plain.getvalue() == ""


@pytest.mark.parametrize("verbose", [3, "yes", None])
def test_an_unknown_verbose_is_refused(verbose: Any) -> None:
    with pytest.raises(ArgumentError, match='"auto", 0, 1 or 2'):
        Orchestrator(verbose=verbose)


@pytest.mark.asyncio
async def test_no_standard_output_is_no_error() -> None:
    await three(None, 2)


# ---------------------------------------------------------------- a terminal


@pytest.mark.asyncio
async def test_a_live_training_has_a_row_and_the_totals_stand_above_them(terminal: Terminal) -> None:
    models = [ScriptedModel(gated=True) for _ in range(2)]
    async with on(terminal, slots=2) as orch:
        runs = [submit(orch, f"run {number}", model) for number, model in enumerate(models)]
        submit(orch, "waits")
        await terminal.until(lambda lines: len(lines) == 3 and "Epoch 1/2" in lines[2])
        totals, *rows = timeless("\n".join(terminal.lines())).splitlines()
        assert re.fullmatch(r"0 of 3 ended +[━╺ ]+ 0s - 2 running - 1 queued", totals)
        assert [row.split(" ━")[0].rstrip() for row in rows] == ["run 0", "run 1"]
        await models[0].open(3)  # the first epoch, and a batch of the second
        await terminal.until(lambda lines: "Epoch 2/2 - loss: 1.0000" in lines[1])
        runs[0].prune("enough")
        models[0].open_for_good()
        await terminal.until(lambda lines: not any("run 0" in line for line in lines))
        models[1].open_for_good()
    assert [timeless(line) for line in terminal.at_last()] == ["3 of 3 ended - 0s - 1 pruned"]
    assert terminal.screen.cursor.hidden is False


@pytest.mark.asyncio
async def test_on_a_terminal_failures_and_totals_stay(terminal: Terminal) -> None:
    await three(terminal.file)
    assert [timeless(line) for line in terminal.at_last()] == LINES.replace("3/3 - ", "").splitlines()[2:]


@pytest.mark.asyncio
async def test_while_nothing_is_alive_nothing_is_drawn_and_no_timer_runs(terminal: Terminal) -> None:
    loop: Any = asyncio.get_running_loop()

    def timers() -> list[Any]:
        ours = [handle for handle in loop._scheduled if not handle.cancelled()]
        return [handle for handle in ours if "Overview" in repr(handle)]

    async with on(terminal) as orch:
        for _ in range(2):
            model = ScriptedModel(gated=True)
            run = submit(orch, "the one", model)
            await terminal.until(lambda lines: any("the one" in line for line in lines))
            assert len(timers()) == 1
            model.open_for_good()
            await run
            await terminal.until(lambda lines: lines == [])
            assert timers() == []
        submit(orch, "one more")
    assert timers() == []


@pytest.mark.asyncio
async def test_more_trainings_than_lines_leave_nothing_on_the_terminal(low_terminal: Terminal) -> None:
    models = [ScriptedModel(gated=True) for _ in range(12)]
    async with on(low_terminal, slots=12) as orch:
        for number, each in enumerate(models):
            submit(orch, f"run {number}", each)
        await low_terminal.until(lambda lines: len(lines) == 5 and "12 running" in lines[0])
        for each in models:
            each.open_for_good()
    assert [timeless(line) for line in low_terminal.at_last()] == ["12 of 12 ended - 0s"]


@pytest.mark.asyncio
async def test_a_terminal_that_takes_nothing_holds_neither_a_training_nor_the_end(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "PATIENCE", 0.05)
    termios.tcflow(terminal.slave, termios.TCOOFF)
    try:
        await three(terminal.file, 2)
        await three(terminal.file, 1)
        assert terminal.lines() == []
    finally:
        termios.tcflow(terminal.slave, termios.TCOON)
    await terminal.until(lambda lines: len(lines) == 6)


# ---------------------------------------------------------------- one row


def test_a_row_counts_batches_where_their_number_is_known_and_never_goes_back() -> None:
    run: Any = SimpleNamespace(history=SimpleNamespace(params=None), epoch=0, step=0)
    row = Progress(run)
    assert (row.total, row.completed) == (None, 0)
    run.history.params = {"epochs": 3, "steps": 10}
    seen = []
    for run.epoch, run.step in [(0, 9), (0, 10), (1, 10), (1, 11)]:  # ten are trained, the epoch not over
        seen.append(row.completed)
    assert (row.total, seen) == (30, [9, 9, 10, 11])
    run.history.params = {"epochs": 3, "steps": None}
    other = Progress(run)
    assert (other.total, other.completed) == (3, 1)
