"""
Linux epoll, edge-triggered: the kernel keeps a list of the descriptors that have
changed, and reports each change once.

References: epoll(7), epoll_ctl(2), and ``fs/eventpoll.c`` of the kernel.
"""

from __future__ import annotations

import fcntl
import select
from collections.abc import Mapping, Sequence
from typing import Any

from twisted_rtsig.notifiers import GONE, HANGUP, Event, Reported, Unchecked, forks
from twisted_rtsig.notifiers.hang_ups import poll_reports_hang_up
from twisted_rtsig.notifiers.registration import READ, WRITE, Registration

# Some facts about epoll
# ----------------------
#
# * Adding or modifying an entry is a level check: if the descriptor is ready, the
#   next epoll_wait(2) reports it, edge-triggered or not.
#
# * An event says what poll(2) would say at the moment of epoll_wait.  If EPOLLRDHUP
#   is asked for as well, an event that is only EPOLLIN comes before the end of the
#   stream, and the end is another edge.  So a read after such an event that returns
#   less than it asked for has emptied the socket: whatever has arrived since
#   epoll_wait has queued the entry again.  Urgent data (EPOLLPRI) is an exception.
#   A read stops at its mark, though there is more data.  So a descriptor that has
#   ever had urgent data is level-triggered from then on.
#
# * Edge-triggering is worth it only for readers that tell when a read has emptied
#   the descriptor, as the stream transports of this package do.  All other
#   descriptors are level-triggered, and never need a check.
#
# * An entry belongs to an open file description and a number together.  close(2)
#   removes the entry only if it closes the last descriptor of the description.  If
#   there is another one, by dup(2) or in a forked child, the entry stays.  It reports
#   under the old number, and cannot be removed.  Then the whole set is replaced.
#
# * A descriptor that is closed while it is watched causes no event, as with
#   Twisted's epoll reactor.  Only a later check finds out.
#
# * epoll refuses regular files and directories with EPERM.  For poll(2) they are
#   always ready, and so they are here.
#
# * A forked child shares the set itself with its parent, so it makes a new one.

# PyPy's ``select`` does not define it.  The number is the same on all architectures.
_EPOLLRDHUP = getattr(select, "EPOLLRDHUP", 0x2000)
_EDGE_TRIGGERED_INPUT = select.EPOLLIN | _EPOLLRDHUP | select.EPOLLPRI

# Indexed by interest: nothing, READ, WRITE, READ | WRITE.
_LEVEL_MASKS = (
    0,
    select.EPOLLIN,
    select.EPOLLOUT,
    select.EPOLLIN | select.EPOLLOUT,
)
_EDGE_MASKS = tuple(
    select.EPOLLET
    | (_EDGE_TRIGGERED_INPUT if interest & READ else 0)
    | (select.EPOLLOUT if interest & WRITE else 0)
    for interest in range(4)
)

# Indexed by the low five bits of an event.
_READY = tuple(
    (READ if event & select.EPOLLIN else 0)
    | (WRITE if event & select.EPOLLOUT else 0)
    | (HANGUP if event & (select.EPOLLHUP | select.EPOLLERR) else 0)
    for event in range(32)
)


