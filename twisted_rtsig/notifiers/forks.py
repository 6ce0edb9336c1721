"""
The number of forks that this process came out of.

What a notifier holds in the kernel, a forked child shares with its parent, who
may go on with it.  Whoever remembers the count notices that it is in the child.
"""

from __future__ import annotations

import os

count = 0
"""Forks between the first import of this module and this process."""


def _after_fork_in_child() -> None:
    global count
    count += 1


# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
