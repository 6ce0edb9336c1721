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

# How often the watchdog looks within its shortest limit.
_LOOKS: Final = 4

# How many streams are looked at before the reactor has its turn: about a millisecond.
_BATCH: Final = 500


class TimeLimits(NamedTuple):
    """Seconds; None for no limit.  See ``CoroutineFactory``."""

    first_byte: float | None = None
    idle: float | None = None
    read: float | None = None
    write: float | None = None


class Watchdog:
    """
    Ends connections that exceed one of the time limits, by one delayed call for all.

    It looks at each stream several times within a limit, and counts the looks between
    which there was no sign of life.  So a process that was stopped for a while, or a
    clock that was set, does not end connections.

    :param streams: those to look at.
    :param exceeded: called with a stream, and the error with which to end it.
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
        # Of this look.
        self._left: list[Stream] = []
        self._call: Any = None

    def start(self, reactor: Any) -> None:
        """There is a stream to look at."""
        if self._call is None and self._interval < math.inf:
            self._call = reactor.callLater(self._interval, self._look, reactor)

    def stop(self) -> None:
        """There is none; it does not look again."""
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
                    # Of a transport, or a protocol between it and the stream.
                    self._failures.tell(
                        reactor.seconds(), stream=stream, log_failure=Failure()
                    )
        if self._stopped:
            # All were ended.
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
        limits = self._limits
        reading = stream.unfinished_read
        # What begins after this look is seen in the next one at the earliest.
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
            name, what = "first_byte_timeout", "the peer has sent nothing"
            seconds = limits.first_byte
        elif now - signs.reading_since >= self._read:
            name, what = "read_timeout", "the rest of a message has not arrived"
            seconds = limits.read
        elif now - signs.taken_at >= self._write:
            name, what = "write_timeout", "the peer has taken nothing of the output"
            seconds = limits.write
        elif now - signs.alive >= self._idle:
            name, what = "idle_timeout", "nothing was sent or received"
            seconds = limits.idle
        else:
            return
        error = ConnectionAborted(f"{what} for {seconds} s ({name})")
        self._exceeded(stream, name, error)


def handshake_is_pending(stream: Stream) -> bool:
    """Whether there is TLS whose handshake is not done; it has a limit of its own."""
    return handshake_is_done(stream.transport) is False


class Signs:
    """
    The signs of life of a stream: what the watchdog has seen, and in which look.

    :ivar pending: how many bytes the transport and the kernel held.
    :ivar sent: how many bytes the kernel had taken.
    :ivar received: and how many of these the peer had taken.
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
        """Look at a stream; return whether anything was sent or received."""
        activity = stream.activity
        # What is written before the TLS handshake is done is pending nowhere else.
        nothing_pending = self.pending == _NOTHING_PENDING and not stream.full
        if activity == self.activity and nothing_pending:
            # All was taken before, and nothing was written since: the kernel need not
            # be asked.
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
        # What TLS holds has grown by the encryption, so that this is too little.  It
        # grows nevertheless when something is sent; unless as much was written at the
        # same time that the encryption has added more, which the room for output allows
        # only now and then.
        sent = stream.written - held + stream.resumed
        return sent, sent - queue


_NOTHING_PENDING: Final = (0, 0)


def pending_of(stream: Stream) -> tuple[int, int]:
    """
    As ``pending_output``.  A transport that does not tell how much it holds tells when
    it has no room; of such a one, as much as was written.
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
