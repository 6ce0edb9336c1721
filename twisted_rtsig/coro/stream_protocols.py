"""
The interfaces of streams, for code that reads from any stream or writes to it.

``twisted_rtsig.coro.testing.STREAM_CHECKS`` has the rules that their methods keep.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from twisted_rtsig.coro.reading import MAX_BYTES

if TYPE_CHECKING:
    from typing_extensions import Self


class ReceiveStream(Protocol):
    """
    A stream of bytes to read from.  :class:`Stream` says what each method does.
    """

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive.  There may be data left to read."""

    def read(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.read`."""

    def peek(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.peek`."""

    def read_exactly(self, size: int) -> Awaitable[bytes]:
        """See :meth:`Stream.read_exactly`."""

    def read_until(
        self, delimiter: bytes, max_bytes: int = MAX_BYTES
    ) -> Awaitable[bytes]:
        """See :meth:`Stream.read_until`."""

    def read_line(self, max_bytes: int = MAX_BYTES) -> Awaitable[bytes]:
        """See :meth:`Stream.read_line`."""

    def read_until_regex(
        self, pattern: bytes | re.Pattern[bytes], max_bytes: int = MAX_BYTES
    ) -> Awaitable[bytes]:
        """See :meth:`Stream.read_until_regex`."""

    def lines(self, max_bytes: int = MAX_BYTES) -> AsyncIterator[bytes]:
        """See :meth:`Stream.lines`."""

    def close(self) -> Awaitable[None]:
        """See :meth:`Stream.close`."""

    def abort(self) -> Awaitable[None]:
        """See :meth:`Stream.abort`."""


class SendStream(Protocol):
    """
    A stream of bytes to write to.  :class:`Stream` says what each method does.
    """

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""

    def write(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """See :meth:`Stream.write`."""

    def write_eof(self) -> Awaitable[None]:
        """See :meth:`Stream.write_eof`."""

    def close(self) -> Awaitable[None]:
        """See :meth:`Stream.close`."""

    def abort(self) -> Awaitable[None]:
        """See :meth:`Stream.abort`."""


class ByteStream(ReceiveStream, SendStream, Protocol):
    """
    A stream of bytes in both directions, such as :class:`Stream` and
    :class:`StapledStream`.  A stream of another package can be one as well.
    """

    async def __aenter__(self) -> Self:
        """Begin a block that closes the stream, or aborts it if it raises."""

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaitable[None]:
        """End the block."""
