"""Child processes: their streams, and how they end."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from twisted.internet.error import ConnectionDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import scheduler_for

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Variables = Mapping[str, Argument] | Mapping[bytes, Argument]

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

    def getPeer(self) -> str:
        return f"process {self._process.pid}"

    def getHost(self) -> str:
        return f"process {os.getpid()}"


class Process:
    """
    A child process.  Made by :func:`open_process`.

    As an asynchronous context manager it closes the pipes and waits for the end of the
    process, as C{subprocess.Popen} does: the standard input once everything is
    written, and the outputs at once, so that a process which writes more gets
    C{SIGPIPE}, and cannot hold up the block.  It kills the process if the block, or
    that wait, ends by an exception.

    :ivar stream: writes to its standard input, and reads from its standard output.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._status: int | None = None
        self._waiters: dict[Operation[int], None] = {}
        self._transport: Any = None
        self.stream: Stream
        self._errors: Stream
        self._errors_asked_for = False
        processes.add(self)

    @property
    def errors(self) -> Stream:
        """
        Reads from its standard error.

        A process is never held up because this is not read: as long as it was not
        asked for, only the newest output is kept, 64 KiB at least.  From then on
        nothing is discarded, and a process that writes faster than this is read has to
        wait.
        """
        self._errors_asked_for = True
        return self._errors

    @property
    def pid(self) -> int | None:
        """The number of the process; None once it has ended."""
        pid: int | None = self._transport.pid
        return pid

    @must_be_awaited
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
        self._waiters[operation] = None
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
                # Not by stream.close(), which would wait for a file that is being sent.
                for output in (_OUTPUT, _ERRORS):
                    self._transport.closeChildFD(output)
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
            self._errors.close()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self.pid}"

    def _feed_errors(self, data: bytes) -> None:
        if not self._errors_asked_for:
            # Stream.feed would stop reading at the limit.
            buffer = self._errors._buffer
            excess = buffer.size + len(data) - _MOST_ERRORS
            if excess > 0:
                buffer.take(max(excess, _MOST_ERRORS // 2))
        self._errors.feed(data)

    def _exited(self, reason: Failure) -> None:
        why: Any = reason.value
        self._status = -why.signal if why.signal else why.exitCode
        waiters, self._waiters = self._waiters, {}
        for operation in waiters:
            # One that is resumed may cancel another.
            if not operation.called:
                operation.succeed(self._status)


processes: Final[Registry[Process]] = Registry()
"""All that any code still refers to."""


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
        process._errors = Stream(errors, process._scheduler)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD == _ERRORS:
            self._process._feed_errors(data)
        else:
            self._process.stream.feed(data)

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
        self._process._errors.lose(closed)

    def _stream(self, descriptor: int) -> Stream:
        process = self._process
        return process._errors if descriptor == _ERRORS else process.stream


def open_process(
    command: Sequence[Argument],
    *,
    env: Variables | None = None,
    cwd: Argument | None = None,
    reactor: Any | None = None,
) -> Process:
    """
    Start a child process, without a shell::

        async with open_process(["sort", "-n"]) as sort:
            await sort.stream.write(b"3\\n1\\n2\\n")
            await sort.stream.write_eof()
            lines = [line async for line in sort.stream.lines()]
            status = await sort.wait()

    The program is looked for as ``subprocess`` does on POSIX: in the C{PATH} of C{env};
    or from C{cwd} on, if its name has a directory in it.

    :param command: the program and its arguments.
    :param env: its environment; by default that of this process.  (On Windows: what is
        added to that of this process.)
    :param cwd: its working directory; by default that of this process.
    :param reactor: an ``IReactorProcess`` provider; by default that of the task.
    :raises FileNotFoundError: if there is no such program, or no such C{cwd}.
    :raises PermissionError: if the program may not be executed, or C{cwd} not entered.
    :raises NotADirectoryError: if C{cwd} is no directory.
    :raises ValueError: if the command is empty, or an argument has a null byte in it.
    """
    if isinstance(command, str | bytes | os.PathLike):
        raise TypeError(
            f"command={command!r}: give the program and its arguments as a list"
        )
    if not command:
        raise ValueError("the command is empty: give the program and its arguments")
    arguments = [_native(each) for each in command]
    variables = None
    if env is not None:
        variables = {_native(name): _native(value) for name, value in env.items()}
    folder = None if cwd is None else _native(cwd)
    if folder is not None:
        _check(folder, os.fsdecode(folder), stat.S_ISDIR, errno.ENOTDIR)
    program = _find_program(os.fsdecode(arguments[0]), variables, folder)
    scheduler = scheduler_for(reactor)
    process = Process(scheduler)
    scheduler.reactor.spawnProcess(
        _ChildProtocol(process), program, arguments, env=variables, path=folder
    )
    return process


def _native(argument: Argument) -> Any:
    """An argument as the system takes it: bytes, or text on Windows."""
    text = os.fsdecode(argument)
    if "\0" in text:
        raise ValueError(f"{argument!r} has a null byte in it")
    return text if sys.platform == "win32" else os.fsencode(text)


def _find_program(name: str, env: dict[Any, Any] | None, cwd: Any) -> str:
    """
    The path of a program, from the root on: the child may look for it in another
    environment and from another folder.

    :raises OSError: as C{execvp} does.  In a child that is forked it could only be told
        from the exit status.
    """
    start = os.path.join(os.getcwd(), os.fsdecode(cwd or ""))
    has_folder = bool(os.path.dirname(name))
    why = (
        os.strerror(errno.ENOENT) if has_folder else "there is no such program in PATH"
    )
    missing = FileNotFoundError(errno.ENOENT, why, name)
    if sys.platform == "win32":
        if has_folder:
            found = shutil.which(os.path.join(start, name))
        else:
            variables = (env or {}).items()
            search = next(
                (each[1] for each in variables if each[0].upper() == "PATH"), None
            )
            found = shutil.which(name, path=search)
        if found is None:
            raise missing
        return found
    failure: OSError = missing
    for folder in [""] if has_folder else os.get_exec_path(env):
        path = os.path.join(start, folder, name)
        try:
            _check(path, name, stat.S_ISREG, errno.EACCES)
        except OSError as error:
            # Why one cannot be executed says more than where there is none.
            if has_folder or (error.errno not in _NOT_THERE and failure is missing):
                failure = error
        else:
            return path
    raise failure


def _check(path: Any, name: str, is_right: Callable[[int], bool], wrong: int) -> None:
    """
    Check that something is there, of the right kind, and can be executed or entered.

    :param name: what it is called in the error.
    :param wrong: the error if it is of another kind.
    :raises OSError: if it is not.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        code = error.errno or errno.ENOENT
    else:
        effective = os.access in os.supports_effective_ids
        if not is_right(mode):
            code = wrong
        elif os.access(path, os.X_OK, effective_ids=effective):
            return
        else:
            code = errno.EACCES
    raise OSError(code, os.strerror(code), name)
