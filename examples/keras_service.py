"""A Keras model in an aiohttp handler: it trains on one request, and others are answered meanwhile.

``POST /train`` answers when the training is over; if the client goes away, the training ends after its batch.
``POST /predict`` answers with the model as it is now, in mid-training too. Needs Keras with a backend, and
scikit-learn for the digits. It tries itself out as a client, and ends.

Prints, among others::

    right of 10 while it trained: ...
    trained: val_accuracy 0.9...
    a client went away: the training is cancelled
"""

import asyncio
import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from aiohttp import ClientSession, ClientTimeout, web
from sklearn.datasets import load_digits

from asynccb import Run, RunCancelled, Trainer

digits, labels = load_digits(return_X_y=True)
x, y = (digits / 16).astype("float32"), labels


def build() -> keras.Model:
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Service:
    run: Run  # the newest training, once it has begun

    def __init__(self) -> None:
        self.model = build()
        self.begun = asyncio.Event()

    async def train(self, request: web.Request) -> web.Response:
        epochs = (await request.json())["epochs"]
        trainer = Trainer(self.model, seed=7)
        async with trainer.start(x, y, epochs=epochs, validation_split=0.2, verbose=0) as run:
            self.run = run
            self.begun.set()
            history = await run
        return web.json_response(history.rows()[-1])

    async def predict(self, request: web.Request) -> web.Response:
        rows = np.asarray(await request.json(), "float32")
        await self.begun.wait()
        snapshot = await self.run.snapshot()  # between two batches; the training goes on
        # Making a model and calling it computes, so it is another thread's.
        found = await asyncio.to_thread(lambda: snapshot.to_model().predict(rows, verbose=0))
        return web.json_response(found.argmax(axis=1).tolist())


async def try_out(root: str, service: Service) -> None:
    async with ClientSession(root) as client:
        training = asyncio.create_task(client.post("/train", json={"epochs": 30}))
        right = []
        for _ in range(5):
            async with client.post("/predict", json=x[:10].tolist()) as answer:
                right.append(int((np.array(await answer.json()) == y[:10]).sum()))
        print("right of 10 while it trained:", *right)
        async with await training as answer:
            print(f"trained: val_accuracy {(await answer.json())['val_accuracy']:.3f}")
        try:
            await client.post("/train", json={"epochs": 10_000}, timeout=ClientTimeout(0.5))
        except TimeoutError:
            run = service.run
            with contextlib.suppress(RunCancelled):
                await run
            print(f"a client went away: the training is {run.outcome}")


async def main() -> None:
    service = Service()
    app = web.Application()
    app.add_routes([web.post("/train", service.train), web.post("/predict", service.predict)])
    runner = web.AppRunner(app, handler_cancellation=True)  # a client that goes away cancels its handler
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        await try_out(f"http://127.0.0.1:{runner.addresses[0][1]}", service)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
