"""The kit for tests of protocols that are coroutines."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.error import ConnectionAborted, ConnectionLost
from twisted.internet.task import Clock

from tests.coro.support import output_of
from tests.support import DEADLINE
from twisted_rtsig.coro import (
    Cancelled,
    Event,
    IncompleteRead,
    Stream,
    coroutine,
    current_task,
    shield,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import SansIO, cancel_everywhere, stream_pair

# The same in every style


async def _echo(stream: Stream) -> str:
    async for line in stream.lines():
        await stream.write(b"<" + line + b">")
    return "the end"


def _echo_as_generator(stream: Stream) -> Generator[Any, Any, str]:
    while True:
        try:
            line = yield stream.read_line()
        except IncompleteRead:
            return "the end"
        yield stream.write(b"<" + line + b">")


@pytest.mark.parametrize(
    "handler",
    [
        _echo,
        _echo_as_generator,
        coroutine(_echo_as_generator),
        inlineCallbacks(_echo_as_generator),
        lambda stream: Deferred.fromCoroutine(_echo(stream)),
    ],
)
def test_a_conversation(handler: Any) -> None:
    conversation = SansIO(handler)
    assert conversation.written() == b""
    conversation.feed(b"on")
    assert conversation.written() == b""
    conversation.feed(b"e\ntwo\n")
    assert conversation.written() == b"<one><two>"
    assert conversation.written() == b""
    assert not conversation.done
    assert conversation.ended is None
    conversation.feed_eof()
    assert conversation.done
    assert conversation.result() == "the end"
    assert conversation.ended == "closed"


def test_time_passes_when_advanced() -> None:
    async def session(stream: Stream) -> None:
        await sleep(0)
        try:
            with timeout(5):
                await stream.read_line()
        except TimeoutError:
            await stream.write(b"too late")

    conversation = SansIO(session)
    conversation.advance(4)
    assert not conversation.done
    conversation.advance(1)
    assert conversation.written() == b"too late"
    assert conversation.ended == "closed"
    assert not conversation.clock.getDelayedCalls()


def test_a_handler_that_fails(logged: list[Any]) -> None:
    async def session(stream: Stream) -> None:
        raise KeyError(await stream.read())

    conversation = SansIO(session)
    conversation.feed(b"x")
    assert conversation.ended == "aborted"
    with pytest.raises(KeyError, match="x"):
        conversation.result()
    del conversation
    assert not [event for event in logged if "log_failure" in event]


def test_a_handler_that_is_cancelled() -> None:
    conversation = SansIO(_echo)
    conversation.task.cancel()
    conversation.advance(0)
    assert conversation.ended == "aborted"
    with pytest.raises(CancelledError):
        conversation.result()


@pytest.mark.parametrize("reason", [None, ConnectionAborted()])
def test_a_connection_that_is_lost(reason: Exception | None) -> None:
    async def session(stream: Stream) -> None:
        assert await stream.read_exactly(2) == b"ab"
        await stream.read()

    conversation = SansIO(session)
    conversation.feed(b"ab")
    conversation.lose(reason)
    assert conversation.ended == "lost"
    with pytest.raises(type(reason or ConnectionLost())):
        conversation.result()
    conversation.feed(b"too late")
    conversation.feed_eof()


def test_half_close() -> None:
    async def session(stream: Stream) -> bytes:
        await stream.write_eof()
        got: bytes = await stream.read()
        return got

    conversation = SansIO(session)
    assert conversation.wrote_eof
    assert conversation.ended is None
    conversation.feed(b"still here")
    assert conversation.result() == b"still here"


def test_a_peer_that_does_not_read() -> None:
    async def session(stream: Stream) -> None:
        for _ in range(3):
            await stream.write(bytes(100))

    conversation = SansIO(session, buffer_size=150)
    assert not conversation.done
    assert len(conversation.written()) == 200
    assert conversation.done
    assert len(conversation.written()) == 100


def test_a_handler_that_does_not_read() -> None:
    async def session(stream: Stream) -> int:
        await sleep(1)
        size = 0
        while data := await stream.read():
            size += len(data)
        return size

    conversation = SansIO(session)
    for _ in range(10):
        conversation.feed(bytes(1 << 16))
    conversation.feed_eof()
    conversation.advance(1)
    assert conversation.result() == 10 << 16


# Two streams


def test_a_pair_with_latency(clock: Clock) -> None:
    one, other = stream_pair(latency=0.5, reactor=clock)
    read = other.read()
    one.write(b"slow")
    clock.advance(0.4)
    one.write(b" light")
    assert not read.called
    clock.advance(0.1)
    assert read.result == b"slow"
    read = other.read()
    clock.advance(0.3)
    assert not read.called
    clock.advance(0.1)
    assert read.result == b" light"
    other.abort()
    clock.advance(0)
    assert other.lost
    assert not one.lost
    clock.advance(0.5)
    assert one.lost
    assert not clock.getDelayedCalls()


def test_a_pair_with_a_buffer(clock: Clock) -> None:
    one, other = stream_pair(buffer_size=100, reactor=clock)
    assert one.write(bytes(100)).called
    writes = [one.write(b"1"), one.write(b"2")]
    assert not any(each.called for each in writes)
    clock.advance(0)
    # The buffer took it, though it was not read yet.
    assert all(each.called for each in writes)
    assert other.read().result == bytes(100) + b"12"


def test_a_pair_whose_reader_is_slow(clock: Clock) -> None:
    one, other = stream_pair(buffer_size=100, reactor=clock)
    size = 0
    while (write := one.write(bytes(100))).called or not size:
        size += 100
        clock.advance(0)
    assert size > 100_000
    closed = one.close()
    clock.advance(0)
    assert not closed.called
    while data := other.read().result:
        size -= len(data)
        clock.advance(0)
    # The one that had to wait.
    assert size == -100
    assert write.called
    assert closed.called


def test_writing_to_a_closed_peer_loses_the_connection(
    clock: Clock,
) -> None:
    one, other = stream_pair(reactor=clock)
    one.write(b"the last")
    one.close()
    clock.advance(0)
    assert one.lost
    assert other.ended
    assert not other.lost
    other.write(b"an answer")
    clock.pump([0, 0])
    assert isinstance(other._lost, ConnectionLost)
    assert other.read().result == b"the last"


@pytest.mark.parametrize("wrong", [{"buffer_size": -1}, {"latency": -0.1}])
def test_bad_options_of_a_pair(clock: Clock, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 is the least"):
        stream_pair(reactor=clock, **wrong)


# To cancel everywhere


class Seats:
    """Something that must be given back."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *error: object) -> None:
        self.taken -= 1

    def all_free(self) -> None:
        assert self.taken == 0


