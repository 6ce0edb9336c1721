"""
``spawnProcess`` on every reactor of this package: how a child is started, and that its
end is noticed.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("test_windows_processes.py is for Windows", allow_module_level=True)

from twisted.internet.process import reapProcessHandlers
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from tests.support import (
    DEADLINE,
    ON_PYPY,
    Output,
    blocked_signals,
    open_descriptors,
    settle,
    spawn_waiting,
    spin,
    spin_with_timers,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.kqreactor import KQueueReactor
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc"
)


spawns = pytest.mark.skipif(
    ON_PYPY, reason="PyPy forks, since its posix_spawn cannot start sessions"
)


class Child(Output):
    """Collects the output and the exit status of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.status: int | None = None
        self.when_ended: Callable[[], Any] = lambda: None

    def processEnded(self, reason: Failure) -> None:
        super().processEnded(reason)
        why: Any = reason.value
        self.status = why.exitCode
        self.when_ended()


def run(reactor: Any, start: Callable[[], Any], child: Child) -> None:
    """Run the reactor until the child has ended, without signal handlers."""
    child.when_ended = reactor.stop
    reactor.callWhenRunning(start)
    reactor.callLater(DEADLINE, reactor.crash)
    reactor.run(installSignalHandlers=False)
    assert child.ended


def shell(script: str) -> tuple[str, list[str]]:
    return "/bin/sh", ["sh", "-c", script]


# How a child is started


@pytest.fixture
def started(reactor: EngineReactor) -> EngineReactor:
    """A reactor that has blocked its signals, if it has any."""
    reactor.iterate(0)
    return reactor


def must_not_fork(*_: Any) -> int:
    raise AssertionError("it has forked")


@spawns
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="pipes"),
        pytest.param({"env": None}, id="environment"),
        pytest.param({"path": "."}, id="same folder"),
        pytest.param({"childFDs": {0: 0, 1: "r", 5: "w"}}, id="descriptors"),
    ],
)
def test_a_child_is_started_without_fork(
    started: EngineReactor, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    """Copying the page tables of a big process takes long."""
    monkeypatch.setattr(os, "fork", must_not_fork)
    child = Child()
    started.spawnProcess(child, *shell("echo hello; exit 3"), **options)
    spin(started, lambda: child.ended)
    assert (child.output, child.status) == (b"hello\n", 3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"usePTY": True}, id="terminal"),
        pytest.param({"path": "/"}, id="another folder"),
    ],
)
def test_a_child_that_posix_spawn_cannot_start_is_forked(
    started: EngineReactor, options: Any
) -> None:
    child = Child()
    started.spawnProcess(child, *shell("pwd; exit 3"), **options)
    spin(started, lambda: child.ended)
    where = options.get("path", os.getcwd())
    assert (child.output.decode().strip(), child.status) == (where, 3)


@pytest.mark.parametrize(
    ("env", "expected"), [({}, b"\n"), (None, b"ours\n"), ({"NAME": "own"}, b"own\n")]
)
def test_the_environment_of_a_child(
    started: EngineReactor,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str] | None,
    expected: bytes,
) -> None:
    """``None`` is the environment of this process."""
    monkeypatch.setenv("NAME", "ours")
    child = Child()
    started.spawnProcess(child, *shell("echo $NAME"), env=env)
    spin(started, lambda: child.ended)
    assert child.output == expected


@spawns
@linux_only
def test_a_missing_program_is_reported_to_the_caller(started: EngineReactor) -> None:
    """As by Twisted's epoll reactor.  No descriptor is left open."""
    before = open_descriptors()
    readers = started.getReaders()
    with pytest.raises(FileNotFoundError):
        started.spawnProcess(Child(), "/no/such/program", ["program"])
    assert open_descriptors() <= before
    assert started.getReaders() == readers


