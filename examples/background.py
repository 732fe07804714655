"""A hand-written training loop with callbacks that no batch waits for: rows on the disk, early stopping, and
a hook of one's own that talks to a slow service.

Prints, among others::

    published epoch 0
    stopped at epoch ...: EarlyStopping: val_loss has not improved ...
    published: ... of ... epochs, in order
    rows in log.csv: ...
"""

import asyncio
import csv
from typing import Any

import numpy as np

from asynccb import Callback
from asynccb.callbacks import CSVLogger, EarlyStopping
from asynccb.integrations import Background


class Publish(Callback):
    """``async def``: it runs on an event loop beside the training, one epoch after the other."""

    def __init__(self) -> None:
        self.published: list[int] = []

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await asyncio.sleep(0.02)  # a slow service
        self.published.append(epoch)
        print(f"published epoch {epoch}")


random = np.random.default_rng(7)
x = random.normal(size=(512, 8))
y = x @ random.normal(size=8) + random.normal(scale=0.5, size=512)
weights = np.zeros(8)


def loss_of(rows: slice) -> float:
    return float(((x[rows] @ weights - y[rows]) ** 2).mean())


publish = Publish()
callbacks = [CSVLogger("log.csv"), EarlyStopping("val_loss", min_delta=1e-4, patience=2), publish]

with Background(callbacks, params={"epochs": 200}) as hooks:
    for epoch in range(200):
        hooks.on_epoch_begin(epoch)
        for batch in range(12):
            rows = slice(batch * 32, batch * 32 + 32)
            weights -= 0.02 * 2 * x[rows].T @ (x[rows] @ weights - y[rows]) / 32
            hooks.on_batch_end(batch, {"loss": loss_of(rows), "size": 32})
        hooks.on_epoch_end(epoch, {"loss": loss_of(slice(0, 384)), "val_loss": loss_of(slice(384, None))})
        if hooks.should_stop:
            break

# Behind the block everything has run and is closed.
epochs = len(hooks.history.epoch)
print(f"{hooks.history.outcome} at epoch {epochs - 1}: {hooks.history.reason}")
in_order = publish.published == hooks.history.epoch
print(f"published: {len(publish.published)} of {epochs} epochs, {'in order' if in_order else 'not in order'}")
with open("log.csv", newline="") as file:
    print(f"rows in log.csv: {len(list(csv.DictReader(file)))}")
