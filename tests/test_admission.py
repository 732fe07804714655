"""Whose turn it is to begin, beside a list that is sorted anew for each question."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asynccb.admission import ANY, Demand, Devices, Line, Submission
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from asynccb.admission import Room


class Counter:
    """Makes submissions, numbered in the order in which they are made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, priority: float = 0, demand: Demand | None = None) -> Submission:
        self.made += 1
        run: Any = SimpleNamespace(priority=priority, name=f"run-{self.made}")
        nothing: Any = None
        return Submission(run, nothing, nothing, nothing, None, demand, self.made)


@pytest.fixture
def submission() -> Counter:
    return Counter()


def everywhere(demand: Demand, kept: Container[str] = ()) -> Room:
    return demand.device, demand.device not in kept


def nowhere(demand: Demand, kept: Container[str] = ()) -> Room:
    return demand.device, False


def fit(devices: Devices, demand: Demand) -> str | None:
    """The device that has room."""
    device, fits = devices.room(demand)
    return device if fits else None


def taken(line: Line, room: Callable[[Demand, Container[str]], Room] = everywhere) -> list[int]:
    """The numbers of all that can be taken, in their order."""
    numbers = []
    while (found := line.next(room)) is not None:
        numbers.append(found[0].number)
    return numbers


def line_of(*submissions: Submission) -> Line:
    line = Line()
    for submission in submissions:
        line.add(submission)
    return line


# ---------------------------------------------------------------- the line


def test_the_first_submitted_begins_first(submission: Counter) -> None:
    assert taken(line_of(submission(), submission(), submission())) == [1, 2, 3]


def test_a_higher_priority_goes_before_an_earlier_submission(submission: Counter) -> None:
    assert taken(line_of(submission(0), submission(-1), submission(2), submission(2))) == [3, 4, 1, 2]


def test_an_empty_line_has_nobody(submission: Counter) -> None:
    assert line_of().next(everywhere) is None


def test_whoever_is_taken_is_being_made_and_waits_no_more(submission: Counter) -> None:
    first = submission()
    line = line_of(first, submission())
    assert len(line) == 2
    assert line.next(everywhere) == (first, None)
    assert (first.state, len(line)) == ("building", 1)


def test_a_priority_that_rises_or_sinks_moves_its_submission(submission: Counter) -> None:
    one, two, three = submission(), submission(), submission()
    line = line_of(one, two, three)
    three.run.priority = 1
    line.move(three)
    one.run.priority = -1
    line.move(one)
    assert len(line) == 3
    assert taken(line) == [3, 2, 1]


def test_a_submission_that_moves_there_and_back_begins_once(submission: Counter) -> None:
    one, two = submission(), submission()
    line = line_of(one, two)
    for priority in (1, -1, 0):
        one.run.priority = priority
        line.move(one)
    assert taken(line) == [1, 2]
    assert len(line) == 0


def test_a_withdrawn_submission_never_begins(submission: Counter) -> None:
    one, two = submission(), submission()
    line = line_of(one, two)
    line.withdraw(one, "over")
    assert (one.state, len(line)) == ("over", 1)
    assert taken(line) == [2]


def test_a_submission_that_was_held_begins_at_its_old_place(submission: Counter) -> None:
    one, two = submission(), submission()
    line = line_of(one, two)
    line.withdraw(one, "held")
    line.add(one)
    assert (one.state, len(line)) == ("queued", 2)
    assert taken(line) == [1, 2]


@pytest.mark.parametrize("priority", [lambda turn: turn, lambda turn: 0], ids=["another", "the same"])
def test_a_line_does_not_grow_by_moving(submission: Counter, priority: Callable[[int], float]) -> None:
    moved = submission()
    line = line_of(moved, *(submission() for _ in range(9)))
    for turn in range(1000):
        moved.run.priority = priority(turn)
        line.move(moved)
    assert sum(map(len, line._heaps.values())) <= 50
    assert sorted(taken(line)) == list(range(1, 11))


def test_a_line_does_not_grow_by_holding_and_going_on(submission: Counter) -> None:
    held = submission()
    line = line_of(submission(1), held)
    for _ in range(1000):
        line.withdraw(held, "held")
        line.add(held)
    assert sum(map(len, line._heaps.values())) <= 50
    assert taken(line) == [2, 1]


def test_a_line_does_not_grow_by_those_that_come_and_are_withdrawn_behind_one_that_waits(
    submission: Counter,
) -> None:
    line = line_of(submission(1))
    for _ in range(1000):
        gone = submission()
        line.add(gone)
        line.withdraw(gone, "over")
    assert sum(map(len, line._heaps.values())) <= 50
    assert taken(line) == [1]


