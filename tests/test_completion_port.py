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
    Watcher,
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


@pytest.fixture
def reactor_class() -> type[EngineReactor]:
    return CompletionPortReactor


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    one.setblocking(False)
    with one, other:
        yield one, other


def open_handles() -> int:
    """How many handles this process has."""
    query = ctypes.CDLL("ntdll").NtQuerySystemInformation
    everyone = 16  # SystemHandleInformation
    buffer = ctypes.create_string_buffer(1 << 22)
    assert query(everyone, buffer, len(buffer), None) == 0
    words = memoryview(buffer.raw).cast("I")
    # A count, and then records of six words, of which the first is the owner.
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


def test_a_bare_socket_is_watched(
    reactor: EngineReactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    """As a driver with a socket of its own does it."""
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


def test_a_pipe_is_refused_with_what_to_use_instead(reactor: EngineReactor) -> None:
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
    pair: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    answered: int,
) -> None:
    """Whose provider does not tell the base, but what is below it."""
    control = windows.socket_control
    below, other = pair
    with socket.socket() as layered:

        def through_the_layer(descriptor: int, code: int, *rest: Any) -> int:
            if descriptor != layered.fileno():
                return control(descriptor, code, *rest)
            if code != answered:
                # Which nobody knows the meaning of.
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
    client, connection = served.connect()
    before = served.reactor.statistics()
    for turn in range(1, 51):
        client.sendall(b"x")
        spin(served.reactor, lambda: len(connection.data) == turn)
    settle(served.reactor)
    after = served.reactor.statistics()
    assert after["events"] - before["events"] == 50
    assert after["checks"] - before["checks"] == 50
    assert after["cancelled"] == before["cancelled"]


class Crowd:
    """Pairs of sockets, of which one end is watched and counts what it reads."""

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

    def hear(self, indices: Iterable[int]) -> int:
        """Something arrives at some of them; how many polls that costs."""
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


def test_the_busy_share_a_poll(crowd: Crowd) -> None:
    everybody = range(40)
    crowd.hear(everybody)
    for _ in range(10):
        # The settling takes some of it.
        assert crowd.hear(everybody) < 20
    assert crowd.reactor.statistics()["armed"] == 40


def test_the_idle_leave_the_crowd(crowd: Crowd) -> None:
    """Else each event would cost a question about all of them."""
    crowd.hear(range(40))
    for _ in range(10):
        crowd.hear([7])
    assert crowd.hear([7]) == 1
    assert crowd.reactor.statistics()["armed"] == 40
    crowd.hear(range(40))


@pytest.mark.parametrize("count", [1, 35])
def test_whoever_leaves_is_told_of_nothing_more(crowd: Crowd, count: int) -> None:
    """The others are, though all were named by one poll."""
    crowd.hear(range(40))
    for watcher in crowd.watchers[:count]:
        crowd.reactor.removeReader(watcher)
    for other in crowd.others[:count]:
        other.send(b"unread")
    crowd.hear(range(count, 40))
    crowd.hear(range(count, 40))
    assert crowd.reactor.statistics()["armed"] == 40 - count
    # It may come back, to what has been waiting for it.
    for watcher in crowd.watchers[:count]:
        crowd.reactor.addReader(watcher)
    spin(crowd.reactor, lambda: all(each.reads >= 2 for each in crowd.watchers))


def test_one_of_the_crowd_wants_to_write_as_well(crowd: Crowd) -> None:
    crowd.hear(range(40))
    watcher = crowd.watchers[3]
    watcher.on_write = lambda: crowd.reactor.removeWriter(watcher)
    crowd.reactor.addWriter(watcher)
    spin(crowd.reactor, lambda: watcher.writes)
    crowd.hear(range(40))
    assert watcher.writes == 1


def test_one_of_the_crowd_is_closed(crowd: Crowd) -> None:
    crowd.hear(range(40))
    crowd.ends[5].close()
    spin(crowd.reactor, lambda: crowd.watchers[5].lost)
    crowd.hear([index for index in range(40) if index != 5])
    assert [each for each in crowd.watchers if each.lost] == [crowd.watchers[5]]


