"""The guards of conftest.py fail what misbehaves (a negative control for each) and let what behaves pass."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

# Stands where asynccb would be imported from: what it does on the loop counts as ours.
OURS = """
    import asyncio, logging, threading, time

    async def sleep_on_the_loop():
        time.sleep(0.001)

    async def write_on_the_loop(path):
        with open(path, "w") as file:
            file.write("x")

    async def wait_for_a_thread_on_the_loop(event):
        event.wait(0.001)

    async def swallow_the_refusal():
        try:
            time.sleep(0.001)
        except Exception:
            pass

    async def compute_on_the_loop():
        end = time.thread_time() + 1.3
        while time.thread_time() < end:
            pass

    async def use_the_default_executor():
        await asyncio.to_thread(int)

    async def call(function, *arguments):
        return function(*arguments)

    async def log():
        logging.getLogger(__name__).error("to where the service has it")
"""

OUR_STORAGE = """
    def write(path):
        with open(path, "w") as file:
            file.write("x")
"""

MISBEHAVING = """
    import asyncio, os, signal, sys, tempfile, threading, time, types
    from concurrent.futures import ThreadPoolExecutor
    import pytest
    import asynccb.callbacks, asynccb.storage

    kept = []

    @pytest.fixture(autouse=True, scope="module")
    def let_the_process_end():
        yield
        for thing in kept:
            if isinstance(thing, threading.Event):
                thing.set()
            elif isinstance(thing, str):
                os.unlink(thing)

    def fail():
        raise RuntimeError("nobody looked at me")

    # -- left in the process
    def test_thread():
        kept.append(threading.Event())
        threading.Thread(target=kept[-1].wait, daemon=True, name="the leaked one").start()

    def test_run():
        sys.modules["asynccb.run"] = types.SimpleNamespace(live_runs=lambda: ["the leaked one"])

    def test_open_file(tmp_path):
        kept.append(open(tmp_path / "the leaked one", "w"))

    def test_temporary_file():
        handle, path = tempfile.mkstemp(prefix="ours-")
        os.close(handle)
        kept.append(path)

    def test_half_written_file(tmp_path):
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / ".w.h5.0123abcd-0123abcd-1f-0123abcd-0123abcd.tmp").touch()

    def test_signal_handler():
        signal.signal(signal.SIGUSR1, lambda *_: None)

    def test_stdout():
        sys.stdout = open(os.devnull, "w")

    def test_switch_interval():
        sys.setswitchinterval(0.123)

    def test_executor_job():
        kept.append(ThreadPoolExecutor(1))
        kept.append(threading.Event())
        kept[-2].submit(kept[-1].wait)

    def test_exception_of_a_task_in_a_loop_of_its_own():
        async def main():
            asyncio.ensure_future(asyncio.sleep(0)).add_done_callback(lambda _: fail())
            await asyncio.sleep(0.01)
        asyncio.run(main())

    # -- on the loop
    @pytest.mark.asyncio
    async def test_task():
        kept.append(asyncio.create_task(asyncio.sleep(3600), name="the leaked one"))

    @pytest.mark.asyncio
    async def test_task_that_cannot_be_cancelled():
        async def deaf():
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    pass
        kept.append(asyncio.create_task(deaf()))
        await asyncio.sleep(0)
        fail()

    @pytest.mark.asyncio
    async def test_exception_never_retrieved():
        async def failing():
            fail()
        task = asyncio.create_task(failing())
        await asyncio.sleep(0.01)

    @pytest.mark.asyncio
    async def test_sleep_on_the_loop():
        await asynccb.callbacks.sleep_on_the_loop()

    @pytest.mark.asyncio
    async def test_write_on_the_loop(tmp_path):
        await asynccb.callbacks.write_on_the_loop(tmp_path / "x")

    @pytest.mark.asyncio
    async def test_write_through_storage_on_the_loop(tmp_path):
        await asynccb.callbacks.call(asynccb.storage.write, tmp_path / "x")

    @pytest.mark.asyncio
    async def test_wait_for_a_thread_on_the_loop():
        await asynccb.callbacks.wait_for_a_thread_on_the_loop(threading.Event())

    @pytest.mark.asyncio
    async def test_refusal_that_is_swallowed():
        await asynccb.callbacks.swallow_the_refusal()

    @pytest.mark.asyncio
    async def test_compute_on_the_loop():
        await asyncio.create_task(asynccb.callbacks.compute_on_the_loop())

    @pytest.mark.asyncio
    async def test_default_executor():
        await asynccb.callbacks.use_the_default_executor()
