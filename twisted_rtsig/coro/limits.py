"""
How many connections a server takes: in all, and from one address.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Literal

from twisted_rtsig.coro.output import descriptor

if sys.platform != "win32":
    import resource

MOST_CONNECTIONS: Final = 1 << 16
"""With ``max_connections="auto"``, where the limit of descriptors is no lower."""

# With max_connections="auto", one of so many descriptors stays free for everything
# else: files, connections to other servers, child processes, logs.
_SHARE_KEPT_FREE: Final = 4

# A network of IPv6 is at least that long, in bits: RFC 4291, section 2.5.4.
_IPV6_PREFIX: Final = 64


def scarce_descriptors(transport: Any) -> str | None:
    """
    Whether this process may soon have no descriptor left (``EMFILE``).

    A new descriptor has the lowest free number (POSIX), so that of a new socket tells
    how many are in use, for whatever and by whichever server.

    :param transport: of a connection that was just accepted.
    :return: in words, how many are in use; or None.
    """
    if sys.platform == "win32":
        # The number of sockets has no limit, and that of a socket means nothing.
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
    What counts as one address: that of an IPv4 host, or the network of an IPv6 host,
    which can take any address in it.

    :param address: an ``IAddress`` provider.
    :return: None for an address that is not of the internet, as of UNIX sockets.
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
    """:raises ValueError: if one of the limits is wrong: see ``CoroutineFactory``."""
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
