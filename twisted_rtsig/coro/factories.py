"""The factory of a server: it accepts connections, and runs a handler for each."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Final, Literal

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.handlers import HalfCloseableServer, Handler, ServerProtocol
from twisted_rtsig.coro.handshakes import DEFAULT_TLS_LIMITS, TLSLimits
from twisted_rtsig.coro.limits import (
    MOST_CONNECTIONS,
    check_counts,
    network_of,
    scarce_descriptors,
)
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.notices import Notice
from twisted_rtsig.coro.runnables import name_of
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stopping import CANCEL_TIMEOUT, Stop, Stopped
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.time_limits import (
    FIRST_BYTE_TIMEOUT,
    IDLE_TIMEOUT,
    WRITE_TIMEOUT,
    TimeLimits,
    Watchdog,
    check_timeouts,
)

_log = Logger()


class CoroutineFactory(Factory):
    """
    Runs a function for each connection: as a server, on any endpoint.

    When ``handler`` returns, the connection is closed once everything is sent.  When it
    raises, the error is logged and the connection is aborted.  When the connection is
    lost, reads first return what has arrived, and then raise.

    :param handler: called with a :class:`Stream`; in a task of its own.
    :param name: the name of the task in logs; by default the handler's name.
    :param max_connections: how many connections there may be at once; more are refused.
        "auto" refuses a connection beyond 65,536, and while three quarters of the
        descriptors that this process may have (``RLIMIT_NOFILE``) are in use, by this
        server or anything else.  None for no limit.
    :param max_connections_per_address: how many connections one IPv4 address, or one
        /64 network of IPv6, may have at once; None, the default, for no limit.  Other
        addresses, such as those of UNIX sockets, have no limit.
    :param first_byte_timeout: abort a connection if the handler waits in a read for so
        many seconds, nothing has ever arrived, and nothing was written in the meantime.
        With TLS the time begins when the handshake is done.
    :param idle_timeout: abort a connection if nothing is sent or received for so many
        seconds.  What the peer acknowledges of earlier output counts as sent, where the
        kernel tells: on Linux, macOS, FreeBSD and NetBSD.
    :param write_timeout: abort a connection if the peer takes nothing of what was
        written for so many seconds, also after ``close`` and the end of the handler.  A
        peer that takes a little now and then is never too slow.  Where the kernel does
        not tell what the peer acknowledges, what the socket takes counts.
    :param read_timeout: how many seconds a read may take once a part of its data has
        arrived.  It is meant for peers that send byte after byte for ever.
    :param handshake_timeout: how many seconds a TLS handshake may take, including that
        of ``start_tls``; None for no limit.
    :param close_timeout: how many seconds a TLS peer may take to answer the
        ``close_notify`` alert, which ends a connection after all output; None for no
        limit.  After ``close`` during a handshake that has a limit, the time begins
        when the handshake is done.
    :param cancel_on_loss: cancel the handler when the connection is lost, or the peer
        closes its side.  Then there is no half close.
    :param reactor: an ``IReactorTime`` provider; by default the installed one.
    :raises TypeError: if the handler cannot be called.
    :raises ValueError: if one of the times is not more than 0, ``max_connections`` is
        negative, or ``max_connections_per_address`` is less than 1 or more than
        ``max_connections``.
    :ivar connections: has one key for each connection that there is now.
    :ivar stopping: an :class:`Event` that happens when :meth:`stop` is called; the
        ``stopping`` of each handler's stream.
    :ivar stopped: an :class:`Event` that happens when such a stop has ended.
    :ivar limits: how often each limit has refused or aborted a connection, by the name
        of its option; by ``"stopping"``, the connections that were refused because the
        server had begun to stop.
    """

    noisy = False

    def __init__(
        self,
        handler: Handler,
        *,
        name: str | None = None,
        max_connections: int | Literal["auto"] | None = "auto",
        max_connections_per_address: int | None = None,
        first_byte_timeout: float | None = FIRST_BYTE_TIMEOUT,
        idle_timeout: float | None = IDLE_TIMEOUT,
        read_timeout: float | None = None,
        write_timeout: float | None = WRITE_TIMEOUT,
        handshake_timeout: float | None = DEFAULT_TLS_LIMITS.handshake,
        close_timeout: float | None = DEFAULT_TLS_LIMITS.close,
        cancel_on_loss: bool = False,
        reactor: Any | None = None,
    ) -> None:
        if not callable(handler):
            raise TypeError(
                f"a handler is a function of a stream, which {handler!r} is not"
            )
        check_counts(max_connections, max_connections_per_address)
        check_timeouts(
            first_byte_timeout=first_byte_timeout,
            idle_timeout=idle_timeout,
            read_timeout=read_timeout,
            write_timeout=write_timeout,
            handshake_timeout=handshake_timeout,
            close_timeout=close_timeout,
        )
        self.handler = handler
        self.name = name
        self.max_connections = max_connections
        self._tls_limits = TLSLimits(handshake_timeout, close_timeout)
        self.cancel_on_loss = cancel_on_loss
        self.connections: dict[ServerProtocol, None] = {}
        self._reactor = reactor
        self.stopping: Event = Event()
        self.limits: Counter[str] = Counter()
        servers.add(self)
        self._last_ends = Event()
        self.stopped: Event = Event()
        self._max_per_address = max_connections_per_address
        # The number of connections of each address, as network_of counts them.
        self._per_address: dict[Hashable, int] = {}
        self._time_limits = TimeLimits(
            first_byte_timeout, idle_timeout, read_timeout, write_timeout
        )
        # There is a watchdog while there are connections.
        self._watchdog: Watchdog | None = None
        # The log lines, by the name of the limit, or "stopping".
        self._notices: dict[str, Notice] = {}

    def doStart(self) -> None:
        """
        See ``IProtocolFactory.doStart``: a port is about to listen.

        :raises RuntimeError: if :meth:`stop` was called, since all connections would be
            refused.
        """
        if self.stopping.is_set:
            raise RuntimeError(
                f"{self.display_name} cannot listen, since its factory was stopped: "
                "make a new CoroutineFactory"
            )
        super().doStart()  # type: ignore[no-untyped-call]

    def buildProtocol(self, addr: Any) -> Protocol:
        """See ``IProtocolFactory.buildProtocol``."""
        scheduler = scheduler_for(self._reactor)
        protocol = (ServerProtocol if self.cancel_on_loss else HalfCloseableServer)(
            scheduler, self._tls_limits, self.stopping
        )
        protocol.factory = self
        return protocol

    @property
    def display_name(self) -> str:
        """The name of the handlers in logs."""
        return self.name or name_of(self.handler)

    def is_on(self, reactor: object) -> bool:
        """Whether the handlers run on ``reactor``."""
        own = self._reactor
        if own is None:
            # The installed reactor.  An import would install one.
            own = sys.modules.get("twisted.internet.reactor")
        return own is reactor

    def admit(self, protocol: ServerProtocol) -> bool:
        """Check that a new connection is within the limits; if it is, count it."""
        transport: Any = protocol.transport
        network = (
            None if self._max_per_address is None else network_of(transport.getPeer())
        )
        refusal = self._refusal(transport, network)
        if refusal is not None:
            limit, why = refusal
            message = "{server}: refused {peer}: {why}"
            peer = transport.getPeer()
            self._notify(limit, _log.warn, message, peer=peer, why=why)
            return False
        self.connections[protocol] = None
        if network is not None:
            protocol.network = network
            self._per_address[network] = self._per_address.get(network, 0) + 1
        return True

    def _refusal(
        self, transport: Any, network: Hashable | None
    ) -> tuple[str, str] | None:
        """The limit that forbids a further connection, and why; or None."""
        if self.stopping.is_set:
            return "stopping", "the server stops"
        count, most = len(self.connections), self.max_connections
        if most == "auto":
            why = scarce_descriptors(transport)
            if why is not None:
                return "max_connections", f'{why}, and max_connections is "auto"'
            most = MOST_CONNECTIONS
        if most is not None and count >= most:
            return "max_connections", f"it has {count} connections (max_connections)"
        if network is None:
            return None
        of_address, most = self._per_address.get(network, 0), self._max_per_address
        if most is not None and of_address >= most:
            why = f"{network} has {of_address} (max_connections_per_address)"
            return "max_connections_per_address", why
        return None

    def _exceeded(self, stream: Stream, limit: str, error: Exception) -> None:
        """A connection has taken longer than a limit allows."""
        self.tell_of_limit(stream, limit, error)
        stream.time_out(error)

    def tell_of_limit(self, stream: Stream, limit: str, error: Exception) -> None:
        """Log that a connection is aborted; the limit's name is in the error."""
        message = "{server}: aborted {stream}: {error}"
        self._notify(limit, _log.info, message, stream=stream, error=error)

    def _notify(
        self, limit: str, log: Callable[..., object], message: str, **values: object
    ) -> None:
        self.limits[limit] += 1
        notice = self._notices.get(limit)
        if notice is None:
            notice = self._notices[limit] = Notice(log, message)
        now = scheduler_for(self._reactor).reactor.seconds()
        notice.tell(now, server=self.display_name, **values)

    def stop(
        self, grace: float, cancel_timeout: float = CANCEL_TIMEOUT
    ) -> Deferred[Stopped]:
        """
        Refuse new connections, set :attr:`stopping`, and let the handlers finish for
        ``grace`` seconds.  Then cancel them.  After ``cancel_timeout`` more seconds
        abort the connections that are left.  Handlers that have not ended even then are
        logged, and not waited for any more.

        If the wait is cancelled, the grace ends: the handlers are cancelled at once,
        and waited for.  If it is cancelled again, the connections are aborted.

        :return: fires with a :class:`Stopped` when all handlers and connections have
            ended, and at the latest after both times.
        :raises ValueError: if one of the times is less than 0.
        """
        stop = Stop(self, grace, cancel_timeout)
        self.stopping.set()
        name = f"{self.display_name}, stopping"
        return spawn(stop.run(), name=name, reactor=self._reactor).as_deferred()

    async def all_gone(self) -> None:
        """Wait until all connections and their handlers have ended."""
        while self.connections:
            if self._last_ends.is_set:
                self._last_ends = Event()
            await self._last_ends.wait()

    def watch(self) -> None:
        """A connection was made; it may have ended already."""
        if self._watchdog is None and self.connections:
            self._watchdog = Watchdog(
                self._time_limits,
                lambda: [each.stream for each in self.connections],
                self._exceeded,
            )
            self._watchdog.start(scheduler_for(self._reactor).reactor)

    def forget(self, protocol: ServerProtocol) -> None:
        """A connection and its handler have ended."""
        # If closing a connection loses it at once, this is called twice.
        if protocol not in self.connections:
            return
        del self.connections[protocol]
        network = protocol.network
        if network is not None:
            self._per_address[network] -= 1
            if not self._per_address[network]:
                del self._per_address[network]
        if not self.connections:
            watchdog, self._watchdog = self._watchdog, None
            if watchdog is not None:
                watchdog.stop()
            self._last_ends.set()


servers: Final[Registry[CoroutineFactory]] = Registry()
"""All factories that any code still refers to."""
