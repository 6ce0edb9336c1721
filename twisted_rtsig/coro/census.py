"""
Counts of each reactor's tasks and connections, for statistics.

Everything here is held weakly: to be counted keeps nothing alive.
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
    Objects that are equal only to themselves, for as long as anything else refers to
    them.

    As ``WeakSet``, in calls of C functions: one object is added for each connection.
    """

    __slots__ = ("_discard", "_references")

    def __init__(self) -> None:
        self._references: set[ref[T]] = set()
        # One bound method serves as the callback of all references.
        self._discard = self._references.discard

    def add(self, item: T) -> None:
        """Add ``item``, unless it is there."""
        self._references.add(ref(item, self._discard))

    def discard(self, item: T) -> None:
        """Remove ``item`` if it is there."""
        self._discard(ref(item))

    def __len__(self) -> int:
        return len(self._references)

    def __iter__(self) -> Iterator[T]:
        # A copy, since the garbage collector may remove some meanwhile.
        for reference in self._references.copy():
            item = reference()
            if item is not None:
                yield item


class Totals:
    """
    Counts of one reactor that only grow, and its open connections.

    :ivar tasks: how many tasks were spawned, have succeeded, have failed, and were
        cancelled: by the states of tasks.py, where the state 0 stands for all tasks.
        The scheduler counts the spawned ones when it is asked to.
    :ivar collected: how many tasks were garbage collected before they had ended, as
        far as it was noticed.
    :ivar connections_made: how many streams were made for connections.
    :ivar streams: those of the connections that are not lost.
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

    Its scheduler exists only while there are tasks.
    """
    try:
        totals = _totals.get(reactor)
        if totals is None:
            totals = _totals[reactor] = Totals()
    except TypeError:
        # It has no weak references: its totals last as long as its scheduler.
        totals = Totals()
    return totals
