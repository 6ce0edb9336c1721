"""Portals: tasks that other threads start."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from tests.coro.support import (
    INSTALLS,
    WAITS_FOR_EVER,
    ExpectedError,
    failures,
    installs,
    listen,
    output_of,
    run_for_real,
    running,
)
from tests.support import DEADLINE
from twisted_rtsig.coro import (
    TASK_STATUS_IGNORED,
    Event,
    Portal,
    Stream,
    Task,
    TaskStatus,
    current_task,
    from_thread,
    in_thread,
    open_tcp,
    sleep,
    spawn,
)
from twisted_rtsig.coro.portals import calls_of


async def in_other_thread(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns or raises in a thread that knows no reactor."""
    done: Deferred[Any] = Deferred()
    from twisted.internet import reactor as installed

    reactor: Any = installed

    def work() -> None:
        try:
            result = function(*args)
        except BaseException as error:
            reactor.callFromThread(done.errback, error)
        else:
            reactor.callFromThread(done.callback, result)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return await done
    finally:
        # It may still have to wake the reactor up.
        thread.join()


async def doubled(number: int) -> tuple[int, int]:
    await sleep(0)
    return number * 2, threading.get_ident()


def doubled_by_generator(number: int) -> Generator[Any, Any, tuple[int, int]]:
    yield sleep(0)
    return number * 2, threading.get_ident()


def doubled_at_once(number: int) -> tuple[int, int]:
    return number * 2, threading.get_ident()


async def fails() -> None:
    await sleep(0)
    raise ExpectedError("why")


@pytest.mark.parametrize(
    "function",
    [doubled, doubled_by_generator, doubled_at_once],
    ids=lambda f: f.__name__,
)
def test_tasks_from_any_thread(reactor: Any, function: Any) -> None:
    async def main() -> None:
        async with Portal() as portal:
            expected = 42, threading.get_ident()
            assert await in_other_thread(portal.call, function, 21) == expected
            future = await in_other_thread(portal.spawn, function, 21)
            assert await in_other_thread(future.result, DEADLINE) == expected
            # Also in a function that in_thread() runs.
            assert await in_thread(portal.call, function, 21) == expected

    run_for_real(reactor, main)


def test_the_context_of_the_thread(reactor: Any) -> None:
    variable = contextvars.ContextVar("variable", default="none")

    async def look() -> str:
        await sleep(0)
        return variable.get()

    def work(portal: Portal) -> tuple[str, str]:
        variable.set("of the thread")
        return portal.call(look), portal.spawn(look).result()

    def and_back() -> str:
        variable.set("of the thread")
        got: str = from_thread(look)
        return got

    async def main() -> None:
        async with Portal() as portal:
            assert await in_other_thread(work, portal) == ("of the thread",) * 2
            assert await in_thread(and_back) == "of the thread"
            assert variable.get() == "none"

    run_for_real(reactor, main)


def test_errors(reactor: Any) -> None:
    async def main() -> None:
        async with Portal() as portal:
            with pytest.raises(ExpectedError, match="why"):
                await in_other_thread(portal.call, fails)
            future = await in_other_thread(portal.spawn, fails)
            for _ in range(2):
                with pytest.raises(ExpectedError, match="why"):
                    await in_other_thread(future.result)
            assert isinstance(future.exception(), ExpectedError)
            # What cannot be run at all.
            with pytest.raises(TypeError):
                await in_other_thread(portal.call, doubled)

    run_for_real(reactor, main)


