"""``rtsig-auto`` chooses the reactor of the system.  A program runs on each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from twisted.internet import main
from twisted.logger import ILogObserver, globalLogPublisher

import twisted_rtsig
from tests import libkqueue
from twisted_rtsig import autoreactor
from twisted_rtsig.notifiers import UnsupportedReactorError

CHECKOUT = Path(__file__).parents[1]
ECHO = CHECKOUT / "examples" / "echo.py"

HERE = {"linux": "EdgeEPollReactor", "win32": "CompletionPortReactor"}

needs_a_reactor = pytest.mark.skipif(
    sys.platform not in HERE, reason="for the systems that these tests know"
)


# The arguments of the interpreter before the program, by the chosen reactor.
SYSTEMS: dict[str, tuple[str, ...]] = {}
if sys.platform in HERE:
    SYSTEMS[HERE[sys.platform]] = ()
# If libkqueue is missing, test_kqueue.py says so when it skips.
if sys.platform == "linux" and libkqueue.path() is not None:
    AS_IF_IT_WERE_BSD = """if 1:
        import runpy, sys
        from twisted_rtsig import autoreactor
        autoreactor._REACTORS["linux"] = ("tests.libkqueue", "KQueueReactor")
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    SYSTEMS["KQueueReactor"] = ("-c", AS_IF_IT_WERE_BSD)


@needs_a_reactor
@pytest.mark.parametrize("name", SYSTEMS)
def test_an_example_runs_on_any_system(name: str) -> None:
    with subprocess.Popen(
        [sys.executable, *SYSTEMS[name], str(ECHO), "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as server:
        try:
            assert server.stdout is not None
            reactor, port = server.stdout.readline().split()
            assert reactor == name
            with socket.create_connection(("127.0.0.1", int(port)), 20) as client:
                for turn in range(3):
                    client.sendall(b"%d" % turn)
                    assert client.recv(10) == b"%d" % turn
                client.shutdown(socket.SHUT_WR)
                assert client.recv(10) == b""
        finally:
            server.kill()


@needs_a_reactor
def test_install_names_the_reactor_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    made = object()
    installed: list[object] = []
    monkeypatch.setattr(autoreactor, "make_reactor", lambda: made)
    monkeypatch.setattr(autoreactor, "installReactor", installed.append)
    events: list[object] = []

    def record(event: dict[str, object]) -> None:
        events.append(event.get("name"))

    observe = cast(ILogObserver, record)
    globalLogPublisher.addObserver(observe)
    try:
        twisted_rtsig.install()
    finally:
        globalLogPublisher.removeObserver(observe)
    assert installed == [made]
    assert events == ["object"]


@pytest.mark.parametrize(
    ("platform", "module", "name"),
    [
        ("linux", "epollreactor", "EdgeEPollReactor"),
        ("win32", "iocpreactor", "CompletionPortReactor"),
        ("darwin", "kqreactor", "KQueueReactor"),
        ("freebsd14", "kqreactor", "KQueueReactor"),
    ],
)
def test_the_reactor_of_each_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, module: str, name: str
) -> None:
    made = object()
    module = f"twisted_rtsig.{module}"
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: lambda: made}))
    assert autoreactor.make_reactor() is made


def test_a_system_without_a_reactor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    monkeypatch.setattr(main, "installReactor", pytest.fail)
    with pytest.raises(UnsupportedReactorError, match="sunos5; use --reactor=poll"):
        twisted_rtsig.install()


def test_no_other_reactor_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reactor of the system cannot run, its error is raised."""

    def refuse() -> None:
        raise UnsupportedReactorError("no descriptors are left")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(
        sys.modules,
        "twisted_rtsig.epollreactor",
        SimpleNamespace(EdgeEPollReactor=refuse),
    )
    with pytest.raises(UnsupportedReactorError, match="no descriptors are left"):
        twisted_rtsig.install()
