"""
Linux realtime signals: the kernel queues a signal whenever something happens to a
descriptor, and signalfd(2) returns the queued signals in batches.

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
# In this file a descriptor is *armed* when its signals are switched on, which takes
# three calls.  F_SETOWN_EX names the thread that gets the signals.  F_SETSIG chooses a
# realtime signal; these are queued, and carry the descriptor and a band, which is a
# mask like that of poll(2).  FIOASYNC switches the signals on.  All three calls change
# the open file description, not the descriptor.
# Most of what this file does follows from that:
#
# * A description that two processes share has one owner.  When one process arms it,
#   the other one stops getting signals.  And after a dup(2), si_fd is the number
#   through which FIOASYNC was last switched from off to on, even if that number is
#   closed.  So only descriptions that this process has opened itself and cannot share
#   are armed: connections that the reactor has accepted or made.  The others are few
#   (listening ports, pipes, the terminal, adopted and inherited descriptors), and are
#   polled in each pass.  Among them are some that signals would not serve anyway:
#   files without fasync support (regular files, eventfd, pidfd, timerfd), terminals,
#   which send signals for data but not for a hang-up, and UNIX datagram sockets, whose
#   writers get no signal when the peer's queue drains.
#
# * A signal is an edge, and only a hint.  There is no signal for data that was there
#   before the descriptor was armed.  A signal may be stale: si_fd was closed, and its
#   number was reused.  Its band is wrong at the end of a connection: a reset comes
#   without POLLIN, and so does the close of the other end of a socketpair.  So a
#   signal only makes a descriptor a candidate, and poll(2) confirms it.  One kind of
#   signal needs no confirmation, that for input and nothing else: the socket is
#   non-blocking, so it is simply read.
#
# * The end of a stream is not marked: a FIN arrives as plain input.  But data that
#   carries a FIN queues two signals or three, never one.  So a read that returns less
#   than it asked for has emptied the socket if exactly one signal came since the
#   socket was last found empty.  If more came, another poll is needed to know.
#   Urgent data (POLLPRI) is an exception: a read stops at its mark, though there is
#   more data.  So a descriptor that has ever had urgent data is polled in each pass
#   from then on.
#
# * The kernel sends a signal for POLLOUT when it knows that a process waits for room
#   to write: after a write that met a full buffer, or, for TCP, after a poll that found
#   the socket not writable.  The poll of a UNIX stream leaves no such note, so UNIX
#   streams are polled while they wait to write.
#
# * Signals are not free: three calls to switch them on, one to switch them off, and
#   for each signal a record that is queued, read and looked up.  poll(2) is cheaper for
#   a connection that is ready most of the times that it is polled, or is closed soon,
#   or sends several signals for each read (which would also fill the queue).  So a
#   connection is armed only after it was found not ready _PATIENCE times, and is polled
#   again when one batch has several signals for its input.
#
# * The queue is finite: RLIMIT_SIGPENDING, for all processes of the user together.
#   When it is full, the kernel sends one SIGIO instead, and the notifier then checks
#   all descriptors.  Signals that are read together with the SIGIO are handled too.
#
# * The owner is a thread, and signalfd(2) reads the signals of the thread that calls
#   read(2).  So arming and reading happen in the thread that runs the reactor, which
#   may not be the thread that made the reactor.
#
# * A forked child shares all descriptions with its parent, and must not change them.
#   It polls the descriptors that it has inherited, and arms those that it opens.

_log = Logger()

_F_SETOWN_EX = 15
_F_OWNER_TID = 0
_ON = struct.pack("i", 1)
_OFF = struct.pack("i", 0)

# How many times a connection is found not ready before it is armed.  Polling it that
# often costs about as much as arming it.  The larger number is for a connection that
# was armed and has sent several signals at once: polling it is cheaper.
_PATIENCE = 16
_PATIENCE_AFTER_SEVERAL = 128

# For each origin: the directions whose readiness the kernel signals.
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

# A flag beside those of the band: more than one signal came for the descriptor.
_SEVERAL = 1 << 16


def _probe(signal_number: int) -> None:
    """
    Try the calls of the notifier on a temporary socket.

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
                f"this kernel refuses realtime-signal I/O ({error})"
            ) from error


