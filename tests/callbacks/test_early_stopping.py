"""EarlyStopping: Keras 3's table of epochs, and what it says."""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.callbacks.early_stopping import EarlyStopping
from asynccb.callbacks.hooks import read_hooks
from asynccb.callbacks.lambda_callback import LambdaCallback
from asynccb.errors import ArgumentError
from asynccb.models import Dense, Sequential


def train(stopper: EarlyStopping, values: list[Any], key: str = "val_loss", first: int = 0) -> int | None:
    """The 0-based epoch at whose end it stopped a training with these values; None where it did not."""
    model = SimpleNamespace(stop_training=False)
    stopper.set_model(model)
    stopper.on_train_begin({})
    stopped = None
    for epoch, value in enumerate(values, first):
        stopper.on_epoch_end(epoch, {"loss": 0.0, key: value})
        if model.stop_training:
            stopped = epoch
            break
    stopper.on_train_end({})
    return stopped


def test_the_pages_parameters_keep_their_order_and_defaults_and_the_newer_are_keyword_only() -> None:
    assert str(inspect.signature(EarlyStopping)) == (
        "(monitor: 'str' = 'val_loss', min_delta: 'float' = 0, patience: 'int' = 0, verbose: 'int' = 0, "
        "mode: 'str' = 'auto', *, baseline: 'float | None' = None, start_from_epoch: 'int' = 0, "
        "restore_best_weights: 'bool' = False) -> 'None'"
    )


