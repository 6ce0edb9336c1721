"""Reading from and writing to files, on each reactor and with each back-end."""

from __future__ import annotations

import errno
import gc
import io
import itertools
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from tests.coro.support import STYLES, forgets_awaits, run
from tests.files.support import (
    Gate,
    SlowDisk,
    counted_turns,
    forget_cached,
    occupy_thread,
    open_in,
    results_in,
    small_disk,
)
from tests.files.support import busy_threads as busy_threads
from tests.support import DEADLINE
from twisted_rtsig.coro import DelimiterNotFound, TaskGroup, sleep, spawn, timeout
from twisted_rtsig.files import AsyncFile, asyncfile, open_file

CHUNK = 1 << 16


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("back_end")
def test_the_same_in_every_style(reactor: Any, style: str, path: Path) -> None:
    got = results_in(
        style,
        reactor,
        lambda: open_file(path, "w+b"),
        [
            lambda file: file.write(b"one\ntwo\nthree"),
            lambda file: file.seek(4),
            lambda file: file.read_line(),
            lambda file: file.read(100),
            lambda file: file.read(1),
            lambda file: file.write_at(0, bytearray(b"ONE")),
            lambda file: file.read_at(0, 5),
            lambda file: file.seek(-5, os.SEEK_END),
            lambda file: file.read(2),
            lambda file: file.seek(-1, os.SEEK_CUR),
            lambda file: file.truncate(),
            lambda file: file.size(),
            lambda file: file.seek(-1),
            lambda file: file.sync(),
            lambda file: file.close(),
            lambda file: file.close(),
        ],
    )
    assert got == [
        *(None, None, 4, b"two\n", b"three", b"", None, b"ONE\nt"),
        *(8, b"th", 9, 9, 9, OSError, None, None, None),
    ]
    assert path.read_bytes() == b"ONE\ntwo\nt"


@pytest.mark.usefixtures("back_end")
def test_the_modes_of_a_file(reactor: Any, path: Path) -> None:
    async def write(mode: str) -> bytes:
        async with await open_file(path, mode) as file:
            await file.write(b"12")
            await file.write(b"3")
            assert file.tell() == await file.size() if "a" in mode else 3
        return path.read_bytes()

    async def main() -> None:
        assert await write("xb") == b"123"
        assert await write("ab") == b"123123"
        assert await write("r+b") == b"123123"
        assert await write("rb+") == b"123123"
        assert await write("a+b") == b"123123123"
        assert await write("w+b") == b"123"
        assert await write("wb") == b"123"
        with pytest.raises(FileExistsError):
            await open_file(path, "x+b")
        for mode in ("b", "rwb", "rbb", "rb++", "rbt"):
            with pytest.raises(ValueError, match="add 'b' for bytes"):
                open_file(path, mode)

    run(reactor, main)


def test_a_file_refuses_operations_that_it_is_not_open_for(
    reactor: Any, path: Path
) -> None:
    async def main() -> None:
        async with await open_file(path, "wb") as file:
            for reading in (
                lambda: file.read(1),
                lambda: file.read_at(0, 1),
                lambda: file.read_line(),
            ):
                with pytest.raises(io.UnsupportedOperation, match="for reading"):
                    reading()
        async with await open_file(path) as file:
            for writing in (
                lambda: file.write(b"x"),
                lambda: file.write_at(0, b"x"),
                lambda: file.truncate(0),
            ):
                with pytest.raises(io.UnsupportedOperation, match="for writing"):
                    writing()
        async with await open_file(path, "ab") as file:
            with pytest.raises(io.UnsupportedOperation, match="at its end"):
                file.write_at(0, b"x")

    run(reactor, main)


