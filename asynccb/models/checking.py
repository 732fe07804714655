"""Refusing data that a Sequential can never take, by shapes and dtypes, before the first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words

if TYPE_CHECKING:
    from asynccb.models.losses import Loss

    Shape = tuple[int, ...]


def check_inputs(x: Any, input_shape: Shape | None, classes: int | None, name: str) -> Any:
    """Checks the samples.

    Args:
        x: array-like, samples on axis 0.
        input_shape: shape of one sample, None where the model is not built yet.
        classes: rows of the table if the first layer is an Embedding, else None.
        name: the argument's name for messages.

    Returns:
        ``x`` as an array.

    Raises:
        ArgumentError: for several inputs, dtypes that are no numbers, wrong shapes, numbers outside the
            table.
    """
    if isinstance(x, (tuple, dict)) or (isinstance(x, list) and x and hasattr(x[0], "shape")):
        raise ArgumentError(name, in_words(f"{len(x)} arrays"), "a Sequential model takes one array")
    x = _numbers(x, name)
    shape = sample_shape(x.shape, input_shape)
    if input_shape is not None and shape != input_shape:
        raise ArgumentError(
            name, _shape(x.shape), f"the model's first layer takes samples of shape {input_shape}"
        )
    if classes is not None:
        _check_range(name, x, classes, "the Embedding's input_dim")
    return x


def sample_shape(shape: Shape, input_shape: Shape | None) -> Shape:
    """The shape of one sample; a flat array of numbers is a column of samples with one feature each."""
    if len(shape) == 1 and input_shape in (None, (1,)):
        return (1,)
    return shape[1:]


def check_targets(y: Any, samples: int, output_shape: Shape, loss: Loss, name: str) -> None:
    """Checks the targets against loss and output.

    Raises:
        ArgumentError: for dtypes that are no numbers, lengths that differ, labels where one-hot rows are
            wanted and the reverse, shapes that fit no output, class numbers out of range.
    """
    y = _numbers(y, name)
    if y.ndim == 0 or len(y) != samples:
        raise ArgumentError(name, _shape(y.shape), f"must have as many samples as x, {samples}")
    if loss.sparse:
        _check_labels(y, output_shape, name)
    else:
        _check_dense(y, output_shape, loss, name)


def check_weights(sample_weight: Any, samples: int) -> None:
    """Checks sample weights: one number for each sample.

    Raises:
        ArgumentError: for another shape or dtypes that are no numbers.
    """
    weights = _numbers(sample_weight, "sample_weight")
    if weights.shape not in ((samples,), (samples, 1)):
        raise ArgumentError(
            "sample_weight", _shape(weights.shape), f"must be one number per sample, ({samples},)"
        )


def _numbers(values: Any, name: str) -> Any:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ArgumentError(
            name, in_words(type(values).__name__), f"is not a regular array: {error}"
        ) from None
    if array.dtype.kind not in "biuf":
        fix = "Convert it first: np.asarray(values, dtype=np.float32)"
        raise ArgumentError(name, in_words(f"an array of dtype {array.dtype}"), "must hold real numbers", fix)
    if array.ndim == 0:
        raise ArgumentError(name, values, "must have its samples on axis 0")
    return array


def _check_labels(y: Any, output_shape: Shape, name: str) -> None:
    classes, rows = output_shape[-1], output_shape[:-1]
    shape = y.shape[1:]
    if shape not in (rows, (*rows, 1)):
        one_hot = shape == output_shape
        fix = (
            'For one-hot targets use loss="categorical_crossentropy", or y.argmax(axis=-1)' if one_hot else ""
        )
        allowed = f"sparse_categorical_crossentropy takes one class number for each of {('samples', *rows)}"
        raise ArgumentError(name, _shape(y.shape), allowed, fix)
    _check_range(name, y, classes, "the model's number of outputs")


def _check_range(name: str, values: Any, limit: int, of: str) -> None:
    if not values.size:
        return
    low, high = values.min(), values.max()
    if not (low >= 0 and high < limit):  # written so that NaN is refused too
        given = in_words(f"numbers from {low} to {high}")
        raise ArgumentError(name, given, f"class numbers must lie in 0 .. {limit - 1} ({of} is {limit})")


def _check_dense(y: Any, output_shape: Shape, loss: Loss, name: str) -> None:
    shape = y.shape[1:]
    if shape == output_shape or (*shape, 1) == output_shape or shape == (*output_shape, 1):
        return
    labels = shape in (output_shape[:-1], (*output_shape[:-1], 1))
    fix = ""
    if labels and loss.name == "categorical_crossentropy":
        fix = 'For class numbers use loss="sparse_categorical_crossentropy"'
    raise ArgumentError(name, _shape(y.shape), f"{loss.name} needs {('samples', *output_shape)}", fix)


def _shape(shape: Shape) -> str:
    return in_words(f"shape {shape}")
