"""
TLS for blocking sockets, with the ``SSLContext`` of the caller.

OpenSSL works in memory (``ssl.SSLObject``), and its input and output go over the
stream.  So all settings and checks of the context apply, and its errors are raised, as
with a socket of ``ssl``.  pyOpenSSL is not needed.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from twisted_rtsig.coro.blocking_sockets import BlockingSocket

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from twisted_rtsig.coro.streams import Stream

T = TypeVar("T")
C = TypeVar("C", bound=ssl.SSLContext)

# The most that one read of the stream receives for OpenSSL: some records.
_PIECE = 1 << 16


class BlockingSSLSocket(BlockingSocket):
    """
    The result of ``SSLContext.wrap_socket`` for a :class:`BlockingSocket`: see
    :func:`allow_blocking_sockets`.  It has the methods and the errors of an
    ``ssl.SSLSocket``.

    :ivar server_side: whether this side is the server.
    :ivar server_hostname: the name of the server, for SNI and the check of the
        certificate.
    """

    # None until the socket is connected, and after unwrap().
    _tls: ssl.SSLObject | None = None
    # Counts the reads of the stream for OpenSSL.
    _fills: int = 0

    def __init__(
        self,
        sock: BlockingSocket,
        context: ssl.SSLContext,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        if isinstance(sock, BlockingSSLSocket) and sock._tls is not None:
            raise ValueError(f"{sock!r} is encrypted already")
        if server_side and server_hostname:
            raise ValueError("server_hostname can only be specified in client mode")
        if server_side and session is not None:
            raise ValueError("session can only be specified in client mode")
        if context.check_hostname and not server_hostname:
            raise ValueError("check_hostname requires server_hostname")
        self._begin(sock.family, sock.type, sock.proto)
        self._timeout = sock._timeout
        self._context = context
        self._session = session
        self.server_side: bool = server_side
        self.server_hostname: str | None = (
            server_hostname.decode("ascii")
            if isinstance(server_hostname, bytes)
            else server_hostname
        )
        self.do_handshake_on_connect: bool = do_handshake_on_connect
        self.suppress_ragged_eofs: bool = suppress_ragged_eofs
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        if sock._stream is None:
            sock._check_open()
        # As an SSLSocket, take over the connection: the other socket is closed.
        self._options, self._source = sock._options, sock._source
        self._abortive, self._unread = sock._abortive, sock._unread
        self._read_shut, self._write_shut = sock._read_shut, sock._write_shut
        self._stream, sock._stream = sock._stream, None
        sock._closed = True
        if self._stream is not None:
            self._begin_tls()

    def _begin_tls(self) -> None:
        try:
            self._tls = self._context.wrap_bio(
                self._incoming,
                self._outgoing,
                self.server_side,
                self.server_hostname,
                self._session,
            )
            if self.do_handshake_on_connect:
                if self._timeout == 0:
                    raise ValueError(
                        "do_handshake_on_connect should not be specified for "
                        "non-blocking sockets"
                    )
                self.do_handshake()
        except BaseException:
            # An SSLSocket would be closed when it is collected.
            self.close()
            raise

    def connect(self, address: Any) -> None:
        """See ``ssl.SSLSocket.connect``."""
        super().connect(address)
        self._begin_tls()

    def _object(self) -> ssl.SSLObject:
        self._opened()
        if self._tls is None:
            raise ValueError(f"No SSL wrapper around {self!r}")
        return self._tls

    def _run(self, function: Callable[..., T], what: str, *args: Any) -> T:
        """
        Call a function of OpenSSL, and receive the input that it needs.

        :param what: the name of the operation, for the error of a timeout.
        """
        deadline = self._deadline()
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError as error:
                wants = error.with_traceback(None)
            finally:
                self._flush()
            try:
                self._fill(deadline)
            except BlockingIOError:
                raise wants from None
            except TimeoutError:
                raise TimeoutError(f"The {what} operation timed out") from None
            finally:
                # The traceback refers to this frame.
                del wants

    def _fill(self, deadline: float | None) -> None:
        """Receive input for OpenSSL, unless another task does so meanwhile."""
        fills = self._fills
        at_once = deadline == 0
        self._take_turn(deadline, at_once)
        try:
            if self._fills != fills:
                return
            data = self._receive_in_turn(_PIECE, 0, deadline, at_once)
            self._fills += 1
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
        finally:
            self._turn.release()

    def _flush(self) -> None:
        """
        Send the output of OpenSSL.  Nothing waits in between, so it stays in order.
        """
        data = self._outgoing.read()
        stream = self._stream
        if data and stream is not None:
            # The next receive or send reports an error.
            stream.write(data)

    def do_handshake(self, block: bool = False) -> None:
        """
        See ``ssl.SSLSocket.do_handshake``.

        :raises ssl.SSLError: if the handshake fails; it is an
            ``SSLCertVerificationError`` if the certificate of the peer is not accepted.
        """
        before = self._timeout
        if block and before == 0:
            self._timeout = None
        try:
            self._run(self._object().do_handshake, "handshake")
        finally:
            self._timeout = before

    # Receiving and sending

    @overload
    def read(self, len: int = 1024, buffer: None = None) -> bytes: ...

    @overload
    def read(self, len: int, buffer: WriteableBuffer) -> int: ...

    def read(
        self, len: int = 1024, buffer: WriteableBuffer | None = None
    ) -> bytes | int:
        """See ``ssl.SSLSocket.read``."""
        read: Callable[..., bytes | int] = self._object().read
        args = (len,) if buffer is None else (len, buffer)
        try:
            return self._run(read, "read", *args)
        except ssl.SSLError as error:
            if error.args[0] == ssl.SSL_ERROR_EOF and self.suppress_ragged_eofs:
                return b"" if buffer is None else 0
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """See ``ssl.SSLSocket.recv``."""
        if self._tls is None:
            return super().recv(buflen, flags)
        self._check_no_flags("recv", flags)
        return self.read(buflen)

    def recv_into(
        self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0
    ) -> int:
        """See ``ssl.SSLSocket.recv_into``."""
        if self._tls is None:
            return super().recv_into(buffer, nbytes or 0, flags)
        self._check_no_flags("recv_into", flags)
        if nbytes is None:
            with memoryview(buffer) as view:
                nbytes = view.nbytes or 1024
        return self.read(nbytes, buffer)

    def write(self, data: ReadableBuffer) -> int:
        """See ``ssl.SSLSocket.write``."""
        self._object()
        return self.send(data)

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """See ``ssl.SSLSocket.send``."""
        if self._tls is None:
            return super().send(data, flags)
        self._check_no_flags("send", flags)
        with memoryview(data).cast("B") as view:
            size = len(view)
            self._send(view, self._deadline())
        return size

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        """See ``ssl.SSLSocket.sendall``."""
        if self._tls is not None:
            self._check_no_flags("sendall", flags)
        super().sendall(data, flags)

    def _send(self, data: memoryview, deadline: float | None) -> None:
        tls = self._tls
        if tls is None:
            super()._send(data, deadline)
            return
        try:
            self._until_room(deadline)
        except BlockingIOError:
            raise ssl.SSLWantWriteError(
                ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)"
            ) from None
        except TimeoutError:
            raise TimeoutError("The write operation timed out") from None
        if data:
            self._run(tls.write, "write", data)

    def _check_no_flags(self, what: str, flags: int) -> None:
        if flags:
            raise ValueError(
                f"non-zero flags not allowed in calls to {what}() on {type(self)}"
            )

    def pending(self) -> int:
        """The number of bytes that can be received without waiting."""
        return 0 if self._tls is None else self._tls.pending()

    # The end

    def unwrap(self) -> BlockingSocket:
        """
        End TLS: notify the peer, and wait for its notification.

        :return: this socket, which is not encrypted any more.
        """
        self._run(self._object().unwrap, "shutdown")
        self._tls = None
        self._unread = self._incoming.read()
        return self

    def shutdown(self, how: int, /) -> None:
        """See ``ssl.SSLSocket.shutdown``: it ends TLS without notifying the peer."""
        self._opened()
        self._tls = None
        super().shutdown(how)

    def _end(self, stream: Stream) -> None:
        super()._end(stream)
        self._tls = None

    # Negotiated parameters

    @property
    def context(self) -> ssl.SSLContext:
        """The context; a server may set another one in its ``sni_callback``."""
        return self._context

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        self._context = context
        if self._tls is not None:
            self._tls.context = context

    @property
    def session_reused(self) -> bool | None:
        """Whether an earlier session was resumed."""
        return None if self._tls is None else self._tls.session_reused

    @property
    def session(self) -> ssl.SSLSession | None:
        """The TLS session, for the next connection to the same server."""
        return self._session if self._tls is None else self._tls.session

    @session.setter
    def session(self, session: ssl.SSLSession) -> None:
        self._session = session
        if self._tls is not None:
            self._tls.session = session

    def cipher(self) -> tuple[str, str, int] | None:
        """See ``ssl.SSLSocket.cipher``."""
        return None if self._tls is None else self._tls.cipher()

    @overload
    def getpeercert(
        self, binary_form: Literal[False] = False
    ) -> dict[str, Any] | None: ...

    @overload
    def getpeercert(self, binary_form: Literal[True]) -> bytes | None: ...

    def getpeercert(self, binary_form: bool = False) -> dict[str, Any] | bytes | None:
        """See ``ssl.SSLSocket.getpeercert``."""
        return self._object().getpeercert(binary_form)

    def shared_ciphers(self) -> list[tuple[str, str, int]] | None:
        """See ``ssl.SSLSocket.shared_ciphers``."""
        return None if self._tls is None else self._tls.shared_ciphers()

    def compression(self) -> str | None:
        """See ``ssl.SSLSocket.compression``."""
        return None if self._tls is None else self._tls.compression()

    def version(self) -> str | None:
        """See ``ssl.SSLSocket.version``."""
        return None if self._tls is None else self._tls.version()

    def selected_alpn_protocol(self) -> str | None:
        """See ``ssl.SSLSocket.selected_alpn_protocol``."""
        return None if self._tls is None else self._tls.selected_alpn_protocol()

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """See ``ssl.SSLSocket.get_channel_binding``."""
        if self._tls is not None:
            return self._tls.get_channel_binding(cb_type)
        if cb_type not in ssl.CHANNEL_BINDING_TYPES:
            raise ValueError(f"{cb_type} channel binding type not implemented")
        return None

    def verify_client_post_handshake(self) -> None:
        """See ``ssl.SSLSocket.verify_client_post_handshake``."""
        self._object().verify_client_post_handshake()
        self._flush()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Methods that later versions of Python add.
            tls = self._tls
            if tls is not None and not name.startswith("_") and hasattr(tls, name):
                return getattr(tls, name)
            return super().__getattr__(name)


# Contexts


def allow_blocking_sockets(context: C) -> C:
    """
    Make ``context.wrap_socket`` accept a :class:`BlockingSocket` as well, for which it
    returns a :class:`BlockingSSLSocket`.  Other sockets are wrapped as before.

    :param context: an ``ssl.SSLContext``; its ``sslsocket_class`` is replaced.
    :return: the same context.
    """
    kind: Any = context.sslsocket_class
    context.sslsocket_class = _takes_both(kind)
    return context


@functools.cache
def _takes_both(kind: Any) -> Any:
    if getattr(kind, "takes_blocking_sockets", False):
        return kind

    # wrap_socket() calls it with keyword arguments only.
    def create(cls: Any, /, sock: Any, **arguments: Any) -> Any:
        if isinstance(sock, BlockingSocket):
            return BlockingSSLSocket(sock, **arguments)
        return kind._create.__func__(cls, sock=sock, **arguments)

    members = {"_create": classmethod(create), "takes_blocking_sockets": True}
    return type(kind.__name__, (kind,), members)
