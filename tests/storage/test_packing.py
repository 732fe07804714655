"""Trees of plain data survive as bytes to the last bit, and no bytes do harm."""

from __future__ import annotations

import enum
import json
import math
import random
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asynccb.events import FrozenLogs
from asynccb.storage import packing
from asynccb.storage.packing import freeze, pack, unpack


def bits(tree):
    """The tree with everything in it that equality does not see: types, bits of floats, the order of keys."""
    if isinstance(tree, np.ndarray):
        return "array", tree.dtype.str, tree.shape, tree.tobytes()
    if isinstance(tree, np.generic):
        return "scalar", tree.dtype.str, tree.tobytes()
    if isinstance(tree, list):
        return [bits(item) for item in tree]
    if isinstance(tree, dict):
        return "dict", [(key, bits(value)) for key, value in tree.items()]
    return type(tree), struct.pack("<d", tree) if isinstance(tree, float) else tree


def packed(tree):
    return b"".join(pack(tree))


def memory_of(tree):
    if isinstance(tree, np.ndarray):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from memory_of(item)


# ---------------------------------------------------------------- the law

NAN_WITH_A_MESSAGE = struct.unpack("<d", b"\x01\x02\x03\x00\x00\x00\xf8\xff")[0]

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    *(kind(endianness=end) for kind in (hnp.integer_dtypes, hnp.unsigned_integer_dtypes) for end in "<>"),
    *(hnp.floating_dtypes(endianness=end, sizes=(16, 32, 64)) for end in "<>"),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
SCALARS = ARRAYS.filter(lambda array: array.size).map(lambda array: array.reshape(-1)[0])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 3000), 1 << 3000),
    st.floats(),
    st.just(NAN_WITH_A_MESSAGE),
    st.text(st.characters(exclude_categories=[])).filter(
        lambda text: not packing._JOINED_BY_JSON.search(text)
    ),
    ARRAYS,
    SCALARS,
)
KEYS = st.one_of(st.sampled_from(["$", "$$", "array", "epoch"]), st.text(max_size=5))
TREES = st.recursive(
    LEAVES,
    lambda trees: st.lists(trees, max_size=4) | st.dictionaries(KEYS, trees, max_size=4),
    max_leaves=12,
)


def comes_back(tree):
    frozen = freeze(tree)
    assert bits(frozen) == bits(tree)
    data = packed(frozen)
    assert data.index(b"\n") >= 0
    found = unpack(data + b" " * 100)  # a file has room behind it
    assert bits(found) == bits(tree)
    assert packed(found) == data
    assert all(array.flags.writeable and array.flags.aligned for array in memory_of(found))


@settings(max_examples=200)
@given(TREES)
def test_what_is_packed_comes_back_to_the_last_bit(tree):
    comes_back(tree)


@pytest.mark.long
@settings(max_examples=2000)
@given(TREES)
def test_what_is_packed_comes_back_to_the_last_bit_in_thousands_of_trees(tree):
    comes_back(tree)


def test_json_alone_would_lose_what_a_state_holds():
    """Negative control: what ``json.dumps`` makes of the same values."""
    with pytest.raises(TypeError):
        json.dumps({"a": np.float32(1)})
    assert "NaN" in json.dumps(math.nan)  # no JSON
    assert type(json.loads(json.dumps(np.float64(1)))) is not np.float64
    assert bits(json.loads(json.dumps([NAN_WITH_A_MESSAGE]))) != bits([NAN_WITH_A_MESSAGE])


def test_a_users_dict_is_never_mistaken_for_a_reference():
    tricky = {"$": ["array", "<f4", [1], 0], "$$": {"$": ["float", "00"]}, "a": [{"$": ["int", "0x1"]}]}
    assert unpack(packed(tricky)) == tricky


def test_without_the_escape_it_would_be(monkeypatch):
    """Negative control for the test above."""
    monkeypatch.setattr(packing, "_escaped", lambda key: key)
    assert unpack(packed({"$": ["int", "0x1"]})) == 1


def test_the_first_line_is_json_that_every_parser_reads_and_arrays_follow():
    array = np.arange(3, dtype="<i4")
    line, raw = packed({"a": math.inf, "text": "two\nlines", "b": array}).split(b"\n", 1)

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(line, parse_constant=refuse)
    assert found == {
        "a": {"$": ["float", "000000000000f07f"]},
        "text": "two\nlines",
        "b": {"$": ["array", "<i4", [3], 0]},
    }
    assert raw == array.tobytes()


def test_the_memory_of_arrays_is_not_copied():
    array = np.zeros((300, 1000))
    _, piece = pack(freeze({"a": array}))
    assert len(piece) == array.nbytes
    _, own = pack({"a": array})
    assert np.shares_memory(np.frombuffer(own, np.uint8), array)


def test_pure_json_padded_with_spaces_is_still_read():
    """What model files held before there were arrays in them."""
    old = {"random": {"dropout": {"bit_generator": "PCG64", "state": 1 << 90, "$": {"$": 1}}}}
    assert unpack(json.dumps(old).encode().ljust(1024)) == old


