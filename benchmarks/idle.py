"""
What idle connections cost a server: its CPU time for each echo request over
100 busy connections, without idle connections and with 10,000 of them, on the
realtime-signals reactor and, beside it, on Twisted's epoll reactor.

    python benchmarks/idle.py [--rounds N] [--requests N] [--idle N] [--json FILE]

The bar for the realtime-signals reactor is 1.3 times the cost without idle
connections, as the median over the rounds; above it the exit status is 1.

In each round, every reactor runs in two fresh server processes, one with idle
connections and one without, which are pinned to the same core and take short
turns, so that whatever else the machine does meets both alike.  The client is
pinned to another core.  Every idle connection has made one request before.  The
CPU time is the server's own, user and system, and leaves out what the kernel
does on the client's core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

REACTORS = {
    "RealtimeSignalReactor": "twisted_rtsig.rtsigreactor",
    "EPollReactor": "twisted.internet.epollreactor",
}
OURS = "RealtimeSignalReactor"

BAR = 1.3
ACTIVE = 100
REQUEST = b"x" * 64
BACKLOG = 1024
TURN = 10
"""Batches, of one request on each active connection, before the other's turn."""

TIME_LIMIT = 60.0
"""Seconds after which the client gives up to wait for the server."""


class Sample(TypedDict):
    """One server in one round."""

    round: int
    reactor: str
    idle: int
    cpu_us: float
    """Server CPU for each request, in microseconds."""
    rate: float
    """Requests in a second."""
    statistics: dict[str, int]
    """What the reactor counted meanwhile, if it counts."""


def allow_many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# The server


