"""
The traps of realtime-signal I/O, each against the real kernel: what would be
lost, wrong or endless if the reactor believed the signals.
"""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import tty
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("realtime signals exist on Linux only", allow_module_level=True)

from twisted.internet import defer
from twisted.internet.error import (
    ConnectionDone,
    ConnectionFdescWentAway,
    ConnectionLost,
    ReactorAlreadyRunning,
    ReactorNotRestartable,
)
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IReactorDaemonize,
    IReactorFDSet,
    IReactorMulticast,
    IReactorProcess,
    IReactorSocket,
    IReactorTCP,
    IReactorThreads,
    IReactorTime,
    IReactorUDP,
    IReactorUNIX,
    IReactorUNIXDatagram,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.support import (
    DEADLINE,
    ECHO,
    FORKING,
    Recorder,
    RecorderFactory,
    Served,
    Watcher,
    blocked_signals,
    connect,
    dispose,
    read_all,
    run_program,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: close() sends a reset."""


# What it provides


@pytest.mark.parametrize(
    "interface",
    [
        IReactorDaemonize,
        IReactorFDSet,
        IReactorMulticast,
        IReactorProcess,
        IReactorSocket,
        IReactorTCP,
        IReactorThreads,
        IReactorTime,
        IReactorUDP,
        IReactorUNIX,
        IReactorUNIXDatagram,
    ],
)
def test_provides(reactor: EngineReactor, interface: Any) -> None:
    assert verifyObject(interface, reactor)


# An event is an edge


def test_data_that_waits_before_arming(reactor: EngineReactor) -> None:
    """Data that came before the descriptor was armed gives no signal."""
    served = Served(reactor)
    with connect(served.port) as client:
        client.sendall(b"early")
        spin(reactor, lambda: served.factory.connections)
        spin(reactor, lambda: served.factory.connections[0].data == b"early")


def test_interest_removed_and_added_again(served: Served) -> None:
    """The edge comes while nobody reads; it does not come again."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    client.sendall(b"while paused")
    settle(served.reactor)
    assert connection.data == b""
    connection.transport.resumeProducing()
    spin(served.reactor, lambda: connection.data == b"while paused")


def test_reading_paused_while_writing_goes_on(served: Served) -> None:
    """The registration lives on for the writer, and its read edge is lost."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    size = 8 * 1024 * 1024
    connection.transport.write(bytes(size))
    settle(served.reactor)
    client.sendall(b"while paused")
    settle(served.reactor)
    connection.transport.resumeProducing()
    spin(served.reactor, lambda: connection.data == b"while paused")
    read_all(served.reactor, client, size)


def test_full_buffer_then_room(served: Served) -> None:
    """POLL_OUT comes after a full buffer; much data arrives whole."""
    client, connection = served.connect()
    size = 16 * 1024 * 1024
    connection.transport.write(bytes(size))
    settle(served.reactor)
    assert connection.transport in served.reactor.getWriters()
    read_all(served.reactor, client, size)
    spin(served.reactor, lambda: not served.reactor.getWriters())


def test_unix_stream_writer(reactor: EngineReactor, tmp_path: Any) -> None:
    """
    poll(2) on a full UNIX stream does not ask the kernel for POLL_OUT: found
    not writable is not armed.
    """
    factory = RecorderFactory()
    path = str(tmp_path / "socket")
    reactor.listenUNIX(path, factory)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        spin(reactor, lambda: factory.connections)
        size = 16 * 1024 * 1024
        factory.connections[0].transport.write(bytes(size))
        settle(reactor)
        read_all(reactor, client, size)


def test_unix_stream_half_full(reactor: EngineReactor, tmp_path: Any) -> None:
    """No write met a full buffer, but poll finds the socket not writable."""
    factory = RecorderFactory()
    path = str(tmp_path / "socket")
    reactor.listenUNIX(path, factory)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        spin(reactor, lambda: factory.connections)
        transport = factory.connections[0].transport
        # Over a quarter of the send buffer, and less than all of it: see
        # unix_writable() in the kernel.
        transport.socket.send(bytes(100_000))
        transport.write(b"x")
        settle(reactor)
        read_all(reactor, client, 100_001)


def test_unix_datagram_writer(reactor: EngineReactor) -> None:
    """A UNIX datagram socket gets no signal when its peer's queue drains."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(bytes(1000))
        watcher = Watcher(reactor, one.fileno())
        reactor.addWriter(watcher)
        settle(reactor)
        assert watcher.writes == 0
        with contextlib.suppress(BlockingIOError):
            while True:
                other.recv(2000)
        spin(reactor, lambda: watcher.writes)
        reactor.removeWriter(watcher)


def test_many_sends_are_one_event(served: Served) -> None:
    """Signals are not merged by the kernel: each small send queues one."""
    client, connection = served.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = served.reactor.statistics()["signals"]
    for _ in range(50):
        client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 50)
    assert served.reactor.statistics()["signals"] > before + 1


