"""
Compare the cost of a request to a server on each event loop, side by side.

    python benchmarks/compare.py [--work NAME,...] [--contenders NAME,...]
        [--rounds N] [--seconds N] [--json FILE]
    python benchmarks/compare.py --list

The main figure is the CPU time of the server process per request, user and system.  It
does not include the work of the kernel on the client's core.

All servers are pinned to one core, and their clients to another.  In each round, every
contender has a fresh server with a client of its own.  All servers run together and
take short turns, in which the others sleep.  So any other load on the machine affects
all contenders alike, and the ratios hold even where the absolute figures do not.

When a server is ready, its objects are hidden from the garbage collector (gc.freeze).
Otherwise each collection would cost more for contenders that import more.

The exit status is 1 if a bar is missed (see report.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import report
from console import add_options, environment, names_of, parser_of, say
from servers import CONTENDERS
from works import WORKS, Subject, Turn, Work, prepare

TURN = 0.2
"""The approximate length of a turn, in seconds."""


def measure(
    name: str,
    contenders: list[str],
    round_: int,
    seconds: float,
    core: int,
    folder: Path,
) -> list[report.Sample]:
    """Measure one round of one work."""
    work = WORKS[name]
    # wrk runs for at least a second, and redis-benchmark is slow to start.
    turns = 1 if work.client in ("wrk", "redis") else max(1, round(seconds / TURN))
    with contextlib.ExitStack() as stack:
        subjects = [
            Subject(stack, folder, contender, work, idle, core)
            for contender in contenders
            for idle in sorted({0, work.idle})
        ]
        for subject in subjects:
            subject.connect()
        for subject in subjects:
            subject.take_turn(seconds / turns)
        taken: dict[Subject, list[Turn]] = {subject: [] for subject in subjects}
        for turn in range(turns):
            for subject in subjects if (turn + round_) % 2 else subjects[::-1]:
                taken[subject].append(subject.take_turn(seconds / turns))
        return [
            sample(name, round_, subject, turns) for subject, turns in taken.items()
        ]


def sample(
    work: str, round_: int, subject: Subject, turns: list[Turn]
) -> report.Sample:
    requests = sum(turn["requests"] for turn in turns)
    halves = [turn["p50"] for turn in turns if "p50" in turn]
    tails = [turn["p99"] for turn in turns if "p99" in turn]
    return {
        "work": work,
        "round": round_,
        "contender": subject.contender,
        "idle": subject.idle,
        "rate": round(requests / sum(turn["elapsed"] for turn in turns), 1),
        "cpu": round(sum(turn["cpu"] for turn in turns) / requests * 1e6, 4),
        "p50": statistics.median(halves) if halves else None,
        "p99": statistics.median(tails) if tails else None,
        "memory": subject.memory,
    }


def allow_many_descriptors(works: list[Work]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = max(work.connections + work.idle for work in works) + 50
    if needed > hard:
        raise SystemExit(
            f"{needed:,} open files are needed, and the hard limit is {hard:,}: raise "
            "it (ulimit -Hn), or leave out the works with many connections."
        )


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_options(parser, WORKS, rounds=5)
    parser.add_argument(
        "--contenders",
        type=names_of(CONTENDERS),
        metavar="NAME,...",
        default=list(CONTENDERS),
        help="which servers to measure (all)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        default=1.0,
        help="how long each contender is measured in a round (1); wrk rounds it",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=report.LATEST,
        help="where to write all samples (results/latest.json beside this file)",
    )
    parser.add_argument("--list", action="store_true", help="list works and contenders")
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: give more than 0")
    return options


def list_all() -> None:
    for title, known in (("Works", WORKS), ("Contenders", CONTENDERS)):
        print(f"{title}:")
        for name, each in known.items():
            print(f"  {name:16} {each.what}")


def main() -> int:
    options = parse()
    if options.list:
        list_all()
        return 0
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Two cores are needed, one for the server.")
    os.sched_setaffinity(0, {cores[1]})
    contenders = []
    for name in options.contenders:
        if CONTENDERS[name].missing():
            say(f"{name} is left out: there is no {CONTENDERS[name].needs} here.")
        else:
            contenders.append(name)
    works = {}
    for name in options.work:
        able = [each for each in contenders if each in WORKS[name].contenders()]
        if reason := WORKS[name].missing():
            say(f"{name} is left out: {reason}.")
        elif able:
            works[name] = able
    if not works:
        raise SystemExit("There is nothing to measure.")
    chosen = [WORKS[name] for name in works]
    allow_many_descriptors(chosen)

    about = (
        f"{environment('Twisted', 'uvloop')}. Rounds: {options.rounds}, of "
        f"{options.seconds:g} s for each contender."
    )
    samples: list[report.Sample] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder, chosen)
        for name, able in works.items():
            for round_ in range(1, options.rounds + 1):
                measured = measure(
                    name, able, round_, options.seconds, cores[0], folder
                )
                samples += measured
                costs = ", ".join(
                    f"{each['contender']}{' with idle' if each['idle'] else ''} "
                    f"{report.figure(each['cpu'])}"
                    for each in measured
                )
                say(f"{name}, round {round_} of {options.rounds}, CPU in µs: {costs}")
                report.save(options.json, about, samples)
    return 0 if report.tell(options.json) else 1


if __name__ == "__main__":
    sys.exit(main())
