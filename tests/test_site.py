"""
The documentation as a whole: links, the length of README.md, the index page of the
site, and the API reference.  ``./dev docs`` builds the site.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"

LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
# What Sphinx documents a name by.
DIRECTIVE = re.compile(
    r"^\.\. (?:(?:currentmodule|module):: (?P<module>\S+)"
    r"|(?:auto\w+|class|type|py:type):: (?P<name>[\w.]+))",
    re.MULTILINE,
)
PACKAGES = [
    "twisted_rtsig",
    "twisted_rtsig.coro",
    "twisted_rtsig.coro.stackful",
    "twisted_rtsig.coro.testing",
    "twisted_rtsig.files",
    "twisted_rtsig.workers",
]


def prose(page: Path) -> str:
    """A page without its code."""
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Those of the headings, as a forge and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))],
    ids=lambda page: page.stem,
)
def test_links(page: Path) -> None:
    """Each leads to a file of the repository, and to a heading that is there."""
    for path, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_index_has_each_page() -> None:
    index = (DOCS / "index.md").read_text()
    for page in [*DOCS.glob("*.md"), *REFERENCE.glob("*.rst")]:
        path = page.relative_to(DOCS).as_posix()
        assert path == "index.md" or f"]({path})" in index, path
    for page in (DOCS / "project").glob("*.md"):
        assert f"](../{page.stem.upper()}.md)" in index, page


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_has_each_name(package: str) -> None:
    """Each exactly once."""
    documented = []
    for page in REFERENCE.glob("*.rst"):
        module = None
        for each in DIRECTIVE.finditer(page.read_text()):
            if each["module"]:
                module = each["module"]
            elif module == package:
                documented.append(each["name"])
    names = [name for name in documented if "." not in name]
    assert sorted(names) == sorted(importlib.import_module(package).__all__)
