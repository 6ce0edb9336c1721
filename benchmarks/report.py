"""
Print tables of what compare.py has measured, one for each workload, and whether the
bars are met.

    python benchmarks/report.py [RESULTS]

prints them for the results that compare.py has saved.

Each ratio is taken within a round, of figures that were measured side by side.  The
median and the quartiles are those of these ratios over all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from servers import CONTENDERS
from works import WORKS

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"
PUBLISHED = RESULTS / "published.json"
"""The results that README and docs quote."""

YARDSTICK = "epoll"


class Sample(TypedDict):
    """The figures of one contender at one work in one round."""

    work: str
    round: int
    contender: str
    idle: int
    """How many idle connections there were."""
    rate: float
    """Requests (or other units of the work) per second."""
    cpu: float
    """The CPU time of the server per request, in microseconds."""
    p50: float | None
    p99: float | None
    """Latencies, in microseconds."""
    memory: float | None
    """Bytes per connection."""


@dataclass(frozen=True)
class Bar:
    """A limit: a contender must use at least ``least`` times less than another one."""

    work: str
    against: str
    least: float
    measure: str = "cpu"
    contender: str = "rtsig"


BARS = [
    Bar("echo-100", "epoll", 2.5),
    Bar("echo-100", "python", 0.85),
    Bar("echo-100", "protocol-uvloop", 0.85),
    Bar("echo-1000", "epoll", 2.2),
    Bar("echo-idle", "epoll", 2.5),
    # At most a tenth more.
    Bar("echo-idle", "python", 1 / 1.1, "penalty"),
    Bar("echo-1", "epoll", 1.3),
    Bar("echo-1", "epoll", 1.0, "p50"),
    Bar("connect", "epoll", 1.15),
    Bar("echo-64k", "epoll", 1.1),
    Bar("bulk", "epoll", 1.1),
    Bar("bulk-out", "epoll", 1.1),
    Bar("udp", "epoll", 1.1),
    Bar("tls", "epoll", 1.2),
    Bar("web-hello", "epoll", 1.15),
    Bar("echo-idle", "epoll", 1.0, "memory"),
    Bar("echo-100", "rtsig-epoll", 1 / 1.35, contender="coro"),
    Bar("echo-100", "streams-uvloop", 1.0, contender="coro"),
    Bar("lines-100", "streams-uvloop", 1.0, contender="coro"),
    Bar("redis", "streams", 2.0, contender="coro"),
    # The inverse of the most that the contender may use.
    Bar("echo-100", "rtsig-epoll", 1 / 1.05, contender="rtsig-asyncio"),
    Bar("echo-100", "asyncio", 3.0, contender="rtsig-asyncio"),
    Bar("echo-100", "protocol", 1 / 0.35, contender="protocol-rtsig"),
    Bar("echo-100", "protocol-uvloop", 1 / 1.15, contender="protocol-rtsig"),
    Bar("echo-100", "streams", 1 / 0.45, contender="streams-rtsig"),
    Bar("echo-100", "streams-uvloop", 1 / 1.15, contender="streams-rtsig"),
    Bar("connect", "protocol", 1 / 1.1, contender="protocol-rtsig"),
    Bar("connect", "streams", 1 / 1.1, contender="streams-rtsig"),
]

MEASURES = {
    "cpu": "CPU",
    "p50": "median latency",
    "penalty": "CPU with idle connections over CPU without",
    "memory": "memory per connection",
}


class Spread:
    """The median and the quartiles of one or more values."""

    def __init__(self, values: Iterable[float]) -> None:
        ordered = sorted(values)
        self.low, self.median, self.high = (
            statistics.quantiles(ordered, n=4, method="inclusive")
            if len(ordered) > 1
            else ordered * 3
        )

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Results:
    def __init__(self, about: str, samples: Iterable[Sample]) -> None:
        self.about = about
        self._samples: dict[tuple[str, str], dict[tuple[int, bool], Sample]] = {}
        for sample in samples:
            by_round = self._samples.setdefault(
                (sample["work"], sample["contender"]), {}
            )
            by_round[sample["round"], bool(sample["idle"])] = sample

    def works(self) -> list[str]:
        return [
            work for work in WORKS if any(work == each for each, _ in self._samples)
        ]

    def contenders(self, work: str) -> list[str]:
        return [name for name in CONTENDERS if (work, name) in self._samples]

    def values(
        self, work: str, contender: str, measure: str, *, alone: bool = False
    ) -> dict[int, float]:
        """Return a measure by round; ``alone`` is without the idle connections."""
        samples = self._samples.get((work, contender), {})
        if measure == "penalty":
            without = self.values(work, contender, "cpu", alone=True)
            cpu = self.values(work, contender, "cpu")
            return {each: cpu[each] / without[each] for each in cpu if each in without}
        idle = bool(WORKS[work].idle) and not alone
        found: dict[int, Any] = {
            round_: dict(sample)[measure]
            for (round_, with_idle), sample in samples.items()
            if with_idle == idle
        }
        return {each: value for each, value in found.items() if value is not None}

    def spread(
        self, work: str, contender: str, measure: str, *, alone: bool = False
    ) -> Spread | None:
        values = self.values(work, contender, measure, alone=alone).values()
        return Spread(values) if values else None

    def times(
        self, work: str, contender: str, against: str, measure: str = "cpu"
    ) -> Spread | None:
        """Return how many times less than the other one the contender uses."""
        mine = self.values(work, contender, measure)
        others = self.values(work, against, measure)
        ratios = [others[each] / mine[each] for each in mine if each in others]
        return Spread(ratios) if ratios else None


def save(file: Path, about: str, samples: list[Sample]) -> None:
    lines = ",\n".join(json.dumps(sample) for sample in samples)
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"about": {json.dumps(about)}, "samples": [\n{lines}\n]}}\n')


def load(file: Path) -> Results:
    saved = json.loads(file.read_text())
    return Results(saved["about"], saved["samples"])


def figure(value: float) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def median(spread: Spread | None, unit: str = "") -> str:
    return f"{figure(spread.median)}{unit}" if spread else "-"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)
    )


def table(results: Results, work: str) -> str:
    """Return a table of all contenders at a work, in Markdown."""
    unit, idle = WORKS[work].unit, WORKS[work].idle
    plural = unit if unit == "MiB" else f"{unit}s"
    head = ["contender", f"{plural}/s", f"CPU per {unit}"]
    head += ["times Twisted's epoll (quartiles)", "p50", "p99"]
    if idle:
        head += ["CPU without idle", "penalty", "memory per connection"]
    rows = []
    for name in results.contenders(work):
        get = partial(results.spread, work, name)
        row = [CONTENDERS[name].what, median(get("rate")), median(get("cpu"), " µs")]
        row.append(str(results.times(work, name, YARDSTICK) or "-"))
        row += [median(get("p50"), " µs"), median(get("p99"), " µs")]
        if idle:
            row.append(median(get("cpu", alone=True), " µs"))
            row += [str(get("penalty") or "-"), median(get("memory"), " B")]
        rows.append(row)
    return markdown(head, rows)


def judge(results: Results) -> tuple[str, bool]:
    """Return a table of the measured bars, and whether all are met."""
    rows, all_met = [], True
    for bar in BARS:
        times = results.times(bar.work, bar.contender, bar.against, bar.measure)
        if times is None:
            continue
        met = times.median >= bar.least
        all_met = all_met and met
        rows.append(
            (
                *(bar.work, bar.contender, MEASURES[bar.measure]),
                CONTENDERS[bar.against].what,
                *(str(times), f"{bar.least:.2f}", "good" if met else "MISSED"),
            )
        )
    head = (
        "work",
        "of",
        "what",
        "times less than",
        "measured (quartiles)",
        "at least",
        "",
    )
    return markdown(head, rows) if rows else "", all_met


def tell(file: Path) -> bool:
    """Print the tables of a file of samples; return whether all bars are met."""
    results = load(file)
    print(results.about)
    for work in results.works():
        print(f"\n## {work}: {WORKS[work].what}\n\n{table(results, work)}")
    bars, met = judge(results)
    if bars:
        print(f"\n## Bars\n\n{bars}")
    return met


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=PUBLISHED)
    return 0 if tell(parser.parse_args().results) else 1


if __name__ == "__main__":
    sys.exit(main())
