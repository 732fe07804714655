"""The state of estimators of scikit-learn: what comes back from a backup and a file, and what does not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from estimators import ESTIMATORS, LABELS, SMALL, by_hand, numbers
from interrupting import StopsAfter
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier

from asynccb import ArgumentError, FileRefused, ResumeRefused, Trainer
from asynccb.callbacks import BackupAndRestore
from asynccb.models import SklearnModel, adapt
from asynccb.models.plain import PlainState, read_plain
from asynccb.models.sklearn.state import PlainEstimator
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(params=sorted(ESTIMATORS))
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return ESTIMATORS[request.param]


@pytest.mark.asyncio
async def test_a_training_that_was_interrupted_goes_on_to_the_same_bits(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    words = {"MLPClassifier", "SGDClassifier"}
    estimator, again, whole = make(), make(), make()
    y = np.array([f"digit {label}" for label in LABELS]) if type(whole).__name__ in words else LABELS
    settings: dict[str, Any] = {"batch_size": 20, "epochs": 3, "verbose": 0}
    expected = await Trainer(whole, seed=2).fit(SMALL, y, **settings)
    backup = BackupAndRestore(tmp_path)
    await Trainer(estimator, seed=2).fit(SMALL, y, **settings, callbacks=[backup, StopsAfter(7)])
    assert numbers(estimator) != numbers(whole)
    history = await Trainer(again, seed=2).fit(SMALL, y, **settings, callbacks=BackupAndRestore(tmp_path))
    assert history.history == expected.history
    assert numbers(again) == numbers(whole)
    assert vars(again).keys() == vars(whole).keys()
    # And what that one has left behind is the end of the training, for a new estimator too.
    last = make()
    history = await Trainer(last, seed=2).fit(SMALL, y, **settings, callbacks=BackupAndRestore(tmp_path))
    assert history.history == expected.history
    assert numbers(last) == numbers(whole)


def test_what_attributes_share_is_shared_when_it_comes_back(tmp_path: Path) -> None:
    """``partial_fit`` would go on with one of two arrays, and predict with the other."""
    trained = by_hand(ESTIMATORS["SGDClassifier, averaged"](), SMALL, LABELS, seed=1, epochs=2, size=30)
    assert trained.coef_ is trained._average_coef
    adapt(trained).capture().save(tmp_path / "model.h5")
    model = SklearnModel(ESTIMATORS["SGDClassifier, averaged"]())
    model.load(tmp_path / "model.h5")
    assert model.estimator.coef_ is model.estimator._average_coef


def test_the_order_of_an_array_in_memory_comes_back(tmp_path: Path) -> None:
    trained = SGDRegressor(random_state=1).partial_fit(SMALL, LABELS)
    trained.extra_ = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    adapt(trained).capture().save(tmp_path / "model.h5")
    model = SklearnModel(SGDRegressor(random_state=1))
    model.load(tmp_path / "model.h5")
    assert model.estimator.extra_.flags.f_contiguous
    np.testing.assert_array_equal(model.estimator.extra_, trained.extra_)


@pytest.mark.asyncio
async def test_one_that_draws_from_the_random_numbers_of_the_process_cannot_go_on_exactly(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArgumentError, match=r"random_state=None: a number.*SGDClassifier\(\.\.\., random_st"):
        await Trainer(SGDClassifier()).fit(SMALL, LABELS, verbose=0, callbacks=BackupAndRestore(tmp_path))


@pytest.mark.asyncio
async def test_another_estimator_does_not_go_on_with_its_backup(tmp_path: Path) -> None:
    backup = {"verbose": 0, "callbacks": BackupAndRestore(tmp_path)}
    await Trainer(SGDClassifier(random_state=1), seed=1).fit(SMALL, LABELS, **backup)
    with pytest.raises(ResumeRefused, match=r"model\.parameters\.alpha: 0\.0001 there, 0\.5 here"):
        await Trainer(SGDClassifier(alpha=0.5, random_state=1), seed=1).fit(SMALL, LABELS, **backup)


# ---------------------------------------------------------------- files


def trained() -> Any:
    return MLPClassifier((4,), random_state=1).partial_fit(SMALL, LABELS, classes=np.unique(LABELS))


def test_a_pickle_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"end in \.h5"):
        adapt(trained()).capture().save(tmp_path / "model.pkl")


def test_weights_alone_leave_the_optimizer_as_it_is(tmp_path: Path) -> None:
    model, other = adapt(trained()), SklearnModel(trained())
    model.train_batch(Batch(SMALL, LABELS, None, len(SMALL)))
    model.capture().save(tmp_path / "model.weights.h5", weights_only=True)
    kept = copy.deepcopy(other.estimator._optimizer)
    other.load(tmp_path / "model.weights.h5")
    assert other.estimator.coefs_[0].tobytes() == model.user_model.coefs_[0].tobytes()
    assert other.estimator._optimizer.t == kept.t == 1
    assert list(model.capture().arrays)[-1] == "optimizer/vs/3"


def test_a_file_of_other_parameters_or_another_class_changes_nothing(tmp_path: Path) -> None:
    adapt(trained()).capture().save(tmp_path / "model.h5")
    for model, message in (
        (SklearnModel(MLPClassifier((4,), random_state=2)), "another random_state: 1"),
        (SklearnModel(GaussianNB()), "it holds no GaussianNB"),
    ):
        before = dict(vars(model.estimator))
        with pytest.raises(FileRefused, match=message):
            model.load(tmp_path / "model.h5")
        assert vars(model.estimator) == before


def _stream_at(place: int) -> dict[str, Any]:
    state = np.random.RandomState(0).get_state(legacy=False)
    state["state"]["pos"] = place
    return state


@pytest.mark.parametrize(
    "hostile",
    [
        {"is": "part", "name": "Popen", "state": {}},
        {"is": "part", "name": "../os", "state": {}},
        {"is": "pickle", "bytes": "gASVIAAA"},
        {"is": "listed", "kind": "M", "parts": ["1"], "shape": [1]},
        {"is": "listed", "kind": "U", "parts": ["1"], "shape": [1 << 40]},
        {"is": "random", "state": _stream_at(625)},
        {"is": "same", "as": 99},
        {"no": "kind"},
    ],
)
def test_a_file_makes_nothing_but_what_an_estimator_consists_of(hostile: Any, tmp_path: Path) -> None:
    estimator = trained()
    told = PlainEstimator(estimator).tell()
    told["fitted"]["_optimizer"] = hostile
    PlainState("MLPClassifier", told).save(tmp_path / "model.h5")
    before = dict(vars(estimator))
    with pytest.raises(FileRefused, match="its estimator is damaged"):
        SklearnModel(estimator).load(tmp_path / "model.h5")
    assert vars(estimator) == before


@pytest.mark.parametrize(
    ("name", "attribute", "array"),
    [
        ("SGDClassifier", "coef_", np.zeros((10, 63))),
        ("SGDClassifier", "intercept_", np.zeros(9)),
        ("SGDClassifier, averaged", "_standard_coef", np.zeros((9, 64))),
        ("SGDRegressor", "intercept_", np.zeros(0)),
        ("MiniBatchKMeans", "cluster_centers_", np.zeros((10, 63))),
        ("MiniBatchKMeans", "_counts", np.zeros(9)),
    ],
)
def test_arrays_that_compiled_loops_would_run_out_of_are_refused(
    name: str, attribute: str, array: Any, tmp_path: Path
) -> None:
    estimator = by_hand(ESTIMATORS[name](), SMALL, LABELS, seed=1, epochs=1, size=90)
    told = PlainEstimator(estimator).tell()
    assert attribute in told["fitted"]
    told["fitted"][attribute] = {"is": "array", "array": array, "fortran": False}
    PlainState(name, told).save(tmp_path / "model.h5")
    with pytest.raises(FileRefused, match=r"its estimator is damaged: .* (shape|length)"):
        SklearnModel(ESTIMATORS[name]()).load(tmp_path / "model.h5")


@pytest.mark.parametrize("threads", [-5, 0, 100_000, "1", None, np.ones(2)])
def test_threads_that_openmp_would_end_the_process_over_are_refused(threads: Any, tmp_path: Path) -> None:
    told = PlainEstimator(ESTIMATORS["MiniBatchKMeans"]().partial_fit(SMALL)).tell()
    assert told["fitted"]["_n_threads"] >= 1
    told["fitted"]["_n_threads"] = {"is": "array", "array": threads, "fortran": False}
    if not isinstance(threads, np.ndarray):
        told["fitted"]["_n_threads"] = threads
    PlainState("MiniBatchKMeans", told).save(tmp_path / "model.h5")
    with pytest.raises(FileRefused, match="its estimator is damaged"):
        SklearnModel(ESTIMATORS["MiniBatchKMeans"]()).load(tmp_path / "model.h5")


def test_what_is_not_plain_data_is_named(tmp_path: Path) -> None:
    estimator = trained()
    estimator.log_ = {"file": object()}
    state = adapt(estimator).capture()
    with pytest.raises(ArgumentError, match=r"its log_ is of type builtins\.object"):
        state.save(tmp_path / "model.h5")
    with pytest.raises(ArgumentError, match="its log_ is of type"):
        adapt(estimator).fingerprint()
    assert state.to_model().log_["file"] is not estimator.log_["file"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_data_alone(tmp_path: Path) -> None:
    adapt(trained()).capture().save(tmp_path / "model.h5")
    told = read_plain(str(tmp_path / "model.h5"), lambda extra: None)
    assert told["class"] == "sklearn.neural_network._multilayer_perceptron.MLPClassifier"
    assert told["parameters"]["hidden_layer_sizes"] == {"is": "tuple", "parts": [4]}
