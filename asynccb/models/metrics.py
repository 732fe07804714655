"""Metrics: accuracy in its three forms, and the losses. Each gives the mean over the rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from asynccb.models import losses
from asynccb.models.losses import one_hot
from asynccb.models.names import lookup, numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asynccb.models.arrays import Array

    Metric = Callable[[Array, Array], float]


def binary_accuracy(y: Array, p: Array) -> float:
    """The share of outputs on the side of 0.5 on which their target is."""
    return float(np.mean((p > 0.5) == y))


def categorical_accuracy(y: Array, p: Array) -> float:
    """The share of rows whose largest output is their largest target."""
    return float(np.count_nonzero(p.argmax(axis=-1) == y.argmax(axis=-1)) / max(1, len(p)))


def sparse_categorical_accuracy(y: Array, p: Array) -> float:
    """The share of rows whose largest output is that of the target's class number."""
    return float(np.count_nonzero(p.argmax(axis=-1) == y) / max(1, len(p)))


_ACCURACIES: dict[str, Metric] = {
    "binary_accuracy": binary_accuracy,
    "categorical_accuracy": categorical_accuracy,
    "sparse_categorical_accuracy": sparse_categorical_accuracy,
}
_PLAIN = ("accuracy", "acc")
_KNOWN = dict.fromkeys((*_PLAIN, *_ACCURACIES, *losses.TABLE))


def check(names: Iterable[object]) -> None:
    """Refuses unknown names.

    Raises:
        ArgumentError: it suggests the nearest names.
    """
    for name in names:
        lookup("metrics", name, _KNOWN)


def log_names(names: Iterable[str]) -> list[str]:
    """The keys in the logs: ``loss``, then the names as given, doubles with ``_2``, ``_3``."""
    keys = ["loss"]
    for name in names:
        keys.append(numbered(name, keys, first=2))
    return keys


def direction(name: str) -> str | None:
    """``"max"`` for accuracies, ``"min"`` for losses, None for what is neither."""
    base = name.removeprefix("val_")
    stem, _, number = base.rpartition("_")
    if stem and number.isdigit() and stem in _KNOWN:
        base = stem
    if base in _PLAIN or base in _ACCURACIES:
        return "max"
    return "min" if base == "loss" or base in losses.TABLE else None


def resolve(name: str, loss: losses.Loss, outputs: int) -> Metric:
    """The metric for a model of this loss and number of outputs.

    Args:
        name: a known name.
        loss: the model's loss; its targets are class numbers where it is sparse.
        outputs: size of the last axis of the predictions.
    """
    if name in _PLAIN:
        if loss.sparse:
            return sparse_categorical_accuracy
        binary = outputs == 1 or loss.name == "binary_crossentropy"
        return binary_accuracy if binary else categorical_accuracy
    if name in _ACCURACIES:
        return _with_targets(_ACCURACIES[name], name.startswith("sparse"), loss.sparse)
    return _of_loss(losses.TABLE[name], loss.sparse)


def _with_targets(metric: Metric, wants_numbers: bool, has_numbers: bool) -> Metric:
    if wants_numbers == has_numbers:
        return metric
    if has_numbers:
        return lambda y, p: metric(one_hot(y, p), p)
    return lambda y, p: metric(y.argmax(axis=-1), p)


def _of_loss(metric: losses.Loss, has_numbers: bool) -> Metric:
    def mean(y: Array, p: Array) -> float:
        return float(metric.values(y, p).mean()) if len(p) else 0.0

    return _with_targets(mean, metric.sparse, has_numbers)
