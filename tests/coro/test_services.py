"""Servers as services: started, stopped, and under a real twistd."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from twisted.application.service import IService, MultiService
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from zope.interface.verify import verifyObject

from tests.coro.support import call, run
from tests.support import DEADLINE
from twisted_rtsig.coro import (
    Cancelled,
    CoroutineFactory,
    CoroutineService,
    Event,
    Stopped,
    Stream,
    serve,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.serving import ServerOptions

ROOT = Path(__file__).parents[2]
TAC = ROOT / "examples" / "echo_service.tac"
PLUGIN = ROOT / "examples" / "twistd_plugin"
CLIENTS = 20


async def shout(stream: Stream) -> None:
    async for line in stream.lines():
        await stream.write(line.upper() + b"\n")


def shout_yielding(stream: Stream) -> Generator[Any, Any, None]:
    while True:
        line = yield stream.read_line()
        yield stream.write(line.upper() + b"\n")


handlers = pytest.mark.parametrize(
    "handler",
    [shout, shout_yielding, inlineCallbacks(shout_yielding)],
    ids=["async def", "generator", "inlineCallbacks"],
)


def made(reactor: Any, handler: Any = shout, **options: Any) -> CoroutineService:
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    return CoroutineService(endpoint, handler, reactor=reactor, **options)


def messages(logged: list[Any]) -> list[str]:
    return [
        each["log_format"].format(**each)
        for each in logged
        if "has stopped:" in (each.get("log_format") or "")
    ]


@handlers
def test_a_service_starts_stops_and_starts_again(reactor: Any, handler: Any) -> None:
    service = made(reactor, handler)
    assert verifyObject(IService, service)

    async def main() -> None:
        for _ in range(2):
            service.startService()
            assert service.running
            assert service.server is not None
            async with await call(reactor, service.server) as stream:
                await stream.write(b"hello\n")
                assert await stream.read_line() == b"HELLO"
            await service.stopService()
            assert not service.running
            assert service.server is None
        # There is nothing to stop.
        await service.stopService()

    run(reactor, main)


def test_several_services_start_and_stop_together(
    reactor: Any, logged: list[Any]
) -> None:
    """With privileges, and then without."""
    parent = MultiService()
    children = [made(reactor, max_connections=count) for count in (1, 2, 3)]
    for child in children:
        child.setServiceParent(parent)

    async def main() -> None:
        parent.privilegedStartService()
        ports = [child.server.port for child in children if child.server]
        assert len(ports) == 3
        parent.startService()
        # It does not listen again.
        assert [child.server.port for child in children if child.server] == ports
        for child in children:
            assert child.server is not None
            async with await call(reactor, child.server) as stream:
                await stream.write(b"hello\n")
                assert await stream.read_line() == b"HELLO"
        await parent.stopService()

    run(reactor, main)
    assert len(messages(logged)) == 3


def test_stopping_logs_how_the_handlers_ended(reactor: Any, logged: list[Any]) -> None:
    never = Event()

    async def handler(stream: Stream) -> None:
        kind = await stream.read_line()
        await stream.write(b"here\n")
        if kind == b"quick":
            await stream.stopping.wait()
            return
        while True:
            try:
                await never.wait()
            except Cancelled:
                if kind == b"slow":
                    raise

    service = made(reactor, handler, grace=0.05, cancel_timeout=0.05)

    async def main() -> None:
        service.startService()
        assert service.server is not None
        streams = []
        for kind in (b"quick", b"quick", b"quick", b"slow", b"slow", b"stubborn"):
            streams.append(await call(reactor, service.server))
            await streams[-1].write(kind + b"\n")
            assert await streams[-1].read_line() == b"here"
        stopping = service.stopService()
        for stream in streams:
            stream.abort()
        await stopping

    run(reactor, main)
    [message] = messages(logged)
    assert message.endswith(
        "has stopped: 3 handlers have ended by themselves, 2 were cancelled, "
        "1 have not ended"
    )
    assert "handler" in message.split(" has stopped")[0]


def test_stopping_a_server_logs_the_same(reactor: Any) -> None:
    async def main() -> Stopped:
        endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        server = await serve(endpoint, shout, reactor=reactor)
        async with await call(reactor, server) as stream:
            await stream.write(b"hello\n")
            await stream.read_line()
            return await server.stop(0)

    assert run(reactor, main) == Stopped(finished=0, cancelled=1, abandoned=0)


def test_connections_in_the_backlog_are_served(reactor: Any) -> None:
    """The kernel would reset them when the port is closed."""
    served = Event()

    async def handler(stream: Stream) -> None:
        await stream.write(await stream.read_line() + b"\n")
        served.set()

    async def main() -> None:
        endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        server = await serve(endpoint, handler, reactor=reactor)
        address = "127.0.0.1", server.port.getHost().port
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(address))
                for _ in range(30)
            ]
            # The reactor has had no turn since.
            assert not server.factory.connections
            stopping = server.stop(DEADLINE)
            for client in clients:
                client.sendall(b"accepted\n")
            assert await stopping == Stopped(30, 0, 0)
            for client in clients:
                client.settimeout(DEADLINE)
                assert client.recv(100) == b"accepted\n"

    run(reactor, main)


# Twisted before 24.10 leaves the socket to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_service_that_cannot_listen(reactor: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = TCP4ServerEndpoint(
            reactor, taken.getsockname()[1], interface="127.0.0.1"
        )
        for start in ("startService", "privilegedStartService"):
            service = CoroutineService(endpoint, shout, reactor=reactor)
            with pytest.raises(CannotListenError):
                getattr(service, start)()
            assert service.server is None
            service.stopService()
    gc.collect()


class _Slow:
    """An endpoint that takes its time to listen."""

    def __init__(self) -> None:
        self.listening: Deferred[Any] = Deferred()

    def listen(self, factory: Any) -> Deferred[Any]:
        return self.listening


def test_listening_fails_later(logged: list[Any]) -> None:
    endpoint = _Slow()
    service = CoroutineService(endpoint, shout)
    service.startService()
    endpoint.listening.errback(OSError("the interface is down"))
    [event] = [each for each in logged if each.get("log_failure")]
    assert "cannot listen, and serves nothing" in event["log_format"]
    assert isinstance(event["log_failure"].value, OSError)


def test_stopping_before_it_listens(logged: list[Any]) -> None:
    endpoint = _Slow()
    service = CoroutineService(endpoint, shout)
    service.startService()
    service.stopService()
    got: list[Any] = []
    endpoint.listening.addBoth(got.append)
    assert not [each for each in logged if each.get("log_failure")]
    assert got == [None]


async def _late(reactor: Any, endpoint: Any, factory: Any, go_on: Event) -> Any:
    """Cannot be cancelled."""
    with shield():
        await go_on.wait()
        return await endpoint.listen(factory)


async def _early(reactor: Any, endpoint: Any, factory: Any, go_on: Event) -> Any:
    """Cannot be cancelled, and listens before it says so."""
    port = await endpoint.listen(factory)
    with shield():
        await go_on.wait()
    return port


def _deferred(reactor: Any, endpoint: Any, factory: Any, go_on: Event) -> Any:
    """Drops the port if it is cancelled."""
    listening: Deferred[Any] = Deferred()

    def listen(ignored: None) -> None:
        endpoint.listen(factory).chainDeferred(listening)

    go_on.wait().addCallback(listen)
    return listening


def _deferred_early(reactor: Any, endpoint: Any, factory: Any, go_on: Event) -> Any:
    listening: Deferred[Any] = Deferred()

    def listens(port: Any) -> None:
        go_on.wait().addCallback(lambda _: listening.callback(port))

    endpoint.listen(factory).addCallback(listens)
    return listening


# Twisted leaves the socket of a port whose factory raises to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", [_late, _early, _deferred, _deferred_early])
def test_a_stopped_service_does_not_listen(
    reactor: Any, logged: list[Any], way: Any
) -> None:
    ports: list[Any] = []
    go_on = Event()
    real = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")

    class Endpoint:
        def listen(self, factory: Any) -> Any:
            def keep(port: Any) -> Any:
                ports.append(port)
                return port

            return real.listen(factory).addCallback(keep)

    class Unwilling:
        def listen(self, factory: Any) -> Any:
            waiting = way(reactor, Endpoint(), factory, go_on)
            if isinstance(waiting, Deferred):
                return waiting
            return spawn(waiting, reactor=reactor).as_deferred()

    service = CoroutineService(Unwilling(), shout, reactor=reactor, cancel_timeout=0.05)

    async def main() -> None:
        service.startService()
        await sleep(0)
        assert service.server is None
        await service.stopService()
        go_on.set()
        for _ in range(10):
            await sleep(0)
        assert not any(each.connected for each in ports)
        # It can start again, and does not mix up the two starts.
        service.startService()
        await sleep(0)
        assert service.server is not None
        async with await call(reactor, service.server) as stream:
            await stream.write(b"hello\n")
            assert await stream.read_line() == b"HELLO"
        await service.stopService()
        assert not any(each.connected for each in ports)

    run(reactor, main)
    gc.collect()
    failures = [each["log_failure"].value for each in logged if each.get("log_failure")]
    assert failures == []


def test_an_endpoint_that_never_listens(reactor: Any, logged: list[Any]) -> None:
    never = Event()

    class Endpoint:
        async def _listen(self) -> None:
            with shield():
                await never.wait()

        def listen(self, factory: Any) -> Any:
            return spawn(self._listen, reactor=reactor).as_deferred()

    service = CoroutineService(Endpoint(), shout, reactor=reactor, cancel_timeout=0.01)

    async def main() -> None:
        service.startService()
        await sleep(0)
        await service.stopService()
        never.set()

    run(reactor, main)
    [event] = [each for each in logged if "service" in each]
    assert "has stopped before its endpoint listens" in event["log_format"]


def test_an_endpoint_whose_canceller_fails(logged: list[Any]) -> None:
    def fail(deferred: Any) -> None:
        raise ZeroDivisionError

    endpoint = _Slow()
    endpoint.listening = Deferred(fail)
    clock = Clock()
    service = CoroutineService(endpoint, shout, reactor=clock, cancel_timeout=1)
    service.startService()
    stopping = service.stopService()
    clock.advance(1)
    assert stopping.called
    [event] = [each for each in logged if each.get("log_failure")]
    assert "The canceller of" in event["log_format"]


def test_an_endpoint_that_raises() -> None:
    class Endpoint:
        def listen(self, factory: Any) -> Any:
            raise OSError("no such interface")

    service = CoroutineService(Endpoint(), shout)
    for _ in range(2):
        with pytest.raises(OSError, match="no such interface"):
            service.startService()
        assert service.stopService().called


def test_the_reactor_of_the_service() -> None:
    """It listens on it, and its time is that of the handlers and of the grace."""
    reactor: Any = MemoryReactorClock()
    told: list[str] = []

    async def handler(stream: Stream) -> None:
        await sleep(5)
        told.append("it was 5 s later")
        await Event().wait()

    service = CoroutineService("tcp:1234", handler, reactor=reactor, grace=60)
    service.startService()
    [(port, factory, *_)] = reactor.tcpServers
    assert port == 1234
    protocol = factory.buildProtocol(None)
    transport = StringTransport()
    protocol.makeConnection(transport)
    reactor.advance(5)
    assert told
    stopping = service.stopService()
    reactor.advance(59)
    assert not factory.connections.keys() - {protocol}
    assert protocol.unended_handler is not None
    reactor.advance(1)
    assert protocol.unended_handler is None
    protocol.connectionLost()
    reactor.advance(0)
    assert stopping.called
    assert not reactor.getDelayedCalls()


def test_each_stop_waits_for_those_before(reactor: Any, logged: list[Any]) -> None:
    """Also if the service was started again in between."""
    leave = Event()

    async def handler(stream: Stream) -> None:
        await stream.write(await stream.read_line() + b"\n")
        await leave.wait()

    service = made(reactor, handler, grace=DEADLINE)
    parent = MultiService()
    service.setServiceParent(parent)

    async def main() -> None:
        stops = []
        streams = []
        for _ in range(2):
            parent.startService()
            assert service.server is not None
            streams.append(await call(reactor, service.server))
            await streams[-1].write(b"hello\n")
            assert await streams[-1].read_line() == b"hello"
            stops += [parent.stopService(), parent.stopService()]
        for _ in range(10):
            await sleep(0)
        assert not any(each.called for each in stops)
        leave.set()
        for each in stops:
            await each
        assert parent.stopService().called
        for stream in streams:
            await stream.abort()

    run(reactor, main)
    assert len(messages(logged)) == 2


def test_a_stop_within_a_stop_waits_for_it(reactor: Any) -> None:
    """As of what learns from the first one that the server stops."""
    leave = Event()

    async def handler(stream: Stream) -> None:
        await stream.write(b"here")
        await leave.wait()

    service = made(reactor, handler, grace=DEADLINE)

    async def main() -> None:
        service.startService()
        assert service.server is not None
        within: list[Deferred[Any]] = []
        server = service.server

        def stop_again(ignored: None) -> None:
            within.append(service.stopService())
            within.append(server.stop(DEADLINE))

        server.stopping.wait().addCallback(stop_again)
        async with await call(reactor, server) as stream:
            await stream.read_exactly(4)
            stopping = service.stopService()
            assert len(within) == 2
            for _ in range(5):
                await sleep(0)
            assert not any(each.called for each in (stopping, *within))
            leave.set()
            for each in (stopping, *within):
                await each

    run(reactor, main)


def test_cancelling_a_stop_ends_the_grace(reactor: Any, logged: list[Any]) -> None:
    clean = Event()

    async def handler(stream: Stream) -> None:
        await stream.write(await stream.read_line() + b"\n")
        try:
            await Event().wait()
        finally:
            await sleep(0.01)
            clean.set()

    service = made(reactor, handler, grace=3600)

    async def main() -> None:
        service.startService()
        assert service.server is not None
        async with await call(reactor, service.server) as stream:
            await stream.write(b"hello\n")
            await stream.read_line()
            with pytest.raises(TimeoutError), timeout(0.01):
                await service.stopService()
            assert clean.is_set

    run(reactor, main)
    # How the handlers have ended is not told to what does not wait for it.
    assert not messages(logged)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"grace": -1}, ValueError),
        ({"cancel_timeout": -1}, ValueError),
        ({"max_connections": -1}, ValueError),
        ({"idle_timeout": 0}, ValueError),
        ({"speed": "high"}, TypeError),
    ],
)
def test_wrong_options_are_refused(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        CoroutineService(_Slow(), shout, **options)


def test_the_options_that_are_passed_on_are_all_of_a_factory() -> None:
    """A type checker knows them by this list, and a reader by the docstring."""
    options = get_type_hints(CoroutineFactory.__init__)
    del options["handler"], options["return"]
    assert get_type_hints(ServerOptions) == options
    for name in options:
        assert f"``{name}``" in str(serve.__doc__)
        assert f":param {name}: " in str(CoroutineFactory.__doc__)


def test_a_handler_that_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="a handler is a function of a stream"):
        CoroutineService(_Slow(), "shout")  # type: ignore[arg-type]


# Under twistd

needs_twistd = pytest.mark.skipif(
    sys.platform == "win32", reason="twistd ends by a signal"
)
REACTORS = ["rtsig-auto", "select", "asyncio"]
if sys.platform.startswith("linux"):
    REACTORS += ["rtsig", "epoll"]


class Twistd:
    """A server under twistd, and its log."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-c",
                    "from twisted.scripts.twistd import run; run()",
                ),
                *("--pidfile=", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.log = ""
        self.watchdog = threading.Timer(DEADLINE * 3, self.process.kill)
        self.watchdog.start()

    def wait_for(self, pattern: str) -> str:
        """Read the log up to a match; its group."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
            if found := re.search(pattern, line):
                return found[1]
        pytest.fail(f"{pattern!r} does not come:\n{self.log}")

    def end(self) -> int:
        self.log += self.process.communicate()[0]
        return self.process.returncode

    def kill(self) -> None:
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)


@pytest.fixture
def twistd(tmp_path: Path) -> Iterator[Any]:
    """Starts servers, each in a folder of the test."""
    started: list[Twistd] = []

    def start(*arguments: str, **environment: str) -> Twistd:
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        started.append(Twistd(tmp_path, *arguments, PYTHONPATH=path, **environment))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.mark.processes
@needs_twistd
@pytest.mark.parametrize("name", REACTORS)
def test_the_example_of_an_application(twistd: Any, name: str) -> None:
    server = twistd(f"--reactor={name}", "-noy", str(TAC), PORT="0")
    port = int(server.wait_for(r"CoroutineFactory starting on (\d+)"))
    with connection(port) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        server.process.terminate()
        # The handler ends as soon as it is told that the server stops.
        assert client.recv(100) == b""
    assert server.end() in (0, -signal.SIGTERM)
    assert "1 handlers have ended by themselves, 0 were cancelled" in server.log
    assert "Traceback" not in server.log
    assert "Unhandled" not in server.log


def plugin(folder: Path) -> None:
    """Copied, since twistd leaves a list of what it finds beside plugins."""
    shutil.copytree(
        PLUGIN,
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("dropin.cache", "__pycache__"),
    )


@pytest.mark.processes
@needs_twistd
@pytest.mark.parametrize("name", REACTORS)
def test_the_example_of_a_plugin_under_load(
    twistd: Any, tmp_path: Path, name: str
) -> None:
    """On SIGTERM every client that was accepted gets its answer, within the grace."""
    plugin(tmp_path)
    server = twistd(
        *(f"--reactor={name}", "-n", "greeter", "--grace", "20"),
        *("--listen", "tcp:0:interface=127.0.0.1"),
    )
    port = int(server.wait_for(r"CoroutineFactory starting on (\d+)"))
    stopping = threading.Event()
    answered: list[int] = []
    lost: list[int] = []

    def greeted(number: int, before: Any) -> bool:
        """Whether a client that was accepted gets its answer."""
        accepted = False
        try:
            with connection(port) as client, client.makefile("rb") as file:
                accepted = file.readline() == b"What is your name?\n"
                before()
                client.sendall(b"%d\n" % number)
                return file.readline() == b"Hello, %d!\n" % number
        except OSError:
            # It was refused.
            return not accepted

    def load(number: int) -> None:
        while not stopping.is_set():
            (answered if greeted(number, lambda: None) else lost).append(number)

    def slow(number: int, here: threading.Barrier) -> None:
        def wait() -> None:
            here.wait(DEADLINE)
            stopping.wait(DEADLINE)

        (answered if greeted(number, wait) else lost).append(-number)

    here = threading.Barrier(CLIENTS + 1)
    threads = [threading.Thread(target=load, args=(each,)) for each in range(CLIENTS)]
    threads += [
        threading.Thread(target=slow, args=(each, here))
        for each in range(1, CLIENTS + 1)
    ]
    for thread in threads:
        thread.start()
    here.wait(DEADLINE)
    server.process.terminate()
    server.wait_for(r"(TCP Port \d+ Closed)")
    stopping.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert server.end() in (0, -signal.SIGTERM)
    assert lost == []
    assert {each for each in answered if each < 0} == {
        -n for n in range(1, CLIENTS + 1)
    }
    found = re.search(
        r"<CoroutineService of greet> has stopped: (\d+) handlers have ended by "
        r"themselves, 0 were cancelled, 0 have not ended",
        server.log,
    )
    assert found, server.log
    assert int(found[1]) >= CLIENTS
    assert "Traceback" not in server.log


@needs_twistd
def test_a_plugin_that_cannot_listen(twistd: Any, tmp_path: Path) -> None:
    plugin(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = f"tcp:{port}:interface=127.0.0.1"
        server = twistd("-n", "greeter", "--listen", where)
        assert server.end() == 1
    assert "CannotListenError" in server.log
    assert f"Couldn't listen on 127.0.0.1:{port}" in server.log


@needs_twistd
def test_handlers_are_cancelled_after_the_grace(twistd: Any, tmp_path: Path) -> None:
    plugin(tmp_path)
    server = twistd(
        *("--reactor=rtsig-auto", "-n", "greeter", "--grace", "0.1"),
        *("--listen", "tcp:0:interface=127.0.0.1"),
    )
    port = int(server.wait_for(r"CoroutineFactory starting on (\d+)"))
    with connection(port) as client:
        assert client.recv(100) == b"What is your name?\n"
        server.process.terminate()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    assert server.end() in (0, -signal.SIGTERM)
    assert "0 handlers have ended by themselves, 1 were cancelled" in server.log
