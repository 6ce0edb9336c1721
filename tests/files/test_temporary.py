"""Temporary files and directories, compared with ``tempfile``."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError

from tests.coro.support import STYLES, run, spin
from tests.files.support import Gate, occupy_thread, open_in
from tests.files.support import busy_threads as busy_threads
from tests.support import DEADLINE
from twisted_rtsig.coro import sleep, spawn
from twisted_rtsig.files import (
    AsyncFile,
    AsyncTextFile,
    NamedTemporaryFile,
    TemporaryDirectory,
    TemporaryFile,
    gettempdir,
    gettempdirb,
    mkdtemp,
    mkstemp,
)


class Left(Exception):
    """The exception that ends a block."""


def contents(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_temporary_file_has_no_name(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with TemporaryFile(dir=tmp_path) as file:
            assert isinstance(file, AsyncFile)
            await file.write(b"one\ntwo\n")
            await file.write_at(0, b"O")
            await file.seek(0)
            assert [line async for line in file] == [b"One\n", b"two\n"]
            if sys.platform != "win32":
                assert contents(tmp_path) == []
        async with TemporaryFile("w+", encoding="utf-16", dir=tmp_path) as text:
            assert isinstance(text, AsyncTextFile)
            await text.write("öne\n")
            await text.seek(0)
            assert await text.read(10) == "öne\n"
        assert contents(tmp_path) == []
        assert open_in(tmp_path) == []

    run(reactor, main)


def test_a_named_temporary_file_is_removed(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"suffix": ".x", "prefix": "y", "dir": tmp_path}
        async with NamedTemporaryFile(**options) as file:
            path = Path(str(file.name))
            assert (path.parent, path.suffix, path.name[0]) == (tmp_path, ".x", "y")
            await file.write(b"one")
            # Other code can open it.
            assert path.read_bytes() == b"one"
            if sys.platform != "win32":
                with tempfile.NamedTemporaryFile() as plain:
                    expected = os.stat(plain.name).st_mode
                assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(expected)
        assert contents(tmp_path) == []
        async with NamedTemporaryFile("w", encoding="ascii", dir=tmp_path) as text:
            await text.write("one\n")
            path = Path(str(text.name))
            await text.close()
            assert path.read_text() == "one\n"
        assert contents(tmp_path) == []
        async with NamedTemporaryFile(dir=tmp_path, delete=False) as file:
            await file.write(b"kept")
        assert Path(str(file.name)).read_bytes() == b"kept"
        os.remove(str(file.name))
        async with NamedTemporaryFile(dir=tmp_path) as file:
            if sys.platform != "win32":
                os.remove(str(file.name))
        assert contents(tmp_path) == open_in(tmp_path) == []

    run(reactor, main)


async def leave_by_error(temporary: Any) -> None:
    async with temporary:
        raise Left


def test_a_block_that_raises_removes_its_files(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        for temporary in (
            TemporaryFile(dir=tmp_path),
            NamedTemporaryFile(dir=tmp_path),
            NamedTemporaryFile("w", dir=tmp_path),
            TemporaryDirectory(dir=tmp_path),
        ):
            with pytest.raises(Left):
                await leave_by_error(temporary)
            assert contents(tmp_path) == open_in(tmp_path) == []

    run(reactor, main)


def test_a_block_that_is_garbage_removes_its_files(
    reactor: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async def block(temporary: Any) -> None:
            async with temporary:
                await sleep(3600)

        for temporary in (
            NamedTemporaryFile(dir=tmp_path),
            TemporaryDirectory(dir=tmp_path),
        ):
            abandoned = block(temporary)
            task = spawn(abandoned)
            while not contents(tmp_path) or "sleep" not in (task.waits_for() or ""):
                await sleep(0.001)
            abandoned.close()
            while contents(tmp_path) or open_in(tmp_path):
                await sleep(0.001)
            task.cancel()
            with pytest.raises((RuntimeError, CancelledError)):
                await task

    run(reactor, main)


def test_a_temporary_directory_is_removed(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with TemporaryDirectory(".x", "y", tmp_path) as name:
            path = Path(name)
            assert (path.parent, path.suffix, path.name[0]) == (tmp_path, ".x", "y")
            (path / "below").mkdir()
            (path / "below" / "file").touch()
            if sys.platform != "win32":
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert contents(tmp_path) == []
        with pytest.raises(FileNotFoundError):
            await TemporaryDirectory(dir=tmp_path / "nothing").create()

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, tmp_path: Path, style: str) -> None:
    got: list[Any] = []
    named = NamedTemporaryFile("w+", dir=tmp_path, reactor=reactor)
    plain = TemporaryFile(dir=tmp_path, reactor=reactor)
    folder = TemporaryDirectory(dir=tmp_path, reactor=reactor)
    STYLES[style](
        reactor,
        [
            named.open,
            plain.open,
            lambda: got[1].write(b"x"),
            named.close,
            named.close,
            plain.close,
            plain.close,
            folder.create,
            folder.cleanup,
            lambda: mkstemp(dir=tmp_path, reactor=reactor),
            lambda: mkdtemp(dir=tmp_path, reactor=reactor),
            lambda: gettempdir(reactor=reactor),
            lambda: gettempdirb(reactor=reactor),
            lambda: mkdtemp(dir=tmp_path / "nothing", reactor=reactor),
        ],
        got,
    )
    spin(reactor, lambda: len(got) == 14)
    assert got[2:7] == [None] * 5
    assert os.path.dirname(got[7]) == str(tmp_path)
    assert got[8] is None
    os.close(got[9][0])
    assert contents(tmp_path) == sorted(
        os.path.basename(each) for each in (got[9][1], got[10])
    )
    assert got[11:13] == [tempfile.gettempdir(), tempfile.gettempdirb()]
    assert got[13] is FileNotFoundError


def test_names_are_bytes_if_asked_for(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        number, name = await mkstemp(b".x", dir=os.fsencode(tmp_path))
        os.close(number)
        assert name.endswith(b".x")
        assert (await mkdtemp(prefix=b"y", dir=os.fsencode(tmp_path))).startswith(
            os.fsencode(tmp_path)
        )

    run(reactor, main)


def test_bad_arguments_are_refused(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        for kind in (TemporaryFile, NamedTemporaryFile):
            options: dict[str, Any] = {"encoding": "ascii"}
            with pytest.raises(ValueError, match="is for bytes"):
                kind("w+b", **options)
            with pytest.raises(ValueError, match="add 'b' for bytes"):
                kind("z")  # type: ignore[call-overload]
            with pytest.raises(LookupError):
                await kind("w", encoding="nonsense", dir=tmp_path).open()
            with pytest.raises(FileNotFoundError):
                await kind(dir=tmp_path / "nothing").open()
            with pytest.raises(RuntimeError, match="was not opened"):
                kind().close()
        with pytest.raises(RuntimeError, match="was not made"):
            TemporaryDirectory().cleanup()
        assert contents(tmp_path) == open_in(tmp_path) == []

    run(reactor, main)


MAKERS: dict[str, Any] = {
    "a file": lambda path: TemporaryFile(dir=path).open(),
    "a named file": lambda path: NamedTemporaryFile(dir=path).open(),
    "a text file": lambda path: NamedTemporaryFile("w", dir=path).open(),
    "a directory": lambda path: TemporaryDirectory(dir=path).create(),
    "mkstemp": lambda path: mkstemp(dir=path),
    "mkdtemp": lambda path: mkdtemp(dir=path),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_file_whose_making_is_cancelled_is_removed(
    reactor: Any, tmp_path: Path, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    made: list[str] = []
    # This function makes the names of files and of directories.
    names = tempfile._get_candidate_names  # type: ignore[attr-defined]

    def slow() -> Any:
        made.append("begun")
        gate.wait()
        return names()

    monkeypatch.setattr(tempfile, "_get_candidate_names", slow)
    if hasattr(os, "O_TMPFILE"):
        # With O_TMPFILE a file has no name, and the function would not be called.
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False, raising=False)

    async def main() -> None:
        making = MAKERS[maker](tmp_path)
        assert gate.reached.wait(DEADLINE)
        making.cancel()
        # The making begins only now, and is finished.
        gate.open()
        with pytest.raises(CancelledError):
            await making
        # The only thread does this after the file was made, and perhaps removed.
        await gettempdir()
        await gettempdir()
        while contents(tmp_path) or open_in(tmp_path):
            await sleep(0.001)

    reactor.suggestThreadPoolSize(1)
    run(reactor, main)
    assert made == ["begun"]
    assert contents(tmp_path) == []


def test_a_cancelled_removal_is_done(
    reactor: Any, tmp_path: Path, busy_threads: Gate
) -> None:
    async def main() -> None:
        named = NamedTemporaryFile(dir=tmp_path)
        folder = TemporaryDirectory(dir=tmp_path)
        opening, creating = named.open(), folder.create()
        busy_threads.open()
        await opening
        await creating
        gate = occupy_thread(reactor)
        named.close().cancel()
        folder.cleanup().cancel()
        gate.open()
        while contents(tmp_path):
            await sleep(0.001)

    run(reactor, main)
