"""Instruments: what they are called for, in which order, and when they fail."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from tests.coro.support import STYLES, call, connected, listen, run, run_for_real, spin
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Event,
    Instrument,
    Stream,
    Task,
    TaskGroup,
    add_instrument,
    coroutine,
    current_task,
    remove_instrument,
    sleep,
    spawn,
    symmetric,
    transfer,
)
from twisted_rtsig.engine.reactor import EngineReactor


class Recorder(Instrument):
    """Writes down what it is called for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def task_spawned(self, task: Task[Any]) -> None:
        self.events.append(f"spawned {task.name}")

    def before_task_step(self, task: Task[Any]) -> None:
        self.events.append(f"before {task.name}")

    def after_task_step(self, task: Task[Any]) -> None:
        self.events.append(f"after {task.name}")

    def task_exited(self, task: Task[Any]) -> None:
        how = "cancelled" * task.cancelled or "failed" * task.failed or "returned"
        self.events.append(f"{how} {task.name}")

    def take(self) -> list[str]:
        events, self.events = self.events, []
        return events


class Everything(Recorder):
    """Passes and connections as well."""

    def before_pass(self) -> None:
        self.events.append("before a pass")

    def after_pass(self) -> None:
        self.events.append("after a pass")

    def connection_made(self, stream: Stream) -> None:
        assert not stream.lost
        self.events.append("made")

    def connection_lost(self, stream: Stream) -> None:
        assert stream.lost
        self.events.append("lost")


@pytest.fixture
def recorder(clock: Clock) -> Iterator[Recorder]:
    recorder = Recorder()
    add_instrument(recorder, clock)
    yield recorder
    remove_instrument(recorder, clock)


def in_async_def(event: Event) -> Callable[[], Any]:
    async def wait() -> None:
        await event.wait()

    return wait


def in_a_generator(event: Event) -> Callable[[], Any]:
    def wait() -> Generator[Any, Any, None]:
        yield event.wait()

    return wait


def in_a_decorated_generator(event: Event) -> Callable[[], Any]:
    return coroutine(in_a_generator(event))


@pytest.mark.parametrize(
    "style", [in_async_def, in_a_generator, in_a_decorated_generator]
)
def test_the_steps_of_a_task(
    clock: Clock, recorder: Recorder, style: Callable[[Event], Callable[[], Any]]
) -> None:
    event = Event()
    spawn(style(event), name="a", reactor=clock)
    assert recorder.take() == ["spawned a", "before a", "after a"]
    event.set()
    assert recorder.take() == ["before a", "after a", "returned a"]


def test_tasks_that_fail_and_are_cancelled(clock: Clock, recorder: Recorder) -> None:
    async def fail() -> None:
        raise ValueError

    async def wait() -> None:
        await Event().wait()

    failing = spawn(fail, name="a", reactor=clock)
    assert recorder.take() == ["spawned a", "before a", "after a", "failed a"]
    with pytest.raises(ValueError):  # noqa: PT011
        failing.result()
    task = spawn(wait, name="b", reactor=clock)
    recorder.take()
    task.cancel()
    assert recorder.take() == ["before b", "after b", "cancelled b"]


def test_a_task_that_spawns_another(clock: Clock, recorder: Recorder) -> None:
    async def child() -> None:
        pass

    async def parent() -> None:
        await spawn(child, name="child")

    spawn(parent, name="parent", reactor=clock)
    assert recorder.take() == [
        *("spawned parent", "before parent", "spawned child", "after parent"),
        *("before child", "after child", "returned child"),
        *("before parent", "after parent", "returned parent"),
    ]


def test_transfers(clock: Clock, recorder: Recorder) -> None:
    """Each one is a step of the task that takes over."""

    async def ponging(main: Any) -> None:
        await transfer(main)
        await transfer(main)

    async def main() -> None:
        pong = symmetric(ponging, name="pong")
        await transfer(pong, current_task())
        await transfer(pong)

    spawn(main, name="main", reactor=clock)
    events = recorder.take()
    steps = [each for each in events if each.startswith(("before", "after"))]
    assert steps[:8] == [
        *("before main", "after main", "before pong", "after pong"),
        *("before main", "after main", "before pong", "after pong"),
    ]
    assert events[-1] == "returned main"


def test_tasks_that_began_before_the_instrument(clock: Clock) -> None:
    event = Event()
    spawn(in_async_def(event), name="a", reactor=clock)
    recorder = Recorder()
    add_instrument(recorder, clock)
    # Nothing of the task that was there, and nothing twice.
    add_instrument(recorder, clock)
    assert recorder.take() == []
    event.set()
    assert recorder.take() == ["before a", "after a", "returned a"]
    remove_instrument(recorder, clock)


def test_a_removed_instrument_is_not_called(clock: Clock) -> None:
    first, second, event = Recorder(), Recorder(), Event()
    add_instrument(first, clock)
    add_instrument(second, clock)
    spawn(in_async_def(event), name="a", reactor=clock)
    assert first.take() == second.take() == ["spawned a", "before a", "after a"]
    remove_instrument(first, clock)
    event.set()
    assert first.take() == []
    assert second.take() == ["before a", "after a", "returned a"]
    spawn(in_async_def(event := Event()), name="b", reactor=clock)
    remove_instrument(second, clock)
    second.take()
    event.set()
    assert second.take() == []
    with pytest.raises(KeyError):
        remove_instrument(second, clock)


