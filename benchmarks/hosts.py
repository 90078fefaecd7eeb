"""Two hosts on this machine: network namespaces with a cable between them, as fast as it is told to be (needs root).

For benchmarks to import: no program of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple


class Host(NamedTuple):
    """One end of the cable."""

    name: str
    """Of its namespace; "" for this machine itself."""
    address: str
    interface: str

    @property
    def prefix(self) -> list[str]:
        """What stands before a command to run it there."""
        return ["ip", "netns", "exec", self.name] if self.name else []

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True)


@contextlib.contextmanager
def two_hosts(rate: str | None = None, network: str = "10.77.0") -> Iterator[list[Host]]:
    """Their names stand for no address; they end with the context.

    rate: of the cable each way, as tc has it (1gbit); None: no limit.
    """
    found = [Host(f"gfrnn{os.getpid()}{end}", f"{network}.{n}", "eth0") for n, end in enumerate("ab", 1)]
    try:
        for host in found:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        first, second = found
        first.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for host in found:
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.ip("link", "set", "lo", "up")
            if rate is not None:
                limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                subprocess.run(["tc", "-n", host.name, "qdisc", "add", "dev", "eth0", *limit], check=True)
        yield found
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "del", host.name], check=False, stderr=subprocess.DEVNULL)
