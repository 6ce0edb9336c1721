"""
The queue of realtime signals of one thread, read in batches through signalfd(2), and
shared by all reactors that run in that thread.

The signals are blocked only while a queue is open, and only in its thread.  No program
that the reactor starts inherits them blocked: a forked child unblocks them first, and
:mod:`twisted_rtsig.notifiers.signal_mask` leaves them out of the mask of a spawned one.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
import weakref

from twisted_rtsig.notifiers import UnsupportedReactorError, signal_mask

SIGNAL_VARIABLE = "TWISTED_RTSIG_SIGNAL"
"""The environment variable that chooses the signal, by number or SIGRTMIN+n."""

_ALTERNATIVES = "use --reactor=epoll, or --reactor=poll where there is no epoll"

# signalfd(2): struct signalfd_siginfo is 128 bytes, 32 words.
_RECORD_BYTES = 128
_RECORD_WORDS = 32
_SIGNO, _FD, _BAND = 0, 5, 7
_BATCH = 512

_SFD_NONBLOCK = os.O_NONBLOCK if hasattr(os, "O_NONBLOCK") else 0
_SFD_CLOEXEC = os.O_CLOEXEC if hasattr(os, "O_CLOEXEC") else 0
_SIGSET_BYTES = 128

_SIGIO = int(signal.SIGIO) if hasattr(signal, "SIGIO") else 0

# The flags of poll(2) as they arrive in ssi_band: POLLIN, with which POLLRDNORM comes.
PLAIN_INPUT = 0x001 | 0x040
"""The band of a signal for input and nothing else."""


def _sigset(signals: set[int]) -> bytes:
    mask = 0
    for number in signals:
        mask |= 1 << (number - 1)
    return mask.to_bytes(_SIGSET_BYTES, sys.byteorder)


def refuse(why: str) -> UnsupportedReactorError:
    """The error that says why realtime signals do not work here, and what to use."""
    return UnsupportedReactorError(f"{why}; {_ALTERNATIVES}")


def open_signalfd(signals: set[int]) -> int:
    """
    A new descriptor of signalfd(2), which CPython does not have.

    (``signal.sigwaitinfo`` could be used, but its result lacks the descriptor.)

    :raises UnsupportedReactorError: if the system cannot make one.
    """
    try:
        signalfd = ctypes.CDLL(None, use_errno=True).signalfd
    except AttributeError:
        raise refuse("the C library has no signalfd(2)") from None
    descriptor: int = signalfd(-1, _sigset(signals), _SFD_NONBLOCK | _SFD_CLOEXEC)
    if descriptor < 0:
        why = os.strerror(ctypes.get_errno())
        raise refuse(f"signalfd(2) gives no descriptor ({why})")
    return descriptor


def _parse(name: str) -> int:
    text = name.strip()
    if text.upper().startswith("SIGRTMIN"):
        return int(signal.SIGRTMIN) + int(text[len("SIGRTMIN") :] or 0)
    return int(text)


def choose_signal(requested: int | None = None) -> int:
    """
    Choose a realtime signal that nothing in this process handles.

    :param requested: the signal number to use.  None is the one that the environment
        variable ``TWISTED_RTSIG_SIGNAL`` names, or else the first free one from
        SIGRTMIN on.
    :raises UnsupportedReactorError: if none is free, or if the requested one is no
        realtime signal.
    """
    if not sys.platform.startswith("linux"):
        raise refuse(
            "realtime-signal I/O (O_ASYNC with F_SETSIG) exists on Linux only, "
            f"and this is {sys.platform}"
        )
    first, last = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    variable = os.environ.get(SIGNAL_VARIABLE)
    source = ""
    if requested is None and variable:
        source = f"{SIGNAL_VARIABLE}={variable!r}: "
        try:
            requested = _parse(variable)
        except ValueError:
            raise refuse(
                f"{source}neither a number from {first} to {last} nor SIGRTMIN+n"
            ) from None
    if requested is not None:
        if not first <= requested <= last:
            raise refuse(
                f"{source}signal {requested} is no realtime signal: they go from "
                f"{first} to {last}"
            )
        return requested
    taken = _signals_in_use()
    for number in range(first, last + 1):
        if not taken >> (number - 1) & 1:
            return number
    raise refuse(
        f"all realtime signals from {first} to {last} are handled, ignored or "
        "blocked by something in this process"
    )


def _signals_in_use() -> int:
    """
    A bit for each signal that is caught, ignored or blocked.

    The kernel is asked, as ``signal.getsignal`` does not see a handler set by C code.
    """
    taken = 0
    try:
        with open("/proc/thread-self/status") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name in ("SigCgt", "SigIgn", "SigBlk"):
                    mask = int(value, 16)
                    if name == "SigBlk":
                        for number in signal_mask.blocked:
                            mask &= ~(1 << (number - 1))
                    taken |= mask
    except FileNotFoundError:
        # There is no /proc here, so use what Python knows.
        for number in range(int(signal.SIGRTMIN), int(signal.SIGRTMAX) + 1):
            if signal.getsignal(number) is not signal.SIG_DFL:
                taken |= 1 << (number - 1)
    return taken


class _Thread:
    """
    A thread.

    :ivar ident: its identifier; 0 once it has ended, since a later thread may get the
        same identifier.
    """

    def __init__(self) -> None:
        self.ident = threading.get_ident()


class _EndOfThread:
    """
    An object in the local storage of a thread, which is collected with the thread.
    """

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread

    def __del__(self) -> None:
        self._thread.ident = 0


class _ThisThread(threading.local):
    """The queues of the calling thread, and the signals blocked in it."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self._end = _EndOfThread(self.thread)
        self.queues: dict[int, SignalQueue] = {}
        self.blocked: set[int] = set()
        self.kept: set[int] = set()

    def block(self, signals: set[int]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.blocked |= signals - {int(each) for each in before}
        signal_mask.blocked.update(self.blocked)

    def unblock(self, signals: set[int]) -> None:
        """Unblock those of ``signals`` that this package has blocked."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.blocked & signals)
        self.blocked -= signals


_this_thread = _ThisThread()


class SignalQueue:
    """
    A queue of signals.  :meth:`join` returns that of the calling thread.

    :ivar descriptor: the descriptor of signalfd(2), readable while signals are queued.
    :ivar thread: the thread whose signals it reads.
    :ivar members: the notifiers that share the queue.
    :ivar keep_blocked: set when a descriptor that is not watched any more may still
        send signals.  Then the signal stays blocked when the queue is closed, since the
        default action of a realtime signal is to end the process.
    """

    def __init__(self, number: int) -> None:
        self.descriptor = -1
        self.number = number
        self.signals = {number, _SIGIO}
        self.thread = _this_thread.thread
        self.members: weakref.WeakSet[object] = weakref.WeakSet()
        self.keep_blocked = False
        self._buffer = bytearray(_RECORD_BYTES * _BATCH)
        self._words = memoryview(self._buffer).cast("i")
        self.descriptor = open_signalfd(self.signals)
        # The fastest way to read into a buffer in Python.
        self._read_into = io.FileIO(self.descriptor, closefd=False).readinto

    @classmethod
    def join(cls, number: int, member: object) -> SignalQueue:
        """
        Return the queue of the calling thread for signal ``number``, with ``member``
        added to it.

        :raises UnsupportedReactorError: if it cannot be opened.
        """
        queue = _this_thread.queues.get(number)
        if queue is None:
            queue = cls(number)
            _this_thread.queues[number] = queue
            _this_thread.block(queue.signals)
        queue.members.add(member)
        return queue

    def is_of_this_thread(self) -> bool:
        """Whether the calling thread is the one whose signals it reads."""
        return self.thread.ident == threading.get_ident()

    def leave(self, member: object) -> None:
        """
        Remove ``member``, which watches nothing any more.

        When the last one is removed, the queue is closed, and the signals that are
        still in it are dropped.  Call this in the thread of the queue.
        """
        self.members.discard(member)
        if self.members or not self.is_of_this_thread():
            return
        while self.read()[0]:
            pass
        self.close()
        queues = _this_thread.queues
        del queues[self.number]
        if self.keep_blocked:
            _this_thread.kept |= self.signals
        needed = {each for queue in queues.values() for each in queue.signals}
        _this_thread.unblock(self.signals - needed - _this_thread.kept)

    def read(self) -> tuple[list[int], list[int], bool]:
        """
        Read a batch of signals.

        :return: the descriptor of each signal; the band (``ssi_band``) of each; and
            whether the kernel has reported that its queue was full, so that other
            signals were lost.
        """
        size = self._read_into(self._buffer)
        words = self._words
        if size == _RECORD_BYTES:
            band = words[_BAND]
            return [words[_FD]], [band], not band and words[_SIGNO] == _SIGIO
        if size is None:
            return [], [], False
        end = size // _RECORD_BYTES * _RECORD_WORDS
        descriptors = words[_FD:end:_RECORD_WORDS].tolist()
        bands = words[_BAND:end:_RECORD_WORDS].tolist()
        # When the queue is full, the kernel sends SIGIO in place of the signal that was
        # set by F_SETSIG, with an empty band.
        overflowed = 0 in bands and _SIGIO in words[_SIGNO:end:_RECORD_WORDS].tolist()
        return descriptors, bands, overflowed

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        # The thread has ended without leaving the queue.  Its signal mask and its
        # pending signals have ended with it.
        self.close()


def members_in_this_thread() -> list[object]:
    """The notifiers that are open in the calling thread."""
    return [each for queue in _this_thread.queues.values() for each in queue.members]


def _after_fork_in_child() -> None:
    """
    Unblock the signals.

    That is safe, since none are pending here: signals are queued for the thread that
    owns a descriptor, which is a thread of the parent.  The child has only the thread
    that has forked.
    """
    for queue in _this_thread.queues.values():
        queue.close()
    _this_thread.queues.clear()
    if signal_mask.blocked:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal_mask.blocked)
    _this_thread.blocked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
