"""
The supervisor: a service that starts workers, replaces those that end, and handles
signals.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from twisted_rtsig.coro.scheduler import cancel_call
from twisted_rtsig.workers.boot import Boot
from twisted_rtsig.workers.channel import Message
from twisted_rtsig.workers.listening import Listening
from twisted_rtsig.workers.logs import LineLog, text_output
from twisted_rtsig.workers.notify import SystemdNotifier
from twisted_rtsig.workers.process import Events, Start, WorkerProcess
from twisted_rtsig.workers.status import Status

_log = Logger()

MOST_WORKERS: Final = 250
"""A message can carry the sockets of so many workers (SCM_RIGHTS in unix(7))."""

# A worker that ends before it is ready, or within so many seconds of its start, is a
# failure of its slot.
_LIVED: Final = 60.0
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0

# After a reload, the new workers have so many seconds to start listening.  An
# application may connect to a database first.
_UNUSED: Final = 10.0

# With --uid, the least number of workers that can be added later: their sockets are
# made at the start.
_SPARE: Final = 8


class WorkerStartError(Exception):
    """No worker can be started."""


def pause_before_restart(failures: int) -> float:
    """
    Return how many seconds to wait before a slot gets its next worker.

    :param failures: how many workers in a row have ended early.
    """
    if failures <= 1:
        return 0.0
    return float(min(_FIRST_PAUSE * 2 ** min(failures - 2, 30), _LONGEST_PAUSE))


@dataclass(frozen=True)
class Settings:
    """
    The settings of the supervisor.

    :ivar count: how many workers to start with.
    :ivar grace: how many seconds a worker has to finish when it stops.
    :ivar start_timeout: how many seconds a worker has to start.
    :ivar shared_socket: whether all workers accept from one socket.
    :ivar reactor: the short name of the workers' reactor.
    :ivar path: ``sys.path``.
    :ivar folder: the folder in which the application is loaded.
    :ivar chroot: whether this process changes its root.
    :ivar arguments: the arguments of ``twistd``: its options, the command, and the
        options of the command.
    :ivar log_arguments: further options of ``twistd``, for workers that log by
        themselves.
    :ivar uid: the user to become, or None.
    :ivar gid: the group to become, or None.
    :ivar euid: whether to set only the effective user and group.
    :ivar pidfile: the path of the pid file, or an empty string.
    """

    count: int
    grace: float
    start_timeout: float
    shared_socket: bool
    reactor: str
    path: list[str]
    folder: str
    chroot: bool
    arguments: list[str]
    log_arguments: list[str]
    uid: int | None
    gid: int | None
    euid: bool
    pidfile: str


@dataclass(eq=False)
class Slot:
    """
    The place of one worker and its successors.

    :ivar worker: the worker that serves, or starts; None during a pause.
    :ivar replacement: the new worker that starts, in a reload, while the former one
        still serves.
    :ivar failures: how many workers in a row have ended early.
    :ivar restarts: how many workers were started after the first.
    :ivar pause: the delayed call that starts the next worker, or None.
    """

    number: int
    worker: WorkerProcess | None = None
    replacement: WorkerProcess | None = None
    failures: int = 0
    restarts: int = -1
    pause: Any = None

    def workers(self) -> list[WorkerProcess]:
        """Return the worker and the replacement, as far as they exist."""
        return [each for each in (self.worker, self.replacement) if each is not None]


class Supervisor(Service, Events):
    """
    Runs an application in several processes.

    :ivar slots: the slots, by number.
    :ivar retired: workers that were asked to stop and have not ended.
    :ivar handlers: by the type of a message from a worker, the function that handles
        it.
    """

    def __init__(
        self,
        reactor: Any,
        settings: Settings,
        passed: list[socket.socket],
        passed_names: list[str],
        notifier: SystemdNotifier,
    ) -> None:
        self.reactor = reactor
        self.settings = settings
        self.slots: dict[int, Slot] = {}
        self.retired: set[WorkerProcess] = set()
        self.handlers: dict[str, Callable[[WorkerProcess, Message], None]] = {
            "stopping": self._stops_by_itself,
        }
        self.status = Status(self)
        self._passed = passed
        self._passed_names = passed_names
        self._notifier = notifier
        # Workers may be added after the privileges were dropped, so their sockets are
        # made at the start.
        spare = max(settings.count, _SPARE) if settings.uid is not None else 0
        self.listening = Listening(
            range(settings.count + spare), settings.shared_socket, passed
        )
        self._start: Start | None = None
        self._text_log = True
        self._lifeline: int | None = None
        # In a reload, the slots whose workers are still to be replaced.
        self._to_replace: set[int] = set()
        self._replacing: Slot | None = None
        # The delayed call that closes unused addresses after a reload.
        self._close_unused: Any = None
        self._stopped: Deferred[None] | None = None
        self._start_limits: dict[WorkerProcess, Any] = {}
        self._watchdog: Any = None
        self._signals: dict[int, Any] = {}
        self._asked_to_end = False
        # Whether a hang-up of the terminal ends this process; see _handle_early.
        self._had_terminal = False

    # IService

    def privilegedStartService(self) -> None:
        """
        Start the first worker and wait until it is ready.  This happens before the
        process drops its privileges, which some ports need.

        :raises WorkerStartError: if the worker ends, or takes too long.
        """
        super().privilegedStartService()
        self._prepare()
        self._handle_early()
        slot = self.slots[0] = Slot(0)
        try:
            worker = slot.worker = self._spawn(slot)
        except OSError as error:
            raise WorkerStartError(f"a worker cannot be started: {error}") from error
        worker.wait(self.settings.start_timeout)
        if not worker.ready:
            if not worker.ended:
                worker.kill()
                worker.wait(_LIVED)
                reason = f"was not ready after {self.settings.start_timeout:g} s"
            else:
                reason = f"has ended {worker.reason} before it was ready"
            self.listening.close()
            raise WorkerStartError(
                f"the first worker {reason}; its output is in the log"
            )
        settings = self.settings
        if settings.pidfile:
            self.status.listen(settings.pidfile, settings.uid, settings.gid)

    def startService(self) -> None:
        """Start the other workers."""
        super().startService()
        for number in range(1, self.settings.count):
            self.slots[number] = Slot(number)
        self.reactor.callWhenRunning(self._running)

    def stopService(self) -> Deferred[None]:
        """Stop all workers within the grace."""
        super().stopService()
        self._notifier.stopping()
        _log.info("Stopping all workers")
        self._to_replace.clear()
        stopped = self._stopped = Deferred()
        for slot in self.slots.values():
            if slot.pause is not None:
                slot.pause.cancel()
                slot.pause = None
            for worker in slot.workers():
                self._retire(worker)
            slot.worker = slot.replacement = None
        self._check_stopped()
        return stopped

    # Signals

    def reload(self) -> None:
        """Replace each worker by a new one, which loads the application anew."""
        if self._stopped is not None:
            return
        _log.info("Reloading: each worker is replaced by a new one")
        if not self._to_replace and self._replacing is None:
            self._notifier.reloading()
        self._to_replace = set(self.slots)
        cancel_call(self._close_unused)
        self._replace_next()

    def add_worker(self) -> None:
        """Start one more worker."""
        if self._stopped is not None:
            return
        if len(self.slots) >= MOST_WORKERS:
            _log.warn("No worker is added: {count} are the most", count=len(self.slots))
            return
        number = len(self.slots)
        slot = self.slots[number] = Slot(number)
        _log.info("The wanted number of workers is now {count}", count=len(self.slots))
        self._fill(slot)

    def remove_worker(self) -> None:
        """Stop one worker, unless it is the only one."""
        if self._stopped is not None:
            return
        if len(self.slots) == 1:
            _log.warn("The only worker is not stopped")
            return
        slot = self.slots.pop(len(self.slots) - 1)
        _log.info("The wanted number of workers is now {count}", count=len(self.slots))
        if slot.pause is not None:
            slot.pause.cancel()
        self._to_replace.discard(slot.number)
        for worker in slot.workers():
            self._retire(worker)
        if self._replacing is slot:
            self._replacing = None
            self._replace_next()

    def kill_all(self) -> None:
        """Kill all workers."""
        for slot in self.slots.values():
            for worker in slot.workers():
                worker.kill()
        for worker in list(self.retired):
            worker.kill()

    def workers(self) -> list[WorkerProcess]:
        """Return all worker processes, including those that are stopping."""
        serving = [each for slot in self.slots.values() for each in slot.workers()]
        return [*serving, *self.retired]

    # Events

    def ready(self, worker: WorkerProcess) -> None:
        """See :class:`Events`."""
        _log.info(
            "Worker {number} is ready (process {pid})",
            number=worker.number,
            pid=worker.pid,
        )
        self._cancel_limit(worker)
        slot = self.slots.get(worker.number)
        if slot is None or worker not in slot.workers():
            return
        if worker is slot.replacement:
            former, slot.worker, slot.replacement = slot.worker, worker, None
            if former is not None:
                self._retire(former)
        if slot is self._replacing:
            self._replacing = None
            self._replace_next()
        self._lend()

    def ended(self, worker: WorkerProcess) -> None:
        """See :class:`Events`."""
        self._cancel_limit(worker)
        self.status.ended(worker)
        self.listening.ended(worker)
        slot = self.slots.get(worker.number)
        if worker in self.retired:
            self.retired.discard(worker)
            _log.info(
                "Worker {number} has stopped (process {pid})",
                number=worker.number,
                pid=worker.pid,
            )
        else:
            _log.warn(
                "Worker {number} has ended {reason} (process {pid})",
                number=worker.number,
                reason=worker.reason,
                pid=worker.pid,
            )
        if slot is not None and self._stopped is None:
            if worker is slot.replacement:
                slot.replacement = None
                self._replacing = None
                self._reload_failed(worker)
            elif worker is slot.worker:
                slot.worker = None
                self._count_failure(slot, worker)
                if slot.replacement is not None:
                    slot.worker, slot.replacement = slot.replacement, None
                elif slot is self._replacing:
                    self._replacing = None
                    self._reload_failed(worker)
                    self._fill_later(slot)
                elif self.running:
                    self._fill_later(slot)
        self._lend()
        self._check_stopped()

    def message(self, worker: WorkerProcess, message: Message) -> None:
        """See :class:`Events`."""
        handler = self.handlers.get(message["type"])
        if handler is None:
            _log.error(
                "Worker {number} has sent a message of an unknown type: {type!r}",
                number=worker.number,
                type=str(message["type"])[:100],
            )
        else:
            handler(worker, message)

    def listen(
        self, worker: WorkerProcess, request: Message
    ) -> list[tuple[str, socket.socket]]:
        """See :class:`Events`."""
        self.listening.listen(worker, request)
        self._lend(except_for=worker)
        return self.listening.listen(worker, request)

    def release(self, worker: WorkerProcess, request: Message) -> None:
        """See :class:`Events`."""
        self.listening.release(worker, request)
        self._lend()

    # Workers

    def _prepare(self) -> None:
        output = text_output()
        self._text_log = output is not None
        reading, self._lifeline = os.pipe()
        path: str | None = self.settings.folder
        if self.settings.chroot or path == os.getcwd():
            path = None

        def write_log(number: int) -> Callable[[bytes], None]:
            return LineLog(number) if output is None else output

        self._start = Start(
            reactor=self.reactor,
            lifeline=reading,
            inherited=self._passed,
            path=path,
            write_log=write_log,
        )

    def _spawn(self, slot: Slot) -> WorkerProcess:
        settings = self.settings
        slot.restarts += 1
        boot = Boot(
            number=slot.number,
            count=len(self.slots) if self.running else settings.count,
            reactor=settings.reactor,
            path=settings.path,
            folder=None if settings.chroot else settings.folder,
            arguments=[
                *([] if self._text_log else settings.log_arguments),
                *settings.arguments,
            ],
            uid=settings.uid,
            gid=settings.gid,
            euid=settings.euid,
            text_log=self._text_log,
            supervisor=os.getpid(),
            pidfile=settings.pidfile,
            inherited=self._passed_names,
            grace=settings.grace,
        )
        assert self._start is not None
        worker = WorkerProcess(self._start, boot, self)
        _log.info(
            "Worker {number} is starting (process {pid})",
            number=slot.number,
            pid=worker.pid,
        )
        return worker

    def _fill(self, slot: Slot) -> None:
        """Start a worker in a slot that has none."""
        slot.pause = None
        try:
            slot.worker = self._spawn(slot)
        except OSError:
            _log.failure("Worker {number} cannot be started", number=slot.number)
            slot.failures += 1
            if slot is self._replacing:
                self._replacing = None
                self._reload_failed(None)
            self._fill_later(slot)
        else:
            self._limit(slot.worker)

    def _refill(self, slot: Slot) -> None:
        """Start a worker now in a slot without one, or with one that is starting."""
        if slot.pause is not None:
            slot.pause.cancel()
        if slot.worker is not None:
            self._retire(slot.worker)
            slot.worker = None
        self._fill(slot)

    def _fill_later(self, slot: Slot) -> None:
        seconds = pause_before_restart(slot.failures)
        if seconds:
            _log.warn(
                "Worker {number} has failed {failures} times in a row: the next one "
                "is started in {seconds:g} s",
                number=slot.number,
                failures=slot.failures,
                seconds=seconds,
            )
        slot.pause = self.reactor.callLater(seconds, self._fill, slot)

    def _count_failure(self, slot: Slot, worker: WorkerProcess) -> None:
        if worker.ready and self.reactor.seconds() - worker.started >= _LIVED:
            slot.failures = 0
        else:
            slot.failures += 1

    def _limit(self, worker: WorkerProcess) -> None:
        self._start_limits[worker] = self.reactor.callLater(
            self.settings.start_timeout, self._too_slow, worker
        )

    def _too_slow(self, worker: WorkerProcess) -> None:
        _log.error(
            "Worker {number} is not ready after {seconds:g} s: it is killed",
            number=worker.number,
            seconds=self.settings.start_timeout,
        )
        self._start_limits.pop(worker, None)
        worker.kill()

    def _cancel_limit(self, worker: WorkerProcess) -> None:
        limit = self._start_limits.pop(worker, None)
        if limit is not None and limit.active():
            limit.cancel()

    def _retire(self, worker: WorkerProcess) -> None:
        self._cancel_limit(worker)
        self.retired.add(worker)
        if worker.ready:
            worker.stop(self.settings.grace)
        else:
            # It has not accepted a connection yet.
            worker.stopping = True
            worker.kill()
        self._lend()

    def _stops_by_itself(self, worker: WorkerProcess, message: Message) -> None:
        """Start the successor of a worker that stops without having been asked to."""
        slot = self.slots.get(worker.number)
        if worker.stopping or slot is None or worker is not slot.worker:
            return
        if not worker.ready:
            # It has failed to start; ended() reports that.
            return
        _log.info(
            "Worker {number} is stopping by itself (process {pid})",
            number=worker.number,
            pid=worker.pid,
        )
        self._count_failure(slot, worker)
        slot.worker, slot.replacement = slot.replacement, None
        if slot.worker is None:
            self._fill_later(slot)
        self._retire(worker)

    def _check_stopped(self) -> None:
        if self._stopped is None or self.workers():
            return
        stopped, self._stopped = self._stopped, succeed(None)
        if not stopped.called:
            try:
                self._finish()
            finally:
                stopped.callback(None)

    def _finish(self) -> None:
        self.listening.close()
        self.status.close()
        cancel_call(self._close_unused)
        if self._watchdog is not None and self._watchdog.active():
            self._watchdog.cancel()
        for number, handler in self._signals.items():
            signal.signal(number, handler)
        self._signals.clear()

    # Reload

    def _replace_next(self) -> None:
        if self._replacing is not None:
            return
        while self._to_replace:
            slot = self._replacing = self.slots[min(self._to_replace)]
            self._to_replace.discard(slot.number)
            if slot.worker is None or not slot.worker.ready:
                # The slot pauses, or its worker is starting and may have loaded the old
                # code.
                slot.failures = 0
                self._refill(slot)
                return
            try:
                slot.replacement = self._spawn(slot)
            except OSError:
                _log.failure("Worker {number} cannot be started", number=slot.number)
                self._replacing = None
                self._reload_failed(None)
                return
            self._limit(slot.replacement)
            return
        cancel_call(self._close_unused)
        self._close_unused = self.reactor.callLater(
            _UNUSED, self.listening.close_unused
        )
        self._notifier.ready()
        _log.info("The reload is complete")

    def _reload_failed(self, worker: WorkerProcess | None) -> None:
        self._to_replace.clear()
        self._notifier.ready()
        why = "" if worker is None else f": the new worker has ended {worker.reason}"
        _log.error(
            "The reload has failed{why}; the other workers keep running", why=why
        )

    # Sockets

    def _lend(self, except_for: WorkerProcess | None = None) -> None:
        for worker in self.listening.lend():
            if worker is not except_for:
                worker.send({"type": "sockets"})

    # The process

    def _running(self) -> None:
        self._handle_late()
        for slot in self.slots.values():
            if slot.worker is None and slot.pause is None:
                self._fill(slot)
        self._notifier.ready()
        if self._notifier.watchdog is not None:
            self._feed_watchdog(self._notifier.watchdog / 2)

    def _feed_watchdog(self, pause: float) -> None:
        self._notifier.alive()
        self._watchdog = self.reactor.callLater(pause, self._feed_watchdog, pause)

    def _handle_early(self) -> None:
        """Handle signals from now on; until the reactor runs, they wait."""
        # A daemon has left its terminal already.  nohup(1) makes SIGHUP ignored.
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._had_terminal = not nohup and _has_terminal()
        for number, function in (
            (signal.SIGHUP, self._hang_up),
            (signal.SIGTTIN, self.add_worker),
            (signal.SIGTTOU, self.remove_worker),
        ):
            self._handle(number, partial(self._call, function))

    def _handle_late(self) -> None:
        """Handle the signals for which the reactor has installed its own handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            former = signal.getsignal(number)
            self._handle(number, partial(self._end_by_signal, former))

    def _handle(self, number: int, handler: Callable[..., None]) -> None:
        self._signals[number] = signal.signal(number, handler)
        signal.siginterrupt(number, False)

    def _call(self, function: Callable[[], None], number: int, frame: object) -> None:
        self.reactor.callFromThread(function)

    def _end_by_signal(self, former: Any, number: int, frame: object) -> None:
        if not self._asked_to_end and self._stopped is None and callable(former):
            self._asked_to_end = True
            # The handler of the reactor, which stops the reactor and the services.
            former(number, frame)
        else:
            self.reactor.callFromThread(self._end_now)

    def _end_now(self) -> None:
        _log.warn("Second signal: killing all workers")
        self.kill_all()

    def _hang_up(self) -> None:
        if self._had_terminal and not _has_terminal():
            _log.info("The terminal is gone")
            self.reactor.stop()
        else:
            self.reload()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, as in a shell's foreground."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


__all__ = [
    "MOST_WORKERS",
    "Settings",
    "Slot",
    "Supervisor",
    "WorkerStartError",
    "pause_before_restart",
]
