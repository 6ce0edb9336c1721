"""Functions that take the name of a file, on each reactor."""

from __future__ import annotations

import os
import stat as modes
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.coro.support import STYLES, run, spin
from tests.files.support import small_disk
from twisted_rtsig.files import listdir, remove, rename, stat, write_file


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, style: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    two.write_bytes(b"replaced")
    got: list[Any] = []
    STYLES[style](
        reactor,
        [
            lambda: write_file(one, b"content"),
            lambda: stat(one).addCallback(lambda found: found.st_size),
            lambda: listdir(tmp_path),
            lambda: rename(one, two),
            lambda: listdir(os.fsencode(tmp_path)),
            lambda: stat(one),
            lambda: remove(two),
            lambda: remove(two),
            lambda: listdir(tmp_path / "nothing"),
            lambda: rename(one, two),
        ],
        got,
    )
    spin(reactor, lambda: len(got) == 10)
    missing = FileNotFoundError
    assert got == [
        *(None, 7, ["one", "two"], None, [b"two"], missing, None),
        *(missing, missing, missing),
    ]


@pytest.mark.skipif(
    sys.platform == "win32", reason="on Windows few users may make links"
)
def test_functions_of_links(reactor: Any, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to("target")

    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await stat(link)
        found = await stat(link, follow_symlinks=False)
        assert modes.S_ISLNK(found.st_mode)
        await write_file(link, memoryview(b"content"))
        assert (link.is_symlink(), target.read_bytes()) == (True, b"content")

    run(reactor, main)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_written_file_keeps_its_permissions(reactor: Any, path: Path) -> None:
    async def main() -> None:
        await write_file(path, b"1", permissions=0o640)
        assert modes.S_IMODE(path.stat().st_mode) == 0o640
        await write_file(path, b"2", permissions=0o666)
        assert modes.S_IMODE(path.stat().st_mode) == 0o640
        # With other content, and perhaps another owner, it must not be set-user-id.
        path.chmod(0o6775)
        await write_file(path, b"3")
        assert modes.S_IMODE(path.stat().st_mode) == 0o775

    run(reactor, main)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_file_that_is_being_written_is_not_readable_by_others(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.touch(0o600)
    chmod = os.chmod
    found = []

    def look(name: Any, mode: int) -> None:
        found.append(modes.S_IMODE(os.stat(name).st_mode))
        chmod(name, mode)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", look)
            await write_file(path, b"secret")

    run(reactor, main)
    assert found == [0o600]


def test_a_fifo_is_not_replaced(reactor: Any, fifo: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="Not a regular file"):
            await write_file(fifo, b"x")
        assert modes.S_ISFIFO(fifo.stat().st_mode)
        assert await listdir(fifo.parent) == ["fifo"]

    run(reactor, main)


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows does not replace an open file"
)
def test_an_open_file_keeps_its_content_when_it_is_replaced(
    reactor: Any, tmp_path: Path
) -> None:
    path = tmp_path / ("n" * 255)

    async def main() -> None:
        await write_file(path, b"before")
        with path.open("rb") as file:
            await write_file(path, b"after")
            assert file.read() == b"before"
        assert path.read_bytes() == b"after"

    run(reactor, main)


def test_a_failed_write_leaves_no_temporary_file(reactor: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 16) as folder:
        path = folder / "file"

        async def main() -> None:
            await write_file(path, b"before")
            with pytest.raises(OSError, match="No space"):
                await write_file(path, bytes(100_000))
            assert await listdir(folder) == ["file"]
            assert path.read_bytes() == b"before"

        run(reactor, main)


def test_a_path_that_cannot_be_written(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await write_file(tmp_path / "nothing" / "file", b"")
        with pytest.raises(IsADirectoryError):
            await write_file(tmp_path, b"")
        with pytest.raises(TypeError):
            write_file(tmp_path / "file", "text")  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []

    run(reactor, main)
