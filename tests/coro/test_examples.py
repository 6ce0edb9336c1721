"""The examples, tested with clients in common use for such servers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import smtplib
import socket
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import redis
import twisted.internet
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.ssl import PrivateCertificate

from tests.coro.support import failures, listen, run, spin
from tests.support import DEADLINE, dispose, make_certificate, refusing_port
from twisted_rtsig.coro import (
    CoroutineFactory,
    IncompleteRead,
    Server,
    Stream,
    in_thread,
    spawn,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

# pyOpenSSL warns of how Twisted uses certificates.
pytestmark = pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")

T = TypeVar("T")


@pytest.fixture
def reactor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """
    One reactor with threads, for the clients.  The examples need no other kind of
    reactor.

    It is installed, as in a program: Twisted's TLS uses the installed reactor for its
    timeouts.
    """
    made: Any
    if sys.platform.startswith("linux"):
        from twisted_rtsig.epollreactor import EdgeEPollReactor

        made = EdgeEPollReactor()
    else:
        from twisted.internet.selectreactor import SelectReactor

        made = SelectReactor()
    monkeypatch.setattr(twisted.internet, "reactor", made, raising=False)
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", made)
    threads = made.getThreadPool()
    threads.start()
    yield made
    threads.stop()
    dispose(made)


@functools.cache
def example(name: str) -> Any:
    """An example as a module, which all tests share."""
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serving(reactor: Any, handler: Any, **options: Any) -> int:
    """Serve a handler; return the port."""
    server: Server = run(reactor, lambda: listen(reactor, handler, **options))
    port: int = server.port.getHost().port
    return port


def meanwhile(reactor: Any, function: Callable[..., T], *args: Any) -> T:
    """Call a function that blocks in a thread, while the reactor turns."""
    result: T = run(reactor, in_thread, function, *args)
    return result


def program(name: str) -> str:
    """The path of a program; skip the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: install it (Debian: redis-tools, curl)")
    return path


def output(*command: str) -> str:
    """Run a program, which must succeed; return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


class Client:
    """A client in a thread, which sends and receives lines."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.file = self.socket.makefile("rb")

    def send(self, text: bytes) -> None:
        self.socket.sendall(text)

    def line(self) -> bytes:
        return self.file.readline().removesuffix(b"\r\n")

    def ask(self, text: bytes) -> bytes:
        self.send(text + b"\r\n")
        return self.line()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# The chat.  docs/coroutines.md also has it with callbacks, and the tests of that page
# use the same conversations.


def converse_in_chat(port: int) -> None:
    with Client(port) as ann, Client(port) as bob:
        assert ann.line() == bob.line() == b"What is your name?"
        assert ann.ask(b"Ann") == b"Hello, Ann!"
        assert bob.ask(b"Ann") == b"Choose another one."
        assert bob.ask(b" \x1b ") == b"Choose another one."
        # A name in two pieces; and the line ends of telnet and of netcat.
        bob.send(b"B")
        assert ann.ask(b"/who") == b"* Ann"
        assert bob.ask(b"ob") == b"Hello, Bob!"
        assert ann.line() == b"* Bob is here"
        ann.send(b"hi\nh\xc3\xb6\x1b[2J\r\n\r\n")
        assert bob.line() == b"<Ann> hi"
        assert bob.line() == "<Ann> hö[2J".encode()
        bob.send(b"well, well\r\n")
        assert ann.line() == b"<Bob> well, well"
        assert bob.ask(b"/who") == b"* Ann, Bob"
        assert bob.ask(b"/quit") == b""
        assert ann.line() == b"* Bob has left"
        with Client(port) as bob_again:
            bob_again.send(b"Bob\r\nthis and no mo")
            assert ann.line() == b"* Bob is here"
            bob_again.socket.shutdown(socket.SHUT_WR)
            assert ann.line() == b"* Bob has left"
        assert ann.ask(b"x" * 2000) == b"That line is too long."
        assert ann.line() == b""


def flood_chat(port: int) -> None:
    """Write until the chat drops the client that does not read."""
    with Client(port) as ann, Client(port) as bob:
        assert [bob.line(), bob.ask(b"Bob")][1] == b"Hello, Bob!"
        assert [ann.line(), ann.ask(b"Ann")][1] == b"Hello, Ann!"
        lines = (b"x" * 900 + b"\n") * 100
        for _ in range(1000):
            ann.send(lines)
            if ann.ask(b"/who") != b"* Ann, Bob":
                break
        else:
            raise AssertionError("Bob is there still")


def time_out_in_chat(port: int) -> None:
    with Client(port) as ann:
        assert ann.line() == b"What is your name?"
        assert ann.line() == b"You have no name."
        assert ann.line() == b""


@pytest.mark.parametrize("conversation", [converse_in_chat, flood_chat])
def test_chat(
    reactor: Any, conversation: Callable[[int], None], logged: list[Any]
) -> None:
    room = example("chat").Room()
    meanwhile(reactor, conversation, serving(reactor, room.session))
    spin(reactor, lambda: not room.members)
    assert failures(logged) == []


