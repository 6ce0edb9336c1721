"""
Print the status of ``twistd workers``.

::

    python -m twisted_rtsig.workers status PIDFILE

See ``docs/workers.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from twisted_rtsig.workers.metrics import exposition, from_json
from twisted_rtsig.workers.status import ANSWER_TIMEOUT, NoStatus, read_status

_COLUMNS: Final = (
    "worker",
    "pid",
    "state",
    "age",
    "restarts",
    "connections",
    "requests",
    "CPU",
    "memory",
    "slow passes",
)

_NONE: Final = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Print the status.

    :return: the exit status: 0, or 1 if there is nothing to print.
    :raises SystemExit: with the status 2, if the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        status = read_status(options.path, options.tasks)
    except NoStatus as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        text = json.dumps(status) + "\n"
    elif options.metrics:
        text = exposition(from_json(status["metrics"]))
    else:
        text = "".join(f"{line}\n" for line in _lines(status))
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (a pager, or head) has ended.  Python flushes stdout again at exit,
        # which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m twisted_rtsig.workers")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    status = commands.add_parser("status", help="print the state of each worker")
    status.add_argument(
        "path",
        metavar="PIDFILE-or-SOCKET",
        help="the pid file of twistd, or the socket beside it",
    )
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--metrics",
        action="store_true",
        help="print the sums over all workers, for Prometheus",
    )
    status.add_argument(
        "--tasks", action="store_true", help="describe the tasks of all workers"
    )
    return parser


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    workers = status["workers"]
    yield (
        f"Supervisor {status['pid']}, up {_duration(status['age'])}, "
        f"{status['count']} workers wanted"
    )
    yield ""
    yield from _table([_COLUMNS, *map(_row, workers), _sums(workers)])
    for worker in workers:
        if worker["answers"]:
            yield ""
            yield f"worker {worker['number']} ({worker['pid']})"
            yield from _details(worker)


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    row = (
        str(worker["number"]),
        str(worker["pid"]),
        worker["state"],
        _duration(worker["age"]),
        str(worker["restarts"]),
    )
    if worker["answers"]:
        return (*row, *_figures(worker))
    if worker["state"] == "starting":
        return row
    return (*row, f"no answer within {ANSWER_TIMEOUT:g} s: it computes")


def _figures(worker: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(worker["connections"]),
        _NONE if worker["requests"] is None else str(worker["requests"]),
        f"{worker['cpu']:.1f} s",
        f"{worker['memory'] / 2**20:.1f} MiB",
        str(worker["slow_passes"]),
    )


def _sums(workers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    answered = [each for each in workers if each["answers"]]
    requests = [each["requests"] for each in answered if each["requests"] is not None]
    sums: dict[str, Any] = {
        name: sum(each[name] for each in answered)
        for name in ("connections", "cpu", "memory", "slow_passes")
    }
    sums["requests"] = sum(requests) if requests else None
    restarts = {each["number"]: each["restarts"] for each in workers}
    return ("all", "", "", "", str(sum(restarts.values())), *_figures(sums))


def _details(worker: Mapping[str, Any]) -> Iterator[str]:
    counts = worker["reactor"].items()
    yield "    reactor: " + ", ".join(f"{name} {count}" for name, count in counts)
    coroutines = worker["coroutines"]
    tasks, streams = coroutines["tasks"], coroutines["streams"]
    if tasks["spawned"]:
        yield (
            f"    tasks: running {tasks['running']}, ready {tasks['ready']}, waiting "
            f"{tasks['waiting']}, failed {tasks['failed']} of {tasks['spawned']}; "
            f"streams: {streams['open']} of {streams['made']}"
        )
    for server in coroutines["servers"]:
        limits = "".join(
            f", {limit} {count}" for limit, count in server["limits"].items()
        )
        count = server["connections"]
        yield f"    server {server['name']}: connections {count}{limits}"
    if "tasks" in worker:
        for line in worker["tasks"].splitlines():
            yield f"    {line}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    # A row that ends early has a sentence in its last cell, which may be longer than
    # the column.
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        if len(row) < len(widths):
            cells = [*cells[: len(row) - 1], row[-1]]
        yield "  ".join(cells).rstrip()


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
