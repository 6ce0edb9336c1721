"""
The kqueue reactor over libkqueue, which emulates kqueue(2) on Linux's epoll.

The environment variable ``LIBKQUEUE`` names the library, or else the loader finds it.
No supported Debian release has a package of it.  It is built from its source by::

    git clone https://github.com/mheily/libkqueue
    cmake -S libkqueue -B build -DCMAKE_BUILD_TYPE=Release
    cmake --build build --target kqueue
    export LIBKQUEUE=$PWD/build/libkqueue.so

:class:`LibKQueue` has the interface of ``select.kqueue``, and corrects the differences
between the emulation and a kernel:

- Closed descriptors stay watched.  If a duplicate still exists, their events point to
  memory that was freed.  So the descriptors are checked before each call.  If one was
  closed, all others move to a new queue.
- The emulation clears the error of a socket, so that no read gets the error.  Such a
  socket is removed from the queue as long as it has an error, and its events are made
  here.
- EV_ADD of a knote that exists already fails.
- A wait after a failed change may lose the failure.
- A child that was reaped makes all waits fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import functools
import os
import re
import select
import socket
import struct
import threading
import time
from typing import Any

from twisted.internet.main import installReactor

from twisted_rtsig import kqreactor
from twisted_rtsig.notifiers.kqueue_calls import KernelCalls

READ, WRITE, PROCESS, USER = -1, -2, -5, -11
ADD, DELETE, ONESHOT, CLEAR, EOF, ERROR = 0x1, 0x2, 0x10, 0x20, 0x8000, 0x4000
NOTE_EXIT, NOTE_TRIGGER = 0x80000000, 0x01000000


class KEvent(ctypes.Structure):
    """``struct kevent``, with the names and defaults of ``select.kevent``."""

    _fields_ = (
        ("ident", ctypes.c_size_t),
        ("filter", ctypes.c_short),
        ("flags", ctypes.c_ushort),
        ("fflags", ctypes.c_uint),
        ("data", ctypes.c_ssize_t),
        ("udata", ctypes.c_size_t),
    )

    def __init__(
        self,
        ident: int,
        filter: int = READ,
        flags: int = ADD,
        fflags: int = 0,
        data: int = 0,
        udata: int = 0,
    ) -> None:
        super().__init__(ident, filter, flags, fflags, data, udata)

    def copy(self, **changes: int) -> KEvent:
        values = {name: getattr(self, name) for name, _ in self._fields_}
        return KEvent(**{**values, **changes})

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)}" for name, _ in self._fields_)
        return f"KEvent({values})"


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def path() -> str | None:
    """The path of the library, or ``None``."""
    return os.environ.get("LIBKQUEUE") or ctypes.util.find_library("kqueue")


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(path(), use_errno=True)
    library.kqueue.argtypes = ()
    library.kevent.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    )
    return library


def _eventpolls(pipe: int) -> set[int]:
    """The epoll sets of this process that watch the pipe with this inode."""
    found = set()
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{name}") as info:
            if re.search(rf"^tfd:.*\bino:{pipe:x}\b", info.read(), re.MULTILINE):
                found.add(int(name))
    return found


class _Queue:
    """
    One queue of the library.

    Its descriptor is a pipe, which does not become readable.  The epoll set below it
    does.  A thread of the library frees both at some time after the queue was closed.
    """

    def __init__(self) -> None:
        kept = _keep_one(os.getpid())
        self.number = _call(_library().kqueue)
        self._pipe = os.fstat(self.number).st_ino
        # The epoll set of that thread watches the pipes of all queues.
        (self.eventpoll,) = _eventpolls(self._pipe) - _eventpolls(kept)

    def close(self) -> None:
        os.close(self.number)
        end = time.monotonic() + 5
        while _eventpolls(self._pipe) and time.monotonic() < end:
            time.sleep(0.0002)


@functools.cache
def _keep_one(process: int) -> int:
    """
    The pipe of a queue that stays open.  It keeps the resources that the first queue
    allocates for all and that the last one frees.
    """
    return os.fstat(_call(_library().kqueue)).st_ino


def _call(function: Any, *arguments: Any) -> int:
    result: int = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class LibKQueue:
    """``select.kqueue`` over libkqueue."""

    def __init__(self) -> None:
        self._queue = _Queue()
        # The changes that are in force, and the identity of each watched descriptor.
        self._knotes: dict[tuple[int, int], KEvent] = {}
        self._identities: dict[int, tuple[int, int]] = {}
        # The knotes that were removed because their socket has an error.
        self._taken_out: set[tuple[int, int]] = set()
        # A move replaces the queue.  A signal handler may run during the move.
        self._lock = threading.RLock()
        self._triggered = False
        self.closed = False

    def fileno(self) -> int:
        return self._queue.eventpoll

    def close(self) -> None:
        with self._lock:
            if not self.closed:
                self.closed = True
                self._queue.close()

    def control(
        self, changelist: Any, max_events: int, timeout: float | None = None, /
    ) -> list[Any]:
        """Do the work of kevent(2)."""
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")
        if changelist and changelist[0].fflags & NOTE_TRIGGER:
            # Another thread calls this while this one sleeps: change nothing else.
            self._trigger(changelist[0])
            return []
        self._forget_closed()
        failures = []
        for change in changelist or ():
            number = self._change(change)
            if number:
                failures.append(change.copy(flags=ERROR, data=number))
        if len(failures) > max_events:
            raise OSError(failures[0].data, os.strerror(failures[0].data))
        if failures or not max_events:
            return failures
        if timeout is None or timeout > 0:
            self._sleep(timeout)
        made = self._events_of_errors() + self._events_of_the_reaped()
        return (made + self._kevent(max_events))[:max_events]

    # The work of a kernel

    def _change(self, change: KEvent) -> int:
        """Make a change, and return its errno or 0."""
        key = change.ident, change.filter
        known = self._knotes.pop(key, None)
        if change.flags & DELETE:
            if known is None:
                return errno.ENOENT
            self._take_out(key)
            return 0
        if change.filter in (READ, WRITE):
            try:
                status = os.fstat(change.ident)
            except OSError as error:
                return error.errno or 0
            self._identities[change.ident] = status.st_dev, status.st_ino
        if known is not None:
            self._take_out(key)
        number = self._kchange(change)
        if not number:
            self._knotes[key] = change
        return number

    def _trigger(self, change: KEvent) -> None:
        with self._lock:
            self._triggered = True
            self._kchange(change)

    def _kchange(self, change: KEvent) -> int:
        change = change.copy()
        try:
            _call(
                *(_library().kevent, self._queue.number),
                *(ctypes.byref(change), 1, None, 0, None),
            )
        except OSError as error:
            return error.errno or errno.EINVAL
        return 0

    def _kevent(self, max_events: int) -> list[KEvent]:
        array = (KEvent * max_events)()
        count = _call(
            *(_library().kevent, self._queue.number, None, 0),
            *(ctypes.byref(array), max_events, ctypes.byref(_TimeSpec(0, 0))),
        )
        events = [array[index].copy() for index in range(count)]
        for event in events:
            if event.filter == USER:
                self._triggered = False
            self._tell_once(event)
        return events

    def _tell_once(self, event: KEvent) -> None:
        key = event.ident, event.filter
        knote = self._knotes.get(key)
        if knote is not None and knote.flags & ONESHOT:
            del self._knotes[key]
            self._taken_out.discard(key)

    def _take_out(self, key: tuple[int, int]) -> None:
        if key in self._taken_out:
            self._taken_out.discard(key)
        else:
            self._kchange(KEvent(*key, flags=DELETE))

    # Closed descriptors

    def _forget_closed(self) -> None:
        closed = set()
        for descriptor, identity in self._identities.items():
            try:
                status = os.fstat(descriptor)
            except OSError:
                closed.add(descriptor)
            else:
                if (status.st_dev, status.st_ino) != identity:
                    closed.add(descriptor)
        if not closed:
            return
        for descriptor in closed:
            del self._identities[descriptor]
            for filter in (READ, WRITE):
                self._knotes.pop((descriptor, filter), None)
                self._taken_out.discard((descriptor, filter))
        with self._lock:
            self._queue.close()
            self._queue = _Queue()
            for key, knote in self._knotes.items():
                if key not in self._taken_out:
                    self._kchange(knote)
            if self._triggered:
                self._trigger(KEvent(0, USER, 0, NOTE_TRIGGER))

    # Sockets with an error

    def _watched(self) -> dict[int, list[tuple[int, int]]]:
        watched: dict[int, list[tuple[int, int]]] = {}
        for key in self._knotes:
            if key[1] in (READ, WRITE):
                watched.setdefault(key[0], []).append(key)
        return watched

    def _sleep(self, timeout: float | None) -> None:
        """Sleep until the queue has an event, or a socket has an error."""
        poll = select.poll()
        poll.register(self._queue.eventpoll, select.POLLIN)
        for descriptor in self._watched():
            poll.register(descriptor, 0)
        poll.poll(None if timeout is None else timeout * 1000)

    def _events_of_errors(self) -> list[KEvent]:
        watched = self._watched()
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, 0)
        failed = {
            descriptor
            for descriptor, revents in poll.poll(0)
            if revents & select.POLLERR
        }
        events = []
        for descriptor, keys in watched.items():
            for key in keys:
                if descriptor in failed:
                    if key not in self._taken_out:
                        self._take_out(key)
                        self._taken_out.add(key)
                    events.append(
                        self._knotes[key].copy(
                            # A kernel reports EOF with the error of a stream only.
                            flags=EOF if _is_stream(descriptor) else 0,
                            fflags=errno.ECONNRESET,
                            data=_waiting(descriptor) if key[1] == READ else 32768,
                        )
                    )
                    self._tell_once(events[-1])
                elif key in self._taken_out:
                    self._taken_out.discard(key)
                    self._kchange(self._knotes[key])
        return events

    # Children

    def _events_of_the_reaped(self) -> list[KEvent]:
        events = []
        for key, knote in list(self._knotes.items()):
            if key[1] != PROCESS:
                continue
            try:
                os.waitid(os.P_PID, key[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._take_out(key)
                events.append(knote.copy(flags=EOF, fflags=NOTE_EXIT))
                self._tell_once(events[-1])
        return events


def _is_stream(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as handle:
            return handle.type == socket.SOCK_STREAM
    except OSError:
        # A pipe.
        return True


def _waiting(descriptor: int) -> int:
    """How many bytes can be read."""
    # Windows has neither module, but imports this file.
    import fcntl
    import termios

    try:
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    except OSError:
        return 0
    count: int = struct.unpack("i", answer)[0]
    return count


CALLS = KernelCalls(LibKQueue, KEvent, READ, WRITE, PROCESS, USER)


class KQueueReactor(kqreactor.KQueueReactor):
    """The kqueue reactor over libkqueue."""

    def __init__(self) -> None:
        super().__init__(CALLS)


def install() -> None:
    """Make it the reactor of this process."""
    installReactor(KQueueReactor())