def test_cancelling_the_future_cancels_the_task(reactor: Any) -> None:
    begun, cancelled, never = Event(), Event(), Event()

    async def wait() -> None:
        begun.set()
        try:
            await Event().wait()
        finally:
            cancelled.set()

    def work(future: concurrent.futures.Future[None]) -> None:
        assert future.cancel()
        done, _ = concurrent.futures.wait([future], DEADLINE)
        assert done == {future}
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()

    async def main() -> None:
        async with Portal() as portal:
            future = await in_other_thread(portal.spawn, wait)
            await begun.wait()
            await in_other_thread(work, future)
            assert cancelled.is_set
        async with Portal() as portal:
            # Before the task has begun: the reactor's thread is busy here.
            futures: list[Any] = []
            thread = threading.Thread(
                target=lambda: futures.append(portal.spawn(never.set))
            )
            thread.start()
            thread.join()
            assert futures[0].cancel()
        assert not never.is_set
        assert futures[0].cancelled()

    run_for_real(reactor, main)


def test_the_future_of_a_cancelled_task(reactor: Any) -> None:
    tasks: list[Task[Any]] = []

    async def wait() -> None:
        tasks.append(current_task())
        await Event().wait()

    async def main() -> None:
        async with Portal() as portal:
            calling = spawn(in_other_thread, portal.call, wait)
            future = await in_other_thread(portal.spawn, wait)
            while len(tasks) < 2:
                await sleep(0.001)
            for task in tasks:
                task.cancel()
            with pytest.raises(CancelledError):
                await calling
            while not future.done():
                await sleep(0)
            assert future.cancelled()

    run_for_real(reactor, main)


def test_a_portal_refuses_the_thread_of_the_reactor(reactor: Any) -> None:
    async def call_from_thread() -> None:
        # With the context of the thread.
        from_thread(sleep, 0)

    async def main() -> None:
        async with Portal() as portal:
            for use in (portal.call, portal.spawn):
                with pytest.raises(RuntimeError, match="would wait for itself"):
                    use(sleep, 0)
            with pytest.raises(RuntimeError, match="would wait for itself"):
                await in_thread(from_thread, call_from_thread)
            assert "open, with 0 tasks" in repr(portal)

    run_for_real(reactor, main)


def test_starting_a_task_from_a_thread(reactor: Any) -> None:
    async def listen(*, task_status: TaskStatus[str]) -> str:
        await sleep(0)
        task_status.started("ready")
        await sleep(0)
        return "done"

    async def fails_before(*, task_status: TaskStatus[str]) -> None:
        await fails()

    async def never(*, task_status: TaskStatus[str]) -> None:
        await sleep(0)

    def work(portal: Portal) -> None:
        future, value = portal.start(listen)
        assert (value, future.result()) == ("ready", "done")
        with pytest.raises(ExpectedError, match="why"):
            portal.start(fails_before)
        with pytest.raises(RuntimeError, match="without a call of"):
            portal.start(never)

    async def main() -> None:
        async with Portal() as portal:
            await in_other_thread(work, portal)

    run_for_real(reactor, main)


# The end


def test_a_portal_that_stops_waits_for_its_tasks(reactor: Any) -> None:
    begun, go_on = Event(), Event()

    async def wait() -> str:
        begun.set()
        await go_on.wait()
        return "done"

    async def main() -> None:
        portal = Portal()
        future = await in_other_thread(portal.spawn, wait)
        await begun.wait()
        stopped = portal.stop()
        again = portal.stop()
        await sleep(0)
        assert not stopped.called
        with pytest.raises(RuntimeError, match="the portal is stopped"):
            await in_other_thread(portal.call, sleep, 0)
        go_on.set()
        await stopped
        await again
        assert future.result() == "done"

    run_for_real(reactor, main)


@pytest.mark.parametrize("by", ["stop", "block", "task"])
def test_the_tasks_of_a_portal_are_cancelled(reactor: Any, by: str) -> None:
    begun, cleaned_up = Event(), Event()

    async def wait() -> None:
        begun.set()
        try:
            await Event().wait()
        finally:
            await sleep(0)
            cleaned_up.set()

    async def block(futures: list[Any]) -> None:
        async with Portal() as portal:
            futures.append(await in_other_thread(portal.spawn, wait))
            await begun.wait()
            if by == "stop":
                await portal.stop(cancel=True)
            elif by == "block":
                raise ExpectedError

    async def main() -> None:
        futures: list[Any] = []
        running = spawn(block, futures)
        await begun.wait()
        await sleep(0.01)
        if by == "task":
            running.cancel()
        with contextlib.suppress(ExpectedError, CancelledError):
            await running
        assert cleaned_up.is_set
        assert futures[0].cancelled()

    run_for_real(reactor, main)


