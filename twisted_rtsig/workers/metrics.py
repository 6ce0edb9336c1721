"""
The metrics of all workers, added up, in the names of ``docs/metrics.md``.

Counters only grow: what workers have counted that have ended stays in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeAlias

from twisted_rtsig.coro import Histogram

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

Value: TypeAlias = "float | list[float]"
"""
A number; of a histogram, the sum of its samples and then the number of samples in each
bucket of :class:`Histogram`.
"""


class Metric(NamedTuple):
    """
    One number, or one histogram.

    :ivar name: the name of the family.
    :ivar labels: names and values, in order.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    value: Value


FAMILIES: Final[Mapping[str, tuple[str, str]]] = {
    "twisted_workers": (GAUGE, "Worker processes."),
    "twisted_workers_ended": (COUNTER, "Workers that have ended."),
    "twisted_worker_cpu_seconds": (COUNTER, "CPU time of the workers."),
    "twisted_worker_memory_bytes": (GAUGE, "Resident memory of the workers."),
    "twisted_worker_connections": (GAUGE, "Open server connections, of any protocol."),
    "twisted_worker_requests": (COUNTER, "Requests that twisted.web has answered."),
    "twisted_tasks": (GAUGE, "Tasks that have not ended."),
    "twisted_tasks_spawned": (COUNTER, "Tasks."),
    "twisted_tasks_ended": (COUNTER, "Tasks that have ended."),
    "twisted_connections": (GAUGE, "Open connections."),
    "twisted_connections_made": (COUNTER, "Connections."),
    "twisted_pending_bytes": (GAUGE, "Bytes that wait in the workers."),
    "twisted_server_connections": (GAUGE, "Connections of a server."),
    "twisted_server_limits": (
        COUNTER,
        "Connections that a limit of a server has refused or aborted.",
    ),
    "twisted_channels": (GAUGE, "Values in channels, and operations that wait."),
    "twisted_threads": (GAUGE, "Threads of the pools."),
    "twisted_processes": (GAUGE, "Child processes."),
    "twisted_pass_seconds": (HISTOGRAM, "Passes of the reactors."),
}
"""By name: the type of each family, and its description."""


def metrics_of(snapshot: Mapping[str, Any]) -> Iterator[Metric]:
    """What :func:`twisted_rtsig.workers.snapshot.Observer.snapshot` has counted."""
    coroutines = snapshot["coroutines"]
    tasks, streams = coroutines["tasks"], coroutines["streams"]
    yield Metric("twisted_worker_cpu_seconds", (), snapshot["cpu"])
    yield Metric("twisted_worker_memory_bytes", (), snapshot["memory"])
    yield Metric("twisted_worker_connections", (), snapshot["connections"])
    if snapshot["requests"] is not None:
        yield Metric("twisted_worker_requests", (), snapshot["requests"])
    for state in ("running", "ready", "waiting"):
        yield Metric("twisted_tasks", (("state", state),), tasks[state])
    yield Metric("twisted_tasks_spawned", (), tasks["spawned"])
    for how in ("succeeded", "failed", "cancelled", "collected"):
        yield Metric("twisted_tasks_ended", (("how", how),), tasks[how])
    yield Metric("twisted_connections", (), streams["open"])
    yield Metric("twisted_connections_made", (), streams["made"])
    for state in ("unread", "unsent"):
        yield Metric("twisted_pending_bytes", (("state", state),), streams[state])
    for server in coroutines["servers"]:
        name = ("server", server["name"])
        yield Metric("twisted_server_connections", (name,), server["connections"])
        for limit, count in server["limits"].items():
            yield Metric("twisted_server_limits", (name, ("limit", limit)), count)
    for state in ("buffered", "senders", "receivers"):
        count = coroutines["channels"][state]
        yield Metric("twisted_channels", (("state", state),), count)
    for state in ("busy", "idle"):
        count = coroutines["threads"][state]
        yield Metric("twisted_threads", (("state", state),), count)
    yield Metric("twisted_processes", (), coroutines["processes"])
    passes = snapshot["passes"]
    yield Metric("twisted_pass_seconds", (), [passes["sum"], *passes["counts"]])


def is_gauge(metric: Metric) -> bool:
    """Whether it counts what there is now."""
    return FAMILIES[metric.name][0] == GAUGE


def add_up(metrics: Iterable[Metric]) -> list[Metric]:
    """One of each name and labels, with the sum of the values."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], Value] = {}
    for name, labels, value in metrics:
        so_far = sums.get((name, labels))
        if so_far is None:
            sums[name, labels] = value
        elif isinstance(so_far, list) and isinstance(value, list):
            sums[name, labels] = [a + b for a, b in zip(so_far, value, strict=True)]
        elif not isinstance(so_far, list) and not isinstance(value, list):
            sums[name, labels] = so_far + value
    return [Metric(name, labels, value) for (name, labels), value in sums.items()]


def to_json(metrics: Iterable[Metric]) -> list[Any]:
    """As what JSON has."""
    return [[name, dict(labels), value] for name, labels, value in metrics]


def from_json(metrics: Iterable[Any]) -> list[Metric]:
    """What :func:`to_json` has returned."""
    return [Metric(name, tuple(labels.items()), v) for name, labels, v in metrics]


def exposition(metrics: Iterable[Metric]) -> str:
    """
    Text as Prometheus reads it (its text-based format, version 0.0.4).

    :raises KeyError: if a name is not one of :data:`FAMILIES`.
    """
    by_name: dict[str, list[Metric]] = {name: [] for name in FAMILIES}
    for metric in metrics:
        by_name[metric.name].append(metric)
    lines = []
    for name, those in by_name.items():
        kind, description = FAMILIES[name]
        if those:
            full = f"{name}_total" if kind == COUNTER else name
            lines += [f"# HELP {full} {description}", f"# TYPE {full} {kind}"]
            for metric in those:
                lines += _samples(full, metric)
    return "".join(f"{line}\n" for line in lines)


def _samples(name: str, metric: Metric) -> Iterator[str]:
    if not isinstance(metric.value, list):
        yield f"{name}{_labels(metric.labels)} {metric.value!r}"
        return
    total, *counts = metric.value
    bounds = [*map(repr, Histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(counts), strict=True):
        yield f"{name}_bucket{_labels((*metric.labels, ('le', bound)))} {count}"
    yield f"{name}_count{_labels(metric.labels)} {sum(counts)}"
    yield f"{name}_sum{_labels(metric.labels)} {total!r}"


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


__all__ = ["FAMILIES", "Metric", "add_up", "exposition", "metrics_of"]
