"""
Count the bytecode instructions of a request, a measure that needs no quiet machine.

    python benchmarks/steps.py              compare with the recorded figures
    python benchmarks/steps.py --record     record them, for this Python and Twisted

echo       TCP echo of 64 bytes, one connection
connect    connect, echo 64 bytes, close, one after the other
large      an answer of 1 MiB
timers     a timer that is set and cancelled
streams    TCP echo of 64 bytes by a coroutine: ``read`` and ``write``

The figures are the instructions that the interpreter runs in the reactor's thread, on
each reactor of REACTORS, with a client in another thread.  The cost of the start is
subtracted, by comparing a long run with a short one.  Time in the kernel and in C does
not count.  So the figures show whether the package does more work than before, and
nothing about other servers.  Each figure is counted three times: the most is recorded,
and the least is compared.  The exit status is 1 if that is more than 3% above the
record, or more than WORSE_IN_PASSES allows.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from twisted.internet.protocol import Factory, Protocol

from twisted_rtsig.epollreactor import EdgeEPollReactor
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

RECORD = Path(__file__).parent / "results" / "steps.json"

WORSE: Final = 1.03

WORSE_IN_PASSES: Final = {"connect": 1.25, "large": 2.0}
"""The number of their passes depends on the client's thread and on kernel buffers."""

FEW, MANY = 100, 300
"""How many requests the short and the long run make."""

MESSAGE = b"." * 64
ANSWER = b"." * (1 << 20)

REACTORS: dict[str, Callable[[], Any]] = {
    "rtsig": RealtimeSignalReactor,
    "rtsig-epoll": EdgeEPollReactor,
}


class Echo(Protocol):
    """Echoes all data."""

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[union-attr]


class Large(Protocol):
    """Sends a large answer for each piece of data."""

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(ANSWER)  # type: ignore[union-attr]


async def echo(stream: Any) -> None:
    """Echo all data, by a coroutine."""
    while data := await stream.read():
        await stream.write(data)


# Clients


def receive(client: socket.socket, size: int) -> None:
    """Receive ``size`` bytes."""
    while size:
        received = len(client.recv(size, socket.MSG_WAITALL))
        if not received:
            raise ConnectionError("the server has closed the connection")
        size -= received


def on_one_connection(answer: int, address: Any, requests: int) -> None:
    """Make requests on one connection, one after the other."""
    with socket.create_connection(address) as client:
        for _ in range(requests):
            client.sendall(MESSAGE)
            receive(client, answer)


def connect_for_each(address: Any, requests: int) -> None:
    """Make each request on a connection of its own."""
    for _ in range(requests):
        with socket.create_connection(address) as client:
            client.sendall(MESSAGE)
            receive(client, len(MESSAGE))


# Workloads: what a reactor does, and its client

failed: list[BaseException] = []
"""Errors that clients have raised."""


def serve(
    protocol: type[Protocol],
    client: Callable[[Any, int], None],
    reactor: Any,
    requests: int,
) -> None:
    """Serve a protocol, and let a client make requests."""
    factory = Factory.forProtocol(protocol)
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    run_client(reactor, client, port.getHost().port, requests)


def serve_streams(reactor: Any, requests: int) -> None:
    """Serve a coroutine, and let a client make requests."""
    from twisted_rtsig.coro import CoroutineFactory

    factory = CoroutineFactory(echo, reactor=reactor)
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    client = functools.partial(on_one_connection, len(MESSAGE))
    run_client(reactor, client, port.getHost().port, requests)


def run_client(
    reactor: Any, client: Callable[[Any, int], None], port: int, requests: int
) -> None:
    """Run a client in a thread, and stop the reactor when it is done."""

    def run() -> None:
        try:
            client(("127.0.0.1", port), requests)
        except BaseException as error:
            failed.append(error)
        finally:
            reactor.callFromThread(reactor.stop)

    reactor.callWhenRunning(threading.Thread(target=run, daemon=True).start)


def set_timers(reactor: Any, timers: int) -> None:
    """Set ten timers in each pass, and cancel them in the next one."""

    def turn(left: int, calls: list[Any]) -> None:
        for call in calls:
            call.cancel()
        if left:
            calls = [reactor.callLater(30, turn) for _ in range(10)]
            reactor.callLater(0, turn, left - 10, calls)
        else:
            reactor.stop()

    reactor.callLater(0, turn, timers, [])


WORKS: dict[str, Callable[[Any, int], None]] = {
    "echo": functools.partial(
        serve, Echo, functools.partial(on_one_connection, len(MESSAGE))
    ),
    "connect": functools.partial(serve, Echo, connect_for_each),
    "large": functools.partial(
        serve, Large, functools.partial(on_one_connection, len(ANSWER))
    ),
    "timers": set_timers,
    "streams": serve_streams,
}


# Counting


def steps(reactor: Any, work: Callable[[Any, int], None], requests: int) -> int:
    """Return how many instructions a run takes."""
    counted = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal counted
        if event == "opcode":
            counted += 1
        else:
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return trace

    work(reactor, requests)
    sys.settrace(trace)
    try:
        reactor.run(installSignalHandlers=False)
    finally:
        sys.settrace(None)
    if failed:
        raise failed.pop()
    return counted


def steps_for_each(
    make_reactor: Callable[[], Any], work: Callable[[Any, int], None]
) -> int:
    """Return how many instructions a request takes."""
    # The first run fills the caches of Twisted, zope.interface and the interpreter.
    _, few, many = (steps(make_reactor(), work, each) for each in (FEW, FEW, MANY))
    return round((many - few) / (MANY - FEW))


def fewest_and_most(
    make_reactor: Callable[[], Any], work: Callable[[Any, int], None]
) -> tuple[int, int]:
    """Count three times, as one pass may become two on a busy machine."""
    counted = [steps_for_each(make_reactor, work) for _ in range(3)]
    return min(counted), max(counted)


def key() -> str:
    """Return the versions on which the figures depend."""
    from twisted import __version__

    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"{platform.python_implementation()} {python}, Twisted {__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Count the bytecode instructions of a request."
    )
    parser.add_argument(
        "--record", action="store_true", help="record the figures of this Python"
    )
    options = parser.parse_args()
    record: dict[str, dict[str, int]] = json.loads(RECORD.read_text())
    recorded = record.get(key(), {})
    counted: dict[str, int] = {}
    worse = []
    print(f"{key()}: bytecode instructions for each request\n")
    for name, make_reactor in REACTORS.items():
        for work, function in WORKS.items():
            row = f"{work}, {name}"
            now, counted[row] = fewest_and_most(make_reactor, function)
            before = recorded.get(row)
            if before is None:
                print(f"{row:24}{now:8,}")
            else:
                print(f"{row:24}{now:8,}   recorded: {before:,} ({now / before:.3f})")
                if now > before * WORSE_IN_PASSES.get(work, WORSE):
                    worse.append(row)
    if options.record:
        record[key()] = counted
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=4) + "\n")
        print(f"\nrecorded in {RECORD}")
    elif worse:
        sys.exit(f"\nmore instructions than recorded: {'; '.join(worse)}")
    elif not recorded:
        print("\nno record for these versions: --record makes one")


if __name__ == "__main__":
    main()
