"""What ``typing`` has from Python 3.11 on; before that, ``typing_extensions``."""

import sys

if sys.version_info >= (3, 11):
    from typing import TypeVarTuple, Unpack
else:
    from typing_extensions import TypeVarTuple, Unpack

__all__ = ["TypeVarTuple", "Unpack"]