@pytest.mark.parametrize(("patience", "epoch"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_a_flat_metric_stops_where_keras_3_stops(patience: int, epoch: int) -> None:
    assert train(EarlyStopping(patience=patience), [1.0] * 10) == epoch


def stopped_in_2017(values: list[float], patience: int) -> int | None:
    """The count of 2017: first the test, then the increment."""
    best, wait = math.inf, 0
    for epoch, value in enumerate(values):
        if value < best:
            best, wait = value, 0
        elif wait >= patience:
            return epoch
        else:
            wait += 1
    return None


def test_the_old_order_of_test_and_count_stops_one_epoch_later() -> None:
    assert stopped_in_2017([1.0] * 10, patience=2) == 3
    assert train(EarlyStopping(patience=2), [1.0] * 10) == 2


def test_an_improvement_starts_the_count_again() -> None:
    assert train(EarlyStopping(patience=2), [3.0, 3.0, 2.0, 2.0, 2.0]) == 4
    assert train(EarlyStopping(patience=2), [3.0, 3.0, 2.0, 2.0]) is None


def test_a_change_of_exactly_min_delta_is_no_improvement() -> None:
    assert train(EarlyStopping(min_delta=1), [2.0, 1.0]) == 1
    assert train(EarlyStopping(min_delta=0.99), [2.0, 1.0]) is None


@pytest.mark.parametrize(("mode", "stopped"), [("auto", None), ("max", None), ("min", 1)])
def test_the_mode_tells_which_way_is_better(mode: str, stopped: int | None) -> None:
    stopper = EarlyStopping("val_acc", mode=mode)
    assert train(stopper, [0.1, 0.2, 0.3], key="val_acc") == stopped


def test_the_model_is_asked_which_way_is_better() -> None:
    stopper = EarlyStopping("score")
    stopper.run = SimpleNamespace(direction={"score": "max"}.get, stop=lambda reason: None)
    assert train(stopper, [0.1, 0.2, 0.3], key="score") is None


def test_either_spelling_of_accuracy_is_found() -> None:
    assert train(EarlyStopping("val_acc"), [0.5, 0.5], key="val_accuracy") == 1


def test_nan_in_the_first_epoch_does_not_stop_but_in_the_next_it_does() -> None:
    assert train(EarlyStopping(patience=0), [math.nan]) is None
    assert train(EarlyStopping(patience=0), [math.nan, math.nan]) == 1


def test_nan_in_the_first_epoch_is_not_the_value_to_beat() -> None:
    assert train(EarlyStopping(patience=2), [math.nan, 3.0, 2.0, 1.0]) is None


def test_a_resumed_training_counts_from_its_first_epoch() -> None:
    assert train(EarlyStopping(patience=2), [1.0] * 10, first=5) == 7


def test_an_improvement_below_the_baseline_does_not_start_the_count_again() -> None:
    stopper = EarlyStopping(patience=2, baseline=0.5)
    assert train(stopper, [1.0, 0.9, 0.9]) == 2
    assert train(stopper, [1.0, 0.4, 0.4, 0.4]) == 3


def test_epochs_before_start_from_epoch_are_not_looked_at() -> None:
    stopper = EarlyStopping(patience=1, start_from_epoch=3)
    assert train(stopper, [0.0, 1.0, 1.0, 5.0, 5.0]) == 4
    assert stopper.best == 5.0


def test_an_object_starts_each_training_afresh() -> None:
    stopper = EarlyStopping(patience=1)
    assert train(stopper, [1.0, 1.0]) == 1
    assert train(stopper, [5.0, 4.0, 3.0]) is None
    assert (stopper.best, stopper.wait, stopper.stopped_epoch) == (3.0, 0, 0)


def test_the_stop_is_told_at_the_end_with_an_epoch_that_counts_from_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(EarlyStopping(patience=2, verbose=1), [1.0] * 5)
    assert capsys.readouterr().out == "Epoch 3: early stopping\n"


@pytest.mark.parametrize(("verbose", "values"), [(0, [1.0, 1.0]), (1, [2.0, 1.0])])
def test_without_verbose_or_without_a_stop_nothing_is_printed(
    verbose: int, values: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    train(EarlyStopping(verbose=verbose), values)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("patience", "reason"),
    [
        (1, "EarlyStopping: val_loss has not improved on 1.5 for 1 epoch"),
        (3, "EarlyStopping: val_loss has not improved on 1.5 for 3 epochs"),
    ],
)
def test_the_run_is_told_why(patience: int, reason: str) -> None:
    reasons: list[str] = []
    stopper = EarlyStopping(patience=patience)
    stopper.run = SimpleNamespace(stop=reasons.append, direction=lambda metric: None)
    train(stopper, [1.5] * 5)
    assert reasons == [reason]


def test_a_missing_metric_is_told_once_and_does_nothing() -> None:
    stopper = EarlyStopping()
    stopper.set_model(SimpleNamespace(stop_training=False))
    stopper.on_train_begin({})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(5):
            stopper.on_epoch_end(epoch, {"loss": 1.0, "acc": 0.5})
    assert [(one.category, str(one.message)) for one in caught] == [
        (
            RuntimeWarning,
            "Early stopping conditioned on metric `val_loss` which is not available. "
            "Available metrics are: loss,acc",
        )
    ]
    assert stopper.model.stop_training is False


def test_an_epoch_without_validation_does_not_count() -> None:
    stopper = EarlyStopping(patience=2)
    stopper.set_model(SimpleNamespace(stop_training=False))
    stopper.on_train_begin({})
    with pytest.warns(RuntimeWarning, match="not available"):
        stopper.on_epoch_end(0, {"loss": 1.0})
    stopper.on_epoch_end(1, {"val_loss": 1.0})
    stopper.on_epoch_end(2, {"loss": 1.0})
    assert stopper.wait == 0


def test_an_unknown_mode_warns_and_falls_back_to_auto() -> None:
    with pytest.warns(
        RuntimeWarning, match=r"^EarlyStopping mode foo is unknown, fallback to auto mode\.$"
    ) as caught:
        stopper = EarlyStopping("val_acc", mode="foo")
    assert caught[0].filename == __file__
    assert train(stopper, [0.1, 0.2, 0.3], key="val_acc") is None


def test_numpy_scalars_are_values() -> None:
    stopper = EarlyStopping()
    assert train(stopper, [np.float32(1), np.float64(1)]) == 1
    assert type(stopper.best) is float


def test_a_min_delta_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArgumentError, match="min_delta=nan: a finite number"):
        EarlyStopping(min_delta=math.nan)


# ---------------------------------------------------------------- the best weights come back


class Weighted:
    """A model whose weight is the epoch it is in, and whose copies are none."""

    def __init__(self) -> None:
        self.stop_training = False
        self.kernel = np.zeros(2)

    def get_weights(self) -> list[Any]:
        return [self.kernel]

    def set_weights(self, weights: list[Any]) -> None:
        self.kernel[:] = weights[0]


def trained(
    stopper: EarlyStopping,
    values: list[float],
    end: BaseException | None = None,
    model: Weighted | None = None,
) -> Weighted:
    """The model after a training with these values, one an epoch."""
    model = model or Weighted()
    stopper.set_model(model)
    stopper.on_train_begin({})
    for epoch, value in enumerate(values):
        model.kernel[:] = epoch
        stopper.on_epoch_end(epoch, {"val_loss": value})
        if model.stop_training:
            break
    if end is not None:
        stopper.on_exception(end)
    stopper.on_train_end({})
    return model


@pytest.mark.parametrize(
    ("values", "patience", "best"),
    [([3.0, 1.0, 2.0, 2.0], 2, 1), ([3.0, 1.0, 2.0, 2.0], 9, 1), ([3.0, 2.0, 1.0], 9, 2)],
    ids=["stopped here", "run to its last epoch", "the last one is the best"],
)
def test_the_weights_of_the_best_epoch_come_back_however_the_training_ended(
    values: list[float], patience: int, best: int
) -> None:
    stopper = EarlyStopping(patience=patience, restore_best_weights=True)
    assert trained(stopper, values).kernel.tolist() == [best, best]
    assert stopper.best_epoch == best


class Taking(Weighted):
    """Goes on with the arrays that it is given."""

    def set_weights(self, weights: list[Any]) -> None:
        (self.kernel,) = weights


def test_a_model_that_takes_the_arrays_themselves_can_be_trained_on_with_them() -> None:
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    model = trained(stopper, [2.0, 1.0, 3.0], model=Taking())
    assert model.kernel.tolist() == [1, 1]
    model.kernel += 1
    assert model.kernel.tolist() == [2, 2]


def test_a_reference_in_place_of_a_copy_would_bring_back_the_last_weights() -> None:
    model = Weighted()
    kept = model.get_weights()
    model.kernel[:] = 7
    model.set_weights(kept)
    assert model.kernel.tolist() == [7, 7]


def test_without_being_asked_it_leaves_the_weights_alone() -> None:
    assert trained(EarlyStopping(patience=9), [1.0, 2.0]).kernel.tolist() == [1, 1]


def test_after_a_failure_the_weights_stay_as_they_are() -> None:
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    assert trained(stopper, [1.0, 2.0], end=RuntimeError()).kernel.tolist() == [1, 1]


def test_without_a_best_epoch_nothing_comes_back() -> None:
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    assert trained(stopper, [math.nan, math.nan]).kernel.tolist() == [1, 1]


def test_the_copies_are_let_go_at_the_end() -> None:
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    trained(stopper, [1.0])
    assert stopper.state_dict()["best_weights"] is None


def test_only_an_improvement_copies() -> None:
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    model = Weighted()
    asked = []
    get_weights = model.get_weights
    model.get_weights = lambda: asked.append(1) or get_weights()  # type: ignore[func-returns-value,method-assign]
    stopper.set_model(model)
    stopper.on_train_begin({})
    for epoch, value in enumerate([3.0, 4.0, 2.0, 2.0]):
        stopper.on_epoch_end(epoch, {"val_loss": value})
    assert len(asked) == 2


def test_which_epoch_comes_back_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    trained(EarlyStopping(patience=2, verbose=1, restore_best_weights=True), [3.0, 1.0, 2.0, 2.0])
    assert capsys.readouterr().out == (
        "Epoch 4: early stopping\nRestoring model weights from the end of the best epoch: 2.\n"
    )


@pytest.mark.parametrize("method", ["get_weights", "set_weights"])
def test_a_model_whose_weights_cannot_be_put_back_is_refused_at_the_start(method: str) -> None:
    model = Weighted()
    setattr(model, method, None)
    stopper = EarlyStopping(restore_best_weights=True)
    stopper.set_model(model)
    with pytest.raises(ArgumentError, match=f"restore_best_weights needs {method}"):
        stopper.on_train_begin({})
    EarlyStopping().on_train_begin({})


def test_only_where_weights_come_back_copies_of_the_model_are_not_shared_with_others() -> None:
    assert read_hooks(EarlyStopping(restore_best_weights=True)).changes_model
    assert not read_hooks(EarlyStopping()).changes_model


@pytest.mark.asyncio
async def test_in_a_real_training_the_model_predicts_as_after_its_best_epoch() -> None:
    model = Sequential([Dense(2, input_dim=2)], seed=1)
    model.compile("sgd", "mse")
    x, y = np.eye(2, dtype="f4"), np.ones((2, 2), "f4")
    after: list[Any] = []
    each = LambdaCallback(on_epoch_end=lambda epoch, logs: after.append(model.get_weights()))
    worse = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=[1.0, 3.0, 2.0][epoch]))
    best = EarlyStopping("score", mode="max", patience=9, restore_best_weights=True)
    await Trainer(model).fit(x, y, epochs=3, verbose=0, callbacks=[each, worse, best])
    assert all(map(np.array_equal, model.get_weights(), after[1]))
    assert not all(map(np.array_equal, after[1], after[2]))
