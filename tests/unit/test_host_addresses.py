"""Addresses of both families: where to listen, how to be reached, and how to write it down."""

from __future__ import annotations

import errno
import socket
import time

import pytest
from tests.support.network import WITHOUT_IPV4, WITHOUT_IPV6, in_network, why_not
from tests.support.ports import free_port

from lockstep_runtime.distributed.errors import CommunicatorError
from lockstep_runtime.distributed.join import own_address
from lockstep_runtime.host import addresses

needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not())


def bound(host: str) -> list[str]:
    """The addresses that this stands for here."""
    sockets = addresses.listen(host, free_port())
    found = [str(one.getsockname()[0]) for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [("127.0.0.1", 80, "127.0.0.1:80"), ("fd00::1", 80, "[fd00::1]:80"), ("a-0.a.ns.svc", 7400, "a-0.a.ns.svc:7400"),
     ("fe80::1%eth0", 1, "[fe80::1%eth0]:1")],
)  # fmt: skip
def test_an_address_is_written_so_that_it_can_be_read(host: str, port: int, text: str) -> None:
    assert addresses.join(host, port) == text
    assert addresses.split(text) == (host, port)


def test_what_names_no_port_is_no_address() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        addresses.split("[::1]")


def test_both_families_where_there_are_both() -> None:
    assert bound("localhost") == ["127.0.0.1", "::1"]
    assert bound("::") == ["::"]
    assert bound("127.0.0.2") == ["127.0.0.2"]


@needs_namespaces
def test_one_family_where_there_is_one() -> None:
    def scenario() -> tuple[list[str], str, str, str]:
        return bound("localhost"), addresses.loopback(), addresses.reach("::"), addresses.route_to("fd00::2")

    assert in_network(WITHOUT_IPV4, scenario) == (["::1"], "::1", "::1", "fd00::2")


@needs_namespaces
def test_ipv6_that_is_switched_off_is_not_missed() -> None:
    def scenario() -> tuple[list[str], str, int]:
        port = free_port()
        for one in addresses.listen("::", port):
            one.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=10):
                one.close()
        return bound("localhost"), addresses.loopback(), port

    assert in_network(WITHOUT_IPV6, scenario)[:2] == (["127.0.0.1"], "127.0.0.1")


def test_a_port_that_is_taken_for_one_family_is_taken() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"can't listen on \[::1\]:{port}: Address already in use") as caught:
            addresses.listen("localhost", port)
        assert caught.value.errno == errno.EADDRINUSE


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(OSError, match=r"can't listen on 192\.0\.2\.1:1234: Cannot assign requested address"):
        addresses.listen("192.0.2.1", 1234)


def test_the_way_to_a_host_is_of_its_own_family() -> None:
    assert addresses.route_to("127.0.0.1") == "127.0.0.1"
    assert addresses.route_to("::1") == "::1"
    assert own_address("::1", time.monotonic()) == "::1"
    with pytest.raises(CommunicatorError, match=r"the leader's name nobody\.invalid does not resolve"):
        own_address("nobody.invalid", time.monotonic() - 1)
