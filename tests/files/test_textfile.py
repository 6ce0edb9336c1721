"""Text files, compared with those of Python."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.coro.support import STYLES, run
from tests.files.support import Gate, hold, open_in, results_in
from tests.files.support import busy_threads as busy_threads
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig.coro import DelimiterNotFound
from twisted_rtsig.files import open_file

NEWLINES = [None, "", "\n", "\r", "\r\n"]


@pytest.mark.parametrize("style", STYLES)
def test_the_same_in_every_style(reactor: Any, style: str, path: Path) -> None:
    got = results_in(
        style,
        reactor,
        lambda: open_file(path, "w+", encoding="utf-8", newline="\n"),
        [
            lambda file: file.write("öne\ntwo\nthree"),
            lambda file: file.seek(0),
            lambda file: file.read_line(),
            lambda file: file.read(1),
            lambda file: file.tell(),
            lambda file: file.read(100),
            lambda file: file.read(1),
            lambda file: file.seek(0, os.SEEK_END),
            lambda file: file.seek(5),
            lambda file: file.truncate(),
            lambda file: file.seek(-1),
            lambda file: file.write(b"bytes"),
            lambda file: file.sync(),
            lambda file: file.close(),
            lambda file: file.close(),
        ],
    )
    assert got == [
        *(None, None, 0, "öne\n", "t", 6, "wo\nthree", "", 14, 5, 5),
        *(ValueError, TypeError, None, None, None),
    ]
    assert path.read_bytes() == "öne\n".encode()


def python_lines(path: Path, **options: Any) -> list[str]:
    with open(path, **options) as file:
        return list(file)


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_lines_are_those_of_python(
    reactor: Any, path: Path, newline: str | None, encoding: str
) -> None:
    # Some ends of lines are at the end of the data that was read ahead.
    for length in (0, 1, 65534, 65535, 65536, 65537):
        for end in ("\r\n", "\r", "\n", "ä"):
            text = "é" * length + end + "\nlast" + end
            path.write_bytes(text.encode(encoding))
            options: dict[str, Any] = {"encoding": encoding, "newline": newline}

            async def main() -> None:
                async with await open_file(path, "r", **options) as file:
                    assert [each async for each in file.lines(1 << 20)] == python_lines(
                        path, **options
                    )

            run(reactor, main)


def test_written_text_is_the_same_as_pythons(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        for newline in NEWLINES:
            for mode in ("w", "x", "a", "w+", "a+", "wt", "r+"):
                found, expected = tmp_path / "found", tmp_path / "expected"
                for path in (found, expected):
                    path.write_bytes(b"12345678")
                    if "x" in mode:
                        path.unlink()
                options: dict[str, Any] = {"encoding": "utf-16", "newline": newline}
                with open(expected, mode, **options) as plain:
                    plain.write("one\r\ntwo\n")
                    plain.write("three\r")
                async with await open_file(found, mode, **options) as file:
                    await file.write("one\r\ntwo\n")
                    await file.write("three\r")
                assert found.read_bytes() == expected.read_bytes()

    run(reactor, main)


STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 12)),
    st.tuples(st.just("read"), st.integers(65530, 65540)),
    st.tuples(st.just("read_line"), st.just(1 << 20)),
    st.tuples(st.just("write"), st.text("aä\n\r", max_size=5)),
    st.tuples(st.just("tell"), st.none()),
    st.tuples(st.just("rewind"), st.integers(0, 5)),
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("truncate"), st.none()),
)


def exact_position(plain: io.TextIOWrapper, path: Path, newline: str | None) -> int:
    """
    The position in bytes.  (Python's is another one while its decoder holds a carriage
    return, and Python's file then writes behind that.)
    """
    position = plain.tell()
    if position < 1 << 64:
        return position
    rest = len(plain.read())
    data = path.read_bytes()
    if newline is not None:
        return len(data) - rest
    characters = re.findall(rb"\r\n|.", data, re.DOTALL)
    return sum(map(len, characters[: len(characters) - rest]))


@pytest.mark.parametrize(
    ("data", "size", "options"),
    [
        (b"\r\xff-rest", 2, {"encoding": "utf-8", "errors": "backslashreplace"}),
        (b"\r\xe2(x", 2, {"encoding": "utf-8", "errors": "replace"}),
        (b"a\r\xff", 1, {"encoding": "utf-8", "errors": "ignore"}),
        pytest.param(
            *(b"\r+AOkA6Q-", 2, {"encoding": "utf-7"}),
            marks=pytest.mark.skipif(ON_PYPY, reason="PyPy loses such positions"),
        ),
        (b"a\r", 1, {"encoding": "utf-8"}),
        (b"a\r", 2, {"encoding": "utf-8"}),
        ("\r漢\r".encode("iso2022_jp"), 2, {"encoding": "iso2022_jp"}),
    ],
)
@pytest.mark.parametrize("newline", [None, ""])
def test_a_position_after_a_return_that_the_decoder_holds(
    reactor: Any,
    path: Path,
    newline: str | None,
    data: bytes,
    size: int,
    options: dict[str, Any],
) -> None:
    """To ask for the position, and to return to it, changes nothing."""
    path.write_bytes(data)
    options = {"newline": newline, **options}
    with open(path, "r+", **options) as plain:
        text = plain.read()

    async def main() -> None:
        async with await open_file(path, "r+", **options) as file:
            first = await file.read(size)
            position = await file.tell()
            assert first + await file.read(100) == text
            await file.seek(position)
            assert first + await file.read(100) == text

    run(reactor, main)


def test_text_after_a_held_return_is_written_where_python_writes_it(
    reactor: Any, path: Path
) -> None:
    """It is not clear where the return is: Python's position is taken."""
    data = b"a\r\xff\xff"
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "ignore", "newline": ""}
    path.write_bytes(data)
    with open(path, "r+", **options) as plain:
        plain.read(1)
        plain.seek(plain.tell())
        plain.write("x")
    expected = path.read_bytes()
    path.write_bytes(data)

    async def main() -> None:
        async with await open_file(path, "r+", **options) as file:
            await file.read(1)
            await file.write("x")

    run(reactor, main)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize("newline", [None, ""])