def test_chat_without_a_name(
    reactor: Any, logged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = example("chat")
    monkeypatch.setattr(chat, "SECONDS_FOR_A_NAME", 0.05)
    meanwhile(reactor, time_out_in_chat, serving(reactor, chat.Room().session))
    assert failures(logged) == []


# SMTP


class Mail:
    """The server, and the messages that it has delivered."""

    def __init__(self, reactor: Any, folder: Path) -> None:
        self.certificate, key = make_certificate(folder)
        pem = key.read_bytes() + self.certificate.read_bytes()
        self.messages: list[Any] = []
        handler = example("smtp_server").Server(
            PrivateCertificate.loadPEM(pem).options(),
            {b"ann": b"secret"},
            self.messages.append,
        )
        self.port = serving(reactor, handler.session)

    def context(self) -> ssl.SSLContext:
        """The context of a client that trusts only the certificate of this server."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def connect(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, timeout=DEADLINE)

    def connect_encrypted(self) -> smtplib.SMTP:
        client = self.connect()
        assert client.starttls(context=self.context())[0] == 220
        return client


@pytest.fixture
def mail(reactor: Any, tmp_path: Path, no_failures: None) -> Mail:
    return Mail(reactor, tmp_path)


TEXT = b"Subject: dots\r\n\r\n.\r\n..two\r\nand bare newlines\n.\nthe end\r\n"


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_smtp(reactor: Any, mail: Mail, mechanism: str) -> None:
    def send() -> None:
        with mail.connect_encrypted() as client:
            client.user, client.password = "ann", "secret"
            authobject = getattr(client, f"auth_{mechanism.lower()}")
            client.ehlo()
            assert client.auth(mechanism, authobject)[0] == 235
            for _ in range(2):
                assert client.mail("ann@here.example")[0] == 250
                assert client.rcpt("bob@there.example")[0] == 250
                assert client.rcpt("eve@there.example")[0] == 250
                # Not by data(), which would replace the bare newlines.
                assert client.docmd("DATA")[0] == 354
                client.send(TEXT.replace(b"\r\n.", b"\r\n..") + b".\r\n")
                assert client.getreply()[0] == 250
            assert client.noop()[0] == client.rset()[0] == 250

    meanwhile(reactor, send)
    recipients = ["bob@there.example", "eve@there.example"]
    assert mail.messages == [(b"ann", "ann@here.example", recipients, TEXT)] * 2


def test_smtp_sendmail(reactor: Any, mail: Mail) -> None:
    def send() -> None:
        with mail.connect_encrypted() as client:
            client.login("ann", "secret")
            client.sendmail("", "bob@there.example", "\n.hello\n")

    meanwhile(reactor, send)
    assert mail.messages == [(b"ann", "", ["bob@there.example"], b"\r\n.hello\r\n")]


def test_smtp_wrong_password(reactor: Any, mail: Mail) -> None:
    def guess() -> None:
        with mail.connect_encrypted() as client:
            client.ehlo()
            for client.user in ("ann", "nobody"):
                client.password = "guess"
                # login() would try both ways.
                with pytest.raises(smtplib.SMTPAuthenticationError, match="535"):
                    client.auth("PLAIN", client.auth_plain)
            assert client.mail("ann@here.example")[0] == 530
            # The third attempt: the right password, but of another user.
            given = b64encode(b"bob\0ann\0secret").decode()
            assert client.docmd("AUTH", f"PLAIN {given}")[0] == 535
            with pytest.raises(smtplib.SMTPServerDisconnected):
                client.noop()

    meanwhile(reactor, guess)
    assert mail.messages == []


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("AUTH PLAIN !", 501),
        ("AUTH PLAIN YW5u", 501),
        ("AUTH PLAIN =", 501),
        ("AUTH PLAIN AA== AA==", 501),
        ("AUTH PLAIN\r\n*", 501),
        ("AUTH PLAIN\r\nnot base64", 501),
        ("AUTH LOGIN\r\n*", 501),
        ("AUTH LOGIN\r\nYW5u\r\n*", 501),
        ("AUTH LOGIN YW5u\r\n*", 501),
        ("AUTH", 501),
        ("AUTH NTLM", 504),
        ("AUTH \xff", 504),
    ],
)
def test_smtp_malformed_or_abandoned_authentication(
    reactor: Any, mail: Mail, asked: str, code: int
) -> None:
    """RFC 4954, 4: a client may abandon authentication, and retry, without a limit."""

    def ask() -> None:
        with mail.connect_encrypted() as client:
            for _ in range(5):
                *questions, last = asked.split("\r\n")
                for question in questions:
                    client.send(f"{question}\r\n")
                    assert client.getreply()[0] == 334
                client.send(f"{last}\r\n".encode("latin-1"))
                assert client.getreply()[0] == code
            client.login("ann", "secret")

    meanwhile(reactor, ask)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("", 500),
        ("NONSENSE", 500),
        ("STARTTLS", 503),
        ("STARTTLS x", 501),
        ("DATA x", 501),
        ("RSET x", 501),
        ("QUIT x", 501),
        ("EHLO", 501),
        ("HELO", 501),
        ("NOOP whatever", 250),
        ("noop", 250),
        ("RSET ", 250),
        ("VRFY ann", 252),
        ("AUTH PLAIN", 503),
        ("RCPT TO:<>", 501),
        ("RCPT TO:<b\0b>", 501),
        ("RCPT TO:bob", 501),
        ("RCPT FROM:<bob>", 501),
        ("RCPT TO:<bob> NOTIFY=NEVER", 501),
        ("MAIL FROM:<eve>", 503),
        ("MAIL TO:<eve>", 501),
        ("RCPT TO:<eve>", 250),
        ("DATA", 503),
    ],
)
def test_smtp_commands(reactor: Any, mail: Mail, asked: str, code: int) -> None:
    """After a sender, before a recipient: a refused command changes nothing."""

    def ask() -> None:
        with mail.connect_encrypted() as client:
            client.login("ann", "secret")
            assert client.docmd("MAIL FROM:<ann>")[0] == 250
            assert client.docmd(asked)[0] == code
            if code >= 400:
                assert client.rcpt("bob")[0] == 250
                assert client.docmd("DATA")[0] == 354
                client.send("text\r\n.\r\n")
                assert client.getreply()[0] == 250

    meanwhile(reactor, ask)
    expected = [(b"ann", "ann", ["bob"], b"text\r\n")] if code >= 400 else []
    assert mail.messages == expected


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("", 250),
        (" SIZE=100", 250),
        (" size=16777216", 250),
        (" SIZE=16777217", 552),
        (" SIZE=99999999999999999999", 552),
        (" SIZE=1_0", 501),
        (" SIZE=" + "9" * 400, 501),
        (" BODY=8BITMIME", 501),
    ],
)
def test_smtp_sizes(reactor: Any, mail: Mail, options: str, code: int) -> None:
    def ask() -> None:
        with mail.connect_encrypted() as client:
            client.login("ann", "secret")
            assert client.docmd(f"MAIL FROM:<>{options}")[0] == code

    meanwhile(reactor, ask)


def test_smtp_starttls_with_a_parameter(reactor: Any, mail: Mail) -> None:
    def ask() -> None:
        with mail.connect() as client:
            assert client.docmd("STARTTLS", "x")[0] == 501
            assert client.starttls(context=mail.context())[0] == 220
            client.login("ann", "secret")

    meanwhile(reactor, ask)


def test_smtp_without_tls(reactor: Any, mail: Mail) -> None:
    def try_it() -> None:
        with mail.connect() as client:
            client.ehlo()
            assert client.has_extn("STARTTLS")
            assert not client.has_extn("AUTH")
            assert client.docmd("AUTH", "PLAIN AGFubgBzZWNyZXQ=")[0] == 503
            assert client.mail("ann@here.example")[0] == 530
            assert client.docmd("DATA")[0] == 530

    meanwhile(reactor, try_it)


def test_smtp_injection(reactor: Any, mail: Mail) -> None:
    """Plaintext after STARTTLS is not taken for encrypted data."""

    def inject() -> list[bytes]:
        with Client(mail.port) as client:
            assert client.line() == b"220 ready"
            assert client.ask(b"STARTTLS\r\nNOOP") == b"220 go ahead"
            return client.file.readlines()

    assert meanwhile(reactor, inject) == []


def test_smtp_line_without_end(reactor: Any, mail: Mail) -> None:
    def send() -> bytes:
        with Client(mail.port) as client:
            client.line()
            return client.ask(b"x" * 2000)

    assert meanwhile(reactor, send) == b"500 the line is too long"


# SOCKS5

PAGE = bytes(range(256)) * 4096


@pytest.fixture
def page(reactor: Any) -> int:
    """The port of a web server with one page."""

    async def answer(stream: Stream) -> None:
        while await stream.read_line():
            pass
        await stream.write(b"HTTP/1.0 200 OK\r\n\r\n" + PAGE)

    return serving(reactor, answer)


@pytest.fixture
def socks(reactor: Any) -> int:
    return serving(reactor, example("socks5_proxy").Proxy(reactor).session)


def fetch_by_curl(reactor: Any, *arguments: str) -> Any:
    # --noproxy "" overrides the proxy settings of the environment.
    command = [program("curl"), "--silent", "--show-error", "--noproxy", "", *arguments]
    return meanwhile(
        reactor, lambda: subprocess.run(command, capture_output=True, timeout=DEADLINE)
    )


@pytest.mark.parametrize("option", ["--socks5", "--socks5-hostname"])
def test_curl_through_socks5(
    reactor: Any, page: int, option: str, logged: list[Any]
) -> None:
    socks5_proxy = example("socks5_proxy")
    asked: list[str] = []

    class Proxy(socks5_proxy.Proxy):  # type: ignore[misc, name-defined]
        async def connect(self, host: str, port: int) -> Any:
            asked.append(host)
            return await super().connect(host, port)

    proxy = f"127.0.0.1:{serving(reactor, Proxy(reactor).session)}"
    done = fetch_by_curl(reactor, "-4", option, proxy, f"http://localhost:{page}/")
    assert done.stderr == b""
    assert done.stdout == PAGE
    assert asked == ["localhost" if option == "--socks5-hostname" else "127.0.0.1"]
    assert failures(logged) == []


def test_socks5_to_a_refusing_port(reactor: Any, socks: int, logged: list[Any]) -> None:
    proxy = f"127.0.0.1:{socks}"
    with refusing_port() as port:
        done = fetch_by_curl(reactor, "--socks5", proxy, f"http://127.0.0.1:{port}/")
    assert done.returncode
    assert b"(5)" in done.stderr
    assert failures(logged) == []


HELLO = b"\x05\x01\x00"
WELCOME = b"\x05\x00"
REFUSED = b"\x00\x01" + bytes(6)


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"\x04\x01\x00", b"\x05\xff"),
        (b"\x05\x02\x01\x02", b"\x05\xff"),
        (HELLO + b"\x05\x01\x00\x02", WELCOME + b"\x05\x08" + REFUSED),
        (HELLO + b"\x05\x02\x00\x01" + bytes(6), WELCOME + b"\x05\x07" + REFUSED),
        # Names that no resolver accepts.
        *(
            (
                HELLO + b"\x05\x01\x00\x03%c%b\x00\x50" % (len(name), name),
                WELCOME + b"\x05\x04" + REFUSED,
            )
            for name in (b"a..b.", b"", b"\0", b"\xff", b"a" * 255, b"127.0.0.1\0.x")
        ),
        (b"\x05", b""),
    ],
)
def test_socks5_refusals(
    reactor: Any, socks: int, sent: bytes, answered: bytes, logged: list[Any]
) -> None:
    def ask() -> bytes:
        with Client(socks) as client:
            client.send(sent)
            client.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                return client.file.read()
            return b""

    assert meanwhile(reactor, ask) == answered
    assert failures(logged) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_socks5_passes_on_the_end_of_each_direction(
    reactor: Any, socks: int, host: str, logged: list[Any]
) -> None:
    async def reverse(stream: Stream) -> None:
        received = b""
        while data := await stream.read():
            received += data
        await stream.write(received[::-1])

    if host == "::1":
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind((host, 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
        factory = CoroutineFactory(reverse, reactor=reactor)
        port = reactor.listenTCP(0, factory, interface=host).getHost().port
        address = b"\x04" + socket.inet_pton(socket.AF_INET6, host)
    else:
        port = serving(reactor, reverse)
        address = b"\x01" + socket.inet_aton(host)

    def converse() -> bytes:
        with Client(socks) as client:
            client.send(HELLO + b"\x05\x01\x00" + address + port.to_bytes(2, "big"))
            welcome = WELCOME + b"\x05\x00" + REFUSED
            assert client.file.read(len(welcome)) == welcome
            client.send(PAGE)
            client.socket.shutdown(socket.SHUT_WR)
            return client.file.read()

    assert meanwhile(reactor, converse) == PAGE[::-1]
    assert failures(logged) == []


def test_socks5_passes_on_a_loss(reactor: Any, socks: int, logged: list[Any]) -> None:
    async def abort(stream: Stream) -> None:
        await stream.read_line()
        await stream.abort()

    port = serving(reactor, abort)

    def converse() -> bytes:
        with Client(socks) as client:
            address = socket.inet_aton("127.0.0.1") + port.to_bytes(2, "big")
            client.send(HELLO + b"\x05\x01\x00\x01" + address)
            client.file.read(len(WELCOME + b"\x05\x00" + REFUSED))
            client.send(b"go away\n")
            return client.file.read()

    with pytest.raises(ConnectionResetError):
        meanwhile(reactor, converse)
    assert failures(logged) == []


# Redis


class Redis:
    """The server, and its clients."""

    def __init__(self, reactor: Any) -> None:
        self.database = example("redis_server").Database()
        self.port = serving(reactor, self.database.session, cancel_on_loss=True)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A client of redis-py."""
        with redis.Redis(
            port=self.port, protocol=2, socket_timeout=DEADLINE
        ) as connected:
            yield connected


@pytest.fixture
def server(reactor: Any) -> Redis:
    return Redis(reactor)


def test_redis_py(reactor: Any, server: Redis, logged: list[Any]) -> None:
    def converse() -> None:
        with server.client() as client:
            assert client.ping()
            assert client.echo("hello") == b"hello"
            assert client.get("key") is None
            assert client.set("key", b"\r\n\0")
            assert client.get("key") == b"\r\n\0"
            assert [client.incr("count"), client.incr("count")] == [1, 2]
            assert client.rpush("list", "c", "d") == 2
            assert client.lpush("list", "b", "a") == 4
            assert client.lrange("list", 0, -1) == [b"a", b"b", b"c", b"d"]
            assert client.lrange("list", -3, -2) == [b"b", b"c"]
            assert client.lrange("list", 2, 1) == client.lrange("none", 0, 9) == []
            assert [client.lpop("list"), client.rpop("list")] == [b"a", b"d"]
            assert [client.llen("list"), client.llen("none")] == [2, 0]
            assert client.lpop("none") is None
            assert client.delete("key", "count", "list", "none") == 3
            assert client.config_get("save") == {}
            assert client.info()["db0"]["keys"] == 0
            client.set("text", "x")
            client.rpush("list", "x")
            for wrong in (
                lambda: client.incr("text"),
                lambda: client.lpush("text", 1),
                lambda: client.get("list"),
                lambda: client.lrange("list", "a", "b"),
                lambda: client.blpop("none", timeout=-1),
                lambda: client.execute_command("NONSENSE", "x"),
                lambda: client.execute_command("GET"),
            ):
                with pytest.raises(redis.ResponseError):
                    wrong()

    meanwhile(reactor, converse)
    assert failures(logged) == []


def test_redis_pipelines(reactor: Any, server: Redis) -> None:
    def converse() -> None:
        with server.client() as client:
            with client.pipeline(transaction=False) as pipeline:
                for number in range(20):
                    pipeline.set(f"key{number}", number)
                    pipeline.get(f"key{number}")
                answers = pipeline.execute()
            assert answers[1::2] == [b"%d" % number for number in range(20)]

    meanwhile(reactor, converse)


def test_redis_answers_together(reactor: Any, server: Redis) -> None:
    def converse() -> None:
        with Client(server.port) as client:
            client.send(b"PING\r\n" * 100)
            assert client.socket.recv(1000) == b"+PONG\r\n" * 100

    meanwhile(reactor, converse)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_redis_commands_in_pieces(reactor: Any, server: Redis, pieces: int) -> None:
    text = b"PING\r\n*2\r\n$4\r\nECHO\r\n$3\r\na\r\n\r\n\r\n*0\r\n*1\r\n$4\r\nQUIT\r\n"

    def converse() -> bytes:
        with Client(server.port) as client:
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(text), pieces):
                client.send(text[start : start + pieces])
            return client.file.read()

    assert meanwhile(reactor, converse) == b"+PONG\r\n$3\r\na\r\n\r\n+OK\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"*x\r\n",
        b"*\r\n",
        b"*-1\r\n",
        b"*1_0\r\n",
        b"* 1\r\n",
        b"*01\r\n",
        b"*99999999\r\n",
        b"*" + b"9" * 5000 + b"\r\n",
        *(
            b"*1\r\n%b\r\nPING\r\n" % size
            for size in (b":4", b"4", b"$+4", b"$-4", b"$ 4", b"$4 ", b"$04", b"$0_4")
        ),
        b"*1\r\n$99999999\r\n",
        b"*2\r\n$9999999\r\n" + bytes(9999999) + b"\r\n$9999999\r\n",
        # An item is not followed by the end of a line.
        b"*1\r\n$4\r\nPINGPING\r\n",
        b"*1\r\n$4\r\nPING\n\r\n",
    ],
    ids=lambda sent: repr(sent[:20]),
)
def test_redis_malformed_commands(
    reactor: Any, server: Redis, sent: bytes, logged: list[Any]
) -> None:
    def converse() -> bytes:
        with Client(server.port) as client:
            client.send(b"PING\r\n" + sent)
            return client.file.read()

    assert meanwhile(reactor, converse).startswith(b"+PONG\r\n-ERR Protocol error")
    assert failures(logged) == []


