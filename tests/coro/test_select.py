"""Select: exactly one case happens, and the other cases are left alone."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import pytest
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    fail,
    inlineCallbacks,
    succeed,
)
from twisted.internet.task import Clock

from tests.coro.support import (
    STYLES,
    Start,
    connected,
    failures,
    ignore_error,
    run,
    styles,
)
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Cancelled,
    Channel,
    ChannelClosed,
    Deadline,
    EndOfChannel,
    Event,
    Stream,
    Task,
    coroutine,
    move_on_after,
    select,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import cancel_everywhere


class Kind(NamedTuple):
    """
    Something to select.

    :ivar case: the argument of ``select``.
    :ivar happen: makes the case ready.
    :ivar value: the result of the case.
    :ivar untouched: whether the case is as if it had never been selected, and its value
        is still there.
    """

    case: Any
    happen: Callable[[], object]
    value: Any
    untouched: Callable[[], bool]


def receiving(clock: Clock) -> Kind:
    channel: Channel[str] = Channel(1)
    sent: list[str] = []

    def happen() -> None:
        channel.try_send("value")
        sent.append("value")

    def untouched() -> bool:
        return channel.statistics() == (len(sent), 1, 0, 0, False, 0, 0)

    return Kind(channel, happen, "value", untouched)


def sending(clock: Clock) -> Kind:
    channel: Channel[str] = Channel(1)
    channel.try_send("before")

    def untouched() -> bool:
        buffered, _, senders, *_ = channel.statistics()
        if senders or buffered != 1 - len(received):
            return False
        return received in ([], ["before"])

    received: list[str] = []
    return Kind(
        channel.sending("value"),
        lambda: received.append(channel.try_receive()),
        None,
        untouched,
    )


def meeting_a_sender(clock: Clock) -> Kind:
    channel: Channel[str] = Channel(0)
    sent: list[Deferred[None]] = []
    return Kind(
        channel,
        lambda: sent.append(channel.send("value")),
        "value",
        lambda: (
            channel.statistics().receivers == 0
            and not any(each.called for each in sent)
        ),
    )


def meeting_a_receiver(clock: Clock) -> Kind:
    channel: Channel[str] = Channel(0)
    received: list[Deferred[str]] = []
    return Kind(
        channel.sending("value"),
        lambda: received.append(channel.receive().addCallback(str)),
        None,
        lambda: (
            channel.statistics().senders == 0
            and not any(each.called for each in received)
        ),
    )


def an_event(clock: Clock) -> Kind:
    event = Event()
    return Kind(event, event.set, None, lambda: "set" in repr(event) or _idle(event))


def _idle(event: Event) -> bool:
    return "0 wait" in repr(event)


def a_deadline(clock: Clock) -> Kind:
    return Kind(
        Deadline(1, clock),
        lambda: clock.advance(1),
        None,
        lambda: not clock.getDelayedCalls(),
    )


def a_deferred(clock: Clock) -> Kind:
    cancelled: list[object] = []
    deferred: Deferred[str] = Deferred(cancelled.append)

    def untouched() -> bool:
        if not deferred.called:
            return not cancelled
        # Other waiters can still get the value.
        got: list[str] = []
        deferred.addCallback(take, got)
        return got == ["value"]

    def take(value: str, got: list[str]) -> str:
        got.append(value)
        return value

    return Kind(deferred, lambda: deferred.callback("value"), "value", untouched)


def a_task(clock: Clock) -> Kind:
    gate: Deferred[str] = Deferred()

    async def wait() -> str:
        return await gate

    task = spawn(wait, reactor=clock)
    return Kind(
        task,
        lambda: gate.callback("value"),
        "value",
        lambda: not task.cancelled and (not task.done or task.result() == "value"),
    )


KINDS: dict[str, Callable[[Clock], Kind]] = {
    each.__name__: each
    for each in (
        *(receiving, sending, meeting_a_sender, meeting_a_receiver),
        *(an_event, a_deadline, a_deferred, a_task),
    )
}
kinds = pytest.mark.parametrize("kind", KINDS)


# What is chosen


@styles
@kinds
def test_a_case_that_is_ready_is_chosen_at_once(
    clock: Clock, style: str, kind: str
) -> None:
    what = KINDS[kind](clock)
    what.happen()
    other: Channel[int] = Channel(0)
    got: list[Any] = []
    STYLES[style](
        clock,
        [lambda: select(what.case, other), lambda: select(other, Event(), succeed(1))],
        got,
    )
    assert len(got) == 2
    assert got[0][0] is what.case
    assert got[0][1] == what.value
    assert other.statistics().receivers == 0


@kinds
def test_the_case_that_becomes_ready_is_chosen(
    start: Start, clock: Clock, kind: str
) -> None:
    what = KINDS[kind](clock)
    other: Channel[int] = Channel(0)
    got: list[Any] = []
    start([lambda: select(other, what.case)], got)
    assert got == []
    assert other.statistics().receivers == 1
    what.happen()
    [(chosen, value)] = got
    assert chosen is what.case
    assert value == what.value
    assert other.statistics().receivers == 0


@kinds
def test_the_other_cases_are_left_alone(clock: Clock, kind: str) -> None:
    """They may still happen, also right after the choice."""
    made = {name: make(clock) for name, make in KINDS.items()}
    cases = [each.case for each in made.values()]
    got: list[Any] = []
    spawn(select, *cases, reactor=clock).as_deferred().addCallback(got.append)
    chosen = made.pop(kind)
    chosen.happen()
    assert [each[0] for each in got] == [chosen.case]
    assert [name for name, each in made.items() if not each.untouched()] == []
    for each in made.values():
        each.happen()
    assert [name for name, each in made.items() if not each.untouched()] == []
    assert len(got) == 1


@pytest.mark.parametrize("seed", range(30))
def test_only_one_of_several_ready_cases_happens(clock: Clock, seed: int) -> None:
    random.seed(seed)
    made = [make(clock) for make in KINDS.values()]
    for each in made:
        each.happen()
    chosen, value = spawn(select, *[each.case for each in made]).result()
    [what] = [each for each in made if each.case is chosen]
    assert value == what.value
    made.remove(what)
    assert all(each.untouched() for each in made)


def test_ready_cases_are_chosen_in_turns(clock: Clock) -> None:
    random.seed(1)
    ready: list[Channel[int]] = [Channel(1) for _ in range(4)]
    chosen: Counter[int] = Counter()
    for number in range(8_000):
        # Now and then one of them is not.
        idle = number % 5
        for each in ready[:idle] + ready[idle + 1 :]:
            if not each.statistics().buffered:
                each.try_send(1)
        task = spawn(select, *ready, reactor=clock)
        clock.advance(0)
        chosen[ready.index(task.result()[0])] += 1
    # A twentieth less would be seven standard deviations.
    assert sum(chosen.values()) == 8_000
    assert min(chosen[each] for each in range(4)) > 1_000


@kinds
def test_the_same_case_twice(clock: Clock, kind: str) -> None:
    """Only one of the two happens."""
    for before in (True, False):
        what = KINDS[kind](clock)
        if before:
            what.happen()
        got: list[Any] = []
        cases = [what.case] * 3
        spawn(select, *cases, reactor=clock).as_deferred().addCallback(got.append)
        if not before:
            assert got == []
            what.happen()
        assert got == [(what.case, what.value)]


def test_two_selects_meet(clock: Clock) -> None:
    channel: Channel[str] = Channel(0)
    other: Channel[str] = Channel(0)
    to_send = channel.sending("value")
    for receiver_first in (True, False):
        selects: list[Any] = [[channel, other], [other, to_send]]
        if not receiver_first:
            selects.reverse()
        first, second = (spawn(select, *each, reactor=clock) for each in selects)
        results = [first.result(), second.result()]
        if not receiver_first:
            results.reverse()
        assert results == [(channel, "value"), (to_send, None)]
        assert channel.statistics() == other.statistics() == (0, 0, 0, 0, False, 0, 0)


@pytest.mark.parametrize("receives_first", [True, False])
def test_a_select_never_receives_its_own_value(
    clock: Clock, receives_first: bool
) -> None:
    channel: Channel[str] = Channel(0)
    to_send = channel.sending("own")
    cases: list[Any] = [channel, to_send]
    if not receives_first:
        cases.reverse()

    waiting = select(*cases)
    assert not waiting.called
    assert channel.try_receive() == "own"
    assert waiting.result == (to_send, None)

    waiting = select(*cases)
    channel.try_send("other's")
    assert waiting.result == (channel, "other's")

    # Of two, the later one takes from the first, or gives to it.
    first, second = select(*cases), select(*cases)
    assert {first.result[0], second.result[0]} == {channel, to_send}
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)


@pytest.mark.parametrize("receives_first", [True, False])
def test_a_select_never_receives_its_own_value_when_the_channel_closes(
    clock: Clock, receives_first: bool
) -> None:
    channel: Channel[str] = Channel(0)
    cases: list[Any] = [channel, channel.sending("own")]
    if not receives_first:
        cases.reverse()
    got: list[Any] = []
    STYLES["async def"](clock, [lambda: select(*cases)], got)
    channel.close()
    assert got in ([EndOfChannel], [ChannelClosed])
    assert channel.statistics() == (0, 0, 0, 0, True, 0, 0)


@pytest.mark.parametrize("own", ["first", "last", "only"])
def test_a_select_never_receives_its_own_value_in_a_later_turn(
    clock: Clock, own: str, one_in_a_turn: None
) -> None:
    """The other operations meet it, and each other, in order."""
    channel: Channel[str] = Channel(0)
    got: list[Any] = []

    def both() -> None:
        own = channel.sending("own")
        cases: list[Any] = [channel, channel, own, channel.sending("own")]
        select(*cases).addCallback(got.append)

    def main() -> None:
        channel.send("first")
        assert channel.receive().result == "first"
        if own != "last":
            both()
        if own != "only":
            channel.send("other's").addCallback(got.append)
            channel.receive().addCallback(got.append)
        if own == "last":
            both()

    spawn(main, reactor=clock)
    assert got == []
    clock.advance(0)
    if own == "only":
        assert got == []
        assert channel.statistics() == (0, 0, 2, 2, False, 0, 0)
        assert channel.try_receive() == "own"
    elif own == "first":
        # It is the first sender, whose value the first other receiver gets.
        assert "own" in got
        assert channel.try_receive() == "other's"
    else:
        assert got == [None, "other's"]
        assert channel.try_receive() == "own"
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)


# Cancellation


@styles
def test_a_cancelled_select_leaves_its_cases_alone(clock: Clock, style: str) -> None:
    made = {name: make(clock) for name, make in KINDS.items()}
    got: list[Any] = []
    waiting = STYLES[style](
        clock, [lambda: select(*[each.case for each in made.values()])], got
    )
    waiting.cancel()
    assert got in ([], [CancelledError])
    assert [name for name, each in made.items() if not each.untouched()] == []
    for each in made.values():
        each.happen()
    assert [name for name, each in made.items() if not each.untouched()] == []


def test_a_timeout_around_a_select(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)

    async def main() -> None:
        with timeout(1):
            await select(channel, channel.sending(1), Deadline(60))

    task = spawn(main, reactor=clock)
    clock.advance(1)
    with pytest.raises(TimeoutError):
        task.result()
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)
    assert not clock.getDelayedCalls()


def test_a_cancelled_select_does_not_lose_its_value(clock: Clock) -> None:
    """It is cancelled after the choice, before its next step."""
    channel: Channel[int] = Channel(0)
    got: list[Any] = []

    async def wait() -> None:
        got.append((await select(channel, Event()))[1])
        await sleep(1)

    def send_and_cancel() -> None:
        channel.try_send(1)
        task.cancel()

    task = spawn(wait, reactor=clock)
    spawn(send_and_cancel, reactor=clock)
    assert got == [1]
    assert task.cancelled


# What is left behind


@frees_at_once
def test_a_loop_leaves_nothing_behind(clock: Clock) -> None:
    made = {name: make(clock) for name, make in KINDS.items()}
    others = [each.case for each in made.values()]
    channel: Channel[int] = Channel(0)
    left: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    async def main() -> None:
        for _ in range(1_000):
            selecting = select(*others, channel)
            left.add(selecting)
            assert (await selecting)[0] is channel
            del selecting
            most.append(len(left))

    gc.disable()
    try:
        task = spawn(main, reactor=clock)
        for number in range(1_000):
            channel.try_send(number)
    finally:
        gc.enable()
    assert task.result() is None
    # The one that is awaited.
    assert max(most) <= 1
    assert [name for name, each in made.items() if not each.untouched()] == []
    callbacks = vars(made["a_deferred"].case)
    assert len(callbacks.get("_callbacks", callbacks.get("callbacks"))) < 5
    assert len(made["a_task"].case._done) < 5
    assert not clock.getDelayedCalls()


def test_a_finished_select_keeps_no_case_alive(clock: Clock) -> None:
    async def wait() -> None:
        await select(Event())

    happens = Event()
    unfired: Deferred[None] = Deferred()
    waiting = spawn(wait, reactor=clock)
    ignore_error(select(happens, unfired, waiting, Deadline(1, clock))).cancel()
    gone: list[weakref.ref[Any]] = [
        weakref.ref(happens),
        weakref.ref(unfired),
        weakref.ref(waiting),
    ]
    del happens, unfired, waiting
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("kind", ["Deferred", "Task"])
def test_an_error_keeps_no_case_alive(clock: Clock, waits: bool, kind: str) -> None:
    """The traceback of the error leads to the Deferred, or to the task."""

    def run() -> list[weakref.ref[Any]]:
        gate: Deferred[None] = Deferred()

        async def fails() -> None:
            await gate

        async def wait() -> None:
            case = what
            with pytest.raises(KeyError):
                await select(Event(), case)

        what: Any = gate if kind == "Deferred" else spawn(fails, reactor=clock)
        if not waits:
            gate.errback(KeyError())
        task = spawn(wait, reactor=clock)
        if waits:
            gate.errback(KeyError())
        assert task.result() is None
        return [weakref.ref(gate), weakref.ref(what)]

    gone = run()
    gc.collect()
    assert [each() for each in gone] == [None] * 2


# Errors


@pytest.mark.parametrize("waits", [True, False])
def test_the_end_of_a_channel(start: Start, waits: bool) -> None:
    channel: Channel[int] = Channel(0)
    other: Channel[int] = Channel(0)
    got: list[Any] = []

    def at_end() -> Any:
        selecting: Any = select(other, channel)
        return selecting.addErrback(lambda failure: failure.value.channel)

    if not waits:
        channel.close()
    start([at_end], got)
    channel.close()
    assert got == [channel]
    assert other.statistics().receivers == 0


def test_select_receives_the_values_left_in_a_closed_channel(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    channel.close()
    got: list[Any] = []
    STYLES["async def"](clock, [partial(select, channel)] * 2, got)
    assert got == [(channel, 1), EndOfChannel]


@pytest.mark.parametrize("waits", [True, False])
def test_select_of_a_send_to_a_closed_channel_raises(start: Start, waits: bool) -> None:
    channel: Channel[int] = Channel(0)
    got: list[Any] = []
    if not waits:
        channel.close()
    start([lambda: select(Event(), channel.sending(1))], got)
    channel.close()
    assert got == [ChannelClosed]
    assert channel.statistics() == (0, 0, 0, 0, True, 0, 0)


@pytest.mark.parametrize("waits", [True, False])
def test_a_deferred_that_fails(start: Start, waits: bool, logged: list[Any]) -> None:
    """The task that has chosen it has handled the error, so it is not logged."""
    deferred: Deferred[None] = Deferred()
    got: list[Any] = []
    if not waits:
        deferred.errback(KeyError())
    cases: list[Any] = [Event(), deferred]
    for _ in range(2):
        start([lambda: select(*cases)], got)
    if waits:
        deferred.errback(KeyError())
    assert got == [KeyError, KeyError]
    cases.clear()
    del deferred
    assert failures(logged) == []


def test_a_deferred_that_fails_and_is_not_chosen(
    clock: Clock, logged: list[Any]
) -> None:
    deferred: Deferred[None] = Deferred()
    happens = Event()
    waiting = select(deferred, happens)
    happens.set()
    assert waiting.result == (happens, None)
    deferred.errback(KeyError())
    del deferred, waiting
    assert [each.type for each in failures(logged)] == [KeyError]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_task_that_does_not_succeed(
    start: Start, clock: Clock, waits: bool, how: str, logged: list[Any]
) -> None:
    gate: Deferred[None] = Deferred()

    async def wait() -> None:
        await gate

    task: Task[None] | None = spawn(wait, reactor=clock)
    cases: list[Any] = [Event(), task]
    got: list[Any] = []

    def end() -> None:
        assert task is not None
        if how == "fails":
            gate.errback(KeyError())
        else:
            task.cancel()

    if not waits:
        end()
    for _ in range(2):
        start([lambda: select(*cases)], got)
    if waits:
        end()
    assert got == [KeyError if how == "fails" else CancelledError] * 2
    cases.clear()
    task = None
    assert failures(logged) == []


def test_a_task_that_fails_and_is_not_chosen(clock: Clock, logged: list[Any]) -> None:
    gate: Deferred[None] = Deferred()

    async def wait() -> None:
        await gate

    happens = Event()
    task = spawn(wait, reactor=clock)
    waiting = select(task, happens)
    happens.set()
    gate.errback(KeyError())
    assert waiting.result == (happens, None)
    del task, waiting
    assert [each.type for each in failures(logged)] == [KeyError]


class Pollable:
    """Something else that has a method of this name: ``subprocess.Popen`` has."""

    def poll(self) -> None:
        pass


@pytest.mark.parametrize("what", [None, 3, "channel", Pollable()])
def test_select_refuses_other_types(what: Any) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    with pytest.raises(TypeError, match="cannot wait for"):
        select(channel, what)
    assert channel.try_receive() == 1


def test_select_without_cases() -> None:
    with pytest.raises(ValueError, match="without anything"):
        select()


# Deadlines


def test_a_deadline_for_several_selects(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)

    async def main() -> tuple[list[int], float]:
        deadline = Deadline(10)
        got: list[int] = []
        while True:
            chosen, value = await select(channel, deadline)
            if chosen is deadline:
                assert (await select(deadline))[0] is deadline
                return got, deadline.remaining
            assert value is not None
            got.append(value)

    task = spawn(main, reactor=clock)
    for number in range(3):
        clock.advance(3)
        assert len(clock.getDelayedCalls()) == 1
        channel.try_send(number)
    assert not task.done
    clock.advance(1)
    assert task.result() == ([0, 1, 2], 0)
    assert not clock.getDelayedCalls()
    assert channel.statistics().receivers == 0


def test_the_attributes_of_a_deadline(clock: Clock) -> None:
    deadline = Deadline(10, clock)
    clock.advance(4)
    assert deadline.remaining == 6
    assert "in 6.0 s" in repr(deadline)
    clock.advance(7)
    assert deadline.remaining == 0
    assert not clock.getDelayedCalls()


def test_a_deadline_of_now(clock: Clock) -> None:
    waiting = select(Deadline(0, clock), Event())
    assert waiting.called
    waiting.cancel()


def test_a_waiter_of_a_deadline_cancels_the_others(clock: Clock) -> None:
    deadline = Deadline(1, clock)
    got: list[Any] = []
    tasks: list[Task[Any]] = []

    async def cancels() -> None:
        got.append((await select(deadline, Event()))[0])
        tasks[1].cancel()

    tasks.append(spawn(cancels, reactor=clock))
    tasks.append(spawn(select, deadline, Event(), reactor=clock))
    clock.advance(1)
    assert got == [deadline]
    assert tasks[1].cancelled
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_negative_deadline_is_refused(clock: Clock, seconds: float) -> None:
    with pytest.raises(ValueError, match="0 is the least"):
        Deadline(seconds, clock)


# Callbacks


def test_callbacks_that_select_again(clock: Clock) -> None:
    one: Channel[int] = Channel(0)
    other: Channel[int] = Channel(0)
    got: list[Any] = []

    def again(result: Any = None) -> None:
        if result is not None:
            got.append(result[1])
        select(one, other).addCallback(again)

    again()
    for number in range(10):
        (one, other)[number % 2].try_send(number)
    assert got == list(range(10))
    assert one.statistics() == other.statistics() == (0, 0, 0, 1, False, 0, 0)


def test_a_callback_cancels_another_select(clock: Clock) -> None:
    happens = Event()
    channel: Channel[int] = Channel(0)
    got: list[Any] = []
    first = select(happens, channel)
    second = select(channel, happens)
    first.addCallback(lambda _: second.cancel())
    second.addErrback(lambda failure: got.append(failure.type))
    happens.set()
    assert got == [CancelledError]
    assert channel.statistics().receivers == 0


def test_a_later_select_sees_a_failed_deferred_as_well(logged: list[Any]) -> None:
    failed = fail(KeyError())
    got: list[Any] = []
    STYLES["fromCoroutine"](None, [partial(select, failed)] * 3, got)
    assert got == [KeyError] * 3
    del failed
    assert failures(logged) == []


# Functions, which are called, and cancelled if they are not chosen


class Source:
    """
    Something that a function waits for, and that can be had once.

    :ivar calls: how often the function was called.
    :ivar cancelled: how often what it has returned was cancelled.
    """

    def __init__(self, clock: Clock, how: str) -> None:
        self.gate: Deferred[str] = Deferred(self.cancel)
        self.calls = 0
        self.cancelled = 0
        self._how = how
        self._clock = clock

    def cancel(self, gate: Deferred[str]) -> None:
        self.cancelled += 1

    def wait(self) -> Any:
        self.calls += 1
        results: dict[str, Callable[[], Any]] = {
            "Deferred": lambda: self.gate,
            "async def": self._wait,
            "generator": self._wait_yielding,
            "@coroutine": coroutine(self._wait_yielding),
            "@inlineCallbacks": inlineCallbacks(self._wait_yielding),
            "Task": lambda: spawn(self._wait, reactor=self._clock),
        }
        return results[self._how]()

    async def _wait(self) -> str:
        value: str = await self.gate
        return value

    def _wait_yielding(self) -> Generator[Any, Any, Any]:
        return (yield self.gate)


sources = pytest.mark.parametrize(
    "how",
    ["Deferred", "async def", "generator", "@coroutine", "@inlineCallbacks", "Task"],
)


@sources
@pytest.mark.parametrize("early", [True, False])
def test_a_function_that_is_chosen(
    clock: Clock, how: str, early: bool, logged: list[Any]
) -> None:
    source, other = Source(clock, how), Event()
    if early:
        source.gate.callback("value")
    wait = source.wait
    got = spawn(select, wait, other, reactor=clock)
    if not early:
        assert not got.done
        source.gate.callback("value")
    assert got.result() == (wait, "value")
    assert (source.calls, source.cancelled) == (1, 0)
    other.set()
    assert failures(logged) == []


@sources
@pytest.mark.parametrize("ending", ["other is chosen", "cancelled", "other fails"])
def test_a_function_that_is_not_chosen(
    clock: Clock, how: str, ending: str, logged: list[Any]
) -> None:
    source, other = Source(clock, how), Channel[int](0)
    got = spawn(select, source.wait, other, reactor=clock)
    if ending == "cancelled":
        got.cancel()
        assert got.cancelled
    elif ending == "other fails":
        other.close()
        with pytest.raises(EndOfChannel):
            got.result()
    else:
        other.try_send(1)
        assert got.result() == (other, 1)
    assert (source.calls, source.cancelled) == (1, 1)
    assert other.statistics().receivers == 0
    del got
    assert failures(logged) == []


@sources
def test_a_function_that_fails(clock: Clock, how: str, logged: list[Any]) -> None:
    source, other = Source(clock, how), Source(clock, how)
    got = spawn(select, source.wait, other.wait, reactor=clock)
    source.gate.errback(KeyError())
    with pytest.raises(KeyError):
        got.result()
    assert (source.cancelled, other.cancelled) == (0, 1)
    del got
    assert failures(logged) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_function_is_not_called_if_another_case_is_ready(
    clock: Clock, seed: int
) -> None:
    """Or is called, and cancelled at once."""
    random.seed(seed)
    source, ready = Source(clock, "Deferred"), Event()
    ready.set()
    assert select(source.wait, ready).result == (ready, None)
    assert source.calls == source.cancelled


def test_a_function_that_raises_at_once(clock: Clock) -> None:
    def raises() -> Deferred[None]:
        raise KeyError

    for seed in range(10):
        random.seed(seed)
        source = Source(clock, "Deferred")
        failed: list[Any] = []
        select(raises, source.wait).addErrback(failed.append)
        assert [each.type for each in failed] == [KeyError]
        assert source.calls == source.cancelled


@pytest.mark.parametrize("what", [lambda: 3, Event, Channel.receive])
def test_a_function_that_cannot_wait(clock: Clock, what: Any) -> None:
    source = Source(clock, "Deferred")
    failed: list[Any] = []
    select(source.wait, what).addErrback(failed.append)
    assert [each.type for each in failed] == [TypeError]
    assert source.calls == source.cancelled


def test_a_function_that_makes_another_case_happen(clock: Clock) -> None:
    """A case that was looked at before: it is looked at again."""
    for seed in range(20):
        random.seed(seed)
        event, channel = Event(), Channel[int](1)
        called: list[Deferred[None]] = []

        def sets(
            event: Event = event, called: list[Deferred[None]] = called
        ) -> Deferred[None]:
            event.set()
            called.append(Deferred())
            return called[0]

        assert select(channel, event, sets).result == (event, None)
        assert called[0].called


def test_a_cancelled_function_makes_another_case_happen(clock: Clock) -> None:
    """The other case comes too late to be chosen."""
    event, other = Event(), Event()
    channel: Channel[int] = Channel(1)

    async def cleans_up() -> None:
        try:
            await Deferred()
        finally:
            event.set()
            channel.try_send(1)

    got = select(lambda: spawn(cleans_up, reactor=clock), event, channel, other)
    other.set()
    assert got.result == (other, None)
    assert channel.statistics().receivers == 0
    assert channel.try_receive() == 1


def test_an_error_in_the_cleanup_of_a_cancelled_function_is_logged(
    clock: Clock, logged: list[Any]
) -> None:
    async def fails() -> None:
        try:
            await Deferred()
        finally:
            raise KeyError

    event = Event()
    got = spawn(select, fails, event, reactor=clock)
    event.set()
    assert got.result() == (event, None)
    assert [each.type for each in failures(logged)] == [KeyError]


def test_the_reason_of_the_cancelled_function(clock: Clock) -> None:
    told: list[str] = []

    async def waits() -> None:
        try:
            await Deferred()
        except Cancelled as error:
            told.append(str(error))
            raise

    event = Event()
    got = spawn(select, waits, event, reactor=clock)
    event.set()
    assert got.done
    assert told == ["select() does not wait for it any more"]


def test_a_received_value_wins_over_a_case_that_its_sender_makes_happen(
    clock: Clock, one_in_a_turn: None
) -> None:
    """
    The sender is told that it has been received, and makes another case happen at once:
    the value is chosen.
    """
    channel: Channel[str] = Channel(0)
    event = Event()
    got: list[Any] = []

    def main() -> None:
        channel.send("first")
        assert channel.receive().result == "first"
        channel.send("value").addCallback(lambda _: event.set())
        select(channel.receive, event).addCallback(got.append)

    spawn(main, reactor=clock)
    assert got == []
    clock.advance(0)
    assert event.is_set
    [(chosen, value)] = got
    assert (chosen, value) == (channel.receive, "value")
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)


def test_functions_in_each_style(start: Start, clock: Clock) -> None:
    channel: Channel[str] = Channel(1)
    receive = channel.receive
    got: list[Any] = []
    step = partial(select, receive, Event(), lambda: sleep(1, clock))
    start([step, step], got)
    channel.try_send("value")
    assert got == [(receive, "value")]
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(1)
    assert len(got) == 2
    assert got[1][1] is None
    assert not clock.getDelayedCalls()
    assert channel.statistics().receivers == 0


@pytest.mark.parametrize("seed", range(40))
def test_random_selects_lose_no_value(clock: Clock, seed: int) -> None:
    """
    Whatever is chosen, and however often a select is cancelled: each value is received
    once, by the functions, by the cases and by plain receives.
    """
    random_ = random.Random(seed)
    random.seed(seed)
    made: list[Channel[int]] = [Channel(each) for each in (0, 0, 1, 2)]
    sent = Counter[int]()
    got = Counter[int]()

    async def send(first: int) -> None:
        for number in range(first, first + 20):
            channel = random_.choice(made)
            if random_.random() < 0.5:
                # As a function, which may be cancelled in the middle.
                patience = Deadline(random_.random())
                call = partial(channel.send, number)
                chosen, _ = await select(call, patience)
                sent[number] += chosen is call
            else:
                await channel.send(number)
                sent[number] += 1
            if random_.random() < 0.3:
                await sleep(random_.random())

    async def receive() -> None:
        while True:
            cases: list[Any] = random_.sample(made, 2)
            cases = [each.receive if random_.random() < 0.7 else each for each in cases]
            cases.append(Deadline(random_.random()))
            with move_on_after(random_.random()) as limit:
                chosen, number = await select(*cases)
            if not limit.expired and chosen is not cases[-1]:
                got[number] += 1
            if random_.random() < 0.3:
                await sleep(random_.random())

    senders = [spawn(send, 100 * each, reactor=clock) for each in range(5)]
    receivers = [spawn(receive, reactor=clock) for _ in range(3)]
    for _ in range(4000):
        clock.advance(random_.random() / 4)
        if all(each.done for each in senders) and sent.total() == got.total():
            break
    for each in senders:
        each.result()
    for receiver in receivers:
        receiver.cancel()
        assert receiver.cancelled
    for channel in made:
        assert channel.statistics()[:1] + channel.statistics()[2:4] == (0, 0, 0)
    assert +sent == got
    assert set(got.values()) == {1}


def test_the_reads_of_streams(reactor: Any) -> None:
    """A read that is not chosen takes nothing out of its stream, and the next can."""

    async def main() -> list[Any]:
        async with connected(reactor) as (one, a), connected(reactor) as (two, b):
            got: list[Any] = []
            stop = Event()
            for peer, text in ((a, b"1\n"), (b, b"2\n"), (b, b"half"), (a, b"3\n")):
                peer.sendall(text)
                if text != b"half":
                    chosen, line = await select(one.read_line, two.read_line, stop.wait)
                    got.append((chosen == one.read_line, line))
            b.sendall(b" and half\n")
            got.append(await two.read_line())
            reactor.callLater(0, stop.set)
            chosen, _ = await select(one.read_line, stop)
            got.append(chosen is stop)
            a.sendall(b"4\n")
            got.append(await one.read_line())
            return got

    assert run(reactor, main) == [
        (True, b"1"),
        (False, b"2"),
        (True, b"3"),
        b"half and half",
        True,
        b"4",
    ]


def test_cancelled_everywhere() -> None:
    async def handler(stream: Stream) -> None:
        other: Channel[bytes] = Channel(0)
        chosen, _ = await select(stream.read_line, lambda: sleep(1))
        assert chosen != stream.read_line
        chosen, line = await select(stream.read_line, other.receive)
        assert (chosen, line) == (stream.read_line, b"line")

    def handler_yielding(stream: Stream) -> Generator[Any, Any, None]:
        yield select(stream.read_line, lambda: sleep(1))
        assert (yield stream.read_line()) == b"line"

    async def peer(stream: Stream) -> None:
        await sleep(2)
        await stream.write(b"line\n")
        await stream.write_eof()

    assert cancel_everywhere(handler, peer) == 2
    assert cancel_everywhere(handler_yielding, peer) == 2
