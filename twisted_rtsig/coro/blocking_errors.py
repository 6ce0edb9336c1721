"""The errors of blocking sockets."""

from __future__ import annotations

import io
import os

from twisted.internet.error import TimeoutError as ConnectTimeout


def unsupported(what: str) -> io.UnsupportedOperation:
    """The error of what only a socket of the operating system can do."""
    return io.UnsupportedOperation(what)


def os_error(number: int) -> OSError:
    """As the operating system reports it."""
    return OSError(number, os.strerror(number))


def as_os_error(error: Exception) -> OSError:
    """An error of Twisted's, as a socket has it."""
    number = getattr(error, "osError", None)
    if isinstance(number, int):
        return os_error(number)
    if isinstance(error, ConnectTimeout):
        return TimeoutError("timed out")
    return OSError(str(error))
