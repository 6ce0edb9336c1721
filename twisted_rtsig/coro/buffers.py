"""
The read buffer of a stream: data that was received and not read yet.

The time to search is linear in the size of the data, into however many pieces it was
cut.  The data that is kept is not copied: a single piece stays the ``bytes`` object
that the transport has made, and several pieces are gathered in a ``bytearray``.  Its
front is cut off in constant time, since CPython only moves its start.
"""

from __future__ import annotations

import re


class ReadBuffer:
    """
    A queue of bytes: they are appended at the end and taken from the front.

    :ivar data: what was received and not read yet, after bytes that were read already;
        empty if all was read.
    :ivar start: the offset of the first byte that was not read; 0 in a bytearray.
    """

    __slots__ = ("_searched", "_searched_for", "data", "start")

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.start: int = 0
        # Offset up to which the buffer was searched already, and the delimiter that was
        # searched for.
        self._searched = 0
        self._searched_for = b""

    @property
    def size(self) -> int:
        """The number of bytes that were not read yet."""
        return len(self.data) - self.start

    def append(self, data: bytes) -> None:
        """Add data that has arrived."""
        kept, start = self.data, self.start
        if not kept:
            self.data = data
        elif type(kept) is bytearray:
            kept += data
        else:
            gathered = bytearray(memoryview(kept)[start:])
            gathered += data
            self.data = gathered
            self.start = 0
            self._searched = max(0, self._searched - start)

    def peek(self, size: int) -> bytes:
        """Return the first ``size`` bytes, or all if there are fewer; keep them."""
        start = self.start
        return bytes(memoryview(self.data)[start : start + size])

    def take(self, size: int) -> bytes:
        """Remove and return the first ``size`` bytes, or all if there are fewer."""
        data, start = self.data, self.start
        end = start + size
        if end >= len(data):
            self.data = b""
            self.start = self._searched = 0
            return bytes(data[start:])
        if type(data) is bytes:
            taken = data[start:end]
            self.start = end
            return taken
        taken = bytes(memoryview(data)[:size])
        del data[:size]  # type: ignore[union-attr]
        self._searched = max(0, self._searched - size)
        return taken

    def find(self, delimiter: bytes, limit: int) -> int:
        """
        Return the number of bytes before ``delimiter``; -1 if it does not begin within
        the first ``limit`` + 1 bytes.
        """
        data, start = self.data, self.start
        first = start
        if self._searched > start and self._searched_for == delimiter:
            first = self._searched
        last = start + limit + len(delimiter)
        at = data.find(delimiter, first, last)
        if at >= 0:
            return at - start
        self._searched_for = delimiter
        # A delimiter may have begun in the last bytes.
        self._searched = max(first, min(len(data), last) - len(delimiter) + 1)
        return -1

    def match_end(self, pattern: re.Pattern[bytes], limit: int) -> int:
        """Return where the first match within ``limit`` bytes ends; -1 without one."""
        start = self.start
        # A slice, so that ^, $, lookahead and lookbehind see nothing outside of it.
        with memoryview(self.data)[start : start + limit] as view:
            match = pattern.search(view)
            end = -1 if match is None else match.end()
            del match
        return end
