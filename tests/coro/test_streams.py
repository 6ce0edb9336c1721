"""Reading from and writing to streams, over real connections."""

from __future__ import annotations

from typing import Any

from tests.coro.support import call, listen, run
from twisted_rtsig.coro import (
    Stream,
)


def test_a_conversation(reactor: Any) -> None:
    async def echo(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line + b"!\r\n")

    async def client() -> list[bytes]:
        server = await listen(reactor, echo)
        async with await call(reactor, server) as stream:
            await stream.write(b"one\ntwo\r\n")
            answers = [await stream.read_line(), await stream.read_line()]
            await stream.write_eof()
            answers.append(await stream.read())
        await server.stop()
        return answers

    assert run(reactor, client) == [b"one!", b"two!", b""]
