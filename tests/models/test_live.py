"""The state as it lies in memory: what a copy beside the training gets to see, and when."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from asynccb.models import (
    SGD,
    Activation,
    Adagrad,
    Adam,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    RMSprop,
    Sequential,
    memory,
    updates,
)
from asynccb.protocols import Batch

ROWS, WORDS = 16, 50
OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "rmsprop": lambda: RMSprop(momentum=0.5, centered=True),
    "adagrad": lambda: Adagrad(0.1),
    "adam": lambda: Adam(),
}


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks of 64 numbers and groups of a few blocks, so that a small model has many."""
    monkeypatch.setattr(updates, "BLOCK", 64 * 4)
    monkeypatch.setattr(memory, "PART", 64 * 4 * 6)


def batches(number, embedding):
    rng = np.random.default_rng(5)
    for _ in range(number):
        x = rng.integers(0, WORDS, (ROWS, 3)) if embedding else rng.standard_normal((ROWS, 12))
        yield Batch(x, np.eye(3, dtype=np.float32)[rng.integers(0, 3, ROWS)], None, ROWS)


def make(optimizer="adam", embedding=False):
    first = [Embedding(WORDS, 4, input_length=3), Flatten()] if embedding else [Dense(12, input_dim=12)]
    frozen = Dense(9, activation="tanh", trainable=False)
    layers = [*first, frozen, Dense(30, activation="relu"), BatchNormalization(), Dropout(0.2), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=4)
    model.compile(OPTIMIZERS[optimizer](), "categorical_crossentropy")
    for batch in batches(3, embedding):
        model.train_batch(batch)
    return model


def contents(state):
    return {name: array.tobytes() for name, array in state.arrays.items()}


class LazyCopy:
    """A gate whose copier never gets to anything by itself: each segment is copied when it is asked for.

    It is the slowest copier there can be, so whatever is overwritten unasked shows in the copy.
    """

    def __init__(self, model, obedient=True):
        self.live = model.live()
        self.copies = [np.full_like(array, -7) for array in self.live.arrays]
        self.state = self.live.complete(self.copies)
        self.copying, self.done, self.asked, self.kept = True, 0, [], {}
        self.obedient = obedient

    def __call__(self, segments=None):
        self.asked.append(segments)
        if self.obedient:
            self._copy(len(self.live.segments) if segments is None else segments)

    def keep(self, array, rows):
        if self.obedient:
            for row in rows:
                self.kept.setdefault((array, int(row)), self.live.arrays[array][row].copy())

    def finish(self):
        self._copy(len(self.live.segments))
        for (array, row), values in self.kept.items():
            self.copies[array][row] = values
        self.copying = False
        return self.state

    def _copy(self, segments):
        while self.done < segments:
            array, start, stop = self.live.segments[self.done]
            self.copies[array][start:stop] = self.live.arrays[array][start:stop]
            self.done += 1


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("small_parts")
def test_a_copy_made_as_late_as_the_gate_allows_is_of_the_moment_it_was_asked_for(optimizer, embedding):
    model = make(optimizer, embedding)
    before, gate = contents(model.capture()), LazyCopy(model)
    for batch in batches(1, embedding):
        model.train_batch(batch, gate)
    assert gate.done < len(gate.live.segments)  # the update never waits for what it does not overwrite
    assert contents(gate.finish()) == before
    assert contents(model.capture()) != before


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_copier_that_does_not_copy_when_it_is_asked_gets_a_torn_copy(optimizer, embedding):
    """The control of the test before."""
    model = make(optimizer, embedding)
    before, gate = contents(model.capture()), LazyCopy(model, obedient=False)
    for batch in batches(1, embedding):
        model.train_batch(batch, gate)
    assert contents(gate.finish()) != before


@pytest.mark.usefixtures("small_parts")
def test_the_update_follows_the_copy_group_by_group():
    model = make("adam")
    gate = LazyCopy(model)
    for batch in batches(1, False):
        model.train_batch(batch, gate)
    groups = model.optimizer.groups
    assert len(groups) > 3
    own = [3 * number for number in range(1, len(groups) + 1)]  # parameters and two slots each
    assert gate.asked == [*own, own[-1] + 1]  # and the running means


