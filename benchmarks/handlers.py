"""
Measure the memory of a handler, while many are in the middle of a conversation.

    python benchmarks/handlers.py [--handlers N] [--rounds N]

Each handler has read a line and answered it, and waits for the next one.  All
contenders have the same transports in memory, so that the figure is the size of the
handler's coroutine, its task, its stream and its protocol.  Each contender is measured
in a process of its own, in turns, by the growth of the resident set.  The exit status
is 1 if a handler of this package takes more memory than one of asyncio's streams.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

LINE = b"a line of 64 bytes" + b"." * 45 + b"\n"


class Transport:
    """A transport for Twisted and asyncio that discards what is written."""

    __slots__ = ("__weakref__", "written")

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def registerProducer(self, producer: object, streaming: bool) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        return None


Kept = list[Any]


def coroutines(handler: Any, count: int, measured: Callable[[Kept], None]) -> None:
    from twisted.internet.task import Clock

    from twisted_rtsig.coro import CoroutineFactory

    factory = CoroutineFactory(handler, reactor=Clock())
    kept: Kept = []
    for _ in range(count):
        transport = Transport()
        protocol: Any = factory.buildProtocol(None)
        protocol.makeConnection(transport)
        protocol.dataReceived(bytes(bytearray(LINE)))
        assert transport.written == len(LINE)
        kept.append(protocol)
    measured(kept)
    # Skip the clean-up of all the tasks.
    os._exit(0)


async def as_async_def(stream: Any) -> None:
    while True:
        line = await stream.read_line()
        await stream.write(line + b"\n")


def as_generator(stream: Any) -> Generator[Any, Any, None]:
    while True:
        line = yield stream.read_line()
        yield stream.write(line + b"\n")


def with_inline_callbacks(count: int, measured: Callable[[Kept], None]) -> None:
    from twisted.internet.defer import inlineCallbacks

    coroutines(inlineCallbacks(as_generator), count, measured)


def asyncio_streams(count: int, measured: Callable[[Kept], None]) -> None:
    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            line = await reader.readline()
            writer.write(line)
            await writer.drain()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        kept: Kept = []
        for _ in range(count):
            transport: Any = Transport()
            reader = asyncio.StreamReader(loop=loop)
            protocol = asyncio.StreamReaderProtocol(reader, handler, loop=loop)
            protocol.connection_made(transport)
            protocol.data_received(bytes(bytearray(LINE)))
            kept.append((transport, protocol))
            if not len(kept) % 100:
                await asyncio.sleep(0)
        while not all(transport.written for transport, _ in kept):
            await asyncio.sleep(0)
        measured(kept)
        os._exit(0)

    asyncio.run(main())


CONTENDERS: dict[str, Callable[[int, Callable[[Kept], None]], None]] = {
    "coroutine": lambda count, told: coroutines(as_async_def, count, told),
    "coroutine, a generator": lambda count, told: coroutines(as_generator, count, told),
    "coroutine, under inlineCallbacks": with_inline_callbacks,
    "asyncio streams": asyncio_streams,
}


def resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure(contender: str, count: int) -> None:
    """In a process of its own: print how many bytes each handler takes."""
    # Imported first, so that modules do not count as memory of the handlers.
    for module in ("twisted_rtsig.coro", "twisted.internet.task"):
        importlib.import_module(module)
    before = resident()

    def tell(kept: Kept) -> None:
        print(round((resident() - before) / len(kept)), flush=True)

    CONTENDERS[contender](count, tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[1])
    parser.add_argument("--handlers", type=int, default=20_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.only, arguments.handlers)
        return
    results: dict[str, list[int]] = {each: [] for each in CONTENDERS}
    for _ in range(arguments.rounds):
        for contender, measured in results.items():
            command = [sys.executable, __file__, "--only", contender]
            command += ["--handlers", str(arguments.handlers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            measured.append(int(done.stdout))
    print(f"{arguments.handlers:,} handlers, each in the middle of a conversation.\n")
    print("| contender | memory per handler | of asyncio streams |")
    print("| --- | --- | --- |")
    bar = statistics.median(results["asyncio streams"])
    for contender, measured in results.items():
        size = statistics.median(measured)
        print(f"| {contender} | {size:,.0f} B | {size / bar:.2f} |")
    if statistics.median(results["coroutine"]) > bar:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
