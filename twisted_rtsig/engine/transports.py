"""
The TCP and UNIX stream transports of the engine's reactors, and the methods of a
reactor that make them.

They are subclasses of Twisted's transports, with a shorter path between the socket and
the protocol:

- ``doRead`` asks the engine for another check of the socket only if the read may have
  left data.
- Written data is sent at the end of the pass, and the engine asks for write events only
  when the kernel's buffer is full.  So most responses are sent with one system call.

TLS is inherited.  Producers, half close and aborts behave as in Twisted.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.internet import tcp
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv6Address
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionFdescWentAway,
    UnsupportedAddressFamily,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.posixbase import PosixReactorBase, unixEnabled
from twisted.python import log
from twisted.python.runtime import platformType

from twisted_rtsig.engine.private_names import RESULT_IGNORED
from twisted_rtsig.engine.receive_buffers import bytes_to_read
from twisted_rtsig.notifiers.registration import Origin

if TYPE_CHECKING:
    from twisted_rtsig.engine.reactor import EngineReactor


# After these errors a call is tried again later.  Some systems fail with ENOBUFS when
# the buffer for sending is full.
_TRY_LATER = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.ENOBUFS})

# The descriptor was closed.  Windows reports that it is not a socket.
_CLOSED = frozenset({errno.EBADF, errno.ENOTSOCK})

# The largest number of bytes that are passed to one send(2), and that a connection
# sends before others get their turn.  The kernel takes as much as it has room for, and
# with fewer calls the peer is woken less often.  Windows locks the memory of all the
# data it gets, so there the limit is that of Twisted.
_SEND_LIMIT = 2 * 1024 * 1024 if sys.platform != "win32" else tcp.Connection.SEND_LIMIT

# If fewer unsent bytes than this are left, they are copied to join them with data that
# was written later.
_COPY_LIMIT = tcp.Connection.SEND_LIMIT

# The largest chunk into which several writes are joined: copying that much costs less
# than keeping the writes apart.
_CHUNK_LIMIT = 16 * 1024

# The values of ``StreamTransport.write_state``.
NOT_WRITING = 0
"""There is nothing to send."""
ONE_CHUNK = 1
"""
The engine sends ``dataBuffer`` at the end of the pass.  Then nothing is left to do: no
producer is resumed, and nothing is closed.
"""
QUEUED = 2
"""The engine calls ``doWrite`` at the end of the pass."""
REGISTERED = 3
"""The transport is a writer of the reactor: it waits for a write event."""
ABORTED = 4
"""
The connection was aborted: written data is dropped, although the connection is not lost
yet.
"""


class StreamTransport(tcp.Connection):
    """
    A stream connection.  List it among the bases before the class of Twisted that it
    changes.

    In the simplest cases (plain input; one chunk to send) the engine does not call
    ``doRead`` and ``doWrite``, but does the same itself.

    :cvar origin: where the descriptor comes from.
    :ivar reads_by_recv: whether the engine may call recv(2) and ``dataReceived`` itself
        instead of ``doRead``.
    :ivar write_state: one of the constants above.
    """

    # The attributes that every read and write uses.  In Twisted most of them are
    # attributes of the class until they are set, and finding these takes longer than
    # finding slots.
    __slots__ = (
        "SEND_LIMIT",
        "TLS",
        "_writeDisconnected",
        "_writeDisconnecting",
        "bufferSize",
        "connected",
        "dataBuffer",
        "disconnecting",
        "offset",
        "producer",
        "reactor",
        "reads_by_recv",
        "write_state",
    )

    origin: ClassVar[Origin] = Origin.OWN_TCP
    reactor: EngineReactor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_attributes()
        super().__init__(*args, **kwargs)

    def _set_attributes(self) -> None:
        """Set the slots, but for ``reactor``, to their first values."""
        self.SEND_LIMIT = _SEND_LIMIT
        self.TLS = False
        self._writeDisconnected = False
        self._writeDisconnecting = False
        # A byte more would spare messages of 64 KiB a second read that finds nothing.
        # But a proxy's write of such a chunk would pause its producer each time, and a
        # stream that reads up to 64 KiB would give the last byte alone.
        self.bufferSize = tcp.Connection.bufferSize
        self.connected = 0
        self.dataBuffer = b""
        self.disconnecting = 0
        self.offset = 0
        self.producer = None
        # Otherwise Twisted uses the result of dataReceived.
        self.reads_by_recv = RESULT_IGNORED
        self.write_state = NOT_WRITING

    @property
    def tells_drained(self) -> bool:
        """
        Whether ``doRead`` is that of this module, which asks for another check after a
        read that filled the buffer.
        """
        return True

    def doRead(self) -> Any:
        """Like ``tcp.Connection.doRead``."""
        try:
            received = self._receive()
        except OSError as error:
            return self.why_lost(error)
        return self._deliver(received)

    def _receive(self) -> Any:
        """
        Call recv(2) once.

        :raises OSError: if recv(2) fails.
        """
        return self.socket.recv(self.bufferSize)

    @staticmethod
    def _size(received: Any) -> int:
        """The number of bytes in the result of :meth:`_receive`."""
        return len(received)

    def _deliver(self, received: Any) -> Any:
        """Pass the result of :meth:`_receive` to the protocol."""
        if len(received) == self.bufferSize:
            self.reactor.look_again(self)
        return self._dataReceived(received)

    def _send_failed(self, why: Exception | None) -> Any:
        """
        Handle an error of send(2).

        Data that arrived before a reset can still be read.  It must not be lost when a
        write fails before the read: often it says why the peer has closed.

        :param why: the result of :meth:`why_lost`.
        :return: the result of ``doWrite``.
        """
        if why is CONNECTION_LOST:
            # Read what has arrived so far, unless the protocol pauses, closes or aborts
            # the connection.  The peer of a UNIX socket may send on without end: there
            # EPIPE only means that the peer does not read.
            left = bytes_to_read(self.fileno()) or 0
            while (
                left > 0
                and self.reactor.is_reading(self)
                and self.write_state != ABORTED
            ):
                try:
                    received = self._receive()
                except OSError:
                    break
                left -= self._size(received)
                if self._deliver(received):
                    break
            if self.write_state == ABORTED or not self.connected:
                # The connection is lost, or will be lost, for another reason.
                return None
        return why

    def why_lost(self, error: OSError) -> Exception | None:
        """The result of ``doRead`` or ``doWrite`` after an error; None to go on."""
        if error.errno in _TRY_LATER:
            return None
        if error.errno in _CLOSED:
            return ConnectionFdescWentAway("File descriptor lost")
        return CONNECTION_LOST

    def write(self, data: bytes) -> None:
        """See ``ITransport.write``."""
        if self.TLS or type(data) is not bytes:
            super().write(data)
        elif data and self.connected and not self._writeDisconnected:
            producer: Any = self.producer
            if (
                self.write_state == ONE_CHUNK
                and producer is None
                and len(self.dataBuffer) + len(data) <= _CHUNK_LIMIT
            ):
                self.dataBuffer += data
            elif (
                self.write_state
                or self.dataBuffer
                or self._tempDataLen
                # When all is sent, the connection or its sending half must be closed.
                or self.disconnecting
                or self._writeDisconnecting
                or (
                    producer is not None
                    and (
                        not self.streamingProducer
                        # An earlier producer was paused, so this one must be resumed
                        # when all is sent.
                        or self.producerPaused
                        or len(data) > self.bufferSize
                    )
                )
            ):
                self._tempDataBuffer.append(data)
                self._tempDataLen += len(data)
                if (
                    producer is not None
                    and self.streamingProducer
                    and len(self.dataBuffer) + self._tempDataLen > self.bufferSize
                ):
                    self.producerPaused = True
                    producer.pauseProducing()
                if self.write_state != QUEUED:
                    self.startWriting()
            else:
                # Like write_soon(), but inlined, since most responses come here.
                self.dataBuffer = data
                self.write_state = ONE_CHUNK
                reactor = self.reactor
                reactor._queued.append(self)
                if reactor._waiting:
                    reactor.wakeUp()

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """See ``ITransport.writeSequence``."""
        if self.TLS:
            super().writeSequence(iovec)
        else:
            pieces = tuple(iovec)
            for each in pieces:
                if not isinstance(each, bytes):
                    raise TypeError("Data must be bytes")
            self.write(b"".join(pieces))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See ``IConsumer.registerProducer``."""
        super().registerProducer(producer, streaming)
        if self.write_state == ONE_CHUNK:
            # Sending the chunk is no longer enough: the producer must be asked for
            # more.
            self.write_state = QUEUED

    def startWriting(self) -> None:
        """Let the engine call ``doWrite`` at the end of the pass."""
        if not self.connected:
            # The connection is being made, so wait for the kernel's write event.
            self.reactor.addWriter(self)
        elif self.write_state == NOT_WRITING:
            self.reactor.write_soon(self)
        elif self.write_state == ONE_CHUNK:
            self.write_state = QUEUED

    def abortConnection(self) -> None:
        """See ``IAbortingTransport.abortConnection``."""
        super().abortConnection()
        if self.connected:
            self.write_state = ABORTED
            # The call above has replaced doRead().
            self.reads_by_recv = False

    def doWrite(self) -> Any:
        """
        Like ``FileDescriptor.doWrite``, for a transport that may be queued without
        being a writer of the reactor.
        """
        data = self.dataBuffer
        if self._tempDataLen or self.offset or len(data) > self.SEND_LIMIT:
            return self._write_part()
        if data:
            try:
                sent = self.socket.send(data)
            except OSError as error:
                if error.errno not in _TRY_LATER:
                    return self._send_failed(self.why_lost(error))
                sent = 0
            if sent < len(data):
                self.offset = sent
                self.reactor.addWriter(self)
                return None
            self.dataBuffer = b""
        return self._wrote_all()

    def _write_part(self) -> Any:
        """Send a part of much data; the result is that of ``doWrite``."""
        data, start = self.dataBuffer, self.offset
        if self._tempDataLen and len(data) - start < _COPY_LIMIT:
            data = b"".join([memoryview(data)[start:], *self._tempDataBuffer])
            start = 0
            self._tempDataBuffer.clear()
            self._tempDataLen = 0
        end = min(len(data), start + self.SEND_LIMIT)
        try:
            start += self.socket.send(memoryview(data)[start:end])
        except OSError as error:
            if error.errno not in _TRY_LATER:
                return self._send_failed(self.why_lost(error))
        if start < len(data) or self._tempDataLen:
            self.dataBuffer = data
            self.offset = start
            if start < end:
                self.reactor.addWriter(self)
            else:
                self.startWriting()
            return None
        self.dataBuffer = b""
        self.offset = 0
        return self._wrote_all()

    def _wrote_all(self) -> Any:
        """Resume the producer, or close; the result is that of ``doWrite``."""
        if self.write_state:
            self.stopWriting()
        producer: Any = self.producer
        if producer is not None and (not self.streamingProducer or self.producerPaused):
            self.producerPaused = False
            producer.resumeProducing()
        elif self.disconnecting:
            return self._postLoseConnection()
        elif self._writeDisconnecting:
            self._writeDisconnected = True
            return self._closeWriteConnection()
        return None


