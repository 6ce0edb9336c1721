"""
Measure what files cost: cached reads, sending and serving, and how long the reactor is
held up meanwhile.

    python benchmarks/files.py [--work NAME,...] [--rounds N] [--size BYTES]

cached     reads of 4 KiB from the page cache, one after the other
send       a file of 100 MB over TCP, from the page cache
small      requests for a file of 1 KiB over HTTP, on 8 connections
large      requests for a file of 1 MB over HTTP, on 8 connections
late       a timer of 1 ms, while a file of 2 GB is read or sent that is not cached

The last one tells for which part of the time the reactor's thread has held up others:
in passes that were longer than 1 ms.  A machine that has others to serve makes a timer
late as well, and when nothing else is done it shows by how much.

A process of its own measures each contender, and all of them are measured in turns,
round after round.  In the first four works it has one core, and the client another.
The CPU time is that of the whole process, user and system, threads included.  Of time
the least of all rounds is told and compared, since whatever else the machine does only
ever adds to it, and of the delays the median of those of the rounds.  The quartiles
are those of the ratios within a round.  The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import importlib.util
import json
import os
import resource
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from compare import environment, say
from report import Spread, figure, markdown

PATIENCE = 300.0
"""Seconds after which a measurement is given up."""

MB = 1_000_000
READ = 4096
CONNECTIONS = 8
SENDS = 4
"""How often a file is sent in one process: what comes but once counts the less."""

TICK = 0.001

Numbers = dict[str, float]
"""What was measured, by name."""


# In a process of its own


class Meter:
    """Measures a process from when it is made on."""

    def __init__(self) -> None:
        self._cpu = time.process_time()
        self._start = time.perf_counter()

    def read(self, count: float = 1) -> Numbers:
        """In seconds, for each."""
        seconds = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        return {"seconds": seconds / count, "cpu": cpu / count}


Talk = Callable[[int, int], float]
"""Of a client, with the port, and how many requests it makes."""


class Client:
    """A process on another core, which talks to the server that it is told of."""

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
        """Blocks until that is over."""
        os.write(self._told, b"%d" % port)
        return float(os.read(self._result, 100))


def fetch(port: int, count: int) -> float:
    """
    Receive all that there is of one answer; how much that was.

    It never sleeps: to wake a client up for every packet, or not, as it happens, costs
    the server more than to send the file.
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
    """The same, time after time: how much that was in all."""
    return sum(fetch(port, 1) for _ in range(count))


def request(port: int, count: int) -> float:
    """Make requests on some connections, one after the other; how many there were."""
    ask = b"GET /file HTTP/1.1\r\nHost: here\r\n\r\n"
    memory = memoryview(bytearray(1 << 18))
    selector = selectors.DefaultSelector()
    for _ in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        # What is still to be received; None before the head has come.
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
    """Run a function as a task in a reactor, by its module; print what it returns."""
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
    """Those who send a file to whoever asks."""
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
    """Have a client talk to a server, and measure that one."""

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
    """What sendfile(2) itself takes, with no reactor around it."""
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
    """Now, as the reactor's thread sees it."""

    def __init__(self, scheduled: int) -> None:
        self.clock = time.perf_counter()
        self.cpu = time.thread_time()
        # How long the thread would have run, but had no core.
        self.waited = int(os.pread(scheduled, 100, 0).split()[1]) / 1e9
        self.blocked = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    def since(self, earlier: Moment) -> float:
        """
        For how long the thread has held up the reactor itself: its CPU time, if it has
        not blocked.  If it has, all of the time counts in which it did not wait for a
        core, also that for which the host has stopped this machine.
        """
        if self.blocked == earlier.blocked:
            return self.cpu - earlier.cpu
        return self.clock - earlier.clock - (self.waited - earlier.waited)


class Delays:
    """
    A timer, and how late it has been; and how long each pass of the reactor was, from
    the end of one sleep to the next.
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
        """How late it was, after one more time and a pass."""
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
    Measure how late a timer is while something else is done.

    :param prepare: returns what is to be done, which imports nothing any more.
    """

    def run(path: Path, count: int) -> None:
        client = [] if talk is None else [Client(talk, count)]

        async def main() -> Numbers:
            work = prepare(path, *client)
            # To look through all that was imported takes the garbage collector tens of
            # milliseconds, now and then and whoever it hits.
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


