"""How many compute tokens pay: one, or as many as there are. A pure object: step times in, a decision out.

Trainings bound by the interpreter lock run better one at a time: two threads that compute on small arrays
take the lock from each other many times in a step, and together do less than one alone. Trainings bound by
kernels run best on all CPUs. Which of the two these are shows in their own step times. With one token out a
step takes what it takes alone; with several at once each goes on at (alone / beside the others) of its own
pace, and the sum of these over those that compute is the *ratio*: progress in all with all tokens over
progress with one.

So trials are made: for a short time the other number of tokens, then back. A decision rests on three trials
that are clear and agree, else on the median of nine: on a machine that others use too, one trial says little.
(To subtract the time in which a thread was ready and no CPU was free does not help. Who waits for the lock
wakes now and then to ask for it, and what it then stands in line for is the lock all the same.)

After a decision comes a pause, which doubles for as long as the answer stays the same, and is cut short when
other trainings come or go or when the step times have changed. Trials may cost 2 % of the time in all, beside
a small advance for the first ones, so that with long steps the first trial comes late. Between one token and
all nothing is tried.

Where all tokens are out and every thread has a processor for practically all of its time, no trial is made:
who stands in line for the interpreter lock has not. The other way round nothing is said, for a busy machine
takes processors away too.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Learning"]

WINDOW = 0.02
"""Seconds of computing, and ``BATCHES`` batches, that a side of a trial rests on at least."""
BATCHES = 3
PAUSE = 1.0
"""Seconds between two rounds of trials at least."""
LONGEST_PAUSE = 30.0
COST = 0.02
"""Part of the time that trials may lose."""
ADVANCE = 0.06
"""Seconds that they may lose before that."""
CLEAR = (0.85, 1.2)
"""A ratio outside of these is clear."""
AGREEING, TRIALS = 3, 9
"""Of a round whose ratios are clear, and of one whose ratios are not."""
UNDISTURBED = 0.96
"""Part of their time for which threads that compute beside each other have a processor. Two in line for
the lock have less (0.5 in pure Python, 0.89 on a 64-64-10 network), two of kernels 0.99 or more."""
SEEN = 0.1
"""Seconds of computing that this rests on."""
DRIFT = 1.5
"""Step times that have changed by this factor ask for another look."""


class _Sums:
    """What one training has done, alone and beside others."""

    __slots__ = ("alone", "alone_batches", "measured", "others", "processor", "shared", "shared_batches")

    def __init__(self) -> None:
        self.alone = 0.0
        self.alone_batches = 0
        self.shared = 0.0
        self.shared_batches = 0
        self.measured = 0.0
        """Of ``shared``, the part of which the processor time is known."""
        self.processor = 0.0
        self.others = 0.0
        """Of ``shared``, times the number that computed then."""

    def add(self, other: _Sums) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def step(self, alone: bool) -> float | None:
        """Mean seconds of a batch; None where there are too few."""
        seconds, batches = (self.alone, self.alone_batches) if alone else (self.shared, self.shared_batches)
        return seconds / batches if batches >= BATCHES and seconds > 0 else None


class Learning:
    """Decides whether all tokens may be out. Not thread-safe.

    Args:
        tokens: how many there are, 2 or more.
        now: the time, in seconds; every later ``now`` is on the same clock.
    """

    def __init__(self, tokens: int, now: float) -> None:
        self.ratio: float | None = None
        """The last one measured."""
        self._loss = 1 - 1 / tokens  # of a trial whose outcome nobody knows
        self._all = True
        self._trial = False
        self._collecting = True
        self._sums: dict[Hashable, _Sums] = {}
        self._left = _Sums()
        self._ratios: list[float] = []  # of this round
        self._trial_began = now
        self._trial_ends = now
        self._next = now
        self._pause = PAUSE
        self._round_ended = now - PAUSE
        self._round_said: bool | None = None
        self._looked = now
        self._allowance = ADVANCE
        self._steps: dict[Hashable, float] = {}

    @property
    def all_tokens(self) -> bool:
        """Whether all may be out now, trials included; else one."""
        return self._all is not self._trial

    def record(
        self, training: Hashable, computing: int, seconds: float, batches: int, processor: float | None = None
    ) -> None:
        """So many batches, one after another, while so many trainings computed, this one included.
        ``processor``: seconds for which the thread had one meanwhile, where that is known."""
        sums = self._sums.get(training)
        if sums is None:
            sums = self._sums[training] = _Sums()
        if computing == 1:
            sums.alone += seconds
            sums.alone_batches += batches
        else:
            sums.shared += seconds
            sums.shared_batches += batches
            sums.others += seconds * computing
            if processor is not None:
                sums.measured += seconds
                sums.processor += processor

    def forget(self, training: Hashable) -> None:
        """It has left."""
        sums = self._sums.pop(training, None)
        if sums is not None:
            self._left.add(sums)
        self._steps.pop(training, None)

    def look_again(self, now: float) -> None:
        """Others compute now: the next round comes as soon as the shortest pause has passed."""
        self._pause = PAUSE
        self._next = min(self._next, max(now, self._round_ended + PAUSE))

    def look(self, now: float) -> None:
        """Ends a trial that has seen enough, or begins one that is due."""
        # Time in which nobody looked, because nobody computed beside another, earns nothing.
        self._allowance += COST * min(now - self._looked, 1.0)
        self._looked = now
        if self._trial:
            if now >= self._trial_ends or self._enough(self.all_tokens):
                self._judge(now)
        elif now < self._next:
            self._watch_drift(now)
        elif not self._collecting:
            self._collecting = True
            self._clear()
        elif not self._enough(self._all):
            return
        elif self._all and (undisturbed := self._undisturbed()) is not False:
            if undisturbed:
                self._clear()
                self._end_round(now)
        else:
            self._begin(now)

    # ------------------------------------------------------------------------------------------------------

    def _undisturbed(self) -> bool | None:
        """Whether all that compute have a processor all the time; None: not seen for long enough yet."""
        totals = self._totals()
        if totals.measured < SEEN:
            # Without a word of processor time there is nothing to wait for.
            return None if totals.measured > totals.shared / 2 else False
        return totals.processor >= UNDISTURBED * totals.measured

    def _begin(self, now: float) -> None:
        steps = self._totals().step(alone=not self._all)
        expected = max(WINDOW, BATCHES * (steps or 0.0))
        if self._allowance < expected * self._expected_loss():
            return
        self._trial = True
        self._trial_began = now
        # Twice as long, and a step: the others finish theirs before a token is free.
        self._trial_ends = now + 3 * expected

    def _judge(self, now: float) -> None:
        took = now - self._trial_began
        self._trial = False
        ratio = self._measured()
        if ratio is None:
            self._allowance -= took * self._loss
            self._clear()
            return
        self._ratios.append(ratio)
        self.ratio = ratio = median(self._ratios)
        self._allowance -= took * self._expected_loss()
        self._all = ratio > (1.02 if self._all else 1.08)  # who is near the border stays where he is
        low, high = CLEAR
        clear = len(self._ratios) >= AGREEING and (max(self._ratios) < low or min(self._ratios) > high)
        self._clear()
        if not clear and len(self._ratios) < TRIALS:
            return
        self._end_round(now)

    def _end_round(self, now: float) -> None:
        same = self._round_said is self._all
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if same else PAUSE
        self._round_said = self._all
        self._round_ended = now
        self._next = now + self._pause
        self._steps.clear()
        self._ratios.clear()
        self._collecting = False

    def _watch_drift(self, now: float) -> None:
        if self._collecting or now < self._round_ended + PAUSE or not self._enough(self._all):
            return
        steps = self._usual_steps()
        self._clear()
        if not self._steps:
            self._steps = steps
            return
        for training, step in steps.items():
            before = self._steps.get(training)
            if before is not None and not before / DRIFT < step < before * DRIFT:
                self.look_again(now)
                return

    def _usual_steps(self) -> dict[Hashable, float]:
        steps = {training: sums.step(alone=not self._all) for training, sums in self._sums.items()}
        return {training: step for training, step in steps.items() if step is not None}

    def _clear(self) -> None:
        self._sums.clear()
        self._left = _Sums()

    def _expected_loss(self) -> float:
        if self.ratio is None:
            return self._loss
        return max(0.1, 1 - min(self.ratio, 1 / self.ratio))

    def _enough(self, all_tokens: bool) -> bool:
        totals = self._totals()
        if all_tokens:
            return totals.shared >= WINDOW and totals.shared_batches >= BATCHES
        return totals.alone >= WINDOW and totals.alone_batches >= BATCHES

    def _totals(self) -> _Sums:
        totals = _Sums()
        totals.add(self._left)
        for sums in self._sums.values():
            totals.add(sums)
        return totals

    def _measured(self) -> float | None:
        """The ratio by the trainings that were seen on both sides. If they are so short that none was, all
        are taken for alike."""
        seen = [sums for sums in self._sums.values() if sums.step(True) and sums.step(False)]
        if not seen and not self._left.alone_batches + self._left.shared_batches:
            return None
        of = seen or [self._totals()]
        progress = seconds = 0.0
        for sums in of:
            alone, shared = sums.step(True), sums.step(False)
            if alone is None or shared is None:
                return None
            progress += sums.others * alone / shared
            seconds += sums.shared
        return progress / seconds if seconds else None
