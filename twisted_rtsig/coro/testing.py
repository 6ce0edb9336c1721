"""
To test protocols that are coroutines: without sockets, and without a reactor.

See ``docs/testing.md``.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from twisted_rtsig.coro.scheduler import Scheduler, scheduler_of
from twisted_rtsig.coro.serving import ClientProtocol, Handler
from twisted_rtsig.coro.tasks import Task, spawn

__all__ = ["SansIO", "in_task"]

P = ParamSpec("P")

BUFFER_SIZE = 1 << 16
"""How many bytes a handler may write before it has to wait, by default."""


def in_task(function: Callable[P, Any]) -> Callable[P, Deferred[Any]]:
    """
    Decorate a test, so that it runs as a task of the installed reactor and returns
    a Deferred.

    For trial: in the C{async def} tests that it runs itself there is no task, and so
    no C{timeout}, for example.

    :param function: an ``async def`` or generator function.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Deferred[Any]:
        return spawn(
            function(*args, **kwargs), name=function.__qualname__
        ).as_deferred()

    return call


class SansIO:
    """
    Runs a handler without any input or output: whoever tests it says what comes, and
    looks at what it writes::

        conversation = SansIO(session)
        conversation.feed(b"HELO there\\r\\n")
        assert conversation.written() == b"250 hello\\r\\n"

    Whatever the handler does with what has come, it has done when C{feed} returns.

    :param handler: as for :class:`CoroutineFactory`.
    :param buffer_size: when the handler has written more bytes than that, its
        C{write} waits for somebody to call C{written}.
    :ivar clock: a ``twisted.internet.task.Clock``, the time of the handler.
    :ivar task: the handler's task.
    :ivar stream: what the handler has.
    """

    def __init__(self, handler: Handler, buffer_size: int = BUFFER_SIZE) -> None:
        self.clock = Clock()
        # Kept here, or it would be another one for each task.
        self._scheduler = scheduler_of(self.clock)
        self._transport = _Transport(self._scheduler, buffer_size)
        self.stream = self._transport.protocol.stream
        self.task: Task[Any] = spawn(handler, self.stream, reactor=self.clock)
        self.task._when_done(self._handled)
        self._settle()

    def feed(self, data: bytes) -> None:
        """Let data come.  What comes when the connection has ended is dropped."""
        self._transport.arrive(data)
        self._settle()

    def feed_eof(self) -> None:
        """Let the peer say that nothing more will come."""
        self._transport.arrive(None)
        self._settle()

    def lose(self, reason: Exception | None = None) -> None:
        """
        Lose the connection.

        :param reason: by default a ``ConnectionLost``.
        """
        self._transport.lose(reason or ConnectionLost(), "lost")
        self._settle()

    def written(self) -> bytes:
        """What the handler has written since this was last called."""
        data = self._transport.take()
        self._settle()
        return data

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)

    @property
    def ended(self) -> str | None:
        """
        How the connection has ended: ``"closed"``, with everything sent;
        ``"aborted"``; ``"lost"``, by :meth:`lose`.  None if it has not.
        """
        return self._transport.ended

    @property
    def wrote_eof(self) -> bool:
        """Whether the handler has said that nothing more will come from it."""
        return self._transport.half_closed

    @property
    def done(self) -> bool:
        """Whether the handler has ended, in whatever way."""
        return self.task.done

    def result(self) -> Any:
        """What the handler has returned, or raised: as C{Task.result}."""
        return self.task.result()

    def _handled(self, task: Task[Any]) -> None:
        if task.failed or task.cancelled:
            self.stream.abort()
        else:
            self.stream.close()

    def _settle(self) -> None:
        """Have done what is to be done in the next turn, and in those after it."""
        self.clock.advance(0)


class _Transport(StringTransport):
    """:ivar ended: see ``SansIO.ended``."""

    def __init__(self, scheduler: Scheduler, buffer_size: int) -> None:
        super().__init__()
        self._clock = scheduler.reactor
        self._buffer_size = buffer_size
        self._full = False
        # What comes while the stream takes nothing; None is the end.
        self._arrived: deque[bytes | None] = deque()
        self.half_closed = False
        self.ended: str | None = None
        self.protocol = ClientProtocol(scheduler)
        self.protocol.makeConnection(self)

    def arrive(self, data: bytes | None) -> None:
        self._arrived.append(data)
        self._deliver()

    def _deliver(self) -> None:
        while (
            self._arrived and self.ended is None and self.producerState == "producing"
        ):
            data = self._arrived.popleft()
            if data is None:
                self.protocol.readConnectionLost()
            elif data:
                self.protocol.dataReceived(data)

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self._clock.callLater(0, self._deliver)

    def write(self, data: bytes) -> None:
        if self.ended is None and not self.disconnecting and not self.half_closed:
            super().write(data)
            if not self._full and len(self.value()) > self._buffer_size:
                self._full = True
                self.protocol.stream.pauseProducing()

    def take(self) -> bytes:
        data: bytes = self.value()
        self.clear()
        if self._full:
            self._full = False
            self.protocol.stream.resumeProducing()
        return data

    def loseWriteConnection(self) -> None:
        self.half_closed = True
        self._clock.callLater(0, self.protocol.writeConnectionLost)

    def loseConnection(self) -> None:
        self.disconnecting = True
        self._clock.callLater(0, self.lose, ConnectionDone(), "closed")

    def abortConnection(self) -> None:
        self.disconnecting = True
        self._clock.callLater(0, self.lose, ConnectionAborted(), "aborted")

    def lose(self, reason: Exception, how: str) -> None:
        if self.ended is None:
            self.ended = how
            self.protocol.connectionLost(Failure(reason))
