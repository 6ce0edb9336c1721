"""
Sockets for code that was written for blocking sockets.  They work in stackful tasks: a
call that would block the thread makes the task wait.

See ``docs/stackful.md``.
"""

from __future__ import annotations

import errno
import operator
import os
import socket
import struct
import sys
import warnings
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NoReturn,
    TypeVar,
    overload,
)

from twisted.internet.address import IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionClosed, ConnectionDone

from twisted_rtsig.coro.blocking_connecting import (
    check_timeout,
    connect_tcp,
    connect_to_host,
    connect_unix,
)
from twisted_rtsig.coro.blocking_errors import os_error, unsupported
from twisted_rtsig.coro.blocking_files import SocketFiles
from twisted_rtsig.coro.errors import IncompleteRead, StreamError
from twisted_rtsig.coro.interfaces import Address
from twisted_rtsig.coro.locks import Lock
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.reading import MAX_BYTES, TURNS_TO_RECEIVE
from twisted_rtsig.coro.scheduler import cancel_call, scheduler_for
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.stacks import check_can_wait, wait
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tls import below_tls

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

T = TypeVar("T")
S = TypeVar("S", bound="BlockingSocket")

# The default of the timeout in the functions of socket.
_DEFAULT_TIMEOUT: Final[Any] = vars(socket)["_GLOBAL_DEFAULT_TIMEOUT"]

# The size of the pieces that sendall() passes to the transport, which then holds little
# more than one piece.
_PIECE: Final = 1 << 16

# If the peer takes nothing of the remaining output of a closed socket for this many
# seconds, the connection is given up.
_LINGER: Final = 60.0

_AF_UNIX: Final[int | None] = getattr(socket, "AF_UNIX", None)
_MSG_DONTWAIT: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)
_MSG_WAITALL: Final[int] = getattr(socket, "MSG_WAITALL", 0)
_MSG_NOSIGNAL: Final[int] = getattr(socket, "MSG_NOSIGNAL", 0)

# Options without effect on a non-blocking socket, as those of the reactor are.
_TIMEOUT_OPTIONS: Final = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
_NO_LINGER: Final = struct.Struct("HH" if sys.platform == "win32" else "ii")


