"""
Draining: a process that is about to end answers what it has begun, and goes.

See ``docs/workers.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.tcp import Port
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Interface

from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.coro.serving import (
    CoroutineFactory,
    StreamProtocol,
    accept_backlog,
    servers,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.engine.transports import ServerTransport

_log = Logger()

KEEP_ALIVE: Final = 1.0
"""How many seconds an idle HTTP connection has for a last request, by default."""

# All connections are looked at so often.
_SHORTEST_KEEP_ALIVE: Final = 0.01

CANCEL_TIMEOUT: Final = 1.0
"""How many seconds cancelled coroutine handlers have to end after the grace."""


class IDrainable(Interface):
    """
    A protocol that is told when its process is about to end: for protocols of which a
    connection lasts long.
    """

    def drain() -> None:
        """
        The process is about to end.  Finish what is under way, and close the connection
        then: it is aborted when the grace is over.
        """


class Drained(NamedTuple):
    """
    How the server connections of a process have ended.

    :ivar finished: how many ended within the grace.
    :ivar aborted: how many were aborted after it.
    """

    finished: int
    aborted: int


class Draining(Protocol):
    """A connection of a protocol that :func:`drain` knows, and that is to end."""

    @property
    def channel(self) -> object:
        """The protocol: the one of ``twisted.web`` may be replaced, by HTTP/2."""

    def close_if_idle(self) -> None:
        """Called again and again, until the connection is lost."""


def drain(
    reactor: Any, grace: float, *, keep_alive: float = KEEP_ALIVE
) -> Deferred[Drained]:
    """
    End all server connections, and lose nothing that clients have begun.  A worker does
    this when it is asked to stop.  Another program can do it when its reactor stops::

        reactor.addSystemEventTrigger("before", "shutdown", drain, reactor, 30)

    1. The stream ports accept the connections that wait in their backlogs, and listen
       no more.
    2. Connections of ``twisted.web`` are closed after the answer under way, which says
       ``Connection: close``.  An idle one is closed if no request comes within
       ``keep_alive`` seconds; if one comes, it is answered in the same way.  Clients of
       HTTP/2 get GOAWAY, and all streams that are open are answered.
    3. Coroutine servers stop, as by :meth:`CoroutineFactory.stop`: ``stopping`` of
    their
       streams is set, and their handlers have the grace.
    4. Protocols that provide :class:`IDrainable` are told.
    5. All server connections are waited for, of whatever protocol, and aborted when the
       grace is over.  Connections that this process has made are left alone.

    A second call waits for the same, and the grace ends at the earlier of both times.

    :param reactor: one of this package's.
    :param grace: how many seconds there are.
    :param keep_alive: see above; at most half of the grace.
    :return: a :class:`Drained`, when the last server connection is lost and all
        coroutine handlers have ended: at the latest a second after the grace.
    :raises TypeError: if the reactor is not one of this package's.
    :raises ValueError: if one of the times is less than 0.
    """
    if not isinstance(reactor, EngineReactor):
        raise TypeError(
            f"drain() needs to know all server connections, which {reactor!r} does not "
            "list: use a reactor of this package, by --reactor=rtsig-auto for example"
        )
    for name, seconds in (("grace", grace), ("keep_alive", keep_alive)):
        if not seconds >= 0:
            raise ValueError(f"{name}={seconds}: 0 is the least")
    drainage = _drainages.get(reactor)
    if drainage is None:
        # Idle connections are to be closed before those that are left are aborted.
        keep_alive = max(min(keep_alive, grace / 2), _SHORTEST_KEEP_ALIVE)
        drainage = _drainages[reactor] = _Drainage(reactor, keep_alive)
    return drainage.wait(grace)


class _Drainage:
    """
    The end of the server connections of a reactor.

    :param keep_alive: see :func:`drain`.
    """

    def __init__(self, reactor: EngineReactor, keep_alive: float) -> None:
        self._reactor = reactor
        self._keep_alive = keep_alive
        self._waiting: list[Deferred[Drained]] = []
        # When the grace is over, in the reactor's time.
        self._end: float | None = None
        self._end_call: Any = None
        self._sweep_call: Any = None
        # The connections that were seen and may not be lost yet.
        self._draining: dict[ServerTransport, Draining | None] = {}
        self._seen = 0
        self._aborted = 0
        # HTTP factories whose access logs stay open until the end.
        self._logging: list[Any] = []
        # How many stops of coroutine servers are under way.
        self._stops = 0

    def wait(self, grace: float) -> Deferred[Drained]:
        """Drain, for at most ``grace`` seconds from now on."""
        waiting: Deferred[Drained] = Deferred()
        self._waiting.append(waiting)
        reactor = self._reactor
        end = reactor.seconds() + grace
        if self._end is None:
            reactor.when_servers_idle = self._check
            self._sweep()
        if self._end is None or end < self._end:
            self._end = end
            cancel_call(self._end_call)
            self._end_call = reactor.callLater(grace, self._abort)
            # After the backlogs were accepted: a server that stops refuses connections.
            for server in servers:
                if server.is_on(reactor):
                    self._stop(server, grace)
        self._check()
        return waiting

    def _sweep(self) -> None:
        """Look at all ports and connections, of which some may be new."""
        for reader in self._reactor.getReaders():
            if isinstance(reader, Port):
                self._stop_listening(reader)
        for connection in list(self._reactor.server_connections):
            try:
                self._look_at(connection)
            except Exception:
                _log.failure("cannot drain {connection!r}", connection=connection)
        for connection in self._draining.keys() - self._reactor.server_connections:
            del self._draining[connection]
        self._sweep_call = self._reactor.callLater(self._keep_alive, self._sweep)

    def _stop_listening(self, port: Any) -> None:
        self._keep_logging(port.factory)
        accept_backlog(port)
        port.stopReading()
        # Its service may close it now, too, and Twisted's ports take that only once.
        self._reactor.callLater(0, self._close, port)

    def _close(self, port: Any) -> None:
        if port.connected and not port.disconnecting:
            port.connectionLost(Failure(CONNECTION_DONE))

    def _keep_logging(self, factory: Any) -> None:
        """A factory closes its access log when the last port is closed that uses it."""
        http = sys.modules.get("twisted.web.http")
        while http is not None and factory is not None:
            if isinstance(factory, http.HTTPFactory):
                factory.doStart()
                self._logging.append(factory)
            factory = getattr(factory, "wrappedFactory", None)

    def _look_at(self, connection: ServerTransport) -> None:
        if connection not in self._draining:
            self._seen += 1
            self._draining[connection] = None
            for protocol in protocols_of(connection):
                if IDrainable.providedBy(protocol):
                    protocol.drain()
                    return
        draining = self._draining[connection]
        web = _web()
        if web is not None:
            channel = web.channel_of(protocols_of(connection))
            if channel is not None and (
                draining is None or draining.channel is not channel
            ):
                self._draining[connection] = web.drain_channel(channel, connection)
                return
        if draining is not None:
            draining.close_if_idle()

    def _stop(self, server: CoroutineFactory, grace: float) -> None:
        self._stops += 1

        def stopped(result: object) -> None:
            self._stops -= 1
            self._check()

        server.stop(grace, CANCEL_TIMEOUT).addErrback(
            lambda failure: _log.failure(
                "cannot stop {name}", failure, name=server.name
            )
        ).addCallback(stopped)

    # The end

    def _abort(self) -> None:
        """The grace is over."""
        left = list(self._reactor.server_connections)
        self._aborted = len(left)
        for connection in left:
            # The servers of coroutines cancel their handlers, and abort then.
            if not any(isinstance(p, StreamProtocol) for p in protocols_of(connection)):
                connection.abortConnection()
        if left:
            _log.warn(
                "The grace is over, and connections were aborted: {count}",
                count=len(left),
            )

    def _check(self) -> None:
        """Whether all has ended."""
        if self._reactor.server_connections or self._stops:
            return
        if _drainages.pop(self._reactor, None) is None:
            return
        self._reactor.when_servers_idle = None
        cancel_call(self._sweep_call)
        cancel_call(self._end_call)
        for factory in self._logging:
            factory.doStop()
        drained = Drained(self._seen - self._aborted, self._aborted)
        for waiting in self._waiting:
            if not waiting.called:
                waiting.callback(drained)


_drainages: Final[WeakKeyDictionary[EngineReactor, _Drainage]] = WeakKeyDictionary()


def protocols_of(connection: ServerTransport) -> Iterator[Any]:
    """The protocol of a connection; behind it, those that it wraps, TLS for example."""
    protocol: Any = connection.protocol
    while protocol is not None:
        yield protocol
        protocol = getattr(protocol, "wrappedProtocol", None)


def _web() -> Any:
    """The module for ``twisted.web``, if this process uses that."""
    if "twisted.web.http" not in sys.modules:
        return None
    from twisted_rtsig.workers import web

    return web


__all__ = ["Drained", "IDrainable", "drain"]
