"""
Measure the gain and the cost of workers.

    python benchmarks/workers.py [--rounds N] [--seconds N] [--access-log]

Scaling: a handler computes for one millisecond, in Python, for each request.  The
figure is the ratio of the requests that two workers answer on two cores to those that
one worker answers in the same time.  The client is wrk, which takes about a fiftieth of
a core at that rate.  All processes may run on both cores.

Cost: twisted.web answers with a greeting.  The figure is the ratio of the CPU time per
request of a worker to that of a plain twistd.  There is only one worker, with its
supervisor, as two on one core would disturb each other as any two processes do.  Both
servers are pinned to one core, and wrk to another.  The supervisor's own time is
printed as well.

All subjects run together and take turns of some seconds, in which the others sleep.  So
any other load on the machine affects all of them alike.  The ratios are medians over
the rounds.  When a server is ready, its objects are hidden from the garbage collector.

The benchmark needs wrk, two cores, and the /proc of Linux.  The exit status is 1 if a
bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted_rtsig.workers.status import read_status

SCALING_BAR = 1.85
COST_BAR = 1.03

APPLICATION = """
import gc
from twisted.application.service import Application
from twisted.application.strports import service
from twisted.internet import reactor
from twisted.web.resource import Resource
from twisted.web.server import Site

LOOPS = {loops}
ACCESS_LOG = {access_log}

class Page(Resource):
    isLeaf = True

    def render_GET(self, request):
        number = 0
        for _ in range(LOOPS):
            number += 1
        return b"Hello, world!"

class LoggingAtWill(Site):
    def startFactory(self):
        super().startFactory()
        if not ACCESS_LOG:
            self._logFile = None

def freeze():
    gc.collect()
    gc.freeze()

