"""Running a command to its end, and capturing its output."""

from __future__ import annotations

import locale
import os
import sys
from collections.abc import Sequence
from subprocess import (
    DEVNULL,
    PIPE,
    CalledProcessError,
    CompletedProcess,
    SubprocessError,
)
from typing import Any, Final, Literal, overload

from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.children import GRACE, Child, check_grace
from twisted_rtsig.coro.commands import (
    Argument,
    Command,
    ProcessOptions,
    StandardStream,
)
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, Wait
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.typing_backports import Unpack

MAX_OUTPUT: Final = 1 << 26
"""The default limit of the output: 64 MiB of either stream."""

Data = bytes | bytearray | memoryview


class OutputLimitExceeded(SubprocessError):
    """
    A program has written more than the ``max_bytes`` of ``run_process``.

    :ivar cmd: the command.
    :ivar limit: the limit in bytes.
    :ivar stdout: the output that was collected, in bytes; None if it is not collected.
    :ivar stderr: the same for the standard error.
    """

    def __init__(
        self,
        cmd: Sequence[Argument],
        limit: int,
        stdout: bytes | None,
        stderr: bytes | None,
    ) -> None:
        super().__init__(cmd, limit, stdout, stderr)
        self.cmd = cmd
        self.limit = limit
        self.stdout = stdout
        self.stderr = stderr

    def __str__(self) -> str:
        return (
            f"{self.cmd!r} has written more than {self.limit} bytes and was stopped: "
            "give run_process a greater max_bytes, or read the output from the stream "
            "of open_process"
        )


class RunOptions(ProcessOptions, total=False):
    """The options of ``run_process`` whose types do not depend on one another."""

    stdin: StandardStream
    stdout: StandardStream
    stderr: StandardStream
    check: bool
    max_bytes: int | None


@overload
def run_process(
    command: Sequence[Argument],
    *,
    input: Data | None = None,
    text: Literal[False] = False,
    encoding: None = None,
    errors: None = None,
    **options: Unpack[RunOptions],
) -> Deferred[CompletedProcess[bytes]]: ...


@overload
def run_process(
    command: Sequence[Argument],
    *,
    input: str | None = None,
    text: Literal[True],
    encoding: str | None = None,
    errors: str | None = None,
    **options: Unpack[RunOptions],
) -> Deferred[CompletedProcess[str]]: ...


@overload
def run_process(
    command: Sequence[Argument],
    *,
    encoding: str,
    errors: str | None = None,
    input: str | None = None,
    text: bool = False,
    **options: Unpack[RunOptions],
) -> Deferred[CompletedProcess[str]]: ...


@overload
def run_process(
    command: Sequence[Argument],
    *,
    text: bool = False,
    encoding: str | None = None,
    errors: str,
    input: str | None = None,
    **options: Unpack[RunOptions],
) -> Deferred[CompletedProcess[str]]: ...


@must_be_awaited
def run_process(
    command: Sequence[Argument],
    *,
    input: Data | str | None = None,
    stdin: StandardStream = DEVNULL,
    stdout: StandardStream = PIPE,
    stderr: StandardStream = PIPE,
    check: bool = True,
    text: bool = False,
    encoding: str | None = None,
    errors: str | None = None,
    max_bytes: int | None = MAX_OUTPUT,
    grace: float = GRACE,
    reactor: Any | None = None,
    **options: Any,
) -> Deferred[Any]:
    """
    Run a command to its end, and collect its output::

        done = await run_process(["sort", "-n"], input=b"10\\n9\\n")
        print(done.stdout, done.returncode)

    If the wait is cancelled, by ``timeout`` for example, the program is stopped as by
    ``Process.stop``, and the cancellation takes effect when the program has ended.

    :param input: the data for the standard input; by default none.
    :param stdin: as for ``open_process``, if there is no ``input``.
    :param stdout: as for ``open_process``.  Only a ``PIPE`` is collected.
    :param stderr: as ``stdout``; or ``STDOUT``, to be collected together with it.
    :param check: whether to raise an error if the exit status is not 0.
    :param text: whether ``input`` and the output are ``str``, in the encoding of the
        locale.  Each ``"\\r\\n"`` and ``"\\r"`` of the output becomes ``"\\n"``.
    :param encoding: as ``text``, with this encoding.
    :param errors: as ``text``, with this error handler of ``codecs``.
    :param max_bytes: the limit of each of the two outputs; None for no limit.
    :param grace: as for ``open_process``, if the program has to be stopped.
    :param options: further parameters of ``open_process``.
    :return: fires with a ``subprocess.CompletedProcess``, when the program has ended
        and its outputs are closed.
    :raises subprocess.CalledProcessError: (when awaited) if the exit status is not 0;
        the error has the output.
    :raises OutputLimitExceeded: (when awaited) if the program writes more than
        ``max_bytes``.  It is stopped then.
    :raises UnicodeDecodeError: (when awaited) if the output is not in the encoding.
    :raises TypeError: if ``input`` has not the type that ``text`` asks for.
    :raises OSError: as ``open_process``, whose other errors are raised as well.
    """
    check_grace(grace)
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes}: 0 is the least, and None no limit")
    codec = _Codec(encoding, errors) if text or encoding or errors else None
    data = None
    if input is not None:
        if stdin != DEVNULL:
            raise ValueError("give either input or stdin, and not both")
        data = _encoded(input, codec)
        stdin = PIPE
    elif stdin == PIPE:
        raise ValueError("stdin=PIPE: give run_process what to write as input")
    what = Command(command, stdin, stdout, stderr, **options)
    scheduler = scheduler_for(reactor)
    closed: Operation[None] = Wait()
    run = _Run(scheduler, what, closed, max_bytes, data)
    what.start(scheduler.reactor, run)
    running = spawn(
        run.finish(closed, grace, check, codec),
        name=f"run_process({os.fsdecode(command[0])!r})",
        reactor=scheduler.reactor,
    )
    return running.as_deferred()


