"""The entrance: fit, evaluate and predict on real models, seeds, and which callbacks a training gets."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, History, HookRefused, ModelBusy, Trainer
from asynccb.callbacks import BaseLogger, EarlyStopping, ProgbarLogger
from asynccb.models import Dense, Sequential
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from asynccb.protocols import Batch

generator = np.random.default_rng(7)
X = generator.normal(size=(20, 3)).astype("float32")
Y = (X @ np.array([[1.0], [-2.0], [0.5]], dtype="float32")).astype("float32")


def sequential(seed: int = 1) -> Sequential:
    model = Sequential([Dense(4, activation="tanh", input_dim=3), Dense(1)], seed=seed)
    model.compile(optimizer="sgd", loss="mse", metrics=["mae"])
    return model


class Ordered(ScriptedModel):
    """Keeps the samples of each batch in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []

    def train_batch(self, batch: Batch) -> dict[str, float]:
        self.batches.append(batch.x[:, 0].tolist())
        return super().train_batch(batch)


SAMPLES = np.arange(10.0).reshape(10, 1)


async def order(seed: int | None, **more: Any) -> list[list[float]]:
    model = Ordered()
    await Trainer(model, seed=seed).fit(SAMPLES, batch_size=4, verbose=0, **more)
    return model.batches


# ---------------------------------------------------------------- fit


@pytest.mark.asyncio
async def test_fit_trains_as_the_models_own_batches_would() -> None:
    model, by_hand = sequential(), sequential()
    history = await Trainer(model).fit(X, Y, batch_size=5, epochs=3, shuffle=False, verbose=0)
    from asynccb.protocols import Batch

    losses = []
    for _ in range(3):
        means = [
            by_hand.train_batch(Batch(X[i : i + 5], Y[i : i + 5], None, 5))["loss"] for i in range(0, 20, 5)
        ]
        losses.append(float(np.mean(means)))
    assert history.history["loss"] == pytest.approx(losses)
    for mine, theirs in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert history.history["loss"][2] < history.history["loss"][0]
    assert list(history.history) == ["loss", "mae"]


def test_fit_and_start_take_the_same_arguments_with_the_same_defaults() -> None:
    fit, start = inspect.signature(Trainer.fit).parameters, inspect.signature(Trainer.start).parameters
    assert list(fit) == list(start)
    assert [p.default for p in fit.values()] == [p.default for p in start.values()]
    keras = "x y batch_size epochs verbose callbacks validation_split validation_data shuffle class_weight"
    keras += (
        " sample_weight initial_epoch steps_per_epoch validation_steps validation_batch_size validation_freq"
    )
    assert list(fit)[1:17] == keras.split()


@pytest.mark.asyncio
async def test_every_fit_of_a_trainer_shuffles_alike_and_each_epoch_in_its_own_way() -> None:
    model = Ordered()
    trainer = Trainer(model, seed=3)
    for _ in range(2):
        await trainer.fit(SAMPLES, batch_size=4, epochs=2, verbose=0)
    first, second = model.batches[:6], model.batches[6:]
    assert first == second
    assert first[:3] != first[3:]
    assert sorted(itertools.chain(*first[:3])) == SAMPLES[:, 0].tolist()
    assert [len(batch) for batch in first[:3]] == [4, 4, 2]


