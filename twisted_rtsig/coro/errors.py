"""The exceptions of conversations and of tasks."""

from __future__ import annotations

import sys
from asyncio import CancelledError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from twisted.internet.error import ConnectError, ConnectionLost

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


if TYPE_CHECKING:
    from twisted_rtsig.coro.scopes import Scope


class Cancelled(CancelledError):
    """
    Raised where a task waits when the task is cancelled, or a :class:`timeout` or
    :class:`TaskGroup` around the wait.

    Not an ``Exception``, so that ``except Exception`` does not swallow it.  Clean
    up in ``finally``, or raise it again.  It never leaves its task: outside of it,
    a cancelled task is Twisted's ``CancelledError``.

    For code for asyncio that runs in the task, it is asyncio's ``CancelledError``.

    :ivar reason: the reason that was passed to ``cancel``, by user code or by this
        package; None without a reason.
    """

    # Whether the operation that the task waits for was cancelled for this cancellation:
    # see tasks.py.
    _requested = 0

    def __init__(self, reason: str | None = None, scope: Scope | None = None) -> None:
        super().__init__(*() if reason is None else (reason,))
        self.reason = reason
        # The timeout or group that has cancelled; None for Task.cancel.
        self._scope = scope

    def _raised(self) -> CancelledError:
        """The error that is raised in the task."""
        return self


def cancellation_in(error: BaseException | None) -> CancelledError | None:
    """
    ``error`` if it is a cancellation, of this package or of asyncio; the first one in
    it if it is a group of cancellations.

    asyncio's TaskGroup of Python 3.11 and 3.12 takes ``Cancelled`` for an error.
    """
    while isinstance(error, BaseExceptionGroup):
        if not all(cancellation_in(each) for each in error.exceptions):
            return None
        error = error.exceptions[0]
    return error if isinstance(error, CancelledError) else None


def reason_of(cancelled: CancelledError) -> str | None:
    """Why a task was cancelled: by this package, or by asyncio."""
    if isinstance(cancelled, Cancelled):
        return cancelled.reason
    return str(cancelled.args[0]) if cancelled.args else None


class BusyResourceError(RuntimeError):
    """Two tasks read from one stream at the same time."""


class StreamError(Exception):
    """A stream cannot do what was asked for."""


class IncompleteRead(StreamError):
    """
    The stream has ended before it had all the bytes that were asked for.

    :ivar partial: the bytes that had arrived; they are not in the stream any more.
    """

    def __init__(self, partial: bytes, wanted: str) -> None:
        super().__init__(
            f"the stream ended after {len(partial)} bytes, in the middle of {wanted}"
            if partial
            else f"the stream ended where {wanted} should begin"
        )
        self.partial = partial


class IncompleteText(IncompleteRead):
    """
    A stream of text has ended in the middle of a line.

    :ivar text: the part of the line that had arrived; ``partial`` has it in bytes.
    """

    def __init__(self, text: str, encoding: str) -> None:
        super().__init__(text.encode(encoding, "replace"), "a line")
        self.text = text


class DelimiterNotFound(StreamError):
    """
    The line or other item does not end within the limit.  Its bytes are still in the
    stream.

    :ivar max_bytes: the limit in bytes; of a :class:`TextStream` in characters.
    """

    def __init__(self, wanted: str, max_bytes: int, unit: str = "bytes") -> None:
        super().__init__(
            f"{wanted} does not end within {max_bytes} {unit}: refuse the peer, or "
            f"pass a larger {'max_bytes' if unit == 'bytes' else 'max_chars'}"
        )
        self.max_bytes = max_bytes


class UnreadPlaintext(StreamError):
    """
    ``start_tls`` was called while there were unread bytes in the stream.

    These bytes were not encrypted, so that an attacker on the network may have put them
    there: they must not be taken for a part of the encrypted conversation.  This is the
    STARTTLS injection of CVE-2011-0411.
    """

    def __init__(self, size: int) -> None:
        super().__init__(
            f"{size} bytes came before TLS was started and were not read: an attacker "
            "may have injected them, so close the connection"
        )


class TLSError(ConnectionLost):
    """
    The connection was lost because TLS has failed: the peer does not speak TLS, one
    side rejects the certificate of the other, there was no handshake in time, or what
    arrived was damaged.

    ``__cause__`` is the error of OpenSSL or of ``service_identity``, if there is one.
    """

    MESSAGE = "TLS has failed"


class ConnectFailed(ConnectError, OSError):
    """
    No connection could be made.

    ``__cause__`` is the error of the attempt; after several attempts, an
    ``ExceptionGroup`` of their errors.

    :ivar host: the name or address of the host; for a UNIX socket, its path.
    :ivar port: the port; None for a UNIX socket.
    :ivar errors: the error of each attempt; empty if there was no attempt.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        reasons: Sequence[str],
        errors: Sequence[Exception] = (),
    ) -> None:
        where = repr(host) if port is None else f"{host!r}, port {port}"
        # Not super().__init__(): ConnectError.__init__ has no annotations.
        OSError.__init__(self, f"cannot connect to {where}: {'; '.join(reasons)}")
        self.osError: int | None = None
        self.host = host
        self.port = port
        self.errors: list[Exception] = list(errors)
        if len(self.errors) == 1:
            self.__cause__: BaseException | None = self.errors[0]
        elif self.errors:
            self.__cause__ = ExceptionGroup("all attempts have failed", self.errors)

    def __str__(self) -> str:
        return str(self.args[0])


class FileEnded(EOFError):
    """
    A file has ended before as many bytes were sent as were asked for.

    :ivar sent: the number of bytes that were sent.
    """

    def __init__(self, sent: int, count: int) -> None:
        super().__init__(
            f"the file has ended after {sent} of the {count} bytes to be sent: it was "
            "truncated, or count is too large"
        )
        self.sent = sent


class WouldBlock(Exception):
    """An operation that must not wait cannot be done at once."""


class ChannelClosed(Exception):
    """
    A value was sent to a closed channel, where nothing can receive it.  Or a closed
    :class:`ChannelSender` or :class:`ChannelReceiver` was used.
    """


class EndOfChannel(Exception):
    """
    A channel is closed, and everything that was sent has been received.

    :ivar channel: the channel.
    """

    def __init__(self, channel: object) -> None:
        super().__init__(f"{channel!r} has ended: no more values come")
        self.channel = channel


class TransferError(RuntimeError):
    """The target of a ``transfer`` cannot take over."""


class NoTaskError(RuntimeError):
    """A function that works only in a task was called outside of a task."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} works only in a task: start the coroutine with spawn(), or "
            "decorate the generator function with @coroutine in place of "
            "@inlineCallbacks"
        )


class UnawaitedWarning(RuntimeWarning):
    """Nothing has waited for an operation: see :func:`set_debug`."""
