"""
A pytest plugin that runs tests on a reactor, chosen by its short name.

Choose it by ``pytest --twisted-reactor=rtsig``, or in the configuration of pytest::

    [tool.pytest.ini_options]
    twisted_reactor = "rtsig"

Then tests and fixtures may be ``async def``, and tests may return a Deferred.  A test
that leaves something behind in the reactor fails.  A forgotten ``await`` causes a
warning, unless ``TWISTED_RTSIG_DEBUG=0`` is in the environment.  Without the name of a
reactor, the plugin does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from typing import Any, Final, ParamSpec, TypeVar

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorAlreadyInstalledError

from twisted_rtsig.coro.channels import Channel
from twisted_rtsig.coro.errors import Cancelled, ChannelClosed, EndOfChannel
from twisted_rtsig.coro.forgotten import set_debug, wanted_by_environment
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.installation import installer_named
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.pytest_janitor import ALLOW_UNCLEAN, OTHER_PLUGINS, Janitor
from twisted_rtsig.pytest_reactor import GRACE, ReactorRunner, Timeout

_TIMEOUT: Final = "twisted_timeout"

# Returns how many seconds are left; None for no limit.
_Limit = Callable[[], float | None]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
P = ParamSpec("P")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    group = parser.getgroup("twisted-rtsig")
    for name, metavar, what in (
        (
            "reactor",
            "NAME",
            "the reactor to run the tests on, as twistd --help-reactors lists them",
        ),
        (
            "timeout",
            "SECONDS",
            "how long a test may take, and the set-up and the tear-down of each of its "
            "fixtures; 0 is no limit",
        ),
    ):
        group.addoption(f"--twisted-{name}", metavar=metavar, help=what)
        parser.addini(f"twisted_{name}", what, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, even if no reactor was chosen."""
    for mark in (
        f"{ALLOW_UNCLEAN}: the test may leave tasks, delayed calls, connections and "
        "logged failures behind",
        f"{_TIMEOUT}(seconds): how long the test may take; 0 is no limit",
    ):
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install the reactor before the user's code imports one."""
    name = early_config.known_args_namespace.twisted_reactor
    name = name or early_config.getini("twisted_reactor")
    if name:
        limit = early_config.known_args_namespace.twisted_timeout
        limit = _seconds(limit or early_config.getini("twisted_timeout") or 0)
        _install(name)
        if wanted_by_environment(default=True):
            set_debug(True)
        runner = ReactorRunner(early_config)
        janitor = Janitor(runner)
        plugins = early_config.pluginmanager
        plugins.register(_Plugin(name, limit, runner, janitor), "twisted_rtsig.runner")
        plugins.register(janitor, "twisted_rtsig.janitor")


def _seconds(text: Any) -> float | None:
    """Return a limit in seconds; None for no limit."""
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise pytest.UsageError(f"a timeout is a number of seconds, not {text!r}")
    return seconds or None


def _install(name: str) -> None:
    before = sys.modules.get("twisted.internet.reactor")
    try:
        installer = installer_named(name)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    try:
        installer.install()
    except ReactorAlreadyInstalledError:
        reactor = sys.modules["twisted.internet.reactor"]
        why = (
            "something has imported twisted.internet.reactor before the tests; see "
            "the plugins that -p and PYTEST_PLUGINS name"
            if before is reactor
            else "one of Twisted's plugins imports twisted.internet.reactor, and to "
            "list the reactors has imported that plugin; run twistd --help once, as a "
            "user with write access to its folder, so that Twisted caches the list"
        )
        raise pytest.UsageError(
            f"the reactor cannot be {name!r}, as {type(reactor).__name__} is "
            f"installed already: {why}"
        ) from None
    except (ImportError, UnsupportedReactorError) as error:
        raise pytest.UsageError(f"the reactor cannot be {name!r}: {error}") from error


