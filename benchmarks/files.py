"""
Measure the cost of files: of cached reads, of sending and of serving, and how long they
hold up the reactor.

    python benchmarks/files.py [--work NAME,...] [--rounds N] [--size BYTES]

cached     reads of 4 KiB from the page cache, one after the other
send       a file of 100 MB over TCP, from the page cache
small      requests for a file of 1 KiB over HTTP, on 8 connections
large      requests for a file of 1 MB over HTTP, on 8 connections
late       a timer of 1 ms, while a file of 2 GB that is not cached is read or sent

The work "late" reports for which part of the time the reactor's thread has held up
other work, in passes longer than 1 ms.  Other load on the machine delays a timer as
well; the contender that does nothing else shows by how much.

Each contender is measured in a process of its own, and all of them in turns, round
after round.  In the first four works this process has one core, and the client another.
The CPU time is that of the whole process, user and system, including threads.  For
times, the least of all rounds is reported and compared, since other load on the machine
can only add to it.  For delays, it is the median of all rounds.  The quartiles are
those of the ratios within each round.  The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import os
import resource
import selectors
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

MB = 1_000_000
READ = 4096
CONNECTIONS = 8
SENDS = 4
"""How often a file is sent in one process, so that a cost at the start counts less."""

TICK = 0.001

Numbers = dict[str, float]
"""Figures, by name."""


# In a process of its own


class Meter:
    """Measures this process, from when the meter is made."""

    def __init__(self) -> None:
        self._cpu = time.process_time()
        self._start = time.perf_counter()

    def read(self, count: float = 1) -> Numbers:
        """Return the time and the CPU time so far, in seconds, divided by ``count``."""
        seconds = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        return {"seconds": seconds / count, "cpu": cpu / count}


Talk = Callable[[int, int], float]
"""A client: given the port and the number of requests, returns its count."""


class Client:
    """A process on another core, which talks to a server once it knows the port."""

    def __init__(self, talk: Talk, count: int) -> None:
        waits, self._told = os.pipe()
        self._result, tells = os.pipe()
        if os.fork() == 0:
            try:
                os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
                result = talk(int(os.read(waits, 10)), count)
                os.write(tells, repr(result).encode())
            finally:
                os._exit(0)

    def talk_to(self, port: int) -> float:
        """Talk to the server on a port, and block until the client is done."""
        os.write(self._told, b"%d" % port)
        return float(os.read(self._result, 100))


def fetch(port: int, count: int) -> float:
    """
    Receive one whole response, and return its size.

    The client never sleeps.  Waking it up for some of the packets would cost the server
    more than sending the file, and a random number of times.
    """
    memory = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /file HTTP/1.0\r\n\r\n")
        connection.setblocking(False)
        size = 0
        while True:
            try:
                received = connection.recv_into(memory)
            except BlockingIOError:
                continue
            if not received:
                return size
            size += received


def fetch_again(port: int, count: int) -> float:
    """Receive several responses, one after the other; return their size."""
    return sum(fetch(port, 1) for _ in range(count))


def request(port: int, count: int) -> float:
    """Make requests on several connections at a time; return how many were answered."""
    ask = b"GET /file HTTP/1.1\r\nHost: here\r\n\r\n"
    memory = memoryview(bytearray(1 << 18))
    selector = selectors.DefaultSelector()
    for _ in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        # How many bytes of the body are still to come; None before the head.
        selector.register(connection, selectors.EVENT_READ, [None])
        connection.sendall(ask)
    answers = 0
    while answers < count:
        for key, _ in selector.select():
            client: Any = key.fileobj
            size = client.recv_into(memory)
            left: Any = key.data[0]
            if left is None:
                head, _, body = bytes(memory[:size]).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 "), head
                length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
                left = int(length) - len(body)
            else:
                left -= size
            if left:
                key.data[0] = left
            else:
                answers += 1
                key.data[0] = None
                client.sendall(ask)
    return answers


def in_reactor(name: str, function: Callable[[], Any]) -> None:
    """Run a function as a task in a reactor, named by its module; print its result."""
    importlib.import_module(name).install()
    from twisted.internet import reactor

    from twisted_rtsig.coro import spawn

    def fail(failure: Any) -> None:
        failure.printTraceback(sys.stderr)
        os._exit(1)

    running: Any = reactor

    def start() -> None:
        task = spawn(function).as_deferred()
        task.addCallback(lambda numbers: print(json.dumps(numbers)))
        task.addErrback(fail).addCallback(lambda _: running.stop())

    running.callWhenRunning(start)
    running.run()


OURS = "twisted_rtsig.epollreactor"
TWISTEDS = "twisted.internet.epollreactor"


# Reads


def offsets(count: int, path: Path) -> Iterator[int]:
    pages = path.stat().st_size // READ
    return (each % pages * READ for each in range(count))


def cached_file(path: Path, count: int) -> None:
    from twisted_rtsig.files import open_file

    async def main() -> Numbers:
        async with await open_file(path) as file:
            meter = Meter()
            for offset in offsets(count, path):
                await file.read_at(offset, READ)
            return meter.read(count)

    in_reactor(OURS, main)


def cached_in_threads(path: Path, count: int) -> None:
    from twisted.internet.threads import deferToThread

    async def main() -> Numbers:
        number = os.open(path, os.O_RDONLY)
        meter = Meter()
        for offset in offsets(count, path):
            await deferToThread(os.pread, number, READ, offset)
        return meter.read(count)

    in_reactor(TWISTEDS, main)


def cached_in_aiofiles(path: Path, count: int) -> None:
    import aiofiles

    async def main() -> Numbers:
        async with aiofiles.open(path, "rb", buffering=0) as file:
            meter = Meter()
            for _ in range(count):
                if len(await file.read(READ)) < READ:
                    await file.seek(0)
            return meter.read(count)

    print(json.dumps(asyncio.run(main())))


def cached_blocking(path: Path, count: int) -> None:
    number = os.open(path, os.O_RDONLY)
    meter = Meter()
    for offset in offsets(count, path):
        os.pread(number, READ, offset)
    print(json.dumps(meter.read(count)))


# Servers


def streams(path: Path) -> Any:
    """Return a factory whose handlers send a file to each client."""
    from twisted_rtsig.coro import CoroutineFactory, Stream
    from twisted_rtsig.files import open_file

    async def handler(stream: Stream) -> None:
        await stream.read_until(b"\r\n\r\n")
        async with await open_file(path) as file:
            size = await file.size()
            stream.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            await stream.send_file(file)

    return CoroutineFactory(handler)


def our_site(path: Path) -> Any:
    from twisted.web.server import Site

    from twisted_rtsig.files.web import StaticResource

    return Site(StaticResource(str(path.parent)))


def twisteds_site(path: Path) -> Any:
    from twisted.web.server import Site
    from twisted.web.static import File

    return Site(File(str(path.parent)))


Serve = Callable[[Path], Any]


def serving(
    reactor_name: str, factory: Serve, talk: Talk
) -> Callable[[Path, int], None]:
    """Return a function that measures a server while a client talks to it."""

    def run(path: Path, count: int) -> None:
        client = Client(talk, count)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        async def main() -> Numbers:
            from twisted.internet import reactor
            from twisted.internet.threads import deferToThread

            running: Any = reactor
            port = running.listenTCP(0, factory(path), interface="127.0.0.1")
            meter = Meter()
            done = await deferToThread(client.talk_to, port.getHost().port)
            await port.stopListening()
            return meter.read(done if talk is request else count)

        in_reactor(reactor_name, main)

    return run


def sending_bare(path: Path, count: int) -> None:
    """Measure sendfile(2) alone, without a reactor."""
    client = Client(fetch_again, count)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with socket.create_server(("127.0.0.1", 0)) as listening, path.open("rb") as file:
        meter = Meter()
        talking = threading.Thread(
            target=client.talk_to, args=(listening.getsockname()[1],)
        )
        talking.start()
        for _ in range(count):
            connection, _ = listening.accept()
            with connection:
                connection.recv(READ)
                connection.sendfile(file)
        talking.join()
        print(json.dumps(meter.read(count)))


# Delays


class Moment:
    """A point of time, by the clocks of the reactor's thread."""

    def __init__(self, scheduled: int) -> None:
        self.clock = time.perf_counter()
        self.cpu = time.thread_time()
        # How long the thread was runnable without having a core.
        self.waited = int(os.pread(scheduled, 100, 0).split()[1]) / 1e9
        self.blocked = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    def since(self, earlier: Moment) -> float:
        """
        Return for how long the thread has held up the reactor.  That is its CPU time if
        it has not blocked.  If it has blocked, it is all the time in which the thread
        did not wait for a core, even if the host has paused this machine.
        """
        if self.blocked == earlier.blocked:
            return self.cpu - earlier.cpu
        return self.clock - earlier.clock - (self.waited - earlier.waited)


