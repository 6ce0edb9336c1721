"""The errors of blocking sockets."""

from __future__ import annotations

import io
import os

from twisted.internet.error import TimeoutError as ConnectTimeout


def unsupported(what: str) -> io.UnsupportedOperation:
    """The error of an operation that needs a socket of the operating system."""
    return io.UnsupportedOperation(what)


def os_error(number: int) -> OSError:
    """The error that the operating system raises with this number."""
    return OSError(number, os.strerror(number))


def as_os_error(error: Exception) -> OSError:
    """The error that a socket raises where Twisted has this one."""
    number = getattr(error, "osError", None)
    if isinstance(number, int):
        return os_error(number)
    if isinstance(error, ConnectTimeout):
        return TimeoutError("timed out")
    return OSError(str(error))
