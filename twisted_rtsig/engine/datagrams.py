"""
The UDP ports of the engine's reactors: those of Twisted, except that they check each
destination address only once.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import udp
from twisted.internet.error import UnsupportedAddressFamily
from twisted.internet.posixbase import PosixReactorBase

# The most hosts that a port remembers.
_MOST_HOSTS = 1000


class UDPPort(udp.Port):
    """A UDP port."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The hosts that this port has sent to.  They are IP addresses of its own
        # family.
        self._known_hosts: set[str] = set()

    def write(self, datagram: bytes, addr: tuple[str, int] | None = None) -> Any:
        """See ``IUDPTransport.write``."""
        if addr is None or self._connectedAddr:
            return super().write(datagram, addr)
        known = self._known_hosts
        if addr[0] in known:
            try:
                return self.socket.sendto(datagram, addr)
            except OSError:
                # Twisted's method handles the error.
                return super().write(datagram, addr)
        sent = super().write(datagram, addr)
        if len(known) == _MOST_HOSTS:
            known.clear()
        known.add(addr[0])
        return sent


class MulticastPort(UDPPort, udp.MulticastPort):
    """A UDP port that can join multicast groups."""


class DatagramReactor(PosixReactorBase):
    """Makes the ports of this module in place of Twisted's."""

    def listenUDP(
        self, port: int, protocol: Any, interface: str = "", maxPacketSize: int = 8192
    ) -> UDPPort:
        """See ``IReactorUDP.listenUDP``."""
        listening = UDPPort(port, protocol, interface, maxPacketSize, self)
        listening.startListening()
        return listening

    def listenMulticast(
        self,
        port: int,
        protocol: Any,
        interface: str = "",
        maxPacketSize: int = 8192,
        listenMultiple: bool = False,
    ) -> MulticastPort:
        """See ``IReactorMulticast.listenMulticast``."""
        listening = MulticastPort(
            port, protocol, interface, maxPacketSize, self, listenMultiple
        )
        listening.startListening()
        return listening

    def adoptDatagramPort(
        self,
        fileDescriptor: int,
        addressFamily: int,
        protocol: Any,
        maxPacketSize: int = 8192,
    ) -> Any:
        """See ``IReactorSocket.adoptDatagramPort``."""
        if addressFamily not in (socket.AF_INET, socket.AF_INET6):
            raise UnsupportedAddressFamily(addressFamily)
        listening = UDPPort._fromListeningDescriptor(
            self, fileDescriptor, addressFamily, protocol, maxPacketSize=maxPacketSize
        )
        listening.startListening()
        return listening