class BlockingSocket(SocketFiles):
    """
    A stream with the methods of a connected ``socket.socket``, for libraries that were
    written for blocking sockets::

        def fetch(stream: Stream) -> bytes:
            with BlockingSocket(stream) as connection:
                connection.settimeout(5)
                connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                return connection.makefile("rb").read()

    The methods can be called in stackful tasks only.  They raise the errors of a
    blocking socket: ``ConnectionResetError``, ``BrokenPipeError`` and ``TimeoutError``.
    A method that needs a socket of the operating system raises
    ``io.UnsupportedOperation``, which is an ``OSError``.

    The socket owns the stream from now on.  Several tasks can share it: if several
    read, each gets a part of the data.

    :param stream: the connection, for example of :func:`.open_tcp`.
    """

    _stream: Stream | None = None
    # Whether shutdown() has closed this direction.
    _read_shut = False
    _write_shut = False
    # Whether the end of the input or a reset was reported: the kernel reports a reset
    # only once.
    _ended = False
    # Data that was received behind the end of TLS.
    _unread: bytes = b""
    # Whether close() discards the output that was not sent (SO_LINGER with 0 seconds).
    _abortive = False
    _source: tuple[str, int] | None = None
    # The read that waits.
    _reading: Operation[bytes] | None = None

    def __init__(self, stream: Stream) -> None:
        family, kind, proto = _kind_of(stream)
        self._begin(family, kind, proto)
        self._stream = stream

    def _begin(self, family: int, kind: int, proto: int) -> None:
        self._family = socket.AddressFamily(family)
        self._kind = socket.SocketKind(kind)
        self._proto = proto
        self._timeout: float | None = socket.getdefaulttimeout()
        # Options that were set before the socket was connected.
        self._options: list[tuple[Any, ...]] = []
        # The task that reads holds it.
        self._turn = Lock()

    def _opened(self) -> Stream:
        """
        The stream.

        :raises OSError: if the socket is not connected, or closed.
        """
        stream = self._stream
        if stream is None:
            raise os_error(errno.EBADF if self._closed else errno.ENOTCONN)
        return stream

    def _check_open(self) -> None:
        if self._closed and self._stream is None:
            raise os_error(errno.EBADF)

    # Connecting

    def connect(self, address: Any) -> None:
        """
        Connect: see ``socket.socket.connect``.

        :raises OSError: if the connection fails, or the socket is connected already.
        :raises TimeoutError: if connecting takes longer than the timeout.
        """
        self._check_open()
        if self._stream is not None:
            raise os_error(errno.EISCONN)
        check_timeout(self._timeout)
        check_can_wait()
        if self._family == _AF_UNIX:
            stream = connect_unix(address, self._timeout)
        else:
            stream = connect_tcp(
                *(address, self._family, self._kind, self._proto),
                *(self._timeout, self._source),
            )
        if self._closed:
            stream.abort()
            raise os_error(errno.EBADF)
        self._connected(stream)

    def _connected(self, stream: Stream) -> None:
        self._stream = stream
        stream._write_timeout = _LINGER
        options, self._options = self._options, []
        for option in options:
            self.setsockopt(*option)

    def connect_ex(self, address: Any) -> int:
        """
        As :meth:`connect`, but return the number of an ``OSError``, or 0.

        :raises socket.gaierror: if the name has no address.
        """
        try:
            self.connect(address)
        except socket.gaierror:
            raise
        except TimeoutError as error:
            return error.errno or errno.EAGAIN
        except OSError as error:
            if error.errno is None:
                raise
            return error.errno
        return 0

    def bind(self, address: Any) -> None:
        """Set the local address to connect from: a host and a port (0 for any)."""
        if self._stream is not None:
            raise os_error(errno.EINVAL)
        if self._family == _AF_UNIX:
            raise unsupported("a UNIX socket of the reactor connects without bind()")
        host, port = address[:2]
        self._source = host or ("::" if self._family == socket.AF_INET6 else ""), port

    # Receiving

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """
        Receive 1 to ``bufsize`` bytes; none at the end of the input.

        :param flags: ``MSG_PEEK``, ``MSG_DONTWAIT`` and ``MSG_WAITALL``.
        :raises TimeoutError: if nothing arrives within the timeout.
        :raises ConnectionResetError: if the connection was reset.
        """
        bufsize = operator.index(bufsize)
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        _check_flags(flags, socket.MSG_PEEK | _MSG_DONTWAIT | _MSG_WAITALL)
        return self._receive(bufsize, flags, self._deadline())

    def recv_into(
        self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0
    ) -> int:
        """As :meth:`recv`, into a buffer; return the number of bytes."""
        if nbytes < 0:
            raise ValueError("negative buffersize in recv_into")
        with memoryview(buffer).cast("B") as view:
            if view.readonly:
                # Checked before any data is received, which would be lost.
                raise TypeError("recv_into() needs a buffer that can be written to")
            size = nbytes or len(view)
            if size > len(view):
                raise ValueError("buffer too small for requested bytes")
            data = self.recv(size, flags)
            view[: len(data)] = data
        return len(data)

    def _receive(self, size: int, flags: int, deadline: float | None) -> bytes:
        """
        Receive data from the stream.

        :raises BlockingIOError: if there is no data, and the call may not wait.
        """
        at_once = deadline == 0 or bool(flags & _MSG_DONTWAIT)
        self._take_turn(deadline, at_once)
        try:
            return self._receive_in_turn(size, flags, deadline, at_once)
        finally:
            self._turn.release()

    def _take_turn(self, deadline: float | None, at_once: bool) -> None:
        """Acquire the lock for reading: several tasks read one after another."""
        check_can_wait()
        if at_once and self._turn.locked:
            raise os_error(errno.EAGAIN)
        self._wait(self._turn.acquire(), deadline)

    def _receive_in_turn(
        self, size: int, flags: int, deadline: float | None, at_once: bool
    ) -> bytes:
        stream = self._opened()
        peeks = bool(flags & socket.MSG_PEEK)
        if self._unread:
            data = self._unread[:size]
            if not peeks:
                self._unread = self._unread[size:]
            return data
        if self._read_shut or not size:
            return b""
        try:
            if at_once:
                self._poll(stream)
            if peeks:
                data = self._read(stream.peek(min(size, MAX_BYTES)), deadline)
            elif flags & _MSG_WAITALL and deadline is None and not at_once:
                # With a timeout the kernel ignores MSG_WAITALL.
                data = self._read(stream.read_exactly(size), None)
            else:
                data = self._read(stream.read(size), deadline)
        except IncompleteRead as end:
            data = end.partial
        except ConnectionClosed:
            if self._ended:
                return b""
            self._ended = True
            raise os_error(errno.ECONNRESET) from None
        if not data:
            self._ended = True
        return data

    def _read(self, reading: Operation[bytes], deadline: float | None) -> bytes:
        try:
            if not reading.called:
                self._reading = reading
            return self._wait(reading, deadline)
        finally:
            self._reading = None
            # The traceback of an error refers to this frame, and an operation to its
            # error.
            del reading

    def _poll(self, stream: Stream) -> None:
        """
        Let the reactor receive the data that the kernel has.

        :raises BlockingIOError: if there is none.
        """
        peeking = stream.peek(1)
        try:
            for _ in range(TURNS_TO_RECEIVE):
                if peeking.called:
                    break
                wait(sleep(0, stream._scheduler.reactor))
        except BaseException:
            if not peeking.called:
                peeking.cancel()
            raise
        if not peeking.called:
            peeking.cancel()
            raise os_error(errno.EAGAIN)
        wait(peeking)

    # Sending

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """
        Send all of the data, however long, as soon as the transport has room.

        :return: the number of bytes.
        :raises TimeoutError: if there is no room within the timeout.  Nothing was sent
            then.
        :raises ConnectionResetError: if the connection was reset.
        :raises BrokenPipeError: if nothing can be sent any more.
        """
        _check_flags(flags, _MSG_DONTWAIT | _MSG_NOSIGNAL)
        deadline = 0 if flags & _MSG_DONTWAIT else self._deadline()
        with memoryview(data).cast("B") as view:
            size = len(view)
            self._send(view, deadline)
        return size

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """
        As :meth:`send`, but the timeout is for the whole call.  After a
        ``TimeoutError`` it is unknown how much was sent.
        """
        _check_flags(flags, _MSG_DONTWAIT | _MSG_NOSIGNAL)
        deadline = 0 if flags & _MSG_DONTWAIT else self._deadline()
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view) or 1, _PIECE):
                self._send(view[start : start + _PIECE], deadline)

    def _send(self, data: memoryview, deadline: float | None) -> None:
        self._until_room(deadline)
        if data:
            self._opened().write(bytes(data))

    def _until_room(self, deadline: float | None) -> None:
        """Wait until the peer has taken enough of the earlier output."""
        stream = self._opened()
        while True:
            error = stream._unwritable
            if error is not None:
                raise self._lost(stream)
            if not stream.full:
                return
            if deadline == 0:
                raise os_error(errno.EAGAIN)
            try:
                self._wait(stream.write(b""), deadline)
            except (ConnectionClosed, StreamError):
                stream = self._opened()

    def _lost(self, stream: Stream) -> OSError:
        """
        The error of a send when nothing can be sent any more.  As from the kernel,
        the first error after a reset is ``ECONNRESET``, unless the reset was reported
        before or the peer had closed; all others are ``EPIPE``.
        """
        if stream.lost and not (
            self._write_shut or self._ended or isinstance(stream._lost, ConnectionDone)
        ):
            self._ended = True
            return os_error(errno.ECONNRESET)
        return os_error(errno.EPIPE)

    # Timeouts

    def settimeout(self, value: float | None, /) -> None:
        """
        Limit the seconds that each call may wait; None for no limit.  With 0 no call
        waits: if there is no data, it raises ``BlockingIOError``, after the reactor has
        looked at the sockets.
        """
        if value is not None:
            if not isinstance(value, int | float):
                raise TypeError(f"a timeout is a number of seconds, and not {value!r}")
            if not value >= 0:
                raise ValueError("Timeout value out of range")
        self._timeout = value

    def gettimeout(self) -> float | None:
        """The timeout in seconds; None without one."""
        return self._timeout

    def setblocking(self, flag: bool, /) -> None:
        """``settimeout(None)`` if the flag is true, else ``settimeout(0)``."""
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        """Whether the timeout is not 0."""
        return self._timeout != 0

    @property
    def timeout(self) -> float | None:
        """See :meth:`gettimeout`."""
        return self._timeout

    def _deadline(self) -> float | None:
        """
        The deadline of a call that begins now, in the time of the reactor; 0 if it may
        not wait, and None without a limit.
        """
        seconds = self._timeout
        if not seconds:
            return seconds
        now: float = scheduler_for(None).reactor.seconds()
        return now + seconds

    def _wait(self, operation: Operation[T], deadline: float | None) -> T:
        """
        Wait for an operation.

        :raises TimeoutError: after the deadline.
        """
        call = None
        try:
            if deadline and not operation.called:
                reactor = scheduler_for(None).reactor
                left = max(0.0, deadline - reactor.seconds())
                call = reactor.callLater(left, _expire, operation)
            return wait(operation)
        finally:
            cancel_call(call)
            # As in _read(); the delayed call refers to the operation.
            del operation, call

    # The end

    def shutdown(self, how: int, /) -> None:
        """
        Close one direction or both: see ``socket.socket.shutdown``.  With ``SHUT_RD`` a
        read that waits in another task returns no bytes.
        """
        stream = self._opened()
        if how not in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            raise os_error(errno.EINVAL)
        if stream.lost:
            raise os_error(errno.ENOTCONN)
        if how != socket.SHUT_RD and not self._write_shut:
            try:
                stream.write_eof()
            except StreamError as error:
                raise unsupported(str(error)) from None
            self._write_shut = True
        if how != socket.SHUT_WR:
            self._read_shut = True
            reading = self._reading
            if reading is not None and not reading.called:
                stream.forget(reading)
                reading.succeed(b"")

    def close(self) -> None:
        """
        Close the socket.  The transport sends the remaining output, and then closes
        the connection.  Files of :meth:`makefile` stay usable: the connection is closed
        when they are closed.
        """
        self._closed = True
        if self._io_refs > 0:
            return
        stream, self._stream = self._stream, None
        if stream is not None:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        # A kernel resets the connection if input was not read, and has sent the output
        # before.  Here the output may still be in the transport.  So with unread input
        # reset only if the peer does not take the output.
        if self._abortive or (stream.full and stream._buffer.data):
            stream.abort()
        else:
            stream.close()

    def __del__(self) -> None:
        stream = self._stream
        if stream is None or stream.lost:
            return
        if not self._closed:
            # The warning of a socket that was not closed.
            warnings.warn(
                f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2
            )
        # The garbage collector may run this at any time, and in any thread.
        stream._scheduler.reactor.callFromThread(self._end, stream)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._closed:
            self.close()

    # Addresses and options

    @property
    def family(self) -> socket.AddressFamily:
        """The address family."""
        return self._family

    @property
    def type(self) -> socket.SocketKind:
        """``SOCK_STREAM``."""
        return self._kind

    @property
    def proto(self) -> int:
        """The number of the protocol, or 0."""
        return self._proto

    def getpeername(self) -> Any:
        """The address of the peer, in the form of its family."""
        stream = self._opened()
        if stream.lost:
            raise os_error(errno.ENOTCONN)
        handle = _handle(stream)
        return _plain(stream.peer) if handle is None else handle.getpeername()

    def getsockname(self) -> Any:
        """The address of this side, in the form of its family."""
        self._check_open()
        if self._stream is None:
            with self._throwaway() as plain:
                return self._source or plain.getsockname()
        handle = _handle(self._stream)
        return _plain(self._stream.host) if handle is None else handle.getsockname()

    def fileno(self) -> int:
        """
        Return -1 if the socket is closed.

        :raises io.UnsupportedOperation: if it is open.  The reactor reads from the
            descriptor, so nothing else can poll it, and ``ssl`` cannot take it over.
        """
        if self._closed and self._stream is None:
            return -1
        raise unsupported(
            f"{self!r} has no descriptor that can be polled or given to ssl, since the "
            "reactor reads from it: poll it in a patched() module, and call "
            "allow_blocking_sockets() with the SSLContext"
        )

    def setsockopt(self, level: int, optname: int, *value: Any) -> None:
        """
        Set an option of the socket of the operating system: ``TCP_NODELAY`` or
        ``SO_KEEPALIVE``, for example.  Options can be set before ``connect``.
        """
        self._check_open()
        if level == socket.SOL_SOCKET and optname in _TIMEOUT_OPTIONS:
            raise unsupported("SO_RCVTIMEO and SO_SNDTIMEO: use settimeout()")
        option = (level, optname, *value)
        stream = self._stream
        handle = None if stream is None else _handle(stream)
        if handle is None:
            # The system raises an error if there is no such option.
            with self._throwaway() as handle:
                handle.setsockopt(*option)
            if stream is None:
                self._options.append(option)
        else:
            handle.setsockopt(*option)
        if level == socket.SOL_SOCKET and optname == socket.SO_LINGER:
            on, seconds = _NO_LINGER.unpack(value[0])
            self._abortive = bool(on) and not seconds

    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...

    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...

    def getsockopt(self, level: int, optname: int, *buflen: int) -> int | bytes:
        """Get an option of the socket of the operating system."""
        self._check_open()
        handle = None if self._stream is None else _handle(self._stream)
        if handle is not None:
            return handle.getsockopt(level, optname, *buflen)
        with self._throwaway() as plain:
            for option in self._options:
                plain.setsockopt(*option)
            return plain.getsockopt(level, optname, *buflen)

    def _throwaway(self) -> socket.socket:
        """A new socket of the operating system, which is not connected."""
        return socket.socket(self._family, self._kind, self._proto)

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._stream is None:
            return f"<{kind}: {'closed' if self._closed else 'not connected'}>"
        return f"<{kind} to {self._stream.peer}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(socket.socket, name):
                message += ": only a socket of the operating system has it"
            raise AttributeError(message)