async def _ask_twice(stream: Stream) -> None:
    await stream.write(b"one\n")
    assert await stream.read_line() == b"1"
    await stream.write(b"two\n")
    assert await stream.read_line() == b"2"


def _answers(seats: Seats, lines: list[bytes]) -> dict[str, Any]:
    """Handlers that wait at six points: for two lines, the end, and to write."""

    async def handler(stream: Stream) -> None:
        with seats:
            async for line in stream.lines():
                lines.append(line)
                await stream.write(b"%d\n" % (1 + (line == b"two")))
            await sleep(60)

    def generator(stream: Stream) -> Generator[Any, Any, None]:
        with seats:
            while True:
                try:
                    line = yield stream.read_line()
                except IncompleteRead:
                    break
                lines.append(line)
                yield stream.write(b"%d\n" % (1 + (line == b"two")))
            yield sleep(60)

    return {
        "async def": handler,
        "generator": generator,
        "@coroutine": coroutine(generator),
    }


@pytest.mark.parametrize("style", _answers(Seats(), []))
def test_a_handler_that_is_cancelled_everywhere(style: str) -> None:
    seats = Seats()
    lines: list[bytes] = []
    handler = _answers(seats, lines)[style]
    assert cancel_everywhere(handler, _ask_twice, seats.all_free) == 6
    # Not at all; at the read, the write, the read, the write, the end, the sleep.
    assert len(lines) == 2 + 0 + 1 + 1 + 2 + 2 + 2


def test_a_handler_that_only_writes() -> None:
    async def handler(stream: Stream) -> None:
        await stream.write(b"hello")
        assert await stream.read() == b""

    assert cancel_everywhere(handler) == 2


def test_cancel_everywhere_finds_unreleased_resources() -> None:
    seats = Seats()

    async def handler(stream: Stream) -> None:
        seats.taken += 1
        await stream.read()
        seats.taken -= 1

    with pytest.raises(AssertionError, match="assert 1 == 0"):
        cancel_everywhere(handler, check=seats.all_free)


async def _catches_everything(stream: Stream) -> None:
    with contextlib.suppress(BaseException):
        await stream.read()


async def _fails_when_cancelled(stream: Stream) -> None:
    try:
        await stream.read()
    except Cancelled:
        raise KeyError("no good") from None


async def _leaves_a_task(stream: Stream) -> None:
    spawn(Event().wait, name="left over")
    await stream.read()


async def _leaves_a_call(stream: Stream) -> None:
    reactor = current_task().reactor
    call = reactor.callLater(60, int)
    await stream.read()
    call.cancel()


async def _waits_when_cancelled(stream: Stream) -> None:
    try:
        await stream.read()
    except Cancelled:
        await Event().wait()
        raise


async def _waits_for_ever(stream: Stream) -> None:
    await stream.read()
    await Event().wait()


async def _never_ends(stream: Stream) -> None:
    await stream.read()
    while True:
        await sleep(1)


