"""
A file that is read and written without blocking the reactor.

What is cached is read at once, if the system can say that it is.  Everything else
that may wait for a disk is done in a thread, or in the background where the reactor
has a completion port.  See ``docs/files.md``.
"""

from __future__ import annotations

import errno
import io
import operator
import os
from collections.abc import AsyncIterator
from time import perf_counter_ns
from typing import Any, Final, Literal, TypeVar, overload

from twisted_rtsig.coro.errors import DelimiterNotFound
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.files.descriptors import FURTHEST, MOST_LINES, Descriptor
from twisted_rtsig.files.opening import open_cached, open_descriptor
from twisted_rtsig.files.textfile import AsyncTextFile, open_text
from twisted_rtsig.files.turns import OpenFile, Path, Turn
from twisted_rtsig.files.workers import AT_ONCE, Job, Workers, finish, workers_of

T = TypeVar("T")

Data = bytes | bytearray | memoryview

MAX_BYTES: Final = 1 << 16
"""How long a line may be, and how much of a file comes in a chunk, by default."""

# By mode, without its "b".
_FLAGS: Final = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


class AsyncFile(OpenFile):
    """
    An open file.  Made by :func:`open_file`.

    What has no offset of its own (``read``, ``write``, ``seek`` and the like) is done
    in turn, at the position where the one before has left it, whether that was
    awaited or not.  ``read_at`` and ``write_at`` are done at the same time as
    whatever else.

    A read that is cancelled leaves the position where it was.  A write that is
    cancelled after it has begun is done all the same.

    :ivar name: the path it was opened with.
    :ivar mode: how.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        name: Path,
        mode: str,
        opened: os.stat_result,
        workers: Workers,
    ) -> None:
        self._descriptor = descriptor
        super().__init__(name, mode, workers)
        if workers.port is not None:
            descriptor.report_to(workers.port)
        # What it was then.
        self._opened = opened
        self._position = opened.st_size if "a" in mode else 0
        # The number of operations under way at offsets of their own.
        self._elsewhere = 0
        # How often it was written or truncated.
        self._changes = 0

    def fileno(self) -> int:
        """The descriptor; -1 once it is closed."""
        return self._descriptor.number

    def tell(self) -> int:
        """The position, after all that has been done in turn by now."""
        return self._position

    # Reading

    @must_be_awaited
    def read(self, size: int) -> Operation[bytes]:
        """
        The next ``size`` bytes.  Fewer only at the end of the file, and none after it.

        :raises ValueError: if the file is closed, or the size negative.
        :raises OSError: (when awaited) if it cannot be read.
        """
        if not self._turns:
            data = self._read_cached(size, self._position)
            if data is not None:
                self._position += len(data)
                finished: Finished[bytes] = Finished()
                finished.result = data
                return finished
        self._check_readable()
        return self._in_turn(_Read(self, _not_negative("size", size)))

    @must_be_awaited
    def read_at(self, offset: int, size: int) -> Operation[bytes]:
        """As :meth:`read`, from an offset; the position stays where it is."""
        data = self._read_cached(size, offset)
        if data is not None:
            finished: Finished[bytes] = Finished()
            finished.result = data
            return finished
        self._check_readable()
        offset = _not_negative("offset", offset)
        return self._elsewhere_at(_Read(self, _not_negative("size", size), offset))

    @must_be_awaited
    def read_line(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        The next line, with the newline at its end, which only the last one of the
        file may lack.  Nothing at the end of the file.

        :param max_bytes: how long the line may be, without the newline.
        :raises DelimiterNotFound: (when awaited) if it is longer.
        """
        if not self._turns:
            line = self._read_cached_line(max_bytes, self._position)
            if line is not None:
                self._position += len(line)
                finished: Finished[bytes] = Finished()
                finished.result = line
                return finished
        self._check_readable()
        return self._in_turn(_ReadLine(self, _not_negative("max_bytes", max_bytes)))

    async def lines(self, max_bytes: int = MAX_BYTES) -> AsyncIterator[bytes]:
        """
        Each line from the position on, as :meth:`read_line` returns it::

            async for line in file.lines():

        The position is behind the line that was the last to come.  ``async for line
        in file`` is the same.

        :raises DelimiterNotFound: if a line is too long.
        """
        # What was read from the position on, and where the next line begins there.
        ahead = b""
        start = 0
        position = self._position
        changes = self._changes
        while True:
            if self._turns:
                await self.seek(0, os.SEEK_CUR)
            if self._position != position or self._changes != changes:
                # It was written or sought meanwhile.
                position = self._position
                changes = self._changes
                ahead, start = b"", 0
            end = ahead.find(b"\n", start) + 1
            if not end:
                rest = ahead[start:]
                # As much again, so that a long line is not copied all the time.
                size = max(MAX_BYTES, len(rest))
                more = await self.read_at(position + len(rest), size)
                if more and len(rest) <= max_bytes:
                    ahead, start = rest + more, 0
                    continue
                end = len(ahead)
            line = ahead[start:end]
            if not line:
                return
            if len(line) > max_bytes + line.endswith(b"\n"):
                raise DelimiterNotFound(f"a line of {self!r}", max_bytes)
            start = end
            position = self._position = position + len(line)
            yield line

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.lines()

    async def chunks(self, size: int = MAX_BYTES) -> AsyncIterator[bytes]:
        """
        All from the position on, so many bytes at a time::

            async for chunk in file.chunks():
        """
        while data := await self.read(size):
            yield data

    def _read_cached(self, size: int, offset: int) -> bytes | None:
        """What is cached, unless something else has to be done for it."""
        workers = self._workers
        descriptor = self._descriptor
        if (
            not descriptor.reads_cached
            or workers.left <= 0
            or not 0 < size <= AT_ONCE
            or not 0 <= offset <= FURTHEST
            or self._closing is not None
        ):
            return None
        window = workers.window(size)
        start = perf_counter_ns()
        got = descriptor.read_cached(window, offset)
        if got < 0:
            return None
        workers.count(got, perf_counter_ns() - start)
        return bytes(window) if got == size else bytes(window[:got])

    def _read_cached_line(self, max_bytes: int, offset: int) -> bytes | None:
        size = min(max_bytes + 1, MOST_LINES)
        data = self._read_cached(size, offset)
        return None if data is None else _line_of(data, size)

    # Writing

    def write(self, data: Data) -> Operation[None]:
        """
        Write all of it, at the position; or at the end of the file, if it was opened
        with ``a``.

        :raises OSError: (when awaited) if it cannot be written.  Its
            ``characters_written`` is how much was, and the position is behind that.
        """
        self._check_writable()
        return self._in_turn(_Write(self, copy_of(data)))

    def write_at(self, offset: int, data: Data) -> Operation[None]:
        """
        As :meth:`write`, at an offset; the position stays where it is.

        :raises UnsupportedOperation: if the file was opened with ``a``.
        """
        self._check_writable()
        if "a" in self.mode:
            raise io.UnsupportedOperation(
                f"{self!r} is only written at its end: open it with 'r+b' to write at "
                "an offset"
            )
        offset = _not_negative("offset", offset)
        return self._elsewhere_at(_Write(self, copy_of(data), offset))

    def _send_to(
        self, socket: int, offset: int, size: int
    ) -> Operation[tuple[int, bool]]:
        """
        Send a part of the file to a socket that does not block.

        :return: how much the socket has taken, and whether it is of no use to try
            again: at the end of the file, or after an error.
        """
        self._check_readable()
        return self._elsewhere_at(_SendTo(self, socket, offset, size))

    def truncate(self, size: int | None = None) -> Operation[int]:
        """
        Make the file as long as this, or end at the position; return that.
        """
        self._check_writable()
        if size is not None:
            size = _not_negative("size", size)
        return self._in_turn(_Truncate(self, size))

    @must_be_awaited
    def sync(self) -> Operation[None]:
        """
        Wait until what was written is on the disk: all that comes before this in
        turn, and each ``write_at`` that is done.

        :raises OSError: (when awaited) if the disk has failed.
        """
        self._check_open()
        return self._in_turn(_Sync("to sync", self))

    # Of the whole

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> Operation[int]:
        """
        Set the position; return it.

        :param whence: where the offset is from: ``os.SEEK_SET`` for the beginning of
            the file, ``os.SEEK_CUR`` for the position, ``os.SEEK_END`` for the end.
        :raises OSError: (when awaited) if it would be negative, or further than any
            file can be long.
        """
        self._check_open()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"whence={whence}: use os.SEEK_SET, SEEK_CUR or SEEK_END")
        return self._in_turn(_Seek(self, operator.index(offset), whence))

    @must_be_awaited
    def size(self) -> Operation[int]:
        """How long the file is, when it is the turn of this."""
        self._check_open()
        return self._in_turn(_Size("the size of", self))

    def _is_idle(self) -> bool:
        return super()._is_idle() and not self._elsewhere

    def _closes_at_once(self) -> bool:
        reads = "r" in self.mode and "+" not in self.mode
        return reads and self._descriptor.closes_at_once()

    def _close_file(self) -> None:
        self._descriptor.close()

    def _elsewhere_at(self, access: _Access[T]) -> Operation[T]:
        self._elsewhere += 1
        access.begin()
        return access.operation