# What is measured


class Contender(NamedTuple):
    run: Callable[[Path, int], None]
    needs: str = ""
    """What it imports, unless that is there anyway."""


class Column(NamedTuple):
    """
    A figure, and how it is told.

    :ivar least: the least of all rounds counts, not the median.
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
    :ivar size: of the file, in bytes.
    :ivar cold: whether nothing of it is cached.
    :ivar compared: in which figure all are compared with the first contender; none
        where it may be 0.
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
        "how late a timer of 1 ms is, while a file of 2 GB is read or sent that is not "
        "cached",
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
    """How much of what another uses a contender may use."""

    work: str
    contender: str
    most: float
    against: str


BARS = [
    Bar("cached", READ_AT, 0.1, THREADS),
    Bar("cached", READ_AT, 0.1, AIOFILES),
    Bar("send", SEND_FILE, 0.5, FILE),
]


# What is told

Measured = dict[str, list[Numbers]]
"""The figures of each contender at one work, of all rounds."""


def ratio(measured: Measured, column: Column, name: str, against: str) -> str:
    """Of what counts, and its quartiles within a round."""
    value = column.of(measured[name]) / column.of(measured[against])
    pairs = zip(measured[name], measured[against], strict=True)
    spread = Spread(mine[column.name] / other[column.name] for mine, other in pairs)
    return f"{value:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def table(work: Work, measured: Measured) -> str:
    """A table of all who did a work, in Markdown."""
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
    """A table of the bars whose figures are there, and whether all are met."""
    rows, all_met = [], True
    for bar in BARS:
        measured = results.get(bar.work, {})
        if bar.contender not in measured or bar.against not in measured:
            continue
        column = WORKS[bar.work].compared
        assert column is not None
        mine, other = (
            column.of(measured[each]) for each in (bar.contender, bar.against)
        )
        met = mine <= bar.most * other
        all_met = all_met and met
        said = ratio(measured, column, bar.contender, bar.against)
        row = [bar.work, bar.contender, column.title, bar.against]
        rows.append([*row, said, f"{bar.most:.3g}", "good" if met else "MISSED"])
    head = ["work", "of", "what", "compared with", "measured (quartiles)", "at most"]
    return markdown([*head, ""], rows), all_met


# Measuring


def make(path: Path, size: int) -> None:
    """A file that is on the disk."""
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


def measure(name: str, contender: str, path: Path, count: int) -> Numbers:
    set_cached(path, not WORKS[name].cold)
    command = [sys.executable, __file__, "--only", contender, "--work", name]
    command += ["--folder", str(path.parent), "--count", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    numbers: Numbers = json.loads(done.stdout.splitlines()[-1])
    return numbers


def measure_all(
    name: str, rounds: int, folder: Path, size: int | None, count: int | None
) -> Measured:
    work = WORKS[name]
    path = folder / "file"
    make(path, size or work.size)
    measured: Measured = {}
    for contender, (_, needs) in work.contenders.items():
        if needs and importlib.util.find_spec(needs) is None:
            say(
                f"{contender} is left out: there is no {needs} here "
                "(pip install -e '.[bench]')."
            )
        else:
            measured[contender] = []
    for round_ in range(1, rounds + 1):
        for contender, samples in measured.items():
            samples.append(measure(name, contender, path, count or work.count))
        told = work.compared or work.columns[0]
        said = ", ".join(
            f"{contender} {told.tell(samples[-1][told.name])}"
            for contender, samples in measured.items()
        )
        say(f"{name}, round {round_} of {rounds}, {told.title}: {said}")
    return measured


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    add = parser.add_argument
    add(
        "--work",
        metavar="NAME,...",
        default=",".join(WORKS),
        help=f"what is measured ({', '.join(WORKS)})",
    )
    add("--rounds", type=int, metavar="N", default=4, help="how often (4)")
    add("--size", type=int, metavar="BYTES", help="of each file, instead of its own")
    add(
        "--count",
        type=int,
        metavar="N",
        help="of reads or requests, instead of its own",
    )
    add("--folder", help="on which disk (that of temporary files)")
    add("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.split(",")
    for name in options.work:
        if name not in WORKS:
            parser.error(f"there is no {name}, only {', '.join(WORKS)}")
    if options.rounds < 1:
        parser.error("there is nothing to measure")
    return options


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
