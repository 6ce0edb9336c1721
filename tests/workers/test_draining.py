"""Draining the server connections of a reactor, of every kind."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import h2.connection
import pytest
from hyperframe.frame import DataFrame, Frame, GoAwayFrame
from twisted.internet.protocol import ClientFactory, connectionDone
from twisted.internet.selectreactor import SelectReactor
from twisted.internet.ssl import PrivateCertificate
from twisted.logger import ILogObserver, globalLogPublisher
from twisted.protocols.policies import WrappingFactory
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from tests.support import (
    Recorder,
    RecorderFactory,
    connect,
    dispose,
    make_certificate,
    reactor_classes,
    run_program,
    settle,
    spin_with_timers,
)
from twisted_rtsig.coro import Cancelled, CoroutineFactory, Stream, sleep
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.workers.draining import Drained, IDrainable, drain, protocols_of
from twisted_rtsig.workers.web import DrainingHTTP1, channel_of

# Raised by pyOpenSSL, about the certificate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GET = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: example.org\r\nContent-Length: 4\r\n\r\n"
LONG = 60.0
"""Longer than a test takes, in seconds."""
SHORT = 0.02


@pytest.fixture(params=reactor_classes()[:2][-1:], ids=lambda each: each.__name__)
def reactor_class(request: Any) -> Callable[[], EngineReactor]:
    """One reactor; differences between reactors have tests of their own."""
    chosen: Callable[[], EngineReactor] = request.param
    return chosen


@pytest.fixture(autouse=True)
def installed(reactor: EngineReactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the reactor, as Twisted's HTTP/2 always uses the installed one."""
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", reactor)
    monkeypatch.setattr("twisted.internet.reactor", reactor, raising=False)


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    events: list[Any] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