class _Access(Turn[T]):
    """
    Something that is done with an open file: in turn, or at an offset of its own.

    :cvar writes: whether the position is behind it even if it was cancelled.
    :cvar changes: whether what was read of the file before may be untrue after it.
    """

    __slots__ = ("_offset",)

    _file: AsyncFile
    writes = False
    changes = False

    def __init__(self, what: str, file: AsyncFile, offset: int | None = None) -> None:
        super().__init__(what, file)
        self._offset = offset

    @property
    def position(self) -> int:
        """Where it is done, now that it is its turn."""
        return self._file._position if self._offset is None else self._offset

    def begin(self) -> None:
        """It is its turn."""
        file = self._file
        file._workers.run(self, self.block, file._descriptor, self.position)

    def block(self, descriptor: Descriptor, position: int) -> tuple[T, int]:
        """In a thread: do it.  Return the result, and the position behind it."""
        raise NotImplementedError

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        file = self._file
        value = None
        if error is None:
            value, position = result
        else:
            position = self.position + getattr(error, "characters_written", 0)
        if self._offset is None and (self.writes or not self.operation.called):
            file._position = position
        file._changes += self.changes
        self._finish(value, error)

    def _leave(self) -> None:
        if self._offset is None:
            super()._leave()
        else:
            self._file._elsewhere -= 1