class ServerTransport(StreamTransport):
    """
    A connection to a server.  It is in the reactor's ``server_connections`` until it is
    lost.
    """

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reactor.server_connections[self] = None

    def connectionLost(self, reason: Any) -> None:
        """See ``tcp.Connection.connectionLost``."""
        try:
            super().connectionLost(reason)
        finally:
            self.reactor._server_connection_lost(self)


class TCPServer(ServerTransport, tcp.Server):
    """
    A TCP connection that the reactor has accepted.

    Since each connection runs ``__init__`` and ``connectionLost``, these repeat the
    code of Twisted's classes instead of calling it.
    """

    def __init__(
        self,
        sock: Any,
        protocol: Any,
        client: Any,
        server: Any,
        sessionno: int,
        reactor: Any,
    ) -> None:
        if server is None or not reactor:
            super().__init__(sock, protocol, client, server, sessionno, reactor)
            return
        self._set_attributes()
        # FileDescriptor
        self.reactor = reactor
        self._tempDataBuffer = []
        self._tempDataLen = 0
        # Connection
        self.socket = sock
        sock.setblocking(False)
        self.fileno = sock.fileno
        self.protocol = protocol
        # Server
        if len(client) != 2:
            self._addressType = IPv6Address
        self.server = server
        self.client = client
        self.sessionno = sessionno
        self.hostname = hostname = client[0]
        self.logstr = f"{self._getLogPrefix(protocol)},{sessionno},{hostname}"
        self._repr_of = protocol.__class__, server._realPortNumber
        reactor.begin_reading(self)
        self.connected = 1
        # ServerTransport
        reactor.server_connections[self] = None

    @property
    def repstr(self) -> str:
        """The result of ``repr``, made only when it is asked for."""
        text: str | None = self.__dict__.get("repstr")
        if text is None:
            cls, port = self._repr_of
            text = f"<{cls.__name__} #{self.sessionno} on {port}>"
        return text

    @repstr.setter
    def repstr(self, text: str) -> None:
        self.__dict__["repstr"] = text

    def connectionLost(self, reason: Any) -> None:
        """See ``tcp.Connection.connectionLost``."""
        if not hasattr(self, "socket"):
            # This is a second call.
            return
        try:
            # FileDescriptor
            self.disconnected = 1
            self.connected = 0
            producer: Any = self.producer
            if producer is not None:
                producer.stopProducing()
                self.producer = None
            reactor = self.reactor
            reactor.removeReader(self)
            reactor.removeWriter(self)
            # Connection
            orderly = type(reason.value) is ConnectionDone
            self._closeSocket(orderly or not reason.check(ConnectionAborted))
            protocol = self.protocol
            del self.protocol
            del self.socket
            del self.fileno
            protocol.connectionLost(reason)
        finally:
            # ServerTransport
            self.reactor._server_connection_lost(self)