# ---------------------------------------------------------------- freezing


def test_a_frozen_tree_shares_no_memory_with_its_original():
    tree = {"logs": [1.0, 2.0], "weights": [np.ones((3, 2))], "deep": {"x": [1]}}
    before = bits(freeze(tree))
    frozen = freeze(tree)
    tree["weights"][0][:] = 5
    tree["logs"].append(3.0)
    tree["deep"]["x"][0] = 2
    assert bits(frozen) == before
    assert bits(freeze(tree)) != before


def test_views_are_frozen_as_arrays_of_their_own():
    base = np.arange(12.0).reshape(3, 4)
    for view in (base.T, base[:, ::2], base[::-1], np.broadcast_to(base[0], (5, 4))):
        frozen = freeze(view)
        assert frozen.flags.c_contiguous
        assert frozen.base is None
        assert np.array_equal(frozen, view)
        assert bits(unpack(packed(view))) == bits(frozen)


class Mode(enum.IntEnum):
    MIN = 1


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (FrozenLogs({"loss": 0.5}), {"loss": 0.5}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ([Mode.MIN, Name("x"), np.str_("y")], [1, "x", "y"]),
        (np.memmap, None),
    ],
)
def test_what_is_nearly_plain_becomes_plain(given, plain, tmp_path):
    if given is np.memmap:
        given = np.memmap(tmp_path / "f", np.float32, "w+", shape=(3,))
        plain = np.zeros(3, np.float32)
    for found in (freeze(given), unpack(packed(given))):
        assert bits(found) == bits(plain)


def ring():
    made = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        ({"best": [1, {2}]}, r"EarlyStopping\.best\[1\]", "builtins.set"),
        (
            {"best_weights": [np.zeros(1), np.zeros(1), np.array([None])]},
            r"EarlyStopping\.best_weights\[2\]",
            "dtype object",
        ),
        ({"x": {"y": object()}}, r"EarlyStopping\.x\.y", "builtins.object"),
        ({"x": b"bytes"}, r"EarlyStopping\.x", "builtins.bytes"),
        ({"x": 1j}, r"EarlyStopping\.x", "builtins.complex"),
        ({"x": {1: 2}}, r"EarlyStopping\.x", "the key 1 of type int"),
        ({"x": np.zeros(2, complex)}, r"EarlyStopping\.x", "dtype complex128"),
        ({"x": np.zeros(2, "M8[s]")}, r"EarlyStopping\.x", r"dtype datetime64\[s\]"),
        ({"x": np.zeros(2, "f4,f4")}, r"EarlyStopping\.x", "dtype"),
        ({"x": np.array(["a"])}, r"EarlyStopping\.x", "dtype <U1"),
        ({"x": np.bytes_(b"a")}, r"EarlyStopping\.x", r"dtype \|S1"),
        ({"x": np.ma.masked_array([1], [True])}, r"EarlyStopping\.x", "MaskedArray"),
        ({"x": ring()}, r"EarlyStopping\.x\[0\].*", "holds itself"),
        ({"x": "\ud800\udc00"}, r"EarlyStopping\.x", "surrogates"),
        ({"x": {"\ud800\udc00": 1}}, r"EarlyStopping\.x", "surrogates"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_what_is_not_plain_is_refused_with_its_place_and_type(value, place, kind):
    with pytest.raises(TypeError, match=rf"^{place} .*{kind}"):
        freeze(value, "EarlyStopping")
    with pytest.raises(TypeError, match=kind):
        pack(value)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="its long double is a double")
def test_a_long_double_is_refused_because_other_machines_have_another():
    with pytest.raises(TypeError, match=r"longdouble|float128"):
        freeze([np.longdouble(1)])


# ---------------------------------------------------------------- bytes from somewhere


def line(text, data=b""):
    return text.encode() + b"\n" + data


