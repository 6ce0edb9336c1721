"""
The control channel between the supervisor and a worker: a pair of UNIX sockets that
carries JSON objects, one per line, in both directions.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.logger import Logger
from zope.interface import implementer

_log = Logger()

Message = dict[str, Any]
"""A JSON object whose key ``"type"`` names the kind of message."""

_READ: Final = 64 * 1024

# The most bytes of one message, and of messages that the other end has not read yet.
# It is large because a worker may be asked to describe all its tasks.
LIMIT: Final = 16 * 1024 * 1024


@implementer(IReadWriteDescriptor)
class ControlChannel:
    """
    One end of a control channel.

    :param connection: the socket.  The channel owns it, and makes it non-blocking.
    :param received: called with each message.
    :param lost: called once when the other end has closed the connection or is gone,
        unless :meth:`close` was called before.
    :param rest: bytes that were read from the connection before.
    """

    def __init__(
        self,
        reactor: Any,
        connection: socket.socket,
        received: Callable[[Message], None],
        lost: Callable[[], None],
        rest: bytes = b"",
    ) -> None:
        connection.setblocking(False)
        self._reactor = reactor
        self._socket = connection
        self._received = received
        self._lost = lost
        self._input = bytearray(rest)
        self._output = bytearray()
        self.closed = False

    def start(self) -> None:
        """Start reading."""
        self._reactor.addReader(self)
        self._take_lines()

    def send(self, message: Message) -> bool:
        """
        Send a message.

        :return: False if the channel is closed, or if the other end does not read and
            too much is queued already.
        """
        data = json.dumps(message).encode() + b"\n"
        if self.closed or len(self._output) + len(data) > LIMIT:
            return False
        self._output += data
        self._flush()
        return not self.closed

    def close(self) -> None:
        """Close the channel.  No callback is called afterwards."""
        if not self.closed:
            self.closed = True
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._socket.close()

    def read_all(self) -> None:
        """Read all that has arrived: the last messages of a process that has ended."""
        while not self.closed and self._read():
            pass

    # IReadWriteDescriptor

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Return the prefix of log entries."""
        return "workers"

    def doRead(self) -> None:
        """Read once."""
        self._read()

    def doWrite(self) -> None:
        """Write queued messages."""
        self._flush()

    def connectionLost(self, reason: object) -> None:
        """Close the channel, as the reactor of this process disconnects everything."""
        self.close()

    def _read(self) -> bool:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
            return False
        self._input += data
        if b"\n" in data:
            self._take_lines()
        elif len(self._input) > LIMIT:
            _log.error(
                "A message on the control channel is too long: the channel is closed"
            )
            self._end()
        return not self.closed

    def _take_lines(self) -> None:
        *lines, rest = bytes(self._input).split(b"\n")
        self._input = bytearray(rest)
        for line in lines:
            if not self.closed:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if not isinstance(message, dict) or "type" not in message:
                raise ValueError("not an object with a type")
        except ValueError as error:
            _log.error(
                "The control channel received {line!r}, which is ignored: {error}",
                line=line[:200],
                error=error,
            )
            return
        try:
            self._received(message)
        except Exception:
            _log.failure("Cannot handle the message {received!r}", received=message)

    def _flush(self) -> None:
        try:
            while self._output:
                del self._output[: self._socket.send(self._output)]
        except BlockingIOError:
            self._reactor.addWriter(self)
            return
        except OSError:
            # The other end is gone.  Its last messages may still be unread, so that
            # only reading reports the end.
            self._output.clear()
        self._reactor.removeWriter(self)

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._lost()


__all__ = ["LIMIT", "ControlChannel", "Message"]
