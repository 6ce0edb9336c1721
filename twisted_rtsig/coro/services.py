"""
Servers as services of Twisted: for ``twistd``, and for programs of several services.

See ``docs/running.md``.
"""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.coro.factories import CoroutineFactory
from twisted_rtsig.coro.handlers import Handler
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.scopes import move_on_after
from twisted_rtsig.coro.serving import (
    Server,
    ServerEndpoint,
    ServerOptions,
    server_endpoint,
)
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stopping import CANCEL_TIMEOUT, GRACE, Stopped, check_stop_times
from twisted_rtsig.coro.tracebacks import log_failure
from twisted_rtsig.typing_backports import Unpack

_log = Logger()


class CoroutineService(Service):
    """
    A service that listens on an endpoint and runs a function for each connection.

    :param endpoint: an ``IStreamServerEndpoint`` provider, or its description.
    :param handler: called with a :class:`Stream`; in a task of its own.
    :param grace: how many seconds handlers have to finish when the service stops; then
        they are cancelled.
    :param cancel_timeout: how many seconds cancelled handlers have to end.
    :param options: those of :class:`CoroutineFactory`, as for :func:`serve`.
    :raises TypeError: if the handler cannot be called, or an option is unknown.
    :raises ValueError: if an option has a value that it cannot have.
    :ivar server: the :class:`Server`, while the service listens; else None.
    """

    def __init__(
        self,
        endpoint: ServerEndpoint | str,
        handler: Handler,
        *,
        grace: float = GRACE,
        cancel_timeout: float = CANCEL_TIMEOUT,
        **options: Unpack[ServerOptions],
    ) -> None:
        check_stop_times(grace, cancel_timeout)
        self._endpoint = server_endpoint(endpoint, options.get("reactor"))
        self._handler = handler
        self._options = options
        self._grace = grace
        self._cancel_timeout = cancel_timeout
        self.server: Server | None = None
        self._start: _Start | None = None
        # One event for each stop that is under way; it happens when the stop has ended.
        self._stops: list[Event] = []
        # This raises the errors of wrong options.
        self._new_factory()

    def _new_factory(self) -> CoroutineFactory:
        """Make a factory: each can be stopped once, and a service may start again."""
        return CoroutineFactory(self._handler, **self._options)

    def privilegedStartService(self) -> None:
        """
        Listen.  This is before the process gives up its privileges, since some ports
        need them.

        :raises Exception: the error of the endpoint if it cannot listen, so that
            ``twistd`` does not start.  If the endpoint fails only later, its error is
            logged.
        """
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        start = self._start = _Start(self._new_factory())
        failures: list[Failure] = []
        starting = True

        def listens(port: Any) -> Any:
            server = Server(port, start.factory)
            if self._start is not start:
                # The service was stopped, and the endpoint has ignored that it was
                # cancelled.
                return server.stop(self._grace, self._cancel_timeout)
            self.server = server
            return None

        def fails(failure: Failure) -> None:
            if self._start is not start:
                # The service was stopped before.
                return
            self._start = None
            if starting:
                failures.append(failure)
            else:
                _log.failure(
                    "{service} cannot listen, and serves nothing", failure, service=self
                )

        listening = maybeDeferred(self._endpoint.listen, start.factory)
        start.listening = listening
        listening.addCallbacks(listens, fails)
        listening.addErrback(
            lambda failure: _log.failure(
                "{service} cannot stop listening", failure, service=self
            )
        )
        listening.addBoth(lambda _: start.over.set())
        starting = False
        if failures:
            failures[0].raiseException()

    def startService(self) -> None:
        """
        Listen, if ``privilegedStartService`` was not called before.  Raises the same
        errors.
        """
        if self._start is None:
            self.privilegedStartService()
        super().startService()  # type: ignore[no-untyped-call]

    def stopService(self) -> Deferred[None]:
        """
        Stop listening, set ``stopping`` of all streams, and let the handlers finish
        within the grace.  Then cancel them, as :meth:`Server.stop` does, and log how
        many ended in which way.

        If it is called again, it waits for the same stop.  If the wait is cancelled,
        the grace ends, as with :meth:`Server.stop`.

        :return: fires when all handlers have ended, and at the latest after both times.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        start, self._start = self._start, None
        server, self.server = self.server, None
        earlier = list(self._stops)
        if start is None and not earlier:
            return succeed(None)
        # Handlers learn of the stop, and may call this again.
        over = Event()
        self._stops.append(over)
        if start is None:
            stopping: Deferred[Any] = succeed(None)
        elif server is None:
            stopping = start.give_up(self._grace, self._cancel_timeout)
        else:
            stopping = server.stop(self._grace, self._cancel_timeout)
            stopping.addCallback(self._tell)
        return spawn(
            self._finish_stop,
            *(start, stopping, earlier, over),
            name=f"{self!r}, stopping",
            reactor=self._options.get("reactor"),
        ).as_deferred()

    async def _finish_stop(
        self,
        start: _Start | None,
        stopping: Deferred[Any],
        earlier: list[Event],
        over: Event,
    ) -> None:
        try:
            await stopping
            if start is not None:
                with move_on_after(self._cancel_timeout):
                    await start.over.wait()
                if not start.over.is_set:
                    _log.warn(
                        "{service} has stopped before its endpoint listens, which did "
                        "not end when it was cancelled: its port will be closed then",
                        service=self,
                    )
            for each in earlier:
                await each.wait()
        finally:
            self._stops.remove(over)
            over.set()

    def _tell(self, stopped: Stopped) -> None:
        _log.info(
            "{service} has stopped: {finished} handlers have ended by themselves, "
            "{cancelled} were cancelled, {abandoned} have not ended",
            service=self,
            finished=stopped.finished,
            cancelled=stopped.cancelled,
            abandoned=stopped.abandoned,
        )

    def __repr__(self) -> str:
        handler = getattr(self._handler, "__qualname__", repr(self._handler))
        return f"<CoroutineService of {handler}>"


class _Start:
    """
    A start of a service.

    :ivar factory: makes the protocols of the connections, until the service stops.
    :ivar listening: the Deferred that the endpoint has returned.
    :ivar over: happens when the endpoint listens, or has failed; or when its port is
        closed again, because the service was stopped before it listened.
    """

    def __init__(self, factory: CoroutineFactory) -> None:
        self.factory = factory
        self.listening: Deferred[Any] = Deferred()
        self.over = Event()

    def give_up(self, grace: float, cancel_timeout: float) -> Deferred[Stopped]:
        """Stop before the endpoint has reported that it listens."""
        # From here on the factory refuses to listen.
        stopping = self.factory.stop(grace, cancel_timeout)
        if not self.factory.numPorts:
            # Otherwise it listens already, and only the port that it is about to return
            # can be closed.
            try:
                self.listening.cancel()
            except Exception as error:
                message = "The canceller of {deferred} has failed"
                log_failure(_log, message, error, deferred=self.listening)
        return stopping


__all__ = ["CoroutineService"]
