"""
The input of a stream: what has arrived, and the task that reads it.

A protocol feeds it (see ``connections.py``), and it finishes the operation of the task
that waits for the data.  It knows nothing of how the transport works.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, Final

from twisted.internet.error import ConnectionClosed, ConnectionDone

from twisted_rtsig.coro.buffers import ReadBuffer
from twisted_rtsig.coro.errors import BusyResourceError, IncompleteRead, StreamError
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.interfaces import Transport
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import Finished, Operation, failed
from twisted_rtsig.coro.output import unread_input
from twisted_rtsig.coro.pending import again
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.selection import select
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.takes import (
    CARRIAGE_RETURN,
    Take,
    take_exactly,
    take_line,
    take_match,
    take_peeked,
    take_some,
    take_until,
    wanted,
)

MAX_BYTES: Final = 1 << 16
"""How much a read returns at most, or a delimiter may be away, by default."""

# The transport is paused when no task reads and more than this has arrived, until half
# of it was read.
_HIGH_MARK = 1 << 17
_LOW_MARK = _HIGH_MARK // 2

# Within so many turns the reactor looks once at each socket.
TURNS_TO_RECEIVE: Final = 2

# The kernel holds data, and for so many turns in a row nothing of it arrives: a
# protocol below the stream, which limits the rate for example, has paused the
# transport.
_MOST_TURNS_TO_RECEIVE: Final = 100

# How many reads in a row are answered at once from the buffer, before other tasks and
# the reactor have their turn.
_READS_IN_A_TURN = 256


class StreamInput:
    """The part of a :class:`Stream` that reads."""

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_buffer",
        "_closing",
        "_ended",
        "_limit",
        "_lost",
        "_paused",
        "_reader",
        "_reads_left",
        "_scheduler",
        "_take",
        "_what",
        "transport",
    )

    def __init__(self, transport: Any, scheduler: Scheduler) -> None:
        self.transport: Transport = transport
        self._scheduler = scheduler
        self._buffer = ReadBuffer()
        # The read that waits; the function that takes its data from the buffer, and
        # two arguments of that function.
        self._reader: Operation[bytes] | None = None
        self._take: Take = take_some
        self._what: Any = None
        self._limit = 0
        # How many more reads are answered at once; 0 while a read waits.
        self._reads_left = _READS_IN_A_TURN
        # Whether the transport is paused.
        self._paused = False
        # Whether the input has ended: nothing more will arrive.
        self._ended = False
        # Why the connection is gone; None while there is one.
        self._lost: Exception | None = None
        # Whether this side has closed the connection: what arrives is discarded.
        self._closing = False
        # In how many pieces data has arrived.
        self._arrived = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive.  There may be data left to read."""
        return self._ended

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost is not None

    @property
    def unfinished_read(self) -> object:
        """The read of whose data a part has arrived; None if there is none."""
        return self._reader if self._buffer.data else None

    @property
    def waits_for_first_byte(self) -> bool:
        """Whether a read waits, and nothing has ever arrived."""
        return self._reader is not None and not self._arrived

    # Reading

    @must_be_awaited
    def read(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        Return what has arrived, as soon as there is any: 1 to ``max_bytes`` bytes.
        At the end of the stream, return no bytes.

        :raises ConnectionLost: if the connection was lost in an unclean way.
        """
        if (
            self._buffer.data
            or self._reader is not None
            or self._ended
            or max_bytes < 1
        ):
            return self._read(take_some, None, max_bytes)
        # The most frequent wait, as at the end of _read.  The transport is not paused
        # while the buffer is empty.
        self._take = take_some
        self._limit = max_bytes
        self._reads_left = 0
        reading: Operation[bytes] = Operation()
        reading.owner = self
        self._reader = reading
        return reading

    @must_be_awaited
    def peek(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """As :meth:`read`, but the data stays in the stream, to be read again."""
        return self._read(take_peeked, None, max_bytes)

    @must_be_awaited
    def read_exactly(self, size: int) -> Operation[bytes]:
        """
        Return the next ``size`` bytes.

        :raises IncompleteRead: if the stream ends before.
        """
        if size <= 0:
            if size < 0:
                raise ValueError(f"cannot read {size} bytes: 0 is the least")
            nothing: Finished[bytes] = Finished()
            nothing.result = b""
            return nothing
        buffer = self._buffer
        data, start = buffer.data, buffer.start
        end = start + size
        if (
            # As in read_line.
            end < len(data)
            and type(data) is bytes
            and self._reads_left
            and not self._paused
        ):
            finished: Finished[bytes] = Finished()
            finished.result = data[start:end]
            buffer.start = end
            self._reads_left -= 1
            return finished
        return self._read(take_exactly, None, size)

    @must_be_awaited
    def read_until(
        self, delimiter: bytes, max_bytes: int = MAX_BYTES
    ) -> Operation[bytes]:
        """
        Return what comes before ``delimiter``.  The delimiter is read as well, but not
        returned.

        :param max_bytes: how many bytes may come before it.
        :raises DelimiterNotFound: if it does not begin within the limit.
        :raises IncompleteRead: if the stream ends before.
        """
        if not delimiter:
            raise ValueError("cannot read until an empty delimiter: use read()")
        if type(delimiter) is not bytes:
            delimiter = bytes(memoryview(delimiter))
        return self._read(take_until, delimiter, max_bytes)

    @must_be_awaited
    def read_line(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        Return the next line, without the ``\\n`` or ``\\r\\n`` at its end.

        :param max_bytes: how long the line may be.
        :raises DelimiterNotFound: if it is longer.
        :raises IncompleteRead: if the stream ends before.
        """
        buffer = self._buffer
        data = buffer.data
        if (
            # The most frequent read: the line has arrived, more data is behind it, and
            # all is one piece.
            data
            and type(data) is bytes
            and self._reads_left
            and not self._paused
            and max_bytes > 0
        ):
            start = buffer.start
            end = data.find(b"\n", start, start + max_bytes + 1)
            if 0 <= end < len(data) - 1:
                self._reads_left -= 1
                buffer.start = end + 1
                if data[end - 1] == CARRIAGE_RETURN and end > start:
                    end -= 1
                finished: Finished[bytes] = Finished()
                finished.result = data[start:end]
                return finished
        return self._read(take_line, None, max_bytes)

    @must_be_awaited
    def read_until_regex(
        self, pattern: bytes | re.Pattern[bytes], max_bytes: int = MAX_BYTES
    ) -> Operation[bytes]:
        """
        Return everything up to the end of the first match of a regular expression.

        What has arrived is searched again whenever more arrives, and the first
        match counts, even if more data would make it longer.

        :param max_bytes: within how many bytes the match must end.
        :raises DelimiterNotFound: if it does not.
        :raises IncompleteRead: if the stream ends before.
        """
        compiled = re.compile(pattern)
        if not isinstance(compiled.pattern, bytes):
            raise TypeError(f"{pattern!r} matches text, and a stream consists of bytes")
        return self._read(take_match, compiled, max_bytes)

    async def lines(
        self, max_bytes: int = MAX_BYTES, until: Event | None = None
    ) -> AsyncIterator[bytes]:
        """
        Iterate over the lines, as :meth:`read_line` returns them, until the stream
        ends::

            async for line in stream.lines():

        :param until: end also when this event happens, for example
            :attr:`Stream.stopping`: after the lines that this system has received as a
            whole by then.  The rest stays in the stream.
        :raises IncompleteRead: if it ends in the middle of a line.
        """
        while until is None or not until.is_set:
            reading = self.read_line(max_bytes)
            try:
                if until is not None and not await _first(reading, until):
                    break
                line = await reading
            except IncompleteRead as end:
                if end.partial:
                    raise
                return
            yield line
        # The peer could not know of the event when it sent what the kernel holds now,
        # so these lines are read as well.  With TLS the kernel holds more bytes than
        # the text has.
        held = unread_input(self.transport) or 0
        left = self._buffer.size + held
        for _ in range(TURNS_TO_RECEIVE):
            await sleep(0, self._scheduler.reactor)
        # Not all kernels tell how much they hold, and the reactor may have received
        # some of it meanwhile.
        left = max(left, self._buffer.size)
        while left > 0:
            reading = self.read_line(max_bytes)
            if not await self._is_received(reading):
                return
            try:
                line = await reading
            except IncompleteRead as end:
                self._buffer.append(end.partial)
                return
            left -= len(line) + 1
            yield line

    async def _is_received(self, reading: Operation[bytes]) -> bool:
        """
        Whether a read is done once the transport has delivered what the kernel holds.
        If not, the read is cancelled.
        """
        turns, arrived = 0, self._arrived
        try:
            while not reading.called:
                if self._arrived != arrived:
                    turns, arrived = 0, self._arrived
                if (
                    self._closing
                    or turns >= _MOST_TURNS_TO_RECEIVE
                    or (turns >= TURNS_TO_RECEIVE and not unread_input(self.transport))
                ):
                    reading.cancel()
                    return False
                turns += 1
                await sleep(0, self._scheduler.reactor)
        except GeneratorExit:
            # Nothing can be resumed any more, and cancelling the read would try to.
            raise
        except BaseException:
            reading.cancel()
            raise
        return True

    def _read(self, take: Take, what: Any, limit: int) -> Operation[bytes]:
        if limit < 1:
            raise ValueError(f"max_bytes={limit}: 1 is the least that can be read")
        if self._reader is not None:
            raise BusyResourceError(
                f"another task reads from {self!r} already: let one task read, and "
                "pass on what it has read"
            )
        if self._buffer.data or self._ended:
            if not self._reads_left:
                self._scheduler.next_turn(self._serve_reader)
            else:
                try:
                    data = take(self, what, limit)
                except (StreamError, ConnectionClosed) as error:
                    # As in _serve_reader.
                    return failed(error.with_traceback(None))
                if data is not None:
                    self._reads_left -= 1
                    if self._paused and self._buffer.size <= _LOW_MARK:
                        self._resume_transport()
                    finished: Finished[bytes] = Finished()
                    finished.result = data
                    return finished
        self._take = take
        self._what = what
        self._limit = limit
        self._reads_left = 0
        reading: Operation[bytes] = Operation()
        reading.owner = self
        self._reader = reading
        if self._paused:
            self._resume_transport()
        return reading

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        if operation is self._reader:
            self._forget_reader()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"{wanted(self._take, self._what, self._limit)} from {self!r}"

    def _forget_reader(self) -> None:
        self._reader = None
        self._reads_left = _READS_IN_A_TURN

    def _serve_reader(self) -> None:
        reader = self._reader
        if reader is None:
            return
        try:
            data = self._take(self, self._what, self._limit)
        except Exception as error:
            # Also an error about a wrong argument of the read: it must reach the task
            # that reads, and not the transport.
            self._forget_reader()
            # If this side has closed the connection, as at the end of a handler, a read
            # that is still pending fails without a log line.  The traceback would keep
            # the frames here, which lead back to the error.
            reader.fail(error.with_traceback(None), quietly=self._closing)
        else:
            if data is not None:
                self._forget_reader()
                reader.succeed(data)

    def _resume_transport(self) -> None:
        self._paused = False
        self.transport.resumeProducing()

    def _incomplete(self, wanted: str) -> Exception:
        partial = self._buffer.take(self._buffer.size)
        lost = self._unclean()
        if lost is not None and not partial:
            return lost
        error = IncompleteRead(partial, wanted)
        error.__cause__ = lost
        return error

    def _unclean(self) -> Exception | None:
        """Why the connection was lost; None if it was closed in a clean way."""
        lost = self._lost
        if lost is None or isinstance(lost, ConnectionDone):
            return None
        return again(lost)

    # From the protocol

    def feed(self, data: bytes) -> None:
        """Data has arrived."""
        self._arrived += 1
        reader = self._reader
        buffer = self._buffer
        if reader is None:
            if self._closing:
                return
            buffer.append(data)
        elif self._take is take_some and len(data) <= self._limit and not buffer.data:
            self._reader = None
            self._reads_left = _READS_IN_A_TURN
            reader.succeed(data)
            return
        else:
            buffer.append(data)
            self._serve_reader()
        if self._reader is None and not self._paused and buffer.size > _HIGH_MARK:
            self._paused = True
            self.transport.pauseProducing()

    def feed_eof(self) -> None:
        """The input has ended: nothing more will arrive."""
        self._ended = True
        self._serve_reader()


async def _first(reading: Operation[bytes], event: Event) -> bool:
    """Whether a read is done before an event happens; if not, the read is cancelled."""
    if not reading.called:
        try:
            await select(reading, event)
        except GeneratorExit:
            # Nothing can be resumed any more, and cancelling the read would try to.
            raise
        except BaseException:
            reading.cancel()
            raise
        if not reading.called:
            reading.cancel()
            return False
    return True
