"""Fair shares of compute time, on a clock that the test moves."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asynccb.budget.fair import SLICE, Client, Scheduler


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Habits(NamedTuple):
    """How a training of the simulation behaves."""

    step: float
    weight: float = 1.0
    tokens: int = 1
    away: float = 0.0
    """Waits so long for data after each step."""


class Simulation:
    """Trainings that compute step after step, each as its habits say."""

    def __init__(self, tokens: float) -> None:
        self.clock = Clock()
        self.scheduler = Scheduler(tokens, self.clock)
        self.habits: dict[Client, Habits] = {}
        self._events: list[tuple[float, int, str, Client]] = []
        self._number = 0
        self._under_way: set[Client] = set()

    def enter(self, habits: Habits) -> Client:
        client = Client(habits.weight, habits.tokens)
        self.habits[client] = habits
        self.scheduler.join(client)
        self.scheduler.request(client)
        self._start_granted()
        return client

    def run_until(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.clock.now, _, what, client = heapq.heappop(self._events)
            if not client.joined:
                continue
            if what == "step":
                self._under_way.discard(client)
                self._step_done(client)
            else:
                self.scheduler.request(client)
            self._start_granted()
        self.clock.now = until

    def spent(self, client: Client) -> float:
        return client.spent + (self.clock.now - client.since) * client.granted

    def _at(self, when: float, what: str, client: Client) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, client))

    def _step_done(self, client: Client) -> None:
        away = self.habits[client].away
        if away:
            self.scheduler.give_back(client)
            self._at(self.clock.now + away, "back", client)
        elif client.contended and self.scheduler.over(client):
            self.scheduler.give_back(client)
            self.scheduler.request(client)

    def _start_granted(self) -> None:
        for client in self.scheduler.holding:
            if client not in self._under_way:
                self._under_way.add(client)
                self._at(self.clock.now + self.habits[client].step, "step", client)


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


SIXTEEN = [0.0005 * 1.6**n for n in range(16)]  # from 0.5 ms to 0.6 s


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_sixteen_trainings_of_unequal_steps_get_equal_time(tokens: int) -> None:
    simulation = Simulation(tokens)
    clients = [simulation.enter(Habits(step)) for step in SIXTEEN]
    simulation.run_until(60.0)
    assert jain([simulation.spent(client) for client in clients]) > 0.99


def test_turns_by_the_step_are_unfair() -> None:
    """The control: one step each in turn."""
    spent = [step * 100 for step in SIXTEEN]
    assert jain(spent) < 0.3


@pytest.mark.parametrize("tokens", [1, 2])
def test_weights_1_2_4_get_their_shares(tokens: int) -> None:
    simulation = Simulation(tokens)
    clients = [
        simulation.enter(Habits(step, weight)) for weight in (1, 2, 4) for step in (0.001, 0.004, 0.015)
    ]
    simulation.run_until(30.0)
    whole = sum(simulation.spent(client) for client in clients)
    for client in clients:
        due = client.weight / (3 * (1 + 2 + 4))
        assert simulation.spent(client) / whole == pytest.approx(due, rel=0.1)


def test_a_step_of_ten_seconds_is_paid_back() -> None:
    simulation = Simulation(1)
    long, short = simulation.enter(Habits(10.0)), simulation.enter(Habits(0.001))
    simulation.run_until(200.0)
    assert simulation.spent(long) == pytest.approx(simulation.spent(short), abs=10.1)


def test_a_changed_weight_counts_from_then_on() -> None:
    simulation = Simulation(1)
    one, other = simulation.enter(Habits(0.002)), simulation.enter(Habits(0.002))
    simulation.run_until(10.0)
    before = simulation.spent(one), simulation.spent(other)
    simulation.scheduler.set_weight(one, 4.0)
    simulation.run_until(20.0)
    assert simulation.spent(one) - before[0] == pytest.approx(8.0, rel=0.05)
    assert simulation.spent(other) - before[1] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_no_token_is_idle_while_somebody_waits(tokens: int) -> None:
    simulation = Simulation(tokens)
    clients = [simulation.enter(Habits(step, away=0.0)) for step in SIXTEEN]
    simulation.run_until(10.0)
    assert sum(simulation.spent(client) for client in clients) == pytest.approx(10.0 * tokens)


def test_who_was_away_does_not_catch_up() -> None:
    simulation = Simulation(1)
    absent = simulation.enter(Habits(0.001))
    simulation.run_until(0.5)
    simulation.scheduler.give_back(absent)
    others = [simulation.enter(Habits(0.001)) for _ in range(2)]
    simulation.run_until(100.0)
    before = [simulation.spent(client) for client in (absent, *others)]
    simulation.scheduler.request(absent)
    simulation.run_until(103.0)
    after = [simulation.spent(client) for client in (absent, *others)]
    for earlier, later in zip(before, after, strict=True):
        assert later - earlier == pytest.approx(1.0, abs=2 * SLICE)


def test_who_was_away_does_not_catch_up_with_one_that_needed_no_turn_meanwhile() -> None:
    simulation = Simulation(1)
    absent = simulation.enter(Habits(0.001))
    simulation.run_until(0.5)
    simulation.scheduler.give_back(absent)
    simulation.enter(Habits(10.0))  # pays back after its first step
    paid = simulation.enter(Habits(0.001))
    simulation.run_until(19.0)
    before = simulation.spent(paid)
    simulation.scheduler.request(absent)
    simulation.run_until(20.0)
    assert simulation.spent(paid) - before > 0.5 - 2 * SLICE


def test_who_is_away_for_a_moment_in_every_step_waits_for_a_part_of_a_slice_only() -> None:
    simulation = Simulation(1)
    fetching, steady = simulation.enter(Habits(0.001, away=0.0001)), simulation.enter(Habits(0.001))
    simulation.run_until(20.0)
    assert simulation.spent(fetching) > 0.15 * simulation.spent(steady)  # a whole slice: 0.05


def test_a_newcomer_does_not_profit_from_who_waited_and_left() -> None:
    simulation = Simulation(1)
    long = simulation.enter(Habits(10.0))
    gone = simulation.enter(Habits(0.001))
    simulation.run_until(9.9)
    simulation.scheduler.leave(gone)
    simulation.habits[long] = Habits(0.001)
    simulation.run_until(11.0)
    before = simulation.spent(long)
    simulation.enter(Habits(0.001))
    simulation.run_until(13.0)
    assert simulation.spent(long) - before == pytest.approx(1.0, abs=2 * SLICE)


def test_a_newcomer_begins_where_the_others_are() -> None:
    simulation = Simulation(1)
    old = [simulation.enter(Habits(0.001)) for _ in range(2)]
    simulation.run_until(100.0)
    before = [simulation.spent(client) for client in old]
    new = simulation.enter(Habits(0.001))
    simulation.run_until(103.0)
    assert simulation.spent(new) == pytest.approx(1.0, abs=2 * SLICE)
    for client, earlier in zip(old, before, strict=True):
        assert simulation.spent(client) - earlier == pytest.approx(1.0, abs=2 * SLICE)


def test_time_that_nobody_else_wanted_is_not_owed() -> None:
    simulation = Simulation(2)
    heavy, light = simulation.enter(Habits(0.001, 4.0)), simulation.enter(Habits(0.001, 1.0))
    simulation.run_until(100.0)  # both computed all the time, whatever their weights
    before = simulation.spent(light)
    simulation.enter(Habits(0.001, 1.0))
    simulation.run_until(110.0)
    assert simulation.spent(light) - before > 4.0
    assert simulation.spent(heavy) > 109.0  # more than one token's worth is due to it


def test_a_weight_beyond_one_token_lets_no_newcomer_starve_the_others() -> None:
    simulation = Simulation(2)
    clients = [simulation.enter(Habits(0.001, weight)) for weight in (4.0, 1.0, 1.0)]
    simulation.run_until(50.0)
    before = [simulation.spent(client) for client in clients]
    simulation.enter(Habits(0.001, 1.0))
    simulation.run_until(56.0)
    for client, earlier in zip(clients[1:], before[1:], strict=True):
        assert simulation.spent(client) - earlier > 1.5


def test_a_stream_of_short_newcomers_does_not_keep_a_debtor_out() -> None:
    simulation = Simulation(1)
    debtor = simulation.enter(Habits(1.0))
    newcomers = [simulation.enter(Habits(0.001)) for _ in range(2)]
    for n in range(1, 2000):
        simulation.run_until(n * 0.005)
        for gone in [client for client in newcomers if client.granted]:
            newcomers.remove(gone)
            simulation.scheduler.leave(gone)
            newcomers.append(simulation.enter(Habits(0.001)))
    assert simulation.spent(debtor) > 2.0


def test_a_training_that_waits_for_data_leaves_its_token_to_others() -> None:
    simulation = Simulation(1)
    waiter, hungry = simulation.enter(Habits(0.001, away=0.009)), simulation.enter(Habits(0.001))
    simulation.run_until(20.0)
    assert simulation.spent(waiter) + simulation.spent(hungry) == pytest.approx(20.0)
    assert simulation.spent(waiter) > 0.5  # a step in each slice of the other


def test_who_needs_several_tokens_is_not_overtaken_for_ever() -> None:
    simulation = Simulation(4)
    for step in (0.001, 0.003, 0.007, 0.02, 0.05):
        simulation.enter(Habits(step))
    wide = simulation.enter(Habits(0.005, tokens=4))
    simulation.run_until(20.0)
    # It is charged for all four: six shares of 80 token seconds, a fourth of that in time.
    assert simulation.spent(wide) == pytest.approx(80 / 6 / 4, rel=0.15)


def test_more_tokens_than_there_are_compute_alone() -> None:
    scheduler = Scheduler(2, Clock())
    wide, other = Client(1.0, 8), Client(1.0, 1)
    for client in (wide, other):
        scheduler.join(client)
        scheduler.request(client)
    assert (wide.granted, other.granted) == (True, False)
    scheduler.give_back(wide)
    assert (wide.granted, other.granted) == (False, True)


def test_a_lone_training_is_never_asked_to_look() -> None:
    simulation = Simulation(1)
    client = simulation.enter(Habits(0.001))
    simulation.run_until(1.0)
    assert (client.contended, simulation.scheduler.woken) == (False, [])


def test_whoever_computes_is_woken_when_somebody_comes_to_wait() -> None:
    scheduler = Scheduler(1, Clock())
    one, other = Client(1.0, 1), Client(1.0, 1)
    for client in (one, other):
        scheduler.join(client)
        scheduler.request(client)
    assert (scheduler.woken, one.contended) == ([one], True)
    scheduler.leave(other)
    assert one.contended is False


def test_a_lower_limit_sends_all_but_one_back_and_a_higher_one_lets_them_in() -> None:
    clock = Clock()
    scheduler = Scheduler(2, clock)
    one, other = Client(1.0, 1), Client(1.0, 1)
    for client in (one, other):
        scheduler.join(client)
        scheduler.request(client)
    scheduler.set_limit(1)
    assert one.contended
    assert scheduler.over(one)
    scheduler.give_back(one)
    scheduler.request(one)
    assert (one.granted, other.granted, scheduler.over(other)) == (False, True, False)
    scheduler.set_limit(2)
    assert one.granted


def test_without_a_limit_nobody_waits() -> None:
    scheduler = Scheduler(math.inf, Clock())
    clients = [Client(1.0, 1) for _ in range(50)]
    for client in clients:
        scheduler.join(client)
        scheduler.request(client)
    assert all(client.granted and not client.contended for client in clients)


class Machine(RuleBasedStateMachine):
    """Anybody does anything at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler = Scheduler(3, self.clock)
        self.clients: list[Client] = []
        self.held = 0.0
        self.granted_at: dict[Client, float] = {}

    def follow(self) -> None:
        for client in self.clients:
            if client.granted and client not in self.granted_at:
                self.granted_at[client] = self.clock.now
            elif not client.granted and client in self.granted_at:
                self.held += self.clock.now - self.granted_at.pop(client)

    @rule(weight=st.sampled_from([0.25, 1.0, 2.0, 4.0]), tokens=st.integers(1, 3))
    def join(self, weight: float, tokens: int) -> None:
        if len(self.scheduler.clients) < 8:
            client = Client(weight, tokens)
            self.clients.append(client)
            self.scheduler.join(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), verb=st.sampled_from(["request", "give_back", "leave", "over"]))
    def do(self, data: st.DataObject, verb: str) -> None:
        client = data.draw(st.sampled_from(self.clients))
        waited = [c for c in self.clients if c.wanting]
        self.scheduler.woken.clear()
        getattr(self.scheduler, verb)(client)
        self.follow()
        # No wake-up is lost: whoever had waited and may compute now is told.
        assert all(c in self.scheduler.woken for c in waited if c.granted)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), weight=st.sampled_from([0.5, 1.0, 8.0]))
    def weigh(self, data: st.DataObject, weight: float) -> None:
        self.scheduler.set_weight(data.draw(st.sampled_from(self.clients)), weight)

    @rule(limit=st.sampled_from([1, 3]))
    def bound(self, limit: int) -> None:
        self.scheduler.set_limit(limit)
        self.follow()

    @rule(seconds=st.sampled_from([0.0001, 0.005, 0.03, 2.0]))
    def let_pass(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def no_more_are_out_than_there_are(self) -> None:
        out = sum(client.tokens for client in self.clients if client.granted)
        assert out == self.scheduler.out
        assert out <= self.scheduler.tokens

    @invariant()
    def somebody_computes_if_anybody_wants_to(self) -> None:
        if any(client.wanting for client in self.clients):
            assert any(client.granted for client in self.clients)
            if self.scheduler.limit == 1:
                return
            head = self.scheduler._waiting[0][2]
            assert self.scheduler.out + head.tokens > self.scheduler.tokens

    @invariant()
    def who_computes_looks_if_anybody_waits(self) -> None:
        if self.scheduler.waiting:
            assert all(client.contended for client in self.scheduler.holding)

    @invariant()
    def what_is_spent_is_what_was_held(self) -> None:
        assert sum(client.spent for client in self.clients) == pytest.approx(self.held)

    def teardown(self) -> None:
        """Nobody starves: whoever wants to compute comes to it, however the others go on."""
        wanting = {client for client in self.clients if client.wanting}
        for _ in range(20_000):
            if not wanting:
                break
            self.clock.now += 0.01
            for client in list(self.scheduler.holding):
                if self.scheduler.over(client):
                    self.scheduler.give_back(client)
                    self.scheduler.request(client)
            wanting = {client for client in wanting if client.wanting}
        assert not wanting


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_has_lent_its_token_is_asked_for_it_when_it_computes_again_though_nobody_waits() -> None:
    """Else the two would go on beside each other, with one token, until somebody else came."""
    clock = Clock()
    scheduler = Scheduler(1, clock)
    blocked, other = Client(1.0, 1), Client(1.0, 1)
    for client in (blocked, other):
        scheduler.join(client)
        scheduler.request(client)
    scheduler.lend(blocked)
    assert (other.granted, scheduler.waiting) == (True, 0)
    assert blocked.contended  # so it says that its batch is done
    scheduler.came_back(blocked)
    assert scheduler.over(blocked)
    scheduler.give_back(blocked)
    assert not other.contended
