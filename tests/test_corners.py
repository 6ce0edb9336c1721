"""
Corner cases of the engine with the realtime-signals notifier: interrupted calls, nested
loops, descriptors that are replaced, closed or inherited.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import sys
import time
import tty
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from twisted.internet.error import ConnectionDone, ConnectionFdescWentAway
from twisted.internet.interfaces import IHalfCloseableDescriptor
from twisted.internet.protocol import ClientFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.support import (
    DEADLINE,
    ECHO,
    FORKING,
    Recorder,
    RecorderFactory,
    Served,
    Watcher,
    connect,
    read_all,
    run_program,
    settle,
    spin,
)


def test_interrupted_wait(served: Served, monkeypatch: Any) -> None:
    """Ctrl-C before the poll: what was to be checked is still to be checked."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    client.sendall(b"x")
    connection.transport.resumeProducing()

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(served.reactor._notifier, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            served.reactor.iterate(0)
    spin(served.reactor, lambda: connection.data)


def test_interrupted_after_the_signals_were_read(
    served: Served, monkeypatch: Any
) -> None:
    client, connection = served.connect()
    wait = served.reactor._notifier.wait

    def interrupted(*arguments: Any) -> Any:
        wait(*arguments)
        raise KeyboardInterrupt

    client.sendall(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(served.reactor._notifier, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            served.reactor.iterate(0)
    spin(served.reactor, lambda: connection.data)


def test_interrupted_dispatch(served: Served) -> None:
    """Ctrl-C between two calls: who was not called yet is called later."""
    pairs = [served.connect() for _ in range(3)]
    one, other = socket.socketpair()
    watcher: Any = Watcher(served.reactor, one.fileno())
    served.reactor.addReader(watcher)
    settle(served.reactor)

    def interrupt() -> str:
        raise KeyboardInterrupt

    watcher.on_read = lambda: one.recv(1) and None
    with one, other:
        watcher.logPrefix = interrupt
        other.send(b"x")
        for client, _ in pairs:
            client.sendall(b"x")
        with pytest.raises(KeyboardInterrupt):
            served.reactor.iterate(1)
        del watcher.logPrefix
        spin(served.reactor, lambda: watcher.reads)
        for _, connection in pairs:
            spin(served.reactor, lambda: connection.data)
        served.reactor.removeReader(watcher)


def test_closed_and_number_accepted_again(served: Served) -> None:
    _, first = served.connect()
    number = first.transport.fileno()
    client = connect(served.port)
    os.close(number)
    spin(served.reactor, lambda: len(served.factory.connections) == 2)
    second = served.factory.connections[1]
    assert second.transport.fileno() == number
    settle(served.reactor)
    client.sendall(b"x")
    spin(served.reactor, lambda: second.data)
    first.transport.socket.detach()
    first.lost.append(None)
    client.close()


def test_outgoing_connection_is_armed(served: Served) -> None:
    factory: Any = ClientFactory.forProtocol(Recorder)
    served.reactor.connectTCP("127.0.0.1", served.port.getHost().port, factory)
    spin(served.reactor, lambda: served.factory.connections)
    settle(served.reactor)
    assert served.reactor.statistics()["armed"] == 2


def test_shared_with_a_stranger_is_not_armed(served: Served) -> None:
    reactor = served.reactor
    _, connection = served.connect()
    connection.transport.pauseProducing()
    watcher = Watcher(reactor, connection.transport.fileno())
    reactor.addReader(watcher)
    reactor.addWriter(connection.transport)
    assert reactor.statistics()["armed"] == 0
    reactor.removeReader(watcher)


def test_descriptor_changes_while_registered(reactor: Any) -> None:
    one, other = socket.socketpair()
    two, another = socket.socketpair()
    with one, other, two, another:
        watcher = Watcher(reactor, one.fileno())
        reactor.addReader(watcher)
        watcher.descriptor = two.fileno()
        reactor.addReader(watcher)
        another.send(b"x")
        spin(reactor, lambda: watcher.reads)
        reactor.removeReader(watcher)


def test_hangup_that_ended_does_not_count(reactor: Any) -> None:
    """A terminal hangs up, is opened again, and hangs up again."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    name = os.ttyname(slave)
    watcher = Watcher(reactor, master)

    def read() -> None:
        with contextlib.suppress(OSError):
            os.read(master, 100)

    watcher.on_read = read
    reactor.addReader(watcher)
    settle(reactor)
    os.close(slave)
    reactor.iterate(1)
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.write(slave, b"x")
    reactor.iterate(1)
    os.close(slave)
    reactor.iterate(1)
    assert watcher.reads == 3
    assert watcher.lost == []
    spin(reactor, lambda: watcher.lost)
    os.close(master)


def test_fileno_turned_negative(reactor: Any) -> None:
    one, other = socket.socketpair()
    with one, other:
        watcher = Watcher(reactor, one.fileno())
        reactor.addReader(watcher)
        settle(reactor)
        watcher.descriptor = -1
        other.send(b"x")
        spin(reactor, lambda: watcher.lost)
        assert watcher.lost[0].check(ConnectionFdescWentAway)
        assert watcher.reads == 0


@pytest.mark.parametrize("way", ["Reader", "Writer"])
def test_former_owner_without_the_number(reactor: Any, way: str) -> None:
    one, other = socket.socketpair()
    with one, other:
        former, newcomer = (Watcher(reactor, one.fileno()) for _ in range(2))
        getattr(reactor, "add" + way)(former)
        former.descriptor = -1
        getattr(reactor, "addWriter" if way == "Reader" else "addReader")(newcomer)
        assert former not in reactor.getReaders() + reactor.getWriters()
        reactor.removeReader(newcomer)
        reactor.removeWriter(newcomer)


def test_exception_is_no_half_close(reactor: Any) -> None:
    @implementer(IHalfCloseableDescriptor)
    class HalfCloseable(Watcher):
        def readConnectionLost(self, reason: Any) -> None:
            raise AssertionError("doRead has not ended well")

        def writeConnectionLost(self, reason: Any) -> None:
            """Not in this test."""

    def fail() -> None:
        raise ConnectionDone()

    one, other = socket.socketpair()
    with one, other:
        watcher = HalfCloseable(reactor, one.fileno())
        watcher.on_read = fail
        reactor.addReader(watcher)
        other.send(b"x")
        spin(reactor, lambda: watcher.lost or not reactor.getReaders())
        assert watcher.lost


@pytest.mark.parametrize("more", [b"", b"x"])
def test_room_while_reading_is_paused(served: Served, more: bytes) -> None:
    """POLL_OUT alone, and merged with input that nobody wants."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    size = 16 * 1024 * 1024
    connection.transport.write(bytes(size))
    client.setblocking(False)
    got = 0
    while got < size:
        # One settle() writes 1.3 MB at most: until the buffers are full, and
        # the kernel owes an event.
        for _ in range(10):
            settle(served.reactor)
        assert select.select([client], [], [], DEADLINE)[0]
        with contextlib.suppress(BlockingIOError):
            while chunk := client.recv(1 << 20):
                got += len(chunk)
        if more:
            client.send(more)
        if connection.transport in served.reactor.getWriters():
            served.reactor.iterate(5)
    assert got == size


def test_checked_and_signalled_at_once(served: Served) -> None:
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    connection.transport.write(b"answer")
    client.sendall(b"x")
    settle(served.reactor)
    client.settimeout(1)
    assert client.recv(100) == b"answer"


def test_child_pauses_and_resumes_what_it_inherited() -> None:
    """It begins anew in the child, and is its parent's still."""
    output = run_program(
        FORKING
        + """
pid = os.fork()
if pid == 0:
    from twisted.internet import tcp
    (transport,) = [
        each for each in reactor.getReaders() if isinstance(each, tcp.Server)]
    transport.pauseProducing()
    transport.resumeProducing()
    reactor.iterate(0)
    assert reactor.statistics()["armed"] == 0
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
heard()
print("heard")
"""
    )
    assert output == "heard\n"


def test_iterate_inside_a_read(served: Served) -> None:
    """What an outer pass has in hand is found by the pass inside of it."""
    pairs = [served.connect() for _ in range(2)]
    heard: list[int] = []

    def received(me: Any, other: Any) -> Any:
        def dataReceived(data: bytes) -> None:
            me.data += data
            if not heard:
                heard.append(0)
                spin(served.reactor, lambda: other.data)
                heard[0] = 1

        return dataReceived

    (a, one), (b, two) = pairs
    one.dataReceived, two.dataReceived = received(one, two), received(two, one)
    a.sendall(b"1")
    b.sendall(b"2")
    spin(served.reactor, lambda: one.data and two.data)
    assert heard == [1]


def test_number_reused_by_a_blocking_descriptor(served: Served) -> None:
    """A stale signal must not lead to a read that hangs."""
    client, connection = served.connect()
    number = connection.transport.fileno()
    client.sendall(b"a signal")
    connection.transport.connectionLost(Failure(ConnectionDone()))
    read_end, write_end = os.pipe()
    os.dup2(read_end, number)
    watcher = Watcher(served.reactor, number)
    served.reactor.addReader(watcher)
    settle(served.reactor)
    assert watcher.reads == 0
    served.reactor.removeReader(watcher)
    # The pipe may have got the number at once.
    for each in {read_end, write_end, number}:
        os.close(each)


def test_children_of_worker_threads_inherit_no_blocked_signal() -> None:
    """A thread that the reactor's thread has started inherits its mask."""
    output = run_program(
        """
        import subprocess, threading
        reactor = Reactor()
        reactor.iterate(0)
        def child():
            print(subprocess.run(
                ["/bin/grep", "SigBlk", "/proc/self/status"],
                capture_output=True, text=True, preexec_fn=lambda: None).stdout)
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()
        """
    )
    assert int(output.split()[1], 16) == 0


def test_interest_that_a_signal_handler_begins(served: Served) -> None:
    """It counts at once, and not when the sleep is over."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    client.sendall(b"x")
    settle(served.reactor)
    before = signal.signal(
        signal.SIGALRM, lambda *_: connection.transport.resumeProducing()
    )
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    start = time.monotonic()
    try:
        while not connection.data:
            served.reactor.iterate(DEADLINE)
            assert time.monotonic() < start + DEADLINE / 2
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_overflow_concerns_all_reactors_of_a_thread() -> None:
    """SIGIO is one for all, whatever realtime signals they use."""
    output = run_program(
        ECHO
        + """
import resource
resource.setrlimit(resource.RLIMIT_SIGPENDING, (4, 4))
reactors = [Reactor(40), Reactor(41)]
clients = {}
for reactor in reactors:
    address = listen(reactor)
    clients[reactor] = [
        socket.create_connection(address, timeout=20) for _ in range(10)]
    while reactor.statistics()["armed"] < 10:
        reactor.iterate(0)
for reactor in reactors * 5:
    reactor.iterate(0)
for client in clients[reactors[0]] + clients[reactors[1]]:
    client.sendall(b"hello")
for reactor in reactors * 5:
    reactor.iterate(0)
for reactor in reactors:
    for client in clients[reactor]:
        assert client.recv(5) == b"hello"
print("all")
"""
    )
    assert output == "all\n"


def test_signal_taken_by_the_application_meanwhile() -> None:
    """A signal that a former reactor had used may be somebody else's by now."""
    output = run_program(
        """
        import signal
        first = Reactor()
        first.iterate(0)
        first.beforeDaemonize()
        signal.signal(first._notifier.signal_number, lambda number, frame: None)
        second = Reactor()
        print(second._notifier.signal_number - first._notifier.signal_number)
        """
    )
    assert output == "1\n"


def test_connection_closed_between_two_runs(served: Served) -> None:
    """A descriptor that went away while the loop did not run is reported."""
    _, connection = served.connect()
    served.reactor.beforeDaemonize()
    os.close(connection.transport.fileno())
    spin(served.reactor, lambda: connection.lost)


def test_closed_meanwhile(served: Served) -> None:
    client, connection = served.connect()
    served.reactor.beforeDaemonize()
    assert served.reactor.statistics()["armed"] == 0
    client.sendall(b"meanwhile")
    spin(served.reactor, lambda: connection.data)


def test_child_does_not_poll_the_signalfd_of_the_parent() -> None:
    run_program(
        FORKING
        + """
import time
pid = os.fork()
if pid == 0:
    # Takes the number of the parent's signalfd, and is always ready.
    hoard = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    reactor.iterate(0)
    reactor.iterate(0)
    start = time.monotonic()
    reactor.iterate(0.2)
    os._exit(time.monotonic() - start < 0.1)
assert os.waitpid(pid, 0)[1] == 0
"""
    )


def test_removed_by_a_signal_handler(served: Served) -> None:
    client, connection = served.connect()
    client.sendall(b"x")
    spin(served.reactor, lambda: connection.data)
    connection.transport.pauseProducing()
    connection.transport.resumeProducing()
    # The next pass sleeps while it checks the connection.
    assert served.reactor._unchecked
    before = signal.signal(
        signal.SIGALRM, lambda *_: connection.transport.pauseProducing()
    )
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        served.reactor.iterate(0.3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert connection.transport not in served.reactor.getReaders()


def test_unix_writer_that_is_done_does_not_spin(reactor: Any, tmp_path: Any) -> None:
    factory = RecorderFactory()
    path = str(tmp_path / "socket")
    reactor.listenUNIX(path, factory)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        spin(reactor, lambda: factory.connections)
        factory.connections[0].transport.write(bytes(1_000_000))
        read_all(reactor, client, 1_000_000)
        settle(reactor)
        start = time.monotonic()
        reactor.iterate(0.1)
        assert time.monotonic() - start > 0.09


def test_blocked_before_stays_blocked() -> None:
    output = run_program(
        """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
        reactor = Reactor()
        reactor.iterate(0)
        reactor.beforeDaemonize()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGIO})
        """
    )
    assert output == "True\n"


def test_two_signals_in_one_thread() -> None:
    output = run_program(
        """
        import signal
        one, other = Reactor(40), Reactor(41)
        one.iterate(0)
        other.iterate(0)
        one.beforeDaemonize()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGIO, 41})
        """
    )
    assert output == "True\n"


def test_thread_that_ends_leaves_no_descriptor() -> None:
    output = run_program(
        ECHO
        + """
import gc
def use():
    reactor = Reactor()
    reactor.iterate(0)
    reactor.waker.connectionLost(None)
    reactor.removeReader(reactor.waker)
    reactor._internalReaders.clear()
def count():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
in_thread(use).join()
before = count()
for _ in range(5):
    in_thread(use).join()
print(count() - before)
"""
    )
    assert output == "0\n"
