"""
The servers that compare.py measures: each service on every event loop.

    python benchmarks/servers.py CONTENDER SERVICE [--folder FOLDER]

serves on a free port, and prints its number.  The services:

echo      answer with what was received (TCP)
lines     the same, line by line
sink      answer with one byte for each MiB received (TCP)
source    answer with one MiB for each byte received (TCP)
udp       answer with what was received (UDP)
tls       echo over TLS, with FOLDER/server.pem
web       FOLDER/file under /file, and a greeting under /hello (twisted.web)
redis     a part of the protocol of Redis: examples/redis_server.py
timers    no server: set and cancel timers.  For each number of seconds read from
          standard input, do so for that long, and print the same JSON as load.c
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import importlib.util
import json
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

BACKLOG = 1024
MIB = 1 << 20
BLOCK = bytes(MIB)
READ = 1 << 16

TIMERS = 10_000
"""How many timers are set before they are cancelled."""


# The services, without an event loop


class Sink:
    """Counts the bytes of one connection, and answers each whole MiB."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, data: bytes) -> bytes:
        whole, self.received = divmod(self.received + len(data), MIB)
        return b"." * whole


def make_sink() -> Callable[[bytes], bytes]:
    return Sink()


def make_source() -> Callable[[bytes], bytes]:
    return lambda data: BLOCK * len(data)


ANSWERS = {"sink": make_sink, "source": make_source}


def say(word: object) -> None:
    print(word, flush=True)


def ready(word: object) -> None:
    """
    Print a word, when the server is ready.  The garbage collector ignores all objects
    that exist now, so that the number of imported modules does not affect the results.
    """
    gc.collect()
    gc.freeze()
    say(word)


def timer_turns(later: Callable[[float, Callable[[], object]], Any]) -> Iterator[None]:
    """Set and cancel timers; yield whenever the loop is to run one pass."""

    def never() -> None:
        raise AssertionError("a timer has not been cancelled")

    # Delays as of many connections: spread, and in no order.
    delays = [30 + each * 7919 % TIMERS / TIMERS for each in range(TIMERS)]
    ready("ready")
    for line in sys.stdin:
        seconds, done, start = float(line), 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            calls = [later(delay, never) for delay in delays]
            yield
            for call in calls:
                call.cancel()
            yield
            done += TIMERS
        say(json.dumps({"requests": done, "elapsed": elapsed}))


def turn_timers(
    later: Callable[[float, Callable[[], object]], Any], stop: Callable[[], object]
) -> None:
    turns = timer_turns(later)

    def step() -> None:
        if next(turns, stop) is stop:
            stop()
        else:
            later(0, step)

    later(0, step)


# Twisted


def twisted(reactor_module: str, service: str, folder: Path) -> None:
    importlib.import_module(reactor_module).install()
    run_twisted(service, folder)


def twisted_on_uvloop(service: str, folder: Path) -> None:
    from twisted.internet import asyncioreactor

    asyncioreactor.install(new_loop("uvloop"))
    run_twisted(service, folder)


def run_twisted(service: str, folder: Path) -> None:
    from twisted.internet import reactor

    running: Any = reactor
    port = listen(running, service, folder)
    if port is not None:
        ready(port.getHost().port)
    running.run()


