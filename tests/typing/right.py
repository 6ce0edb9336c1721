"""
Programs that type checkers accept, and the types that they find.

``tests/test_types.py`` runs the checkers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from os import DirEntry, PathLike
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
)
from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.task import Clock
from typing_extensions import assert_type

from twisted_rtsig import run
from twisted_rtsig.coro import (
    Channel,
    ChannelStatistics,
    Condition,
    CoroutineFactory,
    CoroutineService,
    Deadline,
    Event,
    Lock,
    Process,
    Semaphore,
    Server,
    Stopped,
    Stream,
    Task,
    TaskGroup,
    TCPTransport,
    connect,
    current_task,
    from_asyncio,
    from_thread,
    in_thread,
    open_datagrams,
    open_process,
    open_tcp,
    open_unix,
    run_group,
    run_process,
    select,
    serve,
    shield,
    sleep,
    spawn,
    symmetric,
    timeout,
    transfer,
)
from twisted_rtsig.coro.stackful import (
    entering,
    in_stackful,
    iterate,
    spawn_stackful,
    wait,
)
from twisted_rtsig.coro.testing import SansIO, in_task, stream_pair
from twisted_rtsig.files import (
    AsyncFile,
    AsyncTextFile,
    NamedTemporaryFile,
    SpooledTemporaryFile,
    TemporaryFile,
    listdir,
    open_file,
    scandir,
    stat,
    walk,
    write_file,
)

from .functions import (
    Counter,
    count,
    count_decorated,
    count_deferred,
    count_generator,
    count_inline,
    count_plain,
)

# Tasks


async def tasks(ready: Callable[[str], Awaitable[bytes]]) -> None:
    assert_type(spawn(count, "a"), Task[bytes])
    assert_type(spawn(count, "a", 3), Task[bytes])
    assert_type(spawn(count, "a", name="counts", reactor=Clock()), Task[bytes])
    assert_type(spawn(count_generator, "a"), Task[int])
    assert_type(spawn(count_decorated, "a"), Task[int])
    assert_type(spawn(count_inline, "a"), Task[int])
    assert_type(spawn(count_deferred, "a"), Task[float])
    assert_type(spawn(count_plain, "a"), Task[float])
    assert_type(spawn(count_plain, "a", 1, 2), Task[float])
    assert_type(spawn(Counter().count, "a"), Task[bool])
    assert_type(spawn(ready, "a"), Task[bytes])
    assert_type(spawn(lambda: 3), Task[int])
    assert_type(spawn(sleep, 3), Task[None])
    assert_type(spawn(count("a")), Task[bytes])
    assert_type(spawn(count_generator("a")), Task[int])
    task = spawn(count, "a")
    assert_type(await task, bytes)
    assert_type(task.result(), bytes)
    assert_type(await task.as_deferred(), bytes)
    assert_type(task.done, bool)
    assert_type(current_task(), Task[Any])
    assert_type(await count_decorated("a"), int)
    assert_type(await sleep(1), None)
    with timeout(1) as limit, shield():
        assert_type(limit.expired, bool)


def stackful(deferred: Deferred[int], future: asyncio.Future[bytes]) -> None:
    assert_type(spawn_stackful(count_plain, "a"), Task[float])
    assert_type(spawn_stackful(count_plain, "a", 1, name="b"), Task[float])
    assert_type(spawn_stackful(lambda: 3), Task[int])
    assert_type(wait(count("a")), bytes)
    assert_type(wait(count_generator("a")), int)
    assert_type(wait(count_decorated("a")), int)
    assert_type(wait(spawn(count, "a")), bytes)
    assert_type(wait(deferred), int)
    assert_type(wait(future), bytes)
    assert_type(wait(sleep(1)), None)
    assert_type(wait(in_stackful(count_plain, "a", 1)), float)
    channel: Channel[int] = Channel(1)
    assert_type(wait(channel.receive()), int)
    assert_type(list(iterate(channel)), list[int])
    with entering(TaskGroup()) as group, timeout(1):
        assert_type(group, TaskGroup)
        assert_type(group.spawn(in_stackful(count_plain, "a")), Task[float])
    with entering(Lock()):
        pass


async def groups() -> None:
    async with TaskGroup() as group:
        assert_type(group, TaskGroup)
        assert_type(group.spawn(count, "a"), Task[bytes])
        assert_type(group.spawn(count_generator, "a", name="counts"), Task[int])
        assert_type(group.spawn(count_decorated, "a"), Task[int])
        assert_type(group.spawn(count_plain, "a"), Task[float])
        assert_type(group.spawn(count("a")), Task[bytes])

    async def block(group: TaskGroup, name: str) -> bytes:
        group.spawn(sleep, 1)
        return name.encode()

    def generator_block(group: TaskGroup) -> Generator[Any, Any, int]:
        group.spawn(sleep, 1)
        yield sleep(1)
        return 3

    def plain_block(group: TaskGroup) -> float:
        group.spawn(sleep, 1)
        return 0.5

    assert_type(await run_group(block, "a"), bytes)
    assert_type(await run_group(generator_block), int)
    assert_type(await run_group(plain_block), float)


async def threads() -> None:
    def blocks(name: str, *, times: int) -> bytes:
        assert_type(from_thread(count, name), bytes)
        assert_type(from_thread(count_generator, name), int)
        assert_type(from_thread(count_decorated, name), int)
        assert_type(from_thread(count_plain, name), float)
        assert_type(from_thread(count(name)), bytes)
        assert_type(from_thread(sleep, 1), None)
        return name.encode() * times

    assert_type(await in_thread(blocks, "a", times=3), bytes)


async def symmetric_coroutines() -> None:
    async def other(name: str, value: str) -> int:
        await transfer(current_task(), value)
        return len(name)

    def other_generator(value: str) -> Generator[Any, Any, int]:
        yield transfer(current_task(), value)
        return 3

    assert_type(symmetric(other, "a"), Task[int])
    task: Task[int] = symmetric(other_generator, name="other")
    task.cancel()
    await transfer(symmetric(other, "a"), "b")


def generator() -> Generator[Any, Any, int]:
    """The result of ``yield`` is Any to a checker.  ``yield from`` has the type."""
    stream, _ = stream_pair(reactor=Clock())
    channel: Channel[str] = Channel(1)
    assert_type((yield from stream.read()), bytes)
    assert_type((yield from channel.receive()), str)
    assert_type((yield from count_decorated("a")), int)
    assert_type((yield from spawn(count, "a").as_deferred()), bytes)
    yield sleep(1)
    return 3


# Streams


async def streams(stream: Stream) -> None:
    assert_type(await stream.read(), bytes)
    assert_type(await stream.read_exactly(3), bytes)
    assert_type(await stream.read_until(b"\r\n", max_bytes=10), bytes)
    assert_type(await stream.read_until_regex(rb"\d"), bytes)
    assert_type(await stream.read_line(), bytes)
    assert_type(await stream.peek(), bytes)
    async for line in stream.lines(until=stream.stopping):
        assert_type(line, bytes)
    assert_type(await stream.write(b""), None)
    stream.write(bytearray())
    stream.write(memoryview(b""))
    assert_type(await stream.write_eof(), None)
    assert_type(await stream.close(), None)
    assert_type(await stream.abort(), None)
    async with await open_file("data") as file:
        assert_type(await stream.send_file(file, 1, 10), int)
    async with stream as same:
        assert_type(same, Stream)
    reading = stream.read()
    assert_type(reading.addCallback(len), Deferred[int])
    reading.cancel()


def addresses(stream: Stream) -> str:
    assert_type(stream.peer, IPv4Address | IPv6Address | UNIXAddress)
    assert_type(stream.host, IPv4Address | IPv6Address | UNIXAddress)
    if isinstance(stream.transport, TCPTransport):
        stream.transport.setTcpNoDelay(True)
        assert_type(stream.transport.getTcpKeepAlive(), bool)
    peer = stream.peer
    if isinstance(peer, UNIXAddress):
        return repr(peer.name)
    assert_type(peer.port, int)
    return peer.host


# Servers and clients


def handle_in_generator(stream: Stream) -> Generator[Any, Any, None]:
    yield stream.write((yield from stream.read()))


async def serving(
    reactor: Any, listens: IStreamServerEndpoint, connects: IStreamClientEndpoint
) -> None:
    server = await serve(TCP4ServerEndpoint(reactor, 0), streams)
    assert_type(server, Server)
    await serve(TCP4ServerEndpoint(reactor, 0), handle_in_generator)
    await serve(
        listens,
        streams,
        reactor=reactor,
        max_connections=10,
        idle_timeout=30,
        cancel_on_loss=True,
    )
    assert_type(await server.stop(grace=1), Stopped)
    assert_type(server.stopping, Event)
    assert_type(server.factory, CoroutineFactory)
    server.port.getHost()
    stream = await connect(connects)
    assert_type(stream, Stream)
    plain = TCP4ClientEndpoint(reactor, "localhost", 80)
    await connect(plain, reactor, handshake_timeout=3)
    CoroutineFactory(streams, idle_timeout=None)
    described = await serve(
        "tcp:80",
        streams,
        name="echo",
        max_connections="auto",
        max_connections_per_address=None,
        first_byte_timeout=3,
        idle_timeout=None,
        read_timeout=0.5,
        write_timeout=None,
        handshake_timeout=3,
        close_timeout=None,
        cancel_on_loss=False,
        reactor=None,
    )
    assert_type(await described.serve_forever(grace=3), None)
    service = CoroutineService("tcp:80", streams, grace=3, max_connections=None)
    assert_type(service.server, Server | None)
    assert_type(await open_tcp("localhost", 80, tls=True, close_timeout=3), Stream)
    assert_type(await open_unix("/run/socket"), Stream)


def programs() -> None:
    assert_type(run(count, "a"), bytes)
    assert_type(run(count, "a", 3, reactor="rtsig", grace=None, debug=True), bytes)
    assert_type(run(count_generator, "a", name="counts"), int)
    assert_type(run(count_deferred, "a"), float)


# Channels, locks and other objects that tasks share


async def sharing() -> None:
    channel: Channel[int] = Channel(3)
    assert_type(await channel.send(3), None)
    assert_type(await channel.receive(), int)
    assert_type(channel.try_receive(), int)
    async for value in channel:
        assert_type(value, int)
    assert_type(channel.statistics(), ChannelStatistics)
    event, lock, semaphore, condition = Event(), Lock(), Semaphore(3), Condition()
    assert_type(await event.wait(), None)
    async with lock, semaphore, condition:
        assert_type(await condition.wait_for(lambda: True), None)
        assert_type(await condition.wait(), None)
    assert_type(await lock.acquire(), None)
    lock.release()


async def selecting(stream: Stream) -> None:
    numbers: Channel[int] = Channel(3)
    names: Channel[str] = Channel(3)
    task = spawn(count, "a")
    stop = Event()

    chosen, number = await select(numbers, Channel[int](3))
    assert_type(chosen, Channel[int])
    assert_type(number, int)
    _, each = await select(*[spawn(count, name) for name in "abc"])
    assert_type(each, bytes)
    _, data = await select(stream.read(), count_decorated("a").addCallback(bytes))
    assert_type(data, bytes)
    _, value = await select(task)
    assert_type(value, bytes)
    _, two = await select(numbers, stop)
    assert_type(two, int | None)
    _, three = await select(numbers, names, task)
    assert_type(three, int | str | bytes)
    _, four = await select(numbers.sending(3), names, Deadline(1), stream.read())
    assert_type(four, str | bytes | None)
    _, five = await select(numbers, numbers, numbers, numbers, numbers)
    assert_type(five, int)


# Processes, datagrams, files


async def outside() -> None:
    async with open_process(["sort", "-n"]) as process:
        assert_type(process, Process)
        assert_type(process.stream, Stream)
        assert_type(process.errors, Stream)
        assert_type(await process.wait(), int)
    done = await run_process(["true"], env=None, pass_fds=[3], grace=3)
    assert_type(done.stdout, bytes)
    read = await run_process(["true"], text=True, input="words", check=False)
    assert_type(read.stderr, str)
    async with open_datagrams(0) as datagrams:
        assert_type(datagrams.host, IPv4Address | IPv6Address)
        data, address = await datagrams.receive_from()
        assert_type(data, bytes)
        await datagrams.send_to(data, address)
        async for datagram, _ in datagrams:
            assert_type(datagram, bytes)
    async with await open_file("data", "r+b") as file:
        assert_type(file, AsyncFile)
        assert_type(await file.read(3), bytes)
        assert_type(await file.read_line(), bytes)
        assert_type(await file.seek(0), int)
        async for line in file:
            assert_type(line, bytes)
    async with await open_file("data", "w", encoding="utf-8") as text:
        assert_type(text, AsyncTextFile)
        assert_type(await text.read(3), str)
    async with TemporaryFile(dir="folder", suffix=None) as file:
        assert_type(file, AsyncFile)
    async with TemporaryFile("w+", encoding="utf-8") as text:
        assert_type(text, AsyncTextFile)
    async with SpooledTemporaryFile(1 << 20, dir="folder") as file:
        assert_type(file, AsyncFile)
    async with SpooledTemporaryFile(mode="w+") as text:
        assert_type(text, AsyncTextFile)
    async with NamedTemporaryFile("w+", newline="", delete=False) as text:
        assert_type(text, AsyncTextFile)
    assert_type(text.name, str | bytes | PathLike[str] | PathLike[bytes])
    assert_type((await stat("data")).st_size, int)
    assert_type(await listdir(), list[str])
    assert_type(await listdir(b"folder"), list[bytes])
    async for entry in scandir():
        assert_type(entry, DirEntry[str])
    async for entry_in_bytes in scandir(b"folder"):
        assert_type(entry_in_bytes, DirEntry[bytes])
    async for folder, _, names in walk("folder"):
        assert_type(folder, str)
        assert_type(names, list[str])
    assert_type(await write_file("data", b""), None)


# asyncio


async def awaits_asyncio(future: asyncio.Future[int], task: asyncio.Task[str]) -> int:
    assert_type(await asyncio.sleep(1, "slept"), str)
    assert_type(await task, str)
    assert_type(await asyncio.wait_for(task, 1), str)
    assert_type(await asyncio.gather(future, task), tuple[int, str])
    assert_type(from_asyncio(future), Deferred[int])
    assert_type(await from_asyncio(asyncio.sleep(1, "slept")), str)
    return await future


async def waits_for_asyncio() -> int:
    return await asyncio.sleep(1, 3)


async def awaited_by_asyncio(channel: Channel[int], deferred: Deferred[str]) -> bytes:
    assert_type(await channel.receive(), int)
    assert_type(await deferred, str)
    assert_type(await spawn(waits_for_asyncio), int)
    assert_type(await asyncio.wait_for(channel.receive(), 1), int)
    assert_type(await asyncio.gather(deferred, channel.receive()), tuple[str, int])
    return b""


@inlineCallbacks
def yields_asyncio() -> Generator[Deferred[Any], Any, int]:
    yield from_asyncio(awaited_by_asyncio(Channel(0), Deferred()))
    return 3


def of_asyncio() -> None:
    assert_type(
        spawn(awaited_by_asyncio, Channel[int](0), Deferred[str]()), Task[bytes]
    )
    assert_type(spawn(asyncio.sleep, 1), Task[None])
    assert_type(yields_asyncio(), Deferred[int])


# Testing


@in_task
async def test_a_conversation() -> int:
    one, other = stream_pair()
    assert_type(one, Stream)
    conversation = SansIO(streams)
    assert_type(conversation.written(), bytes)
    await other.close()
    return 3


assert_type(test_a_conversation(), Deferred[int])
