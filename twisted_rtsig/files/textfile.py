"""
A text file that is read and written without blocking the reactor.

Python's own ``TextIOWrapper`` does the work in a thread, so encodings, newlines and
positions are those of ``open``.  The file reads ahead, so that most lines need no
thread.  See ``docs/files.md``.
"""

from __future__ import annotations

import io
import operator
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

from twisted_rtsig.coro.errors import DelimiterNotFound
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, finished
from twisted_rtsig.files.turns import OpenFile, Path, Turn
from twisted_rtsig.files.workers import Workers

T = TypeVar("T")

MAX_CHARACTERS: Final = 1 << 16
"""The default limit of a line, and the size of reading ahead, in characters."""

# The pattern of a line's end, by the newline parameter of open().
_LINE_ENDS: Final = {
    None: re.compile("\n"),
    "\n": re.compile("\n"),
    "\r": re.compile("\r"),
    "\r\n": re.compile("\r\n"),
    # A \r at the end of the text read ahead may be the first half of \r\n.
    "": re.compile("\r\n|\n|\r(?!\\Z)", re.DOTALL),
}

# A position in the file, as TextIOWrapper.tell() returns it, and the number of
# characters from there to the position of the reader.
_Position = tuple[int, int]


class AsyncTextFile(OpenFile):
    """
    An open text file.  Made by :func:`open_file`, with a mode that has no ``b``.

    All operations are done in turn, whether they are awaited or not.  A read that is
    cancelled leaves the position where it was.  A write that is cancelled after it has
    begun is still done.

    :ivar name: the path that the file was opened with.
    :ivar mode: the mode that it was opened with.
    """

    def __init__(
        self,
        file: io.TextIOWrapper,
        name: Path,
        mode: str,
        newline: str | None,
        workers: Workers,
    ) -> None:
        self._file = file
        super().__init__(name, mode, workers)
        self._line_end = _LINE_ENDS[newline]
        # Whether a \r alone ends a line as well, and stays in the text.
        self._universal = newline == ""
        # Whether the decoder may hold a carriage return when the file is written to.
        self._may_hold = not newline and "+" in mode
        # The text that was read ahead, and how many characters of it the reader has.
        self._ahead = ""
        self._start = 0
        # For each piece that was read ahead: its position, as TextIOWrapper.tell()
        # returns it, and its length in characters.  And how many characters of the
        # first piece are no longer in _ahead.
        self._pieces: deque[tuple[int, int]] = deque()
        self._passed = 0

    @property
    def encoding(self) -> str:
        """The encoding of the file."""
        return self._file.encoding

    @property
    def errors(self) -> str | None:
        """The error handler of the encoding."""
        return self._file.errors

    @property
    def newlines(self) -> str | tuple[str, ...] | None:
        """The ends of lines that were found so far, as in ``io.TextIOBase``."""
        found: str | tuple[str, ...] | None = self._file.newlines
        return found

    def fileno(self) -> int:
        """The descriptor; -1 once the file is closed."""
        return -1 if self._file.closed else self._file.fileno()

    # Reading

    @must_be_awaited
    def read(self, size: int) -> Operation[str]:
        """
        Read the next ``size`` characters: fewer only at the end of the file, and none
        after the end.

        :raises ValueError: if the file is closed, or the size is negative.
        :raises OSError: (when awaited) if the file cannot be read.
        :raises UnicodeDecodeError: (when awaited) if the file is not in the encoding.
        """
        self._check_readable()
        size = operator.index(size)
        if size < 0:
            raise ValueError(f"size={size}: 0 is the least")
        if not self._turns and len(self._ahead) - self._start >= size:
            return finished(self._take(size))
        return self._in_turn(_ReadText(self, size))

    @must_be_awaited
    def read_line(self, max_characters: int = MAX_CHARACTERS) -> Operation[str]:
        """
        Read the next line, with its newline.  Only the last line of the file may have
        none.  At the end of the file return an empty text.

        :param max_characters: the limit of the line, without the newline.
        :raises DelimiterNotFound: (when awaited) if the line is longer.
        :raises OSError: (when awaited) as :meth:`read`, and so is
            ``UnicodeDecodeError``.
        """
        self._check_readable()
        limit = operator.index(max_characters)
        if limit < 0:
            raise ValueError(f"max_characters={limit}: 0 is the least")
        if not self._turns:
            end = self._end_of_line(limit)
            if end is not None:
                return finished(self._take(end - self._start))
        return self._in_turn(_ReadTextLine(self, limit))

    async def lines(self, max_characters: int = MAX_CHARACTERS) -> AsyncIterator[str]:
        """
        The lines from the position on, each as :meth:`read_line` returns it::

            async for line in file.lines():

        ``async for line in file`` is the same.

        :raises DelimiterNotFound: if a line is too long.
        """
        while line := await self.read_line(max_characters):
            yield line

    def __aiter__(self) -> AsyncIterator[str]:
        return self.lines()

    def _take(self, size: int) -> str:
        text = self._ahead[self._start : self._start + size]
        self._start += len(text)
        return text

    def _end_of_line(self, limit: int) -> int | None:
        """The end of the next line in the text read ahead; None if that has no end."""
        found = self._line_end.search(self._ahead, self._start)
        if found is None or found.start() - self._start > limit:
            return None
        return found.end()

    def _read_ahead(self, begins: int, text: str) -> None:
        """Add text that was read ahead from the position ``begins`` on."""
        pieces = self._pieces
        passed = self._passed + self._start
        while pieces and passed >= pieces[0][1]:
            passed -= pieces.popleft()[1]
        pieces.append((begins, len(text)))
        self._ahead = self._ahead[self._start :] + text
        self._passed, self._start = passed, 0

    def _position(self) -> _Position | None:
        """The position of the reader; None if it is that of the file."""
        if not self._pieces:
            return None
        return self._pieces[0][0], self._passed + self._start

    def _forget_ahead(self) -> None:
        """Drop the text read ahead: the file is at the position of the reader."""
        self._ahead = ""
        self._start = self._passed = 0
        self._pieces.clear()

    # Writing

    def write(self, text: str) -> Operation[None]:
        """
        Write all of the text at the position; or at the end of the file, if it was
        opened with ``a``.

        :raises OSError: (when awaited) if the text cannot be written.
        :raises UnicodeEncodeError: (when awaited) if the encoding lacks a character.
        """
        self._check_writable()
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not text: open the file with 'b' for bytes")
        return self._in_turn(
            _Settled("to write to", self, _write, self._may_hold, text)
        )

    def truncate(self, size: int | None = None) -> Operation[int]:
        """
        Set the size of the file; return it.

        :param size: the size in bytes; by default the position.
        """
        self._check_writable()
        return self._in_turn(
            _Settled("to truncate", self, _truncate, self._may_hold, size)
        )

    @must_be_awaited
    def sync(self) -> Operation[None]:
        """
        Wait until the written text is on the disk.

        :raises OSError: (when awaited) if the disk fails.
        """
        self._check_open()
        return self._in_turn(_Settled("to sync", self, _sync))

    # The position

    @must_be_awaited
    def tell(self) -> Operation[int]:
        """
        The position, for :meth:`seek`.  It counts neither characters nor bytes.
        """
        self._check_open()
        return self._in_turn(_Settled("the position in", self, _tell))

    def seek(self, position: int, whence: int = os.SEEK_SET) -> Operation[int]:
        """
        Set the position; return it.

        :param position: 0, or a result of :meth:`tell`.
        :param whence: as for Python's text files: with ``os.SEEK_CUR`` and
            ``os.SEEK_END`` the position can only be 0.
        :raises OSError: (when awaited) if the position is negative, or is not 0 with
            ``SEEK_CUR`` or ``SEEK_END``.
        """
        self._check_open()
        position = operator.index(position)
        return self._in_turn(_Settled("to seek in", self, _seek, position, whence))

    def _close_file(self) -> None:
        self._file.close()


