"""
Child processes on Windows, whose pipes and end are reported by the completion port.

Those of Twisted poll the pipes, up to ten times a second while nothing happens, and
need pywin32.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet import error
from twisted.internet._baseprocess import BaseProcess
from twisted.internet.interfaces import IConsumer, IProcessTransport, IPushProducer
from twisted.python import log
from zope.interface import implementer

from twisted_rtsig.windows import calls as windows

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier

_CREATE_NO_WINDOW = 0x08000000
_ERROR_BAD_EXE_FORMAT = 193

# The size of a read, and of the largest write.
_READ_BYTES = 1 << 16

_MOST_AT_ONCE = 1 << 16


class _Pipe:
    """
    One end of a pipe.

    :param received: called with data that has arrived.
    :param lost: called once, when the pipe is closed at either end.
    """

    def __init__(
        self,
        port: CompletionPortNotifier,
        pipe: Any,
        received: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self._port = port
        self._pipe = pipe
        self._received = received
        self._lost = lost
        self._reading: Any = None
        self._writing: Any = None
        self._to_write: deque[memoryview] = deque()
        self._paused = False
        # A read has ended while the pipe was paused, and its data was not passed on
        # yet.
        self._has_arrived = False
        self._closing = False
        self._producer: Any = None
        self._streaming = False
        port.adopt(pipe.handle)

    def resumeProducing(self) -> None:
        """Pass on the data of a read that has ended, and read again."""
        self._paused = False
        if self._has_arrived:
            self._has_arrived = False
            self._port._call_soon(self._has_read)
        self.read_on()

    def read_on(self) -> None:
        """Begin a read, unless the pipe is paused or a read is under way."""
        if self._reading is None and self._pipe is not None and not self._paused:
            self._reading = self._begin("ReadFile", _READ_BYTES, self._has_read)

    def pauseProducing(self) -> None:
        """Pass on no data until the pipe is resumed."""
        self._paused = True

    def write(self, data: bytes) -> None:
        if data and self._pipe is not None and not self._closing:
            # bytes() copies only data that the caller could change.
            self._to_write.append(memoryview(bytes(data)))
            if self._writing is None:
                self._write_some()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self._producer is not None:
            raise RuntimeError(f"{self._producer!r} is registered already")
        if self._pipe is None or self._closing:
            producer.stopProducing()
            return
        self._producer, self._streaming = producer, streaming
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self._producer = None
        self._close_if_written()

    def close(self) -> None:
        """Close the pipe when everything is written."""
        if self._pipe is not None:
            self._closing = True
            self._close_if_written()

    def _close_if_written(self) -> None:
        # Like Twisted's transports, wait only for a pull producer to end.
        waits_for_producer = self._producer is not None and not self._streaming
        if self._closing and self._writing is None and not waits_for_producer:
            self.break_off()

    def break_off(self) -> None:
        """Close the pipe now."""
        if self._pipe is None:
            return
        for operation in (self._reading, self._writing):
            if operation is not None:
                operation.cancel()
        self._pipe.close()
        self._pipe = None
        self._to_write.clear()
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()
        self._lost()

    def _begin(self, what: str, argument: Any, done: Callable[[], None]) -> Any:
        """
        Begin an overlapped operation.

        :return: None if the pipe is broken.
        """
        operation = windows.overlapped.Overlapped(0)
        # The operation keeps its buffer until its packet has come.
        self._port.call_once_completed(operation.address, done)
        try:
            getattr(operation, what)(self._pipe.handle, argument)
        except OSError:
            self._port.forget_completion(operation.address)
            self.break_off()
            return None
        return operation

    def _has_read(self) -> None:
        if self._paused and self._pipe is not None:
            self._has_arrived = True
            return
        operation, self._reading = self._reading, None
        if self._pipe is None:
            return
        try:
            data = operation.getresult()
        except OSError:
            data = b""
        if not data:
            self.break_off()
            return
        try:
            self._received(data)
        except BaseException:
            # A protocol that fails gets no more data.
            log.err()
            self.break_off()
        self.read_on()

    def _write_some(self) -> None:
        pieces = []
        room = _MOST_AT_ONCE
        while room and self._to_write:
            piece = self._to_write.popleft()
            if len(piece) > room:
                self._to_write.appendleft(piece[room:])
                piece = piece[:room]
            pieces.append(piece)
            room -= len(piece)
        self._writing = self._begin("WriteFile", b"".join(pieces), self._has_written)
        if self._writing is not None and self._producer and self._streaming:
            self._producer.pauseProducing()

    def _has_written(self) -> None:
        operation, self._writing = self._writing, None
        if self._pipe is None:
            return
        try:
            operation.getresult()
        except OSError:
            self.break_off()
            return
        if self._to_write:
            self._write_some()
        else:
            if self._producer is not None:
                self._producer.resumeProducing()
            self._close_if_written()


def _interpreter(script: str) -> str | None:
    """The interpreter that a script names in its first line, after ``#!``."""
    try:
        with open(script, "rb") as file:
            line = file.readline(1024)
    except OSError:
        return None
    return os.fsdecode(line[2:].strip()) if line.startswith(b"#!") else None


