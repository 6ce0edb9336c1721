"""
Notifiers whose kernel is a script: a test says what each wait returns.

:class:`ScriptedNotifier` returns the events that a test gives it.
:class:`EdgeNotifier` and :class:`OneShotNotifier` find their events in a small fake
kernel, each as one family of real kernels does, and report as few of them and as late
as the contract allows.  :class:`StreamNotifier` adds the parts for streams: edges and
plain input.  All of them also check that the engine keeps its side of the contract.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

from twisted_rtsig.notifiers import GONE, HANGUP, READ, WRITE, Event, Registration

FAKE = 100_000
"""
Descriptors from here on are fake.  The descriptor of the waker, which every reactor
makes, is below: it is watched, and never ready.
"""


class ScriptedNotifier:
    """
    A notifier that returns one batch of events after the other, and then no more.

    :ivar batches: the events that the next calls of ``wait`` return.
    :ivar watched: the registrations, by descriptor.
    :ivar waits: the arguments of each ``wait``.
    :ivar life: the calls of ``open``, ``close`` and ``daemonized``.
    :ivar refused: the descriptors that ``watch`` refuses.
    :ivar raises: raised by the next ``wait``, and whether it has taken the events
        from the kernel by then.
    :ivar on_events: called with the events that ``wait`` is about to return.
    :ivar complaints: how the engine has broken the contract.  An exception alone
        could get lost among those that the engine catches.
    """

    def __init__(self) -> None:
        self.batches: deque[Sequence[Event]] = deque()
        self.watched: dict[int, Registration] = {}
        self.waits: list[tuple[float | None, dict[Registration, int]]] = []
        self.life: list[str] = []
        self.refused: set[int] = set()
        self.raises: tuple[BaseException, bool] | None = None
        self.on_events: Callable[[Sequence[Event]], None] = lambda events: None
        self.complaints: list[str] = []
        # The directions that a wait has checked and that were not reported since.
        self._armed: dict[Registration, int] = {}
        # All registrations, also ended ones, in order.
        self._known: dict[Registration, None] = {}

    # The contract

    def open(self) -> None:
        self.life.append("open")

    def close(self) -> None:
        self.life.append("close")

    def daemonized(self) -> None:
        self.life.append("daemonized")

    def watch(self, registration: Registration) -> None:
        descriptor = registration.descriptor
        self._expect(descriptor not in self.watched, f"{descriptor} is watched already")
        self._expect(registration not in self._known, f"{registration} had ended")
        self._expect(registration.interest != 0, f"{registration} has no interest")
        if descriptor in self.refused:
            raise OSError(errno.ENOMEM, "refused by the script")
        self.watched[descriptor] = registration
        self._known[registration] = None
        self._armed[registration] = 0

    def update(self, registration: Registration) -> None:
        self._expect(self._is_live(registration), f"{registration} is not watched")
        self._expect(registration.interest != 0, f"{registration} should end")
        # A direction that begins again has to be checked again.
        self._armed[registration] &= registration.interest

    def unwatch(self, registration: Registration) -> None:
        self._expect(self._is_live(registration), f"{registration} is not watched")
        self.watched.pop(registration.descriptor, None)
        self._armed.pop(registration, None)

    def wait(
        self, timeout: float | None, unchecked: Mapping[Registration, int]
    ) -> tuple[Sequence[Registration], Sequence[Event]]:
        self.waits.append((timeout, dict(unchecked)))
        raises, self.raises = self.raises, None
        if raises is not None and not raises[1]:
            raise raises[0]
        for registration, armed in self._armed.items():
            known = armed | unchecked.get(registration, 0)
            lost = registration.interest & ~(known | self._spared(registration))
            self._expect(not lost, f"{registration}: {lost} is not armed")
        events = self._happened(unchecked)
        for registration, directions in unchecked.items():
            if registration in self._armed:
                self._armed[registration] |= directions & registration.interest
        for registration, ready, disarmed in events:
            if ready & (HANGUP | GONE):
                disarmed = READ | WRITE
            if registration in self._armed:
                self._armed[registration] &= ~(ready | disarmed)
        if raises is not None:
            raise raises[0]
        self.on_events(events)
        plain = self._plain_input(events)
        return plain, [event for event in events if event[0] not in plain]

    def is_hung_up(self, registration: Registration) -> bool:
        # The next batch says whether it is.
        return True

    def statistics(self) -> Mapping[str, int]:
        return {"waits": len(self.waits)}

    # The script

    def _happened(self, unchecked: Mapping[Registration, int]) -> Sequence[Event]:
        return self.batches.popleft() if self.batches else []

    def _spared(self, registration: Registration) -> int:
        """The directions that need neither be armed nor be checked by this wait."""
        return 0

    def _plain_input(self, events: Sequence[Event]) -> Sequence[Registration]:
        """The registrations whose events are reported as plain input."""
        return []

    def _is_live(self, registration: Registration) -> bool:
        return self.watched.get(registration.descriptor) is registration

    def _expect(self, truth: bool, complaint: str) -> None:
        if not truth:
            self.complaints.append(complaint)


class File:
    """An open file description.  ``levels`` are the directions that are ready."""

    def __init__(self) -> None:
        self.levels = 0


class KernelNotifier(ScriptedNotifier):
    """
    A notifier, and the kernel below it.

    :ivar files: the open files, by descriptor.
    :ivar bound: the file of each registration when it began.
    :ivar random: shuffles the events.
    :ivar hold: whether some events come late.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[int, File] = {}
        self.bound: dict[Registration, File] = {}
        self.random = Random(0)
        self.hold = False
        self._pending: list[Event] = []

    def file_opens(self, descriptor: int) -> None:
        self.files[descriptor] = File()

    def file_closes(self, descriptor: int) -> None:
        del self.files[descriptor]

    def becomes_ready(self, descriptor: int, what: int) -> None:
        self.files[descriptor].levels |= what

    def is_ready_no_more(self, descriptor: int, what: int) -> None:
        self.files[descriptor].levels &= ~what

    def stray(self, which: int, ready: int) -> None:
        """Report one more event, of any registration, also of an ended one."""
        known = [each for each in self._known if each.descriptor >= FAKE]
        if known:
            registration = known[which % len(known)]
            if self._is_live(registration):
                # It may be called without a reason, but not be disconnected.
                ready &= READ | WRITE
            self._pending.append((registration, ready, 0))

    def watch(self, registration: Registration) -> None:
        descriptor = registration.descriptor
        if descriptor < FAKE:
            self.files.setdefault(descriptor, File())
        if descriptor not in self.files:
            raise OSError(errno.EBADF, "not open")
        super().watch(registration)
        self.bound[registration] = self.files[descriptor]

    def unwatch(self, registration: Registration) -> None:
        super().unwatch(registration)
        del self.bound[registration]

    def _happened(self, unchecked: Mapping[Registration, int]) -> Sequence[Event]:
        self._pending.extend(self._check(unchecked))
        self.random.shuffle(self._pending)
        late = len(self._pending) // 2 if self.hold else 0
        held, due = self._pending[:late], self._pending[late:]
        self._pending = held
        merged: dict[Registration, tuple[int, int]] = {}
        for registration, ready, disarmed in due:
            before = merged.get(registration, (0, 0))
            merged[registration] = before[0] | ready, before[1] | disarmed
        return [
            (registration, ready, disarmed & ~ready)
            for registration, (ready, disarmed) in merged.items()
        ]

    def _check(self, unchecked: Mapping[Registration, int]) -> Iterable[Event]:
        raise NotImplementedError

    def _level(self, registration: Registration, directions: int) -> int:
        file = self.files.get(registration.descriptor)
        if file is None:
            return GONE
        return file.levels & (directions & registration.interest | HANGUP)


