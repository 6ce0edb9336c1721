"""
Couple two protocols: netstrings with the clients, lines with a server.

    python examples/coupled_proxy.py SERVER_PORT [PORT]

Each protocol is a loop that knows nothing of the other one, and transfers control to it
in the middle.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.task import react

from twisted_rtsig.coro import (
    Stream,
    StreamError,
    Task,
    connect,
    serve,
    symmetric,
    transfer,
)

MAX_DIGITS = 4
# int() would accept a sign, spaces and underscores as well.
SIZE = re.compile(rb"0|[1-9][0-9]*")


async def talk_netstrings(client: Stream, back: Task[Any]) -> None:
    """Pass on requests until the client closes its side."""
    while await client.peek(1):
        size = await client.read_until(b":", MAX_DIGITS)
        if not SIZE.fullmatch(size):
            raise ValueError("not a netstring")
        request = await client.read_exactly(int(size))
        if await client.read_exactly(1) != b"," or b"\n" in request:
            raise ValueError("not a netstring, or more than one line")
        reply = await transfer(back, request)
        await client.write(b"%d:%b," % (len(reply), reply))


async def talk_lines(server: Stream, front: Task[Any], request: bytes) -> None:
    while True:
        await server.write(request + b"\n")
        request = await transfer(front, await server.read_line())


class Proxy:
    """
    Couples clients with the server.

    :param server: the endpoint of the server.
    """

    def __init__(self, server: Any) -> None:
        self.server = server

    async def session(self, client: Stream) -> None:
        try:
            async with await connect(self.server) as server:
                front = symmetric(talk_netstrings, client)
                # When one of them ends or fails, control returns here or to the front.
                await transfer(front, symmetric(talk_lines, server, front))
        except (ValueError, StreamError, ConnectionClosed, ConnectError) as error:
            print(f"{client.peer}: {error}", file=sys.stderr)


async def main(reactor: Any, server_port: str, port: str = "2424") -> None:
    server = TCP4ClientEndpoint(reactor, "127.0.0.1", int(server_port))
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    running = await serve(endpoint, Proxy(server).session)
    print("netstrings at 127.0.0.1", running.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
