"""Small trainings for tests of an orchestrator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb import Trainer
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from asynccb import Callback, Orchestrator, Run

X = np.zeros((4, 1))


def submit(orch: Orchestrator, model: Any = None, *callbacks: Callback, **more: Any) -> Run:
    """A training of four batches an epoch."""
    trainer = Trainer(ScriptedModel() if model is None else model)
    return orch.submit(trainer, X, batch_size=1, callbacks=callbacks, **more)
