"""
Every example of docs/ runs, and prints what its page says.

The text around a block of code tells what kind of block it is:

- After a comment with the name of a file, a block is a quotation: whole lines of that
  file, which has tests of its own.
- After the comment ``program``, a block runs in a process of its own, which must
  succeed.
- Any other block of Python runs.  The blocks of one section (of the second level) run
  one after the other in one namespace, and in a task, so that they may await.
- A block of text with C: and S: is a conversation.  The test has it with each function
  that takes a stream and was defined in the section since the last conversation.  The
  client sends the lines after C:, and closes its side after the last of them.  The
  server must send the lines after S:, and nothing else, and close.
- Any other block of text is the output since the last such block.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import io
import os
import re
import socket
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from twisted.internet.process import reapAllProcesses
from twisted.internet.task import LoopingCall

from tests.coro.support import failures, run
from tests.coro.test_examples import (
    Client,
    converse_in_chat,
    flood_chat,
    meanwhile,
    serving,
    time_out_in_chat,
)
from tests.coro.test_examples import reactor as reactor
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig import coro, files, workers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# tests/test_first_server.py runs first-server.md, in a shell.
PAGES = sorted(set(DOCS.glob("*.md")) - {DOCS / "first-server.md"})
README = ROOT / "README.md"
# Methods of streams that protocols, transports and watchdogs call.
NOT_FOR_HANDLERS = [
    *("feed", "feed_eof", "finish_output", "lose", "lose_output"),
    *("limit_handshake", "secure"),
    *("pauseProducing", "resumeProducing", "stopProducing"),
    *("forget", "unfinished_read", "waits_for"),
    *("activity", "full", "resumed", "signs", "timed_out", "time_out"),
    *("waits_for_first_byte", "written"),
]
# Classes of objects that tasks share; and methods of these that operations and select
# call.
SHARED = [
    *(coro.Channel, coro.Event, coro.Semaphore, coro.Lock, coro.Condition),
    *(coro.ChannelSender, coro.ChannelReceiver, coro.CapacityLimiter),
    coro.Deadline,
]
NOT_FOR_TASKS = ["forget", "waits_for", "poll", "watch", "unwatch"]
PROGRAM = "program"
CHAT = "The chat, with coroutines and with callbacks"


class Block(NamedTuple):
    """
    A block of code in a page.

    :ivar quoted: the comment before it: the name of a file, ``program``, or None.
    :ivar line: the line of the page where the block begins.
    """

    page: Path
    section: str
    quoted: str | None
    language: str
    code: str
    line: int


BLOCK = re.compile(
    r"(?:^<!-- (?P<quoted>\S+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def _blocks(page: Path) -> list[Block]:
    text = page.read_text()
    headings = [
        (each.start(), each[1]) for each in re.finditer(r"^##? (.*)$", text, re.M)
    ]
    blocks = []
    for each in BLOCK.finditer(text):
        section = [title for start, title in headings if start < each.start()][-1]
        line = text.count("\n", 0, each.start("code"))
        blocks.append(
            Block(page, section, each["quoted"], each["language"], each["code"], line)
        )
    return blocks


def run_program(block: Block) -> str:
    """Run a program; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


BLOCKS = [block for page in PAGES for block in _blocks(page)]
SECTIONS = list(dict.fromkeys((each.page, each.section) for each in BLOCKS))


