"""The examples of symmetric coroutines."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import Clock

from tests.coro.support import client_endpoint, listen, run
from tests.coro.test_examples import EXAMPLES, example
from tests.support import DEADLINE, refusing_port
from twisted_rtsig.coro import Stream, connect, spawn

symmetric = example("symmetric")
proxy = example("coupled_proxy")


def result(function: Any, *args: Any) -> Any:
    return spawn(function, *args, reactor=Clock()).result()


def test_market(capsys: pytest.CaptureFixture[str]) -> None:
    assert result(symmetric.market, ["milk", "eggs"]) == "sold out"
    assert capsys.readouterr().out == "consumed milk\nconsumed eggs\n"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((1, (2, 3)), ((1, 2), 3), True),
        ((1, (2, 3)), ((1, 3), 2), False),
        ((1, (2, 3)), (1, 2), False),
        (1, (1, 2), False),
        ((), ((), ()), True),
    ],
)
def test_same_fringe(one: Any, other: Any, same: bool) -> None:
    assert result(symmetric.same_fringe, one, other) is same
    assert result(symmetric.same_fringe, other, one) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [("2 * (3 + 4) - 5", 9), ("7", 7), ("8 - 4 - 2", 2), ("((2))*3+1", 7)],
)
def test_calculate(text: str, value: int) -> None:
    assert result(symmetric.calculate, text) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected a number, not None"),
        ("1 +", "expected a number, not None"),
        ("(1", "expected [)]"),
        ("1 1", "expected the end, not 1"),
        ("*", "expected a number, not [*]"),
    ],
)
def test_bad_expressions(text: str, error: str) -> None:
    with pytest.raises(SyntaxError, match=error):
        result(symmetric.calculate, text)


def test_the_examples_are_programs() -> None:
    command = [sys.executable, str(EXAMPLES / "symmetric.py"), "6 * 7"]
    output = subprocess.check_output(command, text=True, timeout=DEADLINE)
    assert output.splitlines()[-1] == "6 * 7 = 42"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 +", "expected a number, not None"),
        ("1 / 0", "division"),
        ("9" * 5000, "4300"),
        ("(" * 5000, "recursion"),
    ],
)
def test_errors_are_printed_in_one_line(text: str, says: str) -> None:
    command = [sys.executable, str(EXAMPLES / "symmetric.py"), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


# The proxy


async def shout(stream: Stream) -> None:
    """A server of lines."""
    async for line in stream.lines():
        if line == b"die":
            await stream.abort()
            return
        await stream.write(line.upper() + b"\n")


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (b"5:hello,2:hi,", b"5:HELLO,2:HI,"),
        (b"0:,", b"0:,"),
        (b"2:hi,3:die,", b"2:HI,"),
        (b"2:hi,x:", b"2:HI,"),
        *((b"2:hi,%b:hi," % size, b"2:HI,") for size in (b"+2", b" 2", b"02", b"-1")),
        (b"2:hi,1_0:0123456789,", b"2:HI,"),
        (b"2:hi,:,", b"2:HI,"),
        (b"2:hi,99999:", b"2:HI,"),
        (b"2:hi;", b""),
        (b"2:a\n,", b""),
        (b"9:hi", b""),
        (b"", b""),
    ],
)
def test_the_coupled_proxy(
    reactor: Any, asked: bytes, answered: bytes, logged: list[Any]
) -> None:
    async def main() -> bytes:
        server = await listen(reactor, shout)
        session = proxy.Proxy(client_endpoint(reactor, server)).session
        front = await listen(reactor, session)
        got = b""
        async with await connect(client_endpoint(reactor, front)) as client:
            await client.write(asked)
            client.write_eof()
            while data := await client.read():
                got += data
        await front.stop(1)
        await server.stop(1)
        return got

    assert run(reactor, main) == answered
    assert not [event for event in logged if "log_failure" in event]


def test_the_coupled_proxy_without_its_server(
    reactor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> bytes:
        front = await listen(reactor, proxy.Proxy(endpoint).session)
        async with await connect(client_endpoint(reactor, front)) as client:
            answer: bytes = await client.read()
        await front.stop(1)
        return answer

    with refusing_port() as port:
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
        assert run(reactor, main) == b""
    said = capsys.readouterr().err
    assert "127.0.0.1" in said
    assert "Connection was refused" in said