@pytest.fixture
def signals_blocked() -> Iterator[None]:
    """A realtime-signals reactor in this thread, beside the tested one, blocks them."""
    reactor = RealtimeSignalReactor()
    reactor.iterate(0)
    assert blocked_signals()
    yield
    reactor.beforeDaemonize()


STATUS = "/bin/cat", ["cat", "/proc/self/status"]


@linux_only
@pytest.mark.usefixtures("signals_blocked")
@pytest.mark.parametrize(
    ("use_pty", "in_thread"),
    [
        pytest.param(False, False, id="pipes"),
        pytest.param(True, False, id="terminal"),
        pytest.param(False, True, id="in a thread"),
    ],
)
def test_a_child_has_only_the_blocked_signals_of_the_application(
    make_reactor: Callable[[], EngineReactor], use_pty: bool, in_thread: bool
) -> None:
    """A thread inherits the signals that are blocked in the thread that starts it."""
    child = Child()
    inherited: list[int] = []

    def start() -> None:
        reactor = make_reactor()
        inherited.append(blocked_signals())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        run(
            reactor, lambda: reactor.spawnProcess(child, *STATUS, usePTY=use_pty), child
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        reactor.beforeDaemonize()

    if in_thread:
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    assert inherited[0]
    assert blocked_signals(child.output.decode()) == 1 << (signal.SIGUSR1 - 1)


# That the end of a child is noticed


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="pipes"),
        pytest.param({"childFDs": {}}, id="no pipes"),
        pytest.param({"usePTY": True}, id="terminal"),
    ],
)
def test_the_end_is_noticed_without_sigchld(
    reactor: EngineReactor, options: Any
) -> None:
    """
    Twisted's reactors call waitpid(2) when the pipes of a child end.  If the child has
    not ended by then, they do not notice its end.
    """
    left = 20
    ended: list[int | None] = []

    def next_one() -> None:
        nonlocal left
        left -= 1
        child = Child()

        def when_ended() -> None:
            ended.append(child.status)
            if left:
                next_one()
            else:
                reactor.stop()

        child.when_ended = when_ended
        reactor.spawnProcess(child, *shell("exit 7"), **options)

    reactor.callWhenRunning(next_one)
    reactor.callLater(DEADLINE, reactor.crash)
    reactor.run(installSignalHandlers=False)
    assert ended == [7] * 20


def ends_after_its_pipes(reactor: Any, child: Child) -> None:
    """Start a child that ends after its pipes, when waitpid(2) was called in vain."""
    stay, go = os.pipe()
    open_pipes = {0, 1, 2}

    def pipe_ends(childFD: int) -> None:
        open_pipes.remove(childFD)
        if not open_pipes:
            reactor.callLater(0, os.close, go)

    child.childConnectionLost = pipe_ends  # type: ignore[method-assign]
    reactor.spawnProcess(
        child,
        *shell("exec <&- >&- 2>&-; read line <&3; exit 7"),
        childFDs={0: "w", 1: "r", 2: "r", 3: stay},
    )
    os.close(stay)


def test_the_end_is_noticed_if_the_pipes_end_first(reactor: EngineReactor) -> None:
    child = Child()
    run(reactor, lambda: ends_after_its_pipes(reactor, child), child)
    assert child.status == 7


def test_the_end_is_noticed_in_a_thread(
    make_reactor: Callable[[], EngineReactor],
) -> None:
    """Signal handlers cannot be installed there."""
    child = Child()

    def start() -> None:
        reactor = make_reactor()
        run(reactor, lambda: ends_after_its_pipes(reactor, child), child)
        reactor.beforeDaemonize()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert child.status == 7


def test_the_end_is_noticed_after_removeAll(reactor: EngineReactor) -> None:
    """The reader that reports the end belongs to the reactor, and is not removed."""
    child = Child()
    reactor.spawnProcess(child, *shell("read line; exit 7"), childFDs={0: "w"})
    removed = reactor.removeAll()
    assert len(removed) == 1
    removed[0].connectionLost(Failure(Exception("end of test")))
    spin_with_timers(reactor, lambda: child.ended)
    assert child.status == 7


