"""SwapEMAWeights: when the averages stand in, and that the weights come back as they were."""

from __future__ import annotations

import inspect
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Trainer
from asynccb.callbacks import LambdaCallback, ModelCheckpoint, SwapEMAWeights
from asynccb.callbacks.hooks import read_hooks
from asynccb.models import BatchNormalization, Dense, Sequential, load_model

if TYPE_CHECKING:
    from pathlib import Path

X = np.random.default_rng(0).normal(size=(12, 4)).astype("f4")
Y = np.ones((12, 2), "f4")


class Weighted:
    """Two weights, one of them no float."""

    def __init__(self) -> None:
        self.kernel, self.count = np.zeros(2, np.float32), np.zeros((), np.int64)

    def get_weights(self) -> list[Any]:
        return [self.kernel, self.count]

    def set_weights(self, weights: list[Any]) -> None:
        self.kernel[:], self.count[...] = weights

    def train(self, *values: float) -> None:
        self.kernel[:], self.count[...] = values, self.count + 1


def begun(swap: SwapEMAWeights, *batches: tuple[float, float]) -> Weighted:
    model = Weighted()
    swap.set_model(model)
    swap.on_train_begin({})
    for batch, values in enumerate(batches):
        model.train(*values)
        swap.on_train_batch_end(batch, {})
    return model


def regressor(seed: int = 1) -> Sequential:
    model = Sequential([Dense(3, input_dim=4), BatchNormalization(), Dense(2)], seed=seed)
    model.compile("sgd", "mse")
    return model


def test_its_parameters() -> None:
    assert str(inspect.signature(SwapEMAWeights)) == (
        "(momentum: 'float' = 0.99, swap_on_epoch: 'bool' = False) -> 'None'"
    )


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, "0.9", float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum: Any) -> None:
    with pytest.raises(ArgumentError, match="momentum"):
        SwapEMAWeights(momentum)


def test_the_average_begins_with_the_weights_after_the_first_batch() -> None:
    swap = SwapEMAWeights(0.75)
    model = begun(swap, (1, 2), (5, 2))
    swap.on_test_begin({})
    assert model.kernel.tolist() == [2, 2]  # 0.75 * 1 + 0.25 * 5


def test_an_average_that_begins_with_zeros_would_be_biased() -> None:
    assert 0.75 * (0.75 * 0 + 0.25 * 1) + 0.25 * 5 != 2


def test_after_an_evaluation_the_weights_are_back_to_the_last_bit() -> None:
    swap = SwapEMAWeights(0.75)
    model = begun(swap, (1, 2), (0.1, 1e-30))
    before = model.kernel.tobytes()
    swap.on_test_begin({})
    assert model.kernel.tobytes() != before
    swap.on_test_end({})
    assert (model.kernel.tobytes(), model.count.item()) == (before, 2)


def test_what_is_no_float_stays_with_the_model() -> None:
    swap = SwapEMAWeights(0.75)
    model = begun(swap, (1, 2), (5, 2))
    swap.on_predict_begin({})
    assert model.count == 2


def test_before_the_first_batch_there_is_nothing_to_swap() -> None:
    swap = SwapEMAWeights()
    model = begun(swap)
    swap.on_test_begin({})
    swap.on_test_end({})
    swap.on_train_end({})
    assert model.kernel.tolist() == [0, 0]


@pytest.mark.parametrize(("swap_on_epoch", "between"), [(False, [5, 2]), (True, [2, 2])])
def test_the_averages_stand_in_between_epochs_if_that_is_asked_for(
    swap_on_epoch: bool, between: list[float]
) -> None:
    swap = SwapEMAWeights(0.75, swap_on_epoch=swap_on_epoch)
    model = begun(swap, (1, 2), (5, 2))
    swap.on_epoch_end(0, {})
    assert model.kernel.tolist() == between
    swap.on_epoch_begin(1, {})
    assert model.kernel.tolist() == [5, 2]


def test_a_training_that_ends_leaves_the_averages_in_the_model() -> None:
    swap = SwapEMAWeights(0.75)
    model = begun(swap, (1, 2), (5, 2))
    swap.on_train_end({})
    assert model.kernel.tolist() == [2, 2]
    assert swap.state_dict() == {"averages": [], "weights": None}


