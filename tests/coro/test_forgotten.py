"""The debug mode that warns of awaits that were forgotten."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    gatherResults,
    inlineCallbacks,
)
from twisted.internet.task import Clock

from tests.coro.support import STYLES, connected, run_for_real
from tests.support import frees_at_once
from twisted_rtsig import coro, files
from twisted_rtsig.coro import (
    CapacityLimiter,
    Channel,
    Condition,
    Deadline,
    EndOfChannel,
    Event,
    Lock,
    Semaphore,
    Stream,
    UnawaitedWarning,
    coroutine,
    current_task,
    get_debug,
    in_thread,
    open_datagrams,
    open_process,
    run_group,
    select,
    set_debug,
    sleep,
    spawn,
    symmetric,
    timeout,
    transfer,
)
from twisted_rtsig.coro.testing import stream_pair

pytestmark = frees_at_once

# Functions that start their work when they are called, and need not be awaited.
MAY_BE_LEFT = {
    *("Stream.write", "Stream.write_eof", "Stream.send_file", "Stream.start_tls"),
    *("Stream.close", "Stream.abort", "Channel.send", "ChannelSender.send"),
    *("DatagramSocket.send_to", "DatagramSocket.close"),
    *("AsyncFile.write", "AsyncFile.write_at", "AsyncFile.close"),
    # These are carried out one after the other, in the order of the calls.
    *("AsyncFile.seek", "AsyncFile.truncate"),
    *("AsyncTextFile.write", "AsyncTextFile.seek", "AsyncTextFile.truncate"),
    *("AsyncTextFile.close", "TemporaryFile.close", "NamedTemporaryFile.close"),
    *("SpooledTemporaryFile.close", "TemporaryDirectory.cleanup", "Process.stop"),
    *("StapledStream.close", "StapledStream.abort", "Portal.stop"),
    # These take effect without a wait.
    *("serve", "connect", "Server.stop", "CoroutineFactory.stop"),
    "CoroutineService.stopService",
    *("Task.as_deferred", "FileProducer.start", "FileProducer.startProducing"),
}


@pytest.fixture(autouse=True)
def debug(debug_as_before: None) -> None:
    set_debug(True)


def warned(function: Callable[[], Any]) -> list[str]:
    """The calls in this file that a warning was shown for, each with its code line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # open_file() without await leaves a file open, which is warned of as well.
        warnings.simplefilter("ignore", ResourceWarning)
        function()
        gc.collect()
    lines = inspect.getsource(sys.modules[__name__]).splitlines()
    found = []
    for each in caught:
        assert each.category is UnawaitedWarning
        assert each.filename == __file__
        call = str(each.message).partition(" was never awaited")[0]
        found.append(f"{call}: {lines[each.lineno - 1].strip()}")
    return found


# Calls that warn


def test_tasks_and_time(clock: Clock) -> None:
    def other(value: Any) -> None:
        pass

    async def block(group: Any) -> None:
        pass

    async def main() -> None:
        sleep(0)
        sleep(1)
        transfer(symmetric(other))
        run_group(block)
        await sleep(2)

    def generator() -> Generator[Any, Any, None]:
        sleep(0)
        sleep(1)
        transfer(symmetric(other))
        run_group(block)
        yield sleep(2)

    for function in (main, generator):

        def runs(function: Callable[[], Any] = function) -> None:
            task = spawn(function, reactor=clock)
            clock.pump([1, 1, 1])
            task.result()

        assert sorted(warned(runs)) == [
            "run_group(): run_group(block)",
            "sleep(): sleep(0)",
            "sleep(): sleep(1)",
            "transfer(): transfer(symmetric(other))",
        ]


async def _leaves_out_awaits_of_channels_and_locks() -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    channel.receive()
    channel.receive()
    select(channel, Event())
    select(channel, Deadline(0))
    lock, semaphore, event = Lock(), Semaphore(1), Event()
    lock.acquire()
    lock.acquire()
    semaphore.acquire()
    event.wait()
    event.set()
    event.wait()
    condition = Condition()
    await condition.lock.acquire()
    condition.wait_for(lambda: True)
    condition.wait()
    await condition.lock.acquire()
    condition.notify()
    condition.lock.release()
    # The wait above has acquired the lock again.
    condition.wait_for(lambda: False)


def test_channels_locks_and_select(clock: Clock) -> None:
    main = _leaves_out_awaits_of_channels_and_locks
    assert sorted(warned(lambda: spawn(main, reactor=clock))) == [
        "Channel.receive(): channel.receive()",
        "Channel.receive(): channel.receive()",
        "Condition.wait(): condition.wait()",
        "Condition.wait_for(): condition.wait_for(lambda: False)",
        "Condition.wait_for(): condition.wait_for(lambda: True)",
        "Event.wait(): event.wait()",
        "Event.wait(): event.wait()",
        "Lock.acquire(): lock.acquire()",
        "Lock.acquire(): lock.acquire()",
        "Semaphore.acquire(): semaphore.acquire()",
        "select(): select(channel, Deadline(0))",
        "select(): select(channel, Event())",
    ]