def test_a_small_model_asks_once_for_its_parameters_and_once_for_its_running_means():
    model = make("adam")
    gate = LazyCopy(model)
    for batch in batches(1, False):
        model.train_batch(batch, gate)
    assert gate.asked == [3, 4]


def test_nobody_is_asked_while_nothing_is_copied():
    model = make("adagrad", embedding=True)
    gate = LazyCopy(model)
    gate.copying = False
    for batch in batches(2, True):
        model.train_batch(batch, gate)
    assert gate.asked == []
    assert gate.kept == {}


class Refusing(LazyCopy):
    def __call__(self, segments=None):
        raise KeyError("no")


@pytest.mark.parametrize("embedding", [False, True])
def test_an_exception_in_the_gate_leaves_everything_as_it_was(embedding):
    model = make("adam", embedding)
    before, gate = contents(model.capture()), Refusing(model)
    for batch in batches(1, embedding):
        with pytest.raises(KeyError):
            model.train_batch(batch, gate)
    assert contents(model.capture()) == before


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("small_parts")
def test_segments_cover_every_array_once(optimizer, embedding):
    live = make(optimizer, embedding).live()
    covered = [np.zeros(len(array), int) for array in live.arrays]
    for array, start, stop in live.segments:
        covered[array][start:stop] += 1
    for array, times in zip(live.arrays, covered, strict=True):
        assert times.tolist() == [1] * len(array)
        assert array.flags.c_contiguous
    assert len(live.versions) == len(live.arrays)


def test_the_state_in_memory_is_looked_up_and_not_made_anew():
    model = make()
    live = model.live()
    for batch in batches(2, False):
        model.train_batch(batch)
    assert model.live() is live


def test_a_model_whose_state_was_looked_at_dies_when_it_is_let_go_of():
    """Its memory may be large: no collector should be needed to get it back."""
    model = make("adagrad", embedding=True)
    state, gone = model.capture(), weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert state.to_model() is not None


def test_counters_and_random_streams_are_those_of_the_moment_of_the_copy():
    model = make()
    live = model.live()
    copies = [np.empty_like(array) for array in live.arrays]
    state = live.complete(copies)
    for copy, array in zip(copies, live.arrays, strict=True):
        copy[...] = array
    model.optimizer.lr = 0.5
    expected = model.capture()
    for batch in batches(1, False):
        model.train_batch(batch)
    assert (state.optimizer.iterations, state.optimizer.learning_rate) == (3, 0.001)
    assert state.random == expected.random != model.capture().random


def test_views_of_a_copy_are_read_only_and_the_memory_below_is_not():
    model = make()
    live = model.live()
    copies = [array.copy() for array in live.arrays]
    state = live.complete(copies)
    for array in state.arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for copy in copies:
        copy.fill(1.0)  # a pool may use it again
    assert np.all(state.arrays["dense/kernel"] == 1.0)


def test_only_weights_of_layers_that_are_not_trainable_have_a_version():
    model = make()
    versions = model.live().versions
    numbered = [version for version in versions if version is not None]
    assert len(numbered) == 1
    (constant,) = (
        array for array, version in zip(model.live().arrays, versions, strict=True) if version is not None
    )
    frozen = model.layers[1]
    assert np.shares_memory(constant, frozen.weights[0].value)
    before = constant.copy()
    for batch in batches(2, False):
        model.train_batch(batch)
    assert model.live().versions == versions
    np.testing.assert_array_equal(constant, before)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert [version for version in model.live().versions if version is not None] != numbered


def test_versions_of_two_models_are_never_equal():
    one, other = make().live().versions, make().live().versions
    assert {version for version in one if version is not None}.isdisjoint(other)


def test_weights_that_are_set_during_a_copy_wait_for_it():
    model = make()
    before, gate = contents(model.capture()), LazyCopy(model)
    model.training_gate = gate
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert gate.asked == [None]
    assert contents(gate.finish()) == before
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert gate.asked == [None]
