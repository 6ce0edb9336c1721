"""Cancellation between the end of what a task waits for, and its next step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import UNIXServerEndpoint

from tests.coro.support import connected, listen, run, until
from twisted_rtsig.coro import (
    Event,
    Server,
    Stream,
    Task,
    TextStream,
    current_task,
    open_tcp,
    open_unix,
    select,
    serve,
    sleep,
    spawn,
)
from twisted_rtsig.coro.operations import Operation

Body = Callable[[], Awaitable[Any]]


class Late:
    """
    Cancels a task when any task, which may do something for it, was resumed and has not
    run yet.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._target: Task[Any] | None = None
        self._left = 0
        for cls, name in ((Operation, "succeed"), (Task, "_resume")):
            original = getattr(cls, name)
            monkeypatch.setattr(cls, name, self._cancelling(original))

    def _cancelling(self, original: Any) -> Any:
        def resume(*args: Any) -> None:
            target = self._target
            if target is None or target.done:
                original(*args)
                return
            self._left -= 1
            if self._left:
                original(*args)
                return
            with target._scheduler.holding():
                original(*args)
                target.cancel()

        return resume

    async def everywhere(self, body: Body) -> None:
        """Run it again and again, cancelled at the first point, the second, and on."""
        point = 0
        while True:
            point += 1
            self._left = point

            async def main() -> None:
                self._target = current_task()
                await body()

            task = spawn(main)
            with contextlib.suppress(CancelledError):
                await task
            self._target = None
            if self._left > 0:
                break
        # Else this has shown nothing.
        assert point > 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    return Late(monkeypatch)


async def _wait(stream: Stream) -> None:
    await stream.read()


async def close_all(
    late: Late, server: Server, open_stream: Callable[[], Awaitable[Stream]]
) -> None:
    """Cancel at each point what opens and aborts a stream; no connection is left."""

    async def body() -> None:
        _, stream = await select(open_stream, Event())
        assert stream is not None
        await stream.abort()

    await late.everywhere(body)
    await sleep(0.01)
    await until(lambda: not server.factory.connections)
    await server.stop()


def test_an_unawaited_connection_is_closed(reactor: Any, late: Late) -> None:
    async def main() -> None:
        server = await listen(reactor, _wait)
        port = server.port.getHost().port
        await close_all(late, server, lambda: open_tcp("127.0.0.1", port))

    run(reactor, main)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no UNIX sockets")
def test_an_unawaited_unix_connection_is_closed(
    reactor: Any, late: Late, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")

    async def main() -> None:
        server = await serve(UNIXServerEndpoint(reactor, path), _wait)
        await close_all(late, server, lambda: open_unix(path))

    run(reactor, main)


def test_text_of_a_cancelled_read_can_be_read_again(reactor: Any, late: Late) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            text = TextStream(stream)
            got: list[str] = []

            async def body() -> None:
                spawn(send)
                _, line = await select(text.read_line, Event())
                assert line is not None
                got.append(line)

            async def send() -> None:
                await sleep(0)
                peer.send(b"a line\n")
                sent.append(b"a line\n")

            sent: list[bytes] = []
            await late.everywhere(body)
            await until(lambda: len(sent) > 1)
            while len(got) < len(sent):
                got.append(await text.read_line())

    run(reactor, main)


def test_text_of_a_cancelled_read_can_be_read_in_the_same_step(reactor: Any) -> None:
    """As of a stream of bytes: in the same step, before the scheduler has its turn."""

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            text = TextStream(stream)
            for _ in range(3):
                reading = text.read_line()
                await sleep(0)
                reading.addErrback(lambda failure: failure.trap(CancelledError))
                reading.cancel()
                # Also one that has not begun.
                again = text.read_line()
                again.addErrback(lambda failure: failure.trap(CancelledError))
                again.cancel()
                reading = text.read_line()
                peer.send("größer\n".encode())
                assert await reading == "größer"

    run(reactor, main)
