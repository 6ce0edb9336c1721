"""
Linux realtime signals: the kernel queues a signal whenever something happens
to a descriptor, and signalfd(2) hands them over in batches.

References: fcntl(2) under "Signal-driven I/O", signalfd(2), signal(7), and
``fs/fcntl.c`` of the kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Mapping, Sequence, Set
from typing import Any

from twisted.logger import Logger

from twisted_rtsig.notifiers import GONE, HANGUP, Reported, Unchecked, forks
from twisted_rtsig.notifiers.hang_ups import poll_reports_hang_up
from twisted_rtsig.notifiers.registration import READ, WRITE, Origin, Registration
from twisted_rtsig.notifiers.signal_queue import (
    PLAIN_INPUT,
    SignalQueue,
    members_in_this_thread,
    open_signalfd,
    refuse,
)

# Some facts about realtime-signal I/O
# ------------------------------------
#
# A descriptor is armed by three calls: F_SETOWN_EX names the thread that gets
# the signals, F_SETSIG chooses a realtime signal (those are queued, and carry
# the descriptor and a band, a mask like poll's), and FIOASYNC switches them
# on.  All three change the open file description, not the descriptor.  From
# that follows most of what this file does:
#
# * A description that two processes share has one owner.  Whoever arms it last
#   makes the other one deaf for good.  And after a dup(2), si_fd tells the
#   number that armed last, even if that is closed.  So only what this process
#   has opened itself, and nobody else can hold, is armed: connections that the
#   reactor accepted or made.  The rest is few (listening ports, pipes, the
#   terminal, what was adopted or inherited), and stays in the set of poll(2).
#   That also covers what has no fasync support (regular files, eventfd, pidfd,
#   timerfd), terminals, which signal data but no hang-up, and UNIX datagram
#   sockets, whose writers get no signal at all when the peer's queue drains.
#
# * A signal is an edge, and only a hint.  Data that waited before the
#   descriptor was armed gives none.  It may be stale: si_fd was closed and its
#   number is another's now.  Its band lies at the end of a connection: a reset
#   comes without POLLIN, a close from a socketpair's other end likewise.
#   Hence the rule: signals nominate, poll confirms.  Only a signal that tells
#   of input and nothing else is believed as it stands, since it leads to a read
#   of a socket that does not block.
#
# * The end of a stream is not marked: a FIN arrives as plain input.  But data
#   that carries a FIN queues two signals or three, never one.  So a read that
#   comes back short has emptied the socket if exactly one signal came since it
#   was last found empty.  If more came then only another poll tells.
#   Urgent data (POLLPRI) stops reads at its mark, short of what is there; who
#   ever showed it stays in the set of poll(2) from then on.
#
# * POLL_OUT is sent when the kernel knows that somebody waits for room: after
#   a write that met a full buffer, or, for TCP, after a poll that found the
#   socket not writable.  The poll of a UNIX stream leaves no such note, so its
#   writers stay in the set of poll(2) while they wait.
#
# * Signals cost something too: three calls to have them sent, one to silence
#   them, and for each a record to be queued, read and looked up.  poll(2) is
#   cheaper for a connection that is ready most of the times that it is polled,
#   or will be closed soon, or sends several signals for each read (which would
#   also fill the queue).  So a connection is armed only after it was found not
#   ready a few times, and polled again when it sends more than one signal.
#   Provos and Lever, "Scalable Network I/O in Linux" (2000), is about such
#   hybrids.
#
# * The queue is finite: RLIMIT_SIGPENDING, for all processes of the user
#   together.  When it is full the kernel sends one SIGIO instead, and then
#   everything is checked.  The signals still queued are part of the truth.
#
# * The owner is a thread, and signalfd(2) reads the signals of the thread that
#   calls read(2).  So all this happens in the thread that runs the reactor,
#   not in the one that made it.
#
# * A forked child shares every description with its parent, and never touches
#   what it inherited: what it inherited is polled, what it opens is armed.

_log = Logger()

_F_SETOWN_EX = 15
_F_OWNER_TID = 0
_ON = struct.pack("i", 1)
_OFF = struct.pack("i", 0)

# How often a connection is found not ready before it is armed: to be polled that
# often costs about as much as to be armed.  Who was armed and has sent several
# signals at once has shown that it is better polled.
_PATIENCE = 16
_PATIENCE_WITH_THE_NOISY = 128

# The directions of which a signal will tell, once found not ready.
_EDGES = {Origin.SHARED: 0, Origin.OWN_TCP: READ | WRITE, Origin.OWN_UNIX: READ}

# Indexed by interest: nothing, READ, WRITE, READ | WRITE.
_POLL_MASKS = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)

# Indexed by the low six bits of what poll(2) returned.
_READY = tuple(
    (READ if revents & select.POLLIN else 0)
    | (WRITE if revents & select.POLLOUT else 0)
    | (HANGUP if revents & (select.POLLHUP | select.POLLERR) else 0)
    | (GONE if revents & select.POLLNVAL else 0)
    for revents in range(64)
)

# More than one signal came for the descriptor; beside the flags of its band.
_SEVERAL = 1 << 16


def _probe(signal_number: int) -> None:
    """
    Try what the notifier will need, on a socket of its own.

    :raises UnsupportedReactorError: if the kernel refuses.
    """
    os.close(open_signalfd({signal_number}))
    one, other = socket.socketpair()
    with one, other:
        try:
            fcntl.fcntl(one, _F_SETOWN_EX, struct.pack("ii", _F_OWNER_TID, 0))
            fcntl.fcntl(one, fcntl.F_SETSIG, signal_number)
            fcntl.ioctl(one, termios.FIOASYNC, _OFF)
        except OSError as error:
            raise refuse(
                f"this kernel refuses realtime-signal I/O (F_SETSIG: {error})"
            ) from error


class RealtimeSignalNotifier:
    """
    :param signal_number: the realtime signal to use.
    :raises UnsupportedReactorError: where there is no realtime-signal I/O.
    """

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        _probe(signal_number)
        self._registrations: dict[int, Registration] = {}
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        # Those that may be armed, but are polled still: how often they may yet
        # be found not ready.
        self._patience: dict[Registration, int] = {}
        # To be checked once more, since they were armed after the last check.
        self._just_armed: dict[Registration, int] = {}
        self._queue: SignalQueue | None = None
        self._thread = 0
        self._owner = b""
        self._forks = forks.count
        self._inherited: set[int] = set()
        self._check_all = False
        self._waits = 0
        self._signals = 0
        self._overflows = 0
        self._checks = 0

    def open(self) -> None:
        """See :meth:`Notifier.open`."""
        if self._forks != forks.count:
            self._inherit()
        thread = threading.get_native_id()
        if self._queue is not None:
            if self._queue.is_of_this_thread():
                return
            raise refuse(
                f"this reactor has run in thread {self._thread} and cannot go on "
                f"in thread {thread}, because its signals are sent to the former: "
                "run it in one thread, or another reactor here"
            )
        self._queue = SignalQueue.join(self.signal_number, self)
        self._thread = thread
        self._owner = struct.pack("ii", _F_OWNER_TID, thread)
        self._poll.register(self._queue.descriptor, select.POLLIN)
        for registration in self._registrations.values():
            self._begin_with_poll(registration)

    def close(self) -> None:
        """See :meth:`Notifier.close`."""
        queue = self._queue
        if queue is None or self._forks != forks.count:
            return
        for registration in self._registrations.values():
            self._disarm(registration)
            self.update(registration)
        self._patience.clear()
        self._just_armed.clear()
        self._poll.unregister(queue.descriptor)
        self._queue = None
        queue.leave(self)

    def daemonized(self) -> None:
        """See :meth:`Notifier.daemonized`."""
        self._forks = forks.count

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        if self._forks != forks.count:
            self._inherit()
        # Fails with EBADF where poll would only say so later.
        fcntl.fcntl(registration.descriptor, fcntl.F_GETFD)
        self._registrations[registration.descriptor] = registration
        self.update(registration)
        if self._queue is not None:
            self._begin_with_poll(registration)

    def update(self, registration: Registration) -> None:
        """See :meth:`Notifier.update`."""
        descriptor = registration.descriptor
        mask = _POLL_MASKS[registration.interest & ~registration.edges]
        if mask:
            self._poll.register(descriptor, mask)
            self._polled[descriptor] = mask
        elif self._polled.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def unwatch(self, registration: Registration) -> None:
        """See :meth:`Notifier.unwatch`."""
        if self._forks != forks.count:
            self._inherit()
        descriptor = registration.descriptor
        del self._registrations[descriptor]
        self._patience.pop(registration, None)
        self._just_armed.pop(registration, None)
        if self._polled.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)
        self._disarm(registration)

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """See :meth:`Notifier.wait`."""
        queue = self._queue
        # As is_of_this_thread(), without the call: each pass comes here.
        if (
            queue is None
            or self._forks != forks.count
            or queue.thread.ident != threading.get_ident()
        ):
            self.open()
            queue = self._queue
            assert queue is not None
        if self._check_all:
            self._check_all = False
            unchecked = dict.fromkeys(self._registrations.values(), 0)
        elif self._just_armed:
            unchecked = {**unchecked, **self._just_armed}
            self._just_armed.clear()
        milliseconds = None if timeout is None else timeout * 1000
        if unchecked:
            checking = self._poll_too(unchecked)
            try:
                polled = self._poll.poll(milliseconds)
            finally:
                self._poll_no_more(checking)
        else:
            polled = self._poll.poll(milliseconds)
        self._waits += 1
        registrations = self._registrations
        plain: list[Registration] = []
        ready: dict[Registration, int] = {}
        signalled = False
        for descriptor, revents in polled:
            if descriptor == queue.descriptor:
                signalled = True
                continue
            registration = registrations.get(descriptor)
            if registration is None:
                continue
            if (
                revents == select.POLLIN
                and registration.tells_drained
                and not registration.edges
            ):
                # Polled each time, so that nothing is missed.
                plain.append(registration)
            else:
                ready[registration] = _READY[revents & 63]
        if self._patience:
            idle = self._patience.keys() - plain
            if ready:
                idle -= ready.keys()
            if idle:
                self._arm_the_idle(idle)
        if signalled:
            plain += self._take_signals(queue, ready)
        if ready:
            return plain, [(each, what, 0) for each, what in ready.items()]
        return plain, ()

    def is_hung_up(self, registration: Registration) -> bool:
        """See :meth:`Notifier.is_hung_up`."""
        return poll_reports_hang_up(registration.descriptor)

    def statistics(self) -> Mapping[str, int]:
        """
        See :meth:`Notifier.statistics`.

        ``waits`` counts the passes, ``signals`` the signals that were read,
        ``checks`` the level checks of descriptors that may be armed, and
        ``overflows`` how often the kernel found the signal queue full.
        """
        return {
            "armed": sum(1 for each in self._registrations.values() if each.edges),
            "waits": self._waits,
            "signals": self._signals,
            "checks": self._checks,
            "overflows": self._overflows,
        }

    # Beyond the contract

    @property
    def poller(self) -> Any:
        """
        What the notifier sleeps in; it may be replaced by a wrapper, to measure how
        long ``poll`` takes.  Confirmations call that as well, with a timeout of 0.
        """
        return self._poll

    @poller.setter
    def poller(self, poller: Any) -> None:
        self._poll = poller

    # Signals nominate

    def _take_signals(
        self, queue: SignalQueue, ready: dict[Registration, int]
    ) -> Sequence[Registration]:
        descriptors, bands, overflowed = queue.read()
        self._signals += len(descriptors)
        registrations = self._registrations
        # Nearly always there is nothing but plain input, one signal for each.
        count = len(descriptors)
        if bands.count(PLAIN_INPUT) == count and not ready:
            if count == 1:
                descriptor = descriptors[0]
                if descriptor in registrations and descriptor not in self._polled:
                    return (registrations[descriptor],)
            else:
                named = set(descriptors)
                if len(named) == count and self._polled.keys().isdisjoint(named):
                    try:
                        return [registrations[each] for each in descriptors]
                    except KeyError:
                        pass
        merged: dict[int, int] = {}
        for descriptor, band in zip(descriptors, bands, strict=True):
            if descriptor in merged:
                band |= merged[descriptor] | _SEVERAL
            merged[descriptor] = band
        plain = []
        suspects: dict[Registration, int] = {}
        strangers = False
        for descriptor, band in merged.items():
            registration = registrations.get(descriptor)
            if registration is None:
                strangers = True
            elif not registration.edges:
                # Stale: it is polled each time.
                continue
            elif band & ~_SEVERAL != PLAIN_INPUT:
                if band & select.POLLPRI:
                    self._distrust(registration)
                suspects[registration] = 0
            elif band & _SEVERAL or overflowed or registration in ready:
                ready[registration] = ready.get(registration, 0) | READ
                if band & _SEVERAL:
                    self._disarm(registration)
                    self._begin_with_poll(registration)
                    self._patience[registration] = _PATIENCE_WITH_THE_NOISY
            else:
                plain.append(registration)
        if overflowed:
            self._overflow()
            suspects = {each: 0 for each in registrations.values() if each.edges}
        if overflowed or strangers:
            # Reactors that run in turn in this thread share the queue, and
            # SIGIO is one for all queues.
            for member in members_in_this_thread():
                if member is not self:
                    member._check_all = True  # type: ignore[attr-defined]
        if suspects:
            self._confirm(suspects, ready)
        return plain

    def _distrust(self, registration: Registration) -> None:
        """
        A read stops at the mark of urgent data, so that a short one proves
        nothing any more.
        """
        self._disarm(registration)
        self.update(registration)

    def _overflow(self) -> None:
        if not self._overflows:
            _log.warn(
                "The queue of realtime signals was full (RLIMIT_SIGPENDING, see "
                "getrlimit(2)), so all {count} descriptors are checked by poll. "
                "Nothing is lost, but if it happens often, raise the limit "
                "(ulimit -i) or use another reactor.",
                count=len(self._registrations),
            )
        self._overflows += 1

    # Poll confirms

    def _poll_too(self, unchecked: Mapping[Registration, int]) -> list[Registration]:
        """Put what must be checked beside what is always polled."""
        checking = []
        registrations = self._registrations
        for registration in unchecked:
            descriptor = registration.descriptor
            if registration.edges and registrations.get(descriptor) is registration:
                self._poll.register(descriptor, _POLL_MASKS[registration.interest])
                checking.append(registration)
        self._checks += len(checking)
        return checking

    def _poll_no_more(self, checking: list[Registration]) -> None:
        for registration in checking:
            descriptor = registration.descriptor
            mask = self._polled.get(descriptor)
            if mask is not None:
                self._poll.register(descriptor, mask)
                continue
            # Not there any more if a signal handler has ended the interest.
            with contextlib.suppress(KeyError):
                self._poll.unregister(descriptor)

    def _confirm(
        self, suspects: Mapping[Registration, int], ready: dict[Registration, int]
    ) -> None:
        checking = self._poll_too(suspects)
        try:
            polled = self._poll.poll(0)
        finally:
            self._poll_no_more(checking)
        for descriptor, revents in polled:
            registration = self._registrations.get(descriptor)
            # Others of the set have just been polled.
            if registration is not None and registration in suspects:
                ready[registration] = ready.get(registration, 0) | _READY[revents & 63]

    # Who is polled, and who is armed

    def _begin_with_poll(self, registration: Registration) -> None:
        self.update(registration)
        if _EDGES[registration.origin]:
            self._patience[registration] = _PATIENCE

    def _arm_the_idle(self, idle: Set[Registration]) -> None:
        """Those that were polled and found not ready."""
        for registration in idle:
            self._patience[registration] -= 1
            if self._patience[registration]:
                continue
            del self._patience[registration]
            # Closed meanwhile: then poll says so.
            with contextlib.suppress(OSError):
                if self._arm(registration):
                    self.update(registration)
                    self._just_armed[registration] = 0

    # The open file description

    def _arm(self, registration: Registration) -> bool:
        """
        Have signals sent to this thread, if nobody else can hold the descriptor.

        :raises OSError: EBADF
        """
        edges = _EDGES[registration.origin]
        if not edges:
            return False
        descriptor = registration.descriptor
        if self._inherited and os.fstat(descriptor).st_ino in self._inherited:
            return False
        fcntl.fcntl(descriptor, _F_SETOWN_EX, self._owner)
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, self.signal_number)
        fcntl.ioctl(descriptor, termios.FIOASYNC, _ON)
        registration.edges = edges
        return True

    def _disarm(self, registration: Registration) -> None:
        """Events would go on after the interest in them has ended."""
        if not registration.edges:
            return
        registration.edges = 0
        try:
            fcntl.ioctl(registration.descriptor, termios.FIOASYNC, _OFF)
        except OSError:
            # Closed while it was watched.  If it was duplicated before, then
            # its signals go on.
            if self._queue is not None:
                self._queue.keep_blocked = True

    def _inherit(self) -> None:
        """This is a forked child, and its parent may go on with the reactor."""
        self._forks = forks.count
        self._queue = None
        self._poll = select.poll()
        self._polled = {}
        self._patience.clear()
        self._just_armed.clear()
        # Also the ones that nobody watches now: a paused connection.
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                self._inherited.add(os.fstat(int(name)).st_ino)
        for registration in self._registrations.values():
            registration.origin = Origin.SHARED
            registration.edges = 0
            self.update(registration)