def serve(reactor_name: str, core: int) -> None:
    """
    Serve echo on a port, whose number goes to standard output.  For each line
    on standard input write one, of CPU seconds and statistics; end with it.
    """
    os.sched_setaffinity(0, {core})
    allow_many_descriptors()
    importlib.import_module(REACTORS[reactor_name]).install()
    from twisted.internet import reactor
    from twisted.internet.protocol import Factory, Protocol

    class Echo(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    running: Any = reactor
    factory = Factory.forProtocol(Echo)
    port = running.listenTCP(0, factory, backlog=BACKLOG, interface="127.0.0.1")
    counts = getattr(running, "statistics", dict)

    def answer() -> None:
        # In a thread, so that the reactor under test has nothing to do with it.
        for _ in sys.stdin:
            used = resource.getrusage(resource.RUSAGE_SELF)
            told = {"cpu": used.ru_utime + used.ru_stime, "statistics": dict(counts())}
            print(json.dumps(told), flush=True)
        running.callFromThread(running.stop)

    print(port.getHost().port, flush=True)
    running.callWhenRunning(threading.Thread(target=answer, daemon=True).start)
    running.run()


class Server:
    """A server in a process of its own, as the client sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions = process.stdin
        self._answers = process.stdout
        self.port = int(self._answers.readline())

    def usage(self) -> tuple[float, dict[str, int]]:
        """Its CPU seconds and its counts until now."""
        print(file=self._questions, flush=True)
        told = json.loads(self._answers.readline())
        return told["cpu"], told["statistics"]


@contextlib.contextmanager
def server_on(reactor_name: str, core: int) -> Iterator[Server]:
    """A fresh server; it ends with its standard input."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", reactor_name, "--core", str(core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Server(process)
            _, _ = process.communicate(timeout=TIME_LIMIT)
        finally:
            process.kill()


# The client


@contextlib.contextmanager
def connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections, each of which has made one request."""
    made: list[socket.socket] = []
    try:
        while len(made) < count:
            chunk = [
                socket.create_connection(("127.0.0.1", port), TIME_LIMIT)
                for _ in range(min(BACKLOG // 4, count - len(made)))
            ]
            made += chunk
            ask(chunk)
        yield made
    finally:
        for each in made:
            each.close()


def ask(clients: list[socket.socket]) -> None:
    """One request on each of the connections, all of them under way together."""
    for client in clients:
        client.sendall(REQUEST)
    for client in clients:
        missing = len(REQUEST)
        while missing:
            answer = client.recv(missing)
            if not answer:
                raise ConnectionError("the server has closed a connection")
            missing -= len(answer)


class Subject:
    """A server under measurement, with its active connections."""

    def __init__(self, server: Server, idle: int, active: list[socket.socket]) -> None:
        self.idle = idle
        self._server = server
        self._active = active
        self._cpu = 0.0
        self._elapsed = 0.0
        self._batches = 0
        self._counts: dict[str, int] = {}

    def warm_up(self, batches: int) -> None:
        for _ in range(batches):
            ask(self._active)

    def take_turn(self, batches: int) -> None:
        cpu_before, before = self._server.usage()
        start = time.perf_counter()
        for _ in range(batches):
            ask(self._active)
        self._elapsed += time.perf_counter() - start
        cpu_after, after = self._server.usage()
        self._cpu += cpu_after - cpu_before
        self._batches += batches
        for name in after:
            grown = after[name] - before[name]
            self._counts[name] = self._counts.get(name, 0) + grown

    def sample(self, round_: int, reactor_name: str) -> Sample:
        requests = self._batches * ACTIVE
        return {
            "round": round_,
            "reactor": reactor_name,
            "idle": self.idle,
            "cpu_us": self._cpu / requests * 1e6,
            "rate": requests / self._elapsed,
            "statistics": self._counts,
        }


def measure(
    round_: int, reactor_name: str, idle: int, requests: int, core: int
) -> list[Sample]:
    """One round of one reactor: without idle connections, and with them."""
    with contextlib.ExitStack() as stack:
        subjects = []
        for count in (0, idle):
            server = stack.enter_context(server_on(reactor_name, core))
            stack.enter_context(connections(server.port, count))
            active = stack.enter_context(connections(server.port, ACTIVE))
            subjects.append(Subject(server, count, active))
        turns = max(1, round(requests / ACTIVE / TURN))
        for subject in subjects:
            subject.warm_up(TURN * max(1, turns // 10))
        for turn in range(turns):
            for subject in subjects if turn % 2 else subjects[::-1]:
                subject.take_turn(TURN)
        return [subject.sample(round_, reactor_name) for subject in subjects]


# The report


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(samples: list[Sample], reactor_name: str, idle: int) -> list[float]:
    """Of each round: the cost with idle connections over that without."""
    cost = {
        (sample["round"], sample["idle"]): sample["cpu_us"]
        for sample in samples
        if sample["reactor"] == reactor_name
    }
    rounds = sorted({round_ for round_, _ in cost})
    return [cost[each, idle] / cost[each, 0] for each in rounds]


def report(samples: list[Sample], idle: int) -> str:
    """The table."""
    head = ("reactor", "idle connections", "median", "lower to upper quartile")
    rows = [head, tuple("---" for _ in head)]
    for name in REACTORS:
        for connected in (0, idle):
            low, middle, high = quartiles(
                [
                    sample["cpu_us"]
                    for sample in samples
                    if (sample["reactor"], sample["idle"]) == (name, connected)
                ]
            )
            rows.append(
                (name, f"{connected:,}", f"{middle:.1f} µs", f"{low:.1f} to {high:.1f}")
            )
        low, middle, high = quartiles(ratios(samples, name, idle))
        rows.append((name, "ratio", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def environment() -> str:
    import twisted

    return (
        f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"{platform.python_implementation()} {platform.python_version()}, "
        f"Twisted {twisted.__version__}"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=5, help="how often")
    parser.add_argument(
        "--requests", type=positive, default=50_000, help="to each server in a round"
    )
    parser.add_argument(
        "--idle", type=positive, default=10_000, help="idle connections"
    )
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--serve", choices=REACTORS, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.serve:
        serve(options.serve, options.core)
        return 0
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("idle.py needs two cores, one for the server", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {cores[1]})
    allow_many_descriptors()
    needed = options.idle + 2 * ACTIVE + 50
    if needed > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        print(
            f"idle.py needs {needed} descriptors: raise the hard limit (ulimit -Hn) "
            "or use a smaller --idle",
            file=sys.stderr,
        )
        return 2
    samples: list[Sample] = []
    names = list(REACTORS)
    for round_ in range(1, options.rounds + 1):
        names.reverse()
        for name in names:
            measured = measure(round_, name, options.idle, options.requests, cores[0])
            samples += measured
            for sample in measured:
                print(
                    f"round {round_} of {options.rounds}: {name}, "
                    f"{sample['idle']:,} idle: {sample['cpu_us']:.1f} µs, "
                    f"{sample['rate']:,.0f} requests/s",
                    file=sys.stderr,
                    flush=True,
                )
    ratio = quartiles(ratios(samples, OURS, options.idle))[1]
    print(f"\n{environment()}")
    print(
        f"Server CPU for each request of {len(REQUEST)} bytes, {ACTIVE} active "
        f"connections, {options.requests:,} requests, {options.rounds} rounds:\n"
    )
    print(report(samples, options.idle))
    kept = ratio <= BAR
    print(
        f"\n{OURS}: {ratio:.2f} times the cost, at most {BAR} wanted: "
        + ("good." if kept else "MISSED.")
    )
    if options.json:
        options.json.write_text(
            json.dumps({"environment": environment(), "samples": samples}, indent=1)
        )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
