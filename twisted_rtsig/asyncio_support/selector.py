"""
The engine as the selector of an asyncio event loop, so that the loop and a reactor wait
for events together, in one thread.

An event loop of asyncio calls ``select()`` to sleep.  This one runs passes of the
reactor, and returns only when asyncio has something to do: a descriptor of asyncio is
ready, a timer is due, a callback was scheduled, or the loop was stopped.  So if only
Twisted is busy, control stays in the engine, and asyncio costs a few tests of
attributes in each pass.
"""

from __future__ import annotations

import errno
import selectors
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from twisted.logger import Logger

from twisted_rtsig.asyncio_support.transports import SocketTransport
from twisted_rtsig.asyncio_support.watched import Watched, WatchedTransport
from twisted_rtsig.engine.reactor import LogContext
from twisted_rtsig.notifiers.registration import READ, WRITE

if TYPE_CHECKING:
    from twisted_rtsig.asyncioreactor import AsyncioEngineReactor

# The engine and the standard library have the same values for directions.
assert (READ, WRITE) == (selectors.EVENT_READ, selectors.EVENT_WRITE)

# In seconds: the longest sleep, as in asyncio.
_LONGEST_SLEEP: Final = 24 * 3600.0

# The logger of Twisted's main loop.
_log = Logger(namespace="twisted.internet.base")


class LoopStopped(BaseException):
    """A callback has stopped the loop, which must not call others any more."""


