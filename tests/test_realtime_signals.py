"""
The traps of realtime-signal I/O, each against the real kernel: cases in which a reactor
that trusted each signal would lose data, report the wrong descriptor, or spin.
"""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from twisted.internet import defer
from twisted.internet.error import (
    ConnectionFdescWentAway,
    ReactorNotRestartable,
)

from tests.support import (
    DEADLINE,
    ECHO,
    FORKING,
    Output,
    RecorderFactory,
    Served,
    Watcher,
    blocked_signals,
    connect,
    dispose,
    open_descriptors,
    run_program,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor


@pytest.fixture
def reactor_class() -> type[EngineReactor]:
    return RealtimeSignalReactor


# An event is an edge


def test_many_sends_are_one_event(served: Served) -> None:
    """Signals are not merged by the kernel: each small send queues one."""
    client, connection = served.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = served.reactor.statistics()["signals"]
    for _ in range(50):
        client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 50)
    assert served.reactor.statistics()["signals"] > before + 1


def test_closed_descriptor_still_registered(reactor: EngineReactor) -> None:
    """It is disconnected, once, and does not make the reactor spin."""
    one, other = socket.socketpair()
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    reactor.iterate(0)
    one.close()
    other.close()
    spin(reactor, lambda: watcher.lost)
    assert watcher.reads == 0
    assert watcher.lost[0].check(ConnectionFdescWentAway)
    assert watcher not in reactor.getReaders()


# How a connection ends


# Descriptors that others hold as well


def test_adopted_connection(reactor: EngineReactor) -> None:
    """What was adopted may have another owner: it is never armed."""
    one, other = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    with one, other, listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.setblocking(False)
        factory = RecorderFactory()
        reactor.adoptStreamConnection(accepted.fileno(), socket.AF_INET, factory)
        settle(reactor)
        assert reactor.statistics()["armed"] == 0
        (connection,) = factory.connections
        with client, accepted:
            client.sendall(b"data")
            spin(reactor, lambda: connection.data == b"data")
            connection.transport.write(b"answer")
            settle(reactor)
            assert client.recv(100) == b"answer"
            client.close()
            accepted.close()
            spin(reactor, lambda: connection.lost)


def test_short_connections_are_not_armed(served: Served) -> None:
    """To arm and to disarm costs more than to poll a few times."""
    before = served.reactor.statistics()
    for turn in range(20):
        with connect(served.port) as client:
            client.sendall(b"x")
            spin(served.reactor, lambda: len(served.factory.connections) == turn + 1)
        connection = served.factory.connections[turn]
        spin(served.reactor, lambda: connection.lost)
        assert connection.data == b"x"
    after = served.reactor.statistics()
    assert after["signals"] == before["signals"]
    assert after["checks"] == before["checks"]


def test_signals_for_the_idle_poll_for_the_noisy(served: Served) -> None:
    """Who sends several signals for one read is polled until it calms down."""
    client, connection = served.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert served.reactor.statistics()["armed"] == 1
    for _ in range(50):
        client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 50)
    assert served.reactor.statistics()["armed"] == 0
    signals = served.reactor.statistics()["signals"]
    for _ in range(50):
        client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 100)
    assert served.reactor.statistics()["signals"] == signals
    for _ in range(10):
        settle(served.reactor)
    assert served.reactor.statistics()["armed"] == 1
    client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 101)
    assert served.reactor.statistics()["signals"] > signals


@pytest.mark.parametrize("end", [False, True])
def test_data_between_the_last_poll_and_the_arming(
    served: Served, monkeypatch: pytest.MonkeyPatch, end: bool
) -> None:
    """It was polled too early and signalled too late."""
    client = connect(served.port)
    spin(served.reactor, lambda: served.factory.connections)
    (connection,) = served.factory.connections
    real = fcntl.fcntl

    def arm(descriptor: int, command: int, *argument: Any) -> Any:
        if command == fcntl.F_SETSIG and client.fileno() >= 0:
            client.sendall(b"in between")
            if end:
                client.close()
        return real(descriptor, command, *argument)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "fcntl", arm)
        for _ in range(100):
            if served.reactor.statistics()["armed"]:
                break
            served.reactor.iterate(0)
    assert connection.data == b""
    spin(served.reactor, lambda: connection.data == b"in between")
    client.close()
    spin(served.reactor, lambda: connection.lost)


def test_no_signals_while_paused(served: Served) -> None:
    """Interest ended, so the kernel has been told to be silent."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    before = served.reactor.statistics()["signals"]
    for _ in range(10):
        client.sendall(b"x")
    settle(served.reactor)
    assert served.reactor.statistics()["signals"] == before


# Threads


def test_made_in_one_thread_and_run_in_another() -> None:
    """Signals go to the thread that runs the reactor, not to its maker."""
    output = run_program(
        ECHO
        + """
reactor = Reactor()
address = listen(reactor)
thread = in_thread(reactor.run, False)
from twisted.internet.threads import blockingCallFromThread
with socket.create_connection(address, timeout=20) as client:
    talk(client)
    # Each is a pass of its own: found idle a few times, it is armed.
    for _ in range(20):
        blockingCallFromThread(reactor, int)
    talk(client)
