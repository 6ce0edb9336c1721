"""
Polls of AFD, the driver below Windows sockets: whether a socket is ready.

References: wepoll, mio and trio, which poll AFD as well; ReactOS and the Wine server
for what AFD does.
"""

from __future__ import annotations

import ctypes
import errno
from array import array
from collections.abc import Iterator

from twisted_rtsig.notifiers import GONE, HANGUP
from twisted_rtsig.notifiers.registration import READ, WRITE, Registration
from twisted_rtsig.windows import calls as windows

# Some facts about AFD
# --------------------
#
# * A poll is issued to a handle of the driver itself.  It names a socket and some
#   events, and is pending until one of these events is true.  If one is true when
#   the poll is issued, the driver answers at once: issuing a poll is a level check.
#   Otherwise the answer is a packet in the completion port of the handle.  Either
#   way the poll is used up.  So a descriptor is armed while its poll is pending, and
#   it is checked again by issuing the poll again.
#
# * A poll that is answered at once makes a packet as well, unless the handle is set
#   not to (FILE_SKIP_COMPLETION_PORT_ON_SUCCESS).  Our handles are set so.  Then,
#   while a shared poll (see below) is answered at once again and again, the port
#   needs to be read only now and then, for the sake of the other sockets.
#
# * Windows mixes up two polls of one socket that report to one port: the poll for
#   writing may be answered when there is something to read.  (Trio's notes, "AFD
#   lab", show it.)  So each socket has one poll, which asks for all that is wanted.
#   When more is wanted, the poll is cancelled and another one issued.  When less is
#   wanted, nothing needs to be done.
#
# * One poll may name many sockets; select() is implemented like this.  It is
#   answered as soon as one of the sockets is ready, and reports all that are.  So
#   the busy sockets share a poll: one call for each pass instead of one for each
#   request.  A shared poll costs more the more of its sockets are idle, so a socket
#   that it has not reported for a few turns gets a poll of its own again.  Only
#   sockets that are watched for nothing but reading share a poll.  When a socket
#   leaves a shared poll that is pending, this poll is cancelled.
#
# * A cancelled poll is answered all the same, later.  Until then the kernel may
#   write into its buffers, so they are kept, even if the registration has ended
#   long ago.
#
# * AFD reports more than poll(2): ABORT after a reset, DISCONNECT at the end of the
#   input, and LOCAL_CLOSE when the last handle of the socket was closed.  So a
#   descriptor that is closed while it is watched does not go unnoticed.
#
# * A handle to the driver becomes slower with the number of polls on it.  So each
#   handle has at most 32, as in wepoll and mio.
#
# * AFD knows only sockets of the lowest layer.  A layered service provider (a
#   firewall, for example) may have put a socket of its own on top, below which
#   SIO_BASE_HANDLE finds the one that AFD knows.  Pipes, files and consoles cannot
#   be polled at all.

_READABLE = windows.AFD_RECEIVE | windows.AFD_ACCEPT | windows.AFD_DISCONNECT
_WRITABLE = windows.AFD_SEND
_BROKEN = windows.AFD_ABORT | windows.AFD_CONNECT_FAIL

_ALWAYS = _BROKEN | windows.AFD_LOCAL_CLOSE

MASKS = (
    0,
    _READABLE | _ALWAYS,
    _WRITABLE | _ALWAYS,
    _READABLE | _WRITABLE | _ALWAYS,
)
"""The events to ask for, by interest: nothing, READ, WRITE, READ | WRITE."""

MORE_THAN_INPUT = ~(windows.AFD_RECEIVE | windows.AFD_DISCONNECT)
"""Events without any of these are plain input: a read finds data, or the end."""

_DEVICE = "\\Device\\Afd\\twisted_rtsig"
_MODES = (
    windows.FILE_SKIP_COMPLETION_PORT_ON_SUCCESS | windows.FILE_SKIP_SET_EVENT_ON_HANDLE
)
_POLLS_OF_A_DEVICE = 32

MOST_THAT_SHARE = 512
"""The most sockets of a shared poll."""

# The question and the answer of a poll are in one buffer.
_INFO_BYTES = ctypes.sizeof(windows.AFDPollInfo)
_QUESTION = ctypes.sizeof(windows.IOStatusBlock)
_ANSWER = _QUESTION + _INFO_BYTES
_POLL_BYTES = _ANSWER + _INFO_BYTES
_EVENTS_OFFSET = (
    windows.AFDPollInfo.handles.offset + windows.AFDPollHandleInfo.events.offset
)
# In 32-bit words.
STATUS = 0
"""Where a poll has its status."""
ASKED = (_QUESTION + _EVENTS_OFFSET) // 4
"""Where the poll of one socket has the events that it asks for."""
ANSWERED = (_ANSWER + _EVENTS_OFFSET) // 4
"""Where the poll of one socket has the events that its answer reports."""
ANSWERS = (_ANSWER + windows.AFDPollInfo.number_of_handles.offset) // 4
"""Where the poll of one socket has the number of sockets that its answer reports."""

