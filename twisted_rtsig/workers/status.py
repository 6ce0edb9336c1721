"""
The status of all workers: the supervisor's UNIX socket that reports it, and the client.

A client sends one line with a JSON object, and receives one.  Then the supervisor
closes the connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.error import CannotListenError
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from twisted_rtsig.workers.channel import Message
from twisted_rtsig.workers.metrics import (
    Metric,
    add_up,
    is_gauge,
    metrics_of,
    to_json,
)

if TYPE_CHECKING:
    from twisted_rtsig.workers.process import WorkerProcess
    from twisted_rtsig.workers.supervisor import Supervisor

_log = Logger()

ANSWER_TIMEOUT: Final = 2.0
"""How many seconds a worker has to report its status."""

# How many seconds a client has to send its request, and again to receive the answer.
_CLIENT_TIMEOUT: Final = 5.0

_MOST_CLIENTS: Final = 16

_REQUEST: Final = 1024
"""The most bytes of a request."""


def socket_path(pidfile: str) -> str:
    """Return the path of the status socket of the supervisor with this pid file."""
    return f"{pidfile}.status"


class Status:
    """
    Collects the status of all workers, and serves it on a UNIX socket.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.reactor = supervisor.reactor
        self._supervisor = supervisor
        self._started = self.reactor.seconds()
        self._port: Any = None
        # The latest snapshot of each worker.
        self._last: dict[WorkerProcess, Message] = {}
        # The final counters of the workers that have ended, and how many ended how.
        self._past: list[Metric] = []
        self._ends: Counter[str] = Counter(stopped=0, died=0)
        self._questions: list[_Question] = []
        supervisor.handlers["status"] = self._told

    # The socket

    def listen(self, pidfile: str, uid: int | None, gid: int | None) -> None:
        """
        Open the socket beside a pid file.  If that fails, a line in the log says why.

        :param uid: the user that the process is about to become; None to keep its user.
        :param gid: the group, in the same way.
        """
        path = socket_path(pidfile)
        umask = os.umask(0o177)
        try:
            try:
                with _as_user(uid, gid):
                    self._open(path)
            except (OSError, CannotListenError):
                folder = os.stat(os.path.dirname(path))
                if uid is None or os.geteuid() != 0 or folder.st_uid == uid:
                    raise
                # The user can neither write to that folder nor change its mode, and so
                # cannot put a symbolic link there: root may create the socket.
                self._open(path)
                os.chown(path, uid, -1 if gid is None else gid, follow_symlinks=False)
        except Exception as error:
            _log.warn(
                "The status is not available, as {path} cannot be opened: {error}",
                path=path,
                error=error,
            )
        finally:
            os.umask(umask)

    def _open(self, path: str) -> None:
        _remove(path)
        self._port = self.reactor.listenUNIX(path, _Factory(self), mode=0o600)

    def close(self) -> None:
        """Close and remove the socket now, as the reactor may not run another pass."""
        port, self._port = self._port, None
        if port is not None and port.connected:
            port.stopReading()
            # The file may be gone; or with --uid, only root may write to the folder.
            with contextlib.suppress(OSError):
                port.connectionLost(Failure(CONNECTION_DONE))

    # The workers

    def ended(self, worker: WorkerProcess) -> None:
        """Handle the end of ``worker``: keep its counters in the sums."""
        self._ends["stopped" if worker.stopping else "died"] += 1
        last = self._last.pop(worker, None)
        if last is not None:
            counted = [each for each in metrics_of(last) if not is_gauge(each)]
            self._past = add_up([*self._past, *counted])
        for question in list(self._questions):
            question.answered(worker, None)

    def ask(self, tasks: bool, answer: Callable[[Message], None]) -> None:
        """
        Ask all workers for their status.

        :param tasks: whether they describe their tasks.
        :param answer: called with the status of all workers, after
            :data:`ANSWER_TIMEOUT` at the latest.
        """
        _Question(self._supervisor, self._questions, tasks, self._answer(answer))

    def _told(self, worker: WorkerProcess, message: Message) -> None:
        snapshot = message["snapshot"]
        self._last[worker] = snapshot
        for question in list(self._questions):
            if question.number == message.get("number"):
                question.answered(worker, snapshot)

    def _answer(
        self, answer: Callable[[Message], None]
    ) -> Callable[[dict[WorkerProcess, Message | None]], None]:
        return lambda answers: answer(self._status(answers))

    def _status(self, answers: dict[WorkerProcess, Message | None]) -> Message:
        slots = self._supervisor.slots
        now = self.reactor.seconds()
        workers = [
            {
                "number": worker.number,
                "pid": worker.pid,
                "state": _state(worker),
                "answers": snapshot is not None,
                "age": round(now - worker.started, 3),
                "restarts": getattr(slots.get(worker.number), "restarts", 0),
                **({} if snapshot is None else snapshot),
            }
            for worker, snapshot in answers.items()
            if not worker.ended
        ]
        workers.sort(key=lambda each: (each["number"], -each["age"]))
        return {
            "pid": os.getpid(),
            "age": round(now - self._started, 3),
            "count": len(slots),
            "workers": workers,
            "metrics": to_json(self._metrics(workers)),
        }

    def _metrics(self, workers: list[Message]) -> list[Metric]:
        states = Counter(each["state"] for each in workers)
        return add_up(
            [
                *(
                    Metric("twisted_workers", (("state", state),), states[state])
                    for state in ("starting", "ready", "stopping")
                ),
                *(
                    Metric("twisted_workers_ended", (("how", how),), count)
                    for how, count in self._ends.items()
                ),
                *self._past,
                # A worker that does not answer counts with its latest snapshot, as
                # Prometheus takes a counter that falls for one that was reset.
                *(each for last in self._last.values() for each in metrics_of(last)),
            ]
        )


