"""How many connections a server accepts: in all, and from one address."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Literal

from twisted_rtsig.coro.output import descriptor

if sys.platform != "win32":
    import resource

MOST_CONNECTIONS: Final = 1 << 16
"""The limit with ``max_connections="auto"``, if that of descriptors is not lower."""

# With max_connections="auto", one of so many descriptors, a quarter, stays free for
# everything else: files, connections to other servers, child processes, logs.
_SHARE_KEPT_FREE: Final = 4

# The bits that all hosts of an IPv6 network share, at least: RFC 4291, section 2.5.4.
_IPV6_PREFIX: Final = 64


def scarce_descriptors(transport: Any) -> str | None:
    """
    Whether this process may soon have no descriptor left (``EMFILE``).

    A new descriptor has the lowest free number (POSIX).  So the number of a new socket
    tells how many descriptors are in use, by this server and by everything else.

    :param transport: of a connection that was just accepted.
    :return: a text that tells how many are in use; None if enough are free.
    """
    if sys.platform == "win32":
        # There is no limit on sockets, and the number of a socket means nothing.
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = descriptor(transport)
    if (
        used is None
        or most == resource.RLIM_INFINITY
        or used < most - most // _SHARE_KEPT_FREE
    ):
        return None
    return f"{used} of the {most} descriptors of this process are in use (ulimit -n)"


def network_of(address: Any) -> Hashable | None:
    """
    What counts as one address: the address of an IPv4 host; or the network of an IPv6
    host, since the host can take any address in it.

    :param address: an ``IAddress`` provider.
    :return: None for an address that is not of the internet, such as that of a UNIX
        socket.
    """
    try:
        host = ip_address(getattr(address, "host", None) or "")
    except ValueError:
        return None
    if isinstance(host, IPv4Address):
        return host
    if host.ipv4_mapped is not None:
        return host.ipv4_mapped
    if host.is_link_local:
        # All hosts of a link have the same network.
        return host
    return IPv6Address(int(host) >> _IPV6_PREFIX << _IPV6_PREFIX)


def check_counts(most: int | Literal["auto"] | None, per_address: int | None) -> None:
    """:raises ValueError: if a limit is wrong: see :class:`CoroutineFactory`."""
    if most == "auto":
        most = None
    elif isinstance(most, str):
        raise ValueError(f'max_connections={most!r}: a number, "auto" or None')
    if most is not None and not most >= 0:
        raise ValueError(f"max_connections={most}: 0 is the least")
    if per_address is not None and not per_address >= 1:
        raise ValueError(f"max_connections_per_address={per_address}: 1 is the least")
    if most is not None and per_address is not None and per_address > most:
        raise ValueError(
            f"max_connections_per_address={per_address}: it must not be more than "
            f"max_connections={most}"
        )
