"""
Descriptors of open files, read and written at an offset: the calls that block, and the
few that do not.  Those of Windows are in ``handles``.

Linux can read from a file without waiting for a disk.  preadv2(2) with RWF_NOWAIT
copies data from the page cache.  At the end of the cached data the read is short, or
fails with EAGAIN.  File systems without support, such as tmpfs, fail with EOPNOTSUPP.
Three details matter:

- A short read may mean the end of the file, or only the end of the cached data.
- Linux 5.9 and 5.10 return 0 where nothing is cached, as at the end of the file
  (preadv2(2), BUGS).  So only the size of the file tells whether it has ended.
- Newer kernels begin to read the missing data, and older ones do not.  None waits for
  it, so it has to be read by a blocking call.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, Final

MOST_LINES: Final = 1 << 12
"""The size of the first read for a line: most lines are shorter."""

FURTHEST: Final = (1 << 63) - 1
"""The greatest offset on any system."""

# Before a read of more than this, look at the size of the file.
_MUCH: Final = 1 << 20


class Descriptor:
    """
    The descriptor of an open file.

    :ivar number: the descriptor; -1 once it is closed.
    :ivar reads_cached: whether cached data can be read without waiting, as far as is
        known.
    """

    __slots__ = ("__weakref__", "_has_read_cached", "number", "reads_cached")

    def __init__(self, number: int) -> None:
        self.number: int = number
        self.reads_cached: bool = hasattr(os, "RWF_NOWAIT")
        self._has_read_cached = False

    # Calls that do not block

    def read_cached(self, window: memoryview, offset: int) -> int:
        """
        Read cached data into ``window``.

        :return: the number of bytes; -1 unless the whole window, or everything up to
            the end of the file, is cached.
        """
        number = self.number
        try:
            size = os.preadv(number, (window,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self.reads_cached = False
            # The blocking read will report any other error.
            return -1
        if size < len(window) and os.fstat(number).st_size > offset + size:
            return -1
        self._has_read_cached = True
        return size

    def closes_at_once(self) -> bool:
        """
        Whether closing a file that was only read does not block.  It may block on a
        network file system, which does not support reads of cached data; or delete the
        file, if that has no name any more.
        """
        return self._has_read_cached and os.fstat(self.number).st_nlink > 0

    # Calls in the background, for a completion port

    def report_to(self, port: Any) -> None:
        """Use this completion port, if the descriptor supports one."""

    def begin_read(
        self, size: int, offset: int, done: Callable[[bytes | None], object]
    ) -> bool:
        """
        Begin to read ``size`` bytes, or up to the end of the file.

        :param done: called with the data; or with None after an error, which the
            blocking read will report.
        :return: whether the read has begun; it may be over.
        """
        return False

    def begin_write(
        self, data: bytes, offset: int, done: Callable[[bool], object]
    ) -> bool:
        """
        Begin to write all of the data.

        :param done: called with whether all was written; if not, the blocking write
            will report the error.
        :return: whether the write has begun; it may be over.
        """
        return False

    # Calls that block

    def read(self, size: int, offset: int) -> bytes:
        """Read ``size`` bytes, or up to the end of the file."""
        at_once = size
        if size > _MUCH:
            # A read allocates memory for the whole size that is asked for.
            at_once = min(size, max(self.size() - offset, _MUCH))
        data = self._read_some(at_once, offset)
        if len(data) in (0, size):
            return data
        # A signal or a network file system may cut a read short, or the file has ended.
        parts = [data]
        done = len(data)
        while done < size and (
            data := self._read_some(min(size - done, at_once), offset + done)
        ):
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def read_line(self, limit: int, offset: int) -> bytes:
        """
        Read up to the next newline, inclusively, or up to the end of the file.  If the
        line is longer than ``limit`` bytes, return more than that, without a newline.
        """
        line = b""
        while len(line) <= limit:
            size = min(limit + 1 - len(line), max(MOST_LINES, len(line)))
            more = self.read(size, offset + len(line))
            end = more.find(b"\n") + 1
            if end:
                return line + more[:end]
            line += more
            if len(more) < size:
                break
        return line

    def send_to(self, socket: int, offset: int, size: int) -> tuple[int, bool]:
        """
        Send to a non-blocking socket.

        :return: the number of bytes that it has taken; and whether to stop: at the end
            of the file, or after an error of the file or of the socket.
        """
        done = 0
        try:
            while done < size:
                sent = os.sendfile(socket, self.number, offset + done, size - done)
                if not sent:
                    return done, True
                done += sent
        except BlockingIOError:
            pass
        except OSError:
            return done, True
        return done, False

    def write(self, data: bytes, offset: int) -> None:
        """
        Write all of the data.

        :raises OSError: if that fails.  Its attribute ``characters_written`` is the
            number of bytes that were written.
        """
        self._write_all(data, lambda rest, done: self._write_some(rest, offset + done))

    def append(self, data: bytes) -> int:
        """As :meth:`write`, at the end of the file; return where the file ends then."""
        self._write_all(data, lambda rest, done: os.write(self.number, rest))
        return os.lseek(self.number, 0, os.SEEK_CUR)

    def _write_all(self, data: bytes, write_some: Any) -> None:
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += write_some(view[done:], done)
        except OSError as error:
            error.characters_written = done  # type: ignore[attr-defined]
            raise

    def _read_some(self, size: int, offset: int) -> bytes:
        return os.pread(self.number, size, offset)

    def _write_some(self, data: memoryview, offset: int) -> int:
        return os.pwrite(self.number, data, offset)

    def size(self) -> int:
        """The size of the file in bytes."""
        return os.fstat(self.number).st_size

    def truncate(self, size: int) -> None:
        """Set the size of the file."""
        os.ftruncate(self.number, size)

    def sync(self) -> None:
        """Wait until all written data is on the disk."""
        os.fsync(self.number)

    def close(self) -> None:
        """Close the descriptor.  Nothing may be using it any more."""
        number, self.number = self.number, -1
        os.close(number)


class SeekingDescriptor(Descriptor):
    """For platforms without pread(): each read and write seeks first."""

    __slots__ = ("_lock",)

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.reads_cached = False
        self._lock = threading.Lock()

    def _read_some(self, size: int, offset: int) -> bytes:
        with self._lock:
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, size)

    def _write_some(self, data: memoryview, offset: int) -> int:
        with self._lock:
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.write(self.number, data)


_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