def test_reads(clock: Clock) -> None:
    async def main() -> None:
        one, other = stream_pair()
        await other.write(b"a line\nthe rest of it 1\nmore")
        await sleep(1)
        one.read_line()
        one.read_until(b"\n")
        one.peek()
        one.read_exactly(1)
        one.read_until_regex(rb"o")
        one.read()
        one.read()
        await other.write(b"what is lost")
        await sleep(1)
        one.read_line()
        await other.close()
        await sleep(1)
        one.read_line()

    def runs() -> None:
        task = spawn(main, reactor=clock)
        clock.pump([1] * 10)
        task.result()

    assert sorted(warned(runs)) == [
        "Stream.peek(): one.peek()",
        "Stream.read(): one.read()",
        "Stream.read(): one.read()",
        "Stream.read_exactly(): one.read_exactly(1)",
        "Stream.read_line(): one.read_line()",
        "Stream.read_line(): one.read_line()",
        "Stream.read_line(): one.read_line()",
        'Stream.read_until(): one.read_until(b"\\n")',
        'Stream.read_until_regex(): one.read_until_regex(rb"o")',
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="the program is one of POSIX")
def test_threads_processes_and_connections(reactor: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_bytes(b"text\n")

    async def main() -> None:
        in_thread(len, "a")
        files.stat(tmp_path)
        files.listdir(tmp_path)
        files.open_file(tmp_path / "file")
        async with await files.open_file(tmp_path / "file", "r+b") as file:
            file.read(1)
            file.read_at(0, 1)
            file.read_line()
            file.size()
            await file.sync()
            file.sync()
        async with open_process(["true"]) as process:
            process.wait()
            await process.wait()
            process.wait()
        async with open_datagrams(interface="127.0.0.1") as datagrams:
            datagrams.receive_from()
            await datagrams.send_to(b"x", (datagrams.host.host, datagrams.host.port))
            with timeout(1):
                while datagrams._receiver is not None:
                    await sleep(0.001)
        files.write_file(tmp_path / "other", b"")
        await files.write_file(tmp_path / "new", b"")
        files.rename(tmp_path / "new", tmp_path / "newer")
        await in_thread(wait_for_file, tmp_path / "newer")
        files.remove(tmp_path / "newer")
        # Let the results of all threads arrive: wait for the threads, and then for one
        # more call.
        while reactor.getThreadPool().working:
            await sleep(0.001)
        await in_thread(len, "")

    found = warned(lambda: run_for_real(reactor, main))
    assert sorted(each.partition("(")[0] for each in found) == [
        *("AsyncFile.read", "AsyncFile.read_at", "AsyncFile.read_line"),
        *("AsyncFile.size", "AsyncFile.sync"),
        "DatagramSocket.receive_from",
        *("Process.wait", "Process.wait"),
        *("in_thread", "listdir", "open_file", "remove", "rename", "stat"),
        "write_file",
    ]


def wait_for_file(path: Any) -> None:
    while not path.exists():
        pass


def test_unawaited_operations_that_fail(clock: Clock) -> None:
    """They warn, and an operation that is awaited still raises its error."""
    errors: list[Any] = []

    async def main() -> None:
        channel: Channel[int] = Channel(0)
        channel.receive()
        channel.close()
        channel.receive()
        late = channel.receive()
        try:
            await late
        except EndOfChannel as error:
            errors.append(type(error))

    assert warned(lambda: spawn(main, reactor=clock)) == [
        "Channel.receive(): channel.receive()",
        "Channel.receive(): channel.receive()",
    ]
    assert errors == [EndOfChannel]


def test_each_line_is_shown_once(clock: Clock) -> None:
    async def main() -> None:
        for _ in range(3):
            sleep(0)
        await sleep(0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UnawaitedWarning)
        for _ in range(2):
            spawn(main, reactor=clock)
            clock.advance(0)
        gc.collect()
    assert len(caught) == 1
    assert "sleep() was never awaited: write await before the call" in str(
        caught[0].message
    )


# Calls that do not warn


async def _uses(stream: Stream, other: Stream) -> None:
    await other.write(b"\n" * 40)
    reading = stream.read_line()
    await sleep(0)
    assert await reading == b""
    reading = stream.read_line()
    # To look at an operation, or to wait for it again, is harmless.
    assert reading.called
    assert "Finished" in repr(reading)
    assert [await reading, await reading] == [b"", b""]
    got: list[Any] = []
    stream.read_line().addCallback(got.append)
    stream.read_line().addCallbacks(got.append, got.append)
    stream.read_line().addBoth(got.append)
    stream.read_line().addErrback(got.append)
    assert got == [b"", b"", b""]
    # Callbacks that return finished operations, and operations that finish later.
    assert await sleep(0).addCallback(lambda _: stream.read_line()) == b""
    assert await sleep(0).addCallback(lambda _: stream.read_exactly(0)) == b""
    clock = current_task().reactor
    await sleep(0).addCallback(lambda _: sleep(0, clock))
    assert await gatherResults([stream.read_line(), stream.read_line()]) == [b"", b""]
    assert await select(reading, Event()) == (reading, b"")
    waiting = stream.read_exactly(100)
    assert (await select(waiting, Deadline(0)))[1] is None
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting
    lock, condition, event = Lock(), Condition(), Event()
    async with lock, condition:
        await condition.wait_for(lambda: True)
    event.wait().cancel()
    event.set()
    with timeout(1):
        await event.wait()
    channel: Channel[int] = Channel(1)
    channel.send(1)
    async for value in channel:
        assert value == 1
        channel.close()
    with pytest.raises(EndOfChannel):
        await channel.receive()
    assert await spawn(stream.read_line) == b""
    assert await spawn(stream.read_line).as_deferred() == b""
    assert await spawn(lambda: stream.read_line()) == b""
    await _inline(stream)
    await coroutine(_generator)(stream)
    await spawn(_generator, stream)
    await Deferred.fromCoroutine(_plainly(stream))
    await spawn(_transfers)
    await spawn(_transfers_in_generator)
    async for _ in stream.lines(until=event):
        pass
    # These do their work without a wait.
    stream.write(b"x")
    stream.close()


async def _plainly(stream: Stream) -> None:
    assert await stream.read_line() == b""
    await sleep(0)


def _generator(stream: Stream) -> Generator[Any, Any, None]:
    assert (yield stream.read_line()) == b""
    assert (yield from stream.read_line()) == b""
    reading = stream.read_line()
    yield sleep(0)
    assert (yield reading) == b""
    event = Event()
    event.set()
    yield event.wait()
    lock = Lock()
    yield lock.acquire()
    waiting = lock.acquire()
    lock.release()
    yield waiting
    condition = Condition()
    yield condition.lock.acquire()
    yield condition.wait_for(lambda: True)
    channel: Channel[int] = Channel(1)
    channel.close()
    with pytest.raises(EndOfChannel):
        yield channel.receive()


_inline = inlineCallbacks(_generator)


async def _transfers() -> None:
    async def answer(value: str) -> str:
        return f"{value}!"

    assert await transfer(symmetric(answer), "hello") == "hello!"


def _transfers_in_generator() -> Generator[Any, Any, None]:
    async def answer(value: str) -> str:
        return f"{value}!"

    assert (yield transfer(symmetric(answer), "hello")) == "hello!"
    assert (yield from transfer(symmetric(answer), "hello")) == "hello!"


def test_used_operations_do_not_warn(clock: Clock) -> None:
    def runs() -> None:
        task = spawn(_uses, *stream_pair(reactor=clock), reactor=clock)
        clock.pump([0.1] * 40)
        task.result()

    assert warned(runs) == []


@pytest.mark.parametrize("style", STYLES)
def test_used_operations_do_not_warn_in_each_style(reactor: Any, style: str) -> None:
    got: list[Any] = []

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"one\ntwo\n")
            event, channel = Event(), Channel[int](1)
            steps: list[Callable[[], Any]] = [
                stream.read_line,
                stream.read_line,
                event.wait,
                channel.receive,
                lambda: select(channel, event),
                lambda: sleep(0.001),
                lambda: in_thread(len, "abc"),
                # These wait for other operations within this package.
                lambda: CapacityLimiter(1).in_thread(len, "abc"),
                lambda: spawn(_leave_a_process).as_deferred(),
            ]
            STYLES[style](reactor, steps, got)
            await sleep(0.01)
            event.set()
            await channel.send(7)
            while len(got) < len(steps):
                await sleep(0.001)

    assert warned(lambda: run_for_real(reactor, main)) == []
    assert got[:4] == [b"one", b"two", None, 7]
    assert got[5:] == [None, 3, 3, None]


