"""
Libraries for asyncio on the loop of the reactor, beside Twisted.  Each test runs a
program with both, or one of the examples.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import reactor_classes

pytestmark = pytest.mark.processes

if sys.platform == "win32" or not reactor_classes():
    pytest.skip("it is for Linux, BSD and macOS", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 60.0
"""Seconds that a program may take."""


def need(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(
                f"{name} is not installed (pip install -e '.[asyncio-libraries]')"
            )


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[str]:
    """The URL of a Redis server that only this test uses."""
    need("redis")
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    command = [path, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(
        [*command, "--dir", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            started = any(
                "eady to accept connections" in line for line in server.stdout
            )
            assert started, f"redis-server has ended: {server.wait()}"
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.communicate()


# The beginning of each program.  Its run() runs Twisted and asyncio in one loop.
COMMON = """
import asyncio, sys
from twisted_rtsig import asyncioreactor
asyncioreactor.install(realtime_signals=sys.argv[1] == "realtime signals")
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread

loop = asyncioreactor.new_event_loop()
assert loop.reactor is reactor

def asynced(deferred):
    return deferred.asFuture(loop)

class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)

class Client(Protocol):
    # Sends data, and waits until as much data has come back.
    def __init__(self):
        self.got, self.size, self.waiter = b"", 0, None

    def ask(self, data):
        self.size += len(data)
        self.waiter = Deferred()
        self.transport.write(data)
        return asynced(self.waiter)

    def dataReceived(self, data):
        self.got += data
        if len(self.got) == self.size:
            self.waiter.callback(self.got)

async def twisted_client():
    # A Twisted connection to a Twisted server of this process.
    factory = Factory.forProtocol(Echo)
    listening = reactor.listenTCP(0, factory, interface="127.0.0.1")
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", listening.getHost().port)
    return await asynced(endpoint.connect(Factory.forProtocol(Client)))

def run(main):
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 40))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
    assert not reactor.getDelayedCalls(), reactor.getDelayedCalls()
    print("good")
"""


@pytest.fixture(params=["epoll", "realtime signals"])
def notifier(request: Any) -> str:
    """The notifier of the programs' reactor.  On other systems than Linux: kqueue."""
    if request.param != "epoll" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux has realtime signals")
    name: str = request.param
    return name