# An event may be stale, and a number may be another's


def test_number_reused_within_a_batch(served: Served) -> None:
    """
    Two connections have data in the same batch.  The first handler closes the
    second connection, and registers somebody else with its number.
    """
    reactor = served.reactor
    first_client, first = served.connect()
    second_client, second = served.connect()
    one, other = socket.socketpair()
    stranger = Watcher(reactor, -1)

    def take_over(victim: Any, data: bytes) -> None:
        number = victim.transport.fileno()
        # What abortConnection() would do in the next pass.
        victim.transport.connectionLost(Failure(ConnectionLost()))
        os.dup2(one.fileno(), number)
        stranger.descriptor = number
        reactor.addReader(stranger)

    with one, other:
        # Whoever is called first takes the other one's number.
        for connection, victim in ((first, second), (second, first)):

            def dataReceived(data: bytes, victim: Any = victim) -> None:
                if stranger.descriptor == -1:
                    victim.dataReceived = lambda data: pytest.fail("not for you")
                    take_over(victim, data)

            connection.dataReceived = dataReceived
        first_client.sendall(b"1")
        second_client.sendall(b"2")
        spin(reactor, lambda: stranger.descriptor != -1)
        settle(reactor)
        assert stranger.reads == 0
        other.send(b"now")
        spin(reactor, lambda: stranger.reads)
        reactor.removeReader(stranger)
        os.close(stranger.descriptor)


def test_new_connection_with_a_reused_number(served: Served) -> None:
    """Connections that follow each other on one number all get their data."""
    numbers = set()
    for turn in range(50):
        client, connection = served.connect()
        numbers.add(connection.transport.fileno())
        client.sendall(b"%d" % turn)
        spin(served.reactor, lambda: connection.data)
        assert connection.data == b"%d" % turn
        client.close()
        spin(served.reactor, lambda: connection.lost)
    assert len(numbers) < 50


def test_closed_descriptor_still_registered(reactor: EngineReactor) -> None:
    """It is disconnected, once, and does not make the reactor spin."""
    one, other = socket.socketpair()
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    reactor.iterate(0)
    one.close()
    other.close()
    spin(reactor, lambda: watcher.lost)
    assert watcher.lost[0].check(ConnectionFdescWentAway)
    assert watcher not in reactor.getReaders()


def test_unwatchable_descriptor_is_refused_at_once(reactor: EngineReactor) -> None:
    one, other = socket.socketpair()
    number = one.fileno()
    one.close()
    other.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reactor.addReader(Watcher(reactor, number))
    with pytest.raises(ValueError, match="no descriptor to watch"):
        reactor.addWriter(Watcher(reactor, -1))


# How a connection ends


def test_end_riding_on_data(served: Served) -> None:
    """The end of a stream is not marked: it looks like data, 200 times of 200."""
    for turn in range(200):
        client, connection = served.connect()
        client.sendall(b"%d" % turn)
        client.close()
        spin(served.reactor, lambda: connection.lost)
        assert connection.data == b"%d" % turn
        assert connection.lost[0].check(ConnectionDone)


def test_reset(served: Served) -> None:
    """A reset arrives as POLLERR without POLLIN; it is no clean close."""
    client, connection = served.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    spin(served.reactor, lambda: connection.lost)
    assert connection.lost[0].check(ConnectionLost)


