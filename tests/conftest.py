"""The guards: every test of this suite fails if it blocks the event loop or leaves anything behind.

Two fixtures, one inside the other, surround each test:

``_nothing_left_in_the_process``
    around every test: threads, open files, temporary files, signal handlers, the standard streams, the switch
    interval, and whatever asyncio had to say about tasks and futures that nobody looked at.
``_nothing_left_on_the_loop``
    around async tests, inside their loop: tasks, jobs in the default executor, calls that block, long steps.

``test_fixtures.py`` holds the negative controls: one test for each guard, which must be failed by it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from blockbuster import BlockBuster
from blockbuster.blockbuster import BlockBusterFunction
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from types import FrameType

# What several test files share lies there; they are no package.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

# The same examples on every host, and no measure of time: a busy host is not a wrong result.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

GRACE = 2.0
"""Seconds in which a thread or a file that is just ending may end."""

TEARDOWN = 30.0
"""Seconds in which the fixtures of a test, its loop among them, are taken down."""

LONGEST_STEP = 1.0
"""Seconds of processor time of the loop's thread for one step of our tasks; a busy host raises no alarm, nor
does the collector's pass over all that thousands of tests have left alive."""


# Read when torch is imported: its threads wait for each other without burning a core that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# ---------------------------------------------------------------- whose call is it?

_SPEC = importlib.util.find_spec("asynccb")
assert _SPEC is not None
assert _SPEC.submodule_search_locations is not None
PACKAGE = os.path.join(os.path.realpath(next(iter(_SPEC.submodule_search_locations))), "")
TESTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "")

# These rooms are synchronous by contract: a test may call them from a coroutine, our own coroutines may not.
SYNCHRONOUS = tuple(
    os.path.join(PACKAGE, *room) for room in [("models", ""), ("storage", ""), ("training", "snapshot.py")]
)

# Not ours to move: where the service lets its log go, reading source lines for a traceback or a warning, and
# the moment until a new thread runs. Importing a module at its first use is judged by LONGEST_STEP alone.
_FORGIVEN = {
    ("__init__.py", "callHandlers"),  # logging's
    ("linecache.py", "updatecache"),
    ("linecache.py", "checkcache"),
    ("<frozen linecache>", "updatecache"),
    ("<frozen linecache>", "checkcache"),
    ("control.py", "_should_trace"),  # coverage's
    ("threading.py", "start"),
    ("cpus.py", "_quota"),  # a tenth of a millisecond in all, for files that lie on no disk
    ("cpus.py", "_words"),
    ("blas.py", "_libraries"),  # half a millisecond, once for each library that is loaded
    ("health.py", "_lock_wait"),  # half a millisecond, now and then, of a loop that is late anyhow
    ("<frozen importlib._bootstrap>", "_find_and_load"),
}


def whose(frame: FrameType | None) -> str | None:
    """The line of asynccb that is to blame for what ``frame`` does; None where a test or somebody else is."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(TESTS) or (os.path.basename(file), frame.f_code.co_name) in _FORGIVEN:
            return None
        if file.startswith(PACKAGE) and not file.startswith(SYNCHRONOUS):
            return f"asynccb/{file.removeprefix(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return None


# ---------------------------------------------------------------- what must not be left in the process


def _runs() -> set[object]:
    """Those that live; a later test would wait for them for ever."""
    room = sys.modules.get("asynccb.run")
    return set() if room is None else set(room.live_runs())


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _open_files() -> set[tuple[str, str]]:
    """Descriptor and target of each open file; empty where the system does not tell."""
    found = set()
    try:
        descriptors = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return found
    for descriptor in descriptors:
        try:
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


# What asynccb.storage.atomic names its files until they are whole.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}(-[0-9a-f]{1,8}){4}\.tmp(\.[a-z0-9]+)*")


def _temporary_files(folder: Path | None = None) -> set[str]:
    """What lies in the folder for temporary files, and half-written files in ``folder``."""
    # A cache that torch begins when a part of it is imported for the first time.
    found = {name for name in os.listdir(tempfile.gettempdir()) if not name.startswith("torchinductor_")}
    if folder is not None:
        found |= {str(path) for path in folder.rglob(".*.tmp") if _UNFINISHED.fullmatch(path.name)}
    return found


def _settings() -> dict[str, Any]:
    """What is process-wide and nobody's to change. SIGALRM belongs to pytest-timeout."""
    handlers = {
        f"the handler of {number.name}": signal.getsignal(number)
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals) and number is not signal.SIGALRM
    }
    return handlers | {
        "the switch interval": sys.getswitchinterval(),
        "the excepthook of threads": threading.excepthook,
    }


def _left(before: set[Any], now: Callable[[], set[Any]]) -> set[Any]:
    """What is there now and was not before, after the grace period."""
    deadline = time.monotonic() + GRACE
    while (left := now() - before) and time.monotonic() < deadline:
        time.sleep(0.005)
    return left


