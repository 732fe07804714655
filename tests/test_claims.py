"""One live run at a time for each model and each callback."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, CallbackBusy, History, ModelBusy, Trainer, claims
from asynccb.claims import Claim
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.zeros((2, 1))


def holder_of(held: object) -> str | None:
    """The name of the run that has it now."""
    return claims._holders.get(id(held))


class Thing:
    pass


def test_a_claim_is_free_when_thread_and_supervisor_have_both_let_go() -> None:
    model = Thing()
    claim = Claim("run-a", model, [])
    assert holder_of(model) == "run-a"
    claim.let_go()
    assert (claim.freed, holder_of(model)) == (False, "run-a")
    claim.let_go()
    assert (claim.freed, holder_of(model)) == (True, None)


def test_one_more_hold_is_one_more_to_let_go_of_and_a_free_claim_gives_none() -> None:
    model = Thing()
    claim = Claim("run-a", model, [])
    assert claim.hold()
    claim.let_go()
    claim.let_go()
    assert not claim.freed
    claim.let_go()
    assert claim.freed
    assert not claim.hold()


class Handover:
    """The lock of the claims. Whoever gives it back lets another thread do ``meanwhile`` first, once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.meanwhile: Callable[[], object] | None = None

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()


def test_of_two_threads_that_let_go_at_once_one_cleans_up_and_before_that_nobody_has_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, model, told = Handover(), Thing(), list[str]()
    monkeypatch.setattr(claims, "_lock", lock)
    claim = Claim("run-a", model, [])

    def second() -> None:
        lock.meanwhile = third  # between its last look at the count and the cleaning up
        claim.let_go(lambda: told.append("cleaned up by the second"))

    def third() -> None:
        with pytest.raises(ModelBusy):
            Claim("run-b", model, [])
        assert not claim.hold()
        told.append("refused")

    lock.meanwhile = second
    claim.let_go(lambda: told.append("cleaned up by the first"))
    assert told == ["refused", "cleaned up by the second"]
    assert holder_of(model) is None


def test_a_refused_claim_claims_nothing() -> None:
    model, callback, free = Thing(), Thing(), Thing()
    claim = Claim("run-a", model, [callback])
    with pytest.raises(CallbackBusy, match="Thing already serves run-a: give each run its own instance"):
        Claim("run-b", free, [callback])
    with pytest.raises(ModelBusy, match=r"the model is already in run-a: .*snapshot\(\)\)\.to_model\(\)"):
        Claim("run-b", model, [free])
    assert holder_of(free) is None
    claim.let_go()
    claim.let_go()


def test_what_two_models_train_together_is_in_one_run_at_a_time() -> None:
    shared, first, second = Thing(), Thing(), Thing()
    first.also_trains = second.also_trains = (shared,)  # type: ignore[attr-defined]
    claim = Claim("run-a", first, [])
    with pytest.raises(ModelBusy, match="run-a"):
        Claim("run-b", second, [])
    assert holder_of(second) is None
    claim.let_go()
    claim.let_go()
    assert holder_of(shared) is None
    Claim("run-b", second, [])
    assert holder_of(shared) is None  # its claim was dropped at once


def test_things_are_told_apart_by_identity_not_by_equality() -> None:
    class Equal:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

    first, second = Equal(), Equal()
    claims = [Claim("run-a", first, []), Claim("run-b", second, [])]
    assert (holder_of(first), holder_of(second)) == ("run-a", "run-b")
    for claim in claims * 2:
        claim.let_go()


@pytest.mark.asyncio
async def test_a_second_run_of_a_model_or_a_callback_is_refused_at_start_and_legal_afterwards() -> None:
    model, recorder = ScriptedModel(gated=True), Recorder()
    run = Trainer(model).start(X, verbose=0, callbacks=recorder)
    with pytest.raises(ModelBusy, match=f"already in {run.name}"):
        Trainer(model).start(X, verbose=0)
    with pytest.raises(CallbackBusy, match=f"Recorder already serves {run.name}"):
        await Trainer(ScriptedModel()).fit(X, verbose=0, callbacks=recorder)
    model.open_for_good()
    await run
    assert (await Trainer(model).fit(X, verbose=0, callbacks=recorder)).outcome == "completed"


@pytest.mark.asyncio
async def test_the_callers_history_serves_one_run_at_a_time_too() -> None:
    model, history = ScriptedModel(gated=True), History()
    run = Trainer(model).start(X, verbose=0, callbacks=history)
    with pytest.raises(CallbackBusy, match="History already serves"):
        Trainer(ScriptedModel()).start(X, verbose=0, callbacks=history)
    model.open_for_good()
    assert await run is history


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("overflow", "drop"),
        ("on_error", "rase"),
        ("mailbox_size", 0),
        ("mailbox_size", 1.5),
        ("mailbox_size", True),
    ],
)
async def test_a_misspelt_setting_of_a_callback_is_refused_and_the_model_stays_free(
    attribute: str, value: Any
) -> None:
    model = ScriptedModel()
    odd = type("Odd", (Callback,), {attribute: value})()
    with pytest.raises(ArgumentError, match=rf"Odd\.{attribute}=") as caught:
        Trainer(model).start(X, verbose=0, callbacks=odd)
    assert caught.value.given == value
    assert (await Trainer(model).fit(X, verbose=0)).outcome == "completed"


@pytest.mark.asyncio
async def test_the_model_of_an_ended_run_is_free_before_anybody_is_told() -> None:
    model = ScriptedModel()
    for _ in range(20):
        await Trainer(model).fit(X, verbose=0)
        await asyncio.gather(Trainer(model).fit(X, verbose=0))
    assert model.steps == 40


def test_a_claim_that_nobody_can_let_go_of_any_more_falls_with_its_run() -> None:
    model = object()
    claim = Claim("first", model, [])
    with pytest.raises(ModelBusy):
        Claim("second", model, [])
    del claim
    gc.collect()
    third = Claim("third", model, [])
    third.let_go()
    third.let_go()


@pytest.mark.asyncio
async def test_an_attribute_of_a_users_callback_is_nothing_that_a_run_claims() -> None:
    """However it is named: equal small objects are one and the same."""

    class Marked(Callback):
        _wrapped = True

    first = Trainer(model := ScriptedModel(gated=True)).start(X, verbose=0, callbacks=Marked())
    assert (await Trainer(ScriptedModel()).fit(X, verbose=0, callbacks=Marked())).outcome == "completed"
    model.open_for_good()
    await first
