"""
A Twisted protocol that uses redis.asyncio: a line server that counts in Redis.

    pip install 'twisted-rtsig[asyncio-libraries]'
    python examples/visits.py [PORT [REDIS_URL]]
    nc 127.0.0.1 7000

Each line is a name.  The answer is how often that name has been sent to all servers
that count in the same Redis.  After ``WATCH``, a connection receives each name that is
counted.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError
from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure

from twisted_rtsig import asyncioreactor

VISITS = "visits"
SEEN = "seen"


class Visits(LineReceiver):
    """
    One connection.

    :param client: the Redis client.
    """

    delimiter = b"\n"
    MAX_LENGTH = 1000

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._task: asyncio.Task[None] | None = None

    def lineReceived(self, line: bytes) -> None:
        # One line at a time: the next one is read when this one is answered.
        self.pauseProducing()
        self._task = asyncio.ensure_future(self._do(line.strip()))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _do(self, line: bytes) -> None:
        try:
            if line == b"WATCH":
                await self._watch()
                return
            async with self._client.pipeline() as pipeline:
                pipeline.hincrby(VISITS, line, 1)
                pipeline.publish(SEEN, line)
                visits, _ = await pipeline.execute()
            self.sendLine(b"%d" % visits)
        except RedisError as error:
            self.sendLine(b"error: " + type(error).__name__.encode())
        self.resumeProducing()

    async def _watch(self) -> None:
        async with self._client.pubsub() as subscription:
            await subscription.subscribe(SEEN)
            self.sendLine(b"watching")
            async for message in subscription.listen():
                if message["type"] == "message":
                    self.sendLine(message["data"])


class VisitsFactory(Factory):
    """Makes protocols that share one Redis client."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client

    def buildProtocol(self, addr: object) -> Visits:
        return Visits(self._client)


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 7000
    url = sys.argv[2] if len(sys.argv) > 2 else "redis://127.0.0.1"
    asyncioreactor.install()
    from twisted.internet import reactor as installed
    from twisted.internet.defer import Deferred

    # For type checkers: Twisted has not annotated the methods of reactors.
    reactor: Any = installed
    client = redis.asyncio.Redis.from_url(url)
    listening = reactor.listenTCP(port, VisitsFactory(client), interface="127.0.0.1")
    print(f"Serving on port {listening.getHost().port}", flush=True)

    def close() -> Any:
        # The reactor waits for the Deferred before it stops.
        return Deferred.fromFuture(asyncio.ensure_future(client.aclose()))

    reactor.addSystemEventTrigger("before", "shutdown", close)
    reactor.run()


if __name__ == "__main__":
    main()
