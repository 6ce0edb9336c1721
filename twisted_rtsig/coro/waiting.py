"""A queue of waiters, first come first served."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol


class Entry(Protocol):
    """Who waits: an operation, or one of the cases of a ``select``."""

    called: bool
    """Whether it is finished, or was given up."""

    value: Any
    """Of one who sends: what."""

    owner: Any
    """Of all the cases of one ``select``: the same."""

    def succeed(self, value: Any) -> None:
        """It waits no more."""

    def settle(self, value: Any) -> None:
        """It waits no more, and is told of it by ``tell``."""

    def tell(self) -> None:
        """It is told."""

    def fail(self, error: BaseException) -> None:
        """It waited for nothing."""


class Waiters:
    """
    Those who wait.

    Who was given up stays where it is until it is its turn, or until half of all are
    like that: so that each is gone in constant time, however many there are.

    :ivar entries: all of them; the first one always still waits.
    :ivar given_up: how many do not.
    """

    __slots__ = ("entries", "given_up")

    # A deque of its own, since CPython calls the methods of a subclass the long way.

    def __init__(self) -> None:
        self.entries: deque[Any] = deque()
        self.given_up: int = 0

    @property
    def waiting(self) -> int:
        """How many still wait."""
        return len(self.entries) - self.given_up

    def next(self) -> Any:
        """Take out the first; there must be one."""
        first = self.entries.popleft()
        if self.given_up:
            self.strip()
        return first

    def forget(self, entry: Any) -> None:
        """One of them is given up: it is called, or is about to be."""
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
        """Let the first one be one that still waits."""
        entries = self.entries
        while entries and entries[0].called:
            entries.popleft()
            self.given_up -= 1
