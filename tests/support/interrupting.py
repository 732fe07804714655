"""A training that is interrupted at a batch that the test chooses."""

from __future__ import annotations

from typing import Any

from asynccb import Callback


class StopsAfter(Callback):
    """An interruption: started again, the training goes on."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            assert self.run is not None
            self.run.stop("later")
