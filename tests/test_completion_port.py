"""The completion-port reactor, on a real Windows or on Wine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from random import Random
from types import FrameType
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("completion ports exist on Windows only", allow_module_level=True)

from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionFdescWentAway
from twisted.internet.interfaces import (
    IReactorFDSet,
    IReactorProcess,
    IReactorSocket,
    IReactorWin32Events,
)
from twisted.internet.protocol import ClientFactory
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from tests.support import (
    DEADLINE,
    RESET,
    Recorder,
    RecorderFactory,
    Served,
    SocketPair,
    Watcher,
    only,
    read_all,
    settle,
    spin,
)
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.iocpreactor import CompletionPortReactor
from twisted_rtsig.notifiers import afd, afd_polls, completion_port
from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier
from twisted_rtsig.notifiers.registration import READ, WRITE, Registration
from twisted_rtsig.windows import calls as windows
from twisted_rtsig.windows.console import console

reactor_class = only(CompletionPortReactor)


def make_notifier() -> CompletionPortNotifier:
    """A notifier that calls functions at once rather than in the next pass."""
    return CompletionPortNotifier(lambda function: function())


def open_handles() -> int:
    """How many handles this process has."""
    query = ctypes.CDLL("ntdll").NtQuerySystemInformation
    handles_of_all_processes = 16  # SystemHandleInformation
    buffer = ctypes.create_string_buffer(1 << 22)
    assert query(handles_of_all_processes, buffer, len(buffer), None) == 0
    words = memoryview(buffer.raw).cast("I")
    # A count, and then records of six words.  A record's first word is its owner.
    owners = words[2 : 2 + 6 * words[0] : 6].tolist()
    own = owners.count(os.getpid())
    assert own
    return own


@pytest.mark.parametrize(
    "interface", [IReactorFDSet, IReactorSocket, IReactorProcess, IReactorWin32Events]
)
def test_interface(reactor: EngineReactor, interface: Any) -> None:
    """Twisted's own completion-port reactor does not have the first two."""
    assert verifyObject(interface, reactor)


def test_a_bare_socket_is_watched(reactor: EngineReactor, pair: SocketPair) -> None:
    """A database driver, for example, watches a socket of its own."""
    one, other = pair
    received = []
    watcher = Watcher(reactor, one.fileno())
    watcher.on_read = lambda: received.append(one.recv(100))
    reactor.addReader(watcher)
    for turn in range(1, 4):
        other.send(b"%d" % turn)
        spin(reactor, lambda: len(received) == turn)
    reactor.removeReader(watcher)
    other.send(b"unread")
    settle(reactor)
    assert received == [b"1", b"2", b"3"]
    reactor.addReader(watcher)
    spin(reactor, lambda: received[-1] == b"unread")
    reactor.removeReader(watcher)


def test_a_pipe_is_refused_with_a_hint_at_spawnProcess(reactor: EngineReactor) -> None:
    for descriptor in os.pipe():
        watcher = Watcher(reactor, descriptor)
        with pytest.raises(OSError, match="spawnProcess for the pipes of a child"):
            reactor.addReader(watcher)
        assert watcher not in reactor.getReaders()
        os.close(descriptor)


@pytest.mark.parametrize(
    "answered", [windows.SIO_BSP_HANDLE_POLL, windows.SIO_BSP_HANDLE_SELECT]
)
def test_a_socket_of_a_layered_provider(
    reactor: EngineReactor,
    pair: SocketPair,
    monkeypatch: pytest.MonkeyPatch,
    answered: int,
) -> None:
    """The provider does not name the base socket, but the socket below its own."""
    control = windows.socket_control
    below, other = pair
    with socket.socket() as layered:

        def through_the_layer(descriptor: int, code: int, *rest: Any) -> int:
            if descriptor != layered.fileno():
                return control(descriptor, code, *rest)
            if code != answered:
                # Windows does not know control code 0.
                return control(descriptor, 0, *rest)
            return control(below.fileno(), windows.SIO_BASE_HANDLE, *rest)

        monkeypatch.setattr(windows, "socket_control", through_the_layer)
        watcher = Watcher(reactor, layered.fileno())
        watcher.on_read = lambda: below.recv(100) and None
        reactor.addReader(watcher)
        settle(reactor)
        other.send(b"x")
        spin(reactor, lambda: watcher.reads)
        reactor.removeReader(watcher)
        answered = 0
        with pytest.raises(OSError, match=r".+"):
            reactor.addReader(watcher)