MOST = (1 << 63) - 1


@pytest.mark.parametrize(
    "digits",
    [
        b"1_0",
        b" 1",
        b"1\n",
        b"+1",
        b"01",
        b"-0",
        b"-",
        b"",
        "\u0661".encode(),
        b"%d" % (MOST + 1),
        b"%d" % -(MOST + 2),
        b"9" * 5000,
    ],
    ids=lambda digits: repr(digits[:20]),
)
def test_redis_numbers(
    reactor: Any, server: Redis, digits: bytes, logged: list[Any]
) -> None:
    """Strings that Redis does not accept as a number are refused for each argument."""

    def converse() -> None:
        with server.client() as client:
            client.set("text", digits)
            client.rpush("list", "x")
            for command in (
                ("INCR", "text"),
                ("INCRBY", "text", 1),
                ("INCRBY", "count", digits),
                ("LRANGE", "list", digits, 0),
                ("LRANGE", "list", 0, digits),
            ):
                with pytest.raises(redis.ResponseError, match="not an integer"):
                    client.execute_command(*command)
            assert client.get("text") == digits
            assert client.get("count") is None

    meanwhile(reactor, converse)
    assert failures(logged) == []


def test_redis_numbers_have_64_bits(reactor: Any, server: Redis) -> None:
    def converse() -> None:
        with server.client() as client:
            for most, step in ((MOST, 1), (-MOST - 1, -1)):
                client.set("count", most - step)
                assert client.incrby("count", step) == most
                with pytest.raises(redis.ResponseError, match="out of range"):
                    client.incrby("count", step)
                assert client.get("count") == b"%d" % most
            client.rpush("list", "x", "y")
            assert client.lrange("list", -MOST - 1, MOST) == [b"x", b"y"]

    meanwhile(reactor, converse)


