"""
The contents of the wheel and of the sdist.  The short names of the reactors work with
the wheel alone, without the checkout.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path, PurePath

import pytest

pytestmark = pytest.mark.processes

CHECKOUT = Path(__file__).resolve().parent.parent

PLUGINS = {
    "twisted/plugins/twisted_rtsig_reactors.py",
    "twisted/plugins/twisted_rtsig_workers.py",
}


@dataclass
class Built:
    """The wheel and the sdist of this checkout."""

    wheel: Path
    sdist: Path

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def metadata(self) -> Message:
        """The headers of the wheel's metadata."""
        with zipfile.ZipFile(self.wheel) as archive:
            (metadata,) = (
                name
                for name in archive.namelist()
                if name.endswith(".dist-info/METADATA")
            )
            return HeaderParser().parsestr(archive.read(metadata).decode())

    def sdist_names(self) -> set[str]:
        """The names without the leading folder, which contains the version."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """The output of a Python process, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("build") / "project"
    shutil.copytree(
        CHECKOUT,
        copy,
        ignore=shutil.ignore_patterns(
            *(".git", ".venv", ".*_cache", ".hypothesis", "dist", "_build"),
            "_trial_temp*",
        ),
    )
    # Twisted makes this file in a checkout.  It must not be packed.
    (copy / "twisted/plugins/dropin.cache").write_bytes(b"")
    dist = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", str(dist), cwd=copy)
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    assert len(list(dist.iterdir())) == 2
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder)
    return folder


def run_from_wheel(unpacked: Path, cwd: Path, code: str, *arguments: str) -> str:
    """Run code that imports the package from the unpacked wheel, not the checkout."""
    path = [str(unpacked)]
    path += [each for each in sys.path if each and Path(each).resolve() != CHECKOUT]
    # Without -S, site would add the checkout of an editable install again.
    return run("-S", "-c", code, *arguments, cwd=cwd, PYTHONPATH=os.pathsep.join(path))


def test_the_contents_of_the_wheel(built: Built) -> None:
    names = built.wheel_names()
    assert {"twisted_rtsig/__init__.py", "twisted_rtsig/py.typed", *PLUGINS} <= names
    # In Twisted's own package the wheel may only have the plugins.  An __init__.py
    # would overwrite Twisted's, and be removed when this project is uninstalled.
    assert {name for name in names if name.startswith("twisted/")} == PLUGINS
    tops = {PurePath(name).parts[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert len(info) == 1
    assert tops - info == {"twisted", "twisted_rtsig"}


def test_the_wheel_has_every_module(built: Built) -> None:
    modules = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / "twisted_rtsig").rglob("*.py")
    }
    packed = {name for name in built.wheel_names() if name.startswith("twisted_rtsig/")}
    assert packed == modules | {"twisted_rtsig/py.typed"}


def test_the_contents_of_the_sdist(built: Built) -> None:
    names = built.sdist_names()
    assert {*PLUGINS, "LICENSE", "README.md", "pyproject.toml"} <= names
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "dev"} <= names
    assert {"tests/__init__.py", f"tests/{Path(__file__).name}"} <= names
    assert [name for name in names if name.endswith((".pyc", ".cache"))] == []


def test_description(built: Built) -> None:
    """That of README.md, without links to files that an index page does not have."""
    description = built.metadata().get_payload()
    assert isinstance(description, str)
    assert "twistd --reactor=rtsig-auto" in description
    assert "[Twisted](https://twisted.org)" in description
    assert re.findall(r"\]\((?!https:)", description) == []
    assert "CHANGELOG" in description


def test_the_metadata_of_the_licence(built: Built) -> None:
    """It has an SPDX expression and the text (PEP 639), and not the classifier."""
    metadata = built.metadata()
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "License ::" not in str(metadata.get_all("Classifier"))
    (text,) = (name for name in built.wheel_names() if name.endswith("/LICENSE"))
    with zipfile.ZipFile(built.wheel) as archive:
        assert archive.read(text) == (CHECKOUT / "LICENSE").read_bytes()


