"""
The connections of ``twisted.web`` when their process is about to end.

HTTP/1.1 has one way to end a connection without losing a request: an answer that says
``Connection: close``.  A server that closes an idle connection may meet a request that
is on its way, and the client cannot know whether it was handled.  So an idle connection
stays open for a while.  A busy client sends its next request in that time, and is told.
A connection that is still idle then is closed, unless the kernel has something to read.
What is left is the race that every idle timeout has.

HTTP/2 has GOAWAY (RFC 9113, section 6.8).  The first asks the client to open no more
streams.  The second one, after a while for those that are on their way, tells which
stream was the last to be answered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Final

from twisted.web.http import HTTPChannel, _GenericHTTPChannelProtocol

from twisted_rtsig.coro.serving import is_readable
from twisted_rtsig.engine.transports import ServerTransport

_MOST_STREAMS: Final = (1 << 31) - 1
"""The greatest number that a stream of HTTP/2 can have."""


def channel_of(protocols: Iterable[Any]) -> Any:
    """The HTTP connection among the protocols of a connection, or None."""
    for protocol in protocols:
        if isinstance(protocol, _GenericHTTPChannelProtocol):
            return protocol._channel
        if isinstance(protocol, HTTPChannel) or _is_http2(protocol):
            return protocol
    return None


def drain_channel(
    channel: Any, connection: ServerTransport
) -> DrainingHTTP1 | DrainingHTTP2:
    """Let an HTTP connection end."""
    kind = DrainingHTTP2 if _is_http2(channel) else DrainingHTTP1
    return kind(channel, connection)


def _is_http2(protocol: object) -> bool:
    # Not there without the package h2.
    module = sys.modules.get("twisted.web._http2")
    return module is not None and isinstance(protocol, module.H2Connection)


class DrainingHTTP1:
    """
    A connection of HTTP/1.1 that is to end.

    :ivar channel: an ``HTTPChannel``.
    """

    def __init__(self, channel: Any, connection: ServerTransport) -> None:
        self.channel = channel
        self._connection = connection
        self._check_persistence = channel.checkPersistence
        channel.checkPersistence = self._persists
        request = channel.requests[-1] if channel.requests else None
        # In line mode the headers are still to come.
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
        What ``checkPersistence`` of the channel is: the headers of a request have come.
        """
        persistent: bool = self._check_persistence(request, version)
        return persistent and (self._has_more() or self._close_after(request))

    def _has_more(self) -> bool:
        """Whether the client has sent further requests already (pipelining)."""
        length: int | None = self.channel.length
        return length is not None and len(self.channel._buffer) > length

    def _close_after(self, request: Any) -> bool:
        """Announce the end in an answer; whether the connection persists after it."""
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
        """Close it if it has been idle since the last look."""
        was_idle, self._was_idle = self._was_idle, self._is_idle()
        if was_idle and self._was_idle and not is_readable(self._connection.fileno()):
            # TLS may still deliver a request, which would be handled and not answered.
            self.channel.persistent = False
            self.channel.loseConnection()


class DrainingHTTP2:
    """
    A connection of HTTP/2 that is to end.

    :ivar channel: an ``H2Connection``.
    """

    def __init__(self, channel: Any, connection: ServerTransport) -> None:
        self.channel = channel
        self._connection = connection
        # Whether streams that were opened before the client knew have come.
        self._all_came = False
        self._request_done = channel._requestDone
        channel._requestDone = self._stream_done
        self._go_away(_MOST_STREAMS)

    def _go_away(self, last_stream: int) -> None:
        # Not by the connection of h2, which then refuses what comes on open streams.
        from hyperframe.frame import GoAwayFrame

        frame = GoAwayFrame(last_stream_id=last_stream)
        self.channel.transport.write(frame.serialize())

    def close_if_idle(self) -> None:
        """Close it as soon as no stream is open."""
        self._all_came = True
        self._close_after_last()

    def _stream_done(self, stream: int) -> None:
        """What ``_requestDone`` of the channel is."""
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
        # A stream that is opened now is not answered, as the client knows.
        channel.dataReceived = _ignore
        # TLS does not close as long as it has a producer.
        channel.transport.unregisterProducer()
        channel.transport.loseConnection()


def _ignore(data: bytes) -> None:
    """What ``dataReceived`` of a connection is that was closed."""


def _has_shaken_hands(transport: Any) -> bool:
    """Whether a connection has no TLS, or its handshake is done."""
    done: bool = getattr(transport, "_handshakeDone", True)
    return done