@pytest.mark.parametrize(
    "seconds", ["inf", "nan", "-1", "1_0", " 1", "1e999", "9" * 400, ".", ""]
)
def test_redis_blpop_with_a_bad_timeout(
    reactor: Any, server: Redis, seconds: str, logged: list[Any]
) -> None:
    """A bad timeout is refused even if there is a value in the list."""

    def converse() -> None:
        with server.client() as client:
            for _ in range(2):
                with pytest.raises(redis.ResponseError, match="timeout is not"):
                    client.execute_command("BLPOP", "list", seconds)
                client.rpush("list", "x")
            assert client.llen("list") == 2

    meanwhile(reactor, converse)
    assert failures(logged) == []


def test_redis_blpop(reactor: Any, server: Redis) -> None:
    database = server.database

    def converse() -> None:
        with server.client() as one, server.client() as two:
            two.rpush("b", "there already")
            assert one.blpop(["a", "b"]) == (b"b", b"there already")
            assert one.blpop(["a", "b"], timeout=0.05) is None
            assert not database.waiting

    meanwhile(reactor, converse)
    assert not database.values


def test_redis_blpop_in_order(reactor: Any, server: Redis) -> None:
    """The client that came first is served first, whichever key it waits for."""
    waiting = server.database.waiting

    def wait() -> Any:
        with server.client() as client:
            return client.blpop(["a", "b"], timeout=DEADLINE)

    results: list[Any] = []
    for number in (1, 2):
        spawn(in_thread, wait, reactor=reactor).as_deferred().addCallback(
            results.append
        )
        spin(reactor, lambda: len(waiting.get(b"b", ())) == number)

    def push() -> None:
        with server.client() as client:
            assert client.rpush("b", "1", "2", "3") == 3
            assert client.lrange("b", 0, -1) == [b"3"]

    meanwhile(reactor, push)
    spin(reactor, lambda: len(results) == 2)
    assert sorted(results) == [(b"b", b"1"), (b"b", b"2")]
    assert not waiting


