"""Runs the application in a worker, by means of ``twistd``'s own code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

from twisted.application import app
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger
from twisted.python import usage
from twisted.scripts._twistd_unix import (
    ServerOptions,
    UnixApplicationRunner,
    UnixAppLogger,
)

from twisted_rtsig.workers import current
from twisted_rtsig.workers.boot import Boot
from twisted_rtsig.workers.channel import ControlChannel, Message
from twisted_rtsig.workers.draining import Drained, drain
from twisted_rtsig.workers.logs import worker_observer
from twisted_rtsig.workers.snapshot import Observer
from twisted_rtsig.workers.sockets import HeldSockets, use
from twisted_rtsig.workers.status import socket_path

_log = Logger()

# If the supervisor has ended, the lifeline reports it within so many seconds after the
# control channel was closed.
_LIFELINE_TIMEOUT: Final = 1.0


def run(
    boot: Boot,
    connection: socket.socket,
    rest: bytes,
    sockets: socket.socket,
    lifeline: int,
) -> None:
    """
    Run the application until it ends.

    :param connection: the control channel.
    :param rest: bytes that were read from the control channel already.
    :param sockets: the channel on which to ask for listening sockets.
    :param lifeline: the descriptor of a pipe that reaches its end when the supervisor
        ends.
    """
    options = ServerOptions()
    try:
        options.parseOptions(
            [
                f"--reactor={boot.reactor}",
                *("--nodaemon", "--originalname", "--pidfile="),
                *boot.arguments,
            ]
        )
    except usage.UsageError as error:
        print(f"{options}\n{error}", file=sys.stderr)
        sys.exit(1)
    from twisted.internet import reactor

    side = WorkerSide(reactor, boot, connection, rest, sockets)
    threading.Thread(
        target=_watch, args=(lifeline, side), name="lifeline", daemon=True
    ).start()
    runner = _Runner(options, boot, side)
    runner.run()
    if runner._exitSignal is not None:
        app._exitWithSignal(runner._exitSignal)


class WorkerSide:
    """
    The connection to the supervisor, from the side of the worker.

    :ivar held: the listening sockets.
    :ivar handlers: by the type of a message from the supervisor, the function that
        handles it.
    """

    def __init__(
        self,
        reactor: Any,
        boot: Boot,
        connection: socket.socket,
        rest: bytes,
        sockets: socket.socket,
    ) -> None:
        self.reactor = reactor
        self.boot = boot
        self.control = ControlChannel(
            reactor, connection, self._received, self._channel_lost, rest
        )
        self.held = HeldSockets(sockets)
        use(reactor, self.held)
        self.handlers: dict[str, Callable[[Message], None]] = {
            "sockets": lambda message: self.held.renew(),
            "stop": self._stop,
            "status": self._tell_status,
        }
        self._observer = Observer(reactor)
        self._grace = boot.grace
        self._stopping = False
        # Added before the application adds its triggers, so that draining begins before
        # its services stop.
        reactor.addSystemEventTrigger("before", "shutdown", self._drain)

    def start(self) -> None:
        """Start reading the control channel, as the reactor is about to run."""
        self.control.start()
        # Called after the functions that the application has registered.
        self.reactor.callWhenRunning(self._ready)

    def supervisor_lost(self) -> NoReturn:
        """
        End this process at once, because the supervisor has ended and nothing else
        manages it.  May be called in any thread.
        """
        try:
            self._clean_up()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)

    def _ready(self) -> None:
        self._observer.count_requests()
        self.control.send({"type": "ready"})

    def _stop(self, message: Message) -> None:
        self._grace = message["grace"]
        if self._stopping:
            drain(self.reactor, self._grace)
        else:
            self._stop_reactor()

    def _channel_lost(self) -> None:
        """
        Stop, unless the lifeline reports the end of the supervisor first.

        Without such a report, the application has closed the channel by mistake, and
        the supervisor's files must stay.
        """
        self.reactor.callLater(_LIFELINE_TIMEOUT, self._stop_reactor)

    def _stop_reactor(self) -> None:
        # The application may have stopped the reactor already.
        with contextlib.suppress(ReactorNotRunning):
            self.reactor.stop()

    def _drain(self) -> Deferred[Drained]:
        """Drain, because the reactor stops, for whatever reason."""
        self._stopping = True
        self.control.send({"type": "stopping"})

        def tell_all(drained: Drained) -> Drained:
            # Report the final counts now, as the reactor disconnects the channel during
            # the shutdown.
            self._tell_status({})
            return drained

        return drain(self.reactor, self._grace).addCallback(tell_all)

    def _tell_status(self, question: Message) -> None:
        snapshot = self._observer.snapshot(question.get("tasks", False))
        number = question.get("number")
        self.control.send({"type": "status", "number": number, "snapshot": snapshot})

    def _received(self, message: Message) -> None:
        handler = self.handlers.get(message["type"])
        if handler is None:
            _log.error(
                "The supervisor sent a message of an unknown type: {received!r}",
                received=message,
            )
        else:
            handler(message)

    def _clean_up(self) -> None:
        """Remove the files that the supervisor removes when it ends normally."""
        supervisor = str(self.boot.supervisor)
        if self.boot.pidfile:
            with contextlib.suppress(OSError), open(self.boot.pidfile) as file:
                if file.read().strip() == supervisor:
                    os.unlink(self.boot.pidfile)
                    os.unlink(socket_path(self.boot.pidfile))
        for path, file_id, locked in self.held.files():
            with contextlib.suppress(OSError):
                status = os.stat(path)
                # Another supervisor may have started already, and made its own file.
                if (status.st_dev, status.st_ino) == file_id:
                    os.unlink(path)
            if locked:
                with contextlib.suppress(OSError):
                    if os.readlink(path + ".lock") == supervisor:
                        os.unlink(path + ".lock")


def _watch(lifeline: int, side: WorkerSide) -> None:
    """Wait for the supervisor's end, in a thread, as the main one may be computing."""
    while os.read(lifeline, 1):
        pass
    side.supervisor_lost()


class WorkerLogger(UnixAppLogger):
    """Logs to the log of the supervisor."""

    def _getLogObserver(self) -> Any:
        worker = current()
        assert worker is not None
        return worker_observer(worker.number)


class _Runner(UnixApplicationRunner):
    """Runs the application as ``twistd`` does."""

    def __init__(self, options: Any, boot: Boot, side: WorkerSide) -> None:
        self._side = side
        if boot.text_log:
            self.loggerFactory = WorkerLogger
        super().__init__(options)

    def startReactor(self, *args: Any, **kwargs: Any) -> None:
        """Start the reactor, and tell the supervisor when it runs."""
        self._side.start()
        super().startReactor(*args, **kwargs)


__all__ = ["WorkerSide", "run"]
