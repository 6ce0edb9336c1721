"""Handlers: the task of each connection of a server, from its first byte to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Hashable
from typing import TYPE_CHECKING, Any, TypeAlias

from twisted.internet.error import ConnectionClosed
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str

from twisted_rtsig.coro.connections import HalfCloseable, StreamProtocol
from twisted_rtsig.coro.errors import (
    DelimiterNotFound,
    IncompleteRead,
    TLSError,
    UnreadPlaintext,
)
from twisted_rtsig.coro.runnables import name_of
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.coro.tracebacks import causes, log_failure

if TYPE_CHECKING:
    from twisted_rtsig.coro.factories import CoroutineFactory

_log = Logger()

Handler: TypeAlias = Callable[[Stream], Awaitable[object] | Generator[Any, Any, object]]
"""An ``async def``, a generator function, or a function that returns a Deferred."""


class ServerProtocol(StreamProtocol):
    """
    The connection of a server: runs the handler.

    :ivar network: the address that the connection counts for; None if it counts for
        none, or there is no limit.
    :ivar stopped: whether a stop of the server has cancelled the handler.
    """

    factory: CoroutineFactory
    network: Hashable | None = None
    # None until the handler has run its first step; that step may stop the server.
    _task: Task[Any] | None = None
    _cancelled_early: str | None = None
    _handler_cancelled = False
    stopped: bool = False
    _refused = False

    def connectionMade(self) -> None:
        """See ``IProtocol.connectionMade``."""
        factory = self.factory
        if not factory.admit(self):
            self._refused = True
            transport: Any = self.transport
            getattr(transport, "abortConnection", transport.loseConnection)()
            return
        super().connectionMade()
        task = self._task = self._spawn(factory.handler, self.stream)
        task._when_done(self._handled)
        if self._cancelled_early is not None:
            self.cancel(self._cancelled_early)
        factory.watch()

    def _spawn(self, function: Callable[..., Any], *args: Any) -> Task[Any]:
        name, reactor = self.factory.name, self._scheduler.reactor
        try:
            return spawn(function, *args, name=name, reactor=reactor)
        except Exception as error:
            # The handler cannot be called with these arguments: that is reported as an
            # error that the handler has raised.
            return spawn(_fail, error, name=name or name_of(function), reactor=reactor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """See ``IProtocol.connectionLost``."""
        if self._refused:
            return
        stream = self.stream
        overdue = None if stream.lost else stream.timed_out
        super().connectionLost(reason)
        if isinstance(overdue, TLSError):
            self.factory.tell_of_limit(stream, "handshake_timeout", overdue)
        if self.factory.cancel_on_loss:
            self._cancel_handler("the connection was lost")
        if self._task is not None and self._task.done:
            self.factory.forget(self)

    def cancel(self, reason: str) -> None:
        """Cancel the handler; if it has ended, abort what is not sent yet."""
        if self._task is not None and self._task.done:
            self.stream.abort()
        else:
            self.stopped = True
            self._cancel_handler(reason)

    def _cancel_handler(self, reason: str) -> None:
        """Cancel the handler, but only once, so that it can clean up."""
        if self._task is None:
            self._cancelled_early = reason
        elif not self._handler_cancelled:
            self._handler_cancelled = True
            self._task.cancel(reason)

    @property
    def unended_handler(self) -> Task[Any] | None:
        """The handler's task, if it has not ended."""
        return None if self._task is None or self._task.done else self._task

    def _handled(self, task: Task[Any]) -> None:
        """The handler has returned, has raised, or was cancelled."""
        stream = self.stream
        if task.cancelled:
            stream._begin_abort()
        elif not task.failed:
            stream._begin_close()
        else:
            error = task._see_error()
            names = {"name": task.name, "stream": stream}
            if all(map(self._is_of_the_peer, causes(error))):
                if stream.timed_out is None:
                    # Otherwise the factory has logged it.
                    _log.info(
                        "{name}, {stream}: {error}", error=safe_str(error), **names
                    )
            else:
                message = "{name}, {stream}: the handler has failed"
                log_failure(_log, message, error, **names)
            stream._begin_abort()
        if stream.lost:
            self.factory.forget(self)

    def _is_of_the_peer(self, error: BaseException) -> bool:
        """Whether the peer has caused an error, and not a mistake of the handler."""
        stream = self.stream
        if isinstance(error, DelimiterNotFound | UnreadPlaintext):
            return True
        return (stream.ended and isinstance(error, IncompleteRead)) or (
            (stream.lost or stream.timed_out is not None)
            and isinstance(error, ConnectionClosed)
        )


async def _fail(error: Exception) -> None:
    raise error


class HalfCloseableServer(HalfCloseable, ServerProtocol):
    """A connection whose handler goes on when its input ends."""
