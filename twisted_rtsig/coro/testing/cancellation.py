"""
Cancelling a handler at each of its waits, and checking that it leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Generator
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from twisted_rtsig.coro.awaiting_asyncio import FutureWait
from twisted_rtsig.coro.errors import Cancelled
from twisted_rtsig.coro.handlers import Handler
from twisted_rtsig.coro.inspection import (
    format_tasks,
    in_words,
    stack_of_body,
    tasks_of,
)
from twisted_rtsig.coro.operations import ignore
from twisted_rtsig.coro.scheduler import scheduler_of
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import Task, current_task
from twisted_rtsig.coro.testing.event_loops import ClockLoop, outside_of_loops
from twisted_rtsig.coro.testing.pairs import stream_pair
from twisted_rtsig.coro.testing.running import converse

_TURNS: Final = 10_000
"""How many turns of the clock a conversation may take."""

_PATIENCE: Final = 5.0
"""How many seconds asyncio may wait for a thread, a socket or a child."""


async def _only_listen(stream: Stream) -> None:
    await stream.write_eof()
    while await stream.read():
        pass


def _nothing() -> None:
    pass


def cancel_everywhere(
    handler: Callable[[Stream], object],
    peer: Handler = _only_listen,
    check: Callable[[], object] = _nothing,
) -> int:
    """
    Run a handler to its end.  Then run it again and again, and cancel it at its first
    wait, its second wait, and so on::

        async def client(stream):
            await stream.write(b"HELO there\\r\\n")
            assert await stream.read_line() == b"250 hello"

        cancel_everywhere(session, client)

    Each time there is a new conversation, in memory.  It has its own clock, which
    advances as soon as nothing else happens.  Every write waits until it was received.
    Both sides may await objects of asyncio: the time of asyncio is that of the clock,
    and its threads, sockets and children are real.

    :param handler: an ``async def`` or generator function that takes a :class:`Stream`;
        or a plain function that waits with ``wait`` of
        ``twisted_rtsig.coro.stackful``.
    :param peer: a handler for the other side; by default it sends the end of its
        output, and reads.
    :param check: called after each conversation; it raises an error if the handler has
        not left everything as it should.
    :return: at how many waits the handler was cancelled.
    :raises AssertionError: if the handler goes on, or raises something else, after it
        was cancelled; if it leaves tasks or delayed calls behind, also of asyncio; or
        if one side waits for something that never happens.
    :raises TypeError: if the handler returns a Deferred.
    """
    with outside_of_loops():
        whole = _Conversation(handler, peer)
        whole.run()
        check()
        for point in range(1, whole.waits + 1):
            _Conversation(handler, peer, point).run()
            check()
    return whole.waits


def _may_call_wait(function: object) -> bool:
    """Whether it is a plain function, where there are stackful tasks."""
    return "twisted_rtsig.coro.stackful" in sys.modules and not (
        inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
    )


class _Conversation:
    """
    :param point: at which wait the handler is cancelled; the first one is 1, and 0
        cancels nowhere.
    :ivar waits: how often the handler has waited.
    :ivar where: the line where the handler was cancelled; None if it was not.
    """

    def __init__(
        self, handler: Callable[[Stream], object], peer: Handler, point: int = 0
    ) -> None:
        self._handler = handler
        self._point = point
        self.waits = 0
        self.where: str | None = None
        self._told = False
        self._clock = Clock()
        self._loop = ClockLoop(self._clock)
        # Without this reference each task would have another scheduler.
        self._scheduler = scheduler_of(self._clock)
        ours, theirs = stream_pair(buffer_size=0, reactor=self._clock)
        self._task = converse(self._step_through, ours, self._clock)
        self._task.name = getattr(handler, "__qualname__", repr(handler))
        self._peer = converse(peer, theirs, self._clock)

    def _step_through(self, stream: Stream) -> Generator[Any, Any, Any]:
        """Do what the task would do with the handler, and cancel it at its point."""
        # The generator function under @coroutine can be stepped through.
        function: Any = getattr(self._handler, "generator_function", self._handler)
        if _may_call_wait(function):
            from twisted_rtsig.coro.stackful import in_stackful

            body = yield from self._steps(in_stackful(function, stream))
        else:
            body = function(stream)
        if isinstance(body, Deferred):
            # Its connection is about to be aborted.
            body.addErrback(ignore)
            raise TypeError(
                f"{self._handler!r} returns a Deferred, which does not tell where the "
                "handler waits: give cancel_everywhere() an async def, a generator "
                "function, a function with @coroutine, or a plain function that calls "
                "wait()"
            )
        if not (inspect.iscoroutine(body) or inspect.isgenerator(body)):
            return body
        return (yield from self._steps(body))

    def _steps(self, body: Any) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = body.send
        value: Any = None
        while True:
            try:
                awaited = step(value)
            except StopIteration as stop:
                return stop.value
            if not getattr(awaited, "called", False):
                self.waits += 1
                if self.waits == self._point:
                    self.where = [*in_words(stack_of_body(body))][-1]
                    current_task().cancel("by cancel_everywhere()")
            try:
                step, value = body.send, (yield awaited)
            except GeneratorExit:
                # This generator is collected.  The handler's coroutine may have been
                # collected before, and would not take throw().
                body.close()
                raise
            except BaseException as error:
                self._told = self._told or isinstance(error, Cancelled)
                step, value = body.throw, error

    def run(self) -> None:
        try:
            self._run()
        finally:
            # A failure because the other side is gone must not be logged.
            for task in (self._task, self._peer):
                if task.failed:
                    task._see_failure()
            self._loop.close()

    def _run(self) -> None:
        self._finish(self._task, "the handler")
        self._was_cancelled()
        if self.where is not None:
            self._peer.cancel()
        self._finish(self._peer, "its peer")
        if self.where is None:
            self._task.result()
            self._peer.result()
        self._nothing_is_left()

    def _finish(self, task: Task[Any], who: str) -> None:
        for _ in range(_TURNS):
            if task.done:
                return
            if not self._something_happens():
                raise self._wrong(
                    f"{who} waits for something that never happens", tasks=True
                )
        raise self._wrong(f"{who} has not ended after {_TURNS} turns", tasks=True)

    def _something_happens(self) -> bool:
        """Let the next thing happen; return whether there was any."""
        if self._loop.has_work:
            self._loop.turn()
        elif self._clock.getDelayedCalls():
            self._next_turn()
        else:
            waits = [task._waiting_on for task in tasks_of(self._clock)]
            if any(isinstance(each, FutureWait) for each in waits):
                self._loop.wait(_PATIENCE)
            return self._loop.has_work
        return True

    def _next_turn(self) -> None:
        due = min(each.getTime() for each in self._clock.getDelayedCalls())
        self._clock.advance(max(0.0, due - self._clock.seconds()))

    def _was_cancelled(self) -> None:
        if self.where is None or self._task.cancelled:
            return
        if self._task.failed:
            error = self._task._see_failure().value
            raise self._wrong(f"the handler has raised {error!r}") from error
        if self._told:
            raise self._wrong("the handler went on: let Cancelled pass")

    def _nothing_is_left(self) -> None:
        # The connection needs some turns to end.
        now = self._clock.seconds()
        while self._loop.has_work or any(
            each.getTime() <= now for each in self._clock.getDelayedCalls()
        ):
            self._loop.turn()
            self._clock.advance(0)
        left = self._clock.getDelayedCalls()
        if left:
            raise self._wrong(f"the handler has left behind {left}")
        if tasks_of(self._clock):
            raise self._wrong("the handler has left tasks behind", tasks=True)
        of_asyncio = asyncio.all_tasks(self._loop)
        if of_asyncio:
            raise self._wrong(f"the handler has left behind {of_asyncio}")

    def _wrong(self, what: str, tasks: bool = False) -> AssertionError:
        where = "" if self.where is None else f"cancelled at {self.where}: "
        listing = f":\n{format_tasks(self._clock)}" if tasks else ""
        return AssertionError(where + what + listing)
