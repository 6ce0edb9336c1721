"""The benchmarks run: tiny measurements, through real sockets."""

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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A run of compare.py, and the file of its samples."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    if not shutil.which(os.environ.get("CC") or "cc"):
        pytest.skip("there is no C compiler for the client of the benchmarks")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the benchmarks need two cores")
    file = tmp_path_factory.mktemp("results") / "results.json"
    options = {
        "--work": ",".join(WORKS),
        "--contenders": ",".join(CONTENDERS),
        "--rounds": "1",
        "--seconds": "0.02",
        "--json": str(file),
    }
    command = [sys.executable, str(BENCHMARKS / "compare.py")]
    command += [each for option in options.items() for each in option]
    return subprocess.run(command, capture_output=True, text=True, timeout=180), file


def test_compare(measured: Measured) -> None:
    run, file = measured
    # Whether so short a measurement meets the bars is luck.
    assert run.returncode == ("MISSED" in run.stdout), run.stderr
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


def test_draw(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, file = measured
    command = [sys.executable, str(BENCHMARKS / "draw.py"), str(file)]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True, timeout=180)
    for name in ("speed.svg", "cost.svg"):
        assert "rtsig reactor" in (tmp_path / name).read_text()


def test_steps() -> None:
    """A request takes no more instructions than it took."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    command = [sys.executable, str(BENCHMARKS / "steps.py")]
    # The debug mode has its own instructions.
    environment = {**os.environ, "TWISTED_RTSIG_DEBUG": ""}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("echo, rtsig") == 2


def test_handlers() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    command = [sys.executable, str(BENCHMARKS / "handlers.py")]
    command += ["--handlers", "500", "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    assert "500 handlers" in run.stdout
    sizes = [row.split("|")[2] for row in run.stdout.splitlines()[4:]]
    assert all(int(size.replace(" B", "").replace(",", "")) > 500 for size in sizes)
    assert len(sizes) >= 4


def rows_of(section: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_tasks() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    command = [sys.executable, str(BENCHMARKS / "tasks.py")]
    command += ["--count", "2000", "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    # Whether so short a measurement meets the bars is luck.
    assert run.returncode == ("MISSED" in run.stdout), run.stderr
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
    # What is compared is the very figure that is shown.
    mine, yardstick = (microseconds(row[2]) for row in tables["ping-pong"][:2])
    assert float(bars[0][4].split()[0]) == pytest.approx(mine / yardstick, abs=0.02)


def microseconds(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * {"µs": 1.0, "ns": 0.001}[unit]


def test_files() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks are for Linux")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the benchmarks need two cores")
    command = [sys.executable, str(BENCHMARKS / "files.py"), "--rounds", "1"]
    command += ["--count", "200", "--size", "100000"]
    # That of this checkout, wherever another one is installed.
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=environment
    )
    # Whether so short a measurement meets the bars is luck.
    assert run.returncode == ("MISSED" in run.stdout), run.stderr
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
        # Of the delays it is the longest pass: nobody need have held up anybody.
        times = [row[2 if rows is tables["late"] else 1] for row in rows]
        assert all(float(each.split()[0].replace(",", "")) > 0 for each in times)


def test_workers() -> None:
    if not (sys.platform.startswith("linux") and shutil.which("wrk")):
        pytest.skip("the benchmark of workers needs Linux and wrk")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the benchmarks need two cores")
    run = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "workers.py")),
            *("--rounds", "1", "--seconds", "1", "--connections", "4"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    # Whether so short a measurement meets the bars is luck.
    assert run.returncode in (0, 1), run.stderr
    assert run.stderr == ""
    assert "2 workers to 1: " in run.stdout
    assert "a worker to twistd: " in run.stdout
