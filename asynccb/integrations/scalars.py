"""What a step answers in the loops of others, as logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["of_output", "scalars"]


def of_output(output: Any) -> dict[str, Any]:
    """The numbers of a dict; a number alone is the ``loss``; anything else is nothing."""
    return scalars(output if isinstance(output, dict) else {"loss": output})


def scalars(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of them that are numbers, or arrays and tensors of one number without a dimension."""
    return {name: value for name, value in given.items() if _is_scalar(value)}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or getattr(value, "ndim", None) == 0
