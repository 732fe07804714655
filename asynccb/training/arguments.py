"""Everything that can be refused before the first batch.

Two steps: ``check_*`` looks at what is cheap to see, in the caller's frame; ``Data.feed`` converts and scans
the data on the training thread, before any hook is called, because that may take as long as the data is
large.
"""

from __future__ import annotations

import datetime
import math
import numbers
import operator
import warnings
from collections.abc import AsyncIterable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.training.feed import ArrayFeed, IterableFeed, map_arrays, samples_in
from asynccb.training.prefetch import AsyncFeed

if TYPE_CHECKING:
    from asynccb.protocols import Batch, Model, Source

__all__ = ["Data", "FitArguments", "check_count", "check_fit", "check_seconds", "every"]

_NAN_SCAN = 1 << 22
"""Elements looked at in one piece, so that the scan needs no memory of the data's size."""


def check_count(name: str, value: Any, *, least: int, none: bool = False) -> int:
    """A whole number of at least ``least``; with ``none`` also None, answered as 0.

    Raises:
        ArgumentError: anything else.
    """
    if value is None and none:
        return 0
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ArgumentError(
            name, value, f"a whole number of at least {least}" + (", or None" if none else "")
        )
    return number


def check_seconds(name: str, value: Any) -> float | None:
    """A time in seconds, above 0; or None.

    Raises:
        ArgumentError: anything else.
    """
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 1e-6 <= float(value) < math.inf:
        raise ArgumentError(name, value, "a number of seconds from 0.000001 on, or None")
    return float(value)


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise ArgumentError(name, value, "one of " + ", ".join(repr(choice) for choice in allowed))