class Later(Resource):
    """Answers each request when the test calls :meth:`answer`."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Any] = []

    def render(self, request: Any) -> int:
        self.requests.append(request)
        return NOT_DONE_YET

    def answer(self, body: bytes = b"hello") -> None:
        request = self.requests.pop(0)
        request.setHeader(b"Content-Length", b"%d" % len(body))
        request.write(body)
        request.finish()


class Web:
    """A site on a reactor, with one client."""

    def __init__(self, reactor: EngineReactor, **options: Any) -> None:
        self.reactor = reactor
        self.resource = Later()
        self.site = Site(self.resource, reactor=reactor, **options)
        self.port = self.listen()
        self.client = connect(self.port)
        self.wait(lambda: reactor.server_connections)

    def listen(self) -> Any:
        return self.reactor.listenTCP(0, self.site, interface="127.0.0.1")

    def wait(self, until: Callable[[], Any]) -> None:
        spin_with_timers(self.reactor, until)

    def send(self, data: bytes, requests: int = 1) -> None:
        """Send data, and wait for a number of unanswered requests."""
        self.client.sendall(data)
        self.wait(lambda: len(self.resource.requests) == requests)

    def drain(self, keep_alive: float = LONG) -> list[Drained]:
        """Start draining; return a list that receives the result."""
        drained: list[Drained] = []
        drain(self.reactor, LONG, keep_alive=keep_alive).addCallback(drained.append)
        return drained

    def received(self, drained: list[Drained]) -> bytes:
        """Return all that the client receives until the connection is closed."""
        self.wait(lambda: drained)
        return _read(self.client)


def _read(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


@pytest.fixture
def web(reactor: EngineReactor) -> Iterator[Web]:
    it = Web(reactor)
    yield it
    it.client.close()


# HTTP/1.1


def test_answer_in_progress_announces_the_end(web: Web) -> None:
    web.send(GET)
    drained = web.drain()
    settle(web.reactor)
    assert not drained
    web.resource.answer()
    answer = web.received(drained)
    assert b"Connection: close\r\n" in answer
    assert answer.endswith(b"hello")
    assert drained == [Drained(finished=1, aborted=0)]


@pytest.mark.parametrize(
    ("sent", "rest"),
    [(GET[:5], GET[5:]), (GET[:20], GET[20:]), (POST, b"body"), (POST + b"b", b"ody")],
    ids=["line", "headers", "no body yet", "body"],
)
def test_request_that_has_arrived_in_part_is_answered(
    web: Web, sent: bytes, rest: bytes
) -> None:
    web.client.sendall(sent)
    channel = _channel(web)
    web.wait(lambda: channel.requests or channel._buffer)
    drained = web.drain(SHORT)
    for _ in range(4):
        # The connection is not idle, however often it is checked.
        _look(web)
    web.send(rest)
    web.resource.answer()
    answer = web.received(drained)
    assert b"Connection: close\r\n" in answer
    assert answer.endswith(b"hello")


def _channel(web: Web) -> Any:
    (connection,) = web.reactor.server_connections
    return channel_of([connection.protocol])


def _look(web: Web) -> None:
    """Wait until idle connections were checked again."""
    looks: list[object] = []
    web.reactor.callLater(SHORT, looks.append, None)
    web.wait(lambda: looks)


@pytest.mark.parametrize("answered", [False, True], ids=["new", "used"])
def test_idle_connection_is_closed(web: Web, answered: bool) -> None:
    if answered:
        web.send(GET)
        web.resource.answer()
        settle(web.reactor)
    assert b"Connection: close" not in web.received(web.drain(SHORT))


def test_request_on_an_idle_connection_is_answered(web: Web) -> None:
    web.send(GET)
    web.resource.answer(b"first")
    settle(web.reactor)
    drained = web.drain()
    web.send(GET)
    web.resource.answer(b"second")
    first, second = web.received(drained).split(b"first")
    assert b"Connection: close" not in first
    assert b"Connection: close\r\n" in second
    assert second.endswith(b"second")


def test_request_that_is_still_in_the_kernel_is_answered(web: Web) -> None:
    (connection,) = web.reactor.server_connections
    draining = DrainingHTTP1(_channel(web), connection)
    web.client.sendall(GET)
    # The reactor has not read the request yet.
    draining.close_if_idle()
    drained = web.drain()
    web.send(b"")
    web.resource.answer()
    assert b"Connection: close\r\n" in web.received(drained)


def test_request_after_an_answer_in_progress_is_answered(web: Web) -> None:
    """The first answer has said that the connection persists, so it must."""
    web.send(GET)
    request = web.resource.requests.pop()
    request.setHeader(b"Content-Length", b"5")
    request.write(b"fir")
    drained = web.drain(LONG)
    request.write(b"st")
    request.finish()
    settle(web.reactor)
    web.send(GET)
    web.resource.answer(b"second")
    first, second = web.received(drained).split(b"first")
    assert b"Connection: close" not in first
    assert b"Connection: close\r\n" in second


def test_idle_connection_after_an_answer_in_progress_is_closed(web: Web) -> None:
    web.send(GET)
    request = web.resource.requests.pop()
    request.setHeader(b"Content-Length", b"5")
    request.write(b"hel")
    drained = web.drain(SHORT)
    _look(web)
    request.write(b"lo")
    request.finish()
    assert web.received(drained).endswith(b"hello")


@pytest.mark.parametrize("when", ["before", "after"])
def test_pipelined_requests_are_all_answered(web: Web, when: str) -> None:
    """The last answer announces the end."""
    drained = web.drain() if when == "after" else []
    web.send(GET + POST + b"body" + GET)
    if when == "before":
        drained = web.drain()
    for body in (b"first", b"second", b"third"):
        web.wait(lambda: web.resource.requests)
        web.resource.answer(body)
    first, rest = web.received(drained).split(b"first")
    second, third = rest.split(b"second")
    assert b"Connection: close" not in first + second
    assert b"Connection: close\r\n" in third
    assert third.endswith(b"third")


def test_http_1_0(web: Web) -> None:
    web.send(b"GET / HTTP/1.0\r\n\r\n")
    drained = web.drain()
    web.resource.answer()
    assert web.received(drained).endswith(b"hello")


def test_upgrade_to_another_protocol(web: Web) -> None:
    drained = web.drain()
    web.send(GET.replace(b"\r\n\r\n", b"\r\nUpgrade: echo\r\n\r\n"))
    request = web.resource.requests.pop()
    request.setResponseCode(101)
    request.setHeader(b"Connection", b"Upgrade")
    request.write(b"")
    settle(web.reactor)
    answer = web.client.recv(1000)
    assert b"Connection: Upgrade\r\n" in answer
    assert b"Connection: close" not in answer
    request.loseConnection()
    web.wait(lambda: drained)


def test_the_access_log_stays_open_until_the_end(
    reactor: EngineReactor, tmp_path: Path
) -> None:
    log = tmp_path / "access.log"
    web = Web(reactor, logPath=str(log))
    web.send(GET)
    drained = web.drain()
    # Let the port close, and with it the factory.
    settle(reactor)
    web.resource.answer()
    web.received(drained)
    assert '"GET / HTTP/1.1" 200 5' in log.read_text()
    assert web.site.numPorts == 0


# TLS and HTTP/2


class Secure(Web):
    """A site over TLS, with a client in a thread."""

    def __init__(self, reactor: EngineReactor, folder: Path) -> None:
        self.files = make_certificate(folder)
        super().__init__(reactor)

    def listen(self) -> Any:
        certificate, key = self.files
        pem = certificate.read_bytes() + key.read_bytes()
        options = PrivateCertificate.loadPEM(pem).options()
        return self.reactor.listenSSL(0, self.site, options, interface="127.0.0.1")

    def shake_hands(self, protocol: str = "http/1.1") -> Any:
        """Make the handshake of the client, in its thread."""
        context = ssl.create_default_context(cafile=str(self.files[0]))
        context.set_alpn_protocols([protocol])
        return context.wrap_socket(self.client, server_hostname="127.0.0.1")

    def result(self, client: Client) -> Any:
        self.wait(lambda: not client.is_alive())
        return client.result


class Client(threading.Thread):
    """Runs a function in a thread."""

    result: Any = None

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.start()

    def run(self) -> None:
        self.result = self.function()


@pytest.fixture
def secure(reactor: EngineReactor, tmp_path: Path) -> Iterator[Secure]:
    it = Secure(reactor, tmp_path)
    yield it
    it.client.close()


def test_answer_over_tls(secure: Secure) -> None:
    def ask() -> bytes:
        client = secure.shake_hands()
        client.sendall(GET)
        return _read(client)

    client = Client(ask)
    secure.wait(lambda: secure.resource.requests)
    drained = secure.drain()
    secure.resource.answer()
    secure.wait(lambda: drained)
    answer = secure.result(client)
    assert b"Connection: close\r\n" in answer
    assert answer.endswith(b"hello")


def test_idle_connection_over_tls_is_closed(secure: Secure) -> None:
    """It is closed after its handshake; during the handshake it is not idle."""
    drained = secure.drain(SHORT)
    for _ in range(4):
        _look(secure)
    client = Client(lambda: _read(secure.shake_hands()))
    assert secure.result(client) == b""
    secure.wait(lambda: drained)


class HTTP2:
    """A client in a thread, which opens streams and records received frames."""

    def __init__(self, secure: Secure) -> None:
        self.client = secure.shake_hands("h2")
        self.frames: list[Any] = []
        # It only makes frames.  It receives none, so GOAWAY does not change its state.
        self._opened = h2.connection.H2Connection()
        self._opened.initiate_connection()
        self.client.sendall(self._opened.data_to_send())

    def open(self, stream: int) -> None:
        headers = [(":method", "GET"), (":path", "/"), (":scheme", "https")]
        headers.append((":authority", "example.org"))
        self._opened.send_headers(stream, headers, end_stream=True)
        self.client.sendall(self._opened.data_to_send())

    def read(self, until: Callable[[Any], bool] = lambda frame: False) -> Any:
        """Read frames until one fulfils a condition, or until the end."""
        while head := self._read(9):
            frame, length = Frame.parse_frame_header(memoryview(head))
            frame.parse_body(memoryview(self._read(length)))
            self.frames.append(frame)
            if until(frame):
                return
        self.client.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.client.recv(size - len(data))
            if not more:
                break
            data += more
        return data

    def bodies(self) -> list[bytes]:
        return [e.data for e in self.frames if isinstance(e, DataFrame) and e.data]

    def last_streams(self) -> list[int]:
        """Return the last stream in each GOAWAY, none of which has an error."""
        goaways = [each for each in self.frames if isinstance(each, GoAwayFrame)]
        assert [each.error_code for each in goaways] == [0] * len(goaways)
        return [each.last_stream_id for each in goaways]


def _is_goaway(frame: Any) -> bool:
    return isinstance(frame, GoAwayFrame)


def _ends_stream(frame: Any) -> bool:
    return "END_STREAM" in frame.flags


def test_http_2(secure: Secure) -> None:
    """
    An open stream is answered, and so is a stream that is opened after the first
    GOAWAY.  The second GOAWAY names the last stream.
    """

    def ask() -> HTTP2:
        client = HTTP2(secure)
        client.open(1)
        client.read(_is_goaway)
        client.open(3)
        client.read()
        return client

    client = Client(ask)
    secure.wait(lambda: secure.resource.requests)
    drained = secure.drain(SHORT)
    secure.wait(lambda: len(secure.resource.requests) == 2)
    for _ in range(4):
        _look(secure)
    secure.resource.answer(b"first")
    settle(secure.reactor)
    assert not drained
    secure.resource.answer(b"second")
    secure.wait(lambda: drained)
    it = secure.result(client)
    assert it.bodies() == [b"first", b"second"]
    assert it.last_streams() == [2**31 - 1, 3]
    assert _is_goaway(it.frames[-1])


def test_http_2_streams_on_their_way_are_answered(secure: Secure) -> None:
    """For them, the connection stays open for a while after the last answer."""

    def ask() -> HTTP2:
        client = HTTP2(secure)
        client.open(1)
        client.read(_ends_stream)
        client.open(3)
        client.read(_ends_stream)
        client.client.close()
        return client

    client = Client(ask)
    secure.wait(lambda: secure.resource.requests)
    drained = secure.drain(LONG)
    secure.resource.answer(b"first")
    secure.wait(lambda: secure.resource.requests)
    secure.resource.answer(b"second")
    secure.wait(lambda: drained)
    it = secure.result(client)
    assert it.bodies() == [b"first", b"second"]
    assert it.last_streams() == [2**31 - 1]


def test_idle_http_2_connection_is_closed(secure: Secure) -> None:
    def ask() -> HTTP2:
        client = HTTP2(secure)
        client.read()
        return client

    client = Client(ask)
    secure.wait(lambda: _is_http_2(secure))
    drained = secure.drain(SHORT)
    secure.wait(lambda: drained)
    assert secure.result(client).last_streams() == [2**31 - 1, 0]


def _is_http_2(secure: Secure) -> bool:
    (connection,) = secure.reactor.server_connections
    channel: Any = channel_of(protocols_of(connection))
    return hasattr(channel, "conn")


# Other servers


def test_coroutine_servers_stop(reactor: EngineReactor) -> None:
    """Their handlers have the grace to end."""

    async def handler(stream: Stream) -> None:
        await stream.write(b"hello\n")
        await stream.stopping.wait()
        await stream.write(b"bye\n")

    factory = CoroutineFactory(handler, reactor=reactor)
    client = _connected(reactor, factory)
    drained: list[Drained] = []
    drain(reactor, LONG).addCallback(drained.append)
    spin_with_timers(reactor, lambda: drained)
    assert _read(client) == b"hello\nbye\n"
    assert drained == [Drained(finished=1, aborted=0)]


def _connected(reactor: EngineReactor, factory: Any) -> socket.socket:
    """Listen with a factory; return a connected client."""
    client = connect(reactor.listenTCP(0, factory, interface="127.0.0.1"))
    before = len(reactor.server_connections)
    spin_with_timers(reactor, lambda: len(reactor.server_connections) > before)
    return client


def test_coroutine_handlers_are_cancelled_after_the_grace(
    reactor: EngineReactor, logged: list[Any]
) -> None:
    """The handlers can clean up when they are cancelled."""

    async def handler(stream: Stream) -> None:
        try:
            await sleep(LONG)
        except Cancelled:
            await sleep(SHORT)
            ended.append(stream.lost)
            raise

    ended: list[bool] = []
    client = _connected(reactor, CoroutineFactory(handler, reactor=reactor))
    drained: list[Drained] = []
    drain(reactor, 0).addCallback(drained.append)
    spin_with_timers(reactor, lambda: drained)
    # The connection was not aborted before that.
    assert ended == [False]
    assert drained == [Drained(finished=0, aborted=1)]
    client.close()


def test_connections_in_the_backlog_are_accepted(reactor: EngineReactor) -> None:
    """Closing the port without that would reset them."""

    async def shout(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line.upper())

    factory = CoroutineFactory(shout, reactor=reactor)
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port) for _ in range(3)]
    drained: list[Drained] = []
    drain(reactor, LONG).addCallback(drained.append)
    for client in clients:
        client.sendall(b"hello\n")
        client.shutdown(socket.SHUT_WR)
    spin_with_timers(reactor, lambda: drained)
    assert [_read(client) for client in clients] == [b"HELLO"] * 3
    assert drained == [Drained(finished=3, aborted=0)]


@pytest.mark.parametrize("first", ["service", "drain"])
def test_port_that_its_service_closes_too(
    reactor: EngineReactor, first: str, logged: list[Any]
) -> None:
    port = reactor.listenTCP(0, RecorderFactory(), interface="127.0.0.1")
    closed: list[object] = []
    stops = [
        lambda: port.stopListening().addCallback(closed.append),
        lambda: drain(reactor, LONG),
    ]
    for stop in stops if first == "service" else reversed(stops):
        stop()
    spin_with_timers(reactor, lambda: closed)
    settle(reactor)
    assert not port.connected
    assert [each for each in logged if "log_failure" in each] == []


@implementer(IDrainable)
class Polite(Recorder):
    """Sends a last message when it is drained."""

    def drain(self) -> None:
        transport: Any = self.transport
        transport.write(b"bye")
        transport.loseConnection()


@implementer(IDrainable)
class Faulty(Recorder):
    """Fails when it is drained."""

    def drain(self) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("wrap", [lambda factory: factory, WrappingFactory])
def test_drainable_protocol(reactor: EngineReactor, wrap: Any) -> None:
    client = _connected(reactor, wrap(RecorderFactory(Polite)))
    drained: list[Drained] = []
    drain(reactor, LONG).addCallback(drained.append)
    spin_with_timers(reactor, lambda: drained)
    assert _read(client) == b"bye"


def test_connections_are_not_checked_too_often(reactor: EngineReactor) -> None:
    """There is a pause between checks even with keep_alive=0."""
    client = _connected(reactor, RecorderFactory())
    drain(reactor, LONG, keep_alive=0)
    assert len(reactor.getDelayedCalls()) == 3
    pauses = [each.getTime() - reactor.seconds() for each in reactor.getDelayedCalls()]
    # The calls close the port, check again, and end the grace.
    assert sorted(pauses)[1] > 0.005
    client.close()
    spin_with_timers(reactor, lambda: not reactor.server_connections)


def test_drainable_protocol_that_fails(
    reactor: EngineReactor, logged: list[Any]
) -> None:
    faulty = _connected(reactor, RecorderFactory(Faulty))
    polite = _connected(reactor, RecorderFactory(Polite))
    drained: list[Drained] = []
    drain(reactor, 2 * SHORT, keep_alive=SHORT).addCallback(drained.append)
    spin_with_timers(reactor, lambda: drained)
    assert _read(polite) == b"bye"
    assert drained == [Drained(finished=1, aborted=1)]
    # Its failure is logged once, and not at each check.
    failures = [each["log_failure"] for each in logged if "log_failure" in each]
    assert [each.type for each in failures] == [ZeroDivisionError]
    faulty.close()


def test_drain_while_a_connection_is_lost(
    reactor: EngineReactor, logged: list[Any]
) -> None:
    class Last(Recorder):
        """Drains the reactor when its connection is lost."""

        def connectionLost(self, reason: Any = connectionDone) -> None:
            drain(reactor, LONG).addCallback(drained.append)

    drained: list[Drained] = []
    _connected(reactor, RecorderFactory(Last)).close()
    # The port is closed by a timer.
    spin_with_timers(reactor, lambda: drained and not reactor.getDelayedCalls())
    assert drained == [Drained(finished=1, aborted=0)]
    assert [each for each in logged if "log_failure" in each] == []


# The grace


def test_idle_http_connections_are_closed_within_a_short_grace(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have half of the grace to send a request."""
    # The test moves the clock, as a busy machine would be late for both times.
    now = web.reactor.seconds()
    monkeypatch.setattr(web.reactor, "seconds", lambda: now)
    drained: list[Drained] = []
    drain(web.reactor, 0.1).addCallback(drained.append)
    now += 0.06
    assert web.received(drained) == b""
    assert drained == [Drained(finished=1, aborted=0)]