"""

CLEAN = """
    import asyncio, io, logging, threading, time
    import pytest
    import asynccb.callbacks, asynccb.storage

    def test_thread_that_is_just_ending(tmp_path):
        threading.Thread(target=time.sleep, args=(0.2,)).start()
        with open(tmp_path / "x", "w") as file:
            file.write("x")

    @pytest.mark.asyncio
    async def test_may_touch_files_itself(tmp_path):
        (tmp_path / "x").write_text("x")
        asynccb.storage.write(tmp_path / "y")
        await asynccb.callbacks.call(lambda: (tmp_path / "z").write_text("z"))
        time.sleep(0.001)

    @pytest.mark.asyncio
    async def test_may_use_threads_tasks_and_sockets_that_end():
        await asyncio.to_thread(time.sleep, 0.01)
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with server, asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))

    @pytest.mark.asyncio
    async def test_may_log_into_a_file(tmp_path):
        handler = logging.FileHandler(tmp_path / "service.log")
        logging.getLogger().addHandler(handler)
        await asynccb.callbacks.log()
        logging.getLogger().removeHandler(handler)
        handler.close()
        assert (tmp_path / "service.log").read_text()

    def test_may_patch_a_stream(monkeypatch):
        monkeypatch.setattr("sys.stdout", io.StringIO())

    def test_may_capture(capsys):
        print("x")
        assert capsys.readouterr().out.strip() == "x"

    @pytest.mark.asyncio
    async def test_runs_in_debug_mode():
        assert asyncio.get_running_loop().get_debug()
"""

FAULTS = {
    "test_thread": "a thread is left behind: <Thread(the leaked one",
    "test_run": "a run is left behind: 'the leaked one'",
    "test_open_file": "an open file is left behind",
    "test_temporary_file": "a temporary file is left behind: ours-",
    "test_half_written_file": "logs/.w.h5.0123abcd-0123abcd-1f-0123abcd-0123abcd.tmp",
    "test_signal_handler": "the handler of SIGUSR1 is not what it was",
    "test_stdout": "the standard streams are not what they were",
    "test_switch_interval": "the switch interval is not what it was: 0.123",
    "test_executor_job": "a thread is left behind: <Thread(ThreadPoolExecutor",
    "test_exception_of_a_task_in_a_loop_of_its_own": "asyncio reports: Exception in callback",
    "test_task": "a task is left behind: <Task pending name='the leaked one'",
    "test_task_that_cannot_be_cancelled": "the teardown did not end within 1.0 s",
    "test_exception_never_retrieved": "asyncio reports: Task exception was never retrieved",
    "test_sleep_on_the_loop": "sleep_on_the_loop blocks the event loop in time.sleep",
    "test_write_on_the_loop": "write_on_the_loop blocks the event loop in builtins.open",
    "test_write_through_storage_on_the_loop": "call blocks the event loop in builtins.open",
    "test_wait_for_a_thread_on_the_loop": "a_thread_on_the_loop blocks the event loop in lock.acquire",
    "test_refusal_that_is_swallowed": "swallow_the_refusal blocks the event loop in time.sleep",
    "test_compute_on_the_loop": "one step computed for 1.3",
    "test_default_executor": "use_the_default_executor uses the event loop's default executor",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What pytest says of each misbehaving and each clean test, by its name; all run in one other process."""
    folder = tmp_path_factory.mktemp("guards")
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    files = {
        "tests/conftest.py": conftest.replace("GRACE = 2.0", "GRACE = 0.5").replace(
            "TEARDOWN = 30.0", "TEARDOWN = 1.0"
        ),
        "pytest.ini": "[pytest]\nasyncio_default_fixture_loop_scope = function\n",
        "asynccb/__init__.py": "",
        "asynccb/callbacks.py": OURS,
        "asynccb/storage/__init__.py": OUR_STORAGE,
        "tests/test_misbehaving.py": MISBEHAVING,
        "tests/test_clean.py": CLEAN,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml=said.xml",
        "-o",
        "pythonpath=.",
    ]
    subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=50)
    said: dict[str, str] = {}
    for case in ElementTree.parse(folder / "said.xml").iter("testcase"):
        faults = [part.get("message", "") + (part.text or "") for part in case]
        said[case.attrib["name"]] = said.get(case.attrib["name"], "") + "\n".join(faults)
    return said


@pytest.mark.parametrize("name", FAULTS)
def test_what_misbehaves_is_failed_by_name(said: Mapping[str, str], name: str) -> None:
    assert FAULTS[name] in said[name]


def test_what_behaves_is_let_pass(said: Mapping[str, str]) -> None:
    clean = re.findall(r"def (test_\w+)", CLEAN)
    assert {name: said[name] for name in clean} == dict.fromkeys(clean, "")


def test_each_misbehaving_test_is_looked_at(said: Mapping[str, str]) -> None:
    assert sorted(FAULTS) == sorted(re.findall(r"def (test_\w+)", MISBEHAVING))
    assert sorted(said) == sorted([*FAULTS, *re.findall(r"def (test_\w+)", CLEAN)])
