"""Receiving signals of the operating system in tasks."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any, Final

from twisted_rtsig.coro.errors import BusyResourceError
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, failed, finished
from twisted_rtsig.coro.scheduler import scheduler_for


class SignalReceiver:
    """
    Receives signals.  Made by :func:`open_signal_receiver`.

    Only one task at a time receives.
    """

    def __init__(self, signals: tuple[int, ...], reactor: Any) -> None:
        self._signals = signals
        self._reactor = reactor
        self._open = False
        # The pending signals, in the order of their first arrival.
        self._pending: dict[int, None] = {}
        self._receiving: Operation[int] | None = None
        # Whether a call of _deliver is scheduled in the reactor.
        self._called = False

    @must_be_awaited
    def receive(self) -> Operation[int]:
        """
        Receive the next signal.  A signal that arrives several times before it is
        received is received once.

        :return: its number, as a ``signal.Signals`` if it has a name.
        :raises BusyResourceError: if another task receives already.
        :raises RuntimeError: outside of the ``with`` block.
        """
        if not self._open:
            return failed(self._not_open())
        if self._receiving is not None:
            raise BusyResourceError(f"another task receives from {self!r} already")
        if self._pending:
            return finished(self._next())
        operation: Operation[int] = Operation()
        operation.owner = self
        self._receiving = operation
        return operation

    async def __aiter__(self) -> AsyncIterator[int]:
        while True:
            yield await self.receive()

    def __enter__(self) -> SignalReceiver:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "open_signal_receiver() works only in the main thread, since Python "
                "handles signals there"
            )
        if self._open:
            raise RuntimeError(f"{self!r} is open already")
        done: list[int] = []
        try:
            for number in self._signals:
                _handling_of(number).add(self)
                done.append(number)
        except BaseException:
            for number in done:
                _handling_of(number).remove(self)
            raise
        self._open = True
        # The reactor installs its own handler of SIGTERM when it starts.
        self._reactor.callWhenRunning(self._handle_again)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        for number in self._signals:
            _handling_of(number).remove(self)
        receiving, self._receiving = self._receiving, None
        if receiving is not None and not receiving.called:
            receiving.fail(self._not_open(), quietly=True)
        # Raise the pending signals again, for the handlers that were there before.
        pending, self._pending = self._pending, {}
        _raise_all(list(pending))

    def _handle_again(self) -> None:
        if self._open:
            for number in self._signals:
                _handling_of(number).install()

    def _not_open(self) -> RuntimeError:
        return RuntimeError(
            f"{self!r} is not open: receive within with open_signal_receiver(...)"
        )

    def came(self, number: int) -> None:
        """Called in the signal handler, which can interrupt any code of this thread."""
        self._pending[number] = None
        if not self._called:
            self._called = True
            self._reactor.callFromThread(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        receiving = self._receiving
        if receiving is not None and self._pending:
            self._receiving = None
            receiving.succeed(self._next())

    def _next(self) -> int:
        # A signal handler may run between any two steps and add to the dict.  To make
        # a list of it is one step.
        number = list(self._pending)[0]  # noqa: RUF015
        del self._pending[number]
        return _named(number)

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._receiving = None

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"a signal to {self!r}"

    def __repr__(self) -> str:
        names = ", ".join(_name(number) for number in self._signals)
        return f"<receiver of {names}>"


def _raise_all(numbers: list[int]) -> None:
    """Raise all signals, even if a handler raises an exception."""
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_all(numbers[1:])


class _Handling:
    """
    The receivers of one signal.  The receiver that was opened last gets the signal.

    Receivers may be closed in any order.  So the handler from before is kept here, and
    not by each :class:`SignalReceiver`.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._receivers: list[SignalReceiver] = []
        self._previous: Any = None

    def add(self, receiver: SignalReceiver) -> None:
        """
        Add a receiver.

        :raises OSError: if no process can handle the signal.
        :raises ValueError: if there is no such signal, or a reactor needs it.
        """
        if not self._receivers:
            self.install()
        self._receivers.append(receiver)

    def install(self) -> None:
        """Install the handler, unless it is installed already."""
        previous = signal.getsignal(self._number)
        if previous == self._handle:
            return
        if previous is None:
            raise RuntimeError(
                f"a handler that is not of Python handles {_name(self._number)}, and "
                "could not be restored"
            )
        try:
            signal.signal(self._number, self._handle)
        except OSError as error:
            raise OSError(
                error.errno, f"no process can receive {_name(self._number)}"
            ) from None
        self._previous = previous

    def remove(self, receiver: SignalReceiver) -> None:
        """Remove a receiver; with the last one, restore the handler from before."""
        self._receivers.remove(receiver)
        if not self._receivers:
            previous, self._previous = self._previous, None
            # A handler that was installed meanwhile stays; it may call this one.
            if signal.getsignal(self._number) == self._handle:
                signal.signal(self._number, previous)
            del _handled[self._number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._receivers:
            self._receivers[-1].came(number)
        elif callable(self._previous):
            self._previous(number, frame)


_handled: Final[dict[int, _Handling]] = {}


def _handling_of(number: int) -> _Handling:
    handling = _handled.get(number)
    if handling is None:
        handling = _handled[number] = _Handling(number)
    return handling


def _named(number: int) -> int:
    try:
        return signal.Signals(number)
    except ValueError:
        # Only the first and the last of the realtime signals have names.
        return number


def _name(number: int) -> str:
    named = _named(number)
    return named.name if isinstance(named, signal.Signals) else f"signal {number}"


def open_signal_receiver(*signals: int, reactor: Any | None = None) -> SignalReceiver:
    """
    Receive signals, in place of their handlers::

        with open_signal_receiver(signal.SIGHUP, signal.SIGTERM) as received:
            async for number in received:
                ...

    Within the block the signals have no other effect: ``SIGTERM`` does not stop the
    reactor.  At the end of the block the handlers are restored, and signals that were
    not received are raised again.  If a signal has several receivers, the one that was
    opened last gets it.

    :param signals: the numbers of the signals.
    :param reactor: an ``IReactorFromThreads`` provider; by default that of the task.
    :raises TypeError: if there are no signals.
    :raises ValueError: if there is no such signal, or a reactor of this package needs
        it.
    :raises OSError: (at the beginning of the block) if no process can receive the
        signal: ``SIGKILL``, for example.
    :raises RuntimeError: (at the beginning of the block) outside of the main thread.
    """
    if not signals:
        raise TypeError("open_signal_receiver() needs signals to receive")
    for number in signals:
        if number not in signal.valid_signals():
            raise ValueError(f"there is no signal {number!r}")
        if sys.platform != "win32":
            from twisted_rtsig.notifiers.signal_mask import blocked

            if number in blocked & signal.pthread_sigmask(signal.SIG_BLOCK, ()):
                raise ValueError(
                    f"{_name(number)} cannot be received: the reactor uses it for "
                    "input and output; choose another one"
                )
    numbers = tuple(dict.fromkeys(int(each) for each in signals))
    return SignalReceiver(numbers, scheduler_for(reactor).reactor)
