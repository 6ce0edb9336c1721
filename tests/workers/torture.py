"""
Clients that open, use and close connections without a pause, while the workers are
reloaded, scaled and killed.

    python -m tests.workers.torture
    python -m tests.workers.torture --clients 10 --reloads 1 --scalings 2 --kills 1

Reloads and scalings must not lose a request, nor refuse or reset a connection.  A
worker that is killed loses only the requests on connections that it has accepted.  At
the end, many connections must be spread evenly, which takes root or CAP_BPF.  The exit
status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.workers.support import DEADLINE, Twistd, write_tac
from twisted_rtsig.workers.status import read_status

# It records each accepted connection: the client's port and the process.
APPLICATION = """
import os
from twisted.application.service import Application
from twisted.application.strports import service
from twisted.web.resource import Resource
from twisted.web.server import Site

class Page(Resource):
    isLeaf = True

    def render_GET(self, request):
        return b"%d" % os.getpid()

class Recording(Site):
    def buildProtocol(self, address):
        os.write(accepted, b"%d %d\\n" % (address.port, os.getpid()))
        return super().buildProtocol(address)

    def log(self, request):
        pass

accepted = os.open("accepted", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
application = Application("torture")
service("tcp:0:interface=127.0.0.1", Recording(Page())).setServiceParent(application)
"""

# How many requests a client makes on one connection.
_REQUESTS = (1, 1, 2, 5, 20)


# Seconds.  A worker starts slowly while the clients use all CPU time.
_PATIENCE = 600.0


@dataclass
class Lost:
    """
    A request that was not answered, or a connection that was not made.

    :ivar port: the client's port, or 0 if there was no connection.
    """

    what: str
    port: int
    during: str


@dataclass
class Report:
    """
    The results.

    :ivar requests: how many requests were answered, by what was done meanwhile.
    :ivar lost: requests and connections that were lost and must not be.
    :ivar killed: how many requests were lost by workers that were killed.
    :ivar spread: how many connections each worker had at the end.
    """

    requests: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    lost: list[Lost] = field(default_factory=list)
    killed: int = 0
    spread: list[int] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """Return what is wrong."""
        wrong = [f"{e.what} (port {e.port}, {e.during})" for e in self.lost]
        if self.spread and max(self.spread) > 1.2 * min(self.spread):
            wrong.append(f"the connections are not spread evenly: {self.spread}")
        return wrong


class Torture:
    """
    Runs the clients, and reloads, scales and kills the workers.

    :param count: how many workers there are.
    """

    def __init__(self, twistd: Twistd, folder: Path, count: int) -> None:
        self.report = Report()
        self._twistd = twistd
        self._count = count
        self._accepted = (folder / "accepted").open()
        # By the client's port, the process that accepted its latest connection.
        self._by_port: dict[int, int] = {}
        self._killed: set[int] = set()
        self._port = twistd.port()
        self._stop = False
        self.during = "start"

    async def run(
        self, clients: int, reloads: int, scalings: int, kills: int, connections: int
    ) -> Report:
        """See the options of the command."""
        using = [asyncio.ensure_future(self._use()) for _ in range(clients)]
        try:
            for number in range(reloads):
                await self._do("reloads", self._reload, number + 1)
            for number in range(scalings):
                await self._do("scalings", self._scale, number % 2 == 0)
            for _ in range(kills):
                await self._do("kills", self._kill)
        finally:
            self._stop = True
            await asyncio.gather(*using)
            self._accepted.close()
        if connections:
            await self._spread(connections)
        return self.report

    async def _do(self, name: str, function: Callable[..., None], *args: Any) -> None:
        self.during = name
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, function, *args)
        # Let the clients make requests in between.
        wanted = self.report.requests[name] + 100
        while self.report.requests[name] < wanted:
            await asyncio.sleep(0.01)

    # What is done to the workers, in a thread

    def _reload(self, number: int) -> None:
        self._twistd.send(signal.SIGHUP)
        self._twistd.wait_for("The reload is complete", number, _PATIENCE)

    def _scale(self, up: bool) -> None:
        self._twistd.send(signal.SIGTTIN if up else signal.SIGTTOU)
        wanted = self._count + (1 if up else 0)
        self._wait_for_workers(lambda workers: len(workers) == wanted)

    def _kill(self) -> None:
        workers = self._wait_for_workers(lambda workers: len(workers) == self._count)
        victim = random.choice(workers)
        self._killed.add(victim)
        os.kill(victim, signal.SIGKILL)
        self._wait_for_workers(
            lambda workers: victim not in workers and len(workers) == self._count
        )

    def _wait_for_workers(self, condition: Callable[[list[int]], bool]) -> list[int]:
        """Wait until a condition holds for the ready processes; return these."""
        while True:
            workers = read_status(str(self._twistd.pidfile))["workers"]
            ready = [each["pid"] for each in workers if each["state"] == "ready"]
            if condition(ready):
                return ready

    # The clients

    async def _use(self) -> None:
        while not self._stop:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                self._lose(f"a connection was refused: {error}", 0)
                continue
            self.report.connections += 1
            port = writer.get_extra_info("sockname")[1]
            try:
                await self._ask(reader, writer, random.choice(_REQUESTS))
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                self._lose(f"a request was lost: {error!r}", port)
            writer.close()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        for left in reversed(range(count)):
            close = b"" if left else b"Connection: close\r\n"
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + close + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
            lines = head.lower().split(b"\r\n")
            length = next(each for each in lines if each.startswith(b"content-length"))
            await reader.readexactly(int(length.partition(b":")[2]))
            self.report.requests[self.during] += 1
            if b"connection: close" in lines:
                break

    def _lose(self, what: str, port: int) -> None:
        for line in self._accepted:
            accepted, process = map(int, line.split())
            self._by_port[accepted] = process
        if self._by_port.get(port) in self._killed:
            self.report.killed += 1
        else:
            self.report.lost.append(Lost(what, port, self.during))

    async def _spread(self, connections: int) -> None:
        """Open connections, and count those of each worker."""
        processes: Counter[bytes] = Counter()
        writers = []
        for _ in range(connections):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writers.append(writer)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            processes[answer.rpartition(b"\n")[2]] += 1
        for writer in writers:
            writer.close()
        self.report.spread = sorted(processes.values())
        self.report.spread += [0] * (self._count - len(processes))


def torture(folder: Path, options: argparse.Namespace) -> Report:
    """Run everything in a folder."""
    tac = write_tac(folder, APPLICATION)
    count = options.workers
    shared = ["--shared-socket"] if options.shared_socket else []
    with Twistd(folder, "--count", str(count), *shared, "-y", tac) as twistd:
        twistd.wait_until_ready(count)
        return asyncio.run(
            Torture(twistd, folder, count).run(
                options.clients,
                options.reloads,
                options.scalings,
                options.kills,
                options.connections,
            )
        )


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.workers.torture", description=__doc__.split("\n\n")[0]
    )
    for name, default, what in (
        ("workers", 4, "workers"),
        ("clients", 50, "clients at a time"),
        ("reloads", 20, "reloads, one after the other"),
        ("scalings", 20, "scalings, up and down in turn"),
        ("kills", 20, "workers to kill"),
        ("connections", 400, "connections to count at the end"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} ({default})"
        )
    parser.add_argument(
        "--shared-socket",
        action="store_true",
        help="as of twistd workers; with --connections 0, since it spreads nothing",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = torture(Path(folder), options)
    answered = ", ".join(f"{n} during {name}" for name, n in report.requests.items())
    print(f"requests answered: {answered}; connections: {report.connections}")
    print(f"requests that killed workers had accepted, and lost: {report.killed}")
    print(f"connections of each worker at the end: {report.spread}")
    wrong = report.wrong()
    for each in wrong[:20]:
        print("WRONG:", each)
    print("lost:", len(report.lost))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
