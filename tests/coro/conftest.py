"""Fixtures for the tests of the coroutine adapter."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from twisted.internet.ssl import PrivateCertificate
from twisted.logger import ILogObserver, globalLogPublisher

from tests.support import dispose, each_of, make_certificate
from twisted_rtsig.coro import get_debug, set_debug


def _asyncio() -> Any:
    from twisted.internet.asyncioreactor import AsyncioSelectorReactor

    return AsyncioSelectorReactor(asyncio.new_event_loop())


def _reactors() -> dict[str, Callable[[], Any]]:
    """Ours and Twisted's, of those that this platform has."""
    from twisted.internet.selectreactor import SelectReactor

    reactors: dict[str, Callable[[], Any]] = {
        "select": SelectReactor,
        "asyncio": _asyncio,
    }
    if sys.platform.startswith("linux"):
        from twisted.internet.epollreactor import EPollReactor

        from twisted_rtsig.epollreactor import EdgeEPollReactor
        from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

        reactors["epoll"] = EPollReactor
        reactors["rtsig"] = RealtimeSignalReactor
        reactors["rtsig-epoll"] = EdgeEPollReactor
    if sys.platform == "win32":
        from twisted_rtsig.iocpreactor import CompletionPortReactor

        reactors["rtsig-iocp"] = CompletionPortReactor
    return reactors


@pytest.fixture(params=each_of(_reactors(), plain=("select", "epoll")))
def reactor(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """
    Each reactor, as the installed one; the adapter needs none of this package's.
    """
    made = _reactors()[request.param]()
    # Twisted's TLS, for example, takes no other.
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", made)
    monkeypatch.setattr("twisted.internet.reactor", made, raising=False)
    yield made
    dispose(made)
    if request.param == "asyncio":
        made._asyncioEventloop.close()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """The events that are logged, failures and others, to be looked at."""
    # A task that failed in an earlier test tells of it when it is collected.
    gc.collect()
    events: list[Any] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


@pytest.fixture(autouse=True)
def debug_as_before() -> Iterator[None]:
    """A test may turn the debug mode on or off, and others may run in it."""
    before = get_debug()
    yield
    set_debug(before)


@pytest.fixture
def debug_off(debug_as_before: None) -> None:
    """For a test that leaves operations unawaited."""
    set_debug(False)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> PrivateCertificate:
    """Of this machine, by its address."""
    files = make_certificate(tmp_path_factory.mktemp("certificate"))
    pem = b"".join(each.read_bytes() for each in files)
    return cast(PrivateCertificate, PrivateCertificate.loadPEM(pem))


@pytest.fixture
def tracemalloc() -> Any:
    """The module; PyPy has none."""
    return pytest.importorskip("tracemalloc")
