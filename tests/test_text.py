"""Strict JSON, checked by another language's parser, and the one escape function for names."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb.text import printable, strict_json


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), '"NaN"'),
        (float("inf"), '"Infinity"'),
        (float("-inf"), '"-Infinity"'),
        (-0.0, "-0.0"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (2**63, "9223372036854775808"),
        (np.float16(0.5), "0.5"),
        (np.float32(0.1), "0.10000000149011612"),
        (np.float64(0.1), "0.1"),
        (np.float32("nan"), '"NaN"'),
        (np.float16("-inf"), '"-Infinity"'),
        (np.int64(-7), "-7"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (np.bool_(True), "true"),
        (np.str_("é"), '"\\u00e9"'),
        (np.array(0.25), "0.25"),
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (np.array([1.0, np.nan], np.float32), '[1.0, "NaN"]'),
        (np.longdouble("inf"), '"Infinity"'),
        (np.longdouble(0.5), "0.5"),
        (np.array([0.5, np.inf], np.longdouble), '[0.5, "Infinity"]'),
        (Decimal("0.10"), '"0.10"'),
        (Decimal("NaN"), '"NaN"'),
        (Decimal("sNaN"), '"NaN"'),
        (Decimal("-Infinity"), '"-Infinity"'),
        (True, "true"),
        (None, "null"),
        ((1, "a"), '[1, "a"]'),
        ({"epoch": 3, "loss": 0.5}, '{"epoch": 3, "loss": 0.5}'),
        ({"a": {"b": [float("nan")]}}, '{"a": {"b": ["NaN"]}}'),
    ],
)
def test_each_value_has_its_literal_form(value: object, expected: str) -> None:
    assert strict_json(value) == expected


def test_a_long_double_beyond_doubles_keeps_its_digits() -> None:
    value = np.longdouble(1) + np.finfo(np.longdouble).eps
    if float(value) == value:
        pytest.skip("long doubles are doubles here")
    assert strict_json(value) == json.dumps(str(value))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "a object has no JSON form"),
        ({"a": {1, 2}}, "a set at ['a'] has no JSON form"),
        ({"a": [1, b"x"]}, "a bytes at ['a'][1] has no JSON form"),
        (np.complex64(1), "a complex64 has no JSON form"),
        ({1: 2}, "the key 1 is a int; keys of JSON are strings"),
        ({"a": {None: 2}}, "the key None at ['a'] is a NoneType; keys of JSON are strings"),
    ],
)
def test_what_has_no_json_form_is_refused_by_type_and_place(value: object, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        strict_json(value)
    assert str(caught.value) == words


numbers = (
    st.floats() | st.integers() | st.floats(width=32).map(np.float32) | st.floats(width=16).map(np.float16)
)
leaves = numbers | st.none() | st.booleans() | st.text()
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def _refuse(constant: str) -> object:
    raise AssertionError(f"bare {constant}")


def _expected(value: object) -> object:
    if isinstance(value, dict):
        return {key: _expected(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expected(item) for item in value]
    if isinstance(value, (float, np.floating)) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@given(trees)
def test_whatever_is_written_is_strict_and_reads_back_equal(tree: object) -> None:
    assert json.loads(strict_json(tree), parse_constant=_refuse) == _expected(tree)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_another_language_parses_what_pythons_own_writer_spoils() -> None:
    value = {"a": [float("nan"), float("inf"), -0.0, 5e-324, 2**63, np.float32(0.1)], "\u2028": "\ud800"}

    def parses(text: str) -> bool:
        script = "JSON.parse(require('fs').readFileSync(0, 'utf8'))"
        done = subprocess.run(["node", "-e", script], input=text, text=True, capture_output=True)
        return done.returncode == 0

    assert parses(strict_json(value))
    assert not parses(json.dumps({"a": float("nan")}))


CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
BIDI = [chr(code) for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def test_all_controls_and_the_twelve_bidi_marks_are_escaped() -> None:
    unsafe = [*CONTROLS, *BIDI, "\u2028", "\u2029"]
    assert (len(CONTROLS), len(BIDI)) == (65, 12)
    assert [c for c in unsafe if c in printable(f"a{c}b")] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2Jloss", "\\x1b[2Jloss"),
        ("\x1b]8;;http://x\x07click", "\\x1b]8;;http://x\\x07click"),
        ("\x1b]52;c;Zm9v\x9c", "\\x1b]52;c;Zm9v\\x9c"),
        ("loss\nEpoch 9: saved", "loss\\x0aEpoch 9: saved"),
        ("a\u2028b\u202ec", "a\\u2028b\\u202ec"),
        ("\ud800", "\\ud800"),
        ("損失 précision Δ 🙂 C:\\new", "損失 précision Δ 🙂 C:\\new"),
        ("", ""),
    ],
)
def test_names_are_shown_and_never_obeyed(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text())
def test_a_printed_name_is_one_line_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode()
