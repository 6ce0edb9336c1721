"""Datagrams: sending and receiving UDP in a task."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import MessageLengthError
from twisted.internet.protocol import DatagramProtocol

from twisted_rtsig.coro.closing import ClosedAtExit
from twisted_rtsig.coro.errors import BusyResourceError, StreamError
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.interfaces import IPAddress
from twisted_rtsig.coro.operations import Done, Finished, Operation, failed
from twisted_rtsig.coro.scheduler import scheduler_for

Address = tuple[Any, ...]

# So many datagrams at most wait to be received here.  More of them wait in the kernel,
# which drops those that its buffer has no room for.
_MOST_WAITING = 64


class DatagramSocket(ClosedAtExit):
    """
    A UDP port.  :func:`open_datagrams` makes it.

    Only one task at a time receives; any number may send.

    :ivar transport: the Twisted transport, for multicast and the like.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self._waiting: deque[tuple[bytes, Address]] = deque()
        self._receiver: Operation[tuple[bytes, Address]] | None = None
        self._refused: Exception | None = None
        self._paused = False
        self._closed: Deferred[None] | None = None

    @property
    def host(self) -> IPAddress:
        """The address of this side: an ``IPv4Address`` or an ``IPv6Address``."""
        return cast(IPAddress, self.transport.getHost())

    @must_be_awaited
    def receive_from(self) -> Operation[tuple[bytes, Address]]:
        """
        Return the next datagram, and the address it is from: ``(host, port)`` or
        longer.

        :raises ConnectionRefusedError: after ``transport.connect``, if nothing receives
            at that address.
        :raises StreamError: after ``close``.
        """
        if self._receiver is not None:
            raise BusyResourceError("another task receives from this socket already")
        if self._waiting:
            finished: Finished[tuple[bytes, Address]] = Finished()
            finished.result = self._waiting.popleft()
            if self._paused and not self._waiting:
                self._paused = False
                self.transport.resumeProducing()
            return finished
        if self._refused is not None:
            error, self._refused = self._refused, None
            return failed(error)
        if self._closed is not None:
            return failed(StreamError("nothing can be received after close()"))
        operation: Operation[tuple[bytes, Address]] = Operation()
        operation.owner = self
        self._receiver = operation
        return operation

    def send_to(self, data: bytes, address: Address | None = None) -> Operation[None]:
        """
        Send a datagram.  If the network is too busy for it, it is lost.

        :param address: ``(host, port)``, where the host is an IP address and no name;
            None after ``transport.connect``.
        :raises MessageLengthError: if it is too large.
        :raises OSError: if the system cannot send it.
        :raises StreamError: after ``close``.
        """
        if self._closed is not None:
            return failed(StreamError("nothing can be sent after close()"), True)
        try:
            self.transport.write(data, address)
        except (OSError, MessageLengthError) as error:
            return failed(error, quietly=True)
        done: Operation[None] = Done()
        return done

    def close(self) -> Deferred[None]:
        """Close the port; fires when it is closed."""
        if self._closed is None:
            self._closed = maybeDeferred(self.transport.stopListening)
        done: Deferred[None] = Deferred()
        self._closed.addCallback(_pass_on, done)
        return done

    async def __aenter__(self) -> DatagramSocket:
        return self

    def _close_at_exit(self) -> Deferred[None]:
        return self.close()

    async def __aiter__(self) -> AsyncIterator[tuple[bytes, Address]]:
        while True:
            yield await self.receive_from()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._receiver = None

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"a datagram to {self.host}"

    # From the protocol

    def feed(self, data: bytes, address: Address) -> None:
        """A datagram has arrived."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.succeed((data, address))
            return
        self._waiting.append((data, address))
        if len(self._waiting) >= _MOST_WAITING and not self._paused:
            self._paused = True
            self.transport.pauseProducing()

    def fail(self, error: Exception) -> None:
        """Let the wait for a datagram fail; or, if there is none, the next one."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.fail(error)
        else:
            self._refused = error


def _pass_on(result: object, to: Deferred[None]) -> object:
    to.callback(None)
    return result


class _Datagrams(DatagramProtocol):
    socket: DatagramSocket

    def startProtocol(self) -> None:
        self.socket = DatagramSocket(self.transport)

    def datagramReceived(self, datagram: bytes, addr: Address) -> None:
        self.socket.feed(datagram, addr)

    def connectionRefused(self) -> None:
        self.socket.fail(ConnectionRefusedError("nothing receives at that address"))

    def stopProtocol(self) -> None:
        self.socket.fail(StreamError("nothing can be received after close()"))
        # The transport holds this, and the socket the transport.
        del self.socket


def open_datagrams(
    port: int = 0, interface: str = "", reactor: Any | None = None
) -> DatagramSocket:
    """
    Open a UDP port.

    :param port: 0 for any.
    :param interface: the address of one network interface; all by default.
    :param reactor: an ``IReactorUDP`` provider; by default that of the task.
    :raises CannotListenError: if the port is taken.
    """
    protocol = _Datagrams()
    protocol.noisy = False
    scheduler_for(reactor).reactor.listenUDP(port, protocol, interface)
    return protocol.socket
