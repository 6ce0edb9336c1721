"""Directories that are read in threads."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.coro.support import STYLES, run, spin
from tests.files.support import Gate, hold, open_in
from tests.files.support import busy_threads as busy_threads
from tests.support import DEADLINE
from twisted_rtsig.coro import BusyResourceError, sleep
from twisted_rtsig.files import directories, scandir, walk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/b/one", "a/two", "c/three", "four"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_the_entries_of_a_directory(reactor: Any, tree: Path) -> None:
    async def main() -> None:
        paths: list[Any] = [tree, str(tree), os.fsencode(tree)]
        for path in paths:
            found = [
                (each.name, each.path, each.is_dir()) async for each in scandir(path)
            ]
            with os.scandir(path) as entries:
                expected = [(each.name, each.path, each.is_dir()) for each in entries]
            assert sorted(found) == sorted(expected)
        with pytest.raises(FileNotFoundError):
            _ = [each async for each in scandir(tree / "nothing")]
        with pytest.raises(OSError, match=r"directory|name"):
            _ = [each async for each in scandir(tree / "four")]

    run(reactor, main)


def test_the_current_directory(
    reactor: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)

    async def main() -> None:
        assert {each.name async for each in scandir()} == {"a", "c", "four"}

    run(reactor, main)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, tree: Path, style: str) -> None:
    got: list[Any] = []
    entries = scandir(tree, reactor=reactor)
    missing = scandir(tree / "nothing", reactor=reactor)
    STYLES[style](
        reactor,
        [entries.next_batch, entries.next_batch, missing.next_batch],
        got,
    )
    spin(reactor, lambda: len(got) == 3)
    assert {each.name for each in got[0]} == {"a", "c", "four"}
    assert got[1:] == [[], FileNotFoundError]


def test_a_thread_finds_some_entries_at_a_time(
    reactor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds many entries at once, but none that were not asked for."""
    for number in range(2500):
        (tmp_path / str(number)).touch()
    read = 0
    scan = directories.scan

    def counting(path: Any) -> Any:
        nonlocal read
        for each in scan(path):
            read += 1
            yield each

    monkeypatch.setattr(directories, "scan", counting)
    # This holds on a slow machine, too.
    monkeypatch.setattr(directories, "_LONGEST", DEADLINE)

    async def main() -> None:
        entries = scandir(tmp_path)
        sizes = []
        while batch := await entries.next_batch():
            sizes.append(len(batch))
            assert read == sum(sizes)
        assert sizes == [1000, 1000, 500]
        found = {each.name async for each in scandir(tmp_path)}
        assert len(found) == 2500

    run(reactor, main)


def test_a_slow_directory_is_reported_in_parts(
    reactor: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_LONGEST", -1)

    async def main() -> None:
        entries = scandir(tree)
        assert [len(await entries.next_batch()) for _ in range(5)] == [1, 1, 1, 0, 0]

    run(reactor, main)


def test_no_directory_stays_open(reactor: Any, tree: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("reads /proc")

    async def main() -> None:
        async for _ in scandir(tree):
            break
        entries = scandir(tree)
        await entries.next_batch()
        # The reactor keeps a reference to its last call until its next turn.
        await sleep(0.001)

    def gone() -> bool:
        gc.collect()
        return open_in(tree) == []

    run(reactor, main)
    spin(reactor, gone)


def test_a_cancelled_wait_loses_no_entry(
    reactor: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold(monkeypatch, directories, "scan")

    async def main() -> None:
        entries = scandir(tree)
        waiting = entries.next_batch()
        with pytest.raises(BusyResourceError):
            entries.next_batch()
        assert gate.reached.wait(DEADLINE)
        waiting.cancel()
        again = entries.next_batch()
        gate.open()
        assert {each.name for each in await again} == {"a", "c", "four"}
        assert await entries.next_batch() == []

    run(reactor, main)


def test_a_wait_that_is_cancelled_before_its_begin_loses_no_entry(
    reactor: Any, tree: Path, busy_threads: Gate
) -> None:
    async def main() -> None:
        entries = scandir(tree)
        entries.next_batch().cancel()
        busy_threads.open()
        assert {each.name async for each in entries} == {"a", "c", "four"}

    run(reactor, main)


@pytest.mark.parametrize("topdown", [True, False])
def test_walk_visits_the_same_as_python(
    reactor: Any, tree: Path, topdown: bool
) -> None:
    if sys.platform != "win32":
        (tree / "link").symlink_to("a")

    async def main() -> None:
        tops: list[Any] = [str(tree), os.fsencode(tree)]
        for top in tops:
            for follow in (True, False):
                found = [each async for each in walk(top, topdown, None, follow)]
                assert found == list(os.walk(top, topdown, None, follow))

    run(reactor, main)


def test_walk_can_be_pruned(reactor: Any, tree: Path) -> None:
    async def main() -> None:
        visited = []
        async for folder, below, _ in walk(tree):
            visited.append(os.path.relpath(folder, tree))
            below[:] = [each for each in sorted(below) if each != "b"]
        assert visited == [".", "a", "c"]

    run(reactor, main)


def test_errors_of_a_walk(reactor: Any, tree: Path) -> None:
    async def main() -> None:
        for topdown in (True, False):
            errors: list[OSError] = []
            threads: list[Any] = []

            def tell(error: OSError) -> None:
                errors.append(error)
                threads.append(threading.current_thread())

            assert [e async for e in walk(tree / "nothing", topdown)] == []
            assert [e async for e in walk(tree / "nothing", topdown, tell)] == []
            assert [type(each) for each in errors] == [FileNotFoundError]
            # The function is called in the thread of the reactor.
            assert threads == [threading.current_thread()]

            def fail(error: OSError) -> None:
                raise error

            with pytest.raises(FileNotFoundError):
                _ = [e async for e in walk(tree / "nothing", topdown, fail)]
        # A directory is removed while it is walked.
        errors = []
        async for folder, below, _ in walk(tree, onerror=errors.append):
            if folder == str(tree):
                below.sort()
                shutil.rmtree(tree / "a")
        assert [os.fsdecode(each.filename) for each in errors] == [str(tree / "a")]

    run(reactor, main)
