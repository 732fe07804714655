"""How well an estimator of scikit-learn does on a batch: means over its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.protocols import Batch


def losses_of(estimator: Any) -> Losses:
    """What measures an estimator of this kind.

    Raises:
        ArgumentError: it is neither a classifier nor a regressor, nor has it cluster centres.
    """
    from sklearn.base import ClassifierMixin, ClusterMixin, RegressorMixin

    scores = hasattr(estimator, "predict_proba") or hasattr(estimator, "decision_function")
    if isinstance(estimator, ClassifierMixin) and scores:
        return OfClassifier(estimator)
    if isinstance(estimator, RegressorMixin):
        return OfRegressor(estimator)
    if isinstance(estimator, ClusterMixin) and hasattr(estimator, "score"):
        return OfClusterer(estimator)
    raise ArgumentError(
        "model",
        estimator,
        "a classifier, a regressor, or a clusterer with a score: of anything else the loss is not known",
        "Give an object whose train_batch(batch) calls its partial_fit and returns a loss",
    )


class Losses:
    """Measures batches.

    Attributes:
        names: of the logs, ``loss`` first.
        needs_y: whether there must be targets.
        believes: whether the estimator's own loss is the one that is measured here.
    """

    names: Sequence[str] = ("loss",)
    needs_y = True
    believes = False

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator

    def __call__(self, batch: Batch, own: float | None = None) -> dict[str, float]:
        """The logs of a batch.

        Args:
            batch: it.
            own: the loss that the estimator itself tells. That of a regressor may be another than is measured
                here (half the squared error, Poisson's) and is not believed.

        Raises:
            ArgumentError: there are no targets where there must be, or a label is none of the classes.
        """
        if self.needs_y and batch.y is None:
            raise ArgumentError("y", None, f"one target for each sample: {self._name()} needs it")
        # A class that no batch has had yet has the probability 0: of its logarithm, who trains hears nothing.
        with np.errstate(all="ignore"):
            loss, metrics = self._measure(batch)
        told = float(own) if own is not None and self.believes else _mean(loss, batch.sample_weight)
        return {"loss": told, **metrics}

    def _name(self) -> str:
        return type(self._estimator).__name__

    def _measure(self, batch: Batch) -> tuple[Array, dict[str, float]]:
        """The loss of each sample, and the means of all else."""
        raise NotImplementedError


class OfClassifier(Losses):
    names = ("loss", "accuracy")
    believes = True

    def _measure(self, batch: Batch) -> tuple[Array, dict[str, float]]:
        labels = np.asarray(batch.y)
        right = np.asarray(self._estimator.predict(batch.x)) == labels
        classes = self._estimator.classes_
        places = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
        if (foreign := classes[places] != labels).any():
            label = in_words(f"the label {labels[foreign].tolist()[0]!r}")
            raise ArgumentError("y", label, f"labels out of {classes.tolist()}")
        if hasattr(self._estimator, "predict_proba"):
            loss = _log_loss(self._estimator.predict_proba(batch.x), places)
        else:
            loss = _hinge(np.asarray(self._estimator.decision_function(batch.x)), places)
        return loss, {"accuracy": float(right.mean())}


class OfRegressor(Losses):
    names = ("loss", "mae")

    def _measure(self, batch: Batch) -> tuple[Array, dict[str, float]]:
        off = np.asarray(self._estimator.predict(batch.x), np.float64).reshape(np.shape(batch.y)) - batch.y
        off = off.reshape(len(off), -1)
        return (off**2).mean(axis=1), {"mae": float(np.abs(off).mean())}


class OfClusterer(Losses):
    needs_y = False

    def _measure(self, batch: Batch) -> tuple[Array, dict[str, float]]:
        centres, nearest = self._estimator.cluster_centers_, self._estimator.predict(batch.x)
        return ((np.asarray(batch.x) - centres[nearest]) ** 2).sum(axis=1), {}


def _mean(loss: Array, weight: Array | None) -> float:
    """As Keras does: weighted, and over the number of samples."""
    return float(loss.mean() if weight is None else (loss * np.reshape(weight, -1)).mean())


def _log_loss(probabilities: Array, places: Array) -> Array:
    """Of each sample; a probability of 0 counts as the smallest step of its type."""
    smallest = np.finfo(probabilities.dtype).eps
    right = probabilities[np.arange(len(places)), places]
    loss: Array = -np.log(np.clip(right, smallest, 1 - smallest))
    return loss


def _hinge(scores: Array, places: Array) -> Array:
    """Of each sample: how far the score of its class is from being 1 above the best of the others."""
    if scores.ndim == 1:
        margin = np.where(places == 1, scores, -scores)
    else:
        rows = np.arange(len(places))
        others = scores.copy()
        others[rows, places] = -np.inf
        margin = scores[rows, places] - others.max(axis=1)
    loss: Array = np.maximum(0.0, 1.0 - margin)
    return loss