class RealtimeSignalNotifier:
    """
    Realtime signals for connections of the reactor, and poll(2) for the rest.

    :param signal_number: the realtime signal to use.
    :raises UnsupportedReactorError: on systems without realtime-signal I/O.
    """

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        _probe(signal_number)
        self._registrations: dict[int, Registration] = {}
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        # For each registration that can be armed but is still polled: how many more
        # times it must be found not ready until it is armed.
        self._patience: dict[Registration, int] = {}
        # Registrations that were armed after the last check, and need another one.  The
        # values are not used.
        self._just_armed: dict[Registration, int] = {}
        self._queue: SignalQueue | None = None
        self._thread = 0
        self._owner = b""
        self._forks = forks.count
        # The inode numbers of what a forked child has inherited.
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
                "run it in that thread only, or run another reactor here"
            )
        self._queue = SignalQueue.join(self.signal_number, self)
        self._thread = thread
        self._owner = struct.pack("ii", _F_OWNER_TID, thread)
        self._poll.register(self._queue.descriptor, select.POLLIN)
        for registration in self._registrations.values():
            if registration.origin is not Origin.SHARED:
                self._patience[registration] = _PATIENCE

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
        # Fails with EBADF now; poll would find out later.
        fcntl.fcntl(registration.descriptor, fcntl.F_GETFD)
        self._registrations[registration.descriptor] = registration
        self.update(registration)
        if self._queue is not None and registration.origin is not Origin.SHARED:
            self._patience[registration] = _PATIENCE

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
        # Like is_of_this_thread(), but inlined, since every pass comes here.
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
            checking = self._add_to_poll(unchecked)
            try:
                polled = self._poll.poll(milliseconds)
            finally:
                self._remove_from_poll(checking)
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
                # It is polled in each pass, so no event is missed.
                plain.append(registration)
            else:
                ready[registration] = _READY[revents & 63]
        if self._patience:
            idle = self._patience.keys() - plain
            if ready:
                idle -= ready.keys()
            if idle:
                self._lose_patience(idle)
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

        ``armed`` is the number of descriptors that are armed now, ``waits`` counts the
        waits, ``signals`` the signals that were read, ``checks`` the level checks of
        armed descriptors, and ``overflows`` how often the kernel found the signal queue
        full.
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
        The object whose ``poll`` the notifier sleeps in.  A wrapper may replace it, to
        measure how long ``poll`` takes.  The notifier also calls ``poll`` with a
        timeout of 0, to confirm signals.
        """
        return self._poll

    @poller.setter
    def poller(self, poller: Any) -> None:
        self._poll = poller

    # Reading signals

    def _take_signals(
        self, queue: SignalQueue, ready: dict[Registration, int]
    ) -> Sequence[Registration]:
        """
        Read a batch of signals, and add what was confirmed to ``ready``.

        :return: the registrations with plain input.
        """
        descriptors, bands, overflowed = queue.read()
        self._signals += len(descriptors)
        registrations = self._registrations
        # Nearly always there is only plain input, and one signal for each descriptor.
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
        candidates: dict[Registration, int] = {}
        unknown = False
        for descriptor, band in merged.items():
            registration = registrations.get(descriptor)
            if registration is None:
                unknown = True
            elif not registration.edges:
                # The signal is stale.  The descriptor is polled in each pass.
                continue
            elif band & ~_SEVERAL != PLAIN_INPUT:
                if band & select.POLLPRI:
                    self._poll_for_good(registration)
                candidates[registration] = 0
            elif band & _SEVERAL or overflowed or registration in ready:
                ready[registration] = ready.get(registration, 0) | READ
                if band & _SEVERAL:
                    self._disarm(registration)
                    self.update(registration)
                    self._patience[registration] = _PATIENCE_AFTER_SEVERAL
            else:
                plain.append(registration)
        if overflowed:
            self._overflow()
            candidates = {each: 0 for each in registrations.values() if each.edges}
        if overflowed or unknown:
            # Reactors that run in turn in this thread share the queue, so a signal for
            # an unknown descriptor may belong to another one.  A SIGIO may mean that
            # signals of any queue were lost.
            for member in members_in_this_thread():
                if member is not self:
                    member._check_all = True  # type: ignore[attr-defined]
        if candidates:
            self._confirm(candidates, ready)
        return plain

    def _poll_for_good(self, registration: Registration) -> None:
        """
        Poll from now on: a read stops at the mark of urgent data, so a short read no
        longer proves that the descriptor is empty.
        """
        self._disarm(registration)
        self.update(registration)

    def _overflow(self) -> None:
        if not self._overflows:
            _log.warn(
                "The queue of realtime signals was full (RLIMIT_SIGPENDING, see "
                "getrlimit(2)), so all {count} descriptors are checked by poll. "
                "Nothing is lost.  This is logged only once; reactor.statistics() "
                'counts "overflows".  If there are many, raise the limit (ulimit -i) '
                "or use another reactor.",
                count=len(self._registrations),
            )
        self._overflows += 1

    # Confirming by poll

    def _add_to_poll(self, unchecked: Mapping[Registration, int]) -> list[Registration]:
        """
        Add those of ``unchecked`` that are armed to the poll object; the others are in
        it already.

        :return: those that were added.
        """
        checking = []
        registrations = self._registrations
        for registration in unchecked:
            descriptor = registration.descriptor
            if registration.edges and registrations.get(descriptor) is registration:
                self._poll.register(descriptor, _POLL_MASKS[registration.interest])
                checking.append(registration)
        self._checks += len(checking)
        return checking

    def _remove_from_poll(self, checking: list[Registration]) -> None:
        for registration in checking:
            descriptor = registration.descriptor
            mask = self._polled.get(descriptor)
            if mask is not None:
                self._poll.register(descriptor, mask)
                continue
            # It is gone already if a signal handler has ended the interest.
            with contextlib.suppress(KeyError):
                self._poll.unregister(descriptor)

    def _confirm(
        self, candidates: Mapping[Registration, int], ready: dict[Registration, int]
    ) -> None:
        checking = self._add_to_poll(candidates)
        try:
            polled = self._poll.poll(0)
        finally:
            self._remove_from_poll(checking)
        for descriptor, revents in polled:
            registration = self._registrations.get(descriptor)
            # wait() has polled the others already.
            if registration is not None and registration in candidates:
                ready[registration] = ready.get(registration, 0) | _READY[revents & 63]

    # Polled or armed

    def _lose_patience(self, idle: Set[Registration]) -> None:
        """
        Count down the patience with each of ``idle``, and arm those for which it has
        run out.
        """
        patience = self._patience
        for registration in idle:
            left = patience[registration] - 1
            if left:
                patience[registration] = left
                continue
            del patience[registration]
            # If the descriptor was closed meanwhile, poll will find out.
            with contextlib.suppress(OSError):
                if self._arm(registration):
                    self.update(registration)
                    self._just_armed[registration] = 0

    # The open file description

    def _arm(self, registration: Registration) -> bool:
        """
        Switch on signals to this thread, unless another process may share the
        description.

        :return: whether they were switched on.
        :raises OSError: if the descriptor is closed (EBADF).
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
        """Switch the signals off; otherwise they would go on after the interest."""
        if not registration.edges:
            return
        registration.edges = 0
        try:
            fcntl.ioctl(registration.descriptor, termios.FIOASYNC, _OFF)
        except OSError:
            # The descriptor was closed while it was watched.  If it has a duplicate,
            # the signals go on.
            if self._queue is not None:
                self._queue.keep_blocked = True

    def _inherit(self) -> None:
        """Start anew in a forked child; the parent may still run the reactor."""
        self._forks = forks.count
        self._queue = None
        self._poll = select.poll()
        self._polled = {}
        self._patience.clear()
        self._just_armed.clear()
        # This includes descriptors of paused connections, which are not watched now.
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                self._inherited.add(os.fstat(int(name)).st_ino)
        for registration in self._registrations.values():
            registration.origin = Origin.SHARED
            registration.edges = 0
            self.update(registration)