def _state(worker: WorkerProcess) -> str:
    if worker.stopping:
        return "stopping"
    return "ready" if worker.ready else "starting"


class _Question:
    """One request to all workers, until all have answered or the time is over."""

    _numbers = 0

    def __init__(
        self,
        supervisor: Supervisor,
        questions: list[_Question],
        tasks: bool,
        done: Callable[[dict[WorkerProcess, Message | None]], None],
    ) -> None:
        type(self)._numbers += 1
        self.number = self._numbers
        self._questions = questions
        self._done = done
        self._answers: dict[WorkerProcess, Message | None] = dict.fromkeys(
            supervisor.workers()
        )
        self._unanswered = set(self._answers)
        questions.append(self)
        self._timeout = supervisor.reactor.callLater(ANSWER_TIMEOUT, self._end)
        question = {"type": "status", "number": self.number, "tasks": tasks}
        for worker in list(self._unanswered):
            # A worker that is starting does not read its channel yet.
            if not (worker.ready and worker.send(question)):
                self._unanswered.discard(worker)
        self._check()

    def answered(self, worker: WorkerProcess, snapshot: Message | None) -> None:
        """Handle the answer of ``worker``; None if it has ended."""
        if worker in self._unanswered:
            self._unanswered.discard(worker)
            self._answers[worker] = snapshot
            self._check()

    def _check(self) -> None:
        if not self._unanswered:
            self._timeout.cancel()
            self._end()

    def _end(self) -> None:
        self._questions.remove(self)
        self._done(self._answers)


# The clients


class _Connection(LineReceiver, TimeoutMixin):
    """A client, which has some seconds to send a line and some to receive one."""

    delimiter = b"\n"
    MAX_LENGTH = _REQUEST
    factory: _Factory

    def connectionMade(self) -> None:
        """See ``IProtocol.connectionMade``."""
        self.factory.clients.add(self)
        self.setTimeout(_CLIENT_TIMEOUT)

    def callLater(self, period: float, function: Callable[[], None]) -> Any:
        """See ``TimeoutMixin``."""
        return self.factory.status.reactor.callLater(period, function)

    def timeoutConnection(self) -> None:
        """See ``TimeoutMixin``."""
        self._transport().abortConnection()

    def lineReceived(self, line: bytes) -> None:
        """See ``LineReceiver.lineReceived``."""
        # Only one request is read, and only the first line of what has arrived counts.
        self.pauseProducing()
        try:
            tasks = bool(json.loads(line)["tasks"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self._answer(
                {"error": 'send a JSON object such as {"tasks": false} in one line'}
            )
        else:
            self.factory.status.ask(tasks, self._answer)

    def lineLengthExceeded(self, line: bytes) -> None:
        """See ``LineReceiver.lineLengthExceeded``."""
        self._transport().abortConnection()

    def connectionLost(self, reason: object = None) -> None:
        """See ``IProtocol.connectionLost``."""
        self.setTimeout(None)
        self.factory.clients.discard(self)

    def _answer(self, message: Message) -> None:
        # The client may have disconnected.
        if self in self.factory.clients:
            self.resetTimeout()
            self._transport().write(json.dumps(message).encode() + b"\n")
            self._transport().loseConnection()

    def _transport(self) -> Any:
        return self.transport


class _Factory(ServerFactory):
    noisy = False

    def __init__(self, status: Status) -> None:
        self.status = status
        self.clients: set[_Connection] = set()

    def buildProtocol(self, addr: object) -> Protocol | None:
        if len(self.clients) >= _MOST_CLIENTS:
            return None
        connection = _Connection()
        connection.factory = self
        return connection


@contextlib.contextmanager
def _as_user(uid: int | None, gid: int | None) -> Iterator[None]:
    """
    Do something with the rights of a user.  If root did it in a folder of that user, a
    symbolic link could direct it to any other file.

    :param uid: the user; None to keep the user of this process.
    :param gid: the group; None to keep the group.
    """
    if uid is None or os.geteuid() != 0:
        yield
        return
    group = os.getegid()
    if gid is not None:
        os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def _remove(path: str) -> None:
    """Remove a socket that an earlier supervisor left."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)


class NoStatus(Exception):
    """No supervisor reports its status; the message says why."""


def read_status(path: str, tasks: bool = False) -> Message:
    """
    Ask a supervisor for the status of its workers.  This blocks; for some seconds if a
    worker does not answer.

    :param path: the supervisor's pid file, or its status socket.
    :param tasks: whether to describe the tasks of all workers.
    :raises NoStatus: if no supervisor answers.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            path = socket_path(path)
            os.stat(path)
    except OSError as error:
        raise NoStatus(
            f"{path}: {error.strerror}: give the pid file of a running "
            "'twistd workers' (its option --pidfile), or its status socket"
        ) from None
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_TIMEOUT + _CLIENT_TIMEOUT)
        try:
            client.connect(path)
            client.sendall(json.dumps({"tasks": tasks}).encode() + b"\n")
            with client.makefile("rb") as file:
                answer: Message = json.loads(file.read())
        except TimeoutError:
            raise NoStatus(f"{path}: the supervisor does not answer") from None
        except OSError as error:
            raise NoStatus(f"{path}: {error.strerror}") from None
        except ValueError:
            raise NoStatus(
                f"{path}: this is not a status socket, or it has too many clients"
            ) from None
    if "error" in answer:
        raise NoStatus(f"{path}: {answer['error']}")
    return answer


__all__ = ["NoStatus", "Status", "read_status", "socket_path"]
