"""
A file that is read and written without blocking the reactor.

Cached data is read at once, if the system can tell that it is cached.  Everything else
that may wait for a disk is done in a thread, or in the background if the reactor has a
completion port.  See ``docs/files.md``.
"""

from __future__ import annotations

import io
import operator
import os
from collections.abc import AsyncIterator
from time import perf_counter_ns
from typing import Final, TypeVar

from twisted_rtsig.coro.errors import DelimiterNotFound
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, finished
from twisted_rtsig.files.accesses import (
    Access,
    Read,
    ReadLine,
    Seek,
    SendTo,
    Size,
    Sync,
    Truncate,
    Write,
    line_of,
)
from twisted_rtsig.files.descriptors import FURTHEST, MOST_LINES, Descriptor
from twisted_rtsig.files.turns import OpenFile, Path
from twisted_rtsig.files.workers import AT_ONCE, Workers

T = TypeVar("T")

Data = bytes | bytearray | memoryview

MAX_BYTES: Final = 1 << 16
"""The default limit of a line, and the default size of a chunk."""


class AsyncFile(OpenFile):
    """
    An open file.  Made by :func:`open_file`.

    Operations without an offset of their own (``read``, ``write``, ``seek`` and the
    like) are done in turn, whether they are awaited or not.  Each begins at the
    position where the one before has ended.  ``read_at`` and ``write_at`` do not wait
    for a turn.

    A read that is cancelled leaves the position where it was.  A write that is
    cancelled after it has begun is still done.

    :ivar name: the path that the file was opened with.
    :ivar mode: the mode that it was opened with.
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
        # The result of fstat() when the file was opened.
        self._opened = opened
        self._position = opened.st_size if "a" in mode else 0
        # The number of operations under way at offsets of their own.
        self._elsewhere = 0
        # Counts writes and truncations.
        self._changes = 0

    def fileno(self) -> int:
        """The descriptor; -1 once the file is closed."""
        return self._descriptor.number

    def tell(self) -> int:
        """The position after the operations that are done by now."""
        return self._position

    # Reading

    @must_be_awaited
    def read(self, size: int) -> Operation[bytes]:
        """
        Read the next ``size`` bytes: fewer only at the end of the file, and none after
        the end.

        :raises ValueError: if the file is closed, or the size is negative.
        :raises OSError: (when awaited) if the file cannot be read.
        """
        if not self._turns:
            data = self._read_cached(size, self._position)
            if data is not None:
                self._position += len(data)
                return finished(data)
        self._check_readable()
        return self._in_turn(Read(self, _not_negative("size", size)))

    @must_be_awaited
    def read_at(self, offset: int, size: int) -> Operation[bytes]:
        """As :meth:`read`, at an offset; the position stays where it is."""
        data = self._read_cached(size, offset)
        if data is not None:
            return finished(data)
        self._check_readable()
        offset = _not_negative("offset", offset)
        return self._elsewhere_at(Read(self, _not_negative("size", size), offset))

    @must_be_awaited
    def read_line(self, max_bytes: int = MAX_BYTES) -> Operation[bytes]:
        """
        Read the next line, with its newline.  Only the last line of the file may have
        none.  At the end of the file return nothing.

        :param max_bytes: the limit of the line, without the newline.
        :raises DelimiterNotFound: (when awaited) if the line is longer.
        """
        if not self._turns:
            line = self._read_cached_line(max_bytes, self._position)
            if line is not None:
                self._position += len(line)
                return finished(line)
        self._check_readable()
        return self._in_turn(ReadLine(self, _not_negative("max_bytes", max_bytes)))

    async def lines(self, max_bytes: int = MAX_BYTES) -> AsyncIterator[bytes]:
        """
        The lines from the position on, each as :meth:`read_line` returns it::

            async for line in file.lines():

        The position moves behind each line as the line is returned.  ``async for line
        in file`` is the same.

        :raises DelimiterNotFound: if a line is too long.
        """
        # The data that was read ahead, and where the next line begins in it.
        ahead = b""
        start = 0
        position = self._position
        changes = self._changes
        while True:
            if self._turns:
                await self.seek(0, os.SEEK_CUR)
            if self._position != position or self._changes != changes:
                # The file was written or the position was set meanwhile.
                position = self._position
                changes = self._changes
                ahead, start = b"", 0
            end = ahead.find(b"\n", start) + 1
            if not end:
                rest = ahead[start:]
                # Double what is there, so that a long line is not copied many times.
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
        The content from the position on, in chunks of ``size`` bytes::

            async for chunk in file.chunks():
        """
        while data := await self.read(size):
            yield data

    def _read_cached(self, size: int, offset: int) -> bytes | None:
        """
        Read cached data.

        :return: the data; None if it is not cached, or may not be read at once.
        """
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
        return None if data is None else line_of(data, size)

    # Writing

    def write(self, data: Data) -> Operation[None]:
        """
        Write all of the data at the position; or at the end of the file, if it was
        opened with ``a``.

        :raises OSError: (when awaited) if the data cannot be written.  Its attribute
            ``characters_written`` is the number of bytes that were written, and the
            position is behind them.
        """
        self._check_writable()
        return self._in_turn(Write(self, copy_of(data)))

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
        return self._elsewhere_at(Write(self, copy_of(data), offset))

    def _send_to(
        self, socket: int, offset: int, size: int
    ) -> Operation[tuple[int, bool]]:
        """
        Send a part of the file to a non-blocking socket.

        :return: the number of bytes that the socket has taken; and whether to stop: at
            the end of the file, or after an error.
        """
        self._check_readable()
        return self._elsewhere_at(SendTo(self, socket, offset, size))

    def truncate(self, size: int | None = None) -> Operation[int]:
        """
        Set the size of the file; return it.

        :param size: the size in bytes; by default the position.
        """
        self._check_writable()
        if size is not None:
            size = _not_negative("size", size)
        return self._in_turn(Truncate(self, size))

    @must_be_awaited
    def sync(self) -> Operation[None]:
        """
        Wait until the written data is on the disk: that of all operations before this
        one in turn, and of each ``write_at`` that is done.

        :raises OSError: (when awaited) if the disk fails.
        """
        self._check_open()
        return self._in_turn(Sync("to sync", self))

    # The position and the size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> Operation[int]:
        """
        Set the position; return it.

        :param whence: where the offset counts from: ``os.SEEK_SET`` for the beginning
            of the file, ``os.SEEK_CUR`` for the position, ``os.SEEK_END`` for the end.
        :raises OSError: (when awaited) if the position would be negative, or beyond the
            largest offset of any file.
        """
        self._check_open()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"whence={whence}: use os.SEEK_SET, SEEK_CUR or SEEK_END")
        return self._in_turn(Seek(self, operator.index(offset), whence))

    @must_be_awaited
    def size(self) -> Operation[int]:
        """The size of the file in bytes, when the turn of this operation comes."""
        self._check_open()
        return self._in_turn(Size("the size of", self))

    def _is_idle(self) -> bool:
        return super()._is_idle() and not self._elsewhere

    def _closes_at_once(self) -> bool:
        reads = "r" in self.mode and "+" not in self.mode
        return reads and self._descriptor.closes_at_once()

    def _close_file(self) -> None:
        self._descriptor.close()

    def _elsewhere_at(self, access: Access[T]) -> Operation[T]:
        self._elsewhere += 1
        access.begin()
        return access.operation


def copy_of(data: Data) -> bytes:
    """A copy of the data, which the caller cannot change before it is written."""
    return data if type(data) is bytes else bytes(memoryview(data))


def _not_negative(name: str, value: int) -> int:
    # A bad argument raises at once, and not when its turn comes.
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name}={value}: 0 is the least")
    return number
