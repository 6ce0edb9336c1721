"""
The signals that this package blocks, and the signal mask of a child without them.

A program that starts with a blocked signal does not get it until it unblocks it, which
most programs never do.
"""

from __future__ import annotations

import signal

blocked: set[int] = set()
"""
The signals that notifiers have blocked in any thread.  A thread inherits the mask of
the thread that starts it, so these signals may be blocked in every thread.
"""


def mask_for_children() -> set[int]:
    """The signals that are blocked in the calling thread, without those above."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return {int(each) for each in mask} - blocked