class EdgeNotifier(KernelNotifier):
    """
    A persistent and edge-triggered notifier, like realtime signals, epoll and kqueue.

    An armed registration is reported once when it becomes ready.  An edge that was
    queued stays, even if the registration ends or the descriptor is closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._overflowed = False

    def becomes_ready(self, descriptor: int, what: int) -> None:
        file = self.files[descriptor]
        new = what & ~file.levels
        super().becomes_ready(descriptor, what)
        if new:
            for registration, bound in self.bound.items():
                if bound is file:
                    self._pending.append((registration, new, 0))

    def overflow(self) -> None:
        """Lose the edges of the full queue, and check all registrations."""
        self._pending.clear()
        self._overflowed = True

    def _check(self, unchecked: Mapping[Registration, int]) -> Iterable[Event]:
        if self._overflowed:
            self._overflowed = False
            unchecked = dict.fromkeys(self.watched.values(), READ | WRITE)
        for registration, directions in unchecked.items():
            if self._is_live(registration):
                what = self._level(registration, directions)
                if what:
                    yield registration, what, 0


class OneShotNotifier(KernelNotifier):
    """
    A notifier with one asynchronous poll for each registration, which any event
    completes, as with AFD.

    Checking one direction again takes a new poll for both.  A poll that has completed
    already is reported nevertheless, even if its registration has ended since.
    """

    def __init__(self) -> None:
        super().__init__()
        self._polls: dict[Registration, tuple[File, int]] = {}

    def becomes_ready(self, descriptor: int, what: int) -> None:
        super().becomes_ready(descriptor, what)
        self._complete(self.files[descriptor], what)

    def file_closes(self, descriptor: int) -> None:
        file = self.files[descriptor]
        super().file_closes(descriptor)
        self._complete(file, GONE)

    def unwatch(self, registration: Registration) -> None:
        super().unwatch(registration)
        poll = self._polls.pop(registration, None)
        if poll is not None:
            # The poll is cancelled, but may have completed just before.
            ready = self.random.choice([0, READ, WRITE]) & poll[1]
            self._pending.append((registration, ready, poll[1] & ~ready))

    def _complete(self, file: File, what: int) -> None:
        for registration, (polled, mask) in list(self._polls.items()):
            found = what & (mask | HANGUP | GONE)
            if polled is file and found:
                del self._polls[registration]
                self._pending.append((registration, found, mask & ~found))

    def _check(self, unchecked: Mapping[Registration, int]) -> Iterable[Event]:
        for registration in unchecked:
            if not self._is_live(registration):
                continue
            # The result of a poll that is replaced by another is not reported.
            self._polls.pop(registration, None)
            mask = registration.interest
            what = self._level(registration, mask)
            if what:
                yield registration, what, mask & ~what
            else:
                self._polls[registration] = self.files[registration.descriptor], mask


class StreamSocket(File):
    """
    A connected stream socket: the methods that the engine calls, and those of the peer.

    :ivar descriptor: its descriptor, until it is closed.
    :ivar arrived: all data that its peer has sent.
    :ivar sent: all data that it has sent.
    :ivar room: how many more bytes it can send.
    :ivar ended: the peer has ended its output.
    :ivar reset: the peer has reset the connection.  Data that has arrived can still be
        read.
    :ivar shut: this socket has ended its output.
    :ivar on_recv: called before each read.
    :ivar on_send: called before each attempt to send.
    :ivar on_sent: called after each send, with whether there was room for all.
    """

    def __init__(self, notifier: StreamNotifier, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.arrived = b""
        self.sent = b""
        self.room = 10
        self.ended = False
        self.reset = False
        self.shut = False
        self.on_recv: Callable[[], None] = lambda: None
        self.on_send: Callable[[], None] = lambda: None
        self.on_sent: Callable[[bool], None] = lambda complete: None
        self._notifier = notifier
        self._taken = 0
        self._update()

    # The peer

    def peer_sends(self, data: bytes) -> None:
        if not self.ended and not self.reset:
            self.arrived += data
            self._arrives(READ)

    def peer_ends(self) -> None:
        self.ended = True
        self._arrives(READ, end=True)

    def peer_resets(self) -> None:
        self.reset = True
        self._arrives(READ | WRITE, end=True)

    def peer_reads(self, size: int) -> None:
        self.room += size
        self._arrives(WRITE)

    def bytes_to_read(self) -> int:
        return len(self.arrived) - self._taken

    def all_is_read(self) -> bool:
        return not self.bytes_to_read()

    def ends_behind_data(self) -> bool:
        return self.ended and not self.reset and self._taken < len(self.arrived)

    # The engine

    def fileno(self) -> int:
        return self.descriptor

    def setblocking(self, blocking: bool) -> None:
        pass

    def setsockopt(self, *option: object) -> None:
        pass

    def recv(self, size: int) -> bytes:
        self.on_recv()
        self._fail_if_closed()
        if self.reset and self.all_is_read():
            raise ConnectionResetError(errno.ECONNRESET, "reset by the script")
        data = self.arrived[self._taken : self._taken + size]
        self._taken += len(data)
        self._update()
        would_block = not data and not self.ended and not self.reset
        self._notifier.was_read(self, would_block, len(data) < size)
        if would_block:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        return data

    def send(self, data: bytes | memoryview) -> int:
        self.on_send()
        self._fail_if_closed()
        if self.reset or self.shut:
            raise BrokenPipeError(errno.EPIPE, "reset by the script")
        size = min(len(data), self.room)
        if not size:
            raise BlockingIOError(errno.EAGAIN, "no room")
        self.sent += bytes(data[:size])
        self.room -= size
        self._update()
        self.on_sent(size == len(data))
        return size

    def shutdown(self, how: int) -> None:
        self.shut = True
        if self.ended:
            self._arrives(READ, end=True)

    def close(self) -> None:
        if self.descriptor != -1:
            self._notifier.file_closes(self.descriptor)
            self.descriptor = -1

    def _fail_if_closed(self) -> None:
        if self.descriptor == -1:
            raise OSError(errno.EBADF, "closed by the script")

    def _update(self) -> None:
        self.levels = 0
        if self.reset or self.ended or self._taken < len(self.arrived):
            self.levels |= READ
        if self.reset or self.room:
            self.levels |= WRITE
        if self.reset or (self.ended and self.shut):
            self.levels |= HANGUP

    def _arrives(self, what: int, end: bool = False) -> None:
        self._update()
        self._notifier.arrives(self, what | self.levels & HANGUP, end)


class StreamNotifier(KernelNotifier):
    """
    A persistent and edge-triggered notifier that reports plain input.

    It reports all events that the contract demands, and other events at random.

    :ivar edges: the edges of registrations that begin from now on, if they tell when
        they are drained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.edges = READ | WRITE
        # Reported as plain input by the last wait, and not read since.
        self._unread: set[Registration] = set()
        self._level_triggered: set[Registration] = set()

    def distrust(self, descriptor: int) -> None:
        """
        Give up the edges of a registration, as a kernel does at urgent data.  Each wait
        from now on checks it, even if the engine takes it for armed.
        """
        if descriptor in self.watched:
            self.watched[descriptor].edges = 0
            self._level_triggered.add(self.watched[descriptor])

    def arrives(self, file: StreamSocket, what: int, end: bool) -> None:
        for registration, bound in self.bound.items():
            if bound is not file:
                continue
            owed = bool(self._armed[registration] & what)
            if end and registration in self._unread:
                # The short read that is still to come will not show the end.
                owed = True
            if owed or self.random.random() < 0.5:
                self._pending.append((registration, what, 0))

    def was_read(self, file: StreamSocket, would_block: bool, short: bool) -> None:
        for registration, bound in self.bound.items():
            if bound is not file:
                continue
            drained = would_block or (short and registration in self._unread)
            self._unread.discard(registration)
            if drained:
                self._armed[registration] |= registration.edges & READ

    def is_quiet(self) -> bool:
        """Whether the last wait had no timeout, nothing to check, and no events."""
        return self.waits[-1] == (None, {}) and not self._pending

    def watch(self, registration: Registration) -> None:
        super().watch(registration)
        if registration.tells_drained:
            registration.edges = self.edges

    def _spared(self, registration: Registration) -> int:
        if registration in self._level_triggered:
            return READ | WRITE
        # The engine does not sleep if it has to read on after this wait.
        return registration.edges & READ if self.waits[-1][0] == 0 else 0

    def _check(self, unchecked: Mapping[Registration, int]) -> Iterable[Event]:
        for registration in self.watched.values():
            directions = unchecked.get(registration, 0)
            if registration in self._level_triggered:
                directions = READ | WRITE
            if directions & registration.interest:
                what = self._level(registration, directions)
                if what:
                    yield registration, what, 0

    def _plain_input(self, events: Sequence[Event]) -> Sequence[Registration]:
        plain = []
        for registration, ready, _ in events:
            edge = ready == READ and registration.edges & READ
            if edge and self.random.random() < 0.7:
                plain.append(registration)
                file = self.bound.get(registration)
                if isinstance(file, StreamSocket) and file.ends_behind_data():
                    # A short read does not show the end.
                    self._pending.append((registration, READ, 0))
        self._unread = set(plain)
        return plain
