"""
A pytest plugin: run the tests on any reactor that is installed, by its short name.

As ``pytest --twisted-reactor=rtsig``, or in the configuration of pytest::

    [tool.pytest.ini_options]
    twisted_reactor = "rtsig"

Then tests and fixtures may be ``async def``, and tests may return a Deferred.  A test
that leaves something behind in the reactor fails.  Awaits that were forgotten are
warned of, unless ``TWISTED_RTSIG_DEBUG=0`` is in the environment.  Without a name the
plugin does nothing at all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, Final, ParamSpec, TypeVar

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorAlreadyInstalledError

from twisted_rtsig.coro.channels import Channel
from twisted_rtsig.coro.errors import Cancelled, ChannelClosed, EndOfChannel
from twisted_rtsig.coro.forgotten import set_debug, wanted_by_environment
from twisted_rtsig.coro.tasks import Task, spawn
from twisted_rtsig.installation import installer_named
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.pytest_janitor import ALLOW_UNCLEAN, OTHER_PLUGINS, Janitor
from twisted_rtsig.pytest_reactor import GRACE, ReactorRunner, Timeout

_TIMEOUT: Final = "twisted_timeout"

# Returns the seconds that are left for something; None for no limit.
_Limit = Callable[[], float | None]

T = TypeVar("T")
P = ParamSpec("P")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Beside the other options of pytest."""
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
    """Whether a reactor was chosen or not, tests may be marked."""
    for mark in (
        f"{ALLOW_UNCLEAN}: the test may leave tasks, delayed calls, connections and "
        "logged failures behind",
        f"{_TIMEOUT}(seconds): how long the test may take; 0 is no limit",
    ):
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install the reactor before anything of the user's imports one."""
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
    """A limit; None for none."""
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
            "user who may write into its folder, so that Twisted keeps a list"
        )
        raise pytest.UsageError(
            f"the reactor cannot be {name!r}, since {type(reactor).__name__} is "
            f"installed already: {why}"
        ) from None
    except (ImportError, UnsupportedReactorError) as error:
        raise pytest.UsageError(f"the reactor cannot be {name!r}: {error}") from error