class Delays:
    """
    Measures how late a timer is, and how long each pass of the reactor takes, from the
    end of one sleep to the next sleep.
    """

    def __init__(self) -> None:
        from twisted.internet import reactor

        self._reactor: Any = reactor
        self._late: list[float] = []
        self._running = True
        self._scheduled = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._passes: list[float] = []
        notifier: Any = vars(reactor)["_notifier"]
        self._sleep = notifier.wait
        notifier.wait = self._wait
        self._awake = Moment(self._scheduled)
        self._began = time.perf_counter()
        self._start()

    def _wait(self, *args: Any) -> Any:
        self._passes.append(Moment(self._scheduled).since(self._awake))
        try:
            return self._sleep(*args)
        finally:
            self._awake = Moment(self._scheduled)

    def _start(self) -> None:
        self._due = time.perf_counter() + TICK
        self._reactor.callLater(TICK, self._tick)

    def _tick(self) -> None:
        self._late.append(time.perf_counter() - self._due)
        if self._running:
            self._start()

    async def stop(self) -> Numbers:
        """Wait for one more timer and one pass, and return the figures."""
        from twisted_rtsig.coro import sleep

        self._running = False
        count = len(self._late)
        while len(self._late) == count or not self._passes:
            await sleep(TICK)
        ordered = sorted(self._late)
        shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "worst": 1}
        numbers = {
            name: ordered[int((len(ordered) - 1) * share)]
            for name, share in shares.items()
        }
        held = sum(each for each in self._passes if each > TICK)
        seconds = time.perf_counter() - self._began
        return {**numbers, "pass": max(self._passes), "held": held / seconds}