def test_more_interest_calls_the_poll_back(
    reactor: EngineReactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    """One poll of a socket at a time; less interest leaves it as it is."""
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


def test_closed_while_it_is_watched(reactor: EngineReactor) -> None:
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


def test_a_thread_wakes_the_sleeper(reactor: EngineReactor) -> None:
    """Once for many calls: they are there when it wakes."""
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


def test_a_signal_handler_wakes_the_one_that_is_being_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs between any two steps of its thread, also while that wakes."""
    notifier = CompletionPortNotifier(lambda function: function())
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


def test_nothing_ticks(reactor: EngineReactor) -> None:
    settle(reactor)
    begin = time.monotonic()
    reactor.doIteration(1.0)
    assert time.monotonic() - begin > 0.9


@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGBREAK", 0)])
def test_a_console_event_wakes_the_sleeper(
    reactor: EngineReactor, number: signal.Signals
) -> None:
    """
    Windows calls the handler in a thread that it makes; so does this, since Wine
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


def test_a_console_event_ends_what_blocks_the_reactor(
    reactor: EngineReactor,
) -> None:
    """As without the reactor: a call of the application that sleeps, say."""

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


def test_a_console_event_that_nobody_handles_is_left_to_windows() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert not console.handle(windows.CTRL_C_EVENT)
    finally:
        signal.signal(signal.SIGINT, former)
    logoff = 5
    assert not console.handle(logoff)


class Interrupting(Registration):
    """An interrupt comes just when its event is looked at."""

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


def test_an_interrupt_loses_no_packet(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Each packet comes once, and one that is lost would be waited for forever."""
    one, other = pair
    notifier = CompletionPortNotifier(lambda function: function())
    registration = Interrupting(one.fileno())
    registration.interest = READ
    notifier.watch(registration)
    assert notifier.wait(0, {registration: READ}) == ([], [])
    other.send(b"x")
    with pytest.raises(KeyboardInterrupt):
        notifier.wait(5, {})
    # The engine has it checked, as it does with all after an interrupt.
    assert notifier.wait(5, {registration: READ}) == ([], [(registration, READ, 0)])
    notifier.unwatch(registration)
    notifier.close()


def watched(
    notifier: CompletionPortNotifier, sockets: Iterable[socket.socket]
) -> list[Registration]:
    """Registrations of these, which are told of input."""
    registrations = []
    for each in sockets:
        registration = Registration(each.fileno())
        registration.interest = READ
        notifier.watch(registration)
        registrations.append(registration)
    return registrations


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("count", [1, 10])
def test_an_interrupt_loses_no_answer(
    monkeypatch: pytest.MonkeyPatch, count: int, ready: bool
) -> None:
    """The driver may have answered at once, and no packet tells of that."""
    pairs = [socket.socketpair() for _ in range(count)]
    notifier = CompletionPortNotifier(lambda function: function())
    registrations = watched(notifier, [one for one, _ in pairs])

    def told() -> None:
        events: list[Any] = []
        while len(events) < count:
            plain, more = notifier.wait(5, dict.fromkeys(registrations, READ))
            assert more
            assert not plain
            events += more
        assert sorted(each.descriptor for each, _, _ in events) == sorted(
            one.fileno() for one, _ in pairs
        )

    for _, other in pairs:
        other.send(b"x")
    told()
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
    told()
    told()
    for each in registrations:
        notifier.unwatch(each)
    notifier.close()
    for one, other in pairs:
        one.close()
        other.close()


_FILES = [each.__file__ for each in (afd, afd_polls, completion_port)]


class Interrupt:
    """
    Ctrl-C, at the n-th place where CPython heeds it in the notifier: where a
    function of Python begins, and where one of C returns.
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


def test_an_interrupt_at_any_moment_loses_nothing() -> None:
    """Nobody is waited for in vain afterwards, whoever comes and goes meanwhile."""
    count = 12
    pairs = [socket.socketpair() for _ in range(count)]
    for one, _ in pairs:
        one.setblocking(False)
    notifier = CompletionPortNotifier(lambda function: function())
    registrations = watched(notifier, [one for one, _ in pairs])
    ends = {one.fileno(): one for one, _ in pairs}
    came = True
    turn = 0
    while came:
        turn += 1
        due = set()
        # Most of them are a crowd, and some are idle.
        for one, other in pairs[turn % 3 :]:
            other.send(b"x")
            due.add(one.fileno())
        registrations[-1].interest = READ | WRITE if turn % 2 else READ
        everybody = {each: each.interest for each in registrations}
        interrupt = Interrupt(turn)
        try:
            with interrupt:
                notifier.wait(0, {registrations[-1]: registrations[-1].interest})
                notifier.wait(0, {})
        except KeyboardInterrupt:
            pass
        came = interrupt.came
        # One leaves, and comes back.
        notifier.unwatch(registrations[turn % count])
        (registrations[turn % count],) = watched(notifier, [pairs[turn % count][0]])
        everybody = {each: each.interest for each in registrations}
        deadline = time.monotonic() + DEADLINE
        while due:
            assert time.monotonic() < deadline, (turn, due)
            plain, events = notifier.wait(1, everybody)
            assert not plain
            everybody = {}
            for registration, ready, _ in events:
                if ready & READ:
                    due.discard(registration.descriptor)
                    with contextlib.suppress(BlockingIOError):
                        ends[registration.descriptor].recv(100)
    assert turn > 100
    for each in registrations:
        notifier.unwatch(each)
    notifier.close()
    for one, other in pairs:
        one.close()
        other.close()


def test_who_is_always_ready_costs_one_call_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The port is asked for packets in every fourth pass."""
    pairs = [socket.socketpair() for _ in range(11)]
    notifier = CompletionPortNotifier(lambda function: function())
    *crowd, idle = watched(notifier, [one for one, _ in pairs])
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
    # A thread that wakes it is heard at once.
    before = taken
    while taken == before:
        turn()
    notifier.wake()
    turn()
    assert taken == before + 2
    for each in (*crowd, idle):
        notifier.unwatch(each)
    notifier.close()
    for one, other in pairs:
        one.close()
        other.close()


def test_polls_outlive_the_thread_that_issued_them(served: Served) -> None:
    """Windows cancels what a thread has issued, when it ends."""
    client, connection = served.connect()
    thread = threading.Thread(target=served.reactor.iterate, args=(0,))
    client.sendall(b"x")
    spin(served.reactor, lambda: connection.data == b"x")
    thread.start()
    thread.join()
    client.sendall(b"y")
    spin(served.reactor, lambda: connection.data == b"xy")


def test_a_poll_that_windows_cancels_tells_of_nothing(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Who reads for nothing would block, if it is a socket that blocks."""
    one, other = pair
    notifier = CompletionPortNotifier(lambda function: function())
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
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Who closes the last handle to it need not be the notifier."""
    lost: list[Any] = []
    monkeypatch.setattr(afd_polls, "_leaked", lost)
    notifier = CompletionPortNotifier(lambda function: function())
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


def test_nobody_frees_what_the_kernel_writes_to(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """An open notifier stays, though it was forgotten in whatever thread."""
    alive: list[weakref.ref[CompletionPortNotifier]] = []

    def open_and_forget() -> None:
        notifier = CompletionPortNotifier(lambda function: function())
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


def test_what_could_not_be_opened_is_opened_next_time(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    notifier = CompletionPortNotifier(lambda function: function())
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
    # Sockets close in their own time, under Wine.
    deadline = time.monotonic() + 5
    while open_handles() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_handles() <= before


class Events:
    """Events of Windows, whatever Python they come from."""

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


class Told(FileDescriptor):
    """Is told of an event."""

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
    """Of any origin: pywin32 is not needed."""
    told = {events.create(): Told() for _ in range(100)}
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


def test_an_event_that_is_removed_when_it_is_set_already(
    reactor: CompletionPortReactor, events: Events
) -> None:
    """The first to be told removes both: the other is not told any more."""
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


def test_an_event_that_is_set_when_the_port_is_closed(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was reset when it was told of, so that nothing else would tell."""
    called: list[int] = []
    notifier = CompletionPortNotifier(lambda function: function())
    register = windows.overlapped.RegisterWaitWithQueue

    def register_what_is_set(handle: int, port: int, number: int, limit: int) -> Any:
        waiting = register(handle, port, number, limit)
        # What the thread pool does; when, nobody knows.
        windows.post_completion(port, 0, 0, number)
        return waiting

    monkeypatch.setattr(
        windows.overlapped, "RegisterWaitWithQueue", register_what_is_set
    )
    number = notifier.call_once_signalled(events.create(), lambda: called.append(1))
    notifier.close()
    notifier.forget(number)
    assert called == [1]


def test_an_event_whose_owner_is_done(
    reactor: CompletionPortReactor, events: Events
) -> None:
    handle, told = events.create(), Told()
    told.answer = ConnectionFdescWentAway("done")
    reactor.addEvent(handle, told, "is_set")
    events.set(handle)
    spin(reactor, lambda: told.lost)
    events.set(handle)
    settle(reactor)
    assert told.times == 1
    assert told.lost[0].value is told.answer


class Careless(Recorder):
    """Ends in one of many ways, some of them in the middle of something."""

    transport: Any
    random = Random(7)

    def connectionMade(self) -> None:
        self.transport.write(bytes(self.random.choice([1, 100, 70_000])))
        if self.random.random() < 0.5:
            # Most have something under way by then.
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
            # Off and on again, with the poll called back between.
            transport.reactor.removeReader(transport)
            transport.reactor.addReader(transport)
            transport.loseConnection()
        else:
            transport.loseConnection()


# Wine says ENOTCONN of who was reset before it was accepted, which is logged.
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
            # Whoever is left ends now, also who is accepted only now.
            left = [e for e in (*clients.made, *server.connections) if not e.lost]
            for each in left:
                each.transport.abortConnection()
            counts = reactor.statistics()
            return not left and counts["readers"] == counts["armed"] == 1

        # Not by spin(), which sleeps for long when there is nothing to be told.
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

    # What is kept for further ones is there then.
    for _ in range(3):
        rush(500)
    handles, blocks = left()
    for _ in range(7):
        rush(500)
    more_handles, more_blocks = left()
    assert more_handles <= handles
    # Less than a block for each connection: nothing is left of any.
    assert more_blocks < blocks + 1000
