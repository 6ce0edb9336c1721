"""Settings of twistd and systemd: logs, users, sockets, notifications."""

from __future__ import annotations

import collections
import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import twisted
import twisted_rtsig
from tests.workers.support import (
    DEADLINE,
    IDENTIFY,
    ON_PORT_0,
    RUN_TWISTD,
    Twistd,
    ask,
    needs_fork,
    wait_until,
    write_tac,
)
from twisted_rtsig.workers.notify import SystemdNotifier
from twisted_rtsig.workers.status import Status, read_status

pytestmark = [needs_fork, pytest.mark.slow, pytest.mark.processes]

LINES = 9000

TALKS = (
    ON_PORT_0
    + f"""
from twisted.internet import reactor
from twisted.logger import Logger
from twisted.internet.task import cooperate

def talk():
    for number in range({LINES}):
        Logger().info("{{text}}", text="line %d of %d" % (number, current().number))
        if number % 50 == 0:
            yield

cooperate(talk()).whenDone().addCallback(lambda ignored: print("DONE"))
"""
)


@contextlib.contextmanager
def daemon(
    folder: Path, *arguments: str, launcher: tuple[str, ...] = ()
) -> Iterator[int]:
    """
    Run a daemon; yield its process, and stop it at the end.

    :param launcher: a command that starts the daemon.
    """
    command = (*launcher, sys.executable, "-c", RUN_TWISTD, "--reactor=rtsig-auto")
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done
    pidfile = folder / "twistd.pid"
    process = int(pidfile.read_text())
    try:
        yield process
        os.kill(process, signal.SIGTERM)
        wait_until(lambda: not pidfile.exists())
    finally:
        # Kill its workers as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(process), signal.SIGKILL)


def test_log_file(tmp_path: Path) -> None:
    """
    The log file of a daemon has the lines of all workers, whole, even when it is
    rotated.  SIGUSR1 starts a new file.
    """
    write_tac(tmp_path, TALKS)

    def logged() -> str:
        # The oldest file first.
        files = sorted(tmp_path.glob("log.*"), key=lambda each: -int(each.suffix[1:]))
        return "".join(each.read_text() for each in [*files, tmp_path / "log"])

    arguments = ("-l", "log", "workers", "-c", "2", "-y", "app.tac")
    with daemon(tmp_path, *arguments) as process:
        wait_until(lambda: logged().count("DONE") == 2)
        before = len(list(tmp_path.glob("log.*")))
        assert before >= 1
        os.kill(process, signal.SIGUSR1)
        wait_until(lambda: len(list(tmp_path.glob("log.*"))) == before + 1)
        os.kill(process, signal.SIGHUP)
        wait_until(lambda: "The reload is complete" in (tmp_path / "log").read_text())
    text = logged()
    lines: dict[str, list[int]] = collections.defaultdict(list)
    for number, line, of in re.findall(
        r"^\S+ \[worker (\d): \S+#info\] line (\d+) of (\d)$", text, re.M
    ):
        assert number == of
        lines[number].append(int(line))
    # All lines of each worker, then those of its successor, which may stop early.
    for each in lines.values():
        assert each[:LINES] == list(range(LINES))
    assert set(lines) == {"0", "1"}
    assert text.count("Worker 1 is ready") == 2


IN_TERMINAL = (
    sys.executable,
    "-c",
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
)
"""A command that runs another command in a terminal of its own."""


def test_daemon_started_in_a_terminal(tmp_path: Path) -> None:
    """SIGHUP reloads a daemon, although its terminal is gone."""
    write_tac(tmp_path, ON_PORT_0)
    arguments = ("-l", "log", "workers", "-c", "1", "-y", "app.tac")
    with daemon(tmp_path, *arguments, launcher=IN_TERMINAL) as process:
        os.kill(process, signal.SIGHUP)
        log = tmp_path / "log"
        wait_until(
            lambda: re.search(
                "reload is complete|Stopping all workers", log.read_text()
            )
        )
        assert "Stopping all workers" not in log.read_text()


