"""How workers are started, replaced and stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.support import (
    DEADLINE,
    IDENTIFY,
    ON_PORT_0,
    Twistd,
    ask,
    is_running,
    needs_fork,
    read_answer,
    wait_until,
    write_tac,
)
from twisted_rtsig.workers.supervisor import pause_before_restart

pytestmark = [needs_fork, pytest.mark.processes]


@pytest.mark.slow
def test_add_and_remove_workers(tmp_path: Path) -> None:
    """SIGTTIN adds a worker, and SIGTTOU stops one, but never the last."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        twistd.wait_until_ready(1)
        port = twistd.port()
        twistd.send(signal.SIGTTOU)
        twistd.wait_for("The only worker is not stopped")
        twistd.send(signal.SIGTTIN)
        (added,) = twistd.wait_until_ready(1, number=1)
        seen: set[int] = set()
        while seen != {0, 1}:
            seen.add(ask(("127.0.0.1", port))[0])
        twistd.send(signal.SIGTTOU)
        twistd.wait_for(rf"Worker 1 has stopped \(process {added}\)")
        assert {ask(("127.0.0.1", port))[0] for _ in range(20)} == {0}


@pytest.mark.slow
def test_waiting_connections_are_inherited(tmp_path: Path) -> None:
    """
    If a worker is killed or removed, another worker accepts the connections in its
    backlog; none is lost.
    """
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        workers = twistd.wait_until_ready(2)
        port = twistd.port()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        with connections(port, 20) as clients:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            answers = [read_answer(each) for each in clients]
            assert len(answers) == 20
        twistd.wait_for("Worker . has ended by SIGKILL", 2)
        workers = twistd.wait_until_ready(4)[2:]
        # Remove the second worker while connections wait in its backlog.
        (second,) = twistd.wait_until_ready(2, number=1)[1:]
        os.kill(second, signal.SIGSTOP)
        with connections(port, 20) as clients:
            twistd.send(signal.SIGTTOU)
            assert {read_answer(each)[0] for each in clients} == {0}
        os.kill(second, signal.SIGKILL)


@contextlib.contextmanager
def connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE))
            for _ in range(count)
        ]


def test_reload(tmp_path: Path) -> None:
    """After SIGHUP new workers run the new code, and there is always a worker."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        former = twistd.wait_until_ready(2)
        port = twistd.port()
        new = ON_PORT_0.replace("VERSION = 1", "VERSION = 2")
        write_tac(tmp_path, new)
        twistd.send(signal.SIGHUP)
        versions: set[int] = set()
        while versions != {2} or "The reload is complete" not in twistd.output:
            # Connections are answered, and not reset, all the time.
            versions = {ask(("127.0.0.1", port))[2] for _ in range(4)}
        twistd.wait_for("Worker . has stopped", 2)
        assert not any(map(is_running, former))
        # The new workers have the same port and the same numbers.
        assert {ask(("127.0.0.1", port))[0] for _ in range(20)} <= {0, 1}
        assert set(twistd.wait_for(r"starting on (\d+)$", 4)) == {str(port)}


@pytest.mark.slow
@pytest.mark.parametrize("shared", [(), ("--shared-socket",)])
def test_shared_sockets_outlive_a_worker(
    tmp_path: Path, shared: tuple[str, ...]
) -> None:
    """A worker that stops does not shut down a socket that others accept from."""
    write_tac(tmp_path, ON_PORT_0 + 'listen("unix:path.sock")\n')
    with Twistd(tmp_path, "-c", "2", *shared, "-y", "app.tac") as twistd:
        workers = twistd.wait_until_ready(2)
        port = twistd.port()
        twistd.send(signal.SIGTTOU)
        twistd.wait_for("Worker 1 has stopped")
        assert ask(("127.0.0.1", port))[1] in workers
        assert ask(str(tmp_path / "path.sock"), socket.AF_UNIX)[1] in workers


def test_reload_of_broken_code(tmp_path: Path) -> None:
    """The workers keep running, and the log says why the reload failed."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        workers = set(twistd.wait_until_ready(2))
        port = twistd.port()
        write_tac(tmp_path, ON_PORT_0 + "\nraise RuntimeError('broken version')\n")
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload has failed: the new worker has ended with status 1")
        assert "broken version" in twistd.output
        while (seen := {ask(("127.0.0.1", port))[1] for _ in range(10)}) != workers:
            assert seen < workers
        # A later reload with working code succeeds.
        write_tac(tmp_path, ON_PORT_0)
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        twistd.wait_for("Worker . has stopped", 2)


