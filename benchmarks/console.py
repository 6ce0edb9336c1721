"""The command line of the benchmarks: options, progress, and the environment."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterable, Mapping


def say(line: str) -> None:
    """Report progress, apart from the results on standard output."""
    print(line, file=sys.stderr, flush=True)


def environment(*packages: str) -> str:
    """Describe the system, the Python and the installed ones of some packages."""
    kernel = platform.release().split("-")[0]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    parts = [f"{platform.system()} {kernel} on {platform.machine()}", python]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(parts)


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser, described by the first paragraph of a script's docstring."""
    first = (documentation or "").strip().split("\n\n")[0]
    return argparse.ArgumentParser(description=first)


def names_of(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an option that takes names, separated by commas."""
    known = list(allowed)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"there is no {name!r}, only {', '.join(known)}"
                )
        return names

    return parse


def add_options(
    parser: argparse.ArgumentParser, works: Mapping[str, object], rounds: int
) -> None:
    """
    Add the options ``--work`` and ``--rounds``.

    :param works: the works, by name.
    :param rounds: how many rounds there are by default.
    """
    parser.add_argument(
        "--work",
        type=names_of(works),
        metavar="NAME,...",
        default=list(works),
        help=f"what to measure (by default all: {', '.join(works)})",
    )
    add_number(parser, "--rounds", rounds, "how many rounds")


def add_number(
    parser: argparse.ArgumentParser, option: str, default: int, what: str
) -> None:
    """Add an option that takes a number from 1 on."""
    parser.add_argument(
        option, type=positive, metavar="N", default=default, help=f"{what} ({default})"
    )


def positive(text: str) -> int:
    """Parse a number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
