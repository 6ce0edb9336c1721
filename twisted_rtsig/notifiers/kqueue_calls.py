"""
kqueue(2) and kevent(2) for the kqueue notifier.

They are those of :mod:`select`, which exist on BSD and macOS only.  Nothing else of
this package uses them, so a test can replace them by others.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twisted_rtsig.notifiers import UnsupportedReactorError


class KernelEvent(Protocol):
    """A change or an event: an object of ``select.kevent``."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int


class KernelQueue(Protocol):
    """A queue: an object of ``select.kqueue``."""

    def control(
        self,
        changelist: Sequence[KernelEvent] | None,
        max_events: int,
        timeout: float | None = None,
        /,
    ) -> list[KernelEvent]:
        """Call kevent(2) once."""

    def fileno(self) -> int:
        """The descriptor of the queue, which is readable while there are events."""

    def close(self) -> None:
        """Close the queue."""


@dataclass(frozen=True)
class KernelCalls:
    """
    The kqueue of a system, and the numbers of its filters, which differ by system.

    :ivar user: the number of EVFILT_USER; None if the system does not have it.
    """

    kqueue: Callable[[], KernelQueue]
    kevent: Callable[..., KernelEvent]
    read: int
    write: int
    process: int
    user: int | None


# From sys/event.h of each system, as ``select`` does not define EVFILT_USER.
_EVFILT_USER = {
    "darwin": -10,
    "dragonfly": -9,
    "freebsd": -11,
    "netbsd": 8,
    "openbsd": -10,
}


def native_calls() -> KernelCalls:
    """
    The calls of this system.

    :raises UnsupportedReactorError: if it has no kqueue.
    """
    if not hasattr(select, "kqueue"):
        raise UnsupportedReactorError(
            f"kqueue exists on BSD and macOS only, and this is {sys.platform}; use "
            + (
                "--reactor=rtsig-epoll"
                if sys.platform.startswith("linux")
                else "--reactor=select"
            )
        )
    calls: Any = select
    return KernelCalls(
        kqueue=calls.kqueue,
        kevent=calls.kevent,
        read=calls.KQ_FILTER_READ,
        write=calls.KQ_FILTER_WRITE,
        process=calls.KQ_FILTER_PROC,
        user=_EVFILT_USER.get(sys.platform.rstrip("0123456789.")),
    )
