"""The interface that Gloo is told where the host's own name has a loopback address."""

from __future__ import annotations

import socket

import pytest

from tlgc_mp.engine import interface
from tlgc_mp.engine.interface import choose, gloo_interface
from tlgc_mp.errors import UsageError

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.77.0.1", "docker0": "172.17.0.1"}


def test_the_one_that_routes_to_the_master() -> None:
    assert choose(INTERFACES, "172.17.0.1") == "docker0"
    assert choose({"lo": "127.0.0.1", "eth0": "10.77.0.1"}, None) == "eth0"


@pytest.mark.parametrize("towards", [None, "127.0.0.1"])
def test_several_are_named_where_nothing_says_which(towards: str | None) -> None:
    with pytest.raises(UsageError, match=r"^GLOO_SOCKET_IFNAME must be set .* use one of eth0, docker0$"):
        choose(INTERFACES, towards)


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_a_name_with_a_loopback_address_or_none(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def look_up(host: str) -> str:
        if address is None:
            raise socket.gaierror
        return address

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(interface, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.77.0.1"})
    assert gloo_interface("127.0.0.1") == "eth0"


def test_a_name_that_others_reach_is_left_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.77.0.1")
    assert gloo_interface("node1") is None


def test_this_machine_has_a_loopback_interface() -> None:
    assert interface._interfaces()["lo"] == "127.0.0.1"
    assert interface._address_towards("127.0.0.1") == "127.0.0.1"
