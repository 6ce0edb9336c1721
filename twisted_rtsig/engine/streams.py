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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.internet import tcp
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionFdescWentAway, UnsupportedAddressFamily
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.posixbase import PosixReactorBase, unixEnabled

from twisted_rtsig.engine.registration import Origin

if TYPE_CHECKING:
    from twisted_rtsig.engine.reactor import EngineReactor


# As Twisted has it: ENOBUFS is what some systems say when a queue is full.
_FULL = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.ENOBUFS})


def _why_lost(error: OSError) -> Exception:
    if error.errno == errno.EBADF:
        return ConnectionFdescWentAway("File descriptor lost")
    return CONNECTION_LOST


# How a stream is known to the reactor as a writer.
NOT_WRITING, QUEUED, REGISTERED = range(3)


class Stream(tcp.Connection):
    """
    A stream connection; goes before the class of Twisted's that it changes.

    :cvar origin: who may hold its open file description.
    :ivar write_state: C{QUEUED} until the end of the pass, or C{REGISTERED}
        for write events, or C{NOT_WRITING}.  Only the reactor changes it.
    """

    # What each request looks at.  Twisted has most of these as attributes of
    # the class until they are set, which take longer to find than slots.
    __slots__ = (
        "TLS",
        "_writeDisconnected",
        "_writeDisconnecting",
        "connected",
        "dataBuffer",
        "disconnecting",
        "offset",
        "producer",
        "reactor",
        "write_state",
    )

    origin: ClassVar[Origin] = Origin.OWN_TCP
    reactor: EngineReactor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.TLS = False
        self._writeDisconnected = False
        self._writeDisconnecting = False
        self.connected = 0
        self.dataBuffer = b""
        self.disconnecting = 0
        self.offset = 0
        self.producer = None
        self.write_state = NOT_WRITING
        super().__init__(*args, **kwargs)

    def doRead(self) -> Any:
        """As ``tcp.Connection.doRead``."""
        size = 65536
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return None
        except OSError as error:
            return _why_lost(error)
        if len(data) == size:
            self.reactor.look_again(self)
        if data:
            self.protocol.dataReceived(data)
            return None
        return self._dataReceived(data)

    def write(self, data: bytes) -> None:
        """As ``ITransport.write``."""
        if self.TLS or self.producer is not None or data.__class__ is not bytes:
            super().write(data)
        elif data and self.connected and not self._writeDisconnected:
            if self.dataBuffer or self._tempDataLen:
                self._tempDataBuffer.append(data)
                self._tempDataLen += len(data)
            else:
                self.dataBuffer = data
            if not self.write_state:
                self.reactor.write_soon(self)

    def startWriting(self) -> None:
        """Have ``doWrite`` called at the end of the pass."""
        if self.connected:
            if not self.write_state:
                self.reactor.write_soon(self)
        else:
            # Not before the kernel says so: the connection is being made.
            self.reactor.addWriter(self)

    def doWrite(self) -> Any:
        """As ``FileDescriptor.doWrite``, for a writer that may be queued."""
        data = self.dataBuffer
        if self._tempDataLen or self.offset or len(data) > self.SEND_LIMIT:
            return self._write_part()
        if data:
            try:
                sent = self.socket.send(data)
            except OSError as error:
                if error.errno not in _FULL:
                    return _why_lost(error)
                sent = 0
            if sent < len(data):
                self.offset = sent
                self.reactor.addWriter(self)
                return None
            self.dataBuffer = b""
        if (
            self.producer is not None
            or self.disconnecting
            or self._writeDisconnecting
            or self.write_state
        ):
            return self._wrote_all()
        return None

    def _write_part(self) -> Any:
        limit = self.SEND_LIMIT
        data, start = self.dataBuffer, self.offset
        if len(data) - start < limit:
            data = b"".join([memoryview(data)[start:], *self._tempDataBuffer])
            start = 0
            self._tempDataBuffer.clear()
            self._tempDataLen = 0
        end = min(len(data), start + limit)
        try:
            sent = start + self.socket.send(memoryview(data)[start:end])
        except OSError as error:
            if error.errno not in _FULL:
                return _why_lost(error)
            sent = start
        if sent < len(data) or self._tempDataLen:
            self.dataBuffer = data
            self.offset = sent
            if sent < end:
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


