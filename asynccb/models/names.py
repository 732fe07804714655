"""Names in place of objects: one lookup, one error with the nearest names; names from classes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from asynccb.errors import ArgumentError, nearest

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

T = TypeVar("T")


def lookup(argument: str, name: object, table: Mapping[str, T]) -> T:
    """``table[name]``.

    Raises:
        ArgumentError: naming ``argument`` and the nearest known names.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ArgumentError(argument, name, "is not a known name", nearest(name, table))


def snake_case(word: str) -> str:
    """``BatchNormalization`` -> ``batch_normalization``; ``ReLU`` -> ``re_lu``, as Keras names groups."""
    word = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", word)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", word).lower()


def numbered(base: str, taken: Container[str], separator: str = "_", first: int = 1) -> str:
    """``base``, or ``base_1``, ``base_2``, ... : the first that is not taken."""
    if base not in taken:
        return base
    number = first
    while f"{base}{separator}{number}" in taken:
        number += 1
    return f"{base}{separator}{number}"
