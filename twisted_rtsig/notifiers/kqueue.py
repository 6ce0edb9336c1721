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
# * kevent(2) takes a list of changes, and then waits.  So a change needs no call of
#   its own: it is passed to the next wait, which happens anyway.
#
# * A change that fails comes back among the events, if there is room for it.  It is
#   marked EV_ERROR, and has its errno in ``data``.  If any change fails, the call
#   returns at once, and reports no other events.  An errno of 0 is a receipt.
#
# * The kernel watches a pair of a number and a filter (a "knote"); reading and writing
#   have a filter each.  Without EV_CLEAR a knote is level-triggered: each wait reports
#   it for as long as it is ready, so it never needs a check.  With EV_CLEAR, a reader
#   would have to tell when a read has left data.
#
# * close(2) removes the knotes of the number, even if the description has other
#   descriptors.  So when a reader is removed, its knote stays: nearly always the
#   descriptor is closed next, and removing the knote would fail and cost another call.
#   If the descriptor was only paused and gets input, the knote is removed then.  When a
#   reader is added again, its knote is always added again, since the number may have
#   been closed and reused in between.
#
# * There is nearly always room to write, so nothing waits for it until a write has met
#   a full buffer.  EV_ONESHOT reports it once, and needs no removal.
#
# * An event has the ``udata`` of its EV_ADD.  That is the generation, by which an event
#   for a former owner of the number is recognized.
#
# * EV_EOF says that the other side will not send any more, or not receive any more, and
#   ``fflags`` may hold an errno.  The descriptor must be read or written all the same.
#   There may be ``data`` to read before the end, and a refused connection has ``data``
#   as well (the room in its buffer).  recv(2), send(2) and SO_ERROR find out what has
#   happened.
#
# * A pipe whose other end was closed before is refused: by FreeBSD with EPIPE, by
#   NetBSD with EBADF.  That counts as an event, since write(2) will fail likewise.
#
# * kqueue reports a regular file as readable until its end, and does not report the
#   end.  For poll(2) files are always ready, and so they are here.  Some systems refuse
#   some terminals and devices.  These are watched by select(2), which can watch the
#   descriptor of a kqueue as well.  (poll(2) on macOS does not support devices.)
#
# * EVFILT_USER is an event that another thread triggers.
#
# * EVFILT_PROC reports the end of a child, even if nothing handles SIGCHLD, but a
#   moment before waitpid(2) does.  Some systems refuse a child that has begun to end
#   (ESRCH), or one that runs a setuid program (EACCES).  So after the report, or the
#   refusal, waitpid is called until it knows of the end.
#
# * A forked child does not inherit the queue.  Its number may belong to another file
#   there, so the child must not even close it.

# These are the same on all systems, unlike the filters.
_EV_ADD = 0x0001
_EV_DELETE = 0x0002
_EV_ONESHOT = 0x0010
_EV_CLEAR = 0x0020
_EV_ERROR = 0x4000
_EV_EOF = 0x8000
_NOTE_EXIT = 0x80000000
_NOTE_TRIGGER = 0x01000000

# The most events that one wait reports; the next wait reports the rest.
_EVENTS = 512

# In seconds.  Some systems refuse a timeout of years.
_LONGEST = 24 * 60 * 60

# In seconds: the pause after the end of a child, or a refusal, before the callback is
# called again to ask whether the child was reaped.  It is doubled each time, up to the
# longest one.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 1.0

_log = Logger()

