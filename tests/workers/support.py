"""Runs ``twistd workers`` as a user does, and has applications to run in it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="workers need a POSIX system"
)

DEADLINE = 60.0
"""How many seconds a test waits, as twistd and each worker import all of Twisted."""

IDENTIFY = """
import os
from twisted.application import service, strports
from twisted.internet.protocol import Factory, Protocol
from twisted_rtsig.workers import current

VERSION = 1

class Identify(Protocol):
    def connectionMade(self):
        worker = current()
        self.transport.write(b"%d %d %d\\n" % (worker.number, os.getpid(), VERSION))
        self.transport.loseConnection()

    def dataReceived(self, data):
        pass

factory = Factory.forProtocol(Identify)
application = service.Application("identify")

def listen(description):
    strports.service(description, factory).setServiceParent(application)
"""
"""
An application that answers each connection with the worker's number, its process and
the version.
"""

RUN_TWISTD = "from twisted.scripts.twistd import run; run()"

ON_PORT_0 = IDENTIFY + 'listen("tcp:0:interface=127.0.0.1")\n'


class Twistd:
    """
    A ``twistd`` in the foreground, with its output.  At the end it and its workers are
    killed in any case.

    :param folder: its working directory.
    :param arguments: the arguments of the command.
    :param options: the options of ``twistd``.
    :param prelude: code that the process runs first.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        options: tuple[str, ...] = (),
        reactor: str | None = "rtsig-auto",
        command: str = "workers",
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        prelude: str = "",
        **more: Any,
    ) -> None:
        self.folder = folder
        self.pidfile = folder / "twistd.pid"
        chosen = [] if reactor is None else [f"--reactor={reactor}"]
        self.process = subprocess.Popen(
            [
                *(python, "-c", f"{prelude}\n{RUN_TWISTD}"),
                *("-n", *chosen, *options, command, *arguments),
            ],
            cwd=folder,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **more,
        )
        self._changed = threading.Condition()
        self._output = ""
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Twistd:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # All its processes are in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if error is not None:
            print(self.output)

    @property
    def output(self) -> str:
        """All output so far."""
        with self._changed:
            return self._output

    def wait_for(
        self, pattern: str, times: int = 1, seconds: float = DEADLINE
    ) -> list[str]:
        """
        Wait until something was logged a number of times.

        :param pattern: a regular expression.
        :return: all matches: the first group of each, or the whole match.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                found: list[str] = re.findall(pattern, self._output, re.MULTILINE)
                if len(found) >= times:
                    return found
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    state = "ended" if self._ended else f"run for {seconds} s more"
                    raise AssertionError(
                        f"twistd has {state}, and {pattern!r} was logged {len(found)} "
                        f"times:\n{self._output}"
                    )
                self._changed.wait(left)

    def wait_until_ready(self, workers: int, number: int | str = r"\d+") -> list[int]:
        """Wait until a number of workers have been ready; return their process ids."""
        pattern = rf"Worker {number} is ready \(process (\d+)\)"
        return [int(each) for each in self.wait_for(pattern, workers)]

    def port(self) -> int:
        """Return the first port on which a worker listens."""
        return int(self.wait_for(r"starting on (\d+)$")[0])

    def send(self, number: int) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait until the supervisor ends; return its exit status."""
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._output += line.decode()
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def write_tac(folder: Path, code: str, name: str = "app.tac") -> str:
    """Write an application file; return its name."""
    (folder / name).write_text(textwrap.dedent(code))
    return name


def ask(address: Any, family: int = socket.AF_INET) -> tuple[int, int, int]:
    """Connect to :data:`IDENTIFY`; return the worker's number, process and version."""
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)
        return read_answer(client)


def read_answer(client: socket.socket) -> tuple[int, int, int]:
    """Return the answer of :data:`IDENTIFY` on a connection."""
    data = b""
    while chunk := client.recv(100):
        data += chunk
    number, process, version = map(int, data.split())
    return number, process, version


def is_running(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any) -> None:
    """Poll a condition of which no event tells."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


@contextlib.contextmanager
def waiting_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open connections, and read nothing from them."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port), DEADLINE)
            stack.callback(client.close)
            clients.append(client)
        yield clients