def test_half_close(reactor: EngineReactor) -> None:
    """The peer has sent all, and still reads."""

    @implementer(IHalfCloseableProtocol)
    class HalfCloseable(Recorder):
        ended = 0

        def readConnectionLost(self) -> None:
            self.ended += 1
            transport: Any = self.transport
            transport.write(b"after the end")
            transport.loseConnection()

        def writeConnectionLost(self) -> None:
            """Not in this test."""

    served = Served(reactor, HalfCloseable)
    client, connection = served.connect()
    client.sendall(b"all")
    client.shutdown(socket.SHUT_WR)
    spin(reactor, lambda: connection.lost)
    assert connection.data == b"all"
    assert connection.ended == 1
    assert client.recv(100) == b"after the end"
    served.close()


def test_urgent_data(served: Served) -> None:
    """Out-of-band data is no input, and reads stop short at its mark."""
    client, connection = served.connect()
    for turn in range(1, 11):
        client.sendall(b"a")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"b")
        spin(served.reactor, lambda: len(connection.data) == 2 * turn)
    client.close()
    spin(served.reactor, lambda: connection.lost)
    assert connection.data == b"ab" * 10
    assert connection.lost[0].check(ConnectionDone)


def test_urgent_data_alone(served: Served) -> None:
    """It must not be mistaken for input, nor make the reactor spin."""
    client, connection = served.connect()
    client.send(b"!", socket.MSG_OOB)
    settle(served.reactor)
    before = served.reactor.statistics()["waits"]
    served.reactor.iterate(0.05)
    assert served.reactor.statistics()["waits"] == before + 1
    assert connection.data == b""
    client.sendall(b"data")
    spin(served.reactor, lambda: connection.data == b"data")


def test_pipe_whose_reader_left(reactor: EngineReactor) -> None:
    """The write end of a pipe tells its watcher, who waits as a reader."""
    read_end, write_end = os.pipe()
    watcher = Watcher(reactor, write_end)
    watcher.on_read = lambda: CONNECTION_DONE
    reactor.addReader(watcher)
    settle(reactor)
    assert watcher.reads == 0
    os.close(read_end)
    spin(reactor, lambda: watcher.lost)
    os.close(write_end)


def test_hangup_that_is_ignored_does_not_spin(reactor: EngineReactor) -> None:
    """Who does nothing about a hang-up is disconnected, as epoll would do."""
    read_end, write_end = os.pipe()
    watcher = Watcher(reactor, read_end)
    reactor.addReader(watcher)
    settle(reactor)
    os.close(write_end)
    spin(reactor, lambda: watcher.lost)
    assert watcher.reads == 1
    assert watcher.lost[0].check(ConnectionDone)
    os.close(read_end)


# Terminals and files without signals


@pytest.mark.parametrize("closed", ["master", "slave"])
def test_terminal_hangup(reactor: EngineReactor, closed: str) -> None:
    """A terminal signals data, but not that its other end has gone."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    watched, other = (slave, master) if closed == "master" else (master, slave)
    os.set_blocking(watched, False)
    watcher = Watcher(reactor, watched)
    got: list[bytes] = []

    def read() -> Any:
        try:
            got.append(os.read(watched, 100))
        except BlockingIOError:
            return None
        except OSError as error:
            return error
        return None if got[-1] else CONNECTION_DONE

    watcher.on_read = read
    reactor.addReader(watcher)
    settle(reactor)
    os.write(other, b"data")
    spin(reactor, lambda: got)
    settle(reactor)
    os.close(other)
    spin(reactor, lambda: watcher.lost)
    assert got[0] == b"data"
    os.close(watched)


def test_regular_files_as_standard_io(tmp_path: Any) -> None:
    """Files have no readiness: they are always ready."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"x" * 100_000)
    with source.open("rb") as stdin, target.open("wb") as stdout:
        code = """
            from twisted_rtsig import rtsigreactor
            rtsigreactor.install()
            from twisted.internet import interfaces, protocol, reactor, stdio
            from zope.interface import implementer

            @implementer(interfaces.IHalfCloseableProtocol)
            class Copy(protocol.Protocol):
                def dataReceived(self, data):
                    self.transport.write(data.upper())
                def readConnectionLost(self):
                    self.transport.loseConnection()
                def writeConnectionLost(self):
                    pass
                def connectionLost(self, reason):
                    reactor.stop()

            stdio.StandardIO(Copy())
            reactor.run()
        """
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=stdin,
            stdout=stdout,
            timeout=60,
            check=True,
        )
    assert target.read_bytes() == b"X" * 100_000