def late(
    prepare: Callable[..., Any], talk: Talk | None = None
) -> Callable[[Path, int], None]:
    """
    Return a function that measures how late a timer is during some work.

    :param prepare: returns the work, a function.  It imports all that the work needs.
    """

    def run(path: Path, count: int) -> None:
        client = [] if talk is None else [Client(talk, count)]

        async def main() -> Numbers:
            work = prepare(path, *client)
            # Without this, a garbage collection goes through all imported modules at a
            # random moment, which takes tens of milliseconds.
            gc.collect()
            gc.freeze()
            delays = Delays()
            meter = Meter()
            await work()
            return {**meter.read(), **await delays.stop()}

        in_reactor(OURS, main)

    return run


def nothing(path: Path) -> Any:
    from twisted_rtsig.coro import sleep

    return lambda: sleep(2)


def reading(size: int) -> Callable[[Path], Any]:
    def prepare(path: Path) -> Any:
        from twisted_rtsig.files import open_file

        async def read() -> None:
            async with await open_file(path) as file:
                async for _ in file.chunks(size):
                    pass

        return read

    return prepare


def reading_whole(path: Path) -> Any:
    async def read() -> None:
        with path.open("rb") as file:
            file.read()

    return read


def reading_with_turns(path: Path) -> Any:
    from twisted_rtsig.coro import sleep

    async def read() -> None:
        with path.open("rb") as file:
            while file.read(1 << 20):
                await sleep(0)

    return read


def sending(factory: Serve) -> Callable[[Path, Client], Any]:
    def prepare(path: Path, client: Client) -> Any:
        from twisted.internet import reactor
        from twisted.internet.threads import deferToThread

        running: Any = reactor
        port = running.listenTCP(0, factory(path), interface="127.0.0.1")

        async def send() -> None:
            sent = await deferToThread(client.talk_to, port.getHost().port)
            assert sent >= path.stat().st_size
            await port.stopListening()

        return send

    return prepare


# The measurements


class Column(NamedTuple):
    """
    A figure, and how it is reported.

    :ivar least: whether the least of all rounds counts; otherwise the median does.
    """

    name: str
    title: str
    unit: str
    scale: float
    least: bool = True

    def of(self, samples: list[Numbers]) -> float:
        values = [each[self.name] for each in samples]
        return min(values) if self.least else statistics.median(values)

    def tell(self, value: float) -> str:
        return f"{figure(value * self.scale)} {self.unit}".rstrip()


