"""The benchmarks run: tiny measurements over real sockets."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.processes]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WORKS = ["echo-1", "connect", "timers"]
CONTENDERS = ["rtsig", "epoll", "python", "c"]

Measured = tuple[subprocess.CompletedProcess[str], Path]


def run_benchmark(
    name: str, *arguments: str, cores: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """
    Run a benchmark of this folder, or skip the test if that is not possible here.

    :param environment: additional environment variables.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"this benchmark needs {cores} cores")
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


def assert_measured(run: subprocess.CompletedProcess[str]) -> None:
    """The measurement is so short that it meets its limits only by chance."""
    assert run.returncode == ("MISSED" in run.stdout), run.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A run of compare.py, and the file of its samples."""
    if not shutil.which(os.environ.get("CC") or "cc"):
        pytest.skip("there is no C compiler for the client of the benchmarks")
    file = tmp_path_factory.mktemp("results") / "results.json"
    options = {
        "--work": ",".join(WORKS),
        "--contenders": ",".join(CONTENDERS),
        "--rounds": "1",
        "--seconds": "0.02",
        "--json": str(file),
    }
    arguments = [each for option in options.items() for each in option]
    return run_benchmark("compare.py", *arguments, cores=2), file


def test_the_benchmark_of_reactors(measured: Measured) -> None:
    run, file = measured
    assert_measured(run)
    samples: list[dict[str, Any]] = json.loads(file.read_text())["samples"]
    done = {(each["work"], each["contender"]) for each in samples if each["cpu"] > 0}
    assert done == {
        *((work, name) for work in WORKS[:2] for name in CONTENDERS),
        *(("timers", name) for name in CONTENDERS[:2]),
    }
    cpu = {
        each["contender"]: each["cpu"] for each in samples if each["work"] == "echo-1"
    }
    assert f"| {cpu['epoll'] / cpu['rtsig']:.2f} (" in run.stdout
    for work in WORKS:
        assert f"## {work}: " in run.stdout


def test_the_pictures_of_the_benchmarks(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, file = measured
    command = [sys.executable, str(BENCHMARKS / "draw.py"), str(file)]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True, timeout=180)
    for name in ("speed.svg", "cost.svg"):
        assert "rtsig reactor" in (tmp_path / name).read_text()


def test_the_benchmark_of_instructions() -> None:
    """A request takes no more instructions than before."""
    # The debug mode executes additional instructions.
    run = run_benchmark("steps.py", TWISTED_RTSIG_DEBUG="")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("echo, rtsig") == 2


def test_the_benchmark_of_handlers() -> None:
    run = run_benchmark("handlers.py", "--handlers", "500", "--rounds", "1")
    assert run.returncode == 0, run.stderr
    assert "500 handlers" in run.stdout
    sizes = [row.split("|")[2] for row in run.stdout.splitlines()[4:]]
    assert all(int(size.replace(" B", "").replace(",", "")) > 500 for size in sizes)
    assert len(sizes) >= 4


def rows_of(section: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_the_benchmark_of_tasks() -> None:
    run = run_benchmark("tasks.py", "--count", "2000", "--rounds", "1")
    assert_measured(run)
    _, *sections = run.stdout.split("\n## ")
    tables = {each.split(":")[0].strip(): rows_of(each) for each in sections[:-1]}
    bars = rows_of(sections[-1])
    there = {
        name: importlib.util.find_spec(name) is not None
        for name in ("uvloop", "trio", "gevent", "greenlet")
    }
    others = there["uvloop"] + there["trio"] + there["gevent"]
    expected = {
        "ping-pong": 3 + others + there["greenlet"],
        "parked": 3 + others + there["greenlet"],
        "group": 2 + there["uvloop"] + there["trio"],
        "million": 1,
        "transfer": 5 + there["greenlet"],
    }
    stackful = 2 * (there["greenlet"] and there["gevent"])
    expected_bars = 9 + there["uvloop"] + stackful
    if sys.version_info < (3, 11):
        # asyncio has no groups.
        del expected["group"]
        expected_bars -= 2
    assert {name: len(rows) for name, rows in tables.items()} == expected
    assert len(bars) == expected_bars
    for name, installed in there.items():
        assert (f"there is no {name} here (pip install" in run.stderr) != installed
    for rows in tables.values():
        assert all(float(row[2].split()[0]) > 0 for row in rows)
    assert all(int(row[4][:-2].replace(",", "")) > 100 for row in tables["parked"])
    # The limits compare the figures that the tables show.
    mine, yardstick = (microseconds(row[2]) for row in tables["ping-pong"][:2])
    assert float(bars[0][4].split()[0]) == pytest.approx(mine / yardstick, abs=0.02)


def microseconds(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * {"µs": 1.0, "ns": 0.001}[unit]


def test_the_benchmark_of_files() -> None:
    run = run_benchmark(
        *("files.py", "--rounds", "1", "--count", "200", "--size", "100000"),
        cores=2,
        # Measure the package of this checkout, even if another one is installed.
        PYTHONPATH=str(BENCHMARKS.parent),
    )
    assert_measured(run)
    _, *sections = run.stdout.split("\n## ")
    tables = {each.split(":")[0].strip(): rows_of(each) for each in sections[:-1]}
    there = importlib.util.find_spec("aiofiles") is not None
    assert {name: len(rows) for name, rows in tables.items()} == {
        "cached": 3 + there,
        "send": 6,
        "small": 4,
        "large": 4,
        "late": 8,
    }
    assert len(rows_of(sections[-1])) == 2 + there
    assert ("there is no aiofiles here (pip install" in run.stderr) != there
    for rows in tables.values():
        # The delays may all be 0; their third column is the longest pass.
        times = [row[2 if rows is tables["late"] else 1] for row in rows]
        assert all(float(each.split()[0].replace(",", "")) > 0 for each in times)


def test_the_benchmark_of_workers() -> None:
    if not shutil.which("wrk"):
        pytest.skip("the benchmark of workers needs wrk")
    run = run_benchmark(
        *("workers.py", "--rounds", "1", "--seconds", "1", "--connections", "4"),
        cores=2,
    )
    # The measurement is so short that it meets its limits only by chance.
    assert run.returncode in (0, 1), run.stderr
    assert run.stderr == ""
    assert "2 workers to 1: " in run.stdout
    assert "a worker to twistd: " in run.stdout
