"""A model's weights as the callbacks that put them back see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["averaged_weights", "copied_weights", "current_weights", "require_weights"]


def require_weights(model: Any, owner: str) -> None:
    """Refuses a model whose weights cannot be read and set.

    Raises:
        ArgumentError: it has not both ``get_weights`` and ``set_weights``.
    """
    for method, shown in (("get_weights", "() -> arrays"), ("set_weights", "(arrays)")):
        if not callable(getattr(model, method, None)):
            learns = callable(getattr(model, "partial_fit", None))
            fix = "Give Trainer SklearnModel(estimator), which has it" if learns else f"Add {method}{shown}"
            raise ArgumentError("model", model, f"{owner} needs {method}", fix)


def copied_weights(model: Any) -> list[Array]:
    """Copies of all weights, in the order of ``set_weights``. What a model calls a copy may be its own
    memory."""
    return [np.array(weight) for weight in current_weights(model)]


def current_weights(model: Any) -> list[Array]:
    """All weights as they are now, in the order of ``set_weights``; without a copy where the model shows its
    arrays (``weights``, each with an array as ``value``)."""
    bring_back = getattr(model, "jax_state_sync", None)
    if bring_back is not None:  # in Keras' own `fit` with JAX a model has none in the middle of an epoch
        bring_back()
    shown: list[Any] = [getattr(weight, "value", None) for weight in getattr(model, "weights", None) or ()]
    if shown and all(isinstance(value, np.ndarray) for value in shown):
        return shown
    return [np.asarray(weight) for weight in model.get_weights()]


def averaged_weights(model: Any, arrays: list[Array]) -> list[int]:
    """Which weights an average makes sense of: the trainable ones where the model tells, floats in any
    case."""
    told = [getattr(weight, "trainable", True) for weight in getattr(model, "weights", None) or ()]
    if len(told) != len(arrays):
        told = [True] * len(arrays)
    return [
        index
        for index, (array, trainable) in enumerate(zip(arrays, told, strict=True))
        if trainable and np.issubdtype(array.dtype, np.floating)
    ]