def test_text_is_written_directly_behind_what_was_read(
    reactor: Any, path: Path, newline: str | None, encoding: str
) -> None:
    cases = [("\r", "\r"), ("a\r", "b"), ("\r\n", "\r"), ("a" * 8191 + "\r\n", "\r")]
    for read, rest in cases:
        for told in (False, True):
            text = read + rest

            async def main() -> None:
                options: dict[str, Any] = {"encoding": encoding, "newline": newline}
                path.write_bytes(text.encode(encoding))
                async with await open_file(path, "r+", **options) as file:
                    await file.read_line(1 << 20)
                    if told:
                        await file.seek(await file.tell())
                    await file.write("x")
                    await file.truncate()
                assert path.read_bytes() == (read + "x").encode(encoding)

            run(reactor, main)


@given(
    steps=st.lists(STEPS, max_size=12),
    newline=st.sampled_from(NEWLINES),
    content=st.text("aä\n\r", max_size=40),
    times=st.sampled_from([1, 20_000]),
)
@example(
    steps=[("read", 65534), ("truncate", None)],
    newline=None,
    content="aaa\ra\r\naaa",
    times=20_000,
)
@example(
    steps=[("read_line", 1 << 20), ("truncate", None)],
    newline=None,
    content="\r\r",
    times=1,
)
@example(
    steps=[("read", 65534), ("write", "a")],
    newline=None,
    content="aaa\ra\r\naaa",
    times=20_000,
)
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_operations_behave_like_those_of_a_file_of_python(
    reactor: Any,
    tmp_path: Path,
    steps: list[tuple[str, Any]],
    newline: str | None,
    content: str,
    times: int,
) -> None:
    found, expected = tmp_path / "found", tmp_path / "expected"
    for each in (found, expected):
        each.write_bytes(content[:10].encode("latin-1") * times)

    async def main() -> None:
        options: dict[str, Any] = {"encoding": "latin-1", "newline": newline}
        with open(expected, "r+", **options) as plain:
            async with await open_file(found, "r+", **options) as file:
                # The result of tell() is opaque: each file gets only its own.
                positions = [(0, 0)]
                for what, value in steps:
                    # Python's own file writes at a wrong place after a read.
                    plain.seek(plain.tell())
                    if what in ("write", "truncate"):
                        plain.seek(exact_position(plain, expected, newline))
                    if what == "read":
                        assert await file.read(value) == plain.read(value)
                    elif what == "read_line":
                        assert await file.read_line(value) == plain.readline()
                    elif what == "write":
                        await file.write(value)
                        plain.write(value)
                        plain.flush()
                    elif what == "tell":
                        positions.append((await file.tell(), plain.tell()))
                    elif what == "rewind":
                        position, in_plain = positions[value % len(positions)]
                        assert await file.seek(position) == position
                        plain.seek(in_plain)
                    elif what == "end":
                        assert await file.seek(0, 2) == plain.seek(0, 2)
                    else:
                        assert await file.truncate() == plain.truncate()
                        positions = [(0, 0)]
        assert found.read_bytes() == expected.read_bytes()

    run(reactor, main)


