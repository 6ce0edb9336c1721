"""
The sums of the metrics of all workers, with the names in ``docs/metrics.md``.

Counters only grow: the sums include the counts of workers that have ended.
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
A number; for a histogram, a list of the sum of its samples and then the number of
samples in each bucket of :class:`~twisted_rtsig.coro.Histogram`.
"""


class Metric(NamedTuple):
    """
    One number, or one histogram.

    :ivar name: the name of its family.
    :ivar labels: pairs of a label's name and value, in order.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    value: Value


_TABLE: Final = """\
twisted_workers             gauge     Worker processes.
twisted_workers_ended       counter   Workers that have ended.
twisted_worker_cpu_seconds  counter   CPU time of the workers.
twisted_worker_memory_bytes gauge     Resident memory of the workers.
twisted_worker_connections  gauge     Open server connections, of any protocol.
twisted_worker_requests     counter   Requests that twisted.web has answered.
twisted_tasks               gauge     Tasks that have not ended.
twisted_tasks_spawned       counter   Tasks.
twisted_tasks_ended         counter   Tasks that have ended.
twisted_connections         gauge     Open connections.
twisted_connections_made    counter   Connections.
twisted_pending_bytes       gauge     Bytes that wait in the workers.
twisted_server_connections  gauge     Connections of a server.
twisted_server_limits       counter   Connections that a limit has refused or aborted.
twisted_channels            gauge     Values in channels, and operations that wait.
twisted_threads             gauge     Threads of the pools.
twisted_processes           gauge     Child processes.
twisted_pass_seconds        histogram Passes of the reactors.
"""

FAMILIES: Final[Mapping[str, tuple[str, str]]] = {
    name: (kind, description)
    for name, kind, description in (line.split(None, 2) for line in _TABLE.splitlines())
}
"""By the name of each family: its type and its description."""


def metrics_of(snapshot: Mapping[str, Any]) -> Iterator[Metric]:
    """
    Yield the metrics of a snapshot of a worker.

    :param snapshot: see :meth:`twisted_rtsig.workers.snapshot.Observer.snapshot`.
    """
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
    """Whether the metric is a gauge, which counts what exists now."""
    return FAMILIES[metric.name][0] == GAUGE


def add_up(metrics: Iterable[Metric]) -> list[Metric]:
    """Return one metric for each name and labels, with the sum of the values."""
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
    """Return metrics as lists and dictionaries, for JSON."""
    return [[name, dict(labels), value] for name, labels, value in metrics]


def from_json(metrics: Iterable[Any]) -> list[Metric]:
    """Return the metrics that :func:`to_json` converted."""
    return [Metric(name, tuple(labels.items()), v) for name, labels, v in metrics]


def exposition(metrics: Iterable[Metric]) -> str:
    """
    Return metrics as Prometheus reads them (its text-based format, version 0.0.4).

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
