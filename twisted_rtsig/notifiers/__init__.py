"""
The contract between the engine and a notifier, one notifier for each kernel
interface.

Every kernel interface that this package uses speaks the same language: *tell
me about this descriptor now if it is ready, and after that whenever it becomes
ready*.  A notifier translates.  It knows nothing of Twisted's reactors, and
nothing is clever outside of it.

Each watched direction of a registration is in one of three states:

``unchecked``
    Nobody knows whether it is ready.  The engine puts it into the next
    :meth:`Notifier.wait`.
``ready``
    A ``wait`` said so.  The engine calls ``doRead`` or ``doWrite``, after
    which the direction is unchecked again.  It does not come back for a check,
    but is armed, when the engine knows by itself that nothing is left: after a
    short read that plain input led to (see :meth:`Notifier.wait`), or after a
    read that would have blocked, in a direction that is among the
    registration's ``edges``.
``armed``
    A ``wait`` that was given the direction did not report it: it was found
    not ready, and the kernel owes an event.  The engine sleeps only when
    every direction is armed, or handed to the very ``wait`` that sleeps.

What holds for all notifiers, so that kernels as different as epoll and Windows
AFD fit:

- Everything is keyed by the registration, never by the number.  A notifier
  whose kernel knows only numbers keeps the table from one to the other, and an
  event that belongs to an ended registration may come out of ``wait``; the
  engine ignores it.
- ``wait`` may report a direction that is not ready (a stale or a doubled
  event), but only of a descriptor that cannot block.  It never withholds one
  that is, unless the direction is armed and the event is still to come.
- An event may use up the arming of other directions as well (one-shot
  interfaces).  It names these in its third member.
- Interest may change at any time outside ``wait``, and from a Python signal
  handler inside it.
- A notifier holds no kernel state before :meth:`Notifier.open` and after
  :meth:`Notifier.close`, though it remembers its registrations, and checks all
  of them when it is opened again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from twisted_rtsig.notifiers.registration import READ, WRITE, Registration

HANGUP = 4
"""The kernel reports a hang-up or an error; reading or writing tells which."""
GONE = 8
"""The descriptor was closed while it was still registered."""

Event = tuple[Registration, int, int]
"""
What happened: the registration; ``READ | WRITE | HANGUP | GONE``; and the
directions which this event disarmed besides those that it reports.
"""


Unchecked = Mapping[Registration, int]
"""The directions of each registration that must be level-checked before any sleep."""

Reported = tuple[Sequence[Registration], Sequence[Event]]
"""What a ``wait`` reports: plain input, and all other events."""


class UnsupportedReactorError(Exception):
    """
    The reactor cannot run on this system, or not as it was asked to.  The
    message says why and what to use instead.
    """


class Notifier(Protocol):
    """One kernel interface for readiness events.  See the module for the rules."""

    def open(self) -> None:
        """
        Take what is needed from the kernel, for the calling thread.

        Does nothing when already open in this thread.

        :raises UnsupportedReactorError: if it cannot be had, or if the
            notifier is open in another thread.
        """

    def close(self) -> None:
        """Give everything back to the kernel; a later ``open`` starts afresh."""

    def daemonized(self) -> None:
        """
        The process was forked, and the one that it was forked from has exited:
        what was inherited from it is now exclusive to this one.
        """

    def watch(self, registration: Registration) -> None:
        """
        Begin to watch for ``registration.interest``, all of it unchecked.

        :raises OSError: if the descriptor cannot be watched; nothing changes.
        """

    def update(self, registration: Registration) -> None:
        """``registration.interest`` has changed to another one, not to nothing."""

    def unwatch(self, registration: Registration) -> None:
        """Stop to watch: the last interest has ended.  Never fails."""

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """
        Check, then sleep until something is ready.

        :param timeout: seconds; None for no limit, 0 to return at once.
        :param unchecked: the directions of each registration that must be
            level-checked before any sleep.  Some registrations may have ended.
        :return: plain input, and all other events; each registration comes at
            most once.  *Plain input* is an event that tells of nothing but
            input, of a registration that ``tells_drained``.  The notifier
            vouches that a read which returns less than it asked for empties
            the descriptor, and that whatever comes later, the end of the
            stream included, is announced by another event.
        """

    def is_hung_up(self, registration: Registration) -> bool:
        """
        Whether a hang-up or an error that a ``wait`` has reported is still there.

        A notifier that has no way to ask the kernel says yes.  A new error, which
        came after the reported one was read, counts as well.
        """

    def statistics(self) -> Mapping[str, int]:
        """Counts since the notifier was made; the names depend on the kernel."""


__all__ = [
    "GONE",
    "HANGUP",
    "READ",
    "WRITE",
    "Event",
    "Notifier",
    "Registration",
    "Reported",
    "Unchecked",
    "UnsupportedReactorError",
]