def _start(
    command: str | None,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    path: str | None,
    standard: Sequence[Any],
) -> Any:
    """
    Start a child, or the interpreter of a script.

    :param standard: its standard input, output and error, as arguments of
        :mod:`subprocess`.
    :raises OSError: if there is no such program, or if the file is no program.
    """
    # Its Popen makes pipes that can be read and written in the background.
    tools: Any = importlib.import_module("asyncio.windows_utils")
    # A child that inherits one of the three may have to write to the console of this
    # process, so it is not started without a console.
    flags = 0 if None in standard else _CREATE_NO_WINDOW

    def start(program: str | None, arguments: Sequence[str]) -> Any:
        return tools.Popen(
            arguments,
            executable=program,
            stdin=standard[0],
            stdout=standard[1],
            stderr=standard[2],
            env=environment,
            cwd=path,
            creationflags=flags,
        )

    try:
        return start(command, arguments)
    except OSError as failure:
        code = getattr(failure, "winerror", 0)
        if code != _ERROR_BAD_EXE_FORMAT or command is None:
            raise
        interpreter = _interpreter(command)
        if interpreter is None:
            raise OSError(
                f"{command!r} is neither a Windows executable, "
                "nor a script with a shebang line"
            ) from failure
    return start(interpreter, [arguments[0], command, *arguments[1:]])


