"""The best-so-far comparison: its formula, its guess of a direction, its spellings, its warnings."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb.callbacks.monitor import Monitor, find_key
from asynccb.errors import ArgumentError

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


def improvements(values: list[float], **options: object) -> list[bool]:
    monitor = Monitor("loss", **options)  # type: ignore[arg-type]
    return [monitor.improved(value) for value in values]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [2.0, 1.0, 1.0, 1.5, 0.5], [True, True, False, False, True]),
        ("max", [2.0, 1.0, 2.0, 2.5, 2.5], [True, False, False, True, False]),
    ],
)
def test_only_a_strictly_better_value_improves(mode: str, values: list[float], expected: list[bool]) -> None:
    assert improvements(values, mode=mode) == expected


def test_a_change_of_exactly_min_delta_is_no_improvement() -> None:
    assert improvements([2.0, 1.0, 0.5], min_delta=1) == [True, False, True]
    assert improvements([1.0, 2.0, 2.5], min_delta=1, mode="max") == [True, False, True]


def test_the_sign_of_min_delta_does_not_matter() -> None:
    assert improvements([2.0, 1.0, 0.5], min_delta=-1) == [True, False, True]


def test_a_step_of_epsilon_counts_as_a_plateau() -> None:
    assert improvements([1.0, 0.9999], min_delta=1e-4) == [True, False]


def test_nan_never_improves_and_never_becomes_the_best() -> None:
    monitor = Monitor("loss")
    assert [monitor.improved(value) for value in (math.nan, 1.0, math.nan)] == [False, True, False]
    assert monitor.best == 1.0


def test_an_infinite_value_of_the_wrong_sign_does_not_improve_on_nothing() -> None:
    assert improvements([math.inf, 1e308, -math.inf]) == [False, True, True]


@given(st.lists(numbers, min_size=1), st.sampled_from(["min", "max"]))
def test_best_is_the_extreme_of_all_values(values: list[float], mode: str) -> None:
    monitor = Monitor("loss", mode)
    for value in values:
        monitor.improved(value)
    assert monitor.best == {"min": min, "max": max}[mode](values)


@given(st.lists(numbers, min_size=1), st.floats(0, 10, width=32))
def test_max_is_min_of_the_negated_values(values: list[float], min_delta: float) -> None:
    downward = improvements(values, min_delta=min_delta)
    assert improvements([-value for value in values], min_delta=min_delta, mode="max") == downward


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("mse", "min"),
        ("acc", "max"),
        ("val_acc", "max"),
        ("accuracy", "max"),
        ("top_k_categorical_accuracy", "max"),
        ("acc_2", "max"),
        ("val_auc", "max"),
        ("AUC", "max"),
        ("precision", "max"),
        ("val_recall", "max"),
        ("f1", "max"),
        ("val_f1_score", "max"),
        ("fmeasure", "max"),
        ("val_fmeasure", "max"),
        ("acceleration_error", "min"),
        ("occlusion_accent", "min"),
    ],
)
def test_auto_goes_up_for_the_words_of_scores_and_down_for_all_else(name: str, direction: str) -> None:
    assert Monitor(name).direction == direction


def test_a_substring_rule_would_take_an_error_for_a_score() -> None:
    def naive(name: str) -> str:
        return "max" if "acc" in name else "min"

    assert naive("acceleration_error") == "max" != Monitor("acceleration_error").direction


def test_the_model_knows_better_than_the_name() -> None:
    run = SimpleNamespace(direction={"roughness": "max", "accuracy": "min"}.get)
    roughness, accuracy = Monitor("val_roughness"), Monitor("val_acc")
    roughness.reset(run)
    accuracy.reset(run)
    assert (roughness.direction, accuracy.direction) == ("max", "min")


def test_a_given_mode_wins_over_the_model() -> None:
    monitor = Monitor("roughness", mode="min")
    monitor.reset(SimpleNamespace(direction=lambda metric: "max"))
    assert monitor.direction == "min"


def test_an_unknown_mode_warns_and_falls_back_to_auto() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        monitor = Monitor("val_acc", mode="foo", owner="ModelCheckpoint")
    assert [str(one.message) for one in caught] == [
        "ModelCheckpoint mode foo is unknown, fallback to auto mode."
    ]
    assert monitor.direction == "max"


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("acc", {"acc"}, "acc"),
        ("acc", {"accuracy"}, "accuracy"),
        ("accuracy", {"acc"}, "acc"),
        ("val_acc", {"acc", "val_accuracy"}, "val_accuracy"),
        ("val_accuracy", {"val_acc"}, "val_acc"),
        ("acc", {"acc", "accuracy"}, "acc"),
        ("val_acc", {"acc"}, None),
        ("loss", {"val_loss"}, None),
    ],
)
def test_either_spelling_of_accuracy_finds_the_other_and_an_exact_key_wins(
    name: str, keys: set[str], expected: str | None
) -> None:
    assert find_key(name, keys) == expected


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), np.array([[0.5]])]
)
def test_numbers_of_any_make_become_plain_floats(value: object) -> None:
    found = Monitor("loss").value({"loss": value})
    assert (found, type(found)) == (0.5, float)


@pytest.mark.parametrize("logs", [None, {}, {"acc": 1.0}, {"loss": None}])
def test_a_missing_value_is_none(logs: dict[str, object] | None) -> None:
    assert Monitor("loss").value(logs) is None


@pytest.mark.parametrize("value", [np.zeros(2), "high", object()])
def test_a_value_that_is_not_one_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ArgumentError, match="monitor='loss': a metric whose value is one number, not"):
        Monitor("loss").value({"loss": value})


def test_a_missing_metric_is_told_once_in_a_training_and_again_in_the_next() -> None:
    monitor = Monitor("val_loss", owner="Early stopping")
    expected = (
        "Early stopping conditioned on metric `val_loss` which is not available. "
        "Available metrics are: loss,acc"
    )
    for _training in range(2):
        monitor.reset()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _epoch in range(3):
                monitor.warn_missing({"loss": 1.0, "acc": 0.5})
        assert [(one.category, str(one.message)) for one in caught] == [(RuntimeWarning, expected)]


def test_a_callback_may_say_it_in_its_own_words() -> None:
    monitor = Monitor("val_loss", missing="Can save best model only with {monitor} available, skipping.")
    with pytest.warns(
        RuntimeWarning, match=r"^Can save best model only with val_loss available, skipping\.$"
    ):
        monitor.warn_missing({})


def test_a_metric_name_cannot_move_the_cursor_from_inside_a_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Monitor("val_loss").warn_missing({"\x1b[2Jloss": 1.0})
    assert r"Available metrics are: \x1b[2Jloss" in str(caught[0].message)


def test_reset_forgets_the_best_or_takes_the_one_to_beat() -> None:
    monitor = Monitor("loss")
    monitor.improved(0.1)
    monitor.reset()
    assert monitor.best == math.inf
    monitor.reset(best=0.5)
    assert [monitor.improved(0.5), monitor.improved(0.4)] == [False, True]


@pytest.mark.parametrize(
    "arguments", [{"monitor": ""}, {"monitor": 3}, {"min_delta": math.nan}, {"min_delta": "much"}]
)
def test_arguments_that_could_only_fail_later_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Monitor(**{"monitor": "loss", **arguments})  # type: ignore[arg-type]
