"""
The glue between streams and Twisted: factories and protocols that run a function
for each connection, for any endpoint, on either side.
"""

from __future__ import annotations

import select
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Hashable
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeAlias,
    TypedDict,
    cast,
)
from typing import Protocol as StructuralType

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import clientFromString, serverFromString
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IHandshakeListener,
    ISSLTransport,
)

if TYPE_CHECKING:
    from twisted.internet.interfaces import (
        IStreamClientEndpoint,
        IStreamServerEndpoint,
    )

from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str
from zope.interface import implementer

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.errors import (
    Cancelled,
    DelimiterNotFound,
    IncompleteRead,
    TLSError,
    UnreadPlaintext,
)
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.inspection import describe_first
from twisted_rtsig.coro.interfaces import ListeningPort
from twisted_rtsig.coro.limits import (
    FIRST_BYTE_TIMEOUT,
    IDLE_TIMEOUT,
    MOST_CONNECTIONS,
    WRITE_TIMEOUT,
    Notice,
    TimeLimits,
    Watchdog,
    network_of,
    scarce_descriptors,
)
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import error_of
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.scopes import shield, timeout
from twisted_rtsig.coro.streams import DEFAULT_TLS_LIMITS, Stream, TLSLimits
from twisted_rtsig.coro.tasks import (
    OfTask,
    Task,
    current_task,
    name_of,
    scheduler_for,
    sleep,
    spawn,
)
from twisted_rtsig.coro.tracebacks import causes, log_failure

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

_log = Logger()

Handler: TypeAlias = Callable[[Stream], Awaitable[object] | Generator[Any, Any, object]]
"""An ``async def``, a generator function, or what returns a Deferred."""


class _ListensOn(StructuralType):
    def listen(self, factory: Any, /) -> Deferred[Any]: ...


class _ConnectsTo(StructuralType):
    def connect(self, factory: Any, /) -> Deferred[Any]: ...


# A class that implements one of Twisted's interfaces is a subtype of it only for mypy
# with the plugin mypy-zope.  Without it the method decides.
ServerEndpoint: TypeAlias = "IStreamServerEndpoint | _ListensOn"
ClientEndpoint: TypeAlias = "IStreamClientEndpoint | _ConnectsTo"

GRACE: Final = 10.0
"""How many seconds handlers have to finish when a server stops, by default."""

CANCEL_TIMEOUT: Final = 10.0
"""How many seconds cancelled handlers have to end when a server stops, by default."""

# How many turns of the reactor handlers have to end once their transports are aborted.
_LAST_TURNS: Final = 10

# How often a port accepts what has come before it is closed: clients may come faster
# than it accepts.
_LAST_ACCEPTS: Final = 100


