"""LearningRateScheduler: how the schedule is called, and what it may answer."""

from __future__ import annotations

import inspect
import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb.callbacks.learning_rate_scheduler import LearningRateScheduler
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable


def begun(schedule: Callable[..., Any], optimizer: object = None, **options: Any) -> LearningRateScheduler:
    scheduler = LearningRateScheduler(schedule, **options)
    scheduler.set_model(SimpleNamespace(optimizer=optimizer or SimpleNamespace(lr=1.0)))
    scheduler.on_train_begin({})
    return scheduler


def rates(schedule: Callable[..., Any], epochs: int = 3) -> list[float]:
    scheduler = begun(schedule)
    set_to = []
    for epoch in range(epochs):
        scheduler.on_epoch_begin(epoch, {})
        set_to.append(scheduler.model.optimizer.lr)
    return set_to


def test_of_an_optimizer_with_groups_the_first_one_counts_and_the_others_keep_their_proportion() -> None:
    groups = [{"lr": 0.4}, {"lr": 0.1}, {"lr": 0.4}]
    scheduler = begun(lambda epoch, lr: lr / 2, SimpleNamespace(param_groups=groups))
    scheduler.on_epoch_begin(0, {})
    assert [group["lr"] for group in groups] == pytest.approx([0.2, 0.05, 0.2])
    logs: dict[str, float] = {}
    scheduler.on_epoch_end(0, logs)
    assert logs == {"lr": 0.2}


def test_from_a_rate_of_nought_all_groups_get_the_new_one() -> None:
    groups = [{"lr": 0.0}, {"lr": 0.1}]
    begun(lambda epoch: 0.3, SimpleNamespace(param_groups=groups)).on_epoch_begin(0, {})
    assert [group["lr"] for group in groups] == [0.3, 0.3]


class ByMethod:
    """A schedule that is no function."""

    def __call__(self, epoch: int) -> float:
        return 0.5**epoch

    def with_rate(self, epoch: int, lr: float) -> float:
        return lr / 2


def halve(epoch: int, lr: float) -> float:
    return lr * 0.5


def in_steps(epoch: int, drop: float = 0.5) -> float:
    return drop**epoch


def rate_or_not(epoch: int, lr: float | None = None) -> float:
    return 99.0 if lr is None else lr * 0.5


def test_the_only_positional_parameter_is_the_pages() -> None:
    parameters = inspect.signature(LearningRateScheduler).parameters
    assert [(name, one.kind.name) for name, one in parameters.items()] == [
        ("schedule", "POSITIONAL_OR_KEYWORD"),
        ("verbose", "KEYWORD_ONLY"),
    ]


def test_each_epoch_begins_with_the_rate_of_its_index_counted_from_0() -> None:
    assert rates(lambda epoch: 0.1 * (epoch + 1)) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", [halve, lambda epoch, rate: rate / 2, ByMethod().with_rate, rate_or_not])
def test_a_schedule_of_epoch_and_lr_gets_the_present_rate(schedule: Callable[..., Any]) -> None:
    assert rates(schedule) == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("schedule", [ByMethod(), in_steps, lambda *epoch: 0.5 ** epoch[0]])
def test_a_schedule_that_can_do_without_gets_the_epoch_alone(schedule: Callable[..., Any]) -> None:
    assert rates(schedule) == [1.0, 0.5, 0.25]


def test_a_builtin_that_does_not_tell_its_signature_gets_the_epoch_alone() -> None:
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(math.hypot)
    assert rates(math.hypot) == [0.0, 1.0, 2.0]


def test_a_type_error_inside_the_schedule_is_not_hidden_by_a_second_call() -> None:
    calls = []

    def broken(epoch: int, lr: float) -> float:
        calls.append(epoch)
        return lr * "2"  # type: ignore[operator, no-any-return]

    with pytest.raises(TypeError, match="can't multiply sequence by non-int"):
        rates(broken)
    assert calls == [0]


@pytest.mark.parametrize(
    "answer",
    [
        2,
        2.0,
        np.float16(2),
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        Decimal(2),
        Fraction(2, 1),
    ],
)
def test_any_real_number_is_a_rate_and_is_set_as_a_python_float(answer: object) -> None:
    (rate,) = rates(lambda epoch: answer, epochs=1)
    assert (rate, type(rate)) == (2.0, float)


@pytest.mark.parametrize(
    "answer", [None, "0.1", b"1", math.nan, np.float32("nan"), math.inf, 1j, [0.1], np.ones(1)]
)
def test_what_is_no_finite_real_number_is_refused_in_keras_words(answer: object) -> None:
    with pytest.raises(ValueError, match=r'^The output of the "schedule" function should be float\. Got: '):
        rates(lambda epoch: answer)


def test_a_refused_answer_leaves_the_rate_as_it_was() -> None:
    scheduler = begun(lambda epoch: None)
    with pytest.raises(ValueError, match="should be float"):
        scheduler.on_epoch_begin(0, {})
    assert scheduler.model.optimizer.lr == 1.0


async def later(epoch: int) -> float:
    return 0.1


@pytest.mark.parametrize("schedule", [0.1, None, lambda: 0.1, lambda epoch, lr, more: 0.1, later])
def test_what_cannot_be_called_as_a_schedule_is_refused_at_once(schedule: Any) -> None:
    with pytest.raises(ArgumentError, match="schedule="):
        LearningRateScheduler(schedule)


@pytest.mark.parametrize("model", [None, SimpleNamespace(), SimpleNamespace(optimizer=SimpleNamespace())])
def test_a_model_without_a_rate_is_refused_before_the_first_batch(model: object) -> None:
    scheduler = LearningRateScheduler(lambda epoch: 0.1)
    scheduler.set_model(model)
    with pytest.raises(ValueError, match=r'^Optimizer must have a "lr" attribute\.$'):
        scheduler.on_train_begin({})


def test_learning_rate_is_as_good_a_name_as_lr() -> None:
    scheduler = begun(lambda epoch: 0.25, SimpleNamespace(learning_rate=1.0))
    scheduler.on_epoch_begin(0, {})
    assert vars(scheduler.model.optimizer) == {"learning_rate": 0.25}


def test_the_rate_is_logged_as_lr_at_the_end_of_the_epoch() -> None:
    scheduler, logs = begun(lambda epoch: np.float32(0.5)), {"loss": 1.0}
    scheduler.on_epoch_begin(0, {})
    scheduler.on_epoch_end(0, logs)
    assert logs == {"loss": 1.0, "lr": 0.5}
    assert type(logs["lr"]) is float


def test_a_rate_that_was_logged_before_it_was_lowered_stays() -> None:
    scheduler, logs = begun(lambda epoch: 0.5), {"lr": 0.75}
    scheduler.on_epoch_end(0, logs)
    scheduler.on_epoch_end(0, None)
    assert logs == {"lr": 0.75}


@pytest.mark.parametrize(
    ("verbose", "printed"),
    [(0, ""), (1, "\nEpoch 3: LearningRateScheduler setting learning rate to 0.5.\n")],
)
def test_verbose_tells_the_rate_with_an_epoch_that_counts_from_1(
    verbose: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(lambda epoch: 0.5, verbose=verbose).on_epoch_begin(2, {})
    assert capsys.readouterr().out == printed
