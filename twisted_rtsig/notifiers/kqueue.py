"""
BSD and macOS kqueue: one call tells the kernel what to watch and sleeps until
something has happened.

References: kqueue(2) of FreeBSD, NetBSD, OpenBSD and macOS; Lemon, "Kqueue: a
generic and scalable event notification facility" (2001).
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import stat
import time
from collections.abc import Callable, Mapping, Sequence

from twisted.logger import Logger

from twisted_rtsig.notifiers import GONE, HANGUP, Reported, Unchecked, forks
from twisted_rtsig.notifiers.kqueue_calls import (
    KernelCalls,
    KernelEvent,
    KernelQueue,
)
from twisted_rtsig.notifiers.registration import READ, WRITE, Origin, Registration

# Some facts about kqueue
# -----------------------
#
# * kevent(2) takes a list of changes, and then waits.  So a change costs no call:
#   it goes with the next wait, which happens anyway.
#
# * A change that fails comes back among the events, marked EV_ERROR, with its
#   errno in ``data``, as long as there is room for it.  If any failed, then the
#   call returns at once, and tells of nothing else.  An errno of 0 is a receipt.
#
# * What is watched is a pair of a number and a filter (a "knote"), reading and
#   writing apart.  Without EV_CLEAR it is level-triggered: it is told of in each
#   wait for as long as it is ready.  That needs no check ever.  With EV_CLEAR a
#   read that leaves something behind would have to say so.
#
# * To close a number removes its knotes, whoever else has a duplicate.  So who
#   stops to read is not taken out: nearly always it is closed next, and a removal
#   would fail and cost another call.  If it was only paused and something comes,
#   then it is taken out.  And who reads again is always put in again, since the
#   number may have been closed, and opened, in between.
#
# * Room to write is there nearly always, so that nobody waits for it before a
#   write has met a full buffer.  EV_ONESHOT tells of it once, and needs no
#   removal.
#
# * Events carry what came with EV_ADD in ``udata``: the generation, which tells
#   an event for the former owner of a number.
#
# * EV_EOF says that the other side sends no more, or takes no more, and ``fflags``
#   may hold an errno.  Neither is an excuse not to look: there may be ``data`` to
#   be read before the end, and a refused connection has ``data`` as well (the room
#   in its buffer).  recv(2), send(2) and SO_ERROR find out what has happened.
#
# * A pipe whose other end was closed before is refused, with EPIPE by FreeBSD and
#   with EBADF by NetBSD: the same as an event, since write(2) will say so too.
#
# * Of a regular file, kqueue says that it is readable until its end, and of the
#   end nothing; poll(2) holds it to be always ready, and so does this file.  Some
#   systems refuse some terminals and devices.  Those are left to select(2), which
#   takes the descriptor of a kqueue as well.  (poll(2) on macOS takes no devices.)
#
# * EVFILT_USER is an event that another thread sets off.
#
# * EVFILT_PROC tells of the end of a child, whether anybody listens to SIGCHLD or
#   not, but a moment before waitpid(2) does.  Some systems refuse a child that has
#   begun to end (ESRCH), or one that runs a setuid program (EACCES).  So who was
#   told, or refused, asks waitpid until that knows.
#
# * A forked child does not inherit the queue.  Its number may be another's there,
#   so that the child must not even close it.

# The same everywhere, unlike the filters.
_EV_ADD = 0x0001
_EV_DELETE = 0x0002
_EV_ONESHOT = 0x0010
_EV_CLEAR = 0x0020
_EV_ERROR = 0x4000
_EV_EOF = 0x8000
_NOTE_EXIT = 0x80000000
_NOTE_TRIGGER = 0x01000000

# What one wait may tell of; the rest is told of by the next one.
_EVENTS = 512

# In seconds.  Some systems refuse a timeout of years.
_LONGEST = 24 * 60 * 60

# In seconds: how long after the end of a child, or a refusal, to ask again whether
# it was reaped, and again after twice as long, up to the second one.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 1.0

_log = Logger()

# Some Pythons close them when they are collected, in a child as well.
_inherited: list[KernelQueue] = []


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class KQueueNotifier:
    """
    Kqueue, level-triggered for input and once for output.

    :param calls: the system's, or a test's.
    :ivar can_wake: whether there is :meth:`wake`.
    :raises OSError: if there are no descriptors left.
    """

    def __init__(self, calls: KernelCalls) -> None:
        self._calls = calls
        self._registrations: dict[int, Registration] = {}
        self._queue: KernelQueue | None = None
        self._forks = forks.count
        # Not used twice: 0 is for what is of no registration.
        self._generations = itertools.count(1)
        # Whose input the kernel was told to watch.
        self._reading: set[Registration] = set()
        # For the next wait, beside those that follow from what is unchecked.
        self._changes: list[KernelEvent] = []
        self._check_all = False
        self._always_ready: set[Registration] = set()
        self._selected: set[Registration] = set()
        self._gone: list[Registration] = []
        # By generation: the process, and whom to call.
        self._exits: dict[int, tuple[int, Callable[[], bool]]] = {}
        # Whom to call again, at a time, after which pause.
        self._ending: list[Callable[[], bool]] = []
        self._ending_due = 0.0
        self._pause = _FIRST_PAUSE
        self._woken = False
        self._waits = 0
        self._events = 0
        self._checks = 0
        self._wake_up: KernelEvent | None = None
        if calls.user is not None:
            self._wake_up = calls.kevent(0, calls.user, 0, _NOTE_TRIGGER)
        queue = calls.kqueue()
        self.can_wake = self._listen_for_wakes(queue)
        queue.close()

    def open(self) -> None:
        """See :meth:`Notifier.open`."""
        if self._forks != forks.count:
            self._inherit()
        if self._queue is not None:
            return
        queue = self._calls.kqueue()
        if self.can_wake:
            self._listen_for_wakes(queue)
        for generation, (process, _) in self._exits.items():
            self._changes.append(self._exit_change(process, generation))
        self._check_all = True
        self._queue = queue

    def close(self) -> None:
        """See :meth:`Notifier.close`."""
        if self._forks != forks.count:
            self._inherit()
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
        self._reading.clear()
        self._changes.clear()
        self._selected.clear()
        self._gone.clear()

    def daemonized(self) -> None:
        """See :meth:`Notifier.daemonized`."""
        self._forks = forks.count
        # They are children of the process that was.
        self._exits.clear()
        self._ending.clear()

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        if registration.origin is Origin.SHARED:
            # Fails with EBADF where the next wait would only say so later.
            mode = os.fstat(registration.descriptor).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                self._always_ready.add(registration)
        registration.generation = next(self._generations)
        self._registrations[registration.descriptor] = registration

    def update(self, registration: Registration) -> None:
        """See :meth:`Notifier.update`."""
        if not registration.interest & READ:
            self._reading.discard(registration)

    def unwatch(self, registration: Registration) -> None:
        """See :meth:`Notifier.unwatch`."""
        del self._registrations[registration.descriptor]
        self._reading.discard(registration)
        self._always_ready.discard(registration)
        self._selected.discard(registration)

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """See :meth:`Notifier.wait`."""
        queue = self._queue
        if queue is None or self._forks != forks.count:
            self.open()
            queue = self._queue
            assert queue is not None
        changes = None
        if self._check_all:
            everybody = self._registrations.values()
            changes = self._changes_to_check(dict.fromkeys(everybody, READ | WRITE))
        elif unchecked or self._changes:
            changes = self._changes_to_check(unchecked)
        if self._ending:
            timeout = self._tell_again(timeout)
        if self._woken or self._always_ready:
            self._woken = False
            timeout = 0
        elif timeout is not None and timeout > _LONGEST:
            timeout = _LONGEST
        ready: dict[Registration, int] = {}
        if self._selected:
            happened = self._select_too(queue, timeout, changes, ready)
        else:
            room = max(_EVENTS, len(changes)) if changes else _EVENTS
            happened = queue.control(changes, room, timeout)
        self._waits += 1
        self._events += len(happened)
        if changes:
            # Only now: an interrupt before this leaves them to the next wait.
            self._were_made(changes)
        calls = self._calls
        registrations = self._registrations
        plain: list[Registration] = []
        for event in happened:
            registration = registrations.get(event.ident)
            if event.flags & _EV_ERROR:
                self._has_failed(event, ready)
            elif event.filter == calls.read:
                if (
                    registration is None
                    or registration.generation != event.udata
                    or not registration.interest & READ
                ):
                    self._is_not_for_anybody(event)
                elif registration.interest == READ:
                    if registration.tells_drained:
                        plain.append(registration)
                    elif event.flags & _EV_EOF and not event.data:
                        # Nothing will ever come: who ignores that is told to go.
                        # Of a terminal that was revoked, nobody is told twice.
                        self._reading.discard(registration)
                        ready[registration] = HANGUP
                    else:
                        ready[registration] = READ
                else:
                    ready[registration] = ready.get(registration, 0) | READ
            elif event.filter == calls.write:
                if registration is not None and registration.generation == event.udata:
                    ready[registration] = ready.get(registration, 0) | WRITE
            elif event.filter == calls.process:
                self._has_ended(event)
        for registration in self._always_ready:
            ready[registration] = registration.interest
        if self._gone:
            for registration in self._gone:
                ready[registration] = GONE
            self._gone.clear()
        if ready:
            return plain, [(each, what, 0) for each, what in ready.items()]
        return plain, ()

    def is_hung_up(self, registration: Registration) -> bool:
        """See :meth:`Notifier.is_hung_up`."""
        return True

    def statistics(self) -> Mapping[str, int]:
        """
        See :meth:`Notifier.statistics`.

        ``armed`` counts the connections, ``waits`` the passes, ``events`` what
        kevent(2) has told, ``checks`` the changes that it was given, and
        ``selected`` what is left to select(2) at the moment.
        """
        return {
            "armed": sum(1 for each in self._reading if each.tells_drained),
            "waits": self._waits,
            "events": self._events,
            "checks": self._checks,
            "selected": len(self._selected),
        }

    # Beyond the contract

    def wake(self) -> None:
        """From any thread: end the wait under way, or else the next one."""
        if not self._set_off():
            self._woken = True
            # It may have been opened in between, and sleep already.
            self._set_off()

    def watch_exit(self, process: int, call: Callable[[], bool]) -> None:
        """
        Call ``call`` from within a wait when the child ends, and again some time
        later for as long as it returns True: waitpid(2) may know nothing yet.
        """
        if self._forks != forks.count:
            self._inherit()
        generation = next(self._generations)
        self._exits[generation] = process, call
        if self._queue is not None:
            self._changes.append(self._exit_change(process, generation))

    # Changes

    def _changes_to_check(self, unchecked: Unchecked) -> list[KernelEvent]:
        """What the kernel is to be told, in order."""
        changes = list(self._changes)
        kevent, calls = self._calls.kevent, self._calls
        for registration, directions in unchecked.items():
            descriptor = registration.descriptor
            if (
                self._registrations.get(descriptor) is not registration
                or registration in self._selected
                or registration in self._always_ready
            ):
                continue
            generation = registration.generation
            directions &= registration.interest
            if directions & READ and registration not in self._reading:
                changes.append(
                    kevent(descriptor, calls.read, _EV_ADD, udata=generation)
                )
            if directions & WRITE:
                changes.append(
                    kevent(
                        descriptor,
                        calls.write,
                        _EV_ADD | _EV_ONESHOT,
                        udata=generation,
                    )
                )
        return changes

    def _were_made(self, changes: Sequence[KernelEvent]) -> None:
        self._checks += len(changes)
        self._check_all = False
        if self._changes:
            # A signal handler may have added others in the middle of the sleep.
            made = {id(each) for each in changes}
            self._changes = [each for each in self._changes if id(each) not in made]
        for change in changes:
            if change.filter != self._calls.read or not change.flags & _EV_ADD:
                continue
            registration = self._registrations.get(change.ident)
            if (
                registration is not None
                and registration.generation == change.udata
                and registration.interest & READ
            ):
                self._reading.add(registration)

    def _is_not_for_anybody(self, event: KernelEvent) -> None:
        """Input for who has stopped to read: take it out."""
        registration = self._registrations.get(event.ident)
        if registration is not None and registration.interest & READ:
            # Another has the number now, and is about to be put in.
            return
        self._changes.append(self._calls.kevent(event.ident, event.filter, _EV_DELETE))

    def _has_failed(self, event: KernelEvent, ready: dict[Registration, int]) -> None:
        """A change came back, with what became of it in ``data``."""
        registration = self._registrations.get(event.ident)
        if not event.data:
            return
        if event.filter == self._calls.process:
            # It has ended already, or will not be told of.
            self._has_ended(event)
        elif (
            registration is not None
            and registration.generation == event.udata
            and event.filter in (self._calls.read, self._calls.write)
        ):
            # (What was to be taken out, and is of no registration, has gone by
            # itself.)
            if event.filter == self._calls.read:
                self._reading.discard(registration)
            if event.data == errno.EPIPE or (
                event.data == errno.EBADF and _is_open(event.ident)
            ):
                direction = READ if event.filter == self._calls.read else WRITE
                ready[registration] = ready.get(registration, 0) | direction
            else:
                self._leave_to_select(registration, event.data)

    def _exit_change(self, process: int, generation: int) -> KernelEvent:
        return self._calls.kevent(
            process,
            self._calls.process,
            _EV_ADD | _EV_ONESHOT,
            _NOTE_EXIT,
            udata=generation,
        )

    def _has_ended(self, event: KernelEvent) -> None:
        _, call = self._exits.pop(event.udata, (0, None))
        if call is not None and call():
            self._ending.append(call)
            self._pause = _FIRST_PAUSE
            self._ending_due = time.monotonic() + self._pause

    def _tell_again(self, timeout: float | None) -> float | None:
        """How long the wait may take for those that are not reaped yet."""
        now = time.monotonic()
        if now >= self._ending_due:
            self._ending = [call for call in self._ending if call()]
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._ending_due = now + self._pause
        if not self._ending:
            return timeout
        left = self._ending_due - now
        return left if timeout is None else min(timeout, left)

    # What kqueue does not watch

    def _leave_to_select(self, registration: Registration, error: int) -> None:
        if registration in self._selected:
            # Both directions are refused.
            return
        descriptor = registration.descriptor
        try:
            select.select([descriptor], [], [], 0)
        except (OSError, ValueError):
            # It was closed; or its number is too high for select(2).
            self._gone.append(registration)
        else:
            _log.warn(
                "kqueue refuses to watch descriptor {descriptor} ({error}), so "
                "select(2) does it from now on, at the cost of another call in "
                "each pass.",
                descriptor=descriptor,
                error=os.strerror(error),
            )
            self._selected.add(registration)

    def _select_too(
        self,
        queue: KernelQueue,
        timeout: float | None,
        changes: Sequence[KernelEvent] | None,
        ready: dict[Registration, int],
    ) -> list[KernelEvent]:
        """Sleep in select(2), which watches the queue as well."""
        happened = queue.control(changes, max(_EVENTS, len(changes or ())), 0)
        if happened:
            timeout = 0
        readers = {
            each.descriptor: each for each in self._selected if each.interest & READ
        }
        writers = {
            each.descriptor: each for each in self._selected if each.interest & WRITE
        }
        try:
            readable, writable, _ = select.select(
                [queue.fileno(), *readers], writers, [], timeout
            )
        except OSError:
            self._gone += [
                each for each in self._selected if not _is_open(each.descriptor)
            ]
            return happened
        except ValueError:
            # It is the number of the queue itself that is too high.
            self._gone.extend(self._selected)
            return happened
        for descriptor in readable:
            if descriptor in readers:
                ready[readers[descriptor]] = READ
            elif not happened:
                happened = queue.control(None, _EVENTS, 0)
        for descriptor in writable:
            registration = writers[descriptor]
            ready[registration] = ready.get(registration, 0) | WRITE
        return happened

    # The queue

    def _listen_for_wakes(self, queue: KernelQueue) -> bool:
        """Whether the system has EVFILT_USER."""
        if self._wake_up is None:
            return False
        change = self._calls.kevent(0, self._wake_up.filter, _EV_ADD | _EV_CLEAR)
        try:
            queue.control([change], 0, 0)
        except OSError:
            return False
        return True

    def _set_off(self) -> bool:
        """Set off the event for which the wait listens, if there is a queue."""
        queue = self._queue
        if queue is None or self._forks != forks.count or self._wake_up is None:
            return False
        try:
            queue.control([self._wake_up], 0, 0)
        except (OSError, ValueError):
            # Closed in the meantime.
            return False
        return True

    def _inherit(self) -> None:
        """This is a forked child, and its parent may go on with the reactor."""
        self._forks = forks.count
        queue, self._queue = self._queue, None
        if queue is not None:
            _inherited.append(queue)
        # They are children of the parent.
        self._exits.clear()
        self._ending.clear()
        self.close()
