"""An existing Lightning script, and the same with three lines swapped: its callbacks hold no batch any more.

Each epoch writes a row and tells a server that takes 100 ms to answer. Needs Lightning, and scikit-learn for
the digits.

Prints, among others::

    as it was:           ... s
    three lines swapped: ... s
    the same weights: True
    the server has heard of 8 epochs each time
"""

import csv
import json
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from asynccb.callbacks import CSVLogger, RemoteMonitor  # swapped: two callbacks of one's own
from asynccb.integrations.lightning import BackgroundCallback  # swapped: it is new

torch.set_num_threads(1)  # the quickest for so small a net
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


class BlockingReport(Callback):
    """What a script of today does when an epoch ends."""

    def __init__(self, path: str, root: str) -> None:
        self.path, self.root = path, root

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        row = {name: value.item() for name, value in trainer.callback_metrics.items()}
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([trainer.current_epoch, *row.values()])
        body = json.dumps({"epoch": trainer.current_epoch, **row}).encode()
        urllib.request.urlopen(f"{self.root}/publish/epoch/end/", body).close()


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch: Any, index: int) -> Any:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def train(callbacks: list[Any]) -> tuple[float, list[Any]]:
    """The script: seconds, and the weights."""
    seed_everything(7, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    module = Digits()
    trainer = Trainer(
        max_epochs=8,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    return time.perf_counter() - began, list(module.parameters())


server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
serving = threading.Thread(target=server.serve_forever)
serving.start()
root = f"http://127.0.0.1:{server.server_port}"
try:
    train([])  # what happens once in a process is no part of the difference
    before, weights = train([BlockingReport("before.csv", root)])
    heard_before = len(heard)
    after, same = train(
        [BackgroundCallback([CSVLogger("after.csv"), RemoteMonitor(root)])]  # swapped: the list around it
    )
finally:
    server.shutdown()
    serving.join()
    server.server_close()

print(f"as it was:           {before:.2f} s")
print(f"three lines swapped: {after:.2f} s")
print(f"the same weights: {all(map(torch.equal, weights, same))}")
assert heard_before == len(heard) - heard_before
print(f"the server has heard of {heard_before} epochs each time")
