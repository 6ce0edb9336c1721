"""
The ends of a channel.  The channel is closed when the last end of either side is.

See ``docs/channels.md``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

from twisted_rtsig.coro.errors import ChannelClosed, EndOfChannel
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, failed
from twisted_rtsig.coro.waiting import Entry, Waiters

if TYPE_CHECKING:
    from twisted_rtsig.coro.channels import Channel

T = TypeVar("T")
E = TypeVar("E", bound="_ChannelEnd[Any]")
R = TypeVar("R", bound="AsyncReceiver[Any]")


class AsyncReceiver(Generic[T]):
    """Values for ``async for``, which ends with :class:`EndOfChannel`."""

    def receive(self) -> Operation[T]:
        """See ``Channel.receive``."""
        raise NotImplementedError

    def __aiter__(self: R) -> R:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None


class _ChannelEnd(Generic[T]):
    """
    One end of a channel: it is closed at the end of a ``with`` block, or by ``close``.

    :ivar channel: the channel.
    """

    # Set in __init__.  This default is for __del__ after an error there.
    _open = False

    def __init__(self, channel: Channel[T]) -> None:
        self.channel = channel
        # The operations and the cases of select() that wait through this end.
        self._waiting: WeakSet[Any] = WeakSet()
        self._open = True

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return not self._open

    def _close(self, waiters: Waiters) -> None:
        """Close this end.  Everything that waits through it fails."""
        self._open = False
        waiting = list(self._waiting)
        self._waiting.clear()
        for each in waiting:
            # A task that was resumed before may have given it up.
            if not each.called:
                waiters.forget(each)
                each.fail(self._is_closed())

    def _check(self) -> None:
        if not self._open:
            raise self._is_closed()

    def _is_closed(self) -> ChannelClosed:
        return ChannelClosed(
            f"{self!r} was closed: clone it for each task that uses it"
        )

    def _watch(self, entry: Entry) -> None:
        """Remember that ``entry`` waits through this end, if it waits at all."""
        if not entry.called:
            self._waiting.add(entry)

    def __enter__(self: E) -> E:
        self._check()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this end."""
        raise NotImplementedError

    def __del__(self) -> None:
        if self._open:
            warnings.warn(
                f"{self!r} was not closed, and keeps its channel open: use it in a "
                "with block",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )

    def __repr__(self) -> str:
        closed = "" if self._open else " closed,"
        return f"<{type(self).__name__} at {id(self):#x}:{closed} of {self.channel!r}>"


class ChannelSender(_ChannelEnd[T]):
    """
    The sending end of a channel.  When the last one is closed, so is the channel.

    Made by :meth:`Channel.open_sender`.  Each task that sends should have a sender of
    its own, and use it in a ``with`` block::

        with channel.open_sender() as sender:
            await sender.send(value)

    :ivar channel: the channel.
    """

    def clone(self) -> ChannelSender[T]:
        """
        Open another sender of the same channel.

        :raises ChannelClosed: if this sender or the channel is closed.
        """
        self._check()
        return self.channel.open_sender()

    def send(self, value: T) -> Operation[None]:
        """
        As :meth:`Channel.send`.

        :raises ChannelClosed: (when awaited) also if this sender is closed, or is
            closed while the send waits, or if the last :class:`ChannelReceiver` is
            closed.
        """
        if not self._open:
            return failed(self._is_closed())
        operation = self.channel.send(value)
        self._watch(operation)
        return operation

    def try_send(self, value: T) -> None:
        """
        As :meth:`Channel.try_send`.

        :raises WouldBlock: if the channel has no room for the value.
        :raises ChannelClosed: if this sender or the channel is closed.
        """
        self._check()
        self.channel.try_send(value)

    def sending(self, value: T) -> SenderCase[T]:
        """
        As :meth:`Channel.sending`.

        :raises ChannelClosed: (from ``select``) also if this sender is closed, or is
            closed while ``select`` waits.
        """
        return SenderCase(self, value)

    def close(self) -> None:
        """
        Close this sender, and the channel if it is the last one: receivers get the
        values that were sent, and then the end.

        A :meth:`send` of this sender that waits fails with ``ChannelClosed``.  Closing
        it again does nothing.
        """
        if self._open:
            self._close(self.channel._senders)
            self.channel._sender_closed()


class SenderCase(Generic[T]):
    """
    A case for :func:`select`: to send a value through a :class:`ChannelSender`.

    :raises ChannelClosed: (from ``select``) if the sender or the channel is closed.
    """

    def __init__(self, sender: ChannelSender[T], value: T) -> None:
        self.sender = sender
        self.value = value
        self._sending = sender.channel.sending(value)

    def poll(self) -> Any:
        """See ``Selectable.poll``."""
        self.sender._check()
        return self._sending.poll()

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        self._sending.watch(entry)
        self.sender._watch(entry)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self._sending.unwatch(entry)

    def __repr__(self) -> str:
        return f"<Sending to {self.sender!r}>"


class ChannelReceiver(_ChannelEnd[T], AsyncReceiver[T]):
    """
    The receiving end of a channel.  When the last one is closed, so is the channel:
    senders get ``ChannelClosed``, and the remaining values are dropped.

    Made by :meth:`Channel.open_receiver`.  It can also be a case of ``select``::

        with channel.open_receiver() as receiver:
            async for value in receiver:
                ...

    :ivar channel: the channel.
    """

    def clone(self) -> ChannelReceiver[T]:
        """
        Open another receiver of the same channel.

        :raises ChannelClosed: if this receiver is closed.
        """
        self._check()
        return self.channel.open_receiver()

    @must_be_awaited
    def receive(self) -> Operation[T]:
        """
        As :meth:`Channel.receive`.

        :raises EndOfChannel: (when awaited) if all senders were closed, and all values
            received.
        :raises ChannelClosed: (when awaited) if this receiver is closed, or is closed
            while the receive waits.
        """
        if not self._open:
            return failed(self._is_closed())
        operation = self.channel.receive()
        self._watch(operation)
        return operation

    def try_receive(self) -> T:
        """
        As :meth:`Channel.try_receive`.

        :raises WouldBlock: if there is no value yet.
        :raises EndOfChannel: if all senders were closed, and all values received.
        :raises ChannelClosed: if this receiver is closed.
        """
        self._check()
        return self.channel.try_receive()

    def close(self) -> None:
        """
        Close this receiver, and the channel if it is the last one.

        A :meth:`receive` of this receiver that waits fails with ``ChannelClosed``.
        Closing it again does nothing.
        """
        if self._open:
            self._close(self.channel._receivers)
            self.channel._receiver_closed()

    # As a case of select

    def poll(self) -> Any:
        """See ``Selectable.poll``."""
        self._check()
        return self.channel.poll()

    def watch(self, entry: Entry) -> None:
        """See ``Selectable.watch``."""
        self.channel.watch(entry)
        self._watch(entry)

    def unwatch(self, entry: Entry) -> None:
        """See ``Selectable.unwatch``."""
        self.channel.unwatch(entry)
