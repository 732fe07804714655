"""Context variables of the caller: seen wherever a training runs his code, and leaked nowhere."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

FITS = 32
X = np.zeros((1, 1))

request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody's")


class Notes(Callback):
    """Notes what it finds, and then leaves a mark of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[tuple[str, str]] = []

    def note(self, where: str) -> None:
        self.seen.append((where, request.get()))
        request.set(f"{self.name} was here")


class Inline(Notes):
    def on_train_begin(self, logs: Any = None) -> Any:
        self.note("on_train_begin")
        return self.half("half of on_train_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        self.note("on_epoch_end")
        return self.half("half of on_epoch_end")

    def on_train_end(self, logs: Any = None) -> None:
        self.note("on_train_end")

    async def half(self, where: str) -> None:
        self.note(where)


class Beside(Notes):
    async def on_train_begin(self, logs: Any = None) -> None:
        self.note("on_train_begin")

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)
        self.note("on_epoch_end")
        self.run.announce_saved("a file", epoch)

    async def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        self.note("on_checkpoint_saved")

    async def on_train_end(self, logs: Any = None) -> None:
        self.note("on_train_end")


class Listens(Notes):
    def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        self.note("on_checkpoint_saved of a def")


class Model(ScriptedModel):
    """Notes what it finds in its batches."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.notes = Notes(name)

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.notes.seen.append(("train_batch", request.get()))
        return super().train_batch(batch)


class Source:
    """One batch in each pass, from an iterator that notes what it finds."""

    def __init__(self, name: str) -> None:
        self.notes = Notes(name)

    async def __aiter__(self) -> AsyncIterator[Any]:
        self.notes.note("an async source")
        await asyncio.sleep(0)
        self.notes.note("an async source")
        yield X

    def __iter__(self) -> Iterator[Any]:
        self.notes.seen.append(("a source", request.get()))
        yield X


class Beginner:
    """A synchronous source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return self.source.__iter__()


async def fit(number: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Trains for two epochs as request ``number``; answers what everybody found, each under his name."""
    mine = f"request {number}"
    request.set(mine)
    first, second, inline, listens = Beside("first"), Beside("second"), Inline("inline"), Listens("listens")
    model, source = Model("model"), Source("source")
    data = source if number % 2 else Beginner(source)
    await Trainer(model).fit(data, epochs=2, verbose=0, callbacks=[first, inline, second, listens])
    assert request.get() == mine
    return [(note.name, note.seen) for note in (first, second, inline, listens, model.notes, source.notes)]


@pytest.mark.asyncio
async def test_thirty_two_concurrent_trainings_see_their_own_callers_context_and_leak_nothing() -> None:
    found = await asyncio.gather(*(asyncio.create_task(fit(number)) for number in range(FITS)))
    assert request.get() == "nobody's"
    everywhere: set[str] = set()
    for number, everybody in enumerate(found):
        mine = f"request {number}"
        for name, seen in everybody:
            everywhere |= {where for where, _ in seen}
            # What it finds is the caller's, and behind its own mark that one: nobody else's.
            allowed = {mine, f"{name} was here"}
            if name in (
                "model",
                "source",
            ):  # they run on the training thread, whose context inline hooks share
                allowed.add("inline was here")
            assert {value for _, value in seen} <= allowed, (number, name, seen)
            assert seen[0][1] in (mine, "inline was here"), (number, name, seen)
    assert everywhere == {
        "on_train_begin",
        "half of on_train_begin",
        "on_epoch_end",
        "half of on_epoch_end",
        "on_train_end",
        "on_checkpoint_saved",
        "on_checkpoint_saved of a def",
        "train_batch",
        "an async source",
        "a source",
    }


@pytest.mark.asyncio
async def test_what_the_inline_half_sets_its_coroutine_does_not_see_and_the_other_way_round() -> None:
    token = request.set("mine")
    try:
        inline = Inline("inline")
        await Trainer(ScriptedModel()).fit(X, epochs=1, verbose=0, callbacks=inline)
    finally:
        request.reset(token)
    on_thread = [value for where, value in inline.seen if not where.startswith("half")]
    beside = [value for where, value in inline.seen if where.startswith("half")]
    assert on_thread == ["mine", "inline was here", "inline was here"]
    assert beside == ["mine", "inline was here"]


def test_a_naive_executor_loses_the_callers_context_and_keeps_what_a_training_before_has_set() -> None:
    """The negative control."""
    seen: list[str] = []

    def train(name: str) -> None:
        seen.append(request.get())
        request.set(name)

    async def main() -> None:
        request.set("mine")
        for number in range(2):
            await asyncio.get_running_loop().run_in_executor(None, train, f"training {number}")

    contextvars.copy_context().run(asyncio.run, main())
    assert seen == ["nobody's", "training 0"]
