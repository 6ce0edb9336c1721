"""
Connections that a TCP port accepts: the attributes of their transports, and errors of
accepting.

Every test runs on one of Twisted's own reactors as well: its behaviour is the right
one.
"""

from __future__ import annotations

import errno
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet import tcp
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionDone
from twisted.internet.selectreactor import SelectReactor
from twisted.python import log
from twisted.python.failure import Failure

from tests.support import (
    DEADLINE,
    Recorder,
    RecorderFactory,
    dispose,
    reactor_classes,
    spin_with_timers,
)
from twisted_rtsig.engine.reactor import EngineReactor

REACTORS = [*reactor_classes(), SelectReactor]


@pytest.fixture(params=REACTORS, ids=lambda each: each.__name__)
def reactor(request: Any) -> Iterator[Any]:
    reactor = request.param()
    yield reactor
    dispose(reactor)


def listen(reactor: Any, factory: Any, interface: str = "127.0.0.1") -> Any:
    try:
        return reactor.listenTCP(0, factory, interface=interface)
    except Exception as error:
        if interface == "::1":
            pytest.skip(f"there is no IPv6: {error}")
        raise


def connect(port: Any) -> socket.socket:
    host = port.getHost()
    return socket.create_connection((host.host, host.port), DEADLINE)


@pytest.mark.parametrize(
    ("interface", "cls"), [("127.0.0.1", IPv4Address), ("::1", IPv6Address)]
)
def test_the_attributes_of_an_accepted_transport(
    reactor: Any, interface: str, cls: type[Any]
) -> None:
    factory = RecorderFactory()
    port = listen(reactor, factory, interface)
    number = port.getHost().port
    built: list[Any] = []
    build = factory.buildProtocol

    def build_and_record(address: Any) -> Recorder:
        built.append(address)
        return build(address)

    factory.buildProtocol = build_and_record  # type: ignore[method-assign,assignment]
    with connect(port) as first, connect(port) as second:
        spin_with_timers(reactor, lambda: len(factory.connections) == 2)
        peers = [each.getsockname() for each in (first, second)]
        transports = [each.transport for each in factory.connections]
        assert [each.getPeer() for each in transports] == built
        assert [(each.host, each.port) for each in built] == [p[:2] for p in peers]
        assert [each.getHost() for each in transports] == [port.getHost()] * 2
        assert {type(each) for each in built} == {cls}
        for each, transport in enumerate(transports):
            assert isinstance(transport, tcp.Server)
            assert transport.sessionno == each
            assert transport.hostname == interface
            assert transport.server is port
            assert transport.client[:2] == peers[each][:2]
            assert transport.logstr == f"Recorder,{each},{interface}"
            assert transport.logPrefix() == transport.logstr
            assert repr(transport) == f"<Recorder #{each} on {number}>"
            assert transport.repstr == repr(transport)
            assert not transport.getHandle().getblocking()
            assert not transport.getHandle().get_inheritable()
        # The transports keep their repr after the port has closed.
        port.stopListening()
        spin_with_timers(reactor, lambda: not port.connected)
    spin_with_timers(reactor, lambda: all(each.lost for each in factory.connections))
    assert [repr(each) for each in transports] == [
        f"<Recorder #{each} on {number}>" for each in range(2)
    ]
    transports[0].repstr = "changed"
    assert repr(transports[0]) == "changed"


def test_a_connection_is_lost_once(reactor: Any) -> None:
    calls = []

    class Producer:
        def resumeProducing(self) -> None: ...

        def pauseProducing(self) -> None: ...

        def stopProducing(self) -> None:
            calls.append("stop")

    factory = RecorderFactory()
    port = listen(reactor, factory)
    client = connect(port)
    spin_with_timers(reactor, lambda: factory.connections)
    (protocol,) = factory.connections
    transport = protocol.transport
    transport.registerProducer(Producer(), True)
    client.close()
    spin_with_timers(reactor, lambda: protocol.lost)
    assert [each.type for each in protocol.lost] == [ConnectionDone]
    transport.connectionLost(Failure(ConnectionDone()))
    assert len(protocol.lost) == 1
    assert calls == ["stop"]
    assert not transport.connected
    assert transport.disconnected
    assert not hasattr(transport, "socket")
    assert not hasattr(transport, "protocol")


def test_a_factory_refuses_or_fails(reactor: Any) -> None:
    """
    The other connections are served, and no session number is left out.  This
    package's reactors close the connection for which the factory failed.
    """
    factory = RecorderFactory()
    build = factory.buildProtocol
    answers: list[Callable[[Any], Any]] = [lambda address: None, lambda address: 1 / 0]

    def build_or_not(address: Any) -> Any:
        return answers.pop(0)(address) if answers else build(address)

    factory.buildProtocol = build_or_not  # type: ignore[method-assign,assignment]
    port = listen(reactor, factory)
    logged: list[Any] = []
    log.addObserver(logged.append)
    clients = [connect(port) for _ in range(4)]
    try:
        spin_with_timers(reactor, lambda: len(factory.connections) == 2)
        for client in clients[: 2 if isinstance(reactor, EngineReactor) else 1]:
            assert client.recv(1) == b""
    finally:
        log.removeObserver(logged.append)
        for client in clients:
            client.close()
    assert [each.transport.sessionno for each in factory.connections] == [0, 1]
    (failure,) = (each["failure"] for each in logged if each["isError"])
    assert failure.check(ZeroDivisionError)
    # With Twisted's reactors it refers to the socket, which nothing else closes, and
    # the log may keep it.
    for frame, _ in traceback.walk_tb(failure.getTracebackObject()):
        if "skt" in frame.f_locals:
            frame.f_locals["skt"].close()


def test_connections_are_accepted_after_accept_has_failed(
    reactor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twisted's own code handles the error."""
    factory = RecorderFactory()
    port = listen(reactor, factory)
    accept = socket.socket._accept  # type: ignore[attr-defined]
    fails = [OSError(errno.ECONNABORTED, "of the test")]

    def accept_or_fail(handle: Any) -> Any:
        if fails:
            raise fails.pop()
        return accept(handle)

    monkeypatch.setattr(socket.socket, "_accept", accept_or_fail, raising=False)
    clients = [connect(port) for _ in range(2)]
    spin_with_timers(reactor, lambda: len(factory.connections) == 2)
    assert not fails
    for client in clients:
        client.close()


def test_a_port_accepts_as_many_at_once_as_the_last_time(reactor: Any) -> None:
    """This saves the last accept(2), which would find no connection."""
    factory = RecorderFactory()
    port = listen(reactor, factory)
    served = 0
    for many in (3, 1):
        clients = [connect(port) for _ in range(many)]
        port.doRead()
        served += many
        assert len(factory.connections) == served
        assert port.numberAccepts == many
        for client in clients:
            client.close()
    clients = [connect(port) for _ in range(2)]
    port.doRead()
    assert len(factory.connections) == served + 1
    assert port.numberAccepts == 21
    for client in clients:
        client.close()
    spin_with_timers(reactor, lambda: len(factory.connections) == served + 2)
    spin_with_timers(reactor, lambda: all(each.lost for each in factory.connections))