def time_of(unit: str) -> Column:
    return Column("seconds", f"time per {unit}", "µs", 1e6)


def cpu_of(unit: str) -> Column:
    return Column("cpu", f"CPU per {unit}", "µs", 1e6)


HELD_UP = Column("held", "held up", "%", 100, False)


@dataclass(frozen=True)
class Work:
    """
    A kind of use of files that is measured.

    :ivar size: the size of the file, in bytes.
    :ivar compared: the figure in which all are compared with the first contender; None
        if figures may be 0.
    :ivar count: how many reads or requests there are.
    :ivar cold: whether the file is removed from the page cache first.
    """

    what: str
    size: int
    contenders: dict[str, Contender]
    columns: list[Column]
    compared: Column | None
    count: int = 0
    cold: bool = False


THREADS = "deferToThread(os.pread)"
AIOFILES = "aiofiles"
READ_AT = "AsyncFile.read_at"
FILE = "twisted.web.static.File, Twisted's epoll"
SEND_FILE = "stream.send_file"
RESOURCE = "StaticResource"

HTTP = {
    FILE: Contender(serving(TWISTEDS, twisteds_site, request)),
    "twisted.web.static.File, rtsig-epoll": Contender(
        serving(OURS, twisteds_site, request)
    ),
    f"{RESOURCE}, Twisted's epoll": Contender(serving(TWISTEDS, our_site, request)),
    f"{RESOURCE}, rtsig-epoll": Contender(serving(OURS, our_site, request)),
}

WORKS = {
    "cached": Work(
        "reads of 4 KiB from the page cache, one after the other",
        10 * MB,
        {
            THREADS: Contender(cached_in_threads),
            AIOFILES: Contender(cached_in_aiofiles, "aiofiles"),
            READ_AT: Contender(cached_file),
            "os.pread, which may block": Contender(cached_blocking),
        },
        [time_of("read"), cpu_of("read")],
        time_of("read"),
        20_000,
    ),
    "send": Work(
        "a file of 100 MB over TCP, from the page cache",
        100 * MB,
        {
            FILE: Contender(serving(TWISTEDS, twisteds_site, fetch_again)),
            "twisted.web.static.File, rtsig-epoll": Contender(
                serving(OURS, twisteds_site, fetch_again)
            ),
            f"{RESOURCE}, rtsig-epoll": Contender(serving(OURS, our_site, fetch_again)),
            f"{SEND_FILE}, Twisted's epoll": Contender(
                serving(TWISTEDS, streams, fetch_again)
            ),
            SEND_FILE: Contender(serving(OURS, streams, fetch_again)),
            "sendfile(2), which may block": Contender(sending_bare),
        },
        [time_of("file"), cpu_of("file")],
        cpu_of("file"),
        SENDS,
    ),
    "small": Work(
        "requests for a file of 1 KiB",
        1024,
        HTTP,
        [time_of("request"), cpu_of("request")],
        cpu_of("request"),
        10_000,
    ),
    "large": Work(
        "requests for a file of 1 MB",
        MB,
        HTTP,
        [time_of("request"), cpu_of("request")],
        cpu_of("request"),
        2000,
    ),
    "late": Work(
        "how late a timer of 1 ms is, while a file of 2 GB that is not cached is read "
        "or sent",
        2000 * MB,
        {
            "twisted.web.static.File": Contender(late(sending(twisteds_site), fetch)),
            "AsyncFile.chunks(64 KiB)": Contender(late(reading(1 << 16))),
            "AsyncFile.chunks(1 MiB)": Contender(late(reading(1 << 20))),
            SEND_FILE: Contender(late(sending(streams), fetch)),
            RESOURCE: Contender(late(sending(our_site), fetch)),
            "open().read(1 MiB), with turns": Contender(late(reading_with_turns)),
            "open().read()": Contender(late(reading_whole)),
            "nothing else is done, for 2 s": Contender(late(nothing)),
        },
        [
            HELD_UP,
            Column("pass", "longest pass", "ms", 1e3, False),
            *(
                Column(name, f"late: {name}", "ms", 1e3, False)
                for name in ("p50", "p99", "p99.9", "worst")
            ),
            Column("seconds", "in all", "s", 1),
        ],
        None,
        cold=True,
    ),
}


