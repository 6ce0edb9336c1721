"""The descriptors that asyncio watches, as readers and writers of the engine."""

from __future__ import annotations

import selectors
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from zope.interface import implementer

from twisted_rtsig.asyncio_support.transports import MOST_AT_ONCE
from twisted_rtsig.notifiers.registration import READ, WRITE

if TYPE_CHECKING:
    from twisted_rtsig.asyncioreactor import AsyncioEngineReactor


@implementer(IReadDescriptor, IWriteDescriptor)
class Watched:
    """
    One descriptor that asyncio watches, as a selectable of the engine.

    :ivar key: the selector key of asyncio.
    :ivar pending: the directions that are ready and that ``select()`` has not returned
        yet.
    :ivar reported: the list of those that ``select()`` returns next.
    """

    __slots__ = ("key", "pending", "reported")

    def __init__(self, key: selectors.SelectorKey, reported: list[Watched]) -> None:
        self.key = key
        self.pending = 0
        self.reported = reported

    def report(self, directions: int) -> None:
        """Let ``select()`` return it: these directions are ready."""
        if not self.pending:
            self.reported.append(self)
        self.pending |= directions

    # IReadDescriptor and IWriteDescriptor.  The engine calls these methods only if the
    # other direction of the descriptor belongs to a selectable of Twisted.

    def fileno(self) -> int:
        return self.key.fd

    def logPrefix(self) -> str:
        return "asyncio"

    def doRead(self) -> None:
        self.report(READ)

    def doWrite(self) -> None:
        self.report(WRITE)

    def connectionLost(self, reason: object) -> None:
        # asyncio will find out by itself.
        pass


class WatchedTransport(Watched):
    """
    The descriptor of a transport that the engine reads from like from its own
    transports: the data is passed to the protocol within the pass.

    The engine asks the kernel only for changes (``tells_drained``).  That is cheap, and
    correct only for TCP, where a read that returns less than it asked for has emptied
    the socket.

    :ivar run: calls a function in the context in which reading began.
    """

    __slots__ = (
        "_mode",
        "_reactor",
        "_transport",
        "logstr",
        "reads_by_recv",
        "run",
    )

    # As of the engine's transports.
    tells_drained = True

    def __init__(
        self,
        key: selectors.SelectorKey,
        reported: list[Watched],
        transport: Any,
        reactor: AsyncioEngineReactor,
    ) -> None:
        super().__init__(key, reported)
        self._transport = transport
        self._reactor: Any = reactor
        # As of the engine's transports.
        self.reads_by_recv = False
        self.logstr = "-"
        # It changes with the protocol.
        self._mode = transport._read_ready_cb
        self.run = key.data[0]._context.run

    def doRead(self) -> None:
        """Do what ``_read_ready__data_received`` of the transport does."""
        transport = self._transport
        if self._reactor.raised is not None:
            # The error of another protocol ends the loop.  Read when the loop runs
            # again, as asyncio does.
            self._reactor.look_again(self)
            return
        try:
            if (
                transport._read_ready_cb is not self._mode
                or not self._reactor.calls_protocols
            ):
                # Leave it to asyncio if the transport does not call data_received(); if
                # the loop measures callbacks; or if data_received() is iterating the
                # reactor, as a context cannot be entered twice.
                self._reactor.look_again(self)
                self.report(READ)
                return
            try:
                data = transport._sock.recv(MOST_AT_ONCE)
            except (BlockingIOError, InterruptedError):
                return
            except Exception as error:
                message = "Fatal read error on socket transport"
                self.run(transport._fatal_error, error, message)
                return
            if not data:
                self.run(transport._read_ready__on_eof)
                return
            if len(data) == MOST_AT_ONCE:
                self._reactor.look_again(self)
            try:
                self.run(transport._protocol.data_received, data)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                message = "Fatal error: protocol.data_received() call failed."
                self.run(transport._fatal_error, error, message)
        except BaseException as error:
            # If it were raised here, the engine would log it and close the connection.
            self._reactor.raised = error


__all__ = ["Watched", "WatchedTransport"]
