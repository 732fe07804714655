"""The resume unit: who is asked, when it counts, and what is said of those who do not answer."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from asynccb import BackupIncomplete, Callback
from asynccb.protocols import Place
from asynccb.unit import Report, Unit, Units

if TYPE_CHECKING:
    from collections.abc import Callable


class Stateful(Callback):
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


class Beside(Stateful):
    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


class Durable(Callback):
    def __init__(self) -> None:
        self.synced = 0

    async def sync(self) -> None:
        self.synced += 1


class Taker(Callback):
    """Takes a unit whenever it is asked to want one."""

    def __init__(self, *, wants: Callable[[bool], bool] = lambda last: True) -> None:
        self.units: list[Unit] = []
        self._wants = wants

    def wants_unit(self, *, last: bool) -> bool:
        return self._wants(last)

    def take_unit(self, unit: Unit) -> Any:
        self.units.append(unit)
        return None


class Bench:
    """Units of these callbacks, with mailboxes that are lists."""

    def __init__(self, **callbacks: Callback) -> None:
        self.marks: dict[str, Any] = {}
        self.handed: list[str] = []
        self.snapshots = 0
        self.subscribers = [
            SimpleNamespace(
                name=name,
                callback=callback,
                muted=False,
                beside={"on_epoch_end": None} if isinstance(callback, Beside) else {},
            )
            for name, callback in callbacks.items()
        ]
        self.units = Units(self, self.capture, lambda: {"settings": {}, "stop": None}, 60.0)  # type: ignore[arg-type]

    def capture(self) -> Any:
        self.snapshots += 1
        return SimpleNamespace(another=lambda: "another")

    def mark(self, subscriber: Any, entry: Any) -> None:
        self.marks[subscriber.name] = entry

    def hand_over(self, subscriber: Any, coroutine: Any, snapshots: Any) -> None:
        self.handed.append(subscriber.name)

    async def reach(self, name: str) -> None:
        """What the consumer does at the marker."""
        _, mark, ask, *_ = self.marks[name]
        mark.set_result(await ask())


def test_states_of_inline_callbacks_are_copied_at_the_cut() -> None:
    live = {"count": [1, 2]}
    taker = Taker()
    bench = Bench(Inline=Stateful(**live), Taker=taker)
    bench.units.cut(Place(1), 7)
    live["count"].append(3)
    assert taker.units[0]._state["callbacks"] == {"Inline": {"count": [1, 2]}}
    assert (taker.units[0].place, taker.units[0].step) == (Place(1), 7)


def test_only_those_with_a_state_beside_or_with_files_get_a_marker() -> None:
    bench = Bench(
        Inline=Stateful(a=1), Beside=Beside(a=1), Durable=Durable(), Plain=Callback(), Taker=Taker()
    )
    bench.units.cut(Place(0), 0)
    assert sorted(bench.marks) == ["Beside", "Durable"]


@pytest.mark.asyncio
async def test_it_is_complete_when_all_have_reported_with_what_they_were_at_the_marker() -> None:
    beside, durable, taker = Beside(count=1), Durable(), Taker()
    bench = Bench(Beside=beside, Durable=durable, Taker=taker)
    bench.units.cut(Place(0), 3)
    completing = asyncio.ensure_future(taker.units[0].complete())
    await asyncio.sleep(0)
    beside.state = {"count": 9}
    await bench.reach("Durable")
    await asyncio.sleep(0)
    assert not completing.done()
    await bench.reach("Beside")
    state = await completing
    assert state["callbacks"] == {"Beside": {"count": 9}}
    assert durable.synced == 1


@pytest.mark.asyncio
async def test_who_does_not_answer_in_time_is_named() -> None:
    taker = Taker()
    bench = Bench(Slow=Beside(a=1), Durable=Durable(), Taker=taker)
    bench.units._seconds = 0.01
    bench.units.cut(Place(0), 3)
    await bench.reach("Durable")
    with pytest.raises(BackupIncomplete) as raised:
        await taker.units[0].complete()
    assert (raised.value.step, raised.value.missing) == (3, ["Slow (still busy with what came before)"])


@pytest.mark.asyncio
async def test_a_report_that_comes_too_late_changes_nothing() -> None:
    taker = Taker()
    bench = Bench(Slow=Beside(a=1), Taker=taker)
    bench.units._seconds = -1.0
    bench.units.cut(Place(0), 3)
    with pytest.raises(BackupIncomplete):
        await taker.units[0].complete()
    await bench.reach("Slow")


@pytest.mark.asyncio
async def test_who_has_ended_before_the_marker_is_named_with_or_without_a_state() -> None:
    taker = Taker()
    bench = Bench(Gone=Beside(a=1), Durable=Durable(), Taker=taker)
    bench.units.cut(Place(0), 3)
    for _, mark, *_ in bench.marks.values():
        mark.set_result(None)  # what emptying a mailbox does
    with pytest.raises(BackupIncomplete) as raised:
        await taker.units[0].complete()
    assert raised.value.missing == ["Gone (it had ended)", "Durable (it had ended)"]


@pytest.mark.asyncio
async def test_a_state_dict_that_raises_beside_is_the_reason_that_is_named() -> None:
    class Broken(Beside):
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("no state")

    taker = Taker()
    bench = Bench(Broken=Broken(), Taker=taker)
    bench.units.cut(Place(0), 3)
    await bench.reach("Broken")
    with pytest.raises(BackupIncomplete, match=r"Broken \(its state_dict\(\) raised ValueError: no state\)"):
        await taker.units[0].complete()


@pytest.mark.asyncio
@pytest.mark.parametrize("policy", ["raise", "disable"])
async def test_where_a_hook_has_failed_that_ends_the_training_it_cannot_commit(policy: str) -> None:
    durable, taker = Durable(), Taker()
    durable.on_error = policy  # type: ignore[misc, assignment]
    bench = Bench(Durable=durable, Taker=taker)
    bench.units.cut(Place(0), 3)
    bench.subscribers[0].muted = True  # by what lay before the marker
    await bench.reach("Durable")
    if policy == "disable":
        assert (await taker.units[0].complete())["step"] == 3
        return
    with pytest.raises(BackupIncomplete, match=r"Durable \(one of its hooks has failed\)"):
        await taker.units[0].complete()
    assert durable.synced == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("policy", ["raise", "warn"])
async def test_where_a_sync_fails_that_ends_the_training_it_cannot_commit(policy: str) -> None:
    class Full(Durable):
        async def sync(self) -> None:
            raise OSError(28, "full")

    full, taker = Full(), Taker()
    full.on_error = policy  # type: ignore[misc, assignment]
    bench = Bench(Full=full, Taker=taker)
    bench.units.cut(Place(0), 3)
    with pytest.raises(OSError, match="full"):
        await bench.reach("Full")
    _, mark, *_ = bench.marks["Full"]
    mark.set_result(None)  # what its consumer does then
    if policy == "warn":
        assert (await taker.units[0].complete())["step"] == 3
        return
    with pytest.raises(BackupIncomplete, match=r"Full \(its sync\(\) raised OSError"):
        await taker.units[0].complete()


@pytest.mark.asyncio
async def test_whose_sync_may_fail_still_gives_its_state() -> None:
    class Full(Beside):
        on_error = "warn"

        async def sync(self) -> None:
            raise OSError(28, "full")

    taker = Taker()
    bench = Bench(Full=Full(rows=3), Taker=taker)
    bench.units.cut(Place(0), 3)
    with pytest.raises(OSError, match="full"):
        await bench.reach("Full")
    bench.marks["Full"][1].set_result(None)  # what its consumer does then
    assert (await taker.units[0].complete())["callbacks"] == {"Full": {"rows": 3}}


@pytest.mark.asyncio
async def test_several_takers_wait_for_one_report() -> None:
    subscriber: Any = SimpleNamespace(name="Beside", callback=Beside(a=1), muted=False)
    report = Report(subscriber, stateful=True)
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + 60
    waiting = [asyncio.ensure_future(report.wait(loop, deadline)) for _ in range(3)]
    await asyncio.sleep(0)
    assert report.missing == "Beside (still busy with what came before)"
    await report.sync()
    await asyncio.to_thread(report.set_result, None)  # from any thread
    await asyncio.gather(*waiting)
    assert report.missing == ""


def test_takers_share_one_copy_of_the_model() -> None:
    first, second = Taker(), Taker()
    bench = Bench(First=first, Second=second)
    bench.units.cut(Place(0), 3)
    assert (bench.snapshots, bench.handed) == (1, ["Second", "First"])
    assert second.units[0].snapshot == "another"  # type: ignore[comparison-overlap]


def test_no_taker_gets_two_of_one_place() -> None:
    taker = Taker()
    bench = Bench(Taker=taker)
    for place in (Place(0), Place(0), Place(0, "batches", 1), Place(0, "batches", 1), Place(1)):
        bench.units.cut(place, 1)
    assert [unit.place for unit in taker.units] == [Place(0), Place(0, "batches", 1), Place(1)]


def test_nothing_is_copied_where_nobody_wants_one() -> None:
    taker = Taker(wants=lambda last: last)
    bench = Bench(Taker=taker, Inline=Stateful(a=1))
    bench.units.cut(Place(0), 1)
    assert (bench.snapshots, taker.units) == (0, [])
    bench.units.cut(Place(1), 2, last=True)
    assert [unit.step for unit in taker.units] == [2]


def test_a_muted_taker_is_not_asked() -> None:
    taker = Taker()
    bench = Bench(Taker=taker)
    bench.subscribers[0].muted = True
    bench.units.cut(Place(0), 1)
    assert taker.units == []