@dataclass(frozen=True)
class Bar:
    """A limit: a contender may use at most ``most`` times as much as another one."""

    work: str
    contender: str
    most: float
    against: str


BARS = [
    Bar("cached", READ_AT, 0.1, THREADS),
    Bar("cached", READ_AT, 0.1, AIOFILES),
    Bar("send", SEND_FILE, 0.5, FILE),
]


# The report

Measured = dict[str, list[Numbers]]
"""The figures of one work in all rounds, by contender."""


def ratio(measured: Measured, column: Column, name: str, against: str) -> str:
    """Return the ratio of two contenders, and its quartiles over the rounds."""
    value = column.of(measured[name]) / column.of(measured[against])
    pairs = zip(measured[name], measured[against], strict=True)
    ratios = (mine[column.name] / other[column.name] for mine, other in pairs)
    return with_quartiles(value, ratios, ".3g")


def table(work: Work, measured: Measured) -> str:
    """Return a table of all contenders at a work, in Markdown."""
    first = next(iter(measured))
    titles = [each.title for each in work.columns]
    head = ["contender", *titles]
    if work.compared is not None:
        head.append(f"{work.compared.title}, of the first (quartiles)")
    rows = []
    for name, samples in measured.items():
        row = [name, *(each.tell(each.of(samples)) for each in work.columns)]
        if work.compared is not None:
            row.append(ratio(measured, work.compared, name, first))
        rows.append(row)
    return markdown(head, rows)


def judge(results: dict[str, Measured]) -> tuple[str, bool]:
    """Return a table of the measured bars, and whether all are met."""
    rows = []
    for bar in BARS:
        measured = results.get(bar.work, {})
        if bar.contender not in measured or bar.against not in measured:
            continue
        column = WORKS[bar.work].compared
        assert column is not None
        mine, other = (
            column.of(measured[each]) for each in (bar.contender, bar.against)
        )
        said = ratio(measured, column, bar.contender, bar.against)
        row = [bar.work, bar.contender, column.title, bar.against]
        rows.append(([*row, said, f"{bar.most:.3g}"], mine <= bar.most * other))
    return table_of_bars(rows)


# Measuring


def make(path: Path, size: int) -> None:
    """Make a file, and flush it to the disk."""
    block = os.urandom(min(size, 1 << 20))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(block[: size - file.tell()])
        file.flush()
        os.fsync(file.fileno())


def set_cached(path: Path, cached: bool) -> None:
    with path.open("rb") as file:
        if cached:
            while file.read(1 << 20):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_all(
    name: str, rounds: int, folder: Path, size: int | None, count: int | None
) -> Measured:
    work = WORKS[name]
    path = folder / "file"
    make(path, size or work.size)
    told = work.compared or work.columns[0]
    options = ["--folder", str(folder), "--count", str(count or work.count)]

    def measure(contender: str) -> Numbers:
        set_cached(path, not work.cold)
        numbers: Numbers = run_alone(__file__, name, contender, *options)
        return numbers

    return measure_in_rounds(
        *(name, work.contenders, rounds, measure),
        *(told.title, lambda sample: told.tell(sample[told.name])),
    )


def parse() -> argparse.Namespace:
    parser = parser_with_rounds(__doc__, WORKS)
    for option, metavar, what in (
        ("--size", "BYTES", "the size of each file, instead of that of the work"),
        ("--count", "N", "how many reads or requests, instead of those of the work"),
    ):
        parser.add_argument(option, type=int, metavar=metavar, help=what)
    parser.add_argument(
        "--folder", help="where to make the files (in the folder of temporary files)"
    )
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.only:
        path = Path(options.folder) / "file"
        WORKS[options.work[0]].contenders[options.only].run(path, options.count)
        return 0
    print(f"{environment('Twisted', 'aiofiles')}.")
    print(f"Rounds: {options.rounds}.", flush=True)
    results: dict[str, Measured] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for name in options.work:
            measured = measure_all(
                name, options.rounds, folder, options.size, options.count
            )
            results[name] = measured
            print(f"\n## {name}: {WORKS[name].what}\n")
            print(table(WORKS[name], measured), flush=True)
    finally:
        shutil.rmtree(folder)
    bars, met = judge(results)
    print(f"\n## Bars\n\n{bars}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
