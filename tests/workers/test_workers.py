"""Applications in workers: their sockets, their number, their log."""

from __future__ import annotations

import collections
import os
import re
import signal
import socket
import ssl
import sys
import urllib.request
from pathlib import Path

import pytest
from twisted.python import usage
from twisted.python.versions import Version

from tests.support import make_certificate
from tests.workers.support import (
    DEADLINE,
    IDENTIFY,
    ON_PORT_0,
    Twistd,
    ask,
    is_running,
    needs_fork,
    wait_until,
    write_tac,
)
from twisted import version  # type: ignore[attr-defined]
from twisted_rtsig.workers.options import Options

pytestmark = [needs_fork, pytest.mark.processes]

# The exit status of twistd for wrong options.
WRONG_OPTIONS = 0 if version < Version("Twisted", 24, 3, 0) else 1


@pytest.mark.slow
def test_web(tmp_path: Path) -> None:
    """A command of twistd runs unchanged, and all workers answer."""
    (tmp_path / "index.html").write_text("hello")
    with Twistd(
        tmp_path,
        *("--count", "2", "web", "--path", "."),
        *("--listen", "tcp:0:interface=127.0.0.1"),
    ) as twistd:
        twistd.wait_until_ready(2)
        port = twistd.port()
        # All workers have the same port.
        assert set(twistd.wait_for(r"Site starting on (\d+)$", 2)) == {str(port)}
        seen = r"\[worker (\d): .*\"GET / HTTP/1.1\" 200"
        while len(set(re.findall(seen, twistd.output))) < 2:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
                assert response.read() == b"hello"
        twistd.send(signal.SIGTERM)
        assert twistd.wait() == -signal.SIGTERM
        assert not twistd.pidfile.exists()


@pytest.mark.parametrize(
    "reactor",
    [
        "rtsig-epoll",
        pytest.param("rtsig", marks=pytest.mark.slow),
        pytest.param("rtsig-asyncio", marks=pytest.mark.slow),
    ],
)
def test_kinds_of_listening(tmp_path: Path, reactor: str) -> None:
    """
    An application listens in every way: on port 0 twice, IPv6, TLS, a UNIX path, an
    abstract UNIX name, by a coroutine server.
    """
    certificate, key = make_certificate(tmp_path)
    write_tac(
        tmp_path,
        f"""
        {IDENTIFY.replace(chr(10), chr(10) + " " * 8)}
        from twisted_rtsig.coro.services import CoroutineService
        from twisted.application.internet import TCPServer, UNIXServer

        listen("tcp:0:interface=127.0.0.1")
        listen("tcp:0:interface=127.0.0.1")
        listen("tcp6:0:interface=\\\\:\\\\:1")
        listen("ssl:0:interface=127.0.0.1:privateKey={key.name}"
               ":certKey={certificate.name}")
        listen("unix:path.sock:mode=600")
        TCPServer(0, factory, interface="127.0.0.1").setServiceParent(application)
        UNIXServer("locked.sock", factory, wantPID=True).setServiceParent(application)
        UNIXServer("\\0" + os.getcwd(), factory).setServiceParent(application)

        async def handle(stream):
            await stream.write(b"%d %d 7\\n" % (current().number, os.getpid()))

        CoroutineService("tcp:0:interface=127.0.0.1", handle).setServiceParent(
            application)
        """,
    )
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac", reactor=reactor) as twistd:
        twistd.wait_until_ready(2)
        by_worker = [
            re.findall(rf"\[worker {number}: .*starting on (\d+)$", twistd.output, re.M)
            for number in (0, 1)
        ]
        assert by_worker[0] == by_worker[1]
        ports = [int(each) for each in by_worker[0]]
        assert len(set(ports)) == len(ports) == 6
        one, two, six, tls, four, coroutines = ports
        for port in (one, two, four):
            assert ask(("127.0.0.1", port))[2] == 1
        assert ask(("::1", six), socket.AF_INET6)[2] == 1
        assert ask(("127.0.0.1", coroutines))[2] == 7
        context = ssl.create_default_context(cafile=str(certificate))
        with (
            socket.create_connection(("127.0.0.1", tls), DEADLINE) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
        ):
            assert client.recv(100).split()[2] == b"1"
        names = [str(tmp_path / "path.sock"), str(tmp_path / "locked.sock")]
        if sys.platform.startswith("linux"):
            names.append(f"\0{tmp_path}")
        for name in names:
            assert ask(name, socket.AF_UNIX)[2] == 1
        assert (tmp_path / "path.sock").stat().st_mode & 0o777 == 0o600
        assert os.readlink(tmp_path / "locked.sock.lock") == str(twistd.process.pid)
        twistd.send(signal.SIGTERM)
        twistd.wait()
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"app.tac", certificate.name, key.name}