@pytest.mark.asyncio
async def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    both = await order(3, epochs=2)
    assert await order(3, epochs=2, initial_epoch=1) == both[3:]
    assert await order(4) != both[:3]
    assert await order(3, shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    trainer = Trainer(Ordered())
    drawn = await order(trainer.seed)
    await trainer.fit(SAMPLES, batch_size=4, verbose=0)
    assert trainer.model.batches == drawn


@pytest.mark.asyncio
async def test_what_can_be_refused_is_refused_before_the_first_batch_and_nothing_is_claimed() -> None:
    model = ScriptedModel()
    trainer = Trainer(model)
    for more in (
        {"epochs": -1},
        {"batch_size": 0},
        {"validation_split": 1.0},
        {"stop_after": 5},
        {"callbacks": [object()]},
        {"callbacks": Recorder},
        {"callbacks": 7},
        {"replay": 0},
    ):
        with pytest.raises(ArgumentError, match="|".join(more)):
            trainer.start(np.zeros((2, 1)), **{"verbose": 0, **more})
    twice = Recorder()
    with pytest.raises(ArgumentError, match="each instance once"):
        await trainer.fit(np.zeros((2, 1)), verbose=0, callbacks=[twice, twice])
    assert (model.steps, trainer.last_run) == (0, None)
    assert (await trainer.fit(np.zeros((2, 1)), verbose=0, callbacks=twice)).outcome == "completed"


@pytest.mark.asyncio
async def test_what_is_refused_on_the_training_thread_runs_no_hook() -> None:
    recorder = Recorder()
    trainer = Trainer(sequential())
    with pytest.raises(ArgumentError, match="x="):
        await trainer.fit(np.zeros((4, 7)), np.zeros((4, 1)), verbose=0, callbacks=recorder)
    assert (recorder.hooks, trainer.last_run.outcome) == ([], "failed")
    assert recorder.run is None


@pytest.mark.asyncio
async def test_a_callback_that_mixes_def_and_async_def_is_refused_with_the_way_out() -> None:
    class Mixed(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...

        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    with pytest.raises(HookRefused, match=r"return self\._later\(captured\)"):
        Trainer(ScriptedModel()).start(np.zeros((2, 1)), verbose=0, callbacks=Mixed())


@pytest.mark.asyncio
async def test_a_hook_that_returns_a_future_is_refused_by_name() -> None:
    class Returns(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return loop.create_future()

    loop = asyncio.get_running_loop()
    with pytest.raises(HookRefused, match=r"Returns\.on_epoch_end=.*Return the coroutine itself"):
        await Trainer(ScriptedModel()).fit(np.zeros((2, 1)), verbose=0, callbacks=Returns())


@pytest.mark.asyncio
async def test_a_hook_may_return_anything_that_is_not_awaitable() -> None:
    class Returns(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return 7

        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            return "text"

    history = await Trainer(ScriptedModel()).fit(np.zeros((2, 1)), verbose=0, callbacks=Returns())
    assert history.outcome == "completed"


@pytest.mark.asyncio
async def test_a_trainer_needs_a_running_loop_to_start() -> None:
    trainer = Trainer(ScriptedModel())

    def start_in_a_thread() -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            trainer.start(np.zeros((2, 1)), verbose=0)

    await asyncio.to_thread(start_in_a_thread)
    assert (await trainer.fit(np.zeros((2, 1)), verbose=0)).outcome == "completed"


# ---------------------------------------------------------------- which callbacks, in which order


@pytest.mark.asyncio
async def test_callbacks_are_called_in_the_order_of_the_list() -> None:
    class Says(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            said.append(self.name)

    said: list[str] = []
    callbacks = (Says(name) for name in "abc")  # any iterable
    await Trainer(ScriptedModel()).fit(np.zeros((2, 1)), verbose=0, callbacks=callbacks)
    assert said == ["a", "b", "c"]


@pytest.mark.asyncio
async def test_the_automatic_callbacks_stand_around_those_given_unless_one_was_given() -> None:
    trainer = Trainer(ScriptedModel())
    await trainer.fit(np.zeros((2, 1)), verbose=0, callbacks=Recorder())
    assert list(trainer.last_run.stats.callbacks) == ["BaseLogger", "Recorder", "History"]
    mine = [History(), Recorder(), BaseLogger()]
    history = await trainer.fit(np.zeros((2, 1)), verbose=0, callbacks=mine)
    assert history is mine[0]
    assert list(trainer.last_run.stats.callbacks) == ["BaseLogger", "Recorder", "History"]


@pytest.mark.asyncio
async def test_verbose_brings_the_progress_bar_last(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(ScriptedModel())
    await trainer.fit(np.zeros((2, 1)), verbose=2, callbacks=Recorder())
    assert list(trainer.last_run.stats.callbacks)[-1] == ProgbarLogger.__name__
    assert "loss: 1" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_callbacks_see_model_params_validation_data_and_run_while_they_serve() -> None:
    class Looks(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            seen.update(model=self.model, params=self.params, data=self.validation_data, run=self.run)

    seen: dict[str, Any] = {}
    model, looks = sequential(), Looks()
    trainer = Trainer(model)
    await trainer.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=looks, validation_split=0.25)
    assert seen["model"] is model
    assert seen["run"] is trainer.last_run
    assert {
        "epochs": 2,
        "verbose": 0,
        "batch_size": 8,
        "samples": 15,
        "do_validation": True,
        "metrics": ["loss", "mae", "val_loss", "val_mae"],
    }.items() <= seen["params"].items()
    np.testing.assert_array_equal(seen["data"][0], X[15:])
    assert looks.run is None


@pytest.mark.asyncio
async def test_the_old_batch_hooks_are_called_unless_the_new_ones_are_there() -> None:
    class Old(Callback):
        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            said.append("old")

    class Both(Old):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            said.append("new")

    said: list[str] = []
    await Trainer(ScriptedModel()).fit(np.zeros((1, 1)), verbose=0, callbacks=[Old(), Both()])
    assert said == ["old", "new"]


@pytest.mark.asyncio
async def test_an_early_stopping_stops_by_the_models_own_flag() -> None:
    model = ScriptedModel([1.0, 2.0, 3.0, 4.0, 5.0])
    trainer = Trainer(model)
    history = await trainer.fit(
        np.zeros((1, 1)), epochs=9, verbose=0, callbacks=EarlyStopping(monitor="loss", patience=2)
    )
    assert (history.epoch, history.outcome) == ([0, 1, 2], "stopped")


# ---------------------------------------------------------------- evaluate and predict


@pytest.mark.asyncio
async def test_evaluate_and_predict_give_what_the_models_own_give() -> None:
    model = sequential()
    trainer = Trainer(model)
    means = await trainer.evaluate(X, Y, batch_size=8)
    assert means == pytest.approx(model.evaluate(X, Y, batch_size=8))
    assert list(means) == ["loss", "mae"]
    np.testing.assert_allclose(await trainer.predict(X, batch_size=8), model.predict(X), rtol=1e-6)
    assert (await trainer.predict(X, batch_size=8, steps=1)).shape == (8, 1)
    assert trainer.last_run is None  # that is of fits


@pytest.mark.asyncio
async def test_the_means_of_an_evaluation_weigh_a_smaller_last_batch_by_its_size() -> None:
    class Sizes(ScriptedModel):
        def test_batch(self, batch: Batch) -> dict[str, float]:
            return {"loss": float(batch.size)}

    means = await Trainer(Sizes()).evaluate(np.zeros((5, 1)), batch_size=4)
    assert means == {"loss": (4 * 4 + 1 * 1) / 5}


@pytest.mark.asyncio
async def test_evaluate_and_predict_call_their_own_hooks_only() -> None:
    class Predicts(Recorder):
        async def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            self._add("on_predict_batch_end", batch, logs)

    trainer = Trainer(ScriptedModel())
    tests, predicts = Recorder(), Predicts()
    await trainer.evaluate(np.zeros((2, 1)), batch_size=1, callbacks=tests)
    assert tests.hooks == [
        "on_test_begin",
        *["on_test_batch_begin", "on_test_batch_end"] * 2,
        "on_test_end",
    ]
    outputs = await trainer.predict(np.zeros((2, 1)), batch_size=1, callbacks=predicts)
    assert predicts.hooks == ["on_predict_begin", *["on_predict_batch_end"] * 2, "on_predict_end"]
    np.testing.assert_array_equal(np.concatenate([logs["outputs"] for logs in predicts.logs[1:-1]]), outputs)


@pytest.mark.asyncio
async def test_an_evaluation_that_fails_or_is_cancelled_ends_like_a_training() -> None:
    class Fails(ScriptedModel):
        def test_batch(self, batch: Batch) -> dict[str, float]:
            raise OSError("of the model")

    recorder = Recorder()
    with pytest.raises(OSError, match="of the model"):
        await Trainer(Fails()).evaluate(np.zeros((2, 1)), callbacks=recorder)
    assert recorder.hooks[0] == "on_test_begin"
    assert "on_exception" in recorder.hooks
    assert recorder.hooks[-1] == "on_test_end"

    model, recorder = ScriptedModel(gated=True), Recorder()
    task = asyncio.create_task(Trainer(model).evaluate(np.zeros((2, 1)), batch_size=1, callbacks=recorder))
    await asyncio.sleep(0)
    await model.open(1)
    task.cancel()
    await asyncio.sleep(0)
    model.open_for_good()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorder.hooks[-2:] == ["on_exception", "on_test_end"]


@pytest.mark.asyncio
async def test_a_model_in_training_is_refused_on_the_loop_and_pointed_to_a_copy() -> None:
    class Tries(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            for attempt in (lambda: self.model.predict(X), lambda: self.model.evaluate(X, Y)):
                with pytest.raises(ModelBusy, match=r"snapshot\(\)"):
                    attempt()
            for attempt in (trainer.evaluate(X, Y), trainer.predict(X)):
                with pytest.raises(ModelBusy, match=r"snapshot\(\)\)\.to_model\(\)"):
                    await attempt
            with await self.run.snapshot() as snapshot:
                tried.append(snapshot.to_model().predict(X).shape)

    tried: list[Any] = []
    trainer = Trainer(sequential())
    await trainer.fit(X, Y, verbose=0, epochs=50, callbacks=_stopping_after(Tries()))
    assert tried == [(20, 1)]
    assert trainer.model.predict(X).shape == (20, 1)  # afterwards it is anybody's


def _stopping_after(tries: Callback) -> Callback:
    """Lets the hook of the first epoch end while the model still trains."""
    type(tries).lockstep = True  # type: ignore[misc]
    original = tries.on_epoch_end

    async def on_epoch_end(epoch: int, logs: Any = None) -> None:
        await original(epoch, logs)
        tries.run.stop()

    tries.on_epoch_end = on_epoch_end  # type: ignore[method-assign]
    return tries


@pytest.mark.asyncio
async def test_an_inline_hook_may_use_the_model_that_it_trains() -> None:
    class Uses(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            shapes.append(self.model.predict(X).shape)
            logs["mine"] = self.model.evaluate(X, Y)["loss"]

    shapes: list[Any] = []
    model = sequential()
    history = await Trainer(model).fit(X, Y, verbose=0, epochs=2, callbacks=Uses())
    assert shapes == [(20, 1)] * 2
    assert history.history["mine"][-1] == pytest.approx(model.evaluate(X, Y)["loss"])


@pytest.mark.asyncio
async def test_a_model_without_test_batch_or_predict_batch_says_what_to_add() -> None:
    class Bare:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 1.0}

    trainer = Trainer(Bare())
    with pytest.raises(ArgumentError, match="test_batch is needed"):
        await trainer.evaluate(np.zeros((2, 1)))
    with pytest.raises(ArgumentError, match="predict_batch is needed"):
        await trainer.predict(np.zeros((2, 1)))
    assert (await trainer.fit(np.zeros((2, 1)), verbose=0)).outcome == "completed"