def test_connections_after_the_grace_are_aborted_and_counted(
    reactor: EngineReactor, logged: list[Any]
) -> None:
    """Even paused connections, of any protocol."""
    factory = RecorderFactory()
    clients = [_connected(reactor, factory) for _ in range(3)]
    factory.connections[1].transport.pauseProducing()
    drained: list[Drained] = []
    drain(reactor, LONG).addCallback(drained.append)
    clients.pop().close()
    spin_with_timers(reactor, lambda: len(reactor.server_connections) == 2)
    assert not drained
    # A second call can shorten the grace, and waits for the same end.
    drain(reactor, SHORT).addCallback(drained.append)
    spin_with_timers(reactor, lambda: len(drained) == 2)
    assert drained == [Drained(finished=1, aborted=2)] * 2
    for client in clients:
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
    lines = [
        each["log_format"].format(**each)
        for each in logged
        if "grace" in (each.get("log_format") or "")
    ]
    assert lines == ["The grace is over, and connections were aborted: 2"]
    assert not reactor.getDelayedCalls()


def test_second_call_does_not_lengthen_the_grace(reactor: EngineReactor) -> None:
    client = _connected(reactor, RecorderFactory())
    drained: list[Drained] = []
    drain(reactor, SHORT).addCallback(drained.append)
    drain(reactor, LONG).addCallback(drained.append)
    spin_with_timers(reactor, lambda: drained)
    assert drained == [Drained(finished=0, aborted=1)] * 2
    client.close()


