"""
The conformance kit: this package's streams keep its rules over every transport, and a
stream that breaks a rule is reported.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IReactorUNIX
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock

from tests.coro.support import run, run_for_real
from twisted_rtsig.coro import (
    ByteStream,
    Channel,
    Event,
    IncompleteRead,
    Server,
    StapledStream,
    Stream,
    connect,
    open_process,
    serve,
    spawn,
)
from twisted_rtsig.coro.testing import (
    STREAM_CHECKS,
    MakePair,
    StreamCheck,
    stream_pair,
)

# Twisted and pyOpenSSL hold different opinions on what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

every_check = pytest.mark.parametrize(
    "check", STREAM_CHECKS, ids=lambda each: each.__name__
)


# Over sockets


@dataclass
class Accepting:
    """A server, and clients that connect to it."""

    reactor: Any
    listening: Any
    connecting: Callable[[Any], Any]

    def __post_init__(self) -> None:
        self.accepted: Channel[Stream] = Channel(0)

    async def __aenter__(self) -> MakePair:
        self.server: Server = await serve(
            self.listening, self.accept, reactor=self.reactor
        )
        return self.make_pair

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop()

    async def accept(self, stream: Stream) -> None:
        await self.accepted.send(stream)
        # Until it is cancelled.
        await Event().wait()

    async def make_pair(self) -> tuple[Stream, Stream]:
        one = await connect(self.connecting(self.server.port.getHost()))
        return one, await self.accepted.receive()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """The path of a UNIX socket may not be long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def over_tcp(reactor: Any, **_: Any) -> Accepting:
    return Accepting(
        reactor,
        TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1"),
        lambda host: TCP4ClientEndpoint(reactor, host.host, host.port),
    )


def over_tls(reactor: Any, certificate: PrivateCertificate, **_: Any) -> Accepting:
    trusted = optionsForClientTLS("127.0.0.1", certificate)
    tcp = over_tcp(reactor)
    return Accepting(
        reactor,
        SSL4ServerEndpoint(reactor, 0, certificate.options(), interface="127.0.0.1"),
        lambda host: wrapClientTLS(trusted, tcp.connecting(host)),
    )


def over_unix(reactor: Any, folder: Path, **_: Any) -> Accepting:
    if not IReactorUNIX.providedBy(reactor):
        pytest.skip("this reactor has no UNIX sockets")
    path = str(folder / "socket")
    return Accepting(
        reactor,
        UNIXServerEndpoint(reactor, path),
        lambda host: UNIXClientEndpoint(reactor, path),
    )


@every_check
@pytest.mark.parametrize("transport", [over_tcp, over_tls, over_unix])
def test_over_sockets(
    reactor: Any,
    certificate: PrivateCertificate,
    short_folder: Path,
    transport: Callable[..., Accepting],
    check: StreamCheck,
) -> None:
    async def main() -> None:
        accepting = transport(reactor, certificate=certificate, folder=short_folder)
        async with accepting as make_pair:
            await check(make_pair)

    run(reactor, main)


# In memory


def run_in_memory(check: StreamCheck, make_pair: Callable[[Clock], Any]) -> None:
    """On a clock that passes as soon as nothing else happens."""
    clock = Clock()

    async def make() -> Any:
        return make_pair(clock)

    checking = spawn(check, make, reactor=clock)
    while not checking.done:
        due = min(each.getTime() for each in clock.getDelayedCalls())
        clock.advance(max(0.0, due - clock.seconds()))
    checking.result()


@every_check
@pytest.mark.parametrize("latency", [0, 0.1])
@pytest.mark.parametrize("buffer_size", [0, 1000, 1 << 16])
def test_in_memory(latency: float, buffer_size: int, check: StreamCheck) -> None:
    run_in_memory(
        check,
        lambda clock: stream_pair(
            buffer_size=buffer_size, latency=latency, reactor=clock
        ),
    )


@every_check
def test_in_memory_on_a_reactor(reactor: Any, check: StreamCheck) -> None:
    async def make() -> tuple[Stream, Stream]:
        return stream_pair()

    run(reactor, check, make)


# Two streams as one


def stapled(reactor: Any = None) -> tuple[StapledStream, StapledStream]:
    one, other = stream_pair(reactor=reactor)
    third, fourth = stream_pair(reactor=reactor)
    return StapledStream(one, third), StapledStream(fourth, other)


@every_check
def test_stapled_in_memory(check: StreamCheck) -> None:
    run_in_memory(check, stapled)


