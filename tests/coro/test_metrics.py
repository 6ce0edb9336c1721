"""The example that Prometheus scrapes: over HTTP, as Prometheus does."""

from __future__ import annotations

import time
from typing import Any
from urllib.request import urlopen

import pytest

from tests.coro.support import call, failures, listen, run
from tests.coro.test_examples import example, meanwhile
from tests.coro.test_examples import reactor as reactor
from tests.support import DEADLINE
from twisted_rtsig.coro import Channel, Event, Stream, sleep, spawn
from twisted_rtsig.engine.reactor import EngineReactor

pytest.importorskip(
    "prometheus_client",
    reason="there is no prometheus_client: pip install -e '.[test]'",
)
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]


def scrape(port: int) -> Samples:
    """The samples, each by its name and its labels."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for each in family.samples:
            key = each.name, *sorted(each.labels.values())
            assert key not in samples, "Prometheus would refuse it"
            samples[key] = each.value
    return samples


def test_scraping(reactor: Any, logged: list[Any]) -> None:
    metrics = example("metrics")
    port = metrics.serve_metrics(reactor, 0)
    stop = Event()
    channel: Channel[int] = Channel(3)

    async def fail() -> None:
        raise ValueError

    async def main() -> Any:
        # Two servers of one name, which Prometheus must not see twice.
        servers = [
            await listen(reactor, metrics.echo, max_connections=most) for most in (1, 9)
        ]
        stream: Stream = await call(reactor, servers[0])
        refused = await call(reactor, servers[0])
        while not refused.lost:
            await sleep(0)
            # To see that it is lost.
            if refused.ended:
                refused.abort()
        other = await call(reactor, servers[1])
        await channel.send(1)
        await stream.write(b"x" * 100)
        await stream.peek(100)
        spawn(stop.wait)
        with pytest.raises(ValueError):  # noqa: PT011
            await spawn(fail)
        time.sleep(0.02)
        await sleep(0)
        return servers, stream, other

    kept = run(reactor, main)
    before = scrape_in_thread(reactor, port)
    assert before["twisted_tasks", "running"] == 0
    # The one that waits, two handlers, and the one that waits for this thread.
    assert before["twisted_tasks", "waiting"] == 4
    assert before["twisted_tasks_ended_total", "failed"] == 1
    assert before["twisted_connections",] == 4
    assert before["twisted_connections_made_total",] == 5
    assert before["twisted_pending_bytes", "unread"] == 100
    assert before["twisted_server_connections", "echo"] == 2
    assert before["twisted_server_limits_total", "echo", "max_connections"] == 1
    assert before["twisted_channels", "buffered"] >= 1
    assert before["twisted_threads", "busy"] == 1
    # What held up the reactor is in the bucket of its time.
    assert (
        before["twisted_step_seconds_bucket", "0.016384"]
        < before["twisted_step_seconds_bucket", "+Inf"]
    )
    assert before["twisted_step_seconds_sum",] >= 0.02
    if isinstance(reactor, EngineReactor):
        assert before["twisted_pass_seconds_count",] > 0
        assert before["twisted_pass_seconds_sum",] >= 0.02
    stop.set()
    after = scrape_in_thread(reactor, port)
    assert after["twisted_tasks", "waiting"] == 3
    assert (
        after["twisted_tasks_ended_total", "succeeded"]
        > before["twisted_tasks_ended_total", "succeeded"]
    )
    assert failures(logged) == []
    servers, stream, other = kept

    async def end() -> None:
        await stream.close()
        await other.close()
        for each in servers:
            await each.stop()

    run(reactor, end)
    assert scrape_in_thread(reactor, port)["twisted_connections",] == 0


def scrape_in_thread(reactor: Any, port: Any) -> Samples:
    samples: Samples = meanwhile(reactor, scrape, port.getHost().port)
    return samples
