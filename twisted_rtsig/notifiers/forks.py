"""
The number of forks between the start of the program and this process.

A forked child shares the kernel resources of a notifier with its parent, which may go
on using them.  A notifier that compares this count with an earlier one notices that it
is in a child.
"""

from __future__ import annotations

import os

count = 0
"""The number of forks between the first import of this module and this process."""


def _after_fork_in_child() -> None:
    global count
    count += 1


# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
