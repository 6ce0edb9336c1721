"""
Reads source text for tests/test_private_names.py: the private names of Twisted that the
package uses, and the functions of Twisted in each release.

    python -m tests.private_names [FOLDER...]

records the text of the functions in the installed Twisted, or in each FOLDER that was
filled by ``pip install --no-deps --target FOLDER Twisted==RELEASE``, and prints the
changes.  Do this after the code that mirrors them was compared with them.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from zope.interface import implementedBy

import twisted
import twisted_rtsig
from twisted_rtsig.engine.private_names import MIRRORED, NAMES, OF_ASYNCIO

RECORD = Path(__file__).with_suffix(".json")
PACKAGE = Path(twisted_rtsig.__file__).parent


class Release(NamedTuple):
    """A release of Twisted, and the folder of its source."""

    version: str
    folder: Path


def installed() -> Release:
    return Release(twisted.__version__, Path(twisted.__file__).parent)


def unpacked(folder: Path) -> Release:
    """The Twisted that pip has installed into ``folder``."""
    found = next(iter(metadata.distributions(name="Twisted", path=[str(folder)])))
    return Release(found.version, folder / "twisted")


# Source texts


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or a class, also those in its blocks."""
    for each in body:
        yield each
        if isinstance(each, ast.If | ast.Try | ast.With):
            for block in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(each, block, []):
                    if isinstance(part, ast.ExceptHandler):
                        yield from _statements(part.body)
                    else:
                        yield from _statements([part])


def _find(release: Release, dotted: str) -> list[ast.stmt | ast.Module]:
    """The module, or all definitions of the class or function, of that name."""
    _, *parts = dotted.split(".")
    path = release.folder
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    path /= f"{parts.pop(0)}.py"
    if not path.exists():
        return []
    found: list[ast.stmt | ast.Module] = [parsed(path)]
    for name in parts:
        found = [
            each
            for outer in found
            if isinstance(outer, ast.Module | ast.ClassDef)
            for each in _statements(outer.body)
            if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == name
        ]
    return found


