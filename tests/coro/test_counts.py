"""What runs, in numbers: `statistics`, and how long steps and passes take."""

from __future__ import annotations

import gc
import math
import sys
import threading
from collections.abc import Generator
from typing import Any

import pytest
from twisted.internet.task import Clock

from tests.coro.support import call, connected, listen, run, run_for_real, spin
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Channel,
    Event,
    Histogram,
    LoopMonitor,
    Statistics,
    Stream,
    add_instrument,
    current_task,
    in_thread,
    open_process,
    remove_instrument,
    sleep,
    spawn,
    statistics,
    symmetric,
)
from twisted_rtsig.engine.reactor import EngineReactor

# Tasks


def test_a_reactor_without_tasks(clock: Clock) -> None:
    tasks = statistics(clock).tasks
    assert (tasks.active, tasks.spawned) == (0, 0)


async def fail() -> None:
    raise ValueError


def test_tasks_by_state(clock: Clock) -> None:
    event = Event()

    def generator() -> Generator[Any, Any, None]:
        yield event.wait()

    async def main() -> Statistics:
        spawn(event.wait)
        spawn(generator)
        await sleep(0)
        spawn(sleep, 0)
        spawn(sleep, 0)
        return statistics()

    task = spawn(main, reactor=clock)
    clock.advance(0)
    tasks = task.result().tasks
    assert (tasks.running, tasks.ready, tasks.waiting) == (1, 2, 2)
    assert tasks.active == tasks.spawned == 5
    clock.advance(0)
    tasks = statistics(clock).tasks
    assert (tasks.running, tasks.ready, tasks.waiting) == (0, 0, 2)
    assert (tasks.succeeded, tasks.spawned) == (3, 5)
    event.set()
    assert statistics(clock).tasks.active == 0


def test_tasks_by_outcome(clock: Clock) -> None:
    never = Event()
    spawn(never.wait, reactor=clock).cancel()
    failing = spawn(fail, reactor=clock)
    with pytest.raises(ValueError):  # noqa: PT011
        failing.result()
    spawn(sleep, 0, reactor=clock)
    clock.advance(0)
    # Nothing can resume it.
    spawn(Event().wait, reactor=clock)
    gc.collect()
    unstarted = symmetric(lambda value: never.wait(), reactor=clock)
    tasks = statistics(clock).tasks
    assert (tasks.succeeded, tasks.failed, tasks.cancelled) == (1, 1, 1)
    assert (tasks.collected, tasks.waiting, tasks.spawned) == (1, 1, 5)
    # It exists as long as the reactor does, and not only as long as its tasks.
    del unstarted
    gc.collect()
    assert statistics(clock).tasks.spawned == 5
    assert statistics(clock).tasks.collected == 2
    assert statistics(Clock()).tasks.spawned == 0


