"""Data that a model can never take is refused before the first batch, with the likely mend."""

from __future__ import annotations

import numpy as np
import pytest

from asynccb.errors import ArgumentError
from asynccb.models import Activation, Dense, Embedding, Flatten, Sequential

X = np.zeros((6, 4), np.float32)
ONE_HOT = np.eye(3)[[0, 1, 2, 0, 1, 2]]
LABELS = np.array([0, 1, 2, 0, 1, 2])


def model(loss, outputs=3):
    made = Sequential([Dense(outputs, input_dim=4), Activation("softmax")])
    made.compile("sgd", loss)
    return made


CATEGORICAL, SPARSE = "categorical_crossentropy", "sparse_categorical_crossentropy"

REFUSED = {
    "width": (CATEGORICAL, np.zeros((6, 5)), ONE_HOT, None, r"x=shape \(6, 5\): .*samples of shape \(4,\)"),
    "flat": (CATEGORICAL, np.zeros(6), ONE_HOT, None, r"x=shape \(6,\)"),
    "objects": (
        CATEGORICAL,
        np.array([[object()] * 4] * 6),
        ONE_HOT,
        None,
        "dtype object: must hold real numbers",
    ),
    "strings": (CATEGORICAL, np.array([["a"] * 4] * 6), ONE_HOT, None, "must hold real numbers.*np.asarray"),
    "ragged": (CATEGORICAL, [[1.0, 2.0], [1.0]], ONE_HOT, None, "not a regular array"),
    "two inputs": (CATEGORICAL, (X, X), ONE_HOT, None, "2 arrays: a Sequential model takes one array"),
    "dict of inputs": (CATEGORICAL, {"a": X}, ONE_HOT, None, "1 arrays: a Sequential model takes one array"),
    "labels for one-hot": (CATEGORICAL, X, LABELS, None, 'y=shape .*loss="sparse_categorical_crossentropy"'),
    "one-hot for labels": (SPARSE, X, ONE_HOT, None, 'y=shape .*loss="categorical_crossentropy"'),
    "label too large": (
        SPARSE,
        X,
        LABELS + 1,
        None,
        r"numbers from 1 to 3: class numbers must lie in 0 \.\. 2",
    ),
    "label negative": (SPARSE, X, LABELS - 1, None, "from -1 to 1"),
    "label NaN": (SPARSE, X, np.where(LABELS, np.nan, 0.0), None, "from nan to nan"),
    "columns of y": (CATEGORICAL, X, np.zeros((6, 4)), None, r"y=shape \(6, 4\): .* needs \('samples', 3\)"),
    "samples of y": (CATEGORICAL, X, ONE_HOT[:5], None, "as many samples as x, 6"),
    "no y": (CATEGORICAL, X, None, None, "y=None: targets are needed"),
    "weights": (
        CATEGORICAL,
        X,
        ONE_HOT,
        np.ones(5),
        r"sample_weight=shape \(5,\): must be one number per sample",
    ),
    "complex": (CATEGORICAL, X * 1j, ONE_HOT, None, "complex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_fit_is_refused(case):
    loss, x, y, weights, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        model(loss).check_data(x, y, weights)


ACCEPTED = {
    "one-hot": (CATEGORICAL, X, ONE_HOT, None),
    "labels": (SPARSE, X, LABELS, None),
    "label column": (SPARSE, X, LABELS[:, None], None),
    "float labels": (SPARSE, X, LABELS.astype(float), None),
    "lists": (CATEGORICAL, X.tolist(), ONE_HOT.tolist(), [1.0] * 6),
    "whole numbers": (CATEGORICAL, X.astype(np.uint8), ONE_HOT.astype(bool), np.ones((6, 1))),
    "NaN": (CATEGORICAL, np.full_like(X, np.nan), ONE_HOT, None),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_data_that_fits_passes_and_can_be_evaluated(case):
    loss, x, y, weights = ACCEPTED[case]
    model(loss).check_data(x, y, weights)
    assert set(model(loss).evaluate(x, y, sample_weight=weights)) == {"loss"}


def test_one_output_takes_a_flat_array_of_targets():
    made = Sequential([Dense(1, input_dim=4)])
    made.compile("sgd", "mse")
    made.check_data(X, np.zeros(6), None)
    assert made.evaluate(X, np.zeros(6)) == made.evaluate(X, np.zeros((6, 1)))


def test_one_feature_takes_a_flat_array_of_samples():
    made = Sequential([Dense(1)])
    made.compile("sgd", "mse")
    made.check_data(np.zeros(6), np.zeros(6), None)
    assert made.predict(np.zeros(6)).shape == (6, 1)


def test_numbers_outside_the_table_of_an_embedding_are_refused():
    made = Sequential([Embedding(5, 2, input_length=3), Flatten(), Dense(3, activation="softmax")])
    made.compile("sgd", SPARSE)
    made.check_data(np.array([[0, 4, 1]]), np.array([2]), None)
    with pytest.raises(ArgumentError, match=r"from 0 to 5.*the Embedding's input_dim is 5"):
        made.check_data(np.array([[0, 5, 1]]), np.array([2]), None)
    with pytest.raises(ArgumentError, match="from -1 to 1"):
        made.predict_batch(type("B", (), {"x": np.array([[0, -1, 1]])}))


def test_errors_name_the_argument_of_the_caller():
    with pytest.raises(ArgumentError, match="validation_data=shape"):
        model(CATEGORICAL).check_data(np.zeros((6, 9)), ONE_HOT, None, name="validation_data")
    with pytest.raises(ArgumentError, match="validation_data's y=shape"):
        model(CATEGORICAL).check_data(X, LABELS, None, name="validation_data")


def test_a_prediction_needs_no_targets():
    Sequential([Dense(3, input_dim=4)]).check_data(X, None, None, training=False)


def test_checking_never_reads_or_copies_the_samples():
    """A view of 4 TB of zeros passes at once; anything that looked at the values would never return."""
    huge = np.broadcast_to(np.float32(0), (2**40, 4))
    made = model(CATEGORICAL)
    made.check_data(huge, np.broadcast_to(np.float32(0), (2**40, 3)), None)