def test_more_sockets_than_select_can_watch(reactor: EngineReactor) -> None:
    count = 600
    pairs = [socket.socketpair() for _ in range(count)]
    told = set()

    def read_by(one: socket.socket) -> Any:
        def read() -> None:
            told.add(one)
            one.recv(100)

        return read

    watchers = []
    for one, _ in pairs:
        watcher = Watcher(reactor, one.fileno())
        watcher.on_read = read_by(one)
        reactor.addReader(watcher)
        watchers.append(watcher)
    settle(reactor)
    assert not told
    for _, other in pairs:
        other.send(b"x")
    spin(reactor, lambda: len(told) == count)
    for watcher in watchers:
        reactor.removeReader(watcher)
    for each in pairs:
        for end in each:
            end.close()


def test_a_request_costs_one_poll(served: Served) -> None:
    cost = served.cost_of_requests(50)
    assert (cost["events"], cost["checks"], cost["cancelled"]) == (50, 50, 0)


class Crowd:
    """Pairs of sockets.  One end of each is watched and counts its reads."""

    def __init__(self, reactor: EngineReactor, count: int) -> None:
        self.reactor = reactor
        self.reads = 0
        self.others: list[socket.socket] = []
        self.ends: list[socket.socket] = []
        self.watchers: list[Watcher] = []
        for _ in range(count):
            one, other = socket.socketpair()
            watcher = Watcher(reactor, one.fileno())
            watcher.on_read = self._reading(one)
            reactor.addReader(watcher)
            self.ends.append(one)
            self.others.append(other)
            self.watchers.append(watcher)
        settle(reactor)

    def _reading(self, one: socket.socket) -> Callable[[], None]:
        def read() -> None:
            one.recv(100)
            self.reads += 1

        return read

    def receive(self, indices: Iterable[int]) -> int:
        """
        Let a byte arrive at these sockets.

        :return: how many polls that took.
        """
        wanted = self.reads
        for index in indices:
            self.others[index].send(b"x")
            wanted += 1
        checks = self.reactor.statistics()["checks"]
        spin(self.reactor, lambda: self.reads >= wanted)
        settle(self.reactor)
        assert self.reads == wanted
        return self.reactor.statistics()["checks"] - checks

    def close(self) -> None:
        for watcher in self.watchers:
            self.reactor.removeReader(watcher)
        for each in (*self.ends, *self.others):
            each.close()


@pytest.fixture
def crowd(reactor: EngineReactor) -> Iterator[Crowd]:
    made = Crowd(reactor, 40)
    yield made
    made.close()


def test_busy_sockets_share_a_poll(crowd: Crowd) -> None:
    indices = range(40)
    crowd.receive(indices)
    for _ in range(10):
        # Some of these polls were made to settle.
        assert crowd.receive(indices) < 20
    assert crowd.reactor.statistics()["armed"] == 40


def test_idle_sockets_leave_the_shared_poll(crowd: Crowd) -> None:
    """Otherwise each event would cost a poll of all of them."""
    crowd.receive(range(40))
    for _ in range(10):
        crowd.receive([7])
    assert crowd.receive([7]) == 1
    assert crowd.reactor.statistics()["armed"] == 40
    crowd.receive(range(40))


