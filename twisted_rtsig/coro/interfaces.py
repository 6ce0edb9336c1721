"""
What streams and servers show of Twisted, in types that every checker can read.

Twisted describes it as interfaces of ``zope.interface``.  A checker without the plugin
for these knows neither their methods nor what provides them.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import ITCPTransport

IPAddress: TypeAlias = IPv4Address | IPv6Address
"""The address of a socket of the internet."""

Address: TypeAlias = IPAddress | UNIXAddress
"""The address of a socket, which ``isinstance`` tells from the others."""


class Transport(Protocol):
    """
    What every transport of a stream has: ``ITransport``, ``IPushProducer`` and
    ``IConsumer``.
    """

    def write(self, data: bytes, /) -> object:
        """See ``ITransport.write``."""

    def loseConnection(self) -> object:
        """See ``ITransport.loseConnection``."""

    def getPeer(self) -> Any:
        """See ``ITransport.getPeer``: the kind of address depends on the transport."""

    def getHost(self) -> Any:
        """See ``ITransport.getHost``: the kind of address depends on the transport."""

    def pauseProducing(self) -> object:
        """See ``IPushProducer.pauseProducing``."""

    def resumeProducing(self) -> object:
        """See ``IPushProducer.resumeProducing``."""

    def registerProducer(self, producer: Any, streaming: Any, /) -> object:
        """See ``IConsumer.registerProducer``."""

    def unregisterProducer(self) -> object:
        """See ``IConsumer.unregisterProducer``."""


class _Provided(type(Protocol)):  # type: ignore[misc]
    # A protocol looks for the methods.  But TLS passes them on by __getattr__, which
    # Python 3.12 does not look into, and those of Twisted's UNIX sockets do nothing.
    def __instancecheck__(cls, instance: object) -> bool:
        return bool(ITCPTransport.providedBy(instance))


@runtime_checkable
class TCPTransport(Transport, Protocol, metaclass=_Provided):
    """
    What a transport of TCP has besides, also below TLS: ``ITCPTransport``.

    ``isinstance`` tells whether :attr:`Stream.transport` is one.
    """

    def abortConnection(self) -> object:
        """See ``ITCPTransport.abortConnection``."""

    def getTcpNoDelay(self) -> bool:
        """See ``ITCPTransport.getTcpNoDelay``."""
        raise NotImplementedError

    def setTcpNoDelay(self, enabled: bool, /) -> object:
        """See ``ITCPTransport.setTcpNoDelay``."""

    def getTcpKeepAlive(self) -> bool:
        """See ``ITCPTransport.getTcpKeepAlive``."""
        raise NotImplementedError

    def setTcpKeepAlive(self, enabled: bool, /) -> object:
        """See ``ITCPTransport.setTcpKeepAlive``."""


class ListeningPort(Protocol):
    """What an endpoint listens on: ``IListeningPort``."""

    def getHost(self) -> Any:
        """See ``IListeningPort.getHost``: its kind depends on the endpoint."""

    def startListening(self) -> object:
        """See ``IListeningPort.startListening``."""

    def stopListening(self) -> Deferred[None] | None:
        """See ``IListeningPort.stopListening``."""
        raise NotImplementedError
