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
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("for the reactors of POSIX systems", allow_module_level=True)

from twisted.internet import interfaces
from twisted.internet.error import (
    ConnectionDone,
    ConnectionLost,
    ReactorAlreadyRunning,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import DatagramProtocol
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.support import (
    A_FEW,
    DEADLINE,
    Output,
    Recorder,
    Served,
    Watcher,
    connect,
    read_all,
    reset,
    run_forking,
    run_program,
    settle,
    spin,
    unix_connection,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.kqreactor import KQueueReactor


@pytest.mark.parametrize(
    "interface",
    [
        *("Daemonize", "FDSet", "Multicast", "Process", "Socket", "TCP"),
        *("Threads", "Time", "UDP", "UNIX", "UNIXDatagram"),
    ],
)
def test_the_reactor_provides_an_interface(
    reactor: EngineReactor, interface: str
) -> None:
    assert verifyObject(getattr(interfaces, f"IReactor{interface}"), reactor)


def test_data_before_the_arming_is_received(reactor: EngineReactor) -> None:
    """Data that came before the descriptor was armed causes no signal."""
    served = Served(reactor)
    with connect(served.port) as client:
        client.sendall(b"early")
        spin(reactor, lambda: served.factory.connections)
        spin(reactor, lambda: served.factory.connections[0].data == b"early")


def test_data_during_a_pause_is_received_after_it(served: Served) -> None:
    """The edge comes while reading is paused, and does not come again."""
    client, connection = served.connect()
    connection.transport.pauseProducing()
    settle(served.reactor)
    client.sendall(b"while paused")
    settle(served.reactor)
    assert connection.data == b""
    connection.transport.resumeProducing()
    spin(served.reactor, lambda: connection.data == b"while paused")


def test_reading_is_paused_while_writing_goes_on(served: Served) -> None:
    """The registration stays for the writer, and its read edge is lost."""
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


def test_a_full_buffer_is_written_on_when_it_has_room(served: Served) -> None:
    """POLL_OUT comes after the buffer was full.  All data arrives."""
    client, connection = served.connect()
    size = 16 * 1024 * 1024
    connection.transport.write(bytes(size))
    settle(served.reactor)
    assert connection.transport in served.reactor.getWriters()
    read_all(served.reactor, client, size)
    spin(served.reactor, lambda: not served.reactor.getWriters())


def test_a_full_unix_stream_is_written_on_when_it_has_room(
    reactor: EngineReactor, tmp_path: Path
) -> None:
    """
    poll(2) on a full UNIX stream does not make the kernel send POLL_OUT.  A stream that
    poll(2) finds not writable is not armed by that.
    """
    with unix_connection(reactor, tmp_path) as (client, connection):
        size = 16 * 1024 * 1024
        connection.transport.write(bytes(size))
        settle(reactor)
        read_all(reactor, client, size)


def test_a_half_full_unix_stream_is_written_on_when_it_has_room(
    reactor: EngineReactor, tmp_path: Path
) -> None:
    """No write met a full buffer, but poll(2) finds the socket not writable."""
    with unix_connection(reactor, tmp_path) as (client, connection):
        transport = connection.transport
        # More than a quarter of Linux's send buffer, and less than all of it: see
        # unix_writable() in the kernel.  Other systems have a smaller buffer.
        sent = transport.socket.send(bytes(100_000))
        transport.write(b"x")
        settle(reactor)
        read_all(reactor, client, sent + 1)


def test_a_unix_datagram_writer_waits_for_room(reactor: EngineReactor) -> None:
    """A UNIX datagram socket causes no signal when its peer's queue drains."""
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
            # BSD and macOS fail with ENOBUFS, and report the socket as writable
            # nevertheless.
            pytest.skip(f"a socket with a full queue is writable here: {error}")
        watcher = Watcher(reactor, one.fileno())
        reactor.addWriter(watcher)
        settle(reactor)
        assert watcher.writes == 0
        with contextlib.suppress(BlockingIOError):
            while True:
                other.recv(2000)
        spin(reactor, lambda: watcher.writes)
        reactor.removeWriter(watcher)


def test_a_descriptor_is_reused_within_a_batch(served: Served) -> None:
    """
    Two connections have data in the same batch.  The first handler closes the second
    connection, and registers a new watcher on its descriptor.
    """
    reactor = served.reactor
    first_client, first = served.connect()
    second_client, second = served.connect()
    one, other = socket.socketpair()
    newcomer = Watcher(reactor, -1)

    def take_over(victim: Any, data: bytes) -> None:
        number = victim.transport.fileno()
        # abortConnection() would do this in the next pass.
        victim.transport.connectionLost(Failure(ConnectionLost()))
        os.dup2(one.fileno(), number)
        newcomer.descriptor = number
        reactor.addReader(newcomer)

    with one, other:
        # The connection that is called first takes the other one's descriptor.
        for connection, victim in ((first, second), (second, first)):

            def dataReceived(data: bytes, victim: Any = victim) -> None:
                if newcomer.descriptor == -1:
                    victim.dataReceived = lambda data: pytest.fail("not for you")
                    take_over(victim, data)

            connection.dataReceived = dataReceived
        first_client.sendall(b"1")
        second_client.sendall(b"2")
        spin(reactor, lambda: newcomer.descriptor != -1)
        settle(reactor)
        assert newcomer.reads == 0
        other.send(b"now")
        spin(reactor, lambda: newcomer.reads)
        reactor.removeReader(newcomer)
        os.close(newcomer.descriptor)


def test_connections_that_reuse_a_descriptor_get_their_data(served: Served) -> None:
    """50 connections follow each other on a few descriptors."""
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


def test_a_descriptor_that_cannot_be_watched_is_refused_at_once(
    reactor: EngineReactor,
) -> None:
    one, other = socket.socketpair()
    number = one.fileno()
    one.close()
    other.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reactor.addReader(Watcher(reactor, number))
    with pytest.raises(ValueError, match="no descriptor to watch"):
        reactor.addWriter(Watcher(reactor, -1))


def test_a_reactor_that_gets_no_descriptor_says_what_to_do(
    reactor_class: type[EngineReactor],
) -> None:
    output = run_program(
        """
        import os, resource
        from twisted_rtsig.notifiers import UnsupportedReactorError

        one_more = os.dup(0)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in range(one_more, one_more + 10):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                Reactor()
            except UnsupportedReactorError as error:
                print("ulimit -n" in str(error))
            else:
                break
        """,
        reactor_class=reactor_class,
    )
    assert set(output.splitlines()) == {"True"}


def test_the_end_of_a_stream_arrives_with_its_last_data(served: Served) -> None:
    """The event of such an end is an event of data, in 200 cases of 200."""
    for turn in range(200):
        client, connection = served.connect()
        client.sendall(b"%d" % turn)
        client.close()
        spin(served.reactor, lambda: connection.lost)
        assert connection.data == b"%d" % turn
        assert connection.lost[0].check(ConnectionDone)


def test_a_reset_is_reported_as_connection_lost(served: Served) -> None:
    """A reset arrives as POLLERR without POLLIN."""
    client, connection = served.connect()
    reset(client)
    spin(served.reactor, lambda: connection.lost)
    assert connection.lost[0].check(ConnectionLost)


def test_a_half_closed_connection_can_still_be_written_to(
    reactor: EngineReactor,
) -> None:
    """The peer has sent everything, and still reads."""

    @implementer(interfaces.IHalfCloseableProtocol)
    class HalfCloseable(Recorder):
        ended = 0

        def readConnectionLost(self) -> None:
            self.ended += 1
            transport: Any = self.transport
            transport.write(b"after the end")
            transport.loseConnection()

        def writeConnectionLost(self) -> None:
            """This test does not close the other direction."""

    served = Served(reactor, HalfCloseable)
    client, connection = served.connect()
    client.sendall(b"all")
    client.shutdown(socket.SHUT_WR)
    spin(reactor, lambda: connection.lost)
    assert connection.data == b"all"
    assert connection.ended == 1
    assert client.recv(100) == b"after the end"
    served.close()


def test_urgent_data_is_not_received(served: Served) -> None:
    """Reads stop short at the mark of out-of-band data."""
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


def test_urgent_data_alone_does_not_make_the_reactor_spin(served: Served) -> None:
    """Nor is it taken for input."""
    client, connection = served.connect()
    client.send(b"!", socket.MSG_OOB)
    settle(served.reactor)
    before = served.reactor.statistics()["waits"]
    served.reactor.iterate(0.05)
    assert served.reactor.statistics()["waits"] == before + 1
    assert connection.data == b""
    client.sendall(b"data")
    spin(served.reactor, lambda: connection.data == b"data")


def assert_reported(reactor: EngineReactor, descriptor: int, other: int) -> None:
    """Check that a descriptor is readable once the other one is closed, not before."""
    watcher = Watcher(reactor, descriptor)
    watcher.on_read = lambda: CONNECTION_DONE
    reactor.addReader(watcher)
    settle(reactor)
    assert watcher.reads == 0
    os.close(other)
    spin(reactor, lambda: watcher.lost)


def test_a_pipe_without_a_reader_is_reported(reactor: EngineReactor) -> None:
    """The watcher of the write end waits as a reader."""
    read_end, write_end = os.pipe()
    assert_reported(reactor, write_end, read_end)
    os.close(write_end)


def test_an_ignored_hangup_does_not_make_the_reactor_spin(
    reactor: EngineReactor,
) -> None:
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
    A reader of a datagram socket whose peer refuses datagrams.  The kernel reports an
    error, which the read clears.

    :ivar refusals: how many reads failed.
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
    """As :class:`RefusedSocket`, as a port of the reactor."""

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
    """A reader of datagrams whose peer has just been closed."""
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


def test_an_error_that_a_read_clears_is_not_a_hangup(
    reactor: EngineReactor, refused: Any, peer: socket.socket
) -> None:
    """Each error is reported.  When the peer is back, the socket works as before."""
    for times in range(1, 2 * A_FEW):
        refused.socket.send(b"refused")
        spin(reactor, lambda: refused.refusals == times)
        settle(reactor)
    assert not refused.lost
    address = refused.socket.getpeername()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
        back.settimeout(DEADLINE)
        back.bind(address)
        refused.socket.send(b"question")
        question, sender = back.recvfrom(100)
        back.sendto(b"answer", sender)
        spin(reactor, lambda: refused.data == b"answer")
    assert question == b"question"


def test_an_error_between_two_passes_is_not_a_hangup(
    reactor: EngineReactor, refused: Any
) -> None:
    """
    Each pass reports an error, the read clears it, and the application causes another
    one before the next pass.
    """
    for times in range(1, 3 * A_FEW):
        refused.socket.send(b"refused")
        spin(reactor, lambda: refused.refusals == times or refused.lost)
        assert not refused.lost


def test_an_error_in_each_pass_is_not_a_hangup(
    reactor: EngineReactor, refused: Any
) -> None:
    """
    A datagram that is sent again when it was refused is refused before the next pass.
    Each pass reports an error, and each time it is a new one.
    """
    most = 5 if isinstance(refused, RefusedSocket) else 100

    def send_again() -> None:
        if refused.refusals < most:
            refused.socket.send(b"again")

    refused.on_refusal = send_again
    refused.socket.send(b"refused")
    spin(reactor, lambda: refused.refusals == most)
    settle(reactor)
    assert not refused.lost


def ip_recverr_of(reactor: EngineReactor) -> int:
    """The number of IP_RECVERR, which Linux has and kqueue's systems do not."""
    if isinstance(reactor, KQueueReactor):
        pytest.skip("no system with a kqueue has IP_RECVERR")
    return 11


def test_an_error_that_no_read_clears_is_a_hangup(
    reactor: EngineReactor, peer: socket.socket
) -> None:
    """The error queue of ip(7) is reported until it is read.  A plain read keeps it."""
    ip_recverr = ip_recverr_of(reactor)
    watcher = RefusedSocket(reactor, peer.getsockname())
    peer.close()
    with watcher.socket:
        watcher.socket.setsockopt(socket.IPPROTO_IP, ip_recverr, 1)
        watcher.socket.send(b"refused")
        spin(reactor, lambda: watcher.lost)
    assert watcher.reads <= A_FEW


def test_an_error_queue_ends_a_datagram_port(
    reactor: EngineReactor, peer: socket.socket
) -> None:
    """A port does not read the queue.  If it is not connected, no read reports it."""
    ip_recverr = ip_recverr_of(reactor)
    address = peer.getsockname()
    peer.close()
    stopped: list[object] = []
    protocol = DatagramProtocol()
    protocol.stopProtocol = lambda: stopped.append(None)  # type: ignore[method-assign]
    port: Any = reactor.listenUDP(0, protocol, interface="127.0.0.1")
    port.socket.setsockopt(socket.IPPROTO_IP, ip_recverr, 1)
    port.write(b"refused", address)
    spin(reactor, lambda: stopped)


@pytest.mark.parametrize("closed", ["master", "slave"])
def test_the_hangup_of_a_terminal_is_reported(
    reactor: EngineReactor, closed: str
) -> None:
    """A terminal signals data, but does not signal that its other end was closed."""
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


def test_regular_files_are_always_ready_as_standard_io(
    reactor_class: Any, tmp_path: Any
) -> None:
    """The kernel does not report the readiness of files."""
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


def test_an_eventfd_is_watched(reactor: EngineReactor) -> None:
    """The kernel sends no signals for an eventfd: it does not support O_ASYNC."""
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


def test_a_pidfd_is_watched(reactor: EngineReactor) -> None:
    """A pidfd reports the end of a process only to poll(2)."""
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
    assert_reported(reactor, descriptor, write_end)
    os.waitpid(pid, 0)
    os.close(descriptor)


def test_threads_wake_the_reactor(reactor: EngineReactor) -> None:
    """callFromThread ends a sleep without a timeout."""
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


def test_a_duplicate_does_not_take_the_events_of_the_original(served: Served) -> None:
    """
    A dup shares the open file description, and with it the owner of its signals.  The
    original must get its events while the dup is watched, and after it was closed.
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


def test_a_duplicate_gets_events_after_the_original_was_closed(served: Served) -> None:
    """The descriptor that was armed is closed."""
    reactor = served.reactor
    client, connection = served.connect()
    duplicate = os.dup(connection.transport.fileno())
    # Close this descriptor only: the open file description stays.
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


def test_accepted_connections_are_armed(served: Served) -> None:
    """Otherwise this whole package would be a poll reactor."""
    served.connect()
    served.connect()
    assert served.reactor.statistics()["armed"] == 2


def test_idle_connections_are_not_checked(served: Served) -> None:
    """Armed connections are not checked while another one is busy."""
    for _ in range(20):
        served.connect()
    client, connection = served.connect()
    before = served.reactor.statistics()["checks"]
    for turn in range(1, 101):
        client.sendall(b"x")
        spin(served.reactor, lambda: len(connection.data) == turn)
    # The busy one is checked once after each read, and the others not at all.
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
                # From now on the other workers must accept.  (stopListening() would
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


def test_run_within_run_raises_reactor_already_running(reactor: EngineReactor) -> None:
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


def test_a_connection_that_was_handed_to_a_child_is_still_received_from(
    served: Served,
) -> None:
    """
    A child gets the connection as its standard input and output, as from inetd.  When
    it has ended, the parent still receives data.
    """
    reactor = served.reactor
    client, connection = served.connect()
    number = connection.transport.fileno()
    connection.transport.pauseProducing()
    child = Output()
    ended: list[bytes] = []

    def start() -> None:
        # Before the child starts: the socket does not block, so the child's read would
        # fail without data.
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
    """The highest open descriptor.  Not every system has a folder of descriptors."""
    for number in range(4096, -1, -1):
        with contextlib.suppress(OSError):
            os.fstat(number)
            return number
    raise AssertionError("not even standard input is open")


def test_a_connection_is_accepted_after_too_many_open_files(served: Served) -> None:
    """accept(2) fails with EMFILE.  Meanwhile the other connections are served."""
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
def test_the_parent_gets_events_after_a_forked_child(
    reactor_class: Any, child: str
) -> None:
    """The child changes state in the kernel that it shares with its parent."""
    run_forking(
        f"""
def child():
    # disconnectAll() would shut the connection down for both processes.
    socket.socket.shutdown = lambda *arguments: None
    {child}
in_child(child)
""",
        reactor_class,
    )


@pytest.mark.processes
def test_a_forked_child_runs_the_reactor(reactor_class: Any) -> None:
    """The child serves a connection that it has inherited, and its own port."""
    run_forking(
        """
def child():
    own = listen(reactor)
    thread = in_thread(talk, client)
    other = in_thread(converse, own)
    while thread.is_alive() or other.is_alive():
        reactor.iterate(0.05)
    assert thread.outcome == other.outcome == [None], thread.outcome
    assert events() > 0
in_child(child)
""",
        reactor_class,
    )


@pytest.mark.processes
def test_a_child_that_another_thread_forked_runs_the_reactor(
    reactor_class: Any,
) -> None:
    """The child has only the thread that forked, and its reactor works there."""
    run_forking(
        """
def child():
    spin_until_done(in_thread(talk, client))
thread = in_thread(in_child, child)
thread.join()
assert thread.outcome == [None], thread.outcome
""",
        reactor_class,
    )


def test_a_daemon_gets_events_after_the_reactor_has_run(reactor_class: Any) -> None:
    """Between the two hooks the parent hands everything to the child, and exits."""
    run_forking(
        """
reactor.beforeDaemonize()
ready, go = os.pipe()
if os.fork():
    os.close(go)
    # Do not exit before the child has ended: the test reads the output until then.
    os.read(ready, 1)
    os._exit(0)
reactor.afterDaemonize()
""",
        reactor_class,
    )


class _Measured:
    """A poller that counts its calls.  Synapse measures the ticks by such a one."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._poller.poll(*arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs epoll")
@pytest.mark.parametrize("started", [False, True])
def test_code_that_measures_the_ticks_of_twisteds_reactors_works(
    started: bool, make_reactor: Callable[[], EngineReactor]
) -> None:
    """
    Code that measures the ticks of Twisted's poll and epoll reactors looks at the class
    of the reactor, and replaces its poller.
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
            # Then it opens its poller again.
            reactor.beforeDaemonize()
    served.close()
