"""``FileProducer``, which passes a file to Twisted's consumers, on each reactor."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IConsumer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.coro.support import STYLES, run
from twisted_rtsig.coro import FileEnded, StreamError, connect, sleep, spawn
from twisted_rtsig.files import FileProducer, open_file

SIZE = 2_000_000


@pytest.fixture
def path(path: Path) -> Path:
    path.write_bytes(os.urandom(SIZE))
    return path


def serve_protocol(reactor: Any, protocol: type[Protocol]) -> tuple[Any, Any]:
    """A listening port, and an endpoint that connects to it."""
    factory = Factory.forProtocol(protocol)
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    return port, TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)


@implementer(IConsumer)
class Consumer:
    """Takes ``room`` bytes, and pauses its producer until ``take`` is called."""

    def __init__(self, room: int = SIZE) -> None:
        self.data = b""
        self.room = room
        self.producer: Any = None

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        assert self.producer is None
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        assert self.room > 0, "it was paused"
        self.data += data
        self.room -= len(data)
        if self.room <= 0:
            self.producer.pauseProducing()

    def take(self, room: int) -> None:
        self.room = room
        self.producer.resumeProducing()


def test_a_file_is_produced_for_a_consumer_that_pauses(
    reactor: Any, path: Path
) -> None:
    async def main() -> None:
        consumer = Consumer(1)
        async with await open_file(path) as file:
            producing = FileProducer(file, 10, SIZE - 20).start(consumer)
            before = -1
            while not producing.called:
                if len(consumer.data) == before and consumer.room <= 0:
                    consumer.take(300_000)
                before = len(consumer.data)
                await sleep(0.001)
            assert await producing == SIZE - 20
        assert consumer.data == path.read_bytes()[10:-10]
        assert consumer.producer is None

    run(reactor, main)


def test_a_file_is_produced_for_a_transport(reactor: Any, path: Path) -> None:
    received = []

    class Sender(Protocol):
        def connectionMade(self) -> None:
            spawn(self.send, reactor=reactor)

        async def send(self) -> None:
            async with await open_file(path) as file:
                transport: Any = self.transport
                produced = await FileProducer(file).start(transport)
            transport.write(b"%d" % produced)
            transport.loseConnection()

    port, endpoint = serve_protocol(reactor, Sender)

    async def main() -> None:
        async with await connect(endpoint) as stream:
            while chunk := await stream.read():
                received.append(chunk)
        await port.stopListening()

    run(reactor, main)
    assert b"".join(received) == path.read_bytes() + b"%d" % SIZE


def test_errors_of_producing_a_file(reactor: Any, path: Path) -> None:
    async def main() -> None:
        async with await open_file(path) as file:
            consumer = Consumer()
            with pytest.raises(FileEnded) as caught:
                await FileProducer(file, SIZE - 5, 10).start(consumer)
            assert (caught.value.sent, len(consumer.data)) == (5, 5)
            assert consumer.producer is None
            assert await FileProducer(file, SIZE + 5).start(Consumer()) == 0
            for offset, count in ((-1, 1), (0, -1)):
                with pytest.raises(ValueError, match="the least"):
                    FileProducer(file, offset, count)
            consumer = Consumer(100)
            producer = FileProducer(file)
            producing = producer.start(consumer)
            while not consumer.data:
                await sleep(0.001)
            consumer.producer.stopProducing()
            with pytest.raises(StreamError, match="the consumer has stopped"):
                await producing
            assert producer.produced == len(consumer.data) < SIZE
            producing = FileProducer(file).start(again := Consumer(100))
            while not again.data:
                await sleep(0.001)
            producing.cancel()
            with pytest.raises(CancelledError):
                await producing
            assert again.producer is None

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_a_stopped_consumer_is_reported_rather_than_a_closed_file(
    reactor: Any, path: Path, style: str
) -> None:
    """The program closes the file when the client has gone."""
    got: list[Any] = []

    async def main() -> None:
        file = await open_file(path)
        consumer = Consumer()
        closing: list[Any] = []

        def write(data: bytes) -> None:
            consumer.producer.stopProducing()
            closing.append(file.close())

        consumer.write = write  # type: ignore[method-assign]
        producing = FileProducer(file).start(consumer)
        STYLES[style](reactor, [lambda: producing, lambda: closing[0]], got)
        while len(got) < 2:
            await sleep(0.001)

    run(reactor, main)
    assert got == [StreamError, None]


def test_a_client_that_leaves_early_is_not_logged(
    reactor: Any, path: Path, logged: list[Any]
) -> None:
    """The result is not awaited, as in the example of FileProducer."""
    lost: list[Any] = []

    class Sender(Protocol):
        def connectionMade(self) -> None:
            open_file(path, reactor=reactor).addCallback(self.send)

        def send(self, file: Any) -> None:
            self.file = file
            transport: Any = self.transport
            FileProducer(file).start(transport, reactor)

        def connectionLost(self, reason: Failure = connectionDone) -> None:
            self.file.close()
            lost.append(reason)

    port, endpoint = serve_protocol(reactor, Sender)

    async def main() -> None:
        async with await connect(endpoint) as stream:
            await stream.read()
            await stream.abort()
        while not lost:
            await sleep(0.001)
        await port.stopListening()

    run(reactor, main)
    gc.collect()
    assert not [each for each in logged if each.get("log_failure")]
