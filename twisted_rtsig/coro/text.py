"""Text over a stream of bytes."""

from __future__ import annotations

import codecs
import io
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.closing import AsyncBlock
from twisted_rtsig.coro.errors import (
    BusyResourceError,
    DelimiterNotFound,
    IncompleteText,
)
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import failed, finished
from twisted_rtsig.coro.reading import MAX_BYTES
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stream_protocols import ByteStream
from twisted_rtsig.coro.tasks import Task, raise_if_cancelled

MAX_CHARS: Final = 1 << 16
"""How many characters a read returns at most, or a line may have, by default."""

_NEWLINES: Final = (None, "\n", "\r", "\r\n")


class TextStream(AsyncBlock):
    """
    Reads and writes text over a stream of bytes::

        text = TextStream(stream)
        name = await text.read_line()
        await text.write(f"Hello, {name}!\\n")

    A character may arrive in several pieces.  Limits count characters, as the decoder
    returns them.  Only one task at a time may read, and only from this object: it
    decodes all bytes that have arrived, so that they are not left in ``stream``.

    :param stream: a :class:`Stream`, or any :class:`ByteStream`.
    :param encoding: as for ``open``.  ``"utf-8-sig"`` and ``"utf-16"`` take a byte
        order mark at the beginning, and write one.
    :param errors: how bytes that are no text are handled, as for ``open``.
    :param newline: what ends a line.  By default, ``None``, it is ``"\\n"``,
        ``"\\r\\n"`` or ``"\\r"``, all of which are read as ``"\\n"``, and lines are
        written as they are.  Otherwise it is ``newline``, for which ``"\\n"`` is
        written.
    :raises LookupError: if the encoding or the error handler is unknown.
    :raises ValueError: if ``newline`` is something else.
    """

    def __init__(
        self,
        stream: ByteStream,
        encoding: str = "utf-8",
        errors: str = "strict",
        newline: str | None = None,
    ) -> None:
        if newline not in _NEWLINES:
            raise ValueError(
                f"newline={newline!r}: it is None, '\\n', '\\r' or '\\r\\n'"
            )
        codecs.lookup_error(errors)
        # Not all codecs are of text: hex, for example.
        "".encode(encoding)
        self.stream = stream
        self.encoding = encoding
        self.newline = newline
        decoder: Any = codecs.getincrementaldecoder(encoding)(errors)
        if newline in (None, "\r\n"):
            # It keeps a \r until the next character has arrived.
            decoder = io.IncrementalNewlineDecoder(decoder, newline is None)
        self._decoder = decoder
        self._encoder = codecs.getincrementalencoder(encoding)(errors)
        self._delimiter = newline or "\n"
        self._reactor = scheduler_for(None).reactor
        # Pieces that were searched and in which no line ends; and the text that was not
        # searched yet, which begins at _start.
        self._searched: list[str] = []
        self._searched_size = 0
        self._rest = ""
        self._start = 0
        self._ended = False
        self._reading: Task[str] | None = None
        # Why the next bytes are no text.
        self._error: UnicodeDecodeError | None = None

    # Reading

    @must_be_awaited
    def read(self, max_chars: int = MAX_CHARS) -> Deferred[str]:
        """
        Return what has arrived, as soon as there is any: 1 to ``max_chars`` characters.
        At the end of the stream, return an empty string.

        :raises UnicodeDecodeError: if the next bytes are no text, and ``errors`` is
            ``"strict"``.
        """
        _check_limit(max_chars)
        return self._get(self._take_some, max_chars)

    @must_be_awaited
    def read_line(self, max_chars: int = MAX_CHARS) -> Deferred[str]:
        """
        Return the next line, without its newline.

        :param max_chars: how many characters the line may have.
        :raises DelimiterNotFound: if the line is longer; it stays in the stream.
        :raises IncompleteText: if the stream ends before the line does.
        :raises UnicodeDecodeError: as :meth:`read` does.
        """
        _check_limit(max_chars)
        return self._get(self._take_line, max_chars)

    async def lines(self, max_chars: int = MAX_CHARS) -> AsyncIterator[str]:
        """
        Iterate over the lines, as :meth:`read_line` returns them, until the stream
        ends.

        :raises IncompleteText: if it ends in the middle of a line.
        """
        while True:
            try:
                line = await self.read_line(max_chars)
            except IncompleteText as end:
                if end.text:
                    raise
                return
            yield line

    def _get(self, take: Any, limit: int) -> Deferred[str]:
        before = self._reading
        if before is not None and not before._is_told_to_end():
            raise BusyResourceError(
                f"another task reads from {self!r} already: let one task read, and "
                "pass on what it has read"
            )
        try:
            taken = take(limit)
        except Exception as error:
            # The frames of the traceback refer to the error.
            return failed(error.with_traceback(None))
        if taken is not None:
            return finished(taken)
        reading = self._reading = spawn(
            self._read_until_taken,
            take,
            limit,
            before,
            name="read text",
            reactor=self._reactor,
        )
        reading._when_done(self._end_reading)
        return reading.as_deferred()

    def _end_reading(self, task: Task[str]) -> None:
        if self._reading is task:
            self._reading = None

    async def _read_until_taken(
        self, take: Any, limit: int, before: Task[str] | None
    ) -> str:
        """:param before: a read that was cancelled, and may not have ended yet."""
        if before is not None:
            ended = Event()
            before._when_done(lambda _: ended.set())
            await ended.wait()
            taken: str | None = take(limit)
            if taken is not None:
                return taken
        while True:
            self._feed(await self.stream.read(MAX_BYTES))
            # After a cancellation nothing would get the text that is taken.
            raise_if_cancelled()
            taken = take(limit)
            if taken is not None:
                return taken

    def _feed(self, data: bytes) -> None:
        decoder = self._decoder
        self._ended = not data
        before = decoder.getstate()
        try:
            text = decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            self._error = error.with_traceback(None)
            # The bytes before the error are text.  The object of the error ends with
            # the data, and may begin with bytes that were left from earlier data.
            undecoded: bytes = before[0]
            size = len(undecoded) + len(data) - len(error.object) + error.start
            decoder.setstate(before)
            text = decoder.decode(data[: max(0, size - len(undecoded))])
        except UnicodeError as error:
            # utf-16 without a byte order mark raises this error, which has no position.
            self._error = UnicodeDecodeError(
                self.encoding, data, 0, len(data), str(error)
            )
            text = ""
        self._rest = self._rest[self._start :] + text
        self._start = 0

    def _take_some(self, limit: int) -> str | None:
        if self._searched:
            self._rest = "".join([*self._searched, self._rest[self._start :]])
            self._start = self._searched_size = 0
            self._searched.clear()
        taken = self._rest[self._start : self._start + limit]
        self._start += len(taken)
        if taken:
            return taken
        if self._error is not None:
            raise _again(self._error)
        return "" if self._ended else None

    def _take_line(self, limit: int) -> str | None:
        if self._searched_size <= limit:
            end = self._rest.find(self._delimiter, self._start)
            if end >= 0:
                if self._searched_size + end - self._start > limit:
                    raise DelimiterNotFound("a line", limit, "characters")
                line = self._rest[self._start : end]
                if self._searched:
                    line = "".join([*self._searched, line])
                    self._searched.clear()
                    self._searched_size = 0
                self._start = end + len(self._delimiter)
                return line
            piece = self._rest[self._start :]
            if piece:
                self._searched.append(piece)
                self._searched_size += len(piece)
            self._rest = ""
            self._start = 0
        if self._searched_size > limit:
            raise DelimiterNotFound("a line", limit, "characters")
        if self._error is not None:
            raise _again(self._error)
        if self._ended:
            text = "".join(self._searched)
            self._searched.clear()
            self._searched_size = 0
            raise IncompleteText(text, self.encoding)
        return None

    # Writing, and the end

    def write(self, text: str) -> Awaitable[None]:
        """
        Write, as :meth:`Stream.write` does.

        :raises UnicodeEncodeError: if the encoding does not have a character.
        """
        if self.newline is not None and self.newline != "\n":
            text = text.replace("\n", self.newline)
        return self.stream.write(self._encoder.encode(text))

    def write_eof(self) -> Awaitable[None]:
        """See :meth:`Stream.write_eof`."""
        return self.stream.write_eof()

    def close(self) -> Awaitable[None]:
        """See :meth:`Stream.close`."""
        return self.stream.close()

    def abort(self) -> Awaitable[None]:
        """See :meth:`Stream.abort`."""
        return self.stream.abort()

    async def __aenter__(self) -> TextStream:
        await self.stream.__aenter__()
        return self

    async def _end_block(self, error: BaseException | None) -> None:
        if error is None:
            await self.stream.__aexit__(None, None, None)
        else:
            await self.stream.__aexit__(type(error), error, error.__traceback__)

    def __repr__(self) -> str:
        return f"<TextStream in {self.encoding} over {self.stream!r}>"


def _check_limit(max_chars: int) -> None:
    if max_chars < 1:
        raise ValueError(f"max_chars={max_chars}: 1 is the least that can be read")


def _again(error: UnicodeDecodeError) -> UnicodeDecodeError:
    """A copy, since each raise adds to the traceback of an exception."""
    return UnicodeDecodeError(*error.args)
