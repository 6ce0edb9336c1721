"""
Streams: a connection, to read from and to write to, from the top to the bottom.

A stream knows no transport's inner life.  It is fed by a protocol (see
``serving.py``), and finishes the operation of whoever waits for the data.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from twisted.internet.error import ConnectionClosed, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IHandshakeListener,
    IPushProducer,
    ISSLTransport,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_rtsig.coro.buffers import ReadBuffer
from twisted_rtsig.coro.errors import (
    BusyResourceError,
    DelimiterNotFound,
    IncompleteRead,
    StreamError,
    TLSError,
    UnreadPlaintext,
)
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.interfaces import Address, Transport
from twisted_rtsig.coro.limits import (
    Signs,
    TimeLimits,
    Watchdog,
    pending_of,
)
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import (
    Done,
    Finished,
    Operation,
    Wait,
    failed,
    ignore,
)
from twisted_rtsig.coro.output import (
    below_tls,
    handshake_is_done,
    tls_is_over,
    tls_layer,
    unread_input,
)
from twisted_rtsig.coro.scheduler import Scheduler, cancel_call
from twisted_rtsig.coro.selection import select
from twisted_rtsig.coro.sending import Sending
from twisted_rtsig.coro.tasks import sleep
from twisted_rtsig.coro.tls import TLSInfo, tls_info

if TYPE_CHECKING:
    from twisted_rtsig.files.asyncfile import AsyncFile

_log = Logger()

MAX_BYTES: Final = 1 << 16
"""How much a read returns at most, or a delimiter may be away, by default."""

# Nobody reads, and this much is there: the transport is paused, until half of it
# was read.
_HIGH_MARK = 1 << 17
_LOW_MARK = _HIGH_MARK // 2

_CARRIAGE_RETURN = 0x0D


class TLSLimits(NamedTuple):
    """
    How many seconds a TLS peer may take for the handshake, and to answer the
    ``close_notify`` alert; None for no limit.
    """

    handshake: float | None
    close: float | None


DEFAULT_TLS_LIMITS: Final = TLSLimits(handshake=30.0, close=30.0)
"""Those of every connection, unless it is told otherwise."""

# Within so many turns the reactor looks once at each socket.
TURNS_TO_RECEIVE: Final = 2

# In so many turns in a row nothing arrives of what the kernel holds: a protocol below
# the stream, which limits the rate for example, has paused the transport.
_MOST_TURNS_TO_RECEIVE: Final = 100

# Every so many seconds a handshake that is not reported is looked for.
_LOOK_FOR_HANDSHAKE = 0.02

# How many reads in a row a stream answers from what is there, before all others
# have their turn.
_READS_IN_A_TURN = 256


@implementer(IPushProducer)
class Stream:
    """
    A connection.  Made by ``CoroutineFactory``, ``serve`` and ``connect``.

    Reads return what they have read, and leave the stream as it is when they
    are cancelled.  Only one task at a time reads; any number may write.

    :ivar transport: the Twisted transport.
    :ivar signs: what the watchdog has seen of it.
    :ivar written: how many bytes were written to the transport.
    :ivar full: whether the transport has no room for more.
    :ivar resumed: how often it had room again.
    """

    __slots__ = (
        "__weakref__",
        "_abort_reason",
        "_aborted",
        "_arrived",
        "_buffer",
        "_closed",
        "_closing",
        "_cut_short",
        "_drained",
        "_ended",
        "_handshake",
        "_held",
        "_limit",
        "_lost",
        "_output_finished",
        "_output_lost",
        "_paused",
        "_reader",
        "_reads_left",
        "_scheduler",
        "_secured",
        "_sending",
        "_stopping",
        "_take",
        "_tls_close",
        "_tls_limits",
        "_unwritable",
        "_watchdog",
        "_what",
        "_write_timeout",
        "_wrote_eof",
        "full",
        "resumed",
        "signs",
        "transport",
        "written",
    )

    def __init__(
        self,
        transport: Any,
        scheduler: Scheduler,
        tls_limits: TLSLimits = DEFAULT_TLS_LIMITS,
        stopping: Event | None = None,
        write_timeout: float | None = None,
    ) -> None:
        """
        :param write_timeout: from ``close`` on, where no server has a watchdog that
            looks at this stream; as for ``connect``.
        """
        self.transport: Transport = transport
        self._stopping = stopping
        self._write_timeout = write_timeout
        self._watchdog: Watchdog | None = None
        self.signs: Signs | None = None
        self._scheduler = scheduler
        self._tls_limits = tls_limits
        # The delayed calls that end a TLS handshake, and the wait for close_notify.
        self._handshake: Any = None
        self._tls_close: Any = None
        self._buffer = ReadBuffer()
        # Who reads; and what takes it from the buffer, with two arguments.
        self._reader: Operation[bytes] | None = None
        self._take: _Take = _take_some
        self._what: Any = None
        self._limit = 0
        # How many more reads are answered at once; 0 while somebody reads.
        self._reads_left = _READS_IN_A_TURN
        self._paused = False
        # Nothing more will come.
        self._ended = False
        # Why there is no connection any more.
        self._lost: Exception | None = None
        self.full: bool = False
        # Operations that wait for room, for the end of all output, for the end of the
        # connection, and for the TLS handshake.
        self._drained = _NO_OPERATIONS
        self._wrote_eof: _Operations | None = None
        self._output_finished = False
        self._closed = _NO_OPERATIONS
        self._secured = _NO_OPERATIONS
        self._closing = False
        # Why nothing can be written any more; and why nothing arrives.
        self._unwritable: Exception | None = None
        self._output_lost: Exception | None = None
        self._aborted = False
        # The error to report in place of the transport's.
        self._abort_reason: Exception | None = None
        # The file that is being sent, and what follows it.
        self._sending: Sending | None = None
        self._held = _NOTHING
        # A send_file that failed because the file was closed.
        self._cut_short: Operation[int] | None = None
        # In how many pieces something has arrived.
        self._arrived = 0
        self.written: int = 0
        self.resumed: int = 0

    @property
    def peer(self) -> Address:
        """
        The address of the other side: an ``IPv4Address``, an ``IPv6Address`` or a
        ``UNIXAddress``.

        Without a socket, as between processes and in tests, it is what ``getPeer`` of
        the transport returns.
        """
        return cast(Address, self.transport.getPeer())

    @property
    def host(self) -> Address:
        """The address of this side, as :attr:`peer` is of the other."""
        return cast(Address, self.transport.getHost())

    @property
    def ended(self) -> bool:
        """Whether nothing more will come; there may be something left to read."""
        return self._ended

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost is not None

    @property
    def stopping(self) -> Event:
        """
        Happens when the server begins to stop: :class:`CoroutineFactory` and
        :class:`Server` have the same.  That of a client, or of a stream in a test,
        does not happen unless the program sets it.
        """
        if self._stopping is None:
            self._stopping = Event()
        return self._stopping

    @property
    def tls(self) -> TLSInfo | None:
        """
        What the TLS handshake has negotiated, the peer's certificate among it.  None
        if the stream is not encrypted, if the handshake is not done yet, which
        :meth:`handshake` waits for, and once the connection is lost.
        """
        return None if self._lost is not None else tls_info(self.transport)

    @property
    def unfinished_read(self) -> object:
        """The read that waits for the rest of what it wants; None if none does."""
        return self._reader if self._buffer.data else None

    @property
    def waits_for_first_byte(self) -> bool:
        """Whether a read waits, and nothing has ever arrived."""
        return self._reader is not None and not self._arrived

    @property
    def activity(self) -> int:
        """Changes whenever anything comes or goes."""
        return self._arrived + self.written + self.resumed

    @property
    def timed_out(self) -> Exception | None:
        """The time limit that has ended the connection, as an error; or None."""
        return self._abort_reason

    # Reading

    @must_be_awaited
    def read(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        What has arrived, as soon as that is anything: 1 to ``max_bytes`` bytes.
        At the end of the stream, no bytes.

        :raises ConnectionLost: if the connection was lost in an unclean way.
        """
        if (
            self._buffer.data
            or self._reader is not None
            or self._ended
            or max_bytes < 1
        ):
            return self._read(_take_some, None, max_bytes)
        # The most frequent wait of all: as at the end of _read, but the transport
        # is not paused where nothing has come.
        self._take = _take_some
        self._limit = max_bytes
        self._reads_left = 0
        reading: Operation[bytes] = Operation()
        reading.owner = self
        self._reader = reading
        return reading

    @must_be_awaited
    def peek(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """As :meth:`read`, of what stays there to be read again."""
        return self._read(_look, None, max_bytes)

    @must_be_awaited
    def read_exactly(self, size: int) -> Operation[bytes]:
        """
        The next ``size`` bytes.

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
        return self._read(_take_exactly, None, size)

    @must_be_awaited
    def read_until(
        self, delimiter: bytes, max_bytes: int = MAX_BYTES
    ) -> Operation[bytes]:
        """
        What comes before ``delimiter``, which is read as well but not returned.

        :param max_bytes: how many bytes may come before it.
        :raises DelimiterNotFound: if it does not begin within the limit.
        :raises IncompleteRead: if the stream ends before.
        """
        if not delimiter:
            raise ValueError("cannot read until an empty delimiter: use read()")
        if type(delimiter) is not bytes:
            delimiter = bytes(memoryview(delimiter))
        return self._read(_take_until, delimiter, max_bytes)

    @must_be_awaited
    def read_line(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        The next line, without the ``\\n`` or ``\\r\\n`` at its end.

        :param max_bytes: how long the line may be.
        :raises DelimiterNotFound: if it is longer.
        :raises IncompleteRead: if the stream ends before.
        """
        buffer = self._buffer
        data = buffer.data
        if (
            # The most frequent read of all: it is there, with more behind it, and
            # in one piece.
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
                if data[end - 1] == _CARRIAGE_RETURN and end > start:
                    end -= 1
                finished: Finished[bytes] = Finished()
                finished.result = data[start:end]
                return finished
        return self._read(_take_line, None, max_bytes)

    @must_be_awaited
    def read_until_regex(
        self, pattern: bytes | re.Pattern[bytes], max_bytes: int = MAX_BYTES
    ) -> Operation[bytes]:
        """
        Everything up to the end of the first match of a regular expression.

        What has arrived is searched again whenever more arrives, and the first
        match counts, even if more data would make it longer.

        :param max_bytes: within how many bytes the match must end.
        :raises DelimiterNotFound: if it does not.
        :raises IncompleteRead: if the stream ends before.
        """
        compiled = re.compile(pattern)
        if not isinstance(compiled.pattern, bytes):
            raise TypeError(f"{pattern!r} matches text, and a stream consists of bytes")
        return self._read(_take_match, compiled, max_bytes)

    async def lines(
        self, max_bytes: int = MAX_BYTES, until: Event | None = None
    ) -> AsyncIterator[bytes]:
        """
        Each line, as :meth:`read_line` returns it, until the stream ends::

            async for line in stream.lines():

        :param until: end also when this happens, for example :attr:`stopping`, after
            the lines that this system has received whole by then; the rest stays in
            the stream.
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
        # The peer could not know of the event when it sent what the kernel holds now.
        # Encryption makes that more than the text in it.
        held = unread_input(self.transport) or 0
        left = self._buffer.size + held
        for _ in range(TURNS_TO_RECEIVE):
            await sleep(0, self._scheduler.reactor)
        # Not all kernels tell, and a reactor may have taken something from it already.
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
        Whether a read is done when the transport has delivered what the kernel holds;
        if not, it is cancelled.
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
            # Nothing can be resumed any more, and to cancel the read would try to.
            raise
        except BaseException:
            reading.cancel()
            raise
        return True

    def _read(self, take: _Take, what: Any, limit: int) -> Operation[bytes]:
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
        else:
            # They would pile up if one tried again and again.
            self._drained.pop(operation, None)
            self._closed.pop(operation, None)
            self._secured.pop(operation, None)
            if self._wrote_eof is not None:
                self._wrote_eof.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        if operation is self._reader:
            return f"{_wanted(self._take, self._what, self._limit)} from {self!r}"
        if operation in self._secured:
            return f"the TLS handshake of {self!r}"
        if operation in self._closed:
            return f"the end of {self!r}"
        if operation in (self._wrote_eof or ()):
            return f"everything to be sent to {self!r}"
        return f"room to write to {self!r}"

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
            # Also what is wrong with its arguments: it is the reader's error, and
            # not that of the transport.
            self._forget_reader()
            # A read that was left behind says nothing if this side has ended the
            # connection, as it has when a handler has ended.  The traceback would keep
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
        """Why the connection was lost, if it was not simply closed."""
        lost = self._lost
        if lost is None or isinstance(lost, ConnectionDone):
            return None
        return _again(lost)

    # Writing

    def write(self, data: bytes | bytearray | memoryview) -> Operation[None]:
        """
        Write.  The operation is done when there is room for more: to wait for it
        keeps a peer that does not read from filling the memory.

        :raises ConnectionClosed: (when awaited) if the connection is lost.
        :raises StreamError: (when awaited) after ``close`` or ``write_eof``.
        """
        if self._unwritable is not None:
            return failed(_again(self._unwritable), quietly=True)
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        if self._sending is not None:
            held = self._operation()
            self._held.append((data, held))
            return held
        self.written += len(data)
        self.transport.write(data)
        if not self.full:
            done: Operation[None] = Done()
            return done
        return self._until_resumed()

    def send_file(
        self,
        file: AsyncFile,
        offset: int = 0,
        count: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Operation[int]:
        """
        Send a part of a file, in turn with what is written before and after this.
        The file's position stays where it is.

        The operation is done when all of it was sent, or can be, and its result is
        how many bytes that were.  If it fails or is cancelled in the middle, nothing
        more can be written, since the peer would take it for a part of the file.

        :param count: how much; by default up to the end of the file.
        :param progress: called with how much was sent by now, again and again.
        :raises FileEnded: (when awaited) if the file is shorter.
        :raises OSError: (when awaited) if it cannot be read.
        :raises ConnectionClosed: (when awaited) if the connection is lost.
        """
        for name, value in (("offset", offset), ("count", count or 0)):
            if value < 0:
                raise ValueError(f"{name}={value}: 0 is the least")
        if self._unwritable is not None:
            return failed(_again(self._unwritable), quietly=True)
        sending = Sending(self, file, offset, count, progress)
        if self._sending is None:
            self._sending = sending
            self._held = deque()
            sending.begin()
        else:
            self._held.append(sending)
        return sending.operation

    def write_eof(self) -> Operation[None]:
        """
        Tell the peer that nothing more will come.  One can still read.

        The operation is done when everything was sent.

        :raises StreamError: if the transport has no half close: TLS, for example.
        """
        if self._unwritable is None:
            lose = getattr(self.transport, "loseWriteConnection", None)
            if lose is None or ISSLTransport.providedBy(self.transport):
                raise StreamError(
                    f"{self!r} has no half close: use close(), or let the protocol "
                    "tell the peer that nothing more comes"
                )
            self._wrote_eof = {}
            self._unwritable = StreamError("nothing can be written after write_eof()")
            self._after_files(self._half_close)
        if self._output_finished:
            done: Operation[None] = Done()
            return done
        if self._wrote_eof is None or self._output_lost is not None:
            return failed(_again(self._unwritable), quietly=True)
        operation = self._operation()
        self._wrote_eof[operation] = None
        return operation

    def _half_close(self) -> None:
        # Twisted's transports forget it while their producer is paused.
        if not self.full:
            transport: Any = self.transport
            transport.loseWriteConnection()

    def close(self) -> Operation[None]:
        """
        Close the connection when everything was sent; what comes is discarded.

        A TLS peer is to answer within the ``close_timeout`` of ``serve`` or
        ``connect``.

        The operation is done when the connection is gone.
        """
        if self._lost is None and not self._closing:
            self._close_writing()
            self._after_files(self._lose_transport)
            self._limit_output()
        return self._when_closed()

    def _lose_transport(self) -> None:
        self.transport.unregisterProducer()
        if self._paused:
            # TLS waits for the peer's close_notify.
            self._resume_transport()
        self.transport.loseConnection()
        if self._lost is None and ISSLTransport.providedBy(self.transport):
            self._limit_tls_close()

    def _limit_output(self) -> None:
        """Limit the wait for a peer that takes nothing of what is left."""
        limit = self._write_timeout
        if (
            limit is not None
            and self._lost is None
            and (self._sending is not None or self.full or any(pending_of(self)))
        ):
            self._watchdog = Watchdog(
                TimeLimits(write=limit), lambda: [self], _abort_closing
            )
            self._watchdog.start(self._scheduler.reactor)

    def time_out(self, error: Exception) -> None:
        """Abort the connection: a time limit was exceeded, and this tells which."""
        self._abort_reason = error
        self._unwritable = self._unwritable or error
        self.abort()

    def abort(self) -> Operation[None]:
        """
        Close the connection at once, whatever was not sent yet.

        The operation is done when the connection is gone.
        """
        if self._lost is None:
            self._aborted = True
            self._close_writing()
            transport = self.transport
            getattr(transport, "abortConnection", transport.loseConnection)()
        return self._when_closed()

    def _when_closed(self) -> Operation[None]:
        if self._lost is not None:
            gone: Operation[None] = Done()
            return gone
        operation = self._operation()
        self._closed = self._closed or {}
        self._closed[operation] = None
        return operation

    def _operation(self) -> Operation[None]:
        operation: Operation[None] = Wait()
        operation.owner = self
        return operation

    def _close_writing(self) -> None:
        self._closing = True
        if self._unwritable is None:
            self._unwritable = StreamError("nothing can be written after close()")

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        closing = self.close() if error is None else self.abort()
        if isinstance(error, GeneratorExit):
            # Nobody can resume this any more.
            return
        try:
            await closing
        except BaseException:
            # Nobody waits until the peer has taken what is left.
            self.abort()
            raise

    # Files, for those who send them

    def _after_files(self, function: Callable[[], object]) -> None:
        if self._sending is None:
            function()
        else:
            self._held.append(function)

    def _tell_when_sent(self, each_time: bool) -> None:
        """
        Be told whenever the transport has sent everything, as a pull producer is; or
        when there is room again after there was none, as a push producer is.
        """
        if self._lost is None:
            self.transport.unregisterProducer()
            self.transport.registerProducer(self, not each_time)

    def _all_sent(self, first: bool) -> Operation[None]:
        """
        Wait until the transport has sent everything, and its socket takes more.

        :param first: that there is room is not known to be untrue.
        """
        if self._output_lost is not None:
            return failed(_again(self._output_lost), quietly=True)
        if not self._aborted:
            transport: Any = self.transport
            if first:
                transport.startWriting()
            else:
                self._scheduler.reactor.addWriter(transport)
        return self._until_resumed()

    def _write_of_file(self, data: bytes) -> Operation[None]:
        if self._output_lost is not None:
            return failed(_again(self._output_lost), quietly=True)
        self.written += len(data)
        self.transport.write(data)
        if self.full or self._aborted:
            return self._until_resumed()
        done: Operation[None] = Done()
        return done

    def _until_resumed(self) -> Operation[None]:
        if self._output_lost is not None:
            # By what was just written.
            return failed(_again(self._output_lost), quietly=True)
        operation = self._operation()
        self._drained = self._drained or {}
        self._drained[operation] = None
        return operation

    def _file_has_ended(self, whole: bool) -> None:
        """
        Nothing more of a file comes: go on with what follows it.

        :param whole: none of it is missing, or all.
        """
        if self._output_lost is not None:
            self._fail_held(self._output_lost)
        elif not whole:
            self._unwritable = StreamError(
                "nothing can be written after a part of a file: close the connection"
            )
            self._fail_held(self._unwritable)
        held = self._held
        written: _Operations = {}
        self._sending = None
        while held:
            following = held.popleft()
            if isinstance(following, tuple):
                data, operation = following
                self.written += len(data)
                self.transport.write(data)
                # Unless it was cancelled.
                if not operation.called:
                    written[operation] = None
            elif isinstance(following, Sending):
                if not following.operation.called:
                    self._sending = following
                    break
            else:
                following()
        if self._sending is not None:
            self._sending.begin()
        if self.full:
            self._drained = self._drained or {}
            self._drained.update(written)
        else:
            _succeed(written)

    def _lose_file(self, error: Exception) -> None:
        """The rest of the file that is being sent cannot be sent any more."""
        if self._sending is not None:
            self._sending.lose(_again(error))

    def _file_was_closed(self, operation: Operation[int]) -> None:
        """
        A file was closed before all of it was sent, and its operation has failed.

        A handler that is cancelled, or raises, closes its files first and then aborts
        the connection.  So whether this error has to be logged, if it is never asked
        for, is known when the connection ends.  Until then the operation is kept.
        """
        if self._lost is None:
            self._cut_short = operation

    def _fail_held(self, error: Exception) -> None:
        """What was to follow a file does not; unless it is the end."""
        if not self._held:
            return
        held, self._held = self._held, deque()
        for following in held:
            if isinstance(following, tuple):
                _fail([following[1]], error)
            elif isinstance(following, Sending):
                following.fail(_again(error))
            elif self._output_lost is None:
                self._held.append(following)

    # TLS

    def start_tls(self, context: Any) -> Operation[None]:
        """
        Go on encrypted.  The operation is done when the handshake is.

        :param context: for a server an ``IOpenSSLServerConnectionCreator`` or
            ``ssl.CertificateOptions``; for a client what
            ``ssl.optionsForClientTLS`` returns.
        :raises UnreadPlaintext: if anything is there that was not read yet.
        :raises StreamError: if the transport cannot do it, or does it already; (when
            awaited) if one side has ended already.
        :raises TLSError: (when awaited) if the handshake fails, or takes longer than
            the ``handshake_timeout`` of ``serve`` or ``connect``.
        """
        if self._reader is not None:
            raise BusyResourceError(f"start TLS on {self!r} when nobody reads from it")
        if self._sending is not None:
            raise BusyResourceError(f"start TLS on {self!r} when it sends no file")
        if ISSLTransport.providedBy(self.transport):
            raise StreamError(f"{self!r} is encrypted already")
        if self._buffer.data:
            raise UnreadPlaintext(self._buffer.size)
        if self._unwritable is not None:
            return failed(_again(self._unwritable), quietly=self._lost is not None)
        if self._ended:
            return failed(StreamError(f"{self!r} has ended: no TLS"))
        start = getattr(self.transport, "startTLS", None)
        if start is None:
            raise StreamError(f"{self!r} cannot start TLS: {self.transport!r} has none")
        secured = self._until_secured()
        start(context)
        self.limit_handshake()
        self._look_for_handshake()
        return secured

    @must_be_awaited
    def handshake(self) -> Operation[None]:
        """
        Wait until the TLS handshake is done, which begins by itself: then :attr:`tls`
        tells what it has negotiated.

        :raises StreamError: if the stream is not encrypted.
        :raises TLSError: (when awaited) if the handshake fails, or takes longer than
            the ``handshake_timeout`` of ``serve`` or ``connect``.
        :raises ConnectionClosed: (when awaited) if the connection is lost.
        """
        if self._lost is not None:
            return failed(_again(self._lost), quietly=True)
        if tls_layer(self.transport) is None:
            raise StreamError(
                f"{self!r} is not encrypted: it has no TLS handshake to wait for"
            )
        if handshake_is_done(self.transport):
            done: Operation[None] = Done()
            return done
        secured = self._until_secured()
        self._look_for_handshake()
        return secured

    def _until_secured(self) -> Operation[None]:
        operation = self._operation()
        self._secured = self._secured or {}
        self._secured[operation] = None
        return operation

    def _look_for_handshake(self) -> None:
        """
        See whether the handshake is done, if that is not reported: a protocol between
        TLS and the stream may not pass ``handshakeCompleted`` on.
        """
        if not self._secured:
            return
        layer = tls_layer(self.transport)
        if layer is None or IHandshakeListener.providedBy(layer.wrappedProtocol):
            return
        if handshake_is_done(self.transport):
            self.secure()
        else:
            reactor = self._scheduler.reactor
            reactor.callLater(_LOOK_FOR_HANDSHAKE, self._look_for_handshake)

    def limit_handshake(self) -> None:
        """A TLS handshake has begun: lose the connection if it takes too long."""
        limit = self._tls_limits.handshake
        if limit is not None and self._lost is None:
            reactor = self._scheduler.reactor
            self._handshake = reactor.callLater(limit, self._handshake_overdue, limit)

    def _handshake_overdue(self, limit: float) -> None:
        self._handshake = None
        if handshake_is_done(self.transport):
            # A protocol in between has not passed handshakeCompleted on.
            return
        self.time_out(TLSError(f"no handshake within {limit} s (handshake_timeout)"))

    def _limit_tls_close(self) -> None:
        """
        Limit the wait for the peer's answer to close_notify, which is written when the
        handshake is done and all output with it.
        """
        if self._handshake is not None and not handshake_is_done(self.transport):
            # The handshake has a limit of its own.
            self._until_secured().addCallbacks(
                lambda _: self._limit_tls_close(), ignore
            )
            self._look_for_handshake()
            return
        limit = self._tls_limits.close
        if limit is not None:
            reactor = self._scheduler.reactor
            self._tls_close = reactor.callLater(limit, self._tls_close_overdue)

    def _tls_close_overdue(self) -> None:
        self._tls_close = None
        # RFC 8446, section 6.1, does not require to wait for the answer.  To close the
        # connection below TLS, and not to abort it, lets a peer that reads slowly have
        # what was written before.
        below_tls(self.transport).loseConnection()

    def _handshake_done(self) -> None:
        handshake, self._handshake = self._handshake, None
        cancel_call(handshake)

    # From the protocol

    def feed(self, data: bytes) -> None:
        """Something has arrived."""
        self._arrived += 1
        reader = self._reader
        buffer = self._buffer
        if reader is None:
            if self._closing:
                return
            buffer.append(data)
        elif self._take is _take_some and len(data) <= self._limit and not buffer.data:
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

    def _discard_input(self) -> None:
        """Discard what arrives from now on, so that nothing has to wait for a read."""
        self._close_writing()
        if self._paused:
            self._resume_transport()

    def feed_eof(self) -> None:
        """Nothing more will arrive."""
        self._ended = True
        self._serve_reader()

    def lose(self, reason: Failure) -> None:
        """The connection is gone."""
        self._handshake_done()
        tls_close, self._tls_close = self._tls_close, None
        cancel_call(tls_close)
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.stop()
        self.signs = None
        lost = self._abort_reason or self._connection_error(reason.value)
        self._lost = lost
        self._ended = True
        self._unwritable = self._output_lost = lost
        waiting = [*self._drained, *(self._wrote_eof or ())]
        closed, self._closed = self._closed, _NO_OPERATIONS
        self._drained = _NO_OPERATIONS
        if self._wrote_eof is not None:
            self._wrote_eof = {}
        self._serve_reader()
        waiting += self._secured
        self._secured = _NO_OPERATIONS
        self._lose_file(lost)
        _fail(waiting, lost)
        self._fail_held(lost)
        cut_short, self._cut_short = self._cut_short, None
        if cut_short is not None and self._aborted:
            cut_short.addErrback(ignore)
        _succeed(closed)

    def _connection_error(self, error: BaseException | None) -> Exception:
        """
        Why the connection was lost, as a ``ConnectionClosed`` if TLS is to blame.

        Twisted reports the errors of OpenSSL and ``service_identity`` as they are.
        """
        assert isinstance(error, Exception)
        if isinstance(error, ConnectionClosed) or not ISSLTransport.providedBy(
            self.transport
        ):
            return error
        failed = TLSError(_reasons(error))
        # Its frames belong to Twisted, and would keep the connection in memory.
        failed.__cause__ = error.with_traceback(None)
        return failed

    def lose_output(self) -> None:
        """The peer takes nothing any more, but may still say something."""
        lost = ConnectionLost("the other side has closed what is written to")
        self._unwritable = self._unwritable or lost
        self._output_lost = lost
        drained, self._drained = self._drained, _NO_OPERATIONS
        self._lose_file(lost)
        _fail(drained, lost)
        self._fail_held(lost)

    def finish_output(self) -> None:
        """Everything was sent, and the end of it."""
        if self._wrote_eof is not None:
            self._output_finished = True
            finished, self._wrote_eof = self._wrote_eof, {}
            _succeed(finished)

    def secure(self) -> None:
        """The TLS handshake is done."""
        if handshake_is_done(self.transport) is False:
            # Twisted reports it though it has refused the certificate, as its error
            # will tell when the connection is lost.
            return
        self._handshake_done()
        secured, self._secured = self._secured, _NO_OPERATIONS
        _succeed(secured)

    # IPushProducer, of what is written

    def pauseProducing(self) -> None:
        """See ``IPushProducer``: the transport has no room for more."""
        self.full = True

    def resumeProducing(self) -> None:
        """See ``IPushProducer``: the transport has room again."""
        full = self.full
        if full and tls_is_over(self.transport):
            # TLS drops what is written now.  Twisted closes the connection when its
            # output is sent, but not as long as there is a producer that it has
            # paused.
            self.transport.unregisterProducer()
            return
        self.full = False
        self.resumed += 1
        if full and self._wrote_eof is not None and self._sending is None:
            self._half_close()
        drained, self._drained = self._drained, _NO_OPERATIONS
        _succeed(drained)

    def stopProducing(self) -> None:
        """See ``IPushProducer``: the end of the connection follows."""

    def __repr__(self) -> str:
        return f"<Stream to {self.peer}>"


async def _first(reading: Operation[bytes], event: Event) -> bool:
    """Whether a read is done before an event happens; if not, it is cancelled."""
    if not reading.called:
        try:
            await select(reading, event)
        except GeneratorExit:
            # Nothing can be resumed any more, and to cancel the read would try to.
            raise
        except BaseException:
            reading.cancel()
            raise
        if not reading.called:
            reading.cancel()
            return False
    return True


def _abort_closing(stream: Stream, name: str, error: Exception) -> None:
    _log.info("{stream}: aborted: {error}", stream=stream, error=error)
    stream.time_out(error)


def _succeed(operations: Iterable[Operation[None]]) -> None:
    for operation in operations:
        # Unless it was cancelled.
        if not operation.called:
            operation.succeed(None)


def _fail(operations: Iterable[Operation[None]], error: Exception) -> None:
    for operation in operations:
        if not operation.called:
            operation.fail(_again(error), quietly=True)


def _again(error: Exception) -> Exception:
    """A copy, since each raise adds to the traceback of an exception."""
    try:
        again = copy.copy(error).with_traceback(None)
        again.__cause__ = error.__cause__
        return again
    except Exception:
        # It is made with other arguments than it keeps.
        return error.with_traceback(None)


def _reasons(error: Exception) -> str:
    """What an error of OpenSSL says, or any other."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and all(isinstance(each, tuple) for each in queue):
        # Of each error its library, its function, and its reason.
        return ", ".join(str(each[-1]) for each in queue) or type(error).__name__
    return str(error) or type(error).__name__


# What follows a file: data and who has written it, another file, or the end.
_Held = tuple[bytes, Operation[None]] | Sending | Callable[[], object]

# What follows no file.  An empty deque takes 600 bytes, and each stream would have one.
_NOTHING: Final[deque[_Held]] = deque()

# Operations in their order, each of which is dropped in constant time.  An empty
# dictionary takes 64 bytes, and each stream would have two.
_Operations = dict[Operation[None], None]
_NO_OPERATIONS: Final[_Operations] = {}

# What takes the data of a read from the buffer: None if it is not there yet.
_Take = Callable[[Stream, Any, int], "bytes | None"]


def _take_some(stream: Stream, what: Any, limit: int) -> bytes | None:
    buffer = stream._buffer
    if buffer.data:
        return buffer.take(limit)
    return _nothing_more(stream)


def _look(stream: Stream, what: Any, limit: int) -> bytes | None:
    buffer = stream._buffer
    if buffer.data:
        return buffer.peek(limit)
    return _nothing_more(stream)


def _nothing_more(stream: Stream) -> bytes | None:
    if not stream._ended:
        return None
    lost = stream._unclean()
    if lost is not None:
        raise lost
    return b""


def _take_exactly(stream: Stream, what: Any, size: int) -> bytes | None:
    buffer = stream._buffer
    if buffer.size >= size:
        return buffer.take(size)
    if stream._ended:
        raise stream._incomplete(_wanted(_take_exactly, what, size))
    return None


def _take_until(stream: Stream, delimiter: bytes, limit: int) -> bytes | None:
    buffer = stream._buffer
    end = buffer.find(delimiter, limit)
    if end >= 0:
        data = buffer.take(end)
        buffer.take(len(delimiter))
        return data
    _check_unfinished(stream, limit + len(delimiter), _take_until, delimiter, limit)
    return None


def _take_line(stream: Stream, what: Any, limit: int) -> bytes | None:
    buffer = stream._buffer
    # One more, for a \r.
    end = buffer.find(b"\n", limit + 1)
    if 0 <= end <= limit:
        line = buffer.take(end + 1)
        if end and line[end - 1] == _CARRIAGE_RETURN:
            end -= 1
        return line[:end]
    if end > limit and buffer.peek(end)[-1:] == b"\r":
        return buffer.take(end + 1)[:-2]
    # That many bytes are too many, unless only the \n is missing.
    enough = limit + 1
    if buffer.size == enough and buffer.peek(enough)[-1:] == b"\r":
        enough += 1
    _check_unfinished(stream, enough, _take_line, what, limit)
    return None


def _take_match(stream: Stream, pattern: re.Pattern[bytes], limit: int) -> bytes | None:
    buffer = stream._buffer
    end = buffer.match_end(pattern, limit)
    if end >= 0:
        return buffer.take(end)
    _check_unfinished(stream, limit, _take_match, pattern, limit)
    return None


def _check_unfinished(
    stream: Stream, enough: int, take: _Take, what: Any, limit: int
) -> None:
    """
    ``enough`` bytes would have shown the end.

    :raises StreamError: if it cannot come any more.
    """
    if stream._buffer.size >= enough:
        raise DelimiterNotFound(_wanted(take, what, limit), limit)
    if stream._ended:
        raise stream._incomplete(_wanted(take, what, limit))


def _wanted(take: _Take, what: Any, limit: int) -> str:
    """What a read is about, in words."""
    return _WANTED[take].format(what=what, limit=limit)


_WANTED: Final[dict[_Take, str]] = {
    _take_some: "anything",
    _look: "anything",
    _take_exactly: "{limit} bytes",
    _take_until: "what ends with {what!r}",
    _take_line: "a line",
    _take_match: "a match of {what.pattern!r}",
}
