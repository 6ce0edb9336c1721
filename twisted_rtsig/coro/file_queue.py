"""What a stream sends one after the other: files, and what was written after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted_rtsig.coro.errors import StreamError
from twisted_rtsig.coro.operations import Done, Operation, failed
from twisted_rtsig.coro.pending import Operations, again, fail, succeed
from twisted_rtsig.coro.sending import Sending

if TYPE_CHECKING:
    from twisted_rtsig.coro.streams import Stream

# What follows a file: data and the operation of its write, another file, or the end of
# the output.
_Held = tuple[bytes, Operation[None]] | Sending | Callable[[], object]


class FileQueue:
    """
    The file that a stream sends, and what follows it in turn.

    A stream has a queue from ``send_file`` on, until nothing is left in it.
    """

    __slots__ = ("_held", "_sending", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        # The file that is being sent, and what follows it.
        self._sending: Sending | None = None
        self._held: deque[_Held] = deque()

    # What follows

    def add_file(self, sending: Sending) -> None:
        """Send a file when it is its turn."""
        if self._sending is None and not self._held:
            self._sending = sending
            sending.begin()
        else:
            self._held.append(sending)

    def add_data(self, data: bytes) -> Operation[None]:
        """Write ``data`` after the files."""
        operation = self._stream._operation()
        self._held.append((data, operation))
        return operation

    def add_end(self, function: Callable[[], object]) -> None:
        """Call a function, which ends the output, after the files."""
        self._held.append(function)

    # From the file that is sent

    def file_has_ended(self, whole: bool) -> None:
        """
        No more of a file comes: go on with what follows it.

        :param whole: all of it was sent, or none.
        """
        stream = self._stream
        if stream._output_lost is not None:
            self.fail_held(stream._output_lost)
        elif not whole:
            stream._unwritable = StreamError(
                "nothing can be written after a part of a file: close the connection"
            )
            self.fail_held(stream._unwritable)
        written: Operations = {}
        following_file: Sending | None = None
        self._sending = None
        while self._held:
            following = self._held.popleft()
            if isinstance(following, tuple):
                data, operation = following
                stream.written += len(data)
                stream.transport.write(data)
                # Unless it was cancelled.
                if not operation.called:
                    written[operation] = None
            elif isinstance(following, Sending):
                if not following.operation.called:
                    following_file = following
                    break
            else:
                following()
        if following_file is not None:
            self._sending = following_file
            following_file.begin()
        elif self._sending is None:
            stream._files = None
        if stream._output_lost is not None:
            # By what was just written.
            fail(written, stream._output_lost)
        elif stream.full:
            stream._drained = stream._drained or {}
            stream._drained.update(written)
        else:
            succeed(written)

    def file_was_closed(self, operation: Operation[int]) -> None:
        """
        A file was closed before all of it was sent, and its operation has failed.

        A handler that is cancelled, or raises, closes its files first and then aborts
        the connection.  So whether this error has to be logged, if it is never asked
        for, is known when the connection ends.  Until then the operation is kept.
        """
        if not self._stream.lost:
            self._stream._cut_short = operation

    def tell_when_sent(self, each_time: bool) -> None:
        """
        Let the transport tell whenever it has sent everything, as a pull producer is
        told; or else when there is room again after there was none, as a push producer
        is told.
        """
        stream = self._stream
        if not stream.lost:
            stream.transport.unregisterProducer()
            stream.transport.registerProducer(stream, not each_time)

    def all_sent(self, first: bool) -> Operation[None]:
        """
        Wait until the transport has sent everything, and its socket takes more.

        :param first: nothing has shown yet that the socket is full.
        """
        stream = self._stream
        if stream._output_lost is not None:
            return failed(again(stream._output_lost), quietly=True)
        if not stream._aborted:
            transport: Any = stream.transport
            if first:
                transport.startWriting()
            else:
                stream._scheduler.reactor.addWriter(transport)
        return stream._until_resumed()

    def write(self, data: bytes) -> Operation[None]:
        """Write a part of the file."""
        stream = self._stream
        if stream._output_lost is not None:
            return failed(again(stream._output_lost), quietly=True)
        stream.written += len(data)
        stream.transport.write(data)
        if stream.full or stream._aborted:
            return stream._until_resumed()
        done: Operation[None] = Done()
        return done

    # The output is lost

    def lose_file(self, error: Exception) -> None:
        """The rest of the file that is being sent cannot be sent any more."""
        if self._sending is not None:
            self._sending.lose(again(error))

    def fail_held(self, error: Exception) -> None:
        """
        What was to follow a file fails.  The end of the output remains, unless the
        output is lost.
        """
        held, self._held = self._held, deque()
        for following in held:
            if isinstance(following, tuple):
                fail([following[1]], error)
            elif isinstance(following, Sending):
                following.fail(again(error))
            elif self._stream._output_lost is None:
                self._held.append(following)
