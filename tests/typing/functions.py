"""Functions of each style, for the programs that type checkers accept or refuse."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from twisted_rtsig.coro import coroutine, sleep


async def count(name: str, most: int = 10) -> bytes:
    return name.encode() * most


def count_generator(name: str) -> Generator[Any, Any, int]:
    yield sleep(1)
    return len(name)


@coroutine
def count_decorated(name: str) -> Generator[Deferred[Any], Any, int]:
    yield sleep(1)
    return len(name)


@inlineCallbacks
def count_inline(name: str) -> Generator[Deferred[Any], Any, int]:
    yield sleep(1)
    return len(name)


def count_deferred(name: str) -> Deferred[float]:
    raise NotImplementedError


def count_plain(name: str, *more: int) -> float:
    return len(name) + sum(more)


class Counter:
    async def count(self, name: str) -> bool:
        return bool(name)
