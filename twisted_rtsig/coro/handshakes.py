"""
The TLS handshake of a stream, and the end of TLS: the operations that wait for the
handshake, and how long both may take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IHandshakeListener, ISSLTransport

from twisted_rtsig.coro.errors import TLSError
from twisted_rtsig.coro.operations import Operation, Wait, ignore
from twisted_rtsig.coro.pending import succeed
from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.coro.tls import below_tls, handshake_is_done, tls_layer

if TYPE_CHECKING:
    from twisted_rtsig.coro.pending import Operations
    from twisted_rtsig.coro.streams import Stream

# How often, in seconds, a stream looks whether a handshake is done that is not
# reported.
_LOOK_FOR_HANDSHAKE = 0.02


class TLSLimits(NamedTuple):
    """
    How many seconds a TLS peer may take for the handshake, and to answer the
    ``close_notify`` alert; None for no limit.
    """

    handshake: float | None
    close: float | None


DEFAULT_TLS_LIMITS: Final = TLSLimits(handshake=30.0, close=30.0)
"""The limits of each connection for which no others are given."""


class Handshake:
    """The TLS handshake of a stream, and how long the end of TLS may take."""

    __slots__ = ("_close_call", "_limit_call", "_limits", "_stream", "_waiting")

    def __init__(self, stream: Stream, limits: TLSLimits) -> None:
        self._stream = stream
        self._limits = limits
        # The operations that wait for the handshake.
        self._waiting: Operations = {}
        # The delayed calls that end the handshake, and the wait for close_notify.
        self._limit_call: Any = None
        self._close_call: Any = None

    def wait(self) -> Operation[None]:
        """Wait until the handshake is done."""
        operation: Operation[None] = Wait()
        operation.owner = self
        self._waiting[operation] = None
        return operation

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        # Operations would pile up if a task waits again and again.
        self._waiting.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the TLS handshake of {self._stream!r}"

    def limit(self) -> None:
        """The handshake has begun: lose the connection if it takes too long."""
        seconds = self._limits.handshake
        if seconds is not None and not self._stream.lost:
            reactor = self._stream._scheduler.reactor
            self._limit_call = reactor.callLater(seconds, self._overdue, seconds)

    def _overdue(self, seconds: float) -> None:
        self._limit_call = None
        stream = self._stream
        if handshake_is_done(stream.transport):
            # A protocol between TLS and the stream has not passed
            # handshakeCompleted on.
            return
        error = TLSError(f"no handshake within {seconds} s (handshake_timeout)")
        stream.time_out(error)

    def look(self) -> None:
        """
        Look whether the handshake is done, if that is not reported: a protocol between
        TLS and the stream may not pass ``handshakeCompleted`` on.
        """
        if not self._waiting:
            return
        transport = self._stream.transport
        layer = tls_layer(transport)
        if layer is None or IHandshakeListener.providedBy(layer.wrappedProtocol):
            return
        if handshake_is_done(transport):
            self.done()
        else:
            reactor = self._stream._scheduler.reactor
            reactor.callLater(_LOOK_FOR_HANDSHAKE, self.look)

    def done(self) -> None:
        """The handshake is reported to be done."""
        if handshake_is_done(self._stream.transport) is False:
            # Twisted reports it though it has refused the certificate.  Its error tells
            # so when the connection is lost.
            return
        limit_call, self._limit_call = self._limit_call, None
        cancel_call(limit_call)
        waiting, self._waiting = self._waiting, {}
        succeed(waiting)

    def limit_close(self) -> None:
        """
        Limit the wait for the peer's answer to ``close_notify``.  TLS sends that alert
        when the handshake is done and all output is sent.
        """
        stream = self._stream
        if self._limit_call is not None and not handshake_is_done(stream.transport):
            # The handshake has a limit of its own.
            self.wait().addCallbacks(lambda _: self.limit_close(), ignore)
            self.look()
            return
        seconds = self._limits.close
        if seconds is not None:
            reactor = stream._scheduler.reactor
            self._close_call = reactor.callLater(seconds, self._close_overdue)

    def _close_overdue(self) -> None:
        self._close_call = None
        # RFC 8446, section 6.1, does not require to wait for the answer.  The
        # connection below TLS is closed and not aborted, so that a peer that reads
        # slowly can still receive what was written before.
        below_tls(self._stream.transport).loseConnection()

    def stop_limits(self) -> None:
        """The connection is gone."""
        limit_call, self._limit_call = self._limit_call, None
        cancel_call(limit_call)
        close_call, self._close_call = self._close_call, None
        cancel_call(close_call)

    def take_waiting(self) -> Operations:
        """The operations that wait for the handshake, which does not finish them."""
        waiting, self._waiting = self._waiting, {}
        return waiting


def connection_error(transport: Any, error: BaseException | None) -> Exception:
    """
    Why a connection was lost: a :class:`TLSError` if TLS is to blame.

    Twisted reports the errors of OpenSSL and ``service_identity`` as they are.
    """
    assert isinstance(error, Exception)
    if isinstance(error, ConnectionClosed) or not ISSLTransport.providedBy(transport):
        return error
    failed = TLSError(_reasons(error))
    # Its frames belong to Twisted, and would keep the connection in memory.
    failed.__cause__ = error.with_traceback(None)
    return failed


def _reasons(error: Exception) -> str:
    """What an error of OpenSSL, or any other, says."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and all(isinstance(each, tuple) for each in queue):
        # Each entry is the library, the function and the reason.
        return ", ".join(str(each[-1]) for each in queue) or type(error).__name__
    return str(error) or type(error).__name__
