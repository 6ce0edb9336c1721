"""
The completion-port reactor under Wine: ``twistd`` serves clients that run on Linux.
``./dev test-windows`` runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

WINE = Path(__file__).with_name("wine.sh")

PATIENCE = 180.0
"""Seconds in which each step must have ended."""

FILES = 1000
AT_ONCE = 50
BIG = 50 << 20
SOCKETS = 2000


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    random = Random(5)
    for each in range(FILES):
        data = random.randbytes(random.randrange(20_000))
        (folder / str(each)).write_bytes(data)
    (folder / "big").write_bytes(random.randbytes(BIG // 50) * 50)
    return folder


@pytest.fixture(scope="module")
def port(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of ``twistd --reactor=rtsig-iocp web``, which is in its log."""
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(WINE, "-c", "from twisted.scripts.twistd import run; run()"),
                "--reactor=rtsig-iocp",
                *("web", "--path", str(files)),
                *("--listen", "tcp:0:interface=127.0.0.1:backlog=2000"),
            ],
            cwd=WINE.parents[1],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            if found := re.search(r"Site starting on (\d+)\n", log.read_text()):
                break
            # The log is a file, for which one cannot wait.
            time.sleep(0.05)
        assert "CompletionPortReactor" in log.read_text()
        yield int(found[1])
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


async def fetch(port: int, path: str) -> bytes:
    """Fetch a file, and return its digest."""
    return await ask(*await asyncio.open_connection("127.0.0.1", port), path)


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str
) -> bytes:
    writer.write(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head, head
    content = hashlib.sha256()
    while data := await reader.read(1 << 18):
        content.update(data)
    writer.close()
    return content.digest()


def test_a_thousand_files_are_served(port: int, files: Path) -> None:
    wrong = []

    async def fetch_all() -> None:
        rest = iter(range(FILES))

        async def fetch_some() -> None:
            for each in rest:
                content = (files / str(each)).read_bytes()
                if await fetch(port, str(each)) != digest(content):
                    wrong.append(each)

        await asyncio.gather(*(fetch_some() for _ in range(AT_ONCE)))

    asyncio.run(asyncio.wait_for(fetch_all(), PATIENCE))
    assert not wrong


def test_a_big_file_is_sent_to_many_clients_at_once(port: int, files: Path) -> None:
    async def fetch_all() -> list[bytes]:
        return await asyncio.gather(*(fetch(port, "big") for _ in range(AT_ONCE)))

    digests = asyncio.run(asyncio.wait_for(fetch_all(), PATIENCE))
    assert digests == [digest((files / "big").read_bytes())] * AT_ONCE


def test_two_thousand_connections_at_once(port: int, files: Path) -> None:
    """select(2) allows 512.  All clients are connected before the first request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < SOCKETS + 100:
        pytest.skip(f"no more than {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, SOCKETS + 100), hard))

    async def fetch_all() -> list[bytes]:
        connected = asyncio.Event()
        count = 0

        async def fetch_once() -> bytes:
            nonlocal count
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            count += 1
            if count == SOCKETS:
                connected.set()
            await connected.wait()
            return await ask(reader, writer, "7")

        return await asyncio.gather(*(fetch_once() for _ in range(SOCKETS)))

    try:
        digests = asyncio.run(asyncio.wait_for(fetch_all(), PATIENCE))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert digests == [digest((files / "7").read_bytes())] * SOCKETS
