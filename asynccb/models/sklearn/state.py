"""The state of an estimator of scikit-learn: copies of it, and its way through plain data, without pickle."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models.arrays import read_only
from asynccb.models.files import check_extension
from asynccb.models.plain import PlainState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from asynccb.models.arrays import Array

OPTIMIZER = "_optimizer"
_MADE_ANEW = ("_loss_function_", "stop_training")
"""Attributes that are no state: ``partial_fit`` makes the first each time, and the other is a training's."""


def arrays_of(estimator: Any, *, optimizer: bool = True) -> dict[str, Array]:
    """The fitted arrays of numbers by name, as they lie in memory, each once; those of the optimizer come
    last, and their names begin with ``optimizer/``."""
    parameters = estimator.get_params(deep=False)
    fitted = {name: value for name, value in vars(estimator).items() if name not in parameters}
    slots = vars(fitted.pop(OPTIMIZER)) if OPTIMIZER in fitted else {}
    found: dict[str, Array] = {}
    for prefix, values in (("", fitted), ("optimizer/", slots if optimizer else {})):
        for name, value in values.items():
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, part in parts:
                known = any(part is array for array in found.values())
                if isinstance(part, np.ndarray) and part.dtype.kind in "biufc" and not known:
                    found[f"{prefix}{name}" if index is None else f"{prefix}{name}/{index}"] = part
    return found


class EstimatorState:
    """A copy of an estimator at one moment; satisfies ``ModelState``.

    Args:
        estimator: the copy; nobody else has it.
        rebuild: makes what the user gave out of another copy.
    """

    def __init__(self, estimator: Any, rebuild: Callable[[Any], Any]) -> None:
        self._estimator, self._rebuild = estimator, rebuild

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Read-only arrays by name: weights first, then ``optimizer/...``."""
        return {name: read_only(array) for name, array in arrays_of(self._estimator).items()}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an HDF5 file, atomically; blocks until it is durable. :meth:`SklearnModel.load` reads it.

        Args:
            path: ends in ``.h5`` or ``.hdf5``. Pickles are not written: loading one runs what is in it.
            weights_only: leaves out the optimizer of a multi-layer perceptron.
            extra: plain data that goes into the file beside.

        Raises:
            ArgumentError: for another extension, or an attribute that is not plain data.
            CheckpointWriteError: it could not be written; the file that stood there before is untouched.
        """
        name = check_extension(path)
        told = PlainEstimator(self._estimator).tell(weights_only=weights_only)
        PlainState(type(self._estimator).__name__, told).save(name, extra=extra)

    def to_model(self) -> Any:
        """A new estimator with this state (a :class:`SklearnModel` around it, if one was given)."""
        return self._rebuild(copy.deepcopy(self._estimator))


class PlainEstimator:
    """An estimator as plain data, and back.

    Attributes:
        name: of its class, with its module.
    """

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self.name = f"{type(estimator).__module__}.{type(estimator).__qualname__}"

    def settings(self) -> Any:
        """The parameters, to be compared: a random stream is without its state.

        Raises:
            ArgumentError: a parameter or an attribute is not plain data.
        """
        return _without_streams(self.tell()["parameters"])

    def tell(self, *, weights_only: bool = False) -> dict[str, Any]:
        """All of it.

        Raises:
            ArgumentError: a parameter or an attribute is not plain data; names it.
        """
        encode = _Encoder(self._estimator)
        parameters = self._estimator.get_params(deep=False)
        gone = {*parameters, *_MADE_ANEW, *([OPTIMIZER] if weights_only else [])}
        fitted = {name: value for name, value in vars(self._estimator).items() if name not in gone}
        return {
            "class": self.name,
            "parameters": {name: encode(name, value) for name, value in parameters.items()},
            "fitted": {name: encode(name, value) for name, value in fitted.items()},
            "weights_only": weights_only,
        }

    def put_back(self, path: str, told: Mapping[str, Any]) -> None:
        """Makes the estimator what :meth:`tell` told of.

        Raises:
            FileRefused: it is damaged, or of an estimator with other parameters; nothing is changed then.
        """
        try:
            saved = _without_streams(told["parameters"])
            decode = _Decoder()
            parameters = {name: decode(value) for name, value in told["parameters"].items()}
            fitted = {name: decode(value) for name, value in told["fitted"].items()}
            _check_fit_together(fitted)
            keeps = [OPTIMIZER] if told["weights_only"] else []
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise FileRefused(path, f"its estimator is damaged: {error}") from error
        for name, value in self.settings().items():
            if not _same(saved.get(name), value):
                raise FileRefused(path, f"its estimator has another {name}: {saved.get(name)!r:.80}")
        mine = vars(self._estimator)
        streams = {
            name: value for name, value in parameters.items() if isinstance(value, np.random.RandomState)
        }
        kept = {*self._estimator.get_params(deep=False), *_MADE_ANEW, *keeps}
        for name in [name for name in mine if name not in kept]:
            del mine[name]
        mine.update({**streams, **fitted})


