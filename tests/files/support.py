"""Helpers of the tests of files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from tests.coro.support import STYLES, spin
from tests.support import DEADLINE
from twisted_rtsig.coro import sleep, spawn


def forget_cached(path: Path) -> None:
    """
    Ask the kernel to remove a file from the page cache, on Linux.  The kernel may keep
    parts of it nevertheless.  Asking whether it does would read the file again.
    """
    if sys.platform.startswith("linux"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Gate:
    """
    A thread waits here until the gate is opened.

    :ivar reached: set when a thread waits.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._when_open: list[Callable[[], None]] = []

    def open(self) -> None:
        self._open.set()
        for function in self._when_open:
            function()

    def when_open(self, function: Callable[[], None]) -> None:
        """Call a function: at once if the gate is open, or else when it is opened."""
        if self._open.is_set():
            function()
        else:
            self._when_open.append(function)

    def wait(self) -> None:
        self.reached.set()
        assert self._open.wait(DEADLINE)


@contextlib.contextmanager
def running_threads(reactor: Any) -> Iterator[None]:
    """Run the threads of a reactor that is only iterated."""
    threads = reactor.getThreadPool()
    threads.start()
    yield
    threads.stop()


def occupy_thread(reactor: Any) -> Gate:
    """Let a thread of the reactor wait at a gate."""
    gate = Gate()
    reactor.callInThread(gate.wait)
    assert gate.reached.wait(DEADLINE)
    return gate


@pytest.fixture
def busy_threads(reactor: Any) -> Iterator[Gate]:
    """All threads of the reactor wait at a gate."""
    reactor.suggestThreadPoolSize(1)
    gate = occupy_thread(reactor)
    yield gate
    gate.open()


def hold(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, gate: Gate | None = None
) -> Gate:
    """Let calls of the function ``owner.name`` wait at a gate."""
    gate = gate or Gate()
    function = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        gate.wait()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    return gate


@contextlib.asynccontextmanager
async def counted_turns() -> AsyncIterator[list[int]]:
    """Count the turns that another task gets, as the only item of a list."""
    turns = [0]

    async def count() -> None:
        while True:
            await sleep(0)
            turns[0] += 1

    counter = spawn(count)
    yield turns
    counter.cancel()


def results_in(
    style: str,
    reactor: Any,
    opens: Callable[[], Deferred[Any]],
    calls: Sequence[Callable[[Any], Any]],
) -> list[Any]:
    """
    Open a file and make calls with it, in a function of a style.

    :return: the results, or the types of the errors.
    """
    files: list[Any] = []
    results: list[Any] = []

    def step(call: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: call(files[0])

    steps = [lambda: opens().addCallback(files.append), *map(step, calls)]
    STYLES[style](reactor, steps, results)
    spin(reactor, lambda: len(results) == len(steps))
    return results


class SlowDisk:
    """
    Lets an operation on files wait at a gate, before it is done or before its end is
    reported.

    :param what: a key of ``_FUNCTIONS``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.gate = Gate()
        if sys.platform == "win32":
            self._hold_windows(monkeypatch, what)
        else:
            hold(monkeypatch, os, _FUNCTIONS[what], self.gate)

    def _hold_windows(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        from twisted_rtsig.files.handles import HandleDescriptor
        from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier
        from twisted_rtsig.windows import calls

        if what == "open":
            hold(monkeypatch, calls.msvcrt, "open_osfhandle", self.gate)
            return
        # The operation is done in a thread, or by the port, which also reports the end
        # of both.
        hold(monkeypatch, HandleDescriptor, f"_{what}_some", self.gate)
        call_once_completed = CompletionPortNotifier.call_once_completed

        def hold_report(
            port: CompletionPortNotifier, address: int, function: Callable[[], None]
        ) -> None:
            self.gate.reached.set()
            call_once_completed(
                port,
                address,
                lambda: self.gate.when_open(lambda: port._call_soon(function)),
            )

        monkeypatch.setattr(CompletionPortNotifier, "call_once_completed", hold_report)


# The functions of ``os`` that wait, on POSIX.
_FUNCTIONS = {
    "open": "set_blocking",
    "read": "pread",
    "write": "pwrite",
    "send": "sendfile",
}


def open_in(folder: Path) -> list[str]:
    """The files of a folder that are open in this process."""
    if sys.platform == "win32":
        return [
            str(each) for each in folder.iterdir() if each.is_file() and _is_open(each)
        ]
    found = []
    for each in os.listdir("/proc/self/fd"):
        # The descriptor of the listed folder is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{each}"))
    return [each for each in found if each.startswith(str(folder))]


def _is_open(path: Path) -> bool:
    """Whether Windows refuses to open the file without sharing it."""
    from twisted_rtsig.windows import calls as windows

    handle = windows.open_file(
        str(path), windows.GENERIC_READ, 0, None, windows.OPEN_EXISTING, 0, None
    )
    if handle == windows.INVALID_HANDLE:
        return True
    windows.close_handle(handle)
    return False


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes."""
    if shutil.which("mount") is None:
        pytest.skip("a small disk cannot be mounted: the program mount is missing")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
