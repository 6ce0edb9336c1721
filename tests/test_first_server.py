"""
docs/first-server.md, word for word.  The files of the page are written into an empty
folder, and its commands run there in one shell, whose output must be that of the page.

Other ports are used, since those of the page may be taken.  The packages that pip would
download are found beside the interpreter of the tests instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import site
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.support import make_certificate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-server.md"
PATIENCE = 120.0
"""Seconds that each command may take, also those of pip."""

PARTS = re.compile(
    # A block of Python is a file if the line above it ends with a name of a file.
    r"(?:`(?P<file>[\w/]+\.py)`:\n\n```python\n(?P<code>.*?)^```$)"
    r"|(?:^```console\n(?P<session>.*?)^```$)",
    re.MULTILINE | re.DOTALL,
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl"),
    pytest.mark.skipif(sys.platform == "win32", reason="the page has a POSIX shell"),
]


class Shell:
    """A bash that runs one command after the other."""

    END = "end of the command"

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[str] = self._process.stdin
        self._output: IO[str] = self._process.stdout

    def run(self, command: str, lines: int) -> str:
        """
        Run a command, and return its output: until its end, or at most ``lines`` lines
        if it runs in the background.
        """
        watch = threading.Timer(PATIENCE, self.kill)
        watch.start()
        try:
            self._input.write(f"{command}\n")
            if not command.endswith("&"):
                self._input.write(f"echo {self.END}\n")
            self._input.flush()
            printed = ""
            while lines or not command.endswith("&"):
                line = self._output.readline()
                assert line, f"{command!r} has printed {printed!r}, and did not end"
                if line == f"{self.END}\n":
                    break
                printed += line
                lines -= 1
            return printed
        finally:
            watch.cancel()

    def kill(self) -> None:
        """Kill the shell and the processes that it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        self._process.wait()
        self._input.close()
        self._output.close()


def page() -> str:
    """The page with free ports in place of its own."""
    text = PAGE.read_text()
    local = ("127.0.0.1", 0)
    with socket.create_server(local) as one, socket.create_server(local) as other:
        for port, free in (("8000", one), ("8443", other)):
            assert port in text
            text = text.replace(port, str(free.getsockname()[1]))
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    empty = tmp_path / "empty"
    empty.mkdir()
    return empty


@pytest.fixture
def shell(folder: Path, tmp_path: Path) -> Iterator[Shell]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "twisted-rtsig").symlink_to(ROOT)
    programs = tmp_path / "bin"
    programs.mkdir()
    # The interpreter that the page calls.  Its virtual environment finds the packages
    # that are installed here.
    python = programs / "python3"
    here = site.getsitepackages()[0]
    python.write_text(
        f'#!/bin/sh\n{shlex.quote(sys.executable)} "$@" &&\n'
        "for each in .venv/lib/python3*/site-packages; do\n"
        f'    echo {shlex.quote(here)} >"$each/installed.pth"\n'
        "done\n"
    )
    python.chmod(0o755)
    environment = {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        # This means "no isolation": pip inverts the value of this variable.
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_CACHE_DIR": "1",
    }
    shell = Shell(folder, environment)
    yield shell
    shell.close()


def same(printed: str, expected: str) -> bool:
    """Whether they are the same.  ``...`` stands for any text, on several lines too."""
    parts = (re.escape(part) for part in expected.split("..."))
    return re.fullmatch(".*?".join(parts), printed, re.DOTALL) is not None


def test_the_page_word_for_word(folder: Path, shell: Shell) -> None:
    sessions = 0
    for part in PARTS.finditer(page()):
        if part["file"]:
            (folder / part["file"]).write_text(part["code"])
            continue
        sessions += 1
        for each in part["session"].removeprefix("$ ").split("\n$ "):
            command, _, expected = each.partition("\n")
            while command.endswith("\\"):
                further, _, expected = expected.partition("\n")
                command = f"{command}\n{further}"
            if expected and expected[-1] != "\n":
                expected += "\n"
            printed = shell.run(command, expected.count("\n"))
            assert same(printed, expected), f"{command}\n{printed}"
    assert sessions


# The server of the page under load


CLIENTS = 20


@pytest.fixture
def server(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The server of the page, with TLS.  It prints its port."""
    for part in PARTS.finditer(PAGE.read_text()):
        if part["file"] == "server.py":
            (folder / "server.py").write_text(part["code"])
    make_certificate(folder)
    process = subprocess.Popen(
        [
            *(sys.executable, str(folder / "server.py")),
            "ssl:0:interface=127.0.0.1:privateKey=key.pem:certKey=certificate.pem",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watch = threading.Timer(PATIENCE, process.kill)
    watch.start()
    yield process
    watch.cancel()
    process.kill()
    process.communicate()


def port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    return int(server.stdout.readline().removeprefix("listening on port "))


def connect(port: int) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    return context.wrap_socket(connection)


class LoadingClient(threading.Thread):
    """
    Sends one line after the other, each after the answer to the one before, until the
    server ends the connection.  Then it goes on with another connection, until the
    server has ended.

    :ivar answered: how many lines were answered.
    :ivar lost: the times at which lines were sent that were not answered.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.answered = 0
        self.lost: list[float] = []
        self._port = port

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with connect(self._port) as connection:
                    self._talk(connection)

    def _talk(self, connection: ssl.SSLSocket) -> None:
        answers = connection.makefile("rb")
        for number in range(10):
            line = b"line %d\n" % number
            connection.sendall(line)
            sent = time.monotonic()
            try:
                answer = answers.readline()
            except OSError:
                answer = b""
            if answer != line.upper():
                assert answer == b""
                self.lost.append(sent)
                return
            self.answered += 1


def test_sigterm_under_load_loses_no_request(server: subprocess.Popen[str]) -> None:
    """Lines that were sent before the signal are answered, even if unread by then."""
    port = port_of(server)
    clients = [LoadingClient(port) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    # Wait until each client has connected again.
    while min(each.answered for each in clients) < 25:
        assert server.poll() is None
        time.sleep(0.01)
    signalled = time.monotonic()
    server.send_signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    for each in clients:
        each.join()
    assert [at for each in clients for at in each.lost if at < signalled] == []


def test_a_second_signal_ends_the_server_at_once(server: subprocess.Popen[str]) -> None:
    """A client does not read its answers, and the time of grace is not over."""
    with connect(port_of(server)) as connection:
        connection.settimeout(0.5)
        # Send until the server waits for this client to read.
        with contextlib.suppress(TimeoutError):
            while True:
                connection.sendall(b"a line\n" * 10_000)
        server.send_signal(signal.SIGTERM)
        # Wait until it no longer listens.
        with contextlib.suppress(OSError):
            while True:
                connect(connection.getpeername()[1]).close()
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM
        # The time of grace is 10 s.
        assert time.monotonic() - began < 8
