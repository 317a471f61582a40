"""Names of this machine, under which the page may be asked for."""

from __future__ import annotations

import ipaddress

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def plain_host(name: str) -> str:
    """Name of a host as names are compared: in small letters, without the dot of a complete name."""
    return name.lower().removesuffix(".")


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return plain_host(host) == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def answered_names(host: str) -> frozenset[str]:
    """Names under which the page at an address may be asked for; empty: all, for an address that others reach."""
    if not is_local(host):
        return frozenset()
    own = {plain_host(host)}
    if ":" in host:  # also as browsers write it
        own = {f"[{host.lower()}]", f"[{ipaddress.ip_address(host).compressed}]"}
    return LOCAL_NAMES | own
