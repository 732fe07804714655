"""JAX: a pure step and its state as a model. JAX is imported when the first one is made.

::

    model           JaxModel: what a training asks of it
      state         its leaves by name, on the device and in a file
"""

from __future__ import annotations

from asynccb.models.jax.model import JaxModel

__all__ = ["JaxModel"]