def test_eventfd(reactor: EngineReactor) -> None:
    """An eventfd has no fasync support."""
    libc_eventfd = getattr(os, "eventfd", None)
    if libc_eventfd is None:
        pytest.skip("Python 3.10 or a C library without eventfd")
    descriptor = libc_eventfd(0, os.EFD_NONBLOCK)
    watcher = Watcher(reactor, descriptor)
    watcher.on_read = lambda: os.eventfd_read(descriptor) and None
    reactor.addReader(watcher)
    settle(reactor)
    assert watcher.reads == 0
    os.eventfd_write(descriptor, 1)
    spin(reactor, lambda: watcher.reads == 1)
    settle(reactor)
    assert watcher.reads == 1
    reactor.removeReader(watcher)
    os.close(descriptor)


def test_pidfd(reactor: EngineReactor) -> None:
    """A pidfd tells of the end of a process, by poll alone."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        os.close(write_end)
        os.waitpid(pid, 0)
        pytest.skip(f"no pidfd_open(2) here: {error}")
    watcher = Watcher(reactor, descriptor)
    watcher.on_read = lambda: CONNECTION_DONE
    reactor.addReader(watcher)
    settle(reactor)
    assert watcher.reads == 0
    os.close(write_end)
    spin(reactor, lambda: watcher.lost)
    os.waitpid(pid, 0)
    os.close(descriptor)


def test_threads_wake_the_reactor(reactor: EngineReactor) -> None:
    """callFromThread interrupts a sleep without a limit."""
    done: list[int] = []
    sleeping = threading.Event()

    def call() -> None:
        sleeping.wait(DEADLINE)
        reactor.callFromThread(done.append, 1)
        reactor.callFromThread(reactor.stop)

    thread = threading.Thread(target=call)
    thread.start()
    reactor.callWhenRunning(sleeping.set)
    reactor.run(installSignalHandlers=False)
    thread.join()
    assert done == [1]


# Descriptors that others hold as well


def test_duplicated_descriptor(served: Served) -> None:
    """
    A dup shares the open file description, and with it the owner of its
    signals: watching it must not make the original deaf, nor closing it.
    """
    reactor = served.reactor
    client, connection = served.connect()
    duplicate = os.dup(connection.transport.fileno())
    watcher = Watcher(reactor, duplicate)
    reactor.addReader(watcher)
    settle(reactor)
    client.sendall(b"1")
    spin(reactor, lambda: connection.data == b"1")
    reactor.removeReader(watcher)
    os.close(duplicate)
    client.sendall(b"2")
    spin(reactor, lambda: connection.data == b"12")


def test_original_closed_and_duplicate_kept(served: Served) -> None:
    """The duplicate is heard though the number that was armed is closed."""
    reactor = served.reactor
    client, connection = served.connect()
    duplicate = os.dup(connection.transport.fileno())
    # Closes this end's number only: the description lives on.
    connection.transport._shouldShutdown = False
    watcher = Watcher(reactor, duplicate)
    watcher.on_read = lambda: os.read(duplicate, 100) and None
    connection.transport.connectionLost(Failure(ConnectionDone()))
    reactor.addReader(watcher)
    settle(reactor)
    client.sendall(b"data")
    spin(reactor, lambda: watcher.reads)
    reactor.removeReader(watcher)
    os.close(duplicate)


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


def test_accepted_connection_is_armed(served: Served) -> None:
    """Else this whole package would be a poll reactor."""
    served.connect()
    served.connect()
    assert served.reactor.statistics()["armed"] == 2


def test_idle_connections_cost_no_check(served: Served) -> None:
    """What is armed is not looked at while others work."""
    for _ in range(20):
        served.connect()
    client, connection = served.connect()
    before = served.reactor.statistics()["checks"]
    for turn in range(1, 101):
        client.sendall(b"x")
        spin(served.reactor, lambda: len(connection.data) == turn)
    # One check after each read of the busy one, none of the others.
    assert served.reactor.statistics()["checks"] - before <= 101


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


def test_worker_processes_share_a_port() -> None:
    """Three forked workers all accept from one listening socket."""
    output = run_program(
        """
        import os, socket
        from twisted_rtsig import rtsigreactor
        rtsigreactor.install()
        from twisted.internet import protocol, reactor

        class Once(protocol.Protocol):
            def connectionMade(self):
                # From now on the others must accept.  (To stop listening would
                # shut the socket down for all of them.)
                port.stopReading()
                self.transport.write(b"%d" % os.getpid())
                self.transport.loseConnection()
            def connectionLost(self, reason):
                os._exit(0)

        port = reactor.listenTCP(
            0, protocol.Factory.forProtocol(Once), interface="127.0.0.1")
        workers = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                reactor.run()
            workers.append(pid)
        answers = set()
        for _ in workers:
            with socket.create_connection(
                    port.socket.getsockname(), timeout=20) as client:
                answers.add(int(client.recv(100)))
        assert answers == set(workers), (answers, workers)
        for pid in workers:
            assert os.waitpid(pid, 0)[1] == 0
        print("all")
        """
    )
    assert output == "all\n"


# Threads


def test_made_in_one_thread_and_run_in_another() -> None:
    """Signals go to the thread that runs the reactor, not to its maker."""
    output = run_program(
        ECHO
        + """
