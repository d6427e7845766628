"""The network interface by which this host reaches others, where its own name does not say.

Gloo listens on the address of the host's own name. Debian and Ubuntu give that name a loopback address, 127.0.1.1,
where no other host reaches it. Loads no torch.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping

from tlgc_mp.errors import UsageError

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_ANYWHERE = "192.0.2.1"
"""Nobody's address, to which the default route leads."""


def gloo_interface(master: str | None) -> str | None:
    """The interface that Gloo must be told; ``None`` where the host's own name leads to one that others reach.

    Args:
        master: the host where ranks meet, where that is known.

    Raises:
        UsageError: several could be meant.
    """
    if not _is_loopback(_address_of(socket.gethostname())):
        return None
    towards = _address_towards(master)
    return choose(_interfaces(), _address_towards(_ANYWHERE) if _is_loopback(towards) else towards)


def choose(interfaces: Mapping[str, str], towards: str | None) -> str:
    """The one of ``interfaces`` (address by name) with the address ``towards``, or the only one that is no loopback.

    Raises:
        UsageError: there is none, or several.
    """
    others = {name: address for name, address in interfaces.items() if not _is_loopback(address)}
    found = [name for name, address in others.items() if address == towards] or list(others)
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{GLOO_INTERFACE} must be set to the interface that reaches the other hosts, got none, and this host's own "
        f"name ({socket.gethostname()}) has a loopback address; use one of {', '.join(found) or 'those that are up'}"
    )


def _is_loopback(address: str | None) -> bool:
    return address is None or ipaddress.ip_address(address).is_loopback


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _address_towards(host: str | None) -> str | None:
    """This host's address on the way to another. Nothing is sent."""
    if host is None:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
