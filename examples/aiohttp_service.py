"""A web service on aiohttp that trains, and answers all the while.

==================================  =================================================================
``POST /trainings``                 starts one; JSON ``{"epochs": 20, "rate": 0.1}``, both optional
``GET /trainings``                  lists them
``GET /trainings/{name}/events``    server-sent events, one for each epoch after ``Last-Event-ID``
``GET /trainings/{name}/weights``   the model as it is now, a file for ``load_model``
``POST /trainings/{name}/predict``  digits, with the model as it is now; JSON, rows of 64 numbers
``POST /trainings/{name}/stop``     ends it after the batch under way, for good
``GET /health``                     ``ok``, and how late the event loop is
==================================  =================================================================

    python examples/aiohttp_service.py FOLDER PORT

serves until SIGTERM. Then every training leaves a backup in FOLDER, the event streams end, and the process
does, within 15 s and with status 0; started again, the trainings go on. Without arguments it serves on a free
port, tries itself out as a client, and ends. What it trains and how it keeps it stands in ``trainings.py``.

Prints, among others::

    a bad request: 400, epochs=-1: ...
    watching: id: 0, id: 1
    watching: id: 2, id: 3
    while it trains: {"status": "ok"...}
    predicted with it: [...]
    loaded: <Sequential sequential: 2 layers>
    its last event: event: end
    stopped: asked over HTTP
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

from aiohttp import web
from trainings import Trainings, describe, messages, try_out

from asynccb import NotStarted, Orchestrator, Run

TRAININGS = web.AppKey("TRAININGS", Trainings)

routes = web.RouteTableDef()


@routes.post("/trainings")
async def start(request: web.Request) -> web.Response:
    asked = await request.json() if request.can_read_body else {}
    run = await request.app[TRAININGS].start(**asked)
    return web.Response(text=describe(run), status=201, content_type="application/json")


@routes.get("/trainings")
async def overview(request: web.Request) -> web.Response:
    runs = request.app[TRAININGS].orchestrator.runs.values()
    return web.Response(text=f"[{', '.join(map(describe, runs))}]", content_type="application/json")


@routes.get("/trainings/{name}/events")
async def watch(request: web.Request) -> web.StreamResponse:
    run = find(request)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    async with aclosing(messages(run, request.headers.get("Last-Event-ID", ""))) as stream:
        async for text in stream:
            try:
                await response.write(text.encode())
            except ConnectionResetError:
                break  # the client is gone; the training is not
    return response


@routes.get("/trainings/{name}/weights")
async def weights(request: web.Request) -> web.FileResponse:
    return web.FileResponse(await request.app[TRAININGS].weights(find(request)))


@routes.post("/trainings/{name}/predict")
async def predict(request: web.Request) -> web.Response:
    return web.json_response(await request.app[TRAININGS].predict(find(request), await request.json()))


@routes.post("/trainings/{name}/stop")
async def stop(request: web.Request) -> web.Response:
    run = find(request)
    await request.app[TRAININGS].stop(run)
    return web.Response(text=describe(run), status=202, content_type="application/json")


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    return web.json_response(request.app[TRAININGS].health())


def find(request: web.Request) -> Run:
    run = request.app[TRAININGS].orchestrator.runs.get(request.match_info["name"])
    if run is None:
        raise web.HTTPNotFound(text="no such training")
    return run


@web.middleware
async def refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except NotStarted as error:
        raise web.HTTPConflict(text=str(error)) from error
    except (TypeError, ValueError) as error:  # no JSON, or an ArgumentError: which it is, and what is allowed
        raise web.HTTPBadRequest(text=str(error)) from error


def build(folder: Path) -> web.Application:
    async def trains(app: web.Application) -> AsyncIterator[None]:
        async with Orchestrator() as orchestrator:
            app[TRAININGS] = Trainings(orchestrator, folder)
            yield

    async def end(app: web.Application) -> None:
        # The server takes no new connections now, and will wait for the open ones: the event streams end
        # because their trainings do.
        await app[TRAININGS].end()

    app = web.Application(middlewares=[refusals])
    app.add_routes(routes)
    app.cleanup_ctx.append(trains)
    app.on_shutdown.append(end)
    return app


async def main(folder: Path) -> None:
    runner = web.AppRunner(build(folder), shutdown_timeout=2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        await try_out(f"http://{host}:{port}")
    finally:
        await runner.cleanup()
    for run in runner.app[TRAININGS].orchestrator.runs.values():
        print(f"{run.outcome}: {run.reason}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        web.run_app(build(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), shutdown_timeout=2)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            asyncio.run(main(Path(temporary)))