@pytest.mark.parametrize("ends", ["none", "most", "all"])
def test_many_tasks_by_outcome(clock: Clock, ends: str) -> None:
    """All that were spawned are counted, though few references to them are kept."""
    never, stop = Event(), Event()
    count = 4_000
    for number in range(count):
        waits = ends == "none" or (ends == "most" and number % 10 == 0)
        spawn((never if waits else stop).wait, reactor=clock)
    stop.set()
    # It exists only as long as there are tasks, and the totals as long as the reactor.
    for _ in range(2):
        spawn(sleep, 0, reactor=clock)
        clock.advance(0)
    waiting = {"none": count, "most": count // 10, "all": 0}[ends]
    tasks = statistics(clock).tasks
    assert (tasks.waiting, tasks.spawned) == (waiting, count + 2)
    assert (tasks.succeeded, tasks.collected) == (count + 2 - waiting, 0)
    del never
    gc.collect()
    tasks = statistics(clock).tasks
    assert (tasks.waiting, tasks.collected) == (0, waiting)


# Connections


def test_streams_and_servers(reactor: Any) -> None:
    go_on = Event()

    async def handler(stream: Stream) -> None:
        await go_on.wait()

    async def main() -> None:
        server = await listen(reactor, handler, name="example", max_connections=1)
        stream = await call(reactor, server)
        await stream.write(b"x" * 1000)
        while statistics().streams.unread < 1000:
            await sleep(0)
        refused = await call(reactor, server)
        while not refused.ended:
            await sleep(0)
        found = statistics()
        assert found.streams.unread == 1000
        assert (found.streams.open, found.streams.made) == (2 + (not refused.lost), 3)
        (counts,) = [each for each in found.servers if each.name == "example"]
        assert counts.connections == 1
        assert counts.limits == {"max_connections": 1}
        go_on.set()
        await stream.close()
        await server.stop()

    run(reactor, main)
    spin(reactor, lambda: statistics(reactor).streams.open == 0)
    assert statistics(reactor).streams.unread == 0


@frees_at_once
def test_servers_of_another_reactor(clock: Clock) -> None:
    from twisted_rtsig.coro import CoroutineFactory

    factory = CoroutineFactory(lambda stream: stream.read(), reactor=clock)
    assert len(statistics(clock).servers) == 1
    assert statistics(Clock()).servers == ()
    del factory
    assert statistics(clock).servers == ()


def test_bytes_held_by_transports(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, _peer):
            data = bytes(1 << 24)
            writing = spawn(stream.write, data)
            await sleep(0.01)
            # The kernel has taken some of it.
            assert 0 < statistics().streams.unsent < len(data)
            writing.cancel()

    run(reactor, main)


# Channels, threads and processes


def test_channels() -> None:
    # Those of other tests.
    gc.collect()
    before = statistics(Clock()).channels
    channel: Channel[int] = Channel(2)
    sends = [channel.send(number) for number in range(3)]
    empty: Channel[int] = Channel(1)
    receiving = empty.receive()
    after = statistics(Clock()).channels
    assert after.open - before.open == 2
    assert after.buffered - before.buffered == 2
    assert after.senders - before.senders == 1
    assert after.receivers - before.receivers == 1
    channel.close()
    assert statistics(Clock()).channels.open == before.open + 1
    receiving.cancel()
    del sends, receiving, channel, empty
    gc.collect()
    assert statistics(Clock()).channels == before


def test_threads(reactor: Any) -> None:
    assert statistics(reactor).threads.most == 0
    go_on = threading.Event()

    async def main() -> None:
        waiting = in_thread(go_on.wait)
        threads = statistics().threads
        assert threads.busy == 1
        assert threads.most == reactor.getThreadPool().max
        go_on.set()
        await waiting

    run_for_real(reactor, main)


@pytest.mark.skipif(sys.platform == "win32", reason="the command is for POSIX")
def test_processes(reactor: Any) -> None:
    async def main() -> None:
        async with open_process([sys.executable, "-c", "input()"]) as process:
            assert statistics().processes == 1
            await process.stream.write_eof()
            await process.wait()
            assert statistics().processes == 0

    run_for_real(reactor, main)


# How long it takes


@pytest.mark.parametrize(
    ("nanoseconds", "bound"),
    [
        *((0, 1e-6), (1, 1e-6), (1000, 1e-6), (1001, 2e-6), (2000, 2e-6), (2001, 4e-6)),
        *((10**9, 2**20 * 1e-6), (10**11, math.inf)),
    ],
)
def test_buckets(nanoseconds: int, bound: float) -> None:
    histogram = Histogram()
    histogram.add(nanoseconds)
    assert histogram.quantile(1) == bound
    assert [count for _, count in histogram.cumulative()][-1] == histogram.count == 1
    assert histogram.sum == nanoseconds / 1e9


def test_quantiles() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0
    for milliseconds in range(1, 101):
        histogram.add(milliseconds * 1_000_000)
    assert histogram.quantile(0) == 1e-6
    assert histogram.quantile(0.5) == 65536e-6
    assert histogram.quantile(0.99) == 131072e-6
    with pytest.raises(ValueError, match="between 0 and 1"):
        histogram.quantile(95)


def test_a_sample_takes_no_memory(tracemalloc: Any) -> None:
    histogram = Histogram()
    histogram.add(10**12)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for each in range(10_000):
            histogram.add(each * 1_000_000)
        # But for the numbers in the place of smaller ones.
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()


def test_the_slowest_step(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr("twisted_rtsig.coro.monitor.perf_counter_ns", lambda: now[0])
    monitor = LoopMonitor()
    event = Event()
    assert monitor.take_slowest() is None

    async def work(milliseconds: int) -> None:
        now[0] += milliseconds * 1_000_000
        await event.wait()

    add_instrument(monitor, clock)
    for milliseconds in (1, 30, 2):
        spawn(work, milliseconds, name=f"{milliseconds} ms", reactor=clock)
    slowest = monitor.take_slowest()
    assert slowest is not None
    assert (slowest.task, slowest.seconds) == ("30 ms", 0.03)
    assert slowest.stack[0].endswith(" in work: await event.wait()")
    assert str(slowest).startswith("30 ms: 0.030 s\n    at ")
    assert monitor.take_slowest() is None
    event.set()
    slowest = monitor.take_slowest()
    assert slowest is not None
    # It has ended.
    assert slowest.stack == ()
    assert monitor.steps.count == 6
    assert monitor.steps.sum == pytest.approx(0.033)
    remove_instrument(monitor, clock)


def test_a_monitor_added_during_a_step(clock: Clock) -> None:
    monitor, other = LoopMonitor(), LoopMonitor()
    add_instrument(other, clock)

    async def main() -> None:
        add_instrument(monitor)
        await sleep(0)

    spawn(main, reactor=clock)
    clock.advance(0)
    assert (monitor.steps.count, other.steps.count) == (1, 2)
    remove_instrument(monitor, clock)
    remove_instrument(other, clock)


def test_the_passes_of_a_reactor(reactor: Any) -> None:
    monitor = LoopMonitor()
    add_instrument(monitor, reactor)
    held_up = 0.02

    async def main() -> None:
        await next_pass()
        hold_up(held_up)
        await next_pass()

    async def next_pass() -> None:
        """Until a pass that has begun after this has ended, if passes are known."""
        count = monitor.passes.count + 2
        await sleep(0.001)
        while isinstance(reactor, EngineReactor) and monitor.passes.count < count:
            await sleep(0.001)

    run_for_real(reactor, main)
    remove_instrument(monitor, reactor)
    slowest = monitor.take_slowest()
    assert slowest is not None
    assert slowest.seconds >= held_up
    assert monitor.steps.sum >= held_up
    if isinstance(reactor, EngineReactor):
        # A delayed call, which is a part of the pass.
        assert monitor.passes.sum >= held_up
        assert monitor.passes.quantile(1) >= held_up
    else:
        assert monitor.passes.count == 0


def hold_up(seconds: float) -> None:
    assert current_task()
    threading.Event().wait(seconds)