def test_an_instrument_removed_while_it_is_called(clock: Clock) -> None:
    class Once(Recorder):
        def before_task_step(self, task: Task[Any]) -> None:
            super().before_task_step(task)
            remove_instrument(self, clock)

    once, other = Once(), Recorder()
    add_instrument(once, clock)
    add_instrument(other, clock)
    spawn(in_async_def(Event()), name="a", reactor=clock)
    assert once.take() == ["spawned a", "before a"]
    assert other.take() == ["spawned a", "before a", "after a"]
    remove_instrument(other, clock)


def test_an_instrument_added_by_a_task(clock: Clock) -> None:
    """It belongs to the reactor of that task."""
    recorder = Recorder()

    async def main() -> None:
        add_instrument(recorder)
        await sleep(1)
        remove_instrument(recorder)
        await sleep(1)

    spawn(main, name="a", reactor=clock)
    clock.advance(1)
    clock.advance(1)
    # The steps in which it is added and removed are not whole.
    assert recorder.take() == ["before a"]


def test_an_instrument_does_not_observe_other_reactors(
    clock: Clock, recorder: Recorder
) -> None:
    spawn(in_async_def(Event()), reactor=Clock())
    assert recorder.take() == []


def test_only_overridden_methods_are_called(clock: Clock) -> None:
    class Spawned(Instrument):
        names: list[str] = []  # noqa: RUF012

        def task_spawned(self, task: Task[Any]) -> None:
            self.names.append(task.name)

    instrument = Spawned()
    add_instrument(instrument, clock)
    event = Event()
    task = spawn(in_async_def(event), name="a", reactor=clock)
    event.set()
    assert task.done
    assert instrument.names == ["a"]
    remove_instrument(instrument, clock)


HOOKS = ["task_spawned", "before_task_step", "after_task_step", "task_exited"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failing_instrument_is_removed_and_logged_once(
    clock: Clock, logged: list[Any], recorder: Recorder, hook: str
) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise ZeroDivisionError

    failing = type("Failing", (Recorder,), {hook: fail})()
    add_instrument(failing, clock)
    event = Event()
    tasks = [spawn(in_async_def(event), name=n, reactor=clock) for n in "ab"]
    event.set()
    assert [each.done for each in tasks] == [True, True]
    failures = [event for event in logged if "log_failure" in event]
    assert [event["hook"] for event in failures] == [hook]
    assert failures[0]["log_failure"].type is ZeroDivisionError
    with pytest.raises(KeyError):
        remove_instrument(failing, clock)
    # The others go on.
    assert recorder.take()[-2:] == ["after b", "returned b"]


@pytest.mark.parametrize("style", STYLES)
def test_instruments_change_no_result(
    clock: Clock, recorder: Recorder, style: Any
) -> None:
    """What a task gets is the same as without instruments, errors too."""
    broken: Deferred[int] = Deferred()
    value: Deferred[int] = Deferred()
    got: list[Any] = []
    STYLES[style](clock, [lambda: broken, lambda: value, lambda: succeed(2)], got)
    broken.errback(ZeroDivisionError())
    value.callback(1)
    assert got == [ZeroDivisionError, 1, 2]


@frees_at_once
def test_a_failed_task_is_no_garbage(clock: Clock, recorder: Recorder) -> None:
    """The frames that an error holds do not hold the task."""

    async def fail() -> None:
        await sleep(0)
        raise ValueError

    gc.collect()
    gc.disable()
    try:
        task = spawn(fail, name="a", reactor=clock)
        clock.advance(0)
        assert task.failed
        with pytest.raises(ValueError):  # noqa: PT011
            task.result()
        del task
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = {type(each) for each in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert Task not in kinds


# Reactors


def test_connections(reactor: Any) -> None:
    instrument = Everything()
    add_instrument(instrument, reactor)

    async def handler(stream: Stream) -> None:
        await stream.read()

    async def main() -> None:
        server = await listen(reactor, handler)
        async with TaskGroup():
            stream = await call(reactor, server)
            await stream.close()
        await server.stop()

    try:
        run(reactor, main)
        spin(reactor, lambda: instrument.events.count("lost") == 2)
    finally:
        remove_instrument(instrument, reactor)
    assert instrument.events.count("made") == 2


def test_passes(reactor: Any) -> None:
    """They come in turns, and all else comes within one."""
    instrument = Everything()

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            for _ in range(3):
                peer.send(b"x")
                await stream.read()
        await sleep(0.001)

    add_instrument(instrument, reactor)
    run_for_real(reactor, main)
    remove_instrument(instrument, reactor)
    events = instrument.events
    passes = [each for each in events if each.endswith("a pass")]
    if isinstance(reactor, EngineReactor):
        # What is called before the reactor runs, or waits for the first time, is in
        # no pass, and the last one has no end.
        assert len(passes) > 6
        first = passes.index("before a pass")
        assert passes[first:] == [
            "after a pass" if number % 2 else "before a pass"
            for number in range(len(passes) - first)
        ]
        began = events.index("before a pass")
        inside = False
        for event in events[began:]:
            if event.endswith("a pass"):
                inside = event == "before a pass"
            else:
                assert inside
    else:
        assert passes == []
    before = len(events)
    run(reactor, sleep, 0.001)
    assert len(instrument.events) == before