def test_redis_blpop_of_a_client_that_has_left(
    reactor: Any, server: Redis, logged: list[Any]
) -> None:
    waiting = server.database.waiting
    gone = Client(server.port)
    gone.send(b"PING\r\nBLPOP a 0\r\n")
    spin(reactor, lambda: waiting)
    # The command before BLPOP was answered.
    assert gone.line() == b"+PONG"
    gone.close()
    spin(reactor, lambda: not waiting)

    def push() -> None:
        with server.client() as client:
            client.rpush("a", "precious")
            assert client.lpop("a") == b"precious"

    meanwhile(reactor, push)
    assert failures(logged) == []


def test_redis_publish(reactor: Any, server: Redis, logged: list[Any]) -> None:
    def converse() -> None:
        with server.client() as client, client.pubsub() as subscriber:
            assert client.publish("news", "nobody hears") == 0
            subscriber.subscribe("news", "sport")
            answers = [subscriber.get_message(timeout=DEADLINE) for _ in range(2)]
            assert [each["type"] for each in answers] == ["subscribe"] * 2
            assert [each["data"] for each in answers] == [1, 2]
            assert client.publish("news", "all hear") == 1
            message = subscriber.get_message(timeout=DEADLINE)
            assert message == {
                "type": "message",
                "pattern": None,
                "channel": b"news",
                "data": b"all hear",
            }
            subscriber.ping()
            assert subscriber.get_message(timeout=DEADLINE)["type"] == "pong"
            subscriber.unsubscribe("news")
            assert subscriber.get_message(timeout=DEADLINE)["data"] == 1
            assert client.publish("news", "nobody hears") == 0
            subscriber.unsubscribe()
            assert subscriber.get_message(timeout=DEADLINE)["data"] == 0
        with Client(server.port) as plain:
            assert plain.ask(b"UNSUBSCRIBE") == b"*3"
            assert [plain.line() for _ in range(4)] == [
                b"$11",
                b"unsubscribe",
                b"$-1",
                b":0",
            ]
            plain.send(b"SUBSCRIBE news\r\n")
            assert [plain.line() for _ in range(6)][-1] == b":1"
            assert plain.ask(b"GET key").startswith(b"-ERR a subscriber")

    meanwhile(reactor, converse)
    spin(reactor, lambda: not server.database.subscribers)
    assert failures(logged) == []


