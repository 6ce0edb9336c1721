"""What a worker tells of itself, for ``python -m twisted_rtsig.workers status``."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict
from time import perf_counter_ns
from typing import Any, Final

from twisted_rtsig.coro import Histogram, format_tasks, statistics

SLOW: Final = 0.1
"""After how many seconds a pass of the reactor is called slow."""


class Observer:
    """
    Counts what a worker does.

    :ivar passes: of the reactor, each from one wait for events to the next.
    :ivar slow_passes: those that took longer than :data:`SLOW`.
    :ivar requests: how many requests ``twisted.web`` has answered; None if the worker
        does not use it.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self.passes = Histogram()
        self.slow_passes = 0
        self.requests: int | None = None
        # The start of the program is no pass.
        self._pass_began: int | None = None
        # Not as an instrument: with one, each task is looked at.
        reactor.observe_passes(self._pass_begins, self._pass_ends, self)

    def _pass_begins(self) -> None:
        self._pass_began = perf_counter_ns()

    def _pass_ends(self) -> None:
        if self._pass_began is None:
            return
        took = perf_counter_ns() - self._pass_began
        self.passes.add(took)
        if took > SLOW * 1e9:
            self.slow_passes += 1

    def count_requests(self) -> None:
        """Count requests from now on.  The application has imported what it needs."""
        http = sys.modules.get("twisted.web.http")
        if http is None:
            return
        self.requests = 0
        log = http.HTTPFactory.log

        def count_and_log(factory: Any, request: Any) -> None:
            # HTTPFactory logs each request that is answered.
            self.requests += 1  # type: ignore[operator]
            log(factory, request)

        http.HTTPFactory.log = count_and_log

    def snapshot(self, tasks: bool = False) -> dict[str, Any]:
        """
        What there is now, for JSON.

        :param tasks: whether to describe the tasks.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF)
        snapshot: dict[str, Any] = {
            "connections": len(self._reactor.server_connections),
            "requests": self.requests,
            "cpu": round(usage.ru_utime + usage.ru_stime, 3),
            "memory": _memory(usage),
            "reactor": dict(self._reactor.statistics()),
            "passes": {"sum": self.passes.sum, "counts": self.passes.counts},
            "slow_passes": self.slow_passes,
            "coroutines": asdict(statistics(self._reactor)),
        }
        if tasks:
            snapshot["tasks"] = format_tasks(self._reactor)
        return snapshot


def _memory(usage: resource.struct_rusage) -> int:
    """The bytes of resident memory; at most so many, where the system has only that."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # macOS counts bytes, others kilobytes.
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["SLOW", "Observer"]
