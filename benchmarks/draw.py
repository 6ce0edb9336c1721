"""
Draw what compare.py has measured, as SVG for README and docs/benchmarks.md.

    python benchmarks/draw.py [RESULTS] [--folder FOLDER]

speed.svg   how many times less CPU than Twisted's epoll reactor a request takes
cost.svg    the CPU that a request takes, in microseconds, of all contenders
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from report import PUBLISHED, YARDSTICK, Results, figure, load
from servers import CONTENDERS
from works import WORKS

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("There is no matplotlib: pip install -e '.[bench]'") from None

DOCS = Path(__file__).parent.parent / "docs"

# Readable on white as well as on black.
INK = "#7d8590"
OURS = {"rtsig-epoll": "#e8590c", "rtsig": "#f2a65a"}
"""The bars of this package have a colour of their own."""
COROUTINES = {"coro": "#c98a5e"}
OTHERS = {"protocol-uvloop": "#5b8fc7", "python": "#8fb3d9", "c": "#a3a9b1"}
SPEED = {**OURS, **OTHERS}
SPEED_WORKS = ("echo-100", "echo-1", "echo-64k", "connect", "udp", "tls", "web-hello")
"""Works that differ; docs/benchmarks.md has a table of all."""
COST_WORKS = ("echo-100", "echo-idle", "connect")

STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    # The same picture from the same results.
    "svg.hashsalt": "twisted-rtsig",
}


def plain(axes: Any) -> None:
    """No more lines than needed."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def draw_speed(results: Results) -> Figure:
    works = [
        work
        for work in results.works()
        if any(results.times(work, name, YARDSTICK) for name in OURS)
    ]
    works = [work for work in SPEED_WORKS if work in works] or works
    names = [
        name
        for name in SPEED
        if any(results.times(work, name, YARDSTICK) for work in works)
    ]
    thickness = 0.84 / max(1, len(names))
    drawn = Figure(figsize=(7.5, 1.2 + 0.17 * len(names) * len(works)))
    axes = drawn.subplots()
    for place, name in enumerate(names):
        medians = {
            row: spread.median
            for row, work in enumerate(works)
            if (spread := results.times(work, name, YARDSTICK))
        }
        bars = axes.barh(
            [row - 0.42 + (place + 0.5) * thickness for row in medians],
            list(medians.values()),
            thickness * 0.92,
            color=SPEED[name],
            label=CONTENDERS[name].what,
        )
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7.5)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(works)), [two_lines(WORKS[work].what) for work in works])
    axes.set_xticks([0, 1, 2, 3, 4])
    axes.set_xlabel(
        "longer is better; dashed line: Twisted's epoll reactor; medians of the rounds"
    )
    axes.set_title(
        "How many times less CPU a request takes than on Twisted's epoll reactor",
        loc="left",
        pad=34,
        x=-0.27,
        fontweight="bold",
    )
    axes.legend(
        frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.28, 1), borderpad=0
    )
    plain(axes)
    return drawn


def two_lines(text: str) -> str:
    """A label that is broken behind its last comma."""
    return "\n".join(text.rsplit(", ", 1))


def draw_cost(results: Results) -> Figure:
    works = [work for work in COST_WORKS if work in results.works()]
    works = works or results.works()[:1]
    names = [
        name
        for name in CONTENDERS
        if any(name in results.contenders(work) for work in works)
    ]
    drawn = Figure(figsize=(2.2 + 2.8 * len(works), 1 + 0.24 * len(names)))
    for place, work in enumerate(works):
        axes = drawn.add_subplot(1, len(works), place + 1)
        costs = [results.spread(work, name, "cpu") for name in names]
        bars = axes.barh(
            range(len(names)),
            [cost.median if cost else 0 for cost in costs],
            color=[{**OURS, **COROUTINES}.get(name, INK) for name in names],
        )
        labels = [figure(cost.median) if cost else "" for cost in costs]
        axes.bar_label(bars, labels, padding=3)
        axes.set_yticks(
            range(len(names)),
            ["" if place else CONTENDERS[name].what for name in names],
        )
        axes.set_xticks([])
        axes.margins(x=0.2)
        axes.set_title(two_lines(WORKS[work].what), loc="left", fontsize=8.5)
        plain(axes)
        axes.spines["bottom"].set_visible(False)
    drawn.suptitle(
        "Microseconds of CPU for a request or a connection (shorter is better)",
        y=1.04,
        fontsize=10,
        fontweight="bold",
    )
    return drawn


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=PUBLISHED)
    parser.add_argument("--folder", type=Path, default=DOCS)
    options = parser.parse_args()
    results = load(options.results)
    matplotlib.rcParams.update(STYLE)
    for name, draw in (("speed", draw_speed), ("cost", draw_cost)):
        file = options.folder / f"{name}.svg"
        draw(results).savefig(
            file, transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
        print(file)


if __name__ == "__main__":
    main()
