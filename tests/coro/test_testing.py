"""What helps to test protocols that are coroutines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.error import ConnectionAborted, ConnectionLost

from tests.support import DEADLINE
from twisted_rtsig.coro import IncompleteRead, Stream, coroutine, sleep, timeout
from twisted_rtsig.coro.testing import SansIO

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


def test_time_passes_when_it_is_told_to() -> None:
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
