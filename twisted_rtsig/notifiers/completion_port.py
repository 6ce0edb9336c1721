"""
Windows: polls of the AFD driver, whose answers come through an I/O completion
port.

References: wepoll, mio and trio, which do the same; ReactOS and the Wine
server for what AFD does; the Windows documentation on completion ports.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import math
import signal
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from twisted_rtsig.notifiers import GONE, HANGUP, Event
from twisted_rtsig.notifiers.registration import READ, WRITE, Registration
from twisted_rtsig.windows import calls as windows

# Some facts about AFD and completion ports
# -----------------------------------------
#
# * AFD is the driver below Windows sockets.  A poll of it is asked of a handle
#   to the driver itself, names a socket and some events, and stays with the
#   driver until one of them is true.  If one is true when the poll is issued
#   then it is answered at once: to issue a poll is a level check.  Otherwise the
#   answer is a packet in the completion port of that handle.  Either way the poll
#   is used up.  So a descriptor is armed while its poll is with the driver, and
#   to check it again is to issue the poll again.
#
# * What is answered at once makes a packet as well, unless the handle is told that
#   it need not.  Ours are: where a crowd is always ready, the port need be asked
#   only now and then, for the sake of the others.
#
# * Windows confuses two polls of one socket that report to one port: that for
#   writing may be answered when there is something to read.  (Trio's notes,
#   "AFD lab", show it.)  So there is one poll for each socket, with all that is
#   wanted of it.  When more is wanted then the poll is cancelled, and another is
#   issued; when less is wanted nothing need be done.
#
# * One poll may name many sockets, which is what select() is made of.  It is
#   answered as soon as one of them is ready, and tells of all that are.  So the
#   busy ones share a poll, the crowd: a call for each pass instead of one for
#   each request.  It costs more the more of them are idle, and who has not been
#   told of for a few turns gets a poll of its own again.  Crowds are for those
#   who want to read, and whoever leaves one that is with the driver has it
#   called back.
#
# * A cancelled poll is answered all the same, later.  Until then the kernel may
#   write into its buffers, which therefore are kept, with whoever issued it
#   long gone.
#
# * Packets that were taken from the port are nowhere else any more.  Those that
#   an exception kept from being looked at (KeyboardInterrupt, which can be
#   raised between any two lines) are still in the buffer that they were read
#   into, and are looked at first next time.
#
# * AFD says more than poll(2): ABORT after a reset, DISCONNECT at the end of
#   input, LOCAL_CLOSE when the last handle of the socket was closed, so that a
#   descriptor closed early does not go unnoticed.
#
# * A handle to the driver slows down with the number of polls on it, so that
#   each gets 32, as wepoll and mio have it.
#
# * AFD knows sockets, and only those at the bottom: a layered service provider
#   (a firewall, say) may have put another of its own above, which is unwrapped
#   by SIO_BASE_HANDLE.  Pipes, files and consoles cannot be polled at all.
#
# * No signal interrupts a sleep on Windows.  A thread wakes the sleeper with a
#   packet of its own, and so does Ctrl-C, which Windows tells in a thread that
#   it makes for that.  CPython's own handler would come after ours had woken the
#   sleeper, who would find nothing and sleep on; so ours calls it, and then wakes.
#
# * A handle reports to the port that it was associated with as long as it lives.
#   So the port stays, for the next time, if there are pipes of children.
#
# * Whatever else can be waited for (events, processes) is waited for by a thread
#   of Windows' own pool, which posts a packet.  CPython has the few lines of C
#   that this takes, for asyncio.

_READABLE = windows.AFD_RECEIVE | windows.AFD_ACCEPT | windows.AFD_DISCONNECT
_WRITABLE = windows.AFD_SEND
_BROKEN = windows.AFD_ABORT | windows.AFD_CONNECT_FAIL

_ALWAYS = _BROKEN | windows.AFD_LOCAL_CLOSE

# Indexed by interest: nothing, READ, WRITE, READ | WRITE.
_MASKS = (
    0,
    _READABLE | _ALWAYS,
    _WRITABLE | _ALWAYS,
    _READABLE | _WRITABLE | _ALWAYS,
)

# Whoever learns of nothing else reads, and finds input or the end of it.
_MORE_THAN_INPUT = ~(windows.AFD_RECEIVE | windows.AFD_DISCONNECT)

_DEVICE = "\\Device\\Afd\\twisted_rtsig"
_MODES = (
    windows.FILE_SKIP_COMPLETION_PORT_ON_SUCCESS | windows.FILE_SKIP_SET_EVENT_ON_HANDLE
)
_POLLS_OF_A_DEVICE = 32

# So many who were told of in one pass make a crowd, and so many turns of it without
# a word are enough.
_FEWEST_OF_A_CROWD = 8
_MOST_OF_A_CROWD = 512
_PATIENCE_OF_A_CROWD = 4

# Packets that are read at once, and in how many passes, at most, they can wait for
# it while a crowd is answered at once.
_BATCH = 512
_PASSES_WITHOUT_PACKETS = 3

_PACKET_BYTES = ctypes.sizeof(windows.CompletionPacket)
_PACKET_WORDS = _PACKET_BYTES // 8
_ADDRESS = windows.CompletionPacket.overlapped.offset // 8

# A poll is asked and answered within one buffer.
_INFO_BYTES = ctypes.sizeof(windows.AFDPollInfo)
_QUESTION = ctypes.sizeof(windows.IOStatusBlock)
_ANSWER = _QUESTION + _INFO_BYTES
_POLL_BYTES = _ANSWER + _INFO_BYTES
_EVENTS_OFFSET = (
    windows.AFDPollInfo.handles.offset + windows.AFDPollHandleInfo.events.offset
)
# In 32-bit words.
_STATUS = 0
_ASKED = (_QUESTION + _EVENTS_OFFSET) // 4
_ANSWERED = (_ANSWER + _EVENTS_OFFSET) // 4
_ANSWERS = (_ANSWER + windows.AFDPollInfo.number_of_handles.offset) // 4

# The same for a crowd, whose questions and answers are longer.
_HANDLES = windows.AFDPollInfo.handles.offset
_ENTRY_BYTES = ctypes.sizeof(windows.AFDPollHandleInfo)
_CROWD_BYTES = _HANDLES + _MOST_OF_A_CROWD * _ENTRY_BYTES

# For calls that are over when they return, and want to tell more than their result.
_status = windows.IOStatusBlock()


def _ready(events: int) -> int:
    ready = 0
    if events & _READABLE:
        ready |= READ
    if events & _WRITABLE:
        ready |= WRITE
    if events & _BROKEN:
        ready |= READ | WRITE | HANGUP
    if events & windows.AFD_LOCAL_CLOSE:
        ready |= GONE
    return ready


def base_socket(descriptor: int) -> int:
    """
    The socket that AFD knows, below what layers there are above it.

    :raises OSError: if it is no socket.
    """
    found = ctypes.c_uint64()
    length = ctypes.c_uint32(8)
    where = ctypes.addressof(found), ctypes.addressof(length)
    if windows.get_socket_option(
        descriptor, windows.SOL_SOCKET, windows.SO_TYPE, *where
    ):
        failure = windows.last_error()
        if failure == windows.WSAENOTSOCK:
            raise OSError(
                errno.ENOTSOCK,
                f"descriptor {descriptor} is no open socket, and nothing else can "
                "be watched on Windows: use StandardIO for the console, "
                "spawnProcess for the pipes of a child, and deferToThread for "
                "files and other pipes",
            )
        raise windows.error(failure)
    for code in (
        windows.SIO_BASE_HANDLE,
        windows.SIO_BSP_HANDLE_POLL,
        windows.SIO_BSP_HANDLE_SELECT,
    ):
        if not windows.socket_control(
            *(descriptor, code, None, 0, where[0], 8, where[1], None, None)
        ):
            base = found.value
            if code == windows.SIO_BASE_HANDLE or base == descriptor:
                return base
            return base_socket(base)
    raise windows.error(windows.last_error())


class _Device:
    """A handle to AFD, for a few polls."""

    def __init__(self, port: int) -> None:
        name = ctypes.create_unicode_buffer(_DEVICE)
        text = windows.UnicodeString(
            len(_DEVICE) * 2, len(_DEVICE) * 2 + 2, ctypes.addressof(name)
        )
        attributes = windows.ObjectAttributes(
            ctypes.sizeof(windows.ObjectAttributes), None, ctypes.addressof(text)
        )
        handle = windows.HANDLE()
        status = windows.create_file(
            ctypes.addressof(handle),
            windows.SYNCHRONIZE,
            ctypes.addressof(attributes),
            ctypes.addressof(_status),
            *(None, 0, windows.FILE_SHARE_READ | windows.FILE_SHARE_WRITE),
            *(windows.FILE_OPEN, 0, None, 0),
        )
        if status != windows.STATUS_SUCCESS:
            raise windows.error(windows.status_to_error(status))
        assert handle.value is not None
        self.handle: int = handle.value
        self.polls = 0
        if not (
            windows.create_completion_port(self.handle, port, 0, 0)
            and windows.set_notification_modes(self.handle, _MODES)
        ):
            failure = windows.last_error()
            windows.close_handle(self.handle)
            raise windows.error(failure)


class _Poll:
    """
    The question whether a socket is ready, which is asked again and again.

    :ivar registration: what asks; None if it has ended.
    :ivar pending: the interest that the driver has been asked for; 0 while it
        has no question to answer.
    """

    __slots__ = (
        "_buffer",
        "_question",
        "address",
        "arguments",
        "base",
        "device",
        "pending",
        "registration",
        "told",
        "words",
    )

    def __init__(self, device: _Device) -> None:
        self.device = device
        self.registration: Registration | None = None
        self.pending = 0
        self.base = 0
        # The turn of the crowd that has told of it, while it is of the crowd.
        self.told = 0
        # It stays where it is as long as somebody has a view of it.
        self._buffer = bytearray(_POLL_BYTES)
        self.words = memoryview(self._buffer).cast("I")
        self._question = windows.AFDPollInfo.from_buffer(self._buffer, _QUESTION)
        self._question.timeout = windows.AFD_FOR_EVER
        self._question.number_of_handles = 1
        question = ctypes.addressof(self._question)
        self.address = question - _QUESTION
        self.arguments = (
            *(device.handle, None, None, self.address, self.address),
            *(windows.IOCTL_AFD_POLL, question, _INFO_BYTES),
            *(question + _INFO_BYTES, _INFO_BYTES),
        )

    def ask_about(self, registration: Registration, base: int) -> None:
        self.registration = registration
        self.base = base
        self._question.handles.handle = base


class _Crowd:
    """
    One question about many sockets.

    :ivar members: whose polls are spared, by their sockets.
    :ivar changed: not those whom the buffer names.
    :ivar pending: as that of a poll: ``READ``, or 0.
    :ivar turn: counts the answers.
    """

    def __init__(self, device: _Device) -> None:
        self.device = device
        self.members: dict[int, _Poll] = {}
        self.changed = False
        self.pending = 0
        self.turn = 0
        answer = _QUESTION + _CROWD_BYTES
        buffer = bytearray(answer + _CROWD_BYTES)
        self.words = words = memoryview(buffer).cast("I")
        long_words = memoryview(buffer).cast("Q")
        self._question = windows.AFDPollInfo.from_buffer(buffer, _QUESTION)
        self._question.timeout = windows.AFD_FOR_EVER
        # Of the sockets that are named and of those told of, and what of these.
        asked = (_QUESTION + _HANDLES) // 8
        self._sockets = long_words[asked : answer // 8 : 2]
        self._masks = words[2 * asked + 2 : answer // 4 : 4]
        self._masks[0 : len(self._masks)] = memoryview(
            array("I", [_MASKS[READ]] * len(self._masks))
        )
        told = (answer + _HANDLES) // 8
        self._sockets_told = long_words[told::2]
        self._told = words[2 * told + 2 :: 4]
        self._count = words[
            (answer + windows.AFDPollInfo.number_of_handles.offset) // 4 :
        ]
        question = ctypes.addressof(self._question)
        self.address = question - _QUESTION
        self.arguments = (
            *(device.handle, None, None, self.address, self.address),
            *(windows.IOCTL_AFD_POLL, question, _CROWD_BYTES),
            *(question + _CROWD_BYTES, _CROWD_BYTES),
        )

    def name_members(self) -> None:
        """Write the question."""
        self.changed = False
        count = len(self.members)
        self._question.number_of_handles = count
        self._sockets[:count] = memoryview(array("Q", self.members))

    def answer(self) -> Iterator[tuple[int, int]]:
        """The sockets that it tells of, and what."""
        count = self._count[0]
        return zip(
            self._sockets_told[:count].tolist(),
            self._told[:count].tolist(),
            strict=True,
        )


class CompletionPortNotifier:
    """
    Readiness of sockets of a 64-bit Windows, through a completion port.

    :param call_soon: called with what is to be called, outside of ``wait``, since
        something else than a socket has reported.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self._call_soon = call_soon
        self._registrations: dict[Registration, int] = {}
        self._polls: dict[Registration, _Poll] = {}
        # Those that live or are with the driver, by where their buffers are.
        self._by_address: dict[int, _Poll] = {}
        self._free: list[_Poll] = []
        # Whose answers no packet tells of, and how many passes have looked at none.
        self._at_once: list[_Poll | _Crowd] = []
        self._without_packets = 0
        # While the driver is asked.
        self._asking: _Poll | _Crowd | None = None
        # To be asked again in the next wait.
        self._answered: list[_Poll] = []
        self._gone: list[Registration] = []
        self._devices: list[_Device] = []
        self._crowd: _Crowd | None = None
        # It and those that were called back, until they are answered; by address.
        self._crowds: dict[int, _Crowd] = {}
        self._spare_crowds: list[_Crowd] = []
        self._port: int | None = None
        # The one of the last time, to which handles still report.
        self._former_port: int | None = None
        # What is called when a handle is signalled, by the number that the packet
        # has instead of an address, and what to give back for each.  Numbers are
        # odd, and addresses are not.
        self._signals: dict[int, tuple[int, Callable[[], None]]] = {}
        self._pool_waits: dict[int, int] = {}
        self._numbers = itertools.count(1, 2)
        # What is called when an overlapped operation is over, by where it keeps what
        # the kernel writes to.
        self._operations: dict[int, Callable[[], None]] = {}
        # For the threads that wake it while another one closes it; and for signal
        # handlers, which wake whoever is just doing so.
        self._lock = threading.RLock()
        self._woken = False
        self._packets = bytearray(_BATCH * _PACKET_BYTES)
        self._words = memoryview(self._packets).cast("Q")
        self._packets_address = ctypes.addressof(
            ctypes.c_char.from_buffer(self._packets)
        )
        # How many there are that were not looked at yet.
        self._count = ctypes.c_uint32()
        self._count_address = ctypes.addressof(self._count)
        self._waits = 0
        self._events = 0
        self._checks = 0
        self._cancelled = 0

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
            for registration, base in self._registrations.items():
                self._begin(registration, base)
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
        # What they have not answered yet they answer now.
        for device in self._devices:
            windows.cancel_io(device.handle, None, ctypes.addressof(_status))
        for poll in self._polls.values():
            poll.registration = None
        self._polls.clear()
        self._crowd = None
        self._settle()
        self._look([], [])
        self._hear_at_once([], [])
        asked: list[_Poll | _Crowd] = [
            *self._by_address.values(),
            *self._crowds.values(),
        ]
        # And whatever else has been told is heard.
        unanswered = any(each.pending for each in asked)
        while self._take(port, 1000 if unanswered else 0):
            self._look([], [])
            unanswered = any(each.pending for each in asked)
        if unanswered:
            # Rather a leak than a kernel that writes into others' memory.
            _lost.extend(asked)
        for device in self._devices:
            windows.close_handle(device.handle)
        with self._lock:
            self._port = None
            self._woken = False
            if self._operations:
                self._former_port = port
            else:
                windows.close_handle(port)
                _open.discard(self)
        self._by_address.clear()
        self._crowds.clear()
        self._spare_crowds.clear()
        self._free.clear()
        self._answered.clear()
        self._gone.clear()
        self._devices.clear()

    def daemonized(self) -> None:
        """See :meth:`Notifier.daemonized`; nothing forks on Windows."""

    def watch(self, registration: Registration) -> None:
        """See :meth:`Notifier.watch`."""
        base = base_socket(registration.descriptor)
        if self._port is not None:
            self._begin(registration, base)
        self._registrations[registration] = base

    def update(self, registration: Registration) -> None:
        """
        See :meth:`Notifier.update`: the engine checks what is new, and what is
        wanted no more is not told of.
        """

    def unwatch(self, registration: Registration) -> None:
        """See :meth:`Notifier.unwatch`."""
        del self._registrations[registration]
        poll = self._polls.pop(registration, None)
        if poll is not None:
            self._give_up(poll)

    def wait(
        self, timeout: float | None, unchecked: Mapping[Registration, int]
    ) -> tuple[Sequence[Registration], Sequence[Event]]:
        """See :meth:`Notifier.wait`."""
        port = self._port
        if port is None:
            self.open()
            port = self._port
            assert port is not None
        plain: list[Registration] = []
        events: list[Event] = []
        self._settle()
        checked: Iterable[Registration] = unchecked
        interrupted = self._count.value > 0 or bool(self._at_once)
        if interrupted:
            self._look(plain, events)
            self._hear_at_once(plain, events)
            # These are told of now, and asked for in the next pass.
            told = {poll.registration for poll in self._answered}
            checked = [each for each in unchecked if each not in told]
        else:
            self._issue_answered()
        polls = self._polls
        for registration in checked:
            if registration in polls:
                self._issue(polls[registration])
        crowd = self._crowd
        if crowd is not None and not crowd.pending and not interrupted:
            self._issue_crowd(crowd)
        packets_can_wait = False
        if self._at_once:
            packets_can_wait = (
                crowd in self._at_once
                and self._without_packets < _PASSES_WITHOUT_PACKETS
                and not self._woken
            )
            self._hear_at_once(plain, events)
        if plain or events or self._gone:
            milliseconds = 0
        elif timeout is None:
            milliseconds = windows.INFINITE
        else:
            # Rather late than twice; what is 24 days off can be woken up for.
            milliseconds = min(math.ceil(timeout * 1000), 0x7FFFFFFF)
        if packets_can_wait:
            self._without_packets += 1
        elif not interrupted:
            self._without_packets = 0
            if self._take(port, milliseconds):
                self._look(plain, events)
        self._waits += 1
        if self._gone:
            events += [(registration, GONE, 0) for registration in self._gone]
            self._gone.clear()
        return plain, events

    def is_hung_up(self, registration: Registration) -> bool:
        """See :meth:`Notifier.is_hung_up`."""
        return True

    def statistics(self) -> Mapping[str, int]:
        """
        See :meth:`Notifier.statistics`.

        ``armed`` counts the sockets that polls are with the driver for, ``waits``
        the passes, ``events`` what was told of sockets, ``checks`` the polls that
        were issued, and ``cancelled`` those that were called back.
        """
        crowd = self._crowd
        return {
            "armed": sum(1 for each in self._polls.values() if each.pending)
            + (len(crowd.members) if crowd is not None and crowd.pending else 0),
            "waits": self._waits,
            "events": self._events,
            "checks": self._checks,
            "cancelled": self._cancelled,
        }

    def wake(self) -> None:
        """From any thread: the ``wait`` under way, or else the next one, returns."""
        with self._lock:
            if self._port is not None and not self._woken:
                self._woken = True
                windows.post_completion(self._port, 0, 0, None)

    # Handles

    def call_once_signalled(self, handle: int, function: Callable[[], None]) -> int:
        """
        Have ``function`` called when an object of Windows is signalled.

        :return: a number by which to ``forget`` it, at the latest when it was
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
        """Do not call what was to be called, and let go of the handle."""
        del self._signals[number]
        if number in self._pool_waits:
            self._cease_to_wait(number)

    def adopt(self, handle: int) -> None:
        """Have overlapped operations on a handle, a pipe's say, report here."""
        self.open()
        if not windows.create_completion_port(handle, self._port, 0, 0):
            raise windows.error(windows.last_error())

    def call_once_completed(self, address: int, function: Callable[[], None]) -> None:
        """
        Have ``function`` called when an operation is over.

        Until then it must keep alive what the kernel may write to.

        :param address: of its ``OVERLAPPED``.
        """
        self._operations[address] = function

    def forget_completion(self, address: int) -> None:
        """The operation did not begin."""
        del self._operations[address]

    def _begin_to_wait(self, number: int) -> None:
        handle, _ = self._signals[number]
        self._pool_waits[number] = windows.overlapped.RegisterWaitWithQueue(
            handle, self._port, number, windows.INFINITE
        )

    def _cease_to_wait(self, number: int) -> None:
        # Returns when the pool will post no more packets.
        windows.unregister_wait(self._pool_waits.pop(number), windows.INVALID_HANDLE)

    # Polls

    def _begin(self, registration: Registration, base: int) -> None:
        poll = self._new_poll()
        poll.ask_about(registration, base)
        self._polls[registration] = poll
        self._answered.append(poll)

    def _new_poll(self) -> _Poll:
        if self._free:
            poll = self._free.pop()
        else:
            device = self._device()
            poll = _Poll(device)
            device.polls += 1
        self._by_address[poll.address] = poll
        return poll

    def _device(self) -> _Device:
        if not self._devices or self._devices[-1].polls == _POLLS_OF_A_DEVICE:
            assert self._port is not None
            self._devices.append(_Device(self._port))
        return self._devices[-1]

    def _issue_answered(self) -> None:
        """Ask again for those who have been told of, together if they are many."""
        answered = self._answered
        if not answered:
            return
        self._answered = []
        crowd = self._crowd
        if crowd is None:
            if len(answered) >= _FEWEST_OF_A_CROWD:
                self._crowd = crowd = self._new_crowd()
        elif crowd.pending:
            crowd = None
        for poll in answered:
            if crowd is None or not self._is_of(crowd, poll):
                self._issue(poll)

    def _is_of(self, crowd: _Crowd, poll: _Poll) -> bool:
        """Whether it is of the crowd, or joins it."""
        registration = poll.registration
        if registration is None or registration.interest != READ or poll.pending:
            return False
        member = crowd.members.get(poll.base)
        if member is None and len(crowd.members) < _MOST_OF_A_CROWD:
            poll.told = crowd.turn
            crowd.members[poll.base] = member = poll
            crowd.changed = True
        return member is poll

    def _issue(self, poll: _Poll) -> None:
        """Ask what its registration wants to know, unless that is asked already."""
        registration = poll.registration
        if registration is None:
            return
        interest = registration.interest
        crowd = self._crowd
        if crowd is not None and crowd.members.get(poll.base) is poll:
            if interest == READ:
                return
            self._leave(crowd, poll)
        if poll.pending:
            if not interest & ~poll.pending:
                return
            self._give_up(poll)
            poll = self._new_poll()
            poll.ask_about(registration, self._registrations[registration])
            self._polls[registration] = poll
        poll.words[_ASKED] = _MASKS[interest]
        if not self._ask(poll, interest):
            poll.pending = 0
            self._gone.append(registration)

    def _ask(self, asked: _Poll | _Crowd, interest: int) -> bool:
        """Ask the driver; whether it takes the question."""
        # Before the call: an interrupt after it must find that it was made.  None
        # comes between, where nothing is called that is written in Python.
        asked.words[_STATUS] = windows.STATUS_PENDING
        self._asking = asked
        asked.pending = interest
        status = windows.device_io_control(*asked.arguments)
        self._checks += 1
        if status == windows.STATUS_SUCCESS:
            self._at_once.append(asked)
        self._asking = None
        return status == windows.STATUS_SUCCESS or status == windows.STATUS_PENDING

    def _settle(self) -> None:
        """Clear up what an interrupt has left when the driver was asked."""
        asked, self._asking = self._asking, None
        if (
            asked is None
            or asked.words[_STATUS] == windows.STATUS_PENDING
            or asked in self._at_once
        ):
            return
        # It is answered, and nobody knows whether a packet will tell: so another one
        # takes its place.
        if isinstance(asked, _Crowd):
            asked.pending = 0
            if asked is self._crowd:
                self._replace_crowd(asked)
            return
        asked.pending = 0
        registration, asked.registration = asked.registration, None
        if registration is not None:
            self._begin(registration, asked.base)

    def _give_up(self, poll: _Poll) -> None:
        poll.registration = None
        crowd = self._crowd
        if crowd is not None and crowd.members.get(poll.base) is poll:
            self._leave(crowd, poll)
        if poll.pending:
            self._call_back(poll)
        else:
            self._release(poll)

    def _release(self, poll: _Poll) -> None:
        # Unless an interrupt has it released twice.
        if self._by_address.pop(poll.address, None) is not None:
            self._free.append(poll)

    def _call_back(self, asked: _Poll | _Crowd) -> None:
        self._cancelled += 1
        windows.cancel_io(asked.device.handle, asked.address, ctypes.addressof(_status))

    # The crowd

    def _new_crowd(self) -> _Crowd:
        if self._spare_crowds:
            crowd = self._spare_crowds.pop()
        else:
            crowd = _Crowd(self._device())
        self._crowds[crowd.address] = crowd
        return crowd

    def _release_crowd(self, crowd: _Crowd) -> None:
        crowd.members.clear()
        # Unless an interrupt has it released twice.
        if self._crowds.pop(crowd.address, None) is not None:
            self._spare_crowds.append(crowd)

    def _issue_crowd(self, crowd: _Crowd) -> None:
        """Ask for all of them, but those who have been idle for too long."""
        if not crowd.turn % _PATIENCE_OF_A_CROWD:
            patience = crowd.turn - _PATIENCE_OF_A_CROWD
            for poll in [
                each for each in crowd.members.values() if each.told <= patience
            ]:
                self._leave(crowd, poll)
                self._issue(poll)
        if len(crowd.members) < _FEWEST_OF_A_CROWD:
            self._crowd = None
            members = list(crowd.members.values())
            self._release_crowd(crowd)
            for poll in members:
                self._issue(poll)
            return
        if crowd.changed:
            crowd.name_members()
        if not self._ask(crowd, READ):
            # One of them is no socket any more, and each will find out.
            crowd.pending = 0
            members = list(crowd.members.values())
            crowd.members.clear()
            for poll in members:
                self._issue(poll)

    def _leave(self, crowd: _Crowd, poll: _Poll) -> None:
        del crowd.members[poll.base]
        crowd.changed = True
        if crowd.pending:
            # For it names a socket that may be asked for otherwise now.  What was
            # asked stays as it is until it is answered, so the others move.
            self._call_back(crowd)
            self._replace_crowd(crowd)

    def _replace_crowd(self, crowd: _Crowd) -> None:
        self._crowd = successor = self._new_crowd()
        successor.turn = crowd.turn
        successor.members, crowd.members = crowd.members, {}
        successor.changed = True

    # Packets

    def _take(self, port: int, milliseconds: int) -> bool:
        """Take the packets that there are; whether there are any."""
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

    def _hear_at_once(self, plain: list[Registration], events: list[Event]) -> None:
        """Hear those who need no packet."""
        for asked in self._at_once:
            if isinstance(asked, _Crowd):
                self._hear_crowd(asked, plain, events)
            else:
                self._hear(asked, plain, events)
        self._at_once.clear()

    def _look(self, plain: list[Registration], events: list[Event]) -> None:
        """Find out what the packets that were taken tell of."""
        count = self._count
        addresses = self._words[_ADDRESS : count.value * _PACKET_WORDS : _PACKET_WORDS]
        by_address = self._by_address
        for address in addresses.tolist():
            poll = by_address.get(address)
            if poll is None:
                if address in self._crowds:
                    self._hear_crowd(self._crowds[address], plain, events)
                elif address in self._signals:
                    self._call_soon(self._signals[address][1])
                elif address in self._operations:
                    self._call_soon(self._operations.pop(address))
                elif not address:
                    # Somebody has called wake().
                    self._woken = False
                continue
            self._hear(poll, plain, events)
        count.value = 0

    def _hear(
        self, poll: _Poll, plain: list[Registration], events: list[Event]
    ) -> None:
        poll.pending = 0
        if poll.registration is None:
            self._release(poll)
            return
        words = poll.words
        if words[_STATUS] == windows.STATUS_SUCCESS and words[_ANSWERS]:
            self._tell(poll, words[_ANSWERED], plain, events)
        else:
            # Cancelled by Windows, and what is there is the answer before.
            self._answered.append(poll)

    def _hear_crowd(
        self, crowd: _Crowd, plain: list[Registration], events: list[Event]
    ) -> None:
        crowd.pending = 0
        if crowd is not self._crowd:
            self._release_crowd(crowd)
            return
        if crowd.words[_STATUS] != windows.STATUS_SUCCESS:
            return
        crowd.turn = turn = crowd.turn + 1
        members = crowd.members
        for base, answer in crowd.answer():
            poll = members.get(base)
            # Unless it has left since, with an interrupt between.
            if poll is not None:
                poll.told = turn
                self._tell(poll, answer, plain, events)

    def _tell(
        self,
        poll: _Poll,
        answer: int,
        plain: list[Registration],
        events: list[Event],
    ) -> None:
        registration = poll.registration
        assert registration is not None
        self._events += 1
        self._answered.append(poll)
        if registration.tells_drained and not answer & _MORE_THAN_INPUT:
            plain.append(registration)
        else:
            events.append((registration, _ready(answer), 0))