class _Reading(_Access[bytes]):
    """
    A read of a file, some of which may be cached.

    :ivar size: how much is read first.
    """

    __slots__ = ("_size",)

    def __init__(
        self, what: str, file: AsyncFile, size: int, offset: int | None = None
    ) -> None:
        super().__init__(what, file, offset)
        self._size = size

    def begin(self) -> None:
        file = self._file
        if self.operation.called:
            # It was given up while it waited for the next turn of the reactor.
            self.drop()
        elif file._workers.left <= 0 and file._descriptor.reads_cached:
            file._workers.when_there_is_more(self.begin)
        else:
            data = file._read_cached(self._size, self.position)
            if data is not None:
                self._has_read(data)
            elif not file._descriptor.begin_read(
                self._size, self.position, self._has_read
            ):
                super().begin()

    def _has_read(self, data: bytes | None) -> None:
        """So much was read without a thread; nothing if that has failed."""
        result = None if data is None else self.result_of(data)
        if result is None:
            super().begin()
        else:
            self.end((result, self.position + len(result)), None)

    def result_of(self, data: bytes) -> bytes | None:
        """The result, if what was read first is enough for it."""
        raise NotImplementedError


class _Read(_Reading):
    __slots__ = ()

    def __init__(self, file: AsyncFile, size: int, offset: int | None = None) -> None:
        super().__init__("to read from", file, size, offset)

    def result_of(self, data: bytes) -> bytes:
        return data

    def block(self, descriptor: Descriptor, position: int) -> tuple[bytes, int]:
        data = descriptor.read(self._size, position)
        return data, position + len(data)


class _ReadLine(_Reading):
    __slots__ = ("_max_bytes",)

    def __init__(self, file: AsyncFile, max_bytes: int) -> None:
        size = min(max_bytes + 1, MOST_LINES)
        super().__init__("to read a line from", file, size)
        self._max_bytes = max_bytes

    def result_of(self, data: bytes) -> bytes | None:
        return _line_of(data, self._size)

    def block(self, descriptor: Descriptor, position: int) -> tuple[bytes, int]:
        line = descriptor.read_line(self._max_bytes, position)
        if len(line) > self._max_bytes + line.endswith(b"\n"):
            raise DelimiterNotFound(f"a line of {self._file!r}", self._max_bytes)
        return line, position + len(line)