@pytest.mark.slow
def test_spread(tmp_path: Path) -> None:
    """
    Connections are spread over the workers, even after one was removed; evenly, if the
    system allows that.
    """
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "4", "-y", "app.tac") as twistd:
        twistd.wait_until_ready(4)
        port = twistd.port()
        four = collections.Counter(ask(("127.0.0.1", port))[0] for _ in range(400))
        twistd.send(signal.SIGTTOU)
        twistd.wait_for("Worker 3 has stopped")
        three = collections.Counter(ask(("127.0.0.1", port))[0] for _ in range(300))
    for counts, number in ((four, 4), (three, 3)):
        assert set(counts) == set(range(number))
        if can_take_turns():
            assert max(counts.values()) <= 1.2 * min(counts.values()), counts
        else:
            # By the kernel's hash.  The bound is five standard deviations away.
            assert min(counts.values()) > 40, counts


def can_take_turns() -> bool:
    """Whether this process may load a program into the kernel."""
    from twisted_rtsig.workers.spreading import RoundRobin

    with socket.socket() as listening:
        if not hasattr(socket, "SO_REUSEPORT"):
            return False
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        try:
            RoundRobin(listening).close()
        except OSError:
            return False
    return True


@pytest.mark.slow
def test_shared_socket(tmp_path: Path) -> None:
    """With --shared-socket, any worker that is not busy accepts."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "--shared-socket", "-y", "app.tac") as twistd:
        first, second = twistd.wait_until_ready(2)
        port = twistd.port()
        for stopped, other in ((first, second), (second, first)):
            os.kill(stopped, signal.SIGSTOP)
            assert {ask(("127.0.0.1", port))[1] for _ in range(5)} == {other}
            os.kill(stopped, signal.SIGCONT)


@pytest.mark.slow
def test_port_in_use(tmp_path: Path) -> None:
    """The supervisor logs the reason and ends, as twistd does, and leaves no file."""
    with socket.socket() as taken:
        if hasattr(socket, "SO_REUSEPORT"):
            # As another ``twistd workers`` would.
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = ("--listen", f"tcp:{port}:interface=127.0.0.1")
        with Twistd(tmp_path, "-c", "2", "web", *listen) as twistd:
            assert twistd.wait() == 1
            assert f"Couldn't listen on 127.0.0.1:{port}: [Errno" in twistd.output
            assert "the first worker has ended with status 1" in twistd.output
            assert not twistd.pidfile.exists()


@pytest.mark.slow
def test_address_twice(tmp_path: Path) -> None:
    """An application cannot listen twice on one address, as without workers."""
    write_tac(
        tmp_path,
        IDENTIFY
        + """
import socket
from twisted.internet import reactor
from twisted.internet.error import CannotListenError

port = reactor.listenTCP(0, factory, interface="127.0.0.1")
number = port.getHost().port
try:
    reactor.listenTCP(number, factory, interface="127.0.0.1")
except CannotListenError as error:
    print("REFUSED", error)
port.stopListening().addCallback(
    lambda ignored: print("AGAIN", reactor.listenTCP(
        number, factory, interface="127.0.0.1").getHost().port == number))
""",
    )
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        assert "Address already in use" in twistd.wait_for("REFUSED (.*)")[0]
        assert twistd.wait_for("AGAIN (.*)") == ["True"]


@pytest.mark.slow
def test_stop_listening(tmp_path: Path) -> None:
    """
    If the application in one worker closes its port, the other workers get its
    connections.  When all have closed it, connections are refused.
    """
    write_tac(
        tmp_path,
        IDENTIFY
        + """
import signal
from twisted.internet import reactor

def close(number, frame):
    print("CLOSING", current().number)
    reactor.callFromThread(port.stopListening)