class _Encoder:
    """Values as plain data. What is there twice is told once: an array that two attributes share must be
    shared when it comes back."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is only good as long as its object

    def __call__(self, where: str, value: Any) -> Any:
        if value is None or type(value) in _SCALARS:
            return value
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return value
        if type(value) is list:
            return [self(where, part) for part in value]
        if type(value) is tuple:
            return {"is": "tuple", "parts": [self(where, part) for part in value]}
        if type(value) is dict:
            pairs = [[self(where, key), self(where, part)] for key, part in value.items()]
            return {"is": "dict", "pairs": pairs}
        if id(value) in self._seen:
            return {"is": "same", "as": self._seen[id(value)]}
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return self._thing(where, value)

    def _thing(self, where: str, value: Any) -> dict[str, Any]:
        if type(value) is np.ndarray:
            return self._array(where, value)
        if type(value) is np.random.RandomState:
            return {"is": "random", "state": value.get_state(legacy=False)}
        for name, kind in _parts().items():
            if type(value) is kind:
                state = {key: self(f"{where}.{key}", part) for key, part in vars(value).items()}
                return {"is": "part", "name": name, "state": state}
        kind = type(value)
        raise ArgumentError(
            "model",
            self._estimator,
            f"its {where} is of type {kind.__module__}.{kind.__qualname__}, which no plain data can tell",
            "Snapshots and to_model() work; files and exact resume do not",
        )

    def _array(self, where: str, array: Array) -> dict[str, Any]:
        if array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
            # The order in memory too: a sum depends on it in the last bit.
            fortran = array.flags.f_contiguous and not array.flags.c_contiguous
            return {"is": "array", "array": array.T if fortran else array, "fortran": fortran}
        parts = [self(where, part) for part in array.ravel().tolist()]
        return {"is": "listed", "parts": parts, "kind": array.dtype.kind, "shape": list(array.shape)}


class _Decoder:
    """The way back. What is told of can only be what is listed here: nothing else is looked up or called."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def __call__(self, told: Any) -> Any:
        if isinstance(told, list):
            return [self(part) for part in told]
        if not isinstance(told, dict):
            return told
        match told["is"]:
            case "tuple":
                return tuple(self(part) for part in told["parts"])
            case "dict":
                return {self(key): self(part) for key, part in told["pairs"]}
            case "same":
                return self._seen[told["as"]]
        # Numbered before its parts are, as it was told.
        number = len(self._seen)
        self._seen[number] = None
        self._seen[number] = made = self._thing(told)
        return made

    def _thing(self, told: Mapping[str, Any]) -> Any:
        match told["is"]:
            case "array":
                return told["array"].T.copy("F") if told["fortran"] else told["array"].copy()
            case "listed" if told["kind"] in ("O", "U"):
                parts = [self(part) for part in told["parts"]]
                return np.array(parts, told["kind"]).reshape(told["shape"])
            case "random":
                return _stream(told["state"])
            case "part":
                made: Any = object.__new__(_parts()[told["name"]])
                vars(made).update({key: self(part) for key, part in told["state"].items()})
                return made
        raise ValueError("it holds something that is not known")


_ALIKE = {
    "_standard_coef": "coef_",
    "_average_coef": "coef_",
    "_standard_intercept": "intercept_",
    "_average_intercept": "intercept_",
}
_SCALARS = (bool, int, float, str)
_MOST_THREADS = 1024  # so many more, or less than one, and OpenMP ends the process


def _parts() -> dict[str, type]:
    """The objects that an estimator may consist of."""
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer
    from sklearn.preprocessing import LabelBinarizer

    return {kind.__name__: kind for kind in (AdamOptimizer, LabelBinarizer, SGDOptimizer)}


def _stream(state: Mapping[str, Any]) -> np.random.RandomState:
    """A random stream that stands there.

    Raises:
        ValueError: it cannot; numpy itself would read behind the end of its key.
    """
    key, at = state["state"]["key"], state["state"]["pos"]
    if key.shape != (624,) or not 0 <= at <= 624:
        raise ValueError("a random stream has no such state")
    stream = np.random.RandomState(np.random.MT19937(0))
    stream.set_state(dict(state))
    return stream


def _check_fit_together(fitted: Mapping[str, Any]) -> None:
    """What scikit-learn's compiled loops go over together has the same length; they do not look.

    Raises:
        ValueError: it has not.
    """
    features = fitted.get("n_features_in_")
    for name, first in (("coef_", None), ("cluster_centers_", None), ("intercept_", "coef_")):
        if name not in fitted:
            continue
        shape = fitted[name].shape
        if first is None and shape[-1] != features:
            raise ValueError(f"{name} has the shape {shape}, for {features} features")
        if first is not None and shape != (fitted[first].shape[:-1] or (1,)):
            raise ValueError(f"{name} has the shape {shape}, {first} {fitted[first].shape}")
    for name, other in _ALIKE.items():
        if fitted.get(name) is not None and fitted[name].shape != fitted[other].shape:
            raise ValueError(f"{name} has another shape than {other}")
    counts = fitted.get("_counts")
    if counts is not None and counts.shape != fitted["cluster_centers_"].shape[:1]:
        raise ValueError("_counts has another length than cluster_centers_")
    if "_n_threads" in fitted and fitted["_n_threads"] not in range(1, _MOST_THREADS + 1):
        raise ValueError(f"_n_threads is no number from 1 to {_MOST_THREADS}")


def _without_streams(told: Any) -> Any:
    """Told parameters, with the state of random streams left out and arrays as lists, to be compared."""
    if isinstance(told, dict):
        if told.get("is") == "random":
            return {"is": "random"}
        return {key: _without_streams(value) for key, value in told.items()}
    if isinstance(told, np.ndarray):
        return told.tolist()
    return [_without_streams(part) for part in told] if isinstance(told, list) else told


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second) or (first != first and second != second)
