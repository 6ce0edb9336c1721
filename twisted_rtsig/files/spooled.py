"""
Spooled files: their content is kept in memory, and moves to a temporary file when it
gets too large.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import Any

from twisted_rtsig.files.descriptors import Descriptor
from twisted_rtsig.files.workers import AT_ONCE


class SpooledDescriptor(Descriptor):
    """
    The descriptor of a file that is made once it has more than ``max_size`` bytes.

    :param make: makes the file.
    :ivar number: the descriptor; -1 until there is a file, and once it is closed.
    """

    __slots__ = ("_file", "_make", "_max_size", "_memory", "_rolling")

    def __init__(self, max_size: int, make: Callable[[], Descriptor]) -> None:
        super().__init__(-1)
        # begin_read reads the content in memory at once.
        self.reads_cached = False
        self._max_size = max_size
        self._make = make
        self._memory: bytearray | None = bytearray()
        self._file: Descriptor | None = None
        # Held while the content in memory is changed or moved to a file.
        self._rolling = threading.Lock()

    def roll_over(self) -> None:
        """
        Move the content to a file.

        :raises OSError: if the file cannot be made or written.  The content stays in
            memory then.
        """
        with self._rolling:
            self._roll_over()

    def _roll_over(self) -> None:
        memory = self._memory
        if memory is None:
            return
        file = self._make()
        try:
            file.write(bytes(memory), 0)
        except BaseException:
            file.close()
            raise
        self._file = file
        self.number: int = file.number
        # From here on other threads use the file.
        self._memory = None

    # Calls that do not block

    def begin_read(
        self, size: int, offset: int, done: Callable[[bytes | None], object]
    ) -> bool:
        """See ``Descriptor.begin_read``."""
        memory = self._memory
        if memory is None or min(size, len(memory) - offset) > AT_ONCE:
            return False
        done(bytes(memory[offset : offset + size]))
        return True

    def begin_write(
        self, data: bytes, offset: int, done: Callable[[bool], object]
    ) -> bool:
        """See ``Descriptor.begin_write``."""
        # Do not wait for a thread that is moving the content to a file.
        if not self._rolling.acquire(blocking=False):
            return False
        memory = self._memory
        try:
            written = (
                memory is not None
                and offset + len(data) - len(memory) <= AT_ONCE
                and len(data) <= AT_ONCE
                and self._write_to_memory(data, offset)
            )
        finally:
            self._rolling.release()
        if written:
            done(True)
        return written

    def _write_to_memory(self, data: bytes | memoryview, offset: int) -> bool:
        """
        Write to memory, unless that gets too large or the content is in a file.

        :return: whether the data was written.
        """
        memory = self._memory
        if memory is None or offset + len(data) > self._max_size:
            return False
        if offset > len(memory):
            memory.extend(bytes(offset - len(memory)))
        memory[offset : offset + len(data)] = data
        return True

    # Calls that block

    def append(self, data: bytes) -> int:
        """See ``Descriptor.append``."""
        with self._rolling:
            memory = self._memory
            if memory is not None:
                if self._write_to_memory(data, len(memory)):
                    return len(memory)
                self._roll_over()
        end = self.size()
        self.write(data, end)
        return end + len(data)

    def _read_some(self, size: int, offset: int) -> bytes:
        with self._rolling:
            memory = self._memory
            if memory is not None:
                return bytes(memory[offset : offset + size])
        assert self._file is not None
        return self._file._read_some(size, offset)

    def _write_some(self, data: memoryview, offset: int) -> int:
        with self._rolling:
            if self._write_to_memory(data, offset):
                return len(data)
            self._roll_over()
        assert self._file is not None
        return self._file._write_some(data, offset)

    def size(self) -> int:
        """See ``Descriptor.size``."""
        with self._rolling:
            if self._memory is not None:
                return len(self._memory)
        return super().size()

    def truncate(self, size: int) -> None:
        """See ``Descriptor.truncate``."""
        with self._rolling:
            memory = self._memory
            if memory is not None:
                if size <= self._max_size:
                    del memory[size:]
                    memory.extend(bytes(size - len(memory)))
                    return
                self._roll_over()
        super().truncate(size)

    def sync(self) -> None:
        """See ``Descriptor.sync``: content in memory is not written to a disk."""
        if self._memory is None:
            super().sync()

    def close(self) -> None:
        """See ``Descriptor.close``."""
        self._memory = None
        if self.number >= 0:
            super().close()


class SpooledRaw(io.RawIOBase):
    """The raw file below a file of text: it reads and writes a spooled descriptor."""

    def __init__(self, descriptor: SpooledDescriptor) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        """See ``io.IOBase.readable``."""
        return True

    def writable(self) -> bool:
        """See ``io.IOBase.writable``."""
        return True

    def seekable(self) -> bool:
        """See ``io.IOBase.seekable``."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """See ``io.RawIOBase.readinto``."""
        data = self.descriptor.read(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: Any, /) -> int:
        """See ``io.RawIOBase.write``."""
        written = bytes(data)
        self.descriptor.write(written, self._position)
        self._position += len(written)
        return len(written)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See ``io.IOBase.seek``."""
        start = {
            os.SEEK_SET: lambda: 0,
            os.SEEK_CUR: lambda: self._position,
            os.SEEK_END: self.descriptor.size,
        }[whence]()
        self._position = start + offset
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """See ``io.IOBase.truncate``."""
        size = self._position if size is None else size
        self.descriptor.truncate(size)
        return size

    def fileno(self) -> int:
        """The descriptor; -1 until there is a file."""
        return self.descriptor.number

    def close(self) -> None:
        """See ``io.IOBase.close``."""
        if not self.closed:
            super().close()
            self.descriptor.close()
