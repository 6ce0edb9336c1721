"""
The workloads that compare.py measures, and how a workload runs: the server on one core,
and its clients on another.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from servers import CONTENDERS, MIB

HERE = Path(__file__).parent
PATIENCE = 30.0
"""How many seconds a process has to end after it has closed its output."""


@dataclass(frozen=True)
class Work:
    """
    A workload.

    :ivar client: the program that keeps the server busy: "load" (load.c), "tls"
        (tls_load.py), "wrk", "redis" (redis-benchmark), or "" if the server does so
        itself.
    :ivar arguments: the arguments of the client; for load.c without the port and the
        number of idle connections.
    :ivar connections: how many connections are busy.
    :ivar idle: how many further connections are idle.  The work is measured without
        them as well.
    """

    what: str
    service: str
    client: str = "load"
    arguments: tuple[str | int, ...] = ()
    connections: int = 0
    idle: int = 0
    unit: str = "request"

    def missing(self) -> str:
        """Return why the work cannot be measured here, or an empty string."""
        if self.client == "wrk" and not shutil.which("wrk"):
            return "wrk is not installed (apt-get install wrk)"
        if self.client == "redis" and not shutil.which("redis-benchmark"):
            return "redis-benchmark is not installed (apt-get install redis-tools)"
        if self.service == "tls":
            try:
                import cryptography  # noqa: F401
            except ImportError:
                return "cryptography is not installed (pip install -e '.[tls]')"
        return ""

    def contenders(self) -> list[str]:
        """Return the contenders that support the work, installed or not."""
        return [
            name
            for name, contender in CONTENDERS.items()
            if self.service in contender.services
            and self.connections + self.idle <= contender.most
        ]


def tcp(
    what: str,
    connections: int,
    *,
    service: str = "echo",
    request: int = 64,
    answer: int = 64,
    idle: int = 0,
    unit: str = "request",
) -> Work:
    arguments = ("tcp", connections, request, answer)
    return Work(what, service, "load", arguments, connections, idle, unit)


WORKS = {
    "echo-1": tcp("TCP echo of 64 bytes, 1 connection", 1),
    "echo-100": tcp("TCP echo of 64 bytes, 100 connections", 100),
    "echo-1000": tcp("TCP echo of 64 bytes, 1,000 connections", 1000),
    "echo-idle": tcp(
        "TCP echo of 64 bytes, 100 connections among 10,000 idle ones",
        100,
        idle=10_000,
    ),
    "echo-64k": tcp(
        "TCP echo of 64 KiB, 4 connections", 4, request=1 << 16, answer=1 << 16
    ),
    "lines-100": tcp(
        "TCP echo of lines of 64 bytes, 100 connections", 100, service="lines"
    ),
    "connect": Work(
        "connect, echo 64 bytes, close, 50 at a time",
        "echo",
        "load",
        ("connect", 50, 64, 64),
        50,
        unit="connection",
    ),
    "bulk": tcp(
        "bulk to the server, 4 connections",
        4,
        service="sink",
        request=MIB,
        answer=1,
        unit="MiB",
    ),
    "bulk-out": tcp(
        "bulk from the server, 4 connections",
        4,
        service="source",
        request=1,
        answer=MIB,
        unit="MiB",
    ),
    "udp": Work(
        "UDP echo of 64 bytes, 100 clients", "udp", "load", ("udp", 100, 64, 64), 1
    ),
    "tls": Work("TLS echo of 64 bytes, 50 connections", "tls", "tls", (50, 64), 50),
    "web-hello": Work(
        "twisted.web, a greeting, 100 connections", "web", "wrk", (100, "/hello"), 100
    ),
    "web-file": Work(
        "twisted.web, a file of 1 MB, 10 connections", "web", "wrk", (10, "/file"), 10
    ),
    "redis": Work(
        "redis-benchmark: GET, 50 connections, 16 commands at a time",
        "redis",
        "redis",
        ("get", 50, 16),
        50,
        unit="command",
    ),
    "timers": Work(
        "timers, 10,000 at a time set and cancelled", "timers", "", unit="timer"
    ),
}


def prepare(folder: Path, works: list[Work]) -> None:
    """Make the programs, the certificate and the file that servers and clients need."""
    compiler = os.environ.get("CC") or "cc"
    if not shutil.which(compiler):
        raise SystemExit(
            f"There is no C compiler ({compiler}) for the client: install one "
            "(apt-get install gcc libc6-dev), or name yours with CC=…."
        )
    for name in ("load", "echo"):
        command = [compiler, "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")]
        subprocess.run(command, check=True)
    (folder / "file").write_bytes(os.urandom(1_000_000))
    (folder / "wrk.lua").write_text(WRK_REPORT)
    if any(work.service == "tls" for work in works):
        (folder / "server.pem").write_bytes(certificate())


def certificate() -> bytes:
    """Return a certificate that is valid for a day, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


