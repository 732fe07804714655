"""What inline hooks cost the training, by callback, and a warning where that is too much.

To look at a clock around every hook of every batch would cost as much as a quick hook. So a batch is timed
now and then, and stands for those since the one before: at most one in 512 and one in 20 ms, and never the
first of an epoch, since the end of the batch before tells when it began. Where hooks are slow, every batch is
timed. Hooks of epochs always are.
"""

from __future__ import annotations

import warnings
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any

from asynccb.events import BatchBegin, BatchEnd

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.events import Logs

__all__ = ["HookClock", "Timed"]

SLOW = 0.1
"""Seconds: hooks that take longer than this in a batch are looked at in every batch, for Keras' rule."""
LOST = 1.0
"""Seconds that hooks must have cost before they are compared with the batches."""
SAMPLES = 4
"""Samples before they are."""
APART = 0.02
"""Seconds from one sample to the next, while hooks are quick."""
EVERY, ALWAYS = 511, 1


class HookClock:
    """Times inline hooks on the training thread.

    Two rules, of which one warns once, and names the callback. Keras 2's: the median of the last ten batches'
    hooks is over 0.1 s and over 0.95 of a batch. Ours: hooks have cost more than the batches, and more than a
    second.

    Attributes:
        mask: the clock is asked about a batch where ``index & mask < 2``.
        spent: seconds by callback, those of batch hooks estimated from the samples.

    Args:
        name_of: the callback's name for a hook and the name of that hook; None: it is nobody's any more.
    """

    def __init__(self, name_of: Callable[[Any, str], str | None]) -> None:
        self.mask = EVERY
        self.spent: dict[str, float] = {}
        self._name_of = name_of
        self._ended = (-2, 0.0)  # which batch ended when, if the next one is to be timed
        self._next = 0.0
        self._step = 0
        self._taken_at = perf_counter()
        self._hooks: list[tuple[str, Timed]] = []
        self._came = 0.0
        self._batches = 0.0
        self._in_hooks = 0.0
        self._samples = 0
        self._history: dict[tuple[str, str], deque[float]] = {}
        self._said = False

    def let_go(self) -> None:
        """Of whoever knows the names; nothing is timed any more."""
        self._name_of = lambda hook, hook_name: None

    def add(self, callback: str, seconds: float) -> None:
        """A hook of an epoch took so long."""
        self.spent[callback] = self.spent.get(callback, 0.0) + seconds

    def begin(self, hook_name: str, index: int, hooks: list[Any]) -> list[Any]:
        """What to call for the hooks of a batch event: themselves, or each of them timed."""
        if self._ended[0] != index - 1 or hook_name not in _TIMED:
            return hooks
        if hook_name == BatchBegin.hook:
            self._hooks.clear()
        else:
            self._came = perf_counter()
        timed = [Timed(hook) for hook in hooks]
        self._hooks += [(hook_name, hook) for hook in timed]
        return timed

    def end(self, hook_name: str, index: int, step: int) -> None:
        """They have run."""
        if hook_name != BatchEnd.hook:
            return
        (before, began), now = self._ended, perf_counter()
        if before == index - 1:
            self._take(began, step, now)
            self._next = now + APART
        timed_next = self.mask == ALWAYS or (now >= self._next and before != index - 1)
        self._ended = (index if timed_next else -2, now)
        self._hooks.clear()

    def _take(self, began: float, step: int, now: float) -> None:
        spent = sum(hook.took for _, hook in self._hooks)
        batch = self._came - began - sum(hook.took for name, hook in self._hooks if name == BatchBegin.hook)
        # For no more time than has passed: in a hook that happened to wait for the interpreter lock, a batch
        # of microseconds takes milliseconds, and would stand for seconds.
        passed, self._taken_at = now - self._taken_at, now
        weight, self._step = float(max(1, step - self._step)), step
        if weight * (spent + batch) > passed:
            weight = max(1.0, passed / (spent + batch))
        for name, hook in self._hooks:
            owner = self._name_of(hook.hook, name)
            if owner is not None:
                self.add(owner, hook.took * weight)
        self._batches += batch * weight
        self._in_hooks += spent * weight
        self._samples += 1
        if spent > SLOW:
            self.mask = ALWAYS
        if self.mask == ALWAYS:
            self._compare_with_keras(batch, spent)
        elif self._samples >= SAMPLES and self._in_hooks > max(LOST, self._batches):
            self._say_costly()

    def _compare_with_keras(self, batch: float, spent: float) -> None:
        slowest, median = ("", ""), 0.0
        for name, hook in self._hooks:
            key = (self._name_of(hook.hook, name) or "", getattr(hook.hook, "__name__", name))
            samples = self._history.setdefault(key, deque(maxlen=10))
            samples.append(hook.took if spent > 0.95 * batch else 0.0)
            # Of the last ten; those that are not yet there count as quick.
            middle = sorted([*samples, *[0.0] * (10 - len(samples))])[5]
            if middle > median:
                slowest, median = key, middle
        if median > SLOW and not self._said:
            self._said = True
            owner, hook_name = slowest
            warnings.warn(
                f"Method {hook_name}() of {owner} is slow compared to the batch update ({median:f} s). "
                "Check your callbacks, or make the hook `async def`: then no batch waits for it",
                UserWarning,
                stacklevel=2,
            )

    def _say_costly(self) -> None:
        if self._said:
            return
        self._said = True
        owner = max(self.spent, key=lambda name: self.spent[name])
        warnings.warn(
            f"Inline hooks have cost about {self._in_hooks:.1f} s and the batches themselves "
            f"{self._batches:.1f} s; most of it is {owner}'s. Make its hooks `async def`, or do less "
            "in each batch; run.stats.inline has the seconds of each callback",
            UserWarning,
            stacklevel=2,
        )


_TIMED = (BatchBegin.hook, BatchEnd.hook)


class Timed:
    """An inline hook under observation."""

    __slots__ = ("hook", "took")

    def __init__(self, hook: Callable[[int, Logs], object]) -> None:
        self.hook = hook
        self.took = 0.0

    def __call__(self, index: int, logs: Logs) -> object:
        began = perf_counter()
        try:
            return self.hook(index, logs)
        finally:
            self.took = perf_counter() - began
