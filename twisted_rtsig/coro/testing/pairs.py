"""Two streams in memory that are connected to each other."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost

from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.testing.transports import BUFFER_SIZE, Transport

# What arrives in answer to data for a side that is gone, like an RST of TCP.
_RESET: Final = object()


def stream_pair(
    *,
    buffer_size: int = BUFFER_SIZE,
    latency: float = 0.0,
    reactor: Any | None = None,
) -> tuple[Stream, Stream]:
    """
    Two streams: what is written to one is read from the other.

    They behave as those of a TCP connection.  If one side was aborted, or has closed
    and something is written to it, then the other side loses the connection.

    :param buffer_size: when more bytes than that are on their way, ``write`` waits
        until the other side has taken all of them.  It takes some before they are read.
    :param latency: how many seconds data, and the end of the data, are on their way.
    :param reactor: an ``IReactorTime`` provider, such as a
        ``twisted.internet.task.Clock``; by default that of the task.
    :raises ValueError: if the size or the latency is negative.
    """
    if not (buffer_size >= 0 and latency >= 0):
        raise ValueError(
            f"a buffer of {buffer_size} bytes and a latency of {latency} seconds: 0 "
            "is the least"
        )
    scheduler = scheduler_for(reactor)
    one = _End(scheduler, buffer_size, latency)
    other = _End(scheduler, buffer_size, latency)
    one.peer, other.peer = other, one
    return one.protocol.stream, other.protocol.stream


class _End(Transport):
    """:ivar peer: the other one."""

    peer: _End

    def __init__(self, scheduler: Scheduler, buffer_size: int, latency: float) -> None:
        super().__init__(scheduler, buffer_size)
        self._latency = latency
        # When each thing arrives, and what it is: bytes, None for the end, or a reset.
        self._under_way: deque[tuple[float, Any]] = deque()
        self._arrival: Any = None
        # Whether to close once everything is sent.
        self._closes = False

    # To the other side

    def send(self, data: bytes) -> None:
        self._send(data)

    def send_eof(self) -> None:
        self._send(None)

    def _send(self, what: Any) -> None:
        self._under_way.append((self._reactor.seconds() + self._latency, what))
        self._await_arrival()

    def _await_arrival(self) -> None:
        if self._under_way and self._arrival is None:
            due = self._under_way[0][0] - self._reactor.seconds()
            self._arrival = self._reactor.callLater(max(0.0, due), self._arrives)

    def _arrives(self) -> None:
        now = self._reactor.seconds()
        # What is sent in answer to it arrives in the next turn, even without latency.
        for _ in range(len(self._under_way)):
            if not self._under_way or self._under_way[0][0] > now:
                break
            self.peer.arrives(self._under_way.popleft()[1])
        self._arrival = None
        self._await_arrival()

    def received(self, size: int) -> None:
        self.peer.sent(size)

    # From the other side

    def arrives(self, what: Any) -> None:
        if what is _RESET:
            # What has arrived before is not lost with the connection.
            self.producerState = "producing"
            self._deliver()
            self.lose(ConnectionLost(), "lost")
        elif self.ended is None:
            self.arrive(what)
        elif what is not None:
            self._send(_RESET)

    # The end

    def close(self) -> None:
        self._closes = self._full
        if not self._full and self.ended is None:
            if not self.half_closed:
                self.send_eof()
            self.lose(ConnectionDone(), "closed")

    def sent(self, size: int) -> None:
        super().sent(size)
        if self._closes:
            self.close()

    def abort(self) -> None:
        if self.ended is None:
            self._under_way.clear()
            self._send(_RESET)
            self.lose(ConnectionAborted(), "aborted")
