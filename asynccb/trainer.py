"""The entrance: binds a model, checks what it is asked, and starts runs."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any, Literal

from asynccb.callbacks.backup_and_restore import BackupAndRestore
from asynccb.callbacks.base_logger import BaseLogger
from asynccb.callbacks.early_stopping import EarlyStopping
from asynccb.callbacks.history import History
from asynccb.callbacks.hooks import Hooks, read_hooks
from asynccb.callbacks.model_checkpoint import ModelCheckpoint
from asynccb.callbacks.progbar_logger import ProgbarLogger
from asynccb.callbacks.swap_ema_weights import SwapEMAWeights
from asynccb.callbacks.tensorboard import TensorBoard
from asynccb.callbacks.terminate_on_nan import TerminateOnNaN
from asynccb.claims import Claim
from asynccb.engines.thread import ThreadEngine
from asynccb.models.adapt import adapt
from asynccb.prepared import REPLAY, Prepared, as_list, prepare
from asynccb.resume import Resume, check_resumable
from asynccb.run import Run
from asynccb.session import Order
from asynccb.training.arguments import check_count, recognise
from asynccb.training.control import Limits
from asynccb.training.programs import Evaluate, Fit, Predict

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable, Mapping

    from asynccb.callbacks.base import Callback
    from asynccb.protocols import Engine
    from asynccb.training.programs import Program

__all__ = ["Trainer"]

_ADD_NO_KEYS = (
    BackupAndRestore,
    BaseLogger,
    EarlyStopping,
    History,
    ModelCheckpoint,
    SwapEMAWeights,
    TensorBoard,
    TerminateOnNaN,
)


class Trainer:
    """Binds a model; ``await trainer.fit(...)`` trains it in a worker thread while the event loop stays free.

    Args:
        model: a :class:`asynccb.models.Sequential`, or any object with ``train_batch(batch) -> dict``.
        seed: of the order of the samples: every fit starts from it, and the order of epoch e depends on
            (seed, e) alone.
            None: one is drawn, and can be read as ``trainer.seed``; a training that goes on from a backup
            takes that of the backup.
        engine: where runs are executed; None: each in a daemon thread of its own.

    Attributes:
        seed: int.
        last_run: the newest :class:`~asynccb.Run` of a ``fit``; after a cancelled ``fit`` it still has the
            History.

    Raises:
        ArgumentError: the model cannot train, or the seed is not a whole number from 0 on.
    """

    def __init__(self, model: Any, seed: int | None = None, engine: Engine | None = None) -> None:
        self._model = adapt(model)
        self.model = self._model.user_model
        self._seed_drawn = seed is None
        drawn = secrets.randbits(32) if seed is None else seed
        self.seed = check_count("seed", drawn, least=0)
        self._engine = engine
        self._limits = Limits()
        self.last_run: Run | None = None

    async def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Callback | Iterable[Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | str = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Iterable[int] = 1,
        *,
        resume: str | os.PathLike[str] | Literal[False] | None = None,
        stop_after: datetime.timedelta | None = None,
        name: str | None = None,
        replay: int = REPLAY,
        switch_interval: float | None = None,
    ) -> History:
        """Trains the model and answers its History. Arguments and defaults are those of Keras' ``fit``.

        No batch runs on the event loop, and the loop is never blocked by this package. Cancelling the task
        that awaits this cancels the training: it ends after the batch under way, the callbacks' end hooks
        run, mailboxes drain for up to 5 s, and then the cancellation goes on.

        Args:
            x: array of shape (samples, ...), or a tuple, list or dict of arrays for several inputs; or an
                iterable (generator, loader) or **async** iterable of batches ``x``, ``(x, y)`` or ``(x, y,
                sample_weight)``.
            y: targets, samples on axis 0; None where ``x`` yields whole batches.
            batch_size: samples in a batch of array data; None means 32.
            epochs: index of the last epoch plus one (not a count, where ``initial_epoch`` is given).
            verbose: 0 silent, 1 progress bar, 2 one line an epoch; ``"auto"`` is 1. Not a terminal: one plain
                line an epoch.
            callbacks: instances of :class:`~asynccb.Callback`, called in this order; with a Keras model of
                ``keras.callbacks.Callback`` too, which run inline.
            validation_split: part of the arrays, from their end and before shuffling, to validate on. 0 <=
                split < 1.
            validation_data: ``(x, y)``, ``(x, y, sample_weight)`` or batches; overrides ``validation_split``.
            shuffle: True: a new order of samples each epoch; ``"batch"``: of whole batches; False: none.
                Arrays only.
            class_weight: dict from class index to a weight that multiplies the sample weights; classes not in
                it weigh 1.
            sample_weight: float array of shape (samples,).
            initial_epoch: index of the first epoch.
            steps_per_epoch: batches in an epoch; needed where ``x`` can be iterated once only and there is
                more than one epoch.
            validation_steps: batches in a validation.
            validation_batch_size: None: as ``batch_size``.
            validation_freq: validate after every n-th epoch, or after the 1-based epochs of a list.
            resume: go on from a backup that a :class:`~asynccb.callbacks.BackupAndRestore` made: a file, or a
                folder, of which the newest intact one counts; in a folder with nothing in it yet the training
                begins anew. A training that had ended gives its History at once; ``epochs`` may be larger
                than it was, callbacks may be added. None (default): the folder of the BackupAndRestore among
                the callbacks, if there is one. False: begin anew all the same.
            stop_after: stop at the first batch after this time, as ``run.stop`` does.
            name: of the run; None: ``run-<n>``.
            replay: events kept for ``run.events(since=...)``.
            switch_interval: seconds (0.0005, say) to which ``sys.setswitchinterval`` is lowered while this
                training is active: a service on the same loop answers sooner, a model that computes in Python
                trains a little slower. None (default) leaves it alone. It is process-wide: of trainings under
                way the shortest counts, and the last one restores what was there.

        Raises:
            ArgumentError: before the first batch; names the argument, what was given and what is allowed.
            ResumeRefused: the backup is of another training; lists the differences. Nothing is changed.
            FileRefused: every backup is damaged.
            FolderBusy: another training has the folder of a BackupAndRestore; before any hook.
            HookRefused: a callback's hook cannot be called as it stands.
            ModelBusy, CallbackBusy: in another run that is under way.
            CallbackError: a beside-hook raised.
            RunCancelled: somebody called ``run.cancel()``.
            Exception: whatever the model, the data or an inline hook raised, unchanged.
        """
        run = self.start(
            x,
            y,
            batch_size,
            epochs,
            verbose,
            callbacks,
            validation_split,
            validation_data,
            shuffle,
            class_weight,
            sample_weight,
            initial_epoch,
            steps_per_epoch,
            validation_steps,
            validation_batch_size,
            validation_freq,
            resume=resume,
            stop_after=stop_after,
            name=name,
            replay=replay,
            switch_interval=switch_interval,
        )
        return await run.wait_as_owner()

    def start(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Callback | Iterable[Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | str = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Iterable[int] = 1,
        *,
        resume: str | os.PathLike[str] | Literal[False] | None = None,
        stop_after: datetime.timedelta | None = None,
        name: str | None = None,
        replay: int = REPLAY,
        switch_interval: float | None = None,
    ) -> Run:
        """Starts what :meth:`fit` awaits, and answers the handle on it at once. Takes what ``fit`` takes.

        Needs a running event loop. What can be refused cheaply raises here; data is converted and scanned on
        the training thread, and what is refused there is raised by whoever awaits the run, before the first
        batch.
        """
        prepared = prepare(
            x,
            y,
            callbacks=callbacks,
            resume=resume,
            switch_interval=switch_interval,
            replay=replay,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            stop_after=stop_after,
        )
        order = self.order(prepared)
        run = Run(name, order.history, replay=prepared.replay)
        run.begin(order, Claim(run.name, None, []))
        self.last_run = run
        return run

    def order(self, prepared: Prepared, engine: Engine | None = None) -> Order:
        """What a run of this model is to do. ``engine``: where the trainer has none of its own.

        Raises:
            ArgumentError: the model is not ready for it, or cannot be resumed where that is asked for.
        """
        asked = prepared.fit
        self._model.check_ready(training=True)
        if asked.validation is not None or asked.validation_split:
            self._model.check_ready(training=False)
        hooked = _with_automatic(prepared, asked.verbose)
        program = Fit(
            asked,
            self.seed,
            seed_drawn=self._seed_drawn,
            log_keys_open=any(_may_add_keys(*pair) for pair in hooked),
        )
        backups = [callback for callback, _ in hooked if isinstance(callback, BackupAndRestore)]
        paths = _resume_paths(prepared.resume, backups)
        if paths or backups:
            check_resumable(self._model, "backups are asked for" if backups else "it is to be resumed")
        return Order(
            self._model,
            program,
            hooked,
            prepared.history,
            self._engine or engine or ThreadEngine(),
            self._limits,
            asked.stop_after,
            prepared.switch_interval,
            Resume(self._model, program, paths, backups),
        )

    async def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Callback | Iterable[Callback] | None = None,
    ) -> dict[str, Any]:
        """The means of loss and metrics over all samples, computed on a worker thread.

        Args:
            x, y, batch_size, sample_weight: as in :meth:`fit`.
            steps: batches to evaluate on; None: all.
            callbacks: get the ``on_test_*`` hooks.

        Raises:
            ArgumentError, ModelBusy: as :meth:`fit`.
        """
        self._model.check_ready(training=True)
        self._model.check_ready(training=False)
        program = Evaluate(_data(x, y, sample_weight, batch_size, steps), self.seed)
        means: dict[str, Any] = await self._once(program, callbacks)
        return means

    async def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Callback | Iterable[Callback] | None = None,
    ) -> Any:
        """The model's outputs for ``x``, of shape (samples, ...), computed on a worker thread.

        Args:
            x: as in :meth:`fit`; of batches with targets, only the inputs are used.
            batch_size: None means 32.
            steps: batches to predict; None: all.
            callbacks: get the ``on_predict_*`` hooks.

        Raises:
            ArgumentError, ModelBusy: as :meth:`fit`.
        """
        program = Predict(_data(x, None, None, batch_size, steps), self.seed)
        return await self._once(program, callbacks)

    async def _once(self, program: Program, callbacks: Callback | Iterable[Callback] | None) -> Any:
        hooked = [(callback, read_hooks(callback)) for callback in as_list(callbacks)]
        order = Order(self._model, program, hooked, History(), self._engine or ThreadEngine(), self._limits)
        run = Run(None, order.history, replay=1)
        run.begin(order, Claim(run.name, None, []))
        await run.wait_as_owner()
        return program.result


def _resume_paths(resume: Any, backups: list[BackupAndRestore]) -> list[str]:
    """What to go on from."""
    if resume is False:
        return []
    if resume is None:
        return [callback.backup_dir for callback in backups]
    return [os.path.abspath(os.fspath(resume))]


def _data(x: Any, y: Any, sample_weight: Any, batch_size: int | None, steps: int | None) -> Any:
    size = check_count("batch_size", batch_size, least=1, none=True) or 32
    count = check_count("steps", steps, least=1, none=True) or None
    return recognise("x", x, y, sample_weight, batch_size=size, steps=count)


def _with_automatic(prepared: Prepared, verbose: int) -> list[tuple[Callback, Hooks]]:
    """Keras' order: BaseLogger, the user's, History, ProgbarLogger. One given by the user takes the automatic
    one's place."""

    def given(kind: type[Callback]) -> list[tuple[Callback, Hooks]]:
        return [pair for pair in prepared.hooked if isinstance(pair[0], kind)]

    def made(callback: Callback) -> list[tuple[Callback, Hooks]]:
        return [(callback, read_hooks(callback))]

    means = given(BaseLogger) or made(BaseLogger())
    histories = given(History) or made(prepared.history)
    bars = given(ProgbarLogger) or (made(ProgbarLogger()) if verbose else [])
    automatic = (BaseLogger, History, ProgbarLogger)
    others = [pair for pair in prepared.hooked if not isinstance(pair[0], automatic)]
    return [*means, *others, *histories, *bars]


def _may_add_keys(callback: Callback, hooks: Hooks) -> bool:
    return "on_epoch_end" in hooks.inline and type(callback) not in _ADD_NO_KEYS
