"""
What a stream has received and nobody has read yet.

Searching is linear in the data, however it was cut into pieces, and what is kept
is not copied: a single piece stays the C{bytes} that the transport has made, and
several are gathered in a C{bytearray}, whose front is cut off in constant time
(CPython moves its start).
"""

from __future__ import annotations

import re

_CARRIAGE_RETURN = 0x0D


class ReadBuffer:
    """
    Bytes, in at the end and out at the front.

    :ivar size: how many there are.
    """

    __slots__ = ("_data", "_searched", "_searched_for", "_start", "size")

    def __init__(self) -> None:
        self.size = 0
        self._data: bytes | bytearray = b""
        # Where it begins; 0 in a bytearray.
        self._start = 0
        # How far it is known not to contain what was searched for last.
        self._searched = 0
        self._searched_for = b""

    def append(self, data: bytes) -> None:
        """Add what has arrived."""
        if not self.size:
            self._data = data
            self._start = 0
        elif type(self._data) is bytearray:
            self._data += data
        else:
            gathered = bytearray(memoryview(self._data)[self._start :])
            gathered += data
            self._data = gathered
            self._start = 0
        self.size += len(data)

    def peek(self, size: int) -> bytes:
        """The first C{size} bytes, which stay there; fewer if there are fewer."""
        start = self._start
        return bytes(memoryview(self._data)[start : start + size])

    def take(self, size: int) -> bytes:
        """The first C{size} bytes; fewer if there are fewer."""
        data, start = self._data, self._start
        self._searched = 0
        if size >= self.size:
            self._data = b""
            self._start = self.size = 0
            return bytes(memoryview(data)[start:]) if start else bytes(data)
        self.size -= size
        if type(data) is bytes:
            self._start = end = start + size
            return data[start:end]
        taken = bytes(memoryview(data)[:size])
        del data[:size]  # type: ignore[union-attr]
        return taken

    def take_line(self, limit: int) -> bytes | None:
        """
        The first line without its end, if it is of at most C{limit} bytes with a
        C{\\r} at its end.  None does not say that there is none.
        """
        data, start = self._data, self._start
        if type(data) is not bytes:
            return None
        end = data.find(b"\n", start, start + limit + 1)
        if end < 0:
            return None
        self._searched = 0
        after = end + 1
        self.size -= after - start
        if self.size:
            self._start = after
        else:
            # Nobody needs it any more.
            self._data = b""
            self._start = 0
        if end > start and data[end - 1] == _CARRIAGE_RETURN:
            end -= 1
        return data[start:end]

    def find(self, delimiter: bytes, limit: int) -> int:
        """
        How many bytes there are before C{delimiter}; -1 if it does not begin
        within the first C{limit} + 1 bytes.
        """
        start = self._start
        searched = 0
        if self._searched and self._searched_for == delimiter:
            searched = self._searched
        at = self._data.find(
            delimiter, start + searched, start + limit + len(delimiter)
        )
        if at >= 0:
            return at - start
        self._searched_for = delimiter
        # It may have begun at the end.
        known = min(self.size, limit + len(delimiter)) - len(delimiter) + 1
        self._searched = max(known, searched)
        return -1

    def match_end(self, pattern: re.Pattern[bytes], limit: int) -> int:
        """Where the first match within C{limit} bytes ends; -1 without one."""
        start = self._start
        # Sliced, for ^ and $ and what looks around.
        with memoryview(self._data)[start : start + limit] as view:
            match = pattern.search(view)
            end = -1 if match is None else match.end()
            del match
        return end