@pytest.mark.slow
def test_reload_that_hangs(tmp_path: Path) -> None:
    """A new worker that does not become ready is killed after the limit."""
    write_tac(tmp_path, ON_PORT_0)
    arguments = ("-c", "1", "--start-timeout", "5", "-y", "app.tac")
    with Twistd(tmp_path, *arguments) as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        write_tac(tmp_path, "import signal; signal.pause()")
        twistd.send(signal.SIGHUP)
        twistd.wait_for("Worker 0 is not ready after 5 s: it is killed")
        twistd.wait_for("The reload has failed: the new worker has ended by SIGKILL")
        assert ask(("127.0.0.1", port))[1] == worker


@pytest.mark.slow
def test_reload_closes_unused_addresses(tmp_path: Path) -> None:
    """An address that the new version does not use refuses connections."""
    write_tac(tmp_path, ON_PORT_0 + 'listen("unix:old.sock")\n')
    prelude = "from twisted_rtsig.workers import supervisor; supervisor._UNUSED = 0.1"
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac", prelude=prelude) as twistd:
        twistd.wait_until_ready(1)
        port = twistd.port()
        assert (tmp_path / "old.sock").exists()
        write_tac(tmp_path, IDENTIFY + 'listen("unix:new.sock")\n')
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        twistd.wait_for("Worker 0 has stopped")
        wait_until(lambda: not (tmp_path / "old.sock").exists())
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
        assert ask(str(tmp_path / "new.sock"), socket.AF_UNIX)[2] == 1


@pytest.mark.slow
def test_reload_of_an_application_that_listens_late(tmp_path: Path) -> None:
    """Connections wait until the new worker listens."""
    write_tac(
        tmp_path,
        IDENTIFY
        + """
from twisted.internet import reactor

def listen():
    reactor.listenTCP(0, factory, interface="127.0.0.1")

reactor.callWhenRunning(reactor.callLater, 1, listen)
""",
    )
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        twistd.wait_for(rf"Worker 0 has stopped \(process {worker}\)")
        assert ask(("127.0.0.1", port))[1] == twistd.wait_until_ready(2)[1]


def test_reload_during_a_reload(tmp_path: Path) -> None:
    """All workers have the code of the last reload at the end."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        twistd.wait_until_ready(2)
        port = twistd.port()
        for version in (2, 3):
            write_tac(
                tmp_path, ON_PORT_0.replace("VERSION = 1", f"VERSION = {version}")
            )
            twistd.send(signal.SIGHUP)
            twistd.wait_for("is starting", version + 1)
        # Remove a worker meanwhile.
        twistd.send(signal.SIGTTOU)
        twistd.wait_for("The reload is complete")
        twistd.wait_for("The wanted number of workers is now 1")
        assert {ask(("127.0.0.1", port))[2] for _ in range(10)} == {3}


@pytest.mark.slow
def test_worker_dies_while_it_is_replaced(tmp_path: Path) -> None:
    """Its replacement takes its place when ready."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        twistd.send(signal.SIGHUP)
        replacement = int(twistd.wait_for(r"starting \(process (\d+)\)", 2)[1])
        os.kill(worker, signal.SIGKILL)
        assert ask(("127.0.0.1", port))[1] == replacement
        twistd.wait_for("The reload is complete")
        assert len(twistd.wait_for("Worker 0 is starting")) == 2


@pytest.mark.slow
def test_crash_loop(tmp_path: Path) -> None:
    """A worker that ends again and again is restarted after ever longer pauses."""
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
import signal
from twisted.internet import reactor
if os.path.exists("broken"):
    reactor.callWhenRunning(os.kill, os.getpid(), signal.SIGKILL)
