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
# * To add or to modify an entry is a level check: if the descriptor is ready,
#   then the next epoll_wait(2) says so, edge-triggered or not.
#
# * An event holds what poll(2) would say at the moment of epoll_wait.  With
#   EPOLLRDHUP among what is asked for, an event of nothing but EPOLLIN comes
#   before the end of the stream, and that end is another edge.  So a read that
#   comes back short after it has emptied the socket: whatever arrived since
#   epoll_wait has queued the entry again.  Urgent data (EPOLLPRI) stops reads
#   at its mark, short of what is there; who ever showed it is level-triggered
#   from then on.
#
# * To be edge-triggered pays only for who tells when a read has emptied the
#   descriptor, which the streams of this package do.  Everything else is
#   level-triggered, and needs no check ever.
#
# * An entry is of an open file description and a number together.  A close(2)
#   removes it only when it was the last one: if a dup(2) or a forked child has
#   the description as well, the entry stays, reports under the old number, and
#   nobody can remove it.  Then the set is given up for a new one.
#
# * A close before the interest ends is silent, as with Twisted's epoll reactor:
#   only a later check tells.
#
# * Regular files and directories are refused with EPERM.  poll(2) holds them to
#   be always ready, and so does this file.
#
# * A forked child shares the very set with its parent, and makes its own.

# PyPy leaves this one out.  It is the same number on every architecture.
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
        # Added or modified since the last wait, which is as good as a check.
        self._checked: set[Registration] = set()
        self._always_ready: set[Registration] = set()
        self._gone: list[Registration] = []
        # Numbers that were closed while they were watched.
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
            # Fails with EBADF where the next wait would only say so later.
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
        # Only now: whom a signal handler has added in the middle of the sleep
        # may have been told of already, while the engine still holds it to be
        # unchecked.
        self._checked.clear()
        if self._closed_early:
            polled = self._without_ghosts(polled)
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
                self._distrust(registration)
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

        ``armed`` counts who is watched edge-triggered, ``waits`` the passes,
        ``events`` what epoll_wait(2) has told, ``checks`` the level checks, and
        ``renewals`` how often a set was given up because of what was closed too
        early.
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
        """As ``select.epoll.poll``, of the set that is open."""
        assert self._epoll is not None
        return self._epoll.poll(-1 if timeout is None else timeout)

    def has_refused(self, descriptor: int) -> bool | None:
        """
        Whether epoll has refused a descriptor that is watched, which is a file then;
        None if it was not asked yet.
        """
        if self._epoll is None:
            return None
        refused = self._always_ready
        return bool(refused) and self._registrations[descriptor] in refused

    # The set

    def _own_set(self) -> select.epoll | None:
        """The set, unless it is the parent's."""
        if self._forks != forks.count:
            self._forks = forks.count
            self.close()
        return self._epoll

    def _add(self, epoll: select.epoll, registration: Registration) -> None:
        """
        Enter it into the set.

        :raises OSError: EBADF
        """
        edges = READ | WRITE if registration.tells_drained else 0
        masks = _EDGE_MASKS if edges else _LEVEL_MASKS
        mask = masks[registration.interest]
        try:
            epoll.register(registration.descriptor, mask)
        except FileExistsError:
            # It was closed early, and a duplicate is back under the number.
            epoll.modify(registration.descriptor, mask)
        except PermissionError:
            edges = 0
            self._always_ready.add(registration)
        registration.edges = edges
        self._checked.add(registration)

    def _modify(self, epoll: select.epoll, registration: Registration) -> None:
        """Change the entry, or find that it has gone with its descriptor."""
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

    def _distrust(self, registration: Registration) -> None:
        """
        A read stops at the mark of urgent data, so that a short one proves
        nothing any more.
        """
        registration.edges = 0
        self.update(registration)

    def _without_ghosts(
        self, polled: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[int, int]]:
        """Leave out, and get rid of, what is not under its number any more."""
        confirmed = []
        haunted = False
        for descriptor, event in polled:
            if descriptor in self._closed_early:
                poll = select.poll()
                registration = self._registrations.get(descriptor)
                if registration is not None:
                    poll.register(descriptor, _LEVEL_MASKS[registration.interest])
                if not poll.poll(0):
                    haunted = True
                    continue
            confirmed.append((descriptor, event))
        if haunted:
            self._renewals += 1
            self.close()
            self.open()
        return confirmed
