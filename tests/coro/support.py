"""Helpers that the tests of the coroutine adapter share."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock
from twisted.python.failure import Failure

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
    sleep,
    spawn,
    timeout,
)

# For tests that leave out an await on purpose: they can run in debug mode as well.
forgets_awaits = pytest.mark.filterwarnings(
    "ignore::twisted_rtsig.coro.UnawaitedWarning"
)


# The events of the fixture ``logged``.
Logged = list[dict[str, Any]]


class ExpectedError(Exception):
    """An error that a test raises, and expects."""


def ignore_error(operation: Deferred[Any]) -> Deferred[Any]:
    """The same operation, whose error is not logged as unhandled."""
    return operation.addErrback(lambda _: None)


def failures(logged: Logged) -> list[Failure]:
    """
    The failures that were logged; first those errors are logged that can no longer
    be handled, because the task or the Deferred is garbage.
    """
    gc.collect()
    return [each["log_failure"] for each in logged if each.get("log_failure")]


def run(reactor: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as a task on a reactor until it ends; return its result."""
    task = spawn(function, *args, reactor=reactor)
    spin(reactor, lambda: task.done)
    return task.result()


def spin(reactor: Any, until: Callable[[], Any]) -> None:
    """Iterate until a condition is true; fail when that takes too long."""
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        # iterate() would sleep through delayed calls that are due earlier.
        due = reactor.timeout()
        reactor.iterate(0.01 if due is None else min(0.01, due))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await sleep(0)


def run_for_real(reactor: Any, function: Callable[..., Any]) -> Any:
    """As :func:`run`, by ``reactor.run()``: for tests with threads or signals."""
    tasks: list[Task[Any]] = []

    def start() -> None:
        tasks.append(spawn(function, reactor=reactor))
        tasks[0].as_deferred().addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(start)
    deadline = reactor.callLater(DEADLINE, reactor.stop)
    # reactor.run() replaces pytest's handlers of signals, and leaves its own in place;
    # asyncio's reactor also leaves a wake-up descriptor that is closed soon.
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


Certificate = PrivateCertificate | None


async def cancel(task: Task[Any]) -> None:
    """Cancel a task that waits, and wait for its end."""
    await sleep(0)
    task.cancel()
    with pytest.raises(CancelledError):
        await task


def output_of(program: str, **options: Any) -> str:
    """What a Python program prints, in a process of its own; it prints no error."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextlib.contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a process of its own, with pipes; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# The beginning of a program: a reactor, and a function that waits for ever.
WAITS_FOR_EVER = """
import sys, threading
{install}
installed.install()
from twisted.internet import reactor
from twisted.internet.error import ReactorNotRunning
from twisted_rtsig.coro import Event, Portal, from_thread, in_thread, sleep, spawn

begun = Event()

async def never():
    begun.set()
    try:
        await Event().wait()
    finally:
        print("cancelled\\n", end="", flush=True)
"""
INSTALLS = {
    "select": "from twisted.internet import selectreactor as installed",
    "asyncio": "from twisted.internet import asyncioreactor as installed",
    "rtsig-epoll": "from twisted_rtsig import epollreactor as installed",
}


def installs(name: str) -> str:
    """The line that imports a reactor's module; skips if the platform has none."""
    if name == "rtsig-epoll" and not sys.platform.startswith("linux"):
        pytest.skip("this is about Linux")
    return INSTALLS[name]


async def listen(
    reactor: Any, handler: Any, certificate: Certificate = None, /, **options: Any
) -> Server:
    """
    A server on a TCP port of this machine, with options for :func:`serve`.

    :param certificate: to use TLS, with this certificate.
    """
    endpoint: Any = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    if certificate is not None:
        endpoint = tls_endpoint(reactor, certificate)
    return await serve(endpoint, handler, **{"reactor": reactor, **options})


def tls_endpoint(reactor: Any, certificate: PrivateCertificate) -> Any:
    options = certificate.options()
    return SSL4ServerEndpoint(reactor, 0, options, interface="127.0.0.1")


async def call(
    reactor: Any, server: Server, certificate: Certificate = None, /, **options: Any
) -> Stream:
    """
    A connection to such a server, with options for :func:`connect`.

    :param certificate: to use TLS, and to trust this certificate.
    """
    endpoint: Any = client_endpoint(reactor, server)
    if certificate is not None:
        trust = optionsForClientTLS("127.0.0.1", certificate)
        endpoint = wrapClientTLS(trust, endpoint)
    return await connect(endpoint, **options)


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


# Operations awaited one after the other, in each style

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


# Each style takes a reactor, functions that start operations, and a list for results
# and types of errors; it returns the task or Deferred, which can be cancelled.
STYLES: dict[str, Callable[[Any, Steps, list[Any]], Any]] = {
    "async def": lambda reactor, *args: spawn(_async_def, *args, reactor=reactor),
    "generator": lambda reactor, *args: spawn(_generator, *args, reactor=reactor),
    "@coroutine": lambda reactor, *args: spawn(
        lambda: coroutine(_generator)(*args), reactor=reactor
    ),
    "@inlineCallbacks": lambda reactor, *args: inlineCallbacks(_generator)(*args),
    "fromCoroutine": lambda reactor, *args: Deferred.fromCoroutine(_async_def(*args)),
}
styles = pytest.mark.parametrize("style", STYLES)
# What the fixture ``start`` is: it takes functions to call, and the list.
Start = Callable[[Steps, list[Any]], Any]


def most_left_by_timeouts(
    clock: Clock, times: int, make: Callable[[], tuple[Any, Deferred[Any]]]
) -> int:
    """
    Let operations time out, one after the other; how many were in memory at most.

    :param make: starts an operation, and returns the object to count and the operation.
    """
    left: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    async def wait() -> None:
        nonlocal most
        for _ in range(times):
            counted, operation = make()
            left.add(counted)
            with pytest.raises(TimeoutError), timeout(1):
                await operation
            del counted, operation
            most = max(most, len(left))

    task = spawn(wait, reactor=clock)
    clock.pump([1] * times)
    assert task.result() is None
    return most
