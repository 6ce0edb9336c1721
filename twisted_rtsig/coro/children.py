"""
Child processes without their streams: signalling them and waiting for them.

``commands.py`` starts them, ``processes.py`` gives them streams, and ``capturing.py``
runs a command and collects its output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, Final

from twisted.internet.error import ProcessExitedAlready
from twisted.python.failure import Failure

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, finished
from twisted_rtsig.coro.scheduler import Scheduler, cancel_call

GRACE: Final = 5.0
"""The seconds between ``SIGTERM`` and ``SIGKILL``, by default."""


class Child:
    """
    A child process that was started, or is about to be started.

    :param signal_group: whether signals go to its process group.
    """

    def __init__(self, scheduler: Scheduler, signal_group: bool) -> None:
        self._scheduler = scheduler
        self._signal_group = signal_group
        self._status: int | None = None
        self._waiters: dict[Operation[int], None] = {}
        self._transport: Any = None
        self._group = 0
        # The delayed call that kills the process, and whether stop() was called.
        self._kill_call: Any = None
        self._stopping = False
        processes.add(self)

    @property
    def pid(self) -> int | None:
        """The identifier of the process; None once it has ended."""
        pid: int | None = self._transport.pid
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit status, as :meth:`wait` returns it; None while the process runs."""
        return self._status

    @must_be_awaited
    def wait(self) -> Operation[int]:
        """
        Wait until the process has exited.  Its output can still be read after that.

        :return: the exit status; the negative number of the signal that has ended the
            process, if one did.
        """
        if self._status is not None:
            return finished(self._status)
        operation: Operation[int] = Operation()
        operation.owner = self
        self._waiters[operation] = None
        return operation

    def send_signal(self, signal: int | str) -> None:
        """
        Send a signal to the process; or to its process group, if it was opened with
        ``signal_group``.

        :param signal: a number, or a name with or without ``SIG``: ``"TERM"``.
        :raises ProcessLookupError: if the process has ended.
        :raises ValueError: if there is no such signal.  Windows has only INT, TERM and
            KILL, each of which terminates the process.
        """
        number = _number_of_signal(signal)
        if self._signal_group and self.pid is not None:
            try:
                os.killpg(self._group, number)
            except (ProcessLookupError, PermissionError):
                # A forked child may not have made its group yet.
                pass
            else:
                return
        try:
            self._transport.signalProcess(number)
        except ProcessExitedAlready:
            raise ProcessLookupError(
                f"signal {signal}: the process has ended already"
            ) from None

    def terminate(self) -> None:
        """
        Ask the process to end, by ``SIGTERM``.  On Windows this is :meth:`kill`.

        :raises ProcessLookupError: if the process has ended.
        """
        self.send_signal("TERM")

    def kill(self) -> None:
        """
        End the process at once, by ``SIGKILL``.

        :raises ProcessLookupError: if the process has ended.
        """
        self.send_signal("KILL")

    def stop(self, grace: float = GRACE) -> Operation[int]:
        """
        Stop the process: terminate it now, and kill it if it has not ended within
        ``grace`` seconds, whether this is awaited or not.  It can be called again with
        less time.

        If the process was opened with ``signal_group``, the other processes of its
        group are killed when the process itself has ended.

        :return: as :meth:`wait`, also if the process has ended already.
        :raises ValueError: if the time is negative.
        """
        check_grace(grace)
        if self._status is None:
            reactor = self._scheduler.reactor
            if not grace:
                self._kill_now()
            elif not self._stopping:
                self.terminate()
                self._kill_call = reactor.callLater(grace, self._kill_now)
            elif (
                self._kill_call is not None
                and self._kill_call.active()
                and self._kill_call.getTime() > reactor.seconds() + grace
            ):
                self._kill_call.reset(grace)
            self._stopping = True
        return self.wait()

    def _kill_now(self) -> None:
        self._cancel_kill_call()
        # The process may have ended without the reactor knowing yet.
        with contextlib.suppress(ProcessLookupError):
            self.kill()

    def _cancel_kill_call(self) -> None:
        call, self._kill_call = self._kill_call, None
        cancel_call(call)

    async def _end(self, grace: float) -> None:
        """
        Stop the process and wait for its end.  If the wait is cancelled, kill the
        process and wait again.
        """
        try:
            await self.stop(grace)
        except ProcessLookupError:
            # Other code of this program has called waitpid(): the status is lost.
            raise
        except BaseException as error:
            if self._status is None:
                self._kill_now()
                # A coroutine that is being closed cannot wait.
                if not isinstance(error, GeneratorExit):
                    await self.wait()
            raise

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self.pid}"

    # Called by the protocol

    def _started(self, transport: Any) -> None:
        self._transport = transport
        # The number of a new group is that of its first process.
        self._group = transport.pid

    def _exited(self, reason: Failure) -> None:
        why: Any = reason.value
        number = getattr(why, "signal", None)
        self._status = -number if number else why.exitCode
        self._cancel_kill_call()
        if self._signal_group and self._stopping:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        waiters, self._waiters = self._waiters, {}
        for operation in waiters:
            # A task that was resumed before may have cancelled this wait.
            if not operation.called:
                operation.succeed(self._status)


processes: Final[Registry[Child]] = Registry()
"""The child processes of all reactors, as long as anything refers to them."""


def check_grace(grace: float) -> None:
    """
    Check a time of grace.

    :raises ValueError: if it is negative.
    """
    if not grace >= 0:
        raise ValueError(f"grace={grace}: 0 seconds is the least")


def _number_of_signal(name: int | str) -> Any:
    """A signal as the transport takes it: a number, or on Windows a name."""
    if isinstance(name, str):
        short = name.removeprefix("SIG")
    else:
        short = next(
            (each.name[3:] for each in signal.Signals if each == name), str(name)
        )
    if sys.platform == "win32":
        if short not in ("INT", "TERM", "KILL"):
            raise ValueError(
                f"signal {name}: Windows can only end a process, by INT, TERM or KILL"
            )
        return short
    if not isinstance(name, str):
        return int(name)
    try:
        return int(signal.Signals[f"SIG{short}"])
    except KeyError:
        raise ValueError(f"signal {name}: there is no such signal") from None
