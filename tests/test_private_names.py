"""
The names and functions of Twisted that engine/private_names.py lists.  The installed
Twisted still has them.  The text of the functions is the same as when it was last
compared with the code that mirrors them.  No name is missing from the list.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.private_names import (
    PACKAGE,
    RECORD,
    Record,
    Release,
    defines,
    digest,
    files_of_the_package,
    in_manifest,
    installed,
    leaned_on,
    main,
    of_asyncio,
    parsed,
)
from twisted_rtsig.engine.private_names import MIRRORED, NAMES, OF_ASYNCIO

CONNECTION = "twisted.internet.tcp.Connection"
DO_READ = f"{CONNECTION}.doRead"

TCP = '''
class Connection:
    """Receives data."""

    if True:
        logstr: str = "Uninitialized"

    def __init__(self, protocol):
        self.protocol: object = protocol
        self.open = getattr(protocol, "_opened", False)

    def doRead(self, limit: int = 8) -> bytes:
        """Receive."""
        data: bytes = self.socket.recv(limit)
        return data
'''


@pytest.fixture(autouse=True, scope="module")
def _forget_the_sources() -> Iterator[None]:
    """With them, each garbage collection would take a third of a second longer."""
    yield
    parsed.cache_clear()


MakeRelease = Callable[[str, str], Release]


@pytest.fixture
def release(tmp_path: Path) -> MakeRelease:
    """Makes releases of a Twisted that consists of ``tcp.py``."""

    def make(version: str, text: str) -> Release:
        folder = tmp_path / version
        (folder / "internet").mkdir(parents=True)
        (folder / "internet" / "tcp.py").write_text(text)
        return Release(version, folder)

    return make


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A copy of the record, which a test can change."""
    return Record(Path(shutil.copy(RECORD, tmp_path)))


# Names


def test_twisted_has_the_names() -> None:
    version = installed().version
    gone = [
        f"Twisted {version} has no {owner}.{name} any more"
        for owner, names in NAMES.items()
        for name in names
        if not defines(installed(), owner, name)
    ]
    assert not gone


def test_a_name_that_is_gone_is_noticed(release: MakeRelease) -> None:
    before = release("99.1.0", TCP)
    after = release("99.2.0", TCP.replace("Connection", "Stream"))
    for name in ("logstr", "protocol", "_opened", "doRead"):
        assert defines(before, CONNECTION, name)
        assert not defines(after, CONNECTION, name)
    # These names are used there, but not defined.
    assert not defines(before, CONNECTION, "socket")
    assert not defines(before, "twisted.internet.udp.Port", "socket")


def test_every_name_that_the_package_uses_is_listed() -> None:
    missing = {
        name: place
        for name, place in leaned_on(files_of_the_package()).items()
        if name not in in_manifest() | of_asyncio()
    }
    assert not missing


def test_every_name_that_is_listed_is_used() -> None:
    unused = in_manifest() - leaned_on(files_of_the_package()).keys()
    assert not unused
    text = "".join(ast.unparse(each) for each in files_of_the_package().values())
    assert not {name for name in of_asyncio() if not re.search(rf"\b{name}\b", text)}


@pytest.mark.skipif(sys.platform == "win32", reason="asyncio has other loops there")
@pytest.mark.parametrize("owner", OF_ASYNCIO)
def test_asyncio_has_the_names(owner: str) -> None:
    try:
        found = pkgutil.resolve_name(owner)
    except AttributeError:
        # Recent Pythons have no child watchers.
        assert owner.endswith("ChildWatcher")
        return
    text = inspect.getsource(found)
    gone = [
        name
        for name in OF_ASYNCIO[owner]
        if not hasattr(found, name) and f"self.{name} = " not in text
    ]
    assert not gone


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def peek(port): return port._preexistingSocket", "_preexistingSocket"),
        ("def peek(port): return getattr(port, '_type')", "_type"),
        ("from twisted.internet.tcp import _accept", "_accept"),
        ("from twisted.internet.posixbase import processEnabled", "processEnabled"),
        # A class of this package overrides, sets or reads a name.
        (
            "class StreamTransport:\n def _isSendBufferFull(self): ...",
            "_isSendBufferFull",
        ),
        ("class StreamTransport:\n _aborting = True", "_aborting"),
        ("class StreamTransport:\n _shouldShutdown = 0", "_shouldShutdown"),
        ("class StreamTransport:\n def go(self): self._aborting = 1", "_aborting"),
        ("class StreamTransport:\n def go(self): super()._aborting", "_aborting"),
        ("class UNIXTransport:\n def go(self): self.realAddress", "realAddress"),
        ("def go(stream): return stream.realAddress", "realAddress"),
        # The package does not read this name, so Twisted must do so.
        ("class EngineReactor:\n _hook = True", "_hook"),
    ],
)
def test_a_use_is_noticed(source: str, name: str) -> None:
    assert name not in in_manifest()
    assert leaned_on({"x.py": ast.parse(source)}).keys() == {name}


@pytest.mark.parametrize(
    "source",
    [
        "class Own:\n def __init__(self): self._x = 0; print(self._x)",
        "class StreamTransport:\n def go(self): self._x = 0; return self._x",
        "class StreamTransport:\n def __init__(self): super().__init__()",
        # An interface has the name, or subclasses may call it.
        "class StreamTransport:\n def go(self): self.getPeer(); self.stopWriting()",
        "from twisted.internet.posixbase import PosixReactorBase",
        "for _, each in (): print(each)",
    ],
)
def test_public_names_and_own_names_are_not_listed(source: str) -> None:
    assert not leaned_on({"x.py": ast.parse(source)})


