"""
The read buffer of a stream: data that was received and not read yet.

Searching is linear in the data, however it was cut into pieces, and what is kept
is not copied: a single piece stays the ``bytes`` that the transport has made, and
several are gathered in a ``bytearray``, whose front is cut off in constant time
(CPython moves its start).
"""

from __future__ import annotations

import re


class ReadBuffer:
    """
    Bytes, in at the end and out at the front.

    :ivar data: what has arrived and was not read, behind what was; empty if all was.
    :ivar start: where that begins; 0 in a bytearray.
    """

    __slots__ = ("_searched", "_searched_for", "data", "start")

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.start: int = 0
        # Up to where nothing begins that was searched for last.
        self._searched = 0
        self._searched_for = b""

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.data) - self.start

    def append(self, data: bytes) -> None:
        """Add what has arrived."""
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
        """The first ``size`` bytes, which stay there; fewer if there are fewer."""
        start = self.start
        return bytes(memoryview(self.data)[start : start + size])

    def take(self, size: int) -> bytes:
        """The first ``size`` bytes; fewer if there are fewer."""
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
        How many bytes there are before ``delimiter``; -1 if it does not begin
        within the first ``limit`` + 1 bytes.
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
        # It may have begun at the end.
        self._searched = max(first, min(len(data), last) - len(delimiter) + 1)
        return -1

    def match_end(self, pattern: re.Pattern[bytes], limit: int) -> int:
        """Where the first match within ``limit`` bytes ends; -1 without one."""
        start = self.start
        # Sliced, for ^ and $ and what looks around.
        with memoryview(self.data)[start : start + limit] as view:
            match = pattern.search(view)
            end = -1 if match is None else match.end()
            del match
        return end
