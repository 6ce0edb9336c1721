"""
Writes the log of all workers to the log of the supervisor.

A worker writes whole lines to a pipe.  Only the supervisor writes to the log file of
``twistd``, so rotation and SIGUSR1 work as usual.  While a worker logs a lot, its pipe
is read only a few times a second, so that a line costs next to nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import (
    FileLogObserver,
    Logger,
    formatEventAsClassicLogText,
    globalLogPublisher,
)
from twisted.python.logfile import BaseLogFile
from zope.interface import implementer

# Seconds between two reads of a pipe, by whether its capacity is large.
_PAUSES: Final = {True: 0.1, False: 0.02}
_LARGE: Final = 512 * 1024

_READ: Final = 64 * 1024

# The most bytes of a line that are kept until the rest of it arrives.
_LINE: Final = 1024 * 1024

# The wanted capacity of a pipe in bytes, and the assumed one on systems without
# F_SETPIPE_SZ.
_CAPACITY: Final = 1024 * 1024
_SMALL_CAPACITY: Final = 16 * 1024


def make_pipe() -> tuple[int, int]:
    """Make a pipe with room for what a worker writes between two reads."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # Users other than root have limits (pipe(7)).
        with contextlib.suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _CAPACITY)
    return reading, writing


def text_output() -> Callable[[bytes], None] | None:
    """
    Return a function that writes text to the log of ``twistd``: a file or standard
    output.  None if it logs elsewhere (``--syslog``, ``--logger``).
    """
    for observer in globalLogPublisher._observers:
        if isinstance(observer, FileLogObserver):
            break
    else:
        return None
    file: Any = observer._outFile
    takes_bytes = bool(observer._encoding) or isinstance(file, BaseLogFile)
    encoding = getattr(file, "encoding", None) or "utf-8"

    def write(data: bytes) -> None:
        with contextlib.suppress(OSError):
            if takes_bytes:
                file.write(data)
            else:
                # The encoding of a terminal may lack some characters.
                text = data.decode("utf-8", "replace")
                file.write(text.encode(encoding, "backslashreplace").decode(encoding))
            file.flush()

    return write


@implementer(IReadDescriptor)
class LogPipe:
    """
    Reads the log of one worker.

    :param descriptor: the read end of the pipe, which this object owns.
    :param write: called with whole lines.
    """

    def __init__(
        self, reactor: Any, descriptor: int, write: Callable[[bytes], None]
    ) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._write = write
        self._rest = b""
        self._pause: Any = None
        self._finished = False
        self._ended = False
        self._capacity = _SMALL_CAPACITY
        if hasattr(fcntl, "F_GETPIPE_SZ"):
            self._capacity = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
        self._much = self._capacity // 2
        self._seconds = _PAUSES[self._capacity >= _LARGE]

    def start(self) -> None:
        """Start reading."""
        self._reactor.addReader(self)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def logPrefix(self) -> str:
        """Return the prefix of log entries."""
        return "workers"

    def doRead(self) -> None:
        """Read what has arrived, then poll the pipe as long as more arrives."""
        self._reactor.removeReader(self)
        self._look()

    def _look(self) -> None:
        count = total = self.read() or 0
        while count == _READ and total < self._much:
            count = self.read() or 0
            total += count
        if total >= self._much:
            self._pause = self._reactor.callLater(0, self._look)
        elif total:
            self._pause = self._reactor.callLater(self._seconds, self._look)
        elif not self._ended:
            self.start()
        elif self._finished:
            self.close()

    def read(self) -> int | None:
        """
        Read once.

        :return: how many bytes were read; 0 at the end, None if nothing has arrived.
        """
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return None
        if not data:
            self._ended = True
            return 0
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            self._write(self._rest + whole + newline)
            self._rest = rest
        elif len(self._rest) + len(rest) > _LINE:
            self._write(self._rest + rest + b"\n")
            self._rest = b""
        else:
            self._rest += rest
        return len(data)

    def connectionLost(self, reason: object) -> None:
        """Close the pipe, as the reactor disconnects everything."""
        self.close()

    def finish(self) -> None:
        """
        Read the rest, after the worker has ended.  If a child of the worker still has
        the pipe, go on reading until that child ends too.
        """
        self._finished = True
        # The pipe holds no more than this of the worker's own, even if the system does
        # not tell its capacity.  The child may write on without end.
        left = max(self._capacity, _READ)
        while self._descriptor >= 0 and left > 0:
            count = self.read()
            if count is None:
                break
            if count == 0:
                self.close()
            left -= count

    def close(self) -> None:
        """Close the pipe."""
        if self._descriptor < 0:
            return
        if self._pause is not None and self._pause.active():
            self._pause.cancel()
        self._reactor.removeReader(self)
        if self._rest:
            self._write(self._rest + b"\n")
        os.close(self._descriptor)
        self._descriptor = -1


def worker_observer(number: int) -> Any:
    """Return a log observer that writes lines with the worker's number to stdout."""
    mark = f" [worker {number}: "

    def emit(event: dict[str, Any]) -> None:
        text = formatEventAsClassicLogText(event)
        if text is not None:
            # A line is: the time, then the log system in brackets, then the text.
            data = text.replace(" [", mark, 1).encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(1, data) :]

    return emit


class LineLog:
    """Logs each line that a worker prints, if the log of ``twistd`` is not text."""

    _log = Logger()

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, data: bytes) -> None:
        """Log each line of ``data``."""
        for line in data.decode("utf-8", "replace").splitlines():
            self._log.info(
                "worker {number} has printed: {line}", number=self._number, line=line
            )


__all__ = ["LineLog", "LogPipe", "make_pipe", "text_output", "worker_observer"]
