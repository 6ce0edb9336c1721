"""
asyncio's transport for stream sockets, which sends at once all that was written in a
pass.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from twisted_rtsig.asyncioreactor import AsyncioEngineReactor

MOST_AT_ONCE: Final = 65536
"""
The most bytes that a transport reads at once.  asyncio asks for 256 KiB, which is more
than the C library allocates from its heap (mallopt(3), M_MMAP_THRESHOLD): each read,
however small, would map memory, fault it in and unmap it.
"""

# The most bytes that a transport collects before it sends.  Collecting copies them.
_COLLECTED_AT_MOST: Final = 16 * 1024

INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
"""The address families of the internet."""


class SocketTransport(asyncio.selector_events._SelectorSocketTransport):  # type: ignore[name-defined,misc]
    """
    asyncio's transport for stream sockets.  The engine may read for it, and it sends
    written data after the callbacks of the pass.

    Every other method first sends the collected data.  So the transport differs from
    that of asyncio only in when it sends.

    :ivar collected: data that was written and not sent yet: at most 16 KiB, and no more
        than the limit above which the protocol is paused.
    """

    max_size = MOST_AT_ONCE

    def __init__(self, loop: Any, *args: Any, **kwargs: Any) -> None:
        self.collected = b""
        self._collected_at_most = _COLLECTED_AT_MOST
        # Whether the write() of asyncio would send at once.
        self._sends_at_once = True
        self._reactor: AsyncioEngineReactor = loop.reactor
        super().__init__(loop, *args, **kwargs)
        # The transports of asyncio have one since Python 3.15.
        if getattr(self, "_context", None) is None:
            self._context = contextvars.copy_context()

    def write(self, data: Any) -> None:
        """See ``WriteTransport.write``."""
        reactor = self._reactor
        if (
            self._sends_at_once
            and reactor.in_plain_run
            and type(data) is bytes
            and len(self.collected) + len(data) <= self._collected_at_most
            # If the reactor waits, a signal handler writes during the sleep.
            and not reactor._waiting
        ):
            if not self.collected:
                reactor.collecting.append(self)
            # A signal handler, which runs after a call, may have written as well.
            self.collected += data
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
        """
        Send the collected data, and pass to asyncio what the kernel has no room for.
        """
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
        """Send the collected data, before a method of asyncio."""
        self.send_collected()
        self._sends_at_once = False

    def writelines(self, list_of_data: Any) -> None:
        """See ``WriteTransport.writelines``."""
        self._send_first()
        super().writelines(list_of_data)

    def write_eof(self) -> None:
        """See ``WriteTransport.write_eof``."""
        self._send_first()
        super().write_eof()

    def close(self) -> None:
        """See ``BaseTransport.close``."""
        self._send_first()
        super().close()

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        """See ``WriteTransport.set_write_buffer_limits``."""
        super().set_write_buffer_limits(high, low)
        self._collected_at_most = min(_COLLECTED_AT_MOST, self._high_water)

    def get_write_buffer_size(self) -> int:
        """See ``WriteTransport.get_write_buffer_size``."""
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
        """Whether it is a TCP transport whose protocol has ``data_received``."""
        if type(self._sock) is not socket.socket:
            return False
        # The same attributes of socket.socket would make members of enumerations.
        handle: Any = super(socket.socket, self._sock)
        return (
            handle.family in INTERNET
            and handle.type == socket.SOCK_STREAM
            and self._read_ready_cb == self._read_ready__data_received
        )


__all__ = ["INTERNET", "MOST_AT_ONCE", "SocketTransport"]