@pytest.mark.parametrize("hook", ["on_test_begin", "on_train_batch_end"])
def test_a_training_that_fails_leaves_its_own_weights(hook: str) -> None:
    swap = SwapEMAWeights(0.75)
    model = begun(swap, (1, 2), (5, 2))
    if hook == "on_test_begin":
        swap.on_test_begin({})
    swap.on_exception(RuntimeError())
    swap.on_train_end({})
    assert model.kernel.tolist() == [5, 2]


def test_a_model_without_settable_weights_is_refused_at_the_start() -> None:
    swap = SwapEMAWeights()
    swap.set_model(object())
    with pytest.raises(ArgumentError, match="SwapEMAWeights needs get_weights"):
        swap.on_train_begin({})


def test_an_object_starts_each_training_afresh() -> None:
    swap = SwapEMAWeights(0.75)
    for _ in range(3):
        model = begun(swap, (1, 2), (5, 2))
        swap.on_train_end({})
        assert model.kernel.tolist() == [2, 2]


def test_others_know_that_it_changes_the_model() -> None:
    assert read_hooks(SwapEMAWeights()).changes_model


def test_a_batch_makes_no_new_arrays() -> None:
    model = Sequential([Dense(256, input_dim=256)], seed=1)
    model.compile("sgd", "mse")
    swap = SwapEMAWeights()
    swap.set_model(model)
    swap.on_train_begin({})
    swap.on_train_batch_end(0, {})
    tracemalloc.start()
    try:
        swap.on_train_batch_end(1, {})
        naive = [0.99 * array for array in model.get_weights()]
        del naive
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        swap.on_train_batch_end(2, {})
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < 256 * 256 * 4 // 10


@pytest.mark.asyncio
async def test_in_a_real_training_validation_sees_the_averages_and_training_never_does() -> None:
    plain, averaged = regressor(), regressor()
    expected: list[Any] = []
    seen: list[Any] = []
    each = LambdaCallback(on_train_batch_end=lambda batch, logs: expected.append(plain.get_weights()))
    own = LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(averaged.get_weights()),
        on_test_begin=lambda logs: seen.append("test"),
    )
    options: dict[str, Any] = {"batch_size": 4, "epochs": 2, "verbose": 0, "validation_data": (X, Y)}
    await Trainer(plain, seed=3).fit(X, Y, callbacks=[each], **options)
    history = await Trainer(averaged, seed=3).fit(
        X, Y, callbacks=[SwapEMAWeights(0.5, swap_on_epoch=True), own], **options
    )
    weights = [one for one in seen if one != "test"]
    assert len(weights) == len(expected) == 6
    for one, other in zip(weights, expected, strict=True):
        assert [array.tobytes() for array in one] == [array.tobytes() for array in other]
    average = expected[0]
    for later in expected[1:]:
        average = [0.5 * mean + 0.5 * array for mean, array in zip(average, later, strict=True)]
    kernels = [0, 1, 2, 3, 6, 7]  # the running means of the normalization are the last ones trained
    final = averaged.get_weights()
    for index in kernels:
        np.testing.assert_allclose(final[index], average[index], rtol=1e-5)
    for index in (4, 5):
        assert final[index].tobytes() == expected[-1][index].tobytes()
    assert history.history["val_loss"][-1] == pytest.approx(averaged.evaluate(X, Y)["loss"], rel=1e-5)


@pytest.mark.asyncio
async def test_checkpoints_see_the_weights_by_their_place_in_the_list(tmp_path: Path) -> None:
    model = regressor()
    at_batch: list[Any] = []
    each = LambdaCallback(on_train_batch_end=lambda batch, logs: at_batch.append(model.get_weights()[0]))
    before, behind = (ModelCheckpoint(tmp_path / name) for name in ("before.h5", "behind.h5"))
    swap = SwapEMAWeights(0.5, swap_on_epoch=True)
    await Trainer(model).fit(X, Y, epochs=1, verbose=0, batch_size=4, callbacks=[each, before, swap, behind])
    trained, average = (load_model(tmp_path / name).get_weights()[0] for name in ("before.h5", "behind.h5"))
    assert trained.tobytes() == at_batch[-1].tobytes()
    assert average.tobytes() == model.get_weights()[0].tobytes()
    assert not np.array_equal(trained, average)