reactor.callWhenRunning(freeze)
application = Application("subject")
site = LoggingAtWill(Page())
service("tcp:0:interface=127.0.0.1", site).setServiceParent(application)
"""

# How many seconds a server has to start.
_START = 60.0


@dataclass
class Turn:
    """
    The figures of one turn of a subject.

    :ivar cpu: the CPU time of the processes that answer, in seconds.
    :ivar supervisor: the CPU time of the supervisor.
    """

    requests: int
    seconds: float
    cpu: float
    supervisor: float


class Subject:
    """
    A server to measure.

    :param workers: how many workers there are; 0 for a plain twistd.
    :param cores: the cores on which it may run.
    :param loops: how many additions the handler computes.
    :param access_log: whether twisted.web logs each request.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        workers: int,
        cores: set[int],
        loops: int,
        access_log: bool,
    ) -> None:
        folder.mkdir()
        code = APPLICATION.format(loops=loops, access_log=access_log)
        (folder / "app.tac").write_text(code)
        self.name = f"workers --count {workers}" if workers else "twistd"
        self._log = folder / "log"
        python = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        options = ["--reactor=rtsig-auto", "-n", f"--pidfile={folder / 'pid'}"]
        if workers:
            options += ["workers", "--count", str(workers)]
        with self._log.open("w") as log:
            # Children inherit the cores.
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cores)
            server = subprocess.Popen(
                [*python, *options, "-y", "app.tac"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            os.sched_setaffinity(0, before)
        self._pid = server.pid
        stack.callback(self._end, server)
        if workers:
            self._wait_for(r"Worker \d+ is ready", workers)
            status = read_status(str(folder / "pid"))
            self._pids = [each["pid"] for each in status["workers"]]
        else:
            self._pids = [self._pid]
        self._port = self._wait_for(r"starting on (\d+)$", 1)[0]

    def _wait_for(self, pattern: str, times: int) -> list[str]:
        end = time.monotonic() + _START
        while time.monotonic() < end:
            text = self._log.read_text()
            found = re.findall(pattern, text, re.MULTILINE)
            if len(found) >= times:
                return found
            time.sleep(0.05)
        raise SystemExit(f"{self.name} does not start:\n{text}")

    def _end(self, server: subprocess.Popen[bytes]) -> None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(_START)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            server.wait()

    def take_turn(self, seconds: int, connections: int, cores: set[int]) -> Turn:
        """Let wrk make requests, and measure the server."""
        cpu = sum(map(_cpu, self._pids))
        supervisor = _cpu(self._pid)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            output = subprocess.run(
                [
                    *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s"),
                    f"http://127.0.0.1:{self._port}/",
                ],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        finally:
            os.sched_setaffinity(0, before)
        done = re.search(r"(\d+) requests in ([\d.]+)s", output)
        if done is None or "Socket errors" in output or "Non-2xx" in output:
            raise SystemExit(f"{self.name}: wrk has failed:\n{output}")
        return Turn(
            int(done[1]),
            float(done[2]),
            sum(map(_cpu, self._pids)) - cpu,
            _cpu(self._pid) - supervisor,
        )


def _cpu(pid: int) -> float:
    """Return for how many seconds the main thread of a process has run (schedstat)."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def compare(
    subjects: list[Subject], rounds: int, take: Callable[[Subject], Turn]
) -> dict[Subject, list[Turn]]:
    """Let the subjects take turns, in both orders."""
    taken: dict[Subject, list[Turn]] = {each: [] for each in subjects}
    for subject in subjects:
        take(subject)
    for number in range(rounds):
        for subject in subjects if number % 2 else subjects[::-1]:
            taken[subject].append(take(subject))
    return taken


def median_of(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def loops_of_a_millisecond() -> int:
    """Return how many additions take a millisecond of CPU time."""
    best = min(_time_of(100_000) for _ in range(20))
    return round(100_000 * 1e-3 / best)


def _time_of(loops: int) -> float:
    began = time.process_time()
    number = 0
    for _ in range(loops):
        number += 1  # noqa: SIM113
    return time.process_time() - began


def scaling(options: argparse.Namespace, folder: Path, cores: list[int]) -> float:
    """Return the ratio of the requests that two workers answer to those of one."""
    both = set(cores[:2])
    loops = loops_of_a_millisecond()
    with contextlib.ExitStack() as stack:
        one, two = subjects = [
            Subject(stack, folder / f"scaling-{n}", n, both, loops, options.access_log)
            for n in (1, 2)
        ]
        taken = compare(
            subjects,
            options.rounds,
            lambda each: each.take_turn(options.seconds, options.connections, both),
        )
    for subject, turns in taken.items():
        rates = [each.requests / each.seconds for each in turns]
        costs = [each.cpu / each.requests * 1e6 for each in turns]
        print(
            f"    {subject.name}: {statistics.median(rates):.0f} requests/s, "
            f"{statistics.median(costs):.0f} µs of CPU for each"
        )
    ratios = [
        b.requests / b.seconds / (a.requests / a.seconds)
        for a, b in zip(taken[one], taken[two], strict=True)
    ]
    print(f"    2 workers to 1: {median_of(ratios)}; the bar is {SCALING_BAR}")
    return statistics.median(ratios)


def cost(options: argparse.Namespace, folder: Path, cores: list[int]) -> float:
    """Return the ratio of the CPU time of a request in a worker to that in twistd."""
    server, client = {cores[0]}, {cores[1]}
    with contextlib.ExitStack() as stack:
        plain, worker = subjects = [
            Subject(stack, folder / f"cost-{n}", n, server, 0, options.access_log)
            for n in (0, 1)
        ]
        taken = compare(
            subjects,
            options.rounds,
            lambda each: each.take_turn(options.seconds, options.connections, client),
        )
    costs: dict[Any, list[float]] = {}
    for subject, turns in taken.items():
        costs[subject] = [each.cpu / each.requests * 1e6 for each in turns]
        print(f"    {subject.name}: {statistics.median(costs[subject]):.1f} µs of CPU")
    own = [each.supervisor / each.requests * 1e6 for each in taken[worker]]
    ratios = [b / a for a, b in zip(costs[plain], costs[worker], strict=True)]
    print(f"    the supervisor: {statistics.median(own):.2f} µs more")
    print(f"    a worker to twistd: {median_of(ratios)}; the bar is {COST_BAR}")
    return statistics.median(ratios)


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, metavar="N", default=9, help="how often (9)")
    add("--seconds", type=int, metavar="N", default=2, help="of each turn (2)")
    add(
        "--connections",
        type=int,
        metavar="N",
        default=32,
        help="of the client (32)",
    )
    add("--access-log", action="store_true", help="let twisted.web log each request")
    options = parser.parse_args()
    if min(options.rounds, options.seconds, options.connections) < 1:
        parser.error("there is nothing to measure")
    return options


def main() -> int:
    options = parse()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt-get install wrk")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Two cores are needed.")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        print("Scaling, 1 ms of Python for each request:")
        times = scaling(options, folder, cores)
        print("Cost, a greeting of twisted.web:")
        ratio = cost(options, folder, cores)
    return int(times < SCALING_BAR or ratio > COST_BAR)


if __name__ == "__main__":
    sys.exit(main())