reactor = RealtimeSignalReactor()
address = listen(reactor)
thread = in_thread(reactor.run, False)
converse(address)
signals = reactor.statistics()["signals"]
reactor.callFromThread(reactor.stop)
thread.join()
assert thread.outcome == [None], thread.outcome
print(signals > 0)
"""
    )
    assert output == "True\n"


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


def test_run_twice_at_once_is_what_twisted_says(reactor: EngineReactor) -> None:
    raised: list[BaseException] = []

    def again() -> None:
        try:
            reactor.run()
        except BaseException as error:
            raised.append(error)
        reactor.stop()

    reactor.callWhenRunning(again)
    reactor.run(installSignalHandlers=False)
    assert isinstance(raised[0], ReactorAlreadyRunning)


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
reactor = RealtimeSignalReactor()
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
    descriptors = set(os.listdir("/proc/self/fd"))
    during: list[int] = []
    reactor.callWhenRunning(lambda: during.append(blocked_signals()))
    reactor.callWhenRunning(reactor.stop)
    reactor.run(installSignalHandlers=False)
    assert during[0] != mask
    assert blocked_signals() == mask
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_is_left_after_a_run_that_is_refused(reactor: EngineReactor) -> None:
    reactor.callWhenRunning(reactor.stop)
    reactor.run(installSignalHandlers=False)
    with pytest.raises(ReactorNotRestartable):
        reactor.run(installSignalHandlers=False)
    assert blocked_signals() == 0


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


class Output(ProcessProtocol):
    """Collects what a child prints."""

    def __init__(self) -> None:
        self.output = b""
        self.ended = False

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, reason: Failure) -> None:
        self.ended = True


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


def test_descriptor_handed_to_a_child(served: Served) -> None:
    """
    A child gets the connection as its standard input and output, inetd style,
    and when it has gone the parent still hears of it.
    """
    reactor = served.reactor
    client, connection = served.connect()
    number = connection.transport.fileno()
    connection.transport.pauseProducing()
    child = Output()
    ended: list[bytes] = []

    def start() -> None:
        reactor.spawnProcess(
            child,
            "/bin/sh",
            ["sh", "-c", "read line; echo child got $line"],
            childFDs={0: number, 1: number},
        )
        client.sendall(b"hello\n")

    def end(reason: Failure) -> None:
        ended.append(client.recv(100))
        connection.transport.resumeProducing()
        client.sendall(b"parent")

    child.processEnded = end  # type: ignore[method-assign]

    def received(data: bytes) -> None:
        connection.data += data
        reactor.stop()

    connection.dataReceived = received
    reactor.callWhenRunning(start)
    reactor.callLater(DEADLINE, reactor.crash)
    reactor.run()
    assert ended == [b"child got hello\n"]
    assert connection.data == b"parent"


@pytest.mark.parametrize(
    "child",
    [
        pytest.param("os.execv('/bin/true', ['true'])", id="execs"),
        pytest.param("os._exit(0)", id="exits"),
        pytest.param("reactor.disconnectAll(); reactor.removeAll()", id="stops"),
        pytest.param(
            "reactor.iterate(0); reactor.iterate(0); reactor.disconnectAll()",
            id="iterates and stops",
        ),
        pytest.param("reactor.beforeDaemonize()", id="closes"),
    ],
)
def test_forked_child_leaves_the_parent_unharmed(child: str) -> None:
    """Ownership of signals lives on what parent and child share."""
    output = run_program(
        FORKING
        + f"""
