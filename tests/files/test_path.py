"""``Path``, compared with ``pathlib.Path`` case by case."""

from __future__ import annotations

import copy
import errno
import os
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from tests.coro.support import STYLES, run, spin
from twisted_rtsig.files import AsyncFile, AsyncTextFile, Path, listdir, open_file

posix_only = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows does not have it, or not for every user"
)


def make_tree(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for name in ("a/b/file.txt", "a/other.txt", "c.py", "a/b/d/deep.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"in {name}\n".encode("ascii"))
    if sys.platform != "win32":
        (folder / "link").symlink_to("a/b")
        (folder / "dangling").symlink_to("nowhere")
        (folder / "loop").symlink_to("loop")
        os.mkfifo(folder / "fifo")
    return folder


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with files, and on POSIX with links and a FIFO."""
    return make_tree(tmp_path / "tree")


# Calls with a path of pathlib or of this package.
CALLS: dict[str, Callable[[Any], Any]] = {
    "exists": lambda path: path.exists(),
    "is_dir": lambda path: path.is_dir(),
    "is_file": lambda path: path.is_file(),
    "is_fifo": lambda path: path.is_fifo(),
    "is_socket": lambda path: path.is_socket(),
    "is_symlink": lambda path: path.is_symlink(),
    "is_mount": lambda path: path.is_mount(),
    "is_block_device": lambda path: path.is_block_device(),
    "is_char_device": lambda path: path.is_char_device(),
    "stat": lambda path: path.stat(),
    "stat a link": lambda path: path.stat(follow_symlinks=False),
    "lstat": lambda path: path.lstat(),
    "absolute": lambda path: path.absolute(),
    "resolve": lambda path: path.resolve(),
    "resolve strictly": lambda path: path.resolve(True),
    "expanduser": lambda path: path.expanduser(),
    "read_bytes": lambda path: path.read_bytes(),
    "read_text": lambda path: path.read_text("ascii"),
    "samefile": lambda path: path.samefile(path),
    "samefile as another": lambda path: path.samefile(os.getcwd()),
    "write_bytes": lambda path: path.write_bytes(b"one\r\n"),
    "write a memoryview": lambda path: path.write_bytes(memoryview(b"one")),
    "write_text": lambda path: path.write_text("zwei\n", "utf-16", newline="\r\n"),
    "write no text": lambda path: path.write_text(b"x"),
    "touch": lambda path: path.touch(),
    "touch what is new": lambda path: path.touch(exist_ok=False),
    "mkdir": lambda path: path.mkdir(),
    "mkdir parents": lambda path: (path / "x" / "y").mkdir(parents=True),
    "mkdir if there is none": lambda path: path.mkdir(exist_ok=True),
    "rmdir": lambda path: path.rmdir(),
    "unlink": lambda path: path.unlink(),
    "unlink if there is one": lambda path: path.unlink(missing_ok=True),
    "rename": lambda path: path.rename(str(path) + "2"),
    "replace": lambda path: path.replace(type(path)(str(path) + "2")),
    "chmod": lambda path: path.chmod(0o500),
}
if sys.platform != "win32":
    CALLS |= {
        "readlink": lambda path: path.readlink(),
        "owner": lambda path: path.owner(),
        "group": lambda path: path.group(),
        "symlink_to": lambda path: path.symlink_to("a", True),
        "symlink_to a Path": lambda path: path.symlink_to(type(path)("a")),
        "hardlink_to": lambda path: path.hardlink_to("c.py"),
        "lchmod": lambda path: path.lchmod(0o500),
    }
if sys.version_info >= (3, 12):
    CALLS |= {
        "is_junction": lambda path: path.is_junction(),
        "exists without following": lambda path: path.exists(follow_symlinks=False),
    }
if sys.version_info >= (3, 14):
    CALLS |= {
        "copy": lambda path: path.copy("copied"),
        "copy onto a file": lambda path: path.copy("c.py"),
        "copy into its own": lambda path: path.copy(path / "below"),
        "copy links": lambda path: path.copy("copied", follow_symlinks=False),
        "copy_into": lambda path: path.copy_into("a"),
        "move": lambda path: path.move("moved"),
        "move onto a file": lambda path: path.move("c.py"),
        "move_into": lambda path: path.move_into("a"),
    }
NAMES = ["a", "c.py", "nothing", "a/b/file.txt", "link", "dangling", "loop", "fifo/x"]


def seen(folder: pathlib.Path) -> list[Any]:
    """The contents of a folder."""
    return sorted(
        (
            str(each.relative_to(folder)),
            each.lstat().st_mode,
            each.read_bytes() if each.is_file() else None,
        )
        for each in folder.rglob("*")
        if each.name != "loop"
    )


def comparable(result: Any) -> Any:
    if isinstance(result, os.stat_result):
        return result.st_mode, result.st_nlink
    if isinstance(result, pathlib.PurePath):
        return str(result).replace("expected", "found")
    return result


@pytest.mark.parametrize("call", CALLS)
def test_a_call_does_the_same_as_pathlib(
    reactor_without_threads: Any,
    reactor: Any,
    tmp_path: pathlib.Path,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = CALLS[call]
    for number, name in enumerate(NAMES):
        results: list[Any] = []
        (tmp_path / str(number)).mkdir()
        expected, found = (
            make_tree(tmp_path / str(number) / each) for each in ("expected", "found")
        )
        monkeypatch.chdir(expected)
        try:
            results.append(comparable(function(pathlib.Path(name))))
        except Exception as error:
            results.append((type(error), getattr(error, "errno", None)))
        monkeypatch.chdir(found)

        async def main() -> None:
            try:
                result = function(Path(name))
                assert isinstance(result, Deferred)
                result = await result
                if isinstance(result, pathlib.PurePath):
                    assert type(result) is Path
                results.append(comparable(result))
            except Exception as error:
                results.append((type(error), getattr(error, "errno", None)))

        run(reactor, main)
        assert results[1] == results[0], name
        assert seen(found) == seen(expected), name


def test_calls_without_input_or_output_are_those_of_pathlib(
    tmp_path: pathlib.Path,
) -> None:
    for text in ("a/b.txt", "/", ".", "a/../b", "C:/x", "", "//server/share/x"):
        ours, pure = Path(text), pathlib.PurePath(text)
        assert (str(ours), ours.parts, ours.name) == (str(pure), pure.parts, pure.name)
        for made in (ours / "x", "x" / ours, ours.parent, ours.joinpath("y", ours)):
            assert type(made) is Path
        assert all(type(each) is Path for each in ours.parents)
        assert ours.suffixes == pure.suffixes
        assert os.fspath(ours) == os.fspath(pure)
        assert isinstance(ours, os.PathLike | pathlib.PurePath)
    path = Path("a") / "b.txt"
    assert path.with_suffix(".py").relative_to("a") == Path("b.py")
    plain: pathlib.PurePath = pathlib.Path("a/b.txt")
    assert path == plain
    assert {path, pathlib.PurePath("a/b.txt")} == {path}
    assert pickle.loads(pickle.dumps(path)) == copy.copy(path) == path
    assert type(pickle.loads(pickle.dumps(path))) is Path
    assert Path(path) == Path("a", "b.txt")
    assert repr(path) == "Path('a/b.txt')"
    assert sorted([Path("b"), Path("a")]) == [Path("a"), Path("b")]
    if sys.platform == "win32":
        assert Path("A\\B.TXT") == path
        assert path.drive == ""
        assert Path("C:\\x").drive == "C:"
    if sys.version_info >= (3, 13):
        uri = pathlib.Path(tmp_path).as_uri()
        assert Path.from_uri(uri) == Path(tmp_path)


def test_every_name_of_pathlib_exists() -> None:
    """Except deprecated names and those that are too new."""
    left_out = {"info", "is_reserved", "link_to"}
    names = {each for each in vars(pathlib.Path) if not each.startswith("_")}
    assert names - left_out - set(vars(Path)) <= set(dir(pathlib.PurePath))
    # A call of pathlib that reads the disk would block.
    for name in ("expanduser", "resolve", "exists", "glob", "walk", "open"):
        assert name in vars(Path)


def test_a_path_is_copied(
    reactor: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Every Python has the copies that pathlib has from 3.14 on."""
    a, c = Path(folder) / "a", Path(folder) / "c.py"

    async def main() -> None:
        copied = await c.copy(folder / "copied")
        assert type(copied) is Path
        assert copied == Path(folder / "copied")
        assert await copied.read_bytes() == await c.read_bytes()
        # An existing file is replaced.
        await (a / "other.txt").copy(copied)
        assert await copied.read_bytes() == b"in a/other.txt\n"
        assert await c.copy_into(a) == a / "c.py"
        assert await a.copy_into(tmp_path) == Path(tmp_path / "a")
        assert seen(tmp_path / "a") == seen(pathlib.Path(a))
        for target in (a, a / "b" / "below", str(a)):
            with pytest.raises(OSError, match="Source and target"):
                await a.copy(target)
        with pytest.raises(FileExistsError):
            await a.copy(tmp_path / "a")
        with pytest.raises(FileNotFoundError):
            await (a / "nothing").copy(copied)
        with pytest.raises(ValueError, match="has no name"):
            await Path("/").copy_into(folder)
        assert not await (a / "b" / "below").exists()

    run(reactor, main)


@posix_only
def test_links_are_copied_and_fifos_are_refused(
    reactor: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    link = Path(folder) / "link"

    async def main() -> None:
        copied = await link.copy(tmp_path / "link", follow_symlinks=False)
        assert await copied.readlink() == Path("a/b")
        copied = await link.copy(tmp_path / "directory")
        assert await copied.is_dir()
        assert not await copied.is_symlink()
        # Opening it would wait for a writer.
        with pytest.raises(OSError, match="fifo"):
            await (Path(folder) / "fifo").copy(tmp_path / "fifo")
        (folder / "hard").hardlink_to(folder / "c.py")
        with pytest.raises(OSError, match="are the same file"):
            await Path(folder / "hard").copy(folder / "c.py")
        assert (folder / "c.py").read_bytes() == b"in c.py\n"

    run(reactor, main)


@posix_only
def test_a_copy_preserves_the_metadata(
    reactor: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for each in (folder / "a", folder / "a" / "other.txt"):
        each.chmod(0o750)
        os.utime(each, ns=(10**18, 10**18))

    async def main() -> None:
        kept = await (Path(folder) / "a").copy(
            tmp_path / "kept", preserve_metadata=True
        )
        for each in (kept, kept / "other.txt"):
            found = await each.stat()
            assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o750, 10**18)
        plain = await (Path(folder) / "a").copy(tmp_path / "plain")
        assert (await (plain / "other.txt").stat()).st_mtime_ns != 10**18

    run(reactor, main)


@pytest.mark.parametrize("across", [False, True])
def test_a_path_is_moved(
    reactor: Any,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    across: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It moves within a file system, and as if to another one, where it is copied."""
    expected = seen(folder / "a")
    if across:

        def replace(source: Any, target: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "replace", replace)

    async def main() -> None:
        moved = await (Path(folder) / "a").move(tmp_path / "moved")
        assert type(moved) is Path
        assert seen(pathlib.Path(moved)) == expected
        assert not (folder / "a").exists()
        moved = await (Path(folder) / "c.py").move_into(tmp_path)
        assert moved == Path(tmp_path / "c.py")
        assert await moved.read_bytes() == b"in c.py\n"
        # An existing file is replaced.
        await (Path(tmp_path) / "moved" / "other.txt").move(moved)
        assert await moved.read_bytes() == b"in a/other.txt\n"
        with pytest.raises(OSError, match="are the same file"):
            await moved.move(str(moved))
        if sys.platform != "win32":
            await (Path(folder) / "link").move(tmp_path / "link")
            assert os.readlink(tmp_path / "link") == "a/b"
            assert not os.path.lexists(folder / "link")
        with pytest.raises(FileNotFoundError):
            await (Path(folder) / "nothing").move(tmp_path / "x")
        with pytest.raises(ValueError, match="has no name"):
            await Path("/").move_into(folder)

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(
    reactor: Any, style: str, tmp_path: pathlib.Path
) -> None:
    path = Path(tmp_path) / "folder"
    got: list[Any] = []
    entries = path.iterdir()
    STYLES[style](
        reactor,
        [
            path.mkdir,
            lambda: (path / "file").write_text("text", "ascii"),
            lambda: (path / "file").read_text("ascii"),
            entries.next_batch,
            entries.next_batch,
            lambda: (path / "nothing").stat(),
            path.rmdir,
        ],
        got,
    )
    spin(reactor, lambda: len(got) == 7)
    assert got[:5] == [None, 4, "text", [path / "file"], []]
    assert got[5] is FileNotFoundError
    assert issubclass(got[6], OSError)


def test_a_path_is_opened(reactor: Any, tmp_path: pathlib.Path) -> None:
    path = Path(tmp_path) / "file"

    async def main() -> None:
        async with await path.open("w", encoding="ascii") as text:
            assert isinstance(text, AsyncTextFile)
            await text.write("one\n")
        async with await path.open() as text:
            assert await text.read(100) == "one\n"
        async with await path.open("rb") as data:
            assert isinstance(data, AsyncFile)
            assert (await data.read(100)).split() == [b"one"]
        async with await open_file(path) as data:
            assert data.name is path
        assert await listdir(path.parent) == ["file"]
        assert str(await Path.cwd()) == str(pathlib.Path.cwd())
        assert str(await Path.home()) == str(pathlib.Path.home())

    run(reactor, main)


@pytest.mark.parametrize("pattern", ["*", "*.txt", "**/*.txt", "a/*", "**", "n*"])
def test_glob_finds_the_same_as_pathlib(
    reactor: Any, folder: pathlib.Path, pattern: str
) -> None:
    if sys.platform != "win32":
        (folder / "loop").unlink()

    async def main() -> None:
        for name in ("glob", "rglob"):
            found = [each async for each in getattr(Path(folder), name)(pattern)]
            assert all(type(each) is Path for each in found)
            assert sorted(found) == sorted(getattr(folder, name)(pattern))
        found = [each async for each in Path(folder).iterdir()]
        assert sorted(found) == sorted(folder.iterdir())

    run(reactor, main)


def test_wrong_patterns_are_refused(reactor: Any, tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        for pattern in ("", os.path.abspath("/x")):
            with pytest.raises((ValueError, NotImplementedError)):
                _ = [each async for each in Path(tmp_path).glob(pattern)]
        with pytest.raises(FileNotFoundError):
            _ = [each async for each in (Path(tmp_path) / "nothing").iterdir()]
        if sys.version_info >= (3, 12):
            (tmp_path / "File").touch()
            options: dict[str, Any] = {"case_sensitive": False}
            found = [each async for each in Path(tmp_path).glob("f*", **options)]
            assert found == [tmp_path / "File"]

    run(reactor, main)


def reference(folder: pathlib.Path, *args: Any) -> Any:
    """``Path.walk`` of pathlib, or the same made from ``os.walk``."""
    if sys.version_info >= (3, 12):
        return folder.walk(*args)
    top_down, _, follow = args

    def moved() -> Any:
        for name, directories, files in os.walk(folder, top_down, None, follow):
            links = []
            if not follow:
                links = [e for e in directories if os.path.islink(f"{name}/{e}")]
            kept = [each for each in directories if each not in links]
            yield pathlib.Path(name), kept, files + links

    return moved()


@pytest.mark.parametrize("top_down", [True, False])
@pytest.mark.parametrize("follow", [True, False])
def test_walk_visits_the_same_as_pathlib(
    reactor: Any, folder: pathlib.Path, top_down: bool, follow: bool
) -> None:
    def in_order(found: list[Any]) -> list[Any]:
        listed = [
            (str(path), sorted(dirs), sorted(files)) for path, dirs, files in found
        ]
        return sorted(listed)

    async def main() -> None:
        found = [e async for e in Path(folder).walk(top_down, None, follow)]
        assert all(type(path) is Path for path, _, _ in found)
        expected = list(reference(folder, top_down, None, follow))
        assert in_order(found) == in_order(expected)
        # A directory comes before or after its subdirectories.
        assert (str(found[0][0]) == str(folder)) == top_down

    run(reactor, main)


def test_walk_can_be_pruned(reactor: Any, folder: pathlib.Path) -> None:
    async def main() -> None:
        visited = []
        async for path, directories, _ in Path(folder).walk():
            visited.append(str(path.relative_to(folder)))
            if "d" in directories:
                directories.remove("d")
        assert visited == [".", "a", str(Path("a/b"))]

    run(reactor, main)


def test_walk_reports_errors(reactor: Any, tmp_path: pathlib.Path) -> None:
    errors: list[OSError] = []

    async def main() -> None:
        nothing = Path(tmp_path) / "nothing"
        assert [each async for each in nothing.walk()] == []
        assert [each async for each in nothing.walk(on_error=errors.append)] == []
        assert [type(each) for each in errors] == [FileNotFoundError]

    run(reactor, main)