class AdoptedTCPServer(TCPServer):
    """A TCP connection that other code has made and may have open elsewhere."""

    origin = Origin.SHARED


def _is_connected(client: Any) -> bool:
    """Whether a client is connected; until then ``doRead`` is another method."""
    return bool(client.connected)


class TCPClient(StreamTransport, tcp.Client):
    """A TCP connection that the reactor makes."""

    tells_drained = property(_is_connected)


class TCPPort(tcp.Port):
    """A listening TCP port."""

    transport = TCPServer

    def doRead(self) -> None:
        """
        Like ``tcp.Port.doRead``, but faster: Twisted's method makes a logger for each
        call and members of enumerations for each socket.  It still handles errors,
        Windows, and subclasses of ``socket.socket``.
        """
        listening: Any = self.socket
        factory: Any = self.factory
        if platformType != "posix" or type(self.socket) is not socket.socket:
            super().doRead()
            return
        # Plain integers: the properties of socket.socket would make members of
        # enumerations each time.
        handle: Any = super(socket.socket, listening)
        family, kind, proto = handle.family, handle.type, handle.proto
        most, accepted = self.numberAccepts, 0
        try:
            while accepted < most:
                try:
                    descriptor, address = listening._accept()
                except BlockingIOError:
                    break
                except OSError:
                    super().doRead()
                    return
                accepted += 1
                client = socket.socket(family, kind, proto, fileno=descriptor)
                try:
                    if len(address) == 4:
                        # getnameinfo() adds the scope to an IPv6 address.
                        host = socket.getnameinfo(
                            address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
                        )
                        address = (host[0], *address[1:])
                    protocol = factory.buildProtocol(self._buildAddr(address))
                    if protocol is None:
                        client.close()
                        continue
                    number = self.sessionno
                    self.sessionno = number + 1
                    transport = self.transport(
                        client, protocol, address, self, number, self.reactor
                    )
                except BaseException:
                    # The logged failure refers to the socket, which would stay open.
                    client.close()
                    raise
                protocol.makeConnection(transport)
            if accepted == self.numberAccepts:
                self.numberAccepts += 20
            else:
                self.numberAccepts = max(1, accepted)
        except BaseException:
            log.deferr()


