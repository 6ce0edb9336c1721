"""
Count in Redis by many clients at once, in one thread, with redis-py, which is written
for blocking sockets.

    python examples/redis_client.py PORT [CLIENTS]

The server runs on this machine.
"""

from __future__ import annotations

import sys
from typing import Any

import redis
from twisted.internet.task import react

from twisted_rtsig.coro import TaskGroup, spawn, timeout
from twisted_rtsig.coro.stackful import in_stackful, patched

SECONDS = 60
KEY = "visits"


def count_visit(port: int) -> None:
    """Count one visit: a plain function, without any code for the reactor."""
    client = redis.Redis("127.0.0.1", port, socket_timeout=SECONDS)
    with client, client.pipeline() as pipeline:
        pipeline.incr(KEY)
        pipeline.expire(KEY, 3600)
        pipeline.execute()


async def count_all(port: int, clients: int) -> None:
    with patched(redis), timeout(SECONDS):
        async with TaskGroup() as group:
            for _ in range(clients):
                group.spawn(in_stackful(count_visit, port))


async def main(reactor: Any, port: str, clients: str = "500") -> None:
    await spawn(count_all, int(port), int(clients))
    print(clients, "visits are counted")


if __name__ == "__main__":
    react(main, sys.argv[1:])
