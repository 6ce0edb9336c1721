"""
Measure the cost of tasks: to pass a value, to wait, and to transfer control.

    python benchmarks/tasks.py [--work NAME,...] [--rounds N] [--count N]

ping-pong  two coroutines and two queues for one value: a round trip
parked     100,000 tasks that wait for an event: the memory and the CPU time of each
group      as parked, for 100,000 tasks of a task group
million    a million parked tasks of this package: the resident set
transfer   two symmetric coroutines: a transfer, compared with a bare ``send``

Each contender runs in a process of its own.  The contenders take turns, round after
round, on the same core.  The time is the CPU time of the measured part of the process,
user and system, including garbage collection.  A ping-pong and a transfer are warmed up
first, and then run in ten parts; the time is ten times that of the fastest part.  The
memory is the growth of the resident set in the measured part.

For CPU time, the least of all rounds is reported and compared, since other load on the
machine can only add to it; for memory, the median.  The quartiles are those of the
ratios within each round.  The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import gc
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from console import environment
from report import figure, markdown
from rounds import (
    Contender,
    measure_in_rounds,
    parser_with_rounds,
    run_alone,
    table_of_bars,
    with_quartiles,
)

WARM_UP = 10_000
"""The most repetitions before the measurement."""

PARTS = 10
"""The number of parts of a measurement in parts."""

MB = 1_000_000


# In a process of its own


class Meter:
    """Measures a process from ``begin`` to ``end``; ``end`` also ends the process."""

    def __init__(self) -> None:
        self._parts: list[float] = []

    def begin(self) -> None:
        self._before = resident()
        self._start = time.process_time()

    def end(self) -> NoReturn:
        parts = self._parts or [time.process_time() - self._start]
        seconds = min(parts) * len(parts)
        print(json.dumps([seconds, self._before, resident()]), flush=True)
        # Exit at once: the parked tasks do not have to be ended.
        os._exit(0)

    def parts(self, count: int) -> Iterator[int]:
        """
        The number of repetitions of each loop: first to warm up, then of each part.
        The fastest part counts.
        """
        part = max(2, count // PARTS)
        yield min(part, WARM_UP)
        self.begin()
        for _ in range(PARTS):
            start = time.process_time()
            yield part
            self._parts.append(time.process_time() - start)
        self.end()


def resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def in_reactor(start: Callable[[], Any]) -> None:
    """Run a function that returns a Deferred, in the rtsig-epoll reactor."""
    from twisted_rtsig import epollreactor

    epollreactor.install()
    from twisted.internet import reactor

    def fail(failure: Any) -> None:
        failure.printTraceback(sys.stderr)
        os._exit(1)

    running: Any = reactor
    running.callWhenRunning(lambda: start().addErrback(fail))
    running.run()


def in_task(function: Callable[[], Any]) -> None:
    """Run a function as a task of this package, in the rtsig-epoll reactor."""
    from twisted_rtsig.coro import spawn

    in_reactor(lambda: spawn(function).as_deferred())


def in_stackful_task(function: Callable[[], Any]) -> None:
    """As ``in_task``, for a plain function that waits."""
    from twisted_rtsig.coro.stackful import spawn_stackful

    in_reactor(lambda: spawn_stackful(function).as_deferred())


# Ping-pong


def channels(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import Channel, spawn

    there: Channel[int] = Channel(1)
    back: Channel[int] = Channel(1)

    async def pong() -> None:
        while True:
            await back.send(await there.receive())

    async def ping() -> None:
        spawn(pong)
        for rounds in meter.parts(count):
            for each in range(rounds):
                await there.send(each)
                await back.receive()

    in_task(ping)


def stackful_channels(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import Channel
    from twisted_rtsig.coro.stackful import spawn_stackful, wait

    there: Channel[int] = Channel(1)
    back: Channel[int] = Channel(1)

    def pong() -> None:
        while True:
            wait(back.send(wait(there.receive())))

    def ping() -> None:
        spawn_stackful(pong)
        for rounds in meter.parts(count):
            for each in range(rounds):
                wait(there.send(each))
                wait(back.receive())

    in_stackful_task(ping)


def deferred_queues(count: int, meter: Meter) -> None:
    from twisted.internet.defer import Deferred, DeferredQueue

    there: DeferredQueue[int] = DeferredQueue(1)
    back: DeferredQueue[int] = DeferredQueue(1)

    async def pong() -> None:
        while True:
            back.put(await there.get())

    async def ping() -> None:
        Deferred.fromCoroutine(pong())
        for rounds in meter.parts(count):
            for each in range(rounds):
                there.put(each)
                await back.get()

    in_reactor(lambda: Deferred.fromCoroutine(ping()))


def asyncio_queues(
    count: int, meter: Meter, loop: asyncio.AbstractEventLoop | None = None
) -> None:
    async def ping() -> None:
        there: asyncio.Queue[int] = asyncio.Queue(1)
        back: asyncio.Queue[int] = asyncio.Queue(1)

        async def pong() -> None:
            while True:
                await back.put(await there.get())

        kept = asyncio.create_task(pong())
        for rounds in meter.parts(count):
            for each in range(rounds):
                await there.put(each)
                await back.get()
        await kept

    (loop or asyncio.new_event_loop()).run_until_complete(ping())


def uvloop_queues(count: int, meter: Meter) -> None:
    import uvloop

    asyncio_queues(count, meter, uvloop.new_event_loop())


def trio_channels(count: int, meter: Meter) -> None:
    import trio

    async def ping() -> None:
        there, from_ping = trio.open_memory_channel(1)
        back, from_pong = trio.open_memory_channel(1)

        async def pong() -> None:
            while True:
                await back.send(await from_ping.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pong)
            for rounds in meter.parts(count):
                for each in range(rounds):
                    await there.send(each)
                    await from_pong.receive()

    trio.run(ping)


def gevent_queues(count: int, meter: Meter) -> None:
    import gevent
    from gevent.queue import Queue

    there = Queue(1)
    back = Queue(1)

    def pong() -> None:
        while True:
            back.put(there.get())

    def ping() -> None:
        for rounds in meter.parts(count):
            for each in range(rounds):
                there.put(each)
                back.get()

    gevent.joinall([gevent.spawn(pong), gevent.spawn(ping)], raise_error=True)


# Parked tasks.  The task that spawns them goes on when all of them wait.


def parked_tasks(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import Event, sleep, spawn

    async def main() -> None:
        event = Event()

        async def park() -> None:
            await event.wait()

        meter.begin()
        kept = [spawn(park) for _ in range(count)]
        await sleep(0)
        assert repr(event).endswith(f" {len(kept)} wait>")
        meter.end()

    in_task(main)


def parked_stackful_tasks(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import Event, sleep
    from twisted_rtsig.coro.stackful import spawn_stackful, wait

    def main() -> None:
        event = Event()

        def park() -> None:
            wait(event.wait())

        meter.begin()
        kept = [spawn_stackful(park) for _ in range(count)]
        wait(sleep(0))
        assert repr(event).endswith(f" {len(kept)} wait>")
        meter.end()

    in_stackful_task(main)


def parked_deferreds(count: int, meter: Meter) -> None:
    from twisted.internet.defer import Deferred

    # The code that wakes the waiters later needs their Deferreds.
    waiting: list[Deferred[None]] = []

    async def park() -> None:
        deferred: Deferred[None] = Deferred()
        waiting.append(deferred)
        await deferred

    meter.begin()
    kept = [Deferred.fromCoroutine(park()) for _ in range(count)]
    assert len(waiting) == len(kept)
    meter.end()


def parked_in_asyncio(
    count: int, meter: Meter, loop: asyncio.AbstractEventLoop | None = None
) -> None:
    async def main() -> None:
        event = asyncio.Event()

        async def park() -> None:
            await event.wait()

        meter.begin()
        kept = [asyncio.create_task(park()) for _ in range(count)]
        await asyncio.sleep(0)
        assert repr(event).endswith(f"waiters:{len(kept)}]>")
        meter.end()

    (loop or asyncio.new_event_loop()).run_until_complete(main())


def parked_in_uvloop(count: int, meter: Meter) -> None:
    import uvloop

    parked_in_asyncio(count, meter, uvloop.new_event_loop())


def parked_in_trio(count: int, meter: Meter) -> None:
    import trio

    async def main() -> None:
        event = trio.Event()
        async with trio.open_nursery() as nursery:
            meter.begin()
            for _ in range(count):
                nursery.start_soon(event.wait)
            # trio runs the tasks that are ready in random order.
            while event.statistics().tasks_waiting < count:
                await trio.sleep(0)
            meter.end()

    trio.run(main)


def parked_in_gevent(count: int, meter: Meter) -> None:
    import gevent
    from gevent.event import Event

    event = Event()

    def park() -> None:
        event.wait()

    def main() -> None:
        meter.begin()
        kept = [gevent.spawn(park) for _ in range(count)]
        gevent.sleep(0)
        assert event.linkcount() == len(kept)
        meter.end()

    gevent.spawn(main).get()


# Tasks of a group, in the same way


def parked_in_group(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import Event, TaskGroup, sleep

    async def main() -> None:
        event = Event()

        async def park() -> None:
            await event.wait()

        async with TaskGroup() as group:
            meter.begin()
            for _ in range(count):
                group.spawn(park)
            await sleep(0)
            assert repr(event).endswith(f" {count} wait>")
            meter.end()

    in_task(main)


def parked_in_asyncio_group(
    count: int, meter: Meter, loop: asyncio.AbstractEventLoop | None = None
) -> None:
    async def main() -> None:
        event = asyncio.Event()

        async def park() -> None:
            await event.wait()

        async with asyncio.TaskGroup() as group:
            meter.begin()
            for _ in range(count):
                group.create_task(park())
            await asyncio.sleep(0)
            assert repr(event).endswith(f"waiters:{count}]>")
            meter.end()

    (loop or asyncio.new_event_loop()).run_until_complete(main())


def parked_in_uvloop_group(count: int, meter: Meter) -> None:
    import uvloop

    parked_in_asyncio_group(count, meter, uvloop.new_event_loop())


# Symmetric transfer


def transfers(first: Any, second: Any) -> None:
    """Transfer from a task to the first coroutine; both get the pair."""
    from twisted_rtsig.coro import symmetric, transfer

    async def main() -> None:
        pair: list[Any] = []
        pair += symmetric(first, pair), symmetric(second, pair)
        await transfer(pair[0])

    in_task(main)


def generator_transfers(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import transfer

    def first(pair: list[Any], value: Any) -> Generator[Any, Any, None]:
        other = pair[1]
        for transfers in meter.parts(count):
            # There and back.
            for _ in range(transfers // 2):
                value = yield transfer(other, value)

    def second(pair: list[Any], value: Any) -> Generator[Any, Any, None]:
        other = pair[0]
        while True:
            value = yield transfer(other, value)

    transfers(first, second)


def coroutine_transfers(count: int, meter: Meter) -> None:
    from twisted_rtsig.coro import transfer

    async def first(pair: list[Any], value: Any) -> None:
        other = pair[1]
        for transfers in meter.parts(count):
            for _ in range(transfers // 2):
                value = await transfer(other, value)

    async def second(pair: list[Any], value: Any) -> None:
        other = pair[0]
        while True:
            value = await transfer(other, value)

    transfers(first, second)


@dataclass(slots=True)
class Switched:
    """A coroutine that can be switched to; or the next switch."""

    target: Any = None
    value: Any = None
    send: Any = None
    run: Any = None


SWITCH = Switched()


def switch(target: Switched, value: Any) -> Switched:
    SWITCH.target = target
    SWITCH.value = value
    return SWITCH


def bare_switches(count: int, meter: Meter) -> None:
    """
    The least that a transfer needs: the call, the yield, and the resumption of the
    other generator in its own context.  Nothing is checked, nothing records which
    generator runs, and none can be cancelled.
    """
    first, second = Switched(), Switched()

    def run_first(other: Switched) -> Generator[Any, Any, None]:
        value = None
        for switches in meter.parts(count):
            for _ in range(switches // 2):
                value = yield switch(other, value)

    def run_second(other: Switched) -> Generator[Any, Any, None]:
        value = None
        while True:
            value = yield switch(other, value)

    first.send, second.send = run_first(second).send, run_second(first).send
    for each in first, second:
        each.run = contextvars.copy_context().run
    switch(first, None)
    while True:
        target = SWITCH.target
        target.run(target.send, SWITCH.value)


def drive(send: Callable[[Any], Any], count: int, meter: Meter) -> None:
    value = send(None)
    for sends in meter.parts(count):
        for _ in range(sends):
            value = send(value)


def generator_sends(count: int, meter: Meter) -> None:
    def echo() -> Generator[Any, Any, None]:
        value = None
        while True:
            value = yield value

    drive(echo().send, count, meter)


def coroutine_sends(count: int, meter: Meter) -> None:
    @types.coroutine
    def wait(value: Any) -> Generator[Any, Any, Any]:
        return (yield value)

    async def echo() -> None:
        value = None
        while True:
            value = await wait(value)

    drive(echo().send, count, meter)


def greenlet_switches(count: int, meter: Meter) -> None:
    from greenlet import greenlet

    def run_first(value: Any) -> None:
        other = second
        for switches in meter.parts(count):
            for _ in range(switches // 2):
                value = other.switch(value)

    def run_second(value: Any) -> None:
        other = first
        while True:
            value = other.switch(value)

    first = greenlet(run_first)
    second = greenlet(run_second)
    first.switch(None)


# What is measured


@dataclass(frozen=True)
class Sample:
    """The measurement of one contender at one work in one round."""

    count: int
    seconds: float
    before: int
    """The resident set, in bytes."""
    after: int

    def cpu(self) -> float:
        """The CPU time of each unit of the work, in microseconds."""
        return self.seconds / self.count * 1e6

    def memory_of_each(self) -> float:
        return (self.after - self.before) / self.count

    def memory_of_all(self) -> float:
        return self.after

    def growth(self) -> float:
        return self.after - self.before


Measure = Callable[[Sample], float]

MEASURES: dict[Measure, str] = {
    Sample.cpu: "CPU",
    Sample.memory_of_each: "memory of each",
    Sample.memory_of_all: "resident set",
    Sample.growth: "growth of the resident set",
}


@dataclass(frozen=True)
class Work:
    """
    :ivar yardstick: the contender that all others are compared with; empty for none.
    :ivar memory: the measure of memory that is reported, if any.
    """

    what: str
    unit: str
    count: int
    contenders: dict[str, Contender]
    yardstick: str = ""
    memory: Measure | None = None


CHANNEL = "Channel(1)"
STACKFUL_CHANNEL = "Channel(1), stackful"
GEVENT_QUEUE = "gevent's Queue(1)"
DEFERRED_QUEUE = "Twisted's DeferredQueue(1)"
UVLOOP_QUEUE = "asyncio.Queue(1) on uvloop"
TASK = "task"
STACKFUL_TASK = "stackful task"
GEVENT_TASK = "gevent's greenlet"
GROUP = "TaskGroup"
ASYNCIO_GROUP = "asyncio's TaskGroup"
ASYNCIO_TASK = "asyncio's task"
TRANSFER = "transfer, generators"
COROUTINE_TRANSFER = "transfer, async def"
SEND = "send to a generator"

WORKS = {
    "ping-pong": Work(
        "two coroutines and two queues for one value",
        "round trip",
        50_000,
        {
            CHANNEL: Contender(channels),
            DEFERRED_QUEUE: Contender(deferred_queues),
            "asyncio.Queue(1)": Contender(asyncio_queues),
            UVLOOP_QUEUE: Contender(uvloop_queues, "uvloop"),
            "trio's memory channels": Contender(trio_channels, "trio"),
            STACKFUL_CHANNEL: Contender(stackful_channels, "greenlet"),
            GEVENT_QUEUE: Contender(gevent_queues, "gevent"),
        },
        DEFERRED_QUEUE,
    ),
    "parked": Work(
        "tasks that wait for an event",
        "task",
        100_000,
        {
            TASK: Contender(parked_tasks),
            "Deferred.fromCoroutine": Contender(parked_deferreds),
            ASYNCIO_TASK: Contender(parked_in_asyncio),
            "asyncio's task on uvloop": Contender(parked_in_uvloop, "uvloop"),
            "trio's task": Contender(parked_in_trio, "trio"),
            STACKFUL_TASK: Contender(parked_stackful_tasks, "greenlet"),
            GEVENT_TASK: Contender(parked_in_gevent, "gevent"),
        },
        ASYNCIO_TASK,
        Sample.memory_of_each,
    ),
    "group": Work(
        "tasks of a task group that wait for an event",
        "task",
        100_000,
        {
            GROUP: Contender(parked_in_group),
            ASYNCIO_GROUP: Contender(parked_in_asyncio_group),
            "asyncio's TaskGroup on uvloop": Contender(
                parked_in_uvloop_group, "uvloop"
            ),
            "trio's nursery": Contender(parked_in_trio, "trio"),
        },
        ASYNCIO_GROUP,
        Sample.memory_of_each,
    ),
    "million": Work(
        "tasks that wait for an event, in all",
        "task",
        1_000_000,
        {TASK: Contender(parked_tasks)},
        memory=Sample.memory_of_all,
    ),
    "transfer": Work(
        "two coroutines that hand over to each other",
        "transfer",
        1_000_000,
        {
            TRANSFER: Contender(generator_transfers),
            COROUTINE_TRANSFER: Contender(coroutine_transfers),
            "generators, without any check": Contender(bare_switches),
            SEND: Contender(generator_sends),
            "send to a coroutine": Contender(coroutine_sends),
            "greenlet.switch": Contender(greenlet_switches, "greenlet"),
        },
        SEND,
        Sample.growth,
    ),
}

if sys.version_info < (3, 11):
    # asyncio has no groups.
    del WORKS["group"]


@dataclass(frozen=True)
class Bar:
    """The most that a contender may use: in bytes, or relative to another contender."""

    work: str
    contender: str
    measure: Measure
    most: float
    against: str = ""


BARS = [
    Bar("ping-pong", CHANNEL, Sample.cpu, 0.5, DEFERRED_QUEUE),
    Bar("ping-pong", CHANNEL, Sample.cpu, 0.25, UVLOOP_QUEUE),
    Bar("ping-pong", STACKFUL_CHANNEL, Sample.cpu, 1, GEVENT_QUEUE),
    Bar("parked", TASK, Sample.memory_of_each, 0.7, ASYNCIO_TASK),
    Bar("parked", TASK, Sample.cpu, 0.5, ASYNCIO_TASK),
    Bar("parked", STACKFUL_TASK, Sample.memory_of_each, 1, GEVENT_TASK),
    Bar("group", GROUP, Sample.memory_of_each, 0.6, ASYNCIO_GROUP),
    Bar("group", GROUP, Sample.cpu, 0.6, ASYNCIO_GROUP),
    Bar("million", TASK, Sample.memory_of_all, 1000 * MB),
    Bar("transfer", TRANSFER, Sample.cpu, 3, SEND),
    Bar("transfer", TRANSFER, Sample.growth, 1 * MB),
    Bar("transfer", COROUTINE_TRANSFER, Sample.growth, 1 * MB),
]


# The report

Measured = dict[str, list[Sample]]
"""For one work, the samples of all rounds by contender."""


def sum_up(measure: Measure, samples: list[Sample]) -> float:
    """The result of all rounds: the least CPU time; of other measures the median."""
    values = [measure(each) for each in samples]
    return min(values) if measure is Sample.cpu else statistics.median(values)


def ratio(measured: Measured, measure: Measure, name: str, against: str) -> str:
    """The ratio of two results, with the quartiles of the ratios within each round."""
    value = times(measured, measure, name, against)
    pairs = zip(measured[name], measured[against], strict=True)
    ratios = (measure(mine) / measure(other) for mine, other in pairs)
    return with_quartiles(value, ratios, ".2f")


def times(measured: Measured, measure: Measure, name: str, against: str) -> float:
    mine, other = (sum_up(measure, measured[each]) for each in (name, against))
    return mine / other


def in_words(measure: Measure, value: float) -> str:
    if measure is not Sample.cpu:
        return f"{value:,.0f} B" if value < MB else f"{value / MB:,.1f} MB"
    return f"{value * 1000:.0f} ns" if value < 1 else f"{figure(value)} µs"


def table(work: Work, measured: Measured) -> str:
    """A table of all contenders at a work, in Markdown."""
    columns: list[tuple[Measure, str]] = [(Sample.cpu, f"CPU per {work.unit}")]
    if work.memory is not None:
        columns.append((work.memory, MEASURES[work.memory]))
    head = ["contender", "CPU in all"]
    for measure, title in columns:
        head.append(title)
        if compared(work, measure):
            head.append(f"of {work.yardstick} (quartiles)")
    rows = []
    for name, samples in measured.items():
        row = [name, f"{sum_up(Sample.cpu, samples) * samples[0].count / 1e6:.2f} s"]
        for measure, _ in columns:
            row.append(in_words(measure, sum_up(measure, samples)))
            if compared(work, measure):
                row.append(ratio(measured, measure, name, work.yardstick))
        rows.append(row)
    return markdown(head, rows)


def compared(work: Work, measure: Measure) -> bool:
    # Growth and totals may be 0, so they have no ratio.
    each = (Sample.cpu, Sample.memory_of_each)
    return bool(work.yardstick) and measure in each


def judge(results: dict[str, Measured]) -> tuple[str, bool]:
    """Return a table of the bars that were measured, and whether all are met."""
    rows = []
    for bar in BARS:
        measured = results.get(bar.work, {})
        if not measured or (bar.against and bar.against not in measured):
            continue
        if bar.against:
            value = times(measured, bar.measure, bar.contender, bar.against)
            said = ratio(measured, bar.measure, bar.contender, bar.against)
            most = f"{bar.most:.2f}"
        else:
            value = sum_up(bar.measure, measured[bar.contender])
            said = in_words(bar.measure, value)
            most = in_words(bar.measure, bar.most)
        row = [bar.work, bar.contender, MEASURES[bar.measure], bar.against or "-"]
        rows.append(([*row, said, most], value <= bar.most))
    return table_of_bars(rows)


# Measuring


def measure_all(name: str, rounds: int, count: int) -> Measured:
    def measure(contender: str) -> Sample:
        return Sample(count, *run_alone(__file__, name, contender, f"--count={count}"))

    return measure_in_rounds(
        *(name, WORKS[name].contenders, rounds, measure),
        *("CPU", lambda sample: in_words(Sample.cpu, sample.cpu())),
    )


def parse() -> argparse.Namespace:
    parser = parser_with_rounds(__doc__, WORKS)
    parser.add_argument(
        "--count", type=int, metavar="N", help="of each work, instead of its own"
    )
    options = parser.parse_args()
    if options.count is not None and options.count < 2:
        parser.error(f"--count {options.count}: give at least 2")
    return options


def main() -> int:
    options = parse()
    if options.only:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        WORKS[options.work[0]].contenders[options.only].run(options.count, Meter())
        return 1
    print(f"{environment('Twisted', 'uvloop', 'trio', 'gevent', 'greenlet')}.")
    print(f"Rounds: {options.rounds}.", flush=True)
    results: dict[str, Measured] = {}
    for name in options.work:
        work = WORKS[name]
        count = options.count or work.count
        results[name] = measure_all(name, options.rounds, count)
        print(f"\n## {name}: {work.what}\n\n{count:,} {work.unit}s.\n")
        print(table(work, results[name]), flush=True)
    bars, met = judge(results)
    print(f"\n## Bars\n\n{bars}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
