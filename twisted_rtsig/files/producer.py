"""A producer that writes a file to Twisted's consumers: requests and transports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from zope.interface import implementer

from twisted_rtsig.coro.errors import FileEnded, StreamError
from twisted_rtsig.coro.operations import Operation, Wait
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.files.asyncfile import AsyncFile

# Twice as much takes longer: memory of that size comes from the system each time.
_CHUNK = 1 << 16

Part = tuple[bytes, int, int]
"""Data to write before a part of a file, and the offset and the size of the part."""


@implementer(IPushProducer)
class FileProducer:
    """
    Writes a part of a file to a consumer, as fast as the consumer takes it::

        FileProducer(file).start(transport).addCallback(lambda size: ...)

    :param offset: where the part begins.
    :param count: the size of the part; by default up to the end of the file.
    :ivar produced: the number of bytes that were written so far.
    """

    def __init__(
        self, file: AsyncFile, offset: int = 0, count: int | None = None
    ) -> None:
        for name, value in (("offset", offset), ("count", count or 0)):
            if value < 0:
                raise ValueError(f"{name}={value}: 0 is the least")
        self._file = file
        self._offset = offset
        self._count = count
        self._parts: Sequence[Part] | None = None
        self.produced: int = 0
        self._consumer: IConsumer | None = None
        self._task: Task[int] | None = None
        self._paused = False
        self._stopped = False
        self._resumed: Operation[None] | None = None

    @classmethod
    def of_parts(cls, file: AsyncFile, parts: Sequence[Part]) -> FileProducer:
        """A producer of several parts of a file, with other data before each."""
        producer = cls(file)
        producer._parts = parts
        return producer

    def start(self, consumer: IConsumer, reactor: Any | None = None) -> Deferred[int]:
        """
        Register with a consumer, write all of the part, and unregister.

        :param reactor: the reactor; by default that of the task, or the installed one.
        :return: fires with ``produced`` when that is done.  Cancelling it stops the
            producer.
        :raises FileEnded: (of the Deferred) if the file is shorter.
        :raises OSError: (of the Deferred) if the file cannot be read.
        :raises StreamError: (of the Deferred) if the consumer stops the producer.  This
            error is not logged if it stays unhandled, since a client that leaves early
            is not a fault of the program.
        """
        operation: Operation[int] = Operation()
        operation.owner = self
        self._task = spawn(
            self._produce(consumer), name="FileProducer", reactor=reactor
        )
        self._task._when_done(partial(self._ended, operation))
        return operation

    def _ended(self, operation: Operation[int], task: Task[int]) -> None:
        self._unregister()
        error = task._see_failure().value if task.failed else CancelledError()
        if operation.called:
            return
        if not (task.failed or task.cancelled):
            operation.succeed(self.produced)
        elif self._stopped:
            # Report the stop, even if the task has failed for another reason: the file
            # was closed, for example.
            operation.fail(self._was_stopped(), quietly=True)
        else:
            assert error is not None
            operation.fail(error)

    def _unregister(self) -> None:
        consumer, self._consumer = self._consumer, None
        # A consumer that has stopped its producer has unregistered it already.
        if consumer is not None and not self._stopped:
            consumer.unregisterProducer()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._unregister()
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"{self._file!r} to be produced, {self.produced} bytes yet"

    async def _produce(self, consumer: IConsumer) -> int:
        consumer.registerProducer(self, True)
        self._consumer = consumer
        if self._parts is None:
            count = self._count
            if count is None:
                count = await self._file.size() - self._offset
            self._parts = [(b"", self._offset, count)]
        for before, offset, count in self._parts:
            if before:
                await self._write(before)
            end = offset + count
            while offset < end:
                data = await self._file.read_at(offset, min(end - offset, _CHUNK))
                if not data:
                    raise FileEnded(self.produced, self.produced + end - offset)
                offset += len(data)
                await self._write(data)
        return self.produced

    async def _write(self, data: bytes) -> None:
        if self._paused:
            self._resumed = Wait()
            await self._resumed
        if self._stopped or self._consumer is None:
            raise self._was_stopped()
        self.produced += len(data)
        self._consumer.write(data)

    def _was_stopped(self) -> StreamError:
        return StreamError(
            f"the consumer has stopped after {self.produced} bytes of the file"
        )

    # IPushProducer

    def pauseProducing(self) -> None:
        """See ``IPushProducer.pauseProducing``."""
        self._paused = True

    def resumeProducing(self) -> None:
        """See ``IPushProducer.resumeProducing``."""
        self._paused = False
        resumed, self._resumed = self._resumed, None
        if resumed is not None and not resumed.called:
            resumed.succeed(None)

    def stopProducing(self) -> None:
        """See ``IProducer.stopProducing``."""
        self._stopped = True
        self.resumeProducing()
