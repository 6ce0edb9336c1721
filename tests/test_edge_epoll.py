"""The traps of epoll, against the real kernel."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("epoll exists on Linux only", allow_module_level=True)

from twisted.internet.error import ConnectionFdescWentAway, ConnectionLost

from tests.support import (
    Served,
    SocketPair,
    Watcher,
    only,
    open_descriptors,
    read_all,
    run_program,
    settle,
    spin,
    spin_with_timers,
    watch,
)
from tests.test_streams import Link, logged_errors
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.epollreactor import EdgeEPollReactor

reactor_class = only(EdgeEPollReactor)


def gets_events(reactor: EngineReactor) -> bool:
    """Whether epoll still reports events, so that the reactor would never sleep."""
    before = reactor.statistics()["events"]
    settle(reactor)
    return reactor.statistics()["events"] > before


def test_a_request_costs_no_call_except_wait(served: Served) -> None:
    """A socket that was read until it was empty needs neither check nor change."""
    cost = served.cost_of_requests(100)
    assert (cost["events"], cost["checks"]) == (100, 0)


def test_many_sends_cause_few_events(served: Served) -> None:
    """The kernel merges events which would each cause a realtime signal."""
    client, connection = served.connect()
    before = served.reactor.statistics()["events"]
    served.send_bytes(client, connection, 50)
    assert served.reactor.statistics()["events"] - before < 10


@pytest.mark.parametrize("rest", ["paused", "reused", "closed"])
def test_a_duplicate_of_a_descriptor_that_was_closed_too_early(
    served: Served, rest: str
) -> None:
    """
    The descriptor is closed while it is watched, and a duplicate keeps its open file
    description.  The entry of epoll then reports for ever, under a descriptor that may
    be another file now, and cannot be removed.
    """
    reactor = served.reactor
    client, connection = served.connect()
    one, other = socket.socketpair()
    connection.transport.pauseProducing()
    watcher = watch(reactor, connection.transport.fileno())
    duplicate = os.dup(watcher.descriptor)
    if rest == "reused":
        os.dup2(one.fileno(), watcher.descriptor)
    else:
        os.close(watcher.descriptor)
    reactor.removeReader(watcher)
    if rest == "reused":
        reactor.addReader(watcher)
    # It is watched level-triggered, and is not read.
    client.sendall(b"for ever")
    settle(reactor)
    assert not gets_events(reactor)
    assert watcher.reads == 0
    assert reactor.statistics()["renewals"] == 1
    if rest == "reused":
        other.send(b"for the newcomer")
        watcher.on_read = lambda: one.recv(100) and None
        spin(reactor, lambda: watcher.reads == 1)
        reactor.removeReader(watcher)
    else:
        # The description has its former descriptor again.  The renewed set works.
        os.dup2(duplicate, watcher.descriptor)
        connection.transport.resumeProducing()
        spin(reactor, lambda: connection.data == b"for ever")
    one.close()
    other.close()
    os.close(duplicate)


def test_a_duplicate_takes_the_descriptor_of_a_stale_entry(
    reactor: EngineReactor, pair: SocketPair
) -> None:
    """epoll still has the entry of the closed descriptor: EEXIST."""
    one, other = pair
    watcher = watch(reactor, one.fileno())
    duplicate = os.dup(one.fileno())
    number = one.detach()
    os.close(number)
    reactor.removeReader(watcher)
    os.dup2(duplicate, number)
    watcher.on_read = lambda: os.read(number, 100) and None
    reactor.addReader(watcher)
    other.send(b"x")
    spin(reactor, lambda: watcher.reads)
    settle(reactor)
    assert watcher.reads == 1
    reactor.removeReader(watcher)
    for each in (number, duplicate):
        os.close(each)


def test_a_watcher_that_was_closed_before_a_change_is_lost(
    reactor: EngineReactor, pair: SocketPair
) -> None:
    """epoll does not report the close, but refuses the change."""
    watcher = watch(reactor, pair[0].fileno())
    pair[0].close()
    reactor.addWriter(watcher)
    spin(reactor, lambda: watcher.lost)
    assert [each.type for each in watcher.lost] == [ConnectionFdescWentAway]
    assert watcher not in reactor.getReaders() + reactor.getWriters()


def test_a_stream_that_was_closed_before_a_check_is_lost(served: Served) -> None:
    """It is checked because its interest changes."""
    client, connection = served.connect()
    transport = connection.transport
    settle(served.reactor)
    os.close(transport.fileno())
    # Reading goes on, so that this changes the entry.
    served.reactor.addWriter(transport)
    spin(served.reactor, lambda: connection.lost)
    # The transport must not close the descriptor a second time.
    client.close()


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_regular_file_is_always_ready(
    reactor: EngineReactor, tmp_path: Any, direction: str
) -> None:
    """epoll refuses it with EPERM, poll(2) does not."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    watcher = Watcher(reactor, descriptor)
    if direction == "read":
        reactor.addReader(watcher)
        spin(reactor, lambda: watcher.reads == 3)
        reactor.removeReader(watcher)
    else:
        reactor.addWriter(watcher)
        spin(reactor, lambda: watcher.writes == 3)
        # Reading begins and ends while writing goes on.
        reactor.addReader(watcher)
        spin(reactor, lambda: watcher.reads)
        reactor.removeReader(watcher)
        reactor.removeWriter(watcher)
    calls = watcher.reads, watcher.writes
    settle(reactor)
    assert (watcher.reads, watcher.writes) == calls
    os.close(descriptor)


def test_full_buffer_costs_two_changes(served: Served) -> None:
    """Write events are requested only while the buffer is full."""
    client, connection = served.connect()
    size = 8 << 20
    connection.transport.write(bytes(size))
    read_all(served.reactor, client, size)
    spin(served.reactor, lambda: not served.reactor.getWriters())
    # Room is no longer reported: one wait for each request, none for its answer.
    before = served.reactor.statistics()["events"]
    client.setblocking(True)
    connection.dataReceived = connection.transport.write
    for _ in range(20):
        client.sendall(b"x")
        served.reactor.iterate(5)
        assert client.recv(1) == b"x"
    settle(served.reactor)
    assert served.reactor.statistics()["events"] - before == 20


def test_several_threads_run_a_reactor_one_after_another(served: Served) -> None:
    """Unlike a queue of signals, an epoll set does not belong to a thread."""
    output = run_program(
        """
        import threading
        reactor = Reactor()
        for _ in range(3):
            thread = threading.Thread(target=reactor.iterate, args=(0,))
            thread.start()
            thread.join()
        print(reactor.statistics()["waits"])
        """,
        reactor_class=EdgeEPollReactor,
    )
    assert output == "3\n"


def test_no_set_is_left_after_a_run(reactor: EngineReactor) -> None:
    descriptors = open_descriptors()
    reactor.callWhenRunning(reactor.stop)
    reactor.run(installSignalHandlers=False)
    assert open_descriptors() <= descriptors


def test_a_closed_socket_that_should_send_a_descriptor_is_lost(
    reactor: EngineReactor, tmp_path: Path
) -> None:
    """
    Its error is not logged.  (The realtime signals of a socket that was closed like
    this must stay blocked, so they are not tested.)
    """
    link = Link(reactor, "UNIX client", tmp_path)
    link.transport.sendFileDescriptor(0)
    link.transport.write(b"x")
    link.transport.socket.close()
    with logged_errors() as errors:
        spin_with_timers(reactor, lambda: link.protocol.lost)
    assert link.protocol.lost[0].check(ConnectionLost)
    assert errors == []
    link.close()
