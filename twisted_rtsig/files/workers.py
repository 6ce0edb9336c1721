"""
The threads and the completion port that read and write files for a reactor, and how
much is read without them before the reactor gets a turn.

A job is a function that blocks, together with the operation that it finishes.  It
runs in the reactor's thread pool.  A reactor that has no threads, as
``task.Clock`` in tests, runs it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

from twisted.internet.interfaces import IReactorInThreads

from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.scheduler import Scheduler
from twisted_rtsig.coro.tasks import scheduler_for

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier

T = TypeVar("T")

AT_ONCE: Final = 1 << 18
"""How much is read outside of the threads in one call: some 30 µs of copying."""

# How much is read outside of the threads before the reactor gets a turn, and what
# the smallest read counts.  A nanosecond counts as much as a byte: on a machine that
# has given its memory away, to copy what is cached may take 40 times as long.
_IN_A_TURN = 1 << 19
_LEAST = 1 << 12


class Job(Generic[T]):
    """
    A function that blocks, and who waits for it: the owner of the operation.

    :ivar operation: is finished when the function is.
    :ivar what: what the operation waits for, in words.
    """

    __slots__ = ("_claims", "operation", "what")

    def __init__(self, what: str) -> None:
        self.operation: Operation[T] = Operation()
        self.operation.owner = self
        self.what: str = what
        # Whoever takes it decides whether the function runs: a thread, or the
        # reactor's when it is given up.  The interpreter lets only one have it.
        self._claims: list[None] = []

    def submit(self) -> None:
        """It is handed to a thread."""
        self._claims.append(None)

    def claim(self) -> bool:
        """Whether it was handed to a thread and did not begin before this call."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def end(self, result: Any, error: BaseException | None) -> None:
        """
        In the reactor's thread: the function has returned or raised, whether
        anybody still waits for it or not.
        """
        finish(self.operation, result, error)

    def drop(self) -> None:
        """It was given up in time, and the function does not run."""

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        # They hold each other.
        operation.owner = None
        if self.claim():
            self.drop()

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return self.what


def finish(
    operation: Operation[T], result: Any, error: BaseException | None = None
) -> None:
    """Finish the operation of a job, unless it was cancelled."""
    if operation.called:
        return
    operation.owner = None
    if error is None:
        operation.succeed(result)
    else:
        operation.fail(error)


class Workers:
    """
    The threads of a reactor.

    :ivar port: its completion port, if it has one.
    :ivar left: how much more may be read outside of them in this turn.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._has_threads = IReactorInThreads.providedBy(reactor)
        self.port: CompletionPortNotifier | None = _port_of(reactor)
        self.left: int = _IN_A_TURN
        self._waiting: list[Callable[[], object]] = []
        # What is read outside of threads comes here first, whoever reads it.
        self._memory: memoryview | None = None
        self._window = memoryview(b"")

    def run(self, job: Job[Any], function: Callable[..., Any], *args: Any) -> None:
        """Run the function of a job in a thread."""
        if self._has_threads:
            job.submit()
            self._reactor.callInThread(self._work, job, function, args)
        else:
            job.end(*_outcome(function, args))

    def _work(
        self, job: Job[Any], function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        if job.claim():
            self._reactor.callFromThread(job.end, *_outcome(function, args))

    def call(self, what: str, function: Callable[..., T], *args: Any) -> Operation[T]:
        """
        Run a function in a thread.  One that has begun comes to its end, even if
        the operation is cancelled.
        """
        job: Job[T] = Job(what)
        self.run(job, function, *args)
        return job.operation

    # Outside of threads

    def window(self, size: int) -> memoryview:
        """Where to read that many bytes to, at most ``AT_ONCE``."""
        window = self._window
        if len(window) == size:
            return window
        if self._memory is None:
            self._memory = memoryview(bytearray(AT_ONCE))
        window = self._window = self._memory[:size]
        return window

    def count(self, size: int, nanoseconds: int) -> None:
        """So much was read, and took so long."""
        if self._has_threads:
            self.left -= max(size, nanoseconds, _LEAST)

    def when_there_is_more(self, function: Callable[[], object]) -> None:
        """Nothing is left: call a function when the reactor has had a turn."""
        if not self._waiting:
            self._reactor.callLater(0, self._turn)
        self._waiting.append(function)

    def _turn(self) -> None:
        self.left = _IN_A_TURN
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            # Of too many, the rest waits again.
            function()


def _port_of(reactor: Any) -> CompletionPortNotifier | None:
    if sys.platform == "win32":
        from twisted_rtsig.windows.events import WindowsEventReactor

        if isinstance(reactor, WindowsEventReactor):
            return reactor._port
    return None


def _outcome(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, BaseException | None]:
    try:
        return function(*args), None
    except OSError as error:
        # The traceback would show this package alone, and hold the job by its frames.
        return None, error.with_traceback(None)
    except BaseException as error:
        return None, error


_workers: WeakKeyDictionary[Scheduler, Workers] = WeakKeyDictionary()


def workers_of(reactor: Any | None) -> Workers:
    """Those of a reactor; by default of the one of the task, or the installed one."""
    scheduler = scheduler_for(reactor)
    workers = _workers.get(scheduler)
    if workers is None:
        workers = _workers[scheduler] = Workers(scheduler.reactor)
    return workers
