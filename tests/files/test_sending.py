"""Sending files over streams, on each reactor and over each kind of connection."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import inlineCallbacks
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionClosed, ConnectionLost
from twisted.internet.interfaces import IReactorUNIX
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from twisted.internet.task import Clock
from twisted.logger import LogLevel

from tests.coro.support import STYLES, call, client_endpoint, connected, listen, run
from tests.files.support import Gate, SlowDisk, forget_cached
from tests.support import DEADLINE, frees_at_once
from twisted_rtsig.coro import (
    BusyResourceError,
    FileEnded,
    Stream,
    StreamError,
    connect,
    serve,
    sleep,
    spawn,
)
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.testing import SansIO
from twisted_rtsig.coro.testing.transports import Transport
from twisted_rtsig.files import AsyncFile, open_file

# Twisted uses functions of pyOpenSSL that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# More than the buffers of sockets hold.
SIZE = 20_000_000


@contextlib.asynccontextmanager
async def connected_with(
    reactor: Any, path: Path
) -> AsyncIterator[tuple[Stream, socket.socket, AsyncFile]]:
    """A stream, a plain socket at its other end, and an open file."""
    async with connected(reactor) as (stream, peer), await open_file(path) as file:
        yield stream, peer, file


needs_sendfile = pytest.mark.skipif(
    not hasattr(os, "sendfile"), reason="this platform has no sendfile"
)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


Handler = Callable[[Stream], Awaitable[Any]]


@pytest.fixture(params=["TCP", "UNIX", "TLS", "STARTTLS"])
def converse(
    request: Any, reactor: Any, tmp_path: Path, certificate: PrivateCertificate
) -> Converse:
    """Runs a handler and a client of it, over each kind of connection."""
    kind = request.param
    if kind == "UNIX" and not IReactorUNIX.providedBy(reactor):
        pytest.skip("this platform has no UNIX sockets")
    trusted = optionsForClientTLS("127.0.0.1", certificate)

    async def start(handler: Handler, client: Handler) -> Any:
        async def secured(stream: Stream) -> None:
            await stream.read_line()
            await stream.write(b"go ahead\n")
            await stream.start_tls(certificate.options())
            await spawn(handler, stream)

        server: Any
        if kind == "UNIX":
            server = UNIXServerEndpoint(reactor, str(tmp_path / "socket"))
        elif kind == "TLS":
            server = SSL4ServerEndpoint(
                reactor, 0, certificate.options(), interface="127.0.0.1"
            )
        else:
            server = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        serving = await serve(
            server, secured if kind == "STARTTLS" else handler, reactor=reactor
        )
        endpoint: Any
        if kind == "UNIX":
            endpoint = UNIXClientEndpoint(reactor, str(tmp_path / "socket"))
        else:
            endpoint = client_endpoint(reactor, serving)
        if kind == "TLS":
            endpoint = wrapClientTLS(trusted, endpoint)
        async with await connect(endpoint) as stream:
            if kind == "STARTTLS":
                await stream.write(b"STARTTLS\n")
                await stream.read_line()
                await stream.start_tls(trusted)
            result = await client(stream)
        await serving.stop(DEADLINE)
        return result

    return start


Converse = Callable[[Handler, Handler], Awaitable[Any]]


@pytest.fixture
def received_from(converse: Converse) -> Receive:
    """All data that a client gets from a handler, over each kind of connection."""

    async def receive(handler: Handler) -> bytes:
        data: bytes = await converse(handler, read_all)
        return data

    return receive


async def read_all(stream: Stream) -> bytes:
    chunks = []
    while chunk := await stream.read():
        chunks.append(chunk)
    return b"".join(chunks)


Receive = Callable[[Handler], Awaitable[bytes]]


def test_a_file_is_sent_between_earlier_and_later_writes(
    reactor: Any, received_from: Receive, big: Path
) -> None:
    told: list[int] = []
    results: list[Any] = []

    async def handler(stream: Stream) -> None:
        file = await open_file(big)
        await stream.write(b"before")
        sending = stream.send_file(file, progress=told.append)
        stream.write(b"between")
        part = stream.send_file(file, 1000, 500)
        stream.write(bytearray(b"after"))
        nothing = stream.send_file(file, SIZE)
        await stream.write(b"end")
        results.extend([await sending, await part, await nothing])
        await stream.write(b"!")
        await file.close()

    async def main() -> None:
        data = big.read_bytes()
        got = await received_from(handler)
        expected = [b"before", data, b"between", data[1000:1500], b"after", b"end!"]
        assert got == b"".join(expected)

    run(reactor, main)
    assert results == [SIZE, 500, 0]
    assert told == sorted(told)
    assert told[-1] == SIZE


def test_close_waits_for_the_file(
    reactor: Any, received_from: Receive, big: Path
) -> None:
    files: list[AsyncFile] = []

    async def handler(stream: Stream) -> None:
        files.append(await open_file(big))
        stream.write(b"x")
        stream.send_file(files[0])
        stream.close()
        with pytest.raises(StreamError, match="after close"):
            await stream.send_file(files[0])

    async def main() -> None:
        assert await received_from(handler) == b"x" + big.read_bytes()
        await files[0].close()

    run(reactor, main)


def test_a_file_that_is_not_cached_is_sent(
    reactor: Any, received_from: Receive, big: Path
) -> None:
    async def handler(stream: Stream) -> None:
        forget_cached(big)
        async with await open_file(big) as file:
            await stream.send_file(file, 5)

    async def main() -> None:
        assert await received_from(handler) == big.read_bytes()[5:]

    run(reactor, main)


def test_a_part_beyond_4_gb_is_sent(
    reactor: Any, received_from: Receive, tmp_path: Path
) -> None:
    far = (1 << 32) + 12345
    data = os.urandom(200_000)

    async def handler(stream: Stream) -> None:
        async with await open_file(tmp_path / "far", "w+b") as file:
            await file.write_at(far, data)
            assert await stream.send_file(file, far) == len(data)
            assert await stream.send_file(file, far + 5, 10) == 10

    async def main() -> None:
        assert await received_from(handler) == data + data[5:15]

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, style: str, big: Path) -> None:
    got: list[Any] = []

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            file = await open_file(big)
            STYLES[style](
                reactor,
                [
                    lambda: stream.send_file(file, 0, 100_000),
                    lambda: stream.send_file(file, 0, 10),
                    lambda: stream.send_file(file, SIZE - 10, 100),
                ],
                got,
            )
            received = 0
            while len(got) < 3 or received < 100_020:
                received += await some(peer)
            await file.close()

    run(reactor, main)
    assert got == [100_000, 10, FileEnded]


async def some(peer: socket.socket) -> int:
    """How many bytes have arrived at a peer."""
    try:
        return len(peer.recv(1 << 20))
    except BlockingIOError:
        await sleep(0.001)
        return 0


async def next_bytes(peer: socket.socket) -> int:
    """How many bytes arrive next at a peer; 0 at the end."""
    while True:
        try:
            return len(peer.recv(1 << 20))
        except BlockingIOError:
            await sleep(0.001)


def test_write_eof_waits_for_the_file(reactor: Any, big: Path) -> None:
    async def main() -> None:
        async with connected_with(reactor, big) as (stream, peer, file):
            stream.send_file(file)
            ended = stream.write_eof()
            with pytest.raises(StreamError, match="after write_eof"):
                await stream.write(b"x")
            received = 0
            while received < SIZE:
                received += await some(peer)
            await ended
            assert await next_bytes(peer) == 0
            peer.send(b"still there")
            assert await stream.read() == b"still there"

    run(reactor, main)


@needs_sendfile
def test_a_file_is_sent_without_sendfile(
    reactor: Any, big: Path, monkeypatch: pytest.MonkeyPatch, received_from: Receive
) -> None:
    monkeypatch.delattr(os, "sendfile")
    test_a_file_is_sent_between_earlier_and_later_writes(reactor, received_from, big)


@needs_sendfile
def test_a_file_that_sendfile_refuses_is_sent(
    reactor: Any, big: Path, monkeypatch: pytest.MonkeyPatch, received_from: Receive
) -> None:
    refused = []
    sendfile = os.sendfile

    def refuse(socket: int, file: int, offset: int, count: int) -> int:
        if offset > 100_000:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return sendfile(socket, file, offset, 50_001)

    monkeypatch.setattr(os, "sendfile", refuse)

    async def handler(stream: Stream) -> None:
        async with await open_file(big) as file:
            assert await stream.send_file(file) == SIZE

    async def main() -> None:
        assert await received_from(handler) == big.read_bytes()

    run(reactor, main)


# Errors


@pytest.mark.parametrize("held", ["", "unread"])
def test_send_file_after_the_peer_has_left(
    reactor: Any, big: Path, held: str, logged: list[Any]
) -> None:
    async def main() -> None:
        async with connected_with(reactor, big) as (stream, peer, file):
            told: list[int] = []
            sending = stream.send_file(file, progress=told.append)
            following = stream.write(b"x"), stream.send_file(file)
            stream.write(b"not awaited")
            while not told:
                await sleep(0.001)
            while not await some(peer):
                pass
            peer.send(held.encode())
            peer.close()
            for each in (sending, *following):
                with pytest.raises(ConnectionClosed):
                    await each
            with pytest.raises(ConnectionClosed):
                await stream.send_file(file)
            await sleep(0)
            assert stream.lost

    run(reactor, main)
    gc.collect()
    assert not [each for each in logged if each.get("log_failure")]


def _async_handler(path: Path, begin: Begin) -> Handler:
    async def handler(stream: Stream) -> None:
        async with await open_file(path) as file:
            await begin(stream, file)

    return handler


def _generator_handler(path: Path, begin: Begin) -> Handler:
    def handler(stream: Stream) -> Generator[Any, Any, None]:
        file = yield open_file(path)
        try:
            yield begin(stream, file)
        finally:
            yield file.close()

    return handler  # type: ignore[return-value]


Begin = Callable[[Stream, AsyncFile], Any]

# Each makes a handler from the path of a file and a function that begins to send it.
HANDLERS: dict[str, Callable[[Path, Begin], Handler]] = {
    "async def": _async_handler,
    "generator": _generator_handler,
    "@inlineCallbacks": lambda *args: inlineCallbacks(_generator_handler(*args)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("count", [None, SIZE])
@pytest.mark.parametrize("style", HANDLERS)
def test_a_peer_that_leaves_early_is_one_line_in_the_log(
    reactor: Any,
    converse: Converse,
    big: Path,
    count: int | None,
    style: str,
    logged: list[Any],
) -> None:
    """The line reports the connection, and not the socket or file, which are closed."""
    reactor.suggestThreadPoolSize(1)

    async def leave_early(awaited: bool) -> None:
        gate = Gate()
        accepted: list[Stream] = []

        def begin(stream: Stream, file: AsyncFile) -> Any:
            accepted.append(stream)
            # This delays the look at the size of the file, or the first piece of it.
            reactor.callInThread(gate.wait)
            sending = stream.send_file(file, 0, count)
            return sending if awaited else stream.write(b"that is all\n")

        async def client(stream: Stream) -> None:
            while not gate.reached.is_set():
                await sleep(0.001)
            await stream.abort()
            # A UNIX socket that is closed looks like half a close.
            while not (accepted[0].lost or accepted[0].ended):
                await sleep(0.001)
            gate.open()

        try:
            await converse(HANDLERS[style](big, begin), client)
        finally:
            gate.open()

    for awaited in (True, False):
        run(reactor, leave_early, awaited)
        gc.collect()
        assert not [each for each in logged if each.get("log_failure")]
        lines = [each for each in logged if "error" in each]
        assert [each["log_level"] for each in lines] == [LogLevel.info]
        assert "onnection" in lines[0]["error"]
        logged.clear()


@needs_sendfile
def test_a_handler_cancelled_in_the_middle_of_a_file_logs_nothing(
    reactor: Any, big: Path, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    reactor.suggestThreadPoolSize(1)
    disk = SlowDisk(monkeypatch, "send")
    closing = Gate()
    files: list[AsyncFile] = []
    sendings: list[Any] = []

    async def handler(stream: Stream) -> None:
        async with await open_file(big) as file:
            files.append(file)
            sendings.append(stream.send_file(file, 0, SIZE))
            await stream.write(b"that is all\n")

    async def main() -> None:
        server = await listen(reactor, handler)
        async with await call(reactor, server) as stream:
            reading = spawn(read_all, stream)
            while not disk.gate.reached.is_set():
                await sleep(0.001)
            # The same thread closes the file, but not before the next piece of it
            # could be sent.
            reactor.callInThread(closing.wait)
            stopped = server.stop()
            while not files[0].closed:
                await sleep(0.001)
            disk.gate.open()
            while not sendings[0].called:
                await sleep(0.001)
            closing.open()
            await stopped
            with pytest.raises(ConnectionLost):
                await reading

    try:
        run(reactor, main)
    finally:
        disk.gate.open()
        closing.open()
    sendings.clear()
    gc.collect()
    assert not [each for each in logged if each.get("log_failure")]


@frees_at_once
def test_a_file_that_the_handler_closes_too_early_is_logged(
    reactor: Any, received_from: Receive, big: Path, logged: list[Any]
) -> None:
    told: list[int] = []

    async def handler(stream: Stream) -> None:
        async with await open_file(big) as file:
            stream.send_file(file, 0, SIZE, told.append)
            while not told:
                await sleep(0.001)

    async def main() -> None:
        assert 0 < len(await received_from(handler)) < SIZE

    run(reactor, main)
    gc.collect()
    failures = [each["log_failure"] for each in logged if each.get("log_failure")]
    assert [each.type for each in failures] == [ValueError]
    assert "is closed" in failures[0].getErrorMessage()


@needs_sendfile
def test_abort_in_the_middle_of_a_file(
    reactor: Any, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch, "send")

    async def main() -> None:
        async with connected(reactor) as (stream, _):
            file = await open_file(big)
            sending = stream.send_file(file)
            while not disk.gate.reached.is_set():
                await sleep(0.001)
            closing = file.close()
            aborted = stream.abort()
            disk.gate.open()
            with pytest.raises(ConnectionClosed):
                await sending
            await aborted
            await closing

    run(reactor, main)


@pytest.mark.parametrize("cut", [100, 10_000_000])
def test_a_file_that_is_truncated_while_it_is_sent(
    reactor: Any, path: Path, cut: int
) -> None:
    path.write_bytes(bytes(SIZE))

    async def main() -> None:
        async with connected_with(reactor, path) as (stream, peer, file):
            told: list[int] = []
            sending = stream.send_file(file, progress=told.append)
            following = stream.write(b"after")
            while not told:
                await sleep(0.001)
            os.truncate(path, cut)
            received = 0
            while not sending.called:
                received += await some(peer)
            with pytest.raises(FileEnded, match=f"of the {SIZE} bytes") as caught:
                await sending
            # No data may follow the incomplete file.
            for writing in (following, stream.write(b"x")):
                with pytest.raises(StreamError, match="after a part of a file"):
                    await writing
            stream.close()
            while received < caught.value.sent:
                received += await some(peer)
            spun = await some(peer)
            assert (spun, received) == (0, caught.value.sent)

    run(reactor, main)


def test_a_file_of_which_no_byte_can_be_sent(reactor: Any, big: Path) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            file = await open_file(big)
            with pytest.raises(FileEnded) as caught:
                await stream.send_file(file, SIZE, 1)
            assert caught.value.sent == 0
            await file.close()
            for count in (1, 1 << 20):
                with pytest.raises(ValueError, match="is closed"):
                    await stream.send_file(file, 0, count)
            for offset, count in ((-1, 1), (0, -1)):
                with pytest.raises(ValueError, match="0 is the least"):
                    stream.send_file(file, offset, count)
            # No byte was sent, so that the conversation can go on.
            await stream.write(b"sorry")
            while not (received := await some(peer)):
                pass
            assert received == 5

    run(reactor, main)


def test_a_cancelled_send_file_breaks_the_stream(reactor: Any, big: Path) -> None:
    async def main() -> None:
        async with connected_with(reactor, big) as (stream, peer, file):
            told: list[int] = []
            sending = stream.send_file(file, progress=told.append)
            queued = stream.send_file(file)
            queued.addErrback(lambda _: None).cancel()
            while not told:
                await sleep(0.001)
            sending.addErrback(lambda _: None).cancel()
            with pytest.raises(StreamError, match="after a part of a file"):
                await stream.write(b"x")
            stream.close()
            received = 0
            while chunk := await next_bytes(peer):
                received += chunk
            assert told[-1] == received < SIZE

    run(reactor, main)


@pytest.mark.parametrize("where", ["in progress", "between"])
def test_send_file_is_cancelled_at_every_point(
    reactor: Any, big: Path, where: str
) -> None:
    """The peer gets the bytes of the last progress, and no others."""

    async def cancel_after(point: int) -> bool:
        """Whether the file was not sent by then."""
        told = [0]

        def tell(sent: int) -> None:
            told.append(sent)
            if where == "in progress" and len(told) > point:
                sending.cancel()

        async with connected_with(reactor, big) as (stream, peer, file):
            sending = stream.send_file(file, 0, size, progress=tell)
            sending.addErrback(lambda _: None)
            if where == "in progress" and not point:
                sending.cancel()
            received = 0
            while len(told) <= point and not sending.called:
                received += await some(peer)
            ended = told[-1] == size
            sending.cancel()
            closing = stream.close()
            while chunk := await next_bytes(peer):
                received += chunk
            await closing
            assert told[-1] == received
        return not ended

    async def main() -> None:
        point = 0
        while await cancel_after(point):
            point += 1
        # Between two steps of progress, many steps may be made before the test looks.
        assert point > (2 if where == "in progress" else 0)

    # More than a thread sends at once, or than is read and written at once.
    size = 12_000_000 if hasattr(os, "sendfile") else 500_000
    run(reactor, main)


def test_a_queued_send_file_is_cancelled(
    reactor: Any, received_from: Receive, big: Path
) -> None:
    async def handler(stream: Stream) -> None:
        async with await open_file(big) as file:
            first = stream.send_file(file, 0, 100_000)
            stream.send_file(file).addErrback(lambda _: None).cancel()
            await stream.write(b"after")
            await first

    async def main() -> None:
        assert await received_from(handler) == big.read_bytes()[:100_000] + b"after"

    run(reactor, main)


def test_a_write_after_the_file_waits_for_a_slow_peer(reactor: Any, big: Path) -> None:
    async def main() -> None:
        async with connected_with(reactor, big) as (stream, peer, file):
            sending = stream.send_file(file)
            writing = stream.write(b"after")
            await sleep(0.1)
            assert [sending.called, writing.called] == [False, False]
            task = spawn(wait_for, sending)
            await sleep(0)
            assert f"to be sent to {stream!r}" in str(task.waits_for())
            received = 0
            while received < SIZE + 5:
                received += await some(peer)
            assert await sending == SIZE
            await writing
            await task

    async def wait_for(sending: Any) -> None:
        await sending

    run(reactor, main)


def test_start_tls_is_refused_while_a_file_is_sent(reactor: Any, big: Path) -> None:
    async def main() -> None:
        async with connected_with(reactor, big) as (stream, _, file):
            sending = stream.send_file(file)
            with pytest.raises(BusyResourceError, match="sends a file"):
                stream.start_tls(None)
            sending.addErrback(lambda _: None).cancel()

    run(reactor, main)


def test_a_progress_function_that_fails(reactor: Any, big: Path) -> None:
    def progress(sent: int) -> None:
        raise KeyError("of the test")

    async def main() -> None:
        async with connected_with(reactor, big) as (stream, _, file):
            for count in (1000, 1 << 20):
                with pytest.raises((KeyError, StreamError)):
                    await stream.send_file(file, 0, count, progress)

    run(reactor, main)


def test_send_file_without_sockets(path: Path) -> None:
    path.write_bytes(bytes(200_000))

    async def handler(stream: Stream) -> None:
        async with await open_file(path) as file:
            stream.send_file(file)
            await stream.write(b"after")

    conversation = SansIO(handler)
    got = b""
    while data := conversation.written():
        got += data
    assert got == bytes(200_000) + b"after"
    assert (conversation.result(), conversation.ended) == (None, "closed")


class _Fragile(Transport):
    """A transport that loses its connection when ``after`` is written to it."""

    def send(self, data: bytes) -> None:
        if data == b"after":
            self.lose(ConnectionLost(), "lost")
        else:
            self.sent(len(data))


def test_a_connection_that_is_lost_by_what_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    clock = Clock()
    stream = _Fragile(scheduler_for(clock), 0).protocol.stream

    async def main() -> None:
        async with await open_file(path) as file:
            sending = stream.send_file(file)
            writing = stream.write(b"after")
            assert await sending == 200_000
            with pytest.raises(ConnectionLost):
                await writing

    task = spawn(main, reactor=clock)
    while clock.getDelayedCalls():
        clock.advance(0)
    assert task.done
    task.result()
