"""Child processes: their streams, and how they end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from twisted.internet.error import ConnectionDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import scheduler_for

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2


class _Pipes:
    """A stream's transport: one pipe of a child to read, and one to write, or none."""

    def __init__(self, process: Any, reads: int, writes: int | None) -> None:
        self._process = process
        self._reads = reads
        self._writes = writes

    def _pipe(self, number: int | None) -> Any:
        return self._process.pipes.get(number)

    def write(self, data: bytes) -> None:
        if self._pipe(self._writes) is not None:
            self._process.writeToChild(self._writes, data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        pipe = self._pipe(self._writes)
        if pipe is not None:
            pipe.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        pipe = self._pipe(self._writes)
        if pipe is not None:
            pipe.unregisterProducer()

    def pauseProducing(self) -> None:
        pipe = self._pipe(self._reads)
        if pipe is not None:
            pipe.pauseProducing()

    def resumeProducing(self) -> None:
        pipe = self._pipe(self._reads)
        if pipe is not None:
            pipe.resumeProducing()

    def loseWriteConnection(self) -> None:
        if self._pipe(self._writes) is not None:
            self._process.closeChildFD(self._writes)

    def loseConnection(self) -> None:
        self.loseWriteConnection()
        self._process.closeChildFD(self._reads)

    def getPeer(self) -> str:
        return f"process {self._process.pid}"

    def getHost(self) -> str:
        return f"process {os.getpid()}"


class Process:
    """
    A child process.  Made by :func:`open_process`.

    As an asynchronous context manager it closes the standard input and waits for the
    end of the process; and kills it if the block, or that wait, ends by an exception.

    :ivar stream: writes to its standard input, and reads from its standard output.
    :ivar errors: reads from its standard error.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._status: int | None = None
        self._waiters: tuple[Operation[int], ...] = ()
        self._transport: Any = None
        self.stream: Stream
        self.errors: Stream

    @property
    def pid(self) -> int | None:
        """The number of the process; None once it has ended."""
        pid: int | None = self._transport.pid
        return pid

    def wait(self) -> Operation[int]:
        """
        The exit status, when it has exited: negative is the number of the signal
        that has ended it.  What it has written before may still be read.
        """
        if self._status is not None:
            finished: Finished[int] = Finished()
            finished.result = self._status
            return finished
        operation: Operation[int] = Operation()
        operation.owner = self
        self._waiters += (operation,)
        return operation

    def send_signal(self, signal: int | str) -> None:
        """
        :param signal: a number, or a name without C{SIG}: C{"TERM"}, C{"KILL"}.
        :raises ProcessLookupError: if the process has ended.
        """
        try:
            self._transport.signalProcess(signal)
        except ProcessExitedAlready:
            raise ProcessLookupError(
                f"signal {signal}: the process has ended already"
            ) from None

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.stream.write_eof()
                await self.wait()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if self._status is None:
                self.send_signal("KILL")
                # Unless nobody can resume this any more.
                if not isinstance(error, GeneratorExit):
                    await self.wait()
            self.stream.close()
            self.errors.close()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters = tuple(each for each in self._waiters if each is not operation)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self.pid}"

    def _exited(self, reason: Failure) -> None:
        why: Any = reason.value
        self._status = -why.signal if why.signal else why.exitCode
        waiters, self._waiters = self._waiters, ()
        for operation in waiters:
            # One that is resumed may cancel another.
            if not operation.called:
                operation.succeed(self._status)


class _ChildProtocol(ProcessProtocol):
    def __init__(self, process: Process) -> None:
        self._process = process

    def connectionMade(self) -> None:
        process, transport = self._process, self.transport
        process._transport = transport
        inputs = _Pipes(transport, _OUTPUT, _INPUT)
        process.stream = Stream(inputs, process._scheduler)
        inputs.registerProducer(process.stream, True)
        errors = _Pipes(transport, _ERRORS, None)
        process.errors = Stream(errors, process._scheduler)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._stream(childFD).feed(data)

    def childConnectionLost(self, childFD: int) -> None:
        stream = self._stream(childFD)
        if childFD == _INPUT:
            stream.finish_output()
            stream.lose_output()
        else:
            stream.feed_eof()

    def processExited(self, reason: Failure) -> None:
        self._process._exited(reason)

    def processEnded(self, reason: Failure) -> None:
        closed = Failure(ConnectionDone())
        self._process.stream.lose(closed)
        self._process.errors.lose(closed)

    def _stream(self, descriptor: int) -> Stream:
        process = self._process
        return process.errors if descriptor == _ERRORS else process.stream


def open_process(
    command: Sequence[str | bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    reactor: Any | None = None,
) -> Process:
    """
    Start a child process, without a shell::

        async with open_process(["sort", "-n"]) as sort:
            await sort.stream.write(b"3\\n1\\n2\\n")
            await sort.stream.write_eof()
            lines = [line async for line in sort.stream.lines()]
            status = await sort.wait()

    :param command: the program, searched in C{PATH}, and its arguments.
    :param env: its environment; by default that of this process.
    :param cwd: its working directory; by default that of this process.
    :param reactor: an ``IReactorProcess`` provider; by default that of the task.
    :raises FileNotFoundError: if there is no such program.
    """
    program = shutil.which(os.fsdecode(command[0]))
    if program is None:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such program in PATH", os.fsdecode(command[0])
        )
    scheduler = scheduler_for(reactor)
    process = Process(scheduler)
    scheduler.reactor.spawnProcess(
        _ChildProtocol(process), program, list(command), env=env, path=cwd
    )
    return process
