"""
The same application on all cores: ``twistd --reactor=rtsig-auto workers web``.

A supervisor holds the listening sockets, and starts, watches and replaces the worker
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
    What a worker knows of itself.

    :ivar number: from 0 to ``count`` - 1.  The successor of a worker that has ended has
        the same number.
    :ivar count: how many workers there were to be when this one was started.
    """

    number: int
    count: int


_current: Worker | None = None


def current() -> Worker | None:
    """
    The worker that this process is; None in other processes.

    Let one worker do the periodic work, for example::

        worker = current()
        if worker is None or worker.number == 0:
            start_the_nightly_report()
    """
    return _current


def __getattr__(name: str) -> object:
    # A worker begins here, and Twisted is not to be imported before the environment is
    # as the application has to find it.
    if name in ("Drained", "IDrainable", "drain"):
        from twisted_rtsig.workers import draining

        return getattr(draining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Drained", "IDrainable", "Worker", "current", "drain"]
