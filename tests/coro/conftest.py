"""Fixtures for the tests of the coroutine adapter."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, globalLogPublisher

from tests.coro.peers import Connecting, TLSPeer, accepted, tls_client
from tests.coro.support import STYLES, Logged, Start, failures
from tests.support import dispose, each_of, make_certificate
from twisted_rtsig.coro import channels, connect, get_debug, set_debug


def _asyncio() -> Any:
    from twisted.internet.asyncioreactor import AsyncioSelectorReactor

    return AsyncioSelectorReactor(asyncio.new_event_loop())


def _reactors() -> dict[str, Callable[[], Any]]:
    """The reactors of this package and of Twisted that this platform has."""
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
    # Twisted's TLS, for example, uses the installed one.
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", made)
    monkeypatch.setattr("twisted.internet.reactor", made, raising=False)
    yield made
    dispose(made)
    if request.param == "asyncio":
        made._asyncioEventloop.close()


@pytest.fixture
def clock() -> Clock:
    """A clock that a test advances, for what needs no reactor."""
    return Clock()


@pytest.fixture(params=STYLES)
def start(request: Any, clock: Clock) -> Start:
    """In each style, starts what awaits operations one after the other."""
    return partial(STYLES[request.param], clock)


@pytest.fixture
def one_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel serves one operation at once, and the next ones a turn later."""
    monkeypatch.setattr(channels, "_AT_ONCE_IN_A_TURN", 1)


@pytest.fixture
def limits_clock() -> Iterator[Clock]:
    """A clock for time limits: no limit may be pending at the end of a test."""
    clock = Clock()
    yield clock
    assert not clock.getDelayedCalls()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """The events that are logged during the test."""
    # A task that failed in an earlier test logs its error when it is collected.
    gc.collect()
    events: list[Any] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


@pytest.fixture
def no_failures(logged: Logged) -> Iterator[None]:
    """The test logs no failure."""
    yield
    assert failures(logged) == []


@pytest.fixture(autouse=True)
def debug_as_before() -> Iterator[None]:
    """Restores the debug mode, which a test may change."""
    before = get_debug()
    yield
    set_debug(before)


@pytest.fixture
def debug_off(debug_as_before: None) -> None:
    """For a test that leaves operations unawaited."""
    set_debug(False)


@pytest.fixture
def debug_on(debug_as_before: None) -> None:
    """For a test of the debug mode."""
    set_debug(True)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> PrivateCertificate:
    """A self-signed certificate for the address of this machine."""
    files = make_certificate(tmp_path_factory.mktemp("certificate"))
    pem = b"".join(each.read_bytes() for each in files)
    return cast(PrivateCertificate, PrivateCertificate.loadPEM(pem))


@pytest.fixture
def tracemalloc() -> Any:
    """The module; skips on PyPy, which has none."""
    return pytest.importorskip("tracemalloc")


@pytest.fixture
def server_context(certificate: PrivateCertificate, tmp_path: Path) -> ssl.SSLContext:
    pem = tmp_path / "server.pem"
    pem.write_bytes(certificate.dumpPEM())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


@pytest.fixture(params=["TCP", "TLS"])
def maybe_certificate(
    request: Any, certificate: PrivateCertificate
) -> PrivateCertificate | None:
    """The certificate or None, for a test that runs with and without TLS."""
    return certificate if request.param == "TLS" else None


@pytest.fixture
def connecting(
    reactor: Any,
    certificate: PrivateCertificate,
    server_context: ssl.SSLContext,
    limits_clock: Clock,
) -> Callable[..., Any]:
    """Connects a TLS client, with options for :func:`connect`: see ``Connecting``."""

    @contextlib.asynccontextmanager
    async def connecting(**options: Any) -> AsyncIterator[Connecting]:
        async with accepted(reactor) as (endpoint, accept):

            async def secure() -> TLSPeer:
                peer = TLSPeer(await accept(), server_context, server_side=True)
                await peer.handshake()
                return peer

            client = tls_client(endpoint, certificate)
            stream = await connect(client, limits_clock, **options)
            yield Connecting(limits_clock, stream, accept, secure)

    return connecting
