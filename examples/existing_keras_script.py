"""An existing Keras script, and the same with three lines swapped: its callbacks hold no batch any more.

Each epoch writes a row and tells a server that takes 100 ms to answer. Needs Keras with a backend, and
scikit-learn for the digits.

Prints, among others::

    as it was:           ... s
    three lines swapped: ... s
    the same weights: True
    the server has heard of 8 epochs each time
"""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from sklearn.datasets import load_digits

from asynccb.callbacks import CSVLogger, RemoteMonitor  # swapped: from keras.callbacks import ...
from asynccb.integrations.keras import BackgroundCallback  # swapped: it is new

heard: list[int] = []


class Slow(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.1)
        heard.append(1)
        self.send_response(200)
        self.end_headers()

    def log_request(self, *arguments: Any) -> None:
        pass


class BlockingMonitor(keras.callbacks.Callback):
    """What Keras' own RemoteMonitor does (that one needs the package requests)."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        body = json.dumps({"epoch": epoch, **logs}).encode()
        urllib.request.urlopen(f"{self.root}/publish/epoch/end/", body).close()


def train(callbacks: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """The script: seconds, and the weights."""
    digits = load_digits()
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(256, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.layers.Input((64,)), *layers])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    began = time.perf_counter()
    model.fit(
        digits.data / 16,
        digits.target,
        batch_size=4,
        epochs=8,
        verbose=0,
        callbacks=callbacks(),
    )
    return time.perf_counter() - began, model.get_weights()


def as_it_was() -> list[Any]:
    return [keras.callbacks.CSVLogger("before.csv"), BlockingMonitor(root)]


def swapped() -> list[Any]:
    return [BackgroundCallback([CSVLogger("after.csv"), RemoteMonitor(root)])]  # swapped: the list around it


server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
serving = threading.Thread(target=server.serve_forever)
serving.start()
root = f"http://127.0.0.1:{server.server_port}"
try:
    train(list)  # what is compiled once is no part of the difference
    before, weights = train(as_it_was)
    heard_before = len(heard)
    after, same = train(swapped)
finally:
    server.shutdown()
    serving.join()
    server.server_close()

print(f"as it was:           {before:.2f} s")
print(f"three lines swapped: {after:.2f} s")
print(f"the same weights: {all(map(np.array_equal, weights, same))}")
assert heard_before == len(heard) - heard_before
print(f"the server has heard of {heard_before} epochs each time")
