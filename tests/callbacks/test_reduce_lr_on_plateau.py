"""ReduceLROnPlateau: Keras 3's table of rates."""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asynccb.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from asynccb.errors import ArgumentError


def rates(
    reducer: ReduceLROnPlateau, values: list[Any], lr: float = 1.0, key: str = "val_loss"
) -> list[float]:
    """The rate after each epoch of a training with these values."""
    reducer.set_model(SimpleNamespace(optimizer=SimpleNamespace(lr=lr)))
    reducer.on_train_begin({})
    after = []
    for epoch, value in enumerate(values):
        reducer.on_epoch_end(epoch, {"loss": 0.0, key: value})
        after.append(reducer.model.optimizer.lr)
    return after


def flat(epochs: int, **options: Any) -> list[float]:
    return rates(ReduceLROnPlateau(factor=0.5, **options), [1.0] * epochs)


def test_the_pages_parameters_keep_their_order_and_defaults_and_the_newer_are_keyword_only() -> None:
    assert str(inspect.signature(ReduceLROnPlateau)) == (
        "(monitor: 'str' = 'val_loss', factor: 'float' = 0.1, patience: 'int' = 10, verbose: 'int' = 0, "
        "mode: 'str' = 'auto', epsilon: 'float' = 0.0001, cooldown: 'int' = 0, min_lr: 'float' = 0, "
        "*, min_delta: 'float | None' = None) -> 'None'"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patience": 0}, [1, 0.5, 0.25, 0.125]),
        ({"patience": 1}, [1, 0.5, 0.25, 0.125]),
        ({"patience": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"patience": 1, "cooldown": 1}, [1, 0.5, 0.25, 0.125]),
        ({"patience": 1, "cooldown": 2}, [1, 0.5, 0.5, 0.25, 0.25]),
        ({"patience": 0, "min_lr": 0.2}, [1, 0.5, 0.25, 0.2, 0.2]),
    ],
)
def test_on_a_flat_metric_the_rate_drops_as_in_keras_3(
    options: dict[str, Any], expected: list[float]
) -> None:
    assert flat(len(expected), **options) == expected


def test_the_old_order_of_count_and_test_would_drop_one_epoch_later() -> None:
    rate, wait, after = 1.0, 0, [1.0]
    for _ in range(4):  # the count of 2017: first the test, then the increment
        if wait >= 2:
            rate, wait = rate * 0.5, 0
        wait += 1
        after.append(rate)
    assert after == [1, 1, 1, 0.5, 0.5]
    assert after != flat(5, patience=2)


def test_an_improvement_starts_the_count_again() -> None:
    reducer = ReduceLROnPlateau(factor=0.5, patience=2)
    assert rates(reducer, [3.0, 3.0, 2.0, 2.0, 2.0]) == [1, 1, 1, 1, 0.5]


def test_a_change_of_exactly_epsilon_is_a_plateau() -> None:
    assert rates(ReduceLROnPlateau(factor=0.5, patience=1), [1.0, 0.9999]) == [1, 0.5]
    assert rates(ReduceLROnPlateau(factor=0.5, patience=1, epsilon=0), [1.0, 0.9999]) == [1, 1]


@pytest.mark.parametrize("name", ["epsilon", "min_delta"])
def test_epsilon_and_min_delta_name_the_same_parameter(name: str) -> None:
    reducer = ReduceLROnPlateau(factor=0.5, patience=1, **{name: 0.5})
    assert rates(reducer, [2.0, 1.6, 1.4]) == [1, 0.5, 0.5]


@pytest.mark.parametrize("epsilon", [0.5, 0.0001])
def test_epsilon_and_min_delta_together_are_refused_even_with_the_default_written_out(epsilon: float) -> None:
    with pytest.raises(ArgumentError, match=r"^min_delta=0\.1: another name of epsilon, which is given too"):
        ReduceLROnPlateau(epsilon=epsilon, min_delta=0.1)


def test_the_rate_of_the_epoch_before_any_drop_is_logged_as_lr() -> None:
    reducer = ReduceLROnPlateau(factor=0.5, patience=1)
    reducer.set_model(SimpleNamespace(optimizer=SimpleNamespace(lr=np.float32(1.0))))
    reducer.on_train_begin({})
    logged = []
    for epoch in range(3):
        logs = {"val_loss": 1.0}
        reducer.on_epoch_end(epoch, logs)
        logged.append(logs["lr"])
    assert logged == [1.0, 1.0, 0.5]
    assert {type(value) for value in logged} == {float}


