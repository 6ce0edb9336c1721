"""
What a stream must do, whatever carries it: one check for each rule.

A check takes a function that makes two connected streams, of any class that is a
``ByteStream``.  If they break the rule, the check raises an ``AssertionError``, or the
error that they have raised.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final
from unittest import TestCase

from twisted.internet.error import ConnectionClosed

from twisted_rtsig.coro.errors import (
    BusyResourceError,
    DelimiterNotFound,
    IncompleteRead,
    StreamError,
)
from twisted_rtsig.coro.groups import TaskGroup
from twisted_rtsig.coro.scopes import timeout
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.stream_protocols import ByteStream

MakePair = Callable[[], Awaitable[tuple[ByteStream, ByteStream]]]
StreamCheck = Callable[[MakePair], Coroutine[Any, Any, None]]

_PATIENCE: Final = 60
"""Seconds after which a check fails, since nothing happens any more."""

_MUCH: Final = 1 << 20
_TOO_MUCH: Final = 1 << 26
"""How much is written to a side that does not read, until the check gives up."""

_PIECE: Final = bytes(range(256)) * 256

_equal = TestCase().assertEqual
_true = TestCase().assertTrue
_raises = TestCase().assertRaises

_checks: list[StreamCheck] = []


def _check(
    function: Callable[[ByteStream, ByteStream], Awaitable[None]],
) -> StreamCheck:
    """Run a check with a new pair; and again with another pair, with sides swapped."""

    @functools.wraps(function)
    async def check(make_pair: MakePair) -> None:
        for swapped in (False, True):
            with timeout(_PATIENCE):
                one, other = await make_pair()
                try:
                    await function(*((other, one) if swapped else (one, other)))
                finally:
                    await one.abort()
                    await other.abort()

    check.__name__ = function.__name__.strip("_")
    _checks.append(check)
    return check


# Data


@_check
async def _everything_arrives_in_order(one: ByteStream, other: ByteStream) -> None:
    """In both directions at once, written and read in pieces of many sizes."""
    data = _PIECE * (_MUCH // len(_PIECE))
    received = {one: bytearray(), other: bytearray()}
    wrong_sizes = []

    async def write(stream: ByteStream) -> None:
        start, size = 0, 1
        while start < len(data):
            await stream.write(data[start : start + size])
            start, size = start + size, size * 2 % 99_991
        await stream.write(b"")

    async def read(stream: ByteStream) -> None:
        size = 1
        while len(received[stream]) < len(data):
            piece = await stream.read(size)
            received[stream] += piece
            if not 0 < len(piece) <= size:
                wrong_sizes.append((size, len(piece)))
                break
            size = size * 3 % 99_989

    async with TaskGroup() as group:
        for stream in (one, other):
            group.spawn(write, stream)
            group.spawn(read, stream)
    _equal(wrong_sizes, [], "how much was asked for, and how much was read")
    for got in received.values():
        _true(got == data, "what was read is not what was written")


async def _read_a_message(stream: ByteStream) -> None:
    _equal(await stream.peek(1), b"a")
    _equal(await stream.read_line(), b"a line")
    _equal(await stream.read_line(), b"another")
    _equal(await stream.read_until(b"--"), b"- until")
    _equal(await stream.read_exactly(5), b"12345")
    _equal(await stream.read_exactly(0), b"")
    _equal(await stream.read_until_regex(rb"[0-9]+;"), b"x=42;")
    _equal(await stream.read_until_regex(re.compile(rb"E.D")), b"and the END")
    _equal(await stream.read(), b"!")


_MESSAGE: Final = b"a line\r\nanother\n- until--12345x=42;and the END!"


@_check
async def _reads_find_what_they_want(one: ByteStream, other: ByteStream) -> None:
    """If the data arrives at once, and if it arrives byte by byte."""
    await one.write(_MESSAGE)
    await _read_a_message(other)
    reading = spawn(_read_a_message, other)
    for byte in _MESSAGE:
        await sleep(0)
        await one.write(bytes([byte]))
    await reading


@_check
async def _reads_have_a_limit(one: ByteStream, other: ByteStream) -> None:
    """Data that is too long is an error, and stays in the stream."""
    await one.write(b"0123456789\n")
    with _raises(DelimiterNotFound):
        await other.read_line(9)
    with _raises(DelimiterNotFound):
        await other.read_until(b"9", 8)
    with _raises(DelimiterNotFound):
        await other.read_until_regex(rb"\n", 10)
    _equal(await other.read_line(10), b"0123456789")
    for read in (other.read, other.read_line, other.peek):
        with _raises(ValueError):
            await read(0)
    with _raises(ValueError):
        await other.read_exactly(-1)


@_check
async def _what_was_written_may_change(one: ByteStream, other: ByteStream) -> None:
    """When ``write`` has ended, the caller may change the buffer."""
    data = bytearray(b"one ")
    await one.write(data)
    data[:] = b"two "
    await one.write(memoryview(data))
    data[:] = b"----"
    _equal(await other.read_exactly(8), b"one two ")


# Waiting


@_check
async def _a_cancelled_read_takes_nothing(one: ByteStream, other: ByteStream) -> None:
    """Neither before data has arrived, nor after a part of it has."""
    for begun in (b"", b"begu"):
        await one.write(begun)
        if begun:
            _equal(await other.peek(1), b"b")
        for read in (
            functools.partial(other.read_exactly, 10),
            other.read_line,
            functools.partial(other.read_until_regex, b"X"),
        ):
            with _raises(TimeoutError), timeout(0.001):
                await read()
    await one.write(b"n\n")
    _equal(await other.read_line(), b"begun")


@_check
async def _one_reads_at_a_time(one: ByteStream, other: ByteStream) -> None:
    """The second read raises, and the first gets the data."""
    first = spawn(other.read_exactly, 5)
    await sleep(0)
    for read in (other.read, other.read_line, other.peek):
        with _raises(BusyResourceError):
            await read()
    await one.write(b"first")
    _equal(await first, b"first")


@_check
async def _writes_wait_for_the_reader(one: ByteStream, other: ByteStream) -> None:
    """If no task reads, memory does not fill; and later all data arrives."""
    written = 0

    async def write() -> None:
        nonlocal written
        while written < _TOO_MUCH:
            written += len(_PIECE)
            await one.write(_PIECE)

    writing = spawn(write)
    before = -1
    while written != before:
        before = written
        await sleep(0.05)
    _true(not writing.done, f"{written} bytes were written, and no task reads")
    writing.cancel()
    closed = spawn(one.close)
    received = 0
    while data := await other.read():
        expected = (_PIECE * 2)[received % len(_PIECE) :][: len(data)]
        _true(data == expected, f"byte {received} or one of the next is wrong")
        received += len(data)
    _equal(received, written)
    await other.close()
    await closed


# The end


@_check
async def _the_end_comes_after_the_rest(one: ByteStream, other: ByteStream) -> None:
    """Reads return what was written before a close, and then always the end."""
    await one.write(b"first\nlast")
    closed = spawn(one.close)
    lines = other.lines()
    _equal(await lines.__anext__(), b"first")
    with _raises(IncompleteRead) as caught:
        await lines.__anext__()
    _equal(caught.exception.partial, b"last")
    for _ in range(2):
        _equal(await other.read(), b"")
    for read in (other.read_line, functools.partial(other.read_exactly, 5)):
        with _raises(IncompleteRead) as caught:
            await read()
        _equal(caught.exception.partial, b"")
    _equal([line async for line in other.lines()], [])
    _true(other.ended, "the end was read, and ended is not true")
    await other.close()
    await closed


@_check
async def _half_close(one: ByteStream, other: ByteStream) -> None:
    """The other direction goes on.  Or ``write_eof`` raises that it cannot."""
    await one.write(b"the last")
    try:
        await one.write_eof()
    except StreamError:
        return
    with _raises(StreamError):
        await one.write(b"more")
    await one.write_eof()
    _equal(await other.read_exactly(8), b"the last")
    _equal(await other.read(), b"")
    for word in (b"not", b"yet"):
        await other.write(word)
        _equal(await one.read_exactly(3), word)
    await other.close()
    _equal(await one.read(), b"")


@_check
async def _close_is_final(one: ByteStream, other: ByteStream) -> None:
    """A second close changes nothing, and a write afterwards is an error."""
    async with one:
        await one.write(b"bye")
    await one.close()
    await one.abort()
    _true(one.lost, "it is closed, and lost is not true")
    with _raises((StreamError, ConnectionClosed)):
        await one.write(b"more")
    _equal(await other.read_exactly(3), b"bye")
    _equal(await other.read(), b"")


@_check
async def _an_abort_ends_everything(one: ByteStream, other: ByteStream) -> None:
    """On both sides reads that wait come to an end."""
    reading = [spawn(_read_till_the_end, stream) for stream in (one, other)]
    await sleep(0)
    await one.abort()
    _true(one.lost, "it was aborted, and lost is not true")
    for each in reading:
        await each
    with _raises((StreamError, ConnectionClosed)):
        await one.write(b"more")


async def _read_till_the_end(stream: ByteStream) -> None:
    try:
        while await stream.read():
            pass
    except ConnectionClosed:
        pass


@_check
async def _writes_after_an_abort_fail(one: ByteStream, other: ByteStream) -> None:
    """Writes fail at last if the other side was aborted, also those that wait."""
    writing = spawn(_write_for_ever, one)
    await sleep(0.05)
    await other.abort()
    with _raises(ConnectionClosed):
        await writing
    with _raises(ConnectionClosed):
        await one.write(b"more")


async def _write_for_ever(stream: ByteStream) -> None:
    while True:
        await stream.write(_PIECE)
        # If no write waits, others must have their turn all the same.
        await sleep(0)


STREAM_CHECKS: Final[tuple[StreamCheck, ...]] = tuple(_checks)
"""All checks.  Run each in a task, since they use ``timeout``."""
