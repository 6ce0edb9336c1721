"""The engine's timers, compared with Twisted's own: a difference is a bug."""

from __future__ import annotations

import gc
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.base import DelayedCall
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import capturedLogs

from tests.scripted_notifier import EdgeNotifier
from tests.support import dispose, frees_at_once
from twisted_rtsig.engine.reactor import EngineReactor

# Seconds.  Sums of these are exact, so that both reactors get the same times.
TIMES = st.integers(0, 4000).map(lambda each: each / 16)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), TIMES),
        st.tuples(st.just("set from a call"), TIMES),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("reset"), st.integers(0, 30), TIMES),
        st.tuples(st.just("delay"), st.integers(0, 30), TIMES),
        st.tuples(st.just("advance"), TIMES),
        st.tuples(st.just("advance"), st.just(0.0)),
        st.tuples(st.just("cancel all"), st.booleans()),
        st.tuples(st.just("set many"), TIMES),
    ),
    max_size=60,
)


class World:
    """A reactor with a clock of its own, and a record of its calls."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.now = 1000.0
        self.reactor.seconds = lambda: self.now
        # The calls by their names.  A call that another one sets has the name of that
        # one and a dash.  Calls of the same time may be made in another order than
        # Twisted's.
        self.calls: dict[str, Any] = {}
        self.made: list[tuple[float, str]] = []

    def set(self, delay: float, inner: float | None = None, name: str = "") -> None:
        name = name or f"{len(self.calls):04}"

        def call() -> None:
            self.made.append((self.calls[name].getTime(), name))
            if inner is not None:
                self.set(inner, name=f"{name}-")

        self.calls[name] = self.reactor.callLater(delay, call)

    def ordered(self) -> list[Any]:
        return [call for _, call in sorted(self.calls.items())]

    def do(self, step: tuple[Any, ...]) -> Any:
        kind, *arguments = step
        if kind == "set":
            self.set(arguments[0])
        elif kind == "set from a call":
            self.set(arguments[0], arguments[0])
        elif kind == "set many":
            for each in range(60):
                self.set(arguments[0] + each)
        elif kind == "cancel all":
            for each, call in enumerate(self.ordered()):
                if call.active() and (each % 2 or arguments[0]):
                    call.cancel()
        elif kind == "advance":
            self.now += arguments[0]
            self.reactor.runUntilCurrent()
            # Twisted's heap has no order for calls of the same time.
            made, self.made = sorted(self.made), []
            return made, self.reactor.timeout()
        elif self.calls:
            call = self.ordered()[arguments[0] % len(self.calls)]
            try:
                if kind == "cancel":
                    call.cancel()
                elif kind == "reset":
                    call.reset(arguments[1])
                else:
                    # This also moves calls to an earlier time.
                    call.delay(arguments[1] - 100)
            except (AlreadyCalled, AlreadyCancelled) as error:
                return type(error)
        return sorted(each.getTime() for each in self.reactor.getDelayedCalls())

    def state(self) -> list[Any]:
        return [(call.active(), call.getTime()) for call in self.ordered()]


@pytest.fixture
def engine() -> Iterator[EngineReactor]:
    """A reactor of the engine without a kernel."""
    reactor = EngineReactor(EdgeNotifier())
    yield reactor
    dispose(reactor)


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_timers_behave_like_those_of_twisted(steps: list[tuple[Any, ...]]) -> None:
    ours, twisteds = EngineReactor(EdgeNotifier()), SelectReactor()
    try:
        worlds = World(ours), World(twisteds)
        # At the end, make all calls that are left.
        for step in [*steps, ("advance", 1e6)]:
            result, expected = (world.do(step) for world in worlds)
            if step[0] == "advance":
                (made, timeout), (made_by_twisted, timeout_of_twisted) = (
                    result,
                    expected,
                )
                assert made == made_by_twisted, step
                # Twisted also wakes up for calls that were cancelled or delayed.
                if timeout is not None:
                    assert timeout_of_twisted is not None
                    assert timeout >= timeout_of_twisted
            else:
                assert result == expected, step
            assert worlds[0].state() == worlds[1].state()
    finally:
        dispose(ours)
        twisteds.removeAll()


def test_calls_of_the_same_time_are_made_in_order(engine: EngineReactor) -> None:
    world = World(engine)
    for _ in range(2):
        for each in range(200):
            world.set(3.5 if each % 2 else 7.25)
    world.now += 10
    engine.runUntilCurrent()
    assert world.made == sorted(world.made)
    assert len(world.made) == 400


@pytest.mark.parametrize("inserted", [False, True])
def test_a_call_moves_another_to_an_earlier_time(
    engine: EngineReactor, inserted: bool
) -> None:
    """The moved call is made in the same pass, if it existed when the pass began."""
    world = World(engine)
    world.set(50)
    if inserted:
        engine.runUntilCurrent()
    moved = world.ordered()[0]
    engine.callLater(0, lambda: None if inserted else world.set(60))
    engine.callLater(0, lambda: (moved if inserted else world.ordered()[-1]).delay(-70))
    engine.runUntilCurrent()
    assert len(world.made) == inserted
    engine.runUntilCurrent()
    assert len(world.made) == 1


def test_a_program_makes_a_delayed_call_itself(engine: EngineReactor) -> None:
    """Some programs make a ``DelayedCall``, to add features that Twisted lacks."""
    world = World(engine)

    def later(delay: float) -> DelayedCall:
        call = DelayedCall(
            world.now + delay,
            world.made.append,
            ((delay, ""),),
            {},
            engine._cancelCallLater,
            engine._moveCallLaterSooner,
            engine.seconds,
        )
        engine._newTimedCalls.append(call)
        return call

    calls = [later(delay) for delay in (1, 2, 300, 400)]
    engine.runUntilCurrent()
    assert engine.getDelayedCalls() == calls
    calls[1].cancel()
    calls[3].reset(3)
    assert set(engine.getDelayedCalls()) == {calls[0], calls[3], calls[2]}
    world.now += 500
    engine.runUntilCurrent()
    assert world.made == [(1, ""), (400, ""), (300, "")]


def test_a_call_at_infinity_is_never_made(engine: EngineReactor) -> None:
    world = World(engine)
    never = [engine.callLater(math.inf, world.made.append, (0, "")) for _ in range(2)]
    engine.runUntilCurrent()
    assert engine.timeout() == 2147483
    world.set(5)
    assert engine.timeout() == 5
    world.now += 1e12
    engine.runUntilCurrent()
    assert len(world.made) == 1
    assert engine.getDelayedCalls() == never
    never[0].reset(1)
    assert engine.timeout() == 1


def test_a_call_at_infinity_is_moved_to_infinity(engine: EngineReactor) -> None:
    """The difference of these times is not a number."""
    world = World(engine)
    new = engine.callLater(math.inf, world.made.append, (1, ""))
    known = engine.callLater(5, world.made.append, (2, ""))
    for _ in range(3):
        new.reset(math.inf)
        engine.runUntilCurrent()
        known.reset(math.inf)
        world.now += 6
    engine.runUntilCurrent()
    assert set(engine.getDelayedCalls()) == {new, known}
    new.reset(1)
    known.reset(2)
    world.now += 3
    engine.runUntilCurrent()
    engine.runUntilCurrent()
    assert world.made == [(1, ""), (2, "")]


def test_a_call_is_cancelled_while_others_are_moved(engine: EngineReactor) -> None:
    """A finalizer does so: the garbage collector may run whenever memory is needed."""
    world = World(engine)
    calls = [
        engine.callLater(5 + each / 128, world.made.append, (each, ""))
        for each in range(100)
    ]

    class Time(float):
        """Cancels calls when the heap compares it, where a collection may begin."""

        def __eq__(self, other: object) -> bool:
            for call in (calls[10], calls[60], calls[99]):
                if call.active():
                    call.cancel()
            return float(self) == other

        __hash__ = float.__hash__

    engine.callLater(1, world.made.append, (-1, ""))
    engine.runUntilCurrent()
    assert engine.timeout() == 1
    calls[30].time = Time(calls[30].time)
    world.now += 10
    engine.runUntilCurrent()
    engine.runUntilCurrent()
    made = [number for number, _ in world.made]
    assert made == [-1, *(each for each in range(100) if each not in (10, 60, 99))]
    assert engine.getDelayedCalls() == []


def test_a_program_activates_the_delay_itself(engine: EngineReactor) -> None:
    world = World(engine)
    calls = [
        engine.callLater(delay, world.made.append, (delay, "")) for delay in (0.25, 50)
    ]
    engine.runUntilCurrent()
    engine.timeout()
    for call in calls:
        call.delay(100)
        call.activate_delay()
    for made in ([], [(0.25, "")], [(0.25, ""), (50, "")]):
        world.now += 60
        engine.runUntilCurrent()
        assert world.made == made


@pytest.mark.parametrize("delay", [-1, -0.001, math.nan])
def test_a_negative_delay_is_refused(engine: EngineReactor, delay: float) -> None:
    with pytest.raises(AssertionError, match="not greater than or equal to 0"):
        engine.callLater(delay, print)


def test_the_arguments_of_a_call(engine: EngineReactor) -> None:
    calls: list[Any] = []

    def call(*args: Any, **named: Any) -> None:
        calls.append((args, named))

    engine.callLater(0, call)
    engine.callLater(0, call, 1, 2)
    engine.callLater(0, call, 1, key=2)
    # The names of callLater's own parameters cannot be used.
    with pytest.raises(TypeError, match="multiple values"):
        engine.callLater(0, call, delay=1)  # type: ignore[misc]
    engine.runUntilCurrent()
    engine.runUntilCurrent()
    assert calls == [((), {}), ((1, 2), {}), ((1,), {"key": 2})]


def test_keywords_of_calls_are_not_shared(engine: EngineReactor) -> None:
    first, second = engine.callLater(1, print), engine.callLater(1, print)
    with pytest.raises(TypeError):
        first.kw["end"] = ""
    assert not second.kw


def test_the_repr_is_that_of_twisted(engine: EngineReactor) -> None:
    def shown(reactor: Any, debug: bool) -> list[str]:
        World(reactor)
        DelayedCall.debug = debug
        try:
            calls = [
                reactor.callLater(1.5, math.sqrt),
                reactor.callLater(300, math.sqrt, 1, key=2),
                reactor.callLater(300, math.sqrt, key=2),
                reactor.callLater(2, math.sqrt, 5),
            ]
        finally:
            DelayedCall.debug = False
        calls[3].cancel()
        assert all(isinstance(call, DelayedCall) for call in calls)
        return [repr(call).replace(f"{id(call):x}", "") for call in calls]

    twisteds = SelectReactor()
    try:
        for debug in (False, True):
            assert shown(engine, debug) == shown(twisteds, debug)
    finally:
        twisteds.removeAll()


@pytest.mark.parametrize("debug", [False, True])
def test_a_failure_is_logged_with_the_line_that_has_set_the_call(
    engine: EngineReactor, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    monkeypatch.setattr(DelayedCall, "debug", debug)
    made: list[str] = []
    engine.callLater(0, lambda: 1 / 0)
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    engine.callLater(0, made.append, "the next one")
    with capturedLogs() as events:
        engine.runUntilCurrent()
    (event,) = events
    assert event["log_failure"].check(ZeroDivisionError)
    assert event["log_format"].startswith("while handling timed call")
    assert (f'test_timers.py", line {line}' in event.get("previous", "")) == debug
    assert made == ["the next one"]


def test_calls_from_threads(engine: EngineReactor) -> None:
    made: list[Any] = []

    def iterates() -> None:
        made.append("iterates")
        engine.callFromThread(made.append, "brought by a call")
        engine.iterate()

    def ask() -> None:
        engine.callFromThread(made.append, "first")
        engine.callFromThread(lambda: 1 / 0)
        engine.callFromThread(iterates)
        engine.callFromThread(made.append, "last")

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    with capturedLogs() as events:
        engine.runUntilCurrent()
    assert made == ["first", "iterates", "brought by a call", "last"]
    assert [event["log_format"] for event in events] == ["while calling from thread"]


@frees_at_once
def test_cancelled_calls_are_freed(engine: EngineReactor) -> None:
    """Calls and arguments do not accumulate: near, distant, moved or new ones."""
    world = World(engine)

    class Argument:
        pass

    def turn(delay: float, change: Callable[[Any], object]) -> Any:
        argument = Argument()
        call = engine.callLater(delay, print, argument)
        world.now += 1 / 1024
        engine.runUntilCurrent()
        change(call)
        engine.runUntilCurrent()
        return weakref.ref(argument), weakref.ref(call)

    changes: list[tuple[float, Callable[[Any], object]]] = [
        (0.5, lambda call: call.cancel()),
        (1000.0, lambda call: call.cancel()),
        (1000.0, lambda call: (call.reset(900), call.cancel())),
        (1e5, lambda call: (call.reset(1e6), call.cancel())),
    ]
    gc.disable()
    try:
        left = [turn(*each) for each in changes * 300]
        assert sum(argument() is not None for argument, _ in left) == 0
        # Like Twisted, the engine keeps some cancelled calls, which are empty.
        assert sum(call() is not None for _, call in left) < 120
    finally:
        gc.enable()


@frees_at_once
def test_a_call_is_moved_to_earlier_times_again_and_again(
    engine: EngineReactor,
) -> None:
    world = World(engine)
    call = engine.callLater(1e6, world.made.append, (0, ""))
    for each in range(5000):
        engine.runUntilCurrent()
        call.reset(1e6 - each)
    # Its former places in the heap refer to it, and are removed now and then.
    assert sys.getrefcount(call) < 150
    assert engine.getDelayedCalls() == [call]
    world.now += 1e6
    engine.runUntilCurrent()
    assert world.made == [(0, "")]
    assert engine.timeout() is None
