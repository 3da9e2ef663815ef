"""Addresses of both families: where to listen, how to be reached, and how to write it down."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import random
import socket
from collections.abc import Iterator, Sequence
from typing import Final

LOOPBACK: Final = "localhost"  # both families', whatever a name service says of it
EVERY_ADDRESS: Final = "::"  # of both families
_LOOPBACKS: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_NO_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPFNOSUPPORT, errno.ENOPROTOOPT})
FREE_PORTS: Final = range(20_000, 32_000)  # below those that the kernel gives to connections
_ATTEMPTS: Final = 100

Family = socket.AddressFamily


def listen(host: str, port: int, *, reuse: bool = True) -> list[socket.socket]:
    """Bound sockets, not listening yet: one for each address that the host stands for.

    `localhost` is the loopback of whichever families there are; `::` is every address of both, or of IPv4 where there
    is no IPv6. `reuse`: also while connections of an earlier listener linger; off, the port is nobody else's to bind.

    Raises:
        OSError: the port is taken, or the address is not ours; `strerror` is a sentence.
    """
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in _addresses(host):
        try:
            bound.append(_bind(family, address, port, reuse=reuse))
        except OSError as error:
            if error.errno in _NO_FAMILY and host in (LOOPBACK, EVERY_ADDRESS):
                missing = error
                continue
            _close(bound)
            message = f"can't listen on {join(address, port)}: {error.strerror}"
            raise OSError(error.errno, message) from error
        if host == EVERY_ADDRESS:
            break
    if not bound:
        raise OSError(missing.errno if missing else 0, f"can't listen on {join(host, port)}: there is no such address")
    return bound


def listen_somewhere(host: str, preferred: int) -> tuple[int, list[socket.socket]]:
    """This port, or a free one where it is taken; bound so that nobody takes it who does not reuse addresses.

    Raises:
        OSError: there is no free port, or the address is not ours.
    """
    problem: OSError | None = None
    for port in (preferred, *random.sample(FREE_PORTS, _ATTEMPTS)):
        try:
            bound = listen(host, port, reuse=False)
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRINUSE:
                break
            continue
        for one in bound:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # who it is kept for may bind it as well
        return port, bound
    raise problem or OSError(errno.EADDRINUSE, "there is no free port")


def loopback() -> str:
    """The address by which this machine reaches itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1"
    return "::1"


def reach(host: str) -> str:
    """Where a process of this machine finds who listens on `host`."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    return loopback() if host in (LOOPBACK, EVERY_ADDRESS) else host


def route_to(host: str) -> str:
    """The address of this machine on the way to the host: of the first of its addresses to which there is one.

    A link-local address counts last: it means nothing to who does not know by which link.

    Raises:
        OSError: the name does not resolve, or there is no way to any of its addresses.
    """
    problem: OSError | None = None
    found = []
    for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # UDP: chooses a route, sends nothing
                found.append(str(probe.getsockname()[0]))
        except OSError as error:
            problem = error
    if not found:
        raise problem or OSError(errno.EHOSTUNREACH, f"there is no way to {host}")
    return min(found, key=lambda one: ipaddress.ip_address(one.partition("%")[0]).is_link_local)


def join(host: str, port: int) -> str:
    """`host:port`, with brackets around an address of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(text: str) -> tuple[str, int]:
    """The reverse of `join`.

    Raises:
        ValueError: it is not written so.
    """
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def family_of(address: str) -> Family:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _addresses(host: str) -> Iterator[tuple[Family, str]]:
    if host == LOOPBACK:
        yield from _LOOPBACKS
    elif host == EVERY_ADDRESS:
        yield from ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0"))
    else:
        infos = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        yield from dict.fromkeys((family, str(address[0])) for family, _, _, _, address in infos)


def _bind(family: Family, address: str, port: int, *, reuse: bool) -> socket.socket:
    # asyncio sets TCP_NODELAY only on sockets that say TCP; without it an answer's last part waits 40 ms for an ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


def _close(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        one.close()
