"""
The listening sockets of a worker.  It asks the supervisor for them, and Twisted's ports
accept connections from them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.internet import tcp
from twisted.internet.address import UNIXAddress
from twisted.internet.error import CannotListenError
from twisted.python import log

from twisted_rtsig.engine.transports import TCPPort, UNIXPort
from twisted_rtsig.workers.channel import Message
from twisted_rtsig.workers.listening import current_folder

# The most bytes of an answer, and the most descriptors (SCM_RIGHTS in unix(7)).
_ANSWER: Final = 64 * 1024
_DESCRIPTORS: Final = 253

_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


@dataclass
class Held:
    """
    The sockets for one address.

    :ivar request: the request that the worker has sent.
    :ivar identities: the identities of the sockets, that of the worker's own first.
    :ivar sockets: the sockets, in the same order.
    :ivar file: for a UNIX path, the device and inode of its file.
    :ivar changed: called when the sockets have changed.
    """

    request: Message
    identities: list[str]
    sockets: list[socket.socket]
    file: tuple[int, int] | None = None
    changed: Callable[[], None] = field(default=lambda: None)


class HeldSockets:
    """
    All listening sockets that the supervisor holds for this worker.

    :param connection: a socket connected to the supervisor.  It blocks, so that
        requests and answers stay in order.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._connection = connection
        self._lock = threading.Lock()
        self._held: list[Held] = []

    def take(self, request: Message) -> Held:
        """
        Ask for the sockets of an address.

        :raises OSError: the error that the supervisor got when it made the sockets.
        """
        same = [
            each.request["index"]
            for each in self._held
            if _address(each.request) == _address(request)
        ]
        # Each request for port 0 is for another port; the index tells them apart.
        index = next(n for n in range(len(same) + 1) if n not in same)
        if index and request.get("port") != 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        request = {**request, "index": index}
        identities, sockets = self._ask({"type": "listen", **request})
        held = Held(request, identities, sockets)
        self._held.append(held)
        return held

    def release(self, held: Held) -> None:
        """Tell the supervisor that the port of these sockets is closed."""
        if held in self._held:
            self._held.remove(held)
            # The supervisor may have ended already.
            with contextlib.suppress(OSError):
                self._ask({"type": "release", **held.request})

    def renew(self) -> None:
        """Ask for all sockets again, as some have changed."""
        for held in list(self._held):
            try:
                identities, sockets = self._ask({"type": "listen", **held.request})
            except OSError:
                log.err(None, "The supervisor has lost a listening socket")
                continue
            known = dict(zip(held.identities, held.sockets, strict=True))
            now = [held.identities[0]]
            held.sockets = [known[now[0]]]
            for identity, each in zip(identities, sockets, strict=True):
                if identity in now:
                    each.close()
                    continue
                now.append(identity)
                if identity in known:
                    each.close()
                    each = known[identity]
                held.sockets.append(each)
            held.identities = now
            held.changed()

    def files(self) -> Iterator[tuple[str, tuple[int, int], bool]]:
        """Yield each UNIX path, its device and inode, and whether it has a lock."""
        for held in list(self._held):
            if held.file is not None:
                yield held.request["path"], held.file, bool(held.request["lock"])

    def _ask(self, request: Message) -> tuple[list[str], list[socket.socket]]:
        with self._lock:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            answer = b""
            descriptors: list[int] = []
            while not answer.endswith(b"\n"):
                data, more, _, _ = socket.recv_fds(
                    self._connection, _ANSWER, _DESCRIPTORS, _CLOEXEC
                )
                descriptors += more
                if not data:
                    raise OSError(errno.EPIPE, "the supervisor of this worker is gone")
                answer += data
        sockets = [socket.socket(fileno=each) for each in descriptors]
        for each in sockets:
            each.set_inheritable(False)
        message = json.loads(answer)
        if "errno" in message:
            raise OSError(message["errno"], message["error"])
        identities: list[str] = message["sockets"]
        if len(sockets) < len(identities):
            # The kernel drops sockets if the process has too many open descriptors.
            for each in sockets:
                each.close()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return identities, sockets


def _address(request: Message) -> tuple[object, ...]:
    return (request.get("interface"), request.get("port"), request.get("path"))


def use(reactor: Any, sockets: HeldSockets) -> None:
    """Make ``reactor`` listen on the supervisor's sockets from now on."""

    class WorkerTCPPort(_WorkerTCPPort):
        held_sockets = sockets

    class WorkerUNIXPort(_WorkerUNIXPort):
        held_sockets = sockets

    reactor.tcp_port = WorkerTCPPort
    reactor.unix_port = WorkerUNIXPort