def _line_of(data: bytes, size: int) -> bytes | None:
    """The line that was read, if it was to be that many bytes; None if it is longer."""
    end = data.find(b"\n") + 1
    if end:
        return data[:end]
    return data if len(data) < size else None


class _SendTo(_Access[tuple[int, bool]]):
    __slots__ = ("_size", "_socket")

    def __init__(self, file: AsyncFile, socket: int, offset: int, size: int) -> None:
        super().__init__("to send", file, offset)
        self._socket = socket
        self._size = size

    def block(
        self, descriptor: Descriptor, position: int
    ) -> tuple[tuple[int, bool], int]:
        sent, refused = descriptor.send_to(self._socket, position, self._size)
        return (sent, refused), position + sent


class _Write(_Access[None]):
    __slots__ = ("_data",)

    writes = True
    changes = True

    def __init__(self, file: AsyncFile, data: bytes, offset: int | None = None) -> None:
        super().__init__("to write to", file, offset)
        self._data = data

    def begin(self) -> None:
        file = self._file
        if "a" in file.mode or not file._descriptor.begin_write(
            self._data, self.position, self._has_written
        ):
            super().begin()

    def _has_written(self, done: bool) -> None:
        """It was written without a thread, or that has failed."""
        if done:
            self.end((None, self.position + len(self._data)), None)
        else:
            super().begin()

    def block(self, descriptor: Descriptor, position: int) -> tuple[None, int]:
        if "a" in self._file.mode:
            return None, descriptor.append(self._data)
        descriptor.write(self._data, position)
        return None, position + len(self._data)


class _Truncate(_Access[int]):
    __slots__ = ("_size",)

    changes = True

    def __init__(self, file: AsyncFile, size: int | None) -> None:
        super().__init__("to truncate", file)
        self._size = size

    def block(self, descriptor: Descriptor, position: int) -> tuple[int, int]:
        size = position if self._size is None else self._size
        descriptor.truncate(size)
        return size, position


class _Sync(_Access[None]):
    __slots__ = ()

    def block(self, descriptor: Descriptor, position: int) -> tuple[None, int]:
        descriptor.sync()
        return None, position


class _Size(_Access[int]):
    __slots__ = ()

    def block(self, descriptor: Descriptor, position: int) -> tuple[int, int]:
        return descriptor.size(), position


class _Seek(_Access[int]):
    __slots__ = ("_by", "_whence")

    def __init__(self, file: AsyncFile, offset: int, whence: int) -> None:
        super().__init__("to seek in", file)
        self._by = offset
        self._whence = whence

    def begin(self) -> None:
        if self._whence == os.SEEK_END:
            super().begin()
        else:
            start = self.position if self._whence == os.SEEK_CUR else 0
            self.end(*self._to(start + self._by))

    def block(self, descriptor: Descriptor, position: int) -> tuple[int, int]:
        sought, error = self._to(descriptor.size() + self._by)
        if error is not None:
            raise error
        return sought

    def _to(self, position: int) -> tuple[tuple[int, int], OSError | None]:
        error = None
        if position < 0:
            error = OSError(errno.EINVAL, f"Position {position} is before the file")
        elif position > FURTHEST:
            error = OSError(errno.EINVAL, f"Position {position} is behind all files")
        return (position, position), error


def copy_of(data: Data) -> bytes:
    """What is not changed by anybody before it is written."""
    return data if type(data) is bytes else bytes(memoryview(data))


def _not_negative(name: str, value: int) -> int:
    # What is no number is refused before it waits for its turn.
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name}={value}: 0 is the least")
    return number


# Opening


BytesMode = Literal[
    "rb",
    "br",
    "r+b",
    "rb+",
    "wb",
    "bw",
    "w+b",
    "wb+",
    "ab",
    "ba",
    "a+b",
    "ab+",
    "xb",
    "bx",
    "x+b",
    "xb+",
]
TextMode = Literal[
    "r",
    "rt",
    "r+",
    "r+t",
    "rt+",
    "w",
    "wt",
    "w+",
    "w+t",
    "wt+",
    "a",
    "at",
    "a+",
    "a+t",
    "at+",
    "x",
    "xt",
    "x+",
    "x+t",
    "xt+",
]