class _Plugin:
    """The part of the plugin that runs if a reactor was chosen."""

    def __init__(
        self, name: str, limit: float | None, runner: ReactorRunner, janitor: Janitor
    ) -> None:
        self._name = name
        self._limit = limit
        # The limit of the running test.
        self._limit_now: float | None = None
        self._runner = runner
        self._janitor = janitor
        # Whether pytest was interrupted, and tears down the remaining fixtures.
        self._ending = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_report_header(self) -> str:
        limit = "" if self._limit is None else f", {self._limit:g} s for each test"
        return f"reactor: {self._name} ({type(self._runner.reactor).__name__}){limit}"

    # pytest_pyfunc_call and pytest_fixture_setup replace the function by a synchronous
    # one and return None, so that pytest goes on and calls the replacement.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._limit_now = self._limit_of(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        if any(pyfuncitem.get_closest_marker(other) for other in OTHER_PLUGINS):
            return
        limit = self._from_now_on()
        # A test of hypothesis calls inner_test for each example.
        given = getattr(pyfuncitem.obj, "hypothesis", None)
        if given is None:
            pyfuncitem.obj = self._synchronous(pyfuncitem.obj, limit)
        elif inspect.iscoroutinefunction(given.inner_test):
            given.inner_test = _last_if_late(self._synchronous(given.inner_test, limit))
            pyfuncitem.obj = _failing_if_late(pyfuncitem.obj)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        function = fixturedef.func
        # The limit is per test, so it does not apply to a fixture of a wider scope.  A
        # fixture is wrapped only once, for all tests.
        narrow = fixturedef.scope == "function"

        def limit() -> float | None:
            return self._limit_now if narrow else None

        replacement: Callable[..., Any]
        if inspect.iscoroutinefunction(function):
            replacement = self._synchronous(_plain(function), limit)
        elif inspect.isasyncgenfunction(function):
            replacement = self._synchronous_generator(_plain(function), limit)
        else:
            return
        if inspect.ismethod(function):
            # pytest binds the method to the instance of the test class.
            replacement = types.MethodType(replacement, function.__self__)
        vars(fixturedef)["func"] = replacement

    def pytest_keyboard_interrupt(
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> None:
        """Ctrl-C may have come while the reactor did not run."""
        if isinstance(excinfo.value, KeyboardInterrupt):
            self._ending = True
            if not self._runner.interrupted:
                self._runner.interrupt("the session")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Shut the reactor down: Python would wait for its threads at exit."""
        reactor = self._runner.reactor
        shut_down: Deferred[None] = Deferred()
        reactor.addSystemEventTrigger("after", "shutdown", shut_down.callback, None)
        name = "the shutdown of the reactor"
        with self._tearing_down(name):
            self._janitor.cancel_all()
            reactor.fireSystemEvent("shutdown")
            self._wait_for(None, shut_down, shut_down.cancel, name)

    def pytest_unconfigure(self) -> None:
        self._runner.close()

    def _limit_of(self, item: pytest.Item) -> float | None:
        mark = item.get_closest_marker(_TIMEOUT)
        if mark is None:
            return self._limit
        if len(mark.args) != 1 or mark.kwargs:
            raise pytest.UsageError(f"the mark {_TIMEOUT} takes a number of seconds")
        return _seconds(mark.args[0])

    def _from_now_on(self) -> _Limit:
        """Return the limit of the running test; hypothesis examples share it."""
        limit, seconds = self._limit_now, self._runner.reactor.seconds
        began = seconds()
        return lambda: limit and max(began + limit - seconds(), 0.001)

    def _wait_for(
        self,
        limit: _Limit | None,
        deferred: Deferred[Any],
        cancel: Callable[[], object],
        name: str,
    ) -> Any:
        # After Ctrl-C nothing may block for ever.
        if self._runner.interrupted:
            return self._runner.wait_for(deferred, cancel, name, GRACE)
        left = limit and limit()
        whole = left and self._limit_now
        return self._runner.wait_for(deferred, cancel, name, whole, left)

    def _wait_for_task(self, task: Task[Any], limit: _Limit) -> Any:
        return self._wait_for(limit, task.as_deferred(), task.cancel, task.name)

    @contextlib.contextmanager
    def _tearing_down(self, name: str) -> Iterator[None]:
        """Report an error of a tear-down, so that the other tear-downs still run."""
        try:
            yield
        except (GeneratorExit, ChannelClosed, EndOfChannel):
            raise
        except BaseException as error:
            if self._ending:
                # Raised now, it would end pytest with a traceback of pytest's own code.
                self._runner.show(name, f"After the interruption it failed: {error!r}")
            elif isinstance(error, KeyboardInterrupt):
                # A KeyboardInterrupt would keep pytest from tearing down the other
                # fixtures of the test.
                self._session.shouldstop = "Ctrl-C"
                message = f"{name} was interrupted"
                raise pytest.fail.Exception(message, pytrace=False) from None
            else:
                raise

    def _synchronous(
        self, function: Callable[..., Any], limit: _Limit
    ) -> Callable[..., Any]:
        """Wrap a function: run its coroutine or Deferred to the end, then return."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            name = function.__qualname__
            if inspect.iscoroutine(result):
                return self._wait_for_task(spawn(result, name=name), limit)
            if isinstance(result, Deferred):
                # The result is dropped: pytest warns of a test that returns something.
                self._wait_for(limit, result, result.cancel, name)
                return None
            return result

        return call

    def _synchronous_generator(
        self,
        function: Callable[..., AsyncGenerator[Any, None]],
        limit: _Limit,
    ) -> Callable[..., Generator[Any, None, None]]:
        """
        Wrap an asynchronous generator as an ordinary one.  All of it runs in one task,
        so that it can yield within a task group.
        """

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Generator[Any, None, None]:
            turns: Channel[Any] = Channel(0)
            name = function.__qualname__

            async def go_through() -> None:
                fixture = function(*args, **kwargs)
                with contextlib.closing(turns):
                    async for value in fixture:
                        try:
                            await turns.send(value)
                            await turns.receive()
                        except Cancelled as cancelled:
                            # For example, a task group around the yield has failed.
                            with contextlib.suppress(StopAsyncIteration):
                                await fixture.athrow(cancelled)

            task = spawn(go_through, name=name)

            def next_value() -> Any:
                turn = spawn(turns.receive, name=name).as_deferred()
                return self._wait_for(limit, turn, task.cancel, name)

            with contextlib.suppress(ChannelClosed, EndOfChannel):
                yield next_value()
                with self._tearing_down(name):
                    go_on = spawn(turns.send, None, name=name).as_deferred()
                    self._wait_for(limit, go_on, task.cancel, name)
                    # A second value: pytest reports that the fixture yields twice.
                    yield next_value()
            with self._tearing_down(name):
                self._wait_for_task(task, limit)

        return call


class _Late(BaseException):
    """
    A hypothesis example has reached the time limit.

    This is not an ``Exception`` or ``pytest.fail.Exception``: after these, hypothesis
    searches for a smaller example, for far longer than the limit.
    """

    def __init__(self, timeout: Timeout) -> None:
        self.timeout = timeout


def _last_if_late(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap the function for one example: after a timeout, no further example runs."""

    def name_example(timeout: Timeout, values: Mapping[str, Any]) -> _Late:
        example = ", ".join(f"{name}={value!r}" for name, value in values.items())
        timeout.msg = f"{timeout.msg}\nThe example: {example}"
        return _Late(timeout)

    return _raising_in_place_of(Timeout, name_example, function)


def _failing_if_late(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap the test function: the timeout of an example fails the test."""
    return _raising_in_place_of(_Late, lambda late, _: late.timeout, function)


def _raising_in_place_of(
    kind: type[E],
    other: Callable[[E, Mapping[str, Any]], BaseException],
    function: Callable[P, T],
) -> Callable[P, T]:
    """Replace an error of a function; ``other`` gets it, and the keyword arguments."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except kind as error:
            raise other(error, kwargs) from None

    return call


def _plain(function: Any) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(function, "__func__", function)
    return plain
