"""
Channels pass values from one task to another.  A sender that is too fast waits.

See ``docs/channels.md``.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.channel_ends import (
    AsyncReceiver,
    ChannelReceiver,
    ChannelSender,
)
from twisted_rtsig.coro.errors import ChannelClosed, EndOfChannel, WouldBlock
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import (
    NOTHING,
    OVER,
    Done,
    Finished,
    Operation,
    Wait,
    failed,
)
from twisted_rtsig.coro.scheduler import running_scheduler
from twisted_rtsig.coro.waiting import Entry, Waiters

T = TypeVar("T")

# The number of values that a channel passes on at once.  After that it waits for the
# next turn of the scheduler, so that other tasks run.
_AT_ONCE_IN_A_TURN = 256


class ChannelStatistics(NamedTuple):
    """
    The state of a :class:`Channel`.

    :ivar buffered: the number of values that were sent and not received yet.
    :ivar capacity: the limit of ``buffered``.
    :ivar senders: the number of sends that wait.
    :ivar receivers: the number of receives that wait.
    :ivar closed: whether the channel takes no more values.
    :ivar open_senders: the number of :class:`ChannelSender` objects that are open.
    :ivar open_receivers: the number of :class:`ChannelReceiver` objects that are open.
    """

    buffered: int
    capacity: int
    senders: int
    receivers: int
    closed: bool
    open_senders: int
    open_receivers: int


class Channel(AsyncReceiver[T]):
    """
    A queue of values between tasks: any number of tasks may send and receive.

    First come, first served.  Use a channel in the reactor's thread only.

    :param capacity: the number of values that the channel holds until they are
        received.  With 0 each sender waits until a receiver takes its value.
    :raises ValueError: if the capacity is negative.
    """

    def __init__(self, capacity: int) -> None:
        if not capacity >= 0:
            raise ValueError(f"a channel cannot hold {capacity} values: 0 is the least")
        self._capacity = capacity
        self._values: deque[T] = deque()
        self._senders = Waiters()
        self._receivers = Waiters()
        self._closed = False
        self._open_senders = 0
        self._open_receivers = 0
        # Whether the last ChannelReceiver was closed.
        self._abandoned = False
        # How many more values pass at once in this turn.  At 0 all sends and receives
        # wait for the next turn.
        self._at_once = _AT_ONCE_IN_A_TURN
        channels.add(self)

    # Sending

    def send(self, value: T) -> Operation[None]:
        """
        Send a value.  The operation is done when the channel has room for the value.

        A send that is cancelled has sent nothing.

        :raises ChannelClosed: (when awaited) if the channel is closed, or is closed
            while the send waits: the value is not received.
        """
        done: Operation[None]
        receivers = self._receivers
        entries = receivers.entries
        if entries and self._at_once:
            # A receiver waits only while the channel is open and has neither values
            # nor senders.  This send is not counted: the receiver needs a turn anyway.
            receiver = entries.popleft()
            if receivers.given_up:
                receivers.strip()
            if type(receiver) is Operation and (waiter := receiver.waiter) is not None:
                # This is succeed() written out, since most values go through here.
                receiver.waiter = OVER
                receiver.called = True
                receiver.result = value
                waiter._waiting_on = None
                waiter._value = value
                scheduler = waiter._scheduler
                scheduler._ready.append(waiter)
                if not scheduler._busy:
                    try:
                        scheduler._run(scheduler)
                    except StopIteration:
                        scheduler.run_anew()
            else:
                receiver.succeed(value)
            done = Done()
            return done
        if self._closed:
            return failed(self._no_more())
        if self._at_once and self._give(value):
            self._count()
            done = Done()
            return done
        operation: Operation[None] = Wait()
        operation.owner = self
        operation.value = value
        self._senders.entries.append(operation)
        return operation

    def try_send(self, value: T) -> None:
        """
        Send a value without waiting.

        :raises WouldBlock: if the channel has no room for it.
        :raises ChannelClosed: if the channel is closed.
        """
        if self._closed:
            raise self._no_more()
        if not self._give(value):
            raise WouldBlock(f"{self!r} has no room: use send(), which waits")

    def sending(self, value: T) -> SendCase[T]:
        """A case for :func:`select`: to send the value."""
        return SendCase(self, value)

    def _give(self, value: T) -> bool:
        """Give the value to a receiver or to the buffer; return whether one took it."""
        senders = self._senders.entries
        # Receivers and senders may both be waiting, for the next turn.
        if (
            self._receivers.entries
            and not self._values
            and (self._at_once or not senders)
        ):
            self._receivers.next().succeed(value)
        elif len(self._values) < self._capacity and not senders:
            self._values.append(value)
        else:
            return False
        return True

    def _no_more(self) -> ChannelClosed:
        if self._abandoned:
            return ChannelClosed(
                f"{self!r} takes no more values: its last receiver was closed"
            )
        return ChannelClosed(
            f"{self!r} takes no more values: close it when its senders are done"
        )

    # Receiving

    @must_be_awaited
    def receive(self) -> Operation[T]:
        """
        Receive the next value.

        :raises EndOfChannel: (when awaited) if the channel is closed and all values
            have been received.
        """
        if self._values or self._senders.entries:
            if self._at_once:
                finished: Finished[T] = Finished()
                finished.result = self._take()
                self._count()
                return finished
        elif self._closed:
            return failed(EndOfChannel(self))
        operation: Operation[T] = Operation()
        operation.owner = self
        # The same as the default of the class, which takes longer to look up when the
        # operation is awaited.
        operation.waiter = None
        self._receivers.entries.append(operation)
        return operation

    def try_receive(self) -> T:
        """
        Receive the next value without waiting.

        :raises WouldBlock: if there is no value yet.
        :raises EndOfChannel: if the channel is closed and all values have been
            received.
        """
        if self._at_end:
            raise EndOfChannel(self)
        overtakes = self._receivers.entries and not self._at_once
        value: Any = NOTHING if overtakes else self._take()
        if value is NOTHING:
            raise WouldBlock(f"{self!r} is empty: use receive(), which waits")
        return cast(T, value)

    def _take(self) -> Any:
        """
        Take the next value, even if receivers wait; ``NOTHING`` if there is none.
        """
        if self._values:
            value: Any = self._values.popleft()
            if self._senders.entries and not self._closed:
                self._admit(self._senders.next())
            return value
        if self._senders.entries:
            sender = self._senders.next()
            sender.succeed(None)
            return sender.value
        return NOTHING

    def _admit(self, sender: Entry) -> None:
        """Put the value of a waiting sender into the buffer, which has room."""
        self._values.append(sender.value)
        sender.succeed(None)

    @property
    def _at_end(self) -> bool:
        return self._closed and not self._values

    # The end

    def close(self) -> None:
        """
        Take no more values.  Receivers get the values that were sent, and then the
        end.  A send that waits fails with :class:`ChannelClosed`.

        Closing a channel again does nothing.
        """
        if self._closed:
            return
        if not self._abandoned:
            self._match()
        self._closed = True
        # A receive in a callback of these sends has to wait for _match() below: only
        # then is it known which values remain.
        self._at_once = 0
        while self._senders.entries:
            self._senders.next().fail(self._no_more())
        if self._abandoned:
            self._values.clear()
        self._match()

    def open_sender(self) -> ChannelSender[T]:
        """
        Open an end to send to.  When the last one is closed, the channel is closed:
        receivers get the values that were sent, and then the end.

        :raises ChannelClosed: if the channel is closed.
        """
        if self._closed:
            raise self._no_more()
        self._open_senders += 1
        return ChannelSender(self)

    def open_receiver(self) -> ChannelReceiver[T]:
        """
        Open an end to receive from.  When the last one is closed, the channel is
        closed: senders get ``ChannelClosed``, and the remaining values are dropped.
        """
        self._open_receivers += 1
        return ChannelReceiver(self)

    def _sender_closed(self) -> None:
        self._open_senders -= 1
        if not self._open_senders:
            self.close()

    def _receiver_closed(self) -> None:
        self._open_receivers -= 1
        if not self._open_receivers:
            self._abandoned = True
            if self._closed:
                self._values.clear()
            else:
                self.close()

    def statistics(self) -> ChannelStatistics:
        """The state of the channel."""
        return ChannelStatistics(
            len(self._values),
            self._capacity,
            self._senders.waiting,
            self._receivers.waiting,
            self._closed,
            self._open_senders,
            self._open_receivers,
        )

    def __repr__(self) -> str:
        closed = " closed" if self._closed else ""
        return (
            f"<Channel at {id(self):#x}:{closed} {len(self._values)} of "
            f"{self._capacity} values, {self._senders.waiting} senders and "
            f"{self._receivers.waiting} receivers wait>"
        )

    # Turns

    def _count(self) -> None:
        """Count a value that was passed on at once."""
        if not self._at_once:
            # The task that this resumed has used up the turn meanwhile.
            return
        self._at_once -= 1
        if not self._at_once:
            scheduler = running_scheduler()
            if scheduler is not None:
                scheduler.next_turn(self._match)
            else:
                # Outside of the scheduler, the caller gives other code its turns.
                self._at_once = _AT_ONCE_IN_A_TURN

    def _match(self) -> None:
        """Serve the operations that waited for this turn."""
        # Callbacks may send and receive here; they must not overtake what waits.
        self._at_once = 0
        while True:
            if self._receivers.entries and self._values:
                self._receivers.next().succeed(self._values.popleft())
            elif self._senders.entries and len(self._values) < self._capacity:
                self._admit(self._senders.next())
            elif (pair := self._matching_pair()) is not None:
                sender, receiver = pair
                # The task that is resumed first may cancel the other operation.  So
                # settle both before either task is resumed.
                self._receivers.forget(receiver)
                receiver.settle(sender.value)
                self._senders.forget(sender)
                sender.succeed(None)
                receiver.tell()
            else:
                break
        if self._closed:
            while self._receivers.entries:
                self._receivers.next().fail(EndOfChannel(self))
        self._at_once = _AT_ONCE_IN_A_TURN

    def _matching_pair(self) -> tuple[Entry, Entry] | None:
        """
        The first sender that has a receiver, and that receiver.  Two cases of the same
        ``select`` are no pair.
        """
        return next(
            (
                (sender, receiver)
                for sender in self._senders.entries
                for receiver in self._receivers.entries
                if not (sender.called or receiver.called)
                and (sender.owner is not receiver.owner or sender.owner is self)
            ),
            None,
        )

    # Waiting operations

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters_with(operation).forget(operation)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        sends = self._waiters_with(operation) is self._senders
        return f"{'room in' if sends else 'a value from'} {self!r}"

    def _waiters_with(self, operation: Operation[Any]) -> Waiters:
        return self._receivers if operation.value is NOTHING else self._senders

    # As a case of select: to receive

    def poll(self) -> T:
        """See ``Selectable.poll``."""
        if self._at_end:
            raise EndOfChannel(self)
        value: Any = self._take() if self._at_once else NOTHING
        if value is not NOTHING:
            self._count()
        return cast(T, value)

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        self._receivers.entries.append(entry)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self._receivers.forget(entry)


channels: Final[Registry[Channel[Any]]] = Registry()
"""All channels of the process."""


class SendCase(Generic[T]):
    """
    A case for :func:`select`: to send a value.

    :raises ChannelClosed: (from ``select``) if the channel is closed.
    """

    def __init__(self, channel: Channel[T], value: T) -> None:
        self.channel = channel
        self.value = value

    def poll(self) -> None:
        """See ``Selectable.poll``."""
        channel = self.channel
        if channel._closed:
            raise channel._no_more()
        if not (channel._at_once and channel._give(self.value)):
            return NOTHING  # type: ignore[return-value]
        channel._count()
        return None

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        entry.value = self.value
        self.channel._senders.entries.append(entry)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self.channel._senders.forget(entry)

    def __repr__(self) -> str:
        return f"<Sending to {self.channel!r}>"