class Data(NamedTuple):
    """Training, validation or test data as the caller gave it, with the kind that it was recognised as.

    ``kind`` is ``"arrays"``, ``"iterable"`` or ``"async"``.
    """

    name: str
    kind: str
    x: Any
    y: Any
    sample_weight: Any
    class_weight: Mapping[int, float] | None
    batch_size: int
    steps: int | None
    shuffle: bool | str

    def arrays(self, model: Model, *, training: bool) -> Data:
        """Array data as numpy arrays, checked against each other and the model. Other kinds as they are.

        Raises:
            ArgumentError: shapes or lengths that do not fit, no samples, more steps than there are batches.
        """
        if self.kind != "arrays":
            return self
        x, y = _as_arrays(self.name, self.x), _as_arrays(_name_y(self.name), self.y)
        weight = _as_weights(self.sample_weight)
        _check_lengths(self.name, x, y, weight)
        weighed = weight if self.class_weight is None else np.ones(samples_in(x))
        model.check_data(x, y, weighed, name=self.name, training=training)
        _warn_nan(self.name, x)
        return self._replace(x=x, y=y, sample_weight=weight)

    def feed(self, seed: int, *, shuffled: bool) -> Source:
        """The source of batches; call :meth:`arrays` first."""
        if self.kind == "async":
            return AsyncFeed(self.x, steps=self.steps, weigh=self._weigher())
        if self.kind == "iterable":
            return IterableFeed(self.x, steps=self.steps, weigh=self._weigher())
        batches = -(-samples_in(self.x) // self.batch_size)
        if self.steps is not None and self.steps > batches:
            raise ArgumentError(
                self._steps_name(shuffled),
                self.steps,
                f"at most {batches}, the batches that {self.name} gives with batch_size={self.batch_size}",
            )
        shuffle = self.shuffle if shuffled else False
        return ArrayFeed(
            self.x,
            self.y,
            _weigh_classes(self.y, self.sample_weight, self.class_weight),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=seed,
            steps=self.steps,
        )

    def split(self, fraction: float, *, batch_size: int, steps: int | None) -> tuple[Data, Data]:
        """The first part to train on and the last ``fraction`` to validate on, before any shuffling, as Keras
        does: the second part has its own ``batch_size`` and ``steps``, and class weights do not touch it."""
        samples = samples_in(self.x)
        at = math.floor(samples * (1 - fraction))
        if at == 0 or at == samples:
            raise ArgumentError(
                "validation_split", fraction, f"a part of {samples} samples that leaves some on either side"
            )
        last = self._rows(slice(at, None))._replace(
            name="validation_split", batch_size=batch_size, steps=steps, class_weight=None
        )
        return self._rows(slice(None, at)), last

    def _steps_name(self, shuffled: bool) -> str:
        if self.name.startswith("validation"):
            return "validation_steps"
        return "steps_per_epoch" if shuffled else "steps"

    def _rows(self, rows: slice) -> Data:
        weight = None if self.sample_weight is None else self.sample_weight[rows]
        x, y = (map_arrays(lambda array: array[rows], part) for part in (self.x, self.y))
        return self._replace(x=x, y=y, sample_weight=weight)

    def _weigher(self) -> Any:
        if self.class_weight is None:
            return None
        weights = self.class_weight

        def weigh(batch: Batch) -> Batch:
            return batch._replace(
                sample_weight=_weigh_classes(np.asarray(batch.y), batch.sample_weight, weights)
            )

        return weigh


class FitArguments(NamedTuple):
    """What ``fit`` was given, checked as far as that is cheap."""

    data: Data
    validation: Data | None
    validation_split: float
    validation_batch_size: int
    validation_steps: int | None
    validate_after: Collection[int]
    epochs: int
    initial_epoch: int
    verbose: int
    stop_after: float | None


def check_fit(
    x: Any,
    y: Any,
    *,
    batch_size: Any = None,
    epochs: Any = 1,
    verbose: Any = "auto",
    validation_split: Any = 0.0,
    validation_data: Any = None,
    shuffle: Any = True,
    class_weight: Any = None,
    sample_weight: Any = None,
    initial_epoch: Any = 0,
    steps_per_epoch: Any = None,
    validation_steps: Any = None,
    validation_batch_size: Any = None,
    validation_freq: Any = 1,
    stop_after: Any = None,
) -> FitArguments:
    """Checks the arguments of ``fit``; they are Keras' and documented at :meth:`asynccb.Trainer.fit`.

    Raises:
        ArgumentError: names the argument, what was given, what is allowed.
    """
    batch_size = check_count("batch_size", batch_size, least=1, none=True) or 32
    epochs = check_count("epochs", epochs, least=0)
    initial_epoch = check_count("initial_epoch", initial_epoch, least=0)
    if initial_epoch > epochs:
        raise ArgumentError(
            "initial_epoch",
            initial_epoch,
            f"at most epochs={epochs}",
            "epochs is the index of the end, not a count",
        )
    _check_choice("verbose", verbose, ("auto", 0, 1, 2, True, False))
    _check_choice("shuffle", shuffle, (True, False, "batch"))
    _check_class_weight(class_weight)
    steps = check_count("steps_per_epoch", steps_per_epoch, least=1, none=True) or None
    data = recognise("x", x, y, sample_weight, batch_size=batch_size, steps=steps)
    data = data._replace(class_weight=class_weight, shuffle=shuffle)
    _refuse_one_shot("x", data, epochs - initial_epoch, "steps_per_epoch")
    validate_after = every(validation_freq, epochs)
    validation = None
    validation_size = (
        check_count("validation_batch_size", validation_batch_size, least=1, none=True) or batch_size
    )
    validation_count = check_count("validation_steps", validation_steps, least=1, none=True) or None
    if validation_data is not None:
        validation = check_validation(validation_data, validation_size, validation_count)
        due = sum(1 for epoch in range(initial_epoch, epochs) if epoch in validate_after)
        _refuse_one_shot("validation_data", validation, due, "validation_steps")
    split = _check_split(validation_split, data)
    return FitArguments(
        data,
        validation,
        split if validation is None else 0.0,
        validation_size,
        validation_count,
        validate_after,
        epochs,
        initial_epoch,
        1 if verbose == "auto" else int(verbose),
        _check_stop_after(stop_after),
    )


def recognise(name: str, x: Any, y: Any, sample_weight: Any, *, batch_size: int, steps: int | None) -> Data:
    """Which kind of data ``x`` is: with ``y`` given it is arrays; else by its shape.

    Raises:
        ArgumentError: neither arrays nor something that can be iterated, or ``y`` beside an iterable.
    """
    kind = _kind(name, x, y)
    if kind != "arrays" and (y is not None or sample_weight is not None):
        extra = _name_y(name) if y is not None else "sample_weight"
        raise ArgumentError(
            extra, type(sample_weight if y is None else y), f"None where {name} yields whole batches"
        )
    return Data(name, kind, x, y, sample_weight, None, batch_size, steps, False)


def _kind(name: str, x: Any, y: Any) -> str:
    if isinstance(x, AsyncIterable):
        return "async"
    if hasattr(x, "__array__") or isinstance(x, Mapping):
        return "arrays"
    if isinstance(x, (list, tuple)):
        if not x:
            raise ArgumentError(name, x, "data with at least one sample")
        return "iterable" if y is None and _is_batch(x[0]) else "arrays"
    if isinstance(x, Iterable) and not isinstance(x, (str, bytes)):
        return "iterable"
    single = hasattr(x, "__getitem__") and not isinstance(x, (str, bytes))  # samples, as in torch's datasets
    fix = "Give a loader of it, such as torch's DataLoader(dataset, batch_size=32)" if single else ""
    raise ArgumentError(name, x, "arrays, an iterable of batches, or an async iterable of batches", fix)


def _is_batch(item: Any) -> bool:
    """Whether the first thing in a list is a batch: a tuple, a dict, or a list of arrays, as torch's loaders
    make them. A list of numbers is a row."""
    if isinstance(item, list) and item:
        return bool(hasattr(item[0], "__array__") and np.ndim(item[0]))
    return isinstance(item, (tuple, Mapping))


def check_validation(given: Any, batch_size: int, steps: int | None) -> Data:
    """``validation_data``: ``(x, y)``, ``(x, y, sample_weight)``, or batches as ``x`` may be."""
    name = "validation_data"
    if isinstance(given, tuple):
        if not 2 <= len(given) <= 3:
            raise ArgumentError(name, in_words(f"a tuple of {len(given)}"), "(x, y) or (x, y, sample_weight)")
        x, y, *weight = given
        return recognise(name, x, y, weight[0] if weight else None, batch_size=batch_size, steps=steps)
    return recognise(name, given, None, None, batch_size=batch_size, steps=steps)


def every(frequency: Any, epochs: int) -> Collection[int]:
    """The 0-based epochs after which to validate, from Keras' ``validation_freq``: every n-th, or a list of
    1-based ones."""
    if isinstance(frequency, Collection) and not isinstance(frequency, (str, bytes)):
        return frozenset(check_count("validation_freq", epoch, least=1) - 1 for epoch in frequency)
    step = check_count("validation_freq", frequency, least=1)
    return range(step - 1, epochs, step)


def _check_split(split: Any, data: Data) -> float:
    if not isinstance(split, (int, float, np.floating)) or not 0 <= split < 1:
        raise ArgumentError("validation_split", split, "a number from 0 up to, not including, 1")
    if split and data.kind != "arrays":
        raise ArgumentError(
            "validation_split", split, "0 for anything but arrays", "Give validation_data instead"
        )
    return float(split)


def _check_stop_after(limit: Any) -> float | None:
    if limit is None:
        return None
    if not isinstance(limit, datetime.timedelta) or limit <= datetime.timedelta(0):
        raise ArgumentError("stop_after", limit, "a positive datetime.timedelta, or None")
    return limit.total_seconds()


def _check_class_weight(class_weight: Any) -> None:
    if class_weight is None:
        return
    if not isinstance(class_weight, Mapping) or not all(
        isinstance(label, numbers.Integral) and isinstance(weight, numbers.Real)
        for label, weight in class_weight.items()
    ):
        raise ArgumentError(
            "class_weight", class_weight, "a dict from class index (int) to weight (float), or None"
        )


def _refuse_one_shot(name: str, data: Data, passes: int, steps_name: str) -> None:
    """An iterator or generator is spent after one pass: the second epoch would have no data."""
    if data.kind == "arrays" or passes <= 1 or data.steps is not None:
        return
    source = data.x
    once = hasattr(source, "__anext__") if data.kind == "async" else hasattr(source, "__next__")
    if once:
        raise ArgumentError(
            name,
            in_words(f"{type(source).__name__}, which can be iterated once"),
            f"something that can be iterated for each of {passes} epochs",
            f"Give {steps_name}, or an object whose __iter__ (or __aiter__) starts anew",
        )


def _name_y(name: str) -> str:
    return "y" if name == "x" else f"y of {name}"


def _as_arrays(name: str, data: Any) -> Any:
    try:
        arrays = _convert(data)
    except ValueError as error:
        raise ArgumentError(name, in_words(str(error)), "rows of equal length") from None
    return arrays


def _as_weights(sample_weight: Any) -> Any:
    if sample_weight is None:
        return None
    one = "one number for each sample, or None"
    if isinstance(_convert(sample_weight), (dict, list, tuple)):
        fix = "Weights for each output go with the batches: give x as a list of (x, y, weights)"
        raise ArgumentError("sample_weight", in_words(type(sample_weight).__name__), one, fix)
    try:
        return np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentError("sample_weight", sample_weight, one) from None


def _convert(data: Any) -> Any:
    """Arrays in the structure in which they came; a list of numbers or rows is one array."""
    if data is None or isinstance(data, np.ndarray):
        return data
    if isinstance(data, Mapping):
        return {name: _convert(part) for name, part in data.items()}
    if isinstance(data, (list, tuple)) and len(data) and hasattr(data[0], "__array__") and np.ndim(data[0]):
        parts = [_convert(part) for part in data]
        return parts if isinstance(data, list) else tuple(parts)
    return _of_tensor(data) if hasattr(data, "detach") else np.asarray(data)


def _of_tensor(tensor: Any) -> Any:
    """A tensor of torch, wherever it lies and whatever made it; float32 where numpy has no such type."""
    tensor = tensor.detach().cpu()
    try:
        return np.asarray(tensor)
    except TypeError:
        return np.asarray(tensor.float())


def _leaves(data: Any) -> list[np.ndarray[Any, Any]]:
    if data is None:
        return []
    if isinstance(data, np.ndarray):
        return [data]
    if isinstance(data, Mapping):
        return [leaf for part in data.values() for leaf in _leaves(part)]
    if isinstance(data, (list, tuple)):
        return [leaf for part in data for leaf in _leaves(part)]
    return [data]


def _check_lengths(name: str, x: Any, y: Any, weight: Any) -> None:
    named = [(name, leaf) for leaf in _leaves(x)] + [(_name_y(name), leaf) for leaf in _leaves(y)]
    if weight is not None:
        named.append(("sample_weight", weight))
    for argument, leaf in named:
        if leaf.ndim == 0:
            raise ArgumentError(argument, leaf, "an array with the samples on its first axis")
    lengths = {leaf.shape[0] for _, leaf in named}
    if 0 in lengths or not _leaves(x):
        raise ArgumentError(name, in_words("no samples"), "data with at least one sample")
    if len(lengths) > 1:
        told = ", ".join(f"{argument} has {leaf.shape[0]}" for argument, leaf in named)
        raise ArgumentError(name, in_words(f"samples: {told}"), "the same number of samples in all arrays")


def _weigh_classes(y: Any, weight: Any, class_weight: Mapping[int, float] | None) -> Any:
    """Sample weights multiplied by the weight of each sample's class; a class without one weighs 1, as in
    Keras."""
    if class_weight is None:
        return weight
    if not isinstance(y, np.ndarray) or y.ndim == 0:
        raise ArgumentError(
            "class_weight", dict(class_weight), "None unless y is one array of labels or one-hot rows"
        )
    labels = y.reshape(len(y)) if y.ndim == 1 or y.shape[1:] == (1,) else y.argmax(axis=-1)
    weights = np.array([class_weight.get(int(label), 1.0) for label in labels], dtype=np.float64)
    return weights if weight is None else weights * weight


def _warn_nan(name: str, x: Any) -> None:
    for leaf in _leaves(x):
        if leaf.dtype.kind not in "fc":
            continue
        rows = max(1, _NAN_SCAN // max(1, leaf[:1].size))
        for start in range(0, len(leaf), rows):
            if np.isnan(leaf[start : start + rows]).any():
                warnings.warn(
                    f"{name} holds NaN: the loss will be NaN from the first batch that sees it. "
                    "TerminateOnNaN stops the training there",
                    UserWarning,
                    stacklevel=2,
                )
                return