class _ReadingText(Turn[str]):
    """A read, which may have to read further ahead."""

    __slots__ = ("_limit",)

    _file: AsyncTextFile

    def __init__(self, what: str, file: AsyncTextFile, limit: int) -> None:
        super().__init__(what, file)
        self._limit = limit

    def begin(self) -> None:
        self._go_on(ended=False)

    def _go_on(self, ended: bool) -> None:
        file = self._file
        if self.operation.called:
            # It was cancelled: the text stays there for the next read.
            self._finish(None, None)
            return
        try:
            size = self.size(ended)
        except DelimiterNotFound as error:
            self._finish(None, error)
            return
        if size is not None:
            self._finish(file._take(size), None)
            return
        # Double what is there, so that a long line is not copied many times.
        more = max(MAX_CHARACTERS, len(file._ahead) - file._start)
        file._workers.run(self, _read_more, file._file, max(more, self.least()))

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        if error is not None:
            self._finish(None, error)
            return
        begins, text = result
        if text:
            self._file._read_ahead(begins, text)
        self._go_on(ended=not text)

    def size(self, ended: bool) -> int | None:
        """
        The number of characters of the result; None if more has to be read ahead.

        :param ended: whether the file has ended.
        """
        raise NotImplementedError

    def least(self) -> int:
        """The least number of characters that are missing."""
        return 0


class _ReadText(_ReadingText):
    __slots__ = ()

    def __init__(self, file: AsyncTextFile, size: int) -> None:
        super().__init__("to read from", file, size)

    def size(self, ended: bool) -> int | None:
        return None if self.least() > 0 and not ended else self._limit

    def least(self) -> int:
        file = self._file
        return self._limit - (len(file._ahead) - file._start)