def test_redis_subscriber_that_does_not_read(reactor: Any, server: Redis) -> None:
    def converse() -> None:
        with server.client() as client, Client(server.port) as deaf:
            deaf.send(b"SUBSCRIBE news\r\n")
            assert deaf.line() == b"*3"
            for _ in range(1000):
                if not client.publish("news", bytes(100_000)):
                    return
        raise AssertionError("it is subscribed still")

    meanwhile(reactor, converse)


def test_redis_cli(reactor: Any, server: Redis) -> None:
    cli = [program("redis-cli"), "-p", str(server.port)]

    def converse() -> None:
        assert output(*cli, "set", "key", "some value") == "OK\n"
        assert output(*cli, "get", "key") == "some value\n"
        assert output(*cli, "rpush", "list", "1", "2") == "2\n"
        assert output(*cli, "lrange", "list", "0", "-1") == "1\n2\n"
        assert "unknown command" in output(*cli, "nonsense")
        assert output(*cli, "set", "count", "9" * 5000) == "OK\n"
        assert "not an integer" in output(*cli, "incr", "count")
        assert "timeout is not" in output(*cli, "blpop", "count", "inf")
        output(*cli, "del", "count")
        typed = subprocess.run(
            cli,
            input="incr count\nincr count\nquit\n",
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert typed.stdout == "1\n2\n"

    meanwhile(reactor, converse)


def test_redis_benchmark(reactor: Any, server: Redis, logged: list[Any]) -> None:
    tests = "ping,set,get,incr,lpush,rpush,lpop,rpop,lrange_100"
    command = [program("redis-benchmark"), "-p", str(server.port), "-t", tests]
    command += ["-n", "200", "-c", "5", "-P", "8", "--csv"]
    printed = meanwhile(reactor, output, *command)
    for name in ("PING_INLINE", "PING_MBULK", "LRANGE_100", "INCR"):
        assert f'"{name}' in printed
    assert failures(logged) == []


# HTTP through a proxy

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

ANSWERS: dict[str, bytes] = {
    "length": OK + b"Content-Length: 5\r\n\r\nhello",
    "until-the-end": OK + b"\r\nhello",
    "chunks": CHUNKED + b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: x\r\n\r\n",
    "hints": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    + OK
    + b"Content-Length: 5\r\n\r\nhello",
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "lengths": OK + b"Content-Length: 5\r\ncontent-length: 5, 5\r\n\r\nhello",
    "not-found": b"HTTP/1.0 404\r\nContent-Length: 0\r\n\r\n",
    "no-http": b"220 ready\r\n",
    "bad-length": OK + b"Content-Length: +5\r\n\r\nhello",
    "different-lengths": OK
    + b"Content-Length: 6\r\nX: y\r\nContent-Length: 5\r\n\r\nhello",
    "different-lengths-in-one": OK + b"Content-Length: 5, 6\r\n\r\nhello",
    "no-length": OK + b"Content-Length:\r\n\r\nhello",
    "length-in-other-digits": OK + b"Content-Length: 5\xa0\r\n\r\nhello",
    "compressed": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "compressed-in-two": OK
    + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "not-chunked": OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
    "both": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "no-header": OK + b"nonsense\r\n\r\n",
    "folded": OK + b"X: y\r\n Content-Length: 5\r\n\r\nhello",
    "space-before-colon": OK + b"Content-Length : 5\r\n\r\nhello",
    "bad-chunk": CHUNKED + b"2\r\nhello\r\n",
    "bad-chunk-size": CHUNKED + b"-1\r\n",
    "huge-chunk": CHUNKED + b"ffffffff\r\n",
    "headers": OK + b"X: y\r\n" * 200,
    "short": OK + b"Content-Length: 5\r\n\r\nhel",
    "short-chunk": CHUNKED + b"5\r\nhel",
    "silence": b"",
    "silence-in-the-middle": OK + b"Content-Length: 5\r\n\r\nhel",
}


async def proxy(stream: Stream) -> None:
    """Answer by the name in the URL, for any host."""
    method, url, version = (await stream.read_line()).decode().split()
    assert (method, version) == ("GET", "HTTP/1.1")
    scheme, _, host, name = url.split("/")
    assert scheme == "http:"
    headers = set()
    while line := await stream.read_line():
        headers.add(line)
    assert f"Host: {host}".encode() in headers
    if name == "reset":
        stream.abort()
        return
    await stream.write(ANSWERS[name])
    if name.startswith("silence"):
        # Wait until the client leaves.
        await stream.read()


def fetch(reactor: Any, name: str, seconds: float = DEADLINE) -> Any:
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", serving(reactor, proxy))
    http_fetch = example("http_fetch")
    try:
        return run(
            reactor, http_fetch.fetch, endpoint, f"http://site.test/{name}", seconds
        )
    except http_fetch.BadResponse as error:
        return error


@pytest.mark.parametrize(
    "name", ["length", "lengths", "until-the-end", "chunks", "hints"]
)
def test_http_fetch(reactor: Any, name: str, logged: list[Any]) -> None:
    assert fetch(reactor, name)[::2] == (200, b"hello")
    assert failures(logged) == []


def test_http_fetch_without_a_body(reactor: Any) -> None:
    assert fetch(reactor, "nothing") == (204, {}, b"")
    assert fetch(reactor, "not-found") == (404, {"content-length": "0"}, b"")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no-http", "not a status line"),
        ("bad-length", "not a size"),
        ("different-lengths", "different lengths"),
        ("different-lengths-in-one", "different lengths"),
        ("no-length", "not a size"),
        ("length-in-other-digits", "not a size"),
        ("compressed", "with coding='gzip, chunked'"),
        ("compressed-in-two", "with coding='gzip, chunked'"),
        ("not-chunked", "with coding='gzip'"),
        ("both", "length='5'"),
        ("no-header", "not a header"),
        ("folded", "not a header"),
        ("space-before-colon", "not a header"),
        ("bad-chunk", "longer than its size"),
        ("bad-chunk-size", "not a size"),
        ("huge-chunk", "the body has more"),
        ("headers", "more than 100 headers"),
    ],
)
def test_http_fetch_of_malformed_responses(reactor: Any, name: str, why: str) -> None:
    assert why in str(fetch(reactor, name))


