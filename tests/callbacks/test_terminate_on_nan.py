"""TerminateOnNaN: which losses end a training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from asynccb.callbacks.terminate_on_nan import TerminateOnNaN


def stopped_by(logs: dict[str, object] | None, run: object = None) -> bool:
    callback = TerminateOnNaN()
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.run = run
    callback.on_batch_end(5, logs)
    stop: bool = callback.model.stop_training
    return stop


@pytest.mark.parametrize(
    "loss", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(np.inf), np.array([1.0, np.nan])]
)
def test_a_loss_that_is_nan_or_infinite_stops_and_says_so(
    loss: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_by({"loss": loss}) is True
    assert capsys.readouterr().out == "Batch 5: Invalid loss, terminating training\n"


@pytest.mark.parametrize(
    "logs", [{"loss": 1e308}, {"loss": np.float32(0)}, {"loss": 3}, {"acc": math.nan}, {}, None]
)
def test_a_finite_loss_or_none_passes_in_silence(
    logs: dict[str, object] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_by(logs) is False
    assert capsys.readouterr().out == ""


def test_the_run_is_told_why() -> None:
    reasons: list[str] = []
    stopped_by({"loss": math.nan}, SimpleNamespace(stop=reasons.append))
    assert reasons == ["TerminateOnNaN: the loss of batch 5 is nan"]
