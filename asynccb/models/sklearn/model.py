"""scikit-learn: estimators that learn batch by batch, by ``partial_fit``."""

from __future__ import annotations

import copy
import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, FileRefused, in_words
from asynccb.models.files import check_extension
from asynccb.models.sklearn.losses import losses_of
from asynccb.models.sklearn.state import EstimatorState, PlainEstimator, arrays_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.protocols import Batch, Gate

LEARNERS = (
    "SGDClassifier, SGDRegressor, Perceptron, MLPClassifier, MLPRegressor, MiniBatchKMeans, MultinomialNB, "
    "BernoulliNB, CategoricalNB, ComplementNB, GaussianNB"
)


def adapt(estimator: Any) -> SklearnModel:
    """The model around an estimator; callbacks see the estimator itself.

    Raises:
        ArgumentError: it cannot learn batch by batch.
    """
    model = SklearnModel(estimator)
    model.user_model = estimator
    return model


class SklearnModel:
    """An estimator with ``partial_fit``, as a model: one call of it is one batch.

    ``Trainer`` takes estimators as they are; this is for what it cannot know: the classes of data that comes
    in batches. Of arrays they are found in ``y``, the whole of it.

    Logs, means over the samples of a batch; the loss is weighted by ``sample_weight``, the others are not:

    ============  ========================================================================================
    classifiers   ``loss``: the log loss, or where there is no ``predict_proba`` the hinge loss; ``accuracy``
    regressors    ``loss``: the squared error; ``mae``: the absolute error. (``r2`` is no mean of batches.)
    clusterers    ``loss``: the squared distance to the nearest centre, which is the inertia of a sample
    ============  ========================================================================================

    A trained batch is measured behind its update, because an estimator cannot predict before its first. A
    classifier that tells its own ``loss_`` (the multi-layer perceptron) gives that, which is of the moment
    before it, and includes the penalty on weights.

    Beside the rest of ``Model`` it has ``get_weights`` and ``set_weights``, as callbacks ask for them.

    Args:
        estimator: a classifier, a regressor, or a clusterer with ``cluster_centers_``.
        classes: all classes that there will be, for a classifier whose data comes in batches.

    Attributes:
        estimator: it.
        also_trains: what nobody else may train meanwhile.

    Raises:
        ArgumentError: it has no ``partial_fit``, or it is not known how to measure it.
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, estimator: Any, *, classes: Any = None) -> None:
        try:
            from sklearn import get_config
        except ImportError as missing:
            raise ImportError("SklearnModel needs scikit-learn: pip install 'asynccb[sklearn]'") from missing

        partial_fit = _partial_fit(estimator)
        self.user_model: Any = self
        self.stop_training = False
        self.estimator = estimator
        self.also_trains = (estimator,)
        self._losses = losses_of(estimator)
        takes = inspect.signature(partial_fit).parameters
        self._takes_classes, self._takes_weight = "classes" in takes, "sample_weight" in takes
        self._classes: Array | None = None
        if classes is not None:
            if not self._takes_classes:
                raise ArgumentError("classes", classes, f"None for {_name(estimator)}, which has none")
            self._classes = np.unique(np.asarray(classes))
            if np.ndim(classes) != 1 or not len(self._classes):
                raise ArgumentError("classes", classes, "all labels, as a list", "For example range(10)")
        self._told = classes is not None
        self._config = get_config()  # of the caller's thread

    @property
    def metrics_names(self) -> Sequence[str]:
        return self._losses.names

    def check_ready(self, *, training: bool) -> None:
        """An estimator that is not fitted is ready: its first batch makes it."""

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses what the estimator can never take, and finds the classes in the training data's ``y``.

        Raises:
            ArgumentError: words, no ``y``, rows of it, a class that the training data has not, several
                inputs, or weights that the estimator does not take.
        """
        if not isinstance(x, np.ndarray) or x.ndim != 2:
            shape = in_words(f"shape {x.shape}") if isinstance(x, np.ndarray) else type(x)
            raise ArgumentError(name, shape, "one array of shape (samples, features)")
        whose = "y" if name == "x" else f"y of {name}"
        targets = [] if self._takes_classes else [(whose, y)]
        for argument, data in ((name, x), *targets):
            if isinstance(data, np.ndarray) and data.dtype.kind in "SUMmV":
                kind = in_words(f"an array of dtype {data.dtype}")
                raise ArgumentError(argument, kind, "numbers or bools", "Encode it as numbers")
        if not training:
            return
        if self._losses.needs_y and not isinstance(y, np.ndarray):
            raise ArgumentError(whose, y, f"one target for each sample: {_name(self.estimator)} needs it")
        if sample_weight is not None and not self._takes_weight:
            raise ArgumentError("sample_weight", in_words("given"), self._no_weight())
        if self._takes_classes:
            self._check_labels(whose, y, may_find=name == "x")

    def direction(self, metric: str) -> str | None:
        return {"loss": "min", "mae": "min", "accuracy": "max"}.get(metric.removeprefix("val_"))

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]:
        """One ``partial_fit``.

        Raises:
            ArgumentError: the classes are not known, or weights come that the estimator does not take.
        """
        more: dict[str, Any] = {}
        if self._takes_classes and self._fitted_classes() is None:
            more["classes"] = self._known_classes()
        if batch.sample_weight is not None:
            if not self._takes_weight:
                raise ArgumentError("sample_weight", in_words("given"), self._no_weight())
            more["sample_weight"] = batch.sample_weight
        if before_update is not None:
            before_update()
        with self._as_there():
            self.estimator.partial_fit(batch.x, batch.y, **more)
            return self._losses(batch, own=getattr(self.estimator, "loss_", None))

    def test_batch(self, batch: Batch) -> Mapping[str, Any]:
        with self._as_there():
            return self._losses(batch)

    def predict_batch(self, batch: Batch) -> Any:
        """What ``estimator.predict`` answers."""
        with self._as_there():
            return np.array(self.estimator.predict(batch.x))

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Refuses the name of a file that its copies could not be saved as.

        Raises:
            ArgumentError: unless it ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
        """
        check_extension(path)

    def capture(self) -> EstimatorState:
        """A deep copy of the estimator: ``partial_fit`` changes its arrays in place."""
        return EstimatorState(copy.deepcopy(self.estimator), self._made_of)

    # Going on -----------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """The estimator's class and parameters.

        Raises:
            ArgumentError: it draws from the random numbers of the whole process, or has a parameter or an
                attribute that is not plain data, so that it could not go on exactly.
        """
        parameters = self.estimator.get_params(deep=False)
        if parameters.get("random_state", 0) is None:
            raise ArgumentError(
                "random_state",
                None,
                "a number, because the training is to be resumed and None draws from the random numbers of "
                "the whole process",
                f"{_name(self.estimator)}(..., random_state=0)",
            )
        told = PlainEstimator(self.estimator)
        classes = self._classes if (fitted := self._fitted_classes()) is None else fitted
        return {
            "class": told.name,
            "parameters": told.settings(),
            "classes": None if classes is None else classes.tolist(),
        }

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Puts back what a backup holds; see :class:`asynccb.protocols.Resumes`."""
        from asynccb.models.plain import read_plain

        saved = read_plain(path, accept)
        if saved.get("class") != PlainEstimator(self.estimator).name:
            raise FileRefused(path, f"it holds no {_name(self.estimator)}")
        PlainEstimator(self.estimator).put_back(path, saved)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Puts back what a snapshot's ``save`` or a :class:`~asynccb.callbacks.ModelCheckpoint` wrote.
        Blocks.

        Raises:
            FileNotFoundError: there is no such file.
            FileRefused: the file is damaged, not safe, or of another estimator or other parameters; nothing
                is changed then.
        """
        self.restore(os.fspath(path), lambda extra: None)

    # What callbacks ask for ---------------------------------------------------------------------------------

    def get_weights(self) -> list[Array]:
        """Copies of the fitted arrays of floats, without the optimizer's. What is counted and what is only of
        the last batch (``classes_``, ``labels_``) is none of them."""
        return [array.copy() for array in self._weights().values()]

    def set_weights(self, arrays: Sequence[Array]) -> None:
        """Overwrites the fitted arrays.

        Raises:
            ValueError: another number of arrays, or other shapes.
        """
        mine = self._weights()
        for name, array in zip(mine, arrays, strict=True):
            if mine[name].shape != np.shape(array):
                raise ValueError(f"{name} has the shape {mine[name].shape}, not {np.shape(array)}")
        for own, array in zip(mine.values(), arrays, strict=True):
            own[...] = array

    # Parts --------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Array]:
        found = arrays_of(self.estimator, optimizer=False)
        found.pop("classes_", None)
        return {name: array for name, array in found.items() if array.dtype.kind == "f"}

    def _made_of(self, estimator: Any) -> Any:
        """What the user would have given with this estimator."""
        if self.user_model is not self:
            return estimator
        return SklearnModel(estimator, classes=self._classes if self._told else None)

    def _as_there(self) -> AbstractContextManager[Any]:
        """Inside of it, scikit-learn is set as it is on the thread that made the model."""
        from sklearn import config_context, get_config

        if get_config() == self._config:
            return nullcontext()
        there: AbstractContextManager[Any] = config_context(**self._config)
        return there

    def _fitted_classes(self) -> Array | None:
        found: Array | None = getattr(self.estimator, "classes_", None)
        return found

    def _known_classes(self) -> Array:
        if self._classes is None:
            raise ArgumentError(
                "model",
                self.user_model,
                "its classes must be known before the first batch, and batches do not tell them",
                f"SklearnModel({_name(self.estimator)}(...), classes=[...])",
            )
        return self._classes

    def _check_labels(self, whose: str, y: Array, *, may_find: bool) -> None:
        if y.ndim != 1:
            fix = "y.ravel()" if y.shape[1:] == (1,) else "Of one-hot rows: y.argmax(axis=1)"
            raise ArgumentError(whose, in_words(f"shape {y.shape}"), "one label for each sample", fix)
        found, fitted = np.unique(y), self._fitted_classes()
        if fitted is None and may_find and not self._told:
            self._classes = found
        known = self._classes if fitted is None else fitted
        if known is not None and (unknown := sorted(set(found.tolist()) - set(known.tolist()))):
            raise ArgumentError(
                whose,
                in_words(f"the label {unknown[0]!r}"),
                f"labels out of {known.tolist()}",
                f"SklearnModel({_name(self.estimator)}(...), classes=[...]) tells all that there will be, "
                "before the first batch",
            )

    def _no_weight(self) -> str:
        return f"None, because partial_fit of {_name(self.estimator)} takes no weights"


def _name(estimator: Any) -> str:
    return type(estimator).__name__


def _partial_fit(estimator: Any) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = estimator.partial_fit
    except AttributeError as missing:
        # An estimator may have it with other parameters alone, and then says so in the cause.
        why = f" ({missing.__cause__})" if missing.__cause__ else ""
        raise ArgumentError(
            "model",
            estimator,
            f"partial_fit is needed to train batch by batch{why}",
            f"These have it: {LEARNERS}",
        ) from None
    return found
