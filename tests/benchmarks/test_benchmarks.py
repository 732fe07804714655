"""The benchmarks' arithmetic, and that each of them still runs. Nothing here is about how long it took."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def _tracker_of_processes() -> None:
    """Python's own, started with the first process and kept to the end: no test has left it behind."""
    resource_tracker.ensure_running()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import harness

    return harness


@pytest.fixture
def stall(harness: Any) -> Any:
    import stall

    return stall


def ended(steps: int, slow: dict[int, float], drift: float = 0.0) -> list[float]:
    """When each batch had ended: a second each, longer by ``slow``, and each by ``drift`` than before."""
    now, found = 0.0, []
    for step in range(steps):
        now += 1.0 + slow.get(step, 0.0) + drift * step
        found.append(now)
    return found


def test_stall_counts_what_a_save_costs_in_any_batch_of_its_window(stall: Any) -> None:
    window, saves = 4, 2
    # Saves after the batches 7 (left out), 15 and 23; one costs at once, one three batches later.
    told = ended(stall.steps_in(window, saves), {8: 50.0, 16: 3.0, 26: 5.0})
    assert stall.stalls(told, window) == pytest.approx([3.0, 5.0])


def test_stall_counts_nothing_where_nothing_is_saved_even_if_the_machine_drifts(stall: Any) -> None:
    window = 4
    assert stall.stalls(ended(stall.steps_in(window, 3), {}), window) == pytest.approx([0.0] * 3)
    drifting = stall.stalls(ended(stall.steps_in(window, 3), {}, drift=0.001), window)
    assert drifting == pytest.approx([-0.016] * 3)  # window² of it, not the drift since the beginning


def test_a_typical_stall_leaves_out_what_the_machine_did_to_one_save(stall: Any) -> None:
    window, saves = 4, 3
    every_save = {8: 2.0, 16: 2.0, 24: 2.0, 32: 2.0}
    told = ended(stall.steps_in(window, saves), {**every_save, 18: 40.0, 29: 30.0})
    assert stall.typical([told], window) == pytest.approx(2.0)
    assert sorted(stall.stalls(told, window)) == pytest.approx([-28.0, 2.0, 42.0])


def test_rounds_rotate_and_the_warm_up_does_not_count(harness: Any) -> None:
    asked: list[str] = []

    def row(name: str) -> Any:
        return lambda: asked.append(name) or len(asked)

    figures = harness.alternate({"a": row("a"), "b": row("b")}, rounds=2)
    assert asked == ["b", "a", "a", "b", "b", "a"]
    assert figures == {"a": [3, 6], "b": [4, 5]}


def test_a_verdict_says_where_the_rounds_do_not_agree(harness: Any) -> None:
    verdicts = [
        harness.Figure("", values, "x", 1.0).verdict for values in ([0.5, 1.0], [1.1, 2], [0.5, 1.5, 2])
    ]
    assert verdicts == ["met", "missed", "met in 1 of 3"]


def test_a_cost_below_nothing_is_said_to_be_noise(harness: Any) -> None:
    assert harness.Figure("", [-0.5, 0.1, -0.2], "x", 1.0).verdict == "met, below the noise"


def test_a_ratio_over_what_got_lost_in_the_noise_meets_no_target(harness: Any) -> None:
    assert harness.Figure("", harness.over([1.0], [-0.5]), "x", 1.0).verdict == "lost in the noise"


def test_a_contender_has_its_own_number_of_threads_and_leaves_ours_alone(harness: Any) -> None:
    before = dict(os.environ)
    contender = harness.Contender("threads", functools.partial, os.getenv, threads=3)
    try:
        assert contender("OMP_NUM_THREADS") == "3"
    finally:
        contender.close()
    assert dict(os.environ) == before


def test_a_contender_as_a_user_has_it_is_told_no_number_of_threads(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    contender = harness.Contender("threads", functools.partial, os.getenv, threads=None)
    try:
        assert contender("OMP_NUM_THREADS") is None
    finally:
        contender.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_contenders_that_are_asked_before_they_answer_work_at_once(harness: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "met")  # who opens one end of it waits for who opens the other
    with harness.Contenders() as there:
        for name, flags in (("reader", os.O_RDONLY), ("writer", os.O_WRONLY)):
            there.add(name, functools.partial, os.open, tmp_path / "met", flags)
            there[name].ask()
        assert all(there[name].answer() > 2 for name in there)


def test_jains_index_is_one_for_equal_shares_and_a_part_where_one_has_all(harness: Any) -> None:
    import fairness

    assert fairness.jain([0.2] * 16) == pytest.approx(1.0)
    assert fairness.jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_turns_of_a_batch_each_are_far_from_fair_where_steps_are_unequal(harness: Any) -> None:
    import fairness

    assert 1 - fairness.jain(fairness.UNEQUAL) > 0.4  # so that the target of 0.05 says something


def test_shares_by_priority_are_measured_against_their_parts(harness: Any) -> None:
    import fairness

    assert fairness.furthest([1.0, 2.0, 4.0], [1, 2, 4]) == pytest.approx(0.0)
    # 1.3 of 7.3 is 25 % more than a seventh; of the other two each has 4 % less than its part.
    assert fairness.furthest([1.3, 2.0, 4.0], [1, 2, 4]) == pytest.approx(24.66, abs=0.01)
    assert fairness.furthest([1.0, 1.0, 1.0], [1, 2, 4]) == pytest.approx(133.3, abs=0.1)


def test_a_percentile_is_a_value_that_so_many_do_not_exceed(harness: Any) -> None:
    import service

    ordered = [float(number) for number in range(1, 1001)]
    assert [service.percentile(ordered, part) for part in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]
    assert service.percentile([7.0], 0.5) == 7.0


def test_a_training_that_did_other_work_is_no_contender(harness: Any) -> None:
    import many

    many._check({"limit": [(1.0, [2.3, 2.3])], "same": [(0.5, [2.3001, 2.3])]})
    for losses in ([2.3], [2.3, 2.4]):
        with pytest.raises(RuntimeError, match="quick one did other work"):
            many._check({"limit": [(1.0, [2.3, 2.3])], "quick one": [(0.1, losses)]})


def test_a_peer_that_is_not_installed_is_named_and_one_that_fails_says_why(harness: Any) -> None:
    import importlib

    with harness.Contenders() as there:
        there.add("a peer", importlib.import_module, "no_such_peer")
        there.add("int", functools.partial, int)
        assert there.missing == ["a peer (needs no_such_peer)"]
        assert list(there) == ["int"]
        with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
            there["int"]("not a number")
        assert there["int"]("7") == 7


@pytest.mark.long
@pytest.mark.timeout(300)
def test_every_benchmark_runs_and_loses_no_event(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(HERE / "run.py"), "--quick", "--no-peers", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    claims = {
        claim["what"]: claim["values"]
        for result in json.loads(file.read_text())["results"]
        for claim in result["claims"]
    }
    assert claims["async hook sleeps 50 ms, wait: batches it missed"] == [0]
    assert claims["async hook raises, raise: fits that did not raise CallbackError"] == [0]
    wanted = (
        "import asynccb",
        "bare loop",
        "loop busy",
        "asynccb: everything on",
        "gate wait",
        "peak during",
        "orchestrator / limit",
        "1 - Jain's index",
        "a queued training weighs",
        "p99, orchestrator / processes",
    )
    assert [part for part in wanted if not any(part in what for what in claims)] == []
