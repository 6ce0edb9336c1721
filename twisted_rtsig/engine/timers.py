"""
The engine's timers: a ``callLater`` for timers that are mostly cancelled.

Most timers are limits that are never reached: each request sets one, or moves it, and
then cancels it.  So a call is put into the heap only when the second in which it is due
is near.  Until then it is in a dictionary of all calls of that second, unordered, from
which cancelling removes it.  The heap holds tuples, which are compared in C; that of
Twisted compares :class:`DelayedCall` objects in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import count
from traceback import format_stack
from types import MappingProxyType
from typing import Any, Final

from twisted.internet.base import DelayedCall
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.posixbase import PosixReactorBase
from twisted.logger import Logger

# The logger to which Twisted logs failures of timers and of calls from threads.
_log = Logger(namespace="twisted.internet.base")

# Shared by all calls: making a dictionary for each one costs as much as the rest.
_NO_KEYWORDS: Final[Mapping[str, Any]] = MappingProxyType({})

# The longest sleep in seconds: epoll_wait(2) takes an int of milliseconds.
_LONGEST_SLEEP: Final = 2147483

# The number of cancelled calls that may stay in the heap, as in Twisted.
_CANCELLED_THAT_MAY_STAY: Final = 50


# The value of ``Timer.place`` for a call in the heap.
_IN_HEAP: Final[dict[DelayedCall, None]] = {}


class Timer(DelayedCall):
    """
    The result of ``callLater``: a :class:`DelayedCall` that is cheap to make and to
    cancel.

    :ivar place: where it is: the dictionary of its second, ``_IN_HEAP``, or None while
        it is in ``_newTimedCalls``.
    """

    __slots__ = (
        "args",
        "called",
        "cancelled",
        "delayed_time",
        "func",
        "kw",
        "place",
        "reactor",
        "time",
    )

    def __init__(
        self,
        reactor: TimerReactor,
        time: float,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kw: Mapping[str, Any],
    ) -> None:
        self.reactor = reactor
        self.time = time
        self.func = func
        self.args = args
        self.kw = kw  # type: ignore[assignment]
        self.cancelled = self.called = 0
        self.delayed_time = 0.0
        self.place: dict[DelayedCall, None] | None = None
        if self.debug:
            self.creator = format_stack()[:-2]

    def cancel(self) -> None:
        """See ``IDelayedCall.cancel``."""
        if self.cancelled:
            raise AlreadyCancelled
        if self.called:
            raise AlreadyCalled
        place = self.place
        if place is _IN_HEAP:
            self.reactor._cancellations += 1
        elif place is not None:
            del place[self]
        self.cancelled = 1
        if self.debug:
            self._repr = repr(self)
        del self.func, self.args, self.kw

    # Twisted passes these functions to the constructor of DelayedCall.

    def canceller(self, call: DelayedCall) -> None:
        self.reactor._cancelCallLater(call)

    def resetter(self, call: DelayedCall) -> None:
        self.reactor._moveCallLaterSooner(call)

    def seconds(self) -> float:
        return self.reactor.seconds()


class TimerReactor(PosixReactorBase):
    """
    A reactor with timers of its own.

    A call is in one of three places.  Until the next pass it is in ``_newTimedCalls``,
    as calls that a pass sets are made in a later pass at the earliest.  Then it is in
    ``_distant``, by second, and at last in the heap ``_near``.  If it is cancelled or
    moved to an earlier time while it is in the heap, its entry stays there until it is
    on top, or until half of the entries are of that kind.
    """

    def __init__(self) -> None:
        # Ordered by time; calls of the same time, in the order in which they were set.
        self._near: list[tuple[float, int, DelayedCall]] = []
        self._numbers = count()
        # The calls of each second, and a heap of these seconds.
        self._distant: dict[float, dict[DelayedCall, None]] = {}
        self._distant_seconds: list[float] = []
        # Calls up to this second are put into the heap at once.
        self._near_until = -math.inf
        # Not super(): a reactor may also be a subclass of one of Twisted's, which would
        # make a poller of its own.
        PosixReactorBase.__init__(self)

    # IReactorTime

    def callLater(
        self, delay: float, callable: Callable[..., Any], *args: object, **kw: object
    ) -> DelayedCall:
        """See ``IReactorTime.callLater``."""
        assert delay >= 0, f"{delay} is not greater than or equal to 0 seconds"
        call = Timer(self, self.seconds() + delay, callable, args, kw or _NO_KEYWORDS)
        self._newTimedCalls.append(call)
        return call

    def getDelayedCalls(self) -> list[Any]:
        """See ``IReactorTime.getDelayedCalls``."""
        calls = [call for _, _, call in self._near]
        for each in list(self._distant.values()):
            calls += each
        calls += self._newTimedCalls
        return [call for call in dict.fromkeys(calls) if call.active()]

    def _cancelCallLater(self, delayedCall: DelayedCall) -> None:
        place = getattr(delayedCall, "place", None)
        if place is _IN_HEAP:
            self._cancellations += 1
        elif place is not None:
            del place[delayedCall]

    def _moveCallLaterSooner(self, delayedCall: DelayedCall) -> None:
        if getattr(delayedCall, "place", None) is not None:
            self._cancelCallLater(delayedCall)
            self._insert([delayedCall])

    # The places of calls

    def _insertNewDelayedCalls(self) -> None:
        # Programs may add calls that they have made themselves to this list.
        calls = self._newTimedCalls
        if calls:
            self._newTimedCalls = []
            self._insert(calls)

    def _insert(self, calls: Iterable[DelayedCall]) -> None:
        distant, near_until = self._distant, self._near_until
        of_second = distant.get
        call: Any
        for call in calls:
            if call.cancelled:
                continue
            if call.delayed_time:
                call.activate_delay()
            time = call.time
            second = time // 1
            place = of_second(second)
            if place is None:
                if second <= near_until:
                    self._insert_near([call])
                    continue
                if second != second:
                    # It is NaN: infinity // 1 is, and so is the time that reset()
                    # makes of two infinite times.
                    second = call.time = math.inf if time != time else time
                if second not in distant:
                    distant[second] = {}
                    heappush(self._distant_seconds, second)
                place = distant[second]
            place[call] = None
            call.place = place

    def _insert_near(self, calls: Iterable[DelayedCall]) -> None:
        call: Any
        for call in calls:
            if call.cancelled:
                continue
            if call.delayed_time:
                # It may belong to a later second now.
                self._insert([call])
            else:
                call.place = _IN_HEAP
                heappush(self._near, (call.time, next(self._numbers), call))

    def _next_time(self) -> float | None:
        """
        Put the next call on top of the heap.

        :return: when it is due; None if there is none.
        """
        near, seconds = self._near, self._distant_seconds
        while True:
            time = None
            while near:
                time, _, call = near[0]
                active = not call.cancelled and not call.called
                if active and call.time == time:
                    break
                heappop(near)
                if active and call.time > time:
                    # The program has called activate_delay() itself.
                    self._insert([call])
                else:
                    self._cancellations -= 1
                time = None
            if not seconds or (time is not None and time < seconds[0]):
                return time
            # A copy: a finalizer or a signal handler may cancel a call meanwhile.
            self._insert_near(list(self._distant.pop(heappop(seconds))))

    def _forget_cancelled_calls(self) -> None:
        near = self._near
        near[:] = [
            each for each in near if each[2].active() and each[2].time >= each[0]
        ]
        heapify(near)
        self._cancellations = 0

    # The loop

    def _make_calls(self) -> float | None:
        """
        Make the calls of threads and timers, as is done before each pass.

        :return: how long the reactor may sleep then, in seconds; None for no limit.
        """
        if (
            self._newTimedCalls
            or self._near
            or self._distant_seconds
            or self.threadCallQueue
            or self._justStopped
        ):
            self.runUntilCurrent()
            return self.timeout()
        return None

    def timeout(self) -> float | None:
        """Return how long the reactor may sleep, in seconds; None for no limit."""
        self._insertNewDelayedCalls()
        time = self._next_time()
        if time is None:
            return None
        return max(0, min(_LONGEST_SLEEP, time - self.seconds()))

    def runUntilCurrent(self) -> None:
        """Make the calls of threads, and those of timers that are due."""
        if self.threadCallQueue:
            self._make_thread_calls()
        self._insertNewDelayedCalls()
        self._make_due_calls()
        if self._cancellations > max(_CANCELLED_THAT_MAY_STAY, len(self._near) >> 1):
            self._forget_cancelled_calls()
        if self._justStopped:
            self._justStopped = False
            self.fireSystemEvent("shutdown")

    def _make_thread_calls(self) -> None:
        # Only the calls that are queued now, since each may queue others.  They are
        # removed from the queue first, as a call that iterates the reactor comes here
        # again.
        queue = self.threadCallQueue
        calls = queue[:]
        del queue[: len(calls)]
        for function, args, kw in calls:
            try:
                function(*args, **kw)
            except BaseException:
                _log.failure("while calling from thread")
        if queue:
            self.wakeUp()

    def _make_due_calls(self) -> None:
        now = self.seconds()
        while True:
            time = self._next_time()
            if time is None or time > now:
                break
            call = heappop(self._near)[2]
            if call.delayed_time > 0.0:
                self._insert([call])
                continue
            call.called = 1
            try:
                if call.kw:
                    call.func(*call.args, **call.kw)
                else:
                    call.func(*call.args)
            except BaseException:
                _log_failure(call)
        self._near_until = now // 1


def _log_failure(call: DelayedCall) -> None:
    if call.creator is None:
        _log.failure("while handling timed call")
    else:
        creator = "".join(call.creator).rstrip().replace("\n", "\n C:")
        previous = f"\n C: from a DelayedCall created here:\n C:{creator}\n"
        _log.failure("while handling timed call {previous}", previous=previous)