@overload
def open_file(
    path: Path,
    mode: BytesMode = "rb",
    *,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[AsyncFile]: ...


@overload
def open_file(
    path: Path,
    mode: TextMode,
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[AsyncTextFile]: ...


@overload
def open_file(
    path: Path,
    mode: str,
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[Any]: ...


@must_be_awaited
def open_file(
    path: Path,
    mode: str = "rb",
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[Any]:
    """
    Open a regular file::

        async with await open_file("data") as file:

    :param mode: as that of Python's ``open``: ``r``, ``w``, ``a`` or ``x``, and ``+``
        for both directions.  With ``b`` the file is an :class:`AsyncFile`, of bytes,
        and without an :class:`AsyncTextFile`.
    :param encoding: of text; by default that of the locale.
    :param errors: of text: the error handler of ``codecs``.
    :param newline: of text: how lines end, as for Python's ``open``.
    :param permissions: those of a file that is made, less the umask.
    :param reactor: whose threads do what blocks; by default that of the task.
    :raises ValueError: if the mode is none of these, or is for bytes and there is an
        encoding.
    :raises OSError: (when awaited) if it cannot be opened, or is no regular file.
    """
    binary = check_mode(mode, encoding, errors, newline)
    workers = workers_of(reactor)
    if not binary:
        opening_text = _OpenText(path, mode, newline, workers)
        workers.run(
            *(opening_text, open_text, path, mode, permissions),
            *(encoding, errors, newline),
        )
        return opening_text.operation
    flags = _FLAGS[mode.replace("b", "")]
    opened = open_cached(path) if flags == os.O_RDONLY else None
    if opened is not None:
        finished: Finished[AsyncFile] = Finished()
        finished.result = AsyncFile(opened[0], path, mode, opened[1], workers)
        return finished
    opening = _Open(path, mode, workers)
    workers.run(opening, open_descriptor, path, flags, permissions)
    return opening.operation


def check_mode(
    mode: str, encoding: str | None, errors: str | None, newline: str | None
) -> bool:
    """
    Check the arguments of :func:`open_file`.

    :return: whether the file is opened for bytes.
    """
    kind = mode.replace("b", "", 1) if "b" in mode else mode.replace("t", "", 1)
    if kind not in _FLAGS:
        raise ValueError(
            f"mode={mode!r}: a file is opened for text with 'r', 'w', 'a' or 'x', for "
            "bytes with 'b' as well, and with '+' for both directions"
        )
    if "b" not in mode:
        if newline not in (None, "", "\n", "\r", "\r\n"):
            raise ValueError(
                f"newline={newline!r}: use None, '', '\\n', '\\r' or '\\r\\n'"
            )
        return False
    if (encoding, errors, newline) != (None, None, None):
        raise ValueError(
            f"mode={mode!r} is for bytes, which have neither encoding, errors nor "
            "newline: leave out the 'b' for text"
        )
    return True


class _OpenText(Job[AsyncTextFile]):
    __slots__ = ("_mode", "_newline", "_path", "_workers")

    def __init__(
        self, path: Path, mode: str, newline: str | None, workers: Workers
    ) -> None:
        super().__init__(f"to open {path!r}")
        self._path = path
        self._mode = mode
        self._newline = newline
        self._workers = workers

    def end(self, result: Any, error: BaseException | None) -> None:
        file = None
        if error is None:
            file = AsyncTextFile(
                *(result, self._path, self._mode, self._newline, self._workers)
            )
            if self.operation.called:
                # It was cancelled too late.
                file.close()
        finish(self.operation, file, error)


class _Open(Job[AsyncFile]):
    __slots__ = ("_mode", "_path", "_workers")

    def __init__(self, path: Path, mode: str, workers: Workers) -> None:
        super().__init__(f"to open {path!r}")
        self._path = path
        self._mode = mode
        self._workers = workers

    def end(self, result: Any, error: BaseException | None) -> None:
        file = None
        if error is None:
            descriptor, found = result
            file = AsyncFile(descriptor, self._path, self._mode, found, self._workers)
        if file is not None and self.operation.called:
            # It was cancelled too late.
            file.close()
        finish(self.operation, file, error)
