"""What the training thread may rely on, whichever model it drives.

A model joins by a line in MODELS of ``subjects``: a name and how to make one, with data that it can train on.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from subjects import MODELS, PARAMETERS, Subject, assert_same, batch, numbers

from asynccb import ArgumentError, Callback, Trainer
from asynccb.models import adapt
from asynccb.protocols import Batch, Model, Unread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


@pytest.fixture(params=PARAMETERS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return MODELS[request.param]


@pytest.fixture
def model(subject: Subject) -> Model:
    return adapt(subject.make())


def test_it_is_a_model_and_shows_the_object_that_the_user_gave(subject: Subject) -> None:
    given = subject.make()
    model = adapt(given)
    assert isinstance(model, Model)
    assert model.user_model is given


@pytest.mark.parametrize("name", [name for name in vars(Model) if not name.startswith("_")])
def test_its_methods_take_exactly_what_the_protocol_says(model: Model, name: str) -> None:
    wanted = inspect.getattr_static(Model, name)
    if isinstance(wanted, property):
        assert hasattr(model, name)
        return
    asked = [*inspect.signature(wanted).parameters.values()][1:]
    given = inspect.signature(getattr(model, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in asked] == [(p.name, p.kind, p.default) for p in given]


def test_a_model_of_the_protocol_is_driven_as_it_is(model: Model) -> None:
    assert adapt(model) is model


def test_its_stop_flag_can_be_set_and_read(model: Model) -> None:
    model.user_model.stop_training = True
    assert model.user_model.stop_training is True


def read(logs: Mapping[str, Any]) -> dict[str, Any]:
    return logs.read() if isinstance(logs, Unread) else dict(logs)


def test_its_logs_go_through_json_as_they_are(subject: Subject, model: Model) -> None:
    for step in (model.train_batch, model.test_batch):
        logs = read(step(batch(subject)))
        assert json.loads(json.dumps(logs)) == logs


def test_a_batch_gives_its_logs_with_the_loss_first(subject: Subject, model: Model) -> None:
    for step in (model.train_batch, model.test_batch):
        logs = step(batch(subject))
        assert next(iter(logs)) == "loss"
        assert list(logs) == list(model.metrics_names)
        assert all(np.ndim(value) == 0 for value in logs.values())


def test_its_logs_are_its_callers_to_keep(subject: Subject, model: Model) -> None:
    first = model.train_batch(batch(subject))
    kept = read(first)
    model.train_batch(batch(subject, 4, 8))
    assert read(first) == kept


def test_a_trained_batch_changes_the_weights_and_a_tested_one_does_not(
    subject: Subject, model: Model
) -> None:
    before = numbers(model.capture())
    model.test_batch(batch(subject))
    model.predict_batch(batch(subject))
    assert_same(before, numbers(model.capture()))
    model.train_batch(batch(subject))
    after = numbers(model.capture())
    assert any((before[name] != after[name]).any() for name in before)


def test_predictions_have_a_row_for_each_sample_and_own_their_memory(subject: Subject, model: Model) -> None:
    first = model.predict_batch(batch(subject, 0, 4))
    kept = np.array(first)
    assert len(first) == 4
    model.predict_batch(batch(subject, 4, 8))
    model.train_batch(batch(subject, 4, 8))
    np.testing.assert_array_equal(first, kept)


def test_batches_of_any_size_are_trained(subject: Subject, model: Model) -> None:
    for stop in (4, 1, 3, 12):
        assert np.isfinite(model.train_batch(batch(subject, 0, stop))["loss"])


def test_the_data_is_left_as_it_is(subject: Subject, model: Model) -> None:
    x, y = subject.x.copy(), subject.y.copy()
    x.flags.writeable = y.flags.writeable = False
    model.train_batch(Batch(x, y, None, len(x)))
    np.testing.assert_array_equal(x, subject.x)
    np.testing.assert_array_equal(y, subject.y)


class Copying:
    """A gate of a copy that is always under way."""

    copying = True

    def __init__(self, asked: Callable[[], object]) -> None:
        self._asked = asked

    def __call__(self, segments: int | None = None) -> None:
        self._asked()

    def keep(self, array: int, rows: Any) -> None:
        self._asked()


def test_the_gate_opens_before_the_parameters_are_overwritten(subject: Subject, model: Model) -> None:
    seen: list[dict[str, Any]] = []
    before = numbers(model.capture())
    model.train_batch(batch(subject), Copying(lambda: seen.append(numbers(model.capture()))))
    assert len(seen) >= 1
    assert_same(before, seen[0])


def test_a_gate_that_raises_keeps_the_parameters(subject: Subject, model: Model) -> None:
    before = numbers(model.capture())

    def refuse() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train_batch(batch(subject), Copying(refuse))
    after = numbers(model.capture())
    for name in before:
        if not name.startswith("optimizer/") and "moving" not in name:
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


# ---------------------------------------------------------------- copies


def test_a_copy_is_read_only_and_training_on_does_not_change_it(subject: Subject, model: Model) -> None:
    model.train_batch(batch(subject))
    state = model.capture()
    kept = numbers(state)
    for array in state.arrays.values():
        assert not array.flags.writeable
    model.train_batch(batch(subject))
    assert_same(kept, numbers(state))


def test_two_copies_of_one_moment_are_equal_and_weights_come_before_the_optimizer(
    subject: Subject, model: Model
) -> None:
    model.train_batch(batch(subject))
    assert_same(numbers(model.capture()), numbers(model.capture()))
    names = list(model.capture().arrays)
    slots = [name.startswith("optimizer/") for name in names]
    assert slots == sorted(slots)


def test_a_model_made_of_a_copy_has_its_state_and_a_life_of_its_own(subject: Subject, model: Model) -> None:
    model.train_batch(batch(subject))
    state = model.capture()
    kept = numbers(state)
    made = adapt(state.to_model())
    assert made.user_model is not model.user_model
    assert_same(kept, numbers(made.capture()))
    made.train_batch(batch(subject))
    assert_same(kept, numbers(model.capture()))
    assert_same(kept, numbers(state))


def test_a_model_made_of_a_copy_trains_on_exactly_as_the_original(subject: Subject, model: Model) -> None:
    for _ in range(3):
        model.train_batch(batch(subject))
    made = adapt(model.capture().to_model())
    for start in (0, 4, 8):
        model.train_batch(batch(subject, start, start + 4))
        made.train_batch(batch(subject, start, start + 4))
    assert_same(numbers(model.capture()), numbers(made.capture()))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_copy_is_written_whole_under_the_name_that_is_asked_for(
    subject: Subject, model: Model, tmp_path: Path, weights_only: bool
) -> None:
    model.train_batch(batch(subject))
    path = tmp_path / f"model{subject.suffix}"
    model.capture().save(path, weights_only=weights_only)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 0


# ---------------------------------------------------------------- questions


def test_a_loss_goes_down_and_an_unknown_metric_has_no_direction(model: Model) -> None:
    assert model.direction("loss") == "min"
    assert model.direction("val_loss") == "min"
    assert model.direction("no such metric") is None


def test_it_is_ready_and_takes_its_own_data(subject: Subject, model: Model) -> None:
    model.check_ready(training=True)
    model.check_ready(training=False)
    model.check_data(subject.x, subject.y, None)
    model.check_data(subject.x, subject.y, np.ones(len(subject.x)), name="validation_data")


def test_a_question_changes_nothing(subject: Subject, model: Model) -> None:
    before = numbers(model.capture())
    model.check_ready(training=True)
    model.check_data(subject.x, subject.y, None)
    model.direction("loss")
    assert_same(before, numbers(model.capture()))


def test_sample_weights_are_accepted(subject: Subject, model: Model) -> None:
    weighted = batch(subject)._replace(sample_weight=np.array([1.0, 0.0, 2.0, 0.5]))
    assert np.isfinite(model.train_batch(weighted)["loss"])
    assert np.isfinite(model.test_batch(weighted)["loss"])


# ---------------------------------------------------------------- in a training


@pytest.mark.asyncio
async def test_it_trains_on_a_thread_and_is_free_again_afterwards(subject: Subject) -> None:
    given = subject.make()
    trainer = Trainer(given, seed=1)
    history = await trainer.fit(
        subject.x, subject.y, batch_size=5, epochs=2, validation_data=(subject.x, subject.y), verbose=0
    )
    assert history.epoch == [0, 1]
    assert {"loss", "val_loss"} <= set(history.history)
    assert all(type(value) in (int, float) for values in history.history.values() for value in values)
    means = await trainer.evaluate(subject.x, subject.y)
    assert set(means) == set(adapt(given).metrics_names)
    assert len(await trainer.predict(subject.x)) == len(subject.x)


@pytest.mark.asyncio
async def test_two_trainings_with_one_seed_give_the_same_weights(subject: Subject) -> None:
    states = []
    for _ in range(2):
        given = subject.make()
        await Trainer(given, seed=3).fit(subject.x, subject.y, batch_size=5, epochs=2, verbose=0)
        states.append(numbers(adapt(given).capture()))
    assert_same(*states)


@pytest.mark.asyncio
async def test_a_copy_taken_in_a_training_is_of_that_batch(subject: Subject) -> None:
    run = Trainer(subject.make()).start(subject.x, subject.y, batch_size=4, verbose=0)
    await run
    snapshot = await run.snapshot()
    assert snapshot.step == 3
    assert_same(numbers(adapt(snapshot.to_model()).capture()), dict(snapshot.arrays))


@pytest.mark.asyncio
async def test_an_inline_hook_may_copy_it_between_two_batches(subject: Subject) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            with self.snapshot() as taken:
                copies.append({name: array.tobytes() for name, array in taken.arrays.items()})

    copies: list[dict[str, bytes]] = []
    given = subject.make()
    await Trainer(given).fit(subject.x, subject.y, batch_size=4, verbose=0, callbacks=Copies())
    assert len({tuple(copy.values()) for copy in copies}) == 3
    assert copies[-1] == {name: array.tobytes() for name, array in adapt(given).capture().arrays.items()}


def test_what_cannot_train_is_no_model() -> None:
    with pytest.raises(ArgumentError):
        adapt(object())