class TCPConnector(tcp.Connector):
    """Makes TCP connections."""

    def _makeTransport(self) -> TCPClient:
        return TCPClient(self.host, self.port, self.bindAddress, self, self.reactor)


if unixEnabled:
    from twisted.internet import unix

    # The size of the buffer for ancillary data, as in Twisted.  On Linux a message can
    # carry up to 253 descriptors (SCM_RIGHTS in unix(7)), which need a quarter of this.
    _ANCILLARY_BYTES = 4096

    class UNIXTransport(StreamTransport):
        """A UNIX stream connection, which can also carry descriptors."""

        origin = Origin.OWN_UNIX

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.reads_by_recv = False

        # Attributes of unix._SendmsgMixin.
        _sendmsgQueue: list[int]
        _ancillaryLevelSOLSOCKETTypeSCMRIGHTS: Callable[[bytes], None]

        def _receive(self) -> Any:
            """
            Call recvmsg(2) once.

            :raises OSError: if recvmsg(2) fails.
            """
            return self.socket.recvmsg(self.bufferSize, _ANCILLARY_BYTES)

        @staticmethod
        def _size(received: Any) -> int:
            return len(received[0])

        def _deliver(self, received: Any) -> Any:
            """Like ``unix.Server.doRead``, after recvmsg(2)."""
            data, ancillary, _, _ = received
            # A message with ancillary data ends the read, even if more data follows.
            if ancillary or len(data) == self.bufferSize:
                self.reactor.look_again(self)
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._ancillaryLevelSOLSOCKETTypeSCMRIGHTS(payload)
                else:
                    log.msg(
                        format="%(protocolName)s (on %(hostAddress)r) "
                        "received unsupported ancillary data "
                        "(level=%(cmsgLevel)r, type=%(cmsgType)r) "
                        "from %(peerAddress)r.",
                        hostAddress=self.getHost(),
                        peerAddress=self.getPeer(),
                        protocolName=self._getLogPrefix(self.protocol),
                        cmsgLevel=level,
                        cmsgType=kind,
                    )
            return self._dataReceived(data)

        def doWrite(self) -> Any:
            """Like ``unix.Server.doWrite``: descriptors go with the first bytes."""
            if not self._sendmsgQueue:
                return super().doWrite()
            why = FileDescriptor.doWrite(self)
            if why:
                return self._send_failed(why)
            if self.dataBuffer or self._tempDataLen:
                self.reactor.addWriter(self)
            return None

    class UNIXServer(ServerTransport, UNIXTransport, unix.Server):
        """A UNIX connection that the reactor has accepted."""

    class AdoptedUNIXServer(UNIXServer):
        """A UNIX connection that other code has made and may have open elsewhere."""

        origin = Origin.SHARED

    class UNIXClient(UNIXTransport, unix.Client):
        """A UNIX connection that the reactor makes."""

        tells_drained = property(_is_connected)

    class UNIXPort(unix.Port):
        """A listening UNIX port."""

        transport = UNIXServer

    class UNIXConnector(unix.Connector):
        """Makes UNIX connections."""

        def _makeTransport(self) -> Any:
            return UNIXClient(self.address, self, self.reactor, self.checkPID)


