"""Trees of plain data as bytes, and back: the state of a training, in one piece.

A tree is None, a bool, int, float or str, a numpy array or scalar of bools, integers or floats, or a list or
a dict (with keys of type str) of trees. Its bytes are one line of JSON, then the bytes of its arrays, one
behind the other. What JSON has no word for stands in it as an object with the key ``$`` alone::

    {"$": ["array", "<f4", [3, 4], 96]}     type, shape, offset behind the line
    {"$": ["scalar", "<f4", "0000803f"]}    type, bytes
    {"$": ["float", "000000000000f87f"]}    NaN and the infinities: the bytes of the double
    {"$": ["int", "-0x1f…"]}                one with more digits than every parser takes

and a key of a user's that starts with ``$`` has one more in front. Bytes are data from somewhere: unpacking
runs nothing, and allocates no more than they hold.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Buffer = bytes | memoryview

LONGEST_TEXT = 256 << 20
"""Bytes of JSON that are read at most."""

_BLOCK = 1 << 20  # bytes in which the end of the line is looked for at a time
_MOST_DIMENSIONS = 64  # numpy's own limit
_DEEPEST = 200  # lists and dicts in each other; fewer than JSON's own recursion can take
_LONGEST_INT = 1024  # bits; the interpreter may refuse decimals of more than 640 digits
_PLAIN_DTYPE = re.compile(r"[<>|][biuf][1248]")
_JOINED_BY_JSON = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def freeze(tree: Any, where: str = "") -> Any:
    """A copy of a tree that stays as it is while the original changes. Only an array that owns its memory and
    is read-only is not copied.

    Tuples become lists, mappings dicts, arrays C-contiguous, and instances of subclasses of int, float and
    str plain ones. Everything else stays as it is to the last bit.

    Args:
        tree: see the module.
        where: what the tree is called in an error.

    Raises:
        TypeError: something in it is not plain data; the message names its place, as in
            ``EarlyStopping.best_weights[2]``, and its type.
    """
    return _freeze(tree, where, _DEEPEST)


def pack(tree: Any) -> list[Buffer]:
    """The bytes of a tree, in pieces; the memory of its arrays is not copied.

    Trees that are equal to the last bit, with the same order in each dict, give equal bytes.

    Raises:
        TypeError: as :func:`freeze`.
        ValueError: what is no array would be longer than :func:`unpack` reads.
    """
    arrays = _Arrays()
    text = _json(_encode(tree, "", _DEEPEST, arrays))
    if len(text) >= LONGEST_TEXT:
        raise ValueError(
            f"the state takes {len(text)} characters without its arrays; {LONGEST_TEXT} are too many. Long "
            f"lists of numbers belong into arrays"
        )
    return [f"{text}\n".encode(), *arrays.pieces]


def unpack(data: Buffer) -> Any:
    """The tree of which :func:`pack` gave the bytes, whatever stands behind them; all its arrays are new.

    Raises:
        ValueError: these are not the bytes of a tree.
    """
    view = memoryview(data)
    end = _end_of_line(view)
    if end is None:
        return _parse(view, None)  # JSON alone: what was written before there were arrays in it
    return _parse(view[:end], _Decoder(view[end + 1 :]))


# There ---------------------------------------------------------------------------------------------------


def _freeze(tree: Any, where: str, deep: int) -> Any:
    # The cases stand in order of how often a state has them.
    kind = type(tree)
    if tree is None or kind is float or kind is bool or kind is int:
        return tree
    if isinstance(tree, np.ndarray):
        _check_array(tree, where)
        if tree.flags.owndata and tree.flags.c_contiguous and not tree.flags.writeable:
            return tree  # nobody changes it
        return np.array(tree, order="C", copy=True)
    if isinstance(tree, np.generic) and not isinstance(tree, np.str_):
        _check_dtype(tree.dtype, where)
        return tree
    if isinstance(tree, str):
        return _text(tree, where)
    if isinstance(tree, Mapping):
        _check_depth(deep, where)
        return {
            _key(key, where): _freeze(value, f"{where}.{key}" if where else key, deep - 1)
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        _check_depth(deep, where)
        if _is_finite_floats(tree):
            return list(tree)
        return [_freeze(value, f"{where}[{index}]", deep - 1) for index, value in enumerate(tree)]
    if isinstance(tree, int):
        return int.__int__(tree)
    if isinstance(tree, float):
        return float.__float__(tree)
    _refuse(where, f"is of type {kind.__module__}.{kind.__qualname__}")


class _Arrays:
    """Collects the arrays of a tree, one behind the other."""

    def __init__(self) -> None:
        self.pieces: list[Buffer] = []
        self._size = 0

    def add(self, array: Array) -> dict[str, Any]:
        found = {"$": ["array", array.dtype.str, array.shape, self._size]}
        if array.size:
            whole = array if array.flags.c_contiguous else array.copy("C")
            self.pieces.append(whole.reshape(-1).view(np.uint8).data)
            self._size += array.nbytes
        return found


def _encode(tree: Any, where: str, deep: int, arrays: _Arrays) -> Any:
    kind = type(tree)
    if tree is None or kind is bool:
        return tree
    if kind is float:
        return tree if math.isfinite(tree) else {"$": ["float", struct.pack("<d", tree).hex()]}
    if kind is int:
        return tree if tree.bit_length() <= _LONGEST_INT else {"$": ["int", hex(tree)]}
    if kind is str:
        return _text(tree, where)
    if kind is list:
        _check_depth(deep, where)
        if _is_finite_floats(tree):
            return tree
        return [_encode(value, f"{where}[{index}]", deep - 1, arrays) for index, value in enumerate(tree)]
    if kind is dict:
        _check_depth(deep, where)
        return {
            _escaped(_key(key, where)): _encode(value, f"{where}.{key}" if where else key, deep - 1, arrays)
            for key, value in tree.items()
        }
    if isinstance(tree, np.ndarray):
        _check_array(tree, where)
        return arrays.add(tree)
    if isinstance(tree, np.generic) and not isinstance(tree, np.str_):
        _check_dtype(tree.dtype, where)
        return {"$": ["scalar", tree.dtype.str, tree.tobytes().hex()]}
    if isinstance(tree, (Mapping, str, tuple, list, int, float)):
        return _encode(_freeze(tree, where, deep), where, deep, arrays)
    _refuse(where, f"is of type {kind.__module__}.{kind.__qualname__}")


def _escaped(key: str) -> str:
    return f"${key}" if key.startswith("$") else key


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        _refuse(where, f"has the key {key!r:.60} of type {type(key).__qualname__}")
    return _text(key, where)


def _text(text: str, where: str) -> str:
    if not text.isascii() and _JOINED_BY_JSON.search(text):
        _refuse(where, "is or has a text with two surrogates that JSON would join")
    return str.__str__(text)


def _is_finite_floats(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether nothing has to be done with any of them: a History has thousands."""
    return set(map(type, values)) == {float} and all(map(math.isfinite, values))


