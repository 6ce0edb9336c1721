"""Whether a hang-up or an error of a descriptor is still there, as poll(2) says."""

from __future__ import annotations

import select


def poll_reports_hang_up(descriptor: int) -> bool:
    """Ask poll(2), which reports hang-ups and errors whatever the mask is."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