@implementer(IProcessTransport, IConsumer, IPushProducer)
class WindowsProcess(BaseProcess):
    """
    A child process, with pipes to its standard input, output and error.

    :param standard: the three of them, as arguments of :mod:`subprocess`.
    :ivar pipes: the open pipes, by descriptor.
    """

    # None once all is over, when nothing is called any more.  Twisted's annotation
    # includes the None.
    proto: Any

    def __init__(
        self,
        port: CompletionPortNotifier,
        protocol: Any,
        command: Any,
        arguments: Iterable[Any],
        environment: Mapping[Any, Any] | None,
        path: Any,
        standard: Sequence[Any] = (subprocess.PIPE,) * 3,
    ) -> None:
        super().__init__(protocol)
        # Windows needs some environment variables of its own.
        variables = dict(os.environ)
        for name, value in (environment or {}).items():
            variables[os.fsdecode(name)] = os.fsdecode(value)
        self._child = _start(
            os.fsdecode(command) if command else None,
            [os.fsdecode(each) for each in arguments],
            variables,
            os.fsdecode(path) if path else None,
            standard,
        )
        self.pid = self._child.pid
        self._port = port
        ends = (self._child.stdin, self._child.stdout, self._child.stderr)
        self.pipes = {
            number: self._pipe(number, end)
            for number, end in enumerate(ends)
            if end is not None
        }
        try:
            self.proto.makeConnection(self)
        except BaseException:
            log.err()
        # The pipe to its input is read as well, to notice when the child closes it.
        for pipe in list(self.pipes.values()):
            pipe.read_on()
        self._handle = windows.open_process(windows.SYNCHRONIZE, False, self._child.pid)
        self._exit = port.call_once_signalled(self._handle, self._exited)

    def _pipe(self, number: int, end: Any) -> _Pipe:
        return _Pipe(
            self._port,
            end,
            lambda data: self._received(number, data),
            lambda: self._pipe_lost(number),
        )

    def _received(self, number: int, data: bytes) -> None:
        # There is no data from the input of a child.
        if number:
            self.proto.childDataReceived(number, data)

    def _pipe_lost(self, number: int) -> None:
        del self.pipes[number]
        try:
            self.proto.childConnectionLost(number)
        except BaseException:
            log.err()
        self.maybeCallProcessEnded()

    def _exited(self) -> None:
        self._port.forget(self._exit)
        windows.close_handle(self._handle)
        self.processEnded(self._child.wait())

    def maybeCallProcessEnded(self) -> None:
        """Tell the protocol of the end, if the pipes are closed as well."""
        if not self.pipes and self.lostProcess:
            super().maybeCallProcessEnded()

    def _getReason(self, status: int) -> BaseException:
        if status == 0:
            return error.ProcessDone(status)
        return error.ProcessTerminated(status)

    # IProcessTransport

    def signalProcess(self, signalID: str | int) -> None:
        """
        Terminate the process.

        :param signalID: ``INT``, ``TERM`` or ``KILL``, which all do the same; others do
            nothing, as Windows has no signals.
        :raises twisted.internet.error.ProcessExitedAlready: if it has ended.
        """
        if self.pid is None:
            raise error.ProcessExitedAlready()
        if signalID in ("INT", "TERM", "KILL"):
            self._child.terminate()

    def closeChildFD(self, fd: int) -> None:
        """See ``IProcessTransport.closeChildFD``."""
        if fd not in (0, 1, 2):
            raise NotImplementedError(
                "Only standard-IO file descriptors available on win32"
            )
        if fd in self.pipes:
            self.pipes[fd].close()

    def closeStdin(self) -> None:
        """See ``IProcessTransport.closeStdin``."""
        self.closeChildFD(0)

    def closeStdout(self) -> None:
        """See ``IProcessTransport.closeStdout``."""
        self.closeChildFD(1)

    def closeStderr(self) -> None:
        """See ``IProcessTransport.closeStderr``."""
        self.closeChildFD(2)

    def loseConnection(self) -> None:
        """Close all pipes."""
        for pipe in list(self.pipes.values()):
            pipe.close()

    def writeToChild(self, childFD: int, data: bytes) -> None:
        """
        Write to its standard input.

        :raises KeyError: if ``childFD`` is not 0.
        """
        if childFD != 0:
            raise KeyError(childFD)
        self.write(data)

    # ITransport

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        if 0 in self.pipes:
            self.pipes[0].write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Write to its standard input."""
        self.write(b"".join(data))

    def getHost(self) -> Any:
        """Children have no address."""
        raise NotImplementedError("a child has no address")

    def getPeer(self) -> Any:
        """Children have no address."""
        raise NotImplementedError("a child has no address")

    # IConsumer: its standard input

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See ``IConsumer.registerProducer``."""
        if 0 in self.pipes:
            self.pipes[0].registerProducer(producer, streaming)
        else:
            producer.stopProducing()

    def unregisterProducer(self) -> None:
        """See ``IConsumer.unregisterProducer``."""
        if 0 in self.pipes:
            self.pipes[0].unregisterProducer()

    # IPushProducer: its output and error

    def pauseProducing(self) -> None:
        """See ``IPushProducer.pauseProducing``."""
        self._each_output(_Pipe.pauseProducing)

    def resumeProducing(self) -> None:
        """See ``IPushProducer.resumeProducing``."""
        self._each_output(_Pipe.resumeProducing)

    def _each_output(self, do: Callable[[_Pipe], None]) -> None:
        for number, pipe in list(self.pipes.items()):
            if number:
                do(pipe)

    def stopProducing(self) -> None:
        """See ``IProducer.stopProducing``."""
        self.loseConnection()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid}>"
