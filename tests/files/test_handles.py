"""Files on Windows, by overlapped I/O and the completion port."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.coro.support import run
from tests.files.support import Gate
from tests.support import DEADLINE
from twisted_rtsig.files import open_file, remove, rename
from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier
from twisted_rtsig.windows import calls as windows

pytestmark = [
    pytest.mark.skipif(sys.platform != "win32", reason="for Windows only"),
    pytest.mark.parametrize("reactor_without_threads", ["rtsig-iocp"], indirect=True),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\n89")
    return path


def keep_threads_busy(reactor: Any) -> Gate:
    reactor.suggestThreadPoolSize(1)
    gate = Gate()
    reactor.callInThread(gate.wait)
    assert gate.reached.wait(DEADLINE)
    return gate


def test_operations_that_need_no_thread(reactor: Any, path: Path) -> None:
    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            threads = keep_threads_busy(reactor)
            reading = file.read(2)
            assert not reading.called
            assert await reading == b"on"
            assert await file.read_line() == b"e\n"
            assert [await file.read_at(each, 4) for each in (8, 10, 999)] == [
                *(b"89", b"", b""),
            ]
            await file.write(b"TWO")
            await file.write_at(8, b"xy")
            beyond = file.write_at(9, b"YZ"), file.write(b"\n" * 4), file.size()
            assert await file.read_at(0, 100) == b"one\nTWO\nxy"
            assert not any(each.called for each in beyond)
            threads.open()
            assert [await each for each in beyond] == [None, None, 11]
            assert file.tell() == 11

    run(reactor, main)


def test_a_large_read_uses_a_thread(reactor: Any, path: Path) -> None:
    """Without one it would copy too much cached data at once."""
    data = os.urandom(1 << 20)
    path.write_bytes(data)

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            threads = keep_threads_busy(reactor)
            large = file.read_at(0, 1 << 20), file.write_at(0, bytes(1 << 19))
            assert await file.read_at(5, 1000) == data[5:1005]
            assert not any(each.called for each in large)
            threads.open()
            await large[0]
            await large[1]
            assert await file.read(1 << 20) == bytes(1 << 19) + data[1 << 19 :]

    run(reactor, main)


def test_an_open_file_is_renamed_and_removed(reactor: Any, path: Path) -> None:
    async def main() -> None:
        async with await open_file(path) as file:
            await rename(path, other := path.with_name("other"))
            assert await file.read(3) == b"one"
            await remove(other)
            assert await file.read(5) == b"\ntwo\n"
        assert os.listdir(path.parent) == []

    run(reactor, main)


def test_a_file_that_another_handle_does_not_share(reactor: Any, path: Path) -> None:
    async def main() -> None:
        only_mine = windows.open_file(
            str(path), windows.GENERIC_READ, 0, None, windows.OPEN_EXISTING, 0, None
        )
        with pytest.raises(PermissionError) as caught:
            await open_file(path)
        assert caught.value.filename == str(path)
        windows.close_handle(only_mine)
        async with await open_file(path):
            pass

    run(reactor, main)


class Overlapped:
    """Wraps an overlapped operation, so that a subclass can override its attributes."""

    made = windows.overlapped and windows.overlapped.Overlapped

    def __init__(self, *event: int) -> None:
        self._operation = self.made(*event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operation, name)


def test_a_packet_of_another_operation_is_ignored(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Late(Overlapped):
        @property
        def pending(self) -> bool:
            asked.append(self)
            if len(asked) == 1:
                windows.post_completion(reactor._port._port, 0, 0, self.address)
                return True
            return bool(self._operation.pending)

    async def main() -> None:
        async with await open_file(path) as file:
            monkeypatch.setattr(windows.overlapped, "Overlapped", Late)
            assert await file.read(3) == b"one"

    run(reactor, main)
    assert len(asked) == 2


def test_a_thread_repeats_an_operation_that_has_failed(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []

    class Failing(Overlapped):
        def getresult(self, wait: bool = False) -> Any:
            if not wait:
                failed.append(self)
                raise OSError("it has failed")
            return self._operation.getresult(wait)

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            monkeypatch.setattr(windows.overlapped, "Overlapped", Failing)
            await file.write(b"ONE")
            assert await file.read_line() == b"\n"
            assert await file.read_at(0, 3) == b"ONE"
            assert len(failed) == 3

    run(reactor, main)


def test_operations_work_when_the_port_takes_no_more(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(port: CompletionPortNotifier, handle: int) -> None:
        raise OSError("no more handles")

    monkeypatch.setattr(CompletionPortNotifier, "adopt", refuse)

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            await file.write(b"ONE")
            assert await file.read(5) == b"\ntwo\n"

    run(reactor, main)
