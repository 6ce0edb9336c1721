"""
How every reactor of this package handles readiness events, against the real kernel:
cases in which a reactor that trusted each event would lose data, report the wrong
descriptor, or spin.
"""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import tty
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("for the reactors of POSIX systems", allow_module_level=True)

from twisted.internet.error import (
    ConnectionDone,
    ConnectionLost,
    ReactorAlreadyRunning,
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
from twisted.internet.protocol import DatagramProtocol
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.support import (
    A_FEW,
    DEADLINE,
    FORKING,
    Output,
    Recorder,
    RecorderFactory,
    Served,
    Watcher,
    connect,
    read_all,
    reset,
    run_program,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.kqreactor import KQueueReactor


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
        # Over a quarter of Linux's send buffer, and less than all of it: see
        # unix_writable() in the kernel.  Others have a smaller one.
        sent = transport.socket.send(bytes(100_000))
        transport.write(b"x")
        settle(reactor)
        read_all(reactor, client, sent + 1)


def test_unix_datagram_writer(reactor: EngineReactor) -> None:
    """A UNIX datagram socket gets no signal when its peer's queue drains."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        try:
            while True:
                one.send(bytes(1000))
        except BlockingIOError:
            pass
        except OSError as error:
            # BSD and macOS say ENOBUFS, and hold it to be writable nevertheless.
            pytest.skip(f"a full queue is no reason to wait here: {error}")
        watcher = Watcher(reactor, one.fileno())
        reactor.addWriter(watcher)
        settle(reactor)
        assert watcher.writes == 0
        with contextlib.suppress(BlockingIOError):
            while True:
                other.recv(2000)
        spin(reactor, lambda: watcher.writes)
        reactor.removeWriter(watcher)


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


def test_unwatchable_descriptor_is_refused_at_once(reactor: EngineReactor) -> None:
    one, other = socket.socketpair()
    number = one.fileno()
    one.close()
    other.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reactor.addReader(Watcher(reactor, number))
    with pytest.raises(ValueError, match="no descriptor to watch"):
        reactor.addWriter(Watcher(reactor, -1))


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
    reset(client)
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
    """A reader that does nothing about a hang-up is disconnected, as epoll would do."""
    read_end, write_end = os.pipe()
    watcher = Watcher(reactor, read_end)
    reactor.addReader(watcher)
    settle(reactor)
    os.close(write_end)
    spin(reactor, lambda: watcher.lost)
    assert 1 < watcher.reads <= A_FEW
    assert watcher.lost[0].check(ConnectionDone)
    os.close(read_end)


class RefusedSocket(Watcher):
    """
    A reader on a datagram socket whose peer refuses: the kernel reports an error,
    which the read takes away.

    :ivar refusals: how many reads met an error.
    """

    def __init__(self, reactor: EngineReactor, peer: Any) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.connect(peer)
        super().__init__(reactor, self.socket.fileno())
        self.refusals = 0
        self.data = b""
        self.on_refusal: Callable[[], Any] = lambda: None
        self.on_read = self.read
        reactor.addReader(self)

    def read(self) -> Any:
        try:
            self.data = self.socket.recv(100)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            self.refusals += 1
            self.on_refusal()


class RefusedPort(DatagramProtocol):
    """The same, as a port of the reactor's."""

    def __init__(self, reactor: EngineReactor, peer: Any) -> None:
        self.refusals = 0
        self.data = b""
        self.lost: list[object] = []
        self.on_refusal: Callable[[], Any] = lambda: None
        port = reactor.listenUDP(0, self, interface="127.0.0.1")
        self.socket = port.socket
        port.connect(*peer)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.data = datagram

    def connectionRefused(self) -> None:
        self.refusals += 1
        self.on_refusal()

    def stopProtocol(self) -> None:
        self.lost.append(None)


@pytest.fixture(params=[RefusedSocket, RefusedPort])
def refused(request: Any, reactor: EngineReactor, peer: socket.socket) -> Iterator[Any]:
    """Something that reads datagrams, whose peer has just closed."""
    it = request.param(reactor, peer.getsockname())
    peer.close()
    yield it
    it.socket.close()


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A datagram socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(DEADLINE)
        yield peer


def test_an_error_that_a_read_clears_is_no_hangup(
    reactor: EngineReactor, refused: Any, peer: socket.socket
) -> None:
    """
    Each is reported; then the peer is back, and the socket is as good as ever.
    """
    for times in range(1, 2 * A_FEW):
        refused.socket.send(b"anybody there?")
        spin(reactor, lambda: refused.refusals == times)
        settle(reactor)
    assert not refused.lost
    address = refused.socket.getpeername()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
        back.settimeout(DEADLINE)
        back.bind(address)
        refused.socket.send(b"and now?")
        question, sender = back.recvfrom(100)
        back.sendto(b"yes", sender)
        spin(reactor, lambda: refused.data == b"yes")
    assert question == b"and now?"


def test_errors_between_the_passes(reactor: EngineReactor, refused: Any) -> None:
    """
    Each pass reports an error, the read clears it, and the application causes the next
    one before the next pass.
    """
    for times in range(1, 3 * A_FEW):
        refused.socket.send(b"anybody there?")
        spin(reactor, lambda: refused.refusals == times or refused.lost)
        assert not refused.lost


def test_errors_in_each_pass(reactor: EngineReactor, refused: Any) -> None:
    """
    A datagram that is sent again as soon as it was refused is refused before the
    next pass: each pass reports an error, and each time it is another one.
    """
    most = 5 if isinstance(refused, RefusedSocket) else 100

    def send_again() -> None:
        if refused.refusals < most:
            refused.socket.send(b"again")

    refused.on_refusal = send_again
    refused.socket.send(b"anybody there?")
    spin(reactor, lambda: refused.refusals == most)
    settle(reactor)
    assert not refused.lost


def linux_option(reactor: EngineReactor) -> int:
    """The number of IP_RECVERR."""
    if isinstance(reactor, KQueueReactor):
        pytest.skip("no system with a kqueue has IP_RECVERR")
    return 11


def test_an_error_that_no_read_clears(
    reactor: EngineReactor, peer: socket.socket
) -> None:
    """What waits in the error queue (ip(7)) is reported until it is read from there."""
    ip_recverr = linux_option(reactor)
    watcher = RefusedSocket(reactor, peer.getsockname())
    peer.close()
    with watcher.socket:
        watcher.socket.setsockopt(socket.IPPROTO_IP, ip_recverr, 1)
        watcher.socket.send(b"anybody there?")
        spin(reactor, lambda: watcher.lost)
    assert watcher.reads <= A_FEW


def test_an_error_queue_that_a_datagram_port_does_not_read(
    reactor: EngineReactor, peer: socket.socket
) -> None:
    """A port that is not connected gets no refusal by a read."""
    ip_recverr = linux_option(reactor)
    address = peer.getsockname()
    peer.close()
    stopped: list[object] = []
    protocol = DatagramProtocol()
    protocol.stopProtocol = lambda: stopped.append(None)  # type: ignore[method-assign]
    port: Any = reactor.listenUDP(0, protocol, interface="127.0.0.1")
    port.socket.setsockopt(socket.IPPROTO_IP, ip_recverr, 1)
    port.write(b"anybody there?", address)
    spin(reactor, lambda: stopped)


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


def test_regular_files_as_standard_io(reactor_class: Any, tmp_path: Any) -> None:
    """Files have no readiness: they are always ready."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"x" * 100_000)
    with source.open("rb") as stdin, target.open("wb") as stdout:
        code = f"""
            from {reactor_class.__module__} import install
            install()
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
    if not hasattr(os, "pidfd_open"):
        pytest.skip("for Linux only")
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


@pytest.mark.processes
def test_worker_processes_share_a_port(reactor_class: Any) -> None:
    """Three forked workers all accept from one listening socket."""
    output = run_program(
        """
        import os, socket
        install()
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
        """,
        reactor_class=reactor_class,
    )
    assert output == "all\n"


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
        # Before the child starts: the socket does not block, so its read would fail.
        client.sendall(b"hello\n")
        reactor.spawnProcess(
            child,
            "/bin/sh",
            ["sh", "-c", "read line; echo child got $line"],
            childFDs={0: number, 1: number},
        )

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


def highest_descriptor() -> int:
    """Of those that are open.  Not every system has a folder of them."""
    for number in range(4096, -1, -1):
        with contextlib.suppress(OSError):
            os.fstat(number)
            return number
    raise AssertionError("not even standard input is open")


def test_too_many_open_files(served: Served) -> None:
    """EMFILE on accept: the others are served, and so is the newcomer, later."""
    reactor = served.reactor
    client, connection = served.connect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = socket.socket()
    late.settimeout(DEADLINE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1, hard))
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


@pytest.mark.processes
@pytest.mark.parametrize(
    "child",
    [
        pytest.param("os.execlp('true', 'true')", id="execs"),
        pytest.param("os._exit(0)", id="exits"),
        pytest.param("reactor.disconnectAll(); reactor.removeAll()", id="stops"),
        pytest.param(
            "reactor.iterate(0); reactor.iterate(0); reactor.disconnectAll()",
            id="iterates and stops",
        ),
        pytest.param("reactor.beforeDaemonize()", id="closes"),
    ],
)
def test_forked_child_leaves_the_parent_unharmed(
    reactor_class: Any, child: str
) -> None:
    """The kernel is told about what parent and child share."""
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
""",
        reactor_class=reactor_class,
    )
    assert output == "heard\n"


@pytest.mark.processes
def test_forked_child_runs_the_reactor(reactor_class: Any) -> None:
    """Both with what the child has inherited, and with what it opens."""
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
    assert thread.outcome == other.outcome == [None], thread.outcome
    assert events() > 0
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
heard()
print("heard")
""",
        reactor_class=reactor_class,
    )
    assert output == "heard\n"