# Queues of parent processes, kept alive: some Pythons close a queue when it is
# collected, in a child as well.
_inherited: list[KernelQueue] = []


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class KQueueNotifier:
    """
    Kqueue, level-triggered for input and one-shot for output.

    :param calls: the calls of the system, or of a test.
    :ivar can_wake: whether :meth:`wake` works on this system.
    :raises OSError: if no descriptors are left.
    """

    def __init__(self, calls: KernelCalls) -> None:
        self._calls = calls
        self._registrations: dict[int, Registration] = {}
        self._queue: KernelQueue | None = None
        self._forks = forks.count
        # The generation 0 is for events that belong to no registration.
        self._generations = itertools.count(1)
        # Registrations whose input the kernel watches.
        self._reading: set[Registration] = set()
        # Changes for the next wait, besides those for unchecked directions.
        self._changes: list[KernelEvent] = []
        self._check_all = False
        self._always_ready: set[Registration] = set()
        self._selected: set[Registration] = set()
        self._gone: list[Registration] = []
        # For each watched child, by generation: its process ID, and the callback.
        self._exits: dict[int, tuple[int, Callable[[], bool]]] = {}
        # Callbacks of children that are not reaped yet; when to call them again; and
        # the pause before that.
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
        # The children are those of the former process.
        self._exits.clear()
        self._ending.clear()

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        if registration.origin is Origin.SHARED:
            # Fails with EBADF now; the next wait would find out later.
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
            watched = self._registrations.values()
            changes = self._changes_to_check(dict.fromkeys(watched, READ | WRITE))
        elif unchecked or self._changes:
            changes = self._changes_to_check(unchecked)
        if self._ending:
            timeout = self._call_ending(timeout)
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
            # Not earlier: after an interrupt before this, the next wait makes them.
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
                    self._remove_knote(event)
                elif registration.interest == READ:
                    if registration.tells_drained:
                        plain.append(registration)
                    elif event.flags & _EV_EOF and not event.data:
                        # No input will come any more.  A reader that ignores this is
                        # disconnected in the end.  The kernel does not report a revoked
                        # terminal a second time.
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

        ``armed`` counts the connections, ``waits`` the passes, ``events`` the events of
        kevent(2), ``checks`` the changes passed to it, and ``selected`` the descriptors
        that select(2) watches at the moment.
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
        """End the wait under way, or else the next one; from any thread."""
        if not self._trigger_wake_up():
            self._woken = True
            # The queue may have been opened in between, and its thread may sleep
            # already.
            self._trigger_wake_up()

    def watch_exit(self, process: int, call: Callable[[], bool]) -> None:
        """
        Call ``call`` within a wait when the child ends, and again after a pause for as
        long as it returns True: waitpid(2) may not know of the end yet.
        """
        if self._forks != forks.count:
            self._inherit()
        generation = next(self._generations)
        self._exits[generation] = process, call
        if self._queue is not None:
            self._changes.append(self._exit_change(process, generation))

    # Changes

    def _changes_to_check(self, unchecked: Unchecked) -> list[KernelEvent]:
        """The changes to pass to the kernel, in order."""
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
            # A signal handler may have added others during the sleep.
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

    def _remove_knote(self, event: KernelEvent) -> None:
        """Remove a knote whose reader was removed."""
        registration = self._registrations.get(event.ident)
        if registration is not None and registration.interest & READ:
            # The number was reused, and the next wait adds it anew.
            return
        self._changes.append(self._calls.kevent(event.ident, event.filter, _EV_DELETE))

    def _has_failed(self, event: KernelEvent, ready: dict[Registration, int]) -> None:
        """Handle a change that came back, with its errno in ``data``."""
        registration = self._registrations.get(event.ident)
        if not event.data:
            return
        if event.filter == self._calls.process:
            # It has ended already, or its end will not be reported.
            self._has_ended(event)
        elif (
            registration is not None
            and registration.generation == event.udata
            and event.filter in (self._calls.read, self._calls.write)
        ):
            # (A removal has generation 0, and is not meant here: the knote has
            # disappeared by itself.)
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

    def _call_ending(self, timeout: float | None) -> float | None:
        """
        Call the callbacks of children that are not reaped yet, if it is time.

        :return: how long the wait may take then.
        """
        now = time.monotonic()
        if now >= self._ending_due:
            self._ending = [call for call in self._ending if call()]
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._ending_due = now + self._pause
        if not self._ending:
            return timeout
        left = self._ending_due - now
        return left if timeout is None else min(timeout, left)

    # Descriptors that kqueue refuses

    def _leave_to_select(self, registration: Registration, error: int) -> None:
        if registration in self._selected:
            # Both directions are refused.
            return
        descriptor = registration.descriptor
        try:
            select.select([descriptor], [], [], 0)
        except (OSError, ValueError):
            # It was closed, or its number is too high for select(2).
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
        """Sleep in select(2), which also watches the queue."""
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
            # The number of the queue itself is too high.
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

    def _trigger_wake_up(self) -> bool:
        """
        Trigger the event that ends a wait.

        :return: False if there is no queue.
        """
        queue = self._queue
        if queue is None or self._forks != forks.count or self._wake_up is None:
            return False
        try:
            queue.control([self._wake_up], 0, 0)
        except (OSError, ValueError):
            # It was closed meanwhile.
            return False
        return True

    def _inherit(self) -> None:
        """Start anew in a forked child, whose parent may go on with the reactor."""
        self._forks = forks.count
        queue, self._queue = self._queue, None
        if queue is not None:
            _inherited.append(queue)
        # The children are those of the parent.
        self._exits.clear()
        self._ending.clear()
        self.close()
