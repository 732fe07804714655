"""A step in JAX in a training: the bits of a loop by hand, donation, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, Trainer
from asynccb.callbacks import (
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    TensorBoard,
)
from asynccb.models import JaxModel
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.heavy
jax = pytest.importorskip("jax")
jnp = jax.numpy

from jax_steps import X, Y, batch, begin, bits, loss_of, model, step  # noqa: E402  where JAX is there

needs_optax = pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="optax is not installed")

# ---------------------------------------------------------------- as by hand


@pytest.mark.asyncio
async def test_three_epochs_of_the_digits_give_the_bits_of_a_loop_by_hand() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.data / 16).astype("float32")
    y = np.eye(10, dtype="float32")[digits.target]
    trained = JaxModel(step, begin(features=64, outputs=10))
    history = await Trainer(trained, seed=4).fit(x, y, batch_size=128, epochs=3, verbose=0)

    by_hand, state, losses = jax.jit(step, donate_argnums=0), begin(features=64, outputs=10), []
    for epoch in range(3):
        order, seen = np.random.default_rng([4, epoch]).permutation(len(x)), []
        for start in range(0, len(x), 128):
            rows = order[start : start + 128]
            state, logs = by_hand(state, (x[rows], y[rows]))
            seen.append((float(logs["loss"]), len(rows)))
        losses.append(sum(loss * size for loss, size in seen) / len(x))
    assert bits(trained.state) == bits(state)
    assert history.history["loss"] == pytest.approx(losses, rel=1e-12)
    assert bits(trained.state) != bits(begin(features=64, outputs=10))


@pytest.mark.asyncio
async def test_several_trainings_at_the_same_time_give_the_bits_of_each_alone() -> None:
    alone = [model(seed) for seed in range(4)]
    for seed, one in enumerate(alone):
        await Trainer(one, seed=seed).fit(X, Y, batch_size=7, epochs=3, verbose=0)
    together = [model(seed) for seed in range(4)]
    await asyncio.gather(
        *(
            Trainer(one, seed=seed).fit(X, Y, batch_size=7, epochs=3, verbose=0)
            for seed, one in enumerate(together)
        )
    )
    assert [bits(one.state) for one in together] == [bits(one.state) for one in alone]
    assert len({tuple(bits(one.state)) for one in together}) == 4


def test_a_step_that_is_jitted_already_is_called_as_it_is() -> None:
    traced = []

    def counted(state: Any, batch: Any) -> Any:
        traced.append(len(batch[0]))
        return step(state, batch)

    jitted = jax.jit(counted)
    trained = JaxModel(jitted, begin())
    before = trained.state
    for _ in range(3):
        trained.train_batch(batch())
    assert traced == [20]
    # It does not donate, and nobody else did.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Batch(X, None, None, 60), "x alone"),
        (Batch(X, Y, None, 60), "a pair"),
        (Batch(X, Y, np.ones(60), 60), "three"),
    ],
)
def test_a_step_gets_what_the_data_gave(given: Batch, expected: str) -> None:
    seen = []

    def looks(state: Any, batch: Any) -> Any:
        seen.append({2: "a pair", 3: "three"}[len(batch)] if isinstance(batch, tuple) else "x alone")
        return state, {"loss": jnp.zeros(())}

    JaxModel(looks, jnp.zeros(1)).train_batch(given)
    assert seen == [expected]


# ---------------------------------------------------------------- donation


def test_the_callers_arrays_outlive_a_donated_step() -> None:
    mine = begin()
    JaxModel(step, mine).train_batch(batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    # Without the copy they would not:
    jax.jit(step, donate_argnums=0)(mine, (X, Y))
    assert mine["weights"]["kernel"].is_deleted()


def test_a_copy_outlives_the_donated_steps_behind_it() -> None:
    trained = model()
    trained.train_batch(batch())
    kept, copied = trained.state, trained.capture()
    expected = np.array(kept["weights"]["kernel"])
    trained.train_batch(batch())
    assert kept["weights"]["kernel"].is_deleted()  # the state itself, without a copy
    np.testing.assert_array_equal(copied.arrays["weights/kernel"], expected)
    assert bits(copied.to_model().state) != bits(trained.state)


@pytest.mark.asyncio
async def test_a_state_that_was_donated_elsewhere_is_refused_before_the_first_batch() -> None:
    trained = model()
    jax.jit(step, donate_argnums=0)(trained.state, (X, Y))
    with pytest.raises(ArgumentError, match=r"donated to a step that was called outside of it.*model\.state"):
        await Trainer(trained).fit(X, Y, verbose=0)
    trained.state = begin()
    await Trainer(trained).fit(X, Y, verbose=0)


# ---------------------------------------------------------------- logs and what is refused


def test_logs_are_pythons_numbers_and_the_loss_comes_first() -> None:
    """A jitted function sorts its dicts: ``largest`` stood before ``loss``."""
    logs = model().train_batch(batch())
    assert [(name, type(value)) for name, value in logs.items()] == [("loss", float), ("largest", float)]


def changed(state: Any, change: Any) -> Any:
    return {**state, "weights": {**state["weights"], "bias": change(state["weights"]["bias"])}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda state: (state, {"loss": jnp.ones(3)}), r"step='loss': of shape \(3,\).*loss\.mean\(\)"),
        (lambda state: (state, jnp.ones(())), "step=<class .*: a function whose logs are a dict of scalars"),
        (lambda state: state, r"step=<class 'dict'>: a function that returns \(state, logs\)"),
        (
            lambda state: (state, {"loss": jnp.ones(()), "of": {"mae": jnp.ones(())}}),
            "step='of': of type dict",
        ),
        (
            lambda state: (state, {"loss": None}),
            "step='loss': of type NoneType, but a log is one real number",
        ),
        (lambda state: (state, {"loss": jnp.ones((), "complex64")}), "step='loss': of type complex"),
        (lambda state: (state["weights"], {"loss": jnp.ones(())}), "a function that returns a state of the"),
        (
            lambda state: (changed(state, jnp.float16), {"loss": jnp.ones(())}),
            r"weights/bias becomes float16\[2\]: it was float32\[2\], and has to keep its type and shape",
        ),
        (
            lambda state: (changed(state, lambda bias: jnp.tile(bias, 2)), {"loss": jnp.ones(())}),
            r"weights/bias becomes float32\[4\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_step_that_answers_something_else_is_told_what_it_should(answer: Any, message: str) -> None:
    trained = JaxModel(lambda state, batch: answer(state), begin())
    with pytest.raises(ArgumentError, match=message):
        trained.train_batch(batch())


@pytest.mark.parametrize("outputs", [lambda x: (x, x), lambda x: {"first": x}, lambda x: x.sum()])
def test_outputs_that_are_several_are_refused_and_not_stacked(outputs: Any) -> None:
    trained = JaxModel(step, begin(), predict=lambda state, x: outputs(x))
    with pytest.raises(ArgumentError, match=r"predict=<class .*>: a function that returns one array"):
        trained.predict_batch(batch())


@pytest.mark.asyncio
async def test_what_was_not_given_is_named_when_it_is_needed() -> None:
    trained = JaxModel(step, begin())
    with pytest.raises(ArgumentError, match=r"to validate and to evaluate. Give JaxModel\(\.\.\., test_step"):
        await Trainer(trained).fit(X, Y, validation_split=0.5, verbose=0)
    with pytest.raises(ArgumentError, match=r"needed to predict. Give JaxModel\(\.\.\., predict=predict\)"):
        await Trainer(trained).predict(X)
    with pytest.raises(ArgumentError, match="step=3: a function of the state and a batch"):
        JaxModel(3, begin())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="test_step='x'"):
        JaxModel(step, begin(), test_step="x")  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_words_are_refused_before_the_first_batch() -> None:
    words = np.array(["a"] * 60)
    with pytest.raises(ArgumentError, match=r"y=dtype\('<U1'\): numbers or bools. Encode it as numbers"):
        await Trainer(model()).fit(X, words, verbose=0)
    with pytest.raises(ArgumentError, match=r"y=dtype\(\[\('a', '<f4'\)\]\): numbers or bools"):
        await Trainer(model()).fit(X, np.zeros(60, [("a", "f4")]), verbose=0)


def test_without_jax_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"pip install 'asynccb\[jax\]'"):
        JaxModel(step, {})


# ---------------------------------------------------------------- callbacks


def rates_seen(trained: JaxModel) -> Any:
    class Looks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(round(trained.optimizer.learning_rate, 6))

    seen: list[float] = []
    return Looks(), seen


@pytest.mark.asyncio
async def test_a_learning_rate_in_the_state_can_be_scheduled() -> None:
    trained, plain = model(), model()
    looks, seen = rates_seen(trained)
    schedule = LearningRateScheduler(lambda epoch: 0.05 / (epoch + 1))
    history = await Trainer(trained, seed=1).fit(X, Y, epochs=3, verbose=0, callbacks=[schedule, looks])
    await Trainer(plain, seed=1).fit(X, Y, epochs=3, verbose=0)
    assert seen == [0.05, 0.025, 0.016667]
    assert history.history["lr"] == pytest.approx(seen, rel=1e-4)
    assert trained.state["opt_state"].hyperparams["learning_rate"].dtype == jnp.float32
    assert bits(trained.state["weights"]) != bits(plain.state["weights"])


@pytest.mark.asyncio
async def test_without_a_learning_rate_in_the_state_the_way_out_is_named() -> None:
    trained = JaxModel(step, {"weights": jnp.zeros(2)})
    schedule = LearningRateScheduler(lambda epoch: 0.1)
    with pytest.raises(ValueError, match=r"is there 0 times, not once.*optax\.inject_hyperparams"):
        await Trainer(trained).fit(X, Y, verbose=0, callbacks=schedule)


@needs_optax
@pytest.mark.asyncio
async def test_the_states_of_optax_are_known_as_the_optimizers() -> None:
    import optax

    def made(rate: Any) -> JaxModel:
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=rate)

        def optax_step(state: Any, batch: Any) -> Any:
            weights, slots = state
            loss, slopes = jax.value_and_grad(loss_of)(weights, batch)
            updates, slots = optimizer.update(slopes, slots, weights)
            return (optax.apply_updates(weights, updates), slots), {"loss": loss}

        weights = begin()["weights"]
        return JaxModel(optax_step, (weights, optimizer.init(weights)))

    trained = made(0.01)
    looks, seen = rates_seen(trained)
    schedule = LearningRateScheduler(lambda epoch: 0.02)
    await Trainer(trained).fit(X, Y, verbose=0, callbacks=[schedule, looks])
    assert seen == [0.02]
    names = list(trained.capture().arrays)
    assert names[:2] == ["0/bias", "0/kernel"]
    assert all(name.startswith("optimizer/1/") for name in names[2:])
    scheduled = made(optax.constant_schedule(0.1))
    with pytest.raises(ArgumentError, match="follows a schedule of its own"):
        scheduled.optimizer.learning_rate = 0.5


@pytest.mark.asyncio
async def test_the_best_weights_can_be_put_back_and_a_checkpoint_be_loaded(tmp_path: Path) -> None:
    trained = model()
    schedule = LearningRateScheduler(lambda epoch: 0.1 if epoch < 2 else 0.9)  # it gets worse, then
    best = ModelCheckpoint(tmp_path / "best.h5", save_best_only=True)
    stop = EarlyStopping(patience=1, restore_best_weights=True)
    history = await Trainer(trained, seed=1).fit(
        X, Y, epochs=9, validation_data=(X, Y), verbose=0, callbacks=[schedule, best, stop]
    )
    losses = history.history["val_loss"]
    assert losses[-1] > min(losses)
    other = model(5)
    other.load(tmp_path / "best.h5")
    for one in (trained, other):
        assert one.test_batch(Batch(X, Y, None, 60))["loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.asyncio
async def test_its_weights_have_histograms(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, histogram_freq=1)
    with pytest.warns(RuntimeWarning, match="histograms of weights only"):
        await Trainer(model()).fit(X, Y, verbose=0, callbacks=board)
    (file,) = tmp_path.rglob("*tfevents*")
    assert b"weights/kernel" in (written := file.read_bytes())
    assert b"opt_state" not in written


def test_weights_of_another_shape_are_refused() -> None:
    trained = model()
    bias, kernel = trained.get_weights()
    with pytest.raises(ValueError, match="weights/kernel has the shape"):
        trained.set_weights([bias, kernel.T])
    with pytest.raises(ValueError, match="zip"):
        trained.set_weights([bias])
    trained.set_weights([bias + 1, kernel])
    np.testing.assert_array_equal(trained.state["weights"]["bias"], bias + 1)


# ---------------------------------------------------------------- the thread


@pytest.mark.asyncio
async def test_the_thread_computes_as_the_thread_that_made_the_model() -> None:
    """A ``with jax.enable_x64`` holds for one thread alone."""
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

    def made() -> JaxModel:
        return JaxModel(
            lambda state, batch: (state + batch.sum(), {"loss": state.sum()}), np.zeros(2, np.float64)
        )

    with x64(True):
        wide = made()
    narrow = made()
    for trained in (wide, narrow):
        await Trainer(trained).fit(X.astype("float64"), verbose=0)
    assert (wide.state.dtype, narrow.state.dtype) == (jnp.float64, jnp.float32)
    # Here, where the setting does not hold, copies keep their type too.
    assert wide.capture().arrays[""].dtype == np.float64
    assert wide.capture().to_model().state.dtype == jnp.float64


@pytest.mark.asyncio
async def test_the_thread_draws_and_looks_for_nans_as_the_thread_that_made_the_model() -> None:
    def draws(state: Any, batch: Any) -> Any:
        return jax.random.normal(jax.random.key(0), (3,)), {"loss": jnp.log(state.sum() - 1)}

    with jax.default_prng_impl("rbg"):
        trained = JaxModel(draws, jnp.ones(3))
        expected = jax.random.normal(jax.random.key(0), (3,))
    await Trainer(trained).fit(X, batch_size=60, verbose=0)
    assert bits(trained.state) == bits(expected) != bits(jax.random.normal(jax.random.key(0), (3,)))
    with jax.debug_nans(True):
        trained = JaxModel(draws, jnp.zeros(3))
    with pytest.raises(FloatingPointError, match="nan"):
        await Trainer(trained).fit(X, batch_size=60, verbose=0)
