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
from pathlib import Path
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from twisted.internet.error import ConnectionDone, ConnectionFdescWentAway
from twisted.internet.interfaces import IHalfCloseableDescriptor
from twisted.internet.protocol import ClientFactory
from twisted.logger import ILogObserver, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer, provider

from tests.support import (
    DEADLINE,
    ECHO,
    Recorder,
    Served,
    SocketPair,
    Watcher,
    connect,
    read_all,
    run_forking,
    run_program,
    settle,
    spin,
    unix_connection,
)


@pytest.mark.parametrize("moment", ["before the poll", "after the signals were read"])
def test_an_interrupted_wait_loses_no_event(
    served: Served, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A registration that was to be checked is still checked."""
    client, connection = served.connect()
    wait = served.reactor._notifier.wait
    if moment == "before the poll":
        connection.transport.pauseProducing()
        settle(served.reactor)
    client.sendall(b"x")
    if moment == "before the poll":
        connection.transport.resumeProducing()

    def interrupted(*arguments: Any) -> Any:
        if moment != "before the poll":
            wait(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(served.reactor._notifier, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            served.reactor.iterate(0)
    spin(served.reactor, lambda: connection.data)


def test_an_interrupted_dispatch_loses_no_event(served: Served) -> None:
    """Ctrl-C between two calls: the reactor makes the other calls later."""
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


def test_a_connection_that_reuses_a_closed_descriptor_is_received_from(
    served: Served,
) -> None:
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


def test_an_outgoing_connection_is_armed(served: Served) -> None:
    factory: Any = ClientFactory.forProtocol(Recorder)
    served.reactor.connectTCP("127.0.0.1", served.port.getHost().port, factory)
    spin(served.reactor, lambda: served.factory.connections)
    settle(served.reactor)
    assert served.reactor.statistics()["armed"] == 2


def test_a_descriptor_with_a_second_watcher_is_not_armed(served: Served) -> None:
    reactor = served.reactor
    _, connection = served.connect()
    connection.transport.pauseProducing()
    watcher = Watcher(reactor, connection.transport.fileno())
    reactor.addReader(watcher)
    reactor.addWriter(connection.transport)
    assert reactor.statistics()["armed"] == 0
    reactor.removeReader(watcher)


def test_the_descriptor_of_a_registered_watcher_changes(
    reactor: Any, pair: SocketPair
) -> None:
    two, another = socket.socketpair()
    with two, another:
        watcher = Watcher(reactor, pair[0].fileno())
        reactor.addReader(watcher)
        watcher.descriptor = two.fileno()
        reactor.addReader(watcher)
        another.send(b"x")
        spin(reactor, lambda: watcher.reads)
        reactor.removeReader(watcher)


def test_a_hangup_that_has_ended_does_not_count(reactor: Any) -> None:
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


def test_a_watcher_whose_fileno_became_negative_is_lost(
    reactor: Any, pair: SocketPair
) -> None:
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addReader(watcher)
    settle(reactor)
    watcher.descriptor = -1
    pair[1].send(b"x")
    spin(reactor, lambda: watcher.lost)
    assert watcher.lost[0].check(ConnectionFdescWentAway)
    assert watcher.reads == 0


@pytest.mark.parametrize("way", ["Reader", "Writer"])
def test_a_new_watcher_of_the_descriptor_replaces_one_without_a_descriptor(
    reactor: Any, pair: SocketPair, way: str
) -> None:
    former, newcomer = (Watcher(reactor, pair[0].fileno()) for _ in range(2))
    getattr(reactor, "add" + way)(former)
    former.descriptor = -1
    getattr(reactor, "addWriter" if way == "Reader" else "addReader")(newcomer)
    assert former not in reactor.getReaders() + reactor.getWriters()
    reactor.removeReader(newcomer)
    reactor.removeWriter(newcomer)


def test_an_exception_is_not_a_half_close(reactor: Any, pair: SocketPair) -> None:
    @implementer(IHalfCloseableDescriptor)
    class HalfCloseable(Watcher):
        def readConnectionLost(self, reason: Any) -> None:
            raise AssertionError("doRead has failed")

        def writeConnectionLost(self, reason: Any) -> None:
            """This test does not close the other direction."""

    def fail() -> None:
        raise ConnectionDone()

    watcher = HalfCloseable(reactor, pair[0].fileno())
    watcher.on_read = fail
    reactor.addReader(watcher)
    pair[1].send(b"x")
    spin(reactor, lambda: watcher.lost or not reactor.getReaders())
    assert watcher.lost


@pytest.mark.parametrize("more", [b"", b"x"])
def test_writing_goes_on_while_reading_is_paused(served: Served, more: bytes) -> None:
    """POLL_OUT comes alone, and merged with input that is not wanted."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    size = 16 * 1024 * 1024
    connection.transport.write(bytes(size))
    client.setblocking(False)
    got = 0
    while got < size:
        # One settle() writes at most 1.3 MB.  Repeat it until the buffers are full:
        # then the kernel has to send an event.
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


def test_an_answer_is_written_while_paused_input_arrives(served: Served) -> None:
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    connection.transport.write(b"answer")
    client.sendall(b"x")
    settle(served.reactor)
    client.settimeout(1)
    assert client.recv(100) == b"answer"


def test_a_child_pauses_and_resumes_an_inherited_connection() -> None:
    """The child registers it again, and the parent still gets its signals."""
    run_forking(
        """
def child():
    from twisted.internet import tcp
    (transport,) = [
        each for each in reactor.getReaders() if isinstance(each, tcp.Server)]
    transport.pauseProducing()
    transport.resumeProducing()
    # An idle connection that may be armed is armed after a few passes.
    for _ in range(20):
        reactor.iterate(0)
    assert reactor.statistics()["armed"] == 0
in_child(child)
"""
    )


def test_iterate_inside_a_read(served: Served) -> None:
    """The inner pass delivers the events that the outer pass has still to deliver."""
    pairs = [served.connect() for _ in range(2)]
    inner: list[str] = []

    def received(me: Any, other: Any) -> Any:
        def dataReceived(data: bytes) -> None:
            me.data += data
            if not inner:
                inner.append("begins")
                spin(served.reactor, lambda: other.data)
                inner.append("ends")

        return dataReceived

    (a, one), (b, two) = pairs
    one.dataReceived, two.dataReceived = received(one, two), received(two, one)
    a.sendall(b"1")
    b.sendall(b"2")
    spin(served.reactor, lambda: one.data and two.data)
    assert inner == ["begins", "ends"]


def test_a_stale_signal_does_not_read_a_blocking_descriptor(served: Served) -> None:
    """A pipe reuses the descriptor: a read from it would hang."""
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
    # The pipe may have got the same descriptor.
    for each in {read_end, write_end, number}:
        os.close(each)


def test_children_of_worker_threads_inherit_no_blocked_signal() -> None:
    """A thread inherits the signal mask of the reactor's thread, which started it."""
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


def test_a_signal_handler_resumes_reading(served: Served) -> None:
    """It takes effect at once, rather than at the end of the sleep."""
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
def test_an_overflow_affects_all_reactors_of_a_thread() -> None:
    """They share SIGIO, although each has its own realtime signal."""
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


def test_a_signal_that_the_application_has_taken_is_not_reused() -> None:
    """A former reactor of this process had used the signal."""
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


def test_a_descriptor_that_was_closed_between_two_runs_is_lost(served: Served) -> None:
    """It was closed while the loop did not run."""
    _, connection = served.connect()
    served.reactor.beforeDaemonize()
    os.close(connection.transport.fileno())
    spin(served.reactor, lambda: connection.lost)


def test_input_between_two_runs_is_received(served: Served) -> None:
    client, connection = served.connect()
    served.reactor.beforeDaemonize()
    assert served.reactor.statistics()["armed"] == 0
    client.sendall(b"meanwhile")
    spin(served.reactor, lambda: connection.data)


def test_child_does_not_poll_the_signalfd_of_the_parent() -> None:
    run_forking(
        """
import time
def child():
    # One of these gets the descriptor of the parent's signalfd, and is always ready.
    hoard = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    reactor.iterate(0)
    reactor.iterate(0)
    start = time.monotonic()
    reactor.iterate(0.2)
    assert time.monotonic() - start >= 0.1
in_child(child)
"""
    )


def test_a_signal_handler_pauses_reading(served: Served) -> None:
    client, connection = served.connect()
    client.sendall(b"x")
    spin(served.reactor, lambda: connection.data)
    connection.transport.pauseProducing()
    connection.transport.resumeProducing()
    # The next pass checks the connection while it sleeps.
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


def test_a_unix_writer_that_is_done_does_not_spin(reactor: Any, tmp_path: Path) -> None:
    with unix_connection(reactor, tmp_path) as (client, connection):
        connection.transport.write(bytes(1_000_000))
        read_all(reactor, client, 1_000_000)
        settle(reactor)
        start = time.monotonic()
        reactor.iterate(0.1)
        assert time.monotonic() - start > 0.09


def test_a_signal_is_logged_after_its_handler_has_returned(
    reactor: Any,
) -> None:
    """A handler may interrupt the main thread while that takes the lock of a log."""
    logged: list[str | None] = []
    in_handler = []

    @provider(ILogObserver)
    def observe(event: Any) -> None:
        logged.append(formatEvent(event))

    def interrupt() -> None:
        reactor.sigTerm(signal.SIGTERM)
        in_handler.extend(logged)

    reactor.callWhenRunning(interrupt)
    globalLogPublisher.addObserver(observe)
    try:
        reactor.run(installSignalHandlers=False)
    finally:
        globalLogPublisher.removeObserver(observe)
    received = "Received SIGTERM, shutting down."
    assert received not in in_handler
    assert logged.count(received) == 1
    assert reactor._exitSignal == signal.SIGTERM


def test_a_signal_that_was_blocked_before_stays_blocked() -> None:
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


def test_two_reactors_of_a_thread_block_their_own_signals() -> None:
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


def test_a_reactor_in_a_thread_leaves_no_descriptor() -> None:
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