def test_client_connections_are_left_alone(reactor: EngineReactor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        factory = RecorderFactory()
        clients = ClientFactory()
        clients.buildProtocol = factory.buildProtocol  # type: ignore[method-assign]
        connector = reactor.connectTCP("127.0.0.1", server.getsockname()[1], clients)
        spin_with_timers(reactor, lambda: factory.connections)
        drained: list[Drained] = []
        drain(reactor, LONG).addCallback(drained.append)
        assert drained == [Drained(finished=0, aborted=0)]
        assert not factory.connections[0].lost
        connector.disconnect()
        spin_with_timers(reactor, lambda: factory.connections[0].lost)


def test_drain_again(reactor: EngineReactor) -> None:
    """Also, a port that is opened while draining is closed."""
    for _ in range(2):
        polite = _connected(reactor, RecorderFactory(Polite))
        silent = _connected(reactor, RecorderFactory())
        drained: list[Drained] = []
        drain(reactor, LONG, keep_alive=SHORT).addCallback(drained.append)
        late = reactor.listenTCP(0, RecorderFactory(), interface="127.0.0.1")
        spin_with_timers(reactor, lambda: late.disconnected)
        silent.close()
        spin_with_timers(reactor, lambda: drained)
        assert _read(polite) == b"bye"
        assert drained == [Drained(finished=2, aborted=0)]


def test_wrong_arguments(reactor: EngineReactor) -> None:
    other = SelectReactor()
    with pytest.raises(TypeError, match="--reactor=rtsig-auto"):
        drain(other, 1)
    dispose(cast(Any, other))
    with pytest.raises(ValueError, match="grace=-1"):
        drain(reactor, -1)
    with pytest.raises(ValueError, match="keep_alive=-1"):
        drain(reactor, 1, keep_alive=-1)


@pytest.mark.processes
def test_drain_at_the_shutdown_of_a_reactor() -> None:
    output = run_program(
        """
        import socket, threading
        from twisted.internet.protocol import Factory, Protocol
        from twisted_rtsig.workers.draining import drain
        install()
        from twisted.internet import reactor

        class Slow(Protocol):
            def dataReceived(self, data):
                reactor.callFromThread(reactor.stop)
                reactor.callLater(0.1, self.transport.write, b"done")
                reactor.callLater(0.1, self.transport.loseConnection)

        def ask(address):
            with socket.create_connection(address, timeout=20) as client:
                client.sendall(b"work")
                print(client.recv(10), client.recv(10))

        port = reactor.listenTCP(0, Factory.forProtocol(Slow), interface="127.0.0.1")
        reactor.addSystemEventTrigger("before", "shutdown", drain, reactor, 20)
        address = port.socket.getsockname()
        reactor.callWhenRunning(threading.Thread(target=ask, args=[address]).start)
        reactor.run()
        """,
        reactor_class=reactor_classes()[-1],
    )
    assert output == "b'done' b''\n"


# The connections that reactors list


@pytest.mark.parametrize("adopted", [False, True], ids=["accepted", "adopted"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("cls", reactor_classes(), ids=lambda each: each.__name__)
def test_reactors_list_their_server_connections(
    cls: Callable[[], EngineReactor], kind: str, adopted: bool, tmp_path: Path
) -> None:
    reactor = cls()
    factory = RecorderFactory()
    path = str(tmp_path / "socket")
    if adopted:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        client, server = socket.socketpair() if kind == "unix" else _tcp_pair()
        server.setblocking(False)
        reactor.adoptStreamConnection(server.fileno(), family, factory)
        server.close()
    elif kind == "unix":
        reactor.listenUNIX(path, factory)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
    else:
        client = connect(reactor.listenTCP(0, factory, interface="127.0.0.1"))
    spin_with_timers(reactor, lambda: factory.connections)
    (protocol,) = factory.connections
    assert list(reactor.server_connections) == [protocol.transport]
    protocol.transport.pauseProducing()
    assert list(reactor.server_connections) == [protocol.transport]
    protocol.transport.resumeProducing()
    client.close()
    spin_with_timers(reactor, lambda: protocol.lost)
    assert not reactor.server_connections
    dispose(reactor)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0]