def test_operations_that_are_not_awaited_are_done_in_order(
    reactor: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        file = await open_file(tmp_path / "file", "w+", encoding="utf-8", newline="\n")
        file.write("one\n")
        file.write("two\nthree")
        file.seek(0)
        first, second = file.read_line(), file.read(5)
        position = file.tell()
        file.write("!")
        file.seek(0)
        rest = file.read(100)
        closing = file.close()
        assert (await first, await second, await position) == ("one\n", "two\nt", 9)
        assert await rest == "one\ntwo\nt!ree"
        await closing
        assert (file.closed, file.fileno()) == (True, -1)

    run(reactor, main)


def test_a_long_file_is_not_kept_in_memory(reactor: Any, path: Path) -> None:
    """Lines across the end of the data that was read ahead do not make it grow."""
    path.write_bytes(b"123456\n" * 100_000)

    async def main() -> None:
        async with await open_file(path, "r", encoding="ascii") as file:
            async for _ in file:
                assert len(file._ahead) < 70_000
                assert len(file._pieces) <= 2
            assert await file.tell() == 700_000

    run(reactor, main)


def test_a_line_that_is_too_long_is_not_consumed(reactor: Any, path: Path) -> None:
    async def main() -> None:
        for end in ("\n", "\r\n", "\r", ""):
            path.write_bytes(("12345" + end).encode())
            for newline in (None, "", end or "\n"):
                async with await open_file(
                    path, "r", encoding="ascii", newline=newline
                ) as file:
                    with pytest.raises(DelimiterNotFound):
                        await file.read_line(4)
                    # The line stays, and can be read in another way.
                    assert await file.read(2) == "12"
                    line = await file.read_line(3)
                    assert line.rstrip("\r\n") == "345"
                    assert await file.read_line(0) == ""
        path.write_bytes(b"\n" + b"x" * 200_000)
        async with await open_file(path, "r", encoding="ascii") as file:
            assert await file.read_line() == "\n"
            with pytest.raises(DelimiterNotFound):
                await file.read_line()
            assert len(await file.read_line(200_000)) == 200_000

    run(reactor, main)


def test_the_encoding_and_errors_of_a_file(reactor: Any, path: Path) -> None:
    path.write_bytes(b"one\nt\xe4o\n")

    async def main() -> None:
        async with await open_file(path, "r", encoding="utf-8") as file:
            for _ in range(2):
                with pytest.raises(UnicodeDecodeError):
                    await file.read_line()
            assert await file.tell() == 0
            assert (file.encoding, file.errors) == ("utf-8", "strict")
        async with await open_file(
            path, "r", encoding="utf-8", errors="replace"
        ) as file:
            assert [each async for each in file] == ["one\n", "t\ufffdo\n"]
            assert file.newlines == "\n"
        async with await open_file(path, "w", encoding="ascii") as file:
            with pytest.raises(UnicodeEncodeError):
                await file.write("ä")
        with pytest.raises(LookupError):
            await open_file(path, "r", encoding="no such encoding")
        # The default is the encoding of the locale.
        with open(path) as plain:
            expected = plain.encoding
        async with await open_file(path, "r") as file:
            assert file.encoding == expected

    run(reactor, main)


def test_bad_arguments_are_refused(reactor: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for mode in ("", "t", "rwt", "rtt", "rbt", "U"):
        with pytest.raises(ValueError, match="add 'b' for bytes"):
            open_file(path, mode, reactor=reactor)
    with pytest.raises(ValueError, match="newline"):
        open_file(path, "r", newline="x", reactor=reactor)
    for options in ({"encoding": "ascii"}, {"errors": "strict"}, {"newline": ""}):
        with pytest.raises(ValueError, match="is for bytes"):
            open_file(path, "rb", reactor=reactor, **options)  # type: ignore[call-overload]

    async def main() -> None:
        async with await open_file(path, "w") as file:
            with pytest.raises(io.UnsupportedOperation, match="for reading"):
                file.read(1)
            with pytest.raises(io.UnsupportedOperation, match="for reading"):
                file.read_line()
        with pytest.raises(ValueError, match="is closed"):
            file.write("x")
        async with await open_file(path, "r") as file:
            with pytest.raises(io.UnsupportedOperation, match="for writing"):
                file.write("x")
            with pytest.raises(io.UnsupportedOperation, match="for writing"):
                file.truncate()
            for call in (lambda: file.read(-1), lambda: file.read_line(-1)):
                with pytest.raises(ValueError, match="the least"):
                    call()
            with pytest.raises(TypeError):
                file.read("1")  # type: ignore[arg-type]
            with pytest.raises(io.UnsupportedOperation):
                await file.seek(1, os.SEEK_CUR)
            assert await file.read(1) == ""
        with pytest.raises(FileNotFoundError):
            await open_file(tmp_path / "nothing", "r")
        with pytest.raises(OSError, match=r"directory|denied"):
            await open_file(tmp_path, "r")

    run(reactor, main)


def test_a_fifo_cannot_be_opened(reactor: Any, fifo: Path) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="Not a regular file"):
            await open_file(fifo, "r")
        assert open_in(fifo.parent) == []

    run(reactor, main)


def test_a_cancelled_read_loses_no_text(
    reactor: Any, path: Path, busy_threads: Gate
) -> None:
    path.write_text("one\ntwo\n", encoding="ascii")

    async def main() -> None:
        opening = open_file(path, "r", encoding="ascii")
        busy_threads.open()
        file = await opening
        reading = file.read_line()
        reading.cancel()
        following = file.read_line()
        third = file.read(1)
        third.cancel()
        assert await following == "one\n"
        assert await file.read_line() == "two\n"
        await file.close()

    run(reactor, main)


def test_a_read_that_is_cancelled_in_its_thread_loses_no_text(
    reactor: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twisted_rtsig.files import textfile

    path.write_bytes(b"one\ntwo\n")
    gate = hold(monkeypatch, textfile, "_read_more")

    async def main() -> None:
        file = await open_file(path, "r", encoding="ascii")
        reading = file.read_line()
        assert gate.reached.wait(DEADLINE)
        reading.cancel()
        closing = file.read_line()
        gate.open()
        assert await closing == "one\n"
        assert await file.tell() == 4
        await file.close()

    run(reactor, main)