@implementer(IHandshakeListener)
class StreamProtocol(Protocol):
    """Feeds a stream, which is the transport's only producer."""

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
        # One call less for each piece of data.
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
class _HalfCloseable:
    """For the protocols to which the end of what comes is data."""

    stream: Stream

    def readConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol.readConnectionLost``."""
        self.stream.feed_eof()

    def writeConnectionLost(self) -> None:
        """See ``IHalfCloseableProtocol.writeConnectionLost``."""
        self.stream.finish_output()


# Servers


class _ServerProtocol(StreamProtocol):
    """
    Runs a handler as long as the connection lasts.

    :ivar stopped: whether a stop of the server has cancelled the handler.
    """

    factory: CoroutineFactory
    network: Hashable | None = None
    # None until the handler has run its first step, which may stop the server.
    _task: Task[Any] | None = None
    _cancelled_early: str | None = None
    _handler_cancelled = False
    stopped: bool = False
    _refused = False

    def connectionMade(self) -> None:
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
            # It cannot be called like that, and has failed as if it had raised it.
            return spawn(_fail, error, name=name or name_of(function), reactor=reactor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._refused:
            return
        stream = self.stream
        overdue = None if stream.lost else stream.timed_out
        super().connectionLost(reason)
        if isinstance(overdue, TLSError):
            self.factory.tell_of_limit(stream, "handshake_timeout", overdue)
        if self.factory.cancel_on_loss:
            self._cancel_handler("the connection was lost")
        self._forget()

    def cancel(self, reason: str) -> None:
        """Cancel the handler; or if that has ended, what is not sent yet."""
        if self._task is not None and self._task.done:
            self.stream.abort()
        else:
            self.stopped = True
            self._cancel_handler(reason)

    def _cancel_handler(self, reason: str) -> None:
        """Once, so that it can clean up."""
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
        """The handler has come to its end, in whatever way."""
        if task.cancelled:
            self.stream.abort()
        elif not task.failed:
            self.stream.close()
        else:
            error = task._see_error()
            names = {"name": task.name, "stream": self.stream}
            if all(map(self._is_of_the_peer, causes(error))):
                if self.stream.timed_out is None:
                    # Otherwise the factory tells.
                    _log.info(
                        "{name}, {stream}: {error}", error=safe_str(error), **names
                    )
            else:
                message = "{name}, {stream}: the handler has failed"
                log_failure(_log, message, error, **names)
            self.stream.abort()
        self._forget()

    def _is_of_the_peer(self, error: BaseException) -> bool:
        """Whether an error is the peer's doing, and no mistake of the handler."""
        stream = self.stream
        if isinstance(error, DelimiterNotFound | UnreadPlaintext):
            return True
        return (stream.ended and isinstance(error, IncompleteRead)) or (
            (stream.lost or stream.timed_out is not None)
            and isinstance(error, ConnectionClosed)
        )

    def _forget(self) -> None:
        """Once neither the connection nor the handler is there any more."""
        if self.stream.lost and self._task is not None and self._task.done:
            self.factory.forget(self)


async def _fail(error: Exception) -> None:
    raise error


def _check_timeouts(**timeouts: float | None) -> None:
    for name, seconds in timeouts.items():
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name}={seconds}: it must be more than 0, or None")


def _check_counts(most: int | Literal["auto"] | None, per_address: int | None) -> None:
    if most == "auto":
        most = None
    elif isinstance(most, str):
        raise ValueError(f'max_connections={most!r}: a number, "auto" or None')
    if most is not None and not most >= 0:
        raise ValueError(f"max_connections={most}: 0 is the least")
    if per_address is not None and not per_address >= 1:
        raise ValueError(f"max_connections_per_address={per_address}: 1 is the least")
    if most is not None and per_address is not None and per_address > most:
        raise ValueError(
            f"max_connections_per_address={per_address}: it must not be more than "
            f"max_connections={most}"
        )


class _HalfCloseableServer(_HalfCloseable, _ServerProtocol):
    pass


