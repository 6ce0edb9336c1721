"""
Fails each test that leaves something behind in the reactor or logs a failure, as trial
does, and cleans up after it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Final, cast
from weakref import WeakSet

import pytest
from twisted.internet.base import DelayedCall
from twisted.internet.defer import DeferredList
from twisted.internet.main import CONNECTION_LOST
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python import log
from twisted.python.failure import Failure

from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.pytest_reactor import CURRENT_TEST, GRACE, ReactorRunner

ALLOW_UNCLEAN: Final = "twisted_allow_unclean"
"""The mark of a test that may leave something behind."""

OTHER_PLUGINS: Final = ("anyio", "asyncio", "trio")
"""The marks of tests that other plugins run."""

# The pauses between checks, in seconds.  Connections need some passes of the reactor to
# end, and tasks need some more to notice.
_LOOKS: Final = [0.001 * 2**n for n in range(8)]

# The methods of a reactor that register something.
_METHODS: Final = ("callLater", "addReader", "addWriter")


class Janitor:
    """
    A plugin that finds what a test has left behind.

    It records what existed before a test, and what the test's own code has made, which
    it tells by the context (:data:`CURRENT_TEST`) in which that code runs.  Other new
    objects were made by a function that the reactor has called.  They count as the
    test's only if nothing existed that belongs to another test or to a fixture of a
    wider scope, and could have made them.
    """

    def __init__(self, runner: ReactorRunner) -> None:
        self._runner = runner
        self._reactor = runner.reactor
        # All active tasks on the reactor, strongly referenced: whether a task without
        # another reference counts must not depend on the garbage collector.
        self._tasks: dict[Task[Any], None] = {}
        self._observer = cast(ILogObserver, self._observe)
        # The running test, unless it may leave something behind.
        self._test: pytest.Item | None = None
        self._passed = False
        self._failures: list[Failure] = []
        # What the test's own code has made; and what others have made, by id.
        self._own: WeakSet[Any] = WeakSet()
        self._others: dict[int, Any] = {}

    # The session

    def pytest_configure(self) -> None:
        """Start recording tasks, and what is registered with the reactor."""
        globalLogPublisher.addObserver(self._observer)
        for name in _METHODS:
            method = getattr(self._reactor, name, None)
            if method is not None:
                vars(self._reactor)[name] = self._recording(method)
        self._make_task = made = Task.__init__

        def __init__(task: Task[Any], *args: Any, **kwargs: Any) -> None:
            made(task, *args, **kwargs)
            if task.reactor is self._reactor:
                self._tasks[task] = None
                task._when_done(self._tasks.__delitem__)
                self._record(task)

        Task.__init__ = __init__  # type: ignore[method-assign, assignment]

    def pytest_unconfigure(self) -> None:
        """Stop recording."""
        globalLogPublisher.removeObserver(self._observer)
        for name in _METHODS:
            vars(self._reactor).pop(name, None)
        Task.__init__ = self._make_task  # type: ignore[method-assign]

    def cancel(self, tasks: list[Task[Any]]) -> None:
        """Cancel tasks, and give them some seconds to end."""
        # Errors that they raise now are ignored.
        ends = DeferredList([each.as_deferred() for each in tasks], consumeErrors=True)
        for each in tasks:
            each.cancel("the test has ended")
        self._runner.wait_at_most(GRACE, ends)

    def cancel_all(self) -> None:
        """Cancel all tasks that are left."""
        self.cancel(list(self._tasks))

    # A test

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Record what exists before the test."""
        self._failures.clear()
        self._own.clear()
        self._others.clear()
        self._passed = False
        # trial's test cases check all this themselves.
        by_trial = hasattr(getattr(item, "cls", None), "flushLoggedErrors")
        allowed = by_trial or any(
            map(item.get_closest_marker, (ALLOW_UNCLEAN, *OTHER_PLUGINS))
        )
        self._test = None if allowed else item
        CURRENT_TEST.set(self._test)
        self._acquit()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Iterator[None]:
        """Record what a fixture of a wider scope makes, which is not the test's."""
        if fixturedef.scope == "function":
            yield
            return
        token = CURRENT_TEST.set(None)
        yield
        CURRENT_TEST.reset(token)
        if self._test is not None:
            self._acquit()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record whether the test has passed."""
        if report.when == "call":
            self._passed = report.passed

    @pytest.hookimpl(hookwrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        """
        When the fixtures are torn down, find what is left and remove it.  If a fixture
        fails, that alone is reported.
        """
        outcome: Any = yield
        CURRENT_TEST.set(None)
        failed = outcome.excinfo is not None
        interrupted = failed and issubclass(
            outcome.excinfo[0], (KeyboardInterrupt, SystemExit, pytest.exit.Exception)
        )
        if self._test is None or interrupted:
            return
        complaints = self._clean_up()
        self._test = None
        if complaints and not failed:
            outcome.force_exception(
                pytest.fail.Exception("\n".join(complaints), pytrace=False)
            )

    def _clean_up(self) -> list[str]:
        """Remove what is left, and return the lines that report it."""
        # Log unhandled failures without a reference now, and not during a later test.
        gc.collect(1)
        left = self._settle()
        # A test that has failed could not clean up, and its failure is reported.
        complaints = [
            f"It left behind {_in_words(each)}" for each in left if self._passed
        ]
        failures = list(self._failures)
        self._remove(left)
        complaints += [
            f"It logged a failure:\n{each.getTraceback()}" for each in failures
        ]
        if not complaints:
            return []
        return ["The test was not clean.", *complaints, _advice(bool(failures))]

    @pytest.fixture
    def flush_logged_errors(self) -> Callable[..., list[Failure]]:
        """
        Return a function like trial's ``flushLoggedErrors``.  It returns the failures
        that were logged since the test began, and forgets them.  Given types of
        exceptions, it returns and forgets only failures of these types.
        """

        def flush(*types: type[BaseException]) -> list[Failure]:
            flushed = [
                each for each in self._failures if not types or each.check(*types)
            ]
            self._failures[:] = [each for each in self._failures if each not in flushed]
            return flushed

        return flush

    # What exists

    def _observe(self, event: LogEvent) -> None:
        failure = event.get("log_failure")
        if failure is not None:
            self._failures.append(failure)

    def _recording(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            # callLater returns a delayed call; the others register their argument.
            self._record(args[0] if result is None else result)
            return result

        return call

    def _record(self, thing: Any) -> None:
        test = CURRENT_TEST.get()
        if test is not None and test is self._test:
            # Some objects do not support weak references.
            with contextlib.suppress(TypeError):
                self._own.add(thing)

    def _everything(self) -> Iterator[Any]:
        """Yield tasks, delayed calls, sockets and pipes, but not the reactor's own."""
        reactor = self._reactor
        yield from self._tasks
        yield from reactor.getDelayedCalls()
        if hasattr(reactor, "getReaders"):
            selectables = dict.fromkeys([*reactor.getReaders(), *reactor.getWriters()])
            internal = getattr(reactor, "_internalReaders", ())
            yield from (each for each in selectables if each not in internal)

    def _acquit(self) -> None:
        """Record that the running test has not made what exists now."""
        self._others.update((id(each), each) for each in self._everything())

    def _left(self) -> list[Any]:
        """Return what the test has made and left."""
        new = [each for each in self._everything() if id(each) not in self._others]
        return [each for each in new if not self._others or each in self._own]

    # The end

    def _settle(self) -> list[Any]:
        """Return what is left after the reactor has run some passes to end it."""
        left = self._left()
        for seconds in _LOOKS:
            if not left:
                break
            self._runner.wait_at_most(seconds)
            left = self._left()
        return left

    def _remove(self, left: list[Any]) -> None:
        self.cancel([each for each in left if isinstance(each, Task)])
        for each in left:
            if isinstance(each, Task):
                continue
            if isinstance(each, DelayedCall):
                if each.active():
                    each.cancel()
                continue
            self._reactor.removeReader(each)
            self._reactor.removeWriter(each)
            log.callWithLogger(each, each.connectionLost, Failure(CONNECTION_LOST))


def _in_words(left: Any) -> str:
    if isinstance(left, Task):
        return f"the task {left.name}, which waits for {left.waits_for()}"
    return str(left)


def _advice(logged: bool) -> str:
    flush = ", take expected failures with the fixture flush_logged_errors" * logged
    return f"End it in the test or in a fixture{flush}, or mark it {ALLOW_UNCLEAN}."