def _check_array(array: Array, where: str) -> None:
    if type(array) not in (np.ndarray, np.memmap):
        _refuse(where, f"is of type {type(array).__module__}.{type(array).__qualname__}")
    _check_dtype(array.dtype, where)


def _check_dtype(dtype: np.dtype[Any], where: str) -> None:
    if not _PLAIN_DTYPE.fullmatch(dtype.str):
        _refuse(where, f"is of dtype {dtype}, not of bools, integers or floats of at most 8 bytes")


def _check_depth(deep: int, where: str) -> None:
    if not deep:
        _refuse(f"{where[:60]}…", f"is nested more than {_DEEPEST} deep, or holds itself")


def _refuse(where: str, why: str) -> NoReturn:
    allowed = "None, bool, int, float, str, numpy arrays and scalars, lists, and dicts with keys of type str"
    raise TypeError(f"{where or 'the state'} {why}. Plain data is {allowed}")


# And back ------------------------------------------------------------------------------------------------


class _Decoder:
    """Turns the objects of the JSON into what they stand for."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._left = data, len(data)

    def __call__(self, found: dict[str, Any]) -> Any:
        if "$" not in found:
            if any(key.startswith("$") for key in found):
                return {key.removeprefix("$"): value for key, value in found.items()}
            return found
        match found:
            case {"$": ["array", str(dtype), list(shape), int(offset)], **rest} if not rest:
                return self._array(_dtype(dtype), shape, offset)
            case {"$": ["scalar", str(dtype), str(digits)], **rest} if not rest:
                return np.ndarray((), _dtype(dtype), bytes.fromhex(digits))[()]
            case {"$": ["float", str(digits)], **rest} if not rest:
                return struct.unpack("<d", bytes.fromhex(digits))[0]
            case {"$": ["int", str(digits)], **rest} if not rest:
                return int(digits, 16)
        raise ValueError("an object with the key $ is none of those that stand for something")

    def _array(self, dtype: np.dtype[Any], shape: list[Any], offset: int) -> Array:
        if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise ValueError("an array has no shape")
        nbytes = math.prod(shape) * dtype.itemsize
        # The sum too: many small references to the same bytes must not become more memory than these.
        if not 0 <= offset <= len(self._data) - nbytes or nbytes > self._left:
            raise ValueError("an array is larger than what is stored")
        self._left -= nbytes
        return np.ndarray(shape, dtype, self._data, offset).copy()


def _dtype(text: str) -> np.dtype[Any]:
    if not _PLAIN_DTYPE.fullmatch(text):
        raise ValueError(f"an array of type {text[:20]!r}")
    return np.dtype(text)


def _end_of_line(view: memoryview) -> int | None:
    for start in range(0, min(len(view), LONGEST_TEXT), _BLOCK):
        found = bytes(view[start : start + _BLOCK]).find(b"\n")
        if found >= 0:
            return start + found
    return None


def _parse(text: memoryview, decoder: _Decoder | None) -> Any:
    if len(text) > LONGEST_TEXT:
        raise ValueError("its text is longer than any that is read")
    try:
        return json.loads(str(text, "ascii"), object_hook=decoder)
    except (TypeError, struct.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"its text is damaged: {error}") from error