@pytest.mark.parametrize("raises", [False, True])
def test_a_block_that_is_cancelled_again_waits_for_the_tasks(
    reactor: Any, raises: bool
) -> None:
    """Which are cancelled once, and can clean up."""
    begun, go_on = Event(), Event()
    told: list[str] = []

    async def wait() -> None:
        begun.set()
        try:
            await Event().wait()
        finally:
            told.append("cleans up")
            await go_on.wait()
            told.append("is clean")

    async def block() -> None:
        async with Portal() as portal:
            await in_other_thread(portal.spawn, wait)
            await begun.wait()
            if raises:
                raise ExpectedError

    async def main() -> None:
        running = spawn(block)
        await begun.wait()
        await sleep(0.01)
        for _ in range(3):
            running.cancel()
            await sleep(0.01)
        assert told == ["cleans up"]
        assert not running.done
        go_on.set()
        with pytest.raises(CancelledError):
            await running
        assert told == ["cleans up", "is clean"]

    run_for_real(reactor, main)


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("method", ["spawn", "call", "start"])
def test_an_interrupt_while_a_task_is_handed_over(
    reactor: Any, monkeypatch: pytest.MonkeyPatch, handed_over: bool, method: str
) -> None:
    """The task is not begun, or cancelled, and the portal waits for its end."""
    told: list[str] = []
    begun = threading.Event()
    call_from_thread = reactor.callFromThread

    async def wait(*, task_status: Any = TASK_STATUS_IGNORED) -> None:
        told.append("begun")
        begun.set()
        try:
            await Event().wait()
        finally:
            await sleep(0.01)
            told.append("has ended")

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        if handed_over:
            call_from_thread(*args)
            begun.wait(DEADLINE)
        raise KeyboardInterrupt

    async def main() -> None:
        portal = Portal()

        def use() -> None:
            monkeypatch.setattr(reactor, "callFromThread", interrupted)
            with pytest.raises(KeyboardInterrupt):
                getattr(portal, method)(wait)

        await in_other_thread(use)
        await portal.stop()
        assert told == (["begun", "has ended"] if handed_over else [])
        assert not calls_of(reactor)._tasks

    run_for_real(reactor, main)


STOPS = (
    WAITS_FOR_EVER
    + """
def wait(portal):
    for function in (never, sleep):
        try:
            portal.call(function)
        except ReactorNotRunning as error:
            print("told\\n", end="", flush=True)

async def main():
    portal = Portal()
    threads.append(threading.Thread(target=wait, args=(portal,)))
    threads[0].start()
    await begun.wait()
    reactor.stop()

threads = []
reactor.callWhenRunning(spawn, main)
reactor.run()
threads[0].join()
"""
)


@pytest.mark.processes
@pytest.mark.parametrize("name", INSTALLS)
def test_calls_of_threads_fail_when_the_reactor_stops(name: str) -> None:
    output = output_of(STOPS.format(install=installs(name)))
    assert sorted(output.split()) == ["cancelled", "told", "told"]


def test_an_error_that_no_thread_retrieves_is_logged(
    reactor: Any, logged: list[Any]
) -> None:
    async def main() -> None:
        async with Portal() as portal:
            # The thread ends, and its future with it.
            await in_other_thread(lambda: portal.spawn(fails) and None)
        async with Portal() as portal:
            future = await in_other_thread(portal.spawn, fails)
        assert isinstance(future.exception(), ExpectedError)

    run_for_real(reactor, main)
    assert [each.type for each in failures(logged)] == [ExpectedError]


