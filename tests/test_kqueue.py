"""
The kqueue reactor.

A scripted kernel shows how it handles what NetBSD's kernel does.  A real kqueue, or
libkqueue, shows how many calls it makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("kqueue exists on BSD and macOS only", allow_module_level=True)

import fcntl
import resource

from twisted.internet.error import (
    ConnectionFdescWentAway,
    ConnectionLost,
    ConnectionRefusedError,
)
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.process import reapProcessHandlers
from twisted.internet.protocol import ClientFactory, ProcessProtocol
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from zope.interface import implementer

from tests import libkqueue
from tests.scripted_kqueue import (
    ADD,
    CLEAR,
    DELETE,
    EOF,
    ONESHOT,
    PROCESS,
    READ,
    USER,
    WRITE,
    ScriptedKernel,
)
from tests.support import (
    A_FEW,
    DEADLINE,
    Recorder,
    RecorderFactory,
    SocketPair,
    Watcher,
    connect,
    dispose,
    refusing_port,
    reset,
    spawn_waiting,
    spin,
)
from twisted_rtsig.kqreactor import KQueueReactor
from twisted_rtsig.notifiers import (
    GONE,
    HANGUP,
    Registration,
    UnsupportedReactorError,
    forks,
)
from twisted_rtsig.notifiers import READ as INPUT
from twisted_rtsig.notifiers import WRITE as ROOM
from twisted_rtsig.notifiers.kqueue import KQueueNotifier
from twisted_rtsig.notifiers.kqueue_calls import KernelCalls, native_calls
from twisted_rtsig.notifiers.registration import Origin


@pytest.fixture
def kernel() -> ScriptedKernel:
    return ScriptedKernel()


@pytest.fixture
def reactor(kernel: ScriptedKernel) -> Iterator[KQueueReactor]:
    made = KQueueReactor(kernel.calls)
    # Open the queue now, before a test closes descriptors that the queue would reuse.
    made.iterate(0)
    yield made
    dispose(made)


@pytest.fixture
def notifier(kernel: ScriptedKernel) -> Iterator[KQueueNotifier]:
    made = KQueueNotifier(kernel.calls)
    yield made
    made.close()


def watched(
    notifier: KQueueNotifier, file: Any, interest: int, stream: bool = False
) -> Registration:
    """A registration, as the engine makes it."""
    registration = Registration(file.fileno(), tells_drained=stream)
    registration.interest = interest
    notifier.watch(registration)
    return registration


class Accepting:
    """A listening port whose events come from the script."""

    def __init__(
        self,
        reactor: KQueueReactor,
        kernel: ScriptedKernel,
        protocol: Callable[[], Recorder] = Recorder,
    ) -> None:
        self.reactor = reactor
        self.kernel = kernel
        self.factory = RecorderFactory(protocol)
        self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")

    def connect(self) -> tuple[socket.socket, Any, int]:
        """A client, the accepted connection, and the descriptor of the connection."""
        client = connect(self.port)
        self.kernel.happens(self.port.fileno(), READ, data=1)
        self.reactor.iterate(0)
        connection = self.factory.connections[-1]
        return client, connection, connection.transport.fileno()


def await_error(descriptor: int) -> None:
    """Wait until the real kernel has an error for the descriptor."""
    poll = select.poll()
    # BSD and macOS report a hang-up only beside these events, which may come first.
    poll.register(descriptor, select.POLLIN | select.POLLOUT)
    end = time.monotonic() + DEADLINE
    while not any(
        revents & (select.POLLERR | select.POLLHUP) for _, revents in poll.poll(0)
    ):
        assert time.monotonic() < end, "it did not happen"


# Events that NetBSD has been seen to report


def test_a_refused_connection_fails_with_connection_refused(
    reactor: KQueueReactor, kernel: ScriptedKernel
) -> None:
    """
    NetBSD gives the room in its buffer as ``data``.  Twisted's kqueue reactor takes
    such a connection for a lost one.
    """
    with refusing_port() as port:
        why: list[Failure] = []
        factory = ClientFactory()
        factory.clientConnectionFailed = (  # type: ignore[method-assign]
            lambda connector, reason: why.append(reason)
        )
        reactor.connectTCP("127.0.0.1", port, factory)
        while not reactor.getWriters():
            reactor.iterate(0)
        [connecting] = reactor.getWriters()
        descriptor = connecting.fileno()
        assert kernel.take_changes_of(descriptor) == [
            (READ, ADD),
            (WRITE, ADD | ONESHOT),
        ]
        await_error(descriptor)
        refused = errno.ECONNREFUSED
        kernel.happens(descriptor, READ, EOF, fflags=refused)
        kernel.happens(descriptor, WRITE, EOF, fflags=refused, data=32768)
        reactor.iterate(0)
    assert [each.type for each in why] == [ConnectionRefusedError]


def test_input_before_a_reset_is_received(
    reactor: KQueueReactor, kernel: ScriptedKernel
) -> None:
    client, connection, descriptor = Accepting(reactor, kernel).connect()
    client.sendall(b"0123456789")
    reset(client)
    await_error(descriptor)
    kernel.happens(descriptor, READ, EOF, fflags=errno.ECONNRESET, data=10)
    reactor.iterate(0)
    assert connection.data == b"0123456789"
    assert not connection.lost
    kernel.happens(descriptor, READ, EOF, fflags=errno.ECONNRESET)
    reactor.iterate(0)
    assert [each.type for each in connection.lost] == [ConnectionLost]


def test_input_before_a_half_close_is_received(
    reactor: KQueueReactor, kernel: ScriptedKernel
) -> None:
    @implementer(IHalfCloseableProtocol)
    class HalfCloseable(Recorder):
        ended_after = b""

        def readConnectionLost(self) -> None:
            self.ended_after = self.data
            transport: Any = self.transport
            transport.write(b"after the end")

        def writeConnectionLost(self) -> None:
            """This test does not close the other direction."""

    accepting = Accepting(reactor, kernel, HalfCloseable)
    client, connection, descriptor = accepting.connect()
    client.sendall(b"all")
    client.shutdown(socket.SHUT_WR)
    kernel.happens(descriptor, READ, EOF, data=3)
    kernel.happens(descriptor, READ, EOF)
    reactor.iterate(0)
    reactor.iterate(0)
    assert connection.ended_after == connection.data == b"all"
    assert not connection.lost
    assert client.recv(100) == b"after the end"
    client.close()
    connection.transport.connectionLost(Failure(ConnectionLost()))


def test_a_connection_that_reuses_a_descriptor_is_not_lost(
    reactor: KQueueReactor, kernel: ScriptedKernel
) -> None:
    """
    200 connections.  Each is accepted in the pass that closes the one before, and gets
    its descriptor, which the kernel no longer watches.
    """
    accepting = Accepting(reactor, kernel)
    numbers = set()
    client, connection, descriptor = accepting.connect()
    for turn in range(200):
        numbers.add(descriptor)
        client.sendall(b"%d" % turn)
        kernel.happens(descriptor, READ, data=3)
        reactor.iterate(0)
        assert connection.data == b"%d" % turn
        client.close()
        kernel.happens(descriptor, READ, EOF)
        former = connection
        client, connection, descriptor = accepting.connect()
        assert former.lost
    assert not kernel.script
    assert len(numbers) < 10
    client.close()


def test_receipts_are_not_taken_for_events(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    watcher = Watcher(reactor, pair[0].fileno())
    kernel.receipts = True
    reactor.addReader(watcher)
    reactor.addWriter(watcher)
    reactor.iterate(0)
    reactor.iterate(0)
    assert (watcher.reads, watcher.writes, watcher.lost) == (0, 0, [])
    assert kernel.take_changes_of(watcher.descriptor) == [
        (READ, ADD),
        (WRITE, ADD | ONESHOT),
    ]
    kernel.receipts = False
    kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(0)
    assert (watcher.reads, watcher.writes) == (1, 0)


# What the kernel is asked for


def test_reading_is_requested_once_and_cancelled_when_an_unwanted_event_comes(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    """
    A descriptor whose reader stops is nearly always closed next: then no change is
    needed at all.
    """
    watcher = Watcher(reactor, pair[0].fileno())
    descriptor = watcher.descriptor
    reactor.addReader(watcher)
    for _ in range(3):
        kernel.happens(descriptor, READ, data=1)
        reactor.iterate(0)
    assert watcher.reads == 3
    assert kernel.take_changes_of(descriptor) == [(READ, ADD)]
    reactor.removeReader(watcher)
    reactor.iterate(0)
    assert kernel.take_changes_of(descriptor) == []
    kernel.happens(descriptor, READ, data=1)
    reactor.iterate(0)
    reactor.addReader(watcher)
    reactor.iterate(0)
    assert watcher.reads == 3
    # The deletion comes first, so that it does not delete the new request.
    assert kernel.take_changes_of(descriptor) == [(READ, DELETE), (READ, ADD)]
    kernel.happens(descriptor, READ, data=1)
    reactor.iterate(0)
    assert watcher.reads == 4


@pytest.mark.parametrize("sleep", ["first", "second"])
def test_a_descriptor_gets_another_reader_during_the_sleep(
    reactor: KQueueReactor,
    kernel: ScriptedKernel,
    pair: SocketPair,
    sleep: str,
) -> None:
    """An event for the former reader neither reaches the new one nor disturbs it."""
    former = Watcher(reactor, pair[0].fileno())
    newcomer = Watcher(reactor, pair[0].fileno())
    reactor.addReader(former)
    if sleep == "second":
        reactor.iterate(0)
        assert kernel.take_changes_of(former.descriptor) == [(READ, ADD)]

    def succeed() -> None:
        reactor.removeReader(former)
        reactor.addReader(newcomer)

    kernel.meanwhile = succeed
    kernel.happens(former.descriptor, READ, data=1)
    reactor.iterate(0)
    assert (former.reads, newcomer.reads) == (0, 0)
    kernel.happens(former.descriptor, READ, data=1)
    reactor.iterate(0)
    assert (former.reads, newcomer.reads) == (0, 1)
    adds = 2 if sleep == "first" else 1
    assert kernel.take_changes_of(former.descriptor) == [(READ, ADD)] * adds


def test_room_to_write_is_requested_as_long_as_it_is_wanted(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addWriter(watcher)
    for turn in range(1, 4):
        kernel.happens(watcher.descriptor, WRITE, data=1)
        reactor.iterate(0)
        assert watcher.writes == turn
        assert kernel.take_changes_of(watcher.descriptor) == [(WRITE, ADD | ONESHOT)]
    reactor.removeWriter(watcher)
    reactor.iterate(0)
    assert kernel.take_changes_of(watcher.descriptor) == []


@pytest.mark.parametrize("first", [READ, WRITE])
def test_input_and_room_at_once_are_one_event(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    pair: SocketPair,
    first: int,
) -> None:
    registration = watched(notifier, pair[0], INPUT | ROOM)
    kernel.happens(registration.descriptor, first, data=1)
    kernel.happens(registration.descriptor, READ + WRITE - first, data=1)
    told = notifier.wait(0, {registration: INPUT | ROOM})
    assert told == ([], [(registration, INPUT | ROOM, 0)])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("filter", [READ, WRITE])
def test_an_event_for_a_former_owner_of_the_descriptor_is_dropped(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    pair: SocketPair,
    filter: int,
    stream: bool,
) -> None:
    """The descriptor gets another owner in the middle of the sleep."""
    direction = INPUT if filter == READ else ROOM
    former = watched(notifier, pair[0], direction, stream)

    def succeed() -> None:
        notifier.unwatch(former)
        watched(notifier, pair[0], direction, stream)

    notifier.open()
    kernel.happens(former.descriptor, filter, data=1)
    kernel.meanwhile = succeed
    assert notifier.wait(0, {former: direction}) == ([], ())


@pytest.mark.parametrize("paused", ["after", "during"])
def test_input_is_requested_again_after_a_pause(
    notifier: KQueueNotifier, kernel: ScriptedKernel, pair: SocketPair, paused: str
) -> None:
    """Reading pauses after or during the wait that begins to watch for input."""
    registration = watched(notifier, pair[0], INPUT | ROOM)
    descriptor = registration.descriptor

    def pause() -> None:
        registration.interest = ROOM
        notifier.update(registration)

    if paused == "during":
        notifier.open()
        kernel.meanwhile = pause
    notifier.wait(0, {registration: INPUT | ROOM})
    if paused == "after":
        pause()
    kernel.happens(descriptor, READ, data=1)
    assert notifier.wait(0, {}) == ([], ())
    registration.interest = INPUT | ROOM
    notifier.update(registration)
    kernel.take_changes_of(descriptor)
    notifier.wait(0, {registration: INPUT})
    assert kernel.take_changes_of(descriptor) == [(READ, DELETE), (READ, ADD)]


def test_a_late_removal_does_not_affect_the_next_owner_of_the_descriptor(
    notifier: KQueueNotifier, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    """A descriptor was closed after its reader stopped, and is another file now."""
    one, other = pair
    descriptor = os.dup(one.fileno())
    former = Registration(descriptor)
    former.interest = INPUT
    notifier.watch(former)
    notifier.wait(0, {former: INPUT})
    notifier.unwatch(former)
    kernel.happens(descriptor, READ, data=1)
    notifier.wait(0, {})
    os.dup2(other.fileno(), descriptor)
    newcomer = Registration(descriptor)
    newcomer.interest = INPUT
    notifier.watch(newcomer)
    kernel.take_changes_of(descriptor)
    with capturedLogs() as logs:
        notifier.wait(0, {newcomer: INPUT})
    assert kernel.take_changes_of(descriptor) == [(READ, DELETE), (READ, ADD)]
    assert not logs
    kernel.happens(descriptor, READ, data=1)
    assert notifier.wait(0, {}) == ([], [(newcomer, INPUT, 0)])
    os.close(descriptor)


def test_a_registration_that_is_no_longer_watched_is_forgotten(
    notifier: KQueueNotifier, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    registration = watched(notifier, pair[0], INPUT, stream=True)
    notifier.wait(0, {registration: INPUT})
    assert notifier.statistics()["armed"] == 1
    notifier.unwatch(registration)
    assert notifier.statistics()["armed"] == 0
    kernel.take_changes_of(registration.descriptor)
    notifier.wait(0, {registration: INPUT})
    assert kernel.take_changes_of(registration.descriptor) == []


@pytest.mark.parametrize("beside_select", [False, True])
def test_more_changes_fail_than_one_wait_returns_events(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    pair: SocketPair,
    beside_select: bool,
) -> None:
    """Without room for the result of each change, kevent(2) would fail as a whole."""
    if beside_select:
        refused = watched(notifier, pair[0], INPUT)
        kernel.refuses[refused.descriptor] = errno.EINVAL
        notifier.wait(0, {refused: INPUT})
        assert notifier.statistics()["selected"] == 1
    closed = []
    for number in range(100_000, 101_000):
        registration = Registration(number, Origin.OWN_TCP)
        registration.interest = INPUT
        notifier.watch(registration)
        closed.append(registration)
    _, events = notifier.wait(0, dict.fromkeys(closed, INPUT))
    assert events == [(each, GONE, 0) for each in closed]


@pytest.mark.parametrize(
    ("interest", "data", "told"),
    [
        ("input", 0, HANGUP),
        # There is something to be read before the end.
        ("input", 1, INPUT),
        # The peer may still receive what is written.
        ("both", 0, INPUT),
    ],
)
def test_the_end_of_input(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    pair: SocketPair,
    interest: str,
    data: int,
    told: int,
) -> None:
    """The engine disconnects a reader that ignores a hang-up: it cannot spin."""
    both = INPUT if interest == "input" else INPUT | ROOM
    registration = watched(notifier, pair[0], both)
    kernel.happens(registration.descriptor, READ, EOF, data=data)
    assert notifier.wait(0, {registration: both}) == ([], [(registration, told, 0)])


def test_a_hangup_that_is_reported_once_is_requested_again(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    """
    The hang-up of a revoked terminal is one-shot.  A reader that ignores it is
    disconnected nevertheless.
    """
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addReader(watcher)
    reactor.iterate(0)
    reported = 0
    while not watcher.lost:
        kernel.changes.clear()
        kernel.happens(watcher.descriptor, READ, EOF | ONESHOT)
        reactor.iterate(0)
        reported += 1
        assert reported <= A_FEW
        assert (watcher.descriptor in kernel.take_changed()) == (reported > 1)
    assert watcher.reads == reported - 1 > 0


def test_a_regular_file_is_always_ready(
    notifier: KQueueNotifier, kernel: ScriptedKernel, tmp_path: Path
) -> None:
    """As with poll(2).  kqueue itself does not report the end of a file."""
    with (tmp_path / "file").open("wb") as file:
        registration = watched(notifier, file, INPUT)
        for _ in range(2):
            told = notifier.wait(None, {registration: INPUT})
            assert told == ([], [(registration, INPUT, 0)])
        assert kernel.timeouts[-2:] == [0, 0]
        assert kernel.take_changes_of(registration.descriptor) == []
        notifier.unwatch(registration)
        assert notifier.wait(None, {}) == ([], ())


def test_an_interrupt_loses_no_change(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addReader(watcher)
    kernel.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reactor.iterate(0)
    kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(0)
    assert watcher.reads == 1


def test_a_watcher_whose_descriptor_is_closed_too_early_is_lost(
    reactor: KQueueReactor, kernel: ScriptedKernel
) -> None:
    one, other = socket.socketpair()
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    one.close()
    other.close()
    reactor.iterate(0)
    reactor.iterate(0)
    assert [each.type for each in watcher.lost] == [ConnectionFdescWentAway]


def test_a_wait_without_a_timeout_has_none(
    notifier: KQueueNotifier, kernel: ScriptedKernel
) -> None:
    for timeout in (None, 0.5, 1e9):
        notifier.wait(timeout, {})
    # Some systems refuse a timeout of years.
    assert kernel.timeouts[-3:] == [None, 0.5, 24 * 60 * 60]


# Descriptors that kqueue does not watch


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_descriptor_that_kqueue_refuses_is_watched_by_select(
    reactor: KQueueReactor,
    kernel: ScriptedKernel,
    pair: SocketPair,
    direction: str,
) -> None:
    """macOS refuses some terminals.  That is logged once, and works."""
    one, other = pair
    watcher = Watcher(reactor, one.fileno())
    kernel.refuses[watcher.descriptor] = errno.EINVAL
    with capturedLogs() as logs:
        if direction == "read":
            reactor.addReader(watcher)
        else:
            reactor.addWriter(watcher)
        reactor.iterate(0)
    assert [each["descriptor"] for each in logs] == [watcher.descriptor]
    assert reactor.statistics()["selected"] == 1
    assert len(kernel.take_changes_of(watcher.descriptor)) == 1
    if direction == "read":
        reactor.iterate(0)
        assert watcher.reads == 0
        other.send(b"x")
        reactor.iterate(0)
        assert watcher.reads == 1
        reactor.iterate(0)
        reactor.removeReader(watcher)
    else:
        reactor.iterate(0)
        assert watcher.writes == 1
        reactor.iterate(0)
        reactor.removeWriter(watcher)
    # It was not requested again.
    assert kernel.take_changes_of(watcher.descriptor) == []
    assert reactor.statistics()["selected"] == 0


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EBADF])
@pytest.mark.parametrize("direction", [INPUT, ROOM, INPUT | ROOM])
def test_a_pipe_without_another_end_is_ready(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    pair: SocketPair,
    direction: int,
    number: int,
) -> None:
    """
    FreeBSD refuses it with EPIPE, NetBSD with EBADF.  Its writer then fails with EPIPE.
    """
    registration = watched(notifier, pair[0], direction)
    kernel.refuses[registration.descriptor] = number
    with capturedLogs() as logs:
        for _ in range(2):
            told = notifier.wait(None, {registration: direction})
            assert told == ([], [(registration, direction, 0)])
    assert not logs
    assert notifier.statistics()["selected"] == 0


def test_events_of_kqueue_come_while_select_watches_another_descriptor(
    reactor: KQueueReactor,
    kernel: ScriptedKernel,
    pair: SocketPair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = pair
    refused = Watcher(reactor, one.fileno())
    watcher = Watcher(reactor, other.fileno())
    kernel.refuses[refused.descriptor] = errno.ENODEV
    reactor.addReader(refused)
    reactor.addReader(watcher)
    reactor.iterate(0)
    kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(0)
    assert (refused.reads, watcher.reads) == (0, 1)
    # The event comes during the sleep in select(2).
    kernel.meanwhile = lambda: kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(DEADLINE)
    assert (refused.reads, watcher.reads) == (0, 2)
    # If kqueue has an event before that, select(2) does not sleep.
    slept: list[Any] = []
    really = select.select

    def note(*arguments: Any) -> Any:
        slept.append(arguments[-1])
        return really(*arguments)

    monkeypatch.setattr(select, "select", note)
    kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(DEADLINE)
    assert slept == [0]
    assert (refused.reads, watcher.reads) == (0, 3)
    reactor.removeReader(refused)
    reactor.removeReader(watcher)


def test_a_refusal_of_both_directions_is_logged_once(
    notifier: KQueueNotifier, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    registration = watched(notifier, pair[0], INPUT | ROOM)
    kernel.refuses[registration.descriptor] = errno.EINVAL
    with capturedLogs() as logs:
        notifier.wait(0, {registration: INPUT | ROOM})
    assert len(logs) == 1
    assert notifier.wait(0, {})[1] == [(registration, ROOM, 0)]
    pair[1].send(b"x")
    assert notifier.wait(0, {})[1] == [(registration, INPUT | ROOM, 0)]


@pytest.mark.parametrize("why", ["closed", "high", "high queue"])
def test_a_descriptor_that_select_cannot_watch_is_lost(
    reactor: KQueueReactor,
    kernel: ScriptedKernel,
    pair: SocketPair,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """It, or the queue, is above the limit of select(2), or is closed meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if why == "high":
        # The limit is 256 on macOS.
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    try:
        least = 2000 if why == "high" else 3
        descriptor = fcntl.fcntl(pair[0], fcntl.F_DUPFD, least)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    watcher = Watcher(reactor, descriptor)
    kernel.refuses[descriptor] = errno.EINVAL
    reactor.addReader(watcher)
    reactor.iterate(0)
    if why == "closed":
        os.close(descriptor)
    elif why == "high queue":
        monkeypatch.setattr(kernel.queues[-1], "fileno", lambda: 2000)
    reactor.iterate(0)
    reactor.iterate(0)
    assert [each.type for each in watcher.lost] == [ConnectionFdescWentAway]
    if why != "closed":
        os.close(descriptor)


