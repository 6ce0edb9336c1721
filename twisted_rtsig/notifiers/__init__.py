"""
The contract between the engine and a notifier.  There is one notifier for each kernel
interface.

All kernel interfaces that this package uses offer the same: they report a descriptor
now if it is ready, and later whenever it becomes ready.  A notifier translates one of
them for the engine.  It knows nothing of Twisted's reactors, and all that is special
about a kernel interface is in its notifier.

A *registration* is one descriptor that has a reader, a writer or both; its *directions*
are ``READ`` and ``WRITE``.  Each direction with a reader or a writer is in one of three
states:

``unchecked``
    It is not known whether the direction is ready.  The engine passes it to the next
    :meth:`Notifier.wait`, which makes a *level check*: it asks the kernel.
``ready``
    A ``wait`` has reported the direction.  The engine calls ``doRead`` or ``doWrite``,
    and then the direction is unchecked again.  In two cases it is armed instead, since
    the engine knows that nothing is left: after a short read that plain input led to
    (see :meth:`Notifier.wait`); and after a read that would have blocked, if the
    direction is among the ``edges`` of the registration.
``armed``
    A ``wait`` has checked the direction and not reported it: it was not ready, and the
    kernel will report when it becomes ready.  The engine sleeps only when every
    direction is armed, or unchecked and passed to the ``wait`` that sleeps.

These rules hold for all notifiers, and fit kernels as different as epoll and Windows
AFD:

- The key is always the registration, never the descriptor number.  A notifier whose
  kernel knows only numbers keeps a table of registrations by number.  ``wait`` may
  return an event for a registration that has ended; the engine ignores it.
- ``wait`` may report a direction that is not ready (a stale or duplicate event), but
  only of a descriptor that cannot block.  It always reports a direction that is ready,
  unless the direction is armed and the event is still to come.
- An event may disarm other directions as well (in one-shot interfaces).  The third
  member of the event names them.
- Interest may change at any time outside of ``wait``, and within it by a Python signal
  handler.
- A notifier holds no kernel state before :meth:`Notifier.open` and after
  :meth:`Notifier.close`.  It remembers its registrations, and checks all of them when
  it is opened again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from twisted_rtsig.notifiers.registration import READ, WRITE, Registration

HANGUP = 4
"""The kernel reports a hang-up or an error; reading or writing will tell which."""
GONE = 8
"""The descriptor was closed while it was still registered."""

Event = tuple[Registration, int, int]
"""
An event: the registration; what happened, ``READ | WRITE | HANGUP | GONE``; and the
directions that the event has disarmed besides those that it reports.
"""


Unchecked = Mapping[Registration, int]
"""The directions of each registration that must be level-checked before any sleep."""

Reported = tuple[Sequence[Registration], Sequence[Event]]
"""What a ``wait`` reports: plain input, and all other events."""


class UnsupportedReactorError(Exception):
    """
    The reactor cannot run on this system, or not with these arguments.  The message
    says why, and what to use instead.
    """


@contextlib.contextmanager
def explain_lack_of_descriptors() -> Iterator[None]:
    """
    A context for the making of a reactor's own descriptors.

    :raises UnsupportedReactorError: if a system call fails, since neither the process
        nor the system may have more descriptors (EMFILE, ENFILE).
    """
    try:
        yield
    except OSError as error:
        raise UnsupportedReactorError(
            f"there are no descriptors left for a reactor ({error}): raise the limit "
            "of open files (ulimit -n), or make the reactor before others are opened"
        ) from error


class Notifier(Protocol):
    """A kernel interface for readiness events.  The module lists the rules."""

    def open(self) -> None:
        """
        Acquire the kernel resources, for the calling thread.

        Do nothing if the notifier is open in this thread.

        :raises UnsupportedReactorError: if the kernel has not got them, or if the
            notifier is open in another thread.
        """

    def close(self) -> None:
        """Release all kernel resources; a later ``open`` acquires them again."""

    def daemonized(self) -> None:
        """
        Note that this process was forked, and that its parent has exited.  So what it
        has inherited is not shared any more.
        """

    def watch(self, registration: Registration) -> None:
        """
        Begin to watch for ``registration.interest``.  All of its directions are
        unchecked.

        :raises OSError: if the descriptor cannot be watched.  Then nothing has changed.
        """

    def update(self, registration: Registration) -> None:
        """Note that ``registration.interest`` has changed; it is not empty."""

    def unwatch(self, registration: Registration) -> None:
        """Stop watching: the last interest has ended.  This never fails."""

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """
        Check the unchecked directions, then sleep until something is ready.

        :param timeout: seconds; None for no limit, 0 to return at once.
        :param unchecked: the directions of each registration that must be level-checked
            before any sleep.  Some registrations may have ended.
        :return: plain input, and all other events; each registration at most once.
            *Plain input* is an event that reports input and nothing else, for a
            registration that ``tells_drained``.  The notifier guarantees two things:
            a read that returns less than it asked for has emptied the descriptor, and
            another event will report all that comes later, the end of the stream
            included.
        """

    def is_hung_up(self, registration: Registration) -> bool:
        """
        Whether a hang-up or an error that a ``wait`` has reported is still there.

        A notifier that cannot ask the kernel returns True.  A new error, which came
        after the reported one was read, counts as well.
        """

    def statistics(self) -> Mapping[str, int]:
        """
        Return counts since the notifier was made; their names depend on the kernel.
        """


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