class _Plugin:
    """The part that is there once a reactor was chosen."""

    def __init__(
        self, name: str, limit: float | None, runner: ReactorRunner, janitor: Janitor
    ) -> None:
        self._name = name
        self._limit = limit
        # That of the test under way.
        self._limit_now: float | None = None
        self._runner = runner
        self._janitor = janitor
        # Whether pytest was interrupted, and tears down what is left.
        self._ending = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_report_header(self) -> str:
        limit = "" if self._limit is None else f", {self._limit:g} s for each test"
        return f"reactor: {self._name} ({type(self._runner.reactor).__name__}){limit}"

    # Both below put something else in its place and return None, so that pytest goes
    # on with that.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._limit_now = self._limit_of(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        if any(pyfuncitem.get_closest_marker(other) for other in OTHER_PLUGINS):
            return
        limit = self._from_now_on()
        # What hypothesis calls for each example.
        given = getattr(pyfuncitem.obj, "hypothesis", None)
        if given is None:
            pyfuncitem.obj = self._synchronous(pyfuncitem.obj, limit)
        elif inspect.iscoroutinefunction(given.inner_test):
            given.inner_test = _last_if_late(self._synchronous(given.inner_test, limit))
            pyfuncitem.obj = _failing_if_late(pyfuncitem.obj)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        function = fixturedef.func
        # The time of a fixture of a wider scope is not that of one test.
        # A fixture is wrapped once, for all tests.
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
            # Which pytest binds to the object of the test.
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
        """End its threads, for which Python would wait, and whatever else it has."""
        reactor = self._runner.reactor
        shut_down: Deferred[None] = Deferred()
        reactor.addSystemEventTrigger("after", "shutdown", shut_down.callback, None)
        name = "the shutdown of the reactor"
        with self._tearing_down(name):
            self._janitor.cancel_all()
            reactor.fireSystemEvent("shutdown")
            self._wait_for(shut_down, shut_down.cancel, name)

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
        """The limit of the test under way, for all examples of hypothesis together."""
        limit, seconds = self._limit_now, self._runner.reactor.seconds
        began = seconds()
        return lambda: limit and max(began + limit - seconds(), 0.001)

    def _wait_for(
        self,
        deferred: Deferred[Any],
        cancel: Callable[[], object],
        name: str,
        limit: _Limit | None = None,
    ) -> Any:
        # Once the user has pressed Ctrl-C, nothing may take for ever.
        if self._runner.interrupted:
            return self._runner.wait_for(deferred, cancel, name, GRACE)
        left = limit and limit()
        whole = left and self._limit_now
        return self._runner.wait_for(deferred, cancel, name, whole, left)

    def _wait_for_task(self, task: Task[Any], limit: _Limit) -> Any:
        return self._wait_for(task.as_deferred(), task.cancel, task.name, limit)

    @contextlib.contextmanager
    def _tearing_down(self, name: str) -> Iterator[None]:
        """Whatever happens there, the rest is to be torn down as well."""
        try:
            yield
        except (GeneratorExit, ChannelClosed, EndOfChannel):
            raise
        except BaseException as error:
            if self._ending:
                # pytest would end with a stack.
                self._runner.show(name, f"After the interruption it failed: {error!r}")
            elif isinstance(error, KeyboardInterrupt):
                # This very error would keep pytest from the other fixtures of the test.
                self._session.shouldstop = "Ctrl-C"
                message = f"{name} was interrupted"
                raise pytest.fail.Exception(message, pytrace=False) from None
            else:
                raise

    def _synchronous(
        self, function: Callable[..., Any], limit: _Limit
    ) -> Callable[..., Any]:
        """The same, but it returns when it has ended."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            name = function.__qualname__
            if inspect.iscoroutine(result):
                return self._wait_for_task(spawn(result, name=name), limit)
            if isinstance(result, Deferred):
                # Of what is in it, pytest would say that a test should return nothing.
                self._wait_for(result, result.cancel, name, limit)
                return None
            return result

        return call

    def _synchronous_generator(
        self,
        function: Callable[..., AsyncGenerator[Any, None]],
        limit: _Limit,
    ) -> Callable[..., Generator[Any, None, None]]:
        """
        The same, but an ordinary generator.  All of it is one task, so that it can
        yield within a group of tasks.
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
                            # A group that it yields within has failed, say.
                            with contextlib.suppress(StopAsyncIteration):
                                await fixture.athrow(cancelled)

            task = spawn(go_through, name=name)

            def next_value() -> Any:
                turn = spawn(turns.receive, name=name).as_deferred()
                return self._wait_for(turn, task.cancel, name, limit)

            with contextlib.suppress(ChannelClosed, EndOfChannel):
                yield next_value()
                with self._tearing_down(name):
                    go_on = spawn(turns.send, None, name=name).as_deferred()
                    self._wait_for(go_on, task.cancel, name, limit)
                    # One too many.
                    yield next_value()
            with self._tearing_down(name):
                self._wait_for_task(task, limit)

        return call


class _Late(BaseException):
    """
    An example of hypothesis was out of time.

    hypothesis would look for a smaller example after any ``Exception`` and after
    ``pytest.fail.Exception``, for far longer than the limit.
    """

    def __init__(self, timeout: Timeout) -> None:
        self.timeout = timeout


def _last_if_late(function: Callable[P, T]) -> Callable[P, T]:
    """What hypothesis calls for each example: after a timeout it calls it no more."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Timeout as timeout:
            example = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
            timeout.msg = f"{timeout.msg}\nThe example: {example}"
            raise _Late(timeout) from None

    return call


def _failing_if_late(function: Callable[P, T]) -> Callable[P, T]:
    """What pytest calls: the timeout of an example fails the test."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except _Late as late:
            raise late.timeout from None

    return call


def _plain(function: Any) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(function, "__func__", function)
    return plain
