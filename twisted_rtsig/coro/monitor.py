"""Durations of the steps of tasks and of the passes of a reactor."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Final

from twisted_rtsig.coro.inspection import in_words, stack_of_body
from twisted_rtsig.coro.instruments import Instrument
from twisted_rtsig.coro.tasks import Task

# The upper bounds of the buckets, in microseconds: from 1 µs to 67 s, each twice the
# one before.
_BOUNDS: Final = [1 << n for n in range(27)]


class Histogram:
    """
    Counts of durations, in buckets whose bounds double, from one microsecond to more
    than a minute.

    A sample takes no memory.

    :cvar bounds: the upper bounds of the buckets in seconds; one more bucket is for
        samples above the last bound.
    :ivar counts: the number of samples in each bucket.
    """

    bounds: Final[Sequence[float]] = tuple(each / 1e6 for each in _BOUNDS)

    __slots__ = ("_nanoseconds", "counts")

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(_BOUNDS) + 1)
        self._nanoseconds = 0

    def add(self, nanoseconds: int) -> None:
        """Count a sample."""
        bucket = bisect.bisect_left(_BOUNDS, nanoseconds / 1000)
        self.counts[bucket] += 1
        self._nanoseconds += nanoseconds

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self.counts)

    @property
    def sum(self) -> float:
        """The sum of all samples, in seconds."""
        return self._nanoseconds / 1e9

    def cumulative(self) -> list[tuple[float, int]]:
        """
        For each bound, in seconds, the number of samples up to it; the last bound is
        infinite.
        """
        bounds = (*self.bounds, float("inf"))
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))

    def quantile(self, fraction: float) -> float:
        """
        The lowest bound, in seconds, that at least ``fraction`` of the samples do not
        exceed.

        :param fraction: 0.5 for the median, for example.
        :return: 0 if there are no samples; infinity if the quantile is above all
            bounds.
        :raises ValueError: if the fraction is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction}: it must be between 0 and 1")
        wanted = fraction * self.count
        return next(bound for bound, count in self.cumulative() if count >= wanted) * (
            self.count > 0
        )


@dataclass(frozen=True)
class SlowStep:
    """
    A step of a task, from one wait to the next, that took long.

    :ivar task: the name of the task.
    :ivar seconds: the duration of the step.
    :ivar stack: where the task waited after the step, from the outermost function on;
        empty if the task had ended.
    """

    task: str
    seconds: float
    stack: tuple[str, ...]

    def __str__(self) -> str:
        lines = "".join(f"\n    at {each}" for each in self.stack)
        return f"{self.task}: {self.seconds:.3f} s{lines}"


class LoopMonitor(Instrument):
    """
    An instrument that measures how long the steps of the tasks and the passes of the
    reactor take.  During a step, all other tasks wait.

    Add each monitor to one reactor only.  It costs about a microsecond for each step.

    :ivar steps: the steps of the tasks, each from one wait to the next.
    :ivar passes: the passes of the reactor, each from one wait for events to the next.
        Only this package's reactors report them.
    """

    def __init__(self) -> None:
        self.steps: Histogram = Histogram()
        self.passes: Histogram = Histogram()
        self._slowest: SlowStep | None = None
        self._slowest_nanoseconds = -1
        # When the current step and the current pass have begun.
        self._step_began: int | None = None
        self._pass_began: int | None = None

    def take_slowest(self) -> SlowStep | None:
        """
        The slowest step since this was last called; None if there was no step.

        The cause is what the task did just before it came to the wait where the stack
        of the :class:`SlowStep` ends.
        """
        slowest, self._slowest = self._slowest, None
        self._slowest_nanoseconds = -1
        return slowest

    def before_task_step(self, task: Task[Any]) -> None:
        """See ``Instrument.before_task_step``."""
        self._step_began = perf_counter_ns()

    def after_task_step(self, task: Task[Any]) -> None:
        """See ``Instrument.after_task_step``."""
        began, self._step_began = self._step_began, None
        # None if this instrument was added in the middle of the step.
        if began is not None:
            took = perf_counter_ns() - began
            self.steps.add(took)
            if took > self._slowest_nanoseconds:
                self._slowest_nanoseconds = took
                stack = tuple(in_words(stack_of_body(task._body)))
                self._slowest = SlowStep(task.name, took / 1e9, stack)

    def before_pass(self) -> None:
        """See ``Instrument.before_pass``."""
        self._pass_began = perf_counter_ns()

    def after_pass(self) -> None:
        """See ``Instrument.after_pass``."""
        began, self._pass_began = self._pass_began, None
        if began is not None:
            self.passes.add(perf_counter_ns() - began)