class _Complaints(logging.Handler):
    """Keeps what asyncio reports: exceptions never retrieved, callbacks that raised, tasks destroyed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


@pytest.fixture(autouse=True, scope="session")
def _own_folder_for_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What appears there is from these tests and not from a neighbour on the same host."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setattr("tempfile.tempdir", folder)
        patch.setenv("TMPDIR", folder)
        # torch makes a folder for what it might compile, with the first optimizer.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture(autouse=True)
def _long_tests_take_their_time(request: pytest.FixtureRequest) -> None:
    """The last resort of the configuration is for the fast tier; a long test has a timeout of its own."""
    if request.node.get_closest_marker("long"):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> None:
    """Takes what is loaded by now out of the collector's sight: collecting after each test is cheap then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_in_the_process(request: pytest.FixtureRequest, _cheap_collections: None) -> Iterator[None]:
    threads, files, temporary, settings = _threads(), _open_files(), _temporary_files(), _settings()
    runs = _runs()
    complaints = _Complaints()
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    try:
        yield
        gc.collect()  # an exception that nobody retrieved is only reported when its task is collected
    finally:
        logger.removeHandler(complaints)
    faults = [f"asyncio reports: {said}" for said in complaints.said]
    faults += [f"a thread is left behind: {thread!r}" for thread in _left(threads, _threads)]
    faults += [f"a run is left behind: {run!r}" for run in _left(runs, _runs)]
    faults += [
        f"an open file is left behind: {number} -> {target}" for number, target in _left(files, _open_files)
    ]
    unfinished = _temporary_files(request.node.funcargs.get("tmp_path")) - temporary
    faults += [f"a temporary file is left behind: {name}" for name in unfinished]
    faults += [
        f"{name} is not what it was: {now!r}" for name, now in _settings().items() if now != settings[name]
    ]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Ends a teardown that hangs: pytest-timeout lets go of a test for good once it has failed."""

    def give_up(*_: object) -> None:
        pytest.fail(f"the teardown did not end within {TEARDOWN} s", pytrace=False)

    if not hasattr(signal, "setitimer"):
        return (yield)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, TEARDOWN, 5.0)  # again and again: more than one thing may hang
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Looks at the standard streams at once: pytest's capture replaces them before the teardown."""
    before = sys.stdout, sys.stderr
    result = yield
    if (sys.stdout, sys.stderr) != before and "monkeypatch" not in pyfuncitem.fixturenames:
        pytest.fail(
            f"the standard streams are not what they were: {sys.stdout!r}, {sys.stderr!r}", pytrace=False
        )
    return result


# ---------------------------------------------------------------- what must not happen on the loop


class _Watch:
    """Notes what our code may not do on the loop. A note fails the test even if the error was swallowed."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def blockbuster(self) -> BlockBuster:
        """Refuses calls that block, where asynccb is to blame for them."""
        guard = BlockBuster()
        for harmless in ("os.getcwd", "os.path.abspath"):  # they read no disk
            del guard.functions[harmless]
        for more in ("builtins.open", "io.open", "os.open", "os.fsync"):
            guard.functions[more] = BlockBusterFunction(None, more)
        for function in guard.functions.values():
            function.can_block_predicate = self._unless_ours(function)
        return guard

    def _unless_ours(self, function: BlockBusterFunction) -> Callable[..., bool]:
        by_default = function.can_block_predicate

        def may_block(*args: Any, **kwargs: Any) -> bool:
            if by_default(*args, **kwargs):
                return True
            culprit = whose(sys._getframe(2))
            if culprit is not None:
                self.faults.append(f"{culprit} blocks the event loop in {function.full_name}")
            return culprit is None

        return may_block

    def step(self, run: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        """Measures each step that the loop takes."""

        def measured(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            spent = time.thread_time() - began
            if spent > LONGEST_STEP and _is_ours(handle):
                self.faults.append(f"one step computed for {spent:.2f} s on the event loop: {handle!r}")

        return measured

    def executor(self) -> ThreadPoolExecutor:
        """The loop's default executor. It is the service's, so nothing of ours may go there."""
        watch = self

        class TheServices(ThreadPoolExecutor):
            def submit(self, *args: Any, **kwargs: Any) -> Any:
                if culprit := whose(sys._getframe(1)):
                    watch.faults.append(f"{culprit} uses the event loop's default executor")
                return super().submit(*args, **kwargs)

        return TheServices(max_workers=4, thread_name_prefix="default_executor")


def _is_ours(handle: asyncio.Handle) -> bool:
    """Whether this step belongs to a task whose coroutine is written in asynccb."""
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    code = getattr(task.get_coro(), "cr_code", None) if isinstance(task, asyncio.Task) else None
    return code is not None and code.co_filename.startswith(PACKAGE)


@pytest_asyncio.fixture
async def _watched_loop() -> AsyncIterator[None]:
    loop, watch = asyncio.get_running_loop(), _Watch()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0  # asyncio's own measure is wall-clock time, which a busy host spoils
    loop.set_default_executor(watch.executor())
    guard, run = watch.blockbuster(), asyncio.Handle._run  # type: ignore[attr-defined]
    asyncio.Handle._run = watch.step(run)  # type: ignore[attr-defined]
    guard.activate()
    try:
        yield
        for _ in range(3):  # whoever was told to end in the last step of the test may do so
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        watch.faults += [f"a task is left behind: {task!r}" for task in left]
    finally:
        guard.deactivate()
        asyncio.Handle._run = run  # type: ignore[attr-defined]
    if watch.faults:
        pytest.fail("\n".join(watch.faults), pytrace=False)


@pytest.fixture(autouse=True)
def _nothing_left_on_the_loop(request: pytest.FixtureRequest, _nothing_left_in_the_process: None) -> None:
    # The argument makes the order: the loop is closed before the guard of the process looks at what is left.
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("_watched_loop")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
