"""
The server of the soak test, which uses all parts of the package.

Its arguments are the name of a reactor and a folder for its files.  It prints its
addresses as one line of JSON, answers each line of its standard input with a report of
its state, and ends at the end of its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from twisted.application.reactors import installReactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ServerEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import (
    DatagramProtocol,
    Factory,
    ProcessProtocol,
    connectionDone,
)
from twisted.internet.ssl import CertificateOptions, PrivateCertificate
from twisted.logger import (
    ILogObserver,
    LogEvent,
    LogLevel,
    formatEvent,
    globalLogBeginner,
)
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web.server import Site
from zope.interface import implementer

from tests.soak import CHUNK, FILE_NAME, FILE_SIZE, pattern
from tests.soak.asyncio_side import AsyncioSide
from tests.support import make_certificate
from twisted_rtsig.coro import (
    Channel,
    Server,
    Stream,
    TaskGroup,
    from_thread,
    in_thread,
    open_datagrams,
    open_process,
    serve,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.inspection import format_tasks, tasks_of
from twisted_rtsig.files import open_file
from twisted_rtsig.files.web import StaticResource

IDLE_TIMEOUT = 10.0
REFUSALS_PAUSE = 0.05


@implementer(ILogObserver)
class Logged:
    """An observer that counts all events, and keeps the warnings and errors."""

    def __init__(self) -> None:
        self.lines = 0
        self.errors: list[str] = []

    def __call__(self, event: LogEvent) -> None:
        self.lines += 1
        if event.get("log_level", LogLevel.info) >= LogLevel.warn:
            text = formatEvent(event)
            failure = event.get("log_failure")
            if failure is not None:
                text += "\n" + failure.getTraceback()
            self.errors.append(text)


class Session:
    """
    The handler of the coroutine servers: answers commands, one a line.

    :param context: the certificate for ``STARTTLS``.
    :param file: the file of which ``SEND`` and ``READ`` send parts.
    """

    def __init__(self, reactor: Any, context: CertificateOptions, file: Path) -> None:
        self._reactor = reactor
        self._context = context
        self._file = str(file)
        self._commands: dict[bytes, Callable[..., Awaitable[None]]] = {
            b"SEND": self.send,
            b"READ": self.read,
            b"TAKE": self.take,
            b"CHILD": self.child,
            b"LEAVE": self.leave,
            b"SPAWN": self.spawn,
            b"THREAD": self.thread,
        }

    async def __call__(self, stream: Stream) -> None:
        async for line in stream.lines():
            verb, *arguments = line.split(b" ")
            if verb == b"ECHO":
                await stream.write(line + b"\n")
            elif verb == b"STARTTLS" and not ISSLTransport.providedBy(stream.transport):
                await stream.write(b"ready\n")
                try:
                    with timeout(IDLE_TIMEOUT):
                        await stream.start_tls(self._context)
                except TimeoutError:
                    return
            elif verb in self._commands:
                await self._commands[verb](stream, *map(int, arguments))
            else:
                await stream.write(b"unknown command\n")
                return

    async def send(self, stream: Stream, offset: int, size: int) -> None:
        """Send a part of the file with ``send_file``."""
        async with await open_file(self._file, "rb") as file:
            await stream.send_file(file, offset, size)

    async def read(self, stream: Stream, offset: int, size: int) -> None:
        """Read a part of the file, and write it piece by piece."""
        async with await open_file(self._file, "rb") as file:
            for start in range(offset, offset + size, CHUNK):
                data = await file.read_at(start, min(CHUNK, offset + size - start))
                await stream.write(data)

    async def take(self, stream: Stream, size: int) -> None:
        """Receive data through a channel, and answer with its digest."""
        pieces: Channel[bytes] = Channel(4)

        async def receive() -> None:
            left = size
            while left and (data := await stream.read(min(left, CHUNK))):
                left -= len(data)
                await pieces.send(data)
            pieces.close()

        digest = hashlib.sha256()
        async with TaskGroup() as group:
            group.spawn(receive)
            async for data in pieces:
                digest.update(data)
        await stream.write(digest.hexdigest().encode() + b"\n")

    async def child(self, stream: Stream, size: int) -> None:
        """Pass data through ``cat``, and answer with the digest of its output."""
        digest = hashlib.sha256()
        async with open_process(["cat"]) as cat, TaskGroup() as group:

            async def feed() -> None:
                for start in range(0, size, CHUNK):
                    await cat.stream.write(pattern(start, min(CHUNK, size - start)))
                await cat.stream.write_eof()

            group.spawn(feed)
            while data := await cat.stream.read():
                digest.update(data)
        await stream.write(digest.hexdigest().encode() + b"\n")

    async def leave(self, stream: Stream, size: int) -> None:
        """Answer with the first line of a child, and leave the rest of its output."""
        script = f"echo first; head -c {size} /dev/zero; head -c {size} /dev/zero >&2"
        async with open_process(["sh", "-c", script]) as child:
            first = await child.stream.read_line()
        await stream.write(first + b"\n")

    async def spawn(self, stream: Stream, status: int) -> None:
        """Answer with the exit status of a child of ``spawnProcess``."""
        ended: Channel[int] = Channel(1)
        script = ["sh", "-c", f"exit {status}"]
        self._reactor.spawnProcess(Ending(ended), "/bin/sh", script)
        await stream.write(b"%d\n" % await ended.receive())

    async def thread(self, stream: Stream, size: int) -> None:
        """Answer with a digest from a thread, which calls the reactor meanwhile."""

        async def answer() -> int:
            await sleep(0.001)
            return size

        def work() -> str:
            return hashlib.sha256(pattern(0, from_thread(answer))).hexdigest()

        await stream.write((await in_thread(work)).encode() + b"\n")


class Ending(ProcessProtocol):
    """Sends the exit status of a child to a channel."""

    def __init__(self, ended: Channel[int]) -> None:
        self._ended = ended

    def processEnded(self, reason: Failure) -> None:
        status: Any = reason.value
        self._ended.try_send(status.exitCode or 0)


class Lines(LineReceiver):
    """A protocol of Twisted that echoes lines."""

    delimiter = b"\n"
    factory: Any

    def connectionMade(self) -> None:
        self.factory.connections += 1

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(line)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.connections -= 1


class Datagrams(DatagramProtocol):
    """Echoes datagrams."""

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        transport: Any = self.transport
        transport.write(datagram, addr)


class Refusals:
    """
    Sends datagrams to a port without a socket.

    :ivar reported: how many refusals were reported.
    """

    def __init__(self) -> None:
        self.reported = 0

    async def run(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.bind(("127.0.0.1", 0))
            address = unused.getsockname()
            # This one cannot get the same port while the other socket is open.
            datagrams = open_datagrams(0, "127.0.0.1")
        datagrams.transport.connect(*address)
        while True:
            await datagrams.send_to(b"refused")
            try:
                with timeout(IDLE_TIMEOUT):
                    await datagrams.receive_from()
            except ConnectionRefusedError:
                self.reported += 1
            await sleep(REFUSALS_PAUSE)


class Soaked:
    """
    All services, and the state of the process.

    :param folder: the folder for the file, the certificate and the socket.
    """

    def __init__(self, reactor: Any, folder: Path) -> None:
        self._reactor = reactor
        self._folder = folder
        self._servers: list[Server] = []
        self._lines = Factory.forProtocol(Lines)
        self._site: Any = Site(StaticResource(str(folder)))
        self._refusals = Refusals()
        self._logged = Logged()
        # Not None on a reactor that is an asyncio event loop as well.
        self._asyncio: AsyncioSide | None = None
        if hasattr(reactor, "_asyncioEventloop"):
            self._asyncio = AsyncioSide(reactor, self._logged.errors.append)

    async def run(self) -> None:
        """Listen, then answer the lines of the standard input with reports."""
        globalLogBeginner.beginLoggingTo([self._logged], redirectStandardIO=False)
        print(json.dumps(await self._start()), flush=True)
        while await in_thread(sys.stdin.readline):
            print(json.dumps(self._report()), flush=True)
        self._reactor.stop()

    async def _start(self) -> dict[str, Any]:
        reactor, folder = self._reactor, self._folder
        file = folder / FILE_NAME
        file.write_bytes(pattern(0, FILE_SIZE))
        certificate, key = make_certificate(folder)
        both = certificate.read_bytes() + key.read_bytes()
        context = PrivateCertificate.loadPEM(both).options()
        session = Session(reactor, context, file)
        local = {"interface": "127.0.0.1"}
        path = str(folder / "socket")
        addresses: dict[str, Any] = {"certificate": str(certificate), "unix": path}
        for name, endpoint in (
            ("tcp", TCP4ServerEndpoint(reactor, 0, **local)),
            ("tls", SSL4ServerEndpoint(reactor, 0, context, **local)),
            ("unix", UNIXServerEndpoint(reactor, path)),
        ):
            server = await serve(endpoint, session, idle_timeout=IDLE_TIMEOUT)
            self._servers.append(server)
            port: Any = server.port
            addresses.setdefault(name, port.socket.getsockname())
        lines: Any = self._lines
        lines.connections = 0
        for name, factory in (("lines", lines), ("http", self._site)):
            factory.noisy = False
            port = reactor.listenTCP(0, factory, **local)
            addresses[name] = port.socket.getsockname()
        port = reactor.listenUDP(0, Datagrams(), **local)
        addresses["udp"] = port.socket.getsockname()
        spawn(self._refusals.run)
        if self._asyncio is not None:
            starting: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(
                self._asyncio.start(certificate, key)
            )
            further: dict[str, Any] = await Deferred.fromFuture(starting)
            addresses.update(further)
        return addresses

    def _report(self) -> dict[str, Any]:
        for _ in range(3):
            gc.collect()
        lines: Any = self._lines
        tasks = tasks_of(self._reactor)
        timers = self._reactor.getDelayedCalls()
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        errors = list(self._logged.errors)
        self._logged.errors.clear()
        side = self._asyncio
        return {
            "connections": lines.connections
            + (side.connections if side else 0)
            + sum(len(server.factory.connections) for server in self._servers),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": len(tasks) + (side.tasks() if side else 0),
            "timers": len(timers) + (side.timers() if side else 0),
            "watched": sum(
                self._reactor.statistics()[each] for each in ("readers", "writers")
            ),
            "objects": len(gc.get_objects()),
            "memory": resident,
            "refusals": self._refusals.reported,
            "logged": self._logged.lines,
            "errors": errors,
            "details": [format_tasks(), *map(str, timers)],
        }


def main() -> None:
    name, folder = sys.argv[1:]
    reactor: Any = installReactor(name)
    spawn(Soaked(reactor, Path(folder)).run, reactor=reactor)
    reactor.run()


if __name__ == "__main__":
    main()