class _Console:
    """Wakes notifiers at Ctrl-C and Ctrl-Break."""

    def __init__(self) -> None:
        self._notifiers: list[CompletionPortNotifier] = []
        self._handler = windows.ConsoleHandler(self.handle)

    def add(self, notifier: CompletionPortNotifier) -> None:
        if not self._notifiers:
            windows.set_console_handler(self._handler, True)
        self._notifiers.append(notifier)

    def discard(self, notifier: CompletionPortNotifier) -> None:
        with contextlib.suppress(ValueError):
            self._notifiers.remove(notifier)
            if not self._notifiers:
                windows.set_console_handler(self._handler, False)

    def handle(self, event: int) -> bool:
        """Called by Windows, in a thread of its own; whether that is all."""
        if event == windows.CTRL_C_EVENT:
            number = signal.SIGINT
        elif event == windows.CTRL_BREAK_EVENT:
            number = getattr(signal, "SIGBREAK", signal.SIGINT)
        else:
            return False
        if not callable(signal.getsignal(number)):
            # Windows does what it does of itself.
            return False
        signal.raise_signal(number)
        for notifier in list(self._notifiers):
            notifier.wake()
        return True


console = _Console()
"""Where the console control events of this process arrive."""

# Those that are open, or have operations under way: the kernel may write to what
# they have.
_open: set[CompletionPortNotifier] = set()

# The polls of ports that were closed before their answers came.
_lost: list[_Poll | _Crowd] = []
