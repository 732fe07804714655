"""A web service that trains, and answers all the while.

=================================  ==================================================================
``POST /trainings``                starts one; JSON ``{"epochs": 20, "rate": 0.1}``, both optional
``GET /trainings``                 lists them
``GET /trainings/{name}/events``   server-sent events; a browser that was cut off goes on where it was
``POST /trainings/{name}/stop``    ends it after the batch under way
``GET /health``                    ``ok``
=================================  ==================================================================

Run as a script it serves on a free port, is its own client, and ends.

Prints, among others::

    a bad request: epochs=-1: ...
    started run-1
    watching: event ... is the end of epoch 0
    watching: event ... is the end of epoch 1
    cut off; again with Last-Event-ID: ...
    watching: event ... is the end of epoch 2
    health while it trains: ok
    run-1 stopped: asked over HTTP
    run-2 cancelled: the service shuts down
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing

from aiohttp import ClientSession, web
from sklearn.datasets import load_digits

from asynccb import Gap, Run, Trainer
from asynccb.events import EpochEnd, TrainEnd
from asynccb.models import SGD, Dense, Sequential
from asynccb.text import strict_json  # a loss may be NaN, which JSON has no word for

RUNS = web.AppKey("RUNS", dict[str, Run])
DIGITS = load_digits()

routes = web.RouteTableDef()


@routes.post("/trainings")
async def start(request: web.Request) -> web.Response:
    try:
        asked = await request.json() if request.can_read_body else {}
        model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")])
        model.compile(SGD(asked.get("rate", 0.1)), "sparse_categorical_crossentropy", ["accuracy"])
        run = Trainer(model).start(
            DIGITS.data / 16,
            DIGITS.target,
            epochs=asked.get("epochs", 20),
            validation_split=0.2,
            verbose=0,
        )
    except ValueError as error:  # no JSON, or an ArgumentError: which argument it is, and what is allowed
        raise web.HTTPBadRequest(text=str(error)) from error
    request.app[RUNS][run.name] = run
    return web.json_response(describe(run), status=201, dumps=strict_json)


@routes.get("/trainings")
async def overview(request: web.Request) -> web.Response:
    return web.json_response([describe(run) for run in request.app[RUNS].values()], dumps=strict_json)


@routes.post("/trainings/{name}/stop")
async def stop(request: web.Request) -> web.Response:
    run = find(request)
    run.stop("asked over HTTP")
    return web.json_response(describe(run), status=202, dumps=strict_json)


@routes.get("/trainings/{name}/events")
async def watch(request: web.Request) -> web.StreamResponse:
    run = find(request)
    last = request.headers.get("Last-Event-ID", "")  # a browser sends it of its own accord when it reconnects
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    # A slow client never holds the training: what it misses comes as one Gap.
    async with aclosing(run.events(since=int(last) + 1 if last.isdecimal() else 0)) as events:
        async for event in events:
            match event:
                case EpochEnd(epoch=epoch, logs=logs):
                    text = f"id: {event.seq}\nevent: epoch\ndata: {strict_json({'epoch': epoch, **logs})}\n\n"
                case TrainEnd():
                    text = f"id: {event.seq}\nevent: end\ndata: {strict_json(describe(run))}\n\n"
                case Gap(missing=missed):
                    text = f"event: gap\ndata: {missed}\n\n"
                case _:
                    continue
            try:
                await response.write(text.encode())
            except ConnectionResetError:
                break  # the client is gone; the training is not
    return response


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def find(request: web.Request) -> Run:
    run = request.app[RUNS].get(request.match_info["name"])
    if run is None:
        raise web.HTTPNotFound(text="no such training")
    return run


def describe(run: Run) -> dict[str, object]:
    return {"name": run.name, "state": run.state, "epoch": run.epoch, "logs": run.logs, "reason": run.reason}


async def end_trainings(app: web.Application) -> None:
    # The server takes no new connections now, and will wait for the open ones: the event streams end
    # because their trainings do, after every callback has closed its files.
    for run in app[RUNS].values():
        run.cancel("the service shuts down")
    await asyncio.gather(*app[RUNS].values(), return_exceptions=True)


def build() -> web.Application:
    app = web.Application()
    app[RUNS] = {}
    app.add_routes(routes)
    app.on_shutdown.append(end_trainings)
    return app


# The client


async def main() -> None:
    runner = web.AppRunner(build())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with ClientSession(f"http://{host}:{port}") as client:
            await use(client)
    finally:
        await runner.cleanup()
    for run in list(runner.app[RUNS].values()):
        print(f"{run.name} {run.state}: {run.reason}")


async def use(client: ClientSession) -> None:
    async with client.post("/trainings", json={"epochs": -1}) as answer:
        print(f"a bad request: {await answer.text()}")
    async with client.post("/trainings", json={"epochs": 100_000}) as answer:
        name = (await answer.json())["name"]
        print(f"started {name}")

    last = await follow(client, name, {}, until=1)
    print(f"cut off; again with Last-Event-ID: {last}")
    await follow(client, name, {"Last-Event-ID": last}, until=2)

    async with client.get("/health") as answer:
        print(f"health while it trains: {await answer.text()}")
    async with client.post(f"/trainings/{name}/stop") as answer:
        answer.raise_for_status()
    await follow(client, name, {}, until=100_000)  # to its end
    async with client.post("/trainings", json={"epochs": 100_000}) as answer:
        answer.raise_for_status()


async def follow(client: ClientSession, name: str, headers: dict[str, str], until: int) -> str:
    """Reads the events of a training until epoch ``until`` has ended, and answers the last event's id."""
    last = ""
    async with client.get(f"/trainings/{name}/events", headers=headers) as stream:
        async for fields in messages(stream.content):
            last = fields.get("id", last)
            if fields["event"] == "end":
                break
            if fields["event"] == "epoch":
                epoch = int(fields["data"].split('"epoch": ')[1].split(",")[0])
                print(f"watching: event {last} is the end of epoch {epoch}")
                if epoch == until:
                    break
    return last


async def messages(lines: AsyncIterable[bytes]) -> AsyncIterator[dict[str, str]]:
    """Server-sent events, each as a dict of its fields."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line == b"\n":
            yield fields
            fields = {}
        else:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            fields[name] = value


if __name__ == "__main__":
    asyncio.run(main())
