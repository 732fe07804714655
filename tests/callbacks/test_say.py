"""Messages to the person who watches."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from asynccb.callbacks.say import say

if TYPE_CHECKING:
    import pytest


def test_a_message_is_one_line_on_the_present_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    say("Epoch 3: early stopping")
    assert capsys.readouterr().out == "Epoch 3: early stopping\n"


def test_a_closed_stdout_costs_the_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert say("unheard") is None


def test_a_stdout_that_cannot_encode_the_text_costs_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", narrow)
        say("Verlust ≥ 1")
        say("heard")
    assert narrow.buffer.getvalue() == b"heard\n"