@pytest.mark.parametrize("count", [1, 35])
def test_a_watcher_that_was_removed_gets_no_more_events(
    crowd: Crowd, count: int
) -> None:
    """The others get theirs, although one poll named all of them."""
    crowd.receive(range(40))
    for watcher in crowd.watchers[:count]:
        crowd.reactor.removeReader(watcher)
    for other in crowd.others[:count]:
        other.send(b"unread")
    crowd.receive(range(count, 40))
    crowd.receive(range(count, 40))
    assert crowd.reactor.statistics()["armed"] == 40 - count
    # If it comes back, it gets the input that has been waiting.
    for watcher in crowd.watchers[:count]:
        crowd.reactor.addReader(watcher)
    spin(crowd.reactor, lambda: all(each.reads >= 2 for each in crowd.watchers))


def test_one_socket_of_a_shared_poll_wants_to_write_as_well(crowd: Crowd) -> None:
    crowd.receive(range(40))
    watcher = crowd.watchers[3]
    watcher.on_write = lambda: crowd.reactor.removeWriter(watcher)
    crowd.reactor.addWriter(watcher)
    spin(crowd.reactor, lambda: watcher.writes)
    crowd.receive(range(40))
    assert watcher.writes == 1


def test_one_socket_of_a_shared_poll_is_closed(crowd: Crowd) -> None:
    crowd.receive(range(40))
    crowd.ends[5].close()
    spin(crowd.reactor, lambda: crowd.watchers[5].lost)
    crowd.receive([index for index in range(40) if index != 5])
    assert [each for each in crowd.watchers if each.lost] == [crowd.watchers[5]]


def test_more_interest_cancels_the_poll(
    reactor: EngineReactor, pair: SocketPair
) -> None:
    """A socket has one poll at a time.  Less interest leaves that as it is."""
    one, other = pair
    watcher = Watcher(reactor, one.fileno())
    watcher.on_read = lambda: one.recv(100) and None
    watcher.on_write = lambda: reactor.removeWriter(watcher)
    reactor.addReader(watcher)
    settle(reactor)
    before = reactor.statistics()
    reactor.addWriter(watcher)
    spin(reactor, lambda: watcher.writes)
    settle(reactor)
    assert reactor.statistics()["cancelled"] == before["cancelled"] + 1
    assert reactor.statistics()["armed"] == before["armed"]
    other.send(b"x")
    spin(reactor, lambda: watcher.reads)
    settle(reactor)
    assert (watcher.reads, watcher.writes) == (1, 1)
    reactor.removeReader(watcher)


def test_a_socket_is_closed_while_it_is_watched(reactor: EngineReactor) -> None:
    one, other = socket.socketpair()
    watcher = Watcher(reactor, one.fileno())
    reactor.addReader(watcher)
    settle(reactor)
    one.close()
    spin(reactor, lambda: watcher.lost)
    assert watcher.lost[0].check(ConnectionFdescWentAway)
    assert watcher not in reactor.getReaders()
    other.close()


def test_full_buffer(served: Served) -> None:
    client, connection = served.connect()
    size = 16 << 20
    connection.transport.write(bytes(size))
    read_all(served.reactor, client, size)
    spin(served.reactor, lambda: not served.reactor.getWriters())


def test_a_thread_wakes_the_reactor(reactor: EngineReactor) -> None:
    """It wakes it once for many calls, which are all there when the reactor wakes."""
    called: list[int] = []

    def call() -> None:
        for turn in range(100):
            reactor.callFromThread(called.append, turn)

    thread = threading.Timer(0.1, call)
    thread.start()
    begin = time.monotonic()
    while len(called) < 100:
        reactor.doIteration(10)
        reactor.runUntilCurrent()
    assert time.monotonic() - begin < 5
    thread.join()
    assert called == list(range(100))


