"""
A server for the overload test: it sends every line back, under a queue of
realtime signals that is far too short, and keeps a record of each connection.

It prints the numbers of two ports, one for the lines and one for control, and
then its log.
Whoever connects to the latter and sends a number gets all records as JSON when
so many connections have come and gone, or after a while in any case.  Then the
server stops.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from typing import Any, TypedDict

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import implementer

QUEUE = 16
"""How many signals may be queued; more than that would come in each burst."""

PATIENCE = 30
"""Seconds after which the report is sent though connections are missing."""


class Record(TypedDict):
    """One connection, as the server has seen it."""

    name: str
    received: int
    sha256: str
    answered: int
    lost: int
    why: str


class Report(TypedDict):
    """What the server tells in the end."""

    records: list[Record]
    most_at_once: int
    statistics: dict[str, int]


@implementer(IHalfCloseableProtocol)
class Echo(Protocol):
    """
    Sends whole lines back; the first one is the name of the connection.
    It goes on to answer a client that has finished to send.
    """

    transport: Any

    def __init__(self, service: Service) -> None:
        self.service = service
        self.hash = hashlib.sha256()
        self.first = b""
        self.rest = b""
        self.received = 0
        self.answered = 0
        self.lost = 0
        self.why = ""

    def connectionMade(self) -> None:
        self.service.begun(self)

    def dataReceived(self, data: bytes) -> None:
        self.received += len(data)
        self.hash.update(data)
        lines, newline, self.rest = (self.rest + data).rpartition(b"\n")
        if newline:
            self.first = self.first or lines.partition(b"\n")[0]
            self.answered += len(lines) + 1
            self.transport.write(lines + newline)

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        pass

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost += 1
        self.why = type(reason.value).__name__
        self.service.ended()

    def record(self) -> Record:
        return {
            "name": self.first.decode(),
            "received": self.received,
            "sha256": self.hash.hexdigest(),
            "answered": self.answered,
            "lost": self.lost,
            "why": self.why,
        }


class Service(Factory):
    """All connections that ever were."""

    noisy = False

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.connections: list[Echo] = []
        self.open = 0
        self.most_at_once = 0
        self.expected = 0
        self.asked_by: Control | None = None

    def buildProtocol(self, addr: Any) -> Echo:
        return Echo(self)

    def begun(self, echo: Echo) -> None:
        self.connections.append(echo)
        self.open += 1
        self.most_at_once = max(self.most_at_once, self.open)

    def ended(self) -> None:
        self.open -= 1
        self.report_when_done()

    def report_when_done(self) -> None:
        if not self.open and len(self.connections) == self.expected:
            self.report()

    def report(self) -> None:
        if self.asked_by is not None:
            report: Report = {
                "records": [each.record() for each in self.connections],
                "most_at_once": self.most_at_once,
                "statistics": dict(self.reactor.statistics()),
            }
            self.asked_by.transport.write(json.dumps(report).encode())
            self.asked_by.transport.loseConnection()
            self.asked_by = None


class Control(LineOnlyReceiver):
    """The connection by which the report is asked for."""

    transport: Any
    delimiter = b"\n"

    def __init__(self, service: Service) -> None:
        self.service = service

    def lineReceived(self, line: bytes) -> None:
        self.service.expected = int(line)
        self.service.asked_by = self
        self.service.reactor.callLater(PATIENCE, self.service.report)
        self.service.report_when_done()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.service.reactor.stop()


class ControlFactory(Factory):
    noisy = False

    def __init__(self, service: Service) -> None:
        self.service = service

    def buildProtocol(self, addr: Any) -> Control:
        return Control(self.service)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (QUEUE, QUEUE))
    from twisted_rtsig import rtsigreactor

    rtsigreactor.install()
    from twisted.internet import reactor

    running: Any = reactor
    service = Service(running)
    for factory in (service, ControlFactory(service)):
        port = running.listenTCP(0, factory, backlog=1024, interface="127.0.0.1")
        print(port.getHost().port, flush=True)
    log.startLogging(sys.stdout, setStdout=False)
    running.run()


if __name__ == "__main__":
    main()
