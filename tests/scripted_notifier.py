"""
Notifiers whose kernel is a script: a test says what each wait returns.

:class:`ScriptedNotifier` returns what it was told to.  :class:`EdgeNotifier`
and :class:`OneShotNotifier` work it out from a small fake kernel, each in the
way of one family of real ones, and both as unhelpfully as the contract allows.
All of them also hold the engine to its side of the contract.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

from twisted_rtsig.notifiers import GONE, HANGUP, READ, WRITE, Event, Registration

FAKE = 100_000
"""
Numbers from here on are fake.  Below is the waker that every reactor makes: it
is watched, and never ready.
"""


class ScriptedNotifier:
    """
    A notifier that returns one batch of events after the other, then nothing.

    :ivar batches: what the next calls of ``wait`` return or raise.
    :ivar watched: the registrations, by number.
    :ivar waits: the arguments of each ``wait``.
    :ivar life: the calls of ``open``, ``close`` and ``daemonized``.
    :ivar refused: the numbers that ``watch`` refuses.
    :ivar raises: what the next ``wait`` raises, and whether it has taken the
        events from the kernel by then.
    :ivar on_events: called with what ``wait`` is about to return.
    :ivar complaints: how the engine has broken the contract.  An exception
        alone could be lost among those that the engine catches.
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
        # What a wait was given and has not reported since.
        self._armed: dict[Registration, int] = {}
        # All there ever were, in order.
        self._known: dict[Registration, None] = {}

    # The contract

    def open(self) -> None:
        self.life.append("open")

    def close(self) -> None:
        self.life.append("close")

    def daemonized(self) -> None:
        self.life.append("daemonized")

    def watch(self, registration: Registration) -> None:
        number = registration.descriptor
        self._expect(number not in self.watched, f"{number} is watched already")
        self._expect(registration not in self._known, f"{registration} had ended")
        self._expect(registration.interest != 0, f"{registration} is for nobody")
        if number in self.refused:
            raise OSError(errno.ENOMEM, "refused by the script")
        self.watched[number] = registration
        self._known[registration] = None
        self._armed[registration] = 0

    def update(self, registration: Registration) -> None:
        self._expect(self._is_live(registration), f"{registration} is not watched")
        self._expect(registration.interest != 0, f"{registration} should end")
        # A direction that comes anew was not checked since.
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
            lost = registration.interest & ~(armed | unchecked.get(registration, 0))
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
        return [], events

    def statistics(self) -> Mapping[str, int]:
        return {"waits": len(self.waits)}

    # The script

    def _happened(self, unchecked: Mapping[Registration, int]) -> Sequence[Event]:
        return self.batches.popleft() if self.batches else []

    def _is_live(self, registration: Registration) -> bool:
        return self.watched.get(registration.descriptor) is registration

    def _expect(self, truth: bool, complaint: str) -> None:
        if not truth:
            self.complaints.append(complaint)


class File:
    """An open file description; ``levels`` says what it is ready for."""

    def __init__(self) -> None:
        self.levels = 0


class KernelNotifier(ScriptedNotifier):
    """
    A notifier and the kernel below it.

    :ivar files: what is open, by number.
    :ivar bound: what was open when a registration began.
    :ivar random: puts the events out of order.
    :ivar hold: whether some events come late.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[int, File] = {}
        self.bound: dict[Registration, File] = {}
        self.random = Random(0)
        self.hold = False
        self._pending: list[Event] = []

    def file_opens(self, number: int) -> None:
        self.files[number] = File()

    def file_closes(self, number: int) -> None:
        del self.files[number]

    def becomes_ready(self, number: int, what: int) -> None:
        self.files[number].levels |= what

    def is_ready_no_more(self, number: int, what: int) -> None:
        self.files[number].levels &= ~what

    def stray(self, which: int, ready: int) -> None:
        """One more event, of any registration there ever was."""
        known = [each for each in self._known if each.descriptor >= FAKE]
        if known:
            registration = known[which % len(known)]
            if self._is_live(registration):
                # May be called for nothing, but not disconnected for nothing.
                ready &= READ | WRITE
            self._pending.append((registration, ready, 0))

    def watch(self, registration: Registration) -> None:
        number = registration.descriptor
        if number < FAKE:
            self.files.setdefault(number, File())
        if number not in self.files:
            raise OSError(errno.EBADF, "not open")
        super().watch(registration)
        self.bound[registration] = self.files[number]

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
    Persistent and edge-triggered, as realtime signals, epoll and kqueue are.

    What is armed tells once when it becomes ready.  An edge that was queued
    stays, whatever becomes of the registration and of the descriptor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._overflowed = False

    def becomes_ready(self, number: int, what: int) -> None:
        file = self.files[number]
        new = what & ~file.levels
        super().becomes_ready(number, what)
        if new:
            for registration, bound in self.bound.items():
                if bound is file:
                    self._pending.append((registration, new, 0))

    def overflow(self) -> None:
        """The queue was full: its edges are lost, and everything is checked."""
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
    One asynchronous poll for each registration, which any event uses up: AFD.

    To check one direction again takes a new poll for both.  What has completed
    already is told all the same, and so is the poll of a registration that has
    ended since.
    """

    def __init__(self) -> None:
        super().__init__()
        self._polls: dict[Registration, tuple[File, int]] = {}

    def becomes_ready(self, number: int, what: int) -> None:
        super().becomes_ready(number, what)
        self._complete(self.files[number], what)

    def file_closes(self, number: int) -> None:
        file = self.files[number]
        super().file_closes(number)
        self._complete(file, GONE)

    def unwatch(self, registration: Registration) -> None:
        super().unwatch(registration)
        poll = self._polls.pop(registration, None)
        if poll is not None:
            # It is cancelled, but something may have happened just before.
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
            # What comes of a poll that gives way to another is not told.
            self._polls.pop(registration, None)
            mask = registration.interest
            what = self._level(registration, mask)
            if what:
                yield registration, what, mask & ~what
            else:
                self._polls[registration] = self.files[registration.descriptor], mask
