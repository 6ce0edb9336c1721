"""A handler without input and output: the test makes the input."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.task import Clock

from twisted_rtsig.coro.handlers import Handler
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_of
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.coro.testing.running import converse
from twisted_rtsig.coro.testing.transports import BUFFER_SIZE, Transport


class SansIO:
    """
    Runs a handler without any input or output.  The test feeds it, and looks at what it
    writes::

        conversation = SansIO(session)
        conversation.feed(b"HELO there\\r\\n")
        assert conversation.written() == b"250 hello\\r\\n"

    When :meth:`feed` returns, the handler has done all that it does with the data.

    :param handler: as for :class:`CoroutineFactory`.
    :param buffer_size: when the handler has written more bytes than that, its
        ``write`` waits until the test calls :meth:`written`.
    :ivar clock: a ``twisted.internet.task.Clock``, the time of the handler.
    :ivar task: the handler's task.
    :ivar stream: the handler's stream.
    """

    def __init__(self, handler: Handler, buffer_size: int = BUFFER_SIZE) -> None:
        self.clock: Clock = Clock()
        # Without this reference each task would have another scheduler.
        self._scheduler = scheduler_of(self.clock)
        self._transport = _Recorder(self._scheduler, buffer_size)
        self.stream: Stream = self._transport.protocol.stream
        self.task: Task[Any] = converse(handler, self.stream, self.clock)
        self._settle()

    def feed(self, data: bytes) -> None:
        """Let data arrive.  After the end of the connection it is dropped."""
        self._transport.arrive(data)
        self._settle()

    def feed_eof(self) -> None:
        """Let the peer end its output: nothing more will arrive."""
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
        ``"aborted"``; or ``"lost"``, by :meth:`lose`.  None before it has ended.
        """
        return self._transport.ended

    @property
    def wrote_eof(self) -> bool:
        """Whether the handler has called ``write_eof``."""
        return self._transport.half_closed

    @property
    def done(self) -> bool:
        """Whether the handler has returned, has raised, or was cancelled."""
        return self.task.done

    def result(self) -> Any:
        """Return what the handler has returned, or raise its error."""
        return self.task.result()

    def _settle(self) -> None:
        """Let everything happen that is due now, in this turn and the next ones."""
        self.clock.advance(0)


class _Recorder(Transport):
    """Keeps what is written until it is taken."""

    def __init__(self, scheduler: Scheduler, buffer_size: int) -> None:
        super().__init__(scheduler, buffer_size)
        self._output = bytearray()

    def send(self, data: bytes) -> None:
        self._output += data

    def take(self) -> bytes:
        data = bytes(self._output)
        self._output.clear()
        self.sent(len(data))
        return data

    def close(self) -> None:
        self.lose(ConnectionDone(), "closed")

    def abort(self) -> None:
        self.lose(ConnectionAborted(), "aborted")
