"""
An echo server that runs unchanged on Linux, BSD, macOS and Windows, each with its
own reactor of this package.

    python examples/echo.py [PORT]
    telnet 127.0.0.1 7777

Its first line of output names the reactor.
"""

from __future__ import annotations

import sys

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import react

import twisted_rtsig
from twisted_rtsig.coro import Stream, serve


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def main(reactor: object, port: str = "7777") -> None:
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    server = await serve(endpoint, echo)
    print(type(reactor).__name__, server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    twisted_rtsig.install()
    react(main, sys.argv[1:])
