"""
A client for the overload test: thousands of connections, hundreds at a time,
that behave as badly as TCP allows.

    hostile_client.py PORT COUNT SEED

What each connection does follows from the seed alone, so that a test can tell
what the server must have seen.  It exits with an error if an answer is wrong.
"""

from __future__ import annotations

import dataclasses
import io
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

AT_ONCE = 250
"""Connections that are open at the same time."""

TIME_LIMIT = 30.0
"""Seconds for which one call to the server may take."""


def answers(client: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def reset_when_closed(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close_with_data(client: socket.socket, payload: bytes) -> None:
    """The end of the stream comes in the same packet as the data."""
    client.sendall(payload, socket.MSG_MORE)


def reset_after_data(client: socket.socket, payload: bytes) -> None:
    reset_when_closed(client)
    client.sendall(payload)


def reset_midway(client: socket.socket, payload: bytes) -> None:
    """A part of the payload, and of the answers, may still be on the way."""
    reset_when_closed(client)
    client.sendall(payload)


def close_at_once(client: socket.socket, payload: bytes) -> None:
    pass


def reset_at_once(client: socket.socket, payload: bytes) -> None:
    reset_when_closed(client)


def half_close(client: socket.socket, payload: bytes) -> bytes:
    client.sendall(payload)
    client.shutdown(socket.SHUT_WR)
    return answers(client)


def half_close_with_data(client: socket.socket, payload: bytes) -> bytes:
    client.sendall(payload, socket.MSG_MORE)
    client.shutdown(socket.SHUT_WR)
    return answers(client)


def small_writes(client: socket.socket, payload: bytes) -> bytes:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(payload), 17):
        client.sendall(payload[start : start + 17])
    client.shutdown(socket.SHUT_WR)
    return answers(client)


def drip(client: socket.socket, payload: bytes) -> bytes:
    """A line now and then, each after the answer to the one before."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer = b""
    for line in io.BytesIO(payload):
        middle = len(line) // 2
        client.sendall(line[:middle])
        time.sleep(0.003)  # That is the behaviour; nothing depends on it.
        client.sendall(line[middle:])
        expected = len(answer) + len(line)
        while len(answer) < expected:
            piece = client.recv(65536)
            if not piece:
                return answer
            answer += piece
    return answer


@dataclasses.dataclass(frozen=True)
class Way:
    """
    One way to use a connection and to leave it.

    :ivar use: returns the answers, or None if it does not wait for them.
    :ivar size: the least and the most bytes to send; none at all where the
        client leaves without a word.
    :ivar all_arrives: everything that was sent reaches the server.
    """

    use: Callable[[socket.socket, bytes], bytes | None]
    size: tuple[int, int]
    all_arrives: bool = True


# What a reset follows arrives all the same if it fits into the window.
WAYS = (
    Way(close_with_data, (1, 8_000)),
    Way(reset_after_data, (1, 8_000)),
    Way(reset_midway, (100_000, 400_000), all_arrives=False),
    Way(close_at_once, (0, 0)),
    Way(reset_at_once, (0, 0)),
    Way(half_close, (1, 300_000)),
    Way(half_close_with_data, (1, 8_000)),
    Way(small_writes, (1, 8_000)),
    Way(drip, (1, 3_000)),
)


@dataclasses.dataclass(frozen=True)
class Visit:
    """One connection: its name, its way, and all that it sends."""

    name: str
    way: Way
    payload: bytes


def plan(count: int, seed: int) -> list[Visit]:
    """What ``count`` connections will do; the first line of each is its name."""
    chance = random.Random(seed)
    visits = []
    for number in range(count):
        way = chance.choice(WAYS)
        payload = b""
        size = chance.randint(*way.size)
        if size:
            payload = b"%d\n%b\n" % (number, chance.randbytes(size))
        visits.append(Visit(str(number) if size else "", way, payload))
    return visits


def make(visit: Visit, port: int, together: threading.Barrier) -> None:
    """Connect, wait for the others unless the way is not to wait, and do it."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIME_LIMIT) as client:
        if visit.payload:
            together.wait(TIME_LIMIT)
        answer = visit.way.use(client, visit.payload)
    if not visit.payload:
        together.wait(TIME_LIMIT)
    if answer is not None and answer != visit.payload:
        raise RuntimeError(
            f"connection {visit.name} ({visit.way.use.__name__}) sent "
            f"{len(visit.payload)} bytes and got {len(answer)} others back"
        )


def main(port: int, count: int, seed: int) -> None:
    visits = plan(count, seed)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for start in range(0, count, AT_ONCE):
            wave = visits[start : start + AT_ONCE]
            together = threading.Barrier(len(wave))
            for done in [threads.submit(make, each, port, together) for each in wave]:
                done.result()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