class CoroutineFactory(Factory):
    """
    Runs a function for each connection: as a server, on any endpoint.

    When ``handler`` returns, everything is sent and the connection closed; when
    it raises, that is logged and the connection aborted.  When the connection is
    lost, reads return what has arrived, and raise then.

    :param handler: called with a :class:`Stream`; in a task of its own.
    :param name: what the task is called in logs; by default the handler's name.
    :param max_connections: how many there may be at once; more are refused.  "auto"
        refuses a connection while three quarters of the descriptors that this process
        may have (``RLIMIT_NOFILE``) are in use, by whatever, and beyond 65,536.  None
        for no limit.
    :param max_connections_per_address: how many one IPv4 address, or one /64 network of
        IPv6, may have at once; None, the default, for no limit.  Other addresses, as of
        UNIX sockets, have none.
    :param first_byte_timeout: after how many seconds a connection is aborted on which
        the handler waits in a read, nothing has ever arrived, and nothing was written
        in the meantime.  After a TLS handshake it begins with its end.
    :param idle_timeout: after how many seconds in which nothing comes or goes a
        connection is aborted.  What the peer acknowledges of what was written before
        counts, where the kernel tells: on Linux, macOS, FreeBSD and NetBSD.
    :param write_timeout: after how many seconds a connection is aborted whose peer
        takes nothing of what was written, also after ``close`` and the end of the
        handler.  A peer that takes a little now and then is never too slow.  Where the
        kernel does not tell what the peer acknowledges, what the socket takes counts.
    :param read_timeout: how many seconds a read may take once a part of it has
        arrived; this is for peers that send byte after byte for ever.
    :param handshake_timeout: how many seconds a TLS handshake may take, that of
        ``start_tls`` included; None for no limit.
    :param close_timeout: how many seconds a TLS peer may take to answer the
        ``close_notify`` alert with which a connection ends, and which follows what
        was written; None for no limit.  After ``close`` during a handshake that has a
        limit, the time begins when the handshake is done.
    :param cancel_on_loss: cancel the handler when the connection is lost, at the
        latest when the peer closes its side.  Then there is no half close.
    :param reactor: an ``IReactorTime`` provider; by default the installed one.
    :raises TypeError: if the handler cannot be called.
    :raises ValueError: if one of the times is not more than 0, ``max_connections`` is
        negative, or ``max_connections_per_address`` is less than 1 or more than
        ``max_connections``.
    :ivar connections: what there is at the moment, with an item for each.
    :ivar stopping: an :class:`Event` that happens when :meth:`stop` is called; the
        ``stopping`` of each handler's stream.
    :ivar stopped: an :class:`Event` that happens when such a stop has ended.
    :ivar limits: how often each limit has refused or aborted a connection, by the name
        of its option; ``"stopping"`` for connections that came when this had stopped.
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
        _check_counts(max_connections, max_connections_per_address)
        _check_timeouts(
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
        self.connections: dict[_ServerProtocol, None] = {}
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
        # While there are connections.
        self._watchdog: Watchdog | None = None
        # By the name of the limit, or "stopping".
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
        protocol = (_ServerProtocol if self.cancel_on_loss else _HalfCloseableServer)(
            scheduler, self._tls_limits, self.stopping
        )
        protocol.factory = self
        return protocol

    @property
    def display_name(self) -> str:
        """What the handlers are called in logs."""
        return self.name or name_of(self.handler)

    def is_on(self, reactor: object) -> bool:
        """Whether the handlers run on ``reactor``."""
        own = self._reactor
        if own is None:
            # The one that is installed; to import it would install one.
            own = sys.modules.get("twisted.internet.reactor")
        return own is reactor

    def admit(self, protocol: _ServerProtocol) -> bool:
        """Whether a new connection is within the limits; if it is, count it."""
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
        count, most = len(self.connections), self.max_connections
        if self.stopping.is_set:
            return "stopping", "the server stops"
        if most == "auto":
            why = scarce_descriptors(transport)
            if why is not None:
                return "max_connections", f'{why}, and max_connections is "auto"'
            most = MOST_CONNECTIONS
        if most is not None and count >= most:
            return "max_connections", f"it has {count} connections (max_connections)"
        of_address = self._per_address.get(network, 0)
        if self._max_per_address is not None and of_address >= self._max_per_address:
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
        abort the connections that are left, and log the handlers that have not ended
        even then; nothing waits for these any more.

        To cancel the wait ends the grace: the handlers are cancelled now, and waited
        for.  To cancel it again aborts the connections.

        :return: fires with a :class:`Stopped` when all handlers and connections have
            ended, and at the latest after both times.
        :raises ValueError: if one of the times is less than 0.
        """
        check_stop_times(grace, cancel_timeout)
        running = [each for each in self.connections if each.unended_handler]
        self.stopping.set()
        stop = self._stop(running, grace, cancel_timeout)
        name = f"{self.display_name}, stopping"
        return spawn(stop, name=name, reactor=self._reactor).as_deferred()

    async def _stop(
        self, running: list[_ServerProtocol], grace: float, cancel_timeout: float
    ) -> Stopped:
        why = f"the server stops, and its grace of {grace} s is over"
        cancelled: Cancelled | None = None
        try:
            try:
                gone = await self._all_gone_within(grace)
            except Cancelled as error:
                gone, cancelled = not self.connections, error
                why = "the server stops, and does not wait any longer"
            if not gone:
                for protocol in list(self.connections):
                    protocol.cancel(why)
                ending = self._end_cancelled(cancel_timeout)
                cancelled = cancelled or current_task()._next_cancel()
                if cancelled is not None and self._is_awaited_by_handler():
                    # That handler ends when this has ended, and the others after it.
                    spawn(ending, name=current_task().name, reactor=self._reactor)
                    raise cancelled
                await ending
            self.stopped.set()
            if cancelled is not None:
                raise cancelled
        finally:
            # Its traceback holds this frame.
            del cancelled
        abandoned = sum(each.unended_handler is not None for each in running)
        late = sum(each.stopped for each in running)
        return Stopped(len(running) - late, late - abandoned, abandoned)

    async def _end_cancelled(self, cancel_timeout: float) -> None:
        """The handlers were cancelled: wait for them, and log those that are left."""
        try:
            gone = await self._all_gone_within(cancel_timeout)
        except Cancelled:
            with shield():
                await self._abort_connections()
            raise
        else:
            if not gone:
                with shield():
                    await self._abort_connections()
        finally:
            self.stopped.set()

    def _is_awaited_by_handler(self) -> bool:
        """Whether a handler waits for the task that runs."""
        this = current_task()
        seen: set[Task[Any]] = set()
        for handler in self._unended_handlers():
            task: Task[Any] | None = handler
            while task is not None and task not in seen:
                if task is this:
                    return True
                seen.add(task)
                awaited = task._waiting_on
                task = awaited.awaited_task() if isinstance(awaited, OfTask) else None
        return False

    def _unended_handlers(self) -> list[Task[Any]]:
        unended = [each.unended_handler for each in self.connections]
        return [each for each in unended if each is not None]

    async def _abort_connections(self) -> None:
        """Of those that are left."""
        for protocol in list(self.connections):
            protocol.stream.abort()
        for _ in range(_LAST_TURNS):
            await sleep(0)
            if not self.connections:
                return
        self._give_up()

    async def _all_gone_within(self, seconds: float) -> bool:
        try:
            with timeout(seconds):
                while self.connections:
                    if self._last_ends.is_set:
                        self._last_ends = Event()
                    await self._last_ends.wait()
        except TimeoutError:
            return not self.connections
        return True

    def _give_up(self) -> None:
        """Log the handlers that are left, and wait for them no more."""
        tasks = self._unended_handlers()
        for protocol in list(self.connections):
            self.forget(protocol)
        if tasks:
            _log.warn(
                "{count} handlers have not ended though they were cancelled and their "
                "connections aborted; the server has stopped without them:\n{handlers}",
                count=len(tasks),
                handlers=describe_first(tasks),
            )

    def watch(self) -> None:
        """A connection was made; it may have ended already."""
        if self._watchdog is None and self.connections:
            self._watchdog = Watchdog(
                self._time_limits,
                lambda: [each.stream for each in self.connections],
                self._exceeded,
            )
            self._watchdog.start(scheduler_for(self._reactor).reactor)

    def forget(self, protocol: _ServerProtocol) -> None:
        """A connection and its handler have ended."""
        # To close a connection may be to lose it at once, and to come here twice.
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


