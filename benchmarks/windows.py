"""
Compare the reactors for Windows, under Wine: the time and the system calls of a
request.

    python benchmarks/windows.py [--rounds N] [--seconds N]

echo-100   TCP echo of 64 bytes, 100 connections
web-hello  twisted.web, a greeting, 100 connections

The servers are processes of a real Windows Python under Wine (tests/wine.sh).  Their
clients are Linux programs on another core.  In each round each reactor has a fresh
server, and the servers take short turns.  The figure is requests per second, as the CPU
time would leave out Wine's own server, which does a part of the work.

Then strace counts the Linux system calls of the process, without those of Wine's
server.  Windows would count other system calls, but each of them that leaves the
process is at least one of these.

These figures are about Wine.  For Windows they show only which reactor asks less of the
system.  The exit status is 1 if another reactor is better than rtsig-iocp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WINE = HERE.parent / "tests" / "wine.sh"
WORKS = {"echo-100": "echo", "web-hello": "web"}
REACTORS = {
    "rtsig-iocp": "twisted_rtsig.iocpreactor",
    "iocp": "twisted.internet.iocpreactor",
    "select": "twisted.internet.selectreactor",
}
TURN = 0.5
"""The approximate length of a turn, in seconds."""
COUNTED = 5.0
"""For how many seconds the system calls are counted, which slows the server down."""


# Under Wine


def serve(reactor_name: str, service: str) -> None:
    import importlib

    # The Windows Python has not installed the package.
    sys.path.insert(0, str(HERE.parent))
    from servers import listen

    importlib.import_module(REACTORS[reactor_name]).install()
    from twisted.internet import reactor

    running: Any = reactor
    port = listen(running, service, Path()).getHost().port
    print(json.dumps([os.getpid(), port]), flush=True)
    running.run()


# Under Linux


class Server:
    """A server under Wine, and the client that keeps it busy."""

    def __init__(
        self, stack: contextlib.ExitStack, folder: Path, name: str, work: str
    ) -> None:
        from works import Process

        self.name = name
        self._folder = folder
        marker = f"--serve={name}/{WORKS[work]}"
        server = subprocess.Popen(
            [WINE, str(HERE / "windows.py"), marker],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        stack.callback(server.wait)
        stack.callback(os.killpg, server.pid, signal.SIGKILL)
        assert server.stdout is not None
        self._port = json.loads(server.stdout.readline())[1]
        self.pid = next(
            int(each.name)
            for each in Path("/proc").iterdir()
            if each.name.isdigit() and _is_server(each, marker)
        )
        os.sched_setaffinity(self.pid, {0})
        sizes = ["64", "64"] if work == "echo-100" else self._sizes_of_greeting()
        command = [str(folder / "load"), "tcp", str(self._port), "100", *sizes, "0"]
        self._load = Process(stack, command)
        self._load.answer()

    def _sizes_of_greeting(self) -> list[str]:
        """Return the path of a file with the request, and the size of the answer."""
        request = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
        path = self._folder / "request"
        path.write_bytes(request)
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"world!\n"):
                answer += connection.recv(1000)
        return [str(path), str(len(answer))]

    def take_turn(self, seconds: float) -> dict[str, float]:
        turn: dict[str, float] = json.loads(self._load.answer(seconds))
        return turn

    def calls_per_request(self) -> float:
        """Return the system calls per request, counted by strace in one turn."""
        table = self._folder / "calls"
        strace = subprocess.Popen(
            ["strace", "-f", "-c", "-o", str(table), "-p", str(self.pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert strace.stderr is not None
        # "Process … attached"
        strace.stderr.readline()
        turn = self.take_turn(COUNTED)
        strace.send_signal(signal.SIGINT)
        strace.communicate()
        total = re.search(r"^100\.00 +\S+ +\S+ +(\d+)", table.read_text(), re.M)
        assert total is not None, table.read_text()
        return int(total[1]) / turn["requests"]


def _is_server(process: Path, marker: str) -> bool:
    with contextlib.suppress(OSError):
        command = (process / "cmdline").read_bytes().split(b"\0")
        return marker.encode() in command and b"python.exe" in command[0]
    return False


def compare(work: str, rounds: int, seconds: float, folder: Path) -> bool:
    """Print a table; return whether rtsig-iocp was the best."""
    rates: dict[str, list[float]] = {name: [] for name in REACTORS}
    calls: dict[str, float] = {}
    turns = max(1, round(seconds / TURN))
    for round_ in range(rounds):
        with contextlib.ExitStack() as stack:
            servers = [Server(stack, folder, name, work) for name in REACTORS]
            for server in servers:
                server.take_turn(TURN)
            told = {name: [0.0, 0.0] for name in REACTORS}
            for _ in range(turns):
                for server in servers:
                    turn = server.take_turn(seconds / turns)
                    told[server.name][0] += turn["requests"]
                    told[server.name][1] += turn["elapsed"]
            for name, (requests, elapsed) in told.items():
                rates[name].append(requests / elapsed)
            if round_ == rounds - 1 and shutil.which("strace"):
                calls = {each.name: each.calls_per_request() for each in servers}
    print(f"\n## {work}, under Wine\n")
    print(
        "| reactor | requests per second | of rtsig-iocp's | system calls per request |"
    )
    print("| --- | --- | --- | --- |")
    ours = rates["rtsig-iocp"]
    best = True
    for name, theirs in rates.items():
        ratio = statistics.median(
            their / our for their, our in zip(theirs, ours, strict=True)
        )
        counted = f"{calls[name]:.2f}" if calls else "strace is not installed"
        rate = statistics.median(theirs)
        print(f"| {name} | {rate:,.0f} | {ratio:.2f} | {counted} |")
        best = best and ratio <= 1
        best = best and (not calls or calls[name] >= calls["rtsig-iocp"])
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="5 by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="3 by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve.split("/"))
        return 0
    from works import prepare

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), [])
        os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
        results = [
            compare(work, options.rounds, options.seconds, Path(folder))
            for work in WORKS
        ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
