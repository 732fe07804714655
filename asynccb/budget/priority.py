"""How the priority of a training becomes its weight."""

from __future__ import annotations

import contextlib
import numbers
import sys
from typing import Any

from asynccb.errors import ArgumentError

__all__ = ["check_priority", "weight_of"]

_HIGHEST = sys.float_info.max


def check_priority(priority: Any) -> float:
    """A number, as Python's own: one that wraps around (``-numpy.uint8(1)`` is 255) would turn the order of
    the line round.

    Raises:
        ArgumentError: anything else.
    """
    real = isinstance(priority, numbers.Real) and not isinstance(priority, bool)
    with contextlib.suppress(Exception):  # of a user's own kind of number
        own = int(priority) if isinstance(priority, numbers.Integral) else float(priority)
        if real and -_HIGHEST <= own <= _HIGHEST:
            return own
    raise ArgumentError("priority", priority, "a number; the default is 0, and a higher one goes first")


def weight_of(priority: float) -> float:
    """Within 8 of 0, so that nobody waits for ever."""
    return float(2.0 ** max(-8.0, min(8.0, priority)))
