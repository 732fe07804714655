"""Metrics of a ``TorchModel``: by name, any callable, and objects as torchmetrics has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asynccb.errors import ArgumentError
from asynccb.models import metrics as names
from asynccb.models.names import lookup, numbered, snake_case

Metric = Callable[[Any, Any], float]
"""From the outputs and the targets of a batch, both tensors, to the mean over its samples."""


def binary_accuracy(output: Any, target: Any, threshold: float = 0.5) -> Any:
    """The share of outputs on the side of ``threshold`` on which their target is of 0.5."""
    return ((output > threshold) == (target.reshape(output.shape) > 0.5)).float().mean()


def categorical_accuracy(output: Any, target: Any) -> Any:
    """The share of rows whose largest output is their largest target; classes are on axis 1."""
    return (output.argmax(1) == target.argmax(1)).float().mean()


def sparse_categorical_accuracy(output: Any, target: Any) -> Any:
    """The share of rows whose largest output is that of the target's class number; classes are on axis 1."""
    best = output.argmax(1)
    return (best == target.reshape(best.shape)).float().mean()


def mean_absolute_error(output: Any, target: Any) -> Any:
    return (output - target.reshape(output.shape)).abs().mean()


def mean_squared_error(output: Any, target: Any) -> Any:
    return (output - target.reshape(output.shape)).square().mean()


_LOGITS = ("BCEWithLogitsLoss", "binary_cross_entropy_with_logits")
_BINARY = (*_LOGITS, "BCELoss", "binary_cross_entropy")
_PLAIN = ("accuracy", "acc")
_TABLE: dict[str, Callable[..., Any]] = {
    "binary_accuracy": binary_accuracy,
    "categorical_accuracy": categorical_accuracy,
    "sparse_categorical_accuracy": sparse_categorical_accuracy,
    "mae": mean_absolute_error,
    "mean_absolute_error": mean_absolute_error,
    "mse": mean_squared_error,
    "mean_squared_error": mean_squared_error,
}


def resolve(metrics: Any, loss: Any, device: Any) -> dict[str, Metric]:
    """The metrics by their names in the logs.

    Args:
        metrics: a sequence of names, callables and torchmetrics objects, or a mapping from names to such, or
            None.
        loss: of the model; says whether outputs are probabilities or logits.
        device: where objects with state keep it.

    Raises:
        ArgumentError: an unknown name, with the nearest known ones, or something that cannot be called.
    """
    if metrics is None:
        metrics = ()
    elif isinstance(metrics, (str, bytes)) or callable(metrics):
        metrics = (metrics,)
    named = isinstance(metrics, Mapping)
    found: dict[str, Metric] = {}
    for key in metrics:
        metric = metrics[key] if named else key
        if isinstance(metric, str):
            name, function = metric, _by_name(metric, _name_of(loss))
        elif isinstance(metric, type) or not callable(metric):
            raise ArgumentError(
                "metrics", metric, "names, or callables (output, target) -> number", "Give an instance"
            )
        else:
            name, function = snake_case(_name_of(metric)), _numbers_of(metric, device)
        name = str(key) if named else name
        found[numbered(name, ("loss", *found), first=2)] = function
    return found


def is_binary(loss: Any) -> bool:
    """Whether it is a binary cross-entropy of torch's."""
    return _name_of(loss) in _BINARY


def direction(name: str, metrics: Mapping[str, Metric]) -> str | None:
    """``"max"`` or ``"min"`` where the name, or the metric itself (``higher_is_better``), tells."""
    base = name.removeprefix("val_")
    higher = getattr(metrics.get(base), "higher_is_better", None)
    if higher is not None:
        return "max" if higher else "min"
    return names.direction(name)


def _by_name(name: str, loss: str) -> Metric:
    lookup("metrics", name, dict.fromkeys((*_PLAIN, *_TABLE)))
    threshold = 0.0 if loss in _LOGITS else 0.5

    def metric(output: Any, target: Any) -> float:
        if name in _PLAIN:
            chosen = binary_accuracy if loss in _BINARY else _accuracy_for(output, target)
        else:
            chosen = _TABLE[name]
        more = (threshold,) if chosen is binary_accuracy else ()
        return float(chosen(output, target, *more).item())

    return metric


def _accuracy_for(output: Any, target: Any) -> Callable[..., Any]:
    """By the shapes: rows of one output are on one side or the other, targets in rows are shares of classes,
    others are numbers of classes."""
    if output.ndim < 2 or output.shape[1] == 1:
        return binary_accuracy
    return categorical_accuracy if target.shape == output.shape else sparse_categorical_accuracy


def _numbers_of(metric: Any, device: Any) -> Metric:
    """Of an object that collects over batches, the value of one batch alone."""
    collects = callable(getattr(metric, "compute", None)) and callable(getattr(metric, "reset", None))
    if collects and callable(getattr(metric, "to", None)):
        metric.to(device)

    def number(output: Any, target: Any) -> float:
        found = metric(output, target)
        if collects:
            metric.reset()
        return as_number(found, _name_of(metric))

    number.higher_is_better = getattr(metric, "higher_is_better", None)  # type: ignore[attr-defined]
    return number


def as_number(found: Any, name: str) -> float:
    """A metric's answer as a Python number: a tensor's mean.

    Raises:
        ArgumentError: it is none.
    """
    try:
        return float(found.detach().double().mean().item() if hasattr(found, "detach") else found)
    except (TypeError, ValueError):
        raise ArgumentError(
            "metrics", found, f"{name} must give one number, or a tensor of one a sample"
        ) from None


def _name_of(metric: Any) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))