class OfAnotherPackage:
    """
    A ``ByteStream`` whose methods are coroutines, and which has nothing else.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def ended(self) -> bool:
        return self._stream.ended

    async def read(self, max_bytes: int = 1 << 16) -> bytes:
        return await self._stream.read(max_bytes)

    async def peek(self, max_bytes: int = 1 << 16) -> bytes:
        return await self._stream.peek(max_bytes)

    async def read_exactly(self, size: int) -> bytes:
        return await self._stream.read_exactly(size)

    async def read_until(self, delimiter: bytes, max_bytes: int = 1 << 16) -> bytes:
        return await self._stream.read_until(delimiter, max_bytes)

    async def read_line(self, max_bytes: int = 1 << 16) -> bytes:
        return await self._stream.read_line(max_bytes)

    async def read_until_regex(
        self, pattern: bytes | re.Pattern[bytes], max_bytes: int = 1 << 16
    ) -> bytes:
        return await self._stream.read_until_regex(pattern, max_bytes)

    async def lines(self, max_bytes: int = 1 << 16) -> AsyncIterator[bytes]:
        async for line in self._stream.lines(max_bytes):
            yield line

    @property
    def lost(self) -> bool:
        return self._stream.lost

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.write(data)

    async def write_eof(self) -> None:
        await self._stream.write_eof()

    async def close(self) -> None:
        await self._stream.close()

    async def abort(self) -> None:
        await self._stream.abort()

    async def __aenter__(self) -> OfAnotherPackage:
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        await (self.close() if error is None else self.abort())


@pytest.mark.parametrize("as_one", [False, True])
@every_check
def test_streams_of_another_package(
    reactor: Any, check: StreamCheck, as_one: bool
) -> None:
    async def make() -> tuple[ByteStream, ByteStream]:
        one, other = map(OfAnotherPackage, stream_pair())
        if not as_one:
            return one, other
        third, fourth = map(OfAnotherPackage, stream_pair())
        return StapledStream(one, third), StapledStream(fourth, other)

    run(reactor, check, make)


def test_a_stapled_stream_closes_both_even_after_an_error() -> None:
    async def main() -> None:
        one, other = stream_pair()
        third, fourth = stream_pair()
        with contextlib.suppress(KeyError):
            async with StapledStream(one, third) as both:
                assert "StapledStream of" in repr(both)
                raise KeyError
        assert one.lost
        assert third.lost

        class Fails(Broken):
            async def close(self) -> None:
                raise OSError("cannot be closed")

        both = StapledStream(Fails(other), fourth)
        with pytest.raises(OSError, match="cannot be closed"):
            await both.close()
        assert fourth.lost

    clock = Clock()
    task = spawn(main, reactor=clock)
    while not task.done:
        clock.advance(0)
    task.result()


# A process


RELAY = """
import os, select, socket, sys

peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
# What ends a direction, and what is read from it and written to it.
ways = {0: peer.fileno(), peer.fileno(): 1}
poll = select.poll()
for source in ways:
    poll.register(source, select.POLLIN)
poll.register(1, 0)
while ways:
    for source, event in poll.poll():
        if source == 1:
            # Nothing reads the output any more; the input may not be at its end.
            poll.unregister(1)
            if ways.pop(peer.fileno(), None) is not None:
                poll.unregister(peer.fileno())
            continue
        if source not in ways:
            continue
        try:
            data = os.read(source, 1 << 16)
            left = memoryview(data)
            while left:
                left = left[os.write(ways[source], left) :]
        except OSError:
            os._exit(0)
        if not data:
            poll.unregister(source)
            target = ways.pop(source)
            if target == 1:
                poll.unregister(1)
                os.close(1)
            else:
                peer.shutdown(socket.SHUT_WR)
"""


@pytest.mark.processes
@every_check
@pytest.mark.skipif(sys.platform == "win32", reason="poll and pipes of POSIX")
def test_the_stream_of_a_process(reactor: Any, check: StreamCheck) -> None:
    """The program is one side, and a connection that it makes the other one."""

    async def main() -> None:
        processes = []
        accepting = over_tcp(reactor)
        async with accepting:
            port = accepting.server.port.getHost().port

            async def make() -> tuple[ByteStream, ByteStream]:
                command = [sys.executable, "-c", RELAY, str(port)]
                process = open_process(command)
                processes.append(process)
                return process.stream, await accepting.accepted.receive()

            await check(make)
        for process in processes:
            await process.wait()

    run_for_real(reactor, main)


# What breaks a rule


class Broken:
    """As good as another stream, but for one thing."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    async def __aenter__(self) -> Broken:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class ForgetsWhatItReads(Broken):
    async def read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self.stream.read_exactly(1)
        return data


class Reorders(Broken):
    def write(self, data: bytes) -> Any:
        return self.stream.write(bytes(data)[::-1])


class HasNoLimit(Broken):
    def read_line(self, max_bytes: int = 0) -> Any:
        return self.stream.read_line()


class NeverWaits(Broken):
    async def write(self, data: bytes) -> None:
        self.stream.write(data)


class KeepsTheBuffer(Broken):
    async def write(self, data: bytes) -> None:
        spawn(self.stream.write, data)


class HidesTheEnd(Broken):
    async def read_exactly(self, size: int) -> bytes:
        try:
            return await self.stream.read_exactly(size)
        except IncompleteRead as end:
            return end.partial


class LosesTheLast(Broken):
    def close(self) -> Any:
        return self.stream.abort()


class NeverHalfCloses(Broken):
    async def write_eof(self) -> None:
        pass


BREAKS = {
    ForgetsWhatItReads: "a_cancelled_read_takes_nothing",
    Reorders: "everything_arrives_in_order",
    HasNoLimit: "reads_have_a_limit",
    NeverWaits: "writes_wait_for_the_reader",
    KeepsTheBuffer: "what_was_written_may_change",
    HidesTheEnd: "the_end_comes_after_the_rest",
    LosesTheLast: "close_is_final",
    NeverHalfCloses: "half_close",
}


@pytest.mark.parametrize(("broken", "name"), BREAKS.items())
def test_the_checks_notice_broken_rules(broken: Any, name: str) -> None:
    (check,) = [each for each in STREAM_CHECKS if each.__name__ == name]

    def make(clock: Clock) -> Any:
        one, other = stream_pair(reactor=clock)
        return broken(one), broken(other)

    with pytest.raises((AssertionError, ConnectionLost)):
        run_in_memory(check, make)