def test_bad_arguments_are_refused(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "file", "w+b") as file:
            for call in (
                lambda: file.read(-1),
                lambda: file.read_at(-1, 1),
                lambda: file.read_at(0, -1),
                lambda: file.read_line(-1),
                lambda: file.write_at(-1, b""),
                lambda: file.truncate(-1),
                lambda: file.seek(0, 7),
            ):
                with pytest.raises(ValueError, match=r"the least|whence"):
                    call()
            for data in ("text", 5):
                with pytest.raises(TypeError):
                    file.write(data)  # type: ignore[arg-type]
            assert await file.read(0) == b""
            await file.write(b"")
            assert await file.size() == 0

    run(reactor, main)


@forgets_awaits
@pytest.mark.usefixtures("back_end")
@pytest.mark.parametrize("queued", [False, True])
def test_operations_work_after_a_bad_argument(
    reactor: Any, path: Path, queued: bool
) -> None:
    path.write_bytes(b"0123")

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            wrong: list[Callable[[], Any]] = [
                lambda: file.read("1"),  # type: ignore[arg-type]
                lambda: file.read(1.5),  # type: ignore[arg-type]
                lambda: file.read_at(0.5, 1),  # type: ignore[arg-type]
                lambda: file.read_line(1.5),  # type: ignore[arg-type]
                lambda: file.seek("1"),  # type: ignore[arg-type]
                lambda: file.seek(1.5),  # type: ignore[arg-type]
                lambda: file.truncate(1.5),  # type: ignore[arg-type]
                lambda: file.write_at(1.5, b"x"),  # type: ignore[arg-type]
            ]
            for call in wrong:
                if queued:
                    file.size()
                with pytest.raises(TypeError):
                    call()
                assert await file.read(1) == b"0"
                await file.seek(0)
            for far in (
                lambda: file.seek(1 << 63),
                lambda: file.seek(1 << 70, os.SEEK_CUR),
                lambda: file.seek(1 << 70, os.SEEK_END),
                lambda: file.read_at(1 << 70, 1),
                lambda: file.write_at(1 << 70, b"x"),
                lambda: file.truncate(1 << 70),
            ):
                if queued:
                    file.size()
                operation = far()
                following = file.read(2)
                with pytest.raises((OSError, OverflowError)):
                    await operation
                assert await following == b"01"
                await file.seek(0)
            assert await file.size() == 4

    run(reactor, main)


@pytest.mark.usefixtures("back_end")
def test_a_read_asks_for_more_than_the_memory_holds(reactor: Any, path: Path) -> None:
    data = os.urandom(3_000_000)
    path.write_bytes(data)

    async def main() -> None:
        async with await open_file(path) as file:
            for size in (1 << 45, 1 << 100):
                assert await file.read_at(0, size) == data
                assert await file.read_at(1, size) == data[1:]
                assert await file.read_at(len(data), size) == b""
            assert await file.read(1 << 45) == data
            assert await file.read(1 << 45) == b""

    run(reactor, main)


def test_a_path_that_cannot_be_opened(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError) as caught:
            await open_file(tmp_path / "nothing")
        assert os.fspath(caught.value.filename) == str(tmp_path / "nothing")
        with pytest.raises(IsADirectoryError):
            await open_file(tmp_path)
        if sys.platform == "win32":
            other = Path("NUL")
        else:
            # It has no other end.  open_file does not wait for one.
            other = tmp_path / "fifo"
            os.mkfifo(other)
        with pytest.raises(OSError, match="Not a regular file"):
            await open_file(other)
        with pytest.raises(ValueError, match="null"):
            await open_file("with\0null")

    run(reactor, main)
    assert open_in(tmp_path) == []


def test_a_new_file_has_the_permissions(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "file", "wb", permissions=0o600):
            pass
        # Windows stores only whether a file is read-only.
        expected = 0o666 if sys.platform == "win32" else 0o600
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected
        async with await open_file(tmp_path / "other", "wb", permissions=0o400) as file:
            await file.write(b"by the process that has made it")
        assert not (tmp_path / "other").stat().st_mode & stat.S_IWUSR

    run(reactor, main)


