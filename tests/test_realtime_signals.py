"""
The traps of realtime-signal I/O, against the real kernel: cases in which a reactor that
trusted each signal would lose data, report the wrong descriptor, or spin.
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
    only,
    open_descriptors,
    run_forking,
    run_program,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

reactor_class = only(RealtimeSignalReactor)


# An event is an edge


def test_many_sends_cause_many_signals(served: Served) -> None:
    """The kernel does not merge signals: it queues one for each small send."""
    client, connection = served.connect()
    before = served.reactor.statistics()["signals"]
    served.send_bytes(client, connection, 50)
    assert served.reactor.statistics()["signals"] > before + 1


def test_a_watcher_whose_descriptor_is_closed_too_early_is_lost(
    reactor: EngineReactor,
) -> None:
    """It is disconnected once, and does not make the reactor spin."""
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


# Descriptors of open file descriptions that others share


def test_an_adopted_connection_is_not_armed(reactor: EngineReactor) -> None:
    """Another owner may share its open file description."""
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
    """Arming and disarming costs more than polling a few times."""
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


def test_a_noisy_connection_is_polled_until_it_calms_down(served: Served) -> None:
    """A connection is noisy if it causes several signals for one read."""
    client, connection = served.connect()
    assert served.reactor.statistics()["armed"] == 1
    served.send_bytes(client, connection, 50)
    assert served.reactor.statistics()["armed"] == 0
    signals = served.reactor.statistics()["signals"]
    served.send_bytes(client, connection, 50)
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
    """It comes too late for the poll, and too early for a signal."""
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
    """A paused connection is disarmed in the kernel."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    before = served.reactor.statistics()["signals"]
    for _ in range(10):
        client.sendall(b"x")
    settle(served.reactor)
    assert served.reactor.statistics()["signals"] == before


# Threads


def test_a_reactor_is_made_in_one_thread_and_run_in_another() -> None:
    """Signals go to the thread that runs the reactor."""
    output = run_program(
        ECHO
        + """
reactor = Reactor()
address = listen(reactor)
thread = in_thread(reactor.run, False)
from twisted.internet.threads import blockingCallFromThread
with socket.create_connection(address, timeout=20) as client:
    talk(client)
    # Each call is a pass of its own.  The connection is found idle a few times, and
    # armed.
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


def test_a_reactor_that_another_thread_has_run_is_closed(
    reactor: EngineReactor,
) -> None:
    """The thread to which the signals go has ended, or goes on without the reactor."""
    thread = threading.Thread(target=reactor.iterate, args=(0,))
    thread.start()
    thread.join()
    reactor.beforeDaemonize()
    reactor.iterate(0)
    assert blocked_signals() != 0


def test_run_by_another_thread_later_is_refused(reactor: EngineReactor) -> None:
    """Its signals go to the first thread.  The error says so, and nothing spins."""
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


def test_a_signal_does_not_go_to_a_thread_that_is_older_than_the_reactor() -> None:
    """
    Such a thread does not block the signal.  If it got the signal, the default action
    would end the process.
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
    """They share the queue of signals: one takes the other's signals out of it."""
    one, other = Served(make_reactor()), Served(make_reactor())
    one_client, one_connection = one.connect()
    other_client, other_connection = other.connect()
    for turn in range(1, 20):
        one_client.sendall(b"1")
        other_client.sendall(b"2")
        first, second = (one, other) if turn % 2 else (other, one)
        # This reads the signals of both reactors.
        settle(first.reactor)
        settle(second.reactor)
        spin(one.reactor, lambda: len(one_connection.data) == turn)
        spin(other.reactor, lambda: len(other_connection.data) == turn)
    one.close()
    other.close()


# Signals and descriptors that are left in the process


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


def test_a_forked_child_polls_an_inherited_connection() -> None:
    """If it armed the connection, the parent would get no more signals of it."""
    run_forking(
        """
def child():
    # An idle connection that may be armed is armed after a few passes.
    for _ in range(20):
        reactor.iterate(0)
    return reactor.statistics()["armed"]
in_child(child)
"""
    )


def test_signals_that_are_left_do_not_kill_the_process(served: Served) -> None:
    """Signals that are queued when the loop ends are discarded."""
    reactor = served.reactor
    client, _ = served.connect()
    reactor.callWhenRunning(client.sendall, b"unread")
    reactor.callWhenRunning(reactor.crash)
    reactor.run(installSignalHandlers=False)
    client.sendall(b"more")
    assert blocked_signals() == 0


def test_signals_of_a_duplicate_do_not_kill_the_process() -> None:
    """
    An armed descriptor was closed with :func:`os.close`, and a dup keeps its open file
    description.  Its signals go on after the end of this run and of later runs.
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
    client.sendall(b"a signal, since the description is still armed")
    reactor.afterDaemonize()
    reactor.iterate(0)
reactor.beforeDaemonize()
print("alive")
"""
    )
    assert output == "alive\n"


@pytest.mark.parametrize("use_pty", [False, True])
def test_children_inherit_no_blocked_signal(served: Served, use_pty: bool) -> None:
    """SigBlk of the child is empty, with pipes and with a terminal."""
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
    The documentation names this workaround: subprocess runs Python's hooks after fork
    only if it has a preexec_fn.
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
# The connections were found not ready: from here on only signals report their input.
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
def test_an_overflow_of_the_signal_queue_loses_no_input() -> None:
    """The kernel sends one SIGIO in place of the signals that do not fit."""
    assert run_program(OVERFLOW) == "True\n"


# The choice of the signal


def test_the_first_free_signal_is_used() -> None:
    """Signals that Python or C code handles are left alone."""
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
def test_the_environment_names_the_signal(
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
def test_an_environment_without_a_valid_signal_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TWISTED_RTSIG_SIGNAL", name)
    with pytest.raises(UnsupportedReactorError, match="--reactor=epoll"):
        RealtimeSignalReactor()


def test_an_argument_names_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument takes precedence over the environment."""
    monkeypatch.setenv("TWISTED_RTSIG_SIGNAL", "nonsense")
    reactor = RealtimeSignalReactor(int(signal.SIGRTMAX))
    dispose(reactor)
    with pytest.raises(UnsupportedReactorError, match="no realtime signal"):
        RealtimeSignalReactor(int(signal.SIGTERM))


def test_the_reactor_cannot_be_made_without_a_free_signal() -> None:
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


def test_the_reactor_cannot_be_made_without_a_free_descriptor() -> None:
    """The signalfd needs one.  The error says so."""
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
        # Leave one descriptor, to look for a free signal in /proc.
        os.close(hoard.pop())
        hoard.append(open("/dev/null"))
        try:
            Reactor(40)
        except UnsupportedReactorError as error:
            os.write(1, str(error).encode())
        """
    )
    assert output.startswith("signalfd(2) gives no descriptor (Too many open files)")
