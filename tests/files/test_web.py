"""``StaticResource`` serves files over HTTP as ``twisted.web.static.File`` does."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.endpoints import TCP4ClientEndpoint

from tests.coro.support import run
from tests.files.support import SlowDisk, open_in
from tests.support import DEADLINE
from twisted_rtsig.coro import IncompleteRead, Stream, connect, sleep
from twisted_rtsig.files.open_calls import open_descriptor

with warnings.catch_warnings():
    # Twisted warns of its own modules.
    warnings.simplefilter("ignore", DeprecationWarning)
    from twisted.web.resource import Resource
    from twisted.web.server import Site
    from twisted.web.static import Data, File

    from twisted_rtsig.files.web import StaticResource

# Twisted itself warns when it answers that a file does not exist.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZE = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "sub" / "with index").mkdir(parents=True)
    (folder / "sub" / "with index" / "index.html").write_bytes(b"<p>index</p>")
    (folder / "empty").write_bytes(b"")
    (folder / "page.html").write_bytes(b"<p>page</p>")
    (folder / "archive.tar.gz").write_bytes(b"not really")
    (folder / "näme.txt").write_bytes(b"text")
    (folder / "no type").write_bytes(b"?")
    (folder / "big.bin").write_bytes(os.urandom(SIZE))
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


class Response:
    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        self.status = int(first.split()[1])
        pairs = [line.split(b": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}
        self.body = body


class Web:
    """A web site, and a client of it."""

    def __init__(self, reactor: Any, resource: Any) -> None:
        self.reactor = reactor
        site = Site(resource, reactor=reactor)
        site.noisy = False
        self.port = reactor.listenTCP(0, site, interface="127.0.0.1")

    async def connect(self) -> Stream:
        port = self.port.getHost().port
        return await connect(TCP4ClientEndpoint(self.reactor, "127.0.0.1", port))

    async def get(self, path: str, method: str = "GET", **headers: str) -> Response:
        async with await self.connect() as stream:
            await self.ask(stream, path, method, **headers)
            chunks = []
            while chunk := await stream.read():
                chunks.append(chunk)
        head, _, body = b"".join(chunks).partition(b"\r\n\r\n")
        return Response(head, body)

    async def ask(
        self, stream: Stream, path: str, method: str = "GET", **headers: str
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: here", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {headers[name]}" for name in headers]
        await stream.write("\r\n".join([*lines, "", ""]).encode())


@pytest.fixture
def web(reactor: Any, folder: Path) -> Iterator[Web]:
    """A site that serves the folder."""
    it = Web(reactor, StaticResource(str(folder)))
    yield it

    async def stop() -> None:
        await it.port.stopListening()

    run(reactor, stop)


PATHS = [
    *("/", "/empty", "/page.html", "/archive.tar.gz", "/n%C3%A4me.txt", "/no%20type"),
    *("/big.bin", "/sub", "/sub?a=b", "/sub/", "/sub/with%20index"),
    *("/sub/with%20index/", "/sub/with%20index/index.html"),
    *("/nothing", "/nothing/", "/nothing/at/all", "/page.html/", "/page.html/below"),
    *("/../secret", "/%2e%2e/secret", "/sub/..%2f..%2fsecret", "/%ff"),
]
RANGES = [
    *("0-0", "0-9", "5-", "-5", "500000-", "10-5", "x-y", "1", "1000000-", "0-2000000"),
    *("0-4,10-14", "0-0,-1", "0-4,2000000-"),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", PATHS)
def test_a_response_is_the_same_as_from_twisted(
    reactor: Any, folder: Path, path: str, method: str
) -> None:
    same_response(reactor, folder, path, method)


@pytest.mark.parametrize("ranges", RANGES)
def test_a_range_is_the_same_as_from_twisted(
    reactor: Any, folder: Path, ranges: str
) -> None:
    same_response(reactor, folder, "/big.bin", Range=f"bytes={ranges}")


def test_HEAD_of_a_range_is_the_same_as_from_twisted(
    reactor: Any, folder: Path
) -> None:
    for ranges in ("0-4", "0-4,10-14", "2000000-"):
        same_response(reactor, folder, "/big.bin", "HEAD", Range=f"bytes={ranges}")


def same_response(
    reactor: Any, folder: Path, path: str, method: str = "GET", **headers: str
) -> None:
    responses = []

    async def main(resource: Any) -> None:
        web = Web(reactor, resource)
        responses.append(await web.get(path, method, **headers))
        await web.port.stopListening()

    for resource in (File(str(folder)), StaticResource(str(folder))):
        run(reactor, main, resource)
    expected, got = responses
    assert got.status == expected.status
    assert without_boundary(got) == without_boundary(expected)
    if got.status != 404:
        for response in responses:
            response.headers.pop(b"date")
        assert got.headers.keys() == expected.headers.keys()
        for name in expected.headers.keys() - {b"content-type"}:
            assert got.headers[name] == expected.headers[name], name


def without_boundary(response: Response) -> tuple[bytes, bytes]:
    """The type and the body.  The random boundary is replaced."""
    kind = response.headers.get(b"content-type", b"")
    boundary = re.search(rb'boundary="(.*)"', kind)
    body = b"" if response.status == 404 else response.body
    if boundary is None:
        return kind, body
    return kind.replace(boundary[1], b"-"), body.replace(boundary[1], b"-")


def test_requests_that_twisted_does_not_answer_correctly(
    reactor: Any, web: Web
) -> None:
    async def main() -> None:
        assert (await web.get("/%00")).status == 404
        response = await web.get("/page.html", Range="bytes=1000-,2000-")
        assert (response.status, response.body) == (416, b"")
        assert response.headers[b"content-range"] == b"bytes */11"
        # A header without a valid range is ignored (RFC 9110, 14.2).
        for ranges in ("bytes=", "bytes=,", "bytes=\xe9", "bytes=0-\xb2"):
            response = await web.get("/page.html", Range=ranges)
            assert (response.status, response.body) == (200, b"<p>page</p>")

    run(reactor, main)


def test_If_Range_sends_the_whole_file_if_it_has_changed(
    reactor: Any, web: Web
) -> None:
    """The client gets the range only of the file that it has (RFC 9110, 13.1.5)."""

    async def main() -> None:
        modified = (await web.get("/page.html")).headers[b"last-modified"].decode()
        for condition, status in (
            (modified, 206),
            ("Sat, 01 Jan 2000 00:00:00 GMT", 200),
            ("Fri, 01 Jan 2100 00:00:00 GMT", 200),
            ('"a tag"', 200),
        ):
            response = await web.get(
                "/page.html", Range="bytes=3-6", If_Range=condition
            )
            body = b"page" if status == 206 else b"<p>page</p>"
            assert (response.status, response.body) == (status, body), condition

    run(reactor, main)


def test_a_suffix_range_that_is_longer_than_the_file(reactor: Any, web: Web) -> None:
    """The range is the whole file (RFC 9110, 14.1.2)."""
    page = b"<p>page</p>"

    async def main() -> None:
        for size in (12, 1000, 1 << 70):
            response = await web.get("/page.html", Range=f"bytes=-{size}")
            assert (response.status, response.body) == (206, page)
            assert response.headers[b"content-range"] == b"bytes 0-10/11"
            assert response.headers[b"content-length"] == b"11"
        response = await web.get("/page.html", Range="bytes=0-2,-1000")
        assert response.status == 206
        assert int(response.headers[b"content-length"]) == len(response.body)
        assert b"bytes 0-2/11\r\n\r\n<p>\r\n" in response.body
        assert b"bytes 0-10/11\r\n\r\n" + page in response.body

    run(reactor, main)


def test_ranges_of_an_empty_file(reactor: Any, web: Web) -> None:
    """A suffix range of it is valid, and another range is not (RFC 9110, 14.1.2)."""

    async def main() -> None:
        for ranges, status in (
            *(("-5", 200), ("-5,-3", 200), ("0-,-1", 200)),
            *(("-0", 416), ("0-", 416), ("0-0,5-", 416)),
        ):
            response = await web.get("/empty", Range=f"bytes={ranges}")
            assert (response.status, response.body) == (status, b""), ranges
            expected = b"bytes */0" if status == 416 else None
            assert response.headers.get(b"content-range") == expected, ranges

    run(reactor, main)


def test_too_many_ranges_are_ignored(reactor: Any, folder: Path, web: Web) -> None:
    """They would send the file many times, so it is sent once (RFC 9110, 14.2)."""
    big = (folder / "big.bin").read_bytes()

    async def main() -> None:
        for ranges in (
            *(["0-"] * 1000, ["0-"] * 3, ["-2000000", "0-999998", "1-"]),
            [f"{each}-{each}" for each in range(0, 402, 2)],
        ):
            response = await web.get("/big.bin", Range=f"bytes={','.join(ranges)}")
            assert response.status == 200
            assert response.headers[b"content-length"] == b"%d" % SIZE
            assert response.body == big
        # These are served: few ranges, in any order, of which two overlap.
        for ranges in (
            *(["0-", "500000-"], ["900000-", "5-9", "0-3"]),
            [f"{each}-{each}" for each in range(0, 400, 2)],
        ):
            response = await web.get("/big.bin", Range=f"bytes={','.join(ranges)}")
            assert response.status == 206
            assert response.body.count(b"\r\nContent-range: ") == len(ranges)
            assert len(response.body) == int(response.headers[b"content-length"])

    run(reactor, main)


def test_malformed_ranges_are_ignored(
    reactor: Any, web: Web, logged: list[Any]
) -> None:
    """The file is sent, and nothing is logged that a client could repeat at will."""

    async def main() -> None:
        for ranges in (
            *("bytes=1_0-", "bytes=+1-5", "bytes=--5", "bytes=-+5", "bytes=-", "bytes"),
            *("bytes=1 - 5", "bytes=0x1-", "bytes=1-5-7", "bytes=0-1,x", "bytes=5-1"),
            *("lines=1-5", "bytes=" + "1" * 5000 + "-1", "bytes=0-1;2-3"),
        ):
            response = await web.get("/page.html", Range=ranges)
            assert (response.status, response.body) == (200, b"<p>page</p>"), ranges

    run(reactor, main)
    assert "ange" not in "".join(str(each.get("log_text", "")) for each in logged)
    assert not [each for each in logged if each.get("log_failure")]


def test_ranges_with_numbers_of_any_length(reactor: Any, web: Web) -> None:
    async def main() -> None:
        nines, zeros = "9" * 5000, "0" * 5000
        for ranges, status, body in (
            *((f"0-{nines}", 206, b"<p>page</p>"), (f"-{nines}", 206, b"<p>page</p>")),
            *((f"{nines}-", 416, b""), (f"{nines}-{nines}", 416, b"")),
            *((f"{zeros}3-{zeros}6", 206, b"page"), ("\t3-6 ,", 206, b"page")),
        ):
            response = await web.get("/page.html", Range=f"bytes={ranges}")
            assert (response.status, response.body) == (status, body), ranges[:9]
        response = await web.get("/page.html", Range="Bytes=3-6")
        assert (response.status, response.body) == (206, b"page")

    run(reactor, main)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditional_requests(
    reactor: Any, web: Web, logged: list[Any], method: str
) -> None:
    """The rules are those of RFC 9110, 13.2.2, for a file without an entity tag."""
    early, late = "Sat, 01 Jan 2000 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
    cases: list[tuple[int, dict[str, str]]] = [
        (200, {"If_Match": "*"}),
        (412, {"If_Match": '"a tag"'}),
        (200, {"If_Match": "*", "If_Unmodified_Since": early}),
        (200, {"If_Unmodified_Since": late}),
        (412, {"If_Unmodified_Since": early}),
        (412, {"If_Unmodified_Since": early, "If_Modified_Since": late}),
        (412, {"If_Unmodified_Since": early, "Range": "bytes=0-1"}),
        (304, {"If_None_Match": "*"}),
        (200, {"If_None_Match": '"a tag"'}),
        (304, {"If_Modified_Since": late}),
        (200, {"If_None_Match": '"a tag"', "If_Modified_Since": late}),
        (304, {"If_None_Match": "*", "If_Modified_Since": early}),
    ]
    for no_date in (";", "no date", "0", "\xe9"):
        cases.append((200, {"If_Modified_Since": no_date}))
        cases.append((200, {"If_Unmodified_Since": no_date}))

    async def main() -> None:
        for status, headers in cases:
            response = await web.get("/page.html", method, **headers)
            assert response.status == status, headers
            body = b"<p>page</p>" if (status, method) == (200, "GET") else b""
            assert response.body == body, headers

    run(reactor, main)
    assert not [each for each in logged if each.get("log_failure")]


def test_a_range_beyond_4_gb(reactor: Any, folder: Path, web: Web) -> None:
    far = (1 << 32) + 12345
    with (folder / "far.bin").open("wb") as file:
        file.seek(far)
        file.write(b"far away")

    async def main() -> None:
        response = await web.get("/far.bin", Range=f"bytes={far}-{far + 2}")
        assert (response.status, response.body) == (206, b"far")
        assert (await web.get("/far.bin", Range="bytes=-4")).body == b"away"

    run(reactor, main)


def test_a_file_that_was_not_modified_is_not_sent(
    reactor: Any, folder: Path, web: Web
) -> None:
    async def main() -> None:
        modified = (await web.get("/big.bin")).headers[b"last-modified"].decode()
        again = await web.get("/big.bin", If_Modified_Since=modified)
        assert (again.status, again.body) == (304, b"")
        os.utime(folder / "big.bin", (2_000_000_000, 2_000_000_000))
        later = await web.get("/big.bin", If_Modified_Since=modified)
        assert (later.status, len(later.body)) == (200, SIZE)

    run(reactor, main)


def test_a_static_resource_below_another_resource(reactor: Any, folder: Path) -> None:
    async def main() -> None:
        root = Resource()
        static = StaticResource(str(folder), default_type="text/x-unknown")
        static.putChild(b"own", Data(b"its own", "text/plain"))
        root.putChild(b"files", static)
        root.putChild(b"file", StaticResource(str(folder / "page.html")))
        web = Web(reactor, root)
        assert (await web.get("/files/page.html")).body == b"<p>page</p>"
        assert (await web.get("/files/own")).body == b"its own"
        assert (await web.get("/file")).body == b"<p>page</p>"
        redirected = await web.get("/files?x=y")
        assert (redirected.status, redirected.headers[b"location"]) == (
            302,
            b"/files/?x=y",
        )
        kind = (await web.get("/files/no%20type")).headers[b"content-type"]
        assert kind == b"text/x-unknown"
        assert (await web.get("/files/page.html", "POST")).status == 405
        await web.port.stopListening()

    run(reactor, main)


def test_files_that_cannot_be_served_are_not_found(
    reactor: Any, folder: Path, web: Web
) -> None:
    async def main() -> None:
        paths = ["/" + "n" * 300]
        if sys.platform != "win32":
            os.mkfifo(folder / "fifo")
            (folder / "loop").symlink_to("loop")
            paths += ["/fifo", "/loop"]
        for path in paths:
            assert (await web.get(path)).status == 404

    run(reactor, main)


def test_a_file_that_must_not_be_read_is_forbidden(
    reactor: Any, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read all files, so the test makes up the refusal."""

    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", refuse)
            assert (await web.get("/page.html")).status == 403
        assert (await web.get("/page.html")).status == 200

    run(reactor, main)