async def _leave_a_process() -> None:
    with contextlib.suppress(KeyError):
        async with open_process(["cat"]):
            raise KeyError


@pytest.mark.parametrize("late", ["cancel", "succeed", "fail", "addBoth"])
def test_a_method_that_was_looked_up_before_the_operation_was_used(
    clock: Clock, late: str
) -> None:
    """A timer may hold such a method: ``operation.cancel``, for example."""
    arguments: dict[str, list[Any]] = {
        "cancel": [],
        "succeed": [3],
        "fail": [KeyError("late")],
        "addBoth": [lambda result: result],
    }

    async def main(method: list[Any]) -> Any:
        reading: Any = Channel[int](0).receive()
        method.append(getattr(reading, late))
        return await reading

    def runs() -> None:
        method: list[Any] = []
        task = spawn(main, method, reactor=clock)
        assert method[0](*arguments[late]) is not NotImplemented
        ended = {"cancel": CancelledError, "fail": KeyError}.get(late)
        if ended is not None:
            with pytest.raises(ended):
                task.result()
        elif late == "addBoth":
            task.cancel()
        else:
            assert task.result() == 3

    assert warned(runs) == []


def test_a_transfer_outside_of_a_task(clock: Clock) -> None:
    other = symmetric(lambda value: None, reactor=clock)
    errors: list[Any] = []

    def runs() -> None:
        STYLES["@inlineCallbacks"](clock, [lambda: transfer(other)], errors)
        STYLES["fromCoroutine"](clock, [lambda: transfer(other)], errors)

    assert warned(runs) == []
    assert errors == [coro.NoTaskError, coro.NoTaskError]


