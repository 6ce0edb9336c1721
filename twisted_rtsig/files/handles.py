"""
Files of Windows, which are read and written in the background: overlapped.

Some facts about overlapped files:

- The end of an operation is queued as a packet in the completion port of the handle,
  even if the operation is over before the call returns.  No packet is queued if the
  call itself fails, or if the lowest bit of the event in its OVERLAPPED is set.  With
  that bit only the event is signalled, so threads can use the handle as well.
- An operation begins at the offset in its OVERLAPPED; the handle has no position.  The
  offset 2**64 - 1 writes at the end of the file.
- A read at the end of the file fails with ERROR_HANDLE_EOF.
- Cached data is copied before the call returns.  So the reactor's thread reads and
  writes only a little at once.
- Windows extends a file while the caller waits, and not in the background.  So a thread
  does that.
- A file that is opened without FILE_SHARE_DELETE cannot be renamed or removed.  CPython
  opens files that way; here it is as on POSIX.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted_rtsig.files.descriptors import FURTHEST, Descriptor
from twisted_rtsig.files.workers import AT_ONCE
from twisted_rtsig.windows import calls as windows

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier

# A call takes a size of 32 bits.
_MOST: Final = 1 << 30

_AT_THE_END: Final = 2**64 - 1


class HandleDescriptor(Descriptor):
    """A file that was opened by :func:`open_handle`."""

    __slots__ = ("_handle", "_port", "_written")

    def __init__(self, number: int, size: int) -> None:
        super().__init__(number)
        self.reads_cached = False
        self._handle: int = windows.msvcrt.get_osfhandle(number)
        self._port: CompletionPortNotifier | None = None
        # A write beyond this offset may extend the file.
        self._written = size

    def report_to(self, port: CompletionPortNotifier) -> None:
        """See ``Descriptor.report_to``."""
        # Without a port, threads read and write the file.
        with contextlib.suppress(OSError):
            port.adopt(self._handle)
            self._port = port

    def begin_read(
        self, size: int, offset: int, done: Callable[[bytes | None], object]
    ) -> bool:
        """See ``Descriptor.begin_read``."""
        return size <= AT_ONCE and self._begin("ReadFile", size, offset, done)

    def begin_write(
        self, data: bytes, offset: int, done: Callable[[bool], object]
    ) -> bool:
        """See ``Descriptor.begin_write``."""
        size = len(data)
        return (
            size <= AT_ONCE
            and offset + size <= self._written
            and self._begin(
                "WriteFile", data, offset, lambda written: done(written == size)
            )
        )

    def _begin(
        self, what: str, argument: Any, offset: int, done: Callable[[Any], object]
    ) -> bool:
        port = self._port
        if port is None or offset > FURTHEST:
            return False
        operation = _operation(offset, 0)
        # The operation keeps its buffer until it is over.
        address = operation.address

        def ended() -> None:
            if operation.pending:
                # The packet was for an earlier operation at the same address.
                port.call_once_completed(address, ended)
                return
            try:
                result = operation.getresult()
            except OSError as error:
                result = _nothing_if_at_the_end(error)
            done(result)

        port.call_once_completed(address, ended)
        try:
            getattr(operation, what)(self._handle, argument)
        except OSError as error:
            port.forget_completion(address)
            nothing = _nothing_if_at_the_end(error)
            if nothing is None:
                return False
            done(nothing)
        return True

    # Calls that block

    def append(self, data: bytes) -> int:
        """See ``Descriptor.append``."""
        self._write_all(data, lambda rest, done: self._write_some(rest, _AT_THE_END))
        return self.size()

    def truncate(self, size: int) -> None:
        """See ``Descriptor.truncate``."""
        _check_offset(size)
        length = ctypes.c_int64(size)
        self._written = min(self._written, size)
        if not windows.set_file_information(
            self._handle,
            windows.FILE_END_OF_FILE_INFO,
            ctypes.addressof(length),
            ctypes.sizeof(length),
        ):
            raise windows.error(windows.last_error())

    def _read_some(self, size: int, offset: int) -> bytes:
        _check_offset(offset)
        operation = _operation(offset)
        try:
            operation.ReadFile(self._handle, min(size, _MOST))
            data: bytes = operation.getresult(True)
        except OSError as error:
            nothing = _nothing_if_at_the_end(error)
            if nothing is None:
                raise
            return nothing
        return data

    def _write_some(self, data: memoryview, offset: int) -> int:
        if offset != _AT_THE_END:
            _check_offset(offset)
        operation = _operation(offset)
        operation.WriteFile(self._handle, data[:_MOST])
        written: int = operation.getresult(True)
        if offset != _AT_THE_END:
            self._written = max(self._written, offset + written)
        return written


def _check_offset(offset: int) -> None:
    # A larger offset would be truncated, and lead to another part of the file.
    if offset > FURTHEST:
        raise OverflowError(f"offset {offset} is beyond any file")


def _operation(offset: int, event: int | None = None) -> Any:
    """An operation at an offset; by default with an event in place of a packet."""
    if event is None:
        operation = windows.overlapped.Overlapped()
    else:
        operation = windows.overlapped.Overlapped(event)
    structure = windows.Overlapped.from_address(operation.address)
    structure.offset = offset
    if event is None:
        structure.event |= 1
    return operation


def _nothing_if_at_the_end(error: OSError) -> bytes | None:
    at_end = getattr(error, "winerror", 0) == windows.ERROR_HANDLE_EOF
    return b"" if at_end else None


def open_handle(path: Any, flags: int, permissions: int) -> int:
    """
    As ``os.open``, for :class:`HandleDescriptor`.

    :raises OSError: if the file cannot be opened.
    """
    name = os.fsdecode(path)
    if "\0" in name:
        raise ValueError("embedded null character")
    handle = windows.open_file(
        name,
        _ACCESS[flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR)],
        windows.FILE_SHARE_READ | windows.FILE_SHARE_WRITE | windows.FILE_SHARE_DELETE,
        None,
        _DISPOSITIONS[flags & (os.O_CREAT | os.O_TRUNC | os.O_EXCL)],
        windows.FILE_FLAG_OVERLAPPED
        | (
            windows.FILE_ATTRIBUTE_NORMAL
            if permissions & 0o200
            else windows.FILE_ATTRIBUTE_READONLY
        ),
        None,
    )
    if handle == windows.INVALID_HANDLE:
        code = windows.last_error()
        if code == windows.ERROR_ACCESS_DENIED and os.path.isdir(name):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        error = windows.error(code)
        error.filename = os.fspath(path)
        raise error
    try:
        number: int = windows.msvcrt.open_osfhandle(handle, _NUMBER_FLAGS)
    except OSError:
        windows.close_handle(handle)
        raise
    return number


_ACCESS: Final = {
    os.O_RDONLY: windows.GENERIC_READ,
    os.O_WRONLY: windows.GENERIC_WRITE,
    os.O_RDWR: windows.GENERIC_READ | windows.GENERIC_WRITE,
}
_DISPOSITIONS: Final = {
    0: windows.OPEN_EXISTING,
    os.O_CREAT: windows.OPEN_ALWAYS,
    os.O_CREAT | os.O_TRUNC: windows.CREATE_ALWAYS,
    os.O_CREAT | os.O_EXCL: windows.CREATE_NEW,
}
_NUMBER_FLAGS: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
