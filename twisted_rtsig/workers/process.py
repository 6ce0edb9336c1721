"""A worker process, from the side of the supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_rtsig.engine.processes import reap
from twisted_rtsig.workers.boot import CONTROL, INHERITED, LIFELINE, SOCKETS, Boot
from twisted_rtsig.workers.channel import ControlChannel, Message
from twisted_rtsig.workers.logs import LogPipe, make_pipe

_log = Logger()

# The most bytes of a request for sockets.
_REQUEST: Final = 64 * 1024

# How many seconds a worker has to end after the grace, before it is killed.
_MARGIN: Final = 2.0


class Events:
    """The events of worker processes.  The supervisor overrides the methods."""

    def ready(self, worker: WorkerProcess) -> None:
        """Called when ``worker`` has started and listens."""

    def ended(self, worker: WorkerProcess) -> None:
        """Called when ``worker`` has ended; ``worker.reason`` says how."""

    def message(self, worker: WorkerProcess, message: Message) -> None:
        """Called when ``worker`` has sent a message of another type than ``ready``."""

    def listen(
        self, worker: WorkerProcess, request: Message
    ) -> list[tuple[str, socket.socket]]:
        """
        Return the listening sockets that ``worker`` asks for.

        :raises OSError: if they cannot be made.
        """
        raise NotImplementedError

    def release(self, worker: WorkerProcess, request: Message) -> None:
        """Called when the application in ``worker`` has closed a port."""


@dataclass(frozen=True)
class Start:
    """
    The parameters with which worker processes are started.

    :ivar reactor: the reactor of the supervisor.
    :ivar lifeline: the descriptor of the pipe that reaches its end when the supervisor
        ends.
    :ivar inherited: the sockets that systemd passed.
    :ivar path: the working directory of the workers; None for the supervisor's own.
    :ivar write_log: given the number of a worker, returns a function that writes its
        log lines.
    """

    reactor: Any
    lifeline: int
    inherited: list[socket.socket]
    path: str | None
    write_log: Callable[[int], Callable[[bytes], None]]


class WorkerProcess(ProcessProtocol):
    """
    A worker process.

    :ivar number: the number of its slot.
    :ivar pid: its process id.
    :ivar started: the time at which it was started, by the reactor's clock.
    :ivar ready: whether it has started and listens.
    :ivar stopping: whether it was asked to stop, or stops by itself.
    :ivar ended: whether it has ended.
    :ivar reason: how it ended: ``by SIGKILL``, for example, or ``with status 1``.
    """

    def __init__(self, start: Start, boot: Boot, events: Events) -> None:
        self.number = boot.number
        self.started: float = start.reactor.seconds()
        self.ready = False
        self.stopping = False
        self.ended = False
        self.reason = ""
        self._reactor = start.reactor
        self._events = events
        self._kill_later: Any = None
        with contextlib.ExitStack() as theirs:
            control, their_control = socket.socketpair()
            theirs.callback(their_control.close)
            asking, their_asking = socket.socketpair()
            theirs.callback(their_asking.close)
            null = os.open(os.devnull, os.O_RDONLY)
            theirs.callback(os.close, null)
            reading, writing = make_pipe()
            theirs.callback(os.close, writing)
            self.control = ControlChannel(
                start.reactor, control, self._received, lambda: None
            )
            self._requests = _Requests(start.reactor, asking, self._answer)
            self._log_pipe = LogPipe(
                start.reactor, reading, start.write_log(boot.number)
            )
            descriptors = {0: null, 1: writing, 2: writing}
            descriptors[CONTROL] = their_control.fileno()
            descriptors[SOCKETS] = their_asking.fileno()
            descriptors[LIFELINE] = start.lifeline
            for number, inherited in enumerate(start.inherited, INHERITED):
                descriptors[number] = inherited.fileno()
            try:
                self._process: Any = start.reactor.spawnProcess(
                    self,
                    sys.executable,
                    [os.fsencode(each) for each in (sys.executable, *_entry(boot))],
                    env=None,
                    path=start.path,
                    childFDs=descriptors,
                )
            except BaseException:
                for each in (self.control, self._requests, self._log_pipe):
                    each.close()
                raise
        self.pid: int = self._process.pid
        for each in (self.control, self._requests, self._log_pipe):
            each.start()
        self.control.send(boot.to_message())

    @property
    def goes_on(self) -> bool:
        """Whether it is not stopping and has not ended."""
        return not (self.stopping or self.ended)

    @property
    def accepts(self) -> bool:
        """Whether it accepts connections, if it listens."""
        return self.ready and self.goes_on

    def send(self, message: Message) -> bool:
        """Send the worker a message; return False if it cannot be sent."""
        return self.control.send(message)

    def stop(self, grace: float) -> None:
        """Ask the worker to stop, and kill it if it has not ended after the grace."""
        if self.ended or self.stopping:
            return
        self.send({"type": "stop", "grace": grace})
        self.stops_by_itself(grace)

    def stops_by_itself(self, grace: float) -> None:
        """Note that the worker is stopping; kill it if it runs on after the grace."""
        self.stopping = True
        self._kill_later = self._reactor.callLater(grace + _MARGIN, self._overdue)

    def kill(self) -> None:
        """Kill the worker."""
        if not self.ended:
            with contextlib.suppress(ProcessExitedAlready):
                self._process.signalProcess(signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        """
        Block until the worker is ready or has ended.  Its messages are handled without
        the reactor, which does not run yet.

        :param seconds: the longest time to block.
        """
        import select

        end = self._reactor.seconds() + seconds
        poll = select.poll()
        readers = {
            each.fileno(): each
            for each in (self.control, self._requests, self._log_pipe)
        }
        for descriptor in readers:
            poll.register(descriptor, select.POLLIN)
        while not (self.ready or self.ended) and self._reactor.seconds() < end:
            for descriptor, _ in poll.poll(100):
                reader = readers[descriptor]
                if isinstance(reader, LogPipe):
                    more = reader.read() != 0
                else:
                    reader.doRead()
                    more = not reader.closed
                if not more:
                    poll.unregister(descriptor)
            reap(self._process)

    def processExited(self, reason: Failure) -> None:
        """See ``IProcessProtocol``."""
        self._end(reason)

    def processEnded(self, reason: Failure) -> None:
        """See ``IProcessProtocol``."""
        self._end(reason)

    def _end(self, reason: Failure) -> None:
        if self.ended:
            return
        self.ended = True
        number = getattr(reason.value, "signal", None)
        if number is None:
            self.reason = f"with status {getattr(reason.value, 'exitCode', '?')}"
        else:
            name = signal.Signals(number).name if number in _SIGNALS else str(number)
            self.reason = f"by {name}"
        if self._kill_later is not None and self._kill_later.active():
            self._kill_later.cancel()
        # Handle its last messages and its last output.
        self.control.read_all()
        self.control.close()
        self._requests.close()
        self._log_pipe.finish()
        self._events.ended(self)

    def _overdue(self) -> None:
        _log.warn(
            "Worker {number} (process {pid}) has not ended within the grace: it is "
            "killed",
            number=self.number,
            pid=self.pid,
        )
        self.kill()

    def _received(self, message: Message) -> None:
        if message["type"] == "ready":
            self.ready = True
            # So that what it has logged comes before "is ready" in the log.
            self._log_pipe.read()
            self._events.ready(self)
        else:
            self._events.message(self, message)

    def _answer(self, request: Message) -> list[tuple[str, socket.socket]]:
        if request["type"] == "release":
            self._events.release(self, request)
            return []
        return self._events.listen(self, request)


_SIGNALS: Final = signal.valid_signals()


def _flags() -> list[str]:
    """Return the command-line options of this interpreter."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if sys.version_info >= (3, 11) and "-P" not in flags:
        flags.append("-P")
    return flags


