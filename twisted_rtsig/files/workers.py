"""
The threads and the completion port that read and write files for a reactor, and the
limit of reading without them until the reactor gets a turn.

A job is a blocking function, together with the operation that it finishes.  It runs in
the reactor's thread pool.  A reactor without threads, such as ``task.Clock`` in tests,
runs it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

from twisted.internet.interfaces import IReactorInThreads

from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier

T = TypeVar("T")

AT_ONCE: Final = 1 << 18
"""The most that one call reads outside of the threads: about 30 µs of copying."""

# The most that is read outside of the threads until the reactor gets a turn, and the
# least that a read counts.  A nanosecond counts as much as a byte: on a machine that
# has given its memory away (to the host, for example), to copy cached data may take 40
# times as long.
_IN_A_TURN = 1 << 19
_LEAST = 1 << 12


class Job(Generic[T]):
    """
    A blocking function and the operation that waits for it: the owner of the operation.

    :ivar operation: finished when the function has returned.
    :ivar what: a description of the operation.
    """

    __slots__ = ("_claims", "operation", "what")

    def __init__(self, what: str) -> None:
        self.operation: Operation[T] = Operation()
        self.operation.owner = self
        self.what: str = what
        # Holds one item while the function can still be prevented from running.  The
        # thread pops it to run the function, and the reactor's thread pops it to give
        # the job up.  list.pop is atomic, so only one of them gets it.
        self._claims: list[None] = []

    def submit(self) -> None:
        """Mark the job as submitted to a thread."""
        self._claims.append(None)

    def claim(self) -> bool:
        """Claim the job; return False if it has begun, or was claimed before."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def end(self, result: Any, error: BaseException | None) -> None:
        """
        Called in the reactor's thread when the function has returned or raised, even if
        the operation was cancelled.
        """
        finish(self.operation, result, error)

    def drop(self) -> None:
        """Called when the job was given up before the function began."""

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        # The operation and the job refer to each other.
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

    :ivar port: the completion port of the reactor, if it has one.
    :ivar left: how many more bytes may be read outside of the threads in this turn.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._has_threads = IReactorInThreads.providedBy(reactor)
        self.port: CompletionPortNotifier | None = _port_of(reactor)
        self.left: int = _IN_A_TURN
        self._waiting: list[Callable[[], object]] = []
        # The buffer of all reads outside of threads.
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
        Run a function in a thread.  Once it has begun, it runs to its end, even if the
        operation is cancelled.
        """
        job: Job[T] = Job(what)
        self.run(job, function, *args)
        return job.operation

    # Outside of threads

    def window(self, size: int) -> memoryview:
        """A buffer of that many bytes, at most ``AT_ONCE``."""
        window = self._window
        if len(window) == size:
            return window
        if self._memory is None:
            self._memory = memoryview(bytearray(AT_ONCE))
        window = self._window = self._memory[:size]
        return window

    def count(self, size: int, nanoseconds: int) -> None:
        """Count a read outside of threads: its size and its time."""
        if self._has_threads:
            self.left -= max(size, nanoseconds, _LEAST)

    def when_there_is_more(self, function: Callable[[], object]) -> None:
        """``left`` is used up: call a function after the next turn of the reactor."""
        if not self._waiting:
            self._reactor.callLater(0, self._turn)
        self._waiting.append(function)

    def _turn(self) -> None:
        self.left = _IN_A_TURN
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            # If they use up ``left``, the remaining ones wait again.
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
        # The traceback shows only this package, and its frames refer to the job.
        return None, error.with_traceback(None)
    except BaseException as error:
        return None, error


_workers: WeakKeyDictionary[Scheduler, Workers] = WeakKeyDictionary()


def workers_of(reactor: Any | None) -> Workers:
    """
    The workers of a reactor; by default of the task's reactor, or the installed one.
    """
    scheduler = scheduler_for(reactor)
    workers = _workers.get(scheduler)
    if workers is None:
        workers = _workers[scheduler] = Workers(scheduler.reactor)
    return workers