def _is_self(node: ast.expr) -> bool:
    """Whether the expression is ``self`` or ``super()``."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "super")


def _attribute_in_call(node: ast.AST) -> str:
    """The attribute name in a call of ``getattr``, ``hasattr`` or ``setattr``."""
    match node:
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr" | "setattr"),
            args=[_, ast.Constant(value=str(name)), *_],
        ):
            return name
    return ""


def functions_of(owner: ast.Module | ast.ClassDef) -> set[str]:
    return {
        each.name
        for each in _statements(owner.body)
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def data_of(owner: ast.Module | ast.ClassDef) -> set[str]:
    """The names that a module or a class defines, except functions."""
    names: set[str] = set()
    for each in _statements(owner.body):
        match each:
            case ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                for target in targets:
                    names |= {e.id for e in ast.walk(target) if isinstance(e, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    if isinstance(owner, ast.ClassDef):
        for node in ast.walk(owner):
            match node:
                case ast.Attribute(value=value, attr=name, ctx=ast.Store()):
                    if _is_self(value):
                        names.add(name)
            names.add(_attribute_in_call(node))
    return names - {""}


def defines(release: Release, owner: str, name: str) -> bool:
    """Whether the class or module itself has the attribute."""
    return any(
        name in functions_of(each) | data_of(each)
        for each in _find(release, owner)
        if isinstance(each, ast.Module | ast.ClassDef)
    )


# The names of Twisted that the package uses


def _is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


class _FromTwisted(NamedTuple):
    """The names that a class of the package inherits from Twisted."""

    functions: set[str]
    data: set[str]
    documented: set[str]

    def leaned_on(self, names: set[str]) -> set[str]:
        # Subclasses may call and override a function that is not private.
        public = self.functions | self.documented
        return {
            each
            for each in names & (self.functions | self.data)
            if _is_private(each) or not (each in public or each.startswith("__"))
        }


def _from_twisted(classes: Iterable[type[Any]]) -> _FromTwisted:
    """The names that any of these classes inherits."""
    theirs = _FromTwisted(set(), set(), set())
    for ancestor in {each for cls in classes for each in cls.__mro__}:
        if ancestor.__module__.startswith("twisted."):
            name = f"{ancestor.__module__}.{ancestor.__qualname__}"
            for found in _find(installed(), name):
                if isinstance(found, ast.ClassDef):
                    theirs.functions.update(functions_of(found))
                    theirs.data.update(data_of(found))
            for interface in implementedBy(ancestor).flattened():
                theirs.documented.update(interface.names(all=True))
    return theirs


@functools.cache
def _classes_of_the_package() -> dict[str, _FromTwisted]:
    """
    The names that each class and its subclasses inherit from Twisted, by the name of
    the class.  A class of the package may precede one of Twisted among the bases of a
    subclass: both then use the same instance.

    Notifiers inherit nothing, and those of other systems cannot be imported.
    """
    classes: list[type[Any]] = []
    for folder in (
        "twisted_rtsig",
        "twisted_rtsig.asyncio_support",
        "twisted_rtsig.engine",
        "twisted_rtsig.windows",
    ):
        path = importlib.import_module(folder).__path__
        for info in pkgutil.iter_modules(path, f"{folder}."):
            for each in vars(importlib.import_module(info.name)).values():
                if isinstance(each, type) and each.__module__ == info.name:
                    classes.append(each)
    return {
        cls.__name__: _from_twisted(each for each in classes if cls in each.__mro__)
        for cls in classes
    }


def _not_exported(node: ast.ImportFrom) -> Iterator[str]:
    """The names that are imported from Twisted and missing in the ``__all__`` there."""
    if node.module is not None and node.module.startswith("twisted."):
        module = importlib.import_module(node.module)
        exported: list[str] = getattr(module, "__all__", [])
        for each in node.names:
            if _is_private(each.name) or (exported and each.name not in exported):
                yield each.name


def _touched(tree: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _is_self(node.value)
    }


def leaned_on(files: Mapping[str, ast.Module]) -> dict[str, str]:
    """
    The private names of Twisted, and its attributes without an interface, that
    ``files`` of the package use, each with a place of its use.

    A private name belongs to Twisted in three cases: an ancestor of the class has it,
    or some file uses it and none defines it, or a class with an ancestor in Twisted
    defines it and no file uses it, so that Twisted must use it.
    """
    classes = _classes_of_the_package()
    leaned: dict[str, str] = {}
    used: dict[str, str] = {}
    own: set[str] = set()
    hooks: dict[str, str] = {}
    for path, tree in files.items():
        # An annotation without a value does not define the name.
        annotated = {
            each.target
            for each in ast.walk(tree)
            if isinstance(each, ast.AnnAssign) and each.value is None
        }
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            names: set[str] = set()
            match node:
                case ast.ImportFrom():
                    names = set(_not_exported(node))
                case ast.Attribute(value=ast.Name(id="stream"), attr=name):
                    # The engine calls a connection ``stream``.
                    names = classes["StreamTransport"].leaned_on({name})
                case ast.ClassDef(name=name) if (
                    name in classes and classes[name].functions
                ):
                    defined = functions_of(node) | data_of(node)
                    hooks |= dict.fromkeys(defined, place)
                    names = classes[name].leaned_on(defined | _touched(node))
            leaned |= dict.fromkeys(names, place)
            match node:
                case ast.Attribute(attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(value=ast.Name(id="sys")):
                    # The names of the interpreter do not count.
                    pass
                case ast.Attribute(attr=name):
                    used[name] = place
                case ast.Name(id=name, ctx=ast.Store()) if node not in annotated:
                    own.add(name)
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                ):
                    own.add(name)
                case _ if name := _attribute_in_call(node):
                    used[name] = place
    for name, place in [*used.items(), *hooks.items()]:
        if _is_private(name) and not (name in own and name in used):
            leaned.setdefault(name, place)
    return leaned


def files_of_the_package() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(PACKAGE.parent)): parsed(path)
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def in_manifest() -> set[str]:
    return {name for names in NAMES.values() for name in names}


def of_asyncio() -> set[str]:
    return {name for names in OF_ASYNCIO.values() for name in names}


# The text of Twisted's functions


class _WithoutRemarks(ast.NodeTransformer):
    """Removes docstrings and annotations, which have no effect."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            del node.body[0]
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return ast.Assign(targets=[node.target], value=node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        self.generic_visit(node)
        # Python 3.12 adds an empty string at the end of some formats.
        node.values = [
            each
            for each in node.values
            if not (isinstance(each, ast.Constant) and each.value == "")
        ]
        return node


def _dump(node: Any) -> str:
    """
    As ``ast.dump``, but the same on each Python: empty fields are left out, since later
    versions have more fields.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_dump(value)}"
        for name, value in ast.iter_fields(node)
        if name not in ("kind", "type_comment")
        and value is not None
        and value != []
        # Python 3.15 has this field on each import.
        and (name, value) != ("is_lazy", 0)
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def digest(release: Release, function: str) -> str:
    """The digest of a function of Twisted, or "" if the release does not have it."""
    found = [
        _dump(_WithoutRemarks().visit(copy.deepcopy(each)))
        for each in _find(release, function)
    ]
    if not found:
        return ""
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", version)[:3])


class Record:
    """
    The recorded releases of Twisted.

    :ivar releases: their versions, the oldest first.
    :ivar digests: the digests of each function, by the first release with that text.
    """

    def __init__(self, path: Path = RECORD) -> None:
        self.path = path
        stored = json.loads(path.read_text())
        self.releases: list[str] = stored["releases"]
        self.digests: dict[str, dict[str, str]] = stored["digests"]

    def as_of(self, version: str) -> str:
        """The newest recorded release that is not newer than ``version``."""
        older = [each for each in self.releases if _order(each) <= _order(version)]
        return older[-1] if older else "none"

    def digest(self, function: str, version: str) -> str | None:
        """The expected digest of a function in a release."""
        expected = None
        for first, text in self.digests.get(function, {}).items():
            if _order(first) <= _order(version):
                expected = text
        return expected

    def complaint(self, function: str, release: Release) -> str:
        """The error for a function whose text has changed, or "" if it has not."""
        found = digest(release, function)
        if found == self.digest(function, release.version):
            return ""
        version = release.version
        known = self.as_of(version)
        if not found:
            does = f"has no {function} any more"
        elif _order(version) > _order(self.releases[-1]):
            does = f"changes {function} (as of {known})"
        else:
            does = f"has another {function} than was recorded (as of {known})"
        places = " and ".join(MIRRORED[function])
        return (
            f"Twisted {version} {does}: compare it with {places}, then record it "
            "with: python -m tests.private_names"
        )

    def add(self, release: Release) -> list[str]:
        """
        Record a release.

        :return: its changes.
        """
        news = []
        for function in MIRRORED:
            found = digest(release, function)
            if found != self.digest(function, release.version):
                news.append(f"Twisted {release.version}: {function}: {found or 'gone'}")
            texts = {each: self.digest(function, each) for each in self.releases}
            texts[release.version] = found
            former: str | None = None
            self.digests[function] = {}
            for version in sorted(texts, key=_order):
                text = texts[version]
                if text is not None and text != former:
                    self.digests[function][version] = former = text
        self.releases = sorted({*self.releases, release.version}, key=_order)
        self.digests = {each: self.digests[each] for each in MIRRORED}
        return news

    def save(self) -> None:
        lines = [
            f"  {json.dumps(function)}: {json.dumps(texts)}"
            for function, texts in self.digests.items()
        ]
        self.path.write_text(
            f'{{\n "releases": {json.dumps(self.releases)},\n'
            ' "digests": {\n' + ",\n".join(lines) + "\n }\n}\n"
        )


def main(folders: list[str], path: Path = RECORD) -> None:
    record = Record(path)
    releases = [unpacked(Path(each)) for each in folders] or [installed()]
    for release in sorted(releases, key=lambda each: _order(each.version)):
        for news in record.add(release) or [f"Twisted {release.version}: nothing new"]:
            print(news)
    record.save()


if __name__ == "__main__":
    main(sys.argv[1:])
