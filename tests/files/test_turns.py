"""Files of bytes and of text: closing, and cancelled opens."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.coro.support import run, spin
from tests.files.support import Gate, SlowDisk, occupy_thread, open_in
from tests.files.support import busy_threads as busy_threads
from tests.support import DEADLINE, frees_at_once
from twisted_rtsig.coro import Event, sleep, spawn
from twisted_rtsig.files import open_file

CONTENT: dict[str, Any] = {"b": b"all of it", "": "all of it"}


@pytest.fixture(params=CONTENT, ids=["bytes", "text"])
def kind(request: Any) -> str:
    """The arguments after the mode."""
    return str(request.param)


def test_a_forgotten_file_is_closed_with_a_warning(
    reactor: Any, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "file"

    async def main() -> None:
        file: Any = await open_file(path, "w" + kind)
        file.write(CONTENT[kind])

    def gone() -> bool:
        gc.collect()
        return open_in(tmp_path) == []

    def forget() -> None:
        run(reactor, main)
        spin(reactor, gone)

    with pytest.warns(ResourceWarning, match="was not closed"):
        forget()
    assert path.read_text() == "all of it"


def test_a_cancelled_close_is_done(reactor: Any, tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        file: Any = await open_file(tmp_path / "file", "w" + kind)
        file.close().cancel()
        assert file.closed
        await file.close()
        assert open_in(tmp_path) == []

    run(reactor, main)


def test_close_waits_for_earlier_operations(
    reactor: Any, path: Path, busy_threads: Gate, kind: str
) -> None:
    async def main() -> None:
        opening = open_file(path, "w" + kind)
        busy_threads.open()
        file: Any = await opening
        gate = occupy_thread(reactor)
        writing = [file.write(CONTENT[kind]) for _ in range(3)]
        writing[1].addErrback(lambda _: None).cancel()
        closing = file.close()
        assert not closing.called
        gate.open()
        await closing
        assert all(each.called for each in writing)
        assert path.read_text() == 2 * "all of it"
        assert file.fileno() == -1

    run(reactor, main)


@frees_at_once
def test_a_block_that_is_garbage_closes_the_file(
    reactor: Any, path: Path, kind: str
) -> None:
    """It cannot wait for the end of the close."""
    opened: list[Any] = []

    async def main() -> None:
        async with await open_file(path, "w" + kind) as file:
            await file.write(CONTENT[kind])
            opened.append(file)
            await Event().wait()

    def begin() -> None:
        spawn(main, reactor=reactor)
        spin(reactor, lambda: bool(opened))
        assert not opened[0].closed

    begin()
    gc.collect()
    assert opened[0].closed
    spin(reactor, lambda: opened[0].fileno() == -1)


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows opens files in another way"
)
def test_a_cancelled_open_leaves_no_file_open(
    reactor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    disk = SlowDisk(monkeypatch, "open")

    async def main() -> None:
        opening = open_file(path, "r" + kind)
        assert disk.gate.reached.wait(DEADLINE)
        opening.addErrback(lambda _: None).cancel()
        assert open_in(tmp_path) == [str(path)]
        disk.gate.open()
        while open_in(tmp_path):
            await sleep(0.001)
        # By then the end of the earlier operations was reported to the reactor.
        file: Any = await open_file(path, "r" + kind)
        await file.close()

    run(reactor, main)
