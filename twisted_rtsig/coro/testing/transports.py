"""Transports in memory: they carry a stream without a socket."""

from __future__ import annotations

from collections import deque
from typing import Final

from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from twisted_rtsig.coro.clients import ClientProtocol
from twisted_rtsig.coro.scheduler import Scheduler

BUFFER_SIZE: Final = 1 << 16
"""How many bytes may be on their way before writes wait, by default."""


class Transport(StringTransport):
    """
    Does for its stream what Twisted's transports do, but has no socket.

    :ivar protocol: the protocol; it has the stream.
    :ivar half_closed: whether the stream has ended its output.
    :ivar ended: how the connection has ended, in one word; None before.
    """

    disconnecting: bool

    def __init__(self, scheduler: Scheduler, buffer_size: int) -> None:
        super().__init__()
        self._reactor = scheduler.reactor
        self._buffer_size = buffer_size
        # How many bytes were written and not sent yet.
        self._unsent = 0
        self._full = False
        # What has arrived while the stream was paused; None is the end.
        self._arrived: deque[bytes | None] = deque()
        self.half_closed: bool = False
        self.ended: str | None = None
        self.protocol: ClientProtocol = ClientProtocol(scheduler)
        self.protocol.makeConnection(self)

    # What subclasses implement

    def send(self, data: bytes) -> None:
        """Send ``data``, and call :meth:`sent` when that is done."""
        raise NotImplementedError

    def send_eof(self) -> None:
        """Send the end of the output."""

    def close(self) -> None:
        """Call :meth:`lose` when everything is sent."""
        raise NotImplementedError

    def abort(self) -> None:
        """Call :meth:`lose` at once."""
        raise NotImplementedError

    def received(self, size: int) -> None:
        """The stream has taken ``size`` bytes."""

    # Input

    def arrive(self, data: bytes | None) -> None:
        """Data has arrived from the other side; None is the end of it."""
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
                self.received(len(data))

    def resumeProducing(self) -> None:
        """See ``IPushProducer.resumeProducing``."""
        super().resumeProducing()
        self._reactor.callLater(0, self._deliver)

    # Output

    def write(self, data: bytes) -> None:
        """See ``ITransport.write``."""
        if self.ended is None and not self.disconnecting and not self.half_closed:
            self._unsent += len(data)
            self.send(data)
            if not self._full and self._unsent > self._buffer_size:
                self._full = True
                self.protocol.stream.pauseProducing()

    def sent(self, size: int) -> None:
        """``size`` of the bytes that were written have been sent."""
        self._unsent -= size
        if self._full and not self._unsent:
            self._full = False
            self.protocol.stream.resumeProducing()

    # The end

    def loseWriteConnection(self) -> None:
        """See ``ITCPTransport.loseWriteConnection``."""
        self.half_closed = True
        self.send_eof()
        self._reactor.callLater(0, self.protocol.writeConnectionLost)

    def loseConnection(self) -> None:
        """See ``ITransport.loseConnection``."""
        self.disconnecting = True
        self._reactor.callLater(0, self.close)

    def abortConnection(self) -> None:
        """See ``ITCPTransport.abortConnection``."""
        self.disconnecting = True
        self._reactor.callLater(0, self.abort)

    def lose(self, reason: Exception, how: str) -> None:
        """
        The connection has ended.

        :param how: in one word; it becomes :attr:`ended`.
        """
        if self.ended is None:
            self.ended = how
            self.protocol.connectionLost(Failure(reason))
