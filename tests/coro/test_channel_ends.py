"""The ends of a channel: it is closed with the last one of either side."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.task import Clock

from tests.coro.support import Start, run
from tests.support import frees_at_once
from twisted_rtsig.coro import (
    Channel,
    ChannelClosed,
    ChannelReceiver,
    ChannelSender,
    EndOfChannel,
    Event,
    Stream,
    Task,
    TaskGroup,
    WouldBlock,
    coroutine,
    move_on_after,
    select,
    sleep,
    spawn,
)
from twisted_rtsig.coro.testing import cancel_everywhere


async def sends(sender: ChannelSender[Any], values: Any) -> None:
    with sender:
        for value in values:
            await sender.send(value)


def sends_yielding(sender: ChannelSender[Any], values: Any) -> Generator[Any, Any, Any]:
    with sender:
        for value in values:
            yield sender.send(value)


async def receives(receiver: ChannelReceiver[Any], got: list[Any]) -> None:
    with receiver:
        async for value in receiver:
            got.append(value)


def receives_yielding(
    receiver: ChannelReceiver[Any], got: list[Any]
) -> Generator[Any, Any, Any]:
    with receiver:
        while True:
            try:
                got.append((yield receiver.receive()))
            except EndOfChannel:
                return


SENDING: dict[str, Callable[..., Any]] = {
    "async def": sends,
    "generator": sends_yielding,
    "@coroutine": coroutine(sends_yielding),
}
RECEIVING: dict[str, Callable[..., Any]] = {
    "async def": receives,
    "generator": receives_yielding,
    "@coroutine": coroutine(receives_yielding),
}


@pytest.mark.parametrize("capacity", [0, 1, 100])
@pytest.mark.parametrize("style", SENDING)
def test_the_channel_closes_with_its_last_sender(
    clock: Clock, style: str, capacity: int
) -> None:
    channel: Channel[int] = Channel(capacity)
    got: list[int] = []
    with channel.open_sender() as first:
        senders = [
            spawn(SENDING[style], first.clone(), range(each), reactor=clock)
            for each in range(4)
        ]
        still_send = sum(not each.done for each in senders)
        assert channel.statistics().open_senders == still_send + 1
    receiving = spawn(RECEIVING[style], channel.open_receiver(), got, reactor=clock)
    assert sorted(got) == [0, 0, 0, 1, 1, 2]
    for each in (*senders, receiving):
        each.result()
    assert channel.statistics() == (0, capacity, 0, 0, True, 0, 0)
    assert not clock.getDelayedCalls()


def test_values_left_are_received_after_the_last_sender_closes(start: Start) -> None:
    channel: Channel[int] = Channel(2)
    with channel.open_sender() as sender:
        sender.try_send(1)
        sender.send(2)
    got: list[Any] = []
    receiver = channel.open_receiver()
    start([receiver.receive] * 3, got)
    assert got == [1, 2, EndOfChannel]
    receiver.close()


def test_the_channel_closes_with_its_last_receiver(start: Start) -> None:
    channel: Channel[int] = Channel(1)
    got: list[Any] = []
    with channel.open_receiver() as receiver, channel.open_sender() as sender:
        sender.try_send(1)
        start([lambda: sender.send(2), lambda: sender.send(3)], got)
        other = receiver.clone()
        receiver.close()
        assert got == []
        assert not channel.statistics().closed
        assert channel.statistics().open_receivers == 1
        other.close()
        # Neither of them was received.
        assert got == [ChannelClosed, ChannelClosed]
        with pytest.raises(ChannelClosed, match="its last receiver was closed"):
            sender.try_send(4)
        with pytest.raises(ChannelClosed, match="its last receiver was closed"):
            sender.clone()
    # The value that was left is gone.
    assert channel.statistics() == (0, 1, 0, 0, True, 0, 0)
    with channel.open_receiver() as late, pytest.raises(EndOfChannel):
        late.try_receive()


def test_values_left_are_dropped_with_the_last_receiver() -> None:
    channel: Channel[int] = Channel(1)
    with channel.open_receiver():
        channel.try_send(1)
        channel.close()
        assert channel.statistics().buffered == 1
    assert channel.statistics().buffered == 0


def test_a_send_that_waits_for_a_turn_fails_with_the_last_receiver(
    clock: Clock, one_in_a_turn: None
) -> None:
    """The room in the buffer of a channel that nothing receives from is no room."""
    channel: Channel[int] = Channel(1)
    receiver = channel.open_receiver()
    failed: list[Any] = []

    def main() -> None:
        channel.send(1)
        assert receiver.try_receive() == 1
        channel.send(2).addErrback(failed.append)
        receiver.close()

    spawn(main, reactor=clock)
    clock.advance(0)
    assert [each.type for each in failed] == [ChannelClosed]


@pytest.mark.parametrize("sends", [True, False])
def test_closing_an_end_ends_its_waiting_operations(start: Start, sends: bool) -> None:
    """Operations that wait through other ends go on."""
    channel: Channel[Any] = Channel(0)
    own: list[Any] = []
    others: list[Any] = []
    ends: list[Any] = [
        channel.open_sender() if sends else channel.open_receiver() for _ in range(2)
    ]
    for end, got in ((ends[0], own), (ends[1], others), (ends[0], own)) * 3:
        wait = (lambda end=end: end.send("value")) if sends else end.receive
        start([wait], got)
    ends[0].close()
    assert own == [ChannelClosed] * 6
    assert others == []
    assert max(channel.statistics()[2:4]) == 3
    for _ in range(3):
        if sends:
            assert channel.try_receive() == "value"
        else:
            channel.try_send("value")
    assert others == [None if sends else "value"] * 3
    ends[1].close()
    assert channel.statistics() == (0, 0, 0, 0, True, 0, 0)


def test_a_closed_end_cannot_be_used() -> None:
    channel: Channel[int] = Channel(1)
    with channel.open_sender() as sender, channel.open_receiver() as receiver:
        keeps_it_open = sender.clone(), receiver.clone()
    assert sender.closed
    assert receiver.closed
    assert " closed, of <Channel at" in repr(sender)
    # The second time it does nothing.
    sender.close()
    receiver.close()
    assert not channel.statistics().closed
    uses: list[Callable[[], Any]] = [
        lambda: sender.try_send(1),
        sender.clone,
        sender.__enter__,
        receiver.try_receive,
        receiver.clone,
        receiver.__enter__,
    ]
    for use in uses:
        with pytest.raises(ChannelClosed, match="was closed: clone it"):
            use()
    failed: list[Any] = []
    for operation in (
        sender.send(1),
        receiver.receive(),
        select(receiver),
        select(sender.sending(1)),
    ):
        operation.addErrback(failed.append)
    assert [each.type for each in failed] == [ChannelClosed] * 4
    for end in keeps_it_open:
        end.close()


def test_the_try_methods_of_ends() -> None:
    channel: Channel[int] = Channel(1)
    with channel.open_sender() as sender, channel.open_receiver() as receiver:
        with pytest.raises(WouldBlock):
            receiver.try_receive()
        sender.try_send(1)
        with pytest.raises(WouldBlock):
            sender.try_send(2)
        assert receiver.try_receive() == 1
        sender.close()
        with pytest.raises(EndOfChannel) as caught:
            receiver.try_receive()
        assert caught.value.channel is receiver.channel is channel


@frees_at_once
@pytest.mark.filterwarnings("default")
def test_an_end_that_is_not_closed_warns() -> None:
    channel: Channel[int] = Channel(1)
    senders = [channel.open_sender()]
    with pytest.warns(ResourceWarning, match="ChannelSender at .* was not closed"):
        senders.clear()


# Select


def test_select_ends(start: Start) -> None:
    channel: Channel[int] = Channel(0)
    sender, receiver = channel.open_sender(), channel.open_receiver()
    sending = sender.sending(1)
    got: list[Any] = []
    start([lambda: select(receiver, Event())] * 2, got)
    start([lambda: select(sending, Event())], got)
    assert sorted(got, key=repr) == sorted([(receiver, 1), (sending, None)], key=repr)
    sender.close()
    assert got[2] is EndOfChannel
    receiver.close()


@pytest.mark.parametrize("sends", [True, False])
def test_a_select_through_a_closed_end(start: Start, sends: bool) -> None:
    channel: Channel[int] = Channel(0)
    other: Channel[int] = Channel(0)
    end: Any = channel.open_sender() if sends else channel.open_receiver()
    keeps_it_open = end.clone()
    got: list[Any] = []
    case = end.sending(1) if sends else end
    # Twice in one select, and in one that has chosen another case.
    start([lambda: select(case, other, case)], got)
    chosen: list[Any] = []
    start([lambda: select(case, other)], chosen)
    other.try_send(0)
    start([lambda: select(case, other)], got)
    end.close()
    assert sorted(got + chosen, key=repr).count(ChannelClosed) == 2
    assert channel.statistics()[2:4] == other.statistics()[2:4] == (0, 0)
    keeps_it_open.close()


# In whatever order


@pytest.mark.parametrize("seed", range(40))
def test_random_ends_receive_what_was_sent(clock: Clock, seed: int) -> None:
    """
    Of senders and receivers that come and go, wait, are cancelled and close their ends:
    each value is received once, or its sender was told that it is not.
    """
    random_ = random.Random(seed)
    channel: Channel[int] = Channel(random_.choice([0, 1, 3]))
    sent: set[int] = set()
    got: list[int] = []
    numbers = iter(range(10**6))

    async def send(sender: ChannelSender[int]) -> None:
        with sender:
            for _ in range(random_.randint(0, 5)):
                number = next(numbers)
                with move_on_after(random_.random() * 2) as limit:
                    await sender.send(number)
                    sent.add(number)
                assert limit.expired == (number not in sent)
                if random_.random() < 0.5:
                    await sleep(random_.random())

    async def receive(receiver: ChannelReceiver[int]) -> None:
        with receiver:
            async for value in receiver:
                got.append(value)
                if random_.random() < 0.1:
                    return
                if random_.random() < 0.5:
                    await sleep(random_.random())

    tasks: list[Task[None]] = []
    with channel.open_sender() as sender, channel.open_receiver() as receiver:
        for _ in range(60):
            tasks.append(
                spawn(send, sender.clone(), reactor=clock)
                if random_.random() < 0.6
                else spawn(receive, receiver.clone(), reactor=clock)
            )
            if random_.random() < 0.2:
                random_.choice(tasks).cancel()
            clock.advance(random_.random() / 4)
        last = spawn(receives, receiver.clone(), got, reactor=clock)
    clock.pump([0.25] * 100)
    assert all(each.done for each in tasks)
    for each in (*tasks, last):
        if not each.cancelled:
            each.result()
    assert channel.statistics()[:4] == (0, channel.statistics().capacity, 0, 0)
    assert channel.statistics()[4:] == (True, 0, 0)
    assert len(got) == len(set(got))
    assert set(got) == sent


def test_cancelled_everywhere() -> None:
    channels: list[Channel[bytes]] = []

    async def handler(stream: Stream) -> None:
        channel: Channel[bytes] = Channel(0)
        channels.append(channel)
        with channel.open_receiver() as receiver:
            async with TaskGroup() as group:
                with channel.open_sender() as sender:
                    group.spawn(reads_and_sends, stream, sender.clone())
                async for line in receiver:
                    await stream.write(line)

    async def reads_and_sends(stream: Stream, sender: ChannelSender[bytes]) -> None:
        with sender:
            for _ in range(2):
                await sender.send(await stream.read_line())

    async def peer(stream: Stream) -> None:
        await stream.write(b"one\n")
        await sleep(1)
        await stream.write(b"two\n")
        await stream.write_eof()
        while await stream.read():
            pass

    def all_is_closed() -> None:
        statistics = channels[-1].statistics()
        assert statistics[2:] == (0, 0, True, 0, 0)

    assert cancel_everywhere(handler, peer, all_is_closed) == 4


def test_on_a_reactor(reactor: Any) -> None:
    channel: Channel[int] = Channel(1)
    got: list[int] = []

    async def main() -> None:
        async with TaskGroup() as group:
            with channel.open_sender() as sender:
                for each in range(3):
                    group.spawn(sends, sender.clone(), [each, each])
            for _ in range(2):
                group.spawn(receives, channel.open_receiver(), got)

    run(reactor, main)
    assert sorted(got) == [0, 0, 1, 1, 2, 2]