def test_a_line_is_tidied_a_little_at_a_time(submission: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asynccb.admission.STALE", 10)
    gone = [submission() for _ in range(25)]
    line = line_of(*gone, submission())
    for one in gone:
        line.withdraw(one, "over")
    assert [line.tidy() for _ in range(4)] == [False, False, True, True]
    assert sum(map(len, line._heaps.values())) == 1
    assert taken(line) == [26]


def test_a_demand_that_waits_for_its_device_holds_up_nobody_else(submission: Counter) -> None:
    full, free = Demand("full", 1.0), Demand("free", 1.0)
    line = line_of(submission(9, full), submission(0), submission(1, free), submission(0, full))

    def room(demand: Demand, kept: Container[str]) -> Room:
        return demand.device, demand != full and demand.device not in kept

    assert taken(line, room) == [3, 2]
    assert len(line) == 2
    assert taken(line) == [1, 4]


def test_nobody_overtakes_on_a_device_that_an_earlier_one_waits_for(submission: Counter) -> None:
    """Else a stream of small ones keeps a large one waiting for ever, whatever its priority."""
    devices = Devices(["a", "b"])
    devices.take("a", 0.5)
    line = line_of(
        submission(5, Demand("a", 1.0)), submission(0, Demand("a", 0.5)), submission(0, Demand("b", 0.5))
    )
    assert taken(line, devices.room) == [3]
    devices.give_back("a", 0.5)
    found = line.next(devices.room)
    assert found is not None
    assert found[0].number == 1


def test_the_emptiest_device_is_kept_for_one_that_takes_any(submission: Counter) -> None:
    devices = Devices(["a", "b"])
    devices.take("a", 0.75)
    devices.take("b", 0.25)
    line = line_of(
        submission(1, Demand(ANY, 1.0)), submission(0, Demand("b", 0.5)), submission(0, Demand(ANY, 0.25))
    )
    found = line.next(devices.room)
    assert found is not None
    assert (found[0].number, found[1]) == (3, "a")
    devices.give_back("b", 0.25)
    found = line.next(devices.room)
    assert found is not None
    assert (found[0].number, found[1]) == (1, "b")


def test_whoever_wants_no_device_is_not_asked_for_room(submission: Counter) -> None:
    assert line_of(submission()).next(nowhere) is not None


# ---------------------------------------------------------------- the devices


def test_names_have_room_for_one_each() -> None:
    devices = Devices(["a", "b"])
    assert devices.taken() == {"a": 0.0, "b": 0.0}
    devices.take("a", 1.0)
    assert fit(devices, Demand("a", 1.0)) is None
    assert fit(devices, Demand("b", 1.0)) == "b"
    devices.give_back("a", 1.0)
    assert fit(devices, Demand("a", 1.0)) == "a"


def test_a_mapping_tells_how_many_each_has_room_for() -> None:
    devices = Devices({"a": 2, "b": 0.5})
    devices.take("a", 1.0)
    assert fit(devices, Demand("a", 1.0)) == "a"
    devices.take("a", 1.0)
    assert fit(devices, Demand("a", 0.1)) is None
    assert fit(devices, Demand("b", 0.5)) == "b"


@pytest.mark.parametrize("parts", [3, 6, 7, 10, 49])
def test_the_parts_of_a_whole_fit_into_it_and_no_more(parts: int) -> None:
    devices = Devices(["a"])
    share = 1.0 / parts
    for _ in range(parts):
        assert fit(devices, Demand("a", share)) == "a"
        devices.take("a", share)
    assert fit(devices, Demand("a", share)) is None
    assert devices.taken() == {"a": 1.0}
    for _ in range(parts):
        devices.give_back("a", share)
    assert devices.taken() == {"a": 0.0}
    assert fit(devices, Demand("a", 1.0)) == "a"


def test_any_takes_the_emptiest_and_waits_when_none_has_room() -> None:
    devices = Devices({"a": 1, "b": 2})
    any_ = Demand(ANY, 1.0)
    given = []
    while (name := fit(devices, any_)) is not None:
        given.append(name)
        devices.take(name, 1.0)
    assert sorted(given) == ["a", "b", "b"]
    assert given[0] == "b"


def test_what_submit_is_given_becomes_a_demand() -> None:
    devices = Devices(["a", "b"])
    assert devices.demand(None) is None
    assert devices.demand("a") == Demand("a", 1.0)
    assert devices.demand(("b", 0.25)) == Demand("b", 0.25)
    assert devices.demand((ANY, 1)) == Demand(ANY, 1.0)
    assert devices.demand(("a", Fraction(1, 3))) == Demand("a", 1 / 3)


@pytest.mark.parametrize(
    "device",
    ["c", "A", 1, ["a"], ("a",), ("a", 0.5, 1), (1, 0.5), (["a"], 0.5)],
    ids=repr,
)
def test_an_unknown_device_is_refused(device: Any) -> None:
    with pytest.raises(ArgumentError, match="device"):
        Devices(["a", "b"]).demand(device)


def test_a_device_that_is_nearly_right_is_named() -> None:
    with pytest.raises(ArgumentError, match="cuda:1"):
        Devices(["cuda:1"]).demand("cuda1")


def test_where_there_are_no_devices_none_can_be_asked_for() -> None:
    with pytest.raises(ArgumentError, match="has no devices"):
        Devices(None).demand("cuda:0")
    assert Devices(None).demand(None) is None


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), float("inf"), "1", True, None])
def test_a_share_that_is_no_part_of_a_whole_is_refused(share: Any) -> None:
    with pytest.raises(ArgumentError, match="device"):
        Devices(["a"]).demand(("a", share))