def test_a_signal_handler_wakes_the_notifier_during_another_wake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may run between any two steps of its thread, so also within ``wake``."""
    notifier = make_notifier()
    notifier.open()
    post = windows.post_completion
    posted: list[Any] = []

    def post_and_be_interrupted(*arguments: Any) -> int:
        posted.append(arguments)
        if len(posted) == 1:
            notifier.wake()
        return post(*arguments)

    monkeypatch.setattr(windows, "post_completion", post_and_be_interrupted)
    thread = threading.Thread(target=notifier.wake, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert notifier.wait(DEADLINE, {}) == ([], [])
    notifier.close()


def test_an_idle_reactor_sleeps(reactor: EngineReactor) -> None:
    settle(reactor)
    begin = time.monotonic()
    reactor.doIteration(1.0)
    assert time.monotonic() - begin > 0.9


@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGBREAK", 0)])
def test_a_console_event_wakes_the_reactor(
    reactor: EngineReactor, number: signal.Signals
) -> None:
    """
    Windows calls the handler in a thread that it makes.  So does this test, since Wine
    has no console to press keys on.
    """
    events = {signal.SIGINT: windows.CTRL_C_EVENT}
    event = events.get(number, windows.CTRL_BREAK_EVENT)
    received: list[int] = []
    former = signal.signal(number, lambda number, frame: received.append(number))
    settle(reactor)
    thread = threading.Timer(0.1, console.handle, (event,))
    thread.start()
    begin = time.monotonic()
    reactor.doIteration(10)
    thread.join()
    signal.signal(number, former)
    assert received == [number]
    assert time.monotonic() - begin < 5


def test_a_console_event_interrupts_a_blocking_call(
    reactor: EngineReactor,
) -> None:
    """As without the reactor: the application calls :func:`time.sleep`, for example."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, interrupt)
    settle(reactor)
    thread = threading.Timer(0.1, console.handle, (windows.CTRL_C_EVENT,))
    thread.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(DEADLINE)
    assert time.monotonic() - begin < DEADLINE / 2
    thread.join()
    signal.signal(signal.SIGINT, former)


def test_a_console_event_without_a_handler_is_left_to_windows() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert not console.handle(windows.CTRL_C_EVENT)
    finally:
        signal.signal(signal.SIGINT, former)
    logoff = 5
    assert not console.handle(logoff)


class Interrupting(Registration):
    """A registration.  An interrupt comes just when its event is looked at."""

    interrupts = 0

    @property
    def tells_drained(self) -> bool:
        self.interrupts += 1
        if self.interrupts == 1:
            raise KeyboardInterrupt
        return False

    @tells_drained.setter
    def tells_drained(self, value: bool) -> None:
        pass


def test_an_interrupt_loses_no_completion_packet(
    pair: SocketPair,
) -> None:
    """Each packet comes once: a lost one would be waited for forever."""
    one, other = pair
    notifier = make_notifier()
    registration = Interrupting(one.fileno())
    registration.interest = READ
    notifier.watch(registration)
    assert notifier.wait(0, {registration: READ}) == ([], [])
    other.send(b"x")
    with pytest.raises(KeyboardInterrupt):
        notifier.wait(5, {})
    # After an interrupt the engine has all registrations checked.
    assert notifier.wait(5, {registration: READ}) == ([], [(registration, READ, 0)])
    notifier.unwatch(registration)
    notifier.close()


def watched(
    notifier: CompletionPortNotifier, sockets: Iterable[socket.socket]
) -> list[Registration]:
    """Registrations of these sockets, whose input is watched for."""
    registrations = []
    for each in sockets:
        registration = Registration(each.fileno())
        registration.interest = READ
        notifier.watch(registration)
        registrations.append(registration)
    return registrations


@contextlib.contextmanager
def watched_pairs(
    count: int,
) -> Iterator[tuple[CompletionPortNotifier, list[Registration], list[SocketPair]]]:
    """A notifier, pairs of sockets, and a registration of the first of each pair."""
    pairs = [socket.socketpair() for _ in range(count)]
    for one, _ in pairs:
        one.setblocking(False)
    notifier = make_notifier()
    registrations = watched(notifier, [one for one, _ in pairs])
    try:
        yield notifier, registrations, pairs
    finally:
        for registration in registrations:
            notifier.unwatch(registration)
        notifier.close()
        for one, other in pairs:
            one.close()
            other.close()


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("count", [1, 10])
def test_an_interrupt_loses_no_answer_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, count: int, ready: bool
) -> None:
    """The driver may have answered at once, without a completion packet."""
    with watched_pairs(count) as (notifier, registrations, pairs):
        interrupt_and_wait(monkeypatch, notifier, registrations, pairs, ready)