# The same for a shared poll, whose question and answer are longer.
_HANDLES = windows.AFDPollInfo.handles.offset
_ENTRY_BYTES = ctypes.sizeof(windows.AFDPollHandleInfo)
_SHARED_BYTES = _HANDLES + MOST_THAT_SHARE * _ENTRY_BYTES

# The status block of calls that are over when they return.
_status = windows.IOStatusBlock()


def directions(events: int) -> int:
    """What a notifier calls the events of AFD: ``READ | WRITE | HANGUP | GONE``."""
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
    The socket that AFD knows, below the layers that may be on top of it.

    :raises OSError: if the descriptor is no socket.
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


class Device:
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

    def is_full(self) -> bool:
        """Whether it has as many polls as it may have."""
        return self.polls == _POLLS_OF_A_DEVICE

    def cancel(self, address: int | None = None) -> None:
        """Cancel the poll whose buffer is at ``address``, or all polls."""
        windows.cancel_io(self.handle, address, ctypes.addressof(_status))


class SocketPoll:
    """
    The poll of one socket, which is issued again and again.

    :ivar address: the address of its buffer, which its packets carry.
    :ivar base: the socket, as AFD knows it.
    :ivar registration: the registration that it asks for; None if that has ended.
    :ivar pending: the interest that the driver was asked for, while the poll is
        pending; otherwise 0.
    :ivar words: the buffer: the status, the question and the answer.
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
        "reported",
        "words",
    )

    def __init__(self, device: Device) -> None:
        self.device = device
        self.registration: Registration | None = None
        self.pending = 0
        self.base = 0
        # The turn of the shared poll that last reported the socket, while the socket is
        # a member of it.
        self.reported = 0
        # A bytearray cannot be resized, and so does not move, while views of it exist.
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
        """Name the socket in the question."""
        self.registration = registration
        self.base = base
        self._question.handles.handle = base


class SharedPoll:
    """
    One poll of many sockets.

    :ivar address: the address of its buffer, which its packets carry.
    :ivar members: by socket, the polls in place of which this one is issued.
    :ivar changed: whether the members are others than the buffer names.
    :ivar pending: as of :class:`SocketPoll`: ``READ``, or 0.
    :ivar turn: the number of answers so far.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.members: dict[int, SocketPoll] = {}
        self.changed = False
        self.pending = 0
        self.turn = 0
        answer = _QUESTION + _SHARED_BYTES
        buffer = bytearray(answer + _SHARED_BYTES)
        self.words = words = memoryview(buffer).cast("I")
        long_words = memoryview(buffer).cast("Q")
        self._question = windows.AFDPollInfo.from_buffer(buffer, _QUESTION)
        self._question.timeout = windows.AFD_FOR_EVER
        # The sockets and events of the question, and those of the answer.
        asked = (_QUESTION + _HANDLES) // 8
        self._sockets = long_words[asked : answer // 8 : 2]
        self._masks = words[2 * asked + 2 : answer // 4 : 4]
        self._masks[0 : len(self._masks)] = memoryview(
            array("I", [MASKS[READ]] * len(self._masks))
        )
        answered = (answer + _HANDLES) // 8
        self._sockets_reported = long_words[answered::2]
        self._events_reported = words[2 * answered + 2 :: 4]
        self._count = words[
            (answer + windows.AFDPollInfo.number_of_handles.offset) // 4 :
        ]
        question = ctypes.addressof(self._question)
        self.address = question - _QUESTION
        self.arguments = (
            *(device.handle, None, None, self.address, self.address),
            *(windows.IOCTL_AFD_POLL, question, _SHARED_BYTES),
            *(question + _SHARED_BYTES, _SHARED_BYTES),
        )

    def name_members(self) -> None:
        """Name the sockets of all members in the question."""
        self.changed = False
        count = len(self.members)
        self._question.number_of_handles = count
        self._sockets[:count] = memoryview(array("Q", self.members))

    def answer(self) -> Iterator[tuple[int, int]]:
        """The sockets that the answer reports, each with its events."""
        count = self._count[0]
        return zip(
            self._sockets_reported[:count].tolist(),
            self._events_reported[:count].tolist(),
            strict=True,
        )


__all__ = [
    "ANSWERED",
    "ANSWERS",
    "ASKED",
    "MASKS",
    "MORE_THAN_INPUT",
    "MOST_THAT_SHARE",
    "STATUS",
    "Device",
    "SharedPoll",
    "SocketPoll",
    "base_socket",
    "directions",
]
