"""Those who wait for the same thing, first come first served."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol


class Entry(Protocol):
    """Who waits: an operation, or one of the cases of a C{select}."""

    called: bool
    """Whether it is finished, or was given up."""

    value: Any
    """Of one who sends: what."""

    owner: Any
    """Of all the cases of one C{select}: the same."""

    def succeed(self, value: Any) -> None:
        """It waits no more."""

    def fail(self, error: BaseException) -> None:
        """It waited for nothing."""


class Waiters(deque[Any]):
    """
    Entries.

    Those that were given up stay where they are until it is their turn, or until
    half of all are like that: so that each is gone in constant time, however many
    there are.  The first one always still waits.

    :ivar given_up: how many there are of those.
    """

    __slots__ = ("given_up",)

    def __init__(self) -> None:
        super().__init__()
        self.given_up = 0

    @property
    def waiting(self) -> int:
        """How many still wait."""
        return len(self) - self.given_up

    def next(self) -> Any:
        """Take out the first; there must be one."""
        first = self.popleft()
        if self.given_up:
            self.strip()
        return first

    def forget(self, entry: Any) -> None:
        """One of them is given up: it is called, or is about to be."""
        if self[0] is entry:
            self.next()
            return
        self.given_up += 1
        if 2 * self.given_up > len(self):
            waiting = [each for each in self if not (each.called or each is entry)]
            self.clear()
            self.extend(waiting)
            self.given_up = 0

    def strip(self) -> None:
        """Let the first one be one that still waits."""
        while self and self[0].called:
            self.popleft()
            self.given_up -= 1
