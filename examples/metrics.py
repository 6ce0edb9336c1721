"""
An echo server that exports its tasks, connections and delays to Prometheus.

    pip install prometheus_client
    python examples/metrics.py [PORT [METRICS_PORT]]
    curl http://127.0.0.1:9777/metrics
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import react
from twisted.web.resource import Resource
from twisted.web.server import Site

import twisted_rtsig
from twisted_rtsig.coro import (
    Histogram,
    LoopMonitor,
    Stream,
    add_instrument,
    serve,
    statistics,
)


class ReactorCollector(Collector):
    """Collects what runs on a reactor, for a registry of prometheus_client."""

    def __init__(self, reactor: Any, monitor: LoopMonitor) -> None:
        self._reactor = reactor
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        now = statistics(self._reactor)
        tasks, streams, threads = now.tasks, now.streams, now.threads
        yield gauge(
            "twisted_tasks",
            "Tasks that have not ended.",
            running=tasks.running,
            ready=tasks.ready,
            waiting=tasks.waiting,
        )
        yield counter("twisted_tasks_spawned", "Tasks.", tasks.spawned)
        yield counter(
            "twisted_tasks_ended",
            "Tasks that have ended.",
            succeeded=tasks.succeeded,
            failed=tasks.failed,
            cancelled=tasks.cancelled,
            collected=tasks.collected,
        )
        yield gauge("twisted_connections", "Open connections.", streams.open)
        yield counter("twisted_connections_made", "Connections.", streams.made)
        yield gauge(
            "twisted_pending_bytes",
            "Bytes that wait in this process.",
            unread=streams.unread,
            unsent=streams.unsent,
        )
        connections: Counter[str] = Counter()
        limits: Counter[tuple[str, ...]] = Counter()
        for server in now.servers:
            connections[server.name] += server.connections
            for limit, count in server.limits.items():
                limits[server.name, limit] += count
        yield labelled(
            GaugeMetricFamily(
                "twisted_server_connections",
                "Connections of a server.",
                labels=["server"],
            ),
            {(name,): count for name, count in connections.items()},
        )
        yield labelled(
            CounterMetricFamily(
                "twisted_server_limits",
                "Connections that a limit of a server has refused or aborted.",
                labels=["server", "limit"],
            ),
            limits,
        )
        yield gauge(
            "twisted_channels",
            "Values in channels, and operations that wait for one.",
            buffered=now.channels.buffered,
            senders=now.channels.senders,
            receivers=now.channels.receivers,
        )
        yield gauge(
            "twisted_threads",
            "Threads of the pool.",
            busy=threads.busy,
            idle=threads.idle,
        )
        yield gauge("twisted_processes", "Child processes.", now.processes)
        monitor = self._monitor
        yield histogram("twisted_step_seconds", "Steps of tasks.", monitor.steps)
        yield histogram("twisted_pass_seconds", "Passes.", monitor.passes)


def gauge(
    name: str, documentation: str, value: float | None = None, **states: float
) -> Metric:
    """Return a gauge with one value, or with one for each state."""
    return family(GaugeMetricFamily, name, documentation, value, "state", states)


def counter(
    name: str, documentation: str, value: float | None = None, **how: float
) -> Metric:
    """Return a counter with one value, or with one for each kind of end."""
    return family(CounterMetricFamily, name, documentation, value, "how", how)


def family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    documentation: str,
    value: float | None,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    if value is not None:
        return kind(name, documentation, value=value)
    return labelled(
        kind(name, documentation, labels=[label]),
        {(each,): count for each, count in values.items()},
    )


def labelled(
    family: GaugeMetricFamily | CounterMetricFamily,
    values: Mapping[tuple[str, ...], float],
) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def histogram(name: str, documentation: str, of: Histogram) -> Metric:
    buckets: Iterable[tuple[float, int]] = of.cumulative()
    return HistogramMetricFamily(
        name,
        documentation,
        buckets=[(floatToGoString(bound), count) for bound, count in buckets],
        sum_value=of.sum,
    )


class MetricsResource(Resource):
    """
    Answers scrapes in the reactor's thread.  (The resource of prometheus_client answers
    them in another thread.)
    """

    isLeaf = True

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._registry = registry

    def render_GET(self, request: Any) -> bytes:
        request.setHeader(b"Content-Type", CONTENT_TYPE_LATEST.encode())
        return generate_latest(self._registry)


def serve_metrics(reactor: Any, port: int) -> Any:
    """Measure a reactor, and serve the metrics; return the listening port."""
    monitor = LoopMonitor()
    add_instrument(monitor, reactor)
    registry = CollectorRegistry()
    registry.register(ReactorCollector(reactor, monitor))
    site = Site(MetricsResource(registry))
    return reactor.listenTCP(port, site, interface="127.0.0.1")


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def main(reactor: Any, port: str = "7777", metrics_port: str = "9777") -> None:
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    server = await serve(endpoint, echo)
    metrics = serve_metrics(reactor, int(metrics_port))
    ports = server.port.getHost().port, metrics.getHost().port
    print("Echo on port {}, metrics on port {}".format(*ports), flush=True)
    await Deferred()


if __name__ == "__main__":
    twisted_rtsig.install()
    react(main, sys.argv[1:])
