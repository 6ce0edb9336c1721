"""The status of one worker, for ``python -m twisted_rtsig.workers status``."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict
from time import perf_counter_ns
from typing import Any, Final

from twisted_rtsig.coro import Histogram, format_tasks, statistics

SLOW: Final = 0.1
"""A pass of the reactor that takes longer than this, in seconds, counts as slow."""


class Observer:
    """
    Counts the passes of the reactor and the requests of a worker.

    :ivar passes: the durations of the passes.  A pass is the time between two waits for
        events.
    :ivar slow_passes: how many passes took longer than :data:`SLOW`.
    :ivar requests: how many requests ``twisted.web`` has answered; None if the worker
        does not use it.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self.passes = Histogram()
        self.slow_passes = 0
        self.requests: int | None = None
        # None until the first pass begins: the start of the program is not a pass.
        self._pass_began: int | None = None
        # Not an instrument, as that would observe each step of each task.
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
        """Start counting requests.  The application must have imported its modules."""
        http = sys.modules.get("twisted.web.http")
        if http is None:
            return
        self.requests = 0
        log = http.HTTPFactory.log

        def count_and_log(factory: Any, request: Any) -> None:
            # HTTPFactory.log is called for each request that was answered.
            self.requests += 1  # type: ignore[operator]
            log(factory, request)

        http.HTTPFactory.log = count_and_log

    def snapshot(self, tasks: bool = False) -> dict[str, Any]:
        """
        Return the current figures, for JSON.

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
    """Return the resident memory in bytes; its maximum where only that is known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # ru_maxrss is in bytes on macOS, and in kilobytes on other systems.
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["SLOW", "Observer"]
