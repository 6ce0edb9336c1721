"""
What the reads of a stream take from its buffer: one function for each kind of read.

Each is called with the input of a stream and two arguments of the read.  It returns
the data, or None if not all of it has arrived yet; and raises what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted_rtsig.coro.errors import DelimiterNotFound

if TYPE_CHECKING:
    from twisted_rtsig.coro.reading import StreamInput

Take = Callable[["StreamInput", Any, int], "bytes | None"]

CARRIAGE_RETURN: Final = 0x0D


def take_some(stream: StreamInput, what: Any, limit: int) -> bytes | None:
    """What there is, up to ``limit`` bytes.  At the end of the input, no bytes."""
    buffer = stream._buffer
    if buffer.data:
        return buffer.take(limit)
    return _nothing_more(stream)


def take_peeked(stream: StreamInput, what: Any, limit: int) -> bytes | None:
    """As ``take_some``, of what stays in the buffer."""
    buffer = stream._buffer
    if buffer.data:
        return buffer.peek(limit)
    return _nothing_more(stream)


def _nothing_more(stream: StreamInput) -> bytes | None:
    if not stream._ended:
        return None
    lost = stream._unclean()
    if lost is not None:
        raise lost
    return b""


def take_exactly(stream: StreamInput, what: Any, size: int) -> bytes | None:
    """So many bytes."""
    buffer = stream._buffer
    if buffer.size >= size:
        return buffer.take(size)
    if stream._ended:
        raise stream._incomplete(wanted(take_exactly, what, size))
    return None


def take_until(stream: StreamInput, delimiter: bytes, limit: int) -> bytes | None:
    """What is before the delimiter, which is taken as well."""
    buffer = stream._buffer
    end = buffer.find(delimiter, limit)
    if end >= 0:
        data = buffer.take(end)
        buffer.take(len(delimiter))
        return data
    _check_unfinished(stream, limit + len(delimiter), take_until, delimiter, limit)
    return None


def take_line(stream: StreamInput, what: Any, limit: int) -> bytes | None:
    r"""What is before ``\n`` or ``\r\n``, which is taken as well."""
    buffer = stream._buffer
    # One more, for a \r.
    end = buffer.find(b"\n", limit + 1)
    if 0 <= end <= limit:
        line = buffer.take(end + 1)
        if end and line[end - 1] == CARRIAGE_RETURN:
            end -= 1
        return line[:end]
    if end > limit and buffer.peek(end)[-1:] == b"\r":
        return buffer.take(end + 1)[:-2]
    # That many bytes are too many, unless only the \n is missing.
    enough = limit + 1
    if buffer.size == enough and buffer.peek(enough)[-1:] == b"\r":
        enough += 1
    _check_unfinished(stream, enough, take_line, what, limit)
    return None


def take_match(
    stream: StreamInput, pattern: re.Pattern[bytes], limit: int
) -> bytes | None:
    """Everything up to the end of the first match."""
    buffer = stream._buffer
    end = buffer.match_end(pattern, limit)
    if end >= 0:
        return buffer.take(end)
    _check_unfinished(stream, limit, take_match, pattern, limit)
    return None


def _check_unfinished(
    stream: StreamInput, enough: int, take: Take, what: Any, limit: int
) -> None:
    """
    Check that what is not there yet can still arrive.

    :param enough: if so many bytes have arrived, they would have shown it.
    :raises StreamError: if it cannot arrive any more.
    """
    if stream._buffer.size >= enough:
        raise DelimiterNotFound(wanted(take, what, limit), limit)
    if stream._ended:
        raise stream._incomplete(wanted(take, what, limit))


def wanted(take: Take, what: Any, limit: int) -> str:
    """What a read waits for, in words."""
    return _WANTED[take].format(what=what, limit=limit)


_WANTED: Final[dict[Take, str]] = {
    take_some: "anything",
    take_peeked: "anything",
    take_exactly: "{limit} bytes",
    take_until: "what ends with {what!r}",
    take_line: "a line",
    take_match: "a match of {what.pattern!r}",
}
