"""Fixtures for the tests of files."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.coro.conftest import certificate as certificate
from tests.coro.conftest import logged as logged
from tests.coro.conftest import reactor as reactor_without_threads
from tests.files.support import running_threads

__all__ = ["reactor_without_threads"]


@pytest.fixture
def reactor(reactor_without_threads: Any) -> Iterator[Any]:
    """Each reactor, with running threads.  They run although it is only iterated."""
    with running_threads(reactor_without_threads):
        yield reactor_without_threads


def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def _without_cached_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)


def _without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_cached_reads(monkeypatch)
    for name in ("pread", "pwrite", "preadv"):
        monkeypatch.delattr(os, name, raising=False)


BACK_ENDS = {"this platform's": _as_it_is}
if sys.platform != "win32":
    BACK_ENDS["without cached reads"] = _without_cached_reads
    BACK_ENDS["without reads at offsets"] = _without_offsets


@pytest.fixture(params=BACK_ENDS)
def back_end(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which a platform reads files."""
    BACK_ENDS[request.param](monkeypatch)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A folder whose file system can read cached data without waiting."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this platform cannot read without waiting")
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    with probe.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip("the file system of the temporary folder has no RWF_NOWAIT")
    probe.unlink()
    return tmp_path


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    if sys.platform == "win32":
        pytest.skip("Windows has no FIFOs in folders")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file that does not exist yet, in a folder of its own."""
    return tmp_path / "file"
