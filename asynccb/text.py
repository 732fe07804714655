"""Text that leaves the process: JSON that every parser reads, names that are safe on a terminal and in a log.

Both start from the same danger: metric names, values and file names come from users, models and the network.
A bare ``NaN`` makes a browser refuse the whole message, and an escape sequence in a metric's name moves the
reader's cursor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

__all__ = ["printable", "strict_json"]


def strict_json(obj: object) -> str:
    """``obj`` as JSON (RFC 8259), in ASCII, laid out as ``json.dumps`` does it. No value is altered silently.

    JSON has no word for some numbers; they become strings, which a reader can turn back:

    * NaN and the infinities, of any type: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``;
    * a Decimal, and a ``np.longdouble`` that no float equals: its digits.

    numpy scalars become the equal Python number (a float32 keeps its exact value), numpy arrays nested lists,
    tuples lists. Integers are written with all their digits, though some parsers read them as doubles.

    Args:
        obj: dicts with string keys, lists, tuples, strings, numbers, bools, None, and numpy's arrays and
            scalars of them.

    Raises:
        TypeError: anything else; the message names its type and where it stands.
    """
    return json.dumps(_plain(obj, ""), allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    # The cases stand in order of how often logs have them.
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else _not_finite(value)
    if isinstance(value, np.longdouble):
        return _wide(value)
    if isinstance(value, np.ndarray) and value.dtype == np.longdouble:
        return _wide(value[()]) if value.ndim == 0 else [_plain(item, where) for item in value]
    if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biufUO":
        return _plain(value.tolist(), where)
    raise TypeError(f"a {type(value).__name__}{where and f' at {where}'} has no JSON form")


def _key(key: object, where: str) -> str:
    if isinstance(key, str):
        return key
    kind = type(key).__name__
    raise TypeError(f"the key {key!r}{where and f' at {where}'} is a {kind}; keys of JSON are strings")


def _not_finite(value: Any) -> str:
    if value.is_nan() if isinstance(value, Decimal) else value != value:
        return "NaN"  # asked of a Decimal by name: comparing its signalling NaN raises
    return "Infinity" if value > 0 else "-Infinity"


def _wide(value: Any) -> Any:
    if not np.isfinite(value):
        return _not_finite(value)
    narrow = float(value)
    return narrow if narrow == value else str(value)


# C0, DEL and C1; line and paragraph separator; the twelve bidi controls; lone surrogates, which no
# terminal takes.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
)


def printable(text: str) -> str:
    r"""``text`` with everything escaped that could move a cursor, break a line or reorder what is read.

    ``"\x1b[2J"`` becomes the visible ``\x1b[2J``, a newline ``\x0a``, a right-to-left override ``\u202e``.
    Ordinary text of any script, backslashes included, stays as it is; so the result is for eyes, not for
    turning back.
    """
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
