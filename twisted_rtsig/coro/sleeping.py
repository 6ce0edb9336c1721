"""
Sleeping: :func:`sleep`, and the time by which deadlines are given.
"""

from __future__ import annotations

import functools
from typing import Any

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, Wait
from twisted_rtsig.coro.scheduler import Scheduler, cancel_call, scheduler_for


def current_time(reactor: object = None) -> float:
    """
    The time in seconds by which deadlines are given: that of the reactor.

    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    """
    seconds: float = scheduler_for(reactor).reactor.seconds()
    return seconds


@must_be_awaited
def sleep(seconds: float, reactor: object = None) -> Operation[None]:
    """
    Wait for some time.  ``sleep(0)`` lets the reactor and all other ready tasks go
    first.

    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :raises ValueError: if the time is negative.
    """
    if not seconds >= 0:
        raise ValueError(f"cannot sleep for {seconds} seconds: 0 is the least")
    scheduler = scheduler_for(reactor)
    operation: Operation[None] = Wait()
    if seconds == 0:
        scheduler.next_turn(functools.partial(_wake, operation))
    else:
        call = scheduler.reactor.callLater(seconds, _wake, operation)
        operation.owner = _Alarm(call, scheduler)
    return operation


class _Alarm:
    """The owner of a ``sleep``: the delayed call that finishes it."""

    __slots__ = ("_call", "_scheduler")

    def __init__(self, call: Any, scheduler: Scheduler) -> None:
        self._call = call
        self._scheduler = scheduler

    def forget(self, operation: Operation[None]) -> None:
        cancel_call(self._call)

    def waits_for(self, operation: Operation[None]) -> str:
        left = self._call.getTime() - self._scheduler.reactor.seconds()
        return f"{left:.1f} more seconds of sleep"


def _wake(operation: Operation[None]) -> None:
    # The alarm holds the call, which holds the operation.
    operation.owner = None
    if not operation.called:
        operation.succeed(None)
