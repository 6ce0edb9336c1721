"""
Drains the connections of ``twisted.web`` when their process is about to end.

HTTP/1.1 has one way to end a connection without losing a request: a response that says
``Connection: close``.  If a server closes an idle connection, a request may be on its
way, and the client cannot know whether it was handled.  So an idle connection stays
open for a while.  A busy client sends its next request in that time, and the response
says ``Connection: close``.  A connection that is still idle then is closed, unless the
kernel has received something.  What remains is the race that every idle timeout has.

HTTP/2 has GOAWAY (RFC 9113, section 6.8).  The first GOAWAY asks the client to open no
more streams.  A while later, when streams that were on their way have arrived, the
second one names the last stream that is answered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Final

from twisted.web.http import HTTPChannel, _GenericHTTPChannelProtocol

from twisted_rtsig.coro.serving import is_readable
from twisted_rtsig.engine.transports import ServerTransport

_MOST_STREAMS: Final = (1 << 31) - 1
"""The greatest identifier of an HTTP/2 stream."""


def channel_of(protocols: Iterable[Any]) -> Any:
    """Return the HTTP channel among the protocols of a connection, or None."""
    for protocol in protocols:
        if isinstance(protocol, _GenericHTTPChannelProtocol):
            return protocol._channel
        if isinstance(protocol, HTTPChannel) or _is_http2(protocol):
            return protocol
    return None


def drain_channel(
    channel: Any, connection: ServerTransport
) -> DrainingHTTP1 | DrainingHTTP2:
    """Start draining an HTTP connection."""
    kind = DrainingHTTP2 if _is_http2(channel) else DrainingHTTP1
    return kind(channel, connection)


def _is_http2(protocol: object) -> bool:
    # Imported by Twisted only if the package h2 is installed.
    module = sys.modules.get("twisted.web._http2")
    return module is not None and isinstance(protocol, module.H2Connection)


class _Draining:
    """
    A connection that is being drained.

    :ivar channel: the protocol: an ``HTTPChannel`` or ``H2Connection``.
    """

    def __init__(self, channel: Any, connection: ServerTransport) -> None:
        self.channel = channel
        self._connection = connection


class DrainingHTTP1(_Draining):
    """Drains an HTTP/1.1 connection."""

    def __init__(self, channel: Any, connection: ServerTransport) -> None:
        super().__init__(channel, connection)
        self._check_persistence = channel.checkPersistence
        channel.checkPersistence = self._persists
        request = channel.requests[-1] if channel.requests else None
        # In line mode, the headers have not arrived completely.
        if (
            request is not None
            and not channel.line_mode
            and not request.startedWriting
            and not channel._dataBuffer
        ):
            channel.persistent = self._close_after(request)
        self._was_idle = self._is_idle()

    def _persists(self, request: Any, version: bytes) -> bool:
        """
        Replaces ``checkPersistence`` of the channel, which is called when the headers
        of a request have arrived.
        """
        persistent: bool = self._check_persistence(request, version)
        return persistent and (self._has_more() or self._close_after(request))

    def _has_more(self) -> bool:
        """Whether the client has sent more requests already (pipelining)."""
        length: int | None = self.channel.length
        return length is not None and len(self.channel._buffer) > length

    def _close_after(self, request: Any) -> bool:
        """Announce the end in the response; return False: it does not persist."""
        request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
        return False

    def _is_idle(self) -> bool:
        channel = self.channel
        return (
            channel.persistent
            and not channel.requests
            and not channel._buffer
            and _has_shaken_hands(channel.transport)
        )

    def close_if_idle(self) -> None:
        """Close the connection if it has been idle since the previous call."""
        was_idle, self._was_idle = self._was_idle, self._is_idle()
        if was_idle and self._was_idle and not is_readable(self._connection.fileno()):
            # TLS may still deliver a request.  It must not be handled, as its response
            # could not be sent.
            self.channel.persistent = False
            self.channel.loseConnection()


class DrainingHTTP2(_Draining):
    """Drains an HTTP/2 connection."""

    def __init__(self, channel: Any, connection: ServerTransport) -> None:
        super().__init__(channel, connection)
        # Whether the streams that the client opened before it received GOAWAY have had
        # time to arrive.
        self._all_came = False
        self._request_done = channel._requestDone
        channel._requestDone = self._stream_done
        self._go_away(_MOST_STREAMS)

    def _go_away(self, last_stream: int) -> None:
        # Not with h2's close_connection(), after which h2 refuses data of open streams.
        from hyperframe.frame import GoAwayFrame

        frame = GoAwayFrame(last_stream_id=last_stream)
        self.channel.transport.write(frame.serialize())

    def close_if_idle(self) -> None:
        """Close the connection as soon as no stream is open."""
        self._all_came = True
        self._close_after_last()

    def _stream_done(self, stream: int) -> None:
        """Replaces ``_requestDone`` of the channel."""
        self._request_done(stream)
        self._close_after_last()

    def _close_after_last(self) -> None:
        channel = self.channel
        if (
            not self._all_came
            or channel.streams
            or not self._connection.connected
            or is_readable(self._connection.fileno())
        ):
            return
        self._go_away(channel.conn.highest_inbound_stream_id)
        # GOAWAY has told the client that streams opened from now on are not answered.
        channel.dataReceived = _ignore
        # TLS does not close the connection while a producer is registered.
        channel.transport.unregisterProducer()
        channel.transport.loseConnection()


def _ignore(data: bytes) -> None:
    """Replaces ``dataReceived`` of a closed connection."""


def _has_shaken_hands(transport: Any) -> bool:
    """Whether a connection has no TLS, or its handshake is complete."""
    done: bool = getattr(transport, "_handshakeDone", True)
    return done