pid = os.fork()
if pid == 0:
    # disconnectAll() shuts the connection down for both; nobody wants that.
    socket.socket.shutdown = lambda *arguments: None
    {child}
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
heard()
print("heard")
"""
    )
    assert output == "heard\n"


def test_forked_child_runs_the_reactor() -> None:
    """What the child inherited is polled, what it opens is armed."""
    output = run_program(
        FORKING
        + """
pid = os.fork()
if pid == 0:
    own = listen(reactor)
    thread = in_thread(talk, client)
    other = in_thread(converse, own)
    while thread.is_alive() or other.is_alive():
        reactor.iterate(0.05)
        armed = reactor.statistics()["armed"]
        assert armed <= 1, armed
    assert thread.outcome == other.outcome == [None], thread.outcome
    assert reactor.statistics()["signals"] > 0
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
heard()
print("heard")
"""
    )
    assert output == "heard\n"


def test_fork_from_another_thread() -> None:
    """The child has only the thread that forked, and its reactor works there."""
    output = run_program(
        FORKING
        + """
def fork():
    pid = os.fork()
    if pid == 0:
        thread = in_thread(talk, client)
        while thread.is_alive():
            reactor.iterate(0.05)
        os._exit(thread.outcome != [None])
    return os.waitpid(pid, 0)[1]
thread = in_thread(fork)
thread.join()
assert thread.outcome == [0], thread.outcome
heard()
print("heard")
"""
    )
    assert output == "heard\n"


def test_daemonized_after_it_has_run() -> None:
    """Between the hooks the parent hands everything to the child, and exits."""
    output = run_program(
        FORKING
        + """
reactor.beforeDaemonize()
ready, go = os.pipe()
if os.fork():
    os.close(go)
    # Do not exit before the child is through, so that its output is ours.
    os.read(ready, 1)
    os._exit(0)
reactor.afterDaemonize()
heard()
print("heard", flush=True)
"""
    )
    assert output == "heard\n"


# Limits


def test_too_many_open_files(served: Served) -> None:
    """EMFILE on accept: the others are served, and so is the newcomer, later."""
    reactor = served.reactor
    client, connection = served.connect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = socket.socket()
    late.settimeout(DEADLINE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard)
    )
    hoard = []
    try:
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        late.connect(("127.0.0.1", served.port.getHost().port))
        settle(reactor)
        client.sendall(b"served")
        spin(reactor, lambda: connection.data == b"served")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in hoard:
            os.close(each)
    late.close()
    served.connect()


OVERFLOW = (
    ECHO
    + """
import resource
resource.setrlimit(resource.RLIMIT_SIGPENDING, (4, 4))
reactor = RealtimeSignalReactor()
address = listen(reactor)
clients = [socket.create_connection(address, timeout=20) for _ in range(50)]
while reactor.statistics()["armed"] < 50:
    reactor.iterate(1)
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


def test_queue_overflow() -> None:
    """The kernel sends one SIGIO in place of what does not fit."""
    assert run_program(OVERFLOW) == "True\n"


# The choice of the signal


def test_first_free_signal() -> None:
    """What Python and what C code handle is left alone."""
    output = run_program(
        """
        import ctypes, signal
        from twisted_rtsig.rtsigreactor import RealtimeSignalReactor
        first = int(signal.SIGRTMIN)
        signal.signal(first, lambda number, frame: None)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(first + 1, ctypes.cast(libc.getpid, ctypes.c_void_p))
        signal.signal(first + 2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [first + 3])
        one = RealtimeSignalReactor()
        one.iterate(0)
        other = RealtimeSignalReactor()
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
        from twisted_rtsig.rtsigreactor import RealtimeSignalReactor
        reactor = RealtimeSignalReactor()
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
        from twisted_rtsig.rtsigreactor import RealtimeSignalReactor
        for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
            signal.signal(number, signal.SIG_IGN)
        try:
            RealtimeSignalReactor()
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
        from twisted_rtsig import rtsigreactor
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
            rtsigreactor.RealtimeSignalReactor(40)
        except UnsupportedReactorError as error:
            os.write(1, str(error).encode())
        """
    )
    assert output.startswith("signalfd(2) gives no descriptor (Too many open files)")
