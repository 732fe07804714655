"""A web service on FastAPI that trains, and answers all the while.

==================================  =================================================================
``POST /trainings``                 starts one; JSON ``{"epochs": 20, "rate": 0.1}``, both optional
``GET /trainings``                  lists them
``GET /trainings/{name}/events``    server-sent events, one for each epoch after ``Last-Event-ID``
``GET /trainings/{name}/weights``   the model as it is now, a file for ``load_model``
``POST /trainings/{name}/predict``  digits, with the model as it is now; JSON, rows of 64 numbers
``POST /trainings/{name}/stop``     ends it after the batch under way, for good
``GET /health``                     ``ok``, and how late the event loop is
==================================  =================================================================

    python examples/fastapi_service.py FOLDER PORT

serves until SIGTERM. Then every training leaves a backup in FOLDER, the event streams end, and the process
does, within 15 s and by that signal (143 to a shell), as uvicorn has it; started again, the trainings go on.
Without arguments it serves on a free port, tries itself out as a client, and ends. What it trains and how it
keeps it stands in ``trainings.py``.

Prints, among others::

    a bad request: 400, epochs=-1: ...
    watching: id: 0, id: 1
    watching: id: 2, id: 3
    while it trains: {"status":"ok"...}
    predicted with it: [...]
    loaded: <Sequential sequential: 2 layers>
    its last event: event: end
    stopped: asked over HTTP
"""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from trainings import Trainings, describe, messages, try_out

from asynccb import NotStarted, Orchestrator, Run


def trainings_of(request: Request) -> Trainings:
    trainings: Trainings = request.app.state.trainings
    return trainings


def run_of(request: Request, name: str) -> Run:
    run = trainings_of(request).orchestrator.runs.get(name)
    if run is None:
        raise HTTPException(404, "no such training")
    return run


All = Annotated[Trainings, Depends(trainings_of)]
One = Annotated[Run, Depends(run_of)]


@asynccontextmanager
async def trains(app: FastAPI) -> AsyncIterator[None]:
    async with Orchestrator() as orchestrator:
        app.state.trainings = Trainings(orchestrator, app.state.folder)
        yield


app = FastAPI(lifespan=trains)


@app.exception_handler(ValueError)  # an ArgumentError: which argument it is, and what is allowed
@app.exception_handler(TypeError)
async def refuse(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 400)


@app.exception_handler(NotStarted)
async def too_early(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 409)


def answer(json: str, status: int = 200) -> Response:
    return Response(json, status, media_type="application/json")


@app.post("/trainings")
async def start(trainings: All, asked: dict[str, Any] | None = None) -> Response:
    return answer(describe(await trainings.start(**(asked or {}))), 201)


@app.get("/trainings")
async def overview(trainings: All) -> Response:
    return answer(f"[{', '.join(map(describe, trainings.orchestrator.runs.values()))}]")


@app.get("/trainings/{name}/events")
async def watch(request: Request, run: One) -> StreamingResponse:
    stream = messages(run, request.headers.get("Last-Event-ID", ""))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@app.get("/trainings/{name}/weights")
async def weights(trainings: All, run: One) -> FileResponse:
    return FileResponse(await trainings.weights(run))


@app.post("/trainings/{name}/predict")
async def predict(trainings: All, run: One, rows: list[list[float]]) -> list[int]:
    return await trainings.predict(run, rows)


@app.post("/trainings/{name}/stop")
async def stop(trainings: All, run: One) -> Response:
    await trainings.stop(run)
    return answer(describe(run), 202)


@app.get("/health")
async def health(trainings: All) -> dict[str, Any]:
    return trainings.health()


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # First of all, since it waits for the open connections: the event streams end because their trainings
        # do.
        await app.state.trainings.end()
        await super().shutdown(sockets)


def server(folder: Path) -> Server:
    app.state.folder = folder
    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))


async def main(folder: Path) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    serving = server(folder)
    task = asyncio.create_task(serving.serve([listening]))
    try:
        await try_out("http://{}:{}".format(*listening.getsockname()))
    finally:
        serving.should_exit = True
        await task
    for run in app.state.trainings.orchestrator.runs.values():
        print(f"{run.outcome}: {run.reason}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server(Path(sys.argv[1])).run([socket.create_server(("127.0.0.1", int(sys.argv[2])))])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            asyncio.run(main(Path(temporary)))