# Processes


class Process:
    """A process that writes lines, some of them as answers to lines that it reads."""

    def __init__(self, stack: contextlib.ExitStack, command: list[str]) -> None:
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        stack.callback(self._end)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def answer(self, question: object = None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if question is not None:
            with contextlib.suppress(BrokenPipeError):
                print(question, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(PATIENCE)
            raise SystemExit(f"{self._command} has ended with status {status}.")
        return line

    def cpu(self) -> float:
        """Return the CPU time of all its threads in seconds, user and system."""
        # The clock that clock_getcpuclockid(3) returns for the process.
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> int:
        """Return the size of its resident set, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


WRK_REPORT = """\
function done(summary, latency)
    local errors = summary.errors
    print(string.format(
        '{"requests": %d, "elapsed": %f, "p50": %f, "p99": %f, "errors": %d}',
        summary.requests, summary.duration / 1e6,
        latency:percentile(50), latency:percentile(99),
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


class Turn(TypedDict, total=False):
    """The results of a turn: times in seconds, and latencies in microseconds."""

    requests: int
    elapsed: float
    cpu: float
    p50: float
    p99: float
    errors: int


class Subject:
    """A contender at work: its server, and the client that keeps it busy."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        contender: str,
        work: Work,
        idle: int,
        core: int,
    ) -> None:
        self.contender = contender
        self.idle = idle
        self._stack = stack
        self._folder = folder
        self._work = work
        self._server = Process(stack, self._server_command())
        os.sched_setaffinity(self._server.pid, {core})
        self._client: Process | None = None
        self.memory: float | None = None
        """Bytes per connection, if there are idle ones."""

    def _server_command(self) -> list[str]:
        if CONTENDERS[self.contender].serve is None:
            return [str(self._folder / "echo"), self._work.service]
        return [
            *(sys.executable, str(HERE / "servers.py")),
            *(self.contender, self._work.service, "--folder", str(self._folder)),
        ]

    def _client_command(self) -> list[str]:
        arguments = [str(each) for each in self._work.arguments]
        if self._work.client == "tls":
            return [sys.executable, str(HERE / "tls_load.py"), self._port, *arguments]
        kind, *sizes = arguments
        load = str(self._folder / "load")
        return [load, kind, self._port, *sizes, str(self.idle)]

    def connect(self) -> None:
        """Wait for the server, then start the client and make all connections."""
        self._port = self._server.answer().strip()
        if not self._work.client:
            self._client = self._server
        elif self._work.client not in ("wrk", "redis"):
            before = self._server.memory()
            self._client = Process(self._stack, self._client_command())
            self._client.answer()
            if self.idle:
                connections = self._work.connections + self.idle
                self.memory = (self._server.memory() - before) / connections

    def take_turn(self, seconds: float) -> Turn:
        before = self._server.cpu()
        if self._client is not None:
            told = self._client.answer(seconds)
        elif self._work.client == "redis":
            told = self._redis_benchmark(seconds)
        else:
            told = self._wrk(seconds)
        turn: Turn = json.loads(told)
        turn["cpu"] = self._server.cpu() - before
        if turn.get("errors"):
            raise SystemExit(f"{self.contender}: wrk has seen errors: {told}")
        return turn

    def _wrk(self, seconds: float) -> str:
        connections, path = self._work.arguments
        command = [
            *("wrk", "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{max(1, round(seconds))}s"),
            *("--script", str(self._folder / "wrk.lua")),
            f"http://127.0.0.1:{self._port}{path}",
        ]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout
        return output.splitlines()[-1]

    def _redis_benchmark(self, seconds: float) -> str:
        name, connections, pipeline = self._work.arguments
        # It counts requests, not seconds.
        requests = max(1000, int(seconds * 50_000))
        command = [
            *("redis-benchmark", "-h", "127.0.0.1", "-p", self._port, "--csv"),
            *("-t", str(name), "-c", str(connections), "-P", str(pipeline)),
            *("-n", str(requests)),
        ]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout
        # "test","rps","avg_latency_ms","min","p50","p95","p99","max"
        fields = [each.strip('"') for each in output.splitlines()[-1].split(",")]
        told: Turn = {"requests": requests, "elapsed": requests / float(fields[1])}
        told["p50"] = float(fields[4]) * 1000
        told["p99"] = float(fields[6]) * 1000
        return json.dumps(told)
