"""Copies made beside the training: of one moment, whatever the training, its hooks and the writers do."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.protocols import LiveState
from asynccb.training import copying
from asynccb.training.control import Control, Interrupt, Limits
from asynccb.training.copying import Copy, Copying, Target, Warming
from asynccb.training.snapshot import Snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from asynccb.protocols import Batch, Gate

    Array = np.ndarray[Any, Any]

PATIENT = 10.0
"""Seconds after which a test gives up; none of them waits for that long."""


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies are made beside the training too."""
    monkeypatch.setattr(copying, "AT_ONCE", -1)


class State:
    """What a model of these tests answers: arrays by number."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.arrays: Mapping[str, Array] = {str(at): array for at, array in enumerate(arrays)}

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None:
        raise NotImplementedError

    def to_model(self) -> Any:
        raise NotImplementedError


def live(*arrays: Array, pieces: int = 1, versions: Sequence[int | None] | None = None) -> LiveState:
    segments = [
        (at, piece * len(array) // pieces, (piece + 1) * len(array) // pieces)
        for piece in range(pieces)
        for at, array in enumerate(arrays)
    ]
    return LiveState(arrays, segments, versions or [None] * len(arrays), State)


def control() -> Control:
    return Control(lambda: False, lambda: None, Limits(poll=0.01))


class Held:
    """Stands for ``np.copyto``: each copy waits until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.by: list[str] = []
        copyto = np.copyto

        def held(target: Array, source: Array) -> None:
            self.by.append(threading.current_thread().name)
            self.begun.release()
            assert self.go_on.acquire(timeout=PATIENT)
            copyto(target, source)

        monkeypatch.setattr(copying.np, "copyto", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


# ---------------------------------------------------------------- one copy


def test_any_number_of_threads_make_one_copy_together_each_segment_once() -> None:
    source = np.arange(10_000.0)
    state = live(source, pieces=500)
    target = Target(state)
    moved: list[int] = []
    copy = Copy(state, target, lambda: moved.append(1))
    threads = [threading.Thread(target=copy.wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    assert copy.whole
    assert target.arrays[0].tolist() == source.tolist()
    assert len(moved) == 500


def test_what_it_holds_is_shown_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Target(live(np.zeros(3))).shown[0][0] = 1


def test_rows_kept_before_they_are_overwritten_are_in_the_copy_as_they_were() -> None:
    table = np.arange(12.0).reshape(6, 2)
    before = table.copy()
    state = live(table, pieces=3)
    target = Target(state)
    copy = Copy(state, target, lambda: None)
    for turn in range(3):  # row 1 three times: the oldest is the one of the moment
        rows = np.array([1, 5 - turn])
        copy.keep(0, rows)
        table[rows] = -1 - turn
        copy.work()
    copy.wait()
    assert target.arrays[0].tolist() == before.tolist()


def test_without_keeping_them_the_copy_would_be_torn() -> None:
    """The control."""
    table = np.arange(12.0).reshape(6, 2)
    state = live(table, pieces=3)
    target = Target(state)
    copy = Copy(state, target, lambda: None)
    copy.work()
    table[[1, 5]] = -1
    copy.wait()
    assert target.arrays[0][:, 0].tolist() == [0, 2, 4, 6, 8, -1]


def test_an_array_that_kept_its_version_is_not_copied_again(held: Held) -> None:
    fixed, other = np.zeros(4), np.ones(4)
    target = Target(live(fixed, other))
    for _ in range(10):
        held.go_on.release()
    for version in (7, 7, 8):
        copy = Copy(live(fixed, other, versions=[version, None]), target, lambda: None)
        copy.wait()
        fixed += 1
    assert len(held.by) == 2 + 1 + 2
    assert target.arrays[0].tolist() == [2, 2, 2, 2]


def test_a_copy_that_was_given_up_holds_no_version(held: Held) -> None:
    fixed = np.ones(4)
    target = Target(live(fixed))
    Copy(live(fixed, versions=[1]), target, lambda: None).give_up()
    held.go_on.release()
    Copy(live(fixed, versions=[1]), target, lambda: None).wait()
    assert target.arrays[0].tolist() == [1, 1, 1, 1]


def test_a_copy_given_up_is_whole_once_the_segment_under_way_is_done(held: Held) -> None:
    state = live(np.zeros(8), pieces=4)
    copy = Copy(state, Target(state), lambda: None)
    told: list[bool] = []
    thread = threading.Thread(target=copy.work)
    thread.start()
    assert held.begun.acquire(timeout=PATIENT)
    copy.then(lambda: told.append(True))
    copy.give_up()
    assert (copy.whole, told) == (False, [])
    held.go_on.release()
    thread.join(PATIENT)
    assert (copy.whole, told, len(held.by)) == (True, [True], 1)


def test_an_error_while_copying_reaches_who_wants_the_copy_and_holds_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(target: Array, source: Array) -> None:
        raise MemoryError("no page left")

    monkeypatch.setattr(copying.np, "copyto", fails)
    state = live(np.zeros(8), pieces=2)
    copy = Copy(state, Target(state), lambda: None)
    with pytest.raises(MemoryError, match="no page left"):
        copy.wait()
    assert copy.done(2)


def test_memory_in_which_a_copy_failed_is_not_taken_to_hold_what_never_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(target: Array, source: Array) -> None:
        raise MemoryError("no page left")

    state = live(np.arange(8.0), versions=[7])
    target = Target(state)
    target.arrays[0][...] = -1
    with monkeypatch.context() as patched:
        patched.setattr(copying.np, "copyto", fails)
        with pytest.raises(MemoryError, match="no page left"):
            Copy(state, target, lambda: None).wait()
    Copy(state, target, lambda: None).wait()
    assert target.arrays[0].tolist() == list(range(8))


# ---------------------------------------------------------------- the gate


@pytest.fixture
def gate() -> Iterator[Copying]:
    made = Copying(control(), "test")
    yield made
    made.close()


def test_a_small_copy_is_whole_at_once_and_starts_no_thread(
    gate: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "AT_ONCE", 1 << 18)
    before = threading.active_count()
    state = live(np.ones(1 << 15))
    assert gate.begin(state, Target(state)).whole
    assert not gate.copying
    assert threading.active_count() == before


def test_a_large_copy_is_made_by_a_thread_of_its_own(gate: Copying, held: Held) -> None:
    state = live(np.ones(8), pieces=2)
    copy = gate.begin(state, Target(state))
    assert held.begun.acquire(timeout=PATIENT)
    assert (gate.copying, copy.whole) == (True, False)
    held.go_on.release(2)
    copy.wait()
    gate()
    assert not gate.copying
    assert held.by[0] == "asynccb test copier"


def test_the_gate_waits_for_the_segments_that_are_asked_for_and_no_others(gate: Copying, held: Held) -> None:
    source = np.zeros(4)
    state = live(source, pieces=4)
    target = Target(state)
    gate.begin(state, target)
    assert held.begun.acquire(timeout=PATIENT)  # the copier has begun the first
    waits = threading.Thread(target=gate, args=(1,))
    waits.start()
    assert waits.is_alive()
    held.go_on.release()
    waits.join(PATIENT)
    source[0] = 9  # segments 2 to 4 are not copied yet
    held.go_on.release(3)
    gate()
    assert target.arrays[0].tolist() == [0, 0, 0, 0]


def test_who_has_to_wait_copies_what_nobody_has_begun(gate: Copying, held: Held) -> None:
    state = live(np.ones(4), pieces=4)
    target = Target(state)
    gate.begin(state, target)
    assert held.begun.acquire(timeout=PATIENT)  # the copier holds the first segment
    trainer = threading.Thread(target=gate, name="trainer")
    trainer.start()
    assert held.begun.acquire(timeout=PATIENT)  # somebody has begun the second
    held.go_on.release(4)
    trainer.join(PATIENT)
    assert target.arrays[0].tolist() == [1, 1, 1, 1]
    assert "trainer" in held.by


def test_the_time_at_the_gate_is_counted_as_waiting(
    gate: Copying, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(copying, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gate._control, "wait", lambda *given, **more: copy.wait())
    state = live(np.ones(4), pieces=2)
    copy = gate.begin(state, Target(state))
    assert held.begun.acquire(timeout=PATIENT)  # the copier has begun the first, we make the second
    copyto = copying.np.copyto

    def takes_time(target: Array, source: Array) -> None:
        clock[0] += 0.25
        copyto(target, source)

    monkeypatch.setattr(copying.np, "copyto", takes_time)
    held.go_on.release(2)
    gate()
    assert gate._control.waited["gate"] == 0.25


def test_nothing_ends_the_wait_at_the_gate_but_the_copy(held: Held) -> None:
    """A batch that went on would tear the copy, however the run ends."""
    cancelled = control()
    gate = Copying(cancelled, "test")
    source = np.zeros(1)
    state = live(source)
    target = Target(state)
    gate.begin(state, target)
    assert held.begun.acquire(timeout=PATIENT)
    cancelled.interrupt_with("cancelled", "a test")
    cancelled.closing = True

    def update() -> None:
        gate(1)
        source[0] = 1

    thread = threading.Thread(target=update)
    thread.start()
    assert source[0] == 0
    held.go_on.release()
    thread.join(PATIENT)
    assert (source[0], target.arrays[0][0]) == (1, 0)
    gate.close()


def test_rows_beyond_all_measure_are_not_kept_but_the_copy_completed(
    gate: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "KEPT", 100)
    table = np.zeros((1000, 4))
    state = live(table, pieces=4)
    target = Target(state)
    gate.begin(state, target)
    rows = np.arange(500)
    gate.keep(0, rows)
    assert not gate.copying
    table[rows] = 1
    assert not target.arrays[0].any()


def test_closing_completes_the_copy_and_ends_the_thread(gate: Copying) -> None:
    state = live(np.ones(1000), pieces=100)
    target = Target(state)
    copy = gate.begin(state, target)
    gate.close()
    assert copy.whole
    assert not [thread for thread in threading.enumerate() if "copier" in thread.name]


def test_without_a_thread_to_be_had_the_copy_is_made_at_once(
    gate: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    state = live(np.ones(10), pieces=5)
    target = Target(state)
    assert gate.begin(state, target).whole
    assert target.arrays[0].tolist() == [1] * 10


def test_a_copy_that_is_kept_keeps_no_array_of_the_model_alive(gate: Copying) -> None:
    class Owner(np.ndarray[Any, Any]):
        pass

    ended: list[int] = []
    source = np.ones(1000).view(Owner)
    state = live(source)
    copy = gate.begin(state, Target(state))
    copy.wait()
    gate()
    weakref.finalize(source, ended.append, 1)
    del source, state
    gc.collect()
    assert ended == [1]


# ---------------------------------------------------------------- the pool


class OneArray:
    """A model as far as its snapshots are concerned."""

    def __init__(self) -> None:
        self.weights = np.zeros(4)

    def live(self) -> LiveState:
        return live(self.weights)


def snapshots(model: Any = None) -> Snapshots:
    return Snapshots(model or OneArray(), control(), "test")


def memory(snapshot: Any) -> int:
    address: int = snapshot.arrays["0"].__array_interface__["data"][0]
    return address


def test_memory_that_was_given_back_is_used_again() -> None:
    made = snapshots()
    first = made.take(1, 0, pooled=True)
    where = memory(first)
    first.release()
    second = made.take(2, 0, pooled=True)
    assert memory(second) == where
    made.close()


def test_what_a_user_receives_owns_its_memory() -> None:
    made = snapshots()
    kept = []
    for step in range(5):
        snapshot = made.take(step, 0)
        kept.append(snapshot.arrays["0"])
        snapshot.release()
    assert len({array.__array_interface__["data"][0] for array in kept}) == 5
    assert made.has_room()
    made.close()


def test_memory_that_a_user_shares_leaves_the_pool_and_the_pool_has_its_room_again() -> None:
    made = snapshots()
    first = made.take(1, 0, pooled=True)
    users = first.another().own()
    where = memory(users)
    first.release()
    users.release()
    others = [made.take(step, 0, pooled=True) for step in (2, 3)]
    assert where not in [memory(other) for other in others]
    made.close()


def test_two_copies_at_a_time_then_the_training_waits_for_a_release() -> None:
    made = snapshots()
    first, _second = (made.take(step, 0, pooled=True) for step in (1, 2))
    third: list[Any] = []
    thread = threading.Thread(target=lambda: third.append(made.take(3, 0, pooled=True)))
    thread.start()
    while made.gate._control.waiting != "pool":
        assert thread.is_alive()
    assert third == []
    first.release()
    thread.join(PATIENT)
    assert third[0].step == 3
    assert made.gate._control.waits["pool"] == 1
    made.close()


def test_memory_that_left_the_pool_is_forgotten_there() -> None:
    made = snapshots()
    kept = made.take(1, 0, pooled=True).own()
    del kept
    assert [slot.target for slot in made._pool._slots] == [None, None]
    made.close()


def test_there_is_one_place_more_for_each_further_callback_that_writes() -> None:
    made = snapshots()
    for _ in range(3):
        made.expect()
    held = [made.take(step, 0, pooled=True) for step in range(4)]
    assert not made.has_room()
    held[0].release()
    assert made.has_room()
    made.close()


def test_a_model_that_cannot_be_copied_yet_is_no_error_before_its_first_copy() -> None:
    class NotBuilt:
        def live(self) -> LiveState:
            raise ValueError("not built")

    made = snapshots(NotBuilt())
    made.expect()
    with pytest.raises(ValueError, match="not built"):
        made.take(1, 0, pooled=True)
    assert made.has_room()
    made.close()


def test_memory_is_not_warmed_while_a_copy_is_under_way_which_would_lose_its_place(held: Held) -> None:
    made = snapshots()
    first = made.take(1, 0)
    assert held.begun.acquire(timeout=PATIENT)
    made.expect()
    slot = made._pool.first()
    assert slot is not None
    assert slot.warming is None
    held.go_on.release()
    assert first.arrays["0"].tolist() == [0, 0, 0, 0]
    made.close()


def test_a_cancel_ends_the_wait_for_room() -> None:
    made = snapshots()
    _held = [made.take(step, 0, pooled=True) for step in (1, 2)]
    made.gate._control.interrupt_with("cancelled", "a test")
    with pytest.raises(Interrupt):
        made.take(3, 0, pooled=True)
    made.close()


def test_while_the_run_closes_nobody_waits_for_room() -> None:
    made = snapshots()
    held = [made.take(step, 0, pooled=True) for step in (1, 2)]
    made.gate._control.closing = True
    third = made.take(3, 0, pooled=True)
    assert len({memory(snapshot) for snapshot in [*held, third]}) == 3
    made.close()


def test_a_snapshot_dropped_without_a_release_gives_its_room_back() -> None:
    made = snapshots()
    for step in range(5):
        made.take(step, 0, pooled=True)
    assert made.has_room()
    made.close()


def test_memory_is_not_given_to_the_next_copy_while_a_thread_still_writes_to_it(held: Held) -> None:
    made = snapshots()
    first = made.take(1, 0, pooled=True)
    assert held.begun.acquire(timeout=PATIENT)
    first.release()
    assert len(made._pool._free) == 1  # the other one
    held.go_on.release()
    made.gate()
    assert len(made._pool._free) == 2
    made.close()


def test_a_model_that_can_only_capture_is_bounded_by_the_pool_too() -> None:
    class Captures:
        def live(self) -> None:
            return None

        def capture(self) -> State:
            return State([np.zeros(2)])

    made = snapshots(Captures())
    first = made.take(1, 0, pooled=True)
    made.take(2, 0, pooled=True).another()
    held = made.take(2, 0, pooled=True)
    assert not made.has_room()
    first.release()
    held.release()
    assert made.has_room()


# ---------------------------------------------------------------- memory that is warmed


def test_warming_writes_to_every_page_once() -> None:
    target = Target(live(np.ones((700, 900)), np.ones(3, np.float32), np.ones((0, 4))))
    for array in target.arrays:
        array.fill(7)
    warming = Warming(target)
    while warming.work():
        pass
    touched = target.arrays[0].reshape(-1).view(np.uint8)[:: copying.PAGE]
    assert not touched.any()
    assert np.count_nonzero(target.arrays[0].reshape(-1).view(np.uint8) == 0) >= len(touched)


def test_memory_that_is_needed_is_not_written_to_any_more() -> None:
    target = Target(live(np.ones((1000, 1000))))
    warming = Warming(target)
    assert warming.work()
    warming.stop()
    target.arrays[0].fill(7)
    assert not warming.work()
    assert (target.arrays[0] == 7).all()


def test_the_first_copy_is_made_in_the_memory_that_was_warmed_for_it() -> None:
    class Large:
        weights = np.ones((2000, 1000))

        def live(self) -> LiveState:
            return live(self.weights, pieces=4)

    for _ in range(20):
        made = snapshots(Large())
        made.expect()
        expected = made._pool.first()
        assert expected is not None
        snapshot = made.take(1, 0, pooled=True)
        assert expected.target is not None
        assert snapshot.arrays["0"].base is expected.target.arrays[0]
        assert (snapshot.arrays["0"] == 1).all()
        made.close()
        assert (snapshot.arrays["0"] == 1).all()


def test_a_run_that_ends_before_its_memory_is_warm_does_not_wait_for_it() -> None:
    class Huge:
        weights = np.zeros(
            (1 << 14, 1 << 12)
        )  # half a gigabyte, of which nobody ever touches more than a part

        def live(self) -> LiveState:
            return live(self.weights, pieces=64)

    made = snapshots(Huge())
    made.expect()
    made.close()
    slot = made._pool.first()
    assert slot is not None
    assert slot.warming is not None
    assert not slot.warming.work()


# ---------------------------------------------------------------- in a training


class Stamped:
    """Every tensor holds the number of the batch that last changed it; the update goes tensor by tensor."""

    metrics_names = ("loss",)

    def __init__(self, tensors: int, size: int, *, asks: bool = True) -> None:
        self.stop_training = False
        self.tensors = [np.zeros(size) for _ in range(tensors)]
        self.steps = 0
        self._asks = asks

    def live(self) -> LiveState:
        return live(*self.tensors)

    def capture(self) -> State:
        return State([tensor.copy() for tensor in self.tensors])

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> dict[str, float]:
        self.steps += 1
        for at, tensor in enumerate(self.tensors):
            if before_update is not None and before_update.copying and self._asks:
                before_update(at + 1)
            tensor.fill(self.steps)
        return {"loss": 1.0}


class LagsBehind(Callback):
    """A writer that reads its copy late: when the next save has been handed over, at the earliest."""

    changes_model = False

    def __init__(self) -> None:
        self.stamps: list[tuple[int, list[float]]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        return self.write(self.run.snapshot_now(self, pooled=True))

    async def write(self, snapshot: Any) -> None:
        found = sorted({float(value) for array in snapshot.arrays.values() for value in np.unique(array)})
        self.stamps.append((snapshot.step, found))
        snapshot.release()


@pytest.mark.asyncio
async def test_a_thousand_saves_of_many_tensors_are_each_of_one_moment() -> None:
    writer = LagsBehind()
    model = Stamped(tensors=40, size=400)
    run = Trainer(model).start(np.zeros((1000, 1)), batch_size=1, verbose=0, callbacks=[writer])
    await run
    assert writer.stamps == [(step, [float(step)]) for step in range(1, 1001)]
    assert run.stats.snapshots == 1000


@pytest.mark.asyncio
async def test_a_model_that_does_not_ask_the_gate_tears_its_copies() -> None:
    """The control: the same training, and the very check above finds it."""
    writer = LagsBehind()
    model = Stamped(tensors=40, size=40_000, asks=False)
    await Trainer(model).fit(np.zeros((100, 1)), batch_size=1, verbose=0, callbacks=[writer])
    assert any(found != [float(step)] for step, found in writer.stamps)


@pytest.mark.asyncio
async def test_a_hook_that_changes_the_model_right_after_its_own_copy_does_not_tear_it() -> None:
    class Zeroes(LagsBehind):
        changes_model = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            later = super().on_train_batch_end(batch, logs)
            for tensor in self.model.tensors:
                tensor.fill(-1.0)
            return later

        on_epoch_end = on_train_batch_end

    writer = Zeroes()
    model = Stamped(tensors=20, size=20_000)
    await Trainer(model).fit(np.zeros((50, 1)), batch_size=1, verbose=0, callbacks=[writer])
    assert writer.stamps == [*((step, [float(step)]) for step in range(1, 51)), (50, [-1.0])]


@pytest.mark.asyncio
async def test_a_snapshot_that_is_kept_keeps_no_run_alive_and_no_data() -> None:
    class Data(np.ndarray[Any, Any]):
        pass

    kept: list[Any] = []

    class Takes(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kept.append(self.snapshot())

    data = np.zeros((20, 1)).view(Data)
    model = Stamped(tensors=4, size=1000)
    run = Trainer(model).start(data, batch_size=1, verbose=0, callbacks=Takes())
    await run
    gone = [weakref.ref(data), weakref.ref(run), weakref.ref(model)]
    del data, run, model
    while [reference() is None for reference in gone] != [True, True, True]:  # its task and thread end first
        await asyncio.sleep(0)
        gc.collect()
    assert len(kept[0].arrays) == 4


@pytest.mark.asyncio
async def test_hooks_that_change_the_model_right_after_a_copy_do_not_tear_it() -> None:
    class Zeroes(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            for tensor in self.model.tensors:
                tensor.fill(-1.0)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            for tensor in self.model.tensors:
                tensor.fill(-2.0)

    writer = LagsBehind()
    model = Stamped(tensors=20, size=20_000)
    await Trainer(model).fit(np.zeros((100, 1)), batch_size=1, verbose=0, callbacks=[writer, Zeroes()])
    assert writer.stamps == [(step, [float(step)]) for step in range(1, 101)]


@pytest.mark.asyncio
async def test_a_coroutine_begins_when_its_copy_is_whole_so_that_the_loop_never_waits_for_it(
    held: Held,
) -> None:
    whole: list[bool] = []

    class Writes(Callback):
        changes_model = False

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self.write(self.snapshot())

        async def write(self, snapshot: Any) -> None:
            whole.append(snapshot.whole)

    held.go_on.release(100)
    await Trainer(Stamped(tensors=10, size=10)).fit(
        np.zeros((2, 1)), batch_size=1, verbose=0, callbacks=[Writes()]
    )
    assert whole == [True]


@pytest.mark.asyncio
async def test_a_run_that_ends_leaves_no_copy_under_way_and_no_thread() -> None:
    kept: list[Any] = []

    class Takes(Callback):
        changes_model = False

        def on_train_end(self, logs: Any = None) -> None:
            kept.append(self.snapshot())

    model = Stamped(tensors=50, size=20_000)
    await Trainer(model).fit(np.zeros((3, 1)), batch_size=1, verbose=0, callbacks=[Takes()])
    assert kept[0].whole
    assert not [thread for thread in threading.enumerate() if "copier" in thread.name]
