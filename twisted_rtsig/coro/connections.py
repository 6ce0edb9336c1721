"""The protocols that feed streams: Twisted's side of each connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IHandshakeListener,
    ISSLTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_rtsig.coro.handshakes import DEFAULT_TLS_LIMITS, TLSLimits
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.streams import Stream


@implementer(IHandshakeListener)
class StreamProtocol(Protocol):
    """Feeds a stream, and registers it as the producer of its transport."""

    stream: Stream

    if TYPE_CHECKING:

        def dataReceived(self, data: bytes) -> None:
            """See ``IProtocol.dataReceived``."""

    def __init__(
        self,
        scheduler: Scheduler,
        tls_limits: TLSLimits = DEFAULT_TLS_LIMITS,
        stopping: Event | None = None,
        write_timeout: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._tls_limits = tls_limits
        self._stopping = stopping
        self._write_timeout = write_timeout

    def connectionMade(self) -> None:
        """See ``IProtocol.connectionMade``."""
        transport: Any = self.transport
        self.stream = stream = Stream(
            transport,
            self._scheduler,
            self._tls_limits,
            self._stopping,
            self._write_timeout,
        )
        # This saves one call for each piece of data.
        self.dataReceived = stream.feed  # type: ignore[method-assign]
        self._scheduler.connection_made(stream)
        transport.registerProducer(stream, True)
        if ISSLTransport.providedBy(transport):
            stream.limit_handshake()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """See ``IProtocol.connectionLost``."""
        self.stream.lose(reason)
        self._scheduler.connection_lost(self.stream)

    def handshakeCompleted(self) -> None:
        """See ``IHandshakeListener.handshakeCompleted``."""
        self.stream.secure()


@implementer(IHalfCloseableProtocol)
class HalfCloseable:
    """For protocols whose stream can be written to after its input has ended."""

    stream: Stream

    def readConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol.readConnectionLost``."""
        self.stream.feed_eof()

    def writeConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol.writeConnectionLost``."""
        self.stream.finish_output()
