"""Copies of a model in training: whole, shared by those who ask together, and owned by each of them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, NotStarted, RunCancelled, TornState, Trainer
from asynccb.testing import ScriptedModel, ScriptedState, settle
from asynccb.training.control import Limits
from asynccb.training.snapshot import Snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from asynccb.protocols import Batch


def taken(value: float = 1.0) -> Snapshot:
    return Snapshot(ScriptedState(np.full(4, value)), step=5, epoch=2)


# ---------------------------------------------------------------- a handle


def test_a_handle_says_when_it_was_taken_and_its_arrays_cannot_be_changed() -> None:
    snapshot = taken()
    assert (snapshot.step, snapshot.epoch, repr(snapshot)) == (5, 2, "<Snapshot step=5 epoch=2>")
    with pytest.raises(ValueError, match="read-only"):
        snapshot.arrays["weights"][0] = 3
    with pytest.raises(TypeError):
        snapshot.arrays["more"] = np.zeros(1)  # type: ignore[index]


def test_releasing_one_handle_leaves_the_others_theirs() -> None:
    first = taken()
    second = first.another()
    first.release()
    first.release()
    assert (first.released, second.released) == (True, False)
    assert second.arrays["weights"].tolist() == [1, 1, 1, 1]
    assert (second.step, second.epoch) == (5, 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda snapshot: snapshot.arrays,
        lambda snapshot: snapshot.to_model(),
        lambda snapshot: snapshot.save("never"),
        lambda snapshot: snapshot.another(),
    ],
)
def test_a_released_handle_says_so(use: Any) -> None:
    with taken() as snapshot:
        pass
    assert repr(snapshot) == "<Snapshot step=5 epoch=2, released>"
    with pytest.raises(RuntimeError, match="this snapshot of step 5 was released"):
        use(snapshot)


def test_arrays_that_were_taken_before_a_release_stay_readable() -> None:
    snapshot = taken()
    arrays = snapshot.arrays
    snapshot.release()
    assert arrays["weights"].sum() == 4


def test_a_copy_can_be_saved_and_trained_on(tmp_path: Path) -> None:
    snapshot = taken(3.0)
    snapshot.save(tmp_path / "weights")
    assert np.frombuffer((tmp_path / "weights").read_bytes()).tolist() == [3, 3, 3, 3]
    model = snapshot.to_model()
    model.weights[:] = 9
    assert snapshot.arrays["weights"].tolist() == [3, 3, 3, 3]


# ---------------------------------------------------------------- from a run


@pytest.mark.asyncio
async def test_two_hundred_snapshots_beside_a_running_training_are_never_torn() -> None:
    """Each batch writes its number into the first half of the weights, then into the second."""
    model = ScriptedModel()
    async with Trainer(model).start(np.zeros((10, 1)), batch_size=1, epochs=100_000, verbose=0) as run:
        while run.state == "queued":  # noqa: ASYNC110  # a thread brings it about
            await asyncio.sleep(0)
        steps = []
        for _ in range(200):
            snapshot = await run.snapshot()
            (stamp,) = set(snapshot.arrays["weights"].tolist())
            assert stamp == snapshot.step
            assert snapshot.epoch == max(0, snapshot.step - 1) // 10
            steps.append(snapshot.step)
        run.stop()
    assert steps == sorted(steps)
    assert len(set(steps)) > 10


@pytest.mark.asyncio
async def test_a_copy_made_in_the_middle_of_a_batch_would_be_torn() -> None:
    """The control: what a copy at any moment would find."""
    model = ScriptedModel(raises={3: ValueError("in the middle")})
    with pytest.raises(ValueError, match="in the middle"):
        await Trainer(model).fit(np.zeros((10, 1)), batch_size=1, verbose=0)
    assert set(model.weights.tolist()) == {3.0, 4.0}


@pytest.mark.asyncio
async def test_training_on_does_not_change_a_copy() -> None:
    model = ScriptedModel(gated=True)
    async with Trainer(model).start(np.zeros((4, 1)), batch_size=1, verbose=0) as run:
        await model.open(1)
        asked = asyncio.create_task(run.snapshot())
        await settle()
        model.open_for_good()
        snapshot = await asked
    assert (snapshot.step, set(snapshot.arrays["weights"].tolist())) == (2, {2.0})
    assert set(model.weights.tolist()) == {4.0}


@pytest.mark.asyncio
async def test_all_who_ask_before_one_safe_point_share_one_copy_and_hold_a_handle_each() -> None:
    model = ScriptedModel(gated=True)
    async with Trainer(model).start(np.zeros((4, 1)), batch_size=1, verbose=0) as run:
        await model.at_gate()
        asked = [asyncio.create_task(run.snapshot()) for _ in range(5)]
        await settle()
        await model.open(1)
        first, *others = await asyncio.gather(*asked)
        assert run.stats.snapshots == 1
        first.release()
        assert all(other.arrays["weights"] is others[0].arrays["weights"] for other in others)
        model.open_for_good()


@pytest.mark.asyncio
async def test_a_queued_run_has_no_state_of_its_own_and_an_ended_one_has_its_last() -> None:
    model = ScriptedModel()
    run = Trainer(model).start(np.zeros((4, 1)), batch_size=1, verbose=0)
    with pytest.raises(NotStarted):
        await run.snapshot()
    await run
    snapshot = await run.snapshot()
    assert (snapshot.step, set(snapshot.arrays["weights"].tolist())) == (4, {4.0})


@pytest.mark.asyncio
async def test_a_model_that_broke_inside_a_batch_gives_no_copy() -> None:
    run = Trainer(ScriptedModel(raises={1: ValueError("half")})).start(
        np.zeros((4, 1)), batch_size=1, verbose=0
    )
    with pytest.raises(ValueError, match="half"):
        await run
    with pytest.raises(TornState, match="raised inside a batch"):
        await run.snapshot()


@pytest.mark.asyncio
async def test_nobody_waits_for_a_copy_from_a_thread_that_is_stuck() -> None:
    model, trainer = ScriptedModel(gated=True), None
    trainer = Trainer(model)
    trainer._limits = Limits(grace=0.02, last_words=0.02)
    run = trainer.start(np.zeros((4, 1)), batch_size=1, verbose=0)
    await model.at_gate()
    asked = asyncio.create_task(run.snapshot())
    await settle()
    run.cancel()
    with pytest.raises(TornState, match="did not come back"):
        await asked
    with pytest.raises(TornState, match="did not come back"):
        await run.snapshot()
    with pytest.raises(RunCancelled):
        await run
    model.open_for_good()


@pytest.mark.asyncio
async def test_who_no_longer_wants_its_copy_disturbs_nobody() -> None:
    model = ScriptedModel(gated=True)
    async with Trainer(model).start(np.zeros((4, 1)), batch_size=1, verbose=0) as run:
        await model.at_gate()
        gone, stays = asyncio.create_task(run.snapshot()), asyncio.create_task(run.snapshot())
        await settle()
        gone.cancel()
        model.open_for_good()
        assert (await stays).step >= 1
    with pytest.raises(asyncio.CancelledError):
        await gone


# ---------------------------------------------------------------- from a hook


@pytest.mark.asyncio
async def test_an_inline_hook_gets_this_very_moment_and_its_coroutine_may_use_it_later() -> None:
    stamps: list[tuple[int, float]] = []

    class Saves(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            return self.later(batch, self.snapshot())

        async def later(self, batch: int, snapshot: Any) -> None:
            await asyncio.sleep(0)
            stamps.append((snapshot.step, snapshot.arrays["weights"][0]))

    await Trainer(ScriptedModel()).fit(np.zeros((20, 1)), batch_size=1, callbacks=Saves(), verbose=0)
    assert stamps == [(step, float(step)) for step in range(1, 21)]


@pytest.mark.asyncio
async def test_on_the_loop_the_way_to_a_copy_is_named() -> None:
    errors: list[str] = []

    class Beside(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            try:
                self.snapshot()
            except RuntimeError as error:
                errors.append(str(error))

    await Trainer(ScriptedModel()).fit(np.zeros((4, 1)), callbacks=Beside(), verbose=0)
    assert errors == [
        "Beside.snapshot() is legal in inline (`def`) hooks only; elsewhere: `await self.run.snapshot()`"
    ]
    with pytest.raises(RuntimeError, match="Callback serves no run"):
        Callback().snapshot()


# ---------------------------------------------------------------- on their way into files


class HalfWay(ScriptedModel):
    """Lets everybody else run in the middle of each update, when half of its weights are new."""

    def train_batch(self, batch: Batch) -> dict[str, float]:
        self.weights[:8] = self.steps + 1
        time.sleep(0)  # gives the interpreter to the event loop's thread
        return super().train_batch(batch)


class Saves(Callback):
    """Copies inline and writes beside the training, which goes on meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.bin"
        self.saved: list[tuple[int, int, list[float]]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        return self._write(self.run.step, self.snapshot())

    async def _write(self, step: int, taken: Any) -> None:
        await asyncio.to_thread(taken.save, self.path)
        self.saved.append((step, taken.step, np.frombuffer(self.path.read_bytes()).tolist()))


@pytest.mark.asyncio
async def test_two_hundred_saves_of_a_model_that_trains_on_are_whole_and_of_their_batch(
    tmp_path: Path,
) -> None:
    saves = Saves(tmp_path)
    await Trainer(HalfWay()).fit(np.zeros((8, 1)), batch_size=1, epochs=25, verbose=0, callbacks=saves)
    assert saves.saved == [(step, step, [float(step)] * 16) for step in range(1, 201)]


@pytest.mark.asyncio
async def test_between_the_batches_of_a_validation_copies_are_made_too() -> None:
    model, x = ScriptedModel(gated=True), np.zeros((8, 1))
    run = Trainer(model).start(x, batch_size=8, validation_data=x, validation_batch_size=4, verbose=0)
    await model.open(1)
    asked = asyncio.create_task(run.snapshot())
    await asyncio.sleep(0)
    await model.open(1)
    taken = await asked
    assert (taken.step, run.state) == (1, "running")
    model.open_for_good()
    await run