signals = reactor.statistics()["signals"]
reactor.callFromThread(reactor.stop)
thread.join()
assert thread.outcome == [None], thread.outcome
print(signals > 0)
"""
    )
    assert output == "True\n"


def test_closed_by_another_thread(reactor: EngineReactor) -> None:
    """The thread whose queue it is has ended, or goes on without it."""
    thread = threading.Thread(target=reactor.iterate, args=(0,))
    thread.start()
    thread.join()
    reactor.beforeDaemonize()
    reactor.iterate(0)
    assert blocked_signals() != 0


def test_run_by_another_thread_later_is_refused(reactor: EngineReactor) -> None:
    """Its signals go to the first one; a sentence says so, and nothing spins."""
    reactor.iterate(0)
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            reactor.run(installSignalHandlers=False)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert isinstance(outcome[0], UnsupportedReactorError)
    assert "cannot go on in thread" in str(outcome[0])


def test_threads_older_than_the_reactor() -> None:
    """
    A thread that was started before, and has the signal unblocked, must not
    get it: its default action ends the process.
    """
    output = run_program(
        ECHO
        + """
release = threading.Event()
old = [threading.Thread(target=release.wait) for _ in range(5)]
for each in old:
    each.start()
reactor = Reactor()
address = listen(reactor)
client = in_thread(converse, address, 500)
def look():
    if client.is_alive():
        reactor.callLater(0.01, look)
    else:
        reactor.stop()
reactor.callWhenRunning(look)
reactor.run()
release.set()
print(client.outcome)
"""
    )
    assert output == "[None]\n"


def test_two_reactors_in_one_thread(make_reactor: Any) -> None:
    """They share the queue, and one takes the other's signals out of it."""
    one, other = Served(make_reactor()), Served(make_reactor())
    one_client, one_connection = one.connect()
    other_client, other_connection = other.connect()
    for turn in range(1, 20):
        one_client.sendall(b"1")
        other_client.sendall(b"2")
        first, second = (one, other) if turn % 2 else (other, one)
        # Reads the signals of both.
        settle(first.reactor)
        settle(second.reactor)
        spin(one.reactor, lambda: len(one_connection.data) == turn)
        spin(other.reactor, lambda: len(other_connection.data) == turn)
    one.close()
    other.close()


# What is left in the process


def test_nothing_is_left_after_a_run(reactor: EngineReactor) -> None:
    """The signals are unblocked again, and the signalfd is closed."""
    mask = blocked_signals()
    descriptors = open_descriptors()
    during: list[int] = []
    reactor.callWhenRunning(lambda: during.append(blocked_signals()))
    reactor.callWhenRunning(reactor.stop)
    reactor.run(installSignalHandlers=False)
    assert during[0] != mask
    assert blocked_signals() == mask
    assert open_descriptors() <= descriptors


def test_nothing_is_left_after_a_run_that_is_refused(reactor: EngineReactor) -> None:
    reactor.callWhenRunning(reactor.stop)
    reactor.run(installSignalHandlers=False)
    with pytest.raises(ReactorNotRestartable):
        reactor.run(installSignalHandlers=False)
    assert blocked_signals() == 0


def test_forked_child_polls_what_it_inherited() -> None:
    """To arm it would make the parent deaf."""
    run_program(
        FORKING
        + """
pid = os.fork()
if pid == 0:
    reactor.iterate(0)
    os._exit(reactor.statistics()["armed"])
assert os.waitpid(pid, 0)[1] == 0
"""
    )


def test_signals_left_over_do_not_kill(served: Served) -> None:
    """Signals that are queued when the loop ends are thrown away."""
    reactor = served.reactor
    client, _ = served.connect()
    reactor.callWhenRunning(client.sendall, b"unread")
    reactor.callWhenRunning(reactor.crash)
    reactor.run(installSignalHandlers=False)
    client.sendall(b"more")
    assert blocked_signals() == 0


def test_closed_behind_our_back_with_a_duplicate() -> None:
    """
    An armed descriptor was closed by force, and its description lives on in a
    dup: its signals go on after the end, also after that of a later run, and
    must not kill the process.
    """
    output = run_program(
        FORKING
        + """
from twisted.internet import tcp
(transport,) = [each for each in reactor.getReaders() if isinstance(each, tcp.Server)]
duplicate = os.dup(transport.fileno())
os.close(transport.fileno())
reactor.removeReader(transport)
for _ in range(2):
    reactor.beforeDaemonize()
    client.sendall(b"a signal, since it is armed still")
    reactor.afterDaemonize()
    reactor.iterate(0)
reactor.beforeDaemonize()
print("alive")
"""
    )
    assert output == "alive\n"


