"""Workers that stop while requests are in progress."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.workers.support import DEADLINE, Twistd, is_running, write_tac

pytestmark = [pytest.mark.slow, pytest.mark.processes]

APPLICATION = """
import os, time
from twisted.application.service import Application, Service
from twisted.application.strports import service
from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

def wait():
    # Until the test creates this file.
    while not os.path.exists("go"):
        time.sleep(0.01)

class Page(Resource):
    isLeaf = True

    def render_GET(self, request):
        print("handling", os.getpid(), flush=True)
        deferToThread(wait).addCallback(self.answer, request)
        return NOT_DONE_YET

    def answer(self, result, request):
        request.write(b"%d %d" % (os.getpid(), stopped))
        request.finish()

stopped = False

class Other(Service):
    def stopService(self):
        global stopped
        stopped = True
        return super().stopService()

application = Application("waiting")
service("tcp:0:interface=127.0.0.1", Site(Page())).setServiceParent(application)
Other().setServiceParent(application)
"""


def test_requests_in_progress_are_answered(tmp_path: Path) -> None:
    tac = write_tac(tmp_path, APPLICATION)
    options = "--count", "1", "--grace", "1000", "-y", tac
    with Twistd(tmp_path, *options) as twistd:
        twistd.wait_until_ready(1)
        port = twistd.port()

        # A signal stops one worker.  Its successor starts before it has ended.
        first = _ask(port)
        (worker,) = map(int, twistd.wait_for(r"handling (\d+)"))
        os.kill(worker, signal.SIGTERM)
        twistd.wait_until_ready(2)
        assert is_running(worker)
        second = _ask(port)
        successor = int(twistd.wait_for(r"handling (\d+)", 2)[1])
        assert successor != worker

        # The supervisor stops the other one.
        twistd.send(signal.SIGTERM)
        twistd.wait_for("TCP Port .* Closed", 2)
        (tmp_path / "go").touch()
        for client, process in ((first, worker), (second, successor)):
            answer = _read(client)
            assert b"\r\nConnection: close\r\n" in answer
            # Its services were stopped before the answer.
            assert b"\r\n%d 1\r\n" % process in answer
        twistd.wait()
        assert "aborted" not in twistd.output
        assert not is_running(worker)


def test_requests_after_the_grace_are_aborted(tmp_path: Path) -> None:
    """They are counted in the log."""
    tac = write_tac(tmp_path, APPLICATION)
    options = "--count", "1", "--grace", "0.5", "-y", tac
    with Twistd(tmp_path, *options) as twistd:
        twistd.wait_until_ready(1)
        client = _ask(twistd.port())
        idle = socket.create_connection(("127.0.0.1", twistd.port()), DEADLINE)
        twistd.wait_for(r"handling (\d+)")
        twistd.send(signal.SIGTERM)
        twistd.wait_for("The grace is over, and connections were aborted: 1")
        for each in (client, idle):
            with contextlib.suppress(ConnectionResetError):
                assert _read(each) == b""
        # Let its thread end.
        (tmp_path / "go").touch()
        twistd.wait()


def _ask(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), DEADLINE)
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def _read(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()
