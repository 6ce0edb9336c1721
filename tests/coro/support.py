"""What the tests of the coroutine adapter share."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any

import pytest
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
)
from twisted.internet.ssl import PrivateCertificate

from tests.support import DEADLINE
from twisted_rtsig.coro import (
    Channel,
    Event,
    Server,
    Stream,
    Task,
    connect,
    coroutine,
    serve,
    spawn,
)

# Tests that leave out an await on purpose can run in debug mode as well.
forgets_awaits = pytest.mark.filterwarnings(
    "ignore::twisted_rtsig.coro.UnawaitedWarning"
)


def run(reactor: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as a task on a reactor until it ends; what it returns."""
    task = spawn(function, *args, reactor=reactor)
    spin(reactor, lambda: task.done)
    return task.result()


def spin(reactor: Any, until: Callable[[], Any]) -> None:
    """Iterate until something is true; fail when it does not become so."""
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        # iterate() would sleep through what is due earlier.
        due = reactor.timeout()
        reactor.iterate(0.01 if due is None else min(0.01, due))


def run_for_real(reactor: Any, function: Callable[..., Any]) -> Any:
    """As ``run``, with ``reactor.run``, for what needs threads or signals."""
    tasks: list[Task[Any]] = []

    def start() -> None:
        tasks.append(spawn(function, reactor=reactor))
        tasks[0].as_deferred().addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(start)
    deadline = reactor.callLater(DEADLINE, reactor.stop)
    # It handles the signals that pytest would handle, and keeps them; asyncio's
    # even to a descriptor that is about to be closed.
    handlers = {each: signal.getsignal(each) for each in _HANDLED}
    try:
        reactor.run()
    finally:
        signal.set_wakeup_fd(-1)
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert deadline.active(), "it did not happen"
    deadline.cancel()
    return tasks[0].result()


_HANDLED = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _HANDLED.append(signal.SIGCHLD)


async def listen(reactor: Any, handler: Any, **options: Any) -> Server:
    """A server on a TCP port of this machine."""
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    return await serve(endpoint, handler, reactor=reactor, **options)


def tls_endpoint(reactor: Any, certificate: PrivateCertificate) -> Any:
    options = certificate.options()
    return SSL4ServerEndpoint(reactor, 0, options, interface="127.0.0.1")


async def call(reactor: Any, server: Server) -> Stream:
    """A connection to such a server."""
    return await connect(client_endpoint(reactor, server))


def client_endpoint(reactor: Any, server: Server) -> TCP4ClientEndpoint:
    return TCP4ClientEndpoint(reactor, "127.0.0.1", server.port.getHost().port)


@contextlib.asynccontextmanager
async def connected(reactor: Any) -> AsyncIterator[tuple[Stream, socket.socket]]:
    """A stream that a server has accepted, and a plain socket at its other end."""
    accepted: Channel[Stream] = Channel(1)
    left = Event()

    async def handler(stream: Stream) -> None:
        await accepted.send(stream)
        await left.wait()

    server = await listen(reactor, handler)
    port = server.port.getHost().port
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setblocking(False)
        stream = await accepted.receive()
        try:
            yield stream, peer
        finally:
            left.set()
            await stream.abort()
            await server.stop()


# One after the other, in whichever style

Steps = Iterable[Callable[[], Any]]


async def _async_def(steps: Steps, got: list[Any]) -> None:
    for step in steps:
        try:
            got.append(await step())
        except Exception as error:
            got.append(type(error))


def _generator(steps: Steps, got: list[Any]) -> Generator[Any, Any, None]:
    for step in steps:
        try:
            got.append((yield step()))
        except Exception as error:
            got.append(type(error))


# Each takes a reactor, functions to call and whose results to wait for, and a list
# for what comes of that; and returns what can be cancelled.
STYLES: dict[str, Callable[[Any, Steps, list[Any]], Any]] = {
    "async def": lambda reactor, *args: spawn(_async_def, *args, reactor=reactor),
    "generator": lambda reactor, *args: spawn(_generator, *args, reactor=reactor),
    "@coroutine": lambda reactor, *args: spawn(
        lambda: coroutine(_generator)(*args), reactor=reactor
    ),
    "@inlineCallbacks": lambda reactor, *args: inlineCallbacks(_generator)(*args),
    "fromCoroutine": lambda reactor, *args: Deferred.fromCoroutine(_async_def(*args)),
}
