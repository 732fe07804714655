"""A copy of a model is all of it: what is made of the copy trains on as the original would have."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.models import (
    Activation,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Sequential,
    adapt,
)
from asynccb.protocols import Batch
from asynccb.testing import ScriptedModel
from asynccb.training import copying

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asynccb.protocols import Model

_drawn = np.random.default_rng(0)
X = np.abs(_drawn.normal(size=(12, 4)) * 3).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(12) % 3]


def sequential(optimizer: str) -> Sequential:
    """One with every kind of state: weights, slots, moving means, a random stream."""
    layers = [Dense(6, activation="relu", input_dim=4), BatchNormalization(), Dropout(0.25), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=7)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def partly_frozen() -> Sequential:
    model = sequential("adam")
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile("adam", "categorical_crossentropy")
    return model


def of_words() -> Sequential:
    """A table whose rows are updated one by one; it reads the numbers before the point as words."""
    model = Sequential([Embedding(9, 4, input_length=4), Flatten(), Dense(3, activation="softmax")], seed=7)
    model.compile("adagrad", "categorical_crossentropy")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "bare": lambda: ScriptedModel([3.0, 2.0, 1.0]),
    **{
        optimizer: lambda optimizer=optimizer: sequential(optimizer)
        for optimizer in ("sgd", "rmsprop", "adagrad", "adam", "adamw")
    },
    "partly frozen": partly_frozen,
    "of words": of_words,
}


def numbers(model: Model) -> dict[str, Any]:
    return {name: array.copy() for name, array in model.capture().arrays.items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_made_of_a_copy_trains_on_exactly_as_the_original(kind: str) -> None:
    model = adapt(MODELS[kind]())
    batches = [Batch(X[at : at + 4], Y[at : at + 4], None, 4) for at in (0, 4, 8)]
    for batch in batches:
        model.train_batch(batch)
    made = adapt(model.capture().to_model())
    for batch in batches:
        model.train_batch(batch)
        made.train_batch(batch)
    assert_same(numbers(model), numbers(made))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", MODELS)
async def test_the_copy_of_an_ended_training_is_of_its_last_batch(kind: str) -> None:
    given = MODELS[kind]()
    run = Trainer(given, seed=1).start(X, Y, batch_size=5, epochs=2, verbose=0)
    await run
    snapshot = await run.snapshot()
    assert (snapshot.step, snapshot.epoch) == (6, 1)
    assert_same(numbers(adapt(given)), dict(snapshot.arrays))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", MODELS)
async def test_two_trainings_with_one_seed_end_in_the_same_state(kind: str) -> None:
    states = []
    for _ in range(2):
        given = MODELS[kind]()
        await Trainer(given, seed=3).fit(X, Y, batch_size=5, epochs=2, verbose=0)
        states.append(numbers(adapt(given)))
    assert_same(*states)


# ---------------------------------------------------------------- beside the training


class Table:
    """A table of which a batch touches few rows, trained without slots and with them."""

    def __init__(self, optimizer: str) -> None:
        self.x = np.random.default_rng(1).integers(0, 40, (400, 3))
        self.y = np.random.default_rng(2).normal(size=(400, 2)).astype("float32")
        self._optimizer = optimizer

    def build(self) -> Sequential:
        model = Sequential([Embedding(40, 4, input_length=3), Flatten(), Dense(2)], seed=7)
        model.compile(optimizer=self._optimizer, loss="mse")
        return model


class Dense5:
    """Dense layers, moving means, dropout, in segments of a few rows each."""

    def __init__(self, optimizer: str) -> None:
        self.x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
        self.y = np.eye(3, dtype="float32")[np.arange(400) % 3]
        self._optimizer = optimizer

    def build(self) -> Sequential:
        return sequential(self._optimizer)


class OfTorch:
    """Weights, slots and running means, which a forward pass overwrites before the update does the rest."""

    def __init__(self) -> None:
        self.x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
        self.y = np.arange(400) % 3

    def build(self) -> Any:
        torch = pytest.importorskip("torch")
        from asynccb.models import TorchModel

        class Counts(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(1))

            def forward(self, x: Any) -> Any:
                self.calls += 1  # in eval mode too
                return x

        nn = torch.nn
        middle = [nn.BatchNorm1d(6), Counts(), nn.Dropout(0.25)]
        module = nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3))
        return TorchModel(module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters()), seed=7)


class Keeps(Callback):
    """Takes a pooled copy after every batch, and reads it when the training is further on."""

    changes_model = False

    def __init__(self, model: Model) -> None:
        self.found: dict[int, bytes] = {}
        self.expected: dict[int, bytes] = {}
        self._model = model

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        snapshot = self.run.snapshot_now(self, pooled=True)
        self.expected[snapshot.step] = digest(self._model.capture().arrays)  # at once, while nothing moves
        return self.write(snapshot)

    async def write(self, snapshot: Any) -> None:
        self.found[snapshot.step] = digest(snapshot.arrays)
        snapshot.release()


def digest(arrays: Mapping[str, Any]) -> bytes:
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(name.encode() + array.tobytes())
    return found.digest()


KINDS = [Dense5("sgd"), Dense5("adam"), Table("sgd"), Table("adagrad"), Table("adam")]
IDS = ["dense sgd", "dense adam", "table sgd", "table adagrad", "table adam"]
ALL = [
    *(pytest.param(kind, id=name) for kind, name in zip(KINDS, IDS, strict=True)),
    pytest.param(OfTorch(), id="torch", marks=pytest.mark.heavy),
]


def come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made beside the training however small, and the copier comes as late as it can: never."""
    monkeypatch.setattr(copying, "AT_ONCE", -1)
    put = copying._Handed.put
    monkeypatch.setattr(copying._Handed, "put", lambda self, copy: put(self, copy) if copy is None else None)


