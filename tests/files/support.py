"""What the tests of files share."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE


def forget_cached(path: Path) -> None:
    """
    Let nothing of a file be in the page cache, where one can ask for that.  The kernel
    may keep some of it all the same, and to ask whether it does is to have it read.
    """
    if sys.platform.startswith("linux"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Gate:
    """
    Where a thread waits.

    :ivar reached: set when it is there.
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
        """Call a function now, or else by ``open``."""
        if self._open.is_set():
            function()
        else:
            self._when_open.append(function)

    def wait(self) -> None:
        self.reached.set()
        assert self._open.wait(DEADLINE)


@pytest.fixture
def busy_threads(reactor: Any) -> Iterator[Gate]:
    """All threads of the reactor wait at a gate."""
    reactor.suggestThreadPoolSize(1)
    gate = Gate()
    reactor.callInThread(gate.wait)
    assert gate.reached.wait(DEADLINE)
    yield gate
    gate.open()


class SlowDisk:
    """
    Lets what is done with files wait at a gate before it is done, or before anybody
    is told that it is.

    :param what: a key of ``_FUNCTIONS``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.gate = Gate()
        if sys.platform == "win32":
            self._hold_windows(monkeypatch, what)
        else:
            monkeypatch.setattr(os, _FUNCTIONS[what], self._slow(os, _FUNCTIONS[what]))

    def _slow(self, owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def slow(*args: Any) -> Any:
            self.gate.wait()
            return function(*args)

        return slow

    def _hold_windows(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        from twisted_rtsig.files.handles import HandleDescriptor
        from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier
        from twisted_rtsig.windows import calls

        if what == "open":
            opens = calls.msvcrt
            slow = self._slow(opens, "open_osfhandle")
            monkeypatch.setattr(opens, "open_osfhandle", slow)
            return
        # In a thread; and by the port, which tells of both.
        name = f"_{what}_some"
        monkeypatch.setattr(HandleDescriptor, name, self._slow(HandleDescriptor, name))
        call_once_completed = CompletionPortNotifier.call_once_completed

        def hold(
            port: CompletionPortNotifier, address: int, function: Callable[[], None]
        ) -> None:
            self.gate.reached.set()
            call_once_completed(
                port,
                address,
                lambda: self.gate.when_open(lambda: port._call_soon(function)),
            )

        monkeypatch.setattr(CompletionPortNotifier, "call_once_completed", hold)


# What of ``os`` is slow, on POSIX.
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
        # The one of the folder itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{each}"))
    return [each for each in found if each.startswith(str(folder))]


def _is_open(path: Path) -> bool:
    """On Windows: whether it is refused to who does not share it."""
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
    """A file system with only so much room."""
    if shutil.which("mount") is None:
        pytest.skip("a small disk cannot be mounted: there is no program for it")
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
