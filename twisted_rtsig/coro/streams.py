"""
Streams: a connection that a coroutine reads from and writes to.

A stream knows nothing of how its transport works.  A protocol feeds it (see
``connections.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IPushProducer, ISSLTransport
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_rtsig.coro.closing import AbortedOnError
from twisted_rtsig.coro.errors import (
    BusyResourceError,
    StreamError,
    UnreadPlaintext,
)
from twisted_rtsig.coro.file_queue import FileQueue
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.handshakes import (
    DEFAULT_TLS_LIMITS,
    Handshake,
    TLSLimits,
    connection_error,
)
from twisted_rtsig.coro.interfaces import Address
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import Done, Operation, Wait, failed, ignore
from twisted_rtsig.coro.pending import (
    NO_OPERATIONS,
    Operations,
    again,
    fail,
    succeed,
)
from twisted_rtsig.coro.reading import StreamInput
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.sending import Sending
from twisted_rtsig.coro.time_limits import Signs, TimeLimits, Watchdog, pending_of
from twisted_rtsig.coro.tls import (
    TLSInfo,
    handshake_is_done,
    tls_info,
    tls_is_over,
    tls_layer,
)

if TYPE_CHECKING:
    from twisted_rtsig.files.asyncfile import AsyncFile

_log = Logger()


@implementer(IPushProducer)
class Stream(StreamInput, AbortedOnError):
    """
    A connection.  :class:`CoroutineFactory`, :func:`serve` and :func:`connect` make it.

    A read that is cancelled leaves the stream as it is: the data can be read again.
    Only one task at a time may read; any number may write.

    :ivar transport: the Twisted transport.
    :ivar signs: the signs of life that the watchdog of the time limits has seen.
    :ivar written: how many bytes were written to the transport.
    :ivar full: whether the transport has no room for more.
    :ivar resumed: how often it had room again.
    """

    __slots__ = (
        "_abort_reason",
        "_aborted",
        "_closed",
        "_cut_short",
        "_drained",
        "_files",
        "_handshake",
        "_output_finished",
        "_output_lost",
        "_stopping",
        "_tls_limits",
        "_unwritable",
        "_watchdog",
        "_write_timeout",
        "_wrote_eof",
        "full",
        "resumed",
        "signs",
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
        :param write_timeout: as for ``connect``: it counts from ``close`` on, for a
            stream that no watchdog of a server looks at.
        """
        super().__init__(transport, scheduler)
        self._stopping = stopping
        self._write_timeout = write_timeout
        self._watchdog: Watchdog | None = None
        self.signs: Signs | None = None
        self._tls_limits = tls_limits
        # Made with TLS.
        self._handshake: Handshake | None = None
        self.full: bool = False
        # The operations that wait for room, for the end of all output (None before
        # ``write_eof``), and for the end of the connection.
        self._drained = NO_OPERATIONS
        self._wrote_eof: Operations | None = None
        self._output_finished = False
        self._closed = NO_OPERATIONS
        self._aborted = False
        # Why nothing can be written any more; and why the peer takes nothing any more.
        self._unwritable: Exception | None = None
        self._output_lost: Exception | None = None
        # The error to report in place of the transport's.
        self._abort_reason: Exception | None = None
        # The files that are being sent, and what follows them.
        self._files: FileQueue | None = None
        # A send_file that failed because the file was closed.
        self._cut_short: Operation[int] | None = None
        self.written: int = 0
        self.resumed: int = 0

    @property
    def peer(self) -> Address:
        """
        The address of the peer: an ``IPv4Address``, an ``IPv6Address`` or a
        ``UNIXAddress``.

        If there is no socket, as with processes and in tests, it is what ``getPeer`` of
        the transport returns.
        """
        return cast(Address, self.transport.getPeer())

    @property
    def host(self) -> Address:
        """The address of this side, of the same type as :attr:`peer`."""
        return cast(Address, self.transport.getHost())

    @property
    def stopping(self) -> Event:
        """
        An :class:`Event` that happens when the server begins to stop.  The server's
        :class:`CoroutineFactory` and :class:`Server` have the same event.  The event of
        a client, or of a stream in a test, happens only if the program sets it.
        """
        if self._stopping is None:
            self._stopping = Event()
        return self._stopping

    @property
    def tls(self) -> TLSInfo | None:
        """
        What the TLS handshake has negotiated, including the peer's certificate.  None
        if the stream is not encrypted, before the handshake is done (:meth:`handshake`
        waits for it), and once the connection is lost.
        """
        return None if self._lost is not None else tls_info(self.transport)

    @property
    def activity(self) -> int:
        """A number that changes whenever anything is sent or received."""
        return self._arrived + self.written + self.resumed

    @property
    def timed_out(self) -> Exception | None:
        """The time limit that has ended the connection, as an error; or None."""
        return self._abort_reason

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        if operation is self._reader:
            self._forget_reader()
        else:
            # Operations would pile up if a task tries again and again.
            self._drained.pop(operation, None)
            self._closed.pop(operation, None)
            if self._wrote_eof is not None:
                self._wrote_eof.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        if operation is self._reader:
            return super().waits_for(operation)
        if operation in self._closed:
            return f"the end of {self!r}"
        if operation in (self._wrote_eof or ()):
            return f"everything to be sent to {self!r}"
        return f"room to write to {self!r}"

    # Writing

    def write(self, data: bytes | bytearray | memoryview) -> Operation[None]:
        """
        Write ``data``.  The operation is done when there is room for more.  Wait for
        it, so that a peer that does not read cannot fill the memory.

        :raises ConnectionClosed: (when awaited) if the connection is lost.
        :raises StreamError: (when awaited) after ``close`` or ``write_eof``.
        """
        if self._unwritable is not None:
            return failed(again(self._unwritable), quietly=True)
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        if self._files is not None:
            return self._files.add_data(data)
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
        Send a part of a file, in order with what is written before and after this.
        The file's position does not change.

        The operation is done when all of the part was sent, or the transport has room
        for the rest of it.  Its result is the number of bytes.  If it fails or is
        cancelled in the middle, nothing more can be written, since the peer would take
        it for a part of the file.

        :param offset: where the part begins in the file.
        :param count: how many bytes to send; by default up to the end of the file.
        :param progress: called again and again, with the number of bytes that were sent
            so far.
        :raises FileEnded: (when awaited) if the file is shorter.
        :raises OSError: (when awaited) if it cannot be read.
        :raises ConnectionClosed: (when awaited) if the connection is lost.
        """
        for name, value in (("offset", offset), ("count", count or 0)):
            if value < 0:
                raise ValueError(f"{name}={value}: 0 is the least")
        if self._unwritable is not None:
            return failed(again(self._unwritable), quietly=True)
        if self._files is None:
            self._files = FileQueue(self)
        sending = Sending(self, self._files, file, offset, count, progress)
        self._files.add_file(sending)
        return sending.operation

    def write_eof(self) -> Operation[None]:
        """
        Tell the peer that nothing more will be written.  The stream can still be read.

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
            return failed(again(self._unwritable), quietly=True)
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
        Close the connection when everything was sent.  What arrives is discarded.

        A TLS peer must answer within the ``close_timeout`` of :func:`serve` or
        :func:`connect`.

        The operation is done when the connection is gone.
        """
        self._begin_close()
        return self._when_closed()

    def _begin_close(self) -> None:
        """As :meth:`close`, for callers that do not wait for the end."""
        if self._lost is None and not self._closing:
            self._close_writing()
            self._after_files(self._lose_transport)
            if self._write_timeout is not None:
                self._limit_output(self._write_timeout)

    def _lose_transport(self) -> None:
        self.transport.unregisterProducer()
        if self._paused:
            # TLS waits for the peer's close_notify.
            self._resume_transport()
        self.transport.loseConnection()
        if self._lost is None and ISSLTransport.providedBy(self.transport):
            self._tls().limit_close()

    def _limit_output(self, limit: float) -> None:
        """Limit the wait for a peer that takes nothing of what is left to be sent."""
        if self._lost is None and (
            self._files is not None or self.full or any(pending_of(self))
        ):
            self._watchdog = Watchdog(
                TimeLimits(write=limit), lambda: [self], _abort_closing
            )
            self._watchdog.start(self._scheduler.reactor)

    def time_out(self, error: Exception) -> None:
        """Abort the connection: a time limit was exceeded, which the error names."""
        self._abort_reason = error
        self._unwritable = self._unwritable or error
        self._begin_abort()

    def abort(self) -> Operation[None]:
        """
        Close the connection at once.  What was not sent yet is discarded.

        The operation is done when the connection is gone.
        """
        self._begin_abort()
        return self._when_closed()

    def _begin_abort(self) -> None:
        """As :meth:`abort`, for callers that do not wait for the end."""
        if self._lost is None:
            self._aborted = True
            self._close_writing()
            transport = self.transport
            getattr(transport, "abortConnection", transport.loseConnection)()

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

    def _after_files(self, function: Callable[[], object]) -> None:
        if self._files is None:
            function()
        else:
            self._files.add_end(function)

    def _until_resumed(self) -> Operation[None]:
        if self._output_lost is not None:
            # By what was just written.
            return failed(again(self._output_lost), quietly=True)
        operation = self._operation()
        self._drained = self._drained or {}
        self._drained[operation] = None
        return operation

    # TLS

    def start_tls(self, context: Any) -> Operation[None]:
        """
        Start TLS.  The operation is done when the handshake is done.

        :param context: for a server an ``IOpenSSLServerConnectionCreator`` or
            ``ssl.CertificateOptions``; for a client what
            ``ssl.optionsForClientTLS`` returns.
        :raises UnreadPlaintext: if data has arrived that was not read yet.
        :raises BusyResourceError: if a task reads, or a file is being sent.
        :raises StreamError: if the transport has no TLS, or is encrypted already; (when
            awaited) if one side has ended already.
        :raises TLSError: (when awaited) if the handshake fails, or takes longer than
            the ``handshake_timeout`` of :func:`serve` or :func:`connect`.
        """
        if self._reader is not None:
            raise BusyResourceError(
                f"a task reads from {self!r}: start TLS when none does"
            )
        if self._files is not None:
            raise BusyResourceError(f"{self!r} sends a file: start TLS after it")
        if ISSLTransport.providedBy(self.transport):
            raise StreamError(f"{self!r} is encrypted already")
        if self._buffer.data:
            raise UnreadPlaintext(self._buffer.size)
        if self._unwritable is not None:
            return failed(again(self._unwritable), quietly=self._lost is not None)
        if self._ended:
            return failed(StreamError(f"{self!r} cannot start TLS: it has ended"))
        start = getattr(self.transport, "startTLS", None)
        if start is None:
            raise StreamError(f"{self!r} cannot start TLS: {self.transport!r} has none")
        handshake = self._tls()
        secured = handshake.wait()
        start(context)
        handshake.limit()
        handshake.look()
        return secured

    @must_be_awaited
    def handshake(self) -> Operation[None]:
        """
        Wait until the TLS handshake is done.  It begins by itself.  Then :attr:`tls`
        tells what it has negotiated.

        :raises StreamError: if the stream is not encrypted.
        :raises TLSError: (when awaited) if the handshake fails, or takes longer than
            the ``handshake_timeout`` of :func:`serve` or :func:`connect`.
        :raises ConnectionClosed: (when awaited) if the connection is lost.
        """
        if self._lost is not None:
            return failed(again(self._lost), quietly=True)
        if tls_layer(self.transport) is None:
            raise StreamError(
                f"{self!r} is not encrypted: it has no TLS handshake to wait for"
            )
        if handshake_is_done(self.transport):
            done: Operation[None] = Done()
            return done
        handshake = self._tls()
        secured = handshake.wait()
        handshake.look()
        return secured

    def _tls(self) -> Handshake:
        if self._handshake is None:
            self._handshake = Handshake(self, self._tls_limits)
        return self._handshake

    def limit_handshake(self) -> None:
        """A TLS handshake has begun: lose the connection if it takes too long."""
        self._tls().limit()

    # From the protocol

    def _discard_input(self) -> None:
        """Discard what arrives from now on, so that the peer waits for no read."""
        self._close_writing()
        if self._paused:
            self._resume_transport()

    def lose(self, reason: Failure) -> None:
        """The connection is gone."""
        handshake = self._handshake
        if handshake is not None:
            self._handshake = None
            handshake.stop_limits()
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        self.signs = None
        lost = self._abort_reason or connection_error(self.transport, reason.value)
        self._lost = lost
        self._ended = True
        self._unwritable = self._output_lost = lost
        waiting = [*self._drained, *(self._wrote_eof or ())]
        closed, self._closed = self._closed, NO_OPERATIONS
        self._drained = NO_OPERATIONS
        if self._wrote_eof is not None:
            self._wrote_eof = {}
        if self._reader is not None:
            self._serve_reader()
        if handshake is not None:
            waiting += handshake.take_waiting()
        if waiting or self._files is not None:
            self._fail_output(waiting, lost)
        if self._cut_short is not None:
            cut_short, self._cut_short = self._cut_short, None
            if self._aborted:
                cut_short.addErrback(ignore)
        if closed:
            succeed(closed)

    def lose_output(self) -> None:
        """The peer takes nothing any more, but may still send."""
        lost = ConnectionLost("the peer has closed its input")
        self._unwritable = self._unwritable or lost
        self._output_lost = lost
        drained, self._drained = self._drained, NO_OPERATIONS
        self._fail_output(drained, lost)

    def _fail_output(
        self, waiting: Iterable[Operation[None]], error: Exception
    ) -> None:
        """What waits for output to be sent fails, in the order of the output."""
        files = self._files
        if files is not None:
            files.lose_file(error)
        fail(waiting, error)
        if files is not None:
            files.fail_held(error)

    def finish_output(self) -> None:
        """All output was sent, and the end of it."""
        if self._wrote_eof is not None:
            self._output_finished = True
            finished, self._wrote_eof = self._wrote_eof, {}
            succeed(finished)

    def secure(self) -> None:
        """The TLS handshake is done."""
        if self._handshake is not None:
            self._handshake.done()

    # IPushProducer, of what is written

    def pauseProducing(self) -> None:
        """See ``IPushProducer``: the transport has no room for more."""
        self.full = True

    def resumeProducing(self) -> None:
        """See ``IPushProducer``: the transport has room again."""
        full = self.full
        if full and tls_is_over(self.transport):
            # TLS drops what is written now.  Twisted closes the connection when the
            # output of TLS is sent, but not while there is a producer that TLS has
            # paused.
            self.transport.unregisterProducer()
            return
        self.full = False
        self.resumed += 1
        if full and self._wrote_eof is not None and self._files is None:
            self._half_close()
        drained, self._drained = self._drained, NO_OPERATIONS
        succeed(drained)

    def stopProducing(self) -> None:
        """See ``IPushProducer``: the connection is about to end."""

    def __repr__(self) -> str:
        return f"<Stream to {self.peer}>"


def _abort_closing(stream: Stream, name: str, error: Exception) -> None:
    _log.info("{stream}: aborted: {error}", stream=stream, error=error)
    stream.time_out(error)
