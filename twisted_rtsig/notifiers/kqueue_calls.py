"""
Finding kqueue(2) and kevent(2) for the kqueue notifier.

They are those of ``select``, which exist on BSD and macOS only.  Nothing else of
this package touches them, so that a test can hand over others.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twisted_rtsig.notifiers import UnsupportedReactorError


class KernelEvent(Protocol):
    """What ``select.kevent`` makes: a change, or an event."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int


class KernelQueue(Protocol):
    """What ``select.kqueue`` makes."""

    def control(
        self,
        changelist: Sequence[KernelEvent] | None,
        max_events: int,
        timeout: float | None = None,
        /,
    ) -> list[KernelEvent]:
        """Call kevent(2) once."""

    def fileno(self) -> int:
        """Its descriptor, which is readable while there are events."""

    def close(self) -> None:
        """Give it back."""


@dataclass(frozen=True)
class KernelCalls:
    """
    A system's kqueue, and the numbers of its filters, which differ.

    :ivar user: None where there is no EVFILT_USER.
    """

    kqueue: Callable[[], KernelQueue]
    kevent: Callable[..., KernelEvent]
    read: int
    write: int
    process: int
    user: int | None


# From sys/event.h of each: ``select`` leaves EVFILT_USER out.
_EVFILT_USER = {
    "darwin": -10,
    "dragonfly": -9,
    "freebsd": -11,
    "netbsd": 8,
    "openbsd": -10,
}


def native_calls() -> KernelCalls:
    """
    What this system has.

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
