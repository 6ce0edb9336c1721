"""
Draining: before a process ends, it finishes the requests that are in progress.

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

from twisted_rtsig.coro.connections import StreamProtocol
from twisted_rtsig.coro.factories import CoroutineFactory, servers
from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.coro.serving import accept_backlog
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.engine.transports import ServerTransport

_log = Logger()

KEEP_ALIVE: Final = 1.0
"""By default, how many seconds an idle HTTP connection has to send a last request."""

# The connections are not checked more often than this, in seconds.
_SHORTEST_KEEP_ALIVE: Final = 0.01

CANCEL_TIMEOUT: Final = 1.0
"""How many seconds coroutine handlers have to end when they are cancelled."""


class IDrainable(Interface):
    """
    A protocol that wants to know when its process is about to end, because its
    connections are long-lived.
    """

    def drain() -> None:
        """
        Called when the process is about to end.  Finish what is in progress, then close
        the connection: a connection that is still open after the grace is aborted.
        """


class Drained(NamedTuple):
    """
    How the server connections of a process ended.

    :ivar finished: how many connections ended within the grace.
    :ivar aborted: how many connections were aborted after it.
    """

    finished: int
    aborted: int


class Draining(Protocol):
    """A connection that is being drained, of a protocol that :func:`drain` supports."""

    @property
    def channel(self) -> object:
        """The protocol.  ``twisted.web`` may replace it, when HTTP/2 is negotiated."""

    def close_if_idle(self) -> None:
        """Called at intervals until the connection is lost."""


def drain(
    reactor: Any, grace: float, *, keep_alive: float = KEEP_ALIVE
) -> Deferred[Drained]:
    """
    End all server connections, without losing a request that a client has sent.  A
    worker does this when it is asked to stop.  Another program can do it when its
    reactor stops::

        reactor.addSystemEventTrigger("before", "shutdown", drain, reactor, 30)

    1. The stream ports accept the connections in their backlogs, then stop listening.
    2. A connection of ``twisted.web`` is closed after the response in progress, which
       says ``Connection: close``.  An idle connection is closed if no request arrives
       within ``keep_alive`` seconds; a request that arrives is answered with
       ``Connection: close``.  HTTP/2 clients get GOAWAY, and all open streams are
       answered.
    3. Coroutine servers stop, as by :meth:`.CoroutineFactory.stop`: ``stopping`` of
       their streams is set, and their handlers have the grace to end.
    4. ``drain`` of each protocol that provides :class:`IDrainable` is called.
    5. All server connections are awaited, whatever their protocol.  Those that are open
       after the grace are aborted.  Connections that this process opened as a client
       are left alone.

    A second call waits for the same end; the earlier end of the two graces counts.

    :param reactor: a reactor of this package.
    :param grace: in seconds.
    :param keep_alive: in seconds; at most half of the grace is used.
    :return: a Deferred that fires with :class:`Drained` when the last server connection
        is lost and all coroutine handlers have ended: at the latest a second after the
        grace.
    :raises TypeError: if the reactor is not one of this package.
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
        # Idle connections must be closed before the remaining ones are aborted.
        keep_alive = max(min(keep_alive, grace / 2), _SHORTEST_KEEP_ALIVE)
        drainage = _drainages[reactor] = _Drainage(reactor, keep_alive)
    return drainage.wait(grace)


class _Drainage:
    """
    Drains the server connections of one reactor.

    :param keep_alive: see :func:`drain`.
    """

    def __init__(self, reactor: EngineReactor, keep_alive: float) -> None:
        self._reactor = reactor
        self._keep_alive = keep_alive
        self._waiting: list[Deferred[Drained]] = []
        # The end of the grace, in the reactor's time.
        self._end: float | None = None
        self._end_call: Any = None
        self._sweep_call: Any = None
        # Connections that were found and, at the last check, were not lost.
        self._draining: dict[ServerTransport, Draining | None] = {}
        self._seen = 0
        self._aborted = 0
        # HTTP factories whose access logs are kept open until the end.
        self._logging: list[Any] = []
        # How many coroutine servers are stopping.
        self._stops = 0

    def wait(self, grace: float) -> Deferred[Drained]:
        """Drain, for at most ``grace`` seconds from now."""
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
            # After _sweep has accepted the backlogs, as a stopping server refuses new
            # connections.
            for server in servers:
                if server.is_on(reactor):
                    self._stop(server, grace)
        self._check()
        return waiting

    def _sweep(self) -> None:
        """Check all ports and connections, including new ones."""
        for reader in self._reactor.getReaders():
            if isinstance(reader, Port):
                self._stop_listening(reader)
        for connection in list(self._reactor.server_connections):
            try:
                self._look_at(connection)
            except Exception:
                _log.failure("Cannot drain {connection!r}", connection=connection)
        for connection in self._draining.keys() - self._reactor.server_connections:
            del self._draining[connection]
        self._sweep_call = self._reactor.callLater(self._keep_alive, self._sweep)

    def _stop_listening(self, port: Any) -> None:
        self._keep_logging(port.factory)
        accept_backlog(port)
        port.stopReading()
        # Its service may close the port in this pass too.  A Twisted port can be closed
        # only once.
        self._reactor.callLater(0, self._close, port)

    def _close(self, port: Any) -> None:
        if port.connected and not port.disconnecting:
            port.connectionLost(Failure(CONNECTION_DONE))

    def _keep_logging(self, factory: Any) -> None:
        """
        Keep an access log open.

        A factory closes its log when its last port is closed, but requests are still
        answered after that.
        """
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
                "Cannot stop the server {name}", failure, name=server.name
            )
        ).addCallback(stopped)

    # The end

    def _abort(self) -> None:
        """Abort the remaining connections: the grace is over."""
        left = list(self._reactor.server_connections)
        self._aborted = len(left)
        for connection in left:
            # A coroutine server aborts its connections itself, after it has cancelled
            # their handlers.
            if not any(isinstance(p, StreamProtocol) for p in protocols_of(connection)):
                connection.abortConnection()
        if left:
            _log.warn(
                "The grace is over, and connections were aborted: {count}",
                count=len(left),
            )

    def _check(self) -> None:
        """Finish if all connections and handlers have ended."""
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
    """Yield the protocol of a connection, then each one that it wraps (as TLS does)."""
    # A connection that is being lost has no protocol any more.
    protocol: Any = getattr(connection, "protocol", None)
    while protocol is not None:
        yield protocol
        protocol = getattr(protocol, "wrappedProtocol", None)


def _web() -> Any:
    """Return the module that drains ``twisted.web``, if this process uses that."""
    if "twisted.web.http" not in sys.modules:
        return None
    from twisted_rtsig.workers import web

    return web


__all__ = ["Drained", "IDrainable", "drain"]
