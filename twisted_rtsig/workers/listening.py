"""
The listening sockets of all workers, which the supervisor holds.

There is one socket for each slot and TCP address, with SO_REUSEPORT: the kernel gives
each new connection to one of these sockets, and the worker in that slot accepts it.
Closing such a socket resets the connections in its backlog, so it stays open as long as
the address is used.  When a worker ends, its successor in the slot gets the same
socket.  While the slot has no worker, another worker borrows the socket and accepts
from it.

On kernels that cannot do that (only Linux and FreeBSD can), and for UNIX paths, all
workers accept from one shared socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.logger import Logger
from twisted.python.lockfile import FilesystemLock

from twisted_rtsig.workers.channel import Message
from twisted_rtsig.workers.spreading import RoundRobin

_log = Logger()

if sys.platform.startswith("linux"):
    _REUSEPORT: int | None = socket.SO_REUSEPORT
elif sys.platform.startswith("freebsd"):
    # SO_REUSEPORT_LB, which the socket module has only since Python 3.14.
    _REUSEPORT = 0x00010000
else:
    # If the option exists here, it does not spread connections over the sockets.
    _REUSEPORT = None

# Linux takes the option after bind(2) too; FreeBSD only before.  See _bind_all.
_AFTERWARDS: Final = sys.platform.startswith("linux")

SHARED: Final = "shared"
"""The identity of a socket that all workers share."""

Listener = Any
"""
A worker, with the attributes ``number``, ``accepts`` (it accepts connections) and
``goes_on`` (it is not stopping, but may still be starting).
"""


@dataclass(eq=False)
class Address:
    """
    An address on which the application listens.

    :ivar key: the kind, the address, and an index that tells several requests for port
        0 apart.
    :ivar sockets: by slot; a shared socket has the key None.
    :ivar listening: the slots whose sockets listen, in the order in which they started
        to.  A socket that is bound and does not listen gets no connections.
    :ivar listeners: the workers that have asked for the address, the latest last.
    :ivar borrowers: by slot, the worker of another slot that accepts from its socket.
    :ivar owned: whether this process has made the sockets, and the file of a UNIX path.
        If not, systemd passed them.
    :ivar turns: distributes connections round-robin, if the system allows that.
    """

    key: tuple[Any, ...]
    sockets: dict[int | None, socket.socket]
    listening: list[int] = field(default_factory=list)
    listeners: list[Listener] = field(default_factory=list)
    borrowers: dict[int, Listener] = field(default_factory=dict)
    lock: FilesystemLock | None = None
    owned: bool = True
    turns: RoundRobin | None = None

    @property
    def shared(self) -> bool:
        """Whether all workers accept from the same socket."""
        return None in self.sockets

    def accepting(self) -> dict[int, Listener]:
        """Return, by slot, the workers that accept connections."""
        return {each.number: each for each in self.listeners if each.accepts}

    @property
    def used(self) -> bool:
        """Whether a worker listens on the address, or will when it has started."""
        return any(each.goes_on for each in self.listeners)

    def of(self, worker: Listener) -> list[tuple[str, socket.socket]]:
        """Return the sockets that ``worker`` accepts from, its own first."""
        if self.shared:
            return [(SHARED, self.sockets[None])]
        slots = [self.own_slot(worker)]
        slots += [slot for slot, by in self.borrowers.items() if by is worker]
        return [(str(slot), self.sockets[slot]) for slot in slots]

    def own_slot(self, worker: Listener) -> int:
        """Return the slot of a worker, or one to share if its own has no socket."""
        number: int = worker.number
        if number in self.sockets:
            return number
        slots = sorted(slot for slot in self.sockets if slot is not None)
        return slots[number % len(slots)]

    def listen(self, worker: Listener, backlog: int) -> None:
        """
        Make the socket of ``worker`` listen.

        :param backlog: its backlog, which is changed if the socket listens already.
        """
        if not self.owned:
            return
        if self.shared:
            self.sockets[None].listen(backlog)
            return
        slot = self.own_slot(worker)
        self.sockets[slot].listen(backlog)
        if slot not in self.listening:
            self.listening.append(slot)
            if len(self.listening) == 1:
                # On most systems, only root may do that.
                with contextlib.suppress(OSError):
                    self.turns = RoundRobin(self.sockets[slot])

    def lend(self) -> set[Listener]:
        """
        Make sure that a worker accepts from each socket.

        :return: the workers whose sockets have changed.
        """
        if self.shared:
            return set()
        accepting = self.accepting()
        served = {self.own_slot(each) for each in accepting.values()}
        if self.turns is not None:
            # The sockets of other slots get no new connections.  Their borrowers only
            # accept what is in their backlogs.
            self.turns.choose(
                [place for place, slot in enumerate(self.listening) if slot in served]
            )
        before = dict(self.borrowers)
        for slot in self.listening:
            borrower = self.borrowers.get(slot)
            if slot in served or not accepting:
                self.borrowers.pop(slot, None)
            elif borrower is None or accepting.get(borrower.number) is not borrower:
                taken = [id(each) for each in self.borrowers.values()]
                self.borrowers[slot] = min(
                    accepting.values(), key=lambda each: taken.count(id(each))
                )
        changed = {
            worker
            for slot in before.keys() | self.borrowers.keys()
            for worker in (before.get(slot), self.borrowers.get(slot))
            if before.get(slot) is not self.borrowers.get(slot)
            if worker is not None and worker.accepts
        }
        return changed

    def close(self) -> None:
        """Close the sockets, which resets the connections in their backlogs."""
        if not self.owned:
            return
        for each in self.sockets.values():
            each.close()
        if self.turns is not None:
            self.turns.close()
        kind, path = self.key[:2]
        if kind == "unix":
            if not path.startswith("\0"):
                _unlink(path)
            if self.lock is not None:
                with contextlib.suppress(OSError, ValueError):
                    self.lock.unlock()


class Listening:
    """
    The sockets of all addresses.

    :param slots: the slots for which sockets are made together with the first one, as
        this process may have dropped its privileges later.
    :param shared: whether all workers share one socket for each address.
    :param inherited: listening sockets that systemd passed.
    """

    def __init__(
        self, slots: Iterable[int], shared: bool, inherited: Iterable[socket.socket]
    ) -> None:
        self._slots = list(slots)
        self._shared = shared or _REUSEPORT is None
        self._inherited = [
            each for each in inherited if each.type == socket.SOCK_STREAM
        ]
        self._addresses: dict[tuple[Any, ...], Address] = {}

    def listen(
        self, worker: Listener, request: Message
    ) -> list[tuple[str, socket.socket]]:
        """
        Return the sockets that ``worker`` accepts from, its own first.

        :raises OSError: if they cannot be made.
        """
        address = self._addresses.get(_key(request))
        if address is None:
            address = self._make(request)
            self._addresses[address.key] = address
        if not address.shared and worker.number not in address.sockets:
            self._add_slot(address, worker.number)
        if worker not in address.listeners:
            address.listeners.append(worker)
        address.listen(worker, request["backlog"])
        return address.of(worker)

    def release(self, worker: Listener, request: Message) -> None:
        """Handle that the application in ``worker`` has closed its port."""
        address = self._addresses.get(_key(request))
        if address is None or worker not in address.listeners:
            return
        address.listeners.remove(worker)
        if worker.goes_on and not address.used:
            # As in Twisted, a closed port refuses connections.
            self._remove(address)

    def ended(self, worker: Listener) -> None:
        """Handle the end of ``worker``.  Its sockets stay open, for its successor."""
        for address in self._addresses.values():
            if worker in address.listeners:
                address.listeners.remove(worker)

    def lend(self) -> set[Listener]:
        """
        Make sure that a worker accepts from each socket.

        :return: the workers that must ask for their sockets again.
        """
        changed: set[Listener] = set()
        for address in self._addresses.values():
            changed |= address.lend()
        return changed

    def close_unused(self) -> None:
        """
        Close the addresses on which no worker listens any more, because the reloaded
        application does not use them.
        """
        for address in list(self._addresses.values()):
            if not address.used:
                self._remove(address)

    def close(self) -> None:
        """Close all sockets."""
        for address in list(self._addresses.values()):
            self._remove(address)

    def addresses(self) -> Iterator[Address]:
        """Yield all addresses."""
        yield from self._addresses.values()

    def _remove(self, address: Address) -> None:
        del self._addresses[address.key]
        address.close()

    def _make(self, request: Message) -> Address:
        key = _key(request)
        if request["kind"] == "unix":
            return self._make_unix(key, request)
        family = socket.AF_INET6 if request["kind"] == "tcp6" else socket.AF_INET
        name = _name(family, request["interface"], request["port"])
        if request["port"]:
            for each in self._inherited:
                if each.family == family and _same(each.getsockname(), name):
                    return Address(key, {None: each}, owned=False)
        if self._shared:
            return Address(key, {None: _bound(family, name)})
        return Address(key, _bind_all(family, name, self._slots))

    def _make_unix(self, key: tuple[Any, ...], request: Message) -> Address:
        path = _path(request)
        for each in self._inherited:
            if each.family == socket.AF_UNIX:
                name = each.getsockname()
                if (os.fsdecode(name) if isinstance(name, bytes) else name) == path:
                    return Address(key, {None: each}, owned=False)
        lock = None
        if request["lock"]:
            lock = FilesystemLock(path + ".lock")
            if not lock.lock():
                raise OSError(errno.EADDRINUSE, "Cannot acquire lock")
            if not lock.clean:
                # The previous owner of the lock was killed, and left its socket.
                with contextlib.suppress(OSError):
                    if stat.S_ISSOCK(os.stat(path).st_mode):
                        os.unlink(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            listening.bind(os.fsencode(path))
            if not path.startswith("\0"):
                os.chmod(path, request["mode"])
        except OSError:
            listening.close()
            if lock is not None:
                lock.unlock()
            raise
        return Address(key, {None: listening}, lock=lock)

    def _add_slot(self, address: Address, number: int) -> None:
        first = next(iter(address.sockets.values()))
        try:
            added = _bound(first.family, first.getsockname(), _REUSEPORT)
        except OSError as error:
            _log.warn(
                "Worker {number} shares another worker's socket for {address}, as its "
                "own cannot be made: {error}",
                number=number,
                address=first.getsockname()[:2],
                error=error,
            )
        else:
            address.sockets[number] = added


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        # With --uid, the user may not be allowed to write to the folder.
        _log.warn("Cannot remove {path}: {error}", path=path, error=error)


def _key(request: Message) -> tuple[Any, ...]:
    if request["kind"] == "unix":
        return ("unix", _path(request))
    return tuple(request[each] for each in ("kind", "interface", "port", "index"))


def _path(request: Message) -> str:
    """Return the path of a UNIX socket, for use in this process."""
    path: str = request["path"]
    folder = request["folder"]
    # A path is kept relative if possible, as sun_path is limited to about 100 bytes.
    if path.startswith("\0") or folder == current_folder():
        return path
    return os.path.join(folder, path)


def current_folder() -> str:
    """Return the working directory; an empty string if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _name(family: int, interface: str, port: int) -> tuple[Any, ...]:
    if family == socket.AF_INET6:
        # As Twisted does.  The scope may be the name of a network interface.
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        name: tuple[Any, ...] = socket.getaddrinfo(interface, port, flags=flags)[0][4]
        return name
    return (interface, port)