def test_an_index_without_an_extension(reactor: Any, folder: Path) -> None:
    (folder / "sub" / "index").write_bytes(b"index")
    same_response(reactor, folder, "/sub/")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="names are text on this platform"
)
def test_a_listing_leaves_out_names_that_are_not_text(
    reactor: Any, folder: Path, web: Web
) -> None:
    (folder / "sub" / os.fsdecode(b"no text \xff")).write_bytes(b"x")
    (folder / "sub" / "text").write_bytes(b"x")

    async def main() -> None:
        response = await web.get("/sub/")
        assert response.status == 200
        assert b">text<" in response.body
        assert b"no text" not in response.body

    run(reactor, main)


def test_a_failure_is_a_server_error(
    reactor: Any, web: Web, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:

    def fail(*args: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    def truncate(path: str, flags: int, permissions: int) -> Any:
        opened = open_descriptor(path, flags, permissions)
        os.truncate(path, 0)
        return opened

    async def main() -> None:
        module = "twisted_rtsig.files.web"
        monkeypatch.setattr(f"{module}.open_cached", lambda path: None)
        monkeypatch.setattr(f"{module}.open_descriptor", fail)
        assert (await web.get("/page.html")).status == 500
        monkeypatch.setattr(f"{module}.open_descriptor", truncate)
        response = await web.get("/archive.tar.gz", Range="bytes=0-3")
        assert response.status == 500
        about_the_file = {b"content-encoding", b"content-range", b"last-modified"}
        assert not about_the_file & response.headers.keys()
        assert len(response.body) == int(response.headers[b"content-length"])

    run(reactor, main)
    failures = [each["log_failure"] for each in logged if each.get("log_failure")]
    assert [each.type.__name__ for each in failures] == ["OSError", "FileEnded"]


def test_a_file_that_is_truncated_while_it_is_sent(
    reactor: Any, folder: Path, web: Web, logged: list[Any]
) -> None:
    path = folder / "big.bin"
    path.write_bytes(bytes(30 * SIZE))

    async def main() -> None:
        async with await web.connect() as stream:
            await web.ask(stream, "/big.bin")
            await stream.read_until(b"\r\n\r\n")
            os.truncate(path, SIZE)
            # The client can tell that the file is incomplete.
            with pytest.raises(IncompleteRead):
                await stream.read_exactly(30 * SIZE)

    run(reactor, main)
    failures = [each["log_failure"] for each in logged if each.get("log_failure")]
    assert [failure.type.__name__ for failure in failures] == ["FileEnded"]


@pytest.mark.parametrize("when", ["while it is opened", "while it is sent"])
def test_a_client_disconnects_early(
    reactor: Any,
    folder: Path,
    web: Web,
    logged: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    (folder / "big.bin").write_bytes(bytes(30 * SIZE))

    async def main() -> None:
        # The file is opened in a thread.  Its data may be cached.
        monkeypatch.setattr("twisted_rtsig.files.web.open_cached", lambda path: None)
        disk = SlowDisk(monkeypatch, "open")
        if when == "while it is sent":
            disk.gate.open()
        stream = await web.connect()
        await web.ask(
            stream, "/page.html" if when == "while it is opened" else "/big.bin"
        )
        while not disk.gate.reached.is_set():
            await sleep(0.001)
        if when == "while it is sent":
            await stream.read_until(b"\r\n\r\n")
        await stream.abort()
        await sleep(0.01)
        disk.gate.open()
        while open_in(folder):
            await sleep(0.001)

    run(reactor, main)
    assert not [each for each in logged if each.get("log_failure")]


EXAMPLE = Path(__file__).parents[2] / "examples" / "static_server.py"


def test_the_example_server(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    if sys.platform.startswith("linux"):
        command.append("--reactor=rtsig-epoll")
    elif sys.platform == "win32":
        command.append("--reactor=rtsig-iocp")
    if sys.platform != "win32":
        command.append("--pidfile=")
    command += ["--nodaemon", "--python", str(EXAMPLE)]
    environment = {**os.environ, "FOLDER": str(folder), "PORT": "0"}
    environment["PYTHONPATH"] = str(EXAMPLE.parents[1])
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as twistd:
        assert twistd.stdout is not None
        try:
            started = next(
                found
                for line in twistd.stdout
                if (found := re.search(r"Site starting on (\d+)", line))
            )
            url = f"http://127.0.0.1:{started[1]}/big.bin"
            with urllib.request.urlopen(url, timeout=DEADLINE) as response:
                assert response.read() == (folder / "big.bin").read_bytes()
        finally:
            twistd.terminate()