@pytest.mark.parametrize(
    ("handler", "wrong"),
    [
        (
            _catches_everything,
            "test_testing.py:[0-9]+ in _catches_everything: await stream.read(): "
            "the handler went on: let Cancelled pass",
        ),
        (_fails_when_cancelled, "the handler has raised KeyError"),
        (_leaves_a_task, "left tasks behind:\nleft over: [0-9.]+ s, waits for <Event"),
        (_leaves_a_call, "left behind .<DelayedCall"),
        (
            _waits_when_cancelled,
            "^cancelled at .*: the handler waits for something that",
        ),
        (_waits_for_ever, "^the handler waits for something that never happens:"),
        (_never_ends, "^the handler has not ended after [0-9]+ turns"),
    ],
)
def test_cancel_everywhere_finds_wrong_handlers(handler: Any, wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong.replace("()", r"\(\)")):
        cancel_everywhere(handler)


def test_a_handler_is_collected_before_its_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = []

    def handler(stream: Stream) -> Any:
        bodies.append(_waits_for_ever(stream))
        return bodies[-1]

    with pytest.raises(AssertionError, match="waits for something that never happens"):
        cancel_everywhere(handler)
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    bodies.pop().close()
    gc.collect()
    assert ignored == []


def test_a_peer_whose_handler_fails_is_not_logged(logged: list[Any]) -> None:
    async def fails(stream: Stream) -> None:
        raise KeyError("no good")

    async def waits(stream: Stream) -> None:
        await stream.read()

    async def peer(stream: Stream) -> None:
        await stream.read()

    with pytest.raises(KeyError):
        cancel_everywhere(fails, peer)
    assert cancel_everywhere(waits) == 1
    gc.collect()
    # Others may have left something behind, too.
    names = [each.get("name") for each in logged]
    assert not {peer.__qualname__, "_only_listen"}.intersection(names)


def test_a_shield_delays_the_cancellation() -> None:
    said: list[bytes] = []

    async def handler(stream: Stream) -> None:
        with shield():
            await stream.write(b"QUIT")

    async def peer(stream: Stream) -> None:
        said.append(await stream.read())

    assert cancel_everywhere(handler, peer) == 1
    assert said == [b"QUIT", b"QUIT"]


def test_errors_without_any_cancellation() -> None:
    async def handler(stream: Stream) -> None:
        raise KeyError(await stream.read())

    async def peer(stream: Stream) -> None:
        await stream.write(b"x")
        assert await stream.read() == b"y"

    with pytest.raises(KeyError, match="x"):
        cancel_everywhere(handler, peer)
    with pytest.raises(AssertionError, match="b'y'"):
        cancel_everywhere(_only_read, peer)
    with pytest.raises(TypeError, match="@coroutine"):
        cancel_everywhere(inlineCallbacks(_echo_as_generator))


async def _only_read(stream: Stream) -> None:
    await stream.read()


WITHOUT_A_REACTOR = """
import sys
from twisted.internet.task import Clock
from twisted_rtsig.coro import Channel, TaskGroup, select, sleep, spawn, timeout
from twisted_rtsig.coro.testing import SansIO, cancel_everywhere, stream_pair

async def session(stream):
    try:
        with timeout(5):
            async for line in stream.lines():
                await stream.write(line)
    except TimeoutError:
        await sleep(0)
        await stream.write(b"too late")

conversation = SansIO(session)
conversation.feed(b"one\\n")
assert conversation.written() == b"one"
conversation.advance(5)
assert conversation.written() == b"too late"
assert cancel_everywhere(session) == 1

async def main():
    one, other = stream_pair(latency=1)
    channel = Channel(0)
    async with TaskGroup() as group:
        group.spawn(one.write, b"hello")
        group.spawn(lambda: channel.send(1))
        assert await select(channel) == (channel, 1)
        assert await other.read() == b"hello"
    return "done"

clock = Clock()
task = spawn(main, reactor=clock)
clock.pump([1, 1])
assert task.result() == "done"
assert "twisted.internet.reactor" not in sys.modules
"""


def test_without_a_reactor() -> None:
    """None is even imported, which would install one."""
    assert output_of(WITHOUT_A_REACTOR) == ""


# In trial


TRIAL = """
from twisted.trial.unittest import TestCase
from twisted_rtsig.coro import sleep, timeout
from twisted_rtsig.coro.testing import in_task


class Tests(TestCase):
    @in_task
    async def test_passes(self):
        with self.assertRaises(TimeoutError):
            with timeout(0.01):
                await sleep(60)

    @in_task
    def test_fails(self):
        yield sleep(0)
        self.assertEqual(1, 2)
"""


def test_in_trial(tmp_path: Path) -> None:
    (tmp_path / "test_with_trial.py").write_text(TRIAL)
    done = subprocess.run(
        [sys.executable, "-m", "twisted.trial", "test_with_trial"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert "FAILED (failures=1, successes=1)" in done.stdout
    assert "1 != 2" in done.stdout
