"""The list of tasks: their names, where each task is, and what it waits for."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, globalLogPublisher
from zope.interface import provider

from tests.coro.support import connected, run, run_for_real, spin
from tests.support import DEADLINE, frees_at_once
from twisted_rtsig.coro import (
    Channel,
    Event,
    Task,
    TaskGroup,
    current_task,
    format_tasks,
    log_tasks_on_signal,
    sleep,
    spawn,
    statistics,
    symmetric,
    transfer,
    watch_for_blocking,
)
from twisted_rtsig.coro.inspection import tasks_of


@pytest.fixture(autouse=True)
def no_other_tasks() -> None:
    """Collects tasks of earlier tests that only a reference cycle keeps."""
    gc.collect()


HERE = __file__


def test_format_tasks_without_tasks(clock: Clock) -> None:
    assert format_tasks(clock) == "There are no tasks."


def test_format_tasks_prints_a_tree(clock: Clock) -> None:
    stop = Event()

    async def inner() -> None:
        await stop.wait()

    async def child(number: int) -> None:
        await inner()

    def generator() -> Generator[Any, Any, None]:
        yield from nested()

    def nested() -> Generator[Any, Any, None]:
        yield stop.wait()

    async def main() -> None:
        async with TaskGroup() as group:
            group.spawn(child, 1, name="first")
            group.spawn(generator, name="second")

    task = spawn(main, name="main", reactor=clock)
    lines = format_tasks(clock).splitlines()
    assert [line.split(": ")[0] for line in lines if "waits for" in line] == [
        "main",
        "    first",
        "    second",
    ]
    waits = f"s, waits for {stop!r}"
    assert waits in lines[2]
    assert lines[3].startswith(f"        at {HERE}:")
    assert lines[3].endswith(" in child: await inner()")
    assert lines[4].endswith(" in inner: await stop.wait()")
    assert waits in lines[5]
    assert lines[6].endswith(" in generator: yield from nested()")
    assert lines[7].endswith(" in nested: yield stop.wait()")
    assert len(lines) == 8
    stop.set()
    assert task.done
    assert format_tasks(clock) == "There are no tasks."


def test_an_object_whose_repr_raises() -> None:
    """An error of a ``__repr__`` does not hide the other tasks."""

    class Mute(Deferred[None]):
        def __repr__(self) -> str:
            raise ZeroDivisionError("says nothing")

    clock = Clock()
    waiting: list[Deferred[Any]] = [Mute(), Deferred()]

    async def wait(deferred: Deferred[Any]) -> None:
        await deferred

    tasks = [spawn(wait, each, reactor=clock) for each in waiting]
    text = format_tasks(clock)
    assert "waits for what cannot be described (ZeroDivisionError: says" in text
    assert f"waits for {waiting[1]!r}" in text
    assert text.count("in wait: await deferred") == 2
    for each in waiting:
        each.callback(None)
    assert all(task.done for task in tasks)


def test_format_tasks_says_what_each_task_waits_for(reactor: Any) -> None:
    channel: Channel[int] = Channel(0)
    never: Deferred[None] = Deferred()

    async def main() -> str:
        async with connected(reactor) as (stream, _peer):

            async def full() -> None:
                while True:
                    await stream.write(bytes(1 << 16))

            async def handed_over(value: Any) -> None:
                await transfer(parked)

            async def parks(value: Any) -> None:
                await transfer(current_task())

            parked = symmetric(parks)
            functions: dict[str, Callable[[], Any]] = {
                "line": stream.read_line,
                "full": full,
                "receive": channel.receive,
                "sleep": lambda: sleep(100),
                "deferred": lambda: never,
            }
            async with TaskGroup() as group:
                for name, function in functions.items():
                    group.spawn(function, name=name)
                group.spawn(lambda: group_task, name="task")
                group_task: Task[None] = group.spawn(sleep, 50, name="slept")
                unstarted = symmetric(handed_over, name="unstarted")
                await sleep(0)
                text = format_tasks(reactor)
                assert not unstarted.done
                group.cancel()
            return text

    text = run(reactor, main)
    waiting = {
        line.split(": ")[0].strip(): line.split(" s, ", 1)[1]
        for line in text.splitlines()
        if " s, " in line
    }
    assert waiting["line"].startswith("waits for a line from <Stream to IPv4Address(")
    assert waiting["full"].startswith("waits for room to write to <Stream to")
    assert waiting["receive"].startswith("waits for a value from <Channel at ")
    assert "more seconds of sleep" in waiting["sleep"]
    assert waiting["deferred"].startswith("waits for <Deferred at ")
    assert waiting["task"] == "waits for the end of <Task slept: active>"
    assert waiting["unstarted"] == "waits for its first transfer"
    assert (
        waiting["test_format_tasks_says_what_each_task_waits_for.<locals>.main"]
        == "runs"
    )


def test_format_tasks_in_a_task(clock: Clock) -> None:
    def look() -> str:
        return format_tasks(clock)

    async def main() -> str:
        return look()

    lines = spawn(main, name="main", reactor=clock).result().splitlines()
    assert re.fullmatch(r"main: \d\.\d s, runs", lines[0])
    assert lines[1].endswith(" in main: return look()")
    assert lines[2].endswith(" in look: return format_tasks(clock)")
    assert len(lines) == 3


def test_a_long_chain_of_tasks(clock: Clock) -> None:
    stop = Event()

    async def link(left: int) -> None:
        if left:
            spawn(link, left - 1)
        await stop.wait()

    spawn(link, 2000, reactor=clock)
    clock.advance(0)
    lines = format_tasks(clock).splitlines()
    assert len(lines) == 2 * 2001
    assert lines[-2].startswith("    " * 2000)
    stop.set()


def messages(logged: list[Any]) -> list[str]:
    return [event["log_format"].format(**event) for event in logged]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="needs SIGUSR2")
@pytest.mark.parametrize("holding_up", [False, True])
def test_tasks_are_logged_on_a_signal(
    reactor: Any, logged: list[Any], holding_up: bool
) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    log_tasks_on_signal()

    def tasks() -> list[str]:
        return [each for each in messages(logged) if each.startswith("Tasks:")]

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        while not tasks():
            if not holding_up:
                await sleep(0.01)

    try:
        run_for_real(reactor, main)
    finally:
        signal.signal(signal.SIGUSR2, before)
    (text,) = tasks()
    assert "test_tasks_are_logged_on_a_signal.<locals>.main: " in text
    assert f"{HERE}:" in text


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="needs SIGUSR2")
def test_the_handler_of_the_signal_does_not_log() -> None:
    """The main thread may be taking the lock of a log file, which it would wait for."""
    threads: list[int] = []
    happened = threading.Event()

    @provider(ILogObserver)
    def observe(event: Any) -> None:
        threads.append(threading.get_ident())
        happened.set()

    before = signal.getsignal(signal.SIGUSR2)
    log_tasks_on_signal()
    globalLogPublisher.addObserver(observe)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert happened.wait(DEADLINE)
    finally:
        globalLogPublisher.removeObserver(observe)
        signal.signal(signal.SIGUSR2, before)
    assert threading.get_ident() not in threads


def test_log_tasks_on_signal_without_the_signal_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(signal, "SIGUSR2", raising=False)
    with pytest.raises(RuntimeError, match="no SIGUSR2: call"):
        log_tasks_on_signal()


def test_format_tasks_in_a_manhole(clock: Clock) -> None:
    from twisted.conch.manhole import ManholeInterpreter

    shown: list[bytes] = []

    class Handler:
        namespace: dict[str, Any]

        def addOutput(self, data: bytes, asynchronous: bool = False) -> None:
            shown.append(data)

    async def main() -> None:
        await sleep(1)

    spawn(main, name="a task", reactor=clock)
    names = {"format_tasks": format_tasks, "clock": clock}
    interpreter = ManholeInterpreter(Handler(), names)
    interpreter.push(b"print(format_tasks(clock))")
    assert re.match(
        r"a task: \d\.\d s, waits for 1\.0 more seconds of sleep\n", str(shown[0])
    )


# Tasks that block the reactor


def test_a_blocking_task_is_named(reactor: Any, logged: list[Any]) -> None:
    def told() -> list[str]:
        # On a busy machine other tasks are reported as well.
        return [each for each in messages(logged) if " in hold_up: " in each]

    async def hold_up() -> None:
        while not told():
            pass

    async def main() -> None:
        watch = watch_for_blocking(0.05)
        await sleep(0.01)
        await spawn(hold_up, name="the culprit")
        watch.stop()
        watch.stop()

    run(reactor, main)
    assert told()[0].startswith("Task the culprit has blocked the reactor for")
    spin(reactor, lambda: all(each.name != "blocking tasks" for each in threads()))


def test_a_blocking_callback_is_reported(reactor: Any, logged: list[Any]) -> None:
    told: list[str] = []

    def hold_up() -> None:
        # On a busy machine other tasks are reported as well.
        while not told:
            told[:] = [each for each in messages(logged) if " in hold_up: " in each]

    watch = watch_for_blocking(0.05, reactor)
    reactor.callLater(0.01, hold_up)
    spin(reactor, lambda: told)
    watch.stop()
    assert told[0].startswith("Code outside of tasks has blocked the reactor")


def threads() -> list[threading.Thread]:
    return threading.enumerate()


def test_watch_for_blocking_refuses_zero_seconds(clock: Clock) -> None:
    with pytest.raises(ValueError, match="must be more"):
        watch_for_blocking(0, clock)


def test_the_watch_stops_with_the_reactor(reactor: Any) -> None:
    async def main() -> None:
        watch_for_blocking(60)

    run_for_real(reactor, main)
    assert not [
        call for call in reactor.getDelayedCalls() if "watch" in repr(call.func)
    ]
    assert sys.modules["twisted.internet.reactor"] is reactor


# How tasks are found


@frees_at_once
def test_frozen_tasks_are_found(clock: Clock) -> None:
    stop = Event()
    task = spawn(stop.wait, name="frozen", reactor=clock)
    gc.collect()
    gc.freeze()
    try:
        assert format_tasks(clock).startswith("frozen: ")
        assert "frozen: " in format_tasks()
    finally:
        gc.unfreeze()
        # As tests/conftest.py has it.
        gc.freeze()
    stop.set()
    assert task.done


def test_tasks_are_found_without_a_search_of_the_heap(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("get_objects", "get_referrers"):
        monkeypatch.delattr(gc, name)
    stop = Event()
    task = spawn(stop.wait, name="a task", reactor=clock)
    assert format_tasks(clock).startswith("a task: ")
    stop.set()
    assert task.done


@frees_at_once
def test_a_task_that_can_never_be_resumed_is_collected(clock: Clock) -> None:
    """The list of tasks keeps no task alive."""
    ends: list[str] = []

    async def wait() -> None:
        try:
            await Event().wait()
        finally:
            ends.append("collected")

    spawn(wait, name="lost", reactor=clock)
    gc.collect()
    assert ends == ["collected"]
    assert format_tasks(clock) == "There are no tasks."


def test_the_remaining_tasks_of_many_are_found(clock: Clock) -> None:
    """They are found in order, however many tasks have ended."""
    stop = Event()

    async def main() -> list[Any]:
        kept = []
        for number in range(5000):
            if number % 1000 == 0:
                kept.append(spawn(stop.wait, name=f"task {number}"))
            await spawn(sleep, 0)
        return kept

    task = spawn(main, reactor=clock)
    while not task.done:
        clock.advance(0)
    names = [line.split(": ")[0] for line in format_tasks(clock).splitlines()]
    expected = [f"task {number}" for number in range(0, 5000, 1000)]
    assert [each for each in names if each.startswith("task ")] == expected
    stop.set()


@pytest.mark.parametrize("reference_cycles", ["are collected", "are not collected"])
def test_many_tasks_of_every_kind_are_found(
    clock: Clock, reference_cycles: str
) -> None:
    """They are found in order, however many tasks have ended meanwhile."""
    stop, other_stop, deferreds = Event(), Event(), []
    channel: Channel[int] = Channel(0)

    async def wait_for_deferred() -> None:
        deferreds.append(Deferred[None]())
        await deferreds[-1]

    async def wait_for_task() -> None:
        await spawned[0]

    def generator() -> Generator[Any, Any, None]:
        yield stop.wait()

    async def transfers(value: Any) -> None:
        await transfer(one)

    waits: list[Callable[[str], Task[Any]]] = [
        lambda name: spawn(stop.wait, name=name, reactor=clock),
        lambda name: spawn(sleep, 1, name=name, reactor=clock),
        lambda name: spawn(channel.receive, name=name, reactor=clock),
        lambda name: spawn(generator, name=name, reactor=clock),
        lambda name: spawn(wait_for_deferred, name=name, reactor=clock),
        lambda name: spawn(wait_for_task, name=name, reactor=clock),
        lambda name: symmetric(transfers, name=name, reactor=clock),
        *[lambda name: spawn(other_stop.wait, name=name, reactor=clock)] * 8,
    ]
    spawned: list[Task[Any]] = []
    if reference_cycles == "are not collected":
        gc.disable()
    try:
        for number in range(9_000):
            spawned.append(waits[number % len(waits)](f"task {number}"))
        one = symmetric(transfers, name="one", reactor=clock)
        assert set(tasks_of(clock)) == {*spawned, one}
        # Some tasks end, and are still referenced; others are freed.
        other_stop.set()
        assert sum(not each.done for each in spawned) == 9_000 * 7 // 15
        del spawned[1:2_000]
        expected = [each.name for each in spawned if not each.done]
        assert tasks_of(clock) >= {each for each in spawned if not each.done}
        # More tasks, so that the ended ones are dropped from the lists again.
        for number in range(9_000, 15_000):
            spawned.append(waits[0](f"task {number}"))
        text = format_tasks(clock)
        names = re.findall(r"^(task \d+): ", text, re.MULTILINE)
        expected += [f"task {number}" for number in range(9_000, 15_000)]
        found = iter(names)
        assert all(each in found for each in expected)
        assert len(names) == len({*names}) == statistics(clock).tasks.active - 1
    finally:
        gc.enable()
        stop.set()
        channel.close()
        for deferred in deferreds:
            deferred.callback(None)
        clock.advance(1)
        for each in [*spawned, one]:
            each.cancel()
            each.as_deferred().addErrback(lambda failure: None)


@pytest.mark.parametrize("name", ["a name", None])
def test_a_task_that_is_renamed(clock: Clock, name: str | None) -> None:
    """Tasks of one name that are spawned one after the other share that string."""
    stop = Event()
    first, second = (spawn(stop.wait, name=name, reactor=clock) for _ in range(2))
    before = second.name
    first.name = "another name"
    names = [line.split(": ")[0] for line in format_tasks(clock).splitlines()]
    assert [each for each in names if not each.startswith("    ")] == [
        "another name",
        before,
    ]
    stop.set()


def test_tasks_of_one_name_in_all_styles(clock: Clock) -> None:
    stop = Event()

    def generator() -> Generator[Any, Any, None]:
        yield stop.wait()

    async def transferred(value: Any) -> None:
        await stop.wait()

    def transferred_generator(value: Any) -> Generator[Any, Any, None]:
        yield stop.wait()

    tasks: list[Task[None]] = []
    for _ in range(2):
        tasks.append(spawn(stop.wait, name="task", reactor=clock))
        tasks.append(spawn(generator, name="task", reactor=clock))
        for function in (transferred, transferred_generator):
            tasks.append(symmetric(function, name="task", reactor=clock))
            spawn(transfer_to, tasks[-1], name="task", reactor=clock)
    stop.set()
    for each in tasks:
        assert each.result() is None


async def transfer_to(task: Task[None]) -> None:
    await transfer(task)


def test_tasks_of_one_name_below_the_tasks_that_spawned_them(clock: Clock) -> None:
    """They are spawned alternately by two tasks and outside of all tasks."""
    stop, go = Event(), Event()

    async def spawner() -> None:
        for _ in range(3):
            await go.wait()
            spawn(stop.wait, name="child")
            await sleep(0)
        await stop.wait()

    spawn(spawner, name="first", reactor=clock)
    spawn(spawner, name="second", reactor=clock)
    go.set()
    for _ in range(3):
        clock.advance(0)
        spawn(stop.wait, name="child", reactor=clock)
    lines = format_tasks(clock).splitlines()
    tree = [line.split(":")[0] for line in lines if not line.lstrip().startswith("at ")]
    children = ["    child"] * 3
    expected = ["first", *children, "second", *children, "child", "child", "child"]
    assert tree == expected
    stop.set()


def test_a_waiting_task_takes_little_memory(tracemalloc: Any, clock: Clock) -> None:
    """A group finds its tasks without an object for each."""
    count = 1_000
    stop = Event()

    async def wait() -> None:
        await stop.wait()

    async def alone() -> None:
        for _ in range(count):
            spawn(wait)
        await sleep(0)

    async def grouped() -> None:
        async with TaskGroup() as group:
            for _ in range(count):
                group.spawn(wait)

    def memory_of_each(main: Any) -> float:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        spawn(main, reactor=clock)
        clock.advance(0)
        clock.advance(0)
        grown: int = tracemalloc.get_traced_memory()[0] - before
        return grown / count

    tracemalloc.start()
    try:
        memory = memory_of_each(alone)
        in_group = memory_of_each(grouped)
    finally:
        tracemalloc.stop()
    task = spawn(stop.wait, reactor=clock)
    assert sys.getsizeof(task) <= 128
    # The entry of a dictionary, which takes up to 100 bytes in small ones.
    assert in_group - memory < 110
    stop.set()


def test_ended_tasks_take_no_memory(tracemalloc: Any, clock: Clock) -> None:
    async def nothing() -> None:
        pass

    async def main() -> list[int]:
        grown = []
        for _ in range(2):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(100):
                for _ in range(100):
                    spawn(nothing)
                await sleep(0)
            grown.append(tracemalloc.get_traced_memory()[0] - before)
        return grown

    tracemalloc.start()
    try:
        task = spawn(main, reactor=clock)
        while not task.done:
            clock.advance(0)
    finally:
        tracemalloc.stop()
    # Of 10,000 tasks, only references to the last few hundreds are kept.
    assert max(task.result()) < 200_000