@pytest.fixture(params=["pidfd", "waitpid"])
def end_reported_by(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel reports the end.  Before Linux 5.3 waitpid(2) is called repeatedly."""
    if request.param == "waitpid":

        def refuse(process: int) -> int:
            raise OSError(errno.ENOSYS, "as Linux before 5.3")

        monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    return str(request.param)


@pytest.fixture
def linux_reactor(reactor: EngineReactor) -> EngineReactor:
    if isinstance(reactor, KQueueReactor):
        pytest.skip("kqueue reports the end of children: see test_kqueue.py")
    return reactor


@pytest.mark.usefixtures("end_reported_by")
@pytest.mark.parametrize("use_pty", [False, True])
def test_a_child_leaves_no_descriptor_and_no_reader(
    linux_reactor: EngineReactor, use_pty: bool
) -> None:
    reactor = linux_reactor
    settle(reactor)
    before = open_descriptors()
    readers = reactor.getReaders()
    child = Child()
    reactor.spawnProcess(child, *shell("exit 7"), usePTY=use_pty)
    spin_with_timers(
        reactor,
        lambda: (
            child.ended
            and reactor.getReaders() == readers
            and not reactor.getDelayedCalls()
        ),
    )
    assert child.status == 7
    assert open_descriptors() <= before


@pytest.mark.usefixtures("end_reported_by")
def test_other_code_has_reaped_a_child(linux_reactor: EngineReactor) -> None:
    """Then the status is lost, and the reactor does not go on calling waitpid(2)."""
    reactor = linux_reactor
    settle(reactor)
    readers = reactor.getReaders()
    child = Child()
    transport, pipe = spawn_waiting(reactor, child)
    process = transport.pid
    with capturedLogs() as logs:
        os.close(pipe)
        assert os.waitpid(process, 0)[1] == 7 << 8
        spin_with_timers(
            reactor,
            lambda: reactor.getReaders() == readers and not reactor.getDelayedCalls(),
        )
    assert not logs
    assert not child.ended
    del reapProcessHandlers[process]


@spawns
def test_the_end_is_reported_before_waitpid_knows_it(
    linux_reactor: EngineReactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    This happens while a debugger traces a child that has ended.  The reactor calls
    waitpid(2) now and then, and does not spin.
    """
    reactor = linux_reactor
    settle(reactor)
    child = Child()
    transport, pipe = spawn_waiting(reactor, child)
    waitpid = os.waitpid
    asked = 0

    def knows_later(process: int, options: int) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return (0, 0) if asked < 5 else waitpid(process, options)

    monkeypatch.setattr(os, "waitpid", knows_later)
    readers = len(reactor.getReaders())
    os.close(pipe)
    spin_with_timers(reactor, lambda: asked)
    # No descriptor is ready any more: a pass sleeps until the next waitpid(2).
    assert len(reactor.getReaders()) == readers - 1
    assert len(reactor.getDelayedCalls()) == 1
    before = reactor.statistics()["waits"]
    spin_with_timers(reactor, lambda: child.ended)
    assert asked == 5
    assert reactor.statistics()["waits"] - before < 20
    assert child.status == 7
    assert transport.pid is None


@spawns
def test_sigchld_comes_before_the_reported_end(linux_reactor: EngineReactor) -> None:
    """The protocol is told once."""
    reactor = linux_reactor
    settle(reactor)
    readers = reactor.getReaders()
    ended: list[Failure] = []
    child: Any = ProcessProtocol()
    child.processExited = ended.append
    transport, pipe = spawn_waiting(reactor, child)
    os.close(pipe)
    os.waitid(os.P_PID, transport.pid, os.WEXITED | os.WNOWAIT)
    transport.reapProcess()
    assert len(ended) == 1
    spin_with_timers(reactor, lambda: reactor.getReaders() == readers)
    assert len(ended) == 1
