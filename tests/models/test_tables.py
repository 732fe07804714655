"""A table that is updated row by row, beside the same table updated whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asynccb.models import SGD, Activation, Adagrad, Adam, Dense, Embedding, Flatten, Sequential, load_model
from asynccb.models.tables import Table, sum_rows
from asynccb.protocols import Batch

WORDS, LENGTH, ROWS = 40, 3, 8


class DenseSGD(SGD):
    by_rows = False
    name = "sgd"


class DenseAdagrad(Adagrad):
    by_rows = False
    name = "adagrad"


KINDS = {"sgd": (SGD, DenseSGD), "adagrad": (Adagrad, DenseAdagrad)}


def make(optimizer):
    layers = [Embedding(WORDS, 4, input_length=LENGTH), Flatten(), Dense(5, activation="tanh"), Dense(2)]
    model = Sequential([*layers, Activation("softmax")], seed=6)
    model.compile(optimizer, "categorical_crossentropy")
    return model


def batches(number=5):
    rng = np.random.default_rng(8)
    for _ in range(number):
        x = rng.integers(0, WORDS // 2, (ROWS, LENGTH))
        x[0] = x[1, 0]  # a number that occurs four times, three of them in one sample
        yield Batch(x, np.eye(2)[rng.integers(0, 2, ROWS)], None, ROWS)


def contents(model):
    return {name: array.tobytes() for name, array in model.capture().arrays.items()}


def train(model, number=5):
    return [model.train_batch(batch)["loss"] for batch in batches(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_updated_alone_are_those_of_the_whole_update_to_the_byte(kind):
    by_rows, whole = (make(optimizer(0.5)) for optimizer in KINDS[kind])
    assert train(by_rows) == train(whole)
    assert contents(by_rows) == contents(whole)
    assert by_rows._network.table is not None
    assert whole._network.table is None


def test_an_optimizer_that_moves_rows_without_a_gradient_would_differ():
    """The control: Adam's moments go on moving a row, so its rows are not left out."""

    class ByRows(Adam):
        by_rows = True
        name = "adam"

    by_rows, whole = make(ByRows()), make(Adam())
    train(by_rows), train(whole)
    assert contents(by_rows) != contents(whole)


@pytest.mark.parametrize(
    ("optimizer", "by_rows"),
    [
        (SGD(), True),
        (SGD(momentum=0.9), False),
        (Adagrad(), True),
        (Adagrad(initial_accumulator_value=0.0, epsilon=0.0), False),
        (Adam(), False),
    ],
    ids=str,
)
def test_a_table_is_updated_by_rows_only_where_that_changes_no_bit(optimizer, by_rows):
    model = make(optimizer)
    train(model, 1)
    assert (model._network.table is not None) is by_rows


def test_a_number_that_occurs_twice_gets_the_sum_of_its_gradients():
    rows, sums = sum_rows(np.array([7, 2, 7, 7]), np.array([[1.0], [10.0], [2.0], [4.0]]))
    assert rows.tolist() == [2, 7]
    assert sums.tolist() == [[10.0], [7.0]]


@given(
    hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 9)),
    st.integers(1, 4),
)
def test_sums_by_row_are_the_sums_of_a_loop(numbers, length):
    g = np.arange(len(numbers) * length, dtype=np.float64).reshape(-1, length)
    table = Table(np.zeros((10, length)))
    table.collect(numbers, g)
    expected = np.zeros((10, length))
    for number, row in zip(numbers, g, strict=True):
        expected[number] += row
    np.testing.assert_array_equal(table.gradient(), expected)


def test_files_names_and_order_are_those_of_any_other_weight(tmp_path):
    by_rows, whole = make(Adagrad(0.5)), make(DenseAdagrad(0.5))
    train(by_rows), train(whole)
    assert list(by_rows.capture().arrays) == list(whole.capture().arrays)
    by_rows.save(tmp_path / "m.h5")
    loaded = load_model(tmp_path / "m.h5")
    assert contents(loaded) == contents(by_rows)
    assert train(loaded) == train(by_rows) == train(whole)
    lines = []
    by_rows.summary(lines.append)
    assert lines[-1] == "Parameters: 237, trainable: 237"


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_for_another_optimizer_moves_the_table_and_keeps_its_values(kind):
    model = make(KINDS[kind][0](0.5))
    train(model)
    weights = model.get_weights()
    for optimizer in (Adam(), KINDS[kind][0](0.5)):
        model.compile(optimizer, "categorical_crossentropy")
        model._ready_step()
        for before, after in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
    assert model._network.table.value.base is None  # the flat array that it came from is let go of
    fresh = make(KINDS[kind][0](0.5))
    fresh.set_weights(weights)
    assert train(model) == train(fresh)
    assert contents(model) != contents(make(KINDS[kind][0](0.5)))


def test_compiling_anew_with_the_same_optimizer_keeps_the_accumulator_of_the_table():
    optimizer = Adagrad(0.5)
    model = make(optimizer)
    train(model)
    before = optimizer.table_slots["accumulator"].copy()
    model.compile(optimizer, "mse")
    model._ready_step()
    np.testing.assert_array_equal(optimizer.table_slots["accumulator"], before)
    assert np.any(before != before[0, 0])


def test_no_gradient_of_the_size_of_the_table_exists():
    model = make(SGD())
    train(model, 1)
    table = model.layers[0].weights[0]
    assert table.grad is None
    assert model._network.grads.size < table.value.size
    assert model._network.table.sums.shape[0] <= ROWS * LENGTH


def test_a_batch_touches_only_its_rows():
    model = make(Adagrad(0.5))
    before = model.layers[0].weights[0].numpy()
    (batch,) = batches(1)
    model.train_batch(batch)
    changed = np.flatnonzero((model.layers[0].weights[0].value != before).any(axis=1))
    assert changed.tolist() == np.unique(batch.x).tolist()


def test_a_table_stays_where_it_is_when_another_layer_changes():
    """A large one would else be there twice at every compile."""
    model = make(SGD(0.5))
    table = model._network.table.value
    model.layers[-1].trainable = False
    model.compile(SGD(0.5), "mse")
    assert model._network.table.value is table
