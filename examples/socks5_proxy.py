"""
A SOCKS5 proxy (RFC 1928): CONNECT to IPv4 and IPv6 addresses and to names.  It has no
authentication, so it serves this machine only.

    python examples/socks5_proxy.py [PORT]
    curl --socks5-hostname 127.0.0.1:1080 http://example.com/
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ServerEndpoint
from twisted.internet.error import (
    ConnectError,
    ConnectionClosed,
    ConnectionRefusedError,
    DNSLookupError,
)
from twisted.internet.task import react

from twisted_rtsig.coro import (
    IncompleteRead,
    Stream,
    TaskGroup,
    connect,
    serve,
    timeout,
)

VERSION = 5
NO_AUTHENTICATION, NONE_ACCEPTABLE = 0, 0xFF
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4
SUCCEEDED, UNREACHABLE, REFUSED, BAD_COMMAND, BAD_ADDRESS = 0, 4, 5, 7, 8
SECONDS_TO_ASK = SECONDS_TO_CONNECT = 20


class Refused(Exception):
    """The request is refused; the argument is the answer to the client."""


def answer(code: int) -> bytes:
    """Return an answer; its address is zero, as clients ignore it."""
    return bytes([VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0])


class Proxy:
    """
    Serves clients.

    :param reactor: the reactor that connects to the targets.
    """

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor

    async def session(self, client: Stream) -> None:
        try:
            with timeout(SECONDS_TO_ASK):
                host, port = await read_request(client)
            target = await self.connect(host, port)
        except Refused as refused:
            await client.write(refused.args[0])
        except (TimeoutError, IncompleteRead):
            # The client has not sent a complete request.
            client.abort()
        else:
            async with target:
                await client.write(answer(SUCCEEDED))
                async with TaskGroup() as group:
                    group.spawn(copy, client, target)
                    group.spawn(copy, target, client)

    async def connect(self, host: str, port: int) -> Stream:
        try:
            with timeout(SECONDS_TO_CONNECT):
                return await connect(HostnameEndpoint(self.reactor, host, port))
        except ConnectionRefusedError:
            raise Refused(answer(REFUSED)) from None
        except (ConnectError, DNSLookupError, TimeoutError, ValueError):
            raise Refused(answer(UNREACHABLE)) from None


async def read_request(client: Stream) -> tuple[str, int]:
    """Negotiate, and return the host and the port of the target."""
    version, count = await client.read_exactly(2)
    methods = await client.read_exactly(count)
    if version != VERSION or NO_AUTHENTICATION not in methods:
        raise Refused(bytes([VERSION, NONE_ACCEPTABLE]))
    await client.write(bytes([VERSION, NO_AUTHENTICATION]))

    _, command, _, kind = await client.read_exactly(4)
    if kind == IPV4:
        host = str(ipaddress.IPv4Address(await client.read_exactly(4)))
    elif kind == IPV6:
        host = str(ipaddress.IPv6Address(await client.read_exactly(16)))
    elif kind == NAME:
        [length] = await client.read_exactly(1)
        host = (await client.read_exactly(length)).decode("ascii", "replace")
    else:
        raise Refused(answer(BAD_ADDRESS))
    port = int.from_bytes(await client.read_exactly(2), "big")
    if command != CONNECT:
        raise Refused(answer(BAD_COMMAND))
    return host, port


async def copy(source: Stream, target: Stream) -> None:
    """Copy all data and the end of the stream, no faster than the target reads."""
    try:
        while data := await source.read():
            await target.write(data)
        await target.write_eof()
    except ConnectionClosed:
        # One connection is lost: close the other one as well.
        source.abort()
        target.abort()


async def main(reactor: Any, port: str = "1080") -> None:
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    server = await serve(endpoint, Proxy(reactor).session, idle_timeout=600)
    print("SOCKS5 on 127.0.0.1", server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
