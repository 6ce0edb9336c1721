"""
A whole program: a reactor, one main function, and an orderly end, also on a signal.

See ``docs/running.md``.
"""

from __future__ import annotations

import _thread
import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRestartable, ReactorNotRunning
from twisted.logger import Logger

from twisted_rtsig.coro import (
    Event,
    Task,
    current_task,
    format_tasks,
    set_debug,
    sleep,
    spawn,
)
from twisted_rtsig.coro.async_generators import closes_generator
from twisted_rtsig.coro.inspection import describe_first, in_words, tasks_of
from twisted_rtsig.coro.scheduler import running
from twisted_rtsig.coro.scopes import timeout
from twisted_rtsig.coro.tracebacks import drop_machinery_above
from twisted_rtsig.installation import ensure_reactor

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")

_log = Logger()

GRACE: Final = 30.0
"""The default time that a program has to end after a signal, in seconds."""

# The signals that ask a program to end, and the method of a reactor with which Twisted
# handles each.  SIGBREAK is Ctrl-Break on Windows.
_SIGNALS: Final[dict[int, str]] = {
    getattr(signal, name): method
    for name, method in (
        ("SIGINT", "sigInt"),
        ("SIGTERM", "sigTerm"),
        ("SIGBREAK", "sigBreak"),
    )
    if hasattr(signal, name)
}

# Signals that reactors handle for their child processes.
_OF_CHILDREN: Final = [
    getattr(signal, name) for name in ("SIGCHLD",) if hasattr(signal, name)
]

# The status of a process that Windows ends for Ctrl-C or Ctrl-Break: it is
# STATUS_CONTROL_C_EXIT, 0xC000013A.
_CONTROL_C_EXIT: Final = 0xC000013A - (1 << 32)

# How long to wait for the last line to be logged, in seconds: the log may be a pipe
# that no process reads.
_TO_LOG: Final = 1.0

# The number of turns of the reactor in which asynchronous generators can begin to end.
_TURNS: Final = 3


def run(
    main: Callable[
        [Unpack[Ts]], Coroutine[Any, Any, T] | Generator[Any, Any, T] | Deferred[T]
    ],
    *args: Unpack[Ts],
    reactor: object = None,
    grace: float | None = GRACE,
    name: str | None = None,
    debug: bool | None = None,
) -> T:
    """
    Install a reactor, run ``main(*args)`` as a task until it ends, and stop the
    reactor.

    SIGINT and SIGTERM (and Ctrl-Break on Windows) cancel the task, once.  A second
    signal ends the process at once.  See docs/running.md for the exit status.

    When ``main`` has ended, the triggers "before", "shutdown" of the reactor run; then
    the tasks that are left are cancelled and waited for; then the reactor stops, and
    waits for its threads.

    :param main: an ``async def`` or generator function, or one that returns a Deferred.
    :param reactor: the reactor to install: a short name (``"rtsig"``,
        ``"rtsig-asyncio"``), a class, or an instance.  By default, that of this package
        for this system.  If it is installed already, it is used.
    :param grace: the time that everything has to end after the first signal, in
        seconds.  Then the tasks and threads that still run are logged, and the process
        ends by the signal.  Without a signal, the time to wait for tasks that are left
        when ``main`` has ended.  None for no limit.
    :param name: the name of the task in logs; by default the name of ``main``.
    :param debug: whether to report forgotten awaits, as
        :func:`twisted_rtsig.coro.set_debug` does; by default as the environment says.
    :return: the result of ``main``.
    :raises BaseException: the error that ``main`` raises; a ``SystemExit`` is the exit
        status.
    :raises KeyboardInterrupt: if SIGINT has cancelled ``main``, or came after its end.
    :raises SystemExit: likewise for SIGTERM; the process then ends by the signal.
    :raises CancelledError: if ``main`` was cancelled without a signal.
    :raises RuntimeError: in another thread than the main one; while a reactor runs; or
        if the reactor was stopped before ``main`` had ended.
    :raises ReactorNotRestartable: if the reactor has run before.
    :raises ReactorAlreadyInstalledError: if another reactor is installed.
    :raises TypeError: if ``main`` cannot be called.
    :raises ValueError: if ``grace`` is less than 0, or no reactor has that name.
    """
    _check(main, grace)
    if debug is not None:
        set_debug(debug)
    program = _Program(ensure_reactor(reactor), grace)
    program.run(main, args, name)
    error = program.error()
    if error is None:
        result: T = program.result()
        return result
    try:
        raise error
    finally:
        # The traceback refers to this frame.
        del error, program, main, args


