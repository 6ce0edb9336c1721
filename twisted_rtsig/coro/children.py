"""
Child processes without their streams: how they are signalled and waited for.

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
from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.coro.scheduler import Scheduler, cancel_call

GRACE: Final = 5.0
"""How many seconds a program has to end after it was asked to, by default."""


class Child:
    """
    A child process that was started, or is about to be.

    :param signal_group: whether signals go to its process group.
    """

    def __init__(self, scheduler: Scheduler, signal_group: bool) -> None:
        self._scheduler = scheduler
        self._signal_group = signal_group
        self._status: int | None = None
        self._waiters: dict[Operation[int], None] = {}
        self._transport: Any = None
        self._group = 0
        # The delayed call that kills it; and whether it was asked to end.
        self._kill_call: Any = None
        self._stopping = False
        processes.add(self)

    @property
    def pid(self) -> int | None:
        """The number of the process; None once it has ended."""
        pid: int | None = self._transport.pid
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit status, as :meth:`wait` returns it; None as long as it runs."""
        return self._status

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
        Send a signal: to its process group, if it was opened with ``signal_group``.

        :param signal: a number, or a name with or without ``SIG``: ``"TERM"``.
        :raises ProcessLookupError: if the process has ended.
        :raises ValueError: if there is no such signal; on Windows for any but INT,
            TERM and KILL, each of which terminates the process.
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
        Ask it to end, by ``SIGTERM``.  On Windows as :meth:`kill`.

        :raises ProcessLookupError: if it has ended.
        """
        self.send_signal("TERM")

    def kill(self) -> None:
        """
        End it at once, by ``SIGKILL``.

        :raises ProcessLookupError: if it has ended.
        """
        self.send_signal("KILL")

    def stop(self, grace: float = GRACE) -> Operation[int]:
        """
        End it: terminate it now, and kill it if it has not ended within ``grace``
        seconds, whether this is awaited or not.  Can be called again, with less time.

        If it was opened with ``signal_group``, then what is left of its process group
        is killed when the process itself has ended.

        :return: as :meth:`wait`, also if it has ended already.
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
        # It may have ended, and the reactor not know yet.
        with contextlib.suppress(ProcessLookupError):
            self.kill()

    def _cancel_kill_call(self) -> None:
        call, self._kill_call = self._kill_call, None
        cancel_call(call)

    async def _end(self, grace: float) -> None:
        """
        Stop it and wait for its end.  If that is cancelled, kill it and wait again.
        """
        try:
            await self.stop(grace)
        except ProcessLookupError:
            # Other code in this process has called waitpid: the status is lost.
            raise
        except BaseException as error:
            if self._status is None:
                self._kill_now()
                # Unless nothing can resume this any more.
                if not isinstance(error, GeneratorExit):
                    await self.wait()
            raise

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self.pid}"

    # From the protocol

    def _started(self, transport: Any) -> None:
        self._transport = transport
        # Of a new group: that of the process.
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
            # One that is resumed may cancel another.
            if not operation.called:
                operation.succeed(self._status)


processes: Final[Registry[Child]] = Registry()
"""Those of all reactors, as long as anything refers to them."""


def check_grace(grace: float) -> None:
    """:raises ValueError: if it is negative."""
    if not grace >= 0:
        raise ValueError(f"grace={grace}: 0 seconds is the least")


def _number_of_signal(name: int | str) -> Any:
    """As the transport takes it: a number, or on Windows a name."""
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