class _ReadTextLine(_ReadingText):
    __slots__ = ()

    def __init__(self, file: AsyncTextFile, limit: int) -> None:
        super().__init__("to read a line from", file, limit)

    def size(self, ended: bool) -> int | None:
        file = self._file
        end = file._end_of_line(self._limit)
        if end is not None:
            return end - file._start
        rest = len(file._ahead) - file._start
        if ended and file._universal and file._ahead.endswith("\r"):
            # The \r at the end of the file is a line's end, and not half of one.
            return self._checked(rest, 1)
        if ended:
            return self._checked(rest, 0)
        # One character over the limit may be the first half of a line's end.
        self._checked(rest, 1)
        return None

    def _checked(self, size: int, end: int) -> int:
        """
        Check the size of a line.

        :param size: the size, including the line's end.
        :param end: the size of the line's end.
        :raises DelimiterNotFound: if the line is too long.
        """
        if size > self._limit + end:
            raise DelimiterNotFound(f"a line of {self._file!r}", self._limit)
        return size


class _Settled(Turn[Any]):
    """
    An operation for which the file has to be moved back to the position of the reader,
    since it has read ahead.
    """

    __slots__ = ("_args", "_function")

    _file: AsyncTextFile

    def __init__(
        self,
        what: str,
        file: AsyncTextFile,
        function: Callable[..., Any],
        *args: Any,
    ) -> None:
        super().__init__(what, file)
        self._function = function
        self._args = args

    def begin(self) -> None:
        file = self._file
        file._workers.run(
            *(self, _settle_and_call, file._file, file._position()),
            *(self._function, self._args),
        )

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        self._file._forget_ahead()
        self._finish(result, error)


# In threads


def _read_more(file: io.TextIOWrapper, size: int) -> tuple[int, str]:
    """Read ahead; return the position before, and the text."""
    begins = file.tell()
    try:
        return begins, file.read(size)
    except BaseException:
        # The next read begins at the same position.
        file.seek(begins)
        raise


def _settle_and_call(
    file: io.TextIOWrapper,
    position: _Position | None,
    function: Callable[..., T],
    args: tuple[Any, ...],
) -> T:
    if position is not None:
        begins, passed = position
        file.seek(begins)
        file.read(passed)
        # TextIOWrapper has read ahead as well, and would write behind that.
        file.seek(file.tell())
    return function(file, *args)


def _write(file: io.TextIOWrapper, may_hold: bool, text: str) -> None:
    if may_hold:
        _seek_behind_what_was_read(file)
    file.write(text)
    file.flush()


def _truncate(file: io.TextIOWrapper, may_hold: bool, size: int | None) -> int:
    if may_hold:
        _seek_behind_what_was_read(file)
    return file.truncate(size)


def _skip_shift() -> int:
    """
    Return by how many bits ``TextIOWrapper.tell`` shifts the number of characters to
    skip.  PyPy does not pack it as CPython does.
    """
    file = io.TextIOWrapper(io.BytesIO(b"\ra"), "ascii", newline="")
    # The position is behind the carriage return, with one byte to decode and one
    # character to skip.
    file.read(1)
    return file.tell().bit_length() - 1


_SKIP_SHIFT: Final = _skip_shift()


def _seek_behind_what_was_read(file: io.TextIOWrapper) -> None:
    """
    Move the position before a carriage return that was not read yet.

    The decoder of a file with universal newlines holds a carriage return until it has
    the next character.  Then ``TextIOWrapper`` would write behind it, or behind what
    has shown whether it is half of a line's end.  What ``TextIOWrapper.tell`` returns
    holds, after 64 bits for the position of the file below, the state of the decoder,
    the number of bytes to decode and that of characters to skip.
    """
    packed = file.tell()
    position, state = packed & (1 << 64) - 1, packed >> 64 & 0xFFFFFFFF
    if not state & 1:
        return
    if packed >> 96:
        if packed >> _SKIP_SHIFT & 0xFFFFFFFF != 1:
            # More than the carriage return was read since the position of the file
            # below: leave it to Python.
            return
    else:
        # Nothing was read.  What the decoder has ignored may follow the return.  (The
        # first one that is encoded may follow a byte order mark.)
        size = len("\r\r".encode(file.encoding)) - len("\r".encode(file.encoding))
        position -= size
        if position < 0:
            return
        below: Any = file.buffer
        behind = below.tell()
        below.seek(position)
        held = below.read(size)
        below.seek(behind)
        if held.strip(b"\0") != b"\r":
            return
    file.seek(position | (state ^ 1) << 64)


def _sync(file: io.TextIOWrapper) -> None:
    file.flush()
    # A spooled file may still be in memory.
    if file.fileno() >= 0:
        os.fsync(file.fileno())


def _tell(file: io.TextIOWrapper) -> int:
    return file.tell()


def _seek(file: io.TextIOWrapper, position: int, whence: int) -> int:
    return file.seek(position, whence)
