"""
The functions of Windows that this package calls, declared for ctypes.

References: for kernel32 and ws2_32, the Windows SDK; for ntdll and the AFD driver,
which Microsoft documents in part or not at all, ReactOS, wepoll, libuv, mio and trio,
which all rely on the same.

The module can be imported on any system, for type checkers and for tests of its
layouts.  The functions exist on Windows only.  They are called by the C calling
convention, which is correct only on 64-bit systems, where Windows has no other one.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from ctypes import (
    Structure,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    c_wchar_p,
)
from typing import Any

HANDLE = c_void_p
INVALID_HANDLE = 2**64 - 1

INFINITE = 0xFFFFFFFF

STATUS_SUCCESS = 0
STATUS_PENDING = 0x103

ERROR_ACCESS_DENIED = 5
ERROR_HANDLE_EOF = 38
WAIT_TIMEOUT = 258
WSAENOTSOCK = 10038

SOL_SOCKET = 0xFFFF
SO_TYPE = 0x1008

# WSAIoctl: the socket that AFD knows, below the layers that may be on top of it.
SIO_BASE_HANDLE = 0x48000022
SIO_BSP_HANDLE_SELECT = 0x4800001C
SIO_BSP_HANDLE_POLL = 0x4800001D

# ioctlsocket: the number of bytes that can be read.
FIONREAD = 0x4004667F

# NtCreateFile
SYNCHRONIZE = 0x00100000
FILE_SHARE_READ = 1
FILE_SHARE_WRITE = 2
FILE_OPEN = 1

# CreateFile
GENERIC_READ = 0x80000000
GENERIC_WRITE = 0x40000000
FILE_SHARE_DELETE = 4
CREATE_NEW = 1
CREATE_ALWAYS = 2
OPEN_EXISTING = 3
OPEN_ALWAYS = 4
FILE_ATTRIBUTE_READONLY = 0x1
FILE_ATTRIBUTE_NORMAL = 0x80
FILE_FLAG_OVERLAPPED = 0x40000000

# SetFileCompletionNotificationModes
FILE_SKIP_COMPLETION_PORT_ON_SUCCESS = 1
FILE_SKIP_SET_EVENT_ON_HANDLE = 2

# SetFileInformationByHandle: the size of the file.
FILE_END_OF_FILE_INFO = 6

# NtDeviceIoControlFile: a poll of AFD, and its events.
IOCTL_AFD_POLL = 0x00012024
AFD_RECEIVE = 0x001
AFD_SEND = 0x004
AFD_DISCONNECT = 0x008
AFD_ABORT = 0x010
AFD_LOCAL_CLOSE = 0x020
AFD_ACCEPT = 0x080
AFD_CONNECT_FAIL = 0x100
AFD_FOR_EVER = 2**63 - 1
"""The timeout of a poll without a limit."""

# SetConsoleCtrlHandler
CTRL_C_EVENT = 0
CTRL_BREAK_EVENT = 1


class UnicodeString(Structure):
    """``UNICODE_STRING``"""

    _fields_ = (
        ("length", c_uint16),
        ("maximum_length", c_uint16),
        ("buffer", c_void_p),
    )


class ObjectAttributes(Structure):
    """``OBJECT_ATTRIBUTES``"""

    _fields_ = (
        ("length", c_uint32),
        ("root_directory", HANDLE),
        ("object_name", c_void_p),
        ("attributes", c_uint32),
        ("security_descriptor", c_void_p),
        ("security_quality_of_service", c_void_p),
    )


class IOStatusBlock(Structure):
    """``IO_STATUS_BLOCK``"""

    _fields_ = (("status", c_uint64), ("information", c_size_t))


class AFDPollHandleInfo(Structure):
    """``AFD_POLL_HANDLE_INFO``: one socket of a poll."""

    _fields_ = (("handle", c_uint64), ("events", c_uint32), ("status", c_uint32))


class AFDPollInfo(Structure):
    """``AFD_POLL_INFO``, for one socket."""

    _fields_ = (
        ("timeout", c_int64),
        ("number_of_handles", c_uint32),
        ("exclusive", c_uint32),
        ("handles", AFDPollHandleInfo),
    )


class Overlapped(Structure):
    """``OVERLAPPED``: an operation that runs in the background."""

    _fields_ = (
        ("internal", c_size_t),
        ("internal_high", c_size_t),
        ("offset", c_uint64),
        ("event", HANDLE),
    )


class CompletionPacket(Structure):
    """``OVERLAPPED_ENTRY``: a packet of a completion port."""

    _fields_ = (
        ("key", c_size_t),
        ("overlapped", c_uint64),
        ("internal", c_size_t),
        ("number_of_bytes", c_uint32),
    )


_SIZES: dict[type[Structure], int] = {
    UnicodeString: 16,
    ObjectAttributes: 48,
    IOStatusBlock: 16,
    AFDPollHandleInfo: 16,
    AFDPollInfo: 32,
    Overlapped: 32,
    CompletionPacket: 32,
}


def check_layouts() -> None:
    """
    Check the sizes and offsets of the structures.

    :raises AssertionError: if this is no 64-bit system.
    """
    for structure, size in _SIZES.items():
        assert ctypes.sizeof(structure) == size, structure
    assert AFDPollInfo.handles.offset == 16
    assert AFDPollHandleInfo.events.offset == 8
    assert ObjectAttributes.object_name.offset == 16
    assert CompletionPacket.overlapped.offset == 8


Call = Callable[..., int]

_QUICK: dict[str, Any] = {}
_SLOW: dict[str, Any] = {}


def _declare(
    library: str, name: str, result: Any, *arguments: Any, quick: bool = False
) -> Call:
    """
    Declare a function of a library.

    :param quick: whether the call never blocks, so that it can keep the interpreter
        lock.
    """
    if sys.platform != "win32":

        def only_on_windows(*arguments: Any) -> int:
            raise NotImplementedError(f"{name} exists on Windows only")

        return only_on_windows
    loaded = _QUICK if quick else _SLOW
    if library not in loaded:
        kind = ctypes.PyDLL if quick else ctypes.CDLL
        loaded[library] = kind(library, use_last_error=True)
    function: Any = loaded[library][name]
    function.restype = result
    function.argtypes = arguments
    call: Call = function
    return call


create_file = _declare(
    "ntdll",
    "NtCreateFile",
    *(c_uint32, c_void_p, c_uint32, c_void_p, c_void_p, c_void_p),
    *(c_uint32, c_uint32, c_uint32, c_uint32, c_void_p, c_uint32),
)
"""Handle (out), access, object attributes, status block, ..., length."""

device_io_control = _declare(
    "ntdll",
    "NtDeviceIoControlFile",
    *(c_uint32, HANDLE, HANDLE, c_void_p, c_void_p, c_void_p),
    *(c_uint32, c_void_p, c_uint32, c_void_p, c_uint32),
    quick=True,
)
"""Handle, event, APC, its context, status block, code, input, output."""

cancel_io = _declare(
    "ntdll", "NtCancelIoFileEx", c_uint32, HANDLE, c_void_p, c_void_p, quick=True
)
"""Handle, the status block of the operation to cancel, a status block."""

status_to_error = _declare(
    "ntdll", "RtlNtStatusToDosError", c_uint32, c_uint32, quick=True
)
"""The status; the Windows error for it."""

create_completion_port = _declare(
    "kernel32", "CreateIoCompletionPort", HANDLE, HANDLE, HANDLE, c_size_t, c_uint32
)
"""Handle to associate, port, key, concurrency; the port, or None."""

set_notification_modes = _declare(
    "kernel32", "SetFileCompletionNotificationModes", c_int32, HANDLE, c_uint8
)
"""Handle, the notifications that its completion port does not need."""

get_completions = _declare(
    "kernel32",
    "GetQueuedCompletionStatusEx",
    *(c_int32, HANDLE, c_void_p, c_uint32, c_void_p, c_uint32, c_int32),
)
"""Port, packets (out), room for how many, how many (out), milliseconds, alertable."""

post_completion = _declare(
    "kernel32",
    "PostQueuedCompletionStatus",
    *(c_int32, HANDLE, c_uint32, c_size_t, c_void_p),
    quick=True,
)
"""Port, number of bytes, key, overlapped."""

close_handle = _declare("kernel32", "CloseHandle", c_int32, HANDLE)

open_file = _declare(
    "kernel32",
    "CreateFileW",
    *(HANDLE, c_wchar_p, c_uint32, c_uint32, c_void_p, c_uint32, c_uint32, HANDLE),
)
"""Name, access, sharing, security, disposition, flags, template; INVALID_HANDLE."""

set_file_information = _declare(
    "kernel32",
    "SetFileInformationByHandle",
    *(c_int32, HANDLE, c_uint32, c_void_p, c_uint32),
)
"""Handle, the kind of information, the information, its length."""

open_process = _declare("kernel32", "OpenProcess", HANDLE, c_uint32, c_int32, c_uint32)
"""Access, whether it is inherited, process id; the handle, or None."""

unregister_wait = _declare("kernel32", "UnregisterWaitEx", c_int32, HANDLE, HANDLE)
"""A wait of the thread pool; the event to set when it is over, or all ones to block."""

set_console_handler = _declare(
    "kernel32", "SetConsoleCtrlHandler", c_int32, c_void_p, c_int32
)
"""Handler, whether to add it."""

# The type of such a handler.  It is called with the number of a console control event.
ConsoleHandler = ctypes.CFUNCTYPE(c_int32, c_uint32)

socket_control = _declare(
    "ws2_32",
    "WSAIoctl",
    *(c_int32, c_uint64, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32),
    *(c_void_p, c_void_p, c_void_p),
)
"""Socket, code, input, its length, output, its length, length (out), ..."""

get_socket_option = _declare(
    "ws2_32",
    "getsockopt",
    *(c_int32, c_uint64, c_int32, c_int32, c_void_p, c_void_p),
)
"""Socket, level, name, value (out), its length (in and out)."""

_ioctlsocket = _declare(
    "ws2_32", "ioctlsocket", *(c_int32, c_uint64, c_int32, c_void_p)
)
"""Socket, code, argument (in and out)."""

# CPython's own functions for overlapped operations, written for asyncio; they have no
# stubs.  An operation keeps its buffers alive by itself.
overlapped: Any = (
    importlib.import_module("_overlapped") if sys.platform == "win32" else None
)

# Conversion of handles to descriptors.  Its stubs exist on Windows only.
msvcrt: Any = importlib.import_module("msvcrt") if sys.platform == "win32" else None


def last_error() -> int:
    """The error of the last of these calls in this thread."""
    if sys.platform == "win32":
        return ctypes.get_last_error()
    raise NotImplementedError("Windows errors exist on Windows only")


def bytes_to_read(socket: int) -> int | None:
    """The number of bytes that a socket can read at once; None if it is no socket."""
    size = c_uint32()
    if _ioctlsocket(socket, FIONREAD, ctypes.byref(size)):
        return None
    return size.value


def error(code: int) -> OSError:
    """The exception for a Windows error."""
    if sys.platform == "win32":
        return ctypes.WinError(code)
    raise NotImplementedError("Windows errors exist on Windows only")


if sys.platform == "win32" and sys.maxsize > 2**32:
    check_layouts()