# Asynchronous context managers


class Manager:
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.fails_to_enter = False
        self.swallows = False

    async def __aenter__(self) -> str:
        await sleep(0)
        if self.fails_to_enter:
            raise ExpectedError("cannot enter")
        self.seen.append((threading.get_ident(), current_task()))
        return "value"

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        await sleep(0)
        self.seen.append((threading.get_ident(), current_task()))
        self.seen.append(error)
        return self.swallows


def test_a_context_manager(reactor: Any) -> None:
    def work(portal: Portal, manager: Manager, error: Exception | None) -> None:
        with portal.wrap_async_context_manager(manager) as value:
            assert value == "value"
            if error is not None:
                raise error

    async def main() -> None:
        async with Portal() as portal:
            manager = Manager()
            await in_other_thread(work, portal, manager, None)
            entered, left, error = manager.seen
            assert entered == left
            assert entered[0] == threading.get_ident()
            assert error is None
            manager = Manager()
            with pytest.raises(ExpectedError, match="in the block"):
                await in_other_thread(
                    work, portal, manager, ExpectedError("in the block")
                )
            assert isinstance(manager.seen[-1], ExpectedError)
            manager.swallows = True
            await in_other_thread(work, portal, manager, ExpectedError("in the block"))
            manager.fails_to_enter = True
            with pytest.raises(ExpectedError, match="cannot enter"):
                await in_other_thread(work, portal, manager, None)

    run_for_real(reactor, main)


def test_a_context_manager_whose_task_is_cancelled(reactor: Any) -> None:
    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[Task[Any]]:
        yield current_task()

    def work(portal: Portal) -> None:
        with portal.wrap_async_context_manager(manager()) as task:
            portal.call(task.cancel)

    async def main() -> None:
        async with Portal() as portal:
            with pytest.raises(CancelledError):
                await in_other_thread(work, portal)

    run_for_real(reactor, main)


def test_a_stream_for_a_thread(reactor: Any) -> None:
    async def shout(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line.upper() + b"\n")

    def work(portal: Portal, port: int) -> list[bytes]:
        connection = portal.call(open_tcp, "127.0.0.1", port)
        with portal.wrap_async_context_manager(connection) as stream:
            portal.call(stream.write, b"one\ntwo\n")
            return [portal.call(stream.read_line) for _ in range(2)]

    async def main() -> None:
        server = await listen(reactor, shout)
        async with Portal() as portal:
            port = server.port.getHost().port
            assert await in_other_thread(work, portal, port) == [b"ONE", b"TWO"]
        await server.stop()

    run_for_real(reactor, main)


# A reactor in another thread than the main one

BACKGROUND = """
import os, signal, sys, threading
{install}
installed.install()
from twisted.internet import reactor
from twisted_rtsig.coro import Event, Portal, sleep

async def never():
    print("begun", flush=True)
    try:
        await Event().wait()
    finally:
        print("cancelled\\n", end="", flush=True)

async def hello():
    await sleep(0.01)
    return "hello"

portal = Portal(reactor)
thread = threading.Thread(target=reactor.run, args=(False,), daemon=True)
thread.start()
print(portal.call(hello))
try:
    portal.call(never)
except KeyboardInterrupt:
    print("interrupted\\n", end="", flush=True)
print(portal.call(hello))
try:
    portal.call(portal.call, hello)
except RuntimeError as error:
    print(type(error).__name__)
reactor.callFromThread(reactor.stop)
thread.join()
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", INSTALLS)
def test_a_reactor_in_the_background(name: str) -> None:
    with running(BACKGROUND.format(install=installs(name))) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=DEADLINE)
    assert errors == ""
    assert lines == ["hello", "begun"]
    *middle, last, name = rest.split()
    assert sorted(middle) == ["cancelled", "interrupted"]
    assert (last, name) == ("hello", "RuntimeError")
