"""Estimators of scikit-learn that learn batch by batch, and the loop that people write around them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import Perceptron, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier, MLPRegressor

from asynccb.models import adapt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIGITS = load_digits()
X, Y = DIGITS.data / 16, DIGITS.target
SMALL, LABELS = X[:90], Y[:90]

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "SGDClassifier": lambda: SGDClassifier(random_state=1),
    "SGDClassifier, averaged": lambda: SGDClassifier(loss="log_loss", average=20, random_state=1),
    "SGDRegressor": lambda: SGDRegressor(random_state=1),
    "Perceptron": lambda: Perceptron(random_state=1),
    "MLPClassifier": lambda: MLPClassifier((8,), random_state=1),
    "MLPRegressor": lambda: MLPRegressor(hidden_layer_sizes=(8,), solver="sgd", random_state=1),
    "MiniBatchKMeans": lambda: MiniBatchKMeans(10, n_init=1, random_state=1),
    "MultinomialNB": lambda: MultinomialNB(),
    "GaussianNB": lambda: GaussianNB(),
    "drawing from a stream": lambda: SGDClassifier(random_state=np.random.RandomState(1)),
    "sharing a stream": lambda: MLPClassifier((4,), random_state=np.random.RandomState(1)),
}


def numbers(estimator: Any) -> dict[str, bytes]:
    """All that is fitted, to the last bit."""
    return {name: array.tobytes() for name, array in adapt(estimator).capture().arrays.items()}


def batches(seed: int, epoch: int, size: int, samples: int) -> Iterator[np.ndarray[Any, Any]]:
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return (order[start : start + size] for start in range(0, samples, size))


def by_hand(estimator: Any, x: Any, y: Any, *, seed: int, epochs: int, size: int) -> Any:
    """What people write without us."""
    takes_classes = "classes" in inspect.signature(estimator.partial_fit).parameters
    first = {"classes": np.unique(y)} if takes_classes else {}
    for epoch in range(epochs):
        for rows in batches(seed, epoch, size, len(x)):
            estimator.partial_fit(x[rows], y[rows], **first)
    return estimator
