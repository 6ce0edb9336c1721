"""
Opening files: the calls that block, and the one that does not.

Linux opens a file without waiting for a disk if all of its path is cached:
openat2(2) with RESOLVE_CACHED.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import stat
import sys
from typing import Any

from twisted_rtsig.files.descriptors import Descriptor, SeekingDescriptor

# To open a FIFO would wait for its other side.
_NEVER_WAIT: int = getattr(os, "O_NONBLOCK", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)


class _How(ctypes.Structure):
    """``struct open_how`` of openat2(2)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_SYS_OPENAT2 = 437
_AT_FDCWD = -100
_RESOLVE_CACHED = 0x20


class _CachedOpener:
    """
    Opens files for reading whose paths are cached: openat2(2), from Linux 5.12 on.

    The call fails with EAGAIN if it would have to wait.  It always does with flags that
    may change something, such as to create or to truncate a file.
    """

    def __init__(self) -> None:
        self._works = sys.platform.startswith("linux")
        if self._works:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | _NEVER_WAIT
            self._how = _How(flags, 0, _RESOLVE_CACHED)
            self._syscall = ctypes.CDLL(None, use_errno=True).syscall
            self._syscall.restype = ctypes.c_long
            self._syscall.argtypes = (
                *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p),
                *(ctypes.c_void_p, ctypes.c_size_t),
            )

    def open(self, path: bytes) -> int:
        """A new descriptor; -1 if the call would wait, or after any error."""
        if not (self._works and hasattr(os, "RWF_NOWAIT")) or b"\0" in path:
            return -1
        how = self._how
        number: int = self._syscall(
            _SYS_OPENAT2, _AT_FDCWD, path, ctypes.byref(how), ctypes.sizeof(how)
        )
        if number < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
            # An older kernel.
            self._works = False
        return number


_open_cached = _CachedOpener().open


def open_cached(path: Any) -> Opened | None:
    """
    Open a file for reading, if that does not have to wait.

    :return: the descriptor, and the result of ``fstat``; None if it would wait, or
        cannot be opened.
    """
    number = _open_cached(os.fsencode(path))
    if number < 0:
        return None
    try:
        return _opened(number, path)
    except OSError:
        # The blocking call reports the error.
        return None


def open_descriptor(path: Any, flags: int, permissions: int) -> Opened:
    """
    Open a file, which blocks.

    :return: the descriptor, and the result of ``fstat``.
    :raises OSError: if the file cannot be opened, or is not a regular file.
    """
    if sys.platform == "win32" and sys.maxsize > 2**32:
        from twisted_rtsig.files.handles import open_handle

        number = open_handle(path, flags, permissions)
    else:
        number = os.open(path, flags | _NEVER_WAIT | _BINARY, permissions)
    return _opened(number, path)


Opened = tuple[Descriptor, os.stat_result]


def _opened(number: int, path: Any) -> Opened:
    try:
        found = _checked(number, path)
    except BaseException:
        os.close(number)
        raise
    return _descriptor(number, found.st_size), found


def _checked(number: int, path: Any) -> os.stat_result:
    """
    Check that a regular file was opened, and remove ``O_NONBLOCK``.

    :return: the result of ``fstat``.
    :raises OSError: if it is not a regular file.
    """
    found = os.fstat(number)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    if sys.platform != "win32":
        os.set_blocking(number, True)
    return found


def _descriptor(number: int, size: int) -> Descriptor:
    if sys.platform == "win32" and sys.maxsize > 2**32:
        from twisted_rtsig.files.handles import HandleDescriptor

        return HandleDescriptor(number, size)
    return Descriptor(number) if hasattr(os, "pread") else SeekingDescriptor(number)


def open_text(
    path: Any,
    mode: str,
    permissions: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> io.TextIOWrapper:
    """
    Open a text file, which blocks.

    :raises OSError: if the file cannot be opened, or is not a regular file.
    """

    def opener(path: Any, flags: int) -> int:
        return os.open(path, flags | _NEVER_WAIT, permissions)

    file = open(  # noqa: SIM115
        path, mode, encoding=encoding, errors=errors, newline=newline, opener=opener
    )
    assert isinstance(file, io.TextIOWrapper)
    try:
        _checked(file.fileno(), path)
    except BaseException:
        file.close()
        raise
    return file
