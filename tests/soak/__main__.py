"""
Run the soak test::

    python -m tests.soak --reactor rtsig --minutes 30

After a warm-up, and again at the end of the load, the peers leave and the server must
come to rest.  At the end it may have no more memory, descriptors, tasks and timers than
after the warm-up.  No peer may have missed an answer or got a wrong byte.  The server
may not have logged a warning or an error.  The test prints a line a minute, and exits
with status 1 if it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from tests.soak.peers import Crowd, talks_of

REST = 60.0
"""Seconds in which the server must come to rest."""

SAME = ("descriptors", "tasks", "timers", "watched")
MORE_OBJECTS = 2_000
MORE_MEMORY = 16 << 20
"""Bytes that the allocator may hold in addition, for peaks after the warm-up."""


class Soak:
    """The server process, and the faults that were found so far."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        assert server.stdout is not None
        assert server.stdin is not None
        self._reports, self._questions = server.stdout, server.stdin
        self.addresses = self._answer()
        self.wrong: list[str] = []

    def _answer(self) -> dict[str, Any]:
        line = self._reports.readline()
        if not line:
            raise SystemExit(f"the server has ended, status {self._server.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def report(self) -> dict[str, Any]:
        """The state of the server."""
        print(file=self._questions, flush=True)
        report = self._answer()
        self.wrong += report["errors"]
        return report

    def load(self, seconds: float) -> dict[str, Any]:
        """Put the server under load, wait until it is at rest, and return its state."""
        crowd = Crowd(self.addresses)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.wrong:
            time.sleep(min(left, 60))
            self.wrong += crowd.failures()
            if left > 60:
                self._print(self.report())
        times = crowd.leave()
        self.wrong += [each for each in crowd.failures() if each not in self.wrong]
        talks = [each.__name__ for each in talks_of(self.addresses)]
        print(", ".join(f"{times[each]} {each}" for each in talks))
        self.wrong += [f"{each}: not once" for each in talks if not times[each]]
        report = self._at_rest()
        self._print(report)
        return report

    def _at_rest(self) -> dict[str, Any]:
        """Wait until the server has no connection and its state stays the same."""
        end = time.monotonic() + REST
        report, unchanged = self.report(), 0
        while unchanged < 20:
            if time.monotonic() > end:
                self.wrong.append(f"it does not come to rest: {report['details']}")
                break
            time.sleep(0.1)
            before, report = report, self.report()
            same = all(report[name] == before[name] for name in SAME)
            unchanged = unchanged + 1 if same and not report["connections"] else 0
        return report

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Find the numbers that have grown."""
        most = {name: before[name] for name in SAME}
        most["objects"] = before["objects"] + MORE_OBJECTS
        most["memory"] = before["memory"] + MORE_MEMORY
        for name, limit in most.items():
            if after[name] > limit:
                details = (before["details"], after["details"])
                self.wrong.append(
                    f"{name}: {before[name]:,}, and {after[name]:,} at the end; "
                    f"{details if name in ('tasks', 'timers') else ''}"
                )
        if not after["refusals"] > before["refusals"]:
            self.wrong.append("no refusal of a datagram was reported")

    def _print(self, report: dict[str, Any]) -> None:
        print(
            time.strftime("%H:%M:%S"),
            ", ".join(
                f"{value:,} {name}"
                for name, value in report.items()
                if isinstance(value, int)
            ),
            flush=True,
        )


@contextlib.contextmanager
def serving(reactor: str) -> Iterator[Soak]:
    """A server on the reactor of this name."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-m", "tests.soak.server", reactor, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        try:
            yield Soak(server)
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("::")[0].strip())
    parser.add_argument("--reactor", default="rtsig", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="default: %(default)s"
    )
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    warm_up = min(60, seconds / 3)
    with serving(arguments.reactor) as soak:
        before = soak.load(warm_up)
        if not soak.wrong:
            soak.compare(before, soak.load(seconds - warm_up))
    if soak.wrong:
        print(f"{arguments.reactor}: {len(soak.wrong)} faults:")
        print("\n".join(dict.fromkeys(soak.wrong[:20])))
        sys.exit(1)
    print(f"{arguments.reactor}: no fault after {arguments.minutes} minutes")


if __name__ == "__main__":
    main()
