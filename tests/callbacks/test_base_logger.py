"""BaseLogger: the epoch's means."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb.callbacks.base_logger import BaseLogger


def epoch(
    *batches: dict[str, object],
    metrics: list[str] | None = None,
    logs: dict[str, object] | None = None,
    **options: object,
) -> dict[str, object]:
    """The logs of an epoch of these batches, after BaseLogger had them."""
    logger = BaseLogger(**options)  # type: ignore[arg-type]
    logger.set_params({"metrics": ["loss", "val_loss"] if metrics is None else metrics})
    return run(logger, *batches, logs=logs)


def run(
    logger: BaseLogger, *batches: dict[str, object], logs: dict[str, object] | None = None
) -> dict[str, object]:
    logs = {} if logs is None else logs
    logger.on_epoch_begin(0, {})
    for number, batch in enumerate(batches):
        logger.on_batch_end(number, {"batch": number, **batch})
    logger.on_epoch_end(0, logs)
    return logs


def test_batches_are_weighted_by_their_size() -> None:
    assert epoch({"size": 4, "loss": 1.0}, {"size": 2, "loss": 4.0}) == {"loss": 2.0}


def test_what_stands_in_the_logs_of_the_epoch_is_left_alone_and_stays_first() -> None:
    logs = epoch({"size": 4, "loss": 1.0}, {"size": 2, "loss": 4.0}, logs={"val_loss": 9.0})
    assert list(logs.items()) == [("val_loss", 9.0), ("loss", 2.0)]


def test_only_names_in_params_metrics_are_averaged_in_their_order() -> None:
    logs = epoch(
        {"size": 1, "noise": 3.0, "acc": 0.5, "loss": 1.0}, metrics=["loss", "acc", "val_loss", "val_acc"]
    )
    assert list(logs.items()) == [("loss", 1.0), ("acc", 0.5)]


def test_where_the_metrics_are_not_known_every_number_is_averaged() -> None:
    logs = epoch({"size": 1, "loss": 1.0, "note": "a"}, {"size": 3, "loss": 5.0, "note": "b"}, metrics=[])
    assert logs == {"loss": 4.0}


def test_values_of_the_epoch_so_far_are_not_averaged() -> None:
    logger = BaseLogger()
    for metrics in (["loss"], []):
        logger.set_params({"metrics": metrics, "accumulated": True})
        assert run(logger, {"size": 4, "loss": 1.0}, {"size": 2, "loss": 4.0}) == {"loss": 4.0}


def test_each_epoch_starts_anew() -> None:
    logger = BaseLogger()
    logger.set_params({"metrics": ["loss"]})
    assert run(logger, {"size": 2, "loss": 8.0}) == {"loss": 8.0}
    assert run(logger, {"size": 2, "loss": 1.0}) == {"loss": 1.0}


def test_no_batches_write_nothing() -> None:
    assert epoch() == {}


@pytest.mark.parametrize("size", [{}, {"size": 0}, {"size": None}])
def test_without_any_size_all_batches_count_alike(size: dict[str, object]) -> None:
    assert epoch({**size, "loss": 1.0}, {**size, "loss": 4.0}) == {"loss": 2.5}


def test_a_batch_without_size_weighs_nothing_beside_others() -> None:
    assert epoch({"loss": 100.0}, {"size": 2, "loss": 1.0}) == {"loss": 1.0}


def test_stateful_metrics_are_logged_as_their_last_value() -> None:
    batches = [{"size": 4, "loss": 1.0, "auc": 0.1}, {"size": 2, "loss": 4.0, "auc": 0.7}]
    logs = epoch(*batches, metrics=["loss", "auc"], stateful_metrics=["auc"])
    assert logs == {"loss": 2.0, "auc": 0.7}


def test_stateful_metrics_need_no_sizes() -> None:
    logs = epoch({"auc": 0.1}, {"auc": 0.7}, metrics=["auc"], stateful_metrics=["auc"])
    assert logs == {"auc": 0.7}


def test_a_metric_that_some_batches_lack_is_the_mean_of_the_others() -> None:
    batches = [
        {"size": 1, "loss": 1.0, "acc": 0.5},
        {"size": 3, "loss": 3.0},
        {"size": 1, "loss": 1.0, "acc": 1.0},
    ]
    assert epoch(*batches, metrics=["loss", "acc"]) == {"loss": 2.2, "acc": 0.75}


def test_a_metric_that_takes_the_place_of_another_is_not_lost() -> None:
    batches = [{"size": 2, "loss": 1.0, "a": 1.0}, {"size": 2, "loss": 3.0, "b": 5.0}]
    assert epoch(*batches, metrics=["loss", "a", "b"]) == {"loss": 2.0, "a": 1.0, "b": 5.0}
    assert epoch(*batches, metrics=["a", "b", "loss"]) == {"a": 1.0, "b": 5.0, "loss": 2.0}


def test_float32_logs_give_a_python_float_of_full_precision() -> None:
    third = np.float32(1 / 3)
    logs = epoch(*[{"size": 3, "loss": third}] * 1000)
    naive = third * 3
    for _ in range(999):
        naive += third * 3
    assert type(logs["loss"]) is float
    assert json.loads(json.dumps(logs)) == logs
    assert logs["loss"] == pytest.approx(float(third), rel=1e-12)
    assert float(naive) / 3000 != pytest.approx(float(third), rel=1e-12)


@pytest.mark.parametrize("value", [1, np.int64(1), np.float64(1.0), np.array(1.0), True])
def test_a_mean_is_a_python_float_whatever_the_numbers_were(value: object) -> None:
    mean = epoch({"size": 2, "loss": value})["loss"]
    assert (mean, type(mean)) == (1.0, float)


def test_a_metric_of_several_values_is_averaged_value_by_value() -> None:
    first, second = np.array([1.0, 2.0], np.float32), np.array([4.0, 8.0], np.float32)
    logs = epoch({"size": 2, "per_class": first}, {"size": 1, "per_class": second}, metrics=["per_class"])
    np.testing.assert_array_equal(logs["per_class"], [2.0, 4.0])
    np.testing.assert_array_equal(first, [1.0, 2.0])


def test_nan_in_a_batch_is_nan_in_the_epoch() -> None:
    assert math.isnan(epoch({"size": 1, "loss": math.nan}, {"size": 1, "loss": 1.0})["loss"])  # type: ignore[arg-type]


def test_logs_of_none_are_no_batch() -> None:
    logger = BaseLogger()
    logger.on_batch_end(0)
    assert logger.on_epoch_end(0) is None
    assert run(logger) == {}


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(-1e6, 1e6)), min_size=1))
def test_the_mean_is_that_over_all_samples(batches: list[tuple[int, float]]) -> None:
    logs = epoch(*[{"size": size, "loss": loss} for size, loss in batches])
    samples = math.fsum(size * loss for size, loss in batches)
    assert logs["loss"] == pytest.approx(samples / sum(size for size, _ in batches), rel=1e-9, abs=1e-6)