def test_of_two_reducers_the_second_keeps_the_rate_that_the_first_has_logged() -> None:
    model = SimpleNamespace(optimizer=SimpleNamespace(lr=1.0))
    reducers = [ReduceLROnPlateau(factor=0.5, patience=1), ReduceLROnPlateau("loss", factor=0.5, patience=1)]
    logs: dict[str, float] = {}
    for reducer in reducers:
        reducer.set_model(model)
        reducer.on_train_begin({})
    for epoch in range(2):
        logs = {"val_loss": 1.0, "loss": 1.0}
        for reducer in reducers:
            reducer.on_epoch_end(epoch, logs)
    assert logs["lr"] == 1.0
    assert model.optimizer.lr == 0.25


def test_at_the_floor_no_drop_is_made_or_told_again_though_a_float32_rate_misses_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Float32Optimizer:
        """Keeps its rate as a framework with 32-bit variables does."""

        _lr = np.float32(1.0)
        lr = property(lambda self: self._lr, lambda self, rate: setattr(self, "_lr", np.float32(rate)))

    reducer = ReduceLROnPlateau(factor=0.5, patience=1, min_lr=0.3, verbose=1)
    reducer.set_model(SimpleNamespace(optimizer=Float32Optimizer()))
    reducer.on_train_begin({})
    for epoch in range(6):
        reducer.on_epoch_end(epoch, {"val_loss": 1.0})
    assert float(reducer.model.optimizer.lr) > 0.3  # so a plain comparison would go on for ever
    assert capsys.readouterr().out == (
        "\nEpoch 2: ReduceLROnPlateau reducing learning rate to 0.5.\n"
        "\nEpoch 3: ReduceLROnPlateau reducing learning rate to 0.3.\n"
    )


def test_without_verbose_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    flat(4, patience=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("monitor", "mode", "values", "last"),
    [
        ("val_acc", "auto", [0.1, 0.2, 0.3], 1),
        ("val_acc", "min", [0.1, 0.2, 0.3], 0.25),
        ("val_f1", "auto", [0.1, 0.2, 0.3], 1),
        ("val_loss", "max", [0.1, 0.2, 0.3], 1),
    ],
)
def test_the_mode_tells_which_way_is_better(
    monitor: str, mode: str, values: list[float], last: float
) -> None:
    reducer = ReduceLROnPlateau(monitor, factor=0.5, patience=1, mode=mode)
    assert rates(reducer, values, key=monitor)[-1] == last


def test_an_object_starts_each_training_afresh() -> None:
    reducer = ReduceLROnPlateau(factor=0.5, patience=2, cooldown=3)
    assert rates(reducer, [1.0] * 4) == [1, 1, 0.5, 0.5]
    assert rates(reducer, [9.0] * 4) == [1, 1, 0.5, 0.5]


def test_nan_is_no_improvement() -> None:
    assert rates(ReduceLROnPlateau(factor=0.5, patience=1), [1.0, math.nan]) == [1, 0.5]


def test_a_missing_metric_is_told_once_and_lr_is_logged_all_the_same() -> None:
    reducer = ReduceLROnPlateau()
    reducer.set_model(SimpleNamespace(optimizer=SimpleNamespace(lr=0.1)))
    reducer.on_train_begin({})
    logs: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(20):
            logs = {"loss": 1.0}
            reducer.on_epoch_end(epoch, logs)
    assert [(one.category, str(one.message)) for one in caught] == [
        (
            RuntimeWarning,
            "Reduce LR on plateau conditioned on metric `val_loss` which is not available. "
            "Available metrics are: loss,lr",
        )
    ]
    assert logs == {"loss": 1.0, "lr": 0.1}
    assert reducer.model.optimizer.lr == 0.1


def test_an_unknown_mode_warns_and_falls_back_to_auto() -> None:
    text = r"^Learning Rate Plateau Reducing mode foo is unknown, fallback to auto mode\.$"
    with pytest.warns(RuntimeWarning, match=text):
        reducer = ReduceLROnPlateau("val_acc", factor=0.5, patience=1, mode="foo")
    assert rates(reducer, [0.1, 0.2], key="val_acc") == [1, 1]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_factor_of_one_or_more_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau does not support a factor >= 1\.0\."):
        ReduceLROnPlateau(factor=factor)


def test_a_model_without_a_rate_is_refused_before_the_first_batch() -> None:
    reducer = ReduceLROnPlateau()
    reducer.set_model(SimpleNamespace(optimizer=SimpleNamespace()))
    with pytest.raises(ValueError, match=r'Optimizer must have a "lr" attribute\.'):
        reducer.on_train_begin({})
