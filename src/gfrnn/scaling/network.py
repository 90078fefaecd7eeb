"""What a collective takes: latency and bandwidth of two links, and the algorithms that use them.

Sending n bytes takes a + n / b (Hockney): a is a link's latency, b its bytes/s, each way at once. W processes lie
evenly on N nodes, g = W / N on each. `intra` links those of a node, `inter` the nodes: its b is one process' share when
all g send, so that a single stream has g b. Flat algorithms take their steps over the slowest link that they cross: the
larger a, the smaller of b and g b. For messages of n bytes (volume.py's):

    ring        all-gather, reduce-scatter   (W - 1) (a + n / W b)         Thakur, Rabenseifner, Gropp 2005
                all-reduce                   both, twice that              Patarasuk, Yuan 2009; gloo, NCCL
                reduce                       reduce-scatter, then a gather at the owner: twice that; Rabenseifner 2004
                broadcast                    the cheaper of log2 W (a + n / b) and scatter with all-gather, twice that;
                                             Chan, Heimlich, Purkayastha, van de Geijn 2007
    tree        all-reduce                   2 (D + n / b)                 two trees, each for half of the message,
                reduce, broadcast            D + n / b                     pipelined; Sanders, Speck, Traeff 2009; NCCL
                                             with D = a log2 g in a node and a log2 N between nodes
    two levels  all-reduce                   reduce-scatter in the node, all-reduce of n / g between nodes (ring or
                                             tree), all-gather in the node
                all-gather, reduce-scatter   of n / g between nodes, of n in the node; Chan et al. 2007

A library has some of these and takes the cheapest; gloo has rings alone. On top come a time per call, which nothing
avoids (a kernel launch, Python, the library's own set-up), and a factor for each kind that is slower than its theory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gfrnn.scaling.messages import Message

KINDS = ("all_reduce", "reduce", "all_gather", "reduce_scatter", "broadcast")
GLOO = ("ring",)
NCCL = ("ring", "tree", "two levels")


@dataclass(frozen=True)
class Link:
    latency: float
    """Seconds of a message without content."""
    bytes_per_second: float
    """Each way, for one process."""

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bytes_per_second


@dataclass(frozen=True)
class Network:
    """Links, what a library makes of them, and how well all of it is known."""

    intra: Link
    inter: Link
    call_seconds: float = 0.0
    """Of every call of a collective."""
    factors: dict[str, float] = field(default_factory=dict)
    """By kind, on its theory; 1 where it is missing."""
    algorithms: tuple[str, ...] = NCCL
    covariance: NDArray[np.float64] | None = None
    """Of `constants`, [C, C]; None: they are taken as exact."""
    spread: float = 0.0
    """Standard deviation of the relative errors of what they were fitted to."""
    assumed: tuple[str, ...] = ()
    """Constants that the sweep did not show: a link's are the other link's, a call takes no time of its own."""
    largest_world: int = 1
    """Processes of the largest collective that they were fitted to."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constants."""
        links = ("intra latency", "intra seconds a byte", "inter latency", "inter seconds a byte")
        return ("call", *links, *self.factors)

    @property
    def constants(self) -> NDArray[np.float64]:
        """In which a collective's time grows: seconds, seconds a byte, and factors."""
        links = [(link.latency, 1 / link.bytes_per_second) for link in (self.intra, self.inter)]
        return np.array([self.call_seconds, *links[0], *links[1], *self.factors.values()])

    def with_constants(self, constants: Sequence[float] | NDArray[np.float64]) -> Network:
        call, intra, intra_byte, inter, inter_byte, *factors = (float(value) for value in constants)
        return dataclasses.replace(
            self,
            intra=Link(intra, 1 / max(intra_byte, 1e-15)),
            inter=Link(inter, 1 / max(inter_byte, 1e-15)),
            call_seconds=call,
            factors=dict(zip(self.factors, factors, strict=True)),
        )

    @property
    def errors(self) -> dict[str, float]:
        """Standard deviation of each constant."""
        if self.covariance is None:
            return dict.fromkeys(self.names, 0.0)
        return dict(zip(self.names, (float(x) for x in np.sqrt(np.diag(self.covariance))), strict=True))

    def seconds(self, kind: str, size: float, world_size: int, nodes: int = 1) -> float:
        """One call's, of a message of `size` bytes."""
        if world_size == 1:
            return 0.0
        return self.call_seconds + self.factors.get(kind, 1.0) * min(
            self.by_algorithm(kind, size, world_size, nodes).values()
        )

    def by_algorithm(self, kind: str, size: float, world_size: int, nodes: int = 1) -> dict[str, float]:
        """Seconds by theory of the algorithms there are for this kind, without call and factor."""
        per_node = world_size // nodes
        used = [self.intra] * (per_node > 1)
        used += [Link(self.inter.latency, per_node * self.inter.bytes_per_second)] * (nodes > 1)
        flat = Link(max(link.latency for link in used), min(link.bytes_per_second for link in used))
        depth = _log2(per_node) * self.intra.latency + _log2(nodes) * self.inter.latency
        found = {"ring": _ring(kind, size, flat, world_size)}
        if kind in ("all_reduce", "reduce", "broadcast"):
            found["tree"] = (2 if kind == "all_reduce" else 1) * (depth + size / flat.bytes_per_second)
        if min(per_node, nodes) > 1 and kind in ("all_reduce", "all_gather", "reduce_scatter"):
            inside, between = _ring(kind, size, self.intra, per_node), size / per_node
            outside = _ring(kind, between, self.inter, nodes)
            if kind == "all_reduce" and "tree" in self.algorithms:
                tree = 2 * (_log2(nodes) * self.inter.latency + between / self.inter.bytes_per_second)
                outside = min(outside, tree)
            found["two levels"] = inside + outside
        return {name: seconds for name, seconds in found.items() if name in self.algorithms}

    def total(self, sent: Iterable[Message], world_size: int, nodes: int = 1) -> float:
        """Seconds of messages one after another."""
        return sum(m.calls * self.seconds(m.kind, m.bytes, world_size, nodes) for m in sent)

    def gradient(self, sent: Iterable[Message], world_size: int, nodes: int = 1) -> NDArray[np.float64]:
        """Of `total` by the constants."""
        sent, at = list(sent), self.constants
        base, found = self.total(sent, world_size, nodes), np.zeros(len(at))
        for index, value in enumerate(at):
            step = 1e-4 * value or 1e-12
            moved = at.copy()
            moved[index] += step
            found[index] = (self.with_constants(moved).total(sent, world_size, nodes) - base) / step
        return found

    def deviation(self, sent: Iterable[Message], world_size: int, nodes: int = 1) -> float:
        """Standard deviation of `total`, from the constants'."""
        if self.covariance is None:
            return 0.0
        slope = self.gradient(sent, world_size, nodes)
        variance = float(slope @ self.covariance @ slope)
        return math.sqrt(max(variance, 0.0))


def _log2(count: int) -> int:
    return math.ceil(math.log2(count))


def _ring(kind: str, size: float, link: Link, count: int) -> float:
    once = (count - 1) * link.seconds(size / count)
    if kind in ("all_gather", "reduce_scatter"):
        return once
    if kind == "broadcast":
        return min(2 * once, _log2(count) * link.seconds(size))
    if kind not in KINDS:
        raise ValueError(f"no theory of {kind}; there is one of {', '.join(KINDS)}")
    return 2 * once
