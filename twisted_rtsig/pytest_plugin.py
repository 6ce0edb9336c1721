"""
A pytest plugin: run the tests on any reactor that is installed, by its short name.

As ``pytest --twisted-reactor=rtsig``, or in the configuration of pytest::

    [tool.pytest.ini_options]
    twisted_reactor = "rtsig"

Then tests and fixtures may be C{async def}, and tests may return a Deferred.  Without
a name the plugin does nothing at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, Final

import pytest
from twisted.application.reactors import IReactorInstaller, getReactorTypes
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorAlreadyInstalledError
from twisted.python.failure import Failure

from twisted_rtsig.coro.channels import Channel
from twisted_rtsig.coro.errors import ChannelClosed, EndOfChannel
from twisted_rtsig.coro.tasks import spawn
from twisted_rtsig.notifiers import UnsupportedReactorError

# Tests that other plugins run.
_OTHERS: Final = ("anyio", "asyncio", "trio")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Beside the other options of pytest."""
    what = "the reactor to run the tests on, as twistd --help-reactors lists them"
    parser.getgroup("twisted-rtsig").addoption(
        "--twisted-reactor", metavar="NAME", help=what
    )
    parser.addini("twisted_reactor", what, default="")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install the reactor before anything of the user's imports one."""
    name = early_config.known_args_namespace.twisted_reactor
    name = name or early_config.getini("twisted_reactor")
    if name:
        _install(name)
        early_config.pluginmanager.register(_Runner(name), "twisted_rtsig.runner")


# The plugins of Twisted and of this package import no reactor.  To list all plugins
# imports those of other packages as well, some of which do (txtorcon, txi2p).
_PLUGINS: Final = (
    "twisted.plugins.twisted_reactors",
    "twisted.plugins.twisted_rtsig_reactors",
)


def _reactor_types() -> Iterator[Any]:
    for plugin in _PLUGINS:
        for each in vars(importlib.import_module(plugin)).values():
            if IReactorInstaller.providedBy(each):
                yield each
    yield from getReactorTypes()


def _install(name: str) -> None:
    before = sys.modules.get("twisted.internet.reactor")
    for installer in _reactor_types():
        if installer.shortName == name:
            break
    else:
        names = sorted({each.shortName for each in getReactorTypes()})
        raise pytest.UsageError(
            f"no reactor is called {name!r}; there are {', '.join(names)}"
        )
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


class _Runner:
    """The part that is there once a reactor was chosen."""

    def __init__(self, name: str) -> None:
        self._name = name

    def pytest_report_header(self) -> str:
        from twisted.internet import reactor

        return f"reactor: {self._name} ({type(reactor).__name__})"

    # Both below put something else in its place and return None, so that pytest goes
    # on with that.

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        if any(pyfuncitem.get_closest_marker(other) for other in _OTHERS):
            return
        # What hypothesis calls for each example.
        given = getattr(pyfuncitem.obj, "hypothesis", None)
        if given is None:
            pyfuncitem.obj = _synchronous(pyfuncitem.obj)
        elif inspect.iscoroutinefunction(given.inner_test):
            given.inner_test = _synchronous(given.inner_test)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        function = fixturedef.func
        replacement: Callable[..., Any]
        if inspect.iscoroutinefunction(function):
            replacement = _synchronous(_plain(function))
        elif inspect.isasyncgenfunction(function):
            replacement = _synchronous_generator(_plain(function))
        else:
            return
        if inspect.ismethod(function):
            # Which pytest binds to the object of the test.
            replacement = types.MethodType(replacement, function.__self__)
        vars(fixturedef)["func"] = replacement

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """End its threads, for which Python would wait, and whatever else it has."""
        from twisted.internet import reactor

        shut_down: Deferred[None] = Deferred()
        reactor.addSystemEventTrigger("after", "shutdown", shut_down.callback, None)
        reactor.fireSystemEvent("shutdown")
        _wait_for(shut_down)


def _plain(function: Any) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(function, "__func__", function)
    return plain


def _synchronous(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but it returns when it has ended."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result):
            task = spawn(result, name=function.__qualname__)
            return _wait_for(task.as_deferred())
        if isinstance(result, Deferred):
            # Of what is in it, pytest would say that a test should return nothing.
            _wait_for(result)
            return None
        return result

    return call


def _synchronous_generator(
    function: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., Generator[Any, None, None]]:
    """
    The same, but an ordinary generator.  All of it is one task, so that it can yield
    within a group of tasks.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        turns: Channel[Any] = Channel(0)

        async def go_through() -> None:
            with contextlib.closing(turns):
                async for value in function(*args, **kwargs):
                    await turns.send(value)
                    await turns.receive()

        task = spawn(go_through, name=function.__qualname__)
        with contextlib.suppress(ChannelClosed, EndOfChannel):
            while True:
                yield _wait_for(spawn(turns.receive).as_deferred())
                _wait_for(spawn(turns.send, None).as_deferred())
        _wait_for(task.as_deferred())

    return call


def _wait_for(deferred: Deferred[Any]) -> Any:
    """
    Run the reactor until it has a result, as trial does.

    :raises KeyboardInterrupt: if the reactor was stopped before.
    """
    from twisted.internet import reactor

    results: list[Any] = []
    deferred.addBoth(results.append)
    if not results:
        deferred.addBoth(lambda _: reactor.crash())
        # Once it was stopped, a reactor does not run again.
        vars(reactor)["stop"] = reactor.crash
        try:
            reactor.run()
        finally:
            del vars(reactor)["stop"]
    if not results:
        raise KeyboardInterrupt
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]
