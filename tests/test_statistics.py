"""Where the time of a training went: phases that add up, and a report that names who took it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer, statistics
from asynccb.bus.mailbox import MailboxStatistics
from asynccb.health import LagStatistics
from asynccb.protocols import QueueStatistics
from asynccb.statistics import Phases, RunStatistics
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from asynccb.run import Run


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(statistics, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_phases_follow_each_other_and_add_up(clock: Clock) -> None:
    phases = Phases("queued")
    for phase, seconds in {"batches": 1.0, "validation": 2.0}.items():
        phases.enter(phase)
        clock.now += seconds
    assert phases.enter("batches") == "validation"
    clock.now += 4.0
    assert phases.read() == {"queued": 0.0, "batches": 5.0, "validation": 2.0}


def test_after_the_end_no_time_passes(clock: Clock) -> None:
    phases = Phases("drain")
    clock.now += 1.0
    phases.enter(None)
    phases.enter("closing")  # a thread that was given up as stuck comes back
    clock.now += 5.0
    assert phases.read() == {"drain": 1.0}


def test_the_report_says_where_the_time_went_the_dearest_first() -> None:
    box = MailboxStatistics(waiting=0, peak=7, handled=40, dropped=3, held=2, lost=1, bound=8, policy="wait")
    stats = RunStatistics(
        events=80,
        callbacks={"Tells": box},
        waits={"gate": 2},
        waited={"gate": 0.5},
        snapshots=4,
        inline={"Slow\x1b[2J": 1.0, "Quick": 0.1},
        seconds={"batches": 6.0, "drain": 2.0},
        queues={"Tells: posts": QueueStatistics(256, "drop_oldest", 5, 9)},
        computed=5.0,
        lag=LagStatistics(0.001, 0.0125, 0.3, 100),
    )
    assert stats.report().splitlines() == [
        "phase                                      seconds   share",
        "batches                                      6.000   75.0%",
        "drain                                        2.000   25.0%",
        "in all                                       8.000  100.0%",
        "of it inline hooks of Slow\\x1b[2J            1.000   12.5%",
        "of it waiting: gate                          0.500    6.2%",
        "of it inline hooks of Quick                  0.100    1.2%",
        "events                                     handled    peak  dropped  held  lost",
        "Tells                                           40       7        3     2     1",
        "queues                                     waiting   bound  when full",
        "Tells: posts                                     5     256  drop_oldest: 9",
        "copies of the model: 4",
        "the event loop was late by 1.0 ms (p50), 12.5 ms (p99), 300.0 ms (worst)",
    ]


def test_a_run_that_took_no_time_has_a_report() -> None:
    assert "in all" in RunStatistics.nothing().report()


@pytest.mark.asyncio
async def test_a_run_passes_through_its_phases_in_order() -> None:
    seen: list[list[str]] = []

    class Looks(Callback):
        run: Run

        def look(self, *arguments: Any) -> None:
            seen.append(list(self.run.stats.seconds))

        on_train_begin = on_train_end = on_test_begin = on_epoch_end = look

    data = np.zeros((2, 1)), np.zeros(2)
    run = Trainer(ScriptedModel()).start(*data, validation_data=data, verbose=0, callbacks=Looks())
    await run
    opening = ["queued", "opening"]
    validated = [*opening, "batches", "validation"]
    assert seen == [opening, validated, validated, [*validated, "closing"]]
    assert list(run.stats.seconds) == [*validated, "closing", "drain"]
    assert set(run.stats.inline) == {"BaseLogger", "Looks", "History"}
