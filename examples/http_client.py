"""
Fetch a page many times at once, in one thread, with http.client, which is written for
blocking sockets.

    python examples/http_client.py HOST:PORT PATH [TIMES]
"""

from __future__ import annotations

import http.client
import sys
from typing import Any

from twisted.internet.task import react

from twisted_rtsig.coro import TaskGroup, spawn, timeout
from twisted_rtsig.coro.stackful import in_stackful, patched

SECONDS = 60


def fetch(host: str, path: str) -> tuple[int, bytes]:
    """
    Fetch a page: a plain function, without any code for the reactor.

    :return: the status and the body.
    """
    connection = http.client.HTTPConnection(host, timeout=SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


async def fetch_all(host: str, path: str, count: int) -> list[tuple[int, bytes]]:
    with patched(http.client), timeout(SECONDS):
        async with TaskGroup() as group:
            tasks = [group.spawn(in_stackful(fetch, host, path)) for _ in range(count)]
    return [task.result() for task in tasks]


async def main(reactor: Any, host: str, path: str, times: str = "500") -> None:
    responses = await spawn(fetch_all, host, path, int(times))
    for status in sorted({status for status, _ in responses}):
        print(status, sum(each == status for each, _ in responses), "times")


if __name__ == "__main__":
    react(main, sys.argv[1:])