def test_a_cancelled_wait_does_not_warn(clock: Clock) -> None:
    lock = Lock()
    lock.try_acquire()

    def generator() -> Generator[Any, Any, None]:
        yield lock.acquire()

    async def main() -> None:
        await lock.acquire()

    def runs() -> None:
        for function in (generator, main):
            task = spawn(function, reactor=clock)
            task.cancel()
            assert task.cancelled
        assert "0 wait" in repr(lock)

    assert warned(runs) == []


# The mode itself


def _functions() -> Iterator[tuple[str, types.FunctionType]]:
    for module in (coro, files):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield name, value
            elif inspect.isclass(value):
                for own in dir(value):
                    function = inspect.getattr_static(value, own)
                    if (
                        inspect.isfunction(function)
                        and not own.startswith("_")
                        and function.__module__.startswith("twisted_rtsig.")
                    ):
                        yield f"{name}.{own}", function


def test_every_function_is_tested_here() -> None:
    """A function that returns an operation is decorated, or is in MAY_BE_LEFT."""
    decorated = set()
    for name, function in _functions():
        returned = str(function.__annotations__.get("return"))
        if re.match(r"(Operation|Deferred)\b", returned):
            if hasattr(function, "__wrapped__"):
                decorated.add(name)
            else:
                assert name in MAY_BE_LEFT, f"decorate {name} with @must_be_awaited"
    assert not decorated & MAY_BE_LEFT
    assert {"sleep", "Stream.read_line", "Semaphore.acquire"} <= decorated


def test_debug_mode_off_leaves_no_trace(clock: Clock) -> None:
    set_debug(False)
    assert not get_debug()
    functions = dict(_functions())
    before = {
        name: (each.__code__, each.__defaults__, each.__kwdefaults__, vars(each).copy())
        for name, each in functions.items()
    }
    wait_for = coro.Task._wait_for
    signature = inspect.signature(Stream.read_line)
    set_debug(True)
    set_debug(True)
    assert get_debug()
    assert inspect.signature(Stream.read_line) == signature
    assert Stream.read_line.__doc__
    set_debug(False)
    after = {
        name: (each.__code__, each.__defaults__, each.__kwdefaults__, vars(each).copy())
        for name, each in functions.items()
    }
    assert before == after
    assert coro.Task._wait_for is wait_for

    async def main() -> None:
        sleep(0)

    assert warned(lambda: spawn(main, reactor=clock)) == []


def test_operations_begun_before_debug_mode_is_turned_off(clock: Clock) -> None:
    lock = Lock()
    first, second = lock.acquire(), lock.acquire()
    set_debug(False)

    def generator() -> Generator[Any, Any, None]:
        yield first
        lock.release()
        yield second

    def runs() -> None:
        spawn(generator, reactor=clock).result()

    assert warned(runs) == []


PROGRAM = """
from twisted.internet.task import Clock
from twisted_rtsig.coro import get_debug, sleep
clock = Clock()
sleep(1, clock)
del clock
import gc; gc.collect()
print(get_debug())
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("value", "options", "on"),
    [
        (None, [], False),
        ("1", [], True),
        ("0", [], False),
        ("", [], False),
        (None, ["-X", "dev"], True),
        ("0", ["-X", "dev"], False),
        ("1", ["-E"], False),
    ],
)
def test_the_environment_turns_debug_mode_on(
    tmp_path: Any, value: str | None, options: list[str], on: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TWISTED_RTSIG_DEBUG"}
    if value is not None:
        environment["TWISTED_RTSIG_DEBUG"] = value
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ran = subprocess.run(
        [sys.executable, *options, str(program)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == f"{on}\n", ran.stderr
    warning = f"{program}:5: UnawaitedWarning: sleep() was never awaited"
    assert (warning in ran.stderr) == on
