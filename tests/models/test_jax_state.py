"""The state of a step in JAX: what comes back from a backup and a file, and under which names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from interrupting import StopsAfter

from asynccb import ArgumentError, FileRefused, ResumeRefused, Trainer
from asynccb.callbacks import (
    BackupAndRestore,
)
from asynccb.models import JaxModel
from asynccb.models.plain import PlainState

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.heavy
jax = pytest.importorskip("jax")
jnp = jax.numpy

from jax_steps import Injected, X, Y, batch, begin, bits, model, step  # noqa: E402  where JAX is there


@pytest.mark.asyncio
async def test_a_training_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 7, "epochs": 3, "verbose": 0}
    whole, first, again = model(0), model(0), model(5)
    expected = await Trainer(whole, seed=2).fit(X, Y, **settings)
    halves = [BackupAndRestore(tmp_path), StopsAfter(13)]
    await Trainer(first, seed=2).fit(X, Y, **settings, callbacks=halves)
    assert bits(first.state) != bits(whole.state)
    # Another initial state and another random key: all comes out of the backup.
    history = await Trainer(again, seed=2).fit(X, Y, **settings, callbacks=BackupAndRestore(tmp_path))
    assert history.history == expected.history
    assert bits(again.state) == bits(whole.state)
    # And what that one has left behind is the end of the training.
    last = model(6)
    history = await Trainer(last, seed=2).fit(X, Y, **settings, callbacks=BackupAndRestore(tmp_path))
    assert history.history == expected.history
    assert bits(last.state) == bits(whole.state)


@pytest.mark.asyncio
async def test_a_state_of_another_shape_does_not_go_on_with_its_backup(tmp_path: Path) -> None:
    backup: dict[str, Any] = {"verbose": 0, "callbacks": BackupAndRestore(tmp_path)}
    await Trainer(model(), seed=1).fit(X, Y, **backup)
    wider = JaxModel(step, begin(outputs=1))
    with pytest.raises(ResumeRefused, match=r"model\.state\.weights/kernel\[1\]\[1\]: 2 there, 1 here"):
        await Trainer(wider, seed=1).fit(X, Y[:, :1], **backup)


def odd() -> Any:
    """Leaves of every kind, in containers of every kind."""
    return {
        "bfloat": jnp.asarray([1.5, -2.25], jnp.bfloat16),
        "complex": jnp.asarray([1 + 2j, 3 - 4j], jnp.complex64),
        "key": jax.random.key(7),
        "nested": [(jnp.arange(3), jnp.asarray(True)), Injected({"x": jnp.ones((2, 2))}, jnp.zeros(0))],
        "small": jnp.asarray([1, -2], jnp.int8),
        "weak": jnp.asarray(0.1),
    }


def test_every_kind_of_leaf_comes_back_from_a_file(tmp_path: Path) -> None:
    def untouched(state: Any, batch: Any) -> Any:
        return state, {"loss": jnp.zeros(())}

    kept = JaxModel(untouched, odd())
    kept.capture().save(tmp_path / "state.h5")
    blank = jax.tree.map(
        lambda leaf: (
            jax.random.key(0) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        ),
        odd(),
    )
    blank["weak"] = jnp.asarray(0.0)
    loaded = JaxModel(untouched, blank)
    loaded.load(tmp_path / "state.h5")
    assert bits(loaded.state) == bits(kept.state) != bits(blank)
    for name in ("shape", "dtype", "weak_type"):
        kinds = [[getattr(leaf, name, None) for leaf in jax.tree.leaves(one.state)] for one in (loaded, kept)]
        assert kinds[0] == kinds[1]
    loaded.train_batch(batch())  # what was put there may be donated
    assert bits(loaded.state) == bits(kept.state)


def test_arrays_have_the_paths_as_names_and_types_that_everybody_knows() -> None:
    trained = JaxModel(step, odd())
    arrays = trained.capture().arrays
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "bfloat": "float32",
        "complex": "complex64",
        "key": "uint32",
        "nested/0/0": "int32",
        "nested/0/1": "bool",
        "nested/1/hyperparams/x": "float32",
        "nested/1/speed": "float32",
        "small": "int8",
        "weak": "float32",
    }
    assert list(model().capture().arrays) == [
        *("key", "weights/bias", "weights/kernel"),
        "optimizer/opt_state/hyperparams/learning_rate",
        *("optimizer/opt_state/speed/bias", "optimizer/opt_state/speed/kernel"),
    ]


def test_two_paths_that_read_alike_are_two_names() -> None:
    state = {"a": {"b": jnp.zeros(1)}, "a/b": jnp.ones(1)}
    assert list(JaxModel(step, state).capture().arrays) == ["a/b", "a/b#1"]


def test_weights_alone_leave_the_optimizer_as_it_is(tmp_path: Path) -> None:
    trained, other = model(0), model(5)
    trained.train_batch(batch())
    other.train_batch(batch())
    trained.capture().save(tmp_path / "model.weights.h5", weights_only=True)
    slots = bits(other.state["opt_state"])
    other.load(tmp_path / "model.weights.h5")
    assert bits(other.state["weights"]) == bits(trained.state["weights"])
    assert bits(other.state["opt_state"]) == slots != bits(trained.state["opt_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves.pop("weights/bias"), "does not hold weights/bias"),
        (lambda leaves: leaves.update(more=np.zeros(1)), "holds more, which this state has not"),
        (
            lambda leaves: leaves.update({"weights/bias": np.zeros(3, "float32")}),
            r"weights/bias is float32\[3\] there, float32\[2\] here",
        ),
        (
            lambda leaves: leaves.update({"weights/bias": np.zeros(2)}),
            r"weights/bias is float64\[2\] there",
        ),
        (lambda leaves: leaves.update({"weights/bias": "import os"}), "weights/bias is a str, not an array"),
        (lambda leaves: leaves.update(key=np.zeros(2, "int64")), r"key is int64\[2\] there"),
    ],
)
def test_a_file_of_another_state_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    trained = model()
    leaves = {name: array.copy() for name, array in model(5).capture().arrays.items()}
    change(leaves)
    PlainState("JaxModel", {"leaves": leaves}).save(tmp_path / "state.h5")
    before = bits(trained.state)
    with pytest.raises(FileRefused, match=message):
        trained.load(tmp_path / "state.h5")
    assert bits(trained.state) == before


def test_a_file_takes_the_place_of_a_state_that_a_failed_step_has_used_up(tmp_path: Path) -> None:
    trained = JaxModel(step, {**begin(), "keys": jax.random.split(jax.random.key(3))})
    trained.capture().save(tmp_path / "state.h5")
    kept = bits(trained.state)
    jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)(trained.state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained.state))
    trained.load(tmp_path / "state.h5")
    assert bits(trained.state) == kept


def test_only_hdf5_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"end in \.h5"):
        model().capture().save(tmp_path / "model.pkl")


def test_a_number_in_the_state_is_traced_and_counts(tmp_path: Path) -> None:
    """As the ``step`` of a flax ``TrainState``, which begins as Python's 0."""
    traced = []

    def counts(state: Any, batch: Any) -> Any:
        traced.append(state["n"])
        return {"n": state["n"] + 1}, {"loss": 0.5}

    trained = JaxModel(counts, {"n": 0})
    before = trained.fingerprint()
    for _ in range(3):
        assert trained.train_batch(batch()) == {"loss": 0.5}
    assert len(traced) == 1
    assert trained.fingerprint() == before
    trained.capture().save(tmp_path / "state.h5")
    loaded = JaxModel(counts, {"n": 0})
    loaded.load(tmp_path / "state.h5")
    loaded.train_batch(batch())
    assert int(loaded.state["n"]) == 4
    assert loaded.state["n"].weak_type


def test_what_is_no_array_stays_what_it_is() -> None:
    """As the functions in an equinox module do, whose own ``filter_jit`` takes them for constants."""

    class Filtered:
        def lower(self) -> None: ...

        def __call__(self, state: Any, batch: Any) -> Any:
            return {**state, "w": state["activation"](state["w"])}, {"loss": state["w"].sum()}

    trained = JaxModel(Filtered(), {"activation": jnp.tanh, "depth": 2, "w": jnp.ones(2)})
    trained.train_batch(batch())
    made = trained.capture().to_model()
    assert made.state["activation"] is jnp.tanh
    assert type(made.state["depth"]) is int
    np.testing.assert_array_equal(made.state["w"], trained.state["w"])
    assert list(trained.capture().arrays) == ["w"]
