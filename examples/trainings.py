"""What the two web services of this folder have in common: trainings by name, which go on where they were
when the process is started again, and a client that tries a service out. As a script: the trainings alone.

Prints, among others::

    id: 0
    stopped: the service shuts down
    started again in epoch ...; completed after 50 epochs
"""

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientSession
from sklearn.datasets import load_digits

from asynccb import Orchestrator, Run, Trainer
from asynccb.callbacks import BackupAndRestore
from asynccb.events import EpochEnd
from asynccb.models import SGD, Dense, Sequential, load_model
from asynccb.text import strict_json  # a loss may be NaN, which JSON has no word for

DIGITS = load_digits()


class Trainings:
    """Trainings by name, as ``orchestrator.runs`` has them.

    Args:
        folder: has for each what was asked for (``<name>.json``) and its backups (``<name>/``). What stands
            there goes on.
    """

    def __init__(self, orchestrator: Orchestrator, folder: Path) -> None:
        self.orchestrator = orchestrator
        self.folder = folder
        for file in sorted(folder.glob("*.json")):
            self._submit(file.stem, **json.loads(file.read_text()))

    def _submit(self, name: str, epochs: int = 20, rate: float = 0.1) -> Run:
        optimizer = SGD(rate)  # a rate that makes no sense is refused now

        def build() -> Trainer:  # the model, when its turn comes
            model = Sequential([Dense(32, "relu", input_dim=64), Dense(10, "softmax")], seed=1)
            model.compile(optimizer, "sparse_categorical_crossentropy", ["accuracy"])
            return Trainer(model, seed=1)

        backups = BackupAndRestore(self.folder / name, save_freq=1000)  # batches, and where it ends
        x, y = DIGITS.data / 16, DIGITS.target
        return self.orchestrator.submit(
            build, x, y, epochs=epochs, validation_split=0.2, callbacks=backups, name=name
        )

    async def start(self, **asked: Any) -> Run:
        """ValueError or TypeError: which argument it is, and what is allowed."""
        run = self._submit(secrets.token_hex(4), **asked)
        await asyncio.to_thread((self.folder / f"{run.name}.json").write_text, json.dumps(asked))
        return run

    async def stop(self, run: Run) -> None:
        """For good: it does not go on when the process is started again."""
        await asyncio.to_thread((self.folder / f"{run.name}.json").unlink, missing_ok=True)
        run.stop("asked over HTTP")

    async def weights(self, run: Run) -> Path:
        """A file of the model as it is now, between two batches, which do not wait for it."""
        path = self.folder / f"{run.name}.h5"
        await asyncio.to_thread((await run.snapshot()).save, path)
        return path

    async def predict(self, run: Run, rows: object) -> list[int]:
        """With the model as it is now."""
        model = (await run.snapshot()).to_model()
        outputs = await asyncio.to_thread(model.predict, rows)
        return [int(digit) for digit in outputs.argmax(axis=1)]

    def health(self) -> dict[str, Any]:
        stats = self.orchestrator.stats
        return {"status": "ok", "live": stats.live, "queued": stats.queued, "lag": stats.lag._asdict()}

    async def end(self) -> None:
        """Ends all, within 12 s; each that has begun leaves a backup of where it was."""
        runs = self.orchestrator.runs.values()
        for end in (Run.stop, Run.cancel):  # the second one where a callback holds the first one up
            for run in runs:
                end(run, "the service shuts down")
            with suppress(TimeoutError):
                async with asyncio.timeout(6):
                    await asyncio.gather(*runs, return_exceptions=True)


def describe(run: Run) -> str:
    """A run as JSON; ``resumed``: the epoch in which it went on."""
    told = {name: getattr(run, name) for name in ("name", "state", "epoch", "logs", "reason")}
    return strict_json({**told, "resumed": run.resumed and run.resumed.epoch})


async def messages(run: Run, last_event_id: str = "") -> AsyncGenerator[str, None]:
    """A run's epochs as server-sent events. A browser that was cut off sends the last id that it has seen,
    and gets those after it, also from a process that was started again meanwhile."""
    last = int(last_event_id) if last_event_id.isdecimal() else -1
    async with aclosing(run.events(since=0)) as events:
        async for event in events:
            if isinstance(event, EpochEnd):  # the History has it by now, and those that no reader can have
                for epoch, logs in run.history.recorded()[last + 1 :]:
                    yield message(epoch, logs)
                    last = epoch
    for epoch, logs in run.history.recorded()[last + 1 :]:
        yield message(epoch, logs)
    yield f"event: end\ndata: {describe(run)}\n\n"


def message(epoch: int, logs: dict[str, Any]) -> str:
    return f"id: {epoch}\nevent: epoch\ndata: {strict_json({'epoch': epoch, **logs})}\n\n"


async def try_out(url: str) -> None:
    """A client of either service."""
    async with ClientSession(url) as client:
        async with client.post("/trainings", json={"epochs": -1}) as answer:
            print(f"a bad request: {answer.status}, {await answer.text()}")
        async with client.post("/trainings", json={"epochs": 100_000}) as answer:
            name = (await answer.json())["name"]
        for headers in ({}, {"Last-Event-ID": "1"}):
            async with client.get(f"/trainings/{name}/events", headers=headers) as stream:
                lines = [(await stream.content.readline()).decode().strip() for _ in range(8)]
                print(f"watching: {lines[0]}, {lines[4]}")
        async with client.get("/health") as answer:
            print(f"while it trains: {await answer.text()}")
        rows = (DIGITS.data[:5] / 16).tolist()
        async with client.post(f"/trainings/{name}/predict", json=rows) as answer:
            print(f"predicted with it: {await answer.json()}")
        async with client.get(f"/trainings/{name}/weights") as answer:
            print(f"loaded: {await asyncio.to_thread(loaded, await answer.read())}")
        async with client.post(f"/trainings/{name}/stop") as answer:
            answer.raise_for_status()
        async with client.get(f"/trainings/{name}/events", headers={"Last-Event-ID": "100000"}) as stream:
            print(f"its last event: {(await stream.text()).splitlines()[0]}")


def loaded(body: bytes) -> Sequential:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "now.h5")
        path.write_bytes(body)
        return load_model(path)


async def main(folder: Path) -> None:
    async with Orchestrator() as orchestrator:
        trainings = Trainings(orchestrator, folder)
        run = await trainings.start(epochs=50)
        async with aclosing(messages(run)) as stream:
            print(await anext(stream))
        await trainings.end()
        print(f"{run.outcome}: {run.reason}")
    async with Orchestrator() as orchestrator:
        run = Trainings(orchestrator, folder).orchestrator.runs[run.name]
        epochs = len((await run).epoch)
    print(f"started again in epoch {run.resumed and run.resumed.epoch}; {run.outcome} after {epochs} epochs")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(temporary)))
