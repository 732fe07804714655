"""Weights, activations and gradients as records, of real models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event

from asynccb.callbacks.tensorboard import layers as layers_room
from asynccb.callbacks.tensorboard.layers import activations, first_part, gradients, weights
from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential

if TYPE_CHECKING:
    from collections.abc import Iterable

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, 50)]


def model() -> Sequential:
    layers = [
        Dense(8, activation="relu", input_dim=4),
        BatchNormalization(),
        Dropout(0.5),
        Dense(3),
        Activation("softmax"),
    ]
    built = Sequential(layers, seed=1)
    built.compile("sgd", "categorical_crossentropy")
    return built


def histograms(records: Iterable[bytes]) -> dict[str, Any]:
    events = [Event.FromString(record) for record in records]
    assert {(event.step, event.wall_time) for event in events} <= {(3, 1.5)}
    return {value.tag: value.histo for event in events for value in event.summary.value}


def always() -> bool:
    return True


# ---------------------------------------------------------------- which part of the data


def test_the_part_is_the_first_samples_in_chunks_of_the_size_asked_for() -> None:
    x, y = np.arange(1200), -np.arange(1200)
    part = first_part((x, y), 100)
    assert part is not None
    assert part.size == 256
    chunks = list(part)
    assert [len(chunk) for chunk, _, _ in chunks] == [100, 100, 56]
    assert np.concatenate([chunk for chunk, _, _ in chunks]).tolist() == list(range(256))
    assert np.concatenate([chunk for _, chunk, _ in chunks]).tolist() == [-n for n in range(256)]
    assert all(weight is None for _, _, weight in chunks)
    assert all(chunk.base is x for chunk, _, _ in chunks)  # views


def test_the_part_has_its_sample_weights() -> None:
    part = first_part((X, Y, np.arange(50.0)), 32)
    assert part is not None
    assert [weight.tolist() for _, _, weight in part] == [list(range(32)), list(range(32, 50))]


def test_large_samples_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_room, "BYTES", 10 * (X[0].nbytes + Y[0].nbytes))
    part = first_part((X, Y), 32)
    assert part is not None
    assert part.size == 10


def test_a_sample_above_the_bound_is_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_room, "BYTES", 1)
    part = first_part((X, Y), 32)
    assert part is not None
    assert [len(x) for x, _, _ in part] == [1]


def test_several_inputs_keep_their_structure() -> None:
    part = first_part(({"a": X, "b": (X, [X])}, Y), 40)
    assert part is not None
    first, last = part
    assert {key: type(value) for key, value in first[0].items()} == {"a": np.ndarray, "b": tuple}
    assert first[0]["b"][1][0].shape == (40, 4)
    assert last[0]["a"].tolist() == X[40:].tolist()


class Untouched:
    """Batches that nobody but the training may take."""

    def __iter__(self) -> Any:
        raise AssertionError("consumed")

    def __aiter__(self) -> Any:
        raise AssertionError("consumed")

    def __len__(self) -> int:
        raise AssertionError("consumed")


@pytest.mark.parametrize("data", [None, [(X, Y)], (Untouched(), None), Untouched(), iter(())])
def test_what_is_not_arrays_has_no_part_and_is_not_touched(data: Any) -> None:
    assert first_part(data, 32) is None


# ---------------------------------------------------------------- records


def test_weights_are_those_of_the_model_and_not_of_its_optimizer() -> None:
    arrays = {"dense/kernel:0": X, "optimizer/m": X, "names": np.array(["a"]), "none": np.array([np.nan])}
    found = histograms(weights(3, 1.5, arrays, images=False))
    assert list(found) == ["dense/kernel_0"]
    assert found["dense/kernel_0"].num == X.size


def test_activations_are_those_of_each_layer_over_the_whole_part() -> None:
    looked_at, part = model(), first_part((X, Y), 7)
    assert part is not None
    found = histograms(activations(3, 1.5, looked_at, part, always))
    whole = looked_at.activations(X)
    assert list(found) == [f"{name}_out" for name in whole]
    for name, array in whole.items():
        histogram = found[f"{name}_out"]
        assert (histogram.num, sum(histogram.bucket)) == (array.size, array.size)
        assert (histogram.min, histogram.max) == pytest.approx((array.min(), array.max()), rel=1e-5)
        assert histogram.sum == pytest.approx(array.sum(dtype=float), rel=1e-4)


def test_gradients_are_those_of_each_chunk_merged() -> None:
    looked_at, part = model(), first_part((X, Y, np.arange(50.0)), 20)
    assert part is not None
    found = histograms(gradients(3, 1.5, looked_at, part, always))
    chunks = [looked_at.gradients(x, y, sample_weight) for x, y, sample_weight in part]
    assert list(found) == [f"{name}_grad" for name in chunks[0]]
    for name in chunks[0]:
        numbers = np.concatenate([chunk[name].ravel() for chunk in chunks])
        histogram = found[f"{name}_grad"]
        assert histogram.num == numbers.size
        assert (histogram.min, histogram.max) == (numbers.min(), numbers.max())
        assert histogram.sum == pytest.approx(numbers.sum(dtype=float))


class Counts:
    """A model whose outputs are 8 bytes a sample; the sizes of the chunks that it saw."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def activations(self, x: Any) -> dict[str, Any]:
        self.sizes.append(len(x))
        return {"a": np.zeros((len(x), 1), np.float32), "b": np.zeros((len(x), 1), np.float32)}


@pytest.mark.parametrize(
    ("outputs", "sizes"),
    [(8 * 50, [10, 40]), (8 * 15, [10, 15, 15, 10]), (8 * 5, [10] * 5)],
    ids=["all", "some", "no more than a chunk"],
)
def test_activations_of_small_layers_are_computed_for_more_samples_at_a_time(
    monkeypatch: pytest.MonkeyPatch, outputs: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(layers_room, "OUTPUTS", outputs)
    counts, part = Counts(), first_part((X, Y), 10)
    assert part is not None
    found = histograms(activations(3, 1.5, counts, part, always))
    assert counts.sizes == sizes
    assert [found[tag].num for tag in ("a_out", "b_out")] == [50, 50]


def test_the_pass_ends_where_it_is_no_longer_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_room, "OUTPUTS", 1)
    counts, part = Counts(), first_part((X, Y), 10)
    assert part is not None
    assert list(activations(3, 1.5, counts, part, lambda: len(counts.sizes) < 2)) == []
    assert counts.sizes == [10, 10]
