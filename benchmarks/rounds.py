"""
The driver of benchmarks that measure each contender in a process of its own, and all
contenders in turns, round after round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from console import add_options, parser_of, say
from report import Spread, markdown

Sample = TypeVar("Sample")

PATIENCE = 300.0
"""Seconds after which a measurement is given up."""


class Contender(NamedTuple):
    """
    One of the implementations that are compared.

    :ivar run: measures it, in a process of its own.
    :ivar needs: a module that it imports and that may not be installed.
    """

    run: Callable[..., None]
    needs: str = ""

    def missing(self) -> bool:
        """Whether the module that it needs is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def parser_with_rounds(
    documentation: str | None, works: Mapping[str, object]
) -> argparse.ArgumentParser:
    """Return a parser with ``--work``, ``--rounds`` and the ``--only`` of run_alone."""
    parser = parser_of(documentation)
    add_options(parser, works, rounds=4)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser


def run_alone(script: str, work: str, contender: str, *options: str) -> Any:
    """
    Measure one contender in a process of its own.

    :return: the last line that it prints, read as JSON.
    """
    command = [sys.executable, script, "--work", work, "--only", contender, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    return json.loads(done.stdout.splitlines()[-1])


def measure_in_rounds(
    work: str,
    contenders: Mapping[str, Contender],
    rounds: int,
    measure: Callable[[str], Sample],
    title: str,
    figure: Callable[[Sample], str],
) -> dict[str, list[Sample]]:
    """
    Measure all contenders of a work, in turns, and report each round.

    :param measure: measures a contender once.
    :param title: the name of the figure that is reported.
    :param figure: returns that figure of a sample, as text.
    :return: the samples of each contender that could run.
    """
    measured: dict[str, list[Sample]] = {}
    for name, contender in contenders.items():
        if contender.missing():
            say(
                f"{name} is left out: there is no {contender.needs} here "
                "(pip install -e '.[bench]')."
            )
        else:
            measured[name] = []
    for round_ in range(1, rounds + 1):
        for name, samples in measured.items():
            samples.append(measure(name))
        figures = ", ".join(
            f"{name} {figure(samples[-1])}" for name, samples in measured.items()
        )
        say(f"{work}, round {round_} of {rounds}, {title}: {figures}")
    return measured


def with_quartiles(value: float, ratios: Iterable[float], form: str) -> str:
    """Return a ratio and the quartiles of the ratios within each round, as text."""
    spread = Spread(ratios)
    low, high = format(spread.low, form), format(spread.high, form)
    return f"{value:{form}} ({low} to {high})"


def table_of_bars(rows: Iterable[tuple[list[str], bool]]) -> tuple[str, bool]:
    """
    Return a table of the bars, in Markdown, and whether all are met.

    :param rows: the cells of each bar, and whether it is met.
    """
    judged = list(rows)
    head = ["work", "of", "what", "compared with", "measured (quartiles)", "at most"]
    lines = [[*cells, "good" if met else "MISSED"] for cells, met in judged]
    return markdown([*head, ""], lines), all(met for _, met in judged)