def test_http_fetch_of_truncated_responses(reactor: Any) -> None:
    for name in ("short", "short-chunk"):
        with pytest.raises(IncompleteRead) as caught:
            fetch(reactor, name)
        assert caught.value.partial == b"hel"


@pytest.mark.parametrize("name", ["silence", "silence-in-the-middle"])
def test_http_fetch_times_out(reactor: Any, name: str, logged: list[Any]) -> None:
    with pytest.raises(TimeoutError):
        fetch(reactor, name, seconds=0.1)
    assert failures(logged) == []


def test_http_fetch_refuses_bad_urls(reactor: Any) -> None:
    for url in (
        "http://site.test/\r\nX: y",
        "http://site.test/ x",
        "/page",
        "http:///page",
        "http://:80/page",
        "ftp://site.test/page",
        "http://site.test\t/page",
    ):
        with pytest.raises(ValueError, match="not an http URL"):
            run(reactor, example("http_fetch").fetch, None, url)
    for user in ("ann", "ann:secret", "", ":"):
        with pytest.raises(ValueError, match="a user or a password"):
            run(reactor, example("http_fetch").fetch, None, f"http://{user}@site.test/")


def test_http_fetch_does_not_send_the_fragment(reactor: Any) -> None:
    for fragment in ("#", "#top", "#?a=b", "#@there.test"):
        # The proxy would not find the name with a fragment.
        assert fetch(reactor, f"length{fragment}").status == 200


