"""
Types for the objects of Twisted that streams and servers expose, which every type
checker can read.

Twisted describes these objects by interfaces of ``zope.interface``.  A type checker
without the plugin for ``zope.interface`` knows neither the methods of an interface nor
the classes that provide it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import ITCPTransport

IPAddress: TypeAlias = IPv4Address | IPv6Address
"""The address of a TCP or UDP socket, IPv4 or IPv6."""

Address: TypeAlias = IPAddress | UNIXAddress
"""The address of a socket; ``isinstance`` tells which kind it is."""


class Transport(Protocol):
    """
    The methods that every transport of a stream has: those of ``ITransport``,
    ``IPushProducer`` and ``IConsumer``.
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
    # By default isinstance() of a protocol looks for the methods.  That fails in two
    # ways: TLS passes the methods on by __getattr__, which Python 3.12 does not look
    # into; and Twisted's UNIX sockets have methods of TCP that do nothing.
    def __instancecheck__(cls, instance: object) -> bool:
        return bool(ITCPTransport.providedBy(instance))


@runtime_checkable
class TCPTransport(Transport, Protocol, metaclass=_Provided):
    """
    A transport over TCP, with TLS or without, which has the methods of
    ``ITCPTransport`` besides.

    ``isinstance`` tells whether :attr:`Stream.transport` is a transport over TCP.
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
    """The port that an endpoint listens on: ``IListeningPort``."""

    def getHost(self) -> Any:
        """See ``IListeningPort.getHost``: the kind depends on the endpoint."""

    def startListening(self) -> object:
        """See ``IListeningPort.startListening``."""

    def stopListening(self) -> Deferred[None] | None:
        """See ``IListeningPort.stopListening``."""
        raise NotImplementedError