def test_nohup(tmp_path: Path) -> None:
    """nohup(1) keeps workers running when their terminal is gone."""
    with without_terminal(tmp_path, IGNORE_SIGHUP) as twistd:
        twistd.wait_for("The reload is complete")
        assert "The terminal is gone" not in twistd.output


def test_terminal_is_gone(tmp_path: Path) -> None:
    """Workers that run in the foreground of a terminal stop when it is gone."""
    with without_terminal(tmp_path) as twistd:
        assert twistd.wait() == 0
        assert "The terminal is gone" in twistd.output


@contextlib.contextmanager
def without_terminal(folder: Path, prelude: str = "") -> Iterator[Twistd]:
    """
    Start workers in the foreground of a terminal, and close the terminal.

    :param prelude: code that the process runs first.
    """
    write_tac(folder, ON_PORT_0)
    terminal, of_twistd = os.openpty()
    with (
        contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as file,
        Twistd(
            folder,
            *("-c", "1", "-y", "app.tac"),
            prelude=TAKE_TERMINAL + prelude,
            env={"TERMINAL": os.ttyname(of_twistd)},
        ) as twistd,
    ):
        twistd.wait_until_ready(1)
        os.close(of_twistd)
        file.close()
        yield twistd


# The first terminal that a session leader opens becomes its controlling terminal.  The
# tests may run under nohup(1), so restore the default of SIGHUP.
TAKE_TERMINAL = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.open(os.environ["TERMINAL"], os.O_RDWR)
"""

IGNORE_SIGHUP = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"


def test_traceback_is_whole(tmp_path: Path) -> None:
    """
    The lines of an entry stay together, a print is a line, and the output of a child
    that outlives its worker is logged.
    """
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
import subprocess
from twisted.internet import reactor
from twisted.python import log

def fail():
    print("sm\\u00f8rrebr\\u00f8d")
    os.write(2, b"from below\\n")
    # It runs until its standard input ends.
    child = ["sh", "-c", "read line; echo from a child"]
    subprocess.Popen(child, stdin=subprocess.PIPE)
    log.err(ValueError("x" * 10000))

reactor.callWhenRunning(fail)
""",
    )
    environment = {"PYTHONIOENCODING": "ascii"}
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac", env=environment) as twistd:
        workers = twistd.wait_until_ready(2)
        twistd.wait_for(r"\[worker \d: stdout#info\] sm\\xf8rrebr\\xf8d$", 2)
        twistd.wait_for("^from below$", 2)
        twistd.wait_for(r"^\tFailure: builtins.ValueError: x{10000}$", 2)
        os.kill(workers[0], signal.SIGKILL)
        twistd.wait_for("has ended by SIGKILL")
        twistd.wait_for("^from a child$")


def test_other_logger(tmp_path: Path) -> None:
    """All processes use --logger, and the supervisor logs what workers print."""
    (tmp_path / "its_logger.py").write_text(
        textwrap.dedent(
            """
            import os

            def factory():
                file = open(f"{os.getpid()}.its-log", "w", buffering=1)
                return lambda event: file.write(event.get("log_format", "") + "\\n")
            """
        )
    )
    write_tac(tmp_path, ON_PORT_0 + "os.write(1, b'printed\\n')\n")
    with Twistd(
        tmp_path,
        *("-c", "1", "-y", "app.tac"),
        options=("--logger", "its_logger.factory"),
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    ) as twistd:
        supervisor = tmp_path / f"{twistd.process.pid}.its-log"
        wait_until(supervisor.exists)
        wait_until(lambda: "is ready" in supervisor.read_text())
        wait_until(lambda: "has printed: {line}" in supervisor.read_text())
        (worker,) = {*tmp_path.glob("*.its-log")} - {supervisor}
        assert "Starting factory" in worker.read_text()


