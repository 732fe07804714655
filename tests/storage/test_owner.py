"""A process is known by more than its number."""

from __future__ import annotations

import errno
import os
import re
import warnings

import pytest

from asynccb.storage import owner
from asynccb.storage.owner import FORM, Owner, this_process

needs_signals = pytest.mark.skipif(os.name == "nt", reason="the end of a process is not told there")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


@pytest.fixture(autouse=True)
def _asked_anew():
    owner._process.cache_clear()
    yield
    owner._process.cache_clear()


def test_the_text_of_an_owner_is_read_back():
    for one in (this_process(), Owner("01234567", "89abcdef", 4_194_304, "00000000")):
        assert re.fullmatch(FORM, str(one))
        assert Owner.parse(str(one)) == one


def test_this_process_lives():
    assert this_process().pid == os.getpid()
    assert this_process().is_dead() is False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_another_process():
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads; the child needs none
        child = os.fork()
    if not child:
        os.write(writing, str(this_process()).encode())
        os._exit(0)
    with open(reading, "rb") as pipe:
        os.close(writing)
        found = Owner.parse(pipe.read().decode())
    assert found.pid == child
    assert found != this_process()
    os.waitpid(child, 0)
    assert found.is_dead() is True


def test_nothing_is_known_of_other_hosts_and_spaces():
    assert this_process()._replace(host="0badcafe").is_dead() is None
    assert this_process()._replace(space="0badcafe").is_dead() is None


@needs_signals
def test_a_number_that_no_process_can_have_is_a_dead_ones():
    assert this_process()._replace(pid=0xFFFF_FFFF).is_dead() is True


@needs_proc
def test_a_process_that_has_the_number_of_another_is_not_that_one():
    parent = this_process()._replace(pid=os.getppid())
    assert parent._replace(start=owner._start_of(os.getppid())).is_dead() is False
    assert parent._replace(start="0badcafe").is_dead() is True


@needs_proc
def test_another_boot_is_another_start(monkeypatch):
    before = owner._start_of(os.getpid())
    monkeypatch.setattr(owner, "_boot", lambda: "another")
    assert owner._start_of(os.getpid()) != before


@needs_signals
def test_where_no_start_is_told_whoever_has_the_number_may_be_the_owner(monkeypatch):
    parent = this_process()._replace(pid=os.getppid(), start="0badcafe")
    monkeypatch.setattr(owner, "_start_of", lambda pid: owner._UNKNOWN)
    owner._process.cache_clear()
    assert this_process().start == "00000000"
    assert parent.is_dead() is False
    assert this_process()._replace(start="0badcafe").is_dead() is False
    assert parent._replace(pid=0x7FFFFFF0).is_dead() is True


@needs_signals
def test_a_process_that_may_not_be_signalled_is_there(monkeypatch):
    def kill(pid, number):
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "kill", kill)
    parent = this_process()._replace(pid=os.getppid(), start=owner._start_of(os.getppid()))
    assert parent.is_dead() is False


def test_on_windows_nothing_is_known_of_other_processes(monkeypatch):
    """Asking there with signal 0 would end them."""
    other = this_process()._replace(pid=os.getppid())
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail("a process was signalled"))
    assert other.is_dead() is None
    assert this_process().is_dead() is False
