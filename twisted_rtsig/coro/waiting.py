"""A queue of waiters, first come first served."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol


class Entry(Protocol):
    """A waiter: an operation, or one of the cases of a ``select``."""

    called: bool
    """Whether it is finished, or was given up."""

    value: Any
    """The value to send, if it is a sender."""

    owner: Any
    """The object that has made it: the same for all cases of one ``select``."""

    def succeed(self, value: Any) -> None:
        """End the wait with ``value``."""

    def settle(self, value: Any) -> None:
        """End the wait with ``value``, and let ``tell`` resume the waiter."""

    def tell(self) -> None:
        """Resume the waiter after ``settle``."""

    def fail(self, error: BaseException) -> None:
        """End the wait with an error."""


class Waiters:
    """
    The entries that wait, in order.

    An entry that was given up stays in the queue until its turn comes, or until half of
    all entries were given up.  So each one is removed in constant time, however many
    there are.

    :ivar entries: all entries; the first one always still waits.
    :ivar given_up: how many entries do not wait any more.
    """

    __slots__ = ("entries", "given_up")

    # A deque of its own, since CPython calls the methods of a subclass the long way.

    def __init__(self) -> None:
        self.entries: deque[Any] = deque()
        self.given_up: int = 0

    @property
    def waiting(self) -> int:
        """How many entries still wait."""
        return len(self.entries) - self.given_up

    def next(self) -> Any:
        """Take out the first entry; there must be one."""
        first = self.entries.popleft()
        if self.given_up:
            self.strip()
        return first

    def forget(self, entry: Any) -> None:
        """Give up an entry, which is called, or is about to be."""
        entries = self.entries
        if entries[0] is entry:
            self.next()
            return
        self.given_up += 1
        if 2 * self.given_up > len(entries):
            waiting = [each for each in entries if not (each.called or each is entry)]
            entries.clear()
            entries.extend(waiting)
            self.given_up = 0

    def strip(self) -> None:
        """Drop entries until the first one is one that still waits."""
        entries = self.entries
        while entries and entries[0].called:
            entries.popleft()
            self.given_up -= 1