class EdgeEPollNotifier:
    """Epoll, edge-triggered for readers that read until nothing is left."""

    def __init__(self) -> None:
        self._registrations: dict[int, Registration] = {}
        self._epoll: select.epoll | None = None
        self._forks = forks.count
        self._poller: Any = None
        # Registrations that were added or modified since the last wait, which is a
        # level check: they need no other.
        self._checked: set[Registration] = set()
        self._always_ready: set[Registration] = set()
        self._gone: list[Registration] = []
        # The numbers of descriptors that were closed while they were watched.
        self._closed_early: set[int] = set()
        self._waits = 0
        self._events = 0
        self._checks = 0
        self._renewals = 0

    def open(self) -> None:
        """See :meth:`Notifier.open`."""
        if self._forks != forks.count:
            self._forks = forks.count
            self.close()
        if self._epoll is not None:
            return
        self._epoll = select.epoll()
        for registration in self._registrations.values():
            try:
                self._add(self._epoll, registration)
            except OSError:
                self._gone.append(registration)

    def close(self) -> None:
        """See :meth:`Notifier.close`."""
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()
        for registration in self._registrations.values():
            registration.edges = 0
        self._checked.clear()
        self._always_ready.clear()
        self._gone.clear()
        self._closed_early.clear()

    def daemonized(self) -> None:
        """See :meth:`Notifier.daemonized`."""
        self._forks = forks.count

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        epoll = self._own_set()
        if epoll is None:
            # Fails with EBADF now; the next wait would find out later.
            fcntl.fcntl(registration.descriptor, fcntl.F_GETFD)
        else:
            self._add(epoll, registration)
        self._registrations[registration.descriptor] = registration

    def update(self, registration: Registration) -> None:
        """See :meth:`Notifier.update`."""
        epoll = self._own_set()
        if epoll is not None and registration not in self._always_ready:
            self._modify(epoll, registration)

    def unwatch(self, registration: Registration) -> None:
        """See :meth:`Notifier.unwatch`."""
        epoll = self._own_set()
        descriptor = registration.descriptor
        del self._registrations[descriptor]
        self._checked.discard(registration)
        if registration in self._always_ready:
            self._always_ready.remove(registration)
        elif epoll is not None:
            try:
                epoll.unregister(descriptor)
            except OSError:
                self._closed_early.add(descriptor)

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """See :meth:`Notifier.wait`."""
        epoll = self._epoll
        if epoll is None or self._forks != forks.count:
            self.open()
            epoll = self._epoll
            assert epoll is not None
        if unchecked:
            self._check(epoll, unchecked)
        if self._gone or self._always_ready:
            timeout = 0
        elif timeout is None:
            # PyPy takes nothing but numbers.
            timeout = -1
        polled: Sequence[tuple[int, int]]
        if self._poller is None:
            polled = epoll.poll(timeout)
        else:
            polled = self._poller.poll(timeout)
        self._waits += 1
        self._events += len(polled)
        # Not earlier: a signal handler may have added a registration during the sleep.
        # Its event may have been reported by this wait, while for the engine it is
        # unchecked until the next one.
        self._checked.clear()
        if self._closed_early:
            polled = self._without_stale(polled)
        registrations = self._registrations
        plain: list[Registration] = []
        events: list[Event] = []
        for descriptor, event in polled:
            registration = registrations.get(descriptor)
            if registration is None:
                continue
            if event == select.EPOLLIN and registration.edges:
                plain.append(registration)
                continue
            if event & select.EPOLLPRI:
                self._watch_by_level(registration)
            ready = _READY[event & 31]
            if ready:
                events.append((registration, ready, 0))
        for registration in self._always_ready:
            events.append((registration, registration.interest, 0))
        if self._gone:
            events += [(registration, GONE, 0) for registration in self._gone]
            self._gone.clear()
        return plain, events

    def is_hung_up(self, registration: Registration) -> bool:
        """See :meth:`Notifier.is_hung_up`."""
        return poll_reports_hang_up(registration.descriptor)

    def statistics(self) -> Mapping[str, int]:
        """
        See :meth:`Notifier.statistics`.

        ``armed`` counts the edge-triggered registrations, ``waits`` the passes,
        ``events`` the events of epoll_wait(2), ``checks`` the level checks, and
        ``renewals`` how often the set was replaced because a descriptor was closed
        while it was watched.
        """
        return {
            "armed": sum(1 for each in self._registrations.values() if each.edges),
            "waits": self._waits,
            "events": self._events,
            "checks": self._checks,
            "renewals": self._renewals,
        }

    # Beyond the contract

    @property
    def poller(self) -> Any:
        """
        The object whose ``poll`` the notifier sleeps in.  A wrapper may replace it, to
        measure how long ``poll`` takes.
        """
        return self if self._poller is None else self._poller

    @poller.setter
    def poller(self, poller: Any) -> None:
        self._poller = poller

    def poll(self, timeout: float | None = None) -> Sequence[tuple[int, int]]:
        """Call ``select.epoll.poll`` of the current set."""
        assert self._epoll is not None
        return self._epoll.poll(-1 if timeout is None else timeout)

    def has_refused(self, descriptor: int) -> bool | None:
        """
        Whether epoll has refused a watched descriptor, which is a file then.

        :return: None if epoll was not asked yet.
        """
        if self._epoll is None:
            return None
        refused = self._always_ready
        return bool(refused) and self._registrations[descriptor] in refused

    # The set

    def _own_set(self) -> select.epoll | None:
        """Return the set; None if there is none, or only that of the parent process."""
        if self._forks != forks.count:
            self._forks = forks.count
            self.close()
        return self._epoll

    def _add(self, epoll: select.epoll, registration: Registration) -> None:
        """
        Add the registration to the set.

        :raises OSError: EBADF
        """
        edges = READ | WRITE if registration.tells_drained else 0
        masks = _EDGE_MASKS if edges else _LEVEL_MASKS
        mask = masks[registration.interest]
        try:
            epoll.register(registration.descriptor, mask)
        except FileExistsError:
            # The descriptor was closed while it was watched, and a duplicate of it has
            # the number now.
            epoll.modify(registration.descriptor, mask)
        except PermissionError:
            edges = 0
            self._always_ready.add(registration)
        registration.edges = edges
        self._checked.add(registration)

    def _modify(self, epoll: select.epoll, registration: Registration) -> None:
        """Change the entry, or find that it has disappeared with its descriptor."""
        masks = _EDGE_MASKS if registration.edges else _LEVEL_MASKS
        try:
            epoll.modify(registration.descriptor, masks[registration.interest])
        except OSError:
            self._gone.append(registration)
        else:
            self._checked.add(registration)

    def _check(self, epoll: select.epoll, unchecked: Unchecked) -> None:
        for registration in unchecked:
            if (
                registration.edges
                and registration not in self._checked
                and self._registrations.get(registration.descriptor) is registration
            ):
                self._checks += 1
                self._modify(epoll, registration)

    def _watch_by_level(self, registration: Registration) -> None:
        """
        Watch by level from now on: a read stops at the mark of urgent data, so a short
        read no longer proves that the descriptor is empty.
        """
        registration.edges = 0
        self.update(registration)

    def _without_stale(
        self, polled: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[int, int]]:
        """
        Leave out events of descriptors that were closed while they were watched.

        Such an entry cannot be removed from the set, so the set is replaced.
        """
        confirmed = []
        stale = False
        for descriptor, event in polled:
            if descriptor in self._closed_early:
                poll = select.poll()
                registration = self._registrations.get(descriptor)
                if registration is not None:
                    poll.register(descriptor, _LEVEL_MASKS[registration.interest])
                if not poll.poll(0):
                    stale = True
                    continue
            confirmed.append((descriptor, event))
        if stale:
            self._renewals += 1
            self.close()
            self.open()
        return confirmed
