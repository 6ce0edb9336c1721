"""
Children of every reactor of this package, by ``spawnProcess``: how they are
started, and that their end is noticed.
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
    spin,
    spin_with_timers,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.kqreactor import KQueueReactor
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc"
)


spawns = pytest.mark.skipif(
    ON_PYPY, reason="PyPy forks, as its posix_spawn does not start sessions"
)


class Child(Output):
    """Collects what a child prints, and how it has ended."""

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


# How they are started


@pytest.fixture
def started(reactor: EngineReactor) -> EngineReactor:
    """A reactor that blocks signals by now, if it ever does."""
    reactor.iterate(0)
    return reactor


def fails(*_: Any) -> int:
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
def test_the_process_is_not_forked(
    started: EngineReactor, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    """To copy the page tables of a big process takes long."""
    monkeypatch.setattr(os, "fork", fails)
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
def test_what_posix_spawn_cannot_do_is_forked(
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
def test_environment(
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
    """As by Twisted's epoll reactor, and nothing is left behind."""
    before = open_descriptors()
    readers = started.getReaders()
    with pytest.raises(FileNotFoundError):
        started.spawnProcess(Child(), "/no/such/program", ["program"])
    assert open_descriptors() <= before
    assert started.getReaders() == readers


@pytest.fixture
def signals_blocked() -> Iterator[None]:
    """By a realtime-signals reactor that runs in this thread, beside the others."""
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


# That their end is noticed


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="pipes"),
        pytest.param({"childFDs": {}}, id="no pipes"),
        pytest.param({"usePTY": True}, id="terminal"),
    ],
)
def test_ends_without_sigchld(reactor: EngineReactor, options: Any) -> None:
    """
    Twisted's reactors notice the end of a child when its pipes end, if waitpid(2)
    knows of it by then, and never again.
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
    """Start a child that ends only when Twisted has asked for it in vain."""
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


def test_ends_after_its_pipes(reactor: EngineReactor) -> None:
    child = Child()
    run(reactor, lambda: ends_after_its_pipes(reactor, child), child)
    assert child.status == 7


def test_ends_in_a_thread(make_reactor: Callable[[], EngineReactor]) -> None:
    """Where no signal handlers can be installed."""
    child = Child()

    def start() -> None:
        reactor = make_reactor()
        run(reactor, lambda: ends_after_its_pipes(reactor, child), child)
        reactor.beforeDaemonize()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert child.status == 7


def test_ends_after_all_was_removed(reactor: EngineReactor) -> None:
    """What reports the end belongs to the reactor: ``removeAll`` leaves it alone."""
    child = Child()
    reactor.spawnProcess(child, *shell("read line; exit 7"), childFDs={0: "w"})
    removed = reactor.removeAll()
    assert len(removed) == 1
    removed[0].connectionLost(Failure(Exception("end of test")))
    spin_with_timers(reactor, lambda: child.ended)
    assert child.status == 7


@pytest.fixture(params=["pidfd", "waitpid"])
def told_by(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What tells of the end: the kernel, or repeated questions where it does not."""
    if request.param == "waitpid":

        def refuse(process: int) -> int:
            raise OSError(errno.ENOSYS, "as Linux before 5.3")

        monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    return str(request.param)


@pytest.fixture
def linux_reactor(reactor: EngineReactor) -> EngineReactor:
    if isinstance(reactor, KQueueReactor):
        pytest.skip("kqueue tells of children: see test_kqueue.py")
    return reactor


@pytest.mark.usefixtures("told_by")
@pytest.mark.parametrize("use_pty", [False, True])
def test_leaves_nothing_behind(linux_reactor: EngineReactor, use_pty: bool) -> None:
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


@pytest.mark.usefixtures("told_by")
def test_other_code_has_reaped_it(linux_reactor: EngineReactor) -> None:
    """Then the status is lost, and the reactor does not go on to ask for it."""
    reactor = linux_reactor
    settle(reactor)
    readers = reactor.getReaders()
    stay, go = os.pipe()
    child = Child()
    transport: Any = reactor.spawnProcess(
        child, *shell("read line; exit 7"), childFDs={0: stay}
    )
    os.close(stay)
    process = transport.pid
    with capturedLogs() as logs:
        os.close(go)
        assert os.waitpid(process, 0)[1] == 7 << 8
        spin_with_timers(
            reactor,
            lambda: reactor.getReaders() == readers and not reactor.getDelayedCalls(),
        )
    assert not logs
    assert not child.ended
    del reapProcessHandlers[process]


@spawns
def test_the_end_is_told_before_waitpid_knows(
    linux_reactor: EngineReactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a debugger traces a child that has ended: ask now and then, do not spin."""
    reactor = linux_reactor
    settle(reactor)
    stay, go = os.pipe()
    child = Child()
    transport: Any = reactor.spawnProcess(
        child, *shell("read line; exit 7"), childFDs={0: stay}
    )
    os.close(stay)
    waitpid = os.waitpid
    asked = 0

    def knows_later(process: int, options: int) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return (0, 0) if asked < 5 else waitpid(process, options)

    monkeypatch.setattr(os, "waitpid", knows_later)
    readers = len(reactor.getReaders())
    os.close(go)
    spin_with_timers(reactor, lambda: asked)
    # Nothing is ready any more, so that a pass sleeps until the next question.
    assert len(reactor.getReaders()) == readers - 1
    assert len(reactor.getDelayedCalls()) == 1
    before = reactor.statistics()["waits"]
    spin_with_timers(reactor, lambda: child.ended)
    assert asked == 5
    assert reactor.statistics()["waits"] - before < 20
    assert child.status == 7
    assert transport.pid is None


@spawns
def test_sigchld_comes_first(linux_reactor: EngineReactor) -> None:
    """It is told once."""
    reactor = linux_reactor
    settle(reactor)
    readers = reactor.getReaders()
    stay, go = os.pipe()
    ended: list[Failure] = []
    child: Any = ProcessProtocol()
    child.processExited = ended.append
    transport: Any = reactor.spawnProcess(
        child, *shell("read line; exit 7"), childFDs={0: stay}
    )
    os.close(stay)
    os.close(go)
    os.waitid(os.P_PID, transport.pid, os.WEXITED | os.WNOWAIT)
    transport.reapProcess()
    assert len(ended) == 1
    spin_with_timers(reactor, lambda: reactor.getReaders() == readers)
    assert len(ended) == 1
