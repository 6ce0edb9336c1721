"""
Sending a file over a stream, without blocking.

On a plain socket sendfile(2) sends the file, whose data never enters this process.  But
sendfile waits for the disk if the file is not cached.  So a thread calls it, with a
duplicate of the socket's descriptor, which stays valid when the connection is lost.
The thread never waits for the peer: the socket does not block, and when it takes no
more, the transport tells when there is room again.

On any other transport, and if sendfile refuses the file, the file is read and written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet import tcp
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IReactorFDSet, ISSLTransport

from twisted_rtsig.coro.errors import FileEnded
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.scopes import shield
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import Task

if TYPE_CHECKING:
    from twisted_rtsig.coro.file_queue import FileQueue
    from twisted_rtsig.coro.streams import Stream
    from twisted_rtsig.files.asyncfile import AsyncFile

# A file of up to so many bytes is read and written, which takes less time than to hand
# it to a thread.
_LITTLE = 1 << 16

# How many bytes are read and written at a time; and how many a thread sends before it
# reports.
_CHUNK = 1 << 17
_CHUNK_OF_A_THREAD = 1 << 22


class Sending:
    """
    A file, or a part of it, that is to be sent.

    :ivar operation: its result is the number of bytes that were sent.
    """

    def __init__(
        self,
        stream: Stream,
        queue: FileQueue,
        file: AsyncFile,
        offset: int,
        count: int | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.operation: Operation[int] = Operation()
        self.operation.owner = self
        self._stream = stream
        self._queue = queue
        self._file = file
        self._offset = offset
        self._count = count
        self._progress = progress
        self._sent = 0
        self._task: Task[int] | None = None

    def begin(self) -> None:
        """Begin to send: it is the turn of this file."""
        reactor = self._stream._scheduler.reactor
        self._task = spawn(self._send(reactor), name="send_file", reactor=reactor)
        self._task._when_done(self._ended)

    def _ended(self, task: Task[int]) -> None:
        # What follows the file is sent before the task that waits for the file is
        # resumed.
        succeeded = not (task.failed or task.cancelled)
        self._queue.file_has_ended(succeeded or not self._sent)
        operation = self.operation
        # Break the reference cycle.
        self._task = operation.owner = None
        error = task._see_error() if task.failed else CancelledError()
        if operation.called:
            return
        if succeeded:
            operation.succeed(self._sent)
            return
        self.fail(error)
        if self._file.closed:
            self._queue.file_was_closed(operation)

    def fail(self, error: BaseException | None) -> None:
        """The file was not sent, or not all of it."""
        if not self.operation.called:
            assert error is not None
            # The traceback would keep the frame of a method, and so the operation.
            error = error.with_traceback(None)
            self.operation.owner = None
            self.operation.fail(error, quietly=isinstance(error, ConnectionClosed))

    def lose(self, error: Exception) -> None:
        """
        The connection is lost, with this error.

        The operation fails at once, and not when the task next uses the socket or the
        file: both may be closed by then, and the error would be about that.
        """
        if not self.operation.called:
            self.operation.fail(error, quietly=True)
        self._stop()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"{self._file!r} to be sent to {self._stream!r}, {self._sent} bytes yet"

    async def _send(self, reactor: Any) -> int:
        stream, file = self._stream, self._file
        if self._count is None:
            self._count = max(0, await file.size() - self._offset)
        if self._count > _LITTLE and _takes_sendfile(stream.transport, reactor):
            await self._send_by_threads(self._count)
        while (rest := self._count - self._sent) > 0:
            data = await file.read_at(self._offset + self._sent, min(rest, _CHUNK))
            if not data:
                raise FileEnded(self._sent, self._count)
            written = self._queue.write(data)
            self._count_sent(len(data))
            await written
        return self._sent

    async def _send_by_threads(self, count: int) -> None:
        stream = self._stream
        transport: Any = stream.transport
        socket = os.dup(transport.fileno())
        self._queue.tell_when_sent(True)
        try:
            first = True
            while (rest := count - self._sent) > 0:
                # Also what was written before the file.
                await self._queue.all_sent(first)
                first = False
                # A cancellation waits for the thread, which waits at most for the
                # disk: the number of bytes that it has sent must be known.
                with shield():
                    sent, refused = await self._file._send_to(
                        socket,
                        self._offset + self._sent,
                        min(rest, _CHUNK_OF_A_THREAD),
                    )
                stream.written += sent
                self._count_sent(sent)
                if refused:
                    # Reading and writing the file raises the reason.
                    break
        finally:
            os.close(socket)
            self._queue.tell_when_sent(False)

    def _count_sent(self, size: int) -> None:
        self._sent += size
        if size and self._progress is not None:
            self._progress(self._sent)


def _takes_sendfile(transport: Any, reactor: Any) -> bool:
    """Whether a transport writes to a socket, with nothing such as TLS in between."""
    return (
        hasattr(os, "sendfile")
        and isinstance(transport, tcp.Connection)
        and not ISSLTransport.providedBy(transport)
        and IReactorFDSet.providedBy(reactor)
    )
