"""The threads of linear algebra: all pools held to one number, and put back as they were."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from asynccb.budget import blas, blas_threads
from asynccb.budget.blas import Pools, put_back_here


class Library:
    """One pool, as threadpoolctl shows it."""

    def __init__(self, path: str, user_api: str, threads: int) -> None:
        self.filepath, self.user_api, self.num_threads = path, user_api, threads
        self.sets = 0

    def set_num_threads(self, threads: int) -> None:
        self.num_threads = threads
        self.sets += 1


class PerThread(Library):
    """OpenMP keeps the number for each thread, and a new one begins with the environment's."""

    def __init__(self, path: str, threads: int) -> None:
        self._here = threading.local()
        self._first = threads
        super().__init__(path, "openmp", threads)

    @property  # type: ignore[override]
    def num_threads(self) -> int:
        return getattr(self._here, "threads", self._first)

    @num_threads.setter
    def num_threads(self, threads: int) -> None:
        self._here.threads = threads


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    libraries = [Library("openblas", "blas", 4)]
    monkeypatch.setattr(blas, "_libraries", lambda: libraries)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return libraries


def test_all_are_held_and_put_back(loaded: list[Library]) -> None:
    loaded.append(Library("mkl", "blas", 8))
    pools = Pools()
    pools.hold(1)
    assert [library.num_threads for library in loaded] == [1, 1]
    pools.hold(2)
    assert [library.num_threads for library in loaded] == [2, 2]
    pools.restore()
    assert [library.num_threads for library in loaded] == [4, 8]
    assert pools.threads is None


def test_a_library_loaded_later_is_set_by_the_next_hold_and_put_back_too(loaded: list[Library]) -> None:
    pools = Pools()
    pools.hold(1)
    loaded.append(Library("mkl", "blas", 8))
    pools.hold(1)
    assert loaded[1].num_threads == 1
    pools.restore()
    assert [library.num_threads for library in loaded] == [4, 8]


def test_to_hold_the_same_again_touches_nothing(loaded: list[Library]) -> None:
    pools = Pools()
    pools.hold(1)
    pools.hold(1)
    assert loaded[0].sets == 1


def test_openmp_is_set_on_each_thread_and_put_back_there(loaded: list[Library]) -> None:
    library = PerThread("libgomp", 4)
    loaded.append(library)
    pools = Pools()
    pools.hold(1)
    seen: list[int] = []

    def train() -> None:
        seen.append(library.num_threads)
        found = pools.hold_here()
        seen.append(library.num_threads)
        put_back_here(found)
        seen.append(library.num_threads)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [4, 1, 4]
    assert library.num_threads == 4  # here nothing was changed
    assert pools.hold_here() == [(library, 4)]


def test_nothing_is_set_here_while_nothing_is_held(loaded: list[Library]) -> None:
    assert Pools().hold_here() == []
    assert loaded[0].sets == 0


def test_torch_is_set_by_its_own_switch_if_it_is_there(
    loaded: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = SimpleNamespace(threads=6)
    torch.get_num_threads = lambda: torch.threads
    torch.set_num_threads = lambda count: setattr(torch, "threads", count)
    pools = Pools()
    pools.hold(1)
    monkeypatch.setitem(sys.modules, "torch", torch)  # imported while others train
    pools.hold(1)
    pools.hold_here()
    assert torch.threads == 1
    pools.restore()
    assert torch.threads == 6


def test_torch_in_the_midst_of_its_import_is_left_alone(
    loaded: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    pools = Pools()
    pools.hold(1)
    pools.hold_here()
    pools.restore()


def test_threads_of_an_unknown_library_are_not_told(loaded: list[Library]) -> None:
    assert blas_threads() == 4
    loaded[:] = [PerThread("libgomp", 4)]
    assert blas_threads() is None


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    import threadpoolctl

    found: list[Any] = []

    def scan() -> Any:
        found.append(None)
        return SimpleNamespace(lib_controllers=[])

    monkeypatch.setattr(threadpoolctl, "ThreadpoolController", scan)
    # Both together: what is found here is forgotten with the count that it belongs to.
    monkeypatch.setattr(blas, "_known", [])
    monkeypatch.setattr(blas, "_modules", 0)
    return found


def test_libraries_are_looked_for_again_only_when_a_module_was_imported(
    scans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    blas_threads()
    blas_threads()
    assert len(scans) == 1
    monkeypatch.setitem(sys.modules, "a_numerical_library", SimpleNamespace())
    blas_threads()
    assert len(scans) == 2


def test_numpys_own_library_is_reached() -> None:
    before = blas_threads()
    if before is None:
        pytest.skip("numpy's linear algebra does not tell its threads")
    pools = Pools()
    pools.hold(1)
    try:
        assert blas_threads() == 1
    finally:
        pools.restore()
    assert blas_threads() == before


@pytest.mark.heavy
def test_torch_itself_computes_with_the_number_on_every_thread() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    pools = Pools()
    seen: list[int] = []

    def train() -> None:
        pools.hold_here()
        seen.append(torch.get_num_threads())

    pools.hold(1)
    try:
        for _ in range(2):
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
        assert seen == [1, 1]
    finally:
        pools.restore()
    assert torch.get_num_threads() == before
