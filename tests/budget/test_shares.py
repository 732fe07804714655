"""The process's budget: wishes, shares, who is woken, and what is left behind."""

from __future__ import annotations

import logging
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asynccb import ArgumentError
from asynccb.budget import Budget, Share, budget, cpu_budget
from asynccb.budget.blas import Pools
from asynccb.budget.fair import SLICE

if TYPE_CHECKING:
    from collections.abc import Callable


class FakePools(Pools):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int | None] = []

    def hold(self, threads: int) -> None:
        if threads != self.threads:
            self.told.append(threads)
        self.threads = threads

    def hold_here(self) -> list[tuple[Any, int]]:
        return []

    def restore(self) -> None:
        self.threads = None
        self.told.append(None)


class Machine:
    """A budget on a machine of four CPUs, whose libraries begin with four threads; a clock that the test
    moves."""

    def __init__(self, cpus: int = 4) -> None:
        self.now = 0.0
        self.pools = FakePools()
        self.found = 4
        self.budget = Budget(lambda: self.now, self.pools, lambda: cpus, lambda: self.found)

    def join(self, wake: Callable[[], None] = lambda: None, **arguments: Any) -> Share:
        share = self.budget.join(wake, **arguments)
        share.request()
        return share


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_without_a_wish_the_threads_are_left_and_trainings_take_turns(machine: Machine) -> None:
    one, other = machine.join(), machine.join()
    assert (one.granted, other.granted) == (True, False)
    statistics = machine.budget.statistics()
    assert statistics[:4] == (4, 4, 1, 1)
    assert (statistics.holding, statistics.waiting, statistics.learned) == (1, 1, None)
    one.leave()
    assert other.granted
    other.leave()
    assert machine.pools.told == []


def test_threads_that_the_user_set_between_two_trainings_count(machine: Machine) -> None:
    machine.join().leave()
    machine.found = 2
    machine.join()
    assert machine.budget.statistics()[:4] == (4, 2, 2, 2)


def test_a_wish_is_put_in_at_once_and_restored_by_the_last_share(machine: Machine) -> None:
    wish = machine.budget.wish(threads=1)
    assert machine.pools.told == [1]
    one, other = machine.join(), machine.join()
    assert (one.granted, other.granted) == (True, True)
    assert machine.budget.statistics()[:4] == (4, 1, 4, 4)
    wish.withdraw()
    wish.withdraw()
    one.leave()
    assert machine.pools.told == [1]
    other.leave()
    other.leave()
    assert machine.pools.told == [1, None]


def test_the_threads_stay_between_two_trainings_while_the_wish_stands(machine: Machine) -> None:
    wish = machine.budget.wish(threads=1)
    for _ in range(3):
        machine.join().leave()
    assert machine.pools.told == [1]
    wish.withdraw()
    assert machine.pools.told == [1, None]


