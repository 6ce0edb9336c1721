"""An event loop of asyncio whose time is that of a clock which a test advances."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from asyncio import TimerHandle
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock

from twisted_rtsig.coro.awaiting_asyncio import swap_current_task


@contextlib.contextmanager
def outside_of_loops() -> Iterator[None]:
    """Leave the running loop, if a test runs in one, for code that runs its own."""
    outer = asyncio._get_running_loop()
    if outer is None:
        yield
        return
    task = asyncio.current_task()
    if task is not None:
        swap_current_task(outer, None)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
        if task is not None:
            swap_current_task(outer, task)


class ClockLoop(asyncio.SelectorEventLoop):
    """
    The event loop of a ``Clock``: what is scheduled here is a delayed call there.

    Threads, sockets and children are real.

    :param clock: the clock; its tasks can await objects of this loop.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._delayed: dict[TimerHandle, IDelayedCall] = {}
        super().__init__()
        # The attribute that a reactor of Twisted has its loop in.
        clock._asyncioEventloop = self  # type: ignore[attr-defined]

    def time(self) -> float:
        """The time of the clock."""
        return self._clock.seconds()

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> TimerHandle:
        """See ``asyncio.loop.call_at``."""
        handle = TimerHandle(when, callback, args, self, context)
        delay = max(0.0, when - self.time())
        self._delayed[handle] = self._clock.callLater(delay, self._is_due, handle)
        return handle

    def _is_due(self, handle: TimerHandle) -> None:
        del self._delayed[handle]
        self.call_soon(handle._run)

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """A handle that has not run is cancelled."""
        call = self._delayed.pop(handle, None)
        if call is not None:
            call.cancel()

    @property
    def has_work(self) -> bool:
        """Whether a callback is ready."""
        ready: Any = self._ready  # type: ignore[attr-defined]
        return bool(ready)

    def turn(self) -> None:
        """Run the callbacks that are ready, and look for events, without waiting."""
        self.call_soon(self.stop)
        self.run_forever()

    def wait(self, seconds: float) -> None:
        """Wait for a thread, a socket or a child."""
        events = self._selector.select(seconds)  # type: ignore[attr-defined]
        self._process_events(events)  # type: ignore[attr-defined]