async def keep(kind: Any, steps: int) -> Keeps:
    model = kind.build()
    keeps = Keeps(model)
    await Trainer(model, seed=1).fit(
        kind.x, kind.y, batch_size=20, epochs=steps // 20, verbose=0, callbacks=keeps
    )
    assert len(keeps.found) == steps
    return keeps


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ALL)
async def test_copies_made_while_the_next_batches_train_are_of_one_moment_to_the_byte(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "AT_ONCE", -1)
    keeps = await keep(kind, 200)
    assert keeps.found == keeps.expected


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ALL)
async def test_a_copier_that_comes_after_the_update_tears_them_unless_the_gate_holds(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a gate that lets updates pass, and a copier that comes as late as it can."""
    pass_gate = copying.Copying.__call__
    come_late(monkeypatch)
    keeps = await keep(kind, 40)
    assert keeps.found == keeps.expected
    monkeypatch.setattr(
        copying.Copying,
        "__call__",
        lambda self, segments=None: pass_gate(self) if segments is None else None,
    )
    monkeypatch.setattr(copying.Copying, "keep", lambda self, array, rows: None)
    keeps = await keep(kind, 40)
    assert keeps.found != keeps.expected


@pytest.mark.asyncio
@pytest.mark.heavy
async def test_a_validation_that_overwrites_buffers_while_a_copy_is_made_does_not_tear_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    come_late(monkeypatch)
    kind = OfTorch()
    model = kind.build()
    keeps = Keeps(model)
    data: dict[str, Any] = {"validation_data": (kind.x[:20], kind.y[:20])}
    await Trainer(model, seed=1).fit(
        kind.x[:40], kind.y[:40], batch_size=20, epochs=3, verbose=0, callbacks=keeps, **data
    )
    assert keeps.found == keeps.expected


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ALL)
async def test_a_hook_that_sets_the_weights_while_a_copy_is_made_does_not_tear_it(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "AT_ONCE", -1)

    class Halves(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.set_weights([weight / 2 for weight in self.model.get_weights()])

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.model.set_weights([weight * 2 for weight in self.model.get_weights()])

    model = kind.build()
    keeps = Keeps(model)
    await Trainer(model, seed=1).fit(
        kind.x, kind.y, batch_size=20, epochs=5, verbose=0, callbacks=[keeps, Halves()]
    )
    assert len(keeps.found) == 100
    assert keeps.found == keeps.expected


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("how", ["in a hook", "in a subclass"])
async def test_a_batch_that_is_trained_without_the_gate_asks_it_all_the_same(
    kind: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_late(monkeypatch)

    class TrainsOneMore(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.train_batch(Batch(kind.x[:20], kind.y[:20], None, 20))

    class DropsTheGate(Sequential):
        def train_batch(self, batch: Any, before_update: Any = None) -> dict[str, float]:
            return super().train_batch(batch)

    model = kind.build()
    if how == "in a subclass":
        model.__class__ = DropsTheGate
    keeps = Keeps(model)
    callbacks = [keeps, *([TrainsOneMore()] if how == "in a hook" else [])]
    await Trainer(model, seed=1).fit(kind.x, kind.y, batch_size=20, epochs=2, verbose=0, callbacks=callbacks)
    assert len(keeps.found) == 40
    assert keeps.found == keeps.expected


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
async def test_a_hook_that_compiles_the_model_anew_while_a_copy_is_made_does_not_tear_it(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another optimizer has other slots, so that what is copied is divided otherwise."""
    come_late(monkeypatch)

    class Compiles(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            loss = "mse" if isinstance(kind, Table) else "categorical_crossentropy"
            self.model.compile(["sgd", "adam", "adagrad"][batch % 3], loss)

    model = kind.build()
    keeps = Keeps(model)
    await Trainer(model, seed=1).fit(
        kind.x, kind.y, batch_size=20, epochs=2, verbose=0, callbacks=[keeps, Compiles()]
    )
    assert len(keeps.found) == 40
    assert keeps.found == keeps.expected
