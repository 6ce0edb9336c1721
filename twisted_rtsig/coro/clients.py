"""Clients: a stream of a connection that this side makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast
from typing import Protocol as StructuralType

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.connections import HalfCloseable, StreamProtocol
from twisted_rtsig.coro.handshakes import DEFAULT_TLS_LIMITS, TLSLimits
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.time_limits import WRITE_TIMEOUT, check_timeouts

if TYPE_CHECKING:
    from twisted.internet.interfaces import IStreamClientEndpoint


class _ConnectsTo(StructuralType):
    def connect(self, factory: Any, /) -> Deferred[Any]: ...


# A class that implements one of Twisted's interfaces is a subtype of it only for mypy
# with the plugin mypy-zope.  Without it the method decides.
ClientEndpoint: TypeAlias = "IStreamClientEndpoint | _ConnectsTo"


class ClientProtocol(HalfCloseable, StreamProtocol):
    """Feeds the stream of a client."""

    def connectionMade(self) -> None:
        """See ``IProtocol.connectionMade``."""
        transport: Any = self.transport
        if "protocol" in getattr(transport, "__dict__", ()):
            # Endpoints put a wrapper around each protocol.  It has done its work by
            # now, and it hides that this protocol knows the half close: it provides
            # only the last of the interfaces.
            transport.protocol = self
        super().connectionMade()


class _ClientFactory(Factory):
    """
    Makes the protocol of one client.

    :ivar given_up: whether nothing waits for the connection any more.
    """

    noisy = False
    given_up = False

    def __init__(
        self,
        scheduler: Scheduler,
        tls_limits: TLSLimits,
        write_timeout: float | None,
    ) -> None:
        self._scheduler = scheduler
        self._tls_limits = tls_limits
        self._write_timeout = write_timeout

    def buildProtocol(self, addr: Any) -> Protocol | None:
        if self.given_up:
            return None
        return ClientProtocol(
            self._scheduler, self._tls_limits, write_timeout=self._write_timeout
        )


def connect(
    endpoint: ClientEndpoint | str,
    reactor: Any | None = None,
    *,
    write_timeout: float | None = WRITE_TIMEOUT,
    handshake_timeout: float | None = DEFAULT_TLS_LIMITS.handshake,
    close_timeout: float | None = DEFAULT_TLS_LIMITS.close,
) -> Deferred[Stream]:
    """
    Connect to a server.

    With TLS the handshake begins when the connection is made.  Reads wait for it, and
    raise its error.

    :param endpoint: an ``IStreamClientEndpoint`` provider; or its description, as
        ``clientFromString`` takes it: ``"unix:/run/app.sock"``.
    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :param write_timeout: after :meth:`Stream.close`, abort the connection if the peer
        takes nothing of what is left to be sent for so many seconds; None for no limit.
        Before ``close``, let :func:`timeout` limit how long a write may take.
    :param handshake_timeout: as for :class:`CoroutineFactory`.
    :param close_timeout: as for :class:`CoroutineFactory`.
    :return: a :class:`Stream`.
    :raises ValueError: if one of the times is not more than 0.
    """
    check_timeouts(
        write_timeout=write_timeout,
        handshake_timeout=handshake_timeout,
        close_timeout=close_timeout,
    )
    tls_limits = TLSLimits(handshake_timeout, close_timeout)
    factory = _ClientFactory(scheduler_for(reactor), tls_limits, write_timeout)
    if isinstance(endpoint, str):
        described: Any = clientFromString(scheduler_for(reactor).reactor, endpoint)
        endpoint = cast(ClientEndpoint, described)

    def give_up(failure: Failure) -> Failure:
        # An endpoint that ignores the cancellation gets no protocol.
        factory.given_up = True
        return failure

    connecting: Deferred[Any] = endpoint.connect(factory)
    return connecting.addCallbacks(lambda protocol: protocol.stream, give_up)
