"""
Windows: an I/O completion port, to which polls of sockets report, and any other handle.

What a poll of a socket is, is in ``afd.py``; which polls are issued, in
``afd_polls.py``.

References: wepoll, mio and trio, which do the same; the Windows documentation on
completion ports.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Mapping

from twisted_rtsig.notifiers import GONE, Event, Reported, Unchecked
from twisted_rtsig.notifiers.afd import base_socket
from twisted_rtsig.notifiers.afd_polls import Polls
from twisted_rtsig.notifiers.registration import Registration
from twisted_rtsig.windows import calls as windows
from twisted_rtsig.windows.console import console

# Some facts about completion ports
# ---------------------------------
#
# * A packet that was taken from the port is nowhere else any more.  An exception
#   may keep some from being read (KeyboardInterrupt, which can be raised between any
#   two lines).  They are still in the buffer that the port has written them to, and
#   the next wait reads them first.
#
# * No signal interrupts a sleep on Windows.  A thread wakes the sleeping one with a
#   packet of its own, and so does Ctrl-C: see ``windows/console.py``.
#
# * A handle reports to the port that it was associated with for as long as it lives.
#   So a port to which pipes of children still report is kept, and opened again.
#
# * Any other object that can be waited for (an event, a process) is waited for by a
#   thread of Windows' own thread pool, which posts a packet.  CPython has the few
#   lines of C that this takes, for asyncio.

# The number of packets that are read at once.
_BATCH = 512

# For how many passes, at most, packets may wait while a shared poll is answered at
# once.
_PASSES_WITHOUT_PACKETS = 3

_PACKET_BYTES = ctypes.sizeof(windows.CompletionPacket)
_PACKET_WORDS = _PACKET_BYTES // 8
_ADDRESS = windows.CompletionPacket.overlapped.offset // 8


class CompletionPortNotifier:
    """
    Readiness of sockets of a 64-bit Windows, through a completion port.

    :param call_soon: called within ``wait`` when a handle other than a socket has
        reported, with a function that is to be called outside of ``wait``.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self._call_soon = call_soon
        # The socket of each registration, as AFD knows it.
        self._registrations: dict[Registration, int] = {}
        self._polls = Polls()
        self._port: int | None = None
        # The port that was closed last, if handles still report to it.
        self._former_port: int | None = None
        # For each object that is waited for, by the number that its packet has in place
        # of an address: its handle, and the function to call.  Numbers are odd, and
        # addresses are even.
        self._signals: dict[int, tuple[int, Callable[[], None]]] = {}
        # By the same number: the wait of the thread pool, to be given back.
        self._pool_waits: dict[int, int] = {}
        self._numbers = itertools.count(1, 2)
        # What is called when an overlapped operation is over, by the address of its
        # OVERLAPPED.
        self._operations: dict[int, Callable[[], None]] = {}
        # Held while a thread wakes the loop, and while the port is closed.  A signal
        # handler wakes the loop too, and may interrupt a call of wake().
        self._lock = threading.RLock()
        self._woken = False
        # For how many passes in a row no packets were read.
        self._passes_without_packets = 0
        self._packets = bytearray(_BATCH * _PACKET_BYTES)
        self._words = memoryview(self._packets).cast("Q")
        self._packets_address = ctypes.addressof(
            ctypes.c_char.from_buffer(self._packets)
        )
        # The number of packets in the buffer that were not read yet.
        self._count = ctypes.c_uint32()
        self._count_address = ctypes.addressof(self._count)
        self._waits = 0

    def open(self) -> None:
        """See :meth:`Notifier.open`."""
        if self._port is not None:
            return
        port = self._former_port or windows.create_completion_port(
            windows.INVALID_HANDLE, None, 0, 1
        )
        if not port:
            raise windows.error(windows.last_error())
        self._port, self._former_port = port, None
        _open.add(self)
        try:
            self._polls.open(port)
            for registration, base in self._registrations.items():
                self._polls.begin(registration, base)
            for number in self._signals:
                self._begin_to_wait(number)
        except BaseException:
            self.close()
            raise
        if threading.current_thread() is threading.main_thread():
            console.add(self)

    def close(self) -> None:
        """See :meth:`Notifier.close`."""
        port = self._port
        if port is None:
            return
        console.discard(self)
        for number in list(self._pool_waits):
            self._cease_to_wait(number)
        polls = self._polls
        polls.cancel_all()
        self._read_packets([], [])
        polls.report_at_once([], [])
        # Read all other packets as well.
        while self._take_packets(port, 1000 if polls.has_pending() else 0):
            self._read_packets([], [])
        polls.close()
        with self._lock:
            self._port = None
            self._woken = False
            if self._operations:
                self._former_port = port
            else:
                windows.close_handle(port)
                _open.discard(self)

    def daemonized(self) -> None:
        """See :meth:`Notifier.daemonized`; nothing forks on Windows."""

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        base = base_socket(registration.descriptor)
        if self._port is not None:
            self._polls.begin(registration, base)
        self._registrations[registration] = base

    def update(self, registration: Registration) -> None:
        """
        See :meth:`Notifier.update`.  There is nothing to do: the engine has new
        interest checked, and ignores events without interest.
        """

    def unwatch(self, registration: Registration) -> None:
        """See :meth:`Notifier.unwatch`."""
        del self._registrations[registration]
        self._polls.end(registration)

    def wait(self, timeout: float | None, unchecked: Unchecked) -> Reported:
        """See :meth:`Notifier.wait`."""
        port = self._port
        if port is None:
            self.open()
            port = self._port
            assert port is not None
        plain: list[Registration] = []
        events: list[Event] = []
        polls = self._polls
        polls.settle()
        interrupted = self._count.value > 0 or bool(polls.at_once)
        if interrupted:
            self._read_packets(plain, events)
            polls.report_at_once(plain, events)
            polls.issue_unreported(unchecked)
        else:
            polls.issue(unchecked)
        packets_can_wait = False
        if polls.at_once:
            packets_can_wait = (
                polls.shared_is_answered()
                and self._passes_without_packets < _PASSES_WITHOUT_PACKETS
                and not self._woken
            )
            polls.report_at_once(plain, events)
        if plain or events or polls.gone:
            milliseconds = 0
        elif timeout is None:
            milliseconds = windows.INFINITE
        else:
            # Rounded up, as a sleep that ends too early is followed by another one.  A
            # sleep of more than 24 days ends early.
            milliseconds = min(math.ceil(timeout * 1000), 0x7FFFFFFF)
        if packets_can_wait:
            self._passes_without_packets += 1
        elif not interrupted:
            self._passes_without_packets = 0
            if self._take_packets(port, milliseconds):
                self._read_packets(plain, events)
        self._waits += 1
        if polls.gone:
            events += [(registration, GONE, 0) for registration in polls.gone]
            polls.gone.clear()
        return plain, events

    def is_hung_up(self, registration: Registration) -> bool:
        """See :meth:`Notifier.is_hung_up`."""
        return True

    def statistics(self) -> Mapping[str, int]:
        """
        See :meth:`Notifier.statistics`.

        ``armed`` counts the sockets that pending polls name, ``waits`` the passes,
        ``events`` the events of sockets, ``checks`` the polls that were issued, and
        ``cancelled`` those that were cancelled.
        """
        polls = self._polls
        return {
            "armed": polls.armed(),
            "waits": self._waits,
            "events": polls.events,
            "checks": polls.issued,
            "cancelled": polls.cancelled,
        }

    # Beyond the contract

    def wake(self) -> None:
        """End the ``wait`` under way, or else the next one; from any thread."""
        with self._lock:
            if self._port is not None and not self._woken:
                self._woken = True
                windows.post_completion(self._port, 0, 0, None)

    # Handles

    def call_once_signalled(self, handle: int, function: Callable[[], None]) -> int:
        """
        Have ``function`` called when an object of Windows is signalled.

        :return: a number to pass to :meth:`forget`, at the latest when the function was
            called.
        :raises OSError: if Windows refuses to wait for it.
        """
        self.open()
        number = next(self._numbers)
        self._signals[number] = handle, function
        try:
            self._begin_to_wait(number)
        except OSError:
            del self._signals[number]
            raise
        return number

    def forget(self, number: int) -> None:
        """Do not call the function any more, and do not use the handle any more."""
        del self._signals[number]
        if number in self._pool_waits:
            self._cease_to_wait(number)

    def adopt(self, handle: int) -> None:
        """Let overlapped operations on a handle, a pipe's for example, report here."""
        self.open()
        if not windows.create_completion_port(handle, self._port, 0, 0):
            raise windows.error(windows.last_error())

    def call_once_completed(self, address: int, function: Callable[[], None]) -> None:
        """
        Have ``function`` called when an overlapped operation is over.

        Until then the function must keep the memory alive that the kernel may write to.

        :param address: the address of its ``OVERLAPPED``.
        """
        self._operations[address] = function

    def forget_completion(self, address: int) -> None:
        """The operation was not begun."""
        del self._operations[address]

    def _begin_to_wait(self, number: int) -> None:
        handle, _ = self._signals[number]
        self._pool_waits[number] = windows.overlapped.RegisterWaitWithQueue(
            handle, self._port, number, windows.INFINITE
        )

    def _cease_to_wait(self, number: int) -> None:
        # Returns when the pool will post no more packets.
        windows.unregister_wait(self._pool_waits.pop(number), windows.INVALID_HANDLE)

    # Packets

    def _take_packets(self, port: int, milliseconds: int) -> bool:
        """
        Take packets from the port.

        :return: whether there were any.
        """
        if windows.get_completions(
            *(port, self._packets_address, _BATCH, self._count_address),
            *(milliseconds, False),
        ):
            return True
        self._count.value = 0
        failure = windows.last_error()
        if failure == windows.WAIT_TIMEOUT:
            return False
        raise windows.error(failure)

    def _read_packets(self, plain: list[Registration], events: list[Event]) -> None:
        """Report what the packets in the buffer say."""
        count = self._count
        addresses = self._words[_ADDRESS : count.value * _PACKET_WORDS : _PACKET_WORDS]
        polls = self._polls
        by_address = polls.by_address
        for address in addresses.tolist():
            poll = by_address.get(address)
            if poll is not None:
                polls.report(poll, plain, events)
            elif address in polls.shared_by_address:
                shared = polls.shared_by_address[address]
                polls.report_shared(shared, plain, events)
            elif address in self._signals:
                self._call_soon(self._signals[address][1])
            elif address in self._operations:
                self._call_soon(self._operations.pop(address))
            elif not address:
                # wake() has posted it.
                self._woken = False
        count.value = 0


# The notifiers that are open or have operations under way.  The kernel may write to
# their buffers, so they must not be collected.
_open: set[CompletionPortNotifier] = set()