def test_notifications(tmp_path: Path) -> None:
    """systemd is notified of the start, reloads, the stop, and that it is alive."""
    write_tac(tmp_path, ON_PORT_0 + 'print("NOTIFY", "NOTIFY_SOCKET" in os.environ)\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(DEADLINE)
        systemd.bind(str(tmp_path / "notify"))
        environment = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "200000",
        }

        def receive() -> dict[str, str]:
            """The next message that is no sign of life."""
            while (data := systemd.recv(1000).decode()) == "WATCHDOG=1":
                pass
            return dict(line.split("=", 1) for line in data.split("\n"))

        with Twistd(tmp_path, "-c", "1", "-y", "app.tac", env=environment) as twistd:
            own = {"READY": "1", "MAINPID": str(twistd.process.pid)}
            assert receive() == own
            for _ in range(3):
                assert systemd.recv(1000) == b"WATCHDOG=1"
            twistd.send(signal.SIGHUP)
            reloading = receive()
            assert reloading["RELOADING"] == "1"
            assert int(reloading["MONOTONIC_USEC"]) > 0
            assert receive() == own
            # The service is ready after a reload that fails, too.
            write_tac(tmp_path, "raise RuntimeError")
            twistd.send(signal.SIGHUP)
            assert receive()["RELOADING"] == "1"
            assert receive() == own
            twistd.send(signal.SIGTERM)
            assert receive() == {"STOPPING": "1"}
            twistd.wait()
            assert set(twistd.wait_for("NOTIFY (.*)", 2)) == {"False"}


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "self"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "nonsense"}, None),
        ({}, None),
    ],
)
def test_watchdog(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: float | None
) -> None:
    """The variables count only if they are for this process."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens-here")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(os.getpid()) if value == "self" else value)
    notifier = SystemdNotifier()
    assert notifier.watchdog == seconds
    # Nothing receives this, which is no error.
    notifier.alive()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


PASS_SOCKETS = """
import os, sys
given = [int(each) for each in os.environ.pop("GIVEN").split()]
# So that no descriptor is overwritten below.
given = [os.dup(each) for each in given]
for number, each in enumerate(given, 3):
    os.dup2(each, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(given))
os.environ["LISTEN_FDNAMES"] = "web:path"
"""


@pytest.mark.parametrize("before", ["", "import twisted.internet.endpoints"])
def test_sockets_of_systemd(tmp_path: Path, before: str) -> None:
    """
    Workers use the passed sockets for their addresses, and ``systemd:`` endpoints work
    in workers.
    """
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as path,
    ):
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        path.bind(str(tmp_path / "path.sock"))
        for each in (tcp, path):
            each.listen()
        write_tac(
            tmp_path,
            IDENTIFY
            + f"""
listen("tcp:{port}:interface=127.0.0.1")
listen("unix:{tmp_path}/path.sock")
listen("systemd:domain=UNIX:name=path")
""",
        )
        with Twistd(
            tmp_path,
            *("-c", "2", "-y", "app.tac"),
            prelude=PASS_SOCKETS + before,
            env={"GIVEN": f"{tcp.fileno()} {path.fileno()}"},
            pass_fds=(tcp.fileno(), path.fileno()),
        ) as twistd:
            twistd.wait_until_ready(2)
            assert ask(("127.0.0.1", port))[2] == 1
            assert ask(str(tmp_path / "path.sock"), socket.AF_UNIX)[2] == 1
            twistd.send(signal.SIGTERM)
            twistd.wait()
        # The sockets belong to systemd, and still listen.
        assert (tmp_path / "path.sock").exists()
        with socket.create_connection(("127.0.0.1", port), DEADLINE):
            pass


def public_python() -> str | None:
    """Return an interpreter that other users can run with :data:`PACKAGES`, or None."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for each in (sys.executable, shutil.which(name, path=os.defpath)):
        if each is None:
            continue
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [each, "-c", "import twisted_rtsig.rtsigreactor, attr"],
                user="nobody",
                group=pwd.getpwnam("nobody").pw_gid,
                extra_groups=[],
                env={**os.environ, "PYTHONPATH": PACKAGES},
                capture_output=True,
                timeout=DEADLINE,
            )
            if done.returncode == 0:
                return each
    return None