def test_an_unprivileged_process_gets_permission_errors(tmp_path: Path) -> None:
    if sys.platform == "win32" or os.getuid() != 0:
        pytest.skip("only root can become another user")
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0o600)
    program = """
    import os, sys
    from twisted_rtsig.epollreactor import EdgeEPollReactor
    from tests.coro.support import run
    from twisted_rtsig.files import open_file, listdir, write_file

    reactor = EdgeEPollReactor()
    reactor.getThreadPool().start()
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    secret = sys.argv[1]

    async def main():
        for call in (
            lambda: open_file(secret),
            lambda: open_file(secret, "r+b"),
            lambda: write_file(secret + "2", b""),
            lambda: listdir("/proc/1/fd"),
        ):
            try:
                await call()
            except PermissionError as error:
                print(error.errno, error.filename is not None)

    run(reactor, main)
    reactor.getThreadPool().stop()
    """
    # The program finds the file, but may not read it.
    folder = tmp_path
    while folder != Path("/tmp") and folder != folder.parent:
        folder.chmod(0o755)
        folder = folder.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(secret)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"{errno.EACCES} True\n" * 4, done.stderr


# Positions and turns


@pytest.mark.usefixtures("back_end")
def test_operations_that_are_not_awaited_are_done_in_order(
    reactor: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "file", "w+b") as file:
            for each in range(100):
                file.write(b"%02d" % each)
            sizes = [file.size(), file.truncate(50)]
            file.seek(0)
            pieces = [file.read(20), file.read(20), file.read(20), file.read(20)]
            assert [await each for each in sizes] == [200, 50]
            data = [await each for each in pieces]
            assert [len(each) for each in data] == [20, 20, 10, 0]
            assert b"".join(data) == b"".join(b"%02d" % each for each in range(25))
            assert file.tell() == 50

    run(reactor, main)


@pytest.mark.usefixtures("back_end")
def test_reads_and_writes_at_offsets_at_the_same_time(
    reactor: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "file", "w+b") as file:

            async def write(number: int) -> None:
                piece = bytes([number]) * 1000
                await file.write_at(number * 1000, piece)
                assert await file.read_at(number * 1000, 1000) == piece

            async with TaskGroup() as group:
                for number in range(100):
                    group.spawn(write, number)
            assert file.tell() == 0
            data = await file.read(1 << 20)
            assert data == b"".join(bytes([each]) * 1000 for each in range(100))

    run(reactor, main)


@pytest.mark.usefixtures("back_end")
def test_offsets_beyond_4_gb(reactor: Any, tmp_path: Path) -> None:
    far = (1 << 32) + 12345

    async def main() -> None:
        async with await open_file(tmp_path / "file", "w+b") as file:
            await file.write_at(far, b"far away")
            assert await file.size() == far + 8
            assert await file.read_at(far + 4, 100) == b"away"
            await file.seek(far - 2)
            assert await file.read(4) == b"\0\0fa"
            await file.write(b"R")
            assert file.tell() == far + 3
            assert await file.truncate() == far + 3
            assert await file.seek(-3, os.SEEK_END) == far
            assert await file.read_line() == b"faR"

    run(reactor, main)