def interrupt_and_wait(
    monkeypatch: pytest.MonkeyPatch,
    notifier: CompletionPortNotifier,
    registrations: list[Registration],
    pairs: list[SocketPair],
    ready: bool,
) -> None:
    def wait_for_all() -> None:
        events: list[Any] = []
        while len(events) < len(pairs):
            plain, more = notifier.wait(5, dict.fromkeys(registrations, READ))
            assert more
            assert not plain
            events += more
        assert sorted(each.descriptor for each, _, _ in events) == sorted(
            one.fileno() for one, _ in pairs
        )

    for _, other in pairs:
        other.send(b"x")
    wait_for_all()
    if not ready:
        for one, _ in pairs:
            one.recv(1)
    ask = windows.device_io_control

    def interrupted(*arguments: Any) -> int:
        monkeypatch.setattr(windows, "device_io_control", ask)
        ask(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(windows, "device_io_control", interrupted)
    with pytest.raises(KeyboardInterrupt):
        notifier.wait(0, {})
    if not ready:
        for _, other in pairs:
            other.send(b"x")
    wait_for_all()
    wait_for_all()


_FILES = [each.__file__ for each in (afd, afd_polls, completion_port)]


class Interrupt:
    """
    Ctrl-C at the n-th place in the notifier where CPython looks for signals: where a
    function in Python begins, and where a function in C returns.
    """

    def __init__(self, wanted: int) -> None:
        self._left = wanted
        self.came = False

    def __enter__(self) -> None:
        sys.setprofile(self._profile)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and (frame.f_code.co_filename in _FILES):
            self._left -= 1
            if not self._left:
                self.came = True
                raise KeyboardInterrupt


def test_an_interrupt_at_any_moment_loses_no_event() -> None:
    """Registrations come and go meanwhile, and all get their events."""
    with watched_pairs(12) as (notifier, registrations, pairs):
        interrupt_at_every_step(notifier, registrations, pairs)


def interrupt_at_every_step(
    notifier: CompletionPortNotifier,
    registrations: list[Registration],
    pairs: list[SocketPair],
) -> None:
    count = len(pairs)
    ends = {one.fileno(): one for one, _ in pairs}
    came = True
    turn = 0
    while came:
        turn += 1
        due = set()
        # Most of them share a poll, and some are idle.
        for one, other in pairs[turn % 3 :]:
            other.send(b"x")
            due.add(one.fileno())
        registrations[-1].interest = READ | WRITE if turn % 2 else READ
        unchecked = {each: each.interest for each in registrations}
        interrupt = Interrupt(turn)
        try:
            with interrupt:
                notifier.wait(0, {registrations[-1]: registrations[-1].interest})
                notifier.wait(0, {})
        except KeyboardInterrupt:
            pass
        came = interrupt.came
        # One registration leaves, and another one takes its place.
        notifier.unwatch(registrations[turn % count])
        (registrations[turn % count],) = watched(notifier, [pairs[turn % count][0]])
        unchecked = {each: each.interest for each in registrations}
        deadline = time.monotonic() + DEADLINE
        while due:
            assert time.monotonic() < deadline, (turn, due)
            plain, events = notifier.wait(1, unchecked)
            assert not plain
            unchecked = {}
            for registration, ready, _ in events:
                if ready & READ:
                    due.discard(registration.descriptor)
                    with contextlib.suppress(BlockingIOError):
                        ends[registration.descriptor].recv(100)
    assert turn > 100


def test_sockets_that_are_always_ready_do_not_delay_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cost one call a pass.  The port is asked for packets in every fourth."""
    with watched_pairs(11) as (notifier, registrations, pairs):
        wait_beside_ready_sockets(monkeypatch, notifier, registrations, pairs)


def wait_beside_ready_sockets(
    monkeypatch: pytest.MonkeyPatch,
    notifier: CompletionPortNotifier,
    registrations: list[Registration],
    pairs: list[SocketPair],
) -> None:
    *crowd, idle = registrations
    for _, other in pairs[:10]:
        other.send(b"unread")
    told: list[Registration] = []

    def turn() -> None:
        plain, events = notifier.wait(5, {})
        told.extend(each for each, _, _ in events)
        assert not plain

    while told.count(crowd[0]) < 2:
        turn()
    take = windows.get_completions
    taken = 0

    def counted(*arguments: Any) -> int:
        nonlocal taken
        taken += 1
        return take(*arguments)

    monkeypatch.setattr(windows, "get_completions", counted)
    told.clear()
    for _ in range(40):
        turn()
    assert taken == 10
    assert all(told.count(each) == 40 for each in crowd)
    pairs[10][1].send(b"x")
    for _ in range(4):
        turn()
    assert idle in told
    pairs[10][0].recv(1)
    # A thread that wakes the notifier is noticed at once.
    before = taken
    while taken == before:
        turn()
    notifier.wake()
    turn()
    assert taken == before + 2


def test_polls_outlive_the_thread_that_issued_them(served: Served) -> None:
    """When a thread ends, Windows cancels the operations that it has issued."""
    client, connection = served.connect()
    thread = threading.Thread(target=served.reactor.iterate, args=(0,))
    client.sendall(b"x")
    spin(served.reactor, lambda: connection.data == b"x")
    thread.start()
    thread.join()
    client.sendall(b"y")
    spin(served.reactor, lambda: connection.data == b"xy")


def test_a_poll_that_windows_cancels_reports_nothing(
    monkeypatch: pytest.MonkeyPatch, pair: SocketPair
) -> None:
    """A read without input would block, if the socket is a blocking one."""
    one, other = pair
    notifier = make_notifier()
    (registration,) = watched(notifier, [one])
    other.send(b"x")
    assert notifier.wait(5, {}) == ([], [(registration, READ, 0)])
    one.recv(1)
    ask = windows.device_io_control
    asked: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> int:
        asked.append(arguments)
        return ask(*arguments)

    monkeypatch.setattr(windows, "device_io_control", record)
    assert notifier.wait(0, {}) == ([], [])
    ((device, _, _, _, question, *_),) = asked
    status = windows.IOStatusBlock()
    assert not windows.cancel_io(device, question, ctypes.addressof(status))
    while len(asked) == 1:
        assert notifier.wait(0, {}) == ([], [])
    other.send(b"x")
    assert notifier.wait(5, {}) == ([], [(registration, READ, 0)])
    notifier.unwatch(registration)
    notifier.close()


def test_the_driver_is_asked_for_all_answers_before_the_port_is_closed(
    monkeypatch: pytest.MonkeyPatch, pair: SocketPair
) -> None:
    """The last handle of the port need not be the notifier's."""
    lost: list[Any] = []
    monkeypatch.setattr(afd_polls, "_leaked", lost)
    notifier = make_notifier()
    (registration,) = watched(notifier, [pair[0]])
    assert notifier.wait(0, {}) == ([], [])
    close = windows.close_handle
    to_close: list[int] = []

    def keep_open(handle: int) -> int:
        to_close.append(handle)
        return 1

    monkeypatch.setattr(windows, "close_handle", keep_open)
    notifier.close()
    for handle in to_close:
        close(handle)
    notifier.unwatch(registration)
    assert lost == []


def test_memory_that_the_kernel_writes_to_is_not_freed(
    pair: SocketPair,
) -> None:
    """An open notifier stays alive, although no thread refers to it any more."""
    alive: list[weakref.ref[CompletionPortNotifier]] = []

    def open_and_forget() -> None:
        notifier = make_notifier()
        watched(notifier, [pair[0]])
        notifier.wait(0, {})
        alive.append(weakref.ref(notifier))

    thread = threading.Thread(target=open_and_forget)
    thread.start()
    thread.join()
    gc.collect()
    notifier = alive[0]()
    assert notifier is not None
    notifier.close()
    del notifier
    gc.collect()
    assert alive[0]() is None


def test_a_notifier_that_could_not_be_opened_is_opened_next_time(
    monkeypatch: pytest.MonkeyPatch, pair: SocketPair
) -> None:
    notifier = make_notifier()
    (registration,) = watched(notifier, [pair[0]])
    no_memory = 0xC0000017
    with monkeypatch.context() as patch:
        patch.setattr(windows, "create_file", lambda *_: no_memory)
        with pytest.raises(OSError, match=r"[Mm]emory|8"):
            notifier.open()
    pair[1].send(b"x")
    unchecked = {registration: READ}
    assert notifier.wait(5, unchecked) == ([], [(registration, READ, 0)])
    notifier.unwatch(registration)
    notifier.close()


def test_no_handle_is_left_after_a_run(reactor: EngineReactor) -> None:
    before = open_handles()
    pairs = [socket.socketpair() for _ in range(100)]
    watchers = [Watcher(reactor, one.fileno()) for one, _ in pairs]
    for each in watchers:
        reactor.addReader(each)

    def stop() -> None:
        for each in watchers[:50]:
            reactor.removeReader(each)
        reactor.stop()

    reactor.callLater(0.05, stop)
    reactor.run(installSignalHandlers=False)
    for each in watchers[50:]:
        reactor.removeReader(each)
    for one, other in pairs:
        one.close()
        other.close()
    # Under Wine, sockets are closed with a delay.
    deadline = time.monotonic() + 5
    while open_handles() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_handles() <= before


class Events:
    """Events of Windows, made without pywin32."""

    def __init__(self) -> None:
        self._kernel = ctypes.CDLL("kernel32")
        self._kernel.CreateEventW.restype = ctypes.c_void_p
        self.handles: list[int] = []

    def create(self) -> int:
        self.handles.append(self._kernel.CreateEventW(None, False, False, None))
        return self.handles[-1]

    def set(self, handle: int) -> None:
        assert self._kernel.SetEvent(ctypes.c_void_p(handle))

    def close(self) -> None:
        for handle in self.handles:
            windows.close_handle(handle)


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events()
    yield made
    made.close()


class EventOwner(FileDescriptor):
    """Owns an event: ``is_set`` is called for it."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0
        self.answer: Any = None
        self.lost: list[Failure] = []

    def is_set(self) -> Any:
        self.times += 1
        return self.answer

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)


def test_more_events_than_a_thread_can_wait_for(
    reactor: CompletionPortReactor, events: Events
) -> None:
    """The events may have any origin: pywin32 is not needed."""
    told = {events.create(): EventOwner() for _ in range(100)}
    for handle, each in told.items():
        reactor.addEvent(handle, each, "is_set")
    for times in (1, 2):
        for handle in told:
            events.set(handle)
        spin(reactor, lambda: all(each.times == times for each in told.values()))
    for handle in told:
        reactor.removeEvent(handle)
        events.set(handle)
    settle(reactor)
    assert {each.times for each in told.values()} == {2}


def test_an_event_is_removed_after_it_was_set(
    reactor: CompletionPortReactor, events: Events
) -> None:
    """The owner that is called first removes both events: the other is not called."""
    told: list[int] = []

    class Remover(FileDescriptor):
        def is_set(self) -> None:
            told.append(1)
            for handle in events.handles:
                reactor.removeEvent(handle)

    for _ in range(2):
        reactor.addEvent(events.create(), Remover(), "is_set")
    for handle in events.handles:
        events.set(handle)
    spin(reactor, lambda: told)
    settle(reactor)
    assert told == [1]
    with pytest.raises(KeyError):
        reactor.removeEvent(events.handles[0])


def test_an_event_is_set_while_the_port_is_closed(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner is called: the event was reset, and is not reported again."""
    called: list[int] = []
    notifier = make_notifier()
    register = windows.overlapped.RegisterWaitWithQueue

    def register_what_is_set(handle: int, port: int, number: int, limit: int) -> Any:
        waiting = register(handle, port, number, limit)
        # The thread pool does this at some unknown time.
        windows.post_completion(port, 0, 0, number)
        return waiting

    monkeypatch.setattr(
        windows.overlapped, "RegisterWaitWithQueue", register_what_is_set
    )
    number = notifier.call_once_signalled(events.create(), lambda: called.append(1))
    notifier.close()
    notifier.forget(number)
    assert called == [1]


def test_an_event_whose_owner_returns_an_error(
    reactor: CompletionPortReactor, events: Events
) -> None:
    handle, told = events.create(), EventOwner()
    told.answer = ConnectionFdescWentAway("done")
    reactor.addEvent(handle, told, "is_set")
    events.set(handle)
    spin(reactor, lambda: told.lost)
    events.set(handle)
    settle(reactor)
    assert told.times == 1
    assert told.lost[0].value is told.answer


class Careless(Recorder):
    """Ends its connection in one of many ways, and often with operations under way."""

    transport: Any
    random = Random(7)

    def connectionMade(self) -> None:
        self.transport.write(bytes(self.random.choice([1, 100, 70_000])))
        if self.random.random() < 0.5:
            # Most connections have operations under way by then.
            self.transport.reactor.callLater(0.05 * self.random.random(), self.end)

    def dataReceived(self, data: bytes) -> None:
        if self.random.random() < 0.3:
            self.end()

    def end(self) -> None:
        transport = self.transport
        if not transport.connected:
            return
        how = self.random.randrange(6)
        if how == 0:
            transport.abortConnection()
        elif how == 1:
            transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            transport.loseConnection()
        elif how == 2:
            transport.loseWriteConnection()
            transport.reactor.callLater(0.05, transport.abortConnection)
        elif how == 3:
            transport.pauseProducing()
            transport.reactor.callLater(0.02, transport.abortConnection)
        elif how == 4:
            # Stop and start again, with the poll cancelled in between.
            transport.reactor.removeReader(transport)
            transport.reactor.addReader(transport)
            transport.loseConnection()
        else:
            transport.loseConnection()


# Of a connection that was reset before it is accepted, Wine says ENOTCONN, which is
# logged.
def test_careless_connections_leave_nothing_behind(
    reactor: CompletionPortReactor,
) -> None:
    server = RecorderFactory(Careless)
    port = reactor.listenTCP(0, server, interface="127.0.0.1", backlog=600)

    class Clients(ClientFactory):
        noisy = False
        failed = 0

        def __init__(self) -> None:
            self.made: list[Careless] = []

        def buildProtocol(self, addr: Any) -> Careless:
            self.made.append(Careless())
            return self.made[-1]

        def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
            self.failed += 1

    def rush(count: int) -> None:
        clients = Clients()
        for turn in range(count):
            connector = reactor.connectTCP(
                "127.0.0.1", port.getHost().port, clients, timeout=5
            )
            if not turn % 10:
                connector.stopConnecting()
        spin(reactor, lambda: len(clients.made) + clients.failed == count)
        assert len(clients.made) > count // 2

        def all_is_quiet() -> bool:
            # The connections that are left end now, also those that are accepted now.
            left = [e for e in (*clients.made, *server.connections) if not e.lost]
            for each in left:
                each.transport.abortConnection()
            counts = reactor.statistics()
            return not left and counts["readers"] == counts["armed"] == 1

        # Not by spin(), which sleeps long when there are no events.
        deadline = time.monotonic() + DEADLINE
        while not all_is_quiet():
            assert time.monotonic() < deadline
            reactor.iterate(0.01)
        server.connections.clear()
        for call in reactor.getDelayedCalls():
            call.cancel()

    def left() -> tuple[int, int]:
        gc.collect()
        return open_handles(), sys.getallocatedblocks()

    # After these, the objects that are kept for further connections exist.
    for _ in range(3):
        rush(500)
    handles, blocks = left()
    for _ in range(7):
        rush(500)
    more_handles, more_blocks = left()
    assert more_handles <= handles
    # Less than a block for each connection: no connection leaves anything behind.
    assert more_blocks < blocks + 1000