class Stopped(NamedTuple):
    """
    How the handlers of a server ended that ran when it began to stop.

    :ivar finished: how many ended by themselves, within the grace.
    :ivar cancelled: how many were cancelled after it, and have ended.
    :ivar abandoned: how many did not end when they were cancelled.
    """

    finished: int
    cancelled: int
    abandoned: int


servers: Final[Registry[CoroutineFactory]] = Registry()
"""All that any code still refers to."""


def check_stop_times(grace: float, cancel_timeout: float) -> None:
    """:raises ValueError: if one of the times is less than 0."""
    for name, seconds in (("grace", grace), ("cancel_timeout", cancel_timeout)):
        if not seconds >= 0:
            raise ValueError(f"{name}={seconds}: 0 is the least")


class ServerOptions(TypedDict, total=False):
    """
    The options of :class:`CoroutineFactory`, for functions that pass them on.  Its
    signature has the defaults.
    """

    name: str | None
    max_connections: int | Literal["auto"] | None
    max_connections_per_address: int | None
    first_byte_timeout: float | None
    idle_timeout: float | None
    read_timeout: float | None
    write_timeout: float | None
    handshake_timeout: float | None
    close_timeout: float | None
    cancel_on_loss: bool
    reactor: Any | None


class Server:
    """
    What :func:`serve` has started.

    :ivar port: the ``IListeningPort``; of an endpoint without one, what it has.
    :ivar factory: the :class:`CoroutineFactory`.
    """

    def __init__(self, port: Any, factory: CoroutineFactory) -> None:
        self.port: ListeningPort = port
        self.factory = factory
        # Happens when the port listens no more; None as long as stop() was not called.
        self._port_closed: Event | None = None
        # Why it could not be closed.
        self._failure: Failure | None = None

    @property
    def stopping(self) -> Event:
        """Happens when :meth:`stop` is called; the ``stopping`` of each stream."""
        return self.factory.stopping

    @must_be_awaited
    def serve_forever(
        self, grace: float = GRACE, cancel_timeout: float = CANCEL_TIMEOUT
    ) -> Deferred[None]:
        """
        Wait until this is cancelled, and then stop, as :meth:`stop` does; or until
        something else has stopped the server::

            async def main() -> None:
                server = await serve("tcp:8000", handler)
                await server.serve_forever()

            twisted_rtsig.run(main)

        To cancel it again ends the grace, as of :meth:`stop`.

        :param grace: how many seconds handlers have to finish then.
        :param cancel_timeout: how many seconds cancelled handlers have to end.
        :raises ValueError: if one of the times is less than 0.
        """
        check_stop_times(grace, cancel_timeout)
        serving = spawn(
            self._serve_until_cancelled,
            grace,
            cancel_timeout,
            name=f"{self.factory.display_name}, serving",
            reactor=self.factory._reactor,
        )
        return serving.as_deferred()

    async def _serve_until_cancelled(self, grace: float, cancel_timeout: float) -> None:
        try:
            await self.factory.stopped.wait()
        except Cancelled:
            await self.stop(grace, cancel_timeout)
            raise

    def stop(
        self, grace: float = 0, cancel_timeout: float = CANCEL_TIMEOUT
    ) -> Deferred[Stopped]:
        """
        Stop listening, set :attr:`stopping`, and let the handlers finish for ``grace``
        seconds.  Then cancel them; and after ``cancel_timeout`` more seconds abort the
        connections, as :meth:`CoroutineFactory.stop` does.  Can be called again, with
        less to wait for; no handler is cancelled twice.

        To cancel the wait ends the grace: the handlers are cancelled now, and waited
        for.  To cancel it again aborts the connections.

        :return: fires with a :class:`Stopped` when the port is closed and all handlers
            and connections have ended: these at the latest after both times.
        :raises ValueError: if one of the times is less than 0.
        """
        check_stop_times(grace, cancel_timeout)
        if self._port_closed is None:
            accept_backlog(self.port)
        finished = self.factory.stop(grace, cancel_timeout)
        port_closed = self._port_closed
        if port_closed is None:
            port_closed = self._port_closed = Event()
            close = getattr(self.port, "stopListening", lambda: None)
            maybeDeferred(close).addCallbacks(
                lambda _: port_closed.set(), self._cannot_close
            )
        return spawn(
            self._finish_stop,
            finished,
            port_closed,
            name=f"{self.factory.display_name}, stopping",
            reactor=self.factory._reactor,
        ).as_deferred()

    def _cannot_close(self, failure: Failure) -> None:
        assert self._port_closed is not None
        self._failure = failure
        self._port_closed.set()

    async def _finish_stop(
        self, finished: Deferred[Stopped], port_closed: Event
    ) -> Stopped:
        stopped = await finished
        await port_closed.wait()
        if self._failure is not None:
            raise error_of(self._failure)
        return stopped


