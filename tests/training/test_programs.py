"""Fit, evaluate and predict: the data that each prepares, and what its callbacks are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asynccb import Callback, RunCancelled, Trainer
from asynccb.testing import Recorder, ScriptedModel


class Keeps(ScriptedModel):
    """Keeps the batches that it trains and tests on."""

    def __init__(self, **scripted: Any) -> None:
        super().__init__(**scripted)
        self.trained: list[Any] = []
        self.tested: list[Any] = []

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.trained.append(batch)
        return super().train_batch(batch)

    def test_batch(self, batch: Any) -> dict[str, float]:
        self.tested.append(batch)
        return super().test_batch(batch)


class Params(Callback):
    seen: dict[str, Any]

    def on_train_begin(self, logs: Any = None) -> None:
        assert self.params is not None
        self.seen = {**self.params, "validation_data": self.validation_data}

    on_test_begin = on_train_begin


X = np.arange(10.0).reshape(10, 1)
Y = np.array([0, 1] * 5)


def rows(batches: list[Any]) -> list[float]:
    return [float(value) for batch in batches for value in batch.x[:, 0]]


def weights(batches: list[Any]) -> list[float]:
    return [float(value) for batch in batches for value in batch.sample_weight]


# ---------------------------------------------------------------- fit


@pytest.mark.asyncio
async def test_params_of_array_data_and_of_batches() -> None:
    arrays, iterable = Params(), Params()
    await Trainer(ScriptedModel()).fit(
        X, Y, batch_size=4, epochs=2, validation_data=(X, Y), callbacks=arrays, verbose=0
    )
    await Trainer(ScriptedModel()).fit([(X, Y)] * 3, callbacks=iterable, verbose=0)
    seen = {
        name: value for name, value in arrays.seen.items() if name not in ("validation_data", "log_keys_open")
    }
    assert seen == {
        "batch_size": 4,
        "epochs": 2,
        "samples": 10,
        "verbose": 0,
        "do_validation": True,
        "accumulated": False,
        "metrics": ["loss", "val_loss"],
    }
    assert {"batch_size", "samples"}.isdisjoint(iterable.seen)
    assert (iterable.seen["steps"], iterable.seen["do_validation"]) == (3, False)
    assert iterable.seen["metrics"] == ["loss"]


@pytest.mark.asyncio
async def test_validation_data_is_there_before_train_begin() -> None:
    params = Params()
    await Trainer(ScriptedModel()).fit(X, Y, validation_data=(X, Y), callbacks=params, verbose=0)
    x, y = params.seen["validation_data"]
    assert (x is X, y is Y) == (True, True)


@pytest.mark.asyncio
async def test_a_split_takes_the_end_of_the_data_before_it_is_shuffled() -> None:
    model, params = Keeps(), Params()
    await Trainer(model, seed=1).fit(X, Y, 2, validation_split=0.3, callbacks=params, verbose=0)
    assert sorted(rows(model.trained)) == [0, 1, 2, 3, 4, 5, 6]
    assert rows(model.tested) == [7, 8, 9]
    assert params.seen["samples"] == 7
    assert params.seen["validation_data"][0][:, 0].tolist() == [7, 8, 9]


@pytest.mark.asyncio
async def test_a_split_has_steps_and_a_batch_size_of_its_own() -> None:
    """With the steps of the training it would be refused: it has fewer batches."""
    model = Keeps()
    await Trainer(model).fit(
        X,
        Y,
        2,
        validation_split=0.4,
        steps_per_epoch=3,
        validation_batch_size=1,
        validation_steps=2,
        verbose=0,
    )
    assert [batch.size for batch in model.trained] == [2, 2, 2]
    assert [batch.size for batch in model.tested] == [1, 1]


@pytest.mark.asyncio
async def test_class_weights_multiply_sample_weights_and_do_not_touch_what_is_held_out() -> None:
    model = Keeps()
    sample_weight = np.arange(1.0, 11.0)
    await Trainer(model).fit(
        X,
        Y,
        class_weight={1: 10.0},
        sample_weight=sample_weight,
        shuffle=False,
        validation_split=0.2,
        verbose=0,
    )
    assert weights(model.trained) == [1, 20, 3, 40, 5, 60, 7, 80]
    assert weights(model.tested) == [9, 10]


@pytest.mark.asyncio
@pytest.mark.parametrize("labels", [Y, Y[:, None], np.eye(2)[Y]])
async def test_classes_are_read_from_labels_columns_and_one_hot_rows(labels: Any) -> None:
    model = Keeps()
    await Trainer(model).fit(X, labels, class_weight={0: 0.5, 1: 2.0}, shuffle=False, verbose=0)
    assert weights(model.trained) == [0.5, 2.0] * 5


@pytest.mark.asyncio
async def test_class_weights_reach_the_batches_of_an_iterable_too() -> None:
    model = Keeps()
    await Trainer(model).fit([(X[:2], Y[:2])], class_weight={1: 3.0}, verbose=0)
    assert weights(model.trained) == [1.0, 3.0]


@pytest.mark.asyncio
@pytest.mark.parametrize("shape", [tuple, list])
async def test_several_inputs_keep_their_structure(shape: Any) -> None:
    model = Keeps()
    await Trainer(model, seed=3).fit(shape([X, -X]), Y, 4, verbose=0)
    for batch in model.trained:
        first, second = batch.x
        assert (first == -second).all()
        assert batch.size == len(first)


@pytest.mark.asyncio
async def test_inputs_by_name_stay_together_with_their_targets() -> None:
    model = Keeps()
    await Trainer(model, seed=3).fit({"a": X, "b": 2 * X}, {"out": X}, 3, verbose=0)
    assert sorted(float(v) for batch in model.trained for v in batch.x["a"][:, 0]) == list(range(10))
    for batch in model.trained:
        assert (batch.x["b"] == 2 * batch.x["a"]).all()
        assert (batch.y["out"] == batch.x["a"]).all()


@pytest.mark.asyncio
async def test_two_fits_of_one_trainer_shuffle_alike_and_epochs_differ() -> None:
    orders = []
    for initial, epochs in [(0, 2), (0, 2), (1, 2)]:
        model = Keeps()
        await Trainer(model, seed=5).fit(X, Y, initial_epoch=initial, epochs=epochs, verbose=0)
        orders.append(rows(model.trained))
    assert orders[0] == orders[1]
    assert orders[0][:10] != orders[0][10:]
    assert orders[2] == orders[0][10:]  # an epoch's order does not depend on the epochs before it


@pytest.mark.asyncio
async def test_validation_comes_after_the_epochs_that_are_asked_for() -> None:
    recorder = Recorder()
    await Trainer(ScriptedModel()).fit(
        X, Y, epochs=3, validation_data=(X, Y), validation_freq=[1, 3], callbacks=recorder, verbose=0
    )
    ends = [event for event in recorder.events if event[0] in ("on_test_end", "on_epoch_end")]
    assert ends == [
        ("on_test_end",),
        ("on_epoch_end", 0),
        ("on_epoch_end", 1),
        ("on_test_end",),
        ("on_epoch_end", 2),
    ]


# ---------------------------------------------------------------- evaluate and predict


@pytest.mark.asyncio
async def test_an_evaluation_begins_and_ends_once_and_its_end_has_the_means() -> None:
    recorder = Recorder()
    model = ScriptedModel()
    model.steps = 3
    means = await Trainer(model).evaluate(X, Y, batch_size=4, callbacks=recorder)
    assert means == {"loss": 3.0}
    assert recorder.events == [
        ("on_test_begin",),
        ("on_test_batch_begin", 0),
        ("on_test_batch_end", 0),
        ("on_test_batch_begin", 1),
        ("on_test_batch_end", 1),
        ("on_test_batch_begin", 2),
        ("on_test_batch_end", 2),
        ("on_test_end",),
    ]
    assert recorder.logs[-1] == {"loss": 3.0}
    assert recorder.logs[-3:-1] == [{"batch": 2, "size": 2}, {"batch": 2, "size": 2, "loss": 3.0}]


@pytest.mark.asyncio
async def test_an_evaluation_takes_the_samples_as_they_are() -> None:
    model = Keeps()
    await Trainer(model).evaluate(X, Y, batch_size=4, sample_weight=np.arange(10.0))
    assert rows(model.tested) == list(range(10))
    assert weights(model.tested) == list(range(10))


@pytest.mark.asyncio
async def test_a_prediction_has_a_row_for_each_sample_and_its_own_events() -> None:
    seen: list[Any] = []

    class Notes(Callback):
        def on_predict_begin(self, logs: Any = None) -> None:
            seen.append("begin")

        def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
            seen.append((batch, dict(logs)))

        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append((batch, logs["outputs"].shape))

        def on_predict_end(self, logs: Any = None) -> None:
            seen.append("end")

    outputs = await Trainer(ScriptedModel()).predict(X[:5], batch_size=4, callbacks=Notes())
    assert outputs.shape == (5, 1)
    assert seen == [
        "begin",
        (0, {"batch": 0, "size": 4}),
        (0, (4, 1)),
        (1, {"batch": 1, "size": 1}),
        (1, (1, 1)),
        "end",
    ]


@pytest.mark.asyncio
async def test_a_prediction_of_several_outputs_has_each_of_them_in_their_structure() -> None:
    class Several(ScriptedModel):
        def predict_batch(self, batch: Any) -> Any:
            return {"pair": [batch.x, batch.x[:, 0]], "one": (batch.x + 1,)}

    outputs = await Trainer(Several()).predict(X[:5], batch_size=2)
    np.testing.assert_array_equal(outputs["pair"][0], X[:5])
    np.testing.assert_array_equal(outputs["pair"][1], X[:5, 0])
    np.testing.assert_array_equal(outputs["one"][0], X[:5] + 1)


@pytest.mark.asyncio
async def test_a_model_whose_logs_stand_for_the_pass_so_far_is_told_where_each_begins() -> None:
    class Accumulates(ScriptedModel):
        """Counts the samples that it has seen since a pass began."""

        seen = 0

        def begin_pass(self) -> None:
            begun.append(self.seen)
            self.seen = 0

        def train_batch(self, batch: Any, before_update: Any = None) -> dict[str, float]:
            self.seen += len(batch.x)
            return {"loss": float(self.seen)}

        def test_batch(self, batch: Any) -> dict[str, float]:
            return self.train_batch(batch)

    begun: list[int] = []
    trainer = Trainer(Accumulates())
    history = await trainer.fit(X[:5], batch_size=2, epochs=2, validation_data=(X[:3], None), verbose=0)
    assert begun == [0, 5, 3, 5]
    assert history.history == {"val_loss": [3.0, 3.0], "loss": [5.0, 5.0]}
    assert await trainer.evaluate(X[:4], batch_size=3) == {"loss": 4.0}


@pytest.mark.asyncio
async def test_steps_bound_evaluation_and_prediction() -> None:
    model = Keeps()
    await Trainer(model).evaluate(X, Y, batch_size=2, steps=2)
    assert rows(model.tested) == [0, 1, 2, 3]
    assert (await Trainer(model).predict(X, batch_size=2, steps=2)).shape == (4, 1)
    with pytest.raises(ValueError, match=r"^steps=6: at most 5, the batches that x gives with batch_size=2$"):
        await Trainer(model).evaluate(X, Y, batch_size=2, steps=6)


class Opens:
    """Batches, of which each pass opens something."""

    def __init__(self) -> None:
        self.open = 0

    def __iter__(self) -> Any:
        self.open += 1
        try:
            while True:
                yield X[:2], Y[:2]
        finally:
            self.open -= 1


@pytest.mark.asyncio
async def test_what_the_data_opened_is_closed_when_the_run_is_over_though_the_run_is_kept() -> None:
    trained, validated = Opens(), Opens()
    run = Trainer(ScriptedModel()).start(
        trained, steps_per_epoch=2, validation_data=validated, validation_steps=2, epochs=2, verbose=0
    )
    await run
    assert (trained.open, validated.open) == (0, 0)

    class Cancels(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert trained.open == 1
            self.run.cancel()

    cancelled = Trainer(ScriptedModel()).start(trained, steps_per_epoch=2, callbacks=Cancels(), verbose=0)
    with pytest.raises(RunCancelled):
        await cancelled
    assert trained.open == 0
