"""
Run an application on all cores: ``twistd --reactor=rtsig-auto workers web``.

A supervisor holds the listening sockets.  It starts, watches and replaces the worker
processes.  See ``docs/workers.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twisted_rtsig.workers.draining import Drained, IDrainable, drain


@dataclass(frozen=True)
class Worker:
    """
    The number of a worker process, and how many workers there are.

    :ivar number: from 0 to ``count`` - 1.  When a worker ends, its successor gets the
        same number.
    :ivar count: the wanted number of workers at the time this one was started.
    """

    number: int
    count: int


_current: Worker | None = None


def current() -> Worker | None:
    """
    Return the :class:`Worker` that describes this process; None in a process that is
    not a worker.

    For example, let one worker alone do the periodic work::

        worker = current()
        if worker is None or worker.number == 0:
            start_the_nightly_report()
    """
    return _current


def __getattr__(name: str) -> object:
    # Imported on demand: a worker process imports this package first, and must not
    # import Twisted before it has set up the environment for the application.
    if name in ("Drained", "IDrainable", "drain"):
        from twisted_rtsig.workers import draining

        return getattr(draining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Drained", "IDrainable", "Worker", "current", "drain"]
