"""Models: ``Sequential`` on numpy with its layers and optimizers, files of models, and what makes others fit.

Importing this imports numpy and nothing heavier; HDF5 is loaded when a file is first touched.

::

    sequential            what people type; satisfies protocols.Model itself
      step                one batch: forward, loss, metrics, backward, gate, update
        network           flat weights, the two passes as lists of bound calls
        updates           an optimizer goes over the arrays, block by block
        heads             loss and last activation in one stable form
      memory, live        where the state lies, what a copy beside the training needs to know of it
      inspection          outputs of layers and gradients, to look at
      state, files        a copy of a model, and its way into a file; loading is the way back
      layers/             what a layer declares, and the operations that compute
    losses, metrics, optimizers, activations, initializers    tables by Keras' names
"""

from __future__ import annotations

from asynccb.models.adapt import adapt
from asynccb.models.layers import Activation, BatchNormalization, Dense, Dropout, Embedding, Flatten
from asynccb.models.loading import load_model
from asynccb.models.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from asynccb.models.sequential import Sequential

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
    "RMSprop",
    "Sequential",
    "adapt",
    "load_model",
]
