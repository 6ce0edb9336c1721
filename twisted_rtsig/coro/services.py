"""
Servers as services of Twisted: for ``twistd``, and for programs of several services.

See ``docs/running.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.coro.serving import (
    CANCEL_TIMEOUT,
    GRACE,
    CoroutineFactory,
    Handler,
    Server,
    ServerEndpoint,
    ServerOptions,
    Stopped,
    check_stop_times,
    server_endpoint,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_log = Logger()


class CoroutineService(Service):
    """
    A service that listens on an endpoint and runs a function for each connection.

    :param endpoint: an ``IStreamServerEndpoint`` provider, or its description.
    :param handler: called with a :class:`Stream`; in a task of its own.
    :param grace: how many seconds handlers have to finish when the service stops; then
        they are cancelled.
    :param cancel_timeout: how many seconds cancelled handlers have to end.
    :param options: those of :class:`CoroutineFactory`.
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
        # Under way to listen.
        self._listening: Deferred[Any] | None = None
        # So that wrong options are an error here.
        self._new_factory()

    def _new_factory(self) -> CoroutineFactory:
        """A factory stops once, and a service may start again."""
        return CoroutineFactory(self._handler, **self._options)

    def privilegedStartService(self) -> None:
        """
        Listen: before the process gives up its privileges, since some ports need them.

        :raises Exception: what the endpoint says if it cannot listen, so that
            C{twistd} does not start.  If it says so only later, that is logged.
        """
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        factory = self._new_factory()
        failures: list[Failure] = []
        starting = True

        def listens(port: Any) -> None:
            self._listening = None
            self.server = Server(port, factory)

        def fails(failure: Failure) -> None:
            self._listening = None
            if starting:
                failures.append(failure)
            elif not failure.check(CancelledError):
                _log.failure(
                    "{service} cannot listen, and serves nothing", failure, service=self
                )

        listening: Deferred[Any] = self._endpoint.listen(factory)
        self._listening = listening
        listening.addCallbacks(listens, fails)
        starting = False
        if failures:
            failures[0].raiseException()

    def startService(self) -> None:
        """
        Listen, if C{privilegedStartService} was not called before.  Raises what that
        does.
        """
        if self.server is None and self._listening is None:
            self.privilegedStartService()
        super().startService()  # type: ignore[no-untyped-call]

    def stopService(self) -> Deferred[None]:
        """
        Stop listening, set C{stopping} of all streams, and let the handlers finish
        within the grace.  Then cancel them, as :meth:`Server.stop` does, and log how
        many ended in which way.

        :return: fires when all handlers have ended, and at the latest after both times.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        if self._listening is not None:
            self._listening.cancel()
        server, self.server = self.server, None
        if server is None:
            return succeed(None)
        return server.stop(self._grace, self._cancel_timeout).addCallback(self._tell)

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


__all__ = ["CoroutineService"]