class Section:
    """Runs the blocks of a section, one after the other."""

    def __init__(self, reactor: Any, page: Path, title: str) -> None:
        self.reactor = reactor
        where = page, title
        self.blocks = [each for each in BLOCKS if (each.page, each.section) == where]
        self.namespace: dict[str, Any] = {
            "__name__": "page",
            "__builtins__": builtins,
        }
        self.printed = io.StringIO()
        self.handlers: list[Any] = []

    def run(self) -> None:
        for block in self.blocks:
            if block.quoted == PROGRAM:
                self.printed.write(run_program(block))
                continue
            if block.quoted is not None:
                continue
            if block.language == "python":
                self.run_code(block)
            elif re.match("[CS]: ", block.code):
                assert self.handlers, "no handler was started"
                for handler in self.handlers:
                    self.converse(handler, block.code)
                self.handlers.clear()
            else:
                assert self.printed.getvalue() == block.code
                self.printed.seek(0)
                self.printed.truncate()
        assert self.printed.getvalue() == "", "the page does not say what is printed"

    def run_code(self, block: Block) -> None:
        before = dict(self.namespace)
        compiled = compile(
            # Let tracebacks show the line numbers of the page.
            "\n" * block.line + block.code,
            str(block.page),
            "exec",
            ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )

        async def module() -> None:
            result = types.FunctionType(compiled, self.namespace)()
            if inspect.iscoroutine(result):
                await result

        with contextlib.redirect_stdout(self.printed):
            run(self.reactor, module)
        self.handlers += [
            value
            for name, value in self.namespace.items()
            if inspect.isfunction(value)
            and value is not before.get(name)
            and value.__module__ == "page"
            and list(inspect.signature(value).parameters) == ["stream"]
        ]

    def converse(self, handler: Any, conversation: str) -> None:
        port = serving(self.reactor, handler)
        turns = [line.split(": ", 1) for line in conversation.splitlines()]

        def client() -> list[str]:
            said = []
            with Client(port) as connection:
                for number, (who, text) in enumerate(turns):
                    if all(who == "S" for who, _ in turns[number:]):
                        connection.socket.shutdown(socket.SHUT_WR)
                        break
                    if who == "C":
                        connection.send(f"{text}\r\n".encode())
                    else:
                        said.append(connection.line().decode().rstrip("\n"))
                return said + connection.file.read().decode().splitlines()

        expected = [text for who, text in turns if who == "S"]
        assert meanwhile(self.reactor, client) == expected


@pytest.mark.parametrize(
    ("page", "title"),
    SECTIONS,
    ids=[f"{page.stem}, {title}" for page, title in SECTIONS],
)
def test_the_examples_of_a_page_run(
    reactor: Any,
    page: Path,
    title: str,
    logged: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ON_PYPY and title == "Forgotten awaits":
        pytest.skip("PyPy warns some time later")
    monkeypatch.chdir(tmp_path)
    # This reactor is iterated and does not run, so it gets no SIGCHLD: reap children.
    LoopingCall(reapAllProcesses).start(0.01)
    Section(reactor, page, title).run()
    assert failures(logged) == []


@pytest.mark.parametrize(
    "block",
    [
        each
        for each in [*BLOCKS, *_blocks(README)]
        if each.quoted not in (None, PROGRAM)
    ],
    ids=lambda each: f"{each.quoted}, line {each.line}",
)
def test_quotations_are_up_to_date(block: Block) -> None:
    assert block.quoted is not None
    assert f"\n{block.code}" in "\n" + (ROOT / block.quoted).read_text()
    # A quotation must not begin in the middle of a function or class.
    assert not textwrap.dedent(block.code).startswith(" ")


@pytest.mark.parametrize(
    "conversation", [converse_in_chat, flood_chat, time_out_in_chat]
)
def test_the_chat_with_callbacks(
    reactor: Any, conversation: Callable[[int], None], logged: list[Any]
) -> None:
    section = Section(reactor, DOCS / "coroutines.md", CHAT)
    section.run()
    if conversation is time_out_in_chat:
        section.namespace["SECONDS_FOR_A_NAME"] = 0.05
    factory = section.namespace["ChatFactory"]()
    port = reactor.listenTCP(0, factory, interface="127.0.0.1").getHost().port
    meanwhile(reactor, conversation, port)
    assert failures(logged) == []


def test_names_in_the_pages_exist() -> None:
    page = (DOCS / "coroutines.md").read_text()
    for name, value in vars(coro.Stream).items():
        documented = inspect.isfunction(value) or isinstance(value, property)
        if documented and not name.startswith("_") and name not in NOT_FOR_HANDLERS:
            assert re.search(rf"\b{name}\b", page), name
    options = inspect.signature(coro.CoroutineFactory.__init__).parameters
    for option in {*options} - {"self", "handler"}:
        assert f"| `{option}` |" in page, option
    text = "".join(each.read_text() for each in PAGES)
    for name in (*coro.__all__, *files.__all__, *workers.__all__):
        assert re.search(rf"\b{name}\b", text), name
    page = (DOCS / "channels.md").read_text()
    for shared in SHARED:
        for name in vars(shared):
            if not name.startswith("_") and name not in NOT_FOR_TASKS:
                assert re.search(rf"\b{name}\b", page), name
    page = (DOCS / "files.md").read_text()
    for name in (*vars(files.AsyncFile), *vars(files.AsyncTextFile)):
        if not name.startswith("_") and name not in NOT_FOR_TASKS:
            assert re.search(rf"\b{name}\b", page), name
