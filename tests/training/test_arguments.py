"""What ``fit`` refuses before the first batch, and the words in which it does."""

from __future__ import annotations

import datetime
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, Trainer
from asynccb.models import Activation, Dense, Sequential
from asynccb.testing import ScriptedModel
from asynccb.training.arguments import check_count, check_fit, every, recognise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

X, Y = np.zeros((6, 2)), np.zeros((6, 1))


def ask(x: Any = X, y: Any = Y, **given: Any) -> Any:
    """Checks the arguments of a fit, the defaults where nothing is given."""
    asked = {
        "batch_size": None,
        "epochs": 1,
        "verbose": 0,
        "validation_split": 0.0,
        "validation_data": None,
        "shuffle": True,
        "class_weight": None,
        "sample_weight": None,
        "initial_epoch": 0,
        "steps_per_epoch": None,
        "validation_steps": None,
        "validation_batch_size": None,
        "validation_freq": 1,
        "stop_after": None,
    }
    return check_fit(x, y, **(asked | given))


async def batches() -> AsyncIterator[Any]:
    yield X


def generator() -> Any:
    yield X


WHOLE = "a whole number of at least"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": -1}, f"epochs=-1: {WHOLE} 0"),
        ({"epochs": 2.0}, f"epochs=2.0: {WHOLE} 0"),
        ({"epochs": True}, f"epochs=True: {WHOLE} 0"),
        ({"epochs": "3"}, f"epochs='3': {WHOLE} 0"),
        ({"epochs": None}, f"epochs=None: {WHOLE} 0"),
        ({"batch_size": 0}, f"batch_size=0: {WHOLE} 1, or None"),
        ({"batch_size": 1.5}, f"batch_size=1.5: {WHOLE} 1, or None"),
        ({"initial_epoch": -1}, f"initial_epoch=-1: {WHOLE} 0"),
        (
            {"initial_epoch": 3, "epochs": 2},
            "initial_epoch=3: at most epochs=2. epochs is the index of the end, not a count",
        ),
        ({"steps_per_epoch": 0}, f"steps_per_epoch=0: {WHOLE} 1, or None"),
        ({"validation_steps": 0}, f"validation_steps=0: {WHOLE} 1, or None"),
        ({"validation_batch_size": -3}, f"validation_batch_size=-3: {WHOLE} 1, or None"),
        ({"validation_freq": 0}, f"validation_freq=0: {WHOLE} 1"),
        ({"validation_freq": [1, 0]}, f"validation_freq=0: {WHOLE} 1"),
        ({"verbose": 3}, "verbose=3: one of 'auto', 0, 1, 2, True, False"),
        ({"verbose": "loud"}, "verbose='loud': one of 'auto', 0, 1, 2, True, False"),
        ({"shuffle": "yes"}, "shuffle='yes': one of True, False, 'batch'"),
        ({"validation_split": 1.0}, "validation_split=1.0: a number from 0 up to, not including, 1"),
        ({"validation_split": -0.1}, "validation_split=-0.1: a number from 0 up to, not including, 1"),
        ({"validation_split": float("nan")}, "validation_split=nan: a number from 0 up to, not including, 1"),
        ({"validation_split": "0.2"}, "validation_split='0.2': a number from 0 up to, not including, 1"),
        (
            {"x": [(X, Y)], "y": None, "validation_split": 0.5},
            "validation_split=0.5: 0 for anything but arrays. Give validation_data instead",
        ),
        (
            {"validation_data": (X,)},
            "validation_data=a tuple of 1: (x, y) or (x, y, sample_weight)",
        ),
        (
            {"validation_data": 3},
            "validation_data=3: arrays, an iterable of batches, or an async iterable of batches",
        ),
        (
            {"class_weight": [1, 2]},
            "class_weight=[1, 2]: a dict from class index (int) to weight (float), or None",
        ),
        (
            {"class_weight": {"cat": 1.0}},
            "class_weight={'cat': 1.0}: a dict from class index (int) to weight (float), or None",
        ),
        ({"stop_after": 3}, "stop_after=3: a positive datetime.timedelta, or None"),
        (
            {"stop_after": datetime.timedelta(0)},
            "stop_after=datetime.timedelta(0): a positive datetime.timedelta, or None",
        ),
        ({"x": None, "y": None}, "x=None: arrays, an iterable of batches, or an async iterable of batches"),
        (
            {"x": "text", "y": None},
            "x='text': arrays, an iterable of batches, or an async iterable of batches",
        ),
        ({"x": []}, "x=[]: data with at least one sample"),
        (
            {"x": generator()},
            "y=<class 'numpy.ndarray'>: None where x yields whole batches",
        ),
        (
            {"x": generator(), "y": None, "sample_weight": np.ones(6)},
            "sample_weight=<class 'numpy.ndarray'>: None where x yields whole batches",
        ),
        (
            {"x": generator(), "y": None, "epochs": 2},
            "x=generator, which can be iterated once: something that can be iterated for each of 2 epochs. "
            "Give steps_per_epoch, or an object whose __iter__ (or __aiter__) starts anew",
        ),
        (
            {"validation_data": generator(), "epochs": 2},
            "validation_data=generator, which can be iterated once: something that can be iterated for "
            "each of 2 epochs. Give validation_steps, or an object whose __iter__ (or __aiter__) starts anew",
        ),
    ],
)
def test_what_can_be_seen_at_once_is_refused_in_the_callers_frame(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ask(**given)
    assert str(caught.value) == said
    assert isinstance(caught.value, ValueError)


def fit(x: Any = X, y: Any = Y, model: Any = None, **given: Any) -> Callable[[], Any]:
    """A fit whose error is known on the training thread; the callback would see any hook that was called."""

    async def run() -> Any:
        hooks: list[str] = []

        class Any_(Callback):
            def on_train_begin(self, logs: Any = None) -> None:
                hooks.append("on_train_begin")

        try:
            return await Trainer(model or ScriptedModel()).fit(x, y, verbose=0, callbacks=[Any_()], **given)
        finally:
            assert hooks == []

    return run


def classifier() -> Sequential:
    made = Sequential([Dense(3, input_dim=2), Activation("softmax")], seed=1)
    made.compile(optimizer="sgd", loss="categorical_crossentropy")
    return made


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (fit(np.zeros((0, 2)), np.zeros((0, 1))), "x=no samples: data with at least one sample"),
        (fit({}, None), "x=no samples: data with at least one sample"),
        (
            fit(X, np.zeros((5, 1))),
            "x=samples: x has 6, y has 5: the same number of samples in all arrays",
        ),
        (
            fit((X, X[:4]), Y),
            "x=samples: x has 6, x has 4, y has 6: the same number of samples in all arrays",
        ),
        (
            fit(sample_weight=np.ones(4)),
            "x=samples: x has 6, y has 6, sample_weight has 4: the same number of samples in all arrays",
        ),
        (
            fit(sample_weight=["a"] * 6),
            "sample_weight=['a', 'a', 'a', 'a', 'a', 'a']: one number for each sample, or None",
        ),
        (fit(np.array(3.0), None), "x=array(3.): an array with the samples on its first axis"),
        (
            fit(validation_data=(X, Y[:2])),
            "validation_data=samples: validation_data has 6, y of validation_data has 2: "
            "the same number of samples in all arrays",
        ),
        (
            fit(steps_per_epoch=4, batch_size=2),
            "steps_per_epoch=4: at most 3, the batches that x gives with batch_size=2",
        ),
        (
            fit(validation_data=(X, Y), validation_steps=4, validation_batch_size=2),
            "validation_steps=4: at most 3, the batches that validation_data gives with batch_size=2",
        ),
        (
            fit(validation_split=0.5, validation_steps=4, batch_size=3),
            "validation_steps=4: at most 1, the batches that validation_split gives with batch_size=3",
        ),
        (
            fit(validation_split=0.9),
            "validation_split=0.9: a part of 6 samples that leaves some on either side",
        ),
        (
            fit(X, None, class_weight={0: 1.0}),
            "class_weight={0: 1.0}: None unless y is one array of labels or one-hot rows",
        ),
    ],
)
async def test_what_takes_a_look_at_the_data_is_refused_before_any_hook(run: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        await run()
    assert str(caught.value) == said


@pytest.mark.asyncio
async def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^x=.*inhomogeneous.*: rows of equal length$"):
        await fit([[1.0], [1.0, 2.0]], [0.0, 1.0])()


@pytest.mark.asyncio
async def test_shapes_that_the_model_can_never_take_are_refused_by_argument() -> None:
    with pytest.raises(ArgumentError, match=r"^x="):
        await fit(np.zeros((6, 5)), np.zeros((6, 3)), classifier())()
    with pytest.raises(ArgumentError, match=r"^y="):
        await fit(np.zeros((6, 2)), np.zeros((6, 4)), classifier())()
    with pytest.raises(ArgumentError, match=r"^validation_data|^y of validation_data"):
        await fit(
            np.zeros((6, 2)),
            np.zeros((6, 3)),
            classifier(),
            validation_data=(np.zeros((6, 5)), np.zeros((6, 3))),
        )()


@pytest.mark.asyncio
async def test_a_model_that_is_not_compiled_is_refused() -> None:
    model = Sequential([Dense(3, input_dim=2)])
    for run in (fit(model=model), lambda: Trainer(model).evaluate(X, Y)):
        with pytest.raises(ArgumentError, match=r"is not compiled. For example model.compile"):
            await run()


@pytest.mark.asyncio
async def test_a_model_that_cannot_test_is_refused_before_it_trains_an_epoch_for_nothing() -> None:
    class Bare:
        steps = 0

        def train_batch(self, batch: Any) -> dict[str, float]:
            self.steps += 1
            return {"loss": 1.0}

    model = Bare()
    for given in ({"validation_data": (X, Y)}, {"validation_split": 0.5}):
        with pytest.raises(ArgumentError, match="test_batch is needed to validate and to evaluate"):
            await fit(model=model, **given)()
    with pytest.raises(ArgumentError, match="test_batch is needed to validate and to evaluate"):
        await Trainer(model).evaluate(X, Y)
    assert model.steps == 0


@pytest.mark.asyncio
async def test_nan_in_x_is_allowed_and_said() -> None:
    x = X.copy()
    x[4, 1] = np.nan
    with pytest.warns(
        UserWarning, match="x holds NaN: the loss will be NaN from the first batch that sees it"
    ):
        history = await Trainer(ScriptedModel()).fit(x, Y, verbose=0)
    assert history.outcome == "completed"


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [-1, 1.5, "7", True])
async def test_a_seed_is_a_whole_number_from_0_on(seed: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^seed=.*: a whole number of at least 0"):
        Trainer(ScriptedModel(), seed=seed)


@pytest.mark.asyncio
async def test_callbacks_are_instances_and_each_is_there_once() -> None:
    callback = Callback()
    for callbacks, said in [
        (
            Callback,
            r"callbacks=<class .*Callback'>: instances of Callback, not classes. Write Callback\(...\)",
        ),
        (
            [Callback],
            r"callbacks=<class .*Callback'>: instances of Callback, not classes. Write Callback\(...\)",
        ),
        (3, "callbacks=3: a Callback or a list of them"),
        ([callback, callback], "callbacks=<.*>: each instance once. Make a second instance"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            Trainer(ScriptedModel()).start(X, callbacks=callbacks)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_refused_fit_leaves_model_and_callbacks_free() -> None:
    callback, trainer = Callback(), Trainer(ScriptedModel())
    for given in ({"epochs": -1}, {"y": Y[:2]}, {"replay": 0}):
        with pytest.raises(ArgumentError):
            await trainer.fit(X, verbose=0, callbacks=[callback], **given)
    assert (await trainer.fit(X, verbose=0, callbacks=[callback])).outcome == "completed"


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_other_kinds_are_whole_numbers(value: Any) -> None:
    assert check_count("epochs", value, least=1) == 3


def test_the_defaults_are_keras() -> None:
    asked = ask(verbose="auto")
    assert (asked.data.batch_size, asked.epochs, asked.initial_epoch, asked.verbose) == (32, 1, 0, 1)
    assert (asked.data.shuffle, asked.validation, asked.validation_split) == (True, None, 0.0)


def test_validation_data_goes_before_a_split() -> None:
    asked = ask(validation_data=(X, Y), validation_split=0.5, validation_batch_size=2, validation_steps=1)
    assert (asked.validation_split, asked.validation.batch_size, asked.validation.steps) == (0.0, 2, 1)


@pytest.mark.parametrize(
    ("frequency", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), ([1, 5], [0, 4]), ((2,), [1]), ([], [])]
)
def test_validation_freq_is_every_nth_epoch_or_a_list_of_them_counted_from_1(
    frequency: Any, epochs: list[int]
) -> None:
    due = every(frequency, 5)
    assert [epoch for epoch in range(5) if epoch in due] == epochs


@pytest.mark.parametrize(
    ("x", "y", "kind"),
    [
        (X, Y, "arrays"),
        (X, None, "arrays"),
        ([[1.0, 2.0], [3.0, 4.0]], [0, 1], "arrays"),
        ((X, X), Y, "arrays"),
        ([X, X], Y, "arrays"),
        ({"a": X}, Y, "arrays"),
        ([(X, Y), (X, Y)], None, "iterable"),
        (range(3), None, "iterable"),
        (batches(), None, "async"),
    ],
)
def test_data_is_recognised_by_its_shape(x: Any, y: Any, kind: str) -> None:
    assert recognise("x", x, y, None, batch_size=2, steps=None).kind == kind


def test_the_data_itself_is_not_touched() -> None:
    x, y, weights = X.copy(), Y.copy(), np.ones(6)
    for array in (x, y, weights):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ask(x, y, sample_weight=weights, class_weight={0: 2.0}).data
    assert data.x is x
    assert data.y is y
    assert (weights == 1).all()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
async def test_a_split_may_be_a_number_of_numpy_too(kind: Any) -> None:
    history = await Trainer(ScriptedModel()).fit(
        np.zeros((4, 1)), validation_split=kind(0.25), batch_size=1, verbose=0
    )
    assert history.history["val_loss"] == [3.0]
