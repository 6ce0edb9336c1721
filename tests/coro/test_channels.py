"""Channels: the order of values and waiters, cancellation, and closing."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Callable, Generator
from functools import partial
from itertools import count, pairwise, product
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.task import Clock

from tests.coro.support import (
    STYLES,
    Start,
    failures,
    most_left_by_timeouts,
    spin,
)
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Channel,
    ChannelClosed,
    EndOfChannel,
    Task,
    WouldBlock,
    select,
    sleep,
    spawn,
    timeout,
)


def finish(clock: Clock, tasks: list[Task[Any]]) -> None:
    """Let turns pass until they have ended."""
    clock.pump([0] * 1_000)
    assert all(each.done for each in tasks)


class Value:
    """A value whose end can be observed, by a weak reference."""


# Sending and receiving


@pytest.mark.parametrize("capacity", [0, 1, 2, 10])
def test_values_are_received_in_the_order_sent(start: Start, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []
    done: list[Any] = []
    start([partial(channel.send, each) for each in range(5)], done)
    assert done == [None] * min(capacity, 5)
    start([channel.receive] * 5, got)
    assert got == [0, 1, 2, 3, 4]
    assert done == [None] * 5


@pytest.mark.parametrize("capacity", [0, 1])
def test_receivers_wait_for_senders(start: Start, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []
    start([channel.receive] * 3, got)
    start([partial(channel.send, each) for each in range(3)], [])
    assert got == [0, 1, 2]


def test_without_a_buffer_the_sender_waits_for_the_receiver(start: Start) -> None:
    channel: Channel[str] = Channel(0)
    done: list[Any] = []
    start([lambda: channel.send("a")], done)
    assert done == []
    assert channel.statistics().buffered == 0
    received = channel.receive()
    assert done == [None]
    assert received.result == "a"


def test_a_sender_waits_while_the_buffer_is_full(clock: Clock) -> None:
    channel: Channel[int] = Channel(2)
    sends = [channel.send(each) for each in range(4)]
    assert [each.called for each in sends] == [True, True, False, False]
    assert channel.try_receive() == 0
    assert [each.called for each in sends] == [True, True, True, False]
    assert [channel.try_receive() for _ in range(3)] == [1, 2, 3]
    assert all(each.called for each in sends)


@pytest.mark.parametrize("capacity", [0, 2])
def test_senders_are_served_in_order(clock: Clock, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    order: list[int] = []

    async def send(value: int) -> None:
        await channel.send(value)
        order.append(value)

    for value in range(5):
        spawn(send, value, reactor=clock)
    assert [channel.try_receive() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("capacity", [0, 2])
def test_receivers_are_served_in_order(clock: Clock, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[tuple[int, int]] = []

    async def receive(number: int) -> None:
        got.append((number, await channel.receive()))

    for number in range(5):
        spawn(receive, number, reactor=clock)
    for value in range(5):
        channel.try_send(value)
    assert got == [(each, each) for each in range(5)]


def test_many_senders_and_many_receivers(clock: Clock) -> None:
    channel: Channel[tuple[int, int]] = Channel(3)
    got: list[list[tuple[int, int]]] = [[] for _ in range(4)]

    async def send(sender: int) -> None:
        for number in range(50):
            await channel.send((sender, number))

    async def receive(to: list[tuple[int, int]]) -> None:
        async for each in channel:
            to.append(each)

    receivers = [spawn(receive, each, reactor=clock) for each in got]
    senders = [spawn(send, each, reactor=clock) for each in range(5)]
    finish(clock, senders)
    channel.close()
    finish(clock, receivers)
    everything = sorted(each for some in got for each in some)
    assert everything == [(s, n) for s in range(5) for n in range(50)]
    for some in got:
        for sender in range(5):
            numbers = [n for s, n in some if s == sender]
            assert numbers == sorted(numbers)


@pytest.mark.parametrize("value", [None, False, 0, "", ()])
@pytest.mark.parametrize("capacity", [0, 1])
def test_any_object_can_be_sent(clock: Clock, value: object, capacity: int) -> None:
    channel: Channel[object] = Channel(capacity)
    got: list[Any] = []
    spawn(channel.receive, reactor=clock).as_deferred().addCallback(got.append)
    channel.try_send(value)
    sent = channel.send(value)
    got.append(channel.try_receive())
    assert sent.called
    assert got == [value, value]


@pytest.mark.parametrize("capacity", [-1, float("nan")])
def test_a_negative_capacity_is_refused(capacity: Any) -> None:
    with pytest.raises(ValueError, match="0 is the least"):
        Channel(capacity)


# Without waiting


def test_try_send(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    with pytest.raises(WouldBlock, match="no room"):
        channel.try_send(2)
    assert channel.try_receive() == 1
    with pytest.raises(WouldBlock, match="is empty"):
        channel.try_receive()


def test_try_send_and_try_receive_without_a_buffer(clock: Clock) -> None:
    """It succeeds if an operation waits at the other side."""
    channel: Channel[int] = Channel(0)
    with pytest.raises(WouldBlock):
        channel.try_send(1)
    with pytest.raises(WouldBlock):
        channel.try_receive()
    received = channel.receive()
    channel.try_send(2)
    assert received.result == 2
    sent = channel.send(3)
    assert channel.try_receive() == 3
    assert sent.called


def test_try_send_does_not_overtake_waiting_senders(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    channel.send(2)
    with pytest.raises(WouldBlock):
        channel.try_send(3)
    assert [channel.try_receive(), channel.try_receive()] == [1, 2]


def test_try_send_and_try_receive_on_a_closed_channel(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.try_send(2)
    assert channel.try_receive() == 1
    with pytest.raises(EndOfChannel):
        channel.try_receive()


# The end


def test_receivers_get_the_values_left_and_then_the_end(start: Start) -> None:
    channel: Channel[int] = Channel(3)
    for each in range(3):
        channel.try_send(each)
    channel.close()
    got: list[Any] = []
    start([channel.receive] * 5, got)
    assert got == [0, 1, 2, EndOfChannel, EndOfChannel]


@pytest.mark.parametrize("capacity", [0, 3])
def test_waiting_receivers_get_the_end(start: Start, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []
    for _ in range(3):
        start([channel.receive], got)
    channel.close()
    assert got == [EndOfChannel] * 3
    assert channel.statistics().receivers == 0


@pytest.mark.parametrize("capacity", [0, 2])
def test_waiting_senders_fail_when_the_channel_closes(
    start: Start, capacity: int
) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []
    for each in range(4):
        start([partial(channel.send, each)], got)
    channel.close()
    assert got == [None] * capacity + [ChannelClosed] * (4 - capacity)
    received: list[Any] = []
    start([channel.receive] * 4, received)
    left = list(range(capacity))
    assert received == left + [EndOfChannel] * (4 - capacity)


def test_send_to_a_closed_channel_raises(start: Start) -> None:
    channel: Channel[int] = Channel(5)
    channel.close()
    got: list[Any] = []
    start([lambda: channel.send(1), lambda: channel.send(2)], got)
    assert got == [ChannelClosed, ChannelClosed]
    assert channel.statistics().buffered == 0


def test_closing_twice_does_nothing(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    channel.try_send(1)
    channel.close()
    channel.close()
    assert channel.try_receive() == 1
    with pytest.raises(EndOfChannel):
        channel.try_receive()


def test_errors_of_a_closed_channel_name_it(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)
    waiting = channel.receive()
    channel.close()
    for error in (waiting.result.value, channel.receive().result.value):
        assert type(error) is EndOfChannel
        assert error.channel is channel
    waiting.addErrback(lambda _: None)


def test_an_unawaited_send_that_is_refused_is_logged(
    clock: Clock, logged: list[Any]
) -> None:
    channel: Channel[int] = Channel(0)
    channel.send(1)
    channel.close()
    channel.send(2)
    assert [each.type for each in failures(logged)] == [ChannelClosed] * 2


def test_an_awaited_send_that_is_refused_is_not_logged(
    clock: Clock, logged: list[Any]
) -> None:
    channel: Channel[int] = Channel(0)
    got: list[Any] = []
    for style in STYLES.values():
        style(clock, [lambda: channel.send(1)], got)
    channel.close()
    assert got == [ChannelClosed] * len(STYLES)
    assert failures(logged) == []


async def _all(channel: Channel[Any]) -> list[Any]:
    return [each async for each in channel]


@pytest.mark.parametrize("in_task", [True, False])
@pytest.mark.parametrize("capacity", [0, 2])
def test_iteration_ends_when_the_channel_is_closed(
    clock: Clock, in_task: bool, capacity: int
) -> None:
    channel: Channel[int] = Channel(capacity)
    deferred: Deferred[Any] = (
        spawn(_all, channel, reactor=clock).as_deferred()
        if in_task
        else Deferred.fromCoroutine(_all(channel))
    )
    got: list[Any] = []
    deferred.addCallback(got.append)
    spawn(partial(channel.send, 1), reactor=clock)
    spawn(partial(channel.send, 2), reactor=clock)
    assert got == []
    channel.close()
    assert got == [[1, 2]]


def test_an_unreferenced_channel_is_freed_with_its_waiters(
    clock: Clock, logged: list[Any]
) -> None:
    """A channel that is not referenced any more, and the tasks that wait for it."""
    channel: Channel[Value] = Channel(1)
    value = Value()
    spawn(_all, channel, reactor=clock)
    channel.try_send(value)
    channel.try_send(Value())
    gone: list[weakref.ref[Any]] = [weakref.ref(channel), weakref.ref(value)]
    del channel, value
    assert failures(logged) == []
    assert [each() for each in gone] == [None, None]


# What it tells of itself


@pytest.mark.usefixtures("debug_off")
def test_statistics(clock: Clock) -> None:
    channel: Channel[int] = Channel(2)
    assert channel.statistics() == (0, 2, 0, 0, False, 0, 0)
    receiving = [channel.receive() for _ in range(3)]
    assert channel.statistics() == (0, 2, 0, 3, False, 0, 0)
    receiving[1].addErrback(lambda _: None).cancel()
    assert channel.statistics() == (0, 2, 0, 2, False, 0, 0)
    sending = [channel.send(each) for each in range(7)]
    assert channel.statistics() == (2, 2, 3, 0, False, 0, 0)
    sending[5].addErrback(lambda _: None).cancel()
    statistics = channel.statistics()
    assert statistics.buffered == 2
    assert statistics.capacity == 2
    assert statistics.senders == 2
    assert statistics.receivers == 0
    assert not statistics.closed
    for each in sending:
        each.addErrback(lambda _: None)
    channel.close()
    assert channel.statistics() == (2, 2, 0, 0, True, 0, 0)


def test_repr(clock: Clock) -> None:
    channel: Channel[int] = Channel(3)
    channel.try_send(1)
    assert "1 of 3 values, 0 senders and 0 receivers wait" in repr(channel)
    assert "closed" not in repr(channel)
    channel.close()
    assert "closed 1 of 3 values" in repr(channel)
    sending = channel.sending(2)
    assert repr(channel) in repr(sending)
    assert sending.value == 2
    assert sending.channel is channel


# Cancellation


@pytest.mark.parametrize("capacity", [0, 1])
def test_a_cancelled_send_has_sent_nothing(start: Start, capacity: int) -> None:
    channel: Channel[str] = Channel(capacity)
    for _ in range(capacity):
        channel.try_send("first")
    got: list[Any] = []
    sender = start([lambda: channel.send("cancelled")], got)
    last = channel.send("last")
    assert channel.statistics().senders == 2
    sender.cancel()
    assert got in ([], [CancelledError])
    assert channel.statistics().senders == 1
    received = [channel.try_receive() for _ in range(capacity + 1)]
    assert received == ["first"] * capacity + ["last"]
    assert last.called
    with pytest.raises(WouldBlock):
        channel.try_receive()


@pytest.mark.parametrize("capacity", [0, 1])
def test_a_cancelled_receive_has_taken_nothing(start: Start, capacity: int) -> None:
    channel: Channel[str] = Channel(capacity)
    got: list[Any] = []
    receivers = [start([channel.receive], got) for _ in range(3)]
    receivers[0].cancel()
    receivers[2].cancel()
    assert got in ([], [CancelledError] * 2)
    assert channel.statistics().receivers == 1
    channel.try_send("a")
    assert got[-1] == "a"
    sent = channel.send("b")
    assert sent.called == bool(capacity)
    assert channel.try_receive() == "b"


@pytest.mark.parametrize("what", ["send", "receive"])
def test_cancelling_a_finished_operation_does_nothing(start: Start, what: str) -> None:
    channel: Channel[int] = Channel(0)
    done: list[Any] = []
    if what == "send":
        operation: Any = channel.send(1)
        other: Any = channel.receive()
    else:
        operation = channel.receive()
        other = channel.send(1)
    operation.cancel()
    start([lambda: operation, lambda: other], done)
    assert done == ([None, 1] if what == "send" else [1, None])


def test_timeouts(clock: Clock) -> None:
    channel: Channel[str] = Channel(0)

    async def main() -> list[Any]:
        with pytest.raises(TimeoutError), timeout(1):
            await channel.send("late")
        with pytest.raises(TimeoutError), timeout(1):
            await channel.receive()
        channel.send("in time")
        with timeout(1):
            return [await channel.receive(), channel.statistics()]

    task = spawn(main, reactor=clock)
    clock.pump([1, 1])
    assert task.result() == ["in time", (0, 0, 0, 0, False, 0, 0)]
    assert not clock.getDelayedCalls()


def test_a_cancelled_receive_does_not_lose_its_value(clock: Clock) -> None:
    """The receiver is cancelled or times out before it runs with the value."""
    channel: Channel[int] = Channel(0)
    got: list[int] = []

    async def receive() -> None:
        with timeout(1):
            got.append(await channel.receive())
            got.append(await channel.receive())

    def send_and_cancel() -> None:
        channel.try_send(1)
        first.cancel()
        channel.try_send(2)
        clock.advance(1)

    first = spawn(receive, reactor=clock)
    second = spawn(receive, reactor=clock)
    spawn(send_and_cancel, reactor=clock)
    assert got == [1, 2]
    assert first.cancelled
    assert second.failed
    with pytest.raises(TimeoutError):
        second.result()
    assert channel.statistics().receivers == 0


@frees_at_once
def test_ten_thousand_timeouts_leave_nothing_behind(clock: Clock) -> None:
    """Behind a receiver that waits on, so that each would be left in the middle."""
    channel: Channel[Value] = Channel(0)
    patient = spawn(channel.receive, reactor=clock)

    def receive() -> tuple[Any, Deferred[Any]]:
        operation = channel.receive()
        return operation, operation

    most = most_left_by_timeouts(clock, 10_000, receive)
    assert channel.statistics().receivers == 1
    # The patient receiver, the operation that waits, and the last one's error.
    assert most <= 3
    value = Value()
    channel.try_send(value)
    assert patient.result() is value


@frees_at_once
def test_sends_that_time_out_leave_nothing_behind(clock: Clock) -> None:
    channel: Channel[Value] = Channel(0)
    spawn(lambda: channel.send(Value()), reactor=clock)

    def send() -> tuple[Any, Deferred[Any]]:
        value = Value()
        return value, channel.send(value)

    assert most_left_by_timeouts(clock, 1_000, send) <= 2
    assert channel.statistics().senders == 1


ORDERS: dict[str, Callable[[list[Any]], object]] = {
    "first to last": lambda waiting: None,
    "last to first": lambda waiting: waiting.reverse(),
    "random": random.Random(1).shuffle,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["send", "receive"])
def test_cancelling_many_operations_takes_linear_time(
    clock: Clock, order: str, what: str
) -> None:
    """If each operation were searched for in the queue, this would take minutes."""
    channel: Channel[int] = Channel(0)
    start = partial(channel.send, 1) if what == "send" else channel.receive
    waiting: list[Any] = [start() for _ in range(100_000)]
    kept = {*range(0, len(waiting), 10_000)}
    survivors = [waiting[each] for each in sorted(kept)]
    cancelled = [each for n, each in enumerate(waiting) if n not in kept]
    ORDERS[order](cancelled)
    for each in cancelled:
        each.cancel()
    assert max(channel.statistics()[2:4]) == len(survivors)
    for number, each in enumerate(survivors):
        assert not each.called
        if what == "send":
            channel.try_receive()
        else:
            channel.try_send(number)
            assert each.result == number
        assert each.called
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)


# Turns


# Code outside of the tasks of this package has to give turns itself.
TASKS = [each for each in STYLES if each not in ("@inlineCallbacks", "fromCoroutine")]


@pytest.mark.parametrize("style", TASKS)
@pytest.mark.parametrize("capacity", [1, 300])
def test_a_task_that_sends_to_itself_lets_other_tasks_run(
    reactor: Any, style: str, capacity: int
) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []
    others: list[Any] = []

    def steps() -> Generator[Callable[[], Any], None, None]:
        for number in count():
            yield partial(channel.send, number)
            yield channel.receive

    task = STYLES[style](reactor, steps(), got)
    STYLES[style](reactor, [partial(sleep, 0, reactor)], others)
    assert others == []
    done = progress(reactor, got, lambda: len(got) > 10_000)
    assert max(done) < 1_000
    assert others == [None]
    numbers = got[1::2]
    assert numbers == list(range(len(numbers)))
    task.cancel()


@pytest.mark.parametrize("capacity", [0, 1, 7, 1000])
def test_two_busy_tasks_let_the_reactor_run(reactor: Any, capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[int] = []

    async def send() -> None:
        for number in range(10_000):
            await channel.send(number)
        channel.close()

    async def receive() -> None:
        async for each in channel:
            got.append(each)

    tasks = [spawn(send, reactor=reactor), spawn(receive, reactor=reactor)]
    done = progress(reactor, got, lambda: all(each.done for each in tasks))
    assert max(done) < 2_000
    assert got == list(range(10_000))


def progress(reactor: Any, got: list[Any], until: Callable[[], bool]) -> list[int]:
    """How much more there was to be had in each turn of a reactor."""
    had = [0]

    def turn() -> None:
        had.append(len(got))
        calls.append(reactor.callLater(0, turn))

    calls = [reactor.callLater(0, turn)]
    spin(reactor, until)
    calls[-1].cancel()
    return [after - before for before, after in pairwise(had)]


@pytest.fixture
def one_unawaited_in_a_turn(one_in_a_turn: None, debug_off: None) -> None:
    """Of operations that may stay unawaited, one is served in a turn."""


def use_up_the_turn(channel: Channel[Any]) -> None:
    if channel.send(None).called:
        channel.try_receive()
    else:
        channel.receive()


@pytest.mark.usefixtures("one_unawaited_in_a_turn")
@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 9])
def test_operations_are_served_in_order_across_turns(
    clock: Clock, capacity: int
) -> None:
    """No operation overtakes those that wait for the turn."""
    channel: Channel[int] = Channel(capacity)
    got: list[tuple[int, int]] = []
    order: list[int] = []

    async def send(value: int) -> None:
        await channel.send(value)
        order.append(value)

    async def receive(number: int) -> None:
        got.append((number, await channel.receive()))

    def senders_come() -> None:
        use_up_the_turn(channel)
        for each in range(4):
            spawn(send, each)
        spawn(receivers_come)

    def receivers_come() -> None:
        for each in range(4):
            spawn(receive, each)
        spawn(late_ones_come)

    def late_ones_come() -> None:
        with pytest.raises(WouldBlock):
            channel.try_receive()
        with pytest.raises(WouldBlock):
            channel.try_send(-1)
        spawn(send, 4)
        spawn(receive, 4)

    spawn(senders_come, reactor=clock)
    assert got == []
    clock.advance(0)
    assert got == [(each, each) for each in range(5)]
    assert order == list(range(5))
    assert channel.statistics() == (0, capacity, 0, 0, False, 0, 0)


@pytest.mark.usefixtures("one_unawaited_in_a_turn")
def test_operations_keep_their_order_when_a_receiver_uses_up_the_turn(
    clock: Clock,
) -> None:
    """The receiver is resumed within the select that sends to it: it counts first."""
    channel: Channel[str] = Channel(1)
    got: list[tuple[str, str]] = []

    def send_and_receive(value: str) -> None:
        got.append(("first", value))
        channel.send("B")
        channel.receive().addCallback(lambda value: got.append(("second", value)))

    async def send() -> None:
        channel.receive().addCallback(send_and_receive)
        await select(channel.sending("A"))
        channel.receive().addCallback(lambda value: got.append(("third", value)))

    spawn(send, reactor=clock)
    clock.advance(0)
    channel.send("C")
    assert got == [("first", "A"), ("second", "B"), ("third", "C")]


@pytest.mark.usefixtures("one_unawaited_in_a_turn")
@pytest.mark.parametrize("left", range(5))
def test_receivers_that_wait_for_a_turn_get_the_end(clock: Clock, left: int) -> None:
    """There are more receivers than values left."""
    channel: Channel[int] = Channel(9)
    got: list[list[int]] = []

    async def drain() -> None:
        got.append([each async for each in channel])

    def main() -> None:
        for each in range(left):
            channel.try_send(each)
        channel.close()
        for _ in range(4):
            spawn(drain)

    spawn(main, reactor=clock)
    clock.advance(0)
    assert len(got) == 4
    assert sorted(each for some in got for each in some) == list(range(left))


# Callbacks that use the channel


def test_a_receiver_sends_on_at_once(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)
    got: list[int] = []

    def received(value: int) -> None:
        got.append(value)
        if value < 100:
            channel.receive().addCallback(received)
            channel.send(value + 1)

    channel.receive().addCallback(received)
    channel.send(0)
    assert got == list(range(101))


def test_callbacks_close_the_channel(clock: Clock) -> None:
    channel: Channel[int] = Channel(0)
    got: list[Any] = []

    def at_end(failure: Any) -> None:
        got.append(failure.type)
        channel.close()

    for _ in range(3):
        channel.receive().addErrback(at_end)
    channel.close()
    assert got == [EndOfChannel] * 3


def test_a_callback_sends_while_the_channel_is_closed(clock: Clock) -> None:
    channel: Channel[int] = Channel(1)
    got: list[Any] = []

    def at_end(failure: Any) -> None:
        got.append(failure.type)
        with pytest.raises(ChannelClosed):
            channel.try_send(1)
        channel.send(2).addErrback(lambda failure: got.append(failure.type))

    channel.receive().addErrback(at_end)
    STYLES["async def"](clock, [channel.receive], got)
    channel.close()
    assert got == [EndOfChannel, ChannelClosed, EndOfChannel]


@pytest.mark.parametrize(("capacity", "trying"), [*product(range(4), [False, True])])
def test_a_callback_receives_while_the_channel_is_closed(
    clock: Clock, capacity: int, trying: bool
) -> None:
    """It gets what is left, and makes no room for the senders that wait."""
    sent: list[Any] = []
    channel: Channel[int] = Channel(capacity)
    got: list[Any] = []

    def refused(failure: Any) -> None:
        sent.append(failure.type)
        if trying:
            try:
                got.append(channel.try_receive())
            except EndOfChannel:
                got.append(EndOfChannel)
        else:
            STYLES["async def"](clock, [channel.receive], got)

    for each in range(capacity):
        channel.try_send(each)
    for _ in range(3):
        channel.send(-1).addCallbacks(sent.append, refused)
    channel.close()
    assert sent == [ChannelClosed] * 3
    assert got == [*range(capacity), EndOfChannel, EndOfChannel, EndOfChannel][:3]


@pytest.mark.usefixtures("one_unawaited_in_a_turn")
def test_a_callback_receives_in_the_turn_its_operation_waited_for(clock: Clock) -> None:
    channel: Channel[str] = Channel(1)
    got: list[Any] = []

    def main() -> None:
        use_up_the_turn(channel)
        channel.send("a").addCallback(
            lambda _: channel.receive().addCallback(got.append)
        )

    spawn(main, reactor=clock)
    assert got == []
    clock.advance(0)
    assert got == ["a"]
    assert channel.statistics() == (0, 1, 0, 0, False, 0, 0)


def test_a_receive_gets_a_callback_while_it_is_served(
    clock: Clock, one_in_a_turn: None
) -> None:
    """A task waits for it as well: the callback and the task both get the value."""
    channel: Channel[str] = Channel(0)
    got: list[Any] = []

    async def receive() -> str:
        return await receiving

    def main() -> None:
        channel.send("first")
        assert channel.receive().result == "first"

    spawn(main, reactor=clock)
    sending = channel.send("value")
    receiving = channel.receive()
    task = spawn(receive, reactor=clock)
    sending.addCallback(lambda _: receiving.addCallback(got.append))
    clock.advance(0)
    assert got == ["value"]
    assert task.result() == "value"


@pytest.mark.usefixtures("one_unawaited_in_a_turn")
def test_a_callback_sends_in_the_turn_its_operation_waited_for(clock: Clock) -> None:
    """It comes behind the operations that have waited for that turn as well."""
    channel: Channel[str] = Channel(1)
    got: list[str] = []

    def send(value: str) -> None:
        got.append(value)
        if value == "a":
            channel.send("c")

    def main() -> None:
        use_up_the_turn(channel)
        for value in "ab":
            channel.send(value)
        for _ in range(3):
            channel.receive().addCallback(send)

    spawn(main, reactor=clock)
    clock.advance(0)
    assert got == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["send", "receive"])
def test_callbacks_cancel_waiting_operations(clock: Clock, what: str) -> None:
    channel: Channel[int] = Channel(0)
    outcomes: list[Any] = []
    start = partial(channel.send, 1) if what == "send" else channel.receive
    waiting: list[Deferred[Any]] = []

    def cancel_others(result: Any) -> None:
        outcomes.append("done")
        for each in waiting[1:]:
            each.cancel()

    waiting.append(start().addCallback(cancel_others))
    for _ in range(3):
        waiting.append(
            start().addErrback(lambda failure: outcomes.append(failure.type))
        )
    if what == "send":
        assert channel.try_receive() == 1
    else:
        channel.try_send(1)
    assert outcomes == ["done"] + [CancelledError] * 3
    assert channel.statistics() == (0, 0, 0, 0, False, 0, 0)


def test_inline_callbacks_between_two_channels(reactor: Any) -> None:
    """Ten thousand values through a chain of three."""
    first: Channel[int] = Channel(0)
    second: Channel[int] = Channel(5)
    got: list[int] = []

    @inlineCallbacks
    def send() -> Generator[Any, Any, None]:
        for number in range(10_000):
            yield first.send(number)
        first.close()

    @inlineCallbacks
    def pass_on() -> Generator[Any, Any, None]:
        while True:
            try:
                number = yield first.receive()
            except EndOfChannel:
                break
            yield second.send(number)
        second.close()

    async def receive() -> None:
        async for each in second:
            got.append(each)

    passing = pass_on()
    task = spawn(receive, reactor=reactor)
    sending = send()
    spin(reactor, lambda: task.done)
    assert passing.called
    assert sending.called
    assert got == list(range(10_000))


def test_under_asyncio_alone() -> None:
    """An operation is no asyncio future: what does not wait does work there."""
    channel: Channel[int] = Channel(1)

    async def main() -> int:
        await channel.send(1)
        return await channel.receive()

    assert asyncio.run(main()) == 1
