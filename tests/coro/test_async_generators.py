"""Asynchronous generators that are left early run the awaits of their ``finally``."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from tests.coro.support import connected, run, run_for_real
from tests.support import DEADLINE, dispose, frees_at_once
from twisted_rtsig.coro import current_task, in_thread, sleep, spawn, timeout

pytestmark = frees_at_once

variable = contextvars.ContextVar("variable", default="none")


def advance(clock: Clock) -> None:
    for _ in range(5):
        clock.advance(1)


async def numbers(seen: list[Any], clock: Any = None) -> AsyncIterator[int]:
    try:
        for each in range(10):
            yield each
    finally:
        seen.append("begins")
        await sleep(1, clock)
        with timeout(5):
            await sleep(0)
        seen.append(f"ends with {variable.get()}")


def test_leaving_a_loop_closes_its_generator(clock: Clock) -> None:
    seen: list[Any] = []

    async def main() -> None:
        variable.set("that of the task")
        async for _ in numbers(seen):
            break
        seen.append("goes on")
        await sleep(0)
        seen.append("has waited")

    task = spawn(main, reactor=clock)
    advance(clock)
    task.result()
    assert seen == ["goes on", "begins", "has waited", "ends with that of the task"]


@pytest.mark.parametrize("how", ["return", "raise", "cancel"])
def test_the_end_of_the_task_closes_its_generators(
    clock: Clock, how: str, logged: list[Any]
) -> None:
    seen: list[Any] = []

    async def main() -> None:
        async for _ in numbers(seen):
            if how == "return":
                return
            if how == "raise":
                raise KeyError
            await Deferred()

    task = spawn(main, reactor=clock)
    if how == "cancel":
        task.cancel()
    assert task.done
    if how == "raise":
        # The traceback holds the generator.
        with pytest.raises(KeyError):
            task.result()
    del task
    gc.collect()
    advance(clock)
    assert seen == ["begins", "ends with none"]
    assert [each for each in logged if "log_failure" in each] == []


def test_a_generator_freed_outside_of_a_task(clock: Clock) -> None:
    seen: list[Any] = []
    kept: list[Any] = []

    async def main() -> None:
        kept.append(numbers(seen))
        assert await anext_of(kept[0]) == 0

    spawn(main, reactor=clock).result()
    kept.clear()
    # Not in the middle of whatever has dropped it.
    assert seen == []
    advance(clock)
    assert seen == ["begins", "ends with none"]


async def anext_of(generator: Any) -> Any:
    return await generator.__anext__()


def test_a_generator_that_waits_when_its_task_is_freed(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    """Nothing is written about it."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    async def waits() -> AsyncIterator[int]:
        await Deferred()
        yield 1

    async def main() -> None:
        async for _ in waits():
            pass

    spawn(main, reactor=clock)
    gc.collect()
    advance(clock)
    assert unraisable == []
    assert [each for each in logged if "log_failure" in each] == []


def test_a_generator_that_fails_while_it_is_closed(
    clock: Clock, logged: list[Any]
) -> None:
    async def fails() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await sleep(1)
            raise KeyError("why")

    async def main() -> None:
        async for _ in fails():
            break

    spawn(main, reactor=clock).result()
    advance(clock)
    [event] = [each for each in logged if "log_failure" in each]
    assert event["name"].endswith("fails")
    assert isinstance(event["log_failure"].value, KeyError)


def test_a_generator_that_waits_for_nothing_at_its_end(clock: Clock) -> None:
    """As ``stream.lines()``, for example: it is closed without a task."""

    async def main() -> None:
        async for each in letters():
            if each == "b":
                break

    async def letters() -> AsyncIterator[str]:
        for each in "abc":
            yield each

    spawn(main, reactor=clock).result()
    advance(clock)
    assert clock.getDelayedCalls() == []


def test_the_generator_of_a_stream(reactor: Any) -> None:
    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            peer.sendall(b"one\ntwo\nthree\n")
            async for line in stream.lines():
                assert line == b"one"
                break
            assert await stream.read_line() == b"two"

    run(reactor, main)


def test_the_garbage_collector_runs_in_another_thread(reactor: Any) -> None:
    seen: list[Any] = []
    threads: list[int] = []

    async def generator() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            threads.append(threading.get_ident())
            await sleep(0)
            seen.append(current_task().name)

    async def main() -> None:
        kept = [generator()]
        await anext_of(kept[0])
        await in_thread(kept.clear)
        while not seen:
            await sleep(0.001)

    run_for_real(reactor, main)
    assert threads == [threading.get_ident()]
    assert seen[0].endswith("generator")


