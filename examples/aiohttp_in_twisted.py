"""
A Twisted web server that fetches pages from other servers with aiohttp's client.

    pip install 'twisted-rtsig[asyncio-libraries]'
    python examples/aiohttp_in_twisted.py [PORT]
    curl 'http://127.0.0.1:8080/?url=http://…&url=http://…'

The answer has the status and the length of each page.  All pages are fetched at the
same time.  If the client disconnects first, the fetches are cancelled.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiohttp

from twisted_rtsig import asyncioreactor

asyncioreactor.install()

from twisted.internet import reactor as installed  # noqa: E402
from twisted.web.resource import Resource  # noqa: E402
from twisted.web.server import NOT_DONE_YET, Site  # noqa: E402

# For one page, in seconds.
LIMIT = aiohttp.ClientTimeout(total=10)
MAX_URLS = 20

# For type checkers: Twisted has not annotated the methods of reactors.
reactor: Any = installed


class Lengths(Resource):
    """Answers with one line for each ``url`` of the query."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self._client: aiohttp.ClientSession | None = None

    def render_GET(self, request: Any) -> int:
        task = asyncio.ensure_future(self._answer(request))
        # The Deferred fails when the client disconnects.
        request.notifyFinish().addErrback(lambda _: task.cancel())
        return NOT_DONE_YET

    async def close(self) -> None:
        """Close the connections of the client."""
        if self._client is not None:
            await self._client.close()

    async def _answer(self, request: Any) -> None:
        urls = [url.decode("utf-8", "replace") for url in request.args.get(b"url", [])]
        lines = await asyncio.gather(*map(self._length, urls[:MAX_URLS]))
        request.setHeader(b"content-type", b"text/plain; charset=utf-8")
        request.write("".join(lines).encode())
        request.finish()

    async def _length(self, url: str) -> str:
        if self._client is None:
            self._client = aiohttp.ClientSession(timeout=LIMIT)
        try:
            async with self._client.get(url) as response:
                body = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            return f"{url}: {type(error).__name__}\n"
        return f"{url}: {response.status}, {len(body)} bytes\n"


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    lengths = Lengths()
    listening = reactor.listenTCP(port, Site(lengths), interface="127.0.0.1")
    print(f"Serving on port {listening.getHost().port}", flush=True)

    def close() -> Any:
        # The reactor waits for the Deferred before it stops.
        from twisted.internet.defer import Deferred

        return Deferred.fromFuture(asyncio.ensure_future(lengths.close()))

    reactor.addSystemEventTrigger("before", "shutdown", close)
    reactor.run()


if __name__ == "__main__":
    main()