# The examples as programs


@pytest.mark.processes
def test_the_servers_run_as_programs(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    pem = tmp_path / "both.pem"
    pem.write_bytes(key.read_bytes() + certificate.read_bytes())
    # Start all at once, since each takes some time.
    running = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, *arguments in (
            ("chat",),
            ("redis_server",),
            ("smtp_server", str(pem)),
            ("socks5_proxy",),
        )
    ]
    try:
        for each, (sent, answered) in zip(
            running,
            (
                (b"", b"What is your name?"),
                (b"PING\r\n", b"+PONG"),
                (b"", b"220 ready"),
                (b"\x05\x01\x02", b"\x05\xff"),
            ),
            strict=True,
        ):
            assert each.stdout is not None
            port = int(each.stdout.readline().split()[-1])
            with Client(port) as client:
                client.send(sent)
                assert client.line() == answered
    finally:
        for each in running:
            # Not SIGINT, which is ignored in the background of a shell.
            each.terminate()
        for each in running:
            each.communicate(timeout=DEADLINE)


@pytest.mark.processes
def test_http_fetch_runs_as_a_program(reactor: Any) -> None:
    program = [sys.executable, str(EXAMPLES / "http_fetch.py")]
    program += [f"127.0.0.1:{serving(reactor, proxy)}"]
    assert meanwhile(reactor, output, *program, "http://site.test/chunks") == "hello"
    silent = [*program, "http://site.test/silence", "0.1"]
    done = meanwhile(
        reactor,
        lambda: subprocess.run(silent, capture_output=True, timeout=DEADLINE),
    )
    assert done.returncode == 1
    assert b"TimeoutError" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{proxy}", "http://site.test/reset"), "ConnectionLost"),
        (("{proxy}", "http://site.test/different-lengths"), "different lengths"),
        (("{proxy}", "http://site.test/short"), "IncompleteRead"),
        (("{proxy}", "http://ann:secret@site.test/length"), "a user or a password"),
        (("{proxy}", "http://[site.test/length"), "ValueError"),
        (("{proxy}", "http://site.test/length", "soon"), "ValueError"),
        (("{proxy}", "http://site.test/length", "-1"), "ValueError"),
        (("127.0.0.1:x", "http://site.test/length"), "ValueError"),
        (("127.0.0.1:{closed}", "http://site.test/length"), "ConnectionRefusedError"),
    ],
)
def test_http_fetch_reports_an_error_in_one_line(
    reactor: Any, arguments: tuple[str, ...], says: str
) -> None:
    address = f"127.0.0.1:{serving(reactor, proxy)}"
    command = [sys.executable, str(EXAMPLES / "http_fetch.py")]
    with refusing_port() as closed:
        command += [each.format(proxy=address, closed=closed) for each in arguments]
        done = meanwhile(
            reactor,
            lambda: subprocess.run(
                command, capture_output=True, text=True, timeout=DEADLINE
            ),
        )
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