def test_generators_of_asyncio_are_closed_by_asyncio() -> None:
    """Generators of asyncio's tasks are closed by asyncio, and of ours by tasks."""
    loop = asyncio.new_event_loop()
    reactor: Any = AsyncioSelectorReactor(loop)
    seen: list[str] = []

    async def of_asyncio() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            seen.append("asyncio")

    async def in_asyncio() -> None:
        async for _ in of_asyncio():
            break

    async def main() -> None:
        ours: list[Any] = []
        async for _ in numbers(ours, reactor):
            break
        await Deferred.fromFuture(asyncio.ensure_future(in_asyncio(), loop=loop))
        while len(ours) < 2 or not seen:
            await sleep(0.001)

    try:
        run_for_real(reactor, main)
    finally:
        dispose(reactor)
        loop.close()
    assert seen == ["asyncio"]


def test_a_generator_that_no_task_has_begun(clock: Clock) -> None:
    """It is left to Python, as without this package."""
    seen: list[str] = []

    async def generator() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            seen.append("closed")

    async def no_task() -> None:
        async for _ in generator():
            break
        seen.append("goes on")

    # The hooks are there from the first task on.
    spawn(sleep, 0, reactor=clock)
    Deferred.fromCoroutine(no_task())
    assert seen == ["closed", "goes on"]


def test_tasks_of_another_reactor_meanwhile(clock: Clock) -> None:
    """The reactor of the task that has begun a generator closes it."""
    seen: list[Any] = []
    other = Clock()
    kept: list[Any] = []

    async def main() -> None:
        spawn(sleep, 0, reactor=other)
        kept.append(numbers(seen, clock))
        await anext_of(kept[0])

    spawn(main, reactor=clock).result()
    kept.clear()
    advance(other)
    assert seen == []
    advance(clock)
    assert seen == ["begins", "ends with none"]


def test_another_thread_runs_the_reactor(reactor: Any) -> None:
    """The first task runs before, in this thread."""
    seen: list[Any] = []

    async def main() -> None:
        await sleep(0)
        async for _ in numbers(seen, reactor):
            break
        while len(seen) < 2:
            await sleep(0.001)

    task = spawn(main, reactor=reactor)

    def turn() -> None:
        end = time.monotonic() + DEADLINE
        while not task.done and time.monotonic() < end:
            reactor.iterate(0.001)

    thread = threading.Thread(target=turn)
    thread.start()
    thread.join()
    assert seen == ["begins", "ends with none"]


@pytest.mark.parametrize("in_task", [False, True])
def test_generators_of_asyncio_after_tasks_of_a_clock(
    clock: Clock, in_task: bool
) -> None:
    """They run in a task of asyncio's reactor, or in a callback of its loop."""
    loop = asyncio.new_event_loop()
    reactor: Any = AsyncioSelectorReactor(loop)
    hooks: list[Any] = []
    seen: list[Any] = []

    async def of_clock() -> None:
        async for _ in numbers(seen, clock):
            break

    def look() -> None:
        hooks.append(sys.get_asyncgen_hooks())

    def run_of_clock() -> None:
        spawn(of_clock, reactor=clock).result()
        advance(clock)

    async def main() -> None:
        loop.call_soon(look)
        for _ in range(2):
            if in_task:
                run_of_clock()
            else:
                loop.call_soon(run_of_clock)
            loop.call_soon(look)
            await sleep(0.01)

    spawn(of_clock, reactor=clock).result()
    advance(clock)
    try:
        run_for_real(reactor, main)
    finally:
        dispose(reactor)
        loop.close()
    assert hooks == [hooks[0]] * 3
    assert hooks[0].finalizer.__self__ is loop
    assert seen == ["begins", "ends with none"] * 3


def test_generators_at_the_end_of_the_process() -> None:
    """Nothing is written about a generator that is left then."""
    program = """
        from twisted.internet.task import Clock
        from twisted_rtsig.coro import sleep, spawn

        async def generator():
            try:
                yield 1
            finally:
                await sleep(0)

        async def main():
            async for each in kept:
                break

        kept = generator()
        spawn(main, reactor=Clock())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stderr == ""