class EngineSelector(selectors.BaseSelector):
    """
    A selector that runs a reactor while it waits.

    :param reactor: the reactor.
    :param loop: the event loop whose selector it is.
    :ivar fields: the fields of the log context while the loop runs in that of a main
        loop; otherwise None.
    """

    def __init__(self, reactor: AsyncioEngineReactor, loop: Any) -> None:
        self._reactor = reactor
        self._loop = loop
        self._watched: dict[int, Watched] = {}
        # The watched descriptors that are ready.
        self._reported: list[Watched] = []
        self._map = _Map(self._watched)
        self.fields: LogContext | None = None

    # Registrations

    def register(
        self, fileobj: Any, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """
        See ``BaseSelector.register``.

        :raises OSError: if the descriptor cannot be watched; ``PermissionError`` for a
            file on Linux.
        """
        _check(events)
        descriptor = _descriptor_of(fileobj)
        if descriptor in self._watched:
            raise KeyError(f"{fileobj!r} (FD {descriptor}) is already registered")
        key = selectors.SelectorKey(fileobj, descriptor, events, data)
        watched = self._make(key)
        self._watch(watched, events)
        if type(watched) is Watched and self._reactor.is_file(watched):
            self._unwatch(watched, events)
            raise PermissionError(
                errno.EPERM, f"{fileobj!r} is a file, which is always ready"
            )
        self._watched[descriptor] = watched
        return key

    def _make(self, key: selectors.SelectorKey) -> Watched:
        if key.events & READ and isinstance(key.data, tuple):
            transport = getattr(key.data[0]._callback, "__self__", None)
            if type(transport) is SocketTransport and transport.reads_plainly():
                return WatchedTransport(key, self._reported, transport, self._reactor)
        return Watched(key, self._reported)

    def modify(
        self, fileobj: Any, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """
        See ``BaseSelector.modify``.

        :raises OSError: if the descriptor was closed.  Then it is not registered any
            more.
        """
        _check(events)
        watched = self._map.find(fileobj)
        former = watched.key
        watched.key = selectors.SelectorKey(former.fileobj, former.fd, events, data)
        if type(watched) is WatchedTransport and data[0] is not None:
            watched.run = data[0]._context.run
        if events != former.events:
            # New interest first, so that the engine's registration does not end in
            # between.
            try:
                self._watch(watched, events & ~former.events)
            except BaseException:
                self.unregister(fileobj)
                raise
            self._unwatch(watched, former.events & ~events)
        return watched.key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """See ``BaseSelector.unregister``."""
        watched = self._map.find(fileobj)
        key = watched.key
        del self._watched[key.fd]
        self._unwatch(watched, key.events)
        return key

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """See ``BaseSelector.get_key``."""
        return self._map.find(fileobj).key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """See ``BaseSelector.get_map``."""
        return self._map

    def close(self) -> None:
        """Stop watching all descriptors."""
        for watched in list(self._watched.values()):
            self._unwatch(watched, READ | WRITE)
        self._watched.clear()

    def _watch(self, watched: Watched, directions: int) -> None:
        if directions & READ:
            self._reactor.addReader(watched)
        if directions & WRITE:
            try:
                self._reactor.addWriter(watched)
            except BaseException:
                if directions & READ:
                    self._reactor.removeReader(watched)
                raise

    def _unwatch(self, watched: Watched, directions: int) -> None:
        # Drop pending directions whose interest ends.
        if watched.pending:
            watched.pending &= ~directions
            if not watched.pending:
                self._reported.remove(watched)
        if directions & READ:
            self._reactor.removeReader(watched)
        if directions & WRITE:
            self._reactor.removeWriter(watched)

    # Waiting

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """
        Run passes of the reactor until asyncio has something to do.

        :param timeout: seconds; None for no limit.  A callback or timer of asyncio that
            is scheduled meanwhile may end the wait earlier.
        """
        fields = self.fields
        if fields is None:
            self._reactor._in_log_context(self._run_passes, timeout)
        else:
            self._run_passes(fields, timeout)
        reported = self._reported
        if not reported:
            return []
        events = []
        for watched in reported:
            # A descriptor that was unregistered meanwhile is not in the list any more.
            events.append((watched.key, watched.pending))
            watched.pending = 0
        reported.clear()
        return events

    def _run_passes(self, fields: LogContext, timeout: float | None) -> None:
        reactor, loop, reported = self._reactor, self._loop, self._reported
        if reactor.starts_with_loop:
            reactor.start_by_loop()
        once = timeout == 0 or reactor.makes_one_pass
        deadline = None
        if timeout:
            deadline = loop.time() + timeout
        while True:
            try:
                delay = reactor._make_calls()
                # As in _pass(): from here on, a signal handler sends what it writes.
                reactor._waiting = True
                if reactor.collecting:
                    reactor.send_collected()
                # Not earlier: the calls above may have given asyncio something to do.
                if timeout == 0 or reported or loop._ready or loop._stopping:
                    delay = 0
                elif loop._scheduled or deadline is not None:
                    delay = self._sleep(delay, deadline)
                reactor._pass(fields, delay)
            except Exception:
                reactor._waiting = False
                _log.failure("Unexpected error in main loop.")
            if reactor.raised is not None:
                try:
                    raise reactor.raised
                finally:
                    reactor.raised = None
            if once:
                break
            if reported or loop._stopping:
                return
            if loop._scheduled or deadline is not None:
                now = loop.time() + loop._clock_resolution
                if deadline is not None and deadline < now:
                    return
                if loop._scheduled and loop._scheduled[0]._when < now:
                    return
                if loop._timer_cancelled_count > len(loop._scheduled) // 2 + 100:
                    # Only the loop itself removes cancelled timers.
                    return
            if loop._ready:
                if not reactor.in_plain_run:
                    return
                self._run_ready()
        if reactor.makes_one_pass:
            loop.stop()

    def _run_ready(self) -> None:
        """
        Call the scheduled callbacks, as the loop would if nothing else is to do.

        :raises LoopStopped: if one of them has stopped the loop.
        """
        loop = self._loop
        ready = loop._ready
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()
        # The handle may refer to an exception whose traceback refers to this frame.
        handle = None
        if loop._stopping:
            raise LoopStopped

    def _sleep(self, delay: float | None, deadline: float | None) -> float:
        """
        How long to sleep: until the next call of Twisted, the next timer of asyncio, or
        the deadline.
        """
        loop = self._loop
        end = _LONGEST_SLEEP + (now := loop.time())
        if deadline is not None and deadline < end:
            end = deadline
        if loop._scheduled and loop._scheduled[0]._when < end:
            end = loop._scheduled[0]._when
        sleep: float = max(0.0, end - now)
        return sleep if delay is None else min(delay, sleep)


class _Map(Mapping[Any, selectors.SelectorKey]):
    """The keys of a selector by file object or descriptor."""

    def __init__(self, watched: dict[int, Watched]) -> None:
        self._watched = watched

    def find(self, fileobj: Any) -> Watched:
        """
        :raises KeyError: if it is not registered.
        """
        if type(fileobj) is int and fileobj >= 0:
            return self._watched[fileobj]
        try:
            found = self._watched.get(_descriptor_of(fileobj))
        except ValueError:
            # The file is closed and has no descriptor any more, so search for the file.
            found = next(
                (
                    each
                    for each in self._watched.values()
                    if each.key.fileobj is fileobj
                ),
                None,
            )
            if found is None:
                raise
        if found is None:
            raise KeyError(f"{fileobj!r} is not registered")
        return found

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        return self.find(fileobj).key

    def get(self, fileobj: Any, default: Any = None) -> Any:
        found = self._watched.get(fileobj)
        if found is not None:
            return found.key
        return default if type(fileobj) is int else super().get(fileobj, default)

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[int]:
        return iter(self._watched)


def _check(events: int) -> None:
    if not events or events & ~(READ | WRITE):
        raise ValueError(f"Invalid events: {events!r}")


def _descriptor_of(fileobj: Any) -> int:
    """
    :raises ValueError: if it has none.
    """
    if isinstance(fileobj, int):
        descriptor = fileobj
    else:
        try:
            descriptor = int(fileobj.fileno())
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"Invalid file object: {fileobj!r}") from None
    if descriptor < 0:
        raise ValueError(f"Invalid file descriptor: {descriptor}")
    return descriptor


__all__ = ["EngineSelector", "LoopStopped"]
