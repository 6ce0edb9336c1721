# mypy: enable-error-code="unused-awaitable"
"""
Lines that type checkers refuse, each with its errors.

``tests/test_types.py`` runs the checkers.  ``mypy:`` is followed by the error codes of
mypy, and ``pyright:`` by the rules of pyright.  A hyphen means no error of the checker.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint

from twisted_rtsig import run
from twisted_rtsig.coro import (
    Channel,
    Condition,
    CoroutineFactory,
    CoroutineService,
    Deadline,
    Event,
    Lock,
    Semaphore,
    Server,
    Stream,
    Task,
    TaskGroup,
    connect,
    coroutine,
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
    sleep,
    spawn,
    symmetric,
    timeout,
    transfer,
)
from twisted_rtsig.coro.stackful import in_stackful, spawn_stackful, wait
from twisted_rtsig.files import (
    AsyncFile,
    AsyncTextFile,
    NamedTemporaryFile,
    SpooledTemporaryFile,
    TemporaryFile,
    open_file,
    stat,
)

from .functions import (
    Counter,
    count,
    count_decorated,
    count_generator,
    count_inline,
    count_plain,
)

# fmt: off

# Arguments


async def arguments(group: TaskGroup, body: Any) -> None:
    spawn(count)  # mypy: arg-type, call-arg, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count, "a", "b")  # mypy: arg-type, call-arg, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count, "a", 1, 2)  # mypy: arg-type, call-arg, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count, "a", nam="b")  # mypy: call-overload; pyright: reportCallIssue
    spawn(count, "a", name=3)  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    spawn(count_generator)  # mypy: arg-type, call-arg, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count_generator, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count_decorated, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count_inline, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn_stackful(count_plain, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType
    spawn_stackful(count_plain)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType
    await in_stackful(count_plain, 3)  # mypy: arg-type; pyright: reportArgumentType
    await in_stackful(count_plain)  # mypy: call-arg; pyright: reportCallIssue
    wait(3)  # mypy: arg-type; pyright: reportArgumentType
    spawn(count_plain, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(Counter().count, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    spawn(count("a"), "a")  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    spawn(3)  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    spawn(sleep, "a")  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    group.spawn(count)  # mypy: arg-type, call-arg; pyright: reportArgumentType, reportCallIssue
    group.spawn(count, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    group.spawn(count_generator, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    group.spawn(count_decorated, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    group.spawn(count_plain, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    group.spawn(count, "a", nam="b")  # mypy: call-overload; pyright: reportCallIssue
    from_thread(count)  # mypy: arg-type, call-arg; pyright: reportArgumentType, reportCallIssue
    from_thread(count, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    from_thread(count_generator, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    from_thread(count_plain, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    await in_thread(count_plain)  # mypy: call-arg; pyright: reportCallIssue
    await in_thread(count_plain, 3)  # mypy: arg-type; pyright: reportArgumentType
    await in_thread(count_plain, "a", more=3)  # mypy: call-arg; pyright: reportCallIssue
    count_decorated(3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType
    coroutine(count)  # mypy: arg-type; pyright: reportArgumentType


async def blocks() -> None:
    async def block(group: TaskGroup, name: str) -> bytes:
        _ = group.spawn(sleep, 1)
        return name.encode()

    async def other(name: str, value: Any) -> int:
        await transfer(value)
        return len(name)

    await run_group(block)  # mypy: arg-type, call-arg; pyright: reportArgumentType, reportCallIssue
    await run_group(block, 3)  # mypy: arg-type; pyright: reportArgumentType, reportCallIssue
    symmetric(other)  # mypy: arg-type, call-arg, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    symmetric(other, 3)  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType, reportCallIssue
    await transfer(other)  # mypy: arg-type; pyright: reportArgumentType


# Results


async def results(stream: Stream) -> None:
    number: int
    number = await spawn(count, "a")  # mypy: arg-type; pyright: reportAssignmentType
    number = spawn(count_plain, "a").result()  # mypy: assignment; pyright: reportAssignmentType
    task: Task[str] = spawn(count, "a")  # mypy: arg-type; pyright: reportAssignmentType
    text: str = await stream.read_line()  # mypy: assignment; pyright: reportAssignmentType
    text = await stream.read()  # mypy: assignment; pyright: reportAssignmentType
    text = await in_thread(count_plain, "a")  # mypy: arg-type; pyright: reportAssignmentType
    async for line in stream.lines():
        text = line  # mypy: assignment; pyright: reportAssignmentType
    number = from_thread(count, "a")  # mypy: assignment; pyright: reportAssignmentType
    deferred: Deferred[str] = count_decorated("a")  # mypy: assignment; pyright: reportAssignmentType
    number = await (await open_file("data")).read(3)  # mypy: assignment; pyright: reportAssignmentType
    number = (await stat("data")).st_mtime  # mypy: assignment; pyright: reportAssignmentType
    text = await open_process(["true"]).wait()  # mypy: assignment; pyright: reportAssignmentType
    (text, _) = await open_datagrams().receive_from()  # mypy: assignment; pyright: reportAssignmentType
    print(number, text, task, deferred)


# Streams and servers


async def streams(stream: Stream) -> None:
    await stream.read("a")  # mypy: arg-type; pyright: reportArgumentType
    await stream.read_until("\n")  # mypy: arg-type; pyright: reportArgumentType
    await stream.read_until_regex("a")  # mypy: arg-type; pyright: reportArgumentType
    await stream.write("text")  # mypy: arg-type; pyright: reportArgumentType
    await stream.write(3)  # mypy: arg-type; pyright: reportArgumentType
    stream.peer.host  # mypy: union-attr; pyright: reportAttributeAccessIssue, reportUnknownMemberType
    stream.transport.setTcpNoDelay(True)  # mypy: attr-defined; pyright: reportAttributeAccessIssue, reportUnknownMemberType
    stream.peer = None  # mypy: assignment, misc; pyright: reportAttributeAccessIssue
    stream.read_lines()  # mypy: attr-defined; pyright: reportAttributeAccessIssue, reportUnknownMemberType


async def serving(reactor: Any) -> None:
    server = TCP4ServerEndpoint(reactor, 0)
    client = TCP4ClientEndpoint(reactor, "localhost", 80)

    async def without_stream() -> None:
        pass

    await serve(server, without_stream)  # mypy: arg-type; pyright: reportArgumentType
    await connect(client, handshake_timeout="a")  # mypy: arg-type; pyright: reportArgumentType
    CoroutineFactory(without_stream)  # mypy: arg-type; pyright: reportArgumentType
    CoroutineFactory(streams, idle_time=3)  # mypy: call-arg; pyright: reportCallIssue


async def options_of_servers(server: Server) -> None:
    await serve("tcp:80", streams, idle_time=3)  # mypy: call-arg; pyright: reportCallIssue
    await serve("tcp:80", streams, 3)  # mypy: arg-type, call-arg; pyright: reportCallIssue
    await serve(80, streams)  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, name=3)  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, max_connections="all")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, max_connections=0.5)  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, max_connections_per_address="auto")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, first_byte_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, idle_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, read_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, write_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, handshake_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, close_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, cancel_on_loss="no")  # mypy: arg-type; pyright: reportArgumentType
    await serve("tcp:80", streams, grace=3)  # mypy: call-arg; pyright: reportCallIssue
    CoroutineFactory(streams, max_connections="all")  # mypy: arg-type; pyright: reportArgumentType
    CoroutineFactory(streams, cancel_on_loss=None)  # mypy: arg-type; pyright: reportArgumentType
    CoroutineService("tcp:80", streams, 3)  # mypy: call-arg; pyright: reportCallIssue
    CoroutineService("tcp:80", count)  # mypy: arg-type; pyright: reportArgumentType
    CoroutineService("tcp:80", streams, grace="3")  # mypy: arg-type; pyright: reportArgumentType
    CoroutineService("tcp:80", streams, cancel_timeout=None)  # mypy: arg-type; pyright: reportArgumentType
    CoroutineService("tcp:80", streams, idle_time=3)  # mypy: call-arg; pyright: reportCallIssue
    CoroutineService("tcp:80", streams, max_connections="all")  # mypy: arg-type; pyright: reportArgumentType
    CoroutineService("tcp:80", streams, idle_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await server.stop("3")  # mypy: arg-type; pyright: reportArgumentType
    await server.serve_forever(grace=None)  # mypy: arg-type; pyright: reportArgumentType


async def options_of_clients() -> None:
    await connect("tcp:localhost:80", write_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await connect("tcp:localhost:80", handshake_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await connect("tcp:localhost:80", close_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await connect("tcp:localhost:80", idle_timeout=3)  # mypy: call-arg; pyright: reportCallIssue
    await connect(80)  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost")  # mypy: call-arg; pyright: reportCallIssue
    await open_tcp("localhost", "80")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, True)  # mypy: call-arg; pyright: reportCallIssue
    await open_tcp("localhost", 80, tls="yes")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, server_hostname=b"localhost")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, local_address=("localhost", "80"))  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, happy_eyeballs_delay="3")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, connect_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, handshake_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, close_timeout="3")  # mypy: arg-type; pyright: reportArgumentType
    await open_tcp("localhost", 80, timeout=3)  # mypy: call-arg; pyright: reportCallIssue
    await open_unix(80)  # mypy: arg-type; pyright: reportArgumentType


def options_of_programs() -> None:
    number: int
    run(count)  # mypy: arg-type; pyright: reportArgumentType
    run(count, 3)  # mypy: arg-type; pyright: reportArgumentType
    run(count("a"))  # mypy: arg-type; pyright: reportArgumentType
    run(count_plain, "a")  # mypy: arg-type; pyright: reportArgumentType
    run(count, "a", grace="3")  # mypy: arg-type; pyright: reportArgumentType
    run(count, "a", name=3)  # mypy: arg-type; pyright: reportArgumentType
    run(count, "a", debug="yes")  # mypy: arg-type; pyright: reportArgumentType
    run(count, "a", nam="b")  # mypy: call-arg; pyright: reportCallIssue
    number = run(count, "a")  # mypy: assignment; pyright: reportAssignmentType
    print(number)


async def options_of_processes() -> None:
    await run_process(["true"], input="text")  # mypy: call-overload; pyright: reportArgumentType
    await run_process(["true"], text=True, input=b"bytes")  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    await run_process(["true"], max_bytes="3")  # mypy: call-overload; pyright: reportArgumentType
    await run_process(["true"], grace="3")  # mypy: call-overload; pyright: reportArgumentType
    await run_process(["true"], pass_fds=3)  # mypy: call-overload; pyright: reportArgumentType
    await run_process(["true"], shell=True)  # mypy: call-overload; pyright: reportCallIssue
    open_process(["true"], stdin="yes")  # mypy: arg-type; pyright: reportArgumentType
    open_process(["true"], grace="3")  # mypy: arg-type; pyright: reportArgumentType
    open_process(["true"], shell=True)  # mypy: call-arg; pyright: reportCallIssue
    text: str = (await run_process(["true"])).stdout  # mypy: assignment; pyright: reportAssignmentType
    print(text)


# Files


async def options_of_files(data: AsyncFile, words: AsyncTextFile) -> None:
    await open_file("data", permissions="rw")  # mypy: call-overload; pyright: reportArgumentType
    await data.write("text")  # mypy: arg-type; pyright: reportArgumentType
    await words.write(b"bytes")  # mypy: arg-type; pyright: reportArgumentType
    TemporaryFile("w+b", encoding="utf-8")  # mypy: call-overload; pyright: reportArgumentType
    TemporaryFile("w+", dir=3)  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    TemporaryFile(delete=True)  # mypy: call-overload; pyright: reportCallIssue
    NamedTemporaryFile("w+b", encoding="utf-8")  # mypy: call-overload; pyright: reportArgumentType
    NamedTemporaryFile(delete="no")  # mypy: call-overload; pyright: reportArgumentType
    NamedTemporaryFile(name="data")  # mypy: call-overload; pyright: reportCallIssue
    SpooledTemporaryFile("1")  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    SpooledTemporaryFile(delete=True)  # mypy: call-overload; pyright: reportCallIssue
    async with NamedTemporaryFile() as file:
        await file.write("text")  # mypy: arg-type; pyright: reportArgumentType


# Channels, locks and other objects that tasks share


async def sharing(channel: Channel[int]) -> None:
    await channel.send("a")  # mypy: arg-type; pyright: reportArgumentType
    channel.try_send("a")  # mypy: arg-type; pyright: reportArgumentType
    channel.sending("a")  # mypy: arg-type; pyright: reportArgumentType
    text: str = await channel.receive()  # mypy: assignment; pyright: reportAssignmentType
    text = channel.try_receive()  # mypy: assignment; pyright: reportAssignmentType
    async for value in channel:
        text = value  # mypy: assignment; pyright: reportAssignmentType
    Channel()  # mypy: call-arg; pyright: reportCallIssue
    Semaphore("a")  # mypy: arg-type; pyright: reportArgumentType
    await Condition().wait_for(3)  # mypy: arg-type; pyright: reportArgumentType
    timeout("a")  # mypy: arg-type; pyright: reportArgumentType
    with Lock():  # mypy: attr-defined; pyright: reportGeneralTypeIssues
        pass
    async with timeout(3):  # mypy: attr-defined; pyright: reportGeneralTypeIssues
        pass
    print(text)


async def selecting(channel: Channel[int], task: Task[bytes]) -> None:
    await select(3)  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    await select(channel, 3)  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    await select(count("a"))  # mypy: call-overload; pyright: reportArgumentType, reportCallIssue
    text: str
    _, text = await select(channel)  # mypy: arg-type; pyright: reportAssignmentType
    _, text = await select(channel, task)  # mypy: assignment; pyright: reportAssignmentType
    _, text = await select(channel, Deadline(1), task, Event())  # mypy: assignment; pyright: reportAssignmentType
    chosen, _ = await select(channel)
    chosen.result()  # mypy: attr-defined; pyright: reportAttributeAccessIssue, reportUnknownMemberType
    print(text)


# Forgotten awaits


async def forgotten(stream: Stream, channel: Channel[int], lock: Lock) -> None:
    count("a")  # mypy: unused-coroutine; pyright: reportUnusedCoroutine
    sleep(1)  # mypy: unused-awaitable; pyright: -
    stream.read_line()  # mypy: unused-awaitable; pyright: -
    channel.receive()  # mypy: unused-awaitable; pyright: -
    channel.send(3)  # mypy: unused-awaitable; pyright: -
    lock.acquire()  # mypy: unused-awaitable; pyright: -
    Event().wait()  # mypy: unused-awaitable; pyright: -
    Condition().wait()  # mypy: unused-awaitable; pyright: -
    select(channel)  # mypy: unused-awaitable; pyright: -
    in_thread(count_plain, "a")  # mypy: unused-awaitable; pyright: -
    count_decorated("a")  # mypy: unused-awaitable; pyright: -
    stat("data")  # mypy: unused-awaitable; pyright: -
    from_asyncio(count("a"))  # mypy: unused-awaitable; pyright: -
    await from_asyncio(3)  # mypy: arg-type; pyright: reportArgumentType
    line = stream.read_line()
    line.upper()  # mypy: attr-defined; pyright: reportAttributeAccessIssue, reportUnknownMemberType
    stream.write(channel.receive())  # mypy: arg-type, unused-awaitable; pyright: reportArgumentType
    with open_file("data"):  # mypy: attr-defined; pyright: reportGeneralTypeIssues
        pass
