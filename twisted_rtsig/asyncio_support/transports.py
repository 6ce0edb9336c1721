"""
asyncio's transport for stream sockets, which sends what a pass has written in one go.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from twisted_rtsig.asyncioreactor import AsyncioEngineReactor

# In bytes: the most that a transport reads at once.  asyncio asks for 256 KiB, which is
# more than the C library allocates from its heap (mallopt(3), M_MMAP_THRESHOLD): each
# read, however small, then maps memory, faults it in and unmaps it.
MOST_AT_ONCE: Final = 65536

# The most bytes that one transport collects before it sends.  Pieces are copied when
# they are put together.
_COLLECTED_AT_MOST: Final = 16 * 1024

INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


class SocketTransport(asyncio.selector_events._SelectorSocketTransport):  # type: ignore[name-defined,misc]
    """
    asyncio's transport for stream sockets, which the engine may read for, and which
    sends what is written when the callbacks of the pass have been called.

    Whatever else is asked of the transport, what is collected is sent first.  So it is
    that of asyncio in all but the moment of the send.

    :ivar collected: what was written and not sent yet.
    """

    max_size = MOST_AT_ONCE

    def __init__(self, loop: Any, *args: Any, **kwargs: Any) -> None:
        self.collected = b""
        # Whether asyncio's own write() would send at once.
        self._sends_at_once = True
        self._reactor: AsyncioEngineReactor = loop.reactor
        super().__init__(loop, *args, **kwargs)
        # From Python 3.15 on, asyncio's transports have one.
        if getattr(self, "_context", None) is None:
            self._context = contextvars.copy_context()

    def write(self, data: Any) -> None:
        """As ``WriteTransport.write``."""
        reactor = self._reactor
        if (
            self._sends_at_once
            and reactor.in_plain_run
            and type(data) is bytes
            and len(data) <= _COLLECTED_AT_MOST
            # Otherwise a signal handler writes, in the middle of the sleep.
            and not reactor._waiting
        ):
            collected = self.collected
            if not collected:
                self.collected = data
                reactor.collecting.append(self)
                return
            if len(collected) + len(data) <= _COLLECTED_AT_MOST:
                self.collected = collected + data
                return
        self._send_first()
        super().write(data)
        self._sends_at_once = not (
            self._buffer
            or self._conn_lost
            or self._eof
            or self._empty_waiter is not None
        )

    def send_collected(self) -> None:
        """Send what is collected, and leave to asyncio what there is no room for."""
        data = self.collected
        if data:
            self.collected = b""
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except Exception as error:
                message = "Fatal write error on socket transport"
                self._context.run(self._fatal_error, error, message)
                return
            if sent < len(data):
                self._sends_at_once = False
                self._context.run(super().write, data[sent:])

    def _send_first(self) -> None:
        """Before what asyncio does."""
        self.send_collected()
        self._sends_at_once = False

    def writelines(self, list_of_data: Any) -> None:
        """As ``WriteTransport.writelines``."""
        self._send_first()
        super().writelines(list_of_data)

    def write_eof(self) -> None:
        """As ``WriteTransport.write_eof``."""
        self._send_first()
        super().write_eof()

    def close(self) -> None:
        """As ``BaseTransport.close``."""
        self._send_first()
        super().close()

    def get_write_buffer_size(self) -> int:
        """As ``WriteTransport.get_write_buffer_size``."""
        self.send_collected()
        size: int = super().get_write_buffer_size()
        return size

    def _force_close(self, exc: BaseException | None) -> None:
        self._send_first()
        super()._force_close(exc)

    def _make_empty_waiter(self) -> Any:
        self._send_first()
        return super()._make_empty_waiter()

    def reads_plainly(self) -> bool:
        """Whether it is of TCP, and gives what it reads to ``data_received``."""
        if type(self._sock) is not socket.socket:
            return False
        # The attributes of socket.socket make members of enumerations.
        handle: Any = super(socket.socket, self._sock)
        return (
            handle.family in INTERNET
            and handle.type == socket.SOCK_STREAM
            and self._read_ready_cb == self._read_ready__data_received
        )


__all__ = ["INTERNET", "MOST_AT_ONCE", "SocketTransport"]