class TCPServer(Stream, tcp.Server):
    """A TCP connection that the reactor accepted."""


class AdoptedTCPServer(TCPServer):
    """A TCP connection that something else made, and may hold as well."""

    origin = Origin.SHARED


class TCPClient(Stream, tcp.Client):
    """A TCP connection that the reactor makes."""


class TCPPort(tcp.Port):
    """A listening TCP port."""

    transport = TCPServer


class TCPConnector(tcp.Connector):
    """Makes TCP connections."""

    def _makeTransport(self) -> TCPClient:
        return TCPClient(self.host, self.port, self.bindAddress, self, self.reactor)


if unixEnabled:
    from twisted.internet import unix
    from twisted.python import log

    # Room for ancillary data, as Twisted has it.  Linux lets one message carry
    # 253 descriptors (SCM_RIGHTS in unix(7)), which is a quarter of it.
    _ANCILLARY_BYTES = 4096

    class UNIXStream(Stream):
        """A UNIX stream connection, which carries descriptors as well."""

        origin = Origin.OWN_UNIX
        # What unix._SendmsgMixin has.
        _sendmsgQueue: list[int]
        _ancillaryLevelSOLSOCKETTypeSCMRIGHTS: Callable[[bytes], None]

        def doRead(self) -> Any:
            """As ``unix.Server.doRead``."""
            try:
                data, ancillary, _, _ = self.socket.recvmsg(
                    self.bufferSize, _ANCILLARY_BYTES
                )
            except BlockingIOError:
                return None
            except OSError as error:
                return _why_lost(error)
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
            if not why and (self.dataBuffer or self._tempDataLen):
                self.reactor.addWriter(self)
            return why

    class UNIXServer(UNIXStream, unix.Server):
        """A UNIX connection that the reactor accepted."""

    class AdoptedUNIXServer(UNIXServer):
        """A UNIX connection that something else made, and may hold as well."""

        origin = Origin.SHARED

    class UNIXClient(UNIXStream, unix.Client):
        """A UNIX connection that the reactor makes."""

    class UNIXPort(unix.Port):
        """A listening UNIX port."""

        transport = UNIXServer

    class UNIXConnector(unix.Connector):
        """Makes UNIX connections."""

        def _makeTransport(self) -> Any:
            return UNIXClient(self.address, self, self.reactor, self.checkPID)


class StreamReactor(PosixReactorBase):
    """Gives out the streams of this module wherever Twisted gives out its own."""

    def listenTCP(
        self, port: Any, factory: Any, backlog: int = 50, interface: str = ""
    ) -> TCPPort:
        """See ``IReactorTCP.listenTCP``."""
        listening = TCPPort(port, factory, backlog, interface, self)
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
        if addressFamily == socket.AF_UNIX:
            listening = UNIXPort._fromListeningDescriptor(self, fileDescriptor, factory)
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
        if addressFamily == socket.AF_UNIX:
            return AdoptedUNIXServer._fromConnectedSocket(fileDescriptor, factory, self)
        return AdoptedTCPServer._fromConnectedSocket(
            fileDescriptor, addressFamily, factory, self
        )

    if unixEnabled:

        def listenUNIX(
            self,
            address: Any,
            factory: Any,
            backlog: int = 50,
            mode: int = 0o666,
            wantPID: Any = 0,
        ) -> UNIXPort:
            """See ``IReactorUNIX.listenUNIX``."""
            listening = UNIXPort(address, factory, backlog, mode, self, wantPID)
            listening.startListening()
            return listening

        def connectUNIX(
            self, address: Any, factory: Any, timeout: float = 30, checkPID: Any = 0
        ) -> UNIXConnector:
            """See ``IReactorUNIX.connectUNIX``."""
            connector = UNIXConnector(address, factory, timeout, self, checkPID)
            connector.connect()
            return connector
