"""Batches: every sample once an epoch, in an order that seed and epoch alone decide; iterables by passes."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynccb import Trainer
from asynccb.errors import ArgumentError
from asynccb.protocols import Batch
from asynccb.testing import ScriptedModel
from asynccb.training.feed import ArrayFeed, IterableFeed, as_batch, map_arrays, samples_in

if TYPE_CHECKING:
    from collections.abc import Iterator

SHUFFLES = [True, False, "batch"]


def numbered(samples: int, **more: Any) -> ArrayFeed:
    x = np.arange(samples)
    return ArrayFeed(x, x * 10, None, **{"batch_size": 2, **more})


def epoch(source: Any, number: int = 0) -> list[Batch]:
    source.begin(number)
    return list(iter(source.next, None))


def order(source: Any, number: int = 0) -> list[int]:
    return [int(value) for batch in epoch(source, number) for value in batch.x]


# ---------------------------------------------------------------- arrays: the laws


@settings(max_examples=80)
@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    shuffle=st.sampled_from(SHUFFLES),
    seed=st.integers(0, 2**32),
    number=st.integers(0, 50),
)
def test_every_sample_comes_once_an_epoch_with_its_own_target(
    samples: int, batch_size: int, shuffle: Any, seed: int, number: int
) -> None:
    feed = numbered(samples, batch_size=batch_size, shuffle=shuffle, seed=seed)
    batches = epoch(feed, number)
    assert sorted(int(x) for batch in batches for x in batch.x) == list(range(samples))
    assert all((batch.y == batch.x * 10).all() for batch in batches)
    full, rest = divmod(samples, batch_size)
    assert [batch.size for batch in batches] == [batch_size] * full + [rest] * bool(rest)
    assert [len(batch.x) for batch in batches] == [batch.size for batch in batches]
    assert (feed.steps, feed.samples) == (math.ceil(samples / batch_size), samples)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**64),
    number=st.integers(0, 20),
    before=st.lists(st.integers(0, 20), max_size=4),
    shuffle=st.sampled_from([True, "batch"]),
)
def test_the_order_of_an_epoch_depends_on_the_seed_and_its_number_alone(
    seed: int, number: int, before: list[int], shuffle: Any
) -> None:
    used = numbered(23, shuffle=shuffle, seed=seed)
    for other in before:
        epoch(used, other)
    assert order(used, number) == order(numbered(23, shuffle=shuffle, seed=seed), number)


def test_the_random_numbers_of_the_process_have_no_say_in_the_order_and_are_left_alone() -> None:
    np.random.seed(1)
    first = order(numbered(50, shuffle=True, seed=3))
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    np.random.seed(2)
    assert order(numbered(50, shuffle=True, seed=3)) == first
    np.random.seed(1)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(order(numbered(50, shuffle=True, seed=s), e)) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9
    assert tuple(range(50)) not in orders


def test_an_epoch_that_was_left_in_the_middle_begins_anew() -> None:
    feed = numbered(6)
    feed.begin(0)
    feed.next()
    assert order(feed, 1) == list(range(6))


def test_shuffled_by_batch_whole_batches_change_places_and_the_smaller_last_one_stays_last() -> None:
    batches = [batch.x.tolist() for batch in epoch(numbered(21, shuffle="batch", seed=1))]
    assert batches[-1] == [20]
    assert sorted(batches[:-1]) == [[at, at + 1] for at in range(0, 20, 2)]
    assert batches[:-1] != sorted(batches[:-1])


def test_unshuffled_they_come_as_they_are() -> None:
    assert order(numbered(5)) == [0, 1, 2, 3, 4]


def test_fewer_steps_than_there_are_batches_end_the_epoch_early() -> None:
    feed = numbered(10, steps=2)
    assert order(feed) == [0, 1, 2, 3]
    assert (feed.steps, feed.samples) == (2, 4)


def test_with_fewer_steps_a_shuffled_epoch_still_draws_from_all_samples() -> None:
    feed = numbered(10, steps=1, shuffle=True, seed=0)
    assert {sample for number in range(40) for sample in order(feed, number)} == set(range(10))


def test_after_its_end_an_epoch_gives_nothing_more() -> None:
    feed = numbered(2)
    epoch(feed)
    assert [feed.next(), feed.next()] == [None, None]


@pytest.mark.asyncio
async def test_two_fits_of_one_trainer_shuffle_alike_and_their_epochs_differently() -> None:
    class Sees(ScriptedModel):
        def train_batch(self, batch: Batch) -> dict[str, float]:
            seen.append([int(value) for value in batch.x])
            return super().train_batch(batch)

    trainer, seen = Trainer(Sees(), seed=5), list[Any]()
    for _ in range(2):
        await trainer.fit(np.arange(8), batch_size=4, epochs=2, verbose=0)
    assert seen[:4] == seen[4:]
    assert seen[:2] != seen[2:4]


# ---------------------------------------------------------------- arrays: several inputs


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "nested"])
def test_several_inputs_keep_their_structure_and_their_rows_together(kind: str, shuffle: Any) -> None:
    a, b = np.arange(7), np.arange(7).reshape(7, 1) * 100.0
    x: Any = {"tuple": (a, b), "list": [a, b], "dict": {"a": a, "b": b}, "nested": {"p": (a, b)}}[kind]
    feed = ArrayFeed(x, (a, b), a / 10, batch_size=3, shuffle=shuffle, seed=2)
    batches = epoch(feed)
    assert [batch.size for batch in batches] == [3, 3, 1]
    for batch in batches:
        assert type(batch.x) is type(x)
        inner = batch.x["p"] if kind == "nested" else batch.x
        left, right = inner.values() if kind == "dict" else inner
        np.testing.assert_array_equal(right[:, 0], left * 100.0)
        np.testing.assert_array_equal(batch.sample_weight, left / 10)
        np.testing.assert_array_equal(batch.y[0], left)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "rows"])
async def test_a_model_gets_the_structure_that_fit_was_given(kind: str) -> None:
    class Sees(ScriptedModel):
        def train_batch(self, batch: Batch) -> dict[str, float]:
            seen.append(batch.x)
            return super().train_batch(batch)

    a, b = np.arange(3), np.arange(3.0)
    x: Any = {"tuple": (a, b), "list": [a, b], "dict": {"a": a, "b": b}, "rows": [[0, 0], [1, 1], [2, 2]]}[
        kind
    ]
    seen: list[Any] = []
    await Trainer(Sees()).fit(x, np.zeros(3), batch_size=2, shuffle=False, verbose=0)
    assert {type(part) for part in seen} == {np.ndarray if kind == "rows" else type(x)}
    if kind == "rows":
        np.testing.assert_array_equal(seen[1], [[2, 2]])
    else:
        last = list(seen[1].values()) if kind == "dict" else list(seen[1])
        assert [part.tolist() for part in last] == [[2], [2.0]]


def test_targets_and_weights_that_are_not_there_stay_away() -> None:
    (batch,) = epoch(ArrayFeed(np.zeros((2, 3)), None, None, batch_size=2))
    assert (batch.y, batch.sample_weight) == (None, None)


# ---------------------------------------------------------------- iterables


def xs(batches: list[Batch]) -> list[Any]:
    return [batch.x.tolist() for batch in batches]


def three() -> list[Any]:
    return [np.array([value]) for value in range(3)]


def test_without_steps_an_epoch_is_one_pass() -> None:
    feed = IterableFeed(three(), steps=None)
    assert [xs(epoch(feed)), xs(epoch(feed))] == [[[0], [1], [2]]] * 2
    assert (feed.steps, feed.samples, feed.exhausted) == (3, None, False)


def test_the_steps_of_something_without_a_length_are_not_known() -> None:
    assert IterableFeed(iter(three()), steps=None).steps is None


def test_with_steps_passes_follow_each_other_over_the_epochs() -> None:
    feed = IterableFeed(three(), steps=2)
    assert [xs(epoch(feed, e)) for e in range(4)] == [[[0], [1]], [[2], [0]], [[1], [2]], [[0], [1]]]
    assert not feed.exhausted


def test_with_more_steps_than_a_pass_has_an_epoch_is_several_passes() -> None:
    assert xs(epoch(IterableFeed(three(), steps=7))) == [[0], [1], [2], [0], [1], [2], [0]]


def test_no_item_is_taken_that_is_not_trained_on() -> None:
    taken: list[int] = []

    def source() -> Iterator[Any]:
        for value in range(100):
            taken.append(value)
            yield np.array([value])

    feed = IterableFeed(source(), steps=2)
    epoch(feed)
    assert taken == [0, 1]
    epoch(feed)
    assert taken == [0, 1, 2, 3]


def test_an_iterator_is_taken_on_where_it_stands_by_the_next_epoch() -> None:
    feed = IterableFeed(iter(three()), steps=1)
    assert [xs(epoch(feed, e)) for e in range(3)] == [[[0]], [[1]], [[2]]]


def test_an_iterator_that_runs_out_in_mid_epoch_is_one_warning_with_what_is_missing() -> None:
    feed = IterableFeed(iter(three()), steps=2)
    epoch(feed)
    with pytest.warns(UserWarning, match="ran out with 1 batches of the epoch missing") as caught:
        assert xs(epoch(feed, 1)) == [[2]]
    assert len(caught) == 1
    assert feed.exhausted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert feed.next() is None


def test_each_pass_of_a_loader_asks_it_anew() -> None:
    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter([np.array([self.passes])])

    loader = Loader()
    feed = IterableFeed(loader, steps=None)
    assert [xs(epoch(feed, e)) for e in range(3)] == [[[1]], [[2]], [[3]]]


def test_what_an_iterable_raises_is_raised_as_it_is() -> None:
    error = OSError("the disk")

    def source() -> Iterator[Any]:
        yield np.zeros(2)
        raise error

    feed = IterableFeed(source(), steps=None)
    feed.begin(0)
    feed.next()
    with pytest.raises(OSError, match="the disk") as caught:
        feed.next()
    assert caught.value is error


@pytest.mark.asyncio
async def test_validation_data_that_runs_out_is_one_warning_and_the_training_goes_on() -> None:
    batches = iter([np.zeros((2, 1))] * 3)
    with pytest.warns(UserWarning, match="ran out with 1 batches") as caught:
        history = await Trainer(ScriptedModel()).fit(
            np.zeros((1, 1)), validation_data=batches, validation_steps=2, epochs=4, verbose=0
        )
    assert len(caught) == 1
    assert history.history == {"val_loss": [1.0, 2.0], "loss": [1.0] * 4}


@pytest.mark.asyncio
async def test_a_training_that_runs_out_of_data_warns_once_and_keeps_what_it_trained() -> None:
    batches = iter([np.zeros((2, 1))] * 5)
    with pytest.warns(UserWarning, match="ran out") as caught:
        history = await Trainer(ScriptedModel([1.0, 2.0])).fit(
            batches, steps_per_epoch=2, epochs=9, verbose=0
        )
    assert [str(warning.message)[:16] for warning in caught] == ["the data ran out"]
    assert history.epoch == [0, 1, 2]


# ---------------------------------------------------------------- an item as a batch


X, Y, W = np.zeros((4, 2)), np.ones(4), np.full(4, 0.5)


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        (X, (X, None, None)),
        ((X,), (X, None, None)),
        ((X, Y), (X, Y, None)),
        ([X, Y], (X, Y, None)),
        ((X, Y, W), (X, Y, W)),
        (Batch(X, Y), (X, Y, None)),
        (Batch(X, Y, W, 4), (X, Y, W)),
        (((X, X), Y), ((X, X), Y, None)),
        ({"a": X}, ({"a": X}, None, None)),
        (([1, 2, 3, 4], Y), ([1, 2, 3, 4], Y, None)),
    ],
)
def test_an_item_is_a_batch_of_its_parts_with_the_size_of_its_first_array(item: Any, parts: Any) -> None:
    batch = as_batch(item)
    assert all(got is wanted or got == wanted for got, wanted in zip(batch, parts, strict=False))
    assert batch.size == 4


def test_a_size_that_is_given_is_kept() -> None:
    assert as_batch(Batch(X, size=99)).size == 99


@pytest.mark.parametrize("item", [(), (X, Y, W, X), []])
def test_an_item_of_no_or_too_many_parts_is_refused(item: Any) -> None:
    with pytest.raises(ArgumentError, match=r"x=an item of \d parts: a batch is x, \(x, y\) or"):
        as_batch(item)


@pytest.mark.parametrize("item", [np.zeros((0, 2)), (np.zeros((0, 2)), np.zeros(0)), ({"a": np.zeros(0)},)])
def test_a_batch_without_samples_is_refused(item: Any) -> None:
    with pytest.raises(ArgumentError, match="x=a batch without samples"):
        as_batch(item)


def test_map_arrays_keeps_the_structure_and_nothing_where_there_is_nothing() -> None:
    doubled = map_arrays(lambda array: array * 2, {"a": (1, [2, None]), "b": None})
    assert doubled == {"a": (2, [4, None]), "b": None}


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (np.zeros((3, 2)), 3),
        ((np.zeros(5), X), 5),
        ({"a": [np.zeros(2)]}, 2),
        ({"a": [[1.0], [2.0], [3.0]]}, 3),
        ([], 0),
        ([np.float64(1), np.float64(2)], 2),
        ([1, 2], 2),
        (np.float64(1), 1),
        (7, 1),
    ],
)
def test_samples_are_counted_on_the_first_axis_of_the_first_array(data: Any, samples: int) -> None:
    assert samples_in(data) == samples