def _check(main: object, grace: float | None) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "run() works only in the main thread, which gets the signals: in another "
            "one use from_thread(), or reactor.callFromThread()"
        )
    installed = sys.modules.get("twisted.internet.reactor")
    if running.task is not None or getattr(installed, "running", False):
        raise RuntimeError(
            "run() was called while the reactor runs, and it runs a whole program: "
            "await the function, or spawn() it"
        )
    if grace is not None and not grace >= 0:
        raise ValueError(f"grace={grace}: 0 is the least, and None is no limit")
    if not callable(main):
        if inspect.iscoroutine(main):
            # Python would warn that it was never awaited.
            main.close()
        raise TypeError(
            f"run() needs a function and its arguments, and {main!r} is no function: "
            "call run(main), not run(main())"
        )


class _Program:
    """
    One main function on one reactor.

    :param grace: see :func:`run`.
    """

    def __init__(self, reactor: Any, grace: float | None) -> None:
        self._reactor = reactor
        self._grace = grace
        self._task: Task[Any] | None = None
        # Tasks that wait for other tasks.  There may be no other reference to them, if
        # the tasks only wait for each other.
        self._endings: list[Task[Any]] = []
        # The error because of which there is no task.
        self._refusal: BaseException | None = None
        # The first signal, and whether it has cancelled the main task.
        self._signal: int | None = None
        self._delivered = False
        # Whether the reactor was stopped before the main task ended.
        self._stopped_early = False
        # Locked while the reactor runs.
        self._over = threading.Lock()

    def run(self, main: Callable[..., Any], args: tuple[Any, ...], name: Any) -> None:
        """Run the reactor until the program has ended."""
        reactor = self._reactor
        reactor.callWhenRunning(self._start, main, args, name)
        reactor.addSystemEventTrigger("before", "shutdown", self._shut_down)
        self._over.acquire()
        try:
            with self._signals_handled():
                reactor.run()
        except ReactorNotRestartable:
            raise ReactorNotRestartable(
                "run() was called when the reactor had run before, and a reactor runs "
                "only once in a process: call run() once, with one main() that awaits "
                "all that there is to do"
            ) from None
        finally:
            self._over.release()
            if (close_loop := getattr(reactor, "close_own_loop", None)) is not None:
                close_loop()

    def error(self) -> BaseException | None:
        """The error that ``run`` is to raise; None if it returns a result."""
        task = self._task
        if self._refusal is not None:
            return self._refusal
        if task is not None and task.failed:
            return task._see_error()
        if self._signal is not None and (
            task is None or task.cancelled or not task.done or not self._delivered
        ):
            return _error_for(self._signal)
        if task is None or not task.done or (task.cancelled and self._stopped_early):
            return RuntimeError(
                "the reactor was stopped before main had ended: let main return, or "
                "cancel its task, in place of calling reactor.stop()"
            )
        return task._see_error() if task.cancelled else None

    def result(self) -> Any:
        """The result of the main function."""
        assert self._task is not None
        return self._task.result()

    # The main task

    def _start(
        self, main: Callable[..., Any], args: tuple[Any, ...], name: str | None
    ) -> None:
        """Start the main task, when the reactor runs."""
        if self._signal is None:
            try:
                self._task = spawn(main, *args, name=name, reactor=self._reactor)
            except BaseException as error:
                self._refusal = drop_machinery_above(error)
        if self._task is None:
            self._stop()
        else:
            self._task._when_done(self._stop)

    def _stop(self, task: Task[Any] | None = None) -> None:
        """Stop the reactor: the main task has ended, or was not started."""
        # It may be stopping already.
        with contextlib.suppress(ReactorNotRunning):
            self._reactor.stop()

    # Signals

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """
        Handle the signals that ask a program to end, unless they have a handler
        already.  At the end, remove these handlers, and those that the reactor has set.
        """
        reactor = self._reactor
        before = {n: signal.getsignal(n) for n in (*_SIGNALS, *_OF_CHILDREN)}
        # A handler that was not set from Python cannot be set again.
        before = {n: handler for n, handler in before.items() if handler is not None}
        self._handled = [
            number
            for number in _SIGNALS
            if before.get(number) in (signal.SIG_DFL, signal.default_int_handler)
        ]
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        # The handlers that the reactor sets when it starts, in place of existing ones.
        methods = {
            _SIGNALS[number]: self._on_signal if number in self._handled else handler
            for number, handler in before.items()
            if number in _SIGNALS
        }
        vars(reactor).update(methods)
        try:
            for number in self._handled:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for method in methods:
                delattr(reactor, method)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """
        The signal handler, called between any two instructions of the main thread.
        """
        if self._signal is not None:
            return
        self._signal = number
        # A second signal ends the process at once, whatever Python is doing.
        for each in self._handled:
            signal.signal(each, signal.SIG_DFL)
        if self._grace is not None:
            # Not threading.Thread: the main thread may hold one of its locks right now.
            _thread.start_new_thread(self._enforce, (self._grace,))
        self._reactor.callFromThread(self._cancel)

    def _cancel(self) -> None:
        """Cancel the main task after a signal, in a turn of the reactor."""
        assert self._signal is not None
        _log.info(
            "{signal}: the program ends{within}; a second signal ends it at once",
            signal=signal.Signals(self._signal).name,
            within="" if self._grace is None else f" within {self._grace:g} s",
        )
        task = self._task
        if task is not None and not task.done:
            self._delivered = True
            task.cancel()

    def _enforce(self, seconds: float) -> None:
        """
        End the process when the grace is over.

        This runs in a thread, which the main thread cannot block.
        """
        if self._over.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            self._over.release()
            return
        logged = threading.Lock()
        logged.acquire()
        _thread.start_new_thread(self._log_overdue, (seconds, logged))
        logged.acquire(timeout=_TO_LOG)
        assert self._signal is not None
        _die(self._signal)

    def _log_overdue(self, seconds: float, logged: threading.Lock) -> None:
        """Log what still runs when the grace is over."""
        assert self._signal is not None
        try:
            _log.critical(
                "{signal}: the program has not ended within {seconds:g} s, and is "
                "ended now. What still runs:\n{what}",
                signal=signal.Signals(self._signal).name,
                seconds=seconds,
                what="\n".join(_what_runs(self._reactor)),
            )
            for file in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    file.flush()
        finally:
            logged.release()

    # The end

    def _shut_down(self) -> Deferred[Any] | None:
        """
        End the tasks that are left, when the reactor stops.

        This is a trigger of the phase "before", "shutdown", in which services stop and
        may take their time.  The tasks end between this phase and the next one, in
        which all connections are lost at once.
        """
        event = self._reactor._eventTriggers["shutdown"]
        go_on = event._continueFiring

        def end_others(ignored: object) -> None:
            ending = self._spawn_ending(self._cancel_rest)
            ending.addErrback(
                lambda failure: _log.failure("The end of run() has failed", failure)
            )
            if (end_asyncio := getattr(self._reactor, "end_asyncio", None)) is not None:
                # After a signal, the thread enforces the grace.
                limit = self._grace if self._signal is None else None
                ending.addCallback(lambda ignored: end_asyncio(limit))
            ending.addBoth(go_on)

        vars(event)["_continueFiring"] = end_others
        task = self._task
        if task is None or task.done:
            return None
        self._stopped_early = True
        task.cancel()
        return self._spawn_ending(self._wait_for, task)

    def _spawn_ending(self, function: Callable[..., Any], *args: Any) -> Deferred[Any]:
        task = spawn(function, *args, name="the end of run()", reactor=self._reactor)
        self._endings.append(task)
        return task.as_deferred()

    async def _cancel_rest(self) -> None:
        own = current_task()
        try:
            with self._within_grace():
                for _ in range(_TURNS):
                    # Tasks may spawn others when they are cancelled, and these again.
                    while rest := tasks_of(self._reactor) - {own}:
                        for task in rest:
                            if not closes_generator(task):
                                task.cancel()
                        await _all_ended(rest).wait()
                    # Their asynchronous generators end in tasks, which begin later.
                    await sleep(0)
        except TimeoutError:
            self._log_left(tasks_of(self._reactor) - {own})

    async def _wait_for(self, task: Task[Any]) -> None:
        try:
            with self._within_grace():
                await _all_ended({task}).wait()
        except TimeoutError:
            self._log_left({task})

    def _within_grace(self) -> contextlib.AbstractContextManager[object]:
        # After a signal, the thread enforces it.
        return timeout(self._grace if self._signal is None else None)

    def _log_left(self, left: set[Task[Any]]) -> None:
        """Log the tasks that have not ended when the grace is over."""
        _log.critical(
            "{count} tasks were cancelled because the program ends, and have not "
            "ended within {seconds:g} s; they are dropped:\n{tasks}",
            count=len(left),
            seconds=self._grace,
            tasks=describe_first(list(left)),
        )


