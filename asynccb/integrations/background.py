"""Our callbacks beside a training whose loop is somebody else's.

::

    with Background([CSVLogger("log.csv"), RemoteMonitor("http://127.0.0.1:9000")]) as hooks:
        for epoch in range(epochs):
            hooks.on_epoch_begin(epoch)
            for index, batch in enumerate(batches):
                loss = train_one(batch)
                hooks.on_batch_end(index, {"loss": loss})
            hooks.on_epoch_end(epoch, {"loss": mean})
            if hooks.should_stop:
                break

The loop's thread is the training thread of a :class:`~asynccb.Run` like every other: ``def`` hooks run on it,
inside of the call; ``async def`` hooks and the coroutines that others return run on an event loop, in order,
out of bounded mailboxes. That loop runs on a thread which the block starts and ends; or it is the caller's::

    async def handler():
        background = Background(callbacks, loop=asyncio.get_running_loop())
        await asyncio.to_thread(train, background)      # `with background as hooks:` is in there
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import math
import operator
import threading
from typing import TYPE_CHECKING, Any, cast

from asynccb.callbacks.backup_and_restore import BackupAndRestore
from asynccb.callbacks.history import History
from asynccb.callbacks.hooks import read_hooks
from asynccb.ending import of_error
from asynccb.errors import ArgumentError, RunCancelled, said
from asynccb.events import Logs
from asynccb.integrations.entrance import Entrance
from asynccb.integrations.loop_thread import LoopThread
from asynccb.integrations.observed import Observed, OtherLoop
from asynccb.prepared import as_list
from asynccb.session import Order
from asynccb.training.control import Interrupt, Limits
from asynccb.training.loop import add_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self

    from asynccb.bus.table import Emitter
    from asynccb.callbacks.base import Callback
    from asynccb.driver import Driver
    from asynccb.ending import Outcome
    from asynccb.protocols import Model
    from asynccb.run import Run
    from asynccb.training.programs import Program

__all__ = ["Background"]

logger = logging.getLogger("asynccb")

COMEBACK = 30.0
"""Seconds from a cancel until a loop that was opened without a ``with`` counts as gone: its owner may have
failed, and nobody tells."""


_opened: list[Background] = []
"""Those that :meth:`Background.open` has opened; some of them may be forgotten."""


class Background:
    """Runs callbacks beside a loop that is not ours. A context manager, which may be used again.

    Entering it is the beginning of the training and waits for the awaitables of ``on_train_begin``; leaving
    it is the end: mailboxes drain (without a limit; for up to 5 s where the block raised or the run was
    cancelled), then ``on_train_end`` has run and nothing of it is left, no thread, task or file.

    What the hooks are called with goes to the callbacks as it is, framework scalars as Python numbers, and a
    dict may be used again behind the call. They are called on the thread that has entered, and take less than
    a microsecond where nobody wants the event. A call waits where a mailbox is full, for ``lockstep`` hooks,
    and while the run is paused; it takes no turns with the trainings of this process.

    Errors: a ``def`` hook that raises does so out of the call, which is up to the loop. A hook beside it that
    fails (``on_error = "raise"``) is raised as :class:`~asynccb.CallbackError` by the next call and by every
    later one, and at the end of the block. So is :class:`~asynccb.RunCancelled` where somebody has cancelled
    the run. An exception of the block, Ctrl-C among them, goes to ``on_exception`` and on.

    Args:
        callbacks: a Callback or a list of them. A History is added; means of epochs are the loop's affair (or
            :class:`~asynccb.callbacks.BaseLogger`'s, if you add it).
        params: the callbacks' ``params``: ``epochs``, ``steps``, ``metrics``, whatever of it is known.
        model: what callbacks see as ``self.model``. Needed for snapshots and checkpoints: an object with
            ``capture()``, a torch module (of which the weights are copied), or a model that a Trainer takes.
            None: ``self.model`` has ``stop_training`` alone.
        loop: the running event loop of another thread, to run hooks on. None: a private one.
        name: of the run; None: ``run-<n>``.

    Attributes:
        run: the :class:`~asynccb.Run`, from the entrance on; it may be read, stopped, paused and cancelled
            from any thread, and is kept at the end.
        history: the :class:`~asynccb.History`.

    Raises:
        ArgumentError: a callback that is none, or a BackupAndRestore, which cannot put a foreign loop back.
        HookRefused: a callback's hook cannot be called as it stands.
    """

    run: Run

    def __init__(
        self,
        callbacks: Callback | Iterable[Callback],
        *,
        params: Mapping[str, Any] | None = None,
        model: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str | None = None,
    ) -> None:
        self._hooked = [(callback, read_hooks(callback)) for callback in as_list(callbacks)]
        for callback, _ in self._hooked:
            if isinstance(callback, BackupAndRestore):
                allowed = "a loop that is not ours cannot be resumed by us"
                raise ArgumentError("callbacks", callback, allowed, "Use ModelCheckpoint, or a Trainer")
        histories = [callback for callback, _ in self._hooked if isinstance(callback, History)]
        self.history = histories[0] if histories else History()
        if not histories:
            self._hooked.append((self.history, read_hooks(self.history)))
        self._params = dict(params or {})
        self._model = model
        self._given_loop = loop
        self._name = name
        self._limits = Limits()
        self._private: LoopThread | None = None
        self._driver: Driver | None = None
        self._told: BaseException | None = None
        self._of_hook: BaseException | None = None

    # Beginning and end --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._begin(math.inf)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def open(self, *, params: Mapping[str, Any] | None = None, model: Any = None) -> None:
        """As entering, for a program that tells begin and end by calls. One that was forgotten, because the
        program failed without a word, is closed by its next ``open``, by that of another one which has its
        model or one of its callbacks on the same thread, or when the interpreter ends.

        Args:
            params, model: in place of those of the constructor, where they are known now.
        """
        if self.is_open:
            self._close_forgotten("its loop ended without a word, and another one begins")
        self._params = dict(params or self._params)
        self._model = self._model if model is None else model
        for forgotten in [other for other in _opened if other._is_forgotten_by(self)]:
            forgotten._close_forgotten("its loop ended without a word, and another one has what it had")
        self._begin(COMEBACK)
        _opened.append(self)
        atexit.register(self._close_forgotten)

    def close(self, error: BaseException | None = None) -> None:
        """As leaving; ``error`` is what ended the loop. Does nothing where it is not open.

        Raises:
            CallbackError, RunCancelled: as the class says; not where there is an ``error``, which gets them
                as notes.
        """
        driver, self._driver = self._driver, None
        if driver is None:
            return
        atexit.unregister(self._close_forgotten)
        if self in _opened:
            _opened.remove(self)
        try:
            self._end(driver, self._outcome(driver, error))
        except RunCancelled as cut_off:
            if error is None:
                raise
            error.add_note(said(cut_off))
        exception = self.run.exception
        if error is None and exception is not None:
            raise self._to_raise(exception)

    @property
    def is_open(self) -> bool:
        return self._driver is not None

    @property
    def should_stop(self) -> bool:
        """Whether a callback, or anybody who has the run, asks for the end (``run.stop``, ``stop_training``).
        It is the loop that ends; until then the hooks go on working."""
        driver = self._driver
        return driver is not None and driver.stop_asked

    # The hooks ----------------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """``epoch`` is 0-based."""
        driver = self._here()
        driver.epoch = epoch = _index(epoch)
        self._emit(driver.emit.epoch_begin, epoch, _logs(logs), driver.step)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """``logs``: of the whole epoch."""
        driver = self._here()
        driver.epoch = epoch = _index(epoch)
        driver.logs = given = _logs(logs)
        self._emit(driver.emit.epoch_end, epoch, given, driver.step)
        self._be_safe(driver)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """``batch`` counts from 0 in each epoch."""
        driver = self._here()
        table = driver.emit
        self._emit_batch(driver, table.batch_begin, batch, logs, table.logs)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """``logs``: of this batch; a mean over samples needs its ``size``."""
        driver = self._here()
        driver.step += 1
        table = driver.emit
        if table.batch_end is None:
            driver.skip()
        else:
            driver.logs = self._emit_batch(driver, table.batch_end, batch, logs, table.logs)
        self._be_safe(driver)

    on_batch_begin = on_train_batch_begin
    on_batch_end = on_train_batch_end

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """A validation starts."""
        driver = self._here()
        self._emit(driver.emit.test_begin, driver.step, _logs(logs))

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """``logs``: of the whole validation."""
        driver = self._here()
        self._emit(driver.emit.test_end, driver.step, _logs(logs))
        self._be_safe(driver)

    def on_test_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        driver = self._here()
        table = driver.emit
        self._emit_batch(driver, table.test_batch_begin, batch, logs, table.logs)

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        driver = self._here()
        table = driver.emit
        self._emit_batch(driver, table.test_batch_end, batch, logs, table.logs)
        self._be_safe(driver)

    def _here(self) -> Driver:
        driver = self._driver
        if driver is None:
            raise RuntimeError("not open: hooks are called inside of `with Background(...) as hooks:`")
        if driver.ident != threading.get_ident():
            raise RuntimeError(
                "hooks are called on the thread that has entered the Background; it serves one loop at a time"
            )
        return driver

    def _emit_batch(
        self,
        driver: Driver,
        emit: Emitter,
        batch: int,
        logs: Mapping[str, Any] | None,
        kind: type[dict[str, Any]],
    ) -> Mapping[str, Any]:
        given = kind()
        if emit is None:
            driver.skip()
            return given
        if logs:
            _add(given, logs)
        self._emit(emit, batch, given, driver.epoch, driver.step)
        return given

    def _emit(self, emit: Emitter, *fields: Any) -> None:
        try:
            emit(*fields)
            return
        except Interrupt as interrupt:
            told = self._tell(interrupt)
        except BaseException as error:
            self._of_hook = error
            raise
        raise told.with_traceback(None)

    def _be_safe(self, driver: Driver) -> None:
        """Between two batches: requests are served, and what has happened beside is told."""
        try:
            driver.safe_point()
            driver.stopped()
            return
        except Interrupt as interrupt:
            told = self._tell(interrupt)
        raise told.with_traceback(None)  # outside: an Interrupt is nobody's affair

    def _tell(self, interrupt: Interrupt) -> BaseException:
        if self._told is None:  # one for all calls: the block may end by any of them
            self._told = self._to_raise(interrupt.error or RunCancelled(interrupt.reason, self.history))
        return self._told

    def _to_raise(self, error: BaseException) -> BaseException:
        return error

    # How it begins and ends ---------------------------------------------------------------------------------

    def _begin(self, comeback: float) -> None:
        if self.is_open:
            raise RuntimeError("this Background is open already")
        self._told = self._of_hook = None
        loop = self._loop()
        try:
            driver = self._start(loop, self._limits._replace(comeback=comeback))
        except BaseException:
            self._close_loop()
            raise
        outcome = driver.open()
        if outcome is None:
            try:
                driver.safe_point()  # an awaitable of `on_train_begin` may have failed
                self._driver = driver
                return
            except Interrupt as interrupt:
                outcome = of_error(interrupt)
        self._end(driver, outcome)
        raise self._to_raise(self.run.exception or RuntimeError(outcome.reason))

    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self._given_loop
        if loop is None:
            self._private = LoopThread()
            return self._private.loop
        if not (isinstance(loop, asyncio.AbstractEventLoop) and loop.is_running()):
            raise ArgumentError("loop", loop, "a loop that runs", "Leave it out for a private one")
        if loop is _running_loop():
            raise ArgumentError(
                "loop",
                loop,
                "the loop of another thread; this thread cannot train and run it at a time",
                "Enter in `await asyncio.to_thread(...)`, or leave it out for a private one",
            )
        return loop

    def _start(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> Driver:
        order = Order(
            cast("Model", Observed(self._model)),
            cast("Program", OtherLoop(self._params)),
            self._hooked,
            self.history,
            entrance := Entrance(loop, limits.poll),
            limits,
        )
        self._entrance = entrance
        loop.call_soon_threadsafe(entrance.begin, order, self._name, context=contextvars.copy_context())
        try:
            driver = entrance.wait_for_driver()
        except BaseException as error:
            # Interrupted on the way in. The run is not to wait for a loop that never comes.
            entrance.turn_away(error)
            raise
        self.run = entrance.run
        return driver

    def _outcome(self, driver: Driver, error: BaseException | None) -> Outcome:
        if error is None or error is self._told:
            return driver.ended()
        if error is not self._of_hook:
            driver.broke_inside()  # in a batch, perhaps
        return of_error(error)

    def _end(self, driver: Driver, outcome: Outcome) -> None:
        try:
            self._entrance.leave(driver, outcome)
        finally:
            self._close_loop()

    def _close_loop(self) -> None:
        private, self._private = self._private, None
        if private is not None:
            private.close()

    def _close_forgotten(self, reason: str = "the interpreter ends, and its loop never said a word") -> None:
        logger.warning("%s is closed: %s", self.run.name, reason)
        self.run.cancel(reason)
        if (driver := self._driver) is not None:
            driver.broke_inside()  # in a batch, perhaps
        with contextlib.suppress(Exception):  # told in the log, and there is nobody else
            self.close()

    def _is_forgotten_by(self, other: Background) -> bool:
        """Whether its loop must be over, because another one begins with its model or callbacks on its
        thread."""
        driver = self._driver
        if driver is None:
            return False
        ours, theirs = ({id(b._trained()), *(id(c) for c, _ in b._hooked)} for b in (self, other))
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        return driver.ident not in alive and not (ours - {id(None)}).isdisjoint(theirs)

    def _trained(self) -> Any:
        return getattr(self._model, "user_model", self._model)


class ClosesWithBlock:
    """A framework's callback as a context manager, where the framework tells no callback that it has failed:
    the exception of the block goes to ``on_exception``, and everything is closed.

    Attributes:
        background: what is closed.
    """

    background: Background

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.background.close(error)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _logs(given: Mapping[str, Any] | None) -> Logs:
    logs = Logs()
    if given:
        _add(logs, given)
    return logs


def _add(logs: dict[str, Any], given: Mapping[str, Any]) -> None:
    try:
        add_metrics(logs, given)
    except AttributeError:
        if hasattr(given, "items"):
            raise
        fix = 'Write {"loss": loss}'
        raise ArgumentError("logs", given, "a dict of metrics by their names", fix) from None


def _index(epoch: Any) -> int:
    try:
        return operator.index(epoch)
    except TypeError:
        fix = "Logs are the second argument"
        raise ArgumentError("epoch", epoch, "a whole number, from 0 on", fix) from None
