"""Servers: a port that listens, and a handler for each of its connections."""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypedDict, cast
from typing import Protocol as StructuralType

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.python.failure import Failure

from twisted_rtsig.coro.errors import Cancelled
from twisted_rtsig.coro.factories import CoroutineFactory
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.handlers import Handler
from twisted_rtsig.coro.interfaces import ListeningPort
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import error_of
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stopping import (
    CANCEL_TIMEOUT,
    GRACE,
    Stopped,
    check_stop_times,
)
from twisted_rtsig.typing_backports import Unpack

if TYPE_CHECKING:
    from twisted.internet.interfaces import IStreamServerEndpoint


class _ListensOn(StructuralType):
    def listen(self, factory: Any, /) -> Deferred[Any]: ...


# A class that implements one of Twisted's interfaces is a subtype of it only for mypy
# with the plugin mypy-zope.  Without it the method decides.
ServerEndpoint: TypeAlias = "IStreamServerEndpoint | _ListensOn"

# How often a port accepts connections before it is closed, at most: clients may connect
# faster than it accepts.
_LAST_ACCEPTS: Final = 100


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
    A server that listens.  :func:`serve` makes it.

    :ivar port: the ``IListeningPort``; or what else the endpoint has returned.
    :ivar factory: the :class:`CoroutineFactory`.
    """

    def __init__(self, port: Any, factory: CoroutineFactory) -> None:
        self.port: ListeningPort = port
        self.factory = factory
        # Happens when the port is closed; None before stop() was called.
        self._port_closed: Event | None = None
        # Why the port could not be closed.
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
        Wait until the wait is cancelled, and then stop, as :meth:`stop` does; or until
        something else has stopped the server::

            async def main() -> None:
                server = await serve("tcp:8000", handler)
                await server.serve_forever()

            twisted_rtsig.run(main)

        If it is cancelled again, the grace ends, as with :meth:`stop`.

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
        seconds.  Then cancel them.  After ``cancel_timeout`` more seconds abort the
        connections, as :meth:`CoroutineFactory.stop` does.  It can be called again,
        with shorter times.  No handler is cancelled twice.

        If the wait is cancelled, the grace ends: the handlers are cancelled at once,
        and waited for.  If it is cancelled again, the connections are aborted.

        :return: fires with a :class:`Stopped` when the port is closed and all handlers
            and connections have ended.  The latter takes at most both times.
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
    Accept the connections that wait in the kernel's queue (the backlog).  The kernel
    resets them when the port is closed, though clients may have sent requests already.
    """
    accept = getattr(port, "doRead", None)
    if accept is None:
        return
    for _ in range(_LAST_ACCEPTS):
        number = port.fileno()
        # A port that was closed has no descriptor.
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
    An endpoint, or the endpoint of a description.

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
    :raises ValueError: if the description is wrong, or the value of an option.
    """
    factory = CoroutineFactory(handler, **options)
    reactor = options.get("reactor")
    listening: Deferred[Any] = server_endpoint(endpoint, reactor).listen(factory)

    def give_up(failure: Failure) -> Failure:
        # An endpoint that ignores the cancellation gets an error from the factory.
        factory.stopping.set()
        return failure

    return listening.addCallbacks(Server, give_up, callbackArgs=(factory,))
