"""
The TCP and UNIX stream transports of the engine's reactors, and the ways to
get one.

They are Twisted's own with a shorter way from the socket to the protocol and
back:

- ``doRead`` tells the engine whether it has emptied the socket, which saves a
  second look at it.
- What is written is sent at the end of the pass, and write events are asked
  for only when the kernel's buffer is full.  So most answers cost one system
  call.

Everything else is inherited: TLS, producers, half close, aborts.
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
from twisted_rtsig.notifiers.registration import Origin

if TYPE_CHECKING:
    from twisted_rtsig.engine.reactor import EngineReactor


# Some systems say ENOBUFS when there is no room.
_LATER = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.ENOBUFS})

# The descriptor was closed; Windows says that it is no socket.
_CLOSED = frozenset({errno.EBADF, errno.ENOTSOCK})

# The most bytes that one send(2) is given, and that a connection sends before others
# get their turn.  The kernel takes what it has room for, and fewer calls wake up the
# peer less often.  Windows locks the memory of what it is given, so that it gets no
# more than from Twisted.
_SEND_LIMIT = 2 * 1024 * 1024 if sys.platform != "win32" else tcp.Connection.SEND_LIMIT

# The most bytes that are copied together with what is written after them.
_COPIED_AT_MOST = tcp.Connection.SEND_LIMIT

# So many bytes that are written in pieces are still one chunk: to copy them costs less
# than to keep them apart.
_ONE_CHUNK_AT_MOST = 16 * 1024

# What a stream is to the reactor as a writer.
NOT_WRITING = 0
ONE_CHUNK = 1
"""At the end of the pass ``dataBuffer`` is to be sent, and that is all there is."""
QUEUED = 2
"""At the end of the pass ``doWrite`` is to be called."""
REGISTERED = 3
"""It waits for a write event."""
ABORTED = 4
"""What is written goes nowhere, though it may still be connected."""


class StreamTransport(tcp.Connection):
    """
    A stream connection; goes before the class of Twisted's that it changes.

    The engine reads and sends by itself in the simplest cases (one plain event,
    one chunk), in the same way as ``doRead`` and ``doWrite`` do.

    :cvar origin: who may hold its open file description.
    :ivar reads_by_recv: all that ``doRead`` does is recv(2) and ``dataReceived``.
    :ivar write_state: what it is to the reactor as a writer.
    """

    # What each request looks at.  Twisted has most of these as attributes of
    # the class until they are set, which take longer to find than slots.
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
        """Set what an instance has in a slot and Twisted's class has for it."""
        self.SEND_LIMIT = _SEND_LIMIT
        self.TLS = False
        self._writeDisconnected = False
        self._writeDisconnecting = False
        self.bufferSize = tcp.Connection.bufferSize
        self.connected = 0
        self.dataBuffer = b""
        self.disconnecting = 0
        self.offset = 0
        self.producer = None
        self.reads_by_recv = RESULT_IGNORED
        self.write_state = NOT_WRITING

    @property
    def tells_drained(self) -> bool:
        """``doRead`` is that of this module, which looks again after a full read."""
        return True

    def doRead(self) -> Any:
        """As ``tcp.Connection.doRead``."""
        try:
            received = self._receive()
        except OSError as error:
            return self.why_lost(error)
        return self._deliver(received)

    def _receive(self) -> Any:
        """
        Call recv(2) once.

        :raises OSError: what recv(2) does.
        """
        return self.socket.recv(self.bufferSize)

    def _deliver(self, received: Any) -> Any:
        """Pass to the protocol what :meth:`_receive` has returned."""
        if len(received) == self.bufferSize:
            self.reactor.look_again(self)
        return self._dataReceived(received)

    def _send_failed(self, why: Exception | None) -> Any:
        """
        What ``doWrite`` returns after an error, which ``why_lost`` took for ``why``.

        A reset (tcp(7)) leaves what has arrived before it to be read.  A write that
        meets the reset first must not drop that: often it says why the peer has
        left.
        """
        if why is CONNECTION_LOST:
            # Until the protocol pauses, closes or aborts the connection.
            while self.reactor.is_reading(self):
                try:
                    received = self._receive()
                except OSError:
                    break
                if self._deliver(received):
                    break
            if self.write_state == ABORTED or not self.connected:
                # The reason is another by now.
                return None
        return why

    def why_lost(self, error: OSError) -> Exception | None:
        """What ``doRead`` and ``doWrite`` return after an error; None to go on."""
        if error.errno in _LATER:
            return None
        if error.errno in _CLOSED:
            return ConnectionFdescWentAway("File descriptor lost")
        return CONNECTION_LOST

    def write(self, data: bytes) -> None:
        """As ``ITransport.write``."""
        if self.TLS or type(data) is not bytes:
            super().write(data)
        elif data and self.connected and not self._writeDisconnected:
            producer: Any = self.producer
            if (
                self.write_state == ONE_CHUNK
                and producer is None
                and len(self.dataBuffer) + len(data) <= _ONE_CHUNK_AT_MOST
            ):
                self.dataBuffer += data
            elif (
                self.write_state
                or self.dataBuffer
                or self._tempDataLen
                # When all is sent there is more to do: to close.
                or self.disconnecting
                or self._writeDisconnecting
                or (
                    producer is not None
                    and (
                        not self.streamingProducer
                        # A former one was paused: this is what resumes this one.
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
                # As write_soon, without the call: each request comes here.
                self.dataBuffer = data
                self.write_state = ONE_CHUNK
                reactor = self.reactor
                reactor._queued.append(self)
                if reactor._waiting:
                    reactor.wakeUp()

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """As ``ITransport.writeSequence``."""
        if self.TLS:
            super().writeSequence(iovec)
        else:
            pieces = tuple(iovec)
            for each in pieces:
                if not isinstance(each, bytes):
                    raise TypeError("Data must be bytes")
            self.write(b"".join(pieces))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """As ``IConsumer.registerProducer``."""
        super().registerProducer(producer, streaming)
        if self.write_state == ONE_CHUNK:
            # That is not all any more: there is a producer to ask for more.
            self.write_state = QUEUED

    def startWriting(self) -> None:
        """Have ``doWrite`` called at the end of the pass."""
        if not self.connected:
            # Not before the kernel says so: the connection is being made.
            self.reactor.addWriter(self)
        elif self.write_state == NOT_WRITING:
            self.reactor.write_soon(self)
        elif self.write_state == ONE_CHUNK:
            self.write_state = QUEUED

    def abortConnection(self) -> None:
        """As ``IAbortingTransport.abortConnection``."""
        super().abortConnection()
        if self.connected:
            self.write_state = ABORTED

    def doWrite(self) -> Any:
        """As ``FileDescriptor.doWrite``, for a writer that may be queued."""
        data = self.dataBuffer
        if self._tempDataLen or self.offset or len(data) > self.SEND_LIMIT:
            return self._write_part()
        if data:
            try:
                sent = self.socket.send(data)
            except OSError as error:
                if error.errno not in _LATER:
                    return self._send_failed(self.why_lost(error))
                sent = 0
            if sent < len(data):
                self.offset = sent
                self.reactor.addWriter(self)
                return None
            self.dataBuffer = b""
        return self._wrote_all()

    def _write_part(self) -> Any:
        data, start = self.dataBuffer, self.offset
        if self._tempDataLen and len(data) - start < _COPIED_AT_MOST:
            data = b"".join([memoryview(data)[start:], *self._tempDataBuffer])
            start = 0
            self._tempDataBuffer.clear()
            self._tempDataLen = 0
        end = min(len(data), start + self.SEND_LIMIT)
        try:
            start += self.socket.send(memoryview(data)[start:end])
        except OSError as error:
            if error.errno not in _LATER:
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
    """A connection to a server, which its reactor lists until it is lost."""

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reactor.server_connections[self] = None

    def connectionLost(self, reason: Any) -> None:
        """As ``tcp.Connection.connectionLost``."""
        try:
            super().connectionLost(reason)
        finally:
            self.reactor._server_connection_lost(self)


class TCPServer(ServerTransport, tcp.Server):
    """
    A TCP connection that the reactor accepted.

    Each connection comes through ``__init__`` and ``connectionLost``, so that what
    Twisted's classes do there is written out.
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
        """What ``repr`` returns, which few ask for."""
        text: str | None = self.__dict__.get("repstr")
        if text is None:
            cls, port = self._repr_of
            text = f"<{cls.__name__} #{self.sessionno} on {port}>"
        return text

    @repstr.setter
    def repstr(self, text: str) -> None:
        self.__dict__["repstr"] = text

    def connectionLost(self, reason: Any) -> None:
        """See ``abstract.FileDescriptor.connectionLost``."""
        if not hasattr(self, "socket"):
            # It was called before.
            return
        try:
            # FileDescriptor
            self.disconnected = 1
            self.connected = 0
            producer: Any = self.producer
            if producer is not None:
                producer.stopProducing()
                self.producer = None
            self.stopReading()
            self.stopWriting()
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
    """A TCP connection that something else made, and may hold as well."""

    origin = Origin.SHARED


class TCPClient(StreamTransport, tcp.Client):
    """A TCP connection that the reactor makes."""

    @property
    def tells_drained(self) -> bool:
        """While it connects, ``doRead`` is another."""
        return bool(self.connected)


class TCPPort(tcp.Port):
    """A listening TCP port."""

    transport = TCPServer

    def doRead(self) -> None:
        """
        As ``tcp.Port.doRead``, which is left to deal with errors, and which makes a
        logger, and members of enumerations for each socket.
        """
        listening: Any = self.socket
        factory: Any = self.factory
        if platformType != "posix" or type(self.socket) is not socket.socket:
            super().doRead()
            return
        # The attributes of socket.socket make members of enumerations.
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
                if len(address) == 4:
                    # For the scope of an IPv6 address.
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

    # Room for ancillary data, as Twisted has it.  Linux lets one message carry
    # 253 descriptors (SCM_RIGHTS in unix(7)), which is a quarter of it.
    _ANCILLARY_BYTES = 4096

    class UNIXTransport(StreamTransport):
        """A UNIX stream connection, which carries descriptors as well."""

        origin = Origin.OWN_UNIX

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.reads_by_recv = False

        # What unix._SendmsgMixin has.
        _sendmsgQueue: list[int]
        _ancillaryLevelSOLSOCKETTypeSCMRIGHTS: Callable[[bytes], None]

        def _receive(self) -> Any:
            """
            Call recvmsg(2) once.

            :raises OSError: what recvmsg(2) does.
            """
            return self.socket.recvmsg(self.bufferSize, _ANCILLARY_BYTES)

        def _deliver(self, received: Any) -> Any:
            """As ``unix.Server.doRead``, after recvmsg(2)."""
            data, ancillary, _, _ = received
            # A message with ancillary data ends the read, whatever follows it.
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
            """As ``unix.Server.doWrite``: descriptors go with the first bytes."""
            if not self._sendmsgQueue:
                return super().doWrite()
            why = FileDescriptor.doWrite(self)
            if why:
                return self._send_failed(why)
            if self.dataBuffer or self._tempDataLen:
                self.reactor.addWriter(self)
            return None

    class UNIXServer(ServerTransport, UNIXTransport, unix.Server):
        """A UNIX connection that the reactor accepted."""

    class AdoptedUNIXServer(UNIXServer):
        """A UNIX connection that something else made, and may hold as well."""

        origin = Origin.SHARED

    class UNIXClient(UNIXTransport, unix.Client):
        """A UNIX connection that the reactor makes."""

        @property
        def tells_drained(self) -> bool:
            """While it connects, ``doRead`` is another."""
            return bool(self.connected)

    class UNIXPort(unix.Port):
        """A listening UNIX port."""

        transport = UNIXServer

    class UNIXConnector(unix.Connector):
        """Makes UNIX connections."""

        def _makeTransport(self) -> Any:
            return UNIXClient(self.address, self, self.reactor, self.checkPID)


class StreamReactor(PosixReactorBase):
    """
    Gives out the streams of this module wherever Twisted gives out its own.

    :cvar tcp_port: the class of listening TCP ports.  In a worker process
        (``twisted_rtsig.workers``) an instance has another one.
    :cvar unix_port: likewise, of listening UNIX ports.
    :ivar server_connections: those that were accepted or adopted, and are not lost, in
        that order; paused ones as well, which are neither readers nor writers.
    :ivar when_servers_idle: called when the last of them was lost.
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

    def adoptStreamPort(
        self, fileDescriptor: int, addressFamily: int, factory: Any
    ) -> Any:
        """See ``IReactorSocket.adoptStreamPort``."""
        if addressFamily not in self._supportedAddressFamilies:
            raise UnsupportedAddressFamily(addressFamily)
        if unixEnabled and addressFamily == socket.AF_UNIX:
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
        if addressFamily not in self._supportedAddressFamilies:
            raise UnsupportedAddressFamily(addressFamily)
        if unixEnabled and addressFamily == socket.AF_UNIX:
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