# Functions


@pytest.mark.parametrize("function", MIRRORED)
def test_a_mirrored_function_has_its_recorded_text(function: str) -> None:
    complaint = Record().complaint(function, installed())
    assert not complaint, complaint


@pytest.mark.parametrize(
    "place", sorted({e for each in MIRRORED.values() for e in each})
)
def test_the_code_that_mirrors_a_function_exists(place: str) -> None:
    pkgutil.resolve_name(place)


def test_every_supported_release_is_recorded() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    oldest = set(re.findall(r'"Twisted(?:\[tls\])?>=([0-9.]+)"', text))
    assert oldest == {Record().releases[0]}
    for function in MIRRORED:
        assert Record().digest(function, Record().releases[0])
    assert Record().digests.keys() == MIRRORED.keys()


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""Receive."""', '"""Receive\n        something."""', True),
        ('"""Receive."""', "# Receive.", True),
        (" -> bytes", "", True),
        ("limit: int", "limit", True),
        ("data: bytes", "data", True),
        ("def __init__", "def _init", True),
        ("= 8", "= 9", False),
        ("recv(limit)", "recv(limit or 1)", False),
        ("    return data", "    return None", False),
        ("return data", "return data\n\n    def doRead(self): ...", False),
        ("    def doRead", "    @property\n    def doRead", False),
    ],
)
def test_which_changes_of_a_function_count(
    release: MakeRelease, old: str, new: str, same: bool
) -> None:
    assert TCP.count(old) == 1
    before = digest(release("99.1.0", TCP), DO_READ)
    after = digest(release("99.2.0", TCP.replace(old, new)), DO_READ)
    assert (before == after) is same


def test_every_python_has_the_same_digests(release: MakeRelease) -> None:
    text = """
def syntax(self, /, *each, limit: int = 1, **rest):
    import os
    from . import path
    with open(f"{each!r:>{limit}} {{}}" 'r') as file, file:
        try:
            print(*rest, u"x", b"y", (1, *each), each[1:, ...], sep=None)
        except (OSError, ValueError) as error:
            raise (lambda x=-1: [y for y in x if not (yield)]) from error
"""
    found = digest(release("99.1.0", text.lstrip()), "twisted.internet.tcp.syntax")
    assert found == "320dc9b3dab36dfa"


def test_a_release_that_changes_a_function_is_named(
    release: MakeRelease, record: Record
) -> None:
    known = release("24.3.0", TCP)
    record.releases = ["23.10.0", "24.3.0"]
    record.digests = {DO_READ: {"23.10.0": digest(known, DO_READ)}}
    assert not record.complaint(DO_READ, known)
    assert not record.complaint(DO_READ, release("99.1.0", TCP))
    what_to_do = (
        f": compare it with {' and '.join(MIRRORED[DO_READ])}, then record it with: "
        "python -m tests.private_names"
    )
    changed = release("99.2.0", TCP.replace("limit)", "limit or 1)"))
    assert record.complaint(DO_READ, changed) == (
        f"Twisted 99.2.0 changes {DO_READ} (as of 24.3.0){what_to_do}"
    )
    gone = release("99.3.0", TCP.replace("doRead", "doReceive"))
    assert record.complaint(DO_READ, gone) == (
        f"Twisted 99.3.0 has no {DO_READ} any more{what_to_do}"
    )
    in_between = changed._replace(version="24.1.0")
    assert record.complaint(DO_READ, in_between) == (
        f"Twisted 24.1.0 has another {DO_READ} than was recorded "
        f"(as of 23.10.0){what_to_do}"
    )


def test_a_change_of_the_installed_twisted_fails_these_tests(
    release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = release("99.1.0", TCP)
    monkeypatch.setattr("twisted.__version__", changed.version)
    monkeypatch.setattr("twisted.__file__", str(changed.folder / "__init__.py"))
    with pytest.raises(AssertionError, match=r"Twisted 99\.1\.0 changes .*\.doRead"):
        test_a_mirrored_function_has_its_recorded_text(DO_READ)
    with pytest.raises(AssertionError, match=r"Twisted 99\.1\.0 has no .*\.TLS any"):
        test_twisted_has_the_names()


def test_releases_are_recorded_in_any_order(
    release: MakeRelease, record: Record
) -> None:
    changed = TCP.replace("limit)", "limit or 1)")
    texts = {"1.1.0": TCP, "1.2.0": TCP, "1.10.0": changed, "2.1.0rc1": changed}
    releases = [release(version, text) for version, text in texts.items()]
    for order in (releases, releases[::-1], [*releases[2:], *releases[:2], *releases]):
        record.releases, record.digests = [], {}
        for each in order:
            record.add(each)
        assert record.releases == list(texts)
        assert record.digests[DO_READ] == {
            "1.1.0": digest(releases[0], DO_READ),
            "1.10.0": digest(releases[2], DO_READ),
        }
        assert not any(record.complaint(DO_READ, each) for each in releases)


def test_the_command_records_the_installed_twisted(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = record.path.read_text()
    record.digests[DO_READ] = {"0.1.0": "something else"}
    record.releases = ["0.1.0"]
    record.save()
    main([], record.path)
    text = digest(installed(), DO_READ)
    assert (
        f"Twisted {installed().version}: {DO_READ}: {text}\n" in capsys.readouterr().out
    )
    assert not Record(record.path).complaint(DO_READ, installed())
    # The written record has the format of the one in the repository.
    known = Record()
    known.path = record.path
    known.save()
    assert record.path.read_text() == expected