@pytest.mark.parametrize("use_pty", [False, True])
def test_children_inherit_no_blocked_signal(served: Served, use_pty: bool) -> None:
    """spawnProcess by pipes and by PTY: SigBlk of the child is clean."""
    served.connect()
    reactor = served.reactor
    child = Output()

    def start() -> None:
        reactor.spawnProcess(
            child, "/bin/cat", ["cat", "/proc/self/status"], usePTY=use_pty
        )

    ended = defer.Deferred[None]()
    child.processEnded = lambda reason: ended.callback(None)  # type: ignore[method-assign]
    ended.addCallback(lambda _: reactor.stop())
    reactor.callWhenRunning(start)
    reactor.callLater(DEADLINE, reactor.crash)
    blocked: list[int] = []
    reactor.callWhenRunning(lambda: blocked.append(blocked_signals()))
    reactor.run()
    assert blocked[0] != 0
    assert blocked_signals(child.output.decode()) == 0


def test_subprocess_with_a_hook_inherits_no_blocked_signal(
    reactor: EngineReactor,
) -> None:
    """
    The way around that the documentation names: subprocess runs Python's hooks
    after fork only when it is given a preexec_fn.
    """
    reactor.iterate(0)
    done = subprocess.run(
        ["/bin/cat", "/proc/self/status"],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: None,
    )
    assert blocked_signals() != 0
    assert blocked_signals(done.stdout) == 0


# Limits


OVERFLOW = (
    ECHO
    + """
import resource
resource.setrlimit(resource.RLIMIT_SIGPENDING, (4, 4))
reactor = Reactor()
address = listen(reactor)
clients = [socket.create_connection(address, timeout=20) for _ in range(50)]
while reactor.statistics()["armed"] < 50:
    reactor.iterate(0)
# Found not ready: from here on only signals tell of them.
for _ in range(5):
    reactor.iterate(0)
for client in clients:
    client.sendall(b"hello")
while reactor.statistics()["overflows"] == 0:
    reactor.iterate(1)
for _ in range(5):
    reactor.iterate(0)
print(all(client.recv(5) == b"hello" for client in clients))
"""
)


@pytest.mark.slow
def test_queue_overflow() -> None:
    """The kernel sends one SIGIO in place of what does not fit."""
    assert run_program(OVERFLOW) == "True\n"


# The choice of the signal


def test_first_free_signal() -> None:
    """What Python and what C code handle is left alone."""
    output = run_program(
        """
        import ctypes, signal
        first = int(signal.SIGRTMIN)
        signal.signal(first, lambda number, frame: None)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(first + 1, ctypes.cast(libc.getpid, ctypes.c_void_p))
        signal.signal(first + 2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [first + 3])
        one = Reactor()
        one.iterate(0)
        other = Reactor()
        other.iterate(0)
        for each in one, other:
            print(each._notifier.signal_number - first)
        """
    )
    assert output == "4\n4\n"


@pytest.mark.parametrize(
    ("name", "offset"), [("SIGRTMIN+5", 5), (str(int(signal.SIGRTMIN) + 7), 7)]
)
def test_signal_by_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, offset: int
) -> None:
    monkeypatch.setenv("TWISTED_RTSIG_SIGNAL", name)
    output = run_program(
        """
        import signal
        reactor = Reactor()
        reactor.iterate(0)
        print(*signal.pthread_sigmask(signal.SIG_BLOCK, []) - {signal.SIGIO})
        """
    )
    assert int(output) == int(signal.SIGRTMIN) + offset


@pytest.mark.parametrize("name", ["first", "SIGRTMIN+x", "9", "SIGRTMIN+99"])
def test_signal_that_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TWISTED_RTSIG_SIGNAL", name)
    with pytest.raises(UnsupportedReactorError, match="--reactor=epoll"):
        RealtimeSignalReactor()


def test_signal_by_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument goes before the environment."""
    monkeypatch.setenv("TWISTED_RTSIG_SIGNAL", "nonsense")
    reactor = RealtimeSignalReactor(int(signal.SIGRTMAX))
    dispose(reactor)
    with pytest.raises(UnsupportedReactorError, match="no realtime signal"):
        RealtimeSignalReactor(int(signal.SIGTERM))


def test_all_signals_taken() -> None:
    output = run_program(
        """
        import signal
        from twisted_rtsig.notifiers import UnsupportedReactorError
        for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
            signal.signal(number, signal.SIG_IGN)
        try:
            Reactor()
        except UnsupportedReactorError as error:
            print(error)
        """
    )
    assert output.startswith("all realtime signals")


def test_no_descriptor_left() -> None:
    """No descriptor for the signalfd: a sentence that says so."""
    output = run_program(
        """
        import os, resource
        from twisted_rtsig.notifiers import UnsupportedReactorError
        import twisted_rtsig.notifiers.realtime_signals
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        hoard = []
        try:
            while True:
                hoard.append(os.dup(0))
        except OSError:
            pass
        # One to look for a free signal, in /proc.
        os.close(hoard.pop())
        hoard.append(open("/dev/null"))
        try:
            Reactor(40)
        except UnsupportedReactorError as error:
            os.write(1, str(error).encode())
        """
    )
    assert output.startswith("signalfd(2) gives no descriptor (Too many open files)")
