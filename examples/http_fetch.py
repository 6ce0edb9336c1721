"""
Fetch a page over HTTP/1.1 through a proxy, within a time limit.

    python examples/http_fetch.py PROXY_HOST:PORT URL [SECONDS]

The body may have a Content-Length, be sent in chunks, or end with the connection.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.task import react

from twisted_rtsig.coro import Stream, StreamError, connect, spawn, timeout

MAX_LINE = 1 << 13
MAX_HEADERS = 100
MAX_BODY = 1 << 24
# RFC 9110, 5.1 and 5.5.  A line that begins with a space would continue the one before.
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0]*?)[ \t]*")


class Response(NamedTuple):
    """:ivar headers: values by lower-case name; equal names are joined by commas."""

    status: int
    headers: dict[str, str]
    body: bytes


class BadResponse(Exception):
    """The response is not valid HTTP, or exceeds a limit."""


async def fetch(proxy: Any, url: str, seconds: float = 10) -> Response:
    """
    Fetch a page through a proxy.

    :param proxy: an ``IStreamClientEndpoint`` provider.
    :param seconds: the time limit.
    :raises TimeoutError: if it takes longer.
    :raises BadResponse: if the response is not valid HTTP, or too large.
    :raises StreamError: if the response ends in the middle.
    :raises ConnectionClosed: if the connection is lost.
    :raises ValueError: if the URL cannot be sent.
    """
    # The fragment is not sent to servers.
    url = url.partition("#")[0]
    host = host_of(url)
    request = f"GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with timeout(seconds):
        async with await connect(proxy) as stream:
            await stream.write(request.encode())
            status, headers = await read_head(stream)
            # Interim responses may come first: 100 Continue, 103 Early Hints.
            while 100 <= status < 200:
                status, headers = await read_head(stream)
            return Response(status, headers, await read_body(stream, status, headers))


def host_of(url: str) -> str:
    """Return the host and port of a URL; check that it can be sent as it is."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not re.fullmatch("[!-~]+", url):
        raise ValueError(f"not an http URL that can be sent: {url!r}")
    if "@" in parts.netloc:
        raise ValueError("a URL with a user or a password is not sent")
    return parts.netloc


async def read_head(stream: Stream) -> tuple[int, dict[str, str]]:
    """Read the status and the headers."""
    line = await stream.read_line(MAX_LINE)
    start = re.fullmatch(rb"HTTP/1\.[01] ([1-9]\d\d)( .*)?", line)
    if start is None:
        raise BadResponse(f"not a status line of HTTP/1.1: {line!r}")
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADERS):
        line = await stream.read_line(MAX_LINE)
        if not line:
            return int(start[1]), headers
        header = HEADER.fullmatch(line.decode("latin-1"))
        if header is None:
            raise BadResponse(f"not a header: {line!r}")
        name, value = header[1].lower(), header[2]
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    raise BadResponse(f"more than {MAX_HEADERS} headers")


async def read_body(stream: Stream, status: int, headers: dict[str, str]) -> bytes:
    if status in (204, 304):
        return b""
    # RFC 9112, 6.3.  If these headers are ambiguous, a proxy may see another body.
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise BadResponse(f"cannot read a body with {coding=} and {length=}")
        return await read_chunks(stream)
    if length is not None:
        first, *more = (each.strip(" \t") for each in length.split(","))
        if any(each != first for each in more):
            raise BadResponse(f"different lengths: {length}")
        return await stream.read_exactly(number(first, 10))
    body = bytearray()
    while data := await stream.read():
        body += data
        check_size(len(body))
    return bytes(body)


async def read_chunks(stream: Stream) -> bytes:
    body = bytearray()
    while True:
        line = (await stream.read_line(MAX_LINE)).decode("latin-1")
        size = number(line.partition(";")[0].rstrip(" \t"), 16)
        if not size:
            # Skip the trailers, up to an empty line.
            while await stream.read_line(MAX_LINE):
                pass
            return bytes(body)
        check_size(len(body) + size)
        body += await stream.read_exactly(size)
        if await stream.read_line(MAX_LINE):
            raise BadResponse("a chunk is longer than its size")


def number(digits: str, base: int) -> int:
    """Convert digits, without the signs and underscores that ``int`` accepts."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,16}" if base == 16 else r"[0-9]{1,16}", digits):
        raise BadResponse(f"not a size: {digits!r}")
    size = int(digits, base)
    check_size(size)
    return size


def check_size(size: int) -> None:
    if size > MAX_BODY:
        raise BadResponse(f"the body has more than {MAX_BODY} bytes")


async def main(reactor: Any, proxy: str, url: str, seconds: str = "10") -> None:
    host, _, port = proxy.rpartition(":")
    try:
        endpoint = HostnameEndpoint(reactor, host, int(port))
        # timeout() works in a task only.
        response = await spawn(fetch, endpoint, url, float(seconds))
    except (BadResponse, StreamError, ConnectError, ConnectionClosed) as error:
        sys.exit(f"{url}: {error!r}")
    except (OSError, ValueError) as error:
        sys.exit(f"{url}: {error!r}")
    sys.stdout.buffer.write(response.body)


if __name__ == "__main__":
    react(main, sys.argv[1:])
