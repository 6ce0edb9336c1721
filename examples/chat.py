"""
A chat room, for telnet.

    python examples/chat.py [PORT]
    telnet 127.0.0.1 2323

A new member is asked for a name.  Each line goes to all other members; /who lists
the members, and /quit leaves.  A member that does not read is disconnected, as its
unread lines would pile up in the server.
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import react

from twisted_rtsig.coro import (
    DelimiterNotFound,
    IncompleteRead,
    Stream,
    serve,
    timeout,
)

MAX_LINE = 1000
SECONDS_FOR_A_NAME = 60


def printable(line: bytes) -> str:
    """Remove control characters, which could garble the terminals of other members."""
    return "".join(filter(str.isprintable, line.decode(errors="replace"))).strip()


class Room:
    """The members of the room, by name."""

    def __init__(self) -> None:
        self.members: dict[str, Stream] = {}

    async def session(self, stream: Stream) -> None:
        """Serve one member, from the first line to the last."""
        try:
            with timeout(SECONDS_FOR_A_NAME):
                name = await self.ask_name(stream)
            self.members[name] = stream
            try:
                self.tell_others(name, f"* {name} is here")
                await self.talk(name, stream)
            finally:
                del self.members[name]
                self.tell_others(name, f"* {name} has left")
        except TimeoutError:
            await stream.write(b"You have no name.\r\n")
        except DelimiterNotFound:
            await stream.write(b"That line is too long.\r\n")
        except IncompleteRead:
            # The connection has ended before a name, or in the middle of a line.
            pass

    async def ask_name(self, stream: Stream) -> str:
        await stream.write(b"What is your name?\r\n")
        while True:
            name = printable(await stream.read_line(MAX_LINE))
            if name and name not in self.members:
                return name
            await stream.write(b"Choose another one.\r\n")

    async def talk(self, name: str, stream: Stream) -> None:
        await stream.write(f"Hello, {name}!\r\n".encode())
        async for line in stream.lines(MAX_LINE):
            match printable(line):
                case "/quit":
                    return
                case "/who":
                    names = ", ".join(sorted(self.members))
                    await stream.write(f"* {names}\r\n".encode())
                case "":
                    pass
                case text:
                    self.tell_others(name, f"<{name}> {text}")

    def tell_others(self, name: str, text: str) -> None:
        for other, stream in list(self.members.items()):
            # Awaiting the write would let a member that does not read block all others.
            if other != name and not stream.write(f"{text}\r\n".encode()).called:
                stream.abort()


async def main(reactor: Any, port: str = "2323") -> None:
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    server = await serve(endpoint, Room().session)
    print("telnet 127.0.0.1", server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