def test_a_wish_never_changes_the_threads_under_a_training(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine.join()
    machine.budget.wish(threads=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 threads for each training were asked for while trainings are active with 4" in record.message
    second = machine.join()
    first.leave()
    assert machine.pools.told == []
    second.leave()
    assert machine.pools.told == [1]


def test_the_next_wish_is_put_in_when_the_first_is_withdrawn_and_nobody_has_a_share(machine: Machine) -> None:
    first = machine.budget.wish(threads=1)
    machine.budget.wish(threads=2)
    first.withdraw()
    assert machine.pools.told == [1, 2]


def test_of_two_wishes_that_differ_the_first_counts_until_it_is_withdrawn(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine.budget.wish(threads=1)
    machine.budget.wish(threads=1)
    assert caplog.records == []
    machine.budget.wish(threads=2)
    assert "2 threads for each training were asked for, but 1 asked for earlier" in caplog.text
    machine.join().leave()
    first.withdraw()
    machine.join().leave()
    assert machine.pools.told == [1]  # the second asked for one too


def test_a_wish_of_threads_and_one_of_tokens_go_together(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.budget.wish(tokens=3)
    machine.budget.wish(threads=2)
    machine.join()
    assert machine.budget.statistics()[:4] == (4, 2, 3, 3)
    assert caplog.records == []


def test_without_a_limit_of_tokens_nobody_waits_and_nobody_looks(machine: Machine) -> None:
    machine.budget.wish(threads=1, tokens=math.inf)
    shares = [machine.join() for _ in range(50)]
    assert all(share.granted and not share.contended for share in shares)


def test_tokens_that_were_asked_for_are_not_learned_about(machine: Machine) -> None:
    machine.budget.wish(threads=1, tokens=2)
    one, other = machine.join(), machine.join()
    assert (one.contended, other.contended) == (False, False)
    assert machine.budget._learning is None


@pytest.mark.parametrize("threads", [0, -1, 5, 1.0, True, "2"])
def test_threads_that_cannot_be_are_refused(machine: Machine, threads: Any) -> None:
    with pytest.raises(ArgumentError, match=r"threads=.*from 1 to 4"):
        machine.budget.wish(threads=threads)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, math.nan, -math.inf, True, "2"])
def test_tokens_that_cannot_be_are_refused(machine: Machine, tokens: Any) -> None:
    with pytest.raises(ArgumentError, match=r"tokens=.*from 1 on"):
        machine.budget.wish(tokens=tokens)


@pytest.mark.parametrize("weight", [0, -1.0, math.inf, math.nan, True, "1"])
def test_a_weight_that_cannot_be_is_refused(machine: Machine, weight: Any) -> None:
    with pytest.raises(ArgumentError, match="weight"):
        machine.budget.join(lambda: None, weight=weight)
    share = machine.join()
    with pytest.raises(ArgumentError, match="weight"):
        share.weight = weight
    assert share.weight == 1.0


def test_a_share_with_more_threads_takes_more_tokens(machine: Machine) -> None:
    machine.budget.wish(threads=1)
    wide, narrow, other = machine.join(threads=3), machine.join(), machine.join()
    assert (wide.granted, narrow.granted, other.granted) == (True, True, False)
    assert machine.join(threads=99)._client.tokens == 4


def test_the_holder_is_woken_to_look_and_the_waiting_one_when_its_turn_has_come(machine: Machine) -> None:
    woken: list[str] = []
    one = machine.join(lambda: woken.append("one"))
    other = machine.join(lambda: woken.append("other"))
    assert woken == ["one"]
    assert one.contended
    assert not one.batch_done()
    machine.now += SLICE
    assert one.batch_done()
    one.give_back()
    assert woken == ["one", "other"]
    assert (one.granted, other.granted) == (False, True)


def test_wake_is_called_without_the_lock(machine: Machine) -> None:
    free: list[bool] = []

    def wake() -> None:
        free.append(not machine.budget._lock.locked())

    machine.join(wake)
    machine.join(wake).leave()
    assert free == [True]


def test_spent_and_waited_are_seconds_with_the_token_and_in_line(machine: Machine) -> None:
    one, other = machine.join(), machine.join()
    machine.now += 3.0
    assert (one.spent, one.waited, other.spent, other.waited) == (3.0, 0.0, 0.0, 3.0)
    one.leave()
    machine.now += 1.0
    assert (one.spent, other.spent, other.waited) == (3.0, 1.0, 3.0)
    assert machine.budget.statistics().switches == 1


def test_what_comes_after_the_end_does_nothing(machine: Machine) -> None:
    share, other = machine.join(), machine.join()
    share.leave()
    share.request()
    share.give_back()
    share.weight = 2.0
    assert not share.batch_done()
    assert not share.granted
    assert other.granted


def test_trainings_bound_by_the_lock_are_sent_one_at_a_time() -> None:
    machine = Machine(cpus=2)
    machine.budget.wish(threads=1)
    shares = [machine.join(), machine.join()]
    for _ in range(20_000):
        holding = [share for share in shares if share.granted]
        machine.now += 0.0001 if len(holding) == 1 else 0.0003  # three times slower beside each other
        for share in holding:
            if share.contended and share.batch_done():
                share.give_back()
                share.request()
    statistics = machine.budget.statistics()
    assert (statistics.tokens, statistics.in_use_limit) == (2, 1)
    assert statistics.learned == pytest.approx(2 / 3, rel=0.1)
    spent = [share.spent for share in shares]
    assert spent[0] == pytest.approx(spent[1], rel=0.1)


def test_the_block_asks_for_all_trainings_of_the_process() -> None:
    with cpu_budget(threads=1, tokens=math.inf):
        share = budget().join(lambda: None)
        assert budget().statistics()[1:4] == (1, math.inf, math.inf)
        share.leave()
    assert budget().statistics().tokens < math.inf


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_the_trainings_of_its_parent() -> None:
    with cpu_budget(tokens=1):
        share = budget().join(lambda: None)
        share.request()
        with budget()._lock:  # held by another thread at the moment of the fork
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    own = budget().join(lambda: None)
                    own.request()
                    code = 0 if own.granted else 1
                finally:
                    os._exit(code)
        share.leave()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_real_threads_take_turns_and_nobody_is_forgotten() -> None:
    """Eight threads on two tokens, each giving back after every few batches."""
    process = Budget(cpus=lambda: 2, found_threads=lambda: 1, pools=FakePools())
    out = most = 0
    counting = threading.Lock()
    done: list[int] = []

    def train(number: int) -> None:
        nonlocal out, most
        turn = threading.Semaphore(0)
        share = process.join(turn.release)
        for _ in range(50):
            share.request()
            while not share.granted:
                assert turn.acquire(timeout=20)
            with counting:
                out += 1
                most = max(most, out)
            share.batch_done()
            with counting:
                out -= 1
            share.give_back()
        share.leave()
        done.append(number)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(8))
    assert most <= 2
    assert process.statistics()[4:6] == (0, 0)
