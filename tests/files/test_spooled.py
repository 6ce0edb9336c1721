"""Spooled files, which are in memory until they are too large."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.coro.support import STYLES, run, spin
from tests.files.support import hold, open_in
from tests.support import DEADLINE
from twisted_rtsig.files import AsyncFile, AsyncTextFile, SpooledTemporaryFile

LIMIT = 10


@pytest.mark.usefixtures("back_end")
def test_a_small_file_is_in_memory_and_read_at_once(
    reactor: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with SpooledTemporaryFile(LIMIT, dir=tmp_path) as file:
            assert isinstance(file, AsyncFile)
            steps: list[Any] = [
                file.write(b"one\ntwo\n"),
                file.seek(0),
                file.read_line(),
            ]
            steps += [file.write_at(8, b"ab"), file.read_at(8, 5)]
            assert all(each.called for each in steps)
            assert [await each for each in steps] == [None, 0, b"one\n", None, b"ab"]
            assert (await file.size(), file.tell()) == (LIMIT, 4)
            await file.truncate(6)
            await file.sync()
            assert await file.read(100) == b"tw"
            assert file.fileno() == -1
            assert open_in(tmp_path) == []

    run(reactor, main)


@pytest.mark.usefixtures("back_end")
@pytest.mark.parametrize("how", ["write", "write_at", "truncate", "rollover", "append"])
def test_a_large_file_is_on_the_disk(reactor: Any, tmp_path: Path, how: str) -> None:
    async def main() -> None:
        mode: Any = "a+b" if how == "append" else "w+b"
        spooled: Any = SpooledTemporaryFile(LIMIT, mode, dir=tmp_path)
        async with spooled as file:
            await file.write(b"0123456789")
            assert file.fileno() == -1
            if how in ("write", "append"):
                await file.write(b"abc")
            elif how == "write_at":
                await file.write_at(10, b"abc")
            elif how == "truncate":
                await file.truncate(13)
            else:
                await spooled.rollover()
                await spooled.rollover()
                await file.write(b"abc")
            os.fstat(file.fileno())
            end = bytes(3) if how == "truncate" else b"abc"
            assert await file.read_at(0, 100) == b"0123456789" + end
            assert await file.size() == 13
            await file.sync()
        assert open_in(tmp_path) == []

    run(reactor, main)


def test_a_spooled_text_file(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        spooled = SpooledTemporaryFile(LIMIT, "w+", encoding="utf-16", dir=tmp_path)
        async with spooled as file:
            assert isinstance(file, AsyncTextFile)
            with tempfile.SpooledTemporaryFile(LIMIT, "w+", encoding="utf-16") as plain:
                for words in ("ö\n", "two\nthree\n", "four"):
                    await file.write(words)
                    plain.write(words)
                await file.sync()
                await file.seek(0)
                plain.seek(0)
                assert [line async for line in file] == list(plain)
            assert file.fileno() >= 0
        async with SpooledTemporaryFile(mode="w+") as file:
            await file.write("a\nb\n")
            await file.sync()
            await file.seek(0)
            assert await file.read_line() == "a\n"
            await file.truncate()
            assert await file.read(10) == ""
            assert file.fileno() == -1

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, tmp_path: Path, style: str) -> None:
    spooled = SpooledTemporaryFile(LIMIT, dir=tmp_path, reactor=reactor)
    got: list[Any] = []
    STYLES[style](
        reactor,
        [
            spooled.open,
            lambda: got[0].write(b"0123456789abc"),
            lambda: got[0].read_at(8, 10),
            spooled.rollover,
            spooled.close,
            spooled.rollover,
        ],
        got,
    )
    spin(reactor, lambda: len(got) == 6)
    assert got[1:] == [None, b"89abc", None, None, ValueError]
    assert open_in(tmp_path) == []


def test_a_write_fails_if_no_file_can_be_made(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        spooled: SpooledTemporaryFile[AsyncFile] = SpooledTemporaryFile(
            LIMIT, dir=tmp_path / "nothing"
        )
        with pytest.raises(RuntimeError, match="await open"):
            spooled.rollover()
        async with spooled as file:
            await file.write(b"0123456789")
            with pytest.raises(FileNotFoundError):
                await file.write(b"abc")
            with pytest.raises(FileNotFoundError):
                await spooled.rollover()
            # No data is lost.
            assert await file.read_at(0, 100) == b"0123456789"
        with pytest.raises(ValueError, match="0 is the least"):
            SpooledTemporaryFile(-1)

    run(reactor, main)


def test_a_write_while_the_content_moves_to_a_file_is_not_lost(
    reactor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold(monkeypatch, tempfile, "TemporaryFile")

    async def main() -> None:
        spooled = SpooledTemporaryFile(LIMIT, dir=tmp_path)
        async with spooled as file:
            await file.write(b"01234567")
            rolling = spooled.rollover()
            assert gate.reached.wait(DEADLINE)
            writing = file.write_at(2, b"ab")
            assert not writing.called
            # The first bytes can be read while the content moves.
            assert await file.read_at(0, 2) == b"01"
            closing = file.close()
            gate.open()
            await rolling
            await writing
            await closing
        assert open_in(tmp_path) == []

    run(reactor, main)