class _Run(ProcessProtocol):
    """
    Collects the output of a program.  The owner of the operation ``_closed``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        command: Command,
        closed: Operation[None],
        limit: int | None,
        data: bytes | None,
    ) -> None:
        self._child = Child(scheduler, command.signal_group)
        self._command = command
        self._limit = limit
        self._data = data
        # The output by descriptor, and its size.
        self._output: dict[int, list[bytes]] = {}
        self._sizes: dict[int, int] = {}
        # False once the output is discarded.
        self._collects = True
        # Succeeds when the program has ended and its outputs are closed; fails when it
        # has written too much.  None from then on, since the traceback of the error
        # refers to frames that refer to this object.
        self._closed: Operation[None] | None = closed
        closed.owner = self

    async def finish(
        self,
        closed: Operation[None],
        grace: float,
        check: bool,
        codec: _Codec | None,
    ) -> CompletedProcess[Any]:
        """
        Wait for the end of the program and its output; stop it after an error.

        :param closed: the operation, which may be finished before this begins.
        """
        child = self._child
        try:
            try:
                await closed
            finally:
                # The traceback of its error refers to this frame.
                del closed
        except BaseException as error:
            self._collects = False
            try:
                if isinstance(error, GeneratorExit):
                    # A coroutine that is being closed cannot wait.
                    child._kill_now()
                elif child.returncode is None:
                    await child._end(grace)
            finally:
                # Processes that the program has started may keep the outputs open.
                child._transport.loseConnection()
            raise
        status = child.returncode
        assert status is not None
        stdout, stderr = self._collected(1), self._collected(2)
        if codec is None:
            return _result(self._command.command, status, stdout, stderr, check)
        text = codec.decode(stdout), codec.decode(stderr)
        return _result(self._command.command, status, *text, check)

    def _collected(self, descriptor: int) -> bytes | None:
        parts = self._output.get(descriptor)
        return None if parts is None else b"".join(parts)

    # ProcessProtocol

    def connectionMade(self) -> None:
        transport: Any = self.transport
        self._child._started(transport)
        for descriptor in (1, 2):
            if descriptor in transport.pipes:
                self._output[descriptor] = []
                self._sizes[descriptor] = 0
        data, self._data = self._data, None
        if data is not None:
            # The pipe is closed when all data is written, or the program closes it.
            if data:
                transport.writeToChild(0, data)
            transport.closeChildFD(0)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if not self._collects:
            return
        size = self._sizes[childFD] + len(data)
        if self._limit is not None and size > self._limit:
            data = data[: self._limit - self._sizes[childFD]]
        self._output[childFD].append(data)
        self._sizes[childFD] = size
        if self._limit is not None and size > self._limit:
            self._collects = False
            closed = self._take_closed()
            if closed is not None:
                closed.fail(
                    OutputLimitExceeded(
                        self._command.command,
                        self._limit,
                        self._collected(1),
                        self._collected(2),
                    )
                )

    def processExited(self, reason: Failure) -> None:
        self._child._exited(reason)

    def processEnded(self, reason: Failure) -> None:
        closed = self._take_closed()
        if closed is not None:
            closed.succeed(None)

    def _take_closed(self) -> Operation[None] | None:
        closed, self._closed = self._closed, None
        if closed is not None:
            closed.owner = None
        return closed

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: ``finish`` stops the program."""
        self._take_closed()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self._child.pid} and of its output"


def _result(
    command: Sequence[Argument], status: int, stdout: Any, stderr: Any, check: bool
) -> CompletedProcess[Any]:
    if check and status:
        raise CalledProcessError(status, command, stdout, stderr)
    return CompletedProcess(command, status, stdout, stderr)


class _Codec:
    """The encoding of the input and the output of a program."""

    def __init__(self, encoding: str | None, errors: str | None) -> None:
        self._encoding = encoding or locale.getpreferredencoding(False)
        self._errors = errors or "strict"

    def encode(self, text: str) -> bytes:
        if sys.platform == "win32":
            # As subprocess does.
            text = text.replace("\n", os.linesep)
        return text.encode(self._encoding, self._errors)

    def decode(self, data: bytes | None) -> str | None:
        if data is None:
            return None
        text = data.decode(self._encoding, self._errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoded(data: Data | str, codec: _Codec | None) -> bytes:
    if codec is None:
        if isinstance(data, str):
            raise TypeError(
                "input is text: give bytes, or say text=True or an encoding"
            )
        return bytes(data)
    if not isinstance(data, str):
        raise TypeError(f"input={data!r}: with text=True or an encoding give a str")
    return codec.encode(data)
