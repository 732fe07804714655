"""Models: ``Sequential`` on numpy with its layers and optimizers, files of models, and what makes others fit.

Importing this imports numpy and nothing heavier; HDF5 is loaded when a file is first touched.

An engine of one's own is any object with ``train_batch(batch) -> dict of logs``: the loss first, means over
the samples of the batch, Python's numbers. What else it has is used, each for one thing::

    test_batch(batch) -> logs                   validation and evaluate
    predict_batch(batch) -> outputs             predict; samples on axis 0
    capture() -> a ModelState                   snapshots and ModelCheckpoint
    state_dict(), load_state_dict(state)        backups and resume, of plain data: numbers, texts, arrays
    get_weights(), set_weights(arrays)          EarlyStopping(restore_best_weights), SwapEMAWeights
    optimizer.learning_rate                     LearningRateScheduler, ReduceLROnPlateau
    metrics_names, direction(metric)            names known before the first batch; which way they improve
    check_ready(training), check_data(x, ...)   refusals before the first batch, by raising ArgumentError
    stop_training                               a flag that callbacks set, where it can be set
    needs_cpu = False                           it computes elsewhere and takes no turns with other trainings

All of them but ``check_ready``, which is called where ``fit`` is, are called on the training's thread, one
after the other, and may block: the event loop goes on.
``batch`` is a :class:`asynccb.protocols.Batch`. ``train_batch(batch, before_update=None)`` is for one that
also shows its arrays (:class:`asynccb.protocols.ShowsItself`), so that it is copied beside its training.

::

    sequential            what people type; satisfies protocols.Model itself
      step                one batch: forward, loss, metrics, backward, gate, update
        network           flat weights, the two passes as lists of bound calls
        updates           an optimizer goes over the arrays, block by block
        tables            a weight that is updated row by row
        heads             loss and last activation in one stable form
      memory, live        where the state lies, what a copy beside the training needs to know of it
      inspection          outputs of layers and gradients, to look at
      state, files        a copy of a model, and its way into a file; loading is the way back
      interchange         what Keras 3 writes in its files, in our words
      layers/             what a layer declares, and the operations that compute
    keras/, torch/, jax/, sklearn/    what drives a model of theirs; loaded when it is asked for
    losses, metrics, optimizers, activations, initializers    tables by Keras' names
    adapt, plain          other objects as models; the state of those that tell it as plain data
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from asynccb.models.adapt import adapt
from asynccb.models.layers import Activation, BatchNormalization, Dense, Dropout, Embedding, Flatten
from asynccb.models.loading import load_model
from asynccb.models.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from asynccb.models.sequential import Sequential

if TYPE_CHECKING:
    from asynccb.models.jax import JaxModel
    from asynccb.models.sklearn import SklearnModel
    from asynccb.models.torch import TorchModel

__all__ = [
    "SGD",
    "Activation",
    "Adagrad",
    "Adam",
    "AdamW",
    "BatchNormalization",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "JaxModel",
    "RMSprop",
    "Sequential",
    "SklearnModel",
    "TorchModel",
    "adapt",
    "load_model",
]

_LATER = {"JaxModel": "jax", "SklearnModel": "sklearn", "TorchModel": "torch"}
"""Adapters, and the module of each."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