def _all_ended(tasks: set[Task[Any]]) -> Event:
    """Return an event that happens when all tasks have ended, in any way."""
    all_ended = Event()
    left = len(tasks)

    def ended(task: Task[Any]) -> None:
        nonlocal left
        left -= 1
        if not left:
            all_ended.set()

    for each in tasks:
        each._when_done(ended)
    return all_ended


def _what_runs(reactor: Any) -> Iterator[str]:
    """Describe the tasks, and the threads that keep the process from ending."""
    yield format_tasks(reactor)
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.daemon:
            continue
        lines = [f"    at {line}" for line in in_words(_own_frames(frame))]
        if lines:
            yield f"thread {thread.name}:"
            yield from lines


def _own_frames(innermost: FrameType) -> list[FrameType]:
    """The frames of the user's code in the stack of a thread, outermost first."""
    frames: list[FrameType] = []
    frame: FrameType | None = innermost
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_NOT_OF_THE_USER):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


_NOT_OF_THE_USER: Final = (
    *("twisted.", "twisted_rtsig.", "threading", "queue"),
    *("asyncio.", "selectors", "runpy"),
)


# The exit status


def _error_for(number: int) -> BaseException:
    """The error to raise at the end of a program that a signal has asked to end."""
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    if sys.platform == "win32":
        return SystemExit(_CONTROL_C_EXIT if number != signal.SIGTERM else 128 + number)
    # Python always clears the module ``sys`` at the end; other modules only if none of
    # their functions is in use.
    vars(sys)["twisted_rtsig_death"] = _Death(number)
    return SystemExit(128 + number)


class _Death:
    """
    Ends the process by a signal when the interpreter is finalized, after ``finally``
    blocks, functions of ``atexit`` and the last flush of the standard streams.  So for
    a shell and for systemd it ends like a program that does not handle the signal.
    Python does this itself only for SIGINT.
    """

    def __init__(self, number: int) -> None:
        self._number = int(number)
        self._process = os.getpid()

    # Default arguments, since the globals are gone by then.
    def __del__(self, kill: Any = os.kill, getpid: Any = os.getpid) -> None:
        # A forked child of this process must not be ended by the signal.
        if getpid() == self._process:
            kill(self._process, self._number)


def _die(number: int) -> NoReturn:
    """End the process now, from any thread."""
    if sys.platform != "win32":
        # The first signal has reset the handler.
        os.kill(os.getpid(), number)
        # This is reached only if the program has set another handler since.
        time.sleep(_TO_LOG)
        os._exit(128 + number)
    os._exit(_CONTROL_C_EXIT if number != signal.SIGTERM else 128 + number)


__all__ = ["run"]