def test_a_share_that_is_more_than_the_device_is_refused() -> None:
    devices = Devices({"half": 0.5, "whole": 1})
    with pytest.raises(ArgumentError, match=r"0\.5 of half"):
        devices.demand("half")
    assert devices.demand(ANY) == Demand(ANY, 1.0)
    with pytest.raises(ArgumentError, match=r"0\.5 of any"):
        Devices({"half": 0.5}).demand(ANY)


@pytest.mark.parametrize(
    "given",
    ["cuda:0", 3, [1], [ANY], {"a": 0}, {"a": -1}, {"a": float("inf")}, {"a": "1"}, {"a": True}, {1: 1}],
    ids=repr,
)
def test_devices_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="devices"):
        Devices(given)


def test_a_device_that_is_named_twice_is_refused_with_the_way_to_say_it() -> None:
    with pytest.raises(ArgumentError, match=r"each name once.*\{'a': 2\}"):
        Devices(["a", "a"])


# ---------------------------------------------------------------- beside a list


DEMANDS = [None, Demand("a", 1.0), Demand("a", 0.5), Demand("b", 1 / 3), Demand(ANY, 0.5)]


class Beside(RuleBasedStateMachine):
    """The line and its devices beside a list of those that wait, which is sorted for each question, and
    devices counted in fractions."""

    def __init__(self) -> None:
        super().__init__()
        self.submission = Counter()
        self.line, self.devices = Line(), Devices({"a": 1, "b": 2})
        self.waiting: list[Submission] = []
        self.held: list[Submission] = []
        self.live: list[tuple[Submission, str | None]] = []
        self.left = {"a": Fraction(1), "b": Fraction(2)}

    def first(self) -> tuple[Submission, Fraction | None] | None:
        """Who begins, and how much is free on the device that he gets."""
        kept: set[str] = set()
        for one in sorted(self.waiting, key=lambda one: (-one.run.priority, one.number)):
            if one.demand is None:
                return one, None
            names = {"a", "b"} if one.demand.device == ANY else {one.demand.device}
            if not names - kept:
                continue
            # Of two that are equally empty the line takes the one that was named first.
            best = max(sorted(names - kept), key=lambda name: self.left[name])
            if self.left[best] >= exact(one.demand):
                return one, self.left[best]
            kept.add(best)
        return None

    @rule(priority=st.integers(-2, 2), demand=st.sampled_from(DEMANDS))
    def submit(self, priority: int, demand: Demand | None) -> None:
        made = self.submission(priority, demand)
        self.waiting.append(made)
        self.line.add(made)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), priority=st.integers(-2, 2))
    def move(self, data: Any, priority: int) -> None:
        moved = data.draw(st.sampled_from(self.waiting))
        moved.run.priority = priority
        self.line.move(moved)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), held=st.booleans())
    def withdraw(self, data: Any, held: bool) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        self.line.withdraw(gone, "held" if held else "over")
        if held:
            self.held.append(gone)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), priority=st.integers(-2, 2))
    def go_on(self, data: Any, priority: int) -> None:
        back = data.draw(st.sampled_from(self.held))
        self.held.remove(back)
        back.run.priority = priority
        self.waiting.append(back)
        self.line.add(back)

    @rule()
    def tidy(self) -> None:
        assert self.line.tidy()

    @rule()
    def begin(self) -> None:
        found = self.line.next(self.devices.room)
        wanted = self.first()
        if wanted is None:
            assert found is None
            return
        first, free = wanted
        assert found is not None
        assert found[0] is first
        device = found[1]
        if first.demand is not None:
            assert device is not None
            assert self.left[device] == free
            self.left[device] -= exact(first.demand)
            self.devices.take(device, first.demand.share)
        else:
            assert device is None
        self.waiting.remove(first)
        self.live.append((first, device))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        ended = data.draw(st.sampled_from(self.live))
        self.live.remove(ended)
        submission, device = ended
        if device is not None:
            self.left[device] += exact(submission.demand)
            self.devices.give_back(device, submission.demand.share)

    @invariant()
    def agree(self) -> None:
        assert len(self.line) == len(self.waiting)
        capacity = {"a": 1, "b": 2}
        assert self.devices.taken() == {
            name: round(float(capacity[name] - left), 9) for name, left in self.left.items()
        }
        assert sum(map(len, self.line._heaps.values())) <= len(DEMANDS) * (2 * self.submission.made + 17)


def exact(demand: Demand | None) -> Fraction:
    assert demand is not None
    return Fraction(demand.share).limit_denominator(12)


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
