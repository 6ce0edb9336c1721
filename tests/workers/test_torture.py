"""A short run of ``python -m tests.workers.torture``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.torture import parser, torture


@pytest.mark.slow
@pytest.mark.processes
def test_no_request_is_lost(tmp_path: Path) -> None:
    short = "--workers 2 --clients 8 --reloads 1 --scalings 2 --kills 1 --connections 0"
    options = parser().parse_args(short.split())
    report = torture(tmp_path, options)
    assert report.wrong() == []
    assert min(report.requests[each] for each in ("reloads", "scalings", "kills")) > 50
