"""scikit-learn: estimators with ``partial_fit``. scikit-learn is there already, as its user has made one.

::

    model           SklearnModel: what a training asks of an estimator
      losses        how it is measured on a batch
      state         an estimator as plain data, without pickle
"""

from __future__ import annotations

from asynccb.models.sklearn.model import SklearnModel, adapt

__all__ = ["SklearnModel", "adapt"]