def accept_backlog(port: Any) -> None:
    """
    Accept the connections that the kernel has made and that wait in its queue: it
    resets them when the port is closed, though clients may have sent requests already.
    """
    accept = getattr(port, "doRead", None)
    if accept is None:
        return
    for _ in range(_LAST_ACCEPTS):
        number = port.fileno()
        # A port that was closed has none.
        if number < 0 or not is_readable(number):
            break
        accept()


def is_readable(descriptor: int) -> bool:
    """Whether a read of the descriptor would return at once."""
    if sys.platform == "win32":
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def server_endpoint(endpoint: ServerEndpoint | str, reactor: object) -> ServerEndpoint:
    """
    An endpoint, or what a description describes.

    :raises ValueError: if the description is wrong.
    """
    if not isinstance(endpoint, str):
        return endpoint
    described: Any = serverFromString(scheduler_for(reactor).reactor, endpoint)
    return cast(ServerEndpoint, described)


def serve(
    endpoint: ServerEndpoint | str,
    handler: Handler,
    **options: Unpack[ServerOptions],
) -> Deferred[Server]:
    """
    Listen, and run ``handler`` for each connection.

    :param endpoint: an ``IStreamServerEndpoint`` provider; or its description, as
        ``serverFromString`` takes it: ``"tcp:8000"``.
    :param handler: called with a :class:`Stream`; in a task of its own.
    :param options: those of :class:`CoroutineFactory`: ``name``, ``max_connections``,
        ``max_connections_per_address``, ``first_byte_timeout``, ``idle_timeout``,
        ``read_timeout``, ``write_timeout``, ``handshake_timeout``, ``close_timeout``,
        ``cancel_on_loss``, ``reactor``.
    :return: a :class:`Server`.
    :raises TypeError: if the handler cannot be called, or an option is unknown.
    :raises ValueError: if the description is wrong, or an option has a value that it
        cannot have.
    """
    factory = CoroutineFactory(handler, **options)
    reactor = options.get("reactor")
    listening: Deferred[Any] = server_endpoint(endpoint, reactor).listen(factory)

    def give_up(failure: Failure) -> Failure:
        # An endpoint that goes on, though this was cancelled, gets an error.
        factory.stopping.set()
        return failure

    return listening.addCallbacks(Server, give_up, callbackArgs=(factory,))