class _WorkerTCPPort(TCPPort):
    """A TCP port whose sockets the supervisor holds."""

    held_sockets: HeldSockets
    _held: Held | None = None
    _others: dict[socket.socket, _AnotherSocket]

    def startListening(self) -> None:
        """As in Twisted."""
        request = {
            "kind": "tcp6" if self.addressFamily == socket.AF_INET6 else "tcp",
            "interface": self.interface,
            "port": self.port,
            "backlog": self.backlog,
        }
        self._others = {}
        try:
            held = self.held_sockets.take(request)
        except OSError as error:
            raise CannotListenError(self.interface, self.port, error) from None
        # Twisted does not call shutdown(2) on a preexisting socket, which would shut it
        # down for all workers.
        self._preexistingSocket = held.sockets[0]
        try:
            super().startListening()
        except BaseException:
            self.held_sockets.release(held)
            raise
        self._held = held
        held.changed = self._sockets_changed
        self._sockets_changed()

    def startReading(self) -> None:
        """Start accepting from all sockets."""
        super().startReading()
        for each in self._others.values():
            each.startReading()

    def stopReading(self) -> None:
        """Stop accepting from all sockets."""
        super().stopReading()
        for each in self._others.values():
            each.stopReading()

    def connectionLost(self, reason: Any) -> None:
        """As in Twisted."""
        held, self._held = self._held, None
        for each in self._others.values():
            each.end()
        self._others = {}
        super().connectionLost(reason)
        if held is not None:
            self.held_sockets.release(held)

    def _sockets_changed(self) -> None:
        assert self._held is not None
        wanted = self._held.sockets[1:]
        for gone in [each for each in self._others if each not in wanted]:
            self._others.pop(gone).end()
        for added in wanted:
            if added not in self._others:
                other = self._others[added] = _AnotherSocket(self, added)
                if self in self.reactor.getReaders():
                    other.startReading()


class _AnotherSocket(TCPPort):
    """
    A further listening socket of a port.

    :param port: the port that accepts connections from it.
    """

    def __init__(self, port: _WorkerTCPPort, listening: socket.socket) -> None:
        super().__init__(
            None,  # type: ignore[arg-type]
            port.factory,  # type: ignore[arg-type]
            port.backlog,
            port.interface,
            port.reactor,
        )
        self.addressFamily = port.addressFamily
        self._addressType = port._addressType
        self._type = port._type
        self._realPortNumber = port._realPortNumber
        self.connected = True
        self.socket = listening
        self.fileno = listening.fileno  # type: ignore[method-assign]
        self.numberAccepts = 100

    def end(self) -> None:
        """Stop accepting from the socket, and close it."""
        if self.connected:
            self.connected = False
            self.stopReading()
            self.socket.close()

    def connectionLost(self, reason: Any) -> None:
        """
        Close the socket, as the reactor disconnects everything.

        The port itself notifies the factory.
        """
        self.end()


class _WorkerUNIXPort(UNIXPort):
    """
    A UNIX port whose socket and file the supervisor holds; or an adopted one, whose
    file the other workers use as well.
    """

    held_sockets: HeldSockets
    _held: Held | None = None

    def __init__(self, fileName: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(fileName, *args, **kwargs)
        self._path: bytes = UNIXAddress(fileName).name or b""

    def startListening(self) -> None:
        """As in Twisted."""
        if self._preexistingSocket is not None:
            self._shouldShutdown = False
            super().startListening()
            return
        tcp._reservedFD.reserve()
        path = os.fsdecode(self._path)
        log.msg(f"{self._getLogPrefix(self.factory)} starting on {path!r}")
        request = {
            "kind": "unix",
            "path": path,
            "folder": current_folder(),
            "backlog": self.backlog,
            "mode": self.mode,
            "lock": bool(self.wantPID),
        }
        assert self.factory is not None
        self.factory.doStart()
        try:
            held = self.held_sockets.take(request)
        except OSError as error:
            raise CannotListenError(None, self._path, error) from None
        if not path.startswith("\0"):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                held.file = (status.st_dev, status.st_ino)
        self._held = held
        self._shouldShutdown = False
        self.connected = True
        self.socket = held.sockets[0]
        self.fileno = self.socket.fileno  # type: ignore[method-assign]
        self.numberAccepts = 100
        self.startReading()

    def connectionLost(self, reason: Any) -> None:
        """As in Twisted, but leave the file, which the supervisor removes."""
        held, self._held = self._held, None
        tcp.Port.connectionLost(self, reason)
        if held is not None:
            self.held_sockets.release(held)


__all__ = ["Held", "HeldSockets", "use"]
