"""
The operations of an :class:`AsyncFile`: each is done in turn, or at an offset of its
own.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, TypeVar

from twisted_rtsig.coro.errors import DelimiterNotFound
from twisted_rtsig.files.descriptors import FURTHEST, MOST_LINES, Descriptor
from twisted_rtsig.files.turns import Turn

if TYPE_CHECKING:
    from twisted_rtsig.files.asyncfile import AsyncFile

T = TypeVar("T")


class Access(Turn[T]):
    """
    An operation of an open file: in turn, or at an offset of its own.

    :cvar writes: whether the position moves even if the operation was cancelled.
    :cvar changes: whether data that was read ahead is stale after the operation.
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
        """The offset of the operation, once its turn has come."""
        return self._file._position if self._offset is None else self._offset

    def begin(self) -> None:
        """See ``Turn.begin``."""
        file = self._file
        file._workers.run(self, self.block, file._descriptor, self.position)

    def block(self, descriptor: Descriptor, position: int) -> tuple[T, int]:
        """Called in a thread: do the operation.  Return its result and new position."""
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


class Reading(Access[bytes]):
    """
    A read that is done at once if the data is cached.

    :param size: the number of bytes to read first.
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
            # It was cancelled while it waited for the next turn of the reactor.
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
        """
        Use the data that was read without a thread.

        :param data: the data; None if the read has failed.
        """
        result = None if data is None else self.result_of(data)
        if result is None:
            super().begin()
        else:
            self.end((result, self.position + len(result)), None)

    def result_of(self, data: bytes) -> bytes | None:
        """The result; None if more has to be read for it."""
        raise NotImplementedError


class Read(Reading):
    __slots__ = ()

    def __init__(self, file: AsyncFile, size: int, offset: int | None = None) -> None:
        super().__init__("to read from", file, size, offset)

    def result_of(self, data: bytes) -> bytes:
        return data

    def block(self, descriptor: Descriptor, position: int) -> tuple[bytes, int]:
        data = descriptor.read(self._size, position)
        return data, position + len(data)


class ReadLine(Reading):
    __slots__ = ("_max_bytes",)

    def __init__(self, file: AsyncFile, max_bytes: int) -> None:
        size = min(max_bytes + 1, MOST_LINES)
        super().__init__("to read a line from", file, size)
        self._max_bytes = max_bytes

    def result_of(self, data: bytes) -> bytes | None:
        return line_of(data, self._size)

    def block(self, descriptor: Descriptor, position: int) -> tuple[bytes, int]:
        line = descriptor.read_line(self._max_bytes, position)
        if len(line) > self._max_bytes + line.endswith(b"\n"):
            raise DelimiterNotFound(f"a line of {self._file!r}", self._max_bytes)
        return line, position + len(line)


def line_of(data: bytes, size: int) -> bytes | None:
    """
    The first line of the data, which a read of ``size`` bytes has returned; None if the
    line is longer.
    """
    end = data.find(b"\n") + 1
    if end:
        return data[:end]
    return data if len(data) < size else None


class SendTo(Access[tuple[int, bool]]):
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


class Write(Access[None]):
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
        """
        End a write without a thread.

        :param done: whether it has succeeded; if not, a thread tries again.
        """
        if done:
            self.end((None, self.position + len(self._data)), None)
        else:
            super().begin()

    def block(self, descriptor: Descriptor, position: int) -> tuple[None, int]:
        if "a" in self._file.mode:
            return None, descriptor.append(self._data)
        descriptor.write(self._data, position)
        return None, position + len(self._data)


class Truncate(Access[int]):
    __slots__ = ("_size",)

    changes = True

    def __init__(self, file: AsyncFile, size: int | None) -> None:
        super().__init__("to truncate", file)
        self._size = size

    def block(self, descriptor: Descriptor, position: int) -> tuple[int, int]:
        size = position if self._size is None else self._size
        descriptor.truncate(size)
        return size, position


class Sync(Access[None]):
    __slots__ = ()

    def block(self, descriptor: Descriptor, position: int) -> tuple[None, int]:
        descriptor.sync()
        return None, position


class Size(Access[int]):
    __slots__ = ()

    def block(self, descriptor: Descriptor, position: int) -> tuple[int, int]:
        return descriptor.size(), position


class Seek(Access[int]):
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
            error = OSError(errno.EINVAL, f"Position {position} is beyond any file")
        return (position, position), error
