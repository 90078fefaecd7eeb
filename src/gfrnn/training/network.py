"""How this machine reaches the others: for collectives, which must not guess, and for what is said when they fail."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from gfrnn.training.heartbeat import node_name


def interface_to(address: str) -> tuple[str, str] | None:
    """(name, own address) of the network interface by which packets to `address` leave; None if there is no way.

    Of one of this machine's own addresses: the interface that has it.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name, own
    return None


def choose_interface() -> None:
    """Has gloo use the interface that reaches MASTER_ADDR, unless the environment names another.

    By itself it takes the address that the host's name stands for, which on many machines is a loopback one, and on
    others nothing. NCCL looks for the fastest interface, which need not be the one that MASTER_ADDR is reached by.
    """
    found = interface_to(os.environ["MASTER_ADDR"])
    if found is not None and not ipaddress.ip_address(found[1]).is_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found[0])


def here() -> str:
    """This node, its address and its interface towards MASTER_ADDR, in words."""
    found = interface_to(os.environ["MASTER_ADDR"])
    return f"{node_name()} ({f'{found[1]} on {found[0]}' if found is not None else 'no way there'})"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