def test_the_dependencies_at_run_time(built: Built) -> None:
    """
    They are Twisted and zope.interface, and modules that Python 3.10 lacks.  All others
    are extras.
    """
    required = built.metadata().get_all("Requires-Dist", [])
    names = []
    for each in required:
        requirement, _, marker = each.partition(";")
        if "extra" not in marker and "python_version < '3.11'" not in marker:
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            names.append(re.sub(r"[-_.]+", "-", name[0]).lower())
    assert sorted(names) == ["twisted", "zope-interface"]


HERE = {
    "rtsig": sys.platform.startswith("linux"),
    "rtsig-auto": True,
    "rtsig-epoll": sys.platform.startswith("linux"),
    "rtsig-iocp": sys.platform == "win32",
    "rtsig-kqueue": hasattr(select, "kqueue"),
}
"""The reactors, and whether this system has them."""


@pytest.mark.parametrize("program", ["twistd", "trial"])
def test_help_lists_the_reactors(unpacked: Path, tmp_path: Path, program: str) -> None:
    """
    ``--help-reactors`` lists the reactors of this system with a description, and the
    others separately with a reason.
    """
    listing = run_from_wheel(
        unpacked,
        tmp_path,
        f"from twisted.scripts.{program} import run; run()",
        "--help-reactors",
    )
    for name, here in HERE.items():
        if here:
            entry = rf"^\s+{name}\s+\S+ \S+"
        else:
            entry = rf"^\s+!{name}\s+\S+ .*\(it needs .*, and this is {sys.platform}\)"
        assert re.search(entry, listing, re.MULTILINE), listing
        available, _, others = listing.partition("not available on this platform")
        assert bool(re.search(rf"\b{name}\s", available)) is here
        assert bool(re.search(rf"\b{name}\s", others)) is not here


def test_help_lists_the_workers_command(unpacked: Path, tmp_path: Path) -> None:
    """
    ``twistd`` lists the command, and imports its modules only when it is used.
    """
    code = """
import sys
from twisted.scripts.twistd import run

try:
    run()
finally:
    print([name for name in sys.modules if name.startswith("twisted_rtsig.workers")])
"""
    listing = run_from_wheel(unpacked, tmp_path, code, "--help")
    assert re.search(r"^    workers +Run another command", listing, re.MULTILINE)
    assert listing.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", [name for name, here in HERE.items() if not here])
def test_a_reactor_that_cannot_run_here_is_refused(
    unpacked: Path, tmp_path: Path, name: str
) -> None:
    """The error gives the reason, and a reactor to use instead."""
    code = f"""
from twisted.application.reactors import installReactor
try:
    installReactor({name!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    output = run_from_wheel(unpacked, tmp_path, code)
    assert output.startswith("UnsupportedReactorError ")
    assert f"only, and this is {sys.platform}; use --reactor=" in output


def test_pytest_finds_the_plugin(unpacked: Path, tmp_path: Path) -> None:
    """No other part of the package needs to be imported."""
    (tmp_path / "test_it.py").write_text(
        "async def test_it():\n    from twisted.internet import reactor\n"
    )
    output = run_from_wheel(
        unpacked,
        tmp_path,
        "import pytest; raise SystemExit(pytest.main(['--twisted-reactor=select']))",
    )
    assert "reactor: select (SelectReactor)" in output


@pytest.mark.parametrize(
    "module",
    [
        "twisted_rtsig",
        "twisted_rtsig.pytest_plugin",
        "twisted.plugins.twisted_rtsig_reactors",
        "twisted.plugins.twisted_rtsig_workers",
        "twisted_rtsig.workers",
        "twisted_rtsig.workers.options",
    ],
)
def test_an_import_installs_no_reactor(
    unpacked: Path, tmp_path: Path, module: str
) -> None:
    """
    Importing the package or listing the reactors leaves the choice of the reactor open,
    and imports no module that works on one operating system only.
    """
    code = f"""
import sys
import {module}

print(sys.modules["{module}"].__file__)
for name in (
    "twisted.internet.reactor",
    "twisted_rtsig.rtsigreactor",
    "twisted_rtsig.epollreactor",
    "twisted_rtsig.kqreactor",
):
    assert name not in sys.modules, name
"""
    origin = run_from_wheel(unpacked, tmp_path, code).strip()
    assert Path(origin).is_relative_to(unpacked)
