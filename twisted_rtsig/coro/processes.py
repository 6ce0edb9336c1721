"""Child processes with streams, and how they end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from subprocess import PIPE
from typing import Any, NoReturn

from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.children import GRACE, Child, check_grace
from twisted_rtsig.coro.closing import AsyncBlock
from twisted_rtsig.coro.commands import Argument, Command, StandardStream, Variables
from twisted_rtsig.coro.errors import StreamError
from twisted_rtsig.coro.operations import Operation, failed
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for
from twisted_rtsig.coro.streams import Stream

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2

# The most that is kept of the standard error before it is asked for.  When that is
# exceeded, the oldest half or more is dropped, and the newest half or more is kept.
_MOST_ERRORS = 1 << 17


class _Pipes:
    """The transport of a stream: a pipe of a child to read, and maybe one to write."""

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
        """The descriptor of the pipe to read; -1 without one."""
        pipe = self._pipe(self._reads)
        number: int = -1 if pipe is None else pipe.fileno()
        return number

    def getPeer(self) -> str:
        return f"process {self._process.pid}"

    def getHost(self) -> str:
        return f"process {os.getpid()}"


class _WriteOnly(Stream):
    """The stream of a process whose standard output is not a pipe."""

    __slots__ = ()

    def _read(self, *_: Any) -> Operation[bytes]:
        return failed(
            StreamError(
                f"the standard output of {self.peer} is not a pipe: call open_process "
                "with stdout=PIPE, the default, to read it"
            )
        )


class Process(Child, AsyncBlock):
    """
    A child process.  Made by :func:`open_process`.

    At the end of its ``async with`` block it closes the pipes and waits for the end of
    the process, as ``subprocess.Popen`` does.  It closes the standard input once
    everything is written, and the outputs at once: a process that writes more gets
    ``SIGPIPE``, and cannot hold up the block.  If the block or that wait raises an
    exception, it stops the process (see :meth:`stop`), and discards the output until
    then.
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
        The stream that writes to the standard input and reads from the standard output.

        :raises StreamError: if neither is a pipe.  If only one is a pipe, the methods
            for the other direction raise it.
        """
        if self._stream is None:
            _no_pipe(self, "standard input and output", "stdin=PIPE or stdout=PIPE")
        return self._stream

    @property
    def errors(self) -> Stream:
        """
        The stream that reads from the standard error.

        Until this property is used for the first time, only the newest output is kept,
        64 KiB at least, so that the process never has to wait.  From then on nothing is
        discarded, and the process waits if it writes faster than the stream is read.

        :raises StreamError: if the standard error is not a pipe.
        """
        if self._error_stream is None:
            _no_pipe(self, "standard error", "stderr=PIPE")
        self._errors_asked_for = True
        return self._error_stream

    async def __aenter__(self) -> Process:
        return self

    async def _end_block(self, error: BaseException | None) -> None:
        try:
            if error is None:
                if self._stream is not None:
                    self._stream.write_eof()
                # stream.close() would wait for a file that is being sent.
                for output in (_OUTPUT, _ERRORS):
                    self._transport.closeChildFD(output)
                await self.wait()
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                if self._status is None:
                    # A coroutine that is being closed cannot wait.
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
        """Discard the output, so that the process does not wait for it to be read."""
        for stream in self._streams():
            stream._discard_input()

    def _feed_errors(self, data: bytes) -> None:
        errors = self._error_stream
        assert errors is not None
        if not self._errors_asked_for:
            # At its limit Stream.feed() would stop reading, so make room before.
            buffer = errors._buffer
            excess = buffer.size + len(data) - _MOST_ERRORS
            if excess > 0:
                buffer.take(max(excess, _MOST_ERRORS // 2))
        errors.feed(data)


def _no_pipe(process: Process, what: str, instead: str) -> NoReturn:
    raise StreamError(
        f"the {what} of process {process.pid} is not a pipe: call open_process with "
        f"{instead}, the default, to use it"
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
            # Without a pipe _WriteOnly._read() fails every read.
            process._stream._ended = _OUTPUT not in pipes
            if _INPUT in pipes:
                inputs.registerProducer(process._stream, True)
            else:
                process._stream._unwritable = StreamError(
                    f"the standard input of process {process.pid} is not a pipe: "
                    "call open_process with stdin=PIPE, the default, to write to it"
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

    The program is searched for as ``subprocess`` does on POSIX: in the ``PATH`` of
    ``env``; or, if its name contains a directory, relative to ``cwd``.

    The parameters are those of ``subprocess.Popen``, except for ``signal_group``,
    ``grace`` and ``reactor``.

    :param command: the program and its arguments.
    :param stdin: ``subprocess.PIPE``, ``DEVNULL``, a file or a descriptor; or None for
        the standard input of this process.
    :param stdout: as ``stdin``.
    :param stderr: as ``stdin``; or ``subprocess.STDOUT`` for the same as ``stdout``.
    :param env: the environment; by default that of this process.  On Windows these
        variables are added to the environment of this process.
    :param cwd: the working directory; by default that of this process.
    :param pass_fds: further descriptors to inherit, with the same numbers.
    :param start_new_session: whether to start the process in a new session.
    :param process_group: the process group to join, or 0 for a new one; by default
        that of this process.
    :param signal_group: whether to make a new process group, and to send signals to
        all its processes.
    :param user: the user to run as: a name or a number.  Only root may use this.  The
        supplementary groups are those of that user.
    :param group: the group to run as: a name or a number.  Only root may use this.
    :param umask: the umask; by default that of this process.
    :param grace: the seconds between ``SIGTERM`` and ``SIGKILL``, if the block of
        ``async with`` raises an exception.
    :param reactor: an ``IReactorProcess`` provider; by default that of the task.
    :raises FileNotFoundError: if the program or ``cwd`` does not exist.
    :raises PermissionError: if there is no permission to execute the program, to enter
        ``cwd``, or to change the user or the group.
    :raises NotADirectoryError: if ``cwd`` is not a directory.
    :raises OSError: if a descriptor is not open.
    :raises ValueError: if the command is empty, an argument contains a null byte, the
        time is negative, arguments contradict each other, or Windows does not support
        an option.
    :raises NotImplementedError: if the reactor does not support an option.
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
