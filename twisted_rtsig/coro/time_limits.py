"""
How long a server waits for its peers: the limits, and the watchdog that ends the
connections which exceed them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.internet.error import ConnectionAborted
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.coro.notices import Notice
from twisted_rtsig.coro.output import pending_output
from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.coro.tls import handshake_is_done

if TYPE_CHECKING:
    from twisted_rtsig.coro.streams import Stream

_log = Logger()

IDLE_TIMEOUT: Final = 3600.0
"""Seconds in which nothing is sent or received, by default."""

FIRST_BYTE_TIMEOUT: Final = 60.0
"""Seconds in which a new peer sends nothing though a read waits, by default."""

WRITE_TIMEOUT: Final = 120.0
"""
Seconds in which a peer takes nothing of what was written, by default: long enough for a
system that acknowledges in steps, each of which is a part of a large receive buffer.
"""

# The limits by their names in TimeLimits, and what has not happened.
_FIRST_BYTE: Final = "first_byte", "the peer has sent nothing"
_READ: Final = "read", "the rest of a message has not arrived"
_WRITE: Final = "write", "the peer has taken nothing of the output"
_IDLE: Final = "idle", "nothing was sent or received"

# How often the watchdog looks within its shortest limit.
_LOOKS: Final = 4

# How many streams are looked at before the reactor has its turn: about a millisecond.
_BATCH: Final = 500


class TimeLimits(NamedTuple):
    """Seconds; None for no limit.  See :class:`CoroutineFactory`."""

    first_byte: float | None = None
    idle: float | None = None
    read: float | None = None
    write: float | None = None


class Watchdog:
    """
    Ends connections that exceed one of the time limits, with one delayed call for all
    of them.

    It looks at each stream several times within a limit, and counts the looks in a row
    without a sign of life.  So no connection is ended because the process was stopped
    for a while, or the clock was set.

    :param limits: the time limits.
    :param streams: returns the streams to look at.
    :param exceeded: called with a stream, the name of the limit, and the error with
        which to end the stream.
    """

    def __init__(
        self,
        limits: TimeLimits,
        streams: Callable[[], Collection[Stream]],
        exceeded: Callable[[Stream, str, Exception], None],
    ) -> None:
        self._limits = limits
        self._streams = streams
        self._exceeded = exceeded
        shortest = min((each for each in limits if each is not None), default=math.inf)
        self._interval = shortest / _LOOKS
        # After how many looks a limit is exceeded.
        self._first_byte, self._idle, self._read, self._write = (
            math.inf if each is None else math.ceil(each / self._interval)
            for each in limits
        )
        self._look_number = 0
        self._stopped = False
        self._failures = Notice(_log.error, "{stream}: the limits cannot be applied")
        # The streams that are still to be looked at in this look.
        self._left: list[Stream] = []
        self._call: Any = None

    def start(self, reactor: Any) -> None:
        """Look from now on: there is a stream."""
        if self._call is None and self._interval < math.inf:
            self._call = reactor.callLater(self._interval, self._look, reactor)

    def stop(self) -> None:
        """Never look again: there is no stream."""
        self._stopped = True
        self._left.clear()
        call, self._call = self._call, None
        cancel_call(call)

    def _look(self, reactor: Any) -> None:
        self._look_number += 1
        self._left.extend(self._streams())
        self._look_on(reactor)

    def _look_on(self, reactor: Any) -> None:
        self._call = None
        batch = self._left[-_BATCH:]
        del self._left[-_BATCH:]
        for stream in batch:
            if not stream.lost and stream.timed_out is None:
                try:
                    self._look_at(stream)
                except Exception:
                    # An error of a transport, or of a protocol between it and the
                    # stream.
                    self._failures.tell(
                        reactor.seconds(), stream=stream, log_failure=Failure()
                    )
        if self._stopped:
            # All streams were ended.
            return
        if self._left:
            self._call = reactor.callLater(0, self._look_on, reactor)
        elif self._streams():
            self.start(reactor)

    def _look_at(self, stream: Stream) -> None:
        now = self._look_number
        signs = stream.signs
        if signs is None:
            stream.signs = Signs(stream, now)
            return
        alive = signs.update(stream, now)
        reading = stream.unfinished_read
        # A read that begins after this look is seen in the next one at the earliest.
        if reading is None:
            signs.reading_since = now + 1
        elif reading is not signs.reading:
            signs.reading_since = now
        signs.reading = reading
        if not stream.waits_for_first_byte or handshake_is_pending(stream):
            signs.silent_since = now + 1
        elif alive:
            signs.silent_since = now
        if now - signs.silent_since >= self._first_byte:
            exceeded = _FIRST_BYTE
        elif now - signs.reading_since >= self._read:
            exceeded = _READ
        elif now - signs.taken_at >= self._write:
            exceeded = _WRITE
        elif now - signs.alive >= self._idle:
            exceeded = _IDLE
        else:
            return
        limit, what = exceeded
        name = f"{limit}_timeout"
        seconds = getattr(self._limits, limit)
        error = ConnectionAborted(f"{what} for {seconds} s ({name})")
        self._exceeded(stream, name, error)


def handshake_is_pending(stream: Stream) -> bool:
    """Whether there is a TLS handshake that is not done.  It has its own limit."""
    return handshake_is_done(stream.transport) is False


class Signs:
    """
    The signs of life of a stream: what the watchdog has seen, and in which look.

    :ivar activity: the ``activity`` of the stream.
    :ivar pending: how many bytes the transport and the kernel held.
    :ivar sent: how many bytes the kernel had taken from the transport.
    :ivar received: how many of these the peer had taken.
    :ivar alive: the last look in which anything was sent or received.
    :ivar taken_at: the last look in which the peer took output, or there was none.
    :ivar reading: the read that waited for the rest of its data; None without one.
    :ivar reading_since: the look in which that read was first seen.
    :ivar silent_since: the look since which a read waits for the first byte.
    """

    __slots__ = (
        "activity",
        "alive",
        "pending",
        "reading",
        "reading_since",
        "received",
        "sent",
        "silent_since",
        "taken_at",
    )

    def __init__(self, stream: Stream, now: int) -> None:
        self.activity: int = stream.activity
        self.pending: tuple[int, int] = pending_of(stream)
        sent, received = self._progress(stream)
        self.sent: int = sent
        self.received: int = received
        self.alive: int = now
        self.taken_at: int = now
        self.reading_since: int = now
        self.silent_since: int = now
        self.reading: object = None

    def update(self, stream: Stream, now: int) -> bool:
        """Look at a stream; return whether anything was sent or received since then."""
        activity = stream.activity
        # What is written before the TLS handshake is done is held by TLS alone, and
        # only ``full`` tells of it.
        nothing_pending = self.pending == _NOTHING_PENDING and not stream.full
        if activity == self.activity and nothing_pending:
            # The peer had taken everything, and nothing was written since: there is no
            # need to ask the kernel.
            self.taken_at = now + 1
            return False
        pending, self.pending = self.pending, pending_of(stream)
        alive = activity != self.activity or pending != self.pending
        if alive:
            self.alive = now
        sent, received = self._progress(stream)
        if self.pending == _NOTHING_PENDING:
            self.taken_at = now + 1
        elif sent > self.sent or received > self.received:
            self.taken_at = now
        self.activity, self.sent, self.received = activity, sent, received
        return alive

    def _progress(self, stream: Stream) -> tuple[int, int]:
        held, queue = self.pending
        # Encryption makes the held data longer, so this result is too small.  But it
        # grows whenever something is sent.  It does not if so much was written at the
        # same time that the encryption has added more than was sent, which the limited
        # room for output allows only now and then.
        sent = stream.written - held + stream.resumed
        return sent, sent - queue


_NOTHING_PENDING: Final = (0, 0)


def pending_of(stream: Stream) -> tuple[int, int]:
    """
    As ``pending_output``.  A transport that does not tell how much it holds does tell
    when it has no room: then everything that was written counts as held.
    """
    pending = pending_output(stream.transport)
    if pending is None:
        return (stream.written if stream.full else 0), 0
    return pending


def check_timeouts(**timeouts: float | None) -> None:
    """:raises ValueError: if one of the times is not more than 0."""
    for name, seconds in timeouts.items():
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name}={seconds}: it must be more than 0, or None")