""",
    )
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        (tmp_path / "broken").touch()
        os.kill(worker, signal.SIGKILL)
        pauses = twistd.wait_for(r"the next one is started in ([\d.]+) s", 2)
        assert pauses == ["0.5", "1"]
        (tmp_path / "broken").unlink()
        # Connections that arrived meanwhile have waited.
        assert ask(("127.0.0.1", port))[0] == 0


def test_no_pause_after_a_long_life(tmp_path: Path) -> None:
    """A worker that dies after a long life is not a failure of its slot."""
    write_tac(tmp_path, ON_PORT_0)
    prelude = "from twisted_rtsig.workers import supervisor; supervisor._LIVED = 0"
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac", prelude=prelude) as twistd:
        for number in range(3):
            worker = twistd.wait_until_ready(number + 1)[number]
            os.kill(worker, signal.SIGKILL)
        twistd.wait_until_ready(4)
        assert "times in a row" not in twistd.output


def test_pauses() -> None:
    """There is no pause after the first failure; then pauses double up to a minute."""
    assert [pause_before_restart(failures) for failures in range(6)] == [
        *(0, 0, 0.5, 1, 2, 4),
    ]
    assert pause_before_restart(9) == 60
    assert pause_before_restart(10_000) == 60


@pytest.mark.slow
def test_no_worker_can_start(tmp_path: Path) -> None:
    """The supervisor ends and logs the reason."""
    write_tac(tmp_path, "raise RuntimeError('this cannot work')")
    with Twistd(tmp_path, "-y", "app.tac") as twistd:
        assert twistd.wait() == 1
        assert "this cannot work" in twistd.output
        assert "the first worker has ended with status 1 before it was" in twistd.output
    assert not twistd.pidfile.exists()


@pytest.mark.slow
def test_first_worker_hangs(tmp_path: Path) -> None:
    """The start of the first worker has a limit as well."""
    write_tac(tmp_path, "import signal; signal.pause()")
    with Twistd(tmp_path, "--start-timeout", "2", "-y", "app.tac") as twistd:
        assert twistd.wait() == 1
        assert "the first worker was not ready after 2 s" in twistd.output


COMPUTES = (
    ON_PORT_0
    + """
import threading
from twisted.internet import reactor

def compute():
    print("COMPUTING")
    while True:
        pass

reactor.callWhenRunning(reactor.callLater, 0.1, compute)
"""
)


@pytest.mark.slow
def test_sigterm_twice(tmp_path: Path) -> None:
    """The second SIGTERM kills all workers at once."""
    write_tac(tmp_path, COMPUTES)
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        twistd.wait_for("COMPUTING")
        twistd.send(signal.SIGTERM)
        twistd.wait_for("Stopping all workers")
        twistd.send(signal.SIGTERM)
        assert twistd.wait() == -signal.SIGTERM
        assert "Second signal: killing all workers" in twistd.output
        assert not is_running(worker)


@pytest.mark.slow
def test_worker_is_killed_after_the_grace(tmp_path: Path) -> None:
    """A worker that has not ended after the grace is killed."""
    write_tac(tmp_path, COMPUTES)
    with Twistd(tmp_path, "-c", "1", "--grace", "0", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        twistd.wait_for("COMPUTING")
        twistd.send(signal.SIGINT)
        assert twistd.wait() == -signal.SIGINT
        assert "has not ended within the grace: it is killed" in twistd.output
        assert not is_running(worker)


@pytest.mark.parametrize(
    "code", [ON_PORT_0, pytest.param(COMPUTES, marks=pytest.mark.slow)]
)
def test_supervisor_is_killed(tmp_path: Path, code: str) -> None:
    """No process, socket file or pid file is left, even if a worker is computing."""
    write_tac(
        tmp_path,
        code
        + """
