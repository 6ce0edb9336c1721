"""
``select.select``, ``select.poll`` and ``selectors`` for blocking sockets: a stackful
task waits until one of the sockets is readable or writable.
"""

from __future__ import annotations

import select
import selectors
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from twisted_rtsig.coro.blocking_errors import unsupported
from twisted_rtsig.coro.blocking_sockets import BlockingSocket
from twisted_rtsig.coro.blocking_tls import BlockingSSLSocket
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.output import descriptor
from twisted_rtsig.coro.reading import TURNS_TO_RECEIVE
from twisted_rtsig.coro.scopes import move_on_after
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.stacks import wait

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

# On platforms without poll(), the values of Linux.
_POLLIN: Final[int] = getattr(select, "POLLIN", 0x001)
_POLLPRI: Final[int] = getattr(select, "POLLPRI", 0x002)
_POLLOUT: Final[int] = getattr(select, "POLLOUT", 0x004)
_POLLRDHUP: Final[int] = getattr(select, "POLLRDHUP", 0)


class _SocketPoll:
    """One wait for sockets that are readable or writable."""

    def __init__(self) -> None:
        self.ready: dict[BlockingSocket, int] = {}
        self._waiting: list[Operation[Any]] = []
        self._changed = Event()

    def add(self, sock: BlockingSocket, events: int) -> None:
        """Add a socket to wait for."""
        stream = sock._opened()
        if events & READ:
            if sock._unread or sock._read_shut or _holds_records(sock):
                self._note(sock, READ)
            else:
                self._watch(sock, READ, stream.peek(1))
        if events & WRITE:
            self._watch(sock, WRITE, stream.write(b""))

    def _watch(
        self, sock: BlockingSocket, event: int, operation: Operation[Any]
    ) -> None:
        if not operation.called:
            self._waiting.append(operation)
        # After an error the socket is ready too: its next call reports the error.
        operation.addBoth(lambda _: self._note(sock, event))

    def _note(self, sock: BlockingSocket, event: int) -> None:
        self.ready[sock] = self.ready.get(sock, 0) | event
        self._changed.set()

    def wait(self, seconds: float | None) -> dict[BlockingSocket, int]:
        """
        Wait until a socket is ready.

        :return: the sockets that are ready, and their events.
        """
        try:
            if self.ready:
                pass
            elif seconds is None:
                wait(self._changed.wait())
            elif seconds > 0:
                with move_on_after(seconds):
                    wait(self._changed.wait())
            else:
                for _ in range(TURNS_TO_RECEIVE):
                    wait(sleep(0))
        finally:
            ready, self.ready = self.ready, {}
            for operation in self._waiting:
                if not operation.called:
                    operation.cancel()
        return ready


def _holds_records(sock: BlockingSocket) -> bool:
    return isinstance(sock, BlockingSSLSocket) and bool(
        sock.pending() or sock._incoming.pending
    )


def _checked(sock: Any) -> BlockingSocket:
    if not isinstance(sock, BlockingSocket):
        raise unsupported(
            f"a task can poll a BlockingSocket, and not {sock!r}: use the reactor to "
            "watch other descriptors"
        )
    return sock


def blocking_select(
    rlist: Iterable[Any],
    wlist: Iterable[Any],
    xlist: Iterable[Any],
    timeout: float | None = None,
    /,
) -> tuple[list[Any], list[Any], list[Any]]:
    """
    As ``select.select``, for blocking sockets.  The third list of the result is empty.
    """
    if timeout is not None and timeout < 0:
        raise ValueError("timeout must be non-negative")
    readers = [_checked(each) for each in rlist]
    writers = [_checked(each) for each in wlist]
    for each in xlist:
        _checked(each)
    poll = _SocketPoll()
    for sock in readers:
        poll.add(sock, READ)
    for sock in writers:
        poll.add(sock, WRITE)
    ready = poll.wait(timeout)
    return (
        [each for each in readers if ready.get(each, 0) & READ],
        [each for each in writers if ready.get(each, 0) & WRITE],
        [],
    )


class BlockingPoll:
    """A polling object as of ``select.poll``, for blocking sockets."""

    def __init__(self) -> None:
        self._masks: dict[BlockingSocket, int] = {}

    def register(
        self, fd: Any, eventmask: int = _POLLIN | _POLLPRI | _POLLOUT, /
    ) -> None:
        """See ``select.poll.register``."""
        self._masks[_checked(fd)] = eventmask

    def modify(self, fd: Any, eventmask: int, /) -> None:
        """See ``select.poll.modify``."""
        if fd not in self._masks:
            raise FileNotFoundError(2, "No such file or directory")
        self._masks[fd] = eventmask

    def unregister(self, fd: Any, /) -> None:
        """See ``select.poll.unregister``."""
        del self._masks[fd]

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """
        See ``select.poll.poll``.

        :return: descriptors and their events.  Nothing else can poll these descriptors.
        """
        poll = _SocketPoll()
        for sock, mask in self._masks.items():
            poll.add(sock, _events(mask))
        seconds = None if timeout is None or timeout < 0 else timeout / 1000
        return [
            (_number(sock), _mask(sock, events) & (self._masks[sock] | ~_POLLRDHUP))
            for sock, events in poll.wait(seconds).items()
        ]


def _events(mask: int) -> int:
    return (READ if mask & _POLLIN else 0) | (WRITE if mask & _POLLOUT else 0)


def _mask(sock: BlockingSocket, events: int) -> int:
    ended = sock._stream is None or sock._stream.ended
    return (
        (_POLLIN if events & READ else 0)
        | (_POLLOUT if events & WRITE else 0)
        | (_POLLRDHUP if ended else 0)
    )


def _number(sock: BlockingSocket) -> int:
    stream = sock._stream
    number = None if stream is None else descriptor(stream.transport)
    return -1 if number is None else number


class BlockingSelector(selectors.BaseSelector):
    """As ``selectors.SelectSelector``, for blocking sockets."""

    def __init__(self) -> None:
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector.register``."""
        sock = _checked(fileobj)
        if not events or events & ~(READ | WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        if sock in self._keys:
            raise KeyError(f"{sock!r} is already registered")
        key = selectors.SelectorKey(fileobj, _number(sock), events, data)
        self._keys[sock] = key
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector.unregister``."""
        if fileobj not in self._keys:
            raise KeyError(f"{fileobj!r} is not registered")
        return self._keys.pop(fileobj)

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """See ``selectors.BaseSelector.select``."""
        poll = _SocketPoll()
        for sock, key in self._keys.items():
            poll.add(sock, key.events)
        ready = poll.wait(None if timeout is None else max(0.0, timeout))
        return [(self._keys[sock], events) for sock, events in ready.items()]

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        """See ``selectors.BaseSelector.get_map``."""
        return self._keys

    def close(self) -> None:
        """See ``selectors.BaseSelector.close``."""
        self._keys.clear()
