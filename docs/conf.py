"""
How Sphinx builds the documentation site: ``./dev docs``.

The pages are Markdown that a forge shows as well.  docs/index.md is the table of
contents: its links become the navigation of the site.  The API reference, in
docs/reference, is made of the docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import twisted_rtsig  # noqa: E402

project = "twisted-rtsig"
author = "The twisted-rtsig maintainers"
version = release = twisted_rtsig.__version__
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
# Headings get the anchors that a forge gives them.
myst_heading_anchors = 3
# "server.py:12" in a text is no address.
myst_linkify_fuzzy_links = False

autodoc_default_options = {
    "members": True,
    "inherited-members": True,
    "member-order": "bysource",
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"twisted-rtsig {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#b34700",
        "color-brand-content": "#b34700",
        "font-stack": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    },
    "dark_css_variables": {
        "color-brand-primary": "#ff9a4d",
        "color-brand-content": "#ff9a4d",
    },
}

# A heading of docs/index.md, and the list of links below it.
SECTION = re.compile(r"^## (.+)\n\n((?:[- ].*\n)+)", re.MULTILINE)
LINK = re.compile(r"^- \[([^]]+)\]\(([\w/-]+)\.(?:md|rst)\)", re.MULTILINE)
# What lies above docs/, and is a page of the site.
ABOVE = re.compile(r"\]\(\.\./(CHANGELOG|CONTRIBUTING|SECURITY)\.md")


def read_source(app: Any, page: str, source: list[str]) -> None:
    """Link to the pages of the site, and make the navigation out of the index page."""
    text = ABOVE.sub(lambda link: f"](project/{link[1].lower()}.md", source[0])
    if page == "index":
        for title, links in SECTION.findall(text):
            if pages := LINK.findall(links):
                text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n"
                text += (
                    "\n".join(f"{name} <{file}>" for name, file in pages) + "\n```\n"
                )
    source[0] = text


# What operations, select and format_tasks call of the objects that tasks share.
INTERNAL = {"forget", "poll", "unwatch", "waits_for", "watch"}


def skip_member(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what is internal, and what a class has from another package."""
    owner = getattr(member, "__objclass__", member)
    if isinstance(member, property):
        owner = member.fget
    module = getattr(owner, "__module__", None)
    foreign = isinstance(module, str) and not module.startswith("twisted_rtsig")
    return True if foreign or name in INTERNAL else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_member)
    app.connect("source-read", read_source)