from twisted.application.internet import UNIXServer
listen("unix:path.sock")
listen("unix:taken over.sock")
UNIXServer("locked.sock", factory, wantPID=True).setServiceParent(application)
""",
    )
    with (
        socket.socket(socket.AF_UNIX) as other,
        Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd,
    ):
        workers = twistd.wait_until_ready(2)
        if code is COMPUTES:
            twistd.wait_for("COMPUTING", 2)
        assert all(map(is_running, workers))
        assert (tmp_path / "locked.sock").exists()
        # A file by which another server has replaced one of these is not removed.
        taken = tmp_path / "taken over.sock"
        taken.unlink()
        other.bind(str(taken))
        os.kill(twistd.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, workers)))
        assert {each.name for each in tmp_path.iterdir()} == {"app.tac", taken.name}


@pytest.mark.slow
def test_worker_stops_by_itself(tmp_path: Path) -> None:
    """A worker that receives a signal stops, and its successor starts at once."""
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        os.kill(worker, signal.SIGTERM)
        successor = twistd.wait_until_ready(2)[1]
        assert ask(("127.0.0.1", port))[1] == successor
        twistd.wait_for("Worker 0 is stopping by itself")
        wait_until(lambda: not is_running(worker))


@pytest.mark.slow
def test_descriptors(tmp_path: Path) -> None:
    """A worker has only its own descriptors, and its children inherit none of them."""
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
import subprocess
from twisted.internet import reactor

def look():
    print("WORKER", sorted(os.readlink(f"/proc/self/fd/{each}").partition(":")[0]
          for each in os.listdir("/proc/self/fd")
          if os.path.lexists(f"/proc/self/fd/{each}")))
    print("CHILD", subprocess.run(
        ["ls", "/proc/self/fd"], capture_output=True, text=True, close_fds=False,
    ).stdout.split())

reactor.callWhenRunning(look)
""",
    )
    with (
        open(os.devnull) as inherited,
        Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd,
    ):
        assert inherited
        twistd.wait_until_ready(2)
        kinds = [each.split() for each in twistd.wait_for(r"WORKER \[(.*)\]", 2)]
        # A worker has the listening socket and two channels.
        assert [sum("socket" in word for word in each) for each in kinds] == [3, 3]
        assert twistd.wait_for(r"CHILD \[(.*)\]", 2) == ["'0', '1', '2', '3'"] * 2
        before = descriptors(twistd.process.pid)
        twistd.send(signal.SIGHUP)
        twistd.wait_for("The reload is complete")
        twistd.wait_for("Worker . has stopped", 2)
        twistd.send(signal.SIGTTIN)
        twistd.wait_until_ready(5)
        twistd.send(signal.SIGTTOU)
        twistd.wait_for("Worker 2 has stopped")
        # The listening socket of the third slot stays open.
        wait_until(lambda: descriptors(twistd.process.pid) <= before + 1)


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all(tmp_path: Path, number: signal.Signals) -> None:
    """
    Ctrl-C goes to all processes, but only the supervisor handles it.  If all processes
    get SIGTERM, as from systemd, the workers stop by themselves, and all end as well.
    """
    write_tac(tmp_path, ON_PORT_0)
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        workers = twistd.wait_until_ready(2)
        os.killpg(twistd.process.pid, number)
        assert twistd.wait() == -number
        assert not any(map(is_running, workers))
        assert "Unhandled Error" not in twistd.output
        if number == signal.SIGINT:
            assert len(re.findall("Worker . has stopped", twistd.output)) == 2
            assert "stopping by itself" not in twistd.output
            assert "has ended" not in twistd.output


@pytest.mark.slow
def test_invalid_messages_from_a_worker(tmp_path: Path) -> None:
    """Data that an application writes to the channels by mistake is ignored."""
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
from twisted.internet import reactor

def write():
    for each in os.listdir("/proc/self/fd"):
        if int(each) >= 64:
            try:
                os.write(int(each), b"nonsense\\n[1]\\n{\\"type\\": 7}\\n" + b"x" * 100)
            except OSError:
                pass

reactor.callLater(0.1, write)
""",
    )
    with Twistd(tmp_path, "-c", "1", "-y", "app.tac") as twistd:
        (worker,) = twistd.wait_until_ready(1)
        port = twistd.port()
        twistd.wait_for("The control channel received .*nonsense")
        twistd.wait_for("a message of an unknown type: '7'")
        assert ask(("127.0.0.1", port))[1] == worker
        os.kill(worker, signal.SIGKILL)
        twistd.wait_until_ready(2)


def test_lost_channel(tmp_path: Path) -> None:
    """
    If an application closes the channel by mistake, its worker stops and is replaced.
    It does not remove files, as it does when the supervisor has ended.
    """
    write_tac(
        tmp_path,
        ON_PORT_0
        + """
import socket
from twisted.internet import reactor

listen("unix:path.sock")

def close():
    # The control channel has the first descriptor.
    control = socket.socket(fileno=64)
    assert control.family == socket.AF_UNIX
    control.shutdown(socket.SHUT_RDWR)
    control.detach()

if current().number == 1:
    reactor.callLater(0.1, close)
""",
    )
    with Twistd(tmp_path, "-c", "2", "-y", "app.tac") as twistd:
        twistd.wait_for("Worker 1 has ended with status 0")
        assert ask(str(tmp_path / "path.sock"), socket.AF_UNIX)[2] == 1
        assert twistd.pidfile.exists()
        twistd.wait_until_ready(2, number=1)
