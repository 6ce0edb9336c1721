"""The traps of epoll, each against the real kernel."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("epoll exists on Linux only", allow_module_level=True)

from twisted.internet.error import ConnectionFdescWentAway

from tests.support import (
    Served,
    Watcher,
    open_descriptors,
    read_all,
    run_program,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.epollreactor import EdgeEPollReactor


@pytest.fixture
def reactor_class() -> type[EngineReactor]:
    return EdgeEPollReactor


def is_told_of_something(reactor: EngineReactor) -> bool:
    """Does epoll go on to report, so that the reactor would never sleep?"""
    before = reactor.statistics()["events"]
    settle(reactor)
    return reactor.statistics()["events"] > before


def test_a_request_costs_no_call_but_wait(served: Served) -> None:
    """What is read till nothing is left needs neither check nor change."""
    client, connection = served.connect()
    before = served.reactor.statistics()
    for turn in range(1, 101):
        client.sendall(b"x")
        spin(served.reactor, lambda: len(connection.data) == turn)
    after = served.reactor.statistics()
    assert after["events"] - before["events"] == 100
    assert after["checks"] == before["checks"]


def test_many_sends_are_few_events(served: Served) -> None:
    """The kernel merges what realtime signals would tell one by one."""
    client, connection = served.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = served.reactor.statistics()["events"]
    for _ in range(50):
        client.sendall(b"x")
    spin(served.reactor, lambda: len(connection.data) == 50)
    assert served.reactor.statistics()["events"] - before < 10


@pytest.mark.parametrize("rest", ["paused", "reused", "closed"])
def test_closed_early_with_a_duplicate(served: Served, rest: str) -> None:
    """
    The number is closed while it is watched, and the description lives on in a
    duplicate: its entry reports for ever, under a number that may be another's
    now, and cannot be removed.
    """
    reactor = served.reactor
    client, connection = served.connect()
    one, other = socket.socketpair()
    watcher = Watcher(reactor, connection.transport.fileno())
    connection.transport.pauseProducing()
    reactor.addReader(watcher)
    settle(reactor)
    duplicate = os.dup(watcher.descriptor)
    if rest == "reused":
        os.dup2(one.fileno(), watcher.descriptor)
    else:
        os.close(watcher.descriptor)
    reactor.removeReader(watcher)
    if rest == "reused":
        reactor.addReader(watcher)
    # It is watched level-triggered, and nobody reads it.
    client.sendall(b"for ever")
    settle(reactor)
    assert not is_told_of_something(reactor)
    assert watcher.reads == 0
    assert reactor.statistics()["renewals"] == 1
    if rest == "reused":
        other.send(b"for the newcomer")
        watcher.on_read = lambda: one.recv(100) and None
        spin(reactor, lambda: watcher.reads == 1)
        reactor.removeReader(watcher)
    else:
        # Back under its number: what was renewed works as before.
        os.dup2(duplicate, watcher.descriptor)
        connection.transport.resumeProducing()
        spin(reactor, lambda: connection.data == b"for ever")
    one.close()
    other.close()
    os.close(duplicate)


def test_duplicate_is_back_before_anything_was_told(reactor: EngineReactor) -> None:
    """The entry of the closed number is there still: EEXIST."""
    one, other = socket.socketpair()
    one.setblocking(False)
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    settle(reactor)
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
    other.close()


def test_closed_before_interest_changes(reactor: EngineReactor) -> None:
    """Epoll says nothing of the close, but refuses the change."""
    one, other = socket.socketpair()
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    settle(reactor)
    one.close()
    other.close()
    reactor.addWriter(watcher)
    spin(reactor, lambda: watcher.lost)
    assert watcher.lost[0].check(ConnectionFdescWentAway)
    assert watcher not in reactor.getReaders() + reactor.getWriters()


def test_closed_before_a_check(served: Served) -> None:
    """A stream is gone when it is looked at after a pause of its interest."""
    client, connection = served.connect()
    transport = connection.transport
    settle(served.reactor)
    os.close(transport.fileno())
    # Beside the reading that goes on, so that the entry is to be changed.
    served.reactor.addWriter(transport)
    spin(served.reactor, lambda: connection.lost)
    # The number is not the transport's to close a second time.
    client.close()


@pytest.mark.parametrize("direction", ["read", "write"])
def test_regular_file_is_always_ready(
    reactor: EngineReactor, tmp_path: Any, direction: str
) -> None:
    """Epoll refuses it with EPERM, poll(2) does not."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    watcher = Watcher(reactor, descriptor)
    if direction == "read":
        reactor.addReader(watcher)
        spin(reactor, lambda: watcher.reads == 3)
        reactor.removeReader(watcher)
    else:
        reactor.addWriter(watcher)
        spin(reactor, lambda: watcher.writes == 3)
        # Beginning to read and ceasing to are changes like any other.
        reactor.addReader(watcher)
        spin(reactor, lambda: watcher.reads)
        reactor.removeReader(watcher)
        reactor.removeWriter(watcher)
    calls = watcher.reads, watcher.writes
    settle(reactor)
    assert (watcher.reads, watcher.writes) == calls
    os.close(descriptor)


def test_full_buffer_costs_two_changes(served: Served) -> None:
    """Write events are asked for while the buffer is full, and not after."""
    client, connection = served.connect()
    size = 8 << 20
    connection.transport.write(bytes(size))
    read_all(served.reactor, client, size)
    spin(served.reactor, lambda: not served.reactor.getWriters())
    # Room is no news any more: one wait for each request, none for its answer.
    before = served.reactor.statistics()["events"]
    client.setblocking(True)
    connection.dataReceived = connection.transport.write
    for _ in range(20):
        client.sendall(b"x")
        served.reactor.iterate(5)
        assert client.recv(1) == b"x"
    settle(served.reactor)
    assert served.reactor.statistics()["events"] - before == 20


def test_runs_in_any_thread_after_another(served: Served) -> None:
    """A set belongs to no thread, unlike a queue of signals."""
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
