"""
Calls when an event of Windows (``CreateEvent``) is set: ``IReactorWin32Events``.

Twisted's reactors implement it by a second reactor in a thread of its own, which waits
for 63 events at most and needs pywin32.  Here the completion port does it, for any
number of events, and for any handle that can be waited for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IReactorWin32Events
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_rtsig.engine.reactor import EngineReactor

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier


class _Event:
    """The method to call whenever an event is set."""

    def __init__(
        self, reactor: WindowsEventReactor, event: Any, owner: Any, action: str
    ) -> None:
        self._reactor = reactor
        # The handle must not be closed while it is waited for.
        self.event = event
        self._owner = owner
        self._action = action
        self._number = 0

    def wait(self) -> None:
        self._number = self._reactor._port.call_once_signalled(
            int(self.event), self._is_set
        )

    def forget(self) -> None:
        self._reactor._port.forget(self._number)

    def _is_set(self) -> None:
        events = self._reactor._events_by_handle
        handle = int(self.event)
        if events.get(handle) is not self:
            # It was removed before the call.
            return
        why = log.callWithLogger(self._owner, self._call)
        if events.get(handle) is not self:
            return
        self.forget()
        if why:
            del events[handle]
            log.callWithLogger(self._owner, self._owner.connectionLost, Failure(why))
        else:
            self.wait()

    def _call(self) -> Any:
        try:
            return getattr(self._owner, self._action)()
        except BaseException:
            log.err()
            return sys.exc_info()[1]


@implementer(IReactorWin32Events)
class WindowsEventReactor(EngineReactor):
    """An engine on a completion port, to which handles of any kind can report."""

    _port: CompletionPortNotifier

    def __init__(self) -> None:
        self._events_by_handle: dict[int, _Event] = {}
        super().__init__(self._port)

    def addEvent(self, event: Any, fd: Any, action: str) -> None:
        """
        Call the method ``action`` of ``fd`` whenever ``event`` is set.

        When the method raises an error or returns a reason, the event is removed, and
        ``fd.connectionLost`` is called with it.

        :param event: the handle of an event: an integer, or an object that converts to
            one.
        :raises OSError: if Windows refuses to wait for it.
        """
        if int(event) in self._events_by_handle:
            self.removeEvent(event)
        added = _Event(self, event, fd, action)
        added.wait()
        self._events_by_handle[int(event)] = added

    def removeEvent(self, event: Any) -> None:
        """
        Stop waiting for ``event``.

        :raises KeyError: if it was not added, or was removed already.
        """
        self._events_by_handle.pop(int(event)).forget()
