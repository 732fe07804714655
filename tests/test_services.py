"""The two services of the examples keep what they promise to clients that know them by HTTP alone, while they
train, and over SIGTERM and a start anew."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import ClientConnectorError, ClientSession
from sklearn.datasets import load_digits

from asynccb.models import load_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENDS_WITH = {"aiohttp_service.py": 0, "fastapi_service.py": -signal.SIGTERM}
"""Exit status after SIGTERM, as each of them documents it."""
DEADLINE = 15
"""Seconds from SIGTERM to the end of the process, likewise."""
FOR_EVER = {"epochs": 1_000_000}


class Service:
    """An example as a process of its own, on one folder and port however often it is started."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        with (self.folder / "said").open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLES / self.name, self.folder, str(self.port)],
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=said,
                stderr=said,
            )

    async def terminate(self) -> int:
        """Answers the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, DEADLINE)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ClientSession]:
        async with ClientSession(f"http://127.0.0.1:{self.port}") as session:
            while True:
                try:
                    async with session.get("/health") as answer:
                        assert answer.status == 200
                    break
                except ClientConnectorError:
                    assert self.process.poll() is None, self.said()
                    await asyncio.sleep(0.05)
            yield session


@pytest.fixture(scope="module", params=list(ENDS_WITH))
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    found = Service(request.param, tmp_path_factory.mktemp("service"))
    yield found
    found.process.kill()
    found.process.wait()
    assert "Traceback" not in found.said(), found.said()


@pytest_asyncio.fixture
async def client(service: Service) -> AsyncIterator[ClientSession]:
    """Its trainings are stopped at the end of the test."""
    async with service.client() as session:
        yield session
        async with session.get("/trainings") as answer:
            live = [run["name"] for run in await answer.json() if run["state"] in ("queued", "running")]
        for name in live:
            (await session.post(f"/trainings/{name}/stop")).release()
            await ids_and_end(session, name, after=FOR_EVER["epochs"])


async def start(client: ClientSession, **asked: Any) -> str:
    async with client.post("/trainings", json=asked) as answer:
        assert answer.status == 201, await answer.text()
        return str((await answer.json())["name"])


async def told(client: ClientSession, name: str) -> dict[str, Any]:
    async with client.get("/trainings") as answer:
        (found,) = [run for run in await answer.json() if run["name"] == name]
        return dict(found)


async def events(
    client: ClientSession, name: str, after: int | None = None
) -> AsyncIterator[tuple[str, str, Any]]:
    """Kind, id and data of each."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    async with client.get(f"/trainings/{name}/events", headers=headers) as stream:
        assert stream.content_type == "text/event-stream"
        fields: dict[str, str] = {}
        async for line in stream.content:
            if line == b"\n":
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}
            else:
                field, _, value = line.decode().rstrip("\n").partition(": ")
                fields[field] = value


async def some_ids(client: ClientSession, name: str, count: int, after: int | None = None) -> list[int]:
    """Of the next epochs; then it is cut off."""
    seen: list[int] = []
    async for kind, number, data in events(client, name, after):
        assert (kind, int(number)) == ("epoch", data["epoch"])
        seen.append(int(number))
        if len(seen) == count:
            break
    return seen


async def ids_and_end(
    client: ClientSession, name: str, after: int | None = None
) -> tuple[list[int], dict[str, Any]]:
    """Of all epochs until the training has ended, and how it did."""
    seen = [event async for event in events(client, name, after)]
    kind, _, end = seen.pop()
    assert kind == "end"
    return [int(number) for _, number, _ in seen], end


@pytest.mark.asyncio
async def test_trainings_are_listed_and_what_cannot_be_is_refused(client: ClientSession) -> None:
    names = [await start(client, **FOR_EVER), await start(client, epochs=1, rate=0.01)]
    async with client.get("/trainings") as answer:
        assert {run["name"] for run in await answer.json()} >= set(names)
    for asked, words in (({"epochs": -1}, "epochs=-1"), ({"depth": 3}, "depth"), ({"rate": "fast"}, "fast")):
        async with client.post("/trainings", json=asked) as answer:
            assert (answer.status, words in await answer.text()) == (400, True)
    async with client.get("/trainings/nobody/weights") as answer:
        assert answer.status == 404


