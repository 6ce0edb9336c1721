"""
The tables of docs/coroutines.md that compare names: each name exists, here and in trio,
anyio and asyncio, as far as these are installed.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ON_PYPY

PAGE = Path(__file__).parents[2] / "docs" / "coroutines.md"
LIBRARIES = ["here", "trio", "anyio", "asyncio"]
HEADER = f"| {' | '.join(LIBRARIES)} |"

# Where a name is looked for: modules, and classes if it is that of a method.
PLACES = {
    "here": [
        *("twisted_rtsig", "twisted_rtsig.coro", "twisted_rtsig.files", "subprocess"),
        *("twisted_rtsig.coro.Stream", "twisted_rtsig.coro.Channel"),
        *("twisted_rtsig.coro.ChannelSender", "twisted_rtsig.coro.Instrument"),
    ],
    "trio": ["trio", "trio.MemorySendChannel", "trio.abc.Instrument"],
    "anyio": [
        # The names of anyio.from_thread are deprecated in anyio.abc.
        *("anyio", "anyio.from_thread", "anyio.abc", "anyio.streams.buffered"),
        *("anyio.streams.tls", "anyio.streams.text", "anyio.streams.stapled"),
        "anyio.streams.memory.MemoryObjectSendStream",
    ],
    "asyncio": ["asyncio", "asyncio.subprocess"],
}
# What the name of a variable stands for.
VARIABLES = {
    "here": {
        "group": "coro.TaskGroup",
        "limit": "coro.timeout",
        "stream": "coro.Stream",
        "task": "coro.Task",
        "task_status": "coro.TaskStatus",
        "twisted_rtsig": "",
    },
    "trio": {
        "nursery": "Nursery",
        "nursery.cancel_scope": "CancelScope",
        "scope": "CancelScope",
        "task_status": "TaskStatus",
    },
    "anyio": {
        "scope": "CancelScope",
        "task_group": "abc.TaskGroup",
        "task_status": "abc.TaskStatus",
    },
    "asyncio": {
        "loop": "BaseEventLoop",
        "task": "Task",
        "timeout": "Timeout",
    },
}


def names_of(library: str) -> Iterator[str]:
    """The names in a column, each with the class or module that it follows."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line != HEADER:
            continue
        next(lines)
        while (row := next(lines)).startswith("|"):
            cells = [each.strip() for each in row.strip("|").split(" | ")]
            assert len(cells) == len(LIBRARIES), row
            cell = cells[LIBRARIES.index(library)]
            if cell.startswith("the same"):
                since = cell.removeprefix("the same")
                cell = re.sub("(`[^`]+`)", rf"\1{since}", cells[0])
            owner = ""
            for span, major, minor in re.findall(
                r"`([^`]+)`(?:, from Python (\d+)\.(\d+) on)?", cell
            ):
                name = span.partition("(")[0]
                if name.startswith("."):
                    name = owner + name
                owner = name.rpartition(".")[0]
                if not major or sys.version_info >= (int(major), int(minor)):
                    yield name


def found(path: str) -> Any:
    """What a dotted path leads to; for an attribute of instances, its name."""
    parts = path.strip(".").split(".")
    value: Any = importlib.import_module(parts.pop(0))
    for part in parts:
        if isinstance(value, types.ModuleType) and not hasattr(value, part):
            value = importlib.import_module(f"{value.__name__}.{part}")
        elif hasattr(value, part):
            value = getattr(value, part)
        elif inspect.isclass(value) and re.search(
            rf"\bself\.{part}\b|\b{part}: |[\"']{part}[\"']", source_of(value)
        ):
            value = part
        else:
            raise AttributeError(path)
    return value


def source_of(cls: type) -> str:
    """The files in which the methods of a class are."""
    files = {
        method.__code__.co_filename
        for each in cls.__mro__
        for method in vars(each).values()
        if inspect.isfunction(method)
    }
    return "".join(Path(each).read_text("utf-8") for each in files if each[0] != "<")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_names_exist(library: str) -> None:
    if library == "asyncio" and sys.version_info < (3, 11):
        pytest.skip("the page names much that came with Python 3.11")
    if library == "asyncio" and ON_PYPY:
        pytest.skip("some attributes are those of CPython's classes in C")
    if library != "here":
        pytest.importorskip(library)
    root = "twisted_rtsig" if library == "here" else library
    missing = []
    names = list(names_of(library))
    for name in names:
        variable, _, attribute = name.rpartition(".")
        if variable in VARIABLES[library]:
            place = VARIABLES[library][variable]
            paths = [f"{root}.{place}.{attribute}".replace("..", ".")]
        else:
            paths = [f"{place}.{name}" for place in PLACES[library]]
        for path in paths:
            try:
                found(path)
            except (ImportError, AttributeError):
                continue
            break
        else:
            missing.append(name)
    assert missing == []
    assert len(names) > 30
