"""The threads of linear algebra: held from any thread, put back from any other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asynccb.budget.blas import Pools, blas_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def found() -> Iterator[int]:
    before = blas_threads()
    assert before is not None
    yield before
    left = blas_threads()
    assert left == before


def on_a_thread_that_lives_on(function: Callable[[], object]) -> Callable[[], None]:
    """Calls it on a new thread, which then waits. Answers how to end the thread."""
    called, may_end = threading.Event(), threading.Event()

    def body() -> None:
        function()
        called.set()
        may_end.wait(30)

    thread = threading.Thread(target=body)
    thread.start()
    assert called.wait(30)

    def end() -> None:
        may_end.set()
        thread.join()

    return end


def test_what_one_thread_has_set_another_one_puts_back_while_the_first_still_lives(found: int) -> None:
    np.ones((64, 64)) @ np.ones((64, 64))
    pools = Pools()
    end = on_a_thread_that_lives_on(lambda: pools.hold(1))
    try:
        assert blas_threads() == 1
        pools.restore()
        assert blas_threads() == found
    finally:
        end()


def test_a_number_is_held_though_another_thread_has_set_one_through_the_library(found: int) -> None:
    """The control: the library's own way is ignored on this thread, without a word."""
    from threadpoolctl import ThreadpoolController

    libraries = [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]

    def take_control() -> None:
        for library in libraries:
            library.set_num_threads(found)

    end = on_a_thread_that_lives_on(take_control)
    pools = Pools()
    try:
        if hasattr(libraries[0], "_real_set_num_threads"):
            libraries[0].set_num_threads(1)
            assert blas_threads() == found
        pools.hold(1)
        assert blas_threads() == 1
    finally:
        pools.restore()
        end()
