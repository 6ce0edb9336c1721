"""Reading from and writing to streams, over real connections, on each reactor."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import ConnectionLost

from tests.coro.support import call, connected, listen, run
from tests.files.support import counted_turns
from tests.support import reset
from twisted_rtsig.coro import (
    BusyResourceError,
    DelimiterNotFound,
    IncompleteRead,
    Stream,
    StreamError,
    coroutine,
    sleep,
    spawn,
    timeout,
)


async def _session(stream: Stream) -> None:
    """Read in each way; the same as the generators below."""
    await stream.write(b"who?\n")
    name = await stream.read_line()
    size = int(await stream.read_until(b";"))
    data = await stream.read_exactly(size)
    word = await stream.read_until_regex(rb"\w+[.!]")
    start = await stream.peek(1)
    rest = await stream.read_line()
    await stream.write(repr((name, data, word, start, rest)).encode())
    await stream.write_eof()
    assert await stream.read() == b""


def _generator(stream: Stream) -> Generator[Any, Any, None]:
    yield stream.write(b"who?\n")
    name = yield stream.read_line()
    size = yield stream.read_until(b";")
    data = yield stream.read_exactly(int(size))
    word = yield stream.read_until_regex(rb"\w+[.!]")
    start = yield stream.peek(1)
    rest = yield stream.read_line()
    yield stream.write(repr((name, data, word, start, rest)).encode())
    yield stream.write_eof()
    assert (yield stream.read()) == b""


SESSIONS = {
    "async def": _session,
    "generator": _generator,
    "@coroutine": coroutine(_generator),
    "@inlineCallbacks": inlineCallbacks(_generator),
    "fromCoroutine": lambda stream: Deferred.fromCoroutine(_session(stream)),
}


@pytest.mark.parametrize("style", SESSIONS)
@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_the_same_session_in_every_style(reactor: Any, style: str, pieces: int) -> None:
    text = b"me\r\n5;12345 hello! the rest\n"

    async def client() -> bytes:
        server = await listen(reactor, SESSIONS[style])
        async with await call(reactor, server) as stream:
            assert await stream.read_line() == b"who?"
            for start in range(0, len(text), pieces):
                await stream.write(text[start : start + pieces])
                await sleep(0)
            answer = await stream.read_until(b")")
            assert await stream.read() == b""
        await server.stop()
        return answer

    expected = (b"me", b"12345", b" hello!", b" ", b" the rest")
    assert run(reactor, client) == repr(expected).encode()[:-1]


def test_reads_of_the_data_left_at_the_end(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"one\ntwo")
            peer.shutdown(socket.SHUT_WR)
            assert [await stream.read_line(), await stream.peek(1)] == [b"one", b"t"]
            with pytest.raises(
                IncompleteRead, match="3 bytes, in the middle of a line"
            ):
                await stream.read_line()
            with pytest.raises(IncompleteRead) as caught:
                await stream.read_exactly(2)
            assert caught.value.partial == b""
            assert [await stream.read(), await stream.peek()] == [b"", b""]
            # The other direction is open still.
            await stream.write(b"answer")
            assert await from_peer(peer, 6) == b"answer"

    async def from_peer(peer: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                data += peer.recv(size)
            except BlockingIOError:
                await sleep(0.01)
        return data

    run(reactor, main)


@pytest.mark.parametrize(
    "read",
    [
        lambda stream: stream.read_exactly(8),
        lambda stream: stream.read_until(b"\n"),
        lambda stream: stream.read_until_regex(re.compile(rb"\d")),
    ],
)
def test_incomplete_read_holds_the_partial_data(reactor: Any, read: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"partial")
            peer.shutdown(socket.SHUT_WR)
            with pytest.raises(IncompleteRead) as caught:
                await read(stream)
            assert caught.value.partial == b"partial"

    run(reactor, main)


def test_limits(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"12345\r\nx")
            assert await stream.read_line(5) == b"12345"
            peer.sendall(b"12345678")
            for reading in (
                lambda: stream.read_line(4),
                lambda: stream.read_until(b";", 4),
                lambda: stream.read_until_regex(b"z", 4),
            ):
                with pytest.raises(DelimiterNotFound, match="within 4 bytes") as caught:
                    await reading()
                assert caught.value.max_bytes == 4
            # It is all there still.
            assert await stream.read_exactly(9) == b"x12345678"
            peer.sendall(b"12345")
            with pytest.raises(DelimiterNotFound):
                await stream.read_line(4)
            assert await stream.read(2) == b"12"

    run(reactor, main)


def test_a_higher_limit_after_a_lower_one(reactor: Any) -> None:
    """What was found out about the data behind a line does not count for the line."""

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            text = b"much too long\nb"
            peer.sendall(text)
            while await stream.peek() != text:
                await sleep(0)
            with pytest.raises(DelimiterNotFound):
                await stream.read_line(5)
            assert await stream.read_line() == b"much too long"
            reading = stream.read_line()
            peer.sendall(b"\n")
            line = await reading
            assert line == b"b"

    run(reactor, main)


def test_bad_arguments(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, _):
            for reading in (
                lambda: stream.read(0),
                lambda: stream.read_line(-1),
                lambda: stream.read_exactly(-1),
                lambda: stream.read_until(b""),
            ):
                with pytest.raises(ValueError, match=r"least|empty"):
                    reading()
            for data in ["text", 5]:
                with pytest.raises(TypeError):
                    stream.write(data)  # type: ignore[arg-type]
            assert await stream.read_exactly(0) == b""

    run(reactor, main)


@pytest.mark.parametrize(
    "read",
    [
        lambda stream: stream.read(2.5),
        lambda stream: stream.read_exactly(2.5),
        lambda stream: stream.read_line(2.5),
        lambda stream: stream.read_until("\n"),
        lambda stream: stream.read_until_regex("\n"),
    ],
)
def test_bad_arguments_are_an_error_of_the_read(reactor: Any, read: Any) -> None:
    """Also if the read waits already, and the transport delivers the data."""

    async def main() -> None:
        async with connected(reactor) as (stream, peer):

            async def reader() -> None:
                with pytest.raises(TypeError):
                    await read(stream)

            reading = spawn(reader)
            await sleep(0)
            peer.sendall(b"a line\n")
            await reading
            assert await stream.read_line() == b"a line"
            assert not stream.lost

    run(reactor, main)


def test_empty_matches_of_a_pattern(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            reading = stream.read_until_regex(rb"x*")
            peer.sendall(b"one two=2")
            assert await reading == b""
            # What it looks at, ahead or behind, is no part of it.
            assert await stream.read_until_regex(rb"(?= )") == b"one"
            assert await stream.read_until_regex(rb"(?<=o)(?==)") == b" two"
            with pytest.raises(DelimiterNotFound):
                await stream.read_until_regex(rb"=(?=2)", 1)
            assert await stream.read_until_regex(rb"=(?=2)", 2) == b"="
            assert await stream.read_until_regex(rb"\d|$") == b"2"
            peer.shutdown(socket.SHUT_WR)
            assert await stream.read() == b""
            assert await stream.read_until_regex(rb"$") == b""

    run(reactor, main)


def test_only_one_task_reads_at_a_time(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            reading = stream.read()
            with pytest.raises(BusyResourceError, match="another task reads"):
                stream.read_line()
            peer.sendall(b"x")
            assert await reading == b"x"

    run(reactor, main)


def test_a_cancelled_read_consumes_nothing(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"partial")
            while await stream.peek() != b"partial":
                pass
            with pytest.raises(TimeoutError), timeout(0.01):
                await stream.read_line()
            stream.read_line().addErrback(lambda _: None).cancel()
            peer.sendall(b" line\n")
            assert await stream.read_line() == b"partial line"

    run(reactor, main)


def test_a_reset_connection(reactor: Any, logged: list[Any]) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"last words")
            assert await stream.peek() == b"last words"
            reset(peer)
            with pytest.raises(IncompleteRead) as caught:
                await stream.read_line()
            assert caught.value.partial == b"last words"
            assert isinstance(caught.value.__cause__, ConnectionLost)
            for operation in (stream.read, stream.read_line, stream.peek):
                with pytest.raises(ConnectionLost):
                    await operation()
            with pytest.raises(ConnectionLost):
                await stream.write(b"x")
            stream.write(b"not awaited")
            assert stream.lost

    run(reactor, main)
    assert not [each for each in logged if each.get("log_failure")]


def test_writing_after_write_eof_raises(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, _):
            await stream.write_eof()
            await stream.write_eof()
            with pytest.raises(StreamError, match="after write_eof"):
                await stream.write(b"x")
            await stream.close()
            await stream.close()
            with pytest.raises(Exception, match="closed"):
                await stream.write(b"x")

    run(reactor, main)


def test_write_eof_comes_after_all_output(reactor: Any) -> None:
    """Also if no write was awaited."""

    async def main() -> int:
        received = 0
        async with connected(reactor) as (stream, peer):
            stream.write(bytes(1 << 24))
            ending = stream.write_eof()
            while True:
                await sleep(0)
                with suppress(BlockingIOError):
                    size = len(peer.recv(1 << 20))
                    if not size:
                        break
                    received += size
            await ending
        return received

    assert run(reactor, main) == 1 << 24


def test_cancelling_one_waiter_for_the_end_of_output(reactor: Any) -> None:
    """The other waiters are not cancelled."""

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            stream.write(bytes(1 << 24))
            first, second = (spawn(stream.write_eof) for _ in range(2))
            await sleep(0)
            assert "everything to be sent" in str(second.waits_for())
            first.cancel()
            while not second.done:
                with suppress(BlockingIOError):
                    peer.recv(1 << 20)
                await sleep(0)
            await stream.write_eof()
            assert first.cancelled

    run(reactor, main)


def test_leaving_a_block_does_not_wait_for_a_peer_that_does_not_read(
    reactor: Any,
) -> None:
    """The peer reads nothing, so the output cannot be sent."""

    async def main() -> None:
        async with connected(reactor) as (stream, _):
            with pytest.raises(TimeoutError), timeout(0.01):
                async with stream:
                    stream.write(bytes(1 << 24))
            await stream.close()
            assert stream.lost

    run(reactor, main)


def test_a_block_whose_coroutine_is_closed(reactor: Any) -> None:
    async def main() -> None:
        async def body() -> None:
            async with stream:
                await stream.read()

        async with connected(reactor) as (stream, _):
            abandoned = body()
            task = spawn(abandoned)
            await sleep(0)
            # As the garbage collector does.
            abandoned.close()
            await stream.close()
            assert stream.lost
            with pytest.raises(RuntimeError, match="already awaited"):
                await task

    run(reactor, main)


def test_close_sends_all_output_first(reactor: Any) -> None:
    data = bytes(range(256)) * 8192

    async def main() -> bytes:
        async def send(stream: Stream) -> None:
            stream.write(data)

        server = await listen(reactor, send)
        received = []
        async with await call(reactor, server) as stream:
            while chunk := await stream.read():
                received.append(chunk)
        await server.stop()
        return b"".join(received)

    assert run(reactor, main) == data


def test_writes_wait_for_a_peer_that_does_not_read(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            written = 0

            async def write_without_end() -> None:
                nonlocal written
                while True:
                    await stream.write(bytes(10_000))
                    written += 10_000

            writer = spawn(write_without_end)
            before = -1
            while written != before:
                before = written
                await sleep(0.05)
            # What the kernel holds, and one buffer here.
            assert 0 < written < 1 << 26
            received = 0
            while received <= before:
                try:
                    received += len(peer.recv(1 << 20))
                except BlockingIOError:
                    await sleep(0.01)
            assert written > before
            writer.cancel()
            await stream.abort()

    run(reactor, main)


def test_input_is_paused_while_the_handler_does_not_read(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            sent, stuck = 0, 0
            while stuck < 10:
                try:
                    sent += peer.send(bytes(100_000))
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                await sleep(0.01)
            held = len(await stream.peek(1 << 30))
            assert 1 << 17 < held <= 1 << 19
            received = 0
            while received < sent:
                received += len(await stream.read())
            assert received == sent

    run(reactor, main)


async def lost_while_nobody_reads(
    reactor: Any, lose: Callable[[socket.socket], None]
) -> tuple[bytes, bytes, int, type[Exception] | None]:
    """
    What was sent; what is read once it is lost, how much of that was there before,
    and the error after it.  The transport is paused, so that only a read finds out.
    """
    async with connected(reactor) as (stream, peer):
        sent = b""
        with suppress(BlockingIOError):
            while True:
                block = b"%09d " % len(sent) * 10_000
                sent += block[: peer.send(block)]
        while len(await stream.peek(1 << 30)) <= 1 << 17:
            await sleep(0)
        lose(peer)
        held = len(await stream.peek(1 << 30))
        received = b""
        try:
            while chunk := await stream.read():
                received += chunk
        except ConnectionLost as error:
            return sent, received, held, type(error)
        return sent, received, held, None


def test_the_end_of_input_while_no_read_waits(reactor: Any) -> None:
    sent, received, held, error = run(
        reactor, lost_while_nobody_reads, reactor, socket.socket.close
    )
    assert error is None
    assert held < len(sent)
    assert received == sent


def test_a_reset_while_no_read_waits(reactor: Any) -> None:
    sent, received, held, error = run(reactor, lost_while_nobody_reads, reactor, reset)
    assert error is ConnectionLost
    assert len(received) >= held
    assert sent.startswith(received)


def test_reads_that_need_not_wait_let_other_tasks_run(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"\n" * 50_000)
            while len(await stream.peek(50_000)) < 50_000:
                await sleep(0)
            async with counted_turns() as turns:
                for _ in range(50_000):
                    await stream.read_line()
            assert turns[0] > 50

    run(reactor, main)