def _same(bound: tuple[Any, ...], name: tuple[Any, ...]) -> bool:
    if bound[1] != name[1]:
        return False
    if len(name) == 2:
        return bool(bound[0] == (socket.gethostbyname(name[0]) if name[0] else _ANY))
    return bound == name


_ANY: Final = "0.0.0.0"


def _bound(
    family: int, name: tuple[Any, ...], reuseport: int | None = None
) -> socket.socket:
    """Return a socket bound as Twisted binds it, which does not listen yet."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuseport is not None:
            made.setsockopt(socket.SOL_SOCKET, reuseport, 1)
        made.bind(name)
    except BaseException:
        made.close()
        raise
    return made


def _bind_all(
    family: int, name: tuple[Any, ...], slots: Iterable[int]
) -> dict[int | None, socket.socket]:
    first, *others = slots
    assert _REUSEPORT is not None
    # On Linux the first socket is bound without the option, so that bind(2) fails if
    # another server of the same user has the address with that option.  Otherwise that
    # server would silently get a part of the connections.
    made = _bound(family, name, None if _AFTERWARDS else _REUSEPORT)
    sockets: dict[int | None, socket.socket] = {first: made}
    try:
        if _AFTERWARDS:
            made.setsockopt(socket.SOL_SOCKET, _REUSEPORT, 1)
        for slot in others:
            sockets[slot] = _bound(family, made.getsockname(), _REUSEPORT)
    except OSError:
        for each in sockets.values():
            each.close()
        raise
    return sockets


__all__ = ["SHARED", "Address", "Listening", "current_folder"]
