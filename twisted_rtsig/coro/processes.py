"""Child processes with streams, and how they end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from subprocess import PIPE
from types import TracebackType
from typing import Any, NoReturn

from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.children import GRACE, Child, check_grace
from twisted_rtsig.coro.commands import Argument, Command, StandardStream, Variables
from twisted_rtsig.coro.errors import StreamError
from twisted_rtsig.coro.operations import Operation, failed
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import scheduler_for

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2

# How much of the standard error is kept at most if it was not asked for; and half of
# it at least.
_MOST_ERRORS = 1 << 17


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

    def fileno(self) -> int:
        """The descriptor of the pipe that is read; -1 without one."""
        pipe = self._pipe(self._reads)
        number: int = -1 if pipe is None else pipe.fileno()
        return number

    def getPeer(self) -> str:
        return f"process {self._process.pid}"

    def getHost(self) -> str:
        return f"process {os.getpid()}"


class _WriteOnly(Stream):
    """The stream of a process whose standard output is no pipe."""

    __slots__ = ()

    def _read(self, *_: Any) -> Operation[bytes]:
        return failed(
            StreamError(
                f"the standard output of {self.peer} is no pipe: open_process with "
                "stdout=PIPE, the default, to read it"
            )
        )


class Process(Child):
    """
    A child process.  Made by :func:`open_process`.

    As an asynchronous context manager it closes the pipes and waits for the end of the
    process, as ``subprocess.Popen`` does: the standard input once everything is
    written, and the outputs at once, so that a process which writes more gets
    ``SIGPIPE``, and cannot hold up the block.  If the block, or that wait, ends by an
    exception, it stops the process: see :meth:`stop`.  What the process writes
    meanwhile is discarded.
    """

    def __init__(self, scheduler: Scheduler, signal_group: bool, grace: float) -> None:
        super().__init__(scheduler, signal_group)
        self._grace = grace
        self._stream: Stream | None = None
        self._error_stream: Stream | None = None
        self._errors_asked_for = False

    @property
    def stream(self) -> Stream:
        """
        Writes to its standard input, and reads from its standard output.

        :raises StreamError: if neither is a pipe.  If one is, the other direction
            raises it.
        """
        if self._stream is None:
            _no_pipe(self, "standard input and output", "stdin=PIPE or stdout=PIPE")
        return self._stream

    @property
    def errors(self) -> Stream:
        """
        Reads from its standard error.

        A process is never held up because this is not read: as long as it was not
        asked for, only the newest output is kept, 64 KiB at least.  From then on
        nothing is discarded, and a process that writes faster than this is read has to
        wait.

        :raises StreamError: if it is no pipe.
        """
        if self._error_stream is None:
            _no_pipe(self, "standard error", "stderr=PIPE")
        self._errors_asked_for = True
        return self._error_stream

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
                if self._stream is not None:
                    self._stream.write_eof()
                # Not by stream.close(), which would wait for a file that is being sent.
                for output in (_OUTPUT, _ERRORS):
                    self._transport.closeChildFD(output)
                await self.wait()
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                if self._status is None:
                    # If nothing can resume this any more, it cannot be waited for.
                    if isinstance(error, GeneratorExit):
                        self.kill()
                    else:
                        self._discard_output()
                        await self._end(self._grace)
            finally:
                for stream in self._streams():
                    stream.abort()

    def _streams(self) -> list[Stream]:
        both = (self._stream, self._error_stream)
        return [stream for stream in both if stream is not None]

    def _discard_output(self) -> None:
        """Keep a process that is to end from waiting until its output is read."""
        for stream in self._streams():
            stream._discard_input()

    def _feed_errors(self, data: bytes) -> None:
        errors = self._error_stream
        assert errors is not None
        if not self._errors_asked_for:
            # Stream.feed would stop reading at the limit.
            buffer = errors._buffer
            excess = buffer.size + len(data) - _MOST_ERRORS
            if excess > 0:
                buffer.take(max(excess, _MOST_ERRORS // 2))
        errors.feed(data)


def _no_pipe(process: Process, what: str, instead: str) -> NoReturn:
    raise StreamError(
        f"the {what} of process {process.pid} is no pipe: open_process with {instead}, "
        "the default, to use it"
    )


class _ChildProtocol(ProcessProtocol):
    def __init__(self, process: Process) -> None:
        self._process = process

    def connectionMade(self) -> None:
        process, transport = self._process, self.transport
        process._started(transport)
        pipes: Any = transport.pipes  # type: ignore[union-attr]
        if _INPUT in pipes or _OUTPUT in pipes:
            kind = Stream if _OUTPUT in pipes else _WriteOnly
            inputs = _Pipes(transport, _OUTPUT, _INPUT)
            process._stream = kind(inputs, process._scheduler)
            # All reads of one without are answered by its _read.
            process._stream._ended = _OUTPUT not in pipes
            if _INPUT in pipes:
                inputs.registerProducer(process._stream, True)
            else:
                process._stream._unwritable = StreamError(
                    f"the standard input of process {process.pid} is no pipe: "
                    "open_process with stdin=PIPE, the default, to write to it"
                )
        if _ERRORS in pipes:
            errors = _Pipes(transport, _ERRORS, None)
            process._error_stream = Stream(errors, process._scheduler)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD == _ERRORS:
            self._process._feed_errors(data)
        else:
            self._process.stream.feed(data)

    def childConnectionLost(self, childFD: int) -> None:
        process = self._process
        stream = process._error_stream if childFD == _ERRORS else process._stream
        assert stream is not None
        if childFD == _INPUT:
            stream.finish_output()
            stream.lose_output()
        else:
            stream.feed_eof()

    def processExited(self, reason: Failure) -> None:
        self._process._exited(reason)

    def processEnded(self, reason: Failure) -> None:
        closed = Failure(ConnectionDone())
        for stream in self._process._streams():
            stream.lose(closed)


def open_process(
    command: Sequence[Argument],
    *,
    stdin: StandardStream = PIPE,
    stdout: StandardStream = PIPE,
    stderr: StandardStream = PIPE,
    env: Variables | None = None,
    cwd: Argument | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
    process_group: int | None = None,
    signal_group: bool = False,
    user: str | int | None = None,
    group: str | int | None = None,
    umask: int = -1,
    grace: float = GRACE,
    reactor: Any | None = None,
) -> Process:
    """
    Start a child process, without a shell::

        async with open_process(["sort", "-n"]) as sort:
            await sort.stream.write(b"3\\n1\\n2\\n")
            await sort.stream.write_eof()
            lines = [line async for line in sort.stream.lines()]
            status = await sort.wait()

    The program is looked for as ``subprocess`` does on POSIX: in the ``PATH`` of
    ``env``; or from ``cwd`` on, if its name has a directory in it.

    The parameters are those of ``subprocess.Popen``, but for ``signal_group``,
    ``grace`` and ``reactor``.

    :param command: the program and its arguments.
    :param stdin: ``subprocess.PIPE``, ``DEVNULL``, a file or a descriptor; or None for
        the standard input of this process.
    :param stdout: as ``stdin``.
    :param stderr: as ``stdin``, or ``subprocess.STDOUT`` for what ``stdout`` is.
    :param env: its environment; by default that of this process.  (On Windows: what is
        added to that of this process.)
    :param cwd: its working directory; by default that of this process.
    :param pass_fds: further descriptors that it inherits, with the same numbers.
    :param start_new_session: start it in a session of its own.
    :param process_group: the process group that it joins, or 0 for a new one; by
        default that of this process.
    :param signal_group: send signals to all processes of its group, which is a new one.
    :param user: the user that it runs as: a name or a number.  Only root may use this.
        The supplementary groups are those of that user.
    :param group: the same for its group.
    :param umask: its umask; by default that of this process.
    :param grace: how many seconds it has to end after ``SIGTERM``, before ``SIGKILL``,
        if the block of ``async with`` ends by an exception.
    :param reactor: an ``IReactorProcess`` provider; by default that of the task.
    :raises FileNotFoundError: if there is no such program, or no such ``cwd``.
    :raises PermissionError: if the program may not be executed, or ``cwd`` not entered,
        or the user or group not changed.
    :raises NotADirectoryError: if ``cwd`` is no directory.
    :raises OSError: if a descriptor is not open.
    :raises ValueError: if the command is empty, an argument has a null byte in it, the
        time is negative, arguments contradict each other, or Windows does not have
        what they ask for.
    :raises NotImplementedError: if the reactor cannot do what they ask for.
    """
    check_grace(grace)
    what = Command(
        *(command, stdin, stdout, stderr, env, cwd, pass_fds),
        *(start_new_session, process_group, signal_group, user, group, umask),
    )
    scheduler = scheduler_for(reactor)
    process = Process(scheduler, signal_group, grace)
    what.start(scheduler.reactor, _ChildProtocol(process))
    return process