PACKAGES = os.pathsep.join(
    {
        str(Path(module.__file__ or "").parent.parent)
        for module in (twisted, twisted_rtsig)
    }
)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root has privileges"
)
def test_privileged_port(public_folder: Path) -> None:
    """
    With --uid the supervisor binds a port below 1024, and then drops its privileges;
    workers have none.
    """
    python = public_python()
    if python is None:
        pytest.skip("no other user can run this Python")
    nobody = pwd.getpwnam("nobody").pw_uid
    port = privileged_port()
    write_tac(
        public_folder,
        IDENTIFY
        + f"""
listen("tcp:{port}:interface=127.0.0.1")
listen("unix:path.sock")
print("USER", os.getuid(), os.geteuid())
""",
    )
    with Twistd(
        public_folder,
        *("-c", "2", "-y", "app.tac"),
        options=("--uid", "nobody"),
        env={"PYTHONPATH": PACKAGES},
        python=python,
    ) as twistd:
        workers = twistd.wait_until_ready(2)
        status = Path(f"/proc/{twistd.process.pid}/status").read_text()
        assert re.findall(r"^Uid:\t(\d+)\t(\d+)\t(\d+)", status, re.M) == [
            (str(nobody),) * 3
        ]
        assert {ask(("127.0.0.1", port))[2] for _ in range(10)} == {1}
        os.kill(workers[0], signal.SIGKILL)
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        twistd.send(signal.SIGTTIN)
        # The socket of the third worker was bound at the start.
        twistd.wait_until_ready(1, number=2)
        seen: set[int] = set()
        while seen != {0, 1, 2}:
            seen.add(ask(("127.0.0.1", port))[0])
        assert set(twistd.wait_for("USER (.*)")) == {f"{nobody} {nobody}"}
        # In a folder of root, the supervisor has no right to remove its files, but ends
        # normally.
        socket_file = public_folder / "twistd.pid.status"
        assert socket_file.stat().st_uid == nobody
        assert read_status(str(twistd.pidfile))["count"] == 3
        twistd.send(signal.SIGTERM)
        assert twistd.wait() == -signal.SIGTERM
        assert re.search("Cannot remove .*path.sock: ", twistd.output)


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root has privileges"
)
def test_links_of_another_user(public_folder: Path) -> None:
    """
    With --uid, root opens the status socket as the owner of the folder.  A link that
    this user creates meanwhile does not direct root to another file.
    """
    nobody = pwd.getpwnam("nobody")
    target = public_folder / "of root"
    target.touch()
    os.chmod(target, 0o644)
    folder = public_folder / "of the user"
    folder.mkdir()
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    pidfile = str(folder / "twistd.pid")

    class Reactor:
        """Simulates that the user replaces the socket by a link at once."""

        def seconds(self) -> float:
            return 0.0

        def listenUNIX(self, path: str, factory: object, mode: int) -> None:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path)
            users.append((os.geteuid(), os.getegid(), os.stat(path).st_uid))
            os.unlink(path)
            os.symlink(target, path)
            os.chmod(path, mode)

    users: list[tuple[int, int, int]] = []
    supervisor: Any = SimpleNamespace(reactor=Reactor(), handlers={})
    Status(supervisor).listen(pidfile, nobody.pw_uid, nobody.pw_gid)
    assert users[0] == (nobody.pw_uid, nobody.pw_gid, nobody.pw_uid)
    assert os.geteuid() == 0
    assert target.stat().st_uid == 0


def privileged_port() -> int:
    """Return a free port below 1024."""
    for port in range(1023, 600, -1):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are in use")
