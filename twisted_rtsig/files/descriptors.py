"""
Descriptors of open files, read and written at an offset: what blocks, and the few
things that do not.  Those of Windows are in ``handles``.

Linux can read from a file without waiting for a disk.  preadv2(2) with
RWF_NOWAIT copies what is in the page cache, and where that ends the read is
short, or fails with EAGAIN.  Not every file system knows how to (tmpfs does not):
EOPNOTSUPP.  Three things have to be minded:

- A short read may be the end of the file, or only that of what is cached.
- Linux 5.9 and 5.10 return 0 where nothing is cached, as at the end of the file
  (preadv2(2), BUGS).  So only the size of the file tells whether it has ended.
- Newer kernels begin to read what is missing, and older ones do not.  None waits
  for it, so that it must be read in a way that blocks.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, Final

MOST_LINES: Final = 1 << 12
"""How much is read first of a line: most are shorter."""

FURTHEST: Final = (1 << 63) - 1
"""No system knows an offset beyond this."""

# More is read only if there is more.
_MUCH: Final = 1 << 20


class Descriptor:
    """
    An open file.

    :ivar number: -1 once it is closed.
    :ivar reads_cached: whether what is cached can be read without waiting, as far
        as is known.
    """

    __slots__ = ("__weakref__", "_has_read_cached", "number", "reads_cached")

    def __init__(self, number: int) -> None:
        self.number: int = number
        self.reads_cached: bool = hasattr(os, "RWF_NOWAIT")
        self._has_read_cached = False

    # What does not block

    def read_cached(self, window: memoryview, offset: int) -> int:
        """
        Read what is cached.

        :return: how much; -1 if neither the whole window nor all up to the end of
            the file is cached.
        """
        number = self.number
        try:
            size = os.preadv(number, (window,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self.reads_cached = False
            # Of any other the blocking read will tell.
            return -1
        if size < len(window) and os.fstat(number).st_size > offset + size:
            return -1
        self._has_read_cached = True
        return size

    def closes_at_once(self) -> bool:
        """
        Whether to close it waits for nothing, if nobody has written to it: not for a
        network, as its file system has shown, nor for a file to be deleted.
        """
        return self._has_read_cached and os.fstat(self.number).st_nlink > 0

    # What goes on in the background, where a completion port tells when it is over

    def report_to(self, port: Any) -> None:
        """Use this completion port, if there is any use for one."""

    def begin_read(
        self, size: int, offset: int, done: Callable[[bytes | None], object]
    ) -> bool:
        """
        Begin to read all of it, or up to the end of the file.

        :param done: called with that; or with nothing, and then the blocking read
            tells why.
        :return: whether it has begun, and may be over.
        """
        return False

    def begin_write(
        self, data: bytes, offset: int, done: Callable[[bool], object]
    ) -> bool:
        """
        Begin to write all of it.

        :param done: called with whether it was written; if not, then the blocking
            write tells why.
        :return: whether it has begun.
        """
        return False

    # What blocks

    def read(self, size: int, offset: int) -> bytes:
        """Read all of it, or up to the end of the file."""
        at_once = size
        if size > _MUCH:
            # The system takes memory for as much as it is asked for.
            at_once = min(size, max(self.size() - offset, _MUCH))
        data = self._read_some(at_once, offset)
        if len(data) in (0, size):
            return data
        # Signals, network file systems and the like, or the end.
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
        Read up to the next newline and with it, or up to the end of the file; or
        more than ``limit`` bytes without one.
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
        Send to a socket that does not block.

        :return: how much it has taken, and whether that will be all: at the end of the
            file, or after an error, of whichever side.
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
        Write all of it.

        :raises OSError: whose ``characters_written`` is how much was.
        """
        self._write_all(data, lambda rest, done: self._write_some(rest, offset + done))

    def append(self, data: bytes) -> int:
        """As :meth:`write`, at the end of the file; return where that is then."""
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
        """How long the file is."""
        return os.fstat(self.number).st_size

    def truncate(self, size: int) -> None:
        """Make it longer or shorter."""
        os.ftruncate(self.number, size)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self.number)

    def close(self) -> None:
        """Close it.  There must be nobody left who uses it."""
        number, self.number = self.number, -1
        os.close(number)


class SeekingDescriptor(Descriptor):
    """One for platforms on which a file is read where it has been sought to."""

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