# Threads, children, forks


def test_threads_wake_the_reactor_by_the_queue_or_else_by_a_pipe(
    kernel: ScriptedKernel,
) -> None:
    reactor = KQueueReactor(kernel.calls)
    reactor.iterate(0)
    assert reactor.getReaders() == []
    # Once when the notifier is made, to find out, and once when the queue is opened.
    assert kernel.take_changes_of(0) == [(USER, ADD | CLEAR)] * 2
    reactor.wakeUp()
    assert kernel.take_changes_of(0) == [(USER, 0)]
    dispose(reactor)
    kernel.refuses[USER] = errno.EINVAL
    reactor = KQueueReactor(kernel.calls)
    [pipe] = reactor.getReaders()
    reactor.wakeUp()
    assert select.select([pipe.fileno()], [], [], 0)[0]
    dispose(reactor)


def test_a_wake_before_there_is_a_queue_is_kept(
    notifier: KQueueNotifier, kernel: ScriptedKernel
) -> None:
    notifier.wake()
    notifier.wait(None, {})
    notifier.wait(None, {})
    assert kernel.timeouts[-2:] == [0, None]


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "closed"), ValueError("closed")]
)
def test_a_wake_of_a_queue_that_is_being_closed_is_kept(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    notifier.open()

    def control(*arguments: Any) -> Any:
        raise error

    with monkeypatch.context() as closed:
        closed.setattr(kernel.queues[-1], "control", control)
        notifier.wake()
    notifier.wait(None, {})
    assert kernel.timeouts[-1] == 0


@pytest.mark.parametrize(
    ("platform", "user"),
    [
        ("darwin", -10),
        ("dragonfly6", -9),
        ("freebsd14", -11),
        ("netbsd10", 8),
        ("openbsd7", -10),
        ("gnukfreebsd11", None),
    ],
)
def test_the_filters_of_each_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, user: int | None
) -> None:
    """Python names all filters but EVFILT_USER, which wakes the reactor."""
    for name in ("kqueue", "kevent"):
        monkeypatch.setattr(select, name, name, raising=False)
    for number, name in enumerate(("READ", "WRITE", "PROC")):
        monkeypatch.setattr(select, f"KQ_FILTER_{name}", number, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    calls: Any = native_calls()
    assert (calls.kqueue, calls.kevent) == ("kqueue", "kevent")
    assert (calls.read, calls.write, calls.process, calls.user) == (0, 1, 2, user)


def test_the_reactor_cannot_be_made_without_a_free_descriptor(
    kernel: ScriptedKernel,
) -> None:
    def kqueue() -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    calls = dataclasses.replace(kernel.calls, kqueue=kqueue)
    with pytest.raises(UnsupportedReactorError, match="no descriptors left"):
        KQueueReactor(calls)


@pytest.mark.parametrize("number", [0, errno.ESRCH])
def test_the_end_of_a_child_is_reported_until_it_is_reaped(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The end comes as an event, or as a refusal if the child has ended already."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    told: list[int] = []
    process = 12345

    def end() -> bool:
        told.append(process)
        return len(told) < 12

    notifier.watch_exit(process, end)
    if number:
        kernel.refuses[process] = number
    notifier.wait(None, {})
    if not number:
        assert told == []
        kernel.happens(process, PROCESS)
        notifier.wait(None, {})
    assert told == [process]
    assert len(kernel.take_changes_of(process)) == 1
    pause = 0.001
    for times in range(2, 13):
        notifier.wait(None, {})
        assert kernel.timeouts[-1] == pytest.approx(pause, abs=1e-9)
        # A shorter timeout is kept, and does not shorten the pause between reports.
        notifier.wait(0, {})
        assert kernel.timeouts[-1] == 0
        assert len(told) == times - 1
        now += 2 * pause
        pause = min(2 * pause, 1)
        notifier.wait(None, {})
        assert len(told) == times
    assert kernel.timeouts[-1] is None
    assert kernel.take_changes_of(process) == []


def test_a_signal_handler_begins_to_watch_a_child(
    notifier: KQueueNotifier, kernel: ScriptedKernel
) -> None:
    """The handler runs in the middle of a wait that has changes of its own."""
    notifier.open()
    notifier.watch_exit(12345, lambda: False)
    kernel.meanwhile = lambda: notifier.watch_exit(54321, lambda: False)
    notifier.wait(0, {})
    kernel.changes.clear()
    notifier.wait(0, {})
    assert kernel.take_changed() == [54321]


@pytest.mark.parametrize("reaped_by", ["the reactor", "SIGCHLD", "the application"])
def test_kqueue_reports_the_end_of_a_child_before_waitpid_does(
    kernel: ScriptedKernel, reaped_by: str
) -> None:
    """FreeBSD and macOS do this."""
    reactor = KQueueReactor(kernel.calls)
    reactor.iterate(0)
    ended: list[Any] = []
    child = ProcessProtocol()
    child.processEnded = (  # type: ignore[method-assign]
        lambda reason: ended.append(reason.value)
    )
    transport, pipe = spawn_waiting(reactor, child)
    process = transport.pid
    kernel.happens(process, PROCESS)
    for _ in range(3):
        reactor.iterate(0)
    assert not kernel.script
    assert not ended
    os.close(pipe)
    with capturedLogs() as logs:
        if reaped_by == "the application":
            os.waitpid(process, 0)
        elif reaped_by == "SIGCHLD":
            end = time.monotonic() + DEADLINE
            # The reactor is about to reap the child as well.
            while transport.pid is not None and time.monotonic() < end:
                spin(reactor, reactor.getDelayedCalls)
                transport.reapProcess()
        # Then the notifier no longer waits for the child.
        kernel.timeouts.clear()
        spin(reactor, lambda: 5 in kernel.timeouts)
    assert not logs
    if reaped_by == "the application":
        assert not ended
        del reapProcessHandlers[process]
    else:
        assert [each.exitCode for each in ended] == [7]
        assert process not in reapProcessHandlers
    dispose(reactor)


def test_a_forked_child_makes_its_own_queue(
    reactor: KQueueReactor,
    kernel: ScriptedKernel,
    pair: SocketPair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    It does not close its parent's queue, whose descriptor may be another file by now.
    """
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addReader(watcher)
    reactor.addWriter(watcher)
    reactor.iterate(0)
    parents = kernel.queues[-1]
    kernel.changes.clear()
    monkeypatch.setattr(forks, "count", forks.count + 1)
    reactor.wakeUp()
    assert kernel.changes == []
    reactor.iterate(0)
    assert not parents.closed
    assert kernel.queues[-1] is not parents
    assert kernel.take_changed() == [0, watcher.descriptor, watcher.descriptor]
    reactor.removeReader(watcher)
    reactor.removeWriter(watcher)
    parents.close()


def test_a_forked_child_does_not_watch_the_children_of_its_parent(
    notifier: KQueueNotifier,
    kernel: ScriptedKernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []

    def end() -> bool:
        ended.append(12345)
        return True

    notifier.watch_exit(12345, end)
    notifier.watch_exit(23456, lambda: pytest.fail("not its child"))
    kernel.happens(12345, PROCESS)
    notifier.wait(0, {})
    monkeypatch.setattr(forks, "count", forks.count + 1)
    notifier.watch_exit(54321, lambda: False)
    kernel.changes.clear()
    notifier.wait(None, {})
    assert kernel.take_changed() == [0, 54321]
    assert kernel.timeouts[-1] is None
    assert ended == [12345]
    kernel.queues[-2].close()


def test_a_daemon_does_not_watch_the_children_of_its_former_process(
    notifier: KQueueNotifier, kernel: ScriptedKernel
) -> None:
    notifier.watch_exit(12345, lambda: pytest.fail("not its child"))
    notifier.wait(0, {})
    # This would begin with the next wait, which does not come.
    notifier.watch_exit(23456, lambda: pytest.fail("not its child"))
    notifier.close()
    notifier.daemonized()
    kernel.changes.clear()
    notifier.wait(0, {})
    assert kernel.take_changed() == [0]


def test_a_daemon_makes_its_own_queue(
    reactor: KQueueReactor, kernel: ScriptedKernel, pair: SocketPair
) -> None:
    watcher = Watcher(reactor, pair[0].fileno())
    reactor.addReader(watcher)
    reactor.iterate(0)
    reactor.beforeDaemonize()
    assert all(each.closed for each in kernel.queues)
    reactor.afterDaemonize()
    kernel.happens(watcher.descriptor, READ, data=1)
    reactor.iterate(0)
    assert watcher.reads == 1


# A real kqueue, or libkqueue's


class Counting:
    """A system's kqueue that counts the calls of kevent(2) and their changes."""

    def __init__(self, calls: KernelCalls) -> None:
        self.waits = 0
        self.changes = 0
        self.calls = dataclasses.replace(calls, kqueue=lambda: _Counted(self, calls))


class _Counted:
    def __init__(self, counting: Counting, calls: KernelCalls) -> None:
        self._counting = counting
        self._queue = calls.kqueue()
        self.fileno = self._queue.fileno
        self.close = self._queue.close

    def control(self, changelist: Any, max_events: int, timeout: Any = None) -> Any:
        self._counting.waits += 1
        self._counting.changes += len(changelist or ())
        return self._queue.control(changelist, max_events, timeout)


@pytest.fixture
def calls() -> KernelCalls:
    if hasattr(select, "kqueue"):
        return native_calls()
    if libkqueue.path() is None:
        pytest.skip(
            "no kqueue here, nor a libkqueue, so that the tests that all reactors "
            "share leave the kqueue reactor out: see tests/libkqueue.py"
        )
    return libkqueue.CALLS


@pytest.fixture
def counting(calls: KernelCalls) -> Counting:
    return Counting(calls)


@pytest.fixture
def real(counting: Counting) -> Iterator[KQueueReactor]:
    made = KQueueReactor(counting.calls)
    yield made
    dispose(made)


class Echo(Recorder):
    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        transport: Any = self.transport
        transport.write(data)


def echo_in_turn(reactor: Any, connections: int, requests: int, count: Any) -> int:
    """
    Serve clients one after the other.

    :return: what ``count`` counted for their requests, without each first one.
    """
    factory = RecorderFactory(Echo)
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    reactor.iterate(0)
    counted = 0
    for _ in range(connections):
        known = len(factory.connections)
        with connect(port) as client:
            spin(reactor, lambda: len(factory.connections) > known)
            connection = factory.connections[-1]
            # At the first request the reactor still asks kqueue for input.
            for turn in range(requests):
                before = count()
                client.sendall(b"x")
                spin(reactor, lambda: len(connection.data) > turn)
                # Twisted's reactor sends the answer in another pass.  Except on Linux,
                # it may take a moment to arrive.
                client.settimeout(0.05)
                answer: list[bytes] = []

                def answered() -> bool:
                    with contextlib.suppress(TimeoutError):
                        answer.append(client.recv(1))
                    return bool(answer)

                spin(reactor, answered)
                assert answer == [b"x"]
                if turn:
                    counted += count() - before
        spin(reactor, lambda: connection.lost)
    port.stopListening()
    reactor.iterate(0)
    return counted


def test_a_keep_alive_request_is_one_call_and_no_change(
    real: KQueueReactor, counting: Counting
) -> None:
    requests = 100
    assert echo_in_turn(real, 1, requests + 1, lambda: counting.waits) == requests
    before = counting.changes
    assert echo_in_turn(real, 1, requests + 1, lambda: counting.changes) == 0
    # The port, and one connection.
    assert counting.changes - before == 2


def test_a_connection_costs_less_than_half_the_calls_of_twisteds_reactor(
    real: KQueueReactor,
    counting: Counting,
    calls: KernelCalls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Connect, echo, close, one after the other: calls of kevent(2)."""
    for name, number in {
        "KQ_EV_ADD": ADD,
        "KQ_EV_DELETE": DELETE,
        "KQ_EV_EOF": EOF,
        "KQ_FILTER_READ": calls.read,
        "KQ_FILTER_WRITE": calls.write,
    }.items():
        if not hasattr(select, name):
            monkeypatch.setattr(select, name, number, raising=False)
    from twisted.internet import kqreactor

    theirs = Counting(calls)
    twisteds = kqreactor.KQueueReactor(theirs.calls)
    connections = 20
    reactors: list[tuple[Any, Counting]] = [(twisteds, theirs), (real, counting)]
    for reactor, counts in reactors:
        echo_in_turn(reactor, 1, 1, lambda: 0)
        counts.waits = 0
        echo_in_turn(reactor, connections, 1, lambda: 0)
    dispose(reactors[0][0])
    twisteds._kq.close()
    assert counting.waits < theirs.waits / 2


def test_a_pipe_wakes_the_reactor_if_kqueue_has_no_user_filter(
    calls: KernelCalls,
) -> None:
    reactor = KQueueReactor(dataclasses.replace(calls, user=None))
    thread = threading.Thread(
        target=reactor.callFromThread, args=(reactor.stop,), daemon=True
    )
    reactor.callWhenRunning(thread.start)
    reactor.run(installSignalHandlers=False)
    thread.join()
    dispose(reactor)


def test_a_device_is_watched_by_kqueue_or_else_by_select(real: KQueueReactor) -> None:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    watcher = Watcher(real, descriptor)
    real.addReader(watcher)
    spin(real, lambda: watcher.reads)
    real.removeReader(watcher)
    os.close(descriptor)