def listen(reactor: Any, service: str, folder: Path) -> Any:
    from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
    from twisted.protocols.basic import LineOnlyReceiver

    class Echo(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    class EchoLines(LineOnlyReceiver):
        delimiter = b"\n"

        def lineReceived(self, line: bytes) -> None:
            self.sendLine(line)

    class Answering(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            self.answer = ANSWERS[service]()

        def dataReceived(self, data: bytes) -> None:
            if answer := self.answer(data):
                self.transport.write(answer)

    class EchoDatagrams(DatagramProtocol):
        transport: Any

        def datagramReceived(self, datagram: bytes, addr: Any) -> None:
            self.transport.write(datagram, addr)

    Factory.noisy = DatagramProtocol.noisy = False
    where = {"interface": "127.0.0.1"}
    if service == "timers":
        turn_timers(reactor.callLater, reactor.stop)
        return None
    if service == "udp":
        return reactor.listenUDP(0, EchoDatagrams(), **where)
    if service == "tls":
        from twisted.internet.ssl import PrivateCertificate

        pem = (folder / "server.pem").read_bytes()
        options = PrivateCertificate.loadPEM(pem).options()
        echo = Factory.forProtocol(Echo)
        return reactor.listenSSL(0, echo, options, backlog=BACKLOG, **where)
    factory: Any
    if service == "web":
        factory = web_site(folder)
    else:
        protocols = {"echo": Echo, "lines": EchoLines}
        factory = Factory.forProtocol(protocols.get(service, Answering))
    return reactor.listenTCP(0, factory, backlog=BACKLOG, **where)


def web_site(folder: Path) -> Any:
    from twisted.web.resource import Resource
    from twisted.web.server import Site
    from twisted.web.static import Data, File

    root = Resource()
    root.putChild(b"hello", Data(b"Hello, world!\n", "text/plain"))
    root.putChild(b"file", File(str(folder / "file")))
    return Site(root)


def coroutines(reactor_module: str, service: str, folder: Path) -> None:
    """The handlers of this package, on one of its reactors."""
    importlib.import_module(reactor_module).install()
    from twisted.internet import reactor

    from twisted_rtsig.coro import CoroutineFactory, Stream

    async def echo(stream: Stream) -> None:
        while data := await stream.read():
            await stream.write(data)

    async def echo_lines(stream: Stream) -> None:
        while True:
            line = await stream.read_line()
            await stream.write(line + b"\n")

    running: Any = reactor
    handlers = {"echo": echo, "lines": echo_lines}
    factory = CoroutineFactory(
        redis_example().Database().session if service == "redis" else handlers[service],
        # Thousands of connections are idle.
        max_connections=None,
        first_byte_timeout=None,
    )
    port = running.listenTCP(0, factory, backlog=BACKLOG, interface="127.0.0.1")
    ready(port.getHost().port)
    running.run()


def redis_example() -> Any:
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("redis_server")


# asyncio


def new_loop(module: str) -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = importlib.import_module(module).new_event_loop()
    return loop


def reading_64k(
    serve: Callable[[str, str, Path], None], service: str, folder: Path
) -> None:
    """Serve on asyncio's own loop, whose transports then read at most 64 KiB."""
    transport: Any = asyncio.selector_events._SelectorTransport  # type: ignore[attr-defined]
    transport.max_size = READ
    serve("asyncio", service, folder)


def asyncio_protocol(loop_module: str, service: str, folder: Path) -> None:
    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.answer = ANSWERS[service]()

        def data_received(self, data: bytes) -> None:
            if answer := self.answer(data):
                self.transport.write(answer)

    class EchoDatagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    loop = new_loop(loop_module)

    async def start() -> Any:
        if service == "udp":
            where = ("127.0.0.1", 0)
            transport, _ = await loop.create_datagram_endpoint(
                EchoDatagrams, local_addr=where
            )
            return transport.get_extra_info("sockname")
        server = await loop.create_server(
            Answering if service in ANSWERS else Echo,
            "127.0.0.1",
            0,
            backlog=BACKLOG,
            ssl=tls_context(service, folder),
        )
        return server.sockets[0].getsockname()

    if service == "timers":
        turn_timers(loop.call_later, loop.stop)
    else:
        ready(loop.run_until_complete(start())[1])
    loop.run_forever()


def asyncio_streams(loop_module: str, service: str, folder: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        echo = service not in ANSWERS
        answer = bytes if echo else ANSWERS[service]()
        while data := await reader.read(READ):
            writer.write(data if echo else answer(data))
            await writer.drain()
        writer.close()

    async def serve_lines(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    example = redis_example() if service == "redis" else None
    database = example.Database() if example else None

    async def serve_redis(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve the commands of the example, but read and write by asyncio."""
        assert example is not None
        connection = example.Connection(database, None)
        while line := await reader.readline():
            command = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                command.append((await reader.readexactly(size + 2))[:-2])
            writer.write(await connection.answer(command))
            await writer.drain()
        writer.close()

    handlers = {"lines": serve_lines, "redis": serve_redis}

    async def start() -> None:
        server = await asyncio.start_server(
            handlers.get(service, serve),
            "127.0.0.1",
            0,
            backlog=BACKLOG,
            ssl=tls_context(service, folder),
        )
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    new_loop(loop_module).run_until_complete(start())


def tls_context(service: str, folder: Path) -> ssl.SSLContext | None:
    if service != "tls":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


# No framework


def bare_loop(service: str, folder: Path) -> None:
    """Serve with a minimal loop, to show the cost of Python itself."""
    if service == "udp":
        return bare_datagrams()
    echo = service == "echo"
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listener.setblocking(False)
    listening = listener.fileno()
    poller = select.epoll()
    poller.register(listening, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    answers: dict[int, Callable[[bytes], bytes]] = {}
    rests: dict[int, bytes] = {}
    ready(listener.getsockname()[1])
    while True:
        for number, _ in poller.poll():
            if number == listening:
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    continue
                connection.setblocking(False)
                number = connection.fileno()
                connections[number] = connection
                if not echo:
                    answers[number] = ANSWERS[service]()
                poller.register(number, select.EPOLLIN)
                continue
            connection = connections[number]
            answer = b""
            try:
                if number in rests:
                    answer = rests.pop(number)
                    poller.modify(number, select.EPOLLIN)
                elif data := connection.recv(READ):
                    answer = data if echo else answers[number](data)
                else:
                    raise ConnectionResetError
                sent = connection.send(answer) if answer else 0
            except BlockingIOError:
                sent = 0
            except OSError:
                del connections[number]
                answers.pop(number, None)
                connection.close()
                continue
            if sent < len(answer):
                rests[number] = answer[sent:]
                poller.modify(number, select.EPOLLOUT)


def bare_datagrams() -> None:
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port.bind(("127.0.0.1", 0))
    port.setblocking(False)
    poller = select.epoll()
    poller.register(port, select.EPOLLIN)
    ready(port.getsockname()[1])
    while True:
        poller.poll()
        try:
            while True:
                data, address = port.recvfrom(READ)
                port.sendto(data, address)
        except BlockingIOError:
            pass


# The contenders

TCP = frozenset({"echo", "sink", "source"})
SERVICES = TCP | {"lines", "redis", "udp", "tls", "web", "timers"}
CALLBACKS = SERVICES - {"redis"}


@dataclass(frozen=True)
class Contender:
    """
    One of the servers that are compared.

    :ivar what: its name in the tables.
    :ivar serve: a function that serves; None for the server in C.
    :ivar services: the services that it supports.
    :ivar needs: a module that it needs.
    :ivar most: its limit of connections, if any.
    """

    what: str
    serve: Callable[[str, Path], None] | None
    services: frozenset[str]
    needs: str
    most: float = float("inf")

    def missing(self) -> bool:
        return importlib.util.find_spec(self.needs) is None


def reactor(what: str, module: str, most: float = float("inf")) -> Contender:
    return Contender(what, partial(twisted, module), CALLBACKS, module, most)


CONTENDERS = {
    "rtsig": reactor("rtsig reactor", "twisted_rtsig.rtsigreactor"),
    "rtsig-epoll": reactor("rtsig-epoll reactor", "twisted_rtsig.epollreactor"),
    "coro": Contender(
        "coroutines on the rtsig-epoll reactor",
        partial(coroutines, "twisted_rtsig.epollreactor"),
        frozenset({"echo", "lines", "redis"}),
        "twisted_rtsig",
    ),
    "epoll": reactor("Twisted's epoll reactor", "twisted.internet.epollreactor"),
    "poll": reactor("Twisted's poll reactor", "twisted.internet.pollreactor"),
    # select(2) takes 1,024 descriptors, of which a few are not connections.
    "select": reactor(
        "Twisted's select reactor", "twisted.internet.selectreactor", 1010
    ),
    "asyncio": reactor("Twisted's asyncio reactor", "twisted.internet.asyncioreactor"),
    "asyncio-uvloop": Contender(
        "Twisted's asyncio reactor on uvloop", twisted_on_uvloop, CALLBACKS, "uvloop"
    ),
    "rtsig-asyncio": reactor("rtsig-asyncio reactor", "twisted_rtsig.asyncioreactor"),
    "protocol": Contender(
        "asyncio.Protocol",
        partial(asyncio_protocol, "asyncio"),
        SERVICES - {"web", "lines", "redis"},
        "asyncio",
    ),
    "protocol-64k": Contender(
        "asyncio.Protocol, reads of at most 64 KiB",
        partial(reading_64k, asyncio_protocol),
        SERVICES - {"web", "lines", "redis"},
        "asyncio",
    ),
    "protocol-rtsig": Contender(
        "asyncio.Protocol on the loop of rtsig-asyncio",
        partial(asyncio_protocol, "twisted_rtsig.asyncioreactor"),
        SERVICES - {"web", "lines", "redis"},
        "twisted_rtsig",
    ),
    "protocol-uvloop": Contender(
        "asyncio.Protocol on uvloop",
        partial(asyncio_protocol, "uvloop"),
        SERVICES - {"web", "lines", "redis"},
        "uvloop",
    ),
    "streams": Contender(
        "asyncio streams",
        partial(asyncio_streams, "asyncio"),
        TCP | {"lines", "redis", "tls"},
        "asyncio",
    ),
    "streams-64k": Contender(
        "asyncio streams, reads of at most 64 KiB",
        partial(reading_64k, asyncio_streams),
        TCP | {"lines", "redis", "tls"},
        "asyncio",
    ),
    "streams-rtsig": Contender(
        "asyncio streams on the loop of rtsig-asyncio",
        partial(asyncio_streams, "twisted_rtsig.asyncioreactor"),
        TCP | {"lines", "redis", "tls"},
        "twisted_rtsig",
    ),
    "streams-uvloop": Contender(
        "asyncio streams on uvloop",
        partial(asyncio_streams, "uvloop"),
        TCP | {"lines", "redis", "tls"},
        "uvloop",
    ),
    "python": Contender("bare Python epoll loop", bare_loop, TCP | {"udp"}, "select"),
    "c": Contender("C epoll loop", None, TCP | {"udp"}, "select"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve as one of the contenders.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("service", choices=sorted(SERVICES))
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    # End when the parent process ends, for whatever reason (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    serve = CONTENDERS[options.contender].serve
    if serve is None or options.service not in CONTENDERS[options.contender].services:
        parser.error(f"{options.contender} does not serve {options.service} here")
    serve(options.service, options.folder)


if __name__ == "__main__":
    main()
