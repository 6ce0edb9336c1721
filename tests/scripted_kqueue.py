"""
A kqueue whose kernel is a script that behaves as NetBSD does.

A test says what happens to which descriptor.  As in the kernel, the reactor gets an
event only if it has asked for it: closing a descriptor removes its knotes, kevent(2)
returns the changes that failed at once and without events, and a one-shot event is
reported once.  Nothing ever sleeps.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from twisted_rtsig.notifiers.kqueue_calls import KernelCalls

READ, WRITE, PROCESS, USER = 0, 1, 4, 8
ADD, DELETE, ONESHOT, CLEAR, ERROR, EOF = 0x1, 0x2, 0x10, 0x20, 0x4000, 0x8000


@dataclass
class KEvent:
    """``select.kevent``"""

    ident: int
    filter: int = READ
    flags: int = ADD
    fflags: int = 0
    data: int = 0
    udata: int = 0


@dataclass(eq=False)
class ScriptedKernel:
    """
    The state of the kernel, which a test can read and set.

    :ivar changes: the changes of each call of kevent(2), in order.
    :ivar timeouts: the timeout of each call.
    :ivar script: the events that have happened and were not reported yet.
    :ivar refuses: the errno with which a descriptor or a filter is refused.
    :ivar receipts: return a receipt for each change, as for EV_RECEIPT.
    :ivar interrupt: the next call raises this before it does anything.
    :ivar meanwhile: the next call calls this after it has made the changes.
    :ivar queues: all queues that were made.
    """

    changes: list[list[KEvent]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    script: list[KEvent] = field(default_factory=list)
    refuses: dict[Any, int] = field(default_factory=dict)
    receipts: bool = False
    interrupt: BaseException | None = None
    meanwhile: Callable[[], object] | None = None
    queues: list[ScriptedKQueue] = field(default_factory=list)

    @property
    def calls(self) -> KernelCalls:
        """The calls of this kernel, for a notifier."""
        return KernelCalls(
            kqueue=lambda: ScriptedKQueue(self),
            kevent=KEvent,
            read=READ,
            write=WRITE,
            process=PROCESS,
            user=USER,
        )

    def happens(self, ident: int, filter: int, flags: int = 0, **more: int) -> None:
        """Report an event once, as soon as it is watched for."""
        self.script.append(KEvent(ident, filter, flags, **more))

    def take_changes(self) -> list[KEvent]:
        """All changes since the last such call."""
        taken = [change for changes in self.changes for change in changes]
        self.changes.clear()
        return taken

    def take_changes_of(self, ident: int) -> list[tuple[int, int]]:
        """Filter and flags of each change of ``ident`` since changes were taken."""
        return [
            (change.filter, change.flags)
            for change in self.take_changes()
            if change.ident == ident
        ]

    def take_changed(self) -> list[int]:
        """The descriptor or process of each change since changes were taken."""
        return [change.ident for change in self.take_changes()]


class ScriptedKQueue:
    """``select.kqueue``"""

    def __init__(self, kernel: ScriptedKernel) -> None:
        self.kernel = kernel
        kernel.queues.append(self)
        self.closed = False
        # The change that asked for each knote, and the identity of its descriptor.
        self.knotes: dict[tuple[int, int], tuple[KEvent, Any]] = {}
        # This pipe is always readable: select(2) always finds the queue ready.
        self._pipe = os.pipe()
        os.write(self._pipe[1], b"x")

    def fileno(self) -> int:
        return self._pipe[0]

    def close(self) -> None:
        self.closed = True
        for each in self._pipe:
            os.close(each)

    def control(
        self, changelist: Any, max_events: int, timeout: float | None = None, /
    ) -> list[Any]:
        kernel = self.kernel
        interrupt, kernel.interrupt = kernel.interrupt, None
        if interrupt is not None:
            raise interrupt
        changes = list(changelist or ())
        kernel.changes.append(changes)
        kernel.timeouts.append(timeout)
        results = []
        for change in changes:
            number = self._change(change)
            if number or kernel.receipts:
                results.append(replace(change, flags=ERROR, data=number))
        if len(results) > max_events:
            raise OSError(results[0].data, os.strerror(results[0].data))
        if results:
            return results
        events = self._events(max_events)
        meanwhile, kernel.meanwhile = kernel.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return events

    def _change(self, change: KEvent) -> int:
        key = change.ident, change.filter
        for each in (change.ident, change.filter):
            if each in self.kernel.refuses and change.flags & ADD:
                return self.kernel.refuses[each]
        identity = self._identity(*key)
        if identity is None:
            return errno.EBADF
        if key in self.knotes and self.knotes[key][1] != identity:
            del self.knotes[key]
        if change.flags & ADD:
            self.knotes[key] = change, identity
        elif key not in self.knotes:
            return errno.ENOENT
        elif change.flags & DELETE:
            del self.knotes[key]
        return 0

    def _identity(self, ident: int, filter: int) -> Any:
        if filter in (PROCESS, USER):
            return ident
        try:
            status = os.fstat(ident)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _events(self, max_events: int) -> list[KEvent]:
        events: list[KEvent] = []
        for event in list(self.kernel.script):
            key = event.ident, event.filter
            if key not in self.knotes or len(events) == max_events:
                continue
            change, identity = self.knotes[key]
            if self._identity(*key) != identity:
                # The descriptor was closed, and its knotes are gone.
                del self.knotes[key]
                continue
            self.kernel.script.remove(event)
            events.append(replace(event, udata=change.udata))
            if (change.flags | event.flags) & ONESHOT:
                del self.knotes[key]
        return events
