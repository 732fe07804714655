"""Estimators of scikit-learn in a training: as by hand, their classes, their logs, and what comes back."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from estimators import ESTIMATORS, LABELS, SMALL, X, Y, by_hand, numbers
from interrupting import StopsAfter
from sklearn import config_context, get_config, metrics
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from asynccb import ArgumentError, Callback, ModelBusy, Trainer
from asynccb.callbacks import EarlyStopping, ModelCheckpoint, TensorBoard
from asynccb.models import SklearnModel, adapt
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(params=sorted(ESTIMATORS))
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return ESTIMATORS[request.param]


# ---------------------------------------------------------------- as by hand


@pytest.mark.asyncio
async def test_three_epochs_of_the_digits_give_the_bits_of_a_loop_by_hand(make: Callable[[], Any]) -> None:
    estimator = make()
    await Trainer(estimator, seed=4).fit(X, Y, batch_size=256, epochs=3, verbose=0)
    ours = numbers(estimator)
    assert ours
    assert ours == numbers(by_hand(make(), X, Y, seed=4, epochs=3, size=256))


@pytest.mark.asyncio
async def test_another_order_of_the_data_would_be_seen() -> None:
    estimator = ESTIMATORS["SGDClassifier"]()
    await Trainer(estimator, seed=4).fit(X, Y, batch_size=128, verbose=0)
    other = by_hand(ESTIMATORS["SGDClassifier"](), X, Y, seed=5, epochs=1, size=128)
    assert numbers(estimator) != numbers(other)


@pytest.mark.asyncio
async def test_several_trainings_at_the_same_time_give_the_bits_of_each_alone() -> None:
    kinds = ["SGDClassifier", "MLPClassifier", "MiniBatchKMeans"]
    estimators = [ESTIMATORS[kind]() for kind in kinds]
    await asyncio.gather(
        *(Trainer(estimator, seed=4).fit(X, Y, batch_size=128, verbose=0) for estimator in estimators)
    )
    for kind, estimator in zip(kinds, estimators, strict=True):
        alone = by_hand(ESTIMATORS[kind](), X, Y, seed=4, epochs=1, size=128)
        assert numbers(estimator) == numbers(alone), kind


@pytest.mark.asyncio
async def test_what_callbacks_see_as_the_model_is_the_estimator_or_what_was_given_around_it() -> None:
    class Looks(Callback):
        def on_train_end(self, logs: Any = None) -> None:
            seen.append(self.model)

    seen: list[Any] = []
    estimator = GaussianNB()
    wrapped = SklearnModel(GaussianNB())
    for given in (estimator, wrapped):
        await Trainer(given).fit(SMALL, LABELS, verbose=0, callbacks=Looks())
    assert seen == [estimator, wrapped]


# ---------------------------------------------------------------- logs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MultinomialNB", lambda e, x, y: metrics.log_loss(y, e.predict_proba(x), labels=e.classes_)),
        ("MLPClassifier", lambda e, x, y: metrics.log_loss(y, e.predict_proba(x), labels=e.classes_)),
        ("Perceptron", lambda e, x, y: metrics.hinge_loss(y, e.decision_function(x), labels=e.classes_)),
        ("SGDRegressor", lambda e, x, y: metrics.mean_squared_error(y, e.predict(x))),
        ("MiniBatchKMeans", lambda e, x, y: -e.score(x) / len(x)),
    ],
)
def test_the_loss_is_that_of_scikit_learn_itself(name: str, expected: Any) -> None:
    model = adapt(by_hand(ESTIMATORS[name](), X, Y, seed=1, epochs=1, size=200))
    logs = model.test_batch(Batch(SMALL, LABELS, None, len(SMALL)))
    assert logs["loss"] == pytest.approx(expected(model.user_model, SMALL, LABELS), rel=1e-9)
    assert list(logs) == list(model.metrics_names)


def test_the_hinge_loss_of_two_classes_is_that_of_scikit_learn_too() -> None:
    two = LABELS > 4
    estimator = SGDClassifier(random_state=1).partial_fit(SMALL, two, classes=[False, True])
    logs = adapt(estimator).test_batch(Batch(SMALL, two, None, len(SMALL)))
    assert logs["loss"] == pytest.approx(metrics.hinge_loss(two, estimator.decision_function(SMALL)))


@pytest.mark.asyncio
async def test_the_means_over_batches_are_those_of_all_samples() -> None:
    """Batches of unequal size, so that a mean of their means would be another number."""
    classifier = MultinomialNB().fit(X, Y)
    means = await Trainer(classifier).evaluate(SMALL, LABELS, batch_size=40)
    assert means["accuracy"] == pytest.approx(classifier.score(SMALL, LABELS))
    regressor = SGDRegressor(random_state=0).fit(X, Y)
    means = await Trainer(regressor).evaluate(SMALL, LABELS, batch_size=40)
    assert means["mae"] == pytest.approx(metrics.mean_absolute_error(LABELS, regressor.predict(SMALL)))


@pytest.mark.asyncio
async def test_the_loss_of_a_perceptron_that_regresses_is_comparable_with_that_of_its_validation() -> None:
    """Its own ``loss_`` is half the squared error."""
    estimator = MLPRegressor(hidden_layer_sizes=(4,), alpha=0, random_state=1)
    data = {"batch_size": len(SMALL), "validation_data": (SMALL, LABELS), "verbose": 0}
    history = await Trainer(estimator).fit(SMALL, LABELS, **data)
    assert history.history["loss"] == pytest.approx(history.history["val_loss"])
    assert estimator.loss_ < 0.6 * history.history["loss"][0]


@pytest.mark.parametrize("name", ["MultinomialNB", "Perceptron"])
@pytest.mark.parametrize("label", [3, 99])
def test_a_label_that_is_none_of_the_classes_is_measured_as_none_of_them(name: str, label: int) -> None:
    even = ESTIMATORS[name]().partial_fit(SMALL, LABELS * 2, classes=np.arange(0, 20, 2))
    with pytest.raises(ArgumentError, match=f"y=the label {label}: labels out of"):
        adapt(even).test_batch(Batch(SMALL[:2], np.array([2, label]), None, 2))
    with pytest.raises(ArgumentError, match="y=None: one target for each sample"):
        adapt(even).test_batch(Batch(SMALL[:2], None, None, 2))


def test_an_estimator_that_tells_its_loss_is_believed() -> None:
    model = adapt(MLPClassifier((8,), random_state=1).partial_fit(SMALL, LABELS, classes=np.unique(Y)))
    logs = model.train_batch(Batch(SMALL, LABELS, None, len(SMALL)))
    assert logs["loss"] == model.user_model.loss_
    assert logs["accuracy"] == model.user_model.score(SMALL, LABELS)


def test_weights_of_samples_are_given_to_partial_fit_and_weigh_the_loss() -> None:
    weight = np.linspace(0, 2, len(SMALL))
    ours = adapt(SGDRegressor(random_state=1))
    theirs = SGDRegressor(random_state=1).partial_fit(SMALL, LABELS, sample_weight=weight)
    logs = ours.train_batch(Batch(SMALL, LABELS, weight, len(SMALL)))
    assert numbers(ours.user_model) == numbers(theirs)
    assert logs["loss"] == pytest.approx((weight * (theirs.predict(SMALL) - LABELS) ** 2).mean())


def test_it_knows_which_way_its_metrics_go() -> None:
    model = adapt(GaussianNB())
    assert [model.direction(name) for name in ("loss", "val_accuracy", "mae", "lr")] == [
        *("min", "max", "min", None)
    ]


# ---------------------------------------------------------------- classes


@pytest.mark.asyncio
async def test_the_classes_are_those_of_all_labels_and_not_of_the_first_batch() -> None:
    order = np.argsort(LABELS, kind="stable")
    estimator = MultinomialNB()
    await Trainer(estimator).fit(SMALL[order], LABELS[order], batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_array_equal(estimator.classes_, np.arange(10))
    with pytest.raises(ValueError, match="classes must be passed"):
        MultinomialNB().partial_fit(SMALL[order][:4], LABELS[order][:4])


@pytest.mark.asyncio
async def test_labels_may_be_words() -> None:
    words = np.array(["even", "odd"])[LABELS % 2]
    estimator = SGDClassifier(random_state=1)
    history = await Trainer(estimator).fit(SMALL, words, epochs=2, validation_data=(SMALL, words), verbose=0)
    assert list(estimator.classes_) == ["even", "odd"]
    assert history.history["val_accuracy"][-1] == estimator.score(SMALL, words)


@pytest.mark.asyncio
async def test_of_data_in_batches_the_classes_must_be_told() -> None:
    data = [(SMALL[:40], LABELS[:40]), (SMALL[40:], LABELS[40:])]
    with pytest.raises(ArgumentError, match=r"SklearnModel\(GaussianNB\(\.\.\.\), classes=\[\.\.\.\]\)"):
        await Trainer(GaussianNB()).fit(data, verbose=0)
    model = SklearnModel(GaussianNB(), classes=range(12))
    await Trainer(model).fit(data, verbose=0)
    assert len(model.estimator.classes_) == 12


@pytest.mark.asyncio
async def test_a_label_that_the_training_data_has_not_is_refused_before_the_first_batch() -> None:
    estimator, few = GaussianNB(), LABELS < 9
    with pytest.raises(ArgumentError, match="y of validation_data=the label 9: labels out of"):
        await Trainer(estimator).fit(SMALL[few], LABELS[few], validation_data=(SMALL, LABELS), verbose=0)
    assert not hasattr(estimator, "classes_")
    # What was found in data that trained nothing does not bind the next training.
    await Trainer(estimator).fit(SMALL, LABELS, verbose=0)
    assert len(estimator.classes_) == 10


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (LogisticRegression(), "partial_fit is needed to train batch by batch. These have it: SGDClassifier"),
        (MLPClassifier(solver="lbfgs"), r"partial_fit is needed .* \(.*stochastic.*\)"),
        (StandardScaler(), "a classifier, a regressor, or a clusterer"),
    ],
)
def test_an_estimator_that_cannot_be_trained_in_batches_is_refused(estimator: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Trainer(estimator)


class TakesNoWeight(GaussianNB):
    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Any:
        return super().partial_fit(X, y, classes=classes)


@pytest.mark.parametrize(
    ("estimator", "data", "message"),
    [
        (GaussianNB(), {"y": np.eye(10)[LABELS]}, r"y=shape \(90, 10\): one label.*y.argmax\(axis=1\)"),
        (GaussianNB(), {"y": LABELS[:, None]}, r"y=shape \(90, 1\): one label for each sample. y.ravel\(\)"),
        (GaussianNB(), {}, "y=None: one target for each sample"),
        (GaussianNB(), {"x": SMALL.reshape(90, 8, 8), "y": LABELS}, r"x=shape \(90, 8, 8\): one array"),
        (GaussianNB(), {"x": [SMALL, SMALL], "y": LABELS}, "one array of shape"),
        (GaussianNB(), {"x": SMALL.astype(str), "y": LABELS}, "x=an array of dtype <U32: numbers or bools"),
        (SGDRegressor(), {"y": LABELS.astype(str)}, "y=an array of dtype <U21: numbers or bools. Encode it"),
        (TakesNoWeight(), {"y": LABELS, "sample_weight": np.ones(90)}, "TakesNoWeight takes no weights"),
    ],
)
@pytest.mark.asyncio
async def test_data_that_it_can_never_take_is_refused(estimator: Any, data: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        await Trainer(estimator).fit(**{"x": SMALL, **data}, verbose=0)


def test_classes_of_what_has_none_are_refused() -> None:
    with pytest.raises(ArgumentError, match="None for SGDRegressor, which has none"):
        SklearnModel(SGDRegressor(), classes=[1, 2])


@pytest.mark.parametrize("classes", [10, [], np.eye(2)])
def test_classes_that_are_no_list_of_labels_are_refused(classes: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"(?s)classes=.*: all labels, as a list. For example range\(10\)"
    ):
        SklearnModel(GaussianNB(), classes=classes)


@pytest.mark.asyncio
async def test_an_estimator_trains_in_one_run_at_a_time_whatever_is_around_it() -> None:
    estimator = GaussianNB()
    first = Trainer(estimator).start(SMALL, LABELS, verbose=0)
    with pytest.raises(ModelBusy):
        await Trainer(SklearnModel(estimator)).fit(SMALL, LABELS, verbose=0)
    await first
    await Trainer(SklearnModel(estimator)).fit(SMALL, LABELS, verbose=0)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'asynccb\[sklearn\]'"):
        SklearnModel(object())


# ---------------------------------------------------------------- callbacks


@pytest.mark.asyncio
async def test_a_checkpoint_of_the_best_epoch_can_be_loaded(tmp_path: Path) -> None:
    path, fitted = tmp_path / "best.h5", SGDClassifier(random_state=1)
    best = ModelCheckpoint(path, monitor="val_accuracy", save_best_only=True)
    history = await Trainer(fitted, seed=1).fit(
        SMALL, LABELS, batch_size=10, epochs=4, validation_data=(X, Y), verbose=0, callbacks=best
    )
    model = SklearnModel(SGDClassifier(random_state=1))
    model.load(path)
    assert model.estimator.score(X, Y) == pytest.approx(max(history.history["val_accuracy"]))


@pytest.mark.asyncio
async def test_its_arrays_have_histograms(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, histogram_freq=1)
    with pytest.warns(RuntimeWarning, match="histograms of weights only"):
        await Trainer(MLPClassifier((4,), random_state=1)).fit(SMALL, LABELS, verbose=0, callbacks=board)
    (file,) = tmp_path.rglob("*tfevents*")
    assert b"coefs_/0" in file.read_bytes()


@pytest.mark.asyncio
async def test_the_best_weights_can_be_put_back() -> None:
    model = SklearnModel(SGDClassifier(random_state=1))
    stop = EarlyStopping(monitor="val_accuracy", mode="max", patience=2, restore_best_weights=True)
    history = await Trainer(model, seed=1).fit(
        SMALL, LABELS, batch_size=10, epochs=30, validation_data=(X, Y), verbose=0, callbacks=stop
    )
    assert history.history["val_accuracy"][-1] < max(history.history["val_accuracy"])
    assert model.estimator.score(X, Y) == pytest.approx(max(history.history["val_accuracy"]))


@pytest.mark.asyncio
async def test_the_best_weights_can_be_put_back_in_the_middle_of_an_epoch() -> None:
    """The clusters of a batch have its size; they are no weights."""

    class Worsens(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["loss"] = float(epoch)

    model = SklearnModel(MiniBatchKMeans(3, n_init=1, random_state=1))
    best = EarlyStopping(monitor="loss", restore_best_weights=True)
    settings: dict[str, Any] = {"batch_size": 40, "verbose": 0}
    # An epoch ends with a batch of 10 rows; the training with one of 40.
    await Trainer(model, seed=1).fit(SMALL, epochs=9, callbacks=[Worsens(), best, StopsAfter(4)], **settings)
    first = SklearnModel(MiniBatchKMeans(3, n_init=1, random_state=1))
    await Trainer(first, seed=1).fit(SMALL, **settings)
    for mine, wanted in zip(model.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.asyncio
async def test_whose_weights_a_callback_cannot_put_back_is_told_what_has_them() -> None:
    best = EarlyStopping(monitor="loss", restore_best_weights=True)
    with pytest.raises(ArgumentError, match=r"needs get_weights. Give Trainer SklearnModel\(estimator\)"):
        await Trainer(GaussianNB()).fit(SMALL, LABELS, verbose=0, callbacks=best)


def test_the_classes_are_no_weights() -> None:
    """Averaged and put back, the class 3 would become 2."""
    for kind in (int, float):
        labels, classes = LABELS.astype(kind), np.arange(10, dtype=kind)
        fitted = SGDClassifier(random_state=1).partial_fit(SMALL, labels, classes)
        model = SklearnModel(fitted)
        model.set_weights([0.999 * array for array in model.get_weights()])
        np.testing.assert_array_equal(fitted.classes_, np.arange(10))


def test_weights_of_another_shape_overwrite_nothing() -> None:
    model = SklearnModel(GaussianNB().fit(SMALL, LABELS))
    before = model.get_weights()
    with pytest.raises(ValueError, match="has the shape"):
        model.set_weights([*before[:-1], np.zeros(3)])
    with pytest.raises(ValueError, match="zip"):
        model.set_weights(before[:-1])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.asyncio
async def test_the_thread_is_set_as_the_thread_that_made_the_model() -> None:
    class Looks(GaussianNB):
        def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Any:
            seen.append(get_config()["assume_finite"])
            return super().partial_fit(X, y, classes=classes)

    seen: list[bool] = []
    for finite in (True, False):
        with config_context(assume_finite=finite):
            await Trainer(Looks()).fit(SMALL, LABELS, batch_size=90, verbose=0)
    assert seen == [True, False]
