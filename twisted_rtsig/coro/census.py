"""
Counts of each reactor's tasks and connections, for statistics.

All references here are weak: to be counted keeps no object alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from twisted_rtsig.coro.streams import Stream

T = TypeVar("T")


class Registry(Generic[T]):
    """
    A set of weak references to objects that compare by identity.

    As ``WeakSet``, but made of calls of C functions: an object is added for each
    connection, so that has to be fast.
    """

    __slots__ = ("_discard", "_references")

    def __init__(self) -> None:
        self._references: set[ref[T]] = set()
        # One bound method serves as the callback of all references.
        self._discard = self._references.discard

    def add(self, item: T) -> None:
        """Add ``item``, unless it is in the set."""
        self._references.add(ref(item, self._discard))

    def discard(self, item: T) -> None:
        """Remove ``item`` if it is in the set."""
        self._discard(ref(item))

    def __len__(self) -> int:
        return len(self._references)

    def __iter__(self) -> Iterator[T]:
        # A copy, since the garbage collector may remove references meanwhile.
        for reference in self._references.copy():
            item = reference()
            if item is not None:
                yield item


class Totals:
    """
    Totals of one reactor, which only grow, and its open connections.

    :ivar tasks: the numbers of tasks that were spawned, have succeeded, have failed,
        and were cancelled.  The index is the state, as in tasks.py; index 0 is for all
        spawned tasks, which the scheduler adds up only in ``count_spawned``.
    :ivar collected: the number of tasks that were garbage collected before they had
        ended, as far as the scheduler has noticed.
    :ivar connections_made: the number of streams that were made for connections.
    :ivar streams: the streams of the connections that are not lost.
    """

    __slots__ = ("__weakref__", "collected", "connections_made", "streams", "tasks")

    def __init__(self) -> None:
        self.tasks: list[int] = [0, 0, 0, 0]
        self.collected: int = 0
        self.connections_made: int = 0
        self.streams: Registry[Stream] = Registry()


_totals: Final[WeakKeyDictionary[Any, Totals]] = WeakKeyDictionary()


def totals_of(reactor: Any) -> Totals:
    """
    The totals of a reactor, which last as long as the reactor does.

    A scheduler may exist only while there are tasks.
    """
    try:
        totals = _totals.get(reactor)
        if totals is None:
            totals = _totals[reactor] = Totals()
    except TypeError:
        # The reactor does not support weak references: its totals last as long as its
        # scheduler.
        totals = Totals()
    return totals