@pytest.mark.asyncio
async def test_a_watch_that_is_cut_off_goes_on_without_loss_or_repeat(client: ClientSession) -> None:
    name = await start(client, epochs=300)
    first = await some_ids(client, name, 3)
    second = await some_ids(client, name, 4, after=first[-1])
    rest, end = await ids_and_end(client, name, after=second[-1])
    assert first + second + rest == list(range(300))
    assert (end["state"], end["epoch"]) == ("completed", 299)
    # The control: who does not say what he has seen gets it again, the end of it included.
    again, _ = await ids_and_end(client, name)
    assert again == list(range(300))


@pytest.mark.asyncio
async def test_the_model_of_a_training_under_way_loads_and_predicts(
    client: ClientSession, tmp_path: Path
) -> None:
    digits = load_digits()
    name = await start(client, **FOR_EVER)
    (seen,) = await some_ids(client, name, 1)  # it has begun
    early = await weights(client, name, tmp_path / "early.h5")
    await some_ids(client, name, 60, after=seen)
    late = await weights(client, name, tmp_path / "late.h5")
    assert any((a != b).any() for a, b in zip(early.get_weights(), late.get_weights(), strict=True))
    outputs = late.predict(digits.data / 16)
    assert (outputs.argmax(axis=1) == digits.target).mean() > 0.8
    async with client.post(f"/trainings/{name}/predict", json=(digits.data[:50] / 16).tolist()) as answer:
        predicted = await answer.json()
    assert sum(a == b for a, b in zip(predicted, digits.target[:50].tolist(), strict=True)) > 40
    async with client.post(f"/trainings/{name}/predict", json=[[1.0, 2.0]]) as answer:
        assert answer.status == 400  # not rows of 64
    assert (await told(client, name))["state"] == "running"


async def weights(client: ClientSession, name: str, path: Path) -> Any:
    async with client.get(f"/trainings/{name}/weights") as answer:
        assert answer.status == 200, await answer.text()
        path.write_bytes(await answer.read())
    return load_model(path)


@pytest.mark.asyncio
async def test_health_is_told_while_more_train_than_there_is_room_for(client: ClientSession) -> None:
    for _ in range(4 * (os.cpu_count() or 1) + 1):  # twice as many as slots: some may be lent
        last = await start(client, **FOR_EVER)
    for _ in range(30):
        async with client.get("/health") as answer:
            told_now = await answer.json()
            assert (answer.status, told_now["status"]) == (200, "ok")
    assert told_now["live"] > 0
    assert told_now["queued"] > 0
    assert told_now["lag"]["worst"] >= told_now["lag"]["p50"] >= 0
    async with client.get(f"/trainings/{last}/weights") as answer:
        assert answer.status == 409  # it has none yet
        assert "queued" in await answer.text()


@pytest.mark.asyncio
async def test_a_stopped_training_says_why_and_its_watchers_come_to_the_end(client: ClientSession) -> None:
    name = await start(client, **FOR_EVER)
    watching = asyncio.create_task(ids_and_end(client, name))
    await some_ids(client, name, 1)
    async with client.post(f"/trainings/{name}/stop") as answer:
        assert answer.status == 202
    seen, end = await watching
    assert seen == list(range(len(seen)))
    assert (end["state"], end["reason"]) == ("stopped", "asked over HTTP")


@pytest.mark.asyncio
@pytest.mark.skipif(sys.platform == "win32", reason="nothing ends there in good order from outside")
async def test_after_sigterm_it_goes_on_from_its_backup_when_it_is_started_again(service: Service) -> None:
    async with service.client() as client:
        name, stopped = await start(client, **FOR_EVER), await start(client, **FOR_EVER)
        (await client.post(f"/trainings/{stopped}/stop")).release()
        watching = asyncio.create_task(ids_and_end(client, name))
        await some_ids(client, name, 30)
        status = await service.terminate()
        seen, end = await watching
    assert status == ENDS_WITH[service.name], service.said()
    assert seen == list(range(len(seen)))
    assert (end["state"], end["reason"]) == ("stopped", "the service shuts down")

    service.start()
    async with service.client() as client:
        assert await some_ids(client, name, 3, after=seen[-1]) == [seen[-1] + n for n in (1, 2, 3)]
        now = await told(client, name)
        assert now["state"] == "running"
        assert now["resumed"] >= seen[-1]  # and did not begin anew
        assert await some_ids(client, name, 30) == list(range(30))  # of what was before, too
        async with client.get("/trainings") as answer:
            assert stopped not in {run["name"] for run in await answer.json()}
        (await client.post(f"/trainings/{name}/stop")).release()
        await ids_and_end(client, name, after=FOR_EVER["epochs"])