# Clients


class ClientProtocol(_HalfCloseable, StreamProtocol):
    """Feeds the stream of a client."""

    def connectionMade(self) -> None:
        """See ``IProtocol.connectionMade``."""
        transport: Any = self.transport
        if "protocol" in getattr(transport, "__dict__", ()):
            # The wrapper that endpoints put around each protocol has done its
            # work by now, and it hides that there is a half close: it provides
            # only the last of our interfaces.
            transport.protocol = self
        super().connectionMade()


class _ClientFactory(Factory):
    """:ivar given_up: whether nothing waits for the connection any more."""

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
    Connect, as a client.

    A TLS handshake begins then; reads wait for it, and raise what goes wrong with it.

    :param endpoint: an ``IStreamClientEndpoint`` provider; or its description, as
        ``clientFromString`` takes it: ``"unix:/run/app.sock"``.
    :param reactor: an ``IReactorTime`` provider; by default that of the task.
    :param write_timeout: after how many seconds a connection is aborted that was
        closed, and whose peer takes nothing of what is left to be sent; None for no
        limit.  Before, let :func:`timeout` limit how long a write may take.
    :param handshake_timeout: as for :class:`CoroutineFactory`.
    :param close_timeout: as for :class:`CoroutineFactory`.
    :return: a :class:`Stream`.
    :raises ValueError: if one of the times is not more than 0.
    """
    _check_timeouts(
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
        # An endpoint that goes on, though this was cancelled, gets no connection.
        factory.given_up = True
        return failure

    connecting: Deferred[Any] = endpoint.connect(factory)
    return connecting.addCallbacks(lambda protocol: protocol.stream, give_up)