signal.signal(signal.SIGUSR2, close)
port = reactor.listenTCP(0, factory, interface="127.0.0.1")
""",
    )
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        twistd.wait_until_ready(2)
        port = twistd.port()
        first = next(
            number
            for number in twistd.wait_until_ready(1, number=0)
            if is_running(number)
        )
        os.kill(first, signal.SIGUSR2)
        twistd.wait_for("Port .* Closed")
        assert {ask(("127.0.0.1", port))[0] for _ in range(20)} == {1}
        (second,) = twistd.wait_until_ready(1, number=1)
        os.kill(second, signal.SIGUSR2)
        twistd.wait_for("Port .* Closed", 2)

        def refused() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) != 0

        wait_until(refused)


@pytest.mark.parametrize("reactor", [None, "epoll", "select"])
def test_other_reactor(tmp_path: Path, reactor: str | None) -> None:
    """One error at once says which reactors support workers."""
    with Twistd(tmp_path, "-c", "2", "web", reactor=reactor) as twistd:
        assert twistd.wait() == WRONG_OPTIONS
        assert "workers run on the reactors of twisted-rtsig only" in twistd.output
        given = "the default" if reactor is None else f"--reactor={reactor}"
        assert f"not on {given}" in twistd.output
        assert "use twistd --reactor=rtsig-auto workers" in twistd.output
        assert "Traceback" not in twistd.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-c", "0", "web"], "give a number from 1 to 250, or auto"),
        (["-c", "2"], "give the command that the workers are to run"),
        (["-y", "app.tac", "web"], "give the command that the workers are to run"),
        (["-y", "absent.tac"], "there is no file .*absent.tac"),
        (["workers", "web"], "Unknown command: workers"),
        (["nonsense"], "Unknown command: nonsense"),
        (["--grace", "-1", "web"], "give seconds: 0 or more"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: list[str], reason: str) -> None:
    """Wrong options are reported at once, with the usage."""
    with Twistd(tmp_path, *arguments) as twistd:
        assert twistd.wait() == WRONG_OPTIONS
        assert re.search(reason, twistd.output)
        assert "Traceback" not in twistd.output


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says that workers do not run on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(usage.UsageError, match=r"^workers need a POSIX system"):
        Options().parseOptions(["web"])


@pytest.mark.slow
def test_unusual_folder(tmp_path: Path) -> None:
    """The names of the folder and in arguments have a space and non-ASCII letters."""
    folder = tmp_path / "caf\xe9 \u2603"
    folder.mkdir()
    (folder / "index.html").write_text("hello")
    with Twistd(
        folder,
        *("-c", "1", "web", "--path", str(folder)),
        *("--listen", f"unix:{folder}/\u2603.sock"),
    ) as twistd:
        twistd.wait_until_ready(1)
        assert (folder / "\u2603.sock").is_socket()


def test_folder_of_the_application(tmp_path: Path) -> None:
    """An application may change its folder, and listen on a relative path there."""
    code = IDENTIFY + 'os.mkdir("elsewhere")\nos.chdir("elsewhere")\n'
    write_tac(tmp_path, code + 'listen("unix:path.sock")\n')
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        twistd.wait_until_ready(1)
        assert ask(str(tmp_path / "elsewhere/path.sock"), socket.AF_UNIX)[2] == 1
        twistd.send(signal.SIGTERM)
        twistd.wait()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_too_many_open_files(tmp_path: Path) -> None:
    """A port cannot listen without a free descriptor, as without workers."""
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
import resource
from twisted.internet import reactor
from twisted.internet.error import CannotListenError

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, hard))
kept = []
while True:
    try:
        kept.append(os.dup(0))
    except OSError:
        break
try:
    reactor.listenTCP(0, factory, interface="127.0.0.1")
except CannotListenError as error:
    print("REFUSED", error)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
""",
    )
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        assert "Too many open files" in twistd.wait_for("REFUSED (.*)")[0]
        twistd.wait_until_ready(1)


def test_names_of_modules(tmp_path: Path) -> None:
    """A module beside the application does not hide a module of Python."""
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')")
    write_tac(tmp_path, ON_PORT_0)
    # As in the script twistd, whose sys.path begins with the folder of the script.
    prelude = "import sys; sys.path[:] = filter(None, sys.path)"
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac", prelude=prelude) as twistd:
        twistd.wait_until_ready(1)


def test_help_of_a_command(tmp_path: Path) -> None:
    """``workers web --help`` prints the help of ``web``."""
    with Twistd(tmp_path, "web", "--help") as twistd:
        assert twistd.wait() == 0
        assert "--wsgi" in twistd.output
