"""Text over streams of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.task import Clock

from tests.coro.support import STYLES, run_for_real
from tests.support import ON_PYPY
from twisted_rtsig.coro import (
    BusyResourceError,
    DelimiterNotFound,
    IncompleteText,
    Stream,
    TextStream,
    open_process,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.testing import stream_pair

TEXT = "naïve\n€uro\n\N{GRINNING FACE}\n\nlast\n"
LINES = TEXT.split("\n")[:-1]


def in_memory(function: Callable[[Stream, Stream], Any]) -> None:
    clock = Clock()
    task = spawn(function, *stream_pair(reactor=clock), reactor=clock)
    while not task.done:
        calls = clock.getDelayedCalls()
        due = min(each.getTime() for each in calls)
        clock.advance(max(0.0, due - clock.seconds()))
    task.result()


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030"]
if not ON_PYPY:
    # PyPy 7.3 aborts in its io.IncrementalNewlineDecoder.
    ENCODINGS.append("utf-7")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_characters_in_pieces(encoding: str, size: int) -> None:
    async def main(one: Stream, other: Stream) -> None:
        async def write() -> None:
            data = TEXT.encode(encoding)
            for start in range(0, len(data), size):
                await one.write(data[start : start + size])
                await sleep(0)
            await one.close()

        spawn(write)
        text = TextStream(other, encoding)
        assert [line async for line in text.lines()] == LINES
        assert await text.read() == ""

    in_memory(main)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_written_once(encoding: str) -> None:
    async def main(one: Stream, other: Stream) -> None:
        async with TextStream(one, encoding) as text:
            for line in LINES:
                await text.write(f"{line}\n")
        received = b""
        while data := await other.read():
            received += data
        assert received.decode(encoding) == TEXT
        assert received.count("\ufeff".encode(encoding)) <= 1

    in_memory(main)


@pytest.mark.parametrize(
    ("newline", "lines", "written"),
    [
        (None, ["a", "b", "c", "", "d"], b"x\ny\r\n"),
        ("\n", ["a\r", "b\rc", "", "d"], b"x\ny\r\n"),
        ("\r", ["a", "\nb", "c\n\nd\n"], b"x\ry\r\r"),
        ("\r\n", ["a", "b\rc\n\nd\n"], b"x\r\ny\r\r\n"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_ends_of_lines(
    newline: str | None, lines: list[str], written: bytes, size: int
) -> None:
    async def main(one: Stream, other: Stream) -> None:
        data = b"a\r\nb\rc\n\nd\n"
        text = TextStream(other, newline=newline)
        got: list[str] = []

        async def read() -> None:
            try:
                async for line in text.lines():
                    got.append(line)
            except IncompleteText as end:
                got.append(end.text)

        reading = spawn(read)
        for start in range(0, len(data), size):
            await one.write(data[start : start + size])
            await sleep(0)
        await one.write_eof()
        await reading
        assert got == lines
        await text.write("x\ny\r\n")
        assert await one.read() == written

    in_memory(main)


def test_other_newlines() -> None:
    async def main(one: Stream, other: Stream) -> None:
        with pytest.raises(ValueError, match="newline='x'"):
            TextStream(one, newline="x")
        with pytest.raises(LookupError):
            TextStream(one, "no-such-encoding")
        with pytest.raises(LookupError):
            TextStream(one, errors="no-such-way")
        with pytest.raises(LookupError, match="not a text encoding"):
            TextStream(one, "hex")

    in_memory(main)


def test_limits_count_characters() -> None:
    async def main(one: Stream, other: Stream) -> None:
        text = TextStream(other)
        await one.write("äöü€\nxyz\n".encode())
        for read in (text.read, text.read_line):
            with pytest.raises(ValueError, match="max_chars=0"):
                read(0)
        with pytest.raises(DelimiterNotFound, match=r"within 3 characters.*max_chars"):
            await text.read_line(3)
        assert await text.read_line(4) == "äöü€"
        assert await text.read(2) == "xy"
        assert await text.read(2) == "z\n"
        # A peer that never ends a line.
        await one.write(b"a" * 100)
        with pytest.raises(DelimiterNotFound):
            await text.read_line(50)
        with pytest.raises(DelimiterNotFound):
            await text.read_line(99)
        await one.write(b"a\nb\n")
        assert await text.read_line(101) == "a" * 101
        assert await text.read() == "b\n"

    in_memory(main)


def test_undecodable_bytes() -> None:
    async def main(one: Stream, other: Stream) -> None:
        text = TextStream(other)
        # What comes before is read before.
        await one.write(b"first\nsec\xffond\n")
        assert await text.read_line() == "first"
        for _ in range(2):
            with pytest.raises(UnicodeDecodeError):
                await text.read_line()
        assert await text.read() == "sec"
        with pytest.raises(UnicodeDecodeError):
            await text.read()
        with pytest.raises(UnicodeEncodeError):
            text.write("\ud800")
        assert await one.read_exactly(0) == b""

    in_memory(main)


def test_a_missing_byte_order_mark() -> None:
    """The codec raises another error, and knows nothing of where it is."""

    async def main(one: Stream, other: Stream) -> None:
        text = TextStream(other, "utf-16")
        await one.write("line\n".encode("utf-16-le"))
        for _ in range(2):
            with pytest.raises(UnicodeDecodeError):
                await text.read_line()
            with pytest.raises(UnicodeDecodeError):
                await text.read()

    in_memory(main)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("utf-8", b"good\n\xe2\x82"),
        ("utf-8-sig", b"\xef\xbb\xbfgood\n\xe2\x82"),
        ("utf-16", "good\n".encode("utf-16") + b"\x00"),
        ("gb18030", b"good\n\x81"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_the_end_in_the_middle_of_a_character(
    encoding: str, data: bytes, size: int
) -> None:
    async def main(one: Stream, other: Stream) -> None:
        for start in range(0, len(data), size):
            await one.write(data[start : start + size])
        await one.close()
        text = TextStream(other, encoding)
        assert await text.read_line() == "good"
        with pytest.raises(UnicodeDecodeError):
            await text.read_line()

    in_memory(main)


def test_the_end_in_the_middle_of_a_line() -> None:
    async def main(one: Stream, other: Stream) -> None:
        await one.write("één\ntw€".encode())
        await one.close()
        text = TextStream(other)
        assert await text.read_line() == "één"
        with pytest.raises(IncompleteText) as caught:
            await text.read_line()
        assert caught.value.text == "tw€"
        assert caught.value.partial == "tw€".encode()
        with pytest.raises(IncompleteText) as caught:
            await text.read_line()
        assert caught.value.text == ""

    in_memory(main)


def test_a_cancelled_read_consumes_nothing() -> None:
    async def main(one: Stream, other: Stream) -> None:
        text = TextStream(other)
        await one.write("a €"[:2].encode() + b"\xe2\x82")
        for _ in range(2):
            with pytest.raises(TimeoutError), timeout(1):
                await text.read_line()
        first = text.read_line()
        await sleep(0)
        for read in (text.read, text.read_line):
            with pytest.raises(BusyResourceError):
                read()
        await one.write(b"\xac\n")
        assert await first == "a €"

    in_memory(main)


@pytest.mark.parametrize("style", STYLES)
def test_in_each_style(reactor: Any, style: str) -> None:
    got: list[Any] = []

    async def main() -> None:
        one, other = map(TextStream, stream_pair())

        def steps() -> Iterator[Callable[[], Any]]:
            yield lambda: one.write("line\nand more")
            yield other.read_line
            yield other.read
            yield lambda: other.read(1)

        done = STYLES[style](reactor, steps(), got)
        while len(got) < 3:
            await sleep(0)
        await one.write("€")
        await done

    run_for_real(reactor, main)
    assert got == [None, "line", "and more", "€"]


def test_the_text_of_a_process(reactor: Any) -> None:
    async def main() -> None:
        async with open_process(["cat"]) as process:
            text = TextStream(process.stream)
            await text.write(TEXT)
            await text.write_eof()
            assert [line async for line in text.lines()] == LINES

    run_for_real(reactor, main)