BAD = {
    "no JSON": line("{"),
    "nothing": b"",
    "an empty line": b"\n",
    "not ASCII": line('"é"'),
    "JSON without a line": b'{"$": ',
    "an unknown word": line('{"$": ["code", "x"]}'),
    "no list": line('{"$": 1}'),
    "a reference with more beside it": line('{"$": ["int", "0x1"], "a": 1}'),
    "objects": line('{"$": ["array", "|O8", [1], 0]}', bytes(8)),
    "objects, short": line('{"$": ["array", "O", [1], 0]}', bytes(8)),
    "records": line('{"$": ["array", "f4,f4", [1], 0]}', bytes(8)),
    "text": line('{"$": ["array", "<U2", [1], 0]}', bytes(8)),
    "dates": line('{"$": ["array", "<M8", [1], 0]}', bytes(8)),
    "complex": line('{"$": ["array", "<c8", [1], 0]}', bytes(8)),
    "no such type": line('{"$": ["array", "<f1", [1], 0]}', bytes(8)),
    "an offset before the data": line('{"$": ["array", "<f4", [1], -4]}', bytes(8)),
    "an offset behind the data": line('{"$": ["array", "<f4", [1], 5]}', bytes(8)),
    "an offset of nothing behind the data": line('{"$": ["array", "<f4", [0], 9]}', bytes(8)),
    "a huge offset": line('{"$": ["array", "<f4", [1], 99999999999999999999999]}', bytes(8)),
    "more than there is": line('{"$": ["array", "<f4", [3], 0]}', bytes(8)),
    "a petabyte": line('{"$": ["array", "<f8", [33554432, 4194304], 0]}', bytes(8)),
    "a length that wraps around": line('{"$": ["array", "<f8", [4294967296, 4294967296], 0]}', bytes(8)),
    "a negative length": line('{"$": ["array", "<f4", [-1, -2], 0]}', bytes(8)),
    "a length that is no number": line('{"$": ["array", "<f4", ["1"], 0]}', bytes(8)),
    "a length of true": line('{"$": ["array", "<f4", [true], 0]}', bytes(8)),
    "too many dimensions": line('{"$": ["array", "<f4", [' + ",".join("1" * 99) + "], 0]}", bytes(8)),
    "nothing in a huge shape": line('{"$": ["array", "<f8", [0, 4611686018427387904], 0]}', bytes(8)),
    "a float of seven bytes": line('{"$": ["float", "00000000000000"]}'),
    "a float that is no hex": line('{"$": ["float", "xx"]}'),
    "a scalar without bytes": line('{"$": ["scalar", "<f4", "00"]}'),
    "an int that is none": line('{"$": ["int", "0xg"]}'),
    "a number of a million digits": line("1" * 1_000_000),
    "lists without end": line("[" * 1_000_000),
    "objects without end": line('{"a":' * 1_000_000),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bytes_that_are_no_tree_are_a_value_error(data):
    with pytest.raises(ValueError):  # noqa: PT011  # of the parser, or ours
        unpack(data)


def test_many_references_to_the_same_bytes_are_not_more_memory_than_these():
    size = 4 << 20
    one = f'{{"$": ["array", "|u1", [{size}], 0]}}'
    data = line(f"[{','.join([one] * 1000)}]", bytes(size))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="larger than what is stored"):
            unpack(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * size
    halves = [f'{{"$": ["array", "|u1", [2], {offset}]}}' for offset in (0, 1)]
    assert [a.tolist() for a in unpack(line(f"[{','.join(halves)}]", b"\1\2\3\4"))] == [[1, 2], [2, 3]]


def test_text_that_is_longer_than_any_is_not_parsed(monkeypatch):
    monkeypatch.setattr(packing, "LONGEST_TEXT", 100)
    assert unpack(line('"' + "x" * 90 + '"')) == "x" * 90
    for data in (line('"' + "x" * 200 + '"'), b'"' + b"x" * 200 + b'"'):
        with pytest.raises(ValueError, match="longer than any"):
            unpack(data)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_what_would_not_be_read_is_not_written(monkeypatch, block):
    monkeypatch.setattr(packing, "LONGEST_TEXT", 100)
    monkeypatch.setattr(packing, "_BLOCK", block)
    longest = "x" * 97  # and its quotes
    assert unpack(packed(longest)) == longest
    with pytest.raises(ValueError, match="takes 100 characters without its arrays; 100 are too many"):
        pack(longest + "x")


def test_a_line_that_ends_between_two_blocks_is_found(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 7)
    for length in range(30):
        assert unpack(line('"' + "x" * length + '"', b"\n\n")) == "x" * length


SAMPLE = packed(
    {"a": [1, 2.5, math.nan, 1 << 2000], "w": [np.ones((3, 4), "f4"), np.float32(2)], "$": {"x": "text"}}
)


def survives(seed):
    choose = random.Random(seed)
    data = bytearray(SAMPLE)
    for _ in range(choose.randint(1, 8)):
        at = choose.randrange(len(data))
        match choose.randrange(4):
            case 0:
                data[at] ^= 1 << choose.randrange(8)
            case 1:
                data[at : at + choose.randint(1, 20)] = b""
            case 2:
                data[at:at] = choose.choice([b"9" * 9, b"]", b'"', b"{", b"$", b"-", b"\n", b"0"])
            case 3:
                data[at] = choose.randrange(256)
        data = data or bytearray(b" ")
    try:
        tree = unpack(bytes(data))
    except ValueError:
        return False
    assert sum(array.nbytes for array in memory_of(tree)) <= len(data), f"seed {seed}"
    return True


def test_mutated_bytes_are_a_tree_or_a_value_error():
    unpacked = sum(survives(seed) for seed in range(2_000))
    assert 100 < unpacked < 1_900  # both happen


@pytest.mark.long
def test_mutated_bytes_are_a_tree_or_a_value_error_in_a_hundred_thousand_mutants():
    assert sum(survives(seed) for seed in range(100_000)) > 1_000