class ClientSocket(BlockingSocket):
    """
    A :class:`BlockingSocket` that is not connected yet, with the parameters of
    ``socket.socket``.  ``connect`` connects it, by TCP or to a UNIX socket.

    :raises io.UnsupportedOperation: if the type is not ``SOCK_STREAM``, the family is
        another one, or a descriptor is given.
    """

    def __init__(
        self,
        family: int = -1,
        type: int = -1,
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        if fileno is not None:
            raise unsupported(
                "a socket of the reactor cannot be made of a descriptor: use "
                "adoptStreamConnection() of the reactor, and BlockingSocket"
            )
        if type not in (-1, socket.SOCK_STREAM):
            raise unsupported(
                f"a socket of the reactor is for SOCK_STREAM, and not for {type}: "
                "use open_datagrams()"
            )
        family = socket.AF_INET if family == -1 else family
        if family not in (socket.AF_INET, socket.AF_INET6, _AF_UNIX):
            raise unsupported(
                f"a socket of the reactor is for AF_INET, AF_INET6 or AF_UNIX, and not "
                f"for {family}"
            )
        self._begin(family, socket.SOCK_STREAM, max(proto, 0))


def create_connection(
    address: tuple[str | None, int],
    timeout: float | None = _DEFAULT_TIMEOUT,
    source_address: tuple[str, int] | None = None,
    *,
    all_errors: bool = False,
) -> BlockingSocket:
    """
    Connect by TCP, as ``socket.create_connection``; the addresses of a name are tried
    as by :func:`.open_tcp`.

    :param address: host and port.
    :param timeout: the seconds that each attempt may take, and later each call of the
        socket; by default that of ``socket.getdefaulttimeout``.
    :param source_address: the local address and port (0 for any).
    :param all_errors: if no attempt succeeds, raise an ``ExceptionGroup`` of all errors
        instead of the last error.
    :raises socket.gaierror: if the name has no address.
    :raises OSError: if the connection fails: ``ConnectionRefusedError``, for example.
    :raises TimeoutError: if connecting takes longer than the timeout.
    """
    if timeout is _DEFAULT_TIMEOUT:
        timeout = socket.getdefaulttimeout()
    check_timeout(timeout)
    stream = connect_to_host(address, timeout, source_address, all_errors)
    made = BlockingSocket(stream)
    made.settimeout(timeout)
    made._connected(stream)
    return made


def _expire(operation: Operation[Any]) -> None:
    if not operation.called:
        if operation.owner is not None:
            operation.owner.forget(operation)
        operation.fail(TimeoutError("timed out"), quietly=True)


def _check_flags(flags: int, allowed: int) -> None:
    others = flags & ~allowed
    if others:
        raise unsupported(
            f"a socket of the reactor does not have the flags {others:#x}"
        )


def _handle(stream: Stream) -> socket.socket | None:
    """The socket of the operating system; None if there is none, or it is closed."""
    try:
        handle = below_tls(stream.transport).getHandle()
    except AttributeError:
        return None
    return handle if isinstance(handle, socket.socket) else None


def _kind_of(stream: Stream) -> tuple[int, int, int]:
    """Family, type and protocol."""
    handle = _handle(stream)
    if handle is not None:
        return handle.family, handle.type, handle.proto
    family: int = socket.AF_INET
    if isinstance(stream.peer, UNIXAddress) and _AF_UNIX is not None:
        family = _AF_UNIX
    elif isinstance(stream.peer, IPv6Address):
        family = socket.AF_INET6
    return family, socket.SOCK_STREAM, 0


def _plain(address: Address) -> Any:
    """An address in the form of the functions of socket."""
    if isinstance(address, UNIXAddress):
        return os.fsdecode(address.name or b"")
    if isinstance(address, IPv6Address):
        return address.host, address.port, address.flowInfo, 0
    return address.host, address.port