def _entry(boot: Boot) -> list[str]:
    """
    Return the arguments of Python.

    Only the module matters.  The number and the arguments of ``twistd`` follow so that
    ps(1) shows them.
    """
    module = "twisted_rtsig.workers.worker"
    # The worker gets the sys.path of this process.  Until then, it must not import from
    # its working directory: a json.py there would hide Python's own module.
    start = ["-m", module]
    if sys.version_info < (3, 11):
        # Without -P, which came with Python 3.11.
        code = "import sys; sys.path[:] = filter(None, sys.path)"
        start = ["-c", f"{code}; from {module} import main; main()"]
    return [*_flags(), *start, str(boot.number), *boot.arguments]


@implementer(IReadDescriptor)
class _Requests:
    """
    Answers the requests of a worker, which asks for listening sockets or releases them.

    :param answer: returns the sockets for a request, or raises :class:`OSError`.
    """

    def __init__(
        self,
        reactor: Any,
        connection: socket.socket,
        answer: Callable[[Message], list[tuple[str, socket.socket]]],
    ) -> None:
        connection.setblocking(False)
        self._reactor = reactor
        self._socket = connection
        self._sockets_for = answer
        self._input = b""
        self.closed = False

    def start(self) -> None:
        self._reactor.addReader(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "workers"

    def doRead(self) -> None:
        try:
            data = self._socket.recv(_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._input += data
        if not data or len(self._input) > _REQUEST:
            self.close()
            return
        *requests, self._input = self._input.split(b"\n")
        for each in requests:
            self._answer(each)

    def connectionLost(self, reason: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._reactor.removeReader(self)
            self._socket.close()

    def _answer(self, request: bytes) -> None:
        sockets: list[tuple[str, socket.socket]] = []
        try:
            sockets = self._sockets_for(json.loads(request))
        except OSError as error:
            message: Message = {
                "errno": error.errno,
                "error": error.strerror or str(error),
            }
        except Exception:
            _log.failure("Cannot answer the request {request!r}", request=request)
            message = {"errno": 0, "error": "an error in the supervisor: see its log"}
        else:
            message = {"sockets": [identity for identity, _ in sockets]}
        data = json.dumps(message).encode() + b"\n"
        # The socket buffer has room, as a worker waits for each answer before it sends
        # its next request.
        with contextlib.suppress(OSError):
            socket.send_fds(
                self._socket, [data], [each.fileno() for _, each in sockets]
            )


__all__ = ["Events", "Start", "WorkerProcess"]
