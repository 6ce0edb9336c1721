"""Two streams as one: one to write to, and one to read from."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.closing import AbortedOnError
from twisted_rtsig.coro.reading import MAX_BYTES
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stream_protocols import ReceiveStream, SendStream


class StapledStream(AbortedOnError):
    """
    Joins two streams, one to write to and one to read from: two pipes, for example, or
    the input of one process and the output of another.

    Each method is that of :class:`Stream`.  :meth:`close` and :meth:`abort` close or
    abort both streams.

    :ivar send_stream: the one to write to.
    :ivar receive_stream: the one to read from.
    """

    def __init__(self, send_stream: SendStream, receive_stream: ReceiveStream) -> None:
        self.send_stream = send_stream
        self.receive_stream = receive_stream
        self._reactor = scheduler_for(None).reactor

    # Reading

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive.  There may be data left to read."""
        return self.receive_stream.ended

    def read(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.read`."""
        return self.receive_stream.read(max_bytes)

    def peek(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.peek`."""
        return self.receive_stream.peek(max_bytes)

    def read_exactly(self, size: int) -> Awaitable[bytes]:
        """See :meth:`Stream.read_exactly`."""
        return self.receive_stream.read_exactly(size)

    def read_until(
        self, delimiter: bytes, max_bytes: int = MAX_BYTES
    ) -> Awaitable[bytes]:
        """See :meth:`Stream.read_until`."""
        return self.receive_stream.read_until(delimiter, max_bytes)

    def read_line(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.read_line`."""
        return self.receive_stream.read_line(max_bytes)

    def read_until_regex(
        self, pattern: bytes | re.Pattern[bytes], max_bytes: int = MAX_BYTES
    ) -> Awaitable[bytes]:
        """See :meth:`Stream.read_until_regex`."""
        return self.receive_stream.read_until_regex(pattern, max_bytes)

    def lines(self, max_bytes: int = MAX_BYTES) -> AsyncIterator[bytes]:
        """See :meth:`Stream.lines`."""
        return self.receive_stream.lines(max_bytes)

    # Writing, and the end

    @property
    def lost(self) -> bool:
        """Whether the stream to write to is gone."""
        return self.send_stream.lost

    def write(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """See :meth:`Stream.write`."""
        return self.send_stream.write(data)

    def write_eof(self) -> Awaitable[None]:
        """See :meth:`Stream.write_eof`."""
        return self.send_stream.write_eof()

    def close(self) -> Deferred[None]:
        """
        Close both.

        The Deferred fires when both are closed.
        """
        return self._both(self.send_stream.close(), self.receive_stream.close())

    def abort(self) -> Deferred[None]:
        """
        Abort both.

        The Deferred fires when both are gone.
        """
        return self._both(self.send_stream.abort(), self.receive_stream.abort())

    def _both(self, one: Awaitable[None], other: Awaitable[None]) -> Deferred[None]:
        waiting = spawn(_wait_for_both, one, other, reactor=self._reactor)
        return waiting.as_deferred()

    async def __aenter__(self) -> StapledStream:
        return self

    def __repr__(self) -> str:
        return f"<StapledStream of {self.send_stream!r} and {self.receive_stream!r}>"


async def _wait_for_both(one: Awaitable[None], other: Awaitable[None]) -> None:
    # If it is a coroutine, it has to begin now.
    waiting = spawn(_wait_for, other)
    try:
        await one
    except Exception:
        await waiting
        raise
    except BaseException:
        waiting.cancel()
        raise
    await waiting


async def _wait_for(awaitable: Awaitable[None]) -> None:
    await awaitable
