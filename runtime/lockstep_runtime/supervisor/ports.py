"""The ports of a pod: bound, or tried, before anything is started, so that a mistake shows at once."""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from lockstep_runtime.config import ServeConfig, UsageError
from lockstep_runtime.host.addresses import listen, listen_somewhere


@dataclass(frozen=True, slots=True)
class Ports:
    """`status`: the sockets of the status port, bound. `kept`: what keeps the engine's ports from others."""

    config: ServeConfig  # with the ports as they are
    status: list[socket.socket]
    kept: list[socket.socket]


def open_ports(config: ServeConfig, *, may_choose: Collection[str] = ()) -> Ports:
    """Bind the status port; try the engine's, so that a mistake shows at once to who gave the command. An operator
    reads the status, where the engine says it, and ranks keep what they have loaded meanwhile.

    Args:
        may_choose: fields of the configuration (`bus_port`, `status_port`) that may become another port where theirs
            is taken: nobody named it, and nobody on another machine must know it.

    Raises:
        UsageError: a port is taken.
    """
    kept: list[socket.socket] = []
    has_operator = bool(config.spec_revision)
    if config.is_leader and not has_operator:
        _try(config.host, config.api_port, "--port")
        if "bus_port" in may_choose:
            port, kept = _bind_some(config.host, config.bus_port, "--bus-port")
            config = msgspec.structs.replace(config, bus_port=port)
        else:
            _try(config.host, config.bus_port, "--bus-port")
    if "status_port" in may_choose:
        port, status = _bind_some(config.host, config.status_port, "--status-port")
        return Ports(msgspec.structs.replace(config, status_port=port), status, kept)
    return Ports(config, _bind(config.host, config.status_port, "--status-port"), kept)


def _bind(host: str, port: int, flag: str) -> list[socket.socket]:
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(f"{error.strerror}; choose another with {flag}") from error


def _try(host: str, port: int, flag: str) -> None:
    for one in _bind(host, port, flag):
        one.close()


def _bind_some(host: str, preferred: int, flag: str) -> tuple[int, list[socket.socket]]:
    try:
        return listen_somewhere(host, preferred)
    except OSError as error:
        raise UsageError(f"{error.strerror}; choose a port with {flag}") from error