@pytest.mark.skipif(
    not hasattr(os, "pread"), reason="a read of a Windows file is never short"
)
def test_short_reads_and_writes_of_the_system(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals and network file systems cause them.  Later operations fail."""
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    pread, pwrite = os.pread, os.pwrite
    broken: list[int] = []

    def read_less(number: int, size: int, offset: int) -> bytes:
        if offset in broken:
            raise OSError(errno.EIO, "the disk is broken")
        return pread(number, min(size, 3), offset)

    def write_less(number: int, data: memoryview, offset: int) -> int:
        if offset in broken:
            raise OSError(errno.EIO, "the disk is broken")
        return pwrite(number, data[:3], offset)

    monkeypatch.setattr(os, "pread", read_less)
    monkeypatch.setattr(os, "pwrite", write_less)

    async def main() -> None:
        async with await open_file(path, "w+b") as file:
            await file.write(b"0123456789\n")
            await file.write_at(11, b"and more")
            await file.seek(0)
            assert await file.read_line() == b"0123456789\n"
            assert await file.read(100) == b"and more"
            await file.seek(2)
            broken.append(5)
            for reading in (file.read(8), file.read_line(), file.read_at(5, 1)):
                with pytest.raises(OSError, match="broken"):
                    await reading
            with pytest.raises(OSError, match="broken") as caught:
                await file.write_at(2, b"abcdef")
            assert caught.value.characters_written == 3  # type: ignore[attr-defined]
            broken.clear()
            assert await file.read(8) == b"abc56789"

    run(reactor, main)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 30)),
            st.tuples(st.just("write"), st.binary(max_size=20)),
            st.tuples(st.just("read_line"), st.just(1000)),
            st.tuples(st.just("seek"), st.integers(0, 60)),
            st.tuples(st.just("seek"), st.integers(0, 9), st.sampled_from([1, 2])),
            st.tuples(st.just("truncate")),
            st.tuples(st.just("truncate"), st.integers(0, 60)),
        ),
        max_size=20,
    ),
    awaited=st.integers(0, 1 << 20),
    content=st.binary(max_size=60),
)
def test_operations_behave_like_those_of_a_file_of_python(
    reactor: Any, tmp_path: Path, steps: list[Any], awaited: int, content: bytes
) -> None:
    """The program awaits some operations before it begins the next one."""
    path = tmp_path / "file"
    path.write_bytes(content)
    model_path = tmp_path / "model"
    model_path.write_bytes(content)

    async def main() -> list[Any]:
        operations = []
        async with await open_file(path, "r+b") as file:
            for number, (name, *args) in enumerate(steps):
                operation = getattr(file, name)(*args)
                if awaited >> number & 1:
                    await operation
                operations.append(operation)
            return [await each for each in operations]

    expected = []
    with model_path.open("r+b") as model:
        for name, *args in steps:
            name = {"read_line": "readline"}.get(name, name)
            result = getattr(model, name)(*args)
            expected.append(None if name == "write" else result)
    assert run(reactor, main) == expected
    assert path.read_bytes() == model_path.read_bytes()


# Lines and chunks


@pytest.mark.usefixtures("back_end")
def test_lines_are_read(reactor: Any, path: Path) -> None:
    long = b"x" * 200_000
    text = b"one\n\n" + long + b"\ntwo\r\nlast"
    expected = [b"one\n", b"\n", long + b"\n", b"two\r\n", b"last"]
    path.write_bytes(text)

    async def main() -> None:
        async with await open_file(path) as file:
            got = []
            async for line in file.lines(200_000):
                got.append(line)
                assert file.tell() == sum(map(len, got))
            assert got == expected
            await file.seek(0)
            assert [await file.read_line(200_000) for _ in range(6)] == [*expected, b""]
            await file.seek(5 + len(long) + 1)
            assert [line async for line in file] == expected[3:]
            assert [line async for line in file] == []

    run(reactor, main)


@pytest.mark.usefixtures("back_end")
@pytest.mark.parametrize("size", [10, 5000, 200_000])
def test_a_line_that_is_too_long_is_not_consumed(
    reactor: Any, path: Path, size: int
) -> None:
    path.write_bytes(b"ok\n" + b"x" * size + b"\n")

    async def main() -> None:
        async with await open_file(path) as file:
            got = []

            async def read() -> None:
                async for line in file.lines(size - 1):
                    got.append(line)

            with pytest.raises(DelimiterNotFound, match=f"within {size - 1} bytes"):
                await read()
            assert (got, file.tell()) == ([b"ok\n"], 3)
            with pytest.raises(DelimiterNotFound) as caught:
                await file.read_line(size - 1)
            assert caught.value.max_bytes == size - 1
            assert await file.read_line(size) == b"x" * size + b"\n"

    run(reactor, main)


def test_lines_are_read_while_the_file_is_written_and_sought(
    reactor: Any, path: Path
) -> None:
    path.write_bytes(b"one\ntwo\nthree\n")

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            got = []
            async for line in file:
                got.append(line)
                if line == b"one\n":
                    file.write(b"TWO\n")
                elif line == b"three\n":
                    await file.seek(4)
                elif line == b"TWO\n":
                    break
            assert got == [b"one\n", b"three\n", b"TWO\n"]
            assert await file.read(3) == b"thr"

    run(reactor, main)


def test_lines_are_changed_while_earlier_lines_are_read(
    reactor: Any, path: Path
) -> None:
    path.write_bytes(b"one\ntwo\nthree\nfour\n")

    async def change(file: AsyncFile, line: bytes) -> None:
        if line == b"one\n":
            # Afterwards the position is as before.
            await file.write(b"TWO\n")
            await file.seek(4)
        elif line == b"TWO\n":
            await file.write_at(8, b"THREE\n")
        elif line == b"THREE\n":
            await file.truncate(16)

    async def main() -> None:
        async with await open_file(path, "r+b") as file:
            got = []
            async for line in file:
                got.append(line)
                await change(file, line)
            assert got == [b"one\n", b"TWO\n", b"THREE\n", b"fo"]

    run(reactor, main)


@pytest.mark.skipif(not hasattr(os, "pread"), reason="this counts calls of pread")
def test_a_long_line_is_not_read_in_many_small_pieces(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 16 << 20
    path.write_bytes(b"x" * size + b"\n")
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    pread = os.pread
    asked = []

    def count(number: int, size: int, offset: int) -> bytes:
        asked.append(offset)
        return pread(number, size, offset)

    monkeypatch.setattr(os, "pread", count)

    async def main() -> None:
        async with await open_file(path) as file:
            assert [len(line) async for line in file.lines(size)] == [size + 1]

    run(reactor, main)
    assert len(asked) < 30


@pytest.mark.usefixtures("back_end")
def test_chunks_are_read(reactor: Any, path: Path) -> None:
    data = os.urandom(3 * CHUNK + 10)
    path.write_bytes(data)

    async def main() -> None:
        async with await open_file(path) as file:
            chunks = [chunk async for chunk in file.chunks()]
            assert [len(each) for each in chunks] == [CHUNK, CHUNK, CHUNK, 10]
            assert b"".join(chunks) == data
            await file.seek(5)
            assert [each async for each in file.chunks(1 << 24)] == [data[5:]]

    run(reactor, main)


def test_a_file_is_truncated_while_it_is_read(reactor: Any, path: Path) -> None:
    path.write_bytes(bytes(3 * CHUNK))

    async def main() -> None:
        async with await open_file(path) as file:
            got = 0
            async for chunk in file.chunks():
                if not got:
                    os.truncate(path, CHUNK + 5)
                got += len(chunk)
            assert got == file.tell() == CHUNK + 5
            with path.open("ab") as other:
                other.write(b"more")
            assert await file.read(10) == b"more"

    run(reactor, main)


# Files in the page cache


def test_cached_data_is_read_at_once(
    reactor: Any, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reads take no time here.  A slow one would give other tasks a turn.
    monkeypatch.setattr(asyncfile, "perf_counter_ns", lambda: 0)
    path = cached / "file"
    path.write_bytes(bytes(4 * CHUNK) + b"line\nrest")

    async def main() -> None:
        async with await open_file(path) as file:
            for operation, result in (
                (file.read_at(0, 4096), bytes(4096)),
                (file.read_at(5, 2 * CHUNK), bytes(2 * CHUNK)),
                (file.read_at(4 * CHUNK, 4096), b"line\nrest"),
                (file.read_at(9 * CHUNK, 4096), b""),
                (file.seek(4 * CHUNK), 4 * CHUNK),
                (file.read_line(), b"line\n"),
                (file.read(2), b"re"),
                (file.read_line(), b"st"),
            ):
                assert operation.called
                assert await operation == result

    run(reactor, main)


def test_a_file_with_a_cached_name_is_opened_and_closed_at_once(
    reactor: Any, cached: Path
) -> None:
    path = cached / "file"
    path.write_bytes(b"x")

    async def main() -> None:
        opening = open_file(path)
        if not opening.called:
            pytest.skip("this kernel cannot open a file without waiting")
        file = await opening
        number = file.fileno()
        assert not os.get_inheritable(number)
        assert os.get_blocking(number)
        assert await file.read(2) == b"x"
        assert file.close().called
        with pytest.raises(OSError):  # noqa: PT011
            os.fstat(number)
        # Files that are created or were deleted are not.
        for mode in ("r+b", "wb", "ab"):
            opening = open_file(path, mode)
            assert not opening.called
            await (await opening).close()
        file = await open_file(path)
        await file.read(2)
        path.unlink()
        closing = file.close()
        assert not closing.called
        await closing
        opening = open_file(path)
        assert not opening.called
        with pytest.raises(FileNotFoundError):
            await opening

    run(reactor, main)


@forgets_awaits
def test_data_that_is_not_cached_is_read_by_a_thread(
    reactor: Any, cached: Path
) -> None:
    path = cached / "file"
    data = os.urandom(64 * CHUNK)
    path.write_bytes(data)

    async def main() -> None:
        async with await open_file(path) as file:
            for _ in range(100):
                forget_cached(path)
                reading = file.read_at(32 * CHUNK, 4096)
                if not reading.called:
                    break
            else:
                pytest.skip("the kernel keeps the file in its cache")
            assert await reading == data[32 * CHUNK :][:4096]
            # Only the beginning of this range may be cached.
            again = file.read_at(32 * CHUNK, 4 * CHUNK)
            assert await again == data[32 * CHUNK :][: 4 * CHUNK]
            assert b"".join([each async for each in file.chunks()]) == data

    run(reactor, main)


def test_a_file_system_without_reads_that_do_not_wait(reactor: Any) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("there is no /dev/shm")
    path = folder / f"twisted-rtsig-{os.getpid()}"
    path.write_bytes(b"line\n" * 100)

    async def main() -> None:
        async with await open_file(path) as file:
            assert await file.read(7) == b"line\nli"
            assert await file.read_line() == b"ne\n"
            assert [line async for line in file] == [b"line\n"] * 98

    try:
        run(reactor, main)
    finally:
        path.unlink()


@pytest.mark.parametrize("returned", [0, 3])
def test_a_read_without_waiting_that_ends_early_is_not_the_end_of_the_file(
    reactor: Any, cached: Path, monkeypatch: pytest.MonkeyPatch, returned: int
) -> None:
    """Linux 5.9 and 5.10 return 0 where they should fail with EAGAIN."""
    path = cached / "file"
    path.write_bytes(b"0123456789")
    preadv = os.preadv

    def early(number: int, buffers: Any, offset: int, flags: int) -> int:
        return preadv(number, [buffers[0][:returned]], offset, flags)

    monkeypatch.setattr(os, "preadv", early)

    async def main() -> None:
        async with await open_file(path) as file:
            assert await file.read(8) == b"01234567"
            assert await file.read(8) == b"89"
            assert await file.read(8) == b""

    run(reactor, main)


def test_reads_of_cached_data_give_other_tasks_a_turn(
    reactor: Any, cached: Path
) -> None:
    path = cached / "file"
    path.write_bytes(b"line\n" * 10_000)

    async def main() -> None:
        async with counted_turns() as turns, await open_file(path) as file:
            for _ in range(10_000):
                await file.read_at(0, 4096)
            assert turns[0] > 50
            turns[0] = 0
            for _ in range(10_000):
                assert await file.read_line() == b"line\n"
            assert turns[0] > 50
            # Many reads at once are done in order and without recursion.
            await file.seek(0)
            reads = [file.read(5) for _ in range(5000)]
            assert [await each for each in reads] == [b"line\n"] * 5000

    run(reactor, main)


@forgets_awaits
def test_a_slow_read_of_cached_data_gives_other_tasks_a_turn_at_once(
    reactor: Any, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached / "file"
    path.write_bytes(bytes(CHUNK))
    clock = itertools.chain([0, 1000, 0, 1_000_000], itertools.repeat(0))
    monkeypatch.setattr(asyncfile, "perf_counter_ns", clock.__next__)

    async def main() -> None:
        async with await open_file(path) as file:
            assert file.read_at(0, 1).called
            assert file.read_at(0, 1).called
            reading = file.read_at(0, 1)
            assert not reading.called
            await reading
            assert file.read_at(0, 1).called

    run(reactor, main)


# Errors


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_a_full_disk(reactor: Any, tmp_path: Path, mode: str) -> None:
    with small_disk(tmp_path, 1 << 16) as folder:

        async def main() -> None:
            async with await open_file(folder / "file", mode) as file:
                await file.write(bytes(50_000))
                with pytest.raises(OSError, match="No space") as caught:
                    await file.write(b"x" * 50_000)
                assert caught.value.errno == errno.ENOSPC
                written: int = caught.value.characters_written  # type: ignore[attr-defined]
                assert 0 < written < 50_000
                assert file.tell() == await file.size() == 50_000 + written
                if mode == "wb":
                    await file.truncate(10)
                    await file.seek(10)
                    await file.write(b"goes on")

        run(reactor, main)


def test_the_failure_of_a_write_that_is_not_awaited_is_logged(
    reactor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "the disk is broken")

    async def main() -> None:
        async with await open_file(tmp_path / "file", "wb") as file:
            monkeypatch.setattr(type(file._descriptor), "_write_some", fail)
            file.write(b"x")

    run(reactor, main)
    gc.collect()
    (failure,) = [each["log_failure"] for each in logged if "log_failure" in each]
    assert failure.check(OSError)


# Cancellation


def test_a_cancelled_read_loses_no_data(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"0123456789")
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    disk = SlowDisk(monkeypatch, "read")

    async def main() -> None:
        async with await open_file(path) as file:
            with pytest.raises(TimeoutError), timeout(0.01):
                await file.read(4)
            queued = file.read(4)
            also_queued = file.read_line()
            also_queued.addErrback(lambda _: None).cancel()
            disk.gate.open()
            assert await queued == b"0123"
            assert await file.read(4) == b"4567"

    run(reactor, main)


def test_a_cancelled_read_loses_no_line(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b"x" * 40_000 + b"\n"
    path.write_bytes(line * 4)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)

    async def main() -> None:
        async with await open_file(path) as file:
            got = []

            async def read() -> None:
                async for each in file:
                    got.append(each)
                    if len(got) == 1:
                        # The next lines are not read yet.
                        disk = SlowDisk(monkeypatch, "read")
                        disks.append(disk)

            disks: list[SlowDisk] = []
            task = spawn(read)
            while not disks or not disks[0].gate.reached.is_set():
                await sleep(0.001)
            task.cancel()
            disks[0].gate.open()
            assert (got, file.tell()) == ([line], len(line))
            assert [each async for each in file] == [line] * 3

    run(reactor, main)


def test_an_operation_that_is_cancelled_before_its_begin_is_not_done(
    reactor: Any, path: Path, busy_threads: Gate
) -> None:
    path.touch()

    async def main() -> None:
        opening = open_file(path, "r+b")
        busy_threads.open()
        async with await opening as file:
            gate = occupy_thread(reactor)
            for writing in (file.write(b"abc"), file.write_at(5, b"abc")):
                writing.addErrback(lambda _: None).cancel()
            rest = file.write(b"ABC")
            gate.open()
            await rest
            assert file.tell() == 3
        assert path.read_bytes() == b"ABC"

    run(reactor, main)


def test_a_write_that_is_cancelled_after_its_begin_is_done(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with await open_file(path, "wb") as file:
            disk = SlowDisk(monkeypatch, "write")
            writing = file.write(b"first")
            assert disk.gate.reached.wait(DEADLINE)
            writing.addErrback(lambda _: None).cancel()
            second = file.write(b" second")
            assert file.tell() == 0
            disk.gate.open()
            await second
            assert file.tell() == 12

    run(reactor, main)
    assert path.read_bytes() == b"first second"


# The end


def test_close_waits_for_earlier_operations(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"0123456789")

    async def main() -> None:
        file = await open_file(path, "r+b")
        number = file.fileno()
        disk = SlowDisk(monkeypatch, "write")
        writing = file.write(b"ab")
        assert disk.gate.reached.wait(DEADLINE)
        writing.addErrback(lambda _: None).cancel()
        writes = [file.write(b"c"), file.write_at(8, b"d")]
        reading = file.read(4)
        closing = [file.close(), file.close()]
        assert file.closed
        closing[0].addErrback(lambda _: None).cancel()
        os.fstat(number)
        assert not closing[1].called
        disk.gate.open()
        await closing[1]
        assert reading.called
        assert all(each.called for each in writes)
        assert await reading == b"3456"
        with pytest.raises(OSError):  # noqa: PT011
            os.fstat(number)
        assert file.fileno() == -1
        await file.close()

    run(reactor, main)
    assert path.read_bytes()[2:] == b"c34567d9"


def test_a_second_close_waits_for_the_first_one(
    reactor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    close = os.close
    slow: list[int] = []

    def close_slowly(number: int) -> None:
        close(number)
        if number in slow:
            gate.wait()
            raise OSError(errno.EDQUOT, "what was written is lost")

    async def main() -> None:
        file = await open_file(tmp_path / "file", "wb")
        slow.append(file.fileno())
        monkeypatch.setattr(os, "close", close_slowly)
        closing = [file.close()]
        assert gate.reached.wait(DEADLINE)
        slow.clear()
        closing.append(file.close())
        assert [each.called for each in closing] == [False, False]
        gate.open()
        for each in closing:
            with pytest.raises(OSError, match="is lost"):
                await each
        await file.close()

    run(reactor, main)


def test_a_closed_file_refuses_all_operations(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        file = await open_file(tmp_path / "file", "w+b")
        await file.write(b"x")
        await file.close()
        calls: list[Callable[[], Deferred[Any]]] = [
            lambda: file.read(1),
            lambda: file.read_at(0, 1),
            lambda: file.read_line(),
            lambda: file.write(b""),
            lambda: file.write_at(0, b""),
            lambda: file.truncate(0),
            lambda: file.seek(0),
            lambda: file.size(),
            lambda: file.sync(),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="is closed"):
                call()

    run(reactor, main)


def test_a_reactor_without_threads(tmp_path: Path) -> None:
    """The tests of an application may use a clock, for example."""
    done: list[bytes] = []

    async def main() -> None:
        async with await open_file(tmp_path / "file", "w+b") as file:
            await file.write(b"written")
            done.append(await file.read_at(0, 7))

    spawn(main, reactor=Clock())
    assert done == [b"written"]


def test_reads_do_not_wait_for_turns_on_a_reactor_without_threads(cached: Path) -> None:
    path = cached / "file"
    path.write_bytes(bytes(CHUNK))
    done: list[int] = []

    async def main() -> None:
        async with await open_file(path) as file:
            for _ in range(100):
                done.append(len(await file.read_at(0, CHUNK)))

    spawn(main, reactor=Clock())
    assert done == [CHUNK] * 100


def test_a_task_says_which_file_it_waits_for(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write() -> None:
        async with await open_file(path, "wb") as file:
            await file.write(b"x")

    async def main() -> None:
        disk = SlowDisk(monkeypatch, "write")
        task = spawn(write)
        await sleep(0)
        assert task.waits_for() == f"to open {path!r}"
        while not disk.gate.reached.is_set():
            await sleep(0.001)
        assert task.waits_for() == f"to write to <AsyncFile {str(path)!r}, wb>"
        disk.gate.open()
        await task

    run(reactor, main)