class StreamReactor(PosixReactorBase):
    """
    Makes the transports of this module instead of Twisted's.

    :cvar tcp_port: the class of listening TCP ports.  In a worker process
        (:mod:`twisted_rtsig.workers`) an attribute of the reactor with the same name
        replaces it.
    :cvar unix_port: likewise, the class of listening UNIX ports.
    :ivar server_connections: the connections that were accepted or adopted and have not
        been lost yet, the oldest first.  They include paused ones, which are neither
        readers nor writers.
    :ivar when_servers_idle: called whenever the last server connection has been lost;
        None for no call.
    """

    tcp_port: type[TCPPort] = TCPPort

    def __init__(self) -> None:
        self.server_connections: dict[ServerTransport, None] = {}
        self.when_servers_idle: Callable[[], None] | None = None
        super().__init__()

    def _server_connection_lost(self, connection: ServerTransport) -> None:
        connections = self.server_connections
        connections.pop(connection, None)
        if not connections and self.when_servers_idle is not None:
            self.when_servers_idle()

    def listenTCP(
        self, port: Any, factory: Any, backlog: int = 50, interface: str = ""
    ) -> TCPPort:
        """See ``IReactorTCP.listenTCP``."""
        listening = self.tcp_port(port, factory, backlog, interface, self)
        listening.startListening()
        return listening

    def connectTCP(
        self,
        host: str,
        port: int,
        factory: Any,
        timeout: float = 30.0,
        bindAddress: Any = None,
    ) -> TCPConnector:
        """See ``IReactorTCP.connectTCP``."""
        connector = TCPConnector(host, port, factory, timeout, bindAddress, self)
        connector.connect()
        return connector

    def _is_unix(self, family: int) -> bool:
        """
        Whether an address family is that of UNIX sockets.

        :raises UnsupportedAddressFamily: if the reactor does not serve it.
        """
        if family not in self._supportedAddressFamilies:
            raise UnsupportedAddressFamily(family)
        return unixEnabled and family == socket.AF_UNIX

    def adoptStreamPort(
        self, fileDescriptor: int, addressFamily: int, factory: Any
    ) -> Any:
        """See ``IReactorSocket.adoptStreamPort``."""
        if self._is_unix(addressFamily):
            listening = self.unix_port._fromListeningDescriptor(
                self, fileDescriptor, factory
            )
        else:
            listening = TCPPort._fromListeningDescriptor(
                self, fileDescriptor, addressFamily, factory
            )
        listening.startListening()
        return listening

    def adoptStreamConnection(
        self, fileDescriptor: int, addressFamily: int, factory: Any
    ) -> Any:
        """See ``IReactorSocket.adoptStreamConnection``."""
        if self._is_unix(addressFamily):
            return AdoptedUNIXServer._fromConnectedSocket(fileDescriptor, factory, self)
        return AdoptedTCPServer._fromConnectedSocket(
            fileDescriptor, addressFamily, factory, self
        )

    if unixEnabled:
        unix_port: type[UNIXPort] = UNIXPort

        def listenUNIX(
            self,
            address: Any,
            factory: Any,
            backlog: int = 50,
            mode: int = 0o666,
            wantPID: Any = 0,
        ) -> UNIXPort:
            """See ``IReactorUNIX.listenUNIX``."""
            listening = self.unix_port(address, factory, backlog, mode, self, wantPID)
            listening.startListening()
            return listening

        def connectUNIX(
            self, address: Any, factory: Any, timeout: float = 30, checkPID: Any = 0
        ) -> UNIXConnector:
            """See ``IReactorUNIX.connectUNIX``."""
            connector = UNIXConnector(address, factory, timeout, self, checkPID)
            connector.connect()
            return connector