@pytest.mark.processes
def test_fork_from_another_thread(reactor_class: Any) -> None:
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
""",
        reactor_class=reactor_class,
    )
    assert output == "heard\n"


def test_daemonized_after_it_has_run(reactor_class: Any) -> None:
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
""",
        reactor_class=reactor_class,
    )
    assert output == "heard\n"


class _Measured:
    """A poller that counts, as synapse's wrapper does to measure the ticks."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._poller.poll(*arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux has")
@pytest.mark.parametrize("started", [False, True])
def test_twisteds_class_and_the_measurement_of_ticks(
    started: bool, make_reactor: Callable[[], EngineReactor]
) -> None:
    """
    Code that measures the ticks of Twisted's poll and epoll reactors asks for the
    class, and replaces what the reactor sleeps in.
    """
    from twisted.internet.epollreactor import EPollReactor
    from twisted.internet.pollreactor import PollReactor

    reactor: Any = make_reactor()
    if isinstance(reactor, KQueueReactor):
        pytest.skip("Twisted's kqueue reactor is not measured either")
    assert issubclass(type(reactor), PollReactor | EPollReactor)
    if started:
        reactor.iterate(0)
    reactor._poller = measured = _Measured(reactor._poller)
    served = Served(reactor)
    client, connection = served.connect()
    for turn in range(2):
        before, calls = reactor.statistics()["waits"], measured.calls
        client.sendall(b"hello")
        spin(reactor, lambda: connection.data)
        reactor.doPoll(0)
        assert measured.calls - calls == reactor.statistics()["waits"] - before > 1
        assert connection.data == b"hello"
        connection.data = b""
        if not turn:
            # It opens again what it sleeps in.
            reactor.beforeDaemonize()
    served.close()
