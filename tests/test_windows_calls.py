"""The declarations of Windows calls, tested without a Windows."""

from __future__ import annotations

import sys

import pytest

from twisted_rtsig.iocpreactor import CompletionPortReactor
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.windows import calls


def test_layouts() -> None:
    """Those of a 64-bit Windows, wherever they are looked at."""
    calls.check_layouts()


def test_refused_by_a_python_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    with pytest.raises(
        UnsupportedReactorError, match=r"a 64-bit Python; use --reactor=select"
    ):
        CompletionPortReactor()


@pytest.mark.skipif(sys.platform == "win32", reason="what other systems say")
def test_refused_elsewhere() -> None:
    with pytest.raises(UnsupportedReactorError, match="on Windows only"):
        CompletionPortReactor()
    with pytest.raises(NotImplementedError, match="on Windows only"):
        calls.close_handle(1)
