"""
Runs the reactor within a pytest session: until a Deferred fires, a time limit is
reached, or the user presses Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from twisted_rtsig.coro.errors import ChannelClosed, EndOfChannel
from twisted_rtsig.coro.inspection import format_tasks

GRACE: Final = 5.0
"""How many seconds a test or fixture has to end after it was cancelled."""

CURRENT_TEST: Final[ContextVar[object]] = ContextVar("CURRENT_TEST", default=None)
"""
The test whose code is running, or which has started the running task; None in fixtures
of a wider scope, and in functions that the reactor calls.
"""

_SIGNALS: Final = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK")
    if hasattr(signal, name)
]


class Timeout(pytest.fail.Exception):  # type: ignore[misc, name-defined]
    """A test or fixture took longer than its limit."""


class ReactorRunner:
    """
    Runs the installed reactor for one session.

    :ivar interrupted: whether the session was interrupted, and now only cleans up.
    """

    def __init__(self, config: pytest.Config) -> None:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self.interrupted = False
        self._plugins = config.pluginmanager
        # The list that gets the result of the current run; None between two runs.
        self._awaited: list[Any] | None = None
        self._late = False
        self._signalled = False
        self._original_stop = reactor.stop
        self._replace_stop()

    def close(self) -> None:
        """Restore the reactor's own ``stop``."""
        vars(self.reactor).pop("stop", None)

    def wait_for(
        self,
        deferred: Deferred[Any],
        cancel: Callable[[], object],
        name: str,
        limit: float | None = None,
        left: float | None = None,
    ) -> Any:
        """
        Run the reactor until ``deferred`` has fired, and return its result.

        If that takes too long, or the reactor is stopped first, call ``cancel``, and
        wait at most :data:`GRACE` seconds for the result.

        :param cancel: cancels the operation that ``deferred`` waits for.
        :param name: the name of the operation, for the error.
        :param limit: how many seconds the operation may take.
        :param left: how many of these seconds are left; by default all.
        :raises KeyboardInterrupt: at the first Ctrl-C of the session, and if something
            stops the reactor.
        :raises Timeout: if it took longer than ``limit``.
        :raises pytest.fail.Exception: if it was interrupted by another Ctrl-C.
        """
        results: list[Any] = []
        deferred.addBoth(results.append)
        deferred.addBoth(lambda _: self._crash(results))
        if self._run(results, limit if left is None else left):
            if self.interrupted:
                cancel()
                raise pytest.fail.Exception("interrupted again", pytrace=False)
            self.interrupt(name)
            outcome = self._end(results, cancel, name)
            if outcome:
                self.show(name, f"It was interrupted{outcome}.")
            raise KeyboardInterrupt
        if not results:
            tasks = format_tasks(self.reactor)
            outcome = self._end(results, cancel, name)
            raise Timeout(
                f"Timeout: {name} took more than {limit:g} s{outcome}. "
                f"The tasks at that time:\n{tasks}",
                pytrace=False,
            )
        if isinstance(results[0], Failure):
            results[0].raiseException()
        return results[0]

    def wait_at_most(
        self, seconds: float, deferred: Deferred[Any] | None = None
    ) -> None:
        """
        Run the reactor for some seconds, or until ``deferred`` has fired.

        :param seconds: the longest time to run.
        :raises KeyboardInterrupt: at the first Ctrl-C of the session; a later one only
            ends this run.
        """
        results: list[Any] = []
        if deferred is not None:
            deferred.addBoth(results.append)
            deferred.addBoth(lambda _: self._crash(results))
        if self._run(results, seconds) and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt

    def interrupt(self, name: str) -> None:
        """Handle Ctrl-C while ``name`` is running: show all tasks."""
        self.interrupted = True
        self.show(f"{name} was interrupted", format_tasks(self.reactor))

    def show(self, title: str, text: str) -> None:
        """Write to the terminal, even while pytest captures the output."""
        capture = self._plugins.getplugin("capturemanager")
        terminal = self._plugins.getplugin("terminalreporter")
        with contextlib.ExitStack() as stack:
            if capture is not None:
                stack.enter_context(capture.global_and_fixture_disabled())
            if terminal is None:
                # In a worker of pytest-xdist.
                print(f"{title}:\n{text}", file=sys.stderr, flush=True)
            else:
                terminal.ensure_newline()
                terminal.section(title)
                terminal.write_line(text)

    def _end(self, results: list[Any], cancel: Callable[[], object], name: str) -> str:
        """Cancel an operation, wait for its end, and describe an unusual end."""
        cancel()
        self._run(results, GRACE)
        if not results:
            return ", and did not end when it was cancelled"
        [result] = results
        # A fixture closes its channel when it ends, which is the usual end.
        if isinstance(result, Failure) and not result.check(
            CancelledError, ChannelClosed, EndOfChannel
        ):
            return f", and when it was cancelled it raised {result.value!r}"
        return ""

    def _run(self, results: list[Any], limit: float | None) -> bool:
        """
        Run the reactor until ``results`` has an item, or for ``limit`` seconds.

        :return: whether the reactor was stopped before that.
        """
        if results:
            return False
        self._awaited = results
        self._late = self._signalled = False
        # trial's test cases replace ``stop`` by their own function and then delete it.
        self._replace_stop()
        token = CURRENT_TEST.set(None)
        call = limit and self.reactor.callLater(limit, self._give_up)
        try:
            with self._signals():
                self.reactor.run()
        finally:
            CURRENT_TEST.reset(token)
            self._awaited = None
            if call and call.active():
                call.cancel()
        return self._signalled or not (results or self._late)

    def _crash(self, results: list[Any]) -> None:
        """End the run that waits for ``results``, unless it has ended already."""
        if self._awaited is results:
            self.reactor.crash()

    def _give_up(self) -> None:
        self._late = True
        self.reactor.crash()

    def _replace_stop(self) -> None:
        # After its own stop(), a reactor cannot run again.
        vars(self.reactor)["stop"] = self._stop

    def _stop(self) -> None:
        """Replaces ``reactor.stop`` during the session."""
        if self._awaited is None:
            # This raises ReactorNotRunning.
            self._original_stop()
        else:
            self.reactor.crash()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """
        Make Ctrl-C end the run.

        Twisted never removes its signal handlers.  After the run they would keep Ctrl-C
        from interrupting a test that does not use the reactor.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ctrl_c)
        try:
            yield
        finally:
            for number, handler in before.items():
                # None stands for a handler that was not installed by Python.
                if handler is not None:
                    signal.signal(number, handler)

    def _ctrl_c(self, number: int, frame: object) -> None:
        if self._signalled:
            # Since the first Ctrl-C, the running code has not returned to the reactor.
            raise KeyboardInterrupt
        self._signalled = True
        self.reactor.callFromThread(self._crash, self._awaited)