def run_program(code: str, *arguments: str) -> None:
    """Run a program, which must end with status 0 and without a warning."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "good\n", "")


# Programs


def test_aiohttp_beside_twisted(notifier: str) -> None:
    need("aiohttp")
    run_program(
        """
        import aiohttp
        from aiohttp import web

        async def length(request):
            return web.json_response({"length": len(await request.read())})

        async def stream(request):
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(16):
                await response.write(bytes(100_000))
            await response.write_eof()
            return response

        async def socket(request):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                if message.data == "twisted":
                    got = await client_of_twisted.ask(b"x" * 300_000)
                    await socket.send_str(str(len(got)))
                else:
                    await socket.send_bytes(message.data)
            return socket

        async def slow(request):
            await released.wait()
            return web.Response()

        async def main():
            global client_of_twisted, released
            client_of_twisted = await twisted_client()
            released = asyncio.Event()
            app = web.Application()
            app.add_routes([web.post("/", length), web.get("/stream", stream),
                            web.get("/socket", socket), web.get("/slow", slow)])
            runner = web.AppRunner(app, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession() as session:
                async def post(size):
                    async with session.post(url, data=bytes(size)) as response:
                        assert await response.json() == {"length": size}
                await asyncio.gather(*map(post, [0, 1, 65_536, 500_000] * 5))
                async with session.get(url + "/stream") as response:
                    assert len(await response.read()) == 1_600_000
                async with session.ws_connect(url + "/socket") as ws:
                    for size in (1, 65_536, 200_000):
                        await ws.send_bytes(bytes(size))
                        assert (await ws.receive_bytes()) == bytes(size)
                    await ws.send_str("twisted")
                    assert await ws.receive_str() == "300000"
                try:
                    timeout = aiohttp.ClientTimeout(total=0.05)
                    await session.get(url + "/slow", timeout=timeout)
                except asyncio.TimeoutError:
                    pass
                else:
                    raise AssertionError("no timeout")
                released.set()
            await runner.cleanup()
            client_of_twisted.transport.loseConnection()

        run(main)
        """,
        notifier,
    )


def test_httpx_beside_twisted_web(notifier: str) -> None:
    need("httpx")
    run_program(
        """
        import httpx
        from twisted.web.resource import Resource
        from twisted.web.server import Site, NOT_DONE_YET

        class Length(Resource):
            isLeaf = True
            def render_GET(self, request):
                # A thread and a timer send the rest of the answer.
                request.write(b"a")
                def rest(data):
                    request.write(data)
                    reactor.callLater(0.01, request.finish)
                deferToThread(lambda: b"b" * 200_000).addCallback(rest)
                return NOT_DONE_YET
            def render_POST(self, request):
                return b"%d" % len(request.content.read())

        async def main():
            port = reactor.listenTCP(0, Site(Length()), interface="127.0.0.1")
            url = f"http://127.0.0.1:{port.getHost().port}/"
            async with httpx.AsyncClient(trust_env=False) as client:
                async def both(size):
                    answer = await client.post(url, content=bytes(size))
                    assert answer.text == str(size)
                    answer = await client.get(url)
                    assert answer.text == "a" + "b" * 200_000
                await asyncio.gather(*map(both, [0, 100, 70_000, 1_000_000]))
            await asynced(port.stopListening())

        run(main)
        """,
        notifier,
    )


def test_redis_beside_a_twisted_protocol(notifier: str, redis_server: str) -> None:
    run_program(
        """
        import redis.asyncio

        def soon(function, *arguments):
            # A timer of Twisted starts a task of asyncio.
            reactor.callLater(
                0.05, lambda: asyncio.ensure_future(function(*arguments))
            )

        async def main():
            client_of_twisted = await twisted_client()
            client = redis.asyncio.Redis.from_url(sys.argv[2], protocol=2)
            async def count(number):
                assert await client.set(f"key {number}", number)
                assert int(await client.get(f"key {number}")) == number
                await client.incr("count")
            echo = client_of_twisted.ask(bytes(1_000_000))
            await asyncio.gather(*map(count, range(100)))
            assert len(await echo) == 1_000_000
            assert int(await client.get("count")) == 100
            async with client.pipeline() as pipeline:
                for number in range(1000):
                    pipeline.rpush("list", number)
                assert (await pipeline.execute())[-1] == 1000
            assert len(await client.lrange("list", 0, -1)) == 1000
            # One blocking command is cancelled, and another one gets its item.
            taking = asyncio.ensure_future(client.blpop(["nothing"], timeout=60))
            await asyncio.sleep(0.05)
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            assert taking.cancelled()
            taking = asyncio.ensure_future(client.blpop(["something"], timeout=60))
            soon(client.rpush, "something", "x")
            assert (await taking)[1] == b"x"
            async with client.pubsub() as subscription:
                await subscription.subscribe("channel")
                soon(client.publish, "channel", "hello")
                async for message in subscription.listen():
                    if message["type"] == "message":
                        assert message["data"] == b"hello"
                        break
            await client.aclose()
            client_of_twisted.transport.loseConnection()

        run(main)
        """,
        notifier,
        redis_server,
    )


def test_uvicorn_beside_twisted(notifier: str) -> None:
    need("uvicorn")
    run_program(
        """
        import http.client, uvicorn

        async def application(scope, receive, send):
            if scope["type"] != "http":
                return
            size, more = 0, True
            while more:
                event = await receive()
                size += len(event.get("body", b""))
                more = event.get("more_body", False)
            # Twisted's part of the answer.
            echo = await client_of_twisted.ask(b"x")
            start = {"type": "http.response.start", "status": 200, "headers": []}
            await send(start)
            body = {"type": "http.response.body", "body": b"%d" % size}
            await send({**body, "more_body": True})
            await send({"type": "http.response.body", "body": b" bytes"})

        def post(size):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for _ in range(3):
                connection.request("POST", "/", bytes(size))
                assert connection.getresponse().read() == b"%d bytes" % size
            connection.close()

        async def main():
            global client_of_twisted, port
            client_of_twisted = await twisted_client()
            options = {"port": 0, "log_level": "error", "lifespan": "off"}
            config = uvicorn.Config(application, **options)
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            for size in (0, 1000, 400_000):
                await asynced(deferToThread(post, size))
            server.should_exit = True
            await serving
            client_of_twisted.transport.loseConnection()

        run(main)
        """,
        notifier,
    )


def test_uvicorn_stops_at_a_signal_beside_a_running_reactor() -> None:
    need("uvicorn")
    run_program(
        """
        import os, signal, uvicorn

        async def main():
            async def application(scope, receive, send):
                pass
            options = {"port": 0, "log_level": "error", "lifespan": "off"}
            config = uvicorn.Config(application, **options)
            server = uvicorn.Server(config)
            # When uvicorn has stopped, it raises the signal again.
            got = []
            before = signal.signal(signal.SIGTERM, lambda *_: got.append("again"))
            serving = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            reactor.callLater(0, os.kill, os.getpid(), signal.SIGTERM)
            await serving
            assert got == ["again"], got
            signal.signal(signal.SIGTERM, before)

        run(main)
        """,
        "epoll",
    )


# Examples


class Example:
    """An example with a server, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving on port "), line or process.communicate()
        self.port = int(line.split()[-1])

    def stop(self) -> None:
        """Send SIGTERM.  The example must end with status 0 and without output."""
        self._process.send_signal(signal.SIGTERM)
        output, errors = self._process.communicate(timeout=PATIENCE)
        assert (self._process.returncode, output, errors) == (0, "", "")

    def lines(self) -> Lines:
        return Lines(self.port)


class Lines:
    """A client that sends and receives lines."""

    def __init__(self, port: int) -> None:
        self.handle = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._file = self.handle.makefile("rwb")

    def ask(self, line: bytes) -> bytes:
        self.send(line)
        return self.receive()

    def send(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def receive(self) -> bytes:
        return self._file.readline().rstrip(b"\n")

    def close(self) -> None:
        self._file.close()
        self.handle.close()


@contextlib.contextmanager
def example(name: str, *arguments: str) -> Iterator[Example]:
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The clients of the examples must not use a proxy.
        env={**os.environ, "NO_PROXY": "*"},
    ) as process:
        try:
            yield Example(process)
        finally:
            process.kill()


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


PAGES = {
    "/": "<title>First</title><a href='/second'>2</a><a href='third'>3</a>",
    "/second": "<title>Second</title><a href='/'>1</a>",
    "/third": "<title>Third</title>",
}


@pytest.fixture
def pages() -> Iterator[int]:
    """The port of a web server with a few pages."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGES.get(self.path, "").encode()
            self.send_response(200 if page else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_example_of_aiohttp_in_twisted(pages: int) -> None:
    need("aiohttp")
    here = f"http://127.0.0.1:{pages}"
    with example("aiohttp_in_twisted", "0") as server:
        answer = get(server.port, f"/?url={here}/&url={here}/none&url={here}/third")
        assert answer.decode().splitlines() == [
            f"{here}/: 200, {len(PAGES['/'])} bytes",
            f"{here}/none: 404, 0 bytes",
            f"{here}/third: 200, {len(PAGES['/third'])} bytes",
        ]
        # The first URL is refused, and the second is not a URL.
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            refused = f"http://127.0.0.1:{unused.getsockname()[1]}/"
            answer = get(server.port, f"/?url={refused}&url=nonsense")
        assert answer.decode().splitlines() == [
            f"{refused}: ClientConnectorError",
            "nonsense: InvalidUrlClientError",
        ]
        # A page is never sent: its client disconnects.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            client = Lines(server.port)
            client.send(f"GET /?url={url} HTTP/1.1\r\nHost: x\r\n\r".encode())
            silent.settimeout(PATIENCE)
            fetching, _ = silent.accept()
            with fetching:
                fetching.settimeout(PATIENCE)
                assert fetching.recv(1000)
                client.close()
                assert fetching.recv(1000) == b""
        server.stop()


def test_example_of_a_protocol_beside_redis(redis_server: str) -> None:
    with example("visits", "0", redis_server) as server:
        watcher = server.lines()
        assert watcher.ask(b"WATCH") == b"watching"
        clients = [server.lines() for _ in range(5)]
        for number, client in enumerate(clients, 1):
            assert client.ask(b"Alice") == b"%d" % number
        # Many lines at once.  The last one is sent in two parts.
        clients[0].send(b"Bob\n" * 50 + b"Bob")
        assert [clients[0].receive() for _ in range(51)] == [
            b"%d" % each for each in range(1, 52)
        ]
        assert [watcher.receive() for _ in range(56)] == [b"Alice"] * 5 + [b"Bob"] * 51
        for each in (watcher, *clients):
            each.close()
        server.stop()
    with example("visits", "0", "redis://127.0.0.1:1") as server:
        client = server.lines()
        assert client.ask(b"Alice") == b"error: ConnectionError"
        client.close()
        server.stop()


def test_example_of_a_spider(pages: int) -> None:
    need("scrapy")
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "headings_spider.py")),
            f"http://127.0.0.1:{pages}/",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["url"].rpartition("/")[2]: each["title"] for each in found} == {
        "": "First",
        "second": "Second",
        "third": "Third",
    }


def test_example_of_daphne() -> None:
    need("daphne", "aiohttp")
    with example("daphne_chat", "0") as server:
        assert get(server.port, "/") == b"0 people are here.\n"
        run_program(
            """
            import aiohttp

            async def main():
                url = f"http://127.0.0.1:{sys.argv[2]}/"
                async with aiohttp.ClientSession() as session:
                    people = [await session.ws_connect(url) for _ in range(3)]
                    # All are in the room.
                    while True:
                        async with session.get(url) as response:
                            if (await response.text()).startswith("3"):
                                break
                    for number, person in enumerate(people):
                        await person.send_str(f"I am {number}")
                        for each in people:
                            assert await each.receive_str() == f"I am {number}"
                    for person in people:
                        await person.close()
                    while True:
                        async with session.get(url) as response:
                            if (await response.text()).startswith("0"):
                                break

            run(main)
            """,
            "epoll",
            str(server.port),
        )
        server.stop()
